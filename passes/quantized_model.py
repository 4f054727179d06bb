"""A whole model with its linear layers held as codes: `reparameterize(model, ..., bits=3)`.

The pass `shift_add_linear` decides layer by layer inside one graph; this decides for the model, and
has time: layers are calibrated one after the other on what the quantised ones before them give
(`sequence`), widths are given where they count (`allocate`), and what surrounds the codes is tuned
so that the whole says what it said before (`distil`). What comes back is an ordinary module whose
linear layers are `QuantizedLinear`: run it, save it (`ridgeline.save_quantized`), or hand it to
`ridgeline.optimize`, which puts kernels in their place.

Sources: You et al., ShiftAddLLM (binary coding, multi-objective fit, mixed widths); GPTQ.
"""

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ridgeline.ir.errors import RidgelineError
from ridgeline.passes.copy_model import copy_model
from ridgeline.passes.preparation import rotation
from ridgeline.passes.quantizable import Requantized, quantizable
from ridgeline.passes.quantization import (
    Codec,
    QuantizationError,
    QuantizedLinear,
    QuantizedWeight,
    bits_per_weight,
    quantize,
)
from ridgeline.passes.quantization.allocate import allocate, allocate_within, measure
from ridgeline.passes.quantization.calibrate import Batch
from ridgeline.passes.quantization.data import calibration_batches, spread
from ridgeline.passes.quantization.distil import Recipe, distil
from ridgeline.passes.quantization.grid import checked
from ridgeline.passes.quantization.layer import replace_modules
from ridgeline.passes.quantization.resume import Results
from ridgeline.passes.quantization.sequence import quantize_in_sequence, weight_of

HESSIAN_WINDOWS, SENSITIVITY_WINDOWS = 32, 8
"""Windows that Hessians and sensitivities are measured on; distillation draws from all."""

MIXED = (2, 3, 4)
"""Widths that are given out."""

PREPARATION_WINDOWS, JUDGING_WINDOWS = 3, 2
"""Windows that folds are chosen on, and others by which prepared and plain weights are compared."""

Preparation = Literal["auto", "rotation"]
Hessian = Literal["full", "diagonal"]

RECIPES = {
    2: Recipe(steps=60, scale_rate=5e-3),
    3: Recipe(steps=40),
    4: Recipe(steps=24, scale_rate=1e-3, norm_rate=1e-4),
}
"""Distillation by width; the fewer bits, the more there is to win."""


class Progress(Protocol):
    """Called with (stage, what was done last, steps done, steps in all)."""

    def __call__(self, stage: str, what: str, done: int, total: int) -> None: ...


def binary_codec(bits: int) -> Codec:
    """What ShiftAdd layers are held in: 2.25, 3.33 and 4.28 bits per weight, scales included."""
    return Codec(bits, 288 if bits == 4 else 192, "binary", centred=False)


def uniform_codec(bits: int) -> Codec:
    """Scale and minimum per 128 weights: 4.25 bits per weight."""
    return Codec(bits, 128, "minimum")


def shift_add_linear(model: nn.Module, **options: Any) -> nn.Module:
    """Binary-coded layers of 2, 3 or 4 bits; options as of `quantized_model`."""
    return quantized_model(model, codec_of=binary_codec, **options)


def quantized_linear(model: nn.Module, **options: Any) -> nn.Module:
    """Layers of 4 or 8 bits, scale and minimum per group; options as of `quantized_model`, but for
    mixed widths, which go down to codes that this form does not have."""
    for name in ("average_bits", "divergence"):
        if options.get(name) is not None:
            raise QuantizationError(
                f"{name} gives out 2, 3 and 4 bits, and quantized_linear has 4 and 8; use the"
                " method shift_add_linear, or pass bits="
            )
    return quantized_model(model, codec_of=uniform_codec, **options)


