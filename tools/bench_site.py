"""One site on this CPU: ridgeline's TVM kernel against Inductor's own loops and eager torch.

Both compiled forms are graphs of that one site, lowered and called in the same way and allocating
their results at each call, so that what differs is the kernel and how it is called. The memory of
results is kept by the process for all three: fresh pages from the kernel cost several times what
any of them computes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ridgeline.codegen.inductor import compile_graph
from ridgeline.codegen.lower import lower
from ridgeline.cost_model import Target, Work
from ridgeline.ir.capture import capture
from ridgeline.ir.normalize import normalize
from ridgeline.passes.apply import apply
from ridgeline.passes.base import Pass, Setting
from ridgeline.passes.certify import relative_error
from ridgeline.passes.propose import propose
from ridgeline.passes.weights import WeightStore
from ridgeline.tools.allocator import keep_freed_memory
from ridgeline.tools.predicted import log_timings
from ridgeline.tools.timing import TimingError, Timings, interleave

BASELINE = "inductor"
_ROUNDING = 1e-2
"""No contender of a comparison may be further from eager torch than bfloat16 rounds."""


def compare(
    model: nn.Module,
    inputs: Sequence[Tensor],
    ours: Callable[..., Any] | Pass,
    rounds: int,
    target: Target,
) -> Timings:
    """Time eager torch, Inductor and ridgeline on `model`, which is one site.

    ours: the pass that rewrites it, or a function in its place where a graph that returns the
        results would have to copy them into the layout of eager torch's. target: the CPU at hand.
    Raises TimingError where the pass does not fit, or where results differ by more than rounding.
    """
    keep_freed_memory()
    program = capture(model, inputs).program
    module = normalize(program.module)
    inductor = compile_graph(module, program.inputs, dynamic=False)
    works: dict[str, Work] = {}
    if isinstance(ours, Pass):
        setting = Setting(target, False, 0.0, _unobserved, WeightStore())
        candidates, _ = propose((ours,), module, setting)
        if not candidates:
            raise TimingError(f"{ours.name} does not fit {type(model).__name__}")
        works = {BASELINE: candidates[0].before, "ridgeline": candidates[0].after}
        ours = lower(apply(module, candidates[:1]), program.inputs, target, "inductor", False).run
    functions = {"eager": model, BASELINE: inductor, "ridgeline": ours}
    results = {name: _tensors(function(*inputs)) for name, function in functions.items()}
    for name in (BASELINE, "ridgeline"):
        if (error := relative_error(results[name], results["eager"])) > _ROUNDING:
            raise TimingError(f"{name} differs from eager torch by {error:.1e}")
    calls = {name: functools.partial(f, *inputs) for name, f in functions.items()}
    timings = interleave(calls, baseline=BASELINE, rounds=rounds)
    title = f"{type(model).__name__}, {', '.join(str(list(x.shape)) for x in inputs)}"
    log_timings(f"{title}, {inputs[0].dtype}", timings, works, target)
    return timings


def _tensors(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]


def _unobserved(node: Any) -> Tensor:
    raise AssertionError(f"{node}: an exact rewrite is made without looking at values")
