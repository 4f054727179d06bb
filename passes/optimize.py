"""`optimize`: rewrite a model for one target and account for every step."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ridgeline.cost_model import Target
from ridgeline.ir.program import Phase
from ridgeline.passes.all import PASSES
from ridgeline.passes.base import Pass
from ridgeline.passes.compiler import Objective, OptimizeError, check_max_graphs
from ridgeline.passes.drop_in import OptimizedModule, optimized_copy
from ridgeline.passes.forced_bits import forced
from ridgeline.passes.ignore import check_ignore
from ridgeline.passes.parallel.own_collectives import MeshCompiler
from ridgeline.passes.parallel.rewrite import When
from ridgeline.passes.quantizable import is_linear, unfit
from ridgeline.passes.quantization import HessiansOnDemand
from ridgeline.passes.quantization.data import calibration_batches
from ridgeline.passes.shift_add_vit import freeze
from ridgeline.passes.workload import Number, Workload


def optimize(
    model: nn.Module,
    args: Sequence[Any] | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    target: str | Target = "native",
    tolerance: float = 0.0,
    objective: Objective = "latency",
    calibration: Any = None,
    tokenizer: Any = None,
    bits: int | None = None,
    average_bits: float | None = None,
    phase: Phase | None = None,
    batch: Number = None,
    context: Number = None,
    fuse: When | None = None,
    ignore: Sequence[str] = (),
    passes: Sequence[Pass] = PASSES,
    lowering: Literal["inductor", "eager"] = "inductor",
    strict: bool = False,
    max_graphs: int = 16,
) -> OptimizedModule:
    """Return a drop-in copy of `model`, rewritten for `target`; `model` itself is never changed.

    args, kwargs: example inputs, captured at once; without them each kind of call (prefill,
        decode, ...) is captured when it first happens.
    target: a name from `ridgeline.cost_model.target_names()`, a TOML file, or "native".
    tolerance: relative Frobenius error of the outputs that approximate rewrites may spend together;
        0 allows only exact and reassociating ones.
    objective: what to make small: "latency", "memory", "energy" or "eflops".
    calibration: what weights are quantised for: a text with its `tokenizer`, token ids, or batches
        (a tensor, a tuple of arguments or a dict of keyword arguments each); without it they are
        quantised without data, and never binary-coded.
    bits: 2, 3, 4 or 8 for every linear layer but the head, whatever the error: the model is
        reparameterised before it is captured (`ridgeline.reparameterize`), in the codec that the
        cost model finds better on the target, and its errors count from there on.
    average_bits: the same with widths of 2 to 4 given to the layers where they count.
    batch, context: what to choose the rewrites for, where the calls to come differ from those that
        are captured: sequences at once, and tokens, of a prefill those of the call, of a decode
        step those of before. A number is for every phase, or for `phase` ("prefill", "decode" or
        "forward") alone; a dict as ``{"prefill": 1, "decode": 64}`` gives each its own. One result
        holds the graphs of all phases. A size that a graph has fixed decides as it is, which the
        plan says; shape and numbers of the example inputs do not change.
    fuse: for a model that sends things in its forward, on ranks of torch.distributed: whether norms
        move to a shard of the tokens, as `ridgeline.parallelize` takes it. Other than "never", it
        states that the inputs, and values between collectives, are the same on all ranks; where
        they are not, results are wrong. None keeps norms where they are. All ranks call alike.
    ignore: patterns of module paths to leave alone, as ``["lm_head", "*.k_proj"]``.
    lowering: "inductor" compiles what is left of the graph; "eager" runs it op by op.
    strict: raise where a call cannot be captured, instead of running the original code and
        saying so.
    max_graphs: how many captured graphs are kept; beyond it the least recently used is given up.

    A model of `ridgeline.reparameterize` in eval mode has its shift layers packed into codes; train
    the model that was passed, and optimize it again, where they are to change.

    In eval mode the result is for inference: no gradient reaches the parameters, and inputs get
    theirs only where they require it. Call `train()` to train.

    The result's `plan` lists every decision. Raises `OptimizeError` for unusable arguments,
    `ridgeline.passes.workload.WorkloadError` for a phase, batch or context that makes no sense,
    `ridgeline.cost_model.UnknownTarget`, and with `strict` `ridgeline.ir.capture.CaptureError`.
    """
    if not isinstance(model, nn.Module):
        raise OptimizeError(f"model is {type(model).__name__}; pass a torch.nn.Module")
    if args is not None and not isinstance(args, list | tuple):
        raise OptimizeError(f"args is {type(args).__name__}; pass a tuple, as (x,)")
    check_max_graphs(max_graphs)
    forced_bits = bits is not None or average_bits is not None
    compiler = MeshCompiler(
        target,
        fuse=fuse,
        tolerance=tolerance,
        objective=objective,
        passes=passes,
        ignore=ignore,
        lowering=lowering,
        hessians={} if forced_bits else hessians_of(model, calibration, tokenizer),
        workload=Workload(batch, context, phase),
    )
    check_ignore(model, compiler.ignore, OptimizeError)
    if forced_bits:
        model, said = forced(
            model, compiler.target, bits, average_bits, calibration, tokenizer, compiler.ignore
        )
        compiler.plan.note(said)
    fast = optimized_copy(freeze(model), compiler, strict=strict, max_graphs=max_graphs)
    if args is not None or kwargs:
        fast.capture(*(args or ()), **(kwargs or {}))
    return fast


def hessians_of(
    model: nn.Module, calibration: Any, tokenizer: Any = None
) -> Mapping[str, torch.Tensor]:
    """Weight name -> H [K,K] of the linear layers, as `Compiler` takes them; {} without data."""
    if calibration is None:
        return {}
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    layers = [
        name
        for name, module in model.named_modules()
        if is_linear(module) and not unfit(module, parents.get(module))
    ]
    if not layers:
        return {}
    batches = calibration_batches(calibration, tokenizer, model=model)
    return HessiansOnDemand(model, layers, batches)