@torch.inference_mode(False)
@torch.enable_grad()
def quantized_model(
    model: nn.Module,
    *,
    codec_of: Any,
    bits: int | None = None,
    average_bits: float | None = None,
    divergence: float | None = None,
    codec: Codec | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    ignore: Sequence[str] = (),
    hessian: Hessian = "full",
    preparation: Preparation | None = None,
    distillation: Recipe | bool = True,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """A copy of `model` whose linear layers are `QuantizedLinear`; `model` is never changed.

    Exactly one of
    bits: code bits of every layer;  average_bits: code bits per weight, on average, given to the
    layers where they count;  divergence: the fewest bits whose expected divergence (mean KL of
    the outputs, before distillation) is at most this;  codec: a codec of one's own for every layer.
    calibration, tokenizer: a text with its tokenizer, token ids, or batches; see
        `calibration_batches`.
    ignore: patterns of module paths that stay. Layers whose weight is an embedding's too, layers
        outputs of which are the model's own (`get_output_embeddings`) and small ones stay anyway.
    hessian: of a layer's inputs, "full" to let columns make up for each other's errors, or its
        "diagonal", each column for itself: for few tokens, which tell little of more than that.
    preparation: "rotation" for rotations and scales folded into the weights first, exact in real
        arithmetic (`ridgeline.passes.preparation`); "auto" for the better of that and the weights
        as they are, by the harm that coding does to them on windows no fold was chosen on.
    distillation: a recipe, True for the one of the width, False for none.
    folder: results are kept there layer by layer, and a run that was interrupted goes on from them.

    Raises QuantizationError for unusable arguments and for weights that are NaN or infinite, before
    anything is done. The new model's `report` says what each layer became.
    """
    given = [x for x in (bits, average_bits, divergence, codec) if x is not None]
    if len(given) != 1:
        raise QuantizationError(
            f"pass exactly one of bits, average_bits, divergence and codec; found {len(given)}"
        )
    if calibration is None:
        raise QuantizationError(
            "a quantised model is fitted to how it is used; pass calibration=, such as a text and"
            " tokenizer="
        )
    for name, value in (("average_bits", average_bits), ("divergence", divergence)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise QuantizationError(f"{name} is {value!r}; pass a number")
    if average_bits is not None and not MIXED[0] <= average_bits <= MIXED[-1]:
        raise QuantizationError(
            f"average_bits is {average_bits!r}; choose {MIXED[0]} to {MIXED[-1]}, as 3.0"
        )
    if preparation is not None and preparation not in get_args(Preparation):
        raise QuantizationError(
            f"preparation is {preparation!r}; choose one of {get_args(Preparation)}, or None"
        )
    if hessian not in get_args(Hessian):
        raise QuantizationError(f"hessian is {hessian!r}; choose one of {get_args(Hessian)}")
    batches = calibration_batches(calibration, tokenizer, model=model)
    names, stay = quantizable(model, ignore)
    for name in names:
        checked(weight_of(model.get_submodule(name)))
    say = progress or (lambda stage, what, done, total: None)
    given_model = model
    if preparation is not None:
        width = codec or codec_of(bits or round(average_bits or MIXED[1]))
        model, line = _prepared(model, preparation, names, stay, batches, width, say)
        stay.append(line)
    if average_bits is not None or divergence is not None:
        harm, shapes = _harm(model, names, batches, codec_of, say)
        codecs = (
            allocate(harm, shapes, average_bits)
            if average_bits is not None
            else allocate_within(harm, shapes, divergence or 0.0)
        )
    else:
        chosen = codec or codec_of(bits)
        codecs = dict.fromkeys(names, chosen)
    results = Results(folder, _fingerprint(model, codecs, batches, hessian))
    found = _in_sequence(model, codecs, batches, hessian, results, say)
    new = _assembled(model, found)
    recipe = _recipe(distillation, codecs)
    if recipe is not None:
        distil(
            new,
            copy_model(given_model).eval(),
            batches,
            recipe,
            progress=lambda done, total, loss: say("distil", f"loss {loss:.4f}", done, total),
        )
    lines = [Requantized(name, new.get_submodule(name).quantized.codec) for name in names]
    new.report = (*lines, *stay)  # pyright: ignore[reportAttributeAccessIssue]
    return new


def summary(model: nn.Module) -> str:
    """What a reparameterised model holds, in a sentence."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    widths = sorted({layer.quantized.bits for layer in layers})
    kinds = sorted({layer.quantized.scheme for layer in layers})
    return (
        f"{len(layers)} layers of {', '.join(map(str, widths))} bits ({', '.join(kinds)}),"
        f" {bits_per_weight(model):.2f} bits per weight with scales"
    )


def _prepared(
    model: nn.Module,
    preparation: Preparation,
    names: list[str],
    stay: list[Requantized],
    batches: Sequence[Batch],
    codec: Codec,
    say: Progress,
) -> tuple[nn.Module, Requantized]:
    """The model to quantise, `model` or one of other weights that computes the same, and why."""
    few = spread(batches, PREPARATION_WINDOWS)
    ignored = [line.path for line in stay]
    say("prepare", "rotations and scales", 0, 2)
    try:
        new = rotation(copy_model(model).eval(), calibration=few, codec=codec, ignore=ignored)
    except RidgelineError as error:
        if preparation == "rotation":
            raise
        return model, Requantized("preparation", None, f"none: {error}")
    folds = sum(bool(line.what) for line in new.report)  # pyright: ignore
    say("prepare", f"{folds} folds", 1, 2)
    if preparation == "rotation":
        return new, Requantized("preparation", None, f"{folds} rotations and scales folded")
    others = [b for b in batches if not any(b is f for f in few)] or few
    plain, turned = (
        sum(
            harm[codec]
            for harm in measure(
                copy.deepcopy(m).eval(), names, spread(others, JUDGING_WINDOWS), lambda _: [codec]
            ).values()
        )
        for m in (model, new)
    )
    better = turned < plain
    reason = (
        f"{folds} rotations and scales {'folded' if better else 'found and left out'}: expected"
        f" harm of {codec} with them {turned:.4g}, without {plain:.4g}"
    )
    say("prepare", reason, 2, 2)
    return new if better else model, Requantized("preparation", None, reason)


def _harm(
    model: nn.Module,
    names: list[str],
    batches: Sequence[Batch],
    codec_of: Any,
    say: Progress,
) -> tuple[dict[str, dict[Codec, float]], dict[str, tuple[int, int]]]:
    """What each layer's codecs of MIXED widths cost the model, and the layers' shapes."""
    offered = [codec_of(b) for b in MIXED]
    harm = measure(
        copy.deepcopy(model).eval(),
        names,
        spread(batches, SENSITIVITY_WINDOWS),
        lambda name: offered,
        progress=lambda done, total: say("sensitivity", f"{done} layers", done, total),
    )
    shapes = {name: tuple(weight_of(model.get_submodule(name)).shape) for name in names}
    return harm, shapes  # pyright: ignore[reportReturnType]


def _in_sequence(
    model: nn.Module,
    codecs: dict[str, Codec],
    batches: Sequence[Batch],
    kept: Hessian,
    results: Results,
    say: Progress,
) -> dict[str, QuantizedWeight]:
    def quantizer(name: str, weight: Tensor, hessian: Tensor) -> QuantizedWeight:
        seen = hessian if kept == "full" else hessian.diagonal().diag()
        return quantize(weight, codecs[name], seen)

    working = copy.deepcopy(model).eval()
    if getattr(getattr(working, "config", None), "use_cache", False):
        working.config.use_cache = False  # a cache would keep every window's keys and values
    return quantize_in_sequence(
        working,
        list(codecs),
        spread(batches, HESSIAN_WINDOWS),
        quantizer,
        known=results.known,
        done=results.add,
        progress=lambda name, done, total: say("quantise", name, done, total),
    )


def _assembled(model: nn.Module, found: dict[str, QuantizedWeight]) -> nn.Module:
    """A copy of `model` with the layers in `found` replaced, and parameters of its own."""
    new = copy_model(model)
    old = {name: new.get_submodule(name) for name in found}
    replace_modules(new, {old[n]: QuantizedLinear(w, old[n].bias) for n, w in found.items()})
    own: dict[int, nn.Parameter] = {}
    for module in new.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            copied = own.setdefault(id(p), nn.Parameter(p.detach().clone(), False))
            setattr(module, name, copied)
    return new.eval()


def _recipe(distillation: Recipe | bool, codecs: dict[str, Codec]) -> Recipe | None:
    if isinstance(distillation, Recipe):
        return distillation
    narrowest = min(codec.bits for codec in codecs.values())
    return RECIPES.get(narrowest) if distillation else None


def _fingerprint(
    model: nn.Module, codecs: dict[str, Codec], batches: Sequence[Batch], hessian: Hessian
) -> str:
    """Of weights, codecs and data: results of one run are of no use to another."""
    digest = hashlib.sha256(repr((hessian, sorted(codecs.items(), key=str))).encode())
    for value in [*model.state_dict().values(), *tree_leaves(batches)]:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
