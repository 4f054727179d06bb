"""`reparameterize(model, "rotation")`: the same function in weights that low bits hold better.

Values of attention are turned head by head, so that no channel of theirs is loud; inputs of MLPs
and attention are scaled channel by channel, so that loud channels meet small steps. Both are undone
by a neighbouring weight (`fold`), exact in real arithmetic and proven so (`prove`) before anything
is returned. What comes back is a plain model: nothing is added to what it computes.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ridgeline.ir.capture import capture
from ridgeline.ir.normalize import normalize
from ridgeline.passes.apply import copy_graph
from ridgeline.passes.copy_model import copy_model
from ridgeline.passes.ignore import ignored
from ridgeline.passes.preparation.choose import Outcome, choose
from ridgeline.passes.preparation.fold import Turn, Weights
from ridgeline.passes.preparation.prove import UnprovenError, prove
from ridgeline.passes.preparation.sites import Site, find
from ridgeline.passes.quantization.codec import Codec, QuantizationError
from ridgeline.passes.quantization.data import calibration_batches, spread

CODEC = Codec(3, 192, "binary", centred=False)
"""What folds are chosen for where no codec is named."""
WINDOWS = 8
"""Batches that folds are chosen on, spread over those given."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """One line of a prepared model's report.

    path: the producer and the layers that read it, or a layer whose input stays. what: "turned",
    "scaled by rms^a", or "" where nothing was folded, for `reason`. before, after: the harm D of
    `choose` without and with the fold, None where it was not measured.
    """

    path: str
    what: str = ""
    reason: str = ""
    before: float | None = None
    after: float | None = None

    def __str__(self) -> str:
        measured = "" if self.before is None else f", harm {self.before:.4g} -> {self.after:.4g}"
        return f"{self.path}: {self.what or self.reason}{measured}"


def rotation(
    model: nn.Module,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    codec: Codec = CODEC,
    ignore: Sequence[str] = (),
    seed: int = 0,
) -> nn.Module:
    """A copy of `model` with rotations and scales folded into its weights; `model` stays.

    args, kwargs: one call of the model, by which it is captured, in its current mode, and on which
        the proof runs, tokens more than one; without it the first calibration batch.
    calibration, tokenizer: as of `calibration_batches`. With it a site gets what harms the model
        least once it is held in `codec`, which may be nothing. Without it all sites that may be
        turned are turned, and none is scaled.
    ignore: patterns of module paths that stay, with all that would be folded into them.
    seed: of the rotations' signs.

    A key/value cache of the new model holds other values: do not go on with one that the old model
    filled. Raises QuantizationError where neither a call nor calibration is given, CaptureError
    for a model that cannot be captured, UnprovenError where the proof fails.
    The new model's `report` holds a `Prepared` for each site, and for each layer whose input stays.
    """
    batches = None
    if calibration is not None:
        batches = calibration_batches(calibration, tokenizer, model=model)
    args, kwargs = _call(model, args, kwargs, batches)
    program = capture(model, args, kwargs, dynamic=False).program
    captured, _ = copy_graph(program.module)
    found, refused = find(normalize(program.module), model)
    sites = [s for s in found if not any(ignored(p, ignore) for p in s.paths)]
    refused += [(str(s), "listed in ignore=") for s in found if s not in sites]
    if batches is None or not sites:
        weights, outcomes = _turned(model, sites, seed)
    else:
        weights, outcomes = choose(model, sites, spread(batches, WINDOWS), codec, seed)
    if weights.changed:
        prove(captured, program.inputs, weights.changed)
    new = _assembled(model, weights)
    lines = [
        Prepared(str(o.site), o.chosen, before=o.before, after=o.after)
        if o.fold is not None
        else Prepared(str(o.site), "", o.chosen, o.before, o.after)
        for o in outcomes
    ]
    stay = [Prepared(path, "", why) for path, why in refused]
    new.report = (*lines, *stay)  # pyright: ignore[reportAttributeAccessIssue]
    return new


def _call(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    batches: Sequence[Any] | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call to capture, without a cache, whose values would be an output."""
    if isinstance(args, Tensor):
        args = (args,)
    args, kwargs = tuple(args), dict(kwargs or {})
    if not args and not kwargs:
        if batches is None:
            raise QuantizationError(
                "sites are found in one call of the model: pass args=(inputs,), or calibration="
            )
        first = batches[0]
        kwargs = dict(first) if isinstance(first, Mapping) else {}
        args = () if kwargs else (first,) if isinstance(first, Tensor) else tuple(first)
    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs.setdefault("use_cache", False)
    return args, kwargs


def _turned(model: nn.Module, sites: Sequence[Site], seed: int) -> tuple[Weights, list[Outcome]]:
    """Every rotation and no scale: what can be done without data."""
    weights, outcomes = Weights(model), []
    generator = torch.Generator().manual_seed(seed)
    for site in sites:
        fold = Turn.drawn(site, generator) if site.turned else None
        if fold is not None:
            weights.fold(site, fold)
        said = "turned" if fold is not None else "scales are chosen on data: pass calibration="
        outcomes.append(Outcome(site, fold, said, None, None))
    return weights, outcomes


def _assembled(model: nn.Module, weights: Weights) -> nn.Module:
    new = copy_model(model)
    for name, value in weights.changed.items():
        path, _, own = name.rpartition(".")
        held = model.get_parameter(name)
        folded = value.to(held).contiguous()
        if not bool(folded.isfinite().all()):
            raise UnprovenError(f"{name} overflows {held.dtype}; pass the model in a wider dtype")
        setattr(new.get_submodule(path), own, nn.Parameter(folded, held.requires_grad))
    return new
