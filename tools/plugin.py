"""`torch.compile(model, backend="ridgeline", options={...})`: rewrite at compile time.

Dynamo hands over a graph of torch functions. It is traced to the vocabulary that passes know
(pre-dispatch ATen), rewritten as `optimize` does, and given on: for inference to the same lowering,
for training to AOTAutograd and Inductor, through the gradients that `ridgeline::` ops have. A graph
that cannot be traced goes to Inductor as it came, and the log says why.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from ridgeline.codegen.code_version import code_version
from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.program import Program
from ridgeline.passes import PASSES
from ridgeline.passes.compiler import Compiler
from ridgeline.passes.plan import Plan

log = logging.getLogger(__name__)


class PluginError(RidgelineError, ValueError):
    """An option of the backend that cannot be used."""


@dataclass(frozen=True, slots=True)
class Options:
    """The backend's `options`; the first four are `optimize`'s.

    on_plan: called with the `Plan` of each compiled graph.
    """

    target: str = "native"
    tolerance: float = 0.0
    objective: str = "latency"
    ignore: tuple[str, ...] = ()
    on_plan: Callable[[Plan], None] | None = None


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The `torch_dynamo_backends` entry point; see `Options` for `options`.

    Raises PluginError for unknown options or a `mode` (ridgeline has targets instead).
    """
    chosen = _options(options, mode)
    training = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in example_inputs
    )
    fold = chosen.tolerance > 0 and not training  # only a quantised weight need be a constant
    try:
        program, free, folded = _program(gm, example_inputs, training, fold)
    except Exception as error:  # whatever tracing meets, the user's model must still run
        log.warning("ridgeline leaves this graph to Inductor: it could not be traced: %s", error)
        return _inductor(gm, example_inputs)
    run, versions = _compiled(program, chosen), _versions(folded)

    def call(*inputs: Any) -> Any:
        nonlocal run, versions
        if versions != _versions(folded):
            log.info("weights changed: the graph that holds them is compiled anew")
            run, versions = _compiled(program, chosen), _versions(folded)
        return run(*(inputs[i] for i in free))

    return call


def _compiled(program: Program, chosen: Options) -> Callable[..., Any]:
    compiler = Compiler(
        chosen.target,
        tolerance=chosen.tolerance,
        objective=chosen.objective,
        passes=PASSES,
        ignore=chosen.ignore,
    )
    rewritten = compiler.rewrite(program)
    counters["ridgeline"]["applied"] += len(compiler.plan.applied)
    counters["ridgeline"]["refused"] += len(compiler.plan.refused)
    if program.training:
        run = _inductor(rewritten, program.inputs)
    else:
        run = compiler.lower(rewritten, program)
    if chosen.on_plan is not None:
        chosen.on_plan(compiler.plan)
    return run


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [t._version for t in tensors]


def _options(options: dict[str, Any] | None, mode: str | None) -> Options:
    known = [f.name for f in fields(Options)]
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise PluginError(f"unknown options {unknown}; ridgeline takes {known}")
    if mode not in (None, "default"):
        raise PluginError(f"mode={mode!r} is Inductor's; ridgeline takes options={{'target': ...}}")
    return Options(**(options or {}))


def _program(
    gm: fx.GraphModule, example_inputs: Sequence[Any], training: bool, fold: bool
) -> tuple[Program, list[int], list[Tensor]]:
    """Dynamo's graph as a `Program`, which of the inputs are its own, and the folded parameters.

    fold: the parameters among the inputs become constants of the program, so that they can be
    quantised and packed; else they stay inputs.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    values = [n.meta.get("example_value") for n in placeholders]
    # The placeholders' own mode: Dynamo gives back ends another, with the same symbols.
    modes = [v.fake_mode for v in values if isinstance(v, FakeTensor)]
    if not modes:
        raise RidgelineError("the graph's placeholders carry no fake tensors")
    fake_mode = modes[0]
    given = [x if v is None else v for x, v in zip(example_inputs, values, strict=True)]
    with fake_mode:
        traced = make_fx(fx.Interpreter(gm).run, pre_dispatch=True, _allow_non_fake_inputs=True)(
            *given
        )
    constants = [fold and isinstance(x, nn.Parameter) for x in example_inputs]
    _fold(traced, example_inputs, constants)
    free = [i for i, constant in enumerate(constants) if not constant]
    program = Program.from_graph(
        traced,
        [_concrete(example_inputs[i]) for i in free],
        phase="training" if training else "forward",
        training=training,
    )
    return program, free, [x for x, yes in zip(example_inputs, constants, strict=True) if yes]


def _concrete(value: Any) -> Any:
    """A free size as the number it has in this call, so that programs can be run on it."""
    return int(value.node.hint) if isinstance(value, torch.SymInt) else value


def _fold(traced: fx.GraphModule, example_inputs: Sequence[Any], constants: Sequence[bool]) -> None:
    """Turn placeholders of parameters into attributes."""
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    for node, parameter, constant in zip(placeholders, example_inputs, constants, strict=True):
        if not constant:
            continue
        name = f"constant_{node.name}"
        traced.register_parameter(name, parameter)
        with traced.graph.inserting_before(node):
            attribute = traced.graph.get_attr(name)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        traced.graph.erase_node(node)
    traced.recompile()


def _inductor(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    with torch.compiler.config.patch(cache_key_tag=code_version()):
        return compile_fx(gm, list(example_inputs))
