"""Which layer gets how many bits: the widths that cost the model least, under a budget
of memory, or what costs the least memory under a budget of harm.

Law: to second order in the error E_l = W_l - Ŵ_l of every layer, the divergence of the model's
outputs from what they were is the sum over layers of

    D_l(b) = 1/2 sum_n f[n] (E H Eᵀ)[n,n] / 2,     f[n] = mean over tokens of (∂L/∂y[n])²

with H = 2/n sum x xᵀ, L = -log p of a token drawn from the model's own distribution (so f is the
diagonal of the Fisher information of the layer's outputs, averaged over tokens; of a model without
logits, of outputs observed with an error of 1), and E at b bits measured by encoding a sample of
the layer's rows. Then, by the chooser of `ridgeline.cost_model`,

    minimise sum_l D_l(b_l)     subject to   sum_l bits_l(b_l) <= budget,     or
    minimise sum_l bits_l(b_l)  subject to   sum_l D_l(b_l) <= budget.

Layers are not interchangeable: a value projection is a tenth of the weights and half of the harm.
Source: OBD/HAWQ (second-order sensitivity); the published ShiftAddLLM criterion ranks layers by the
spread of W/diag U and gives one threshold instead of an optimum.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ridgeline.cost_model import Option, solve
from ridgeline.passes.quantization.calibrate import (
    Batch,
    accumulate,
    call,
    main_output,
    shared_inputs,
)
from ridgeline.passes.quantization.codec import Codec, QuantizationError
from ridgeline.passes.quantization.descent import descend, factors_of
from ridgeline.passes.quantization.sequence import Chain, weight_of

SAMPLE_ROWS = 48
"""Rows of a layer that are encoded to measure its error at a width: every N/48-th."""

Progress = Callable[[int, int], None]


Harm = Mapping[str, Mapping[Codec, float]]
"""Layer -> codec -> D_l."""


def allocate(
    harm: Harm, shapes: Mapping[str, tuple[int, int]], average_bits: float
) -> dict[str, Codec]:
    """The codec of each layer, of least total harm within `average_bits` bits of code per weight.

    shapes: layer -> (N, K). Raises QuantizationError where not even the narrowest codecs fit.
    """
    narrow = {name: min(forms, key=lambda c: c.bits) for name, forms in harm.items()}
    weights = {name: n * k for name, (n, k) in shapes.items()}
    base = sum(narrow[name].bits * weights[name] for name in harm)
    budget = int(average_bits * sum(weights.values()))
    if base > budget:
        raise QuantizationError(
            f"average_bits is {average_bits}; the narrowest codecs offered take"
            f" {base / sum(weights.values()):.2f}: raise it, or offer fewer bits"
        )

    def option(name: str, codec: Codec) -> dict[str, Any]:
        more = (codec.bits - narrow[name].bits) * weights[name]
        return {"gain": harm[name][narrow[name]] - harm[name][codec], "memory_bytes": more}

    return _chosen(harm, narrow, option, capacity_bytes=budget, base_memory_bytes=base)


def allocate_within(
    harm: Harm, shapes: Mapping[str, tuple[int, int]], divergence: float
) -> dict[str, Codec]:
    """The codec of each layer, of fewest bits in all with a total harm of at most `divergence`.

    Raises QuantizationError where the widest codecs do more harm than that.
    """
    wide = {name: max(forms, key=lambda c: c.bits) for name, forms in harm.items()}
    least = sum(harm[name][codec] for name, codec in wide.items())
    if least > divergence:
        raise QuantizationError(
            f"divergence is {divergence:.3g}; the widest codecs offered are expected to make"
            f" {least:.3g}: raise it, or offer more bits"
        )

    def option(name: str, codec: Codec) -> dict[str, Any]:
        more = max(0.0, harm[name][codec] - harm[name][wide[name]])
        saved = (wide[name].bits - codec.bits) * shapes[name][0] * shapes[name][1]
        return {"gain": float(saved), "error": more**0.5}  # the chooser adds errors as squares

    return _chosen(harm, wide, option, error_budget=(divergence - least) ** 0.5)


def _chosen(
    harm: Harm,
    start: dict[str, Codec],
    option: Callable[[str, Codec], dict[str, Any]],
    **budget: Any,
) -> dict[str, Codec]:
    """`start`, but for the layers that the chooser gives another codec: one each at most."""
    options, codecs = [], {}
    for name, forms in harm.items():
        others = {f"{name} {codec}": codec for codec in forms if codec is not start[name]}
        for key, codec in others.items():
            codecs[key] = name, codec
            conflicts = frozenset(others) - {key}
            options.append(Option(key, conflicts=conflicts, **option(name, codec)))
    choice = solve(options, **budget)
    return start | dict(codecs[key] for key in choice.chosen)


def measure(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    codecs: Callable[[str], Sequence[Codec]],
    *,
    progress: Progress | None = None,
) -> dict[str, dict[Codec, float]]:
    """D_l of every layer for each codec that `codecs` offers it.

    model: as it is before anything is quantised, with parameters that may be differentiated;
    left as it was.
    """
    fisher = fisher_of(model, names, batches)
    shared = shared_inputs(model, names, batches)
    chain = Chain(model, names, batches)
    found: dict[str, dict[Codec, float]] = {}
    for leader, readers in shared.items():
        chain.advance(leader)
        with chain.resumed():
            hessian = accumulate(model, {leader: readers}, batches, lambda: None, shared.uses)[
                leader
            ]
        factors = factors_of(hessian)
        for name in readers:
            weight = weight_of(model.get_submodule(name)).float()
            picked = torch.arange(0, len(weight), max(1, len(weight) // SAMPLE_ROWS))
            rows, share = weight[picked], fisher[name][picked]
            found[name] = {}
            for codec in codecs(name):
                coded = descend(rows, codec, hessian, rounds=0, factors=factors)
                error = rows - coded.dequantize()
                harm = ((error @ hessian) * error).sum(1) @ share / 4
                found[name][codec] = float(harm) * len(weight) / len(picked)
            if progress is not None:
                progress(len(found), len(names))
    return found


def fisher_of(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """f [N] of every layer: tokens are drawn with a fixed seed."""
    squares: dict[str, Tensor] = {}
    tokens = 0

    def watch(name: str):
        def forward(module: nn.Module, args, output: Tensor) -> None:
            def backward(grad: Tensor) -> None:
                flat = grad.float().flatten(0, -2).square().sum(0)
                squares[name] = squares.get(name, torch.zeros_like(flat)) + flat

            output.register_hook(backward)

        return forward

    def open_graph(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if args[0].requires_grad:
            return None
        # the first layers: nothing before them has a gradient
        return args[0].detach().requires_grad_(), *args[1:]

    draw = torch.Generator().manual_seed(0)
    required = {p: p.requires_grad for p in model.parameters()}
    layers = [(name, model.get_submodule(name)) for name in names]
    handles = [layer.register_forward_pre_hook(open_graph) for _, layer in layers]
    handles += [layer.register_forward_hook(watch(name)) for name, layer in layers]
    try:
        for p in required:
            p.requires_grad_(False)
        for batch in batches:
            output = call(model, batch)
            y, logits = main_output(output)
            rows = y.float().reshape(-1, y.shape[-1] if y.dim() else 1)
            _drawn_loss(rows, logits, draw).backward()
            tokens += len(rows)
    finally:
        for handle in handles:
            handle.remove()
        for p, flag in required.items():
            p.requires_grad_(flag)
    return {name: total / tokens for name, total in squares.items()}


def _drawn_loss(rows: Tensor, logits: bool, draw: torch.Generator) -> Tensor:
    """-log p of tokens drawn from the model's own distribution; of an output that is no logits, its
    product with normal noise, as of an observation with an error of 1."""
    if logits:
        drawn = torch.multinomial(rows.detach().softmax(-1), 1, generator=draw)
        return -rows.log_softmax(-1).gather(1, drawn).sum()
    return (rows * torch.randn(rows.shape, generator=draw)).sum()
