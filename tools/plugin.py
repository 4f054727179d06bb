"""`torch.compile(model, backend="ridgeline", options={...})`: rewrite at compile time.

Dynamo hands over a graph of torch functions. It is traced to the vocabulary that passes know
(pre-dispatch ATen), rewritten as `optimize` does, and given on: for inference to the same lowering,
for training to AOTAutograd and Inductor, through the gradients that `ridgeline::` ops have. Of
DTensors, the graph of this rank's own tensors is traced, with the collectives that they send; it is
compiled in step with the other ranks. A graph that cannot be traced, and one over DTensors that is
trained, goes to Inductor as it came; the log and the plan say why.
"""

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._guards import tracing

from ridgeline.codegen.code_version import code_version
from ridgeline.codegen.inductor import inductor_decompositions
from ridgeline.cost_model import load_target
from ridgeline.ir import autocast
from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.local_graph import is_distributed, local_graph
from ridgeline.ir.program import Program
from ridgeline.ir.sizes import number
from ridgeline.passes import PASSES
from ridgeline.passes.apply import copy_graph
from ridgeline.passes.parallel.own_collectives import TRAINED, MeshCompiler, first_collective
from ridgeline.passes.parallel.rewrite import When
from ridgeline.passes.plan import Plan

log = logging.getLogger(__name__)


class PluginError(RidgelineError, ValueError):
    """An option of the backend that cannot be used."""


@dataclass(frozen=True, slots=True)
class Options:
    """The backend's `options`; all but the last are `optimize`'s.

    fuse: for graphs that send. Other than "never", it states of one that is not over DTensors that
        its inputs, and its values between collectives, are the same on all ranks; where they are
        not, results are wrong. None keeps its norms where they are.
    on_plan: called with the `Plan` of each compiled graph.
    """

    target: str = "native"
    tolerance: float = 0.0
    objective: str = "latency"
    ignore: tuple[str, ...] = ()
    fuse: When | None = None
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
    _compiler(chosen)  # refuses values that cannot be used before any work
    training = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in example_inputs
    )
    if training and any(map(is_distributed, example_inputs)):
        return _left(gm, example_inputs, chosen, f"it is over DTensors: {TRAINED}")
    try:
        local = local_graph(gm, example_inputs)
        autocast.make_explicit(local.module, autocast.active())
    except Exception as error:  # whatever tracing meets, the user's model must still run
        return _left(gm, example_inputs, chosen, f"it could not be traced: {error}")
    traced, inputs = local.module, local.inputs(example_inputs)
    # Only a quantised weight need be a constant, and no rank quantises beside the others.
    fold = chosen.tolerance > 0 and not training and first_collective(traced.graph) is None
    folded = [i for i, x in enumerate(inputs) if fold and isinstance(x, nn.Parameter)]
    free = [i for i in range(len(inputs)) if i not in folded]
    # Dynamo gives one graph to all modules of the same code; what it folds is each one's own.
    known: OrderedDict[tuple[int, ...], _Folded] = OrderedDict()

    def compiled_for(inputs: Sequence[Any]) -> Callable[..., Any]:
        weights = [inputs[i] for i in folded]
        key = tuple(map(id, weights))
        found = known.get(key)
        if found is None or found.state != _state(weights):
            program = _program(traced, inputs, folded, training)
            known[key] = found = _Folded(weights, _state(weights), _compiled(program, chosen))
            if len(known) > MOST_FOLDED:
                known.popitem(last=False)
        return found.run

    def call(*given: Any) -> Any:
        inputs = local.inputs(given)
        return local.outputs(compiled_for(inputs)(*(inputs[i] for i in free)))

    # Dynamo knows the DTensors and not their local tensors, whose sizes it would leave free.
    unknown = tracing(None) if local.distributed else contextlib.nullcontext()
    with autocast.disabled(), unknown:  # the traced graph casts by itself
        compiled_for(inputs)
    return autocast.without(call) if autocast.active() else call


MOST_FOLDED = 256
"""Sets of weights for which one graph is kept compiled: the layers of a large model."""


@dataclass(frozen=True, slots=True)
class _Folded:
    """A graph compiled for these weights, as they were."""

    weights: list[Tensor]
    state: list[tuple[int, int]]
    run: Callable[..., Any]


def _state(weights: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Where each weight lies, and how often it was changed in place."""
    return [(w.data_ptr(), w._version) for w in weights]


def _compiler(chosen: Options, training: bool = False) -> MeshCompiler:
    """training: kernels are put in place, and AOTAutograd and Inductor get the graph from here."""
    return MeshCompiler(
        chosen.target,
        fuse=chosen.fuse,
        tolerance=chosen.tolerance,
        objective=chosen.objective,
        passes=PASSES,
        ignore=chosen.ignore,
        lowering="eager" if training else "inductor",
    )


def _left(
    gm: fx.GraphModule, example_inputs: Sequence[Any], chosen: Options, why: str
) -> Callable[..., Any]:
    """Dynamo's graph, compiled by Inductor alone."""
    said = f"ridgeline leaves this graph to Inductor: {why}"
    log.warning(said)
    if chosen.on_plan is not None:
        plan = Plan(load_target(chosen.target).name, chosen.tolerance)
        plan.note(said)
        chosen.on_plan(plan)
    return _inductor(gm, example_inputs)


def _compiled(program: Program, chosen: Options) -> Callable[..., Any]:
    compiler = _compiler(chosen, program.training)
    try:
        run = compiler(program)
        if program.training:
            run = _inductor(run, program.inputs, inductor_decompositions())
    except RidgelineError:
        raise
    except Exception:  # the user's model must still run
        log.exception("a defect of ridgeline, please report it: Inductor gets this graph unchanged")
        return _inductor(program.module, program.inputs)
    counters["ridgeline"]["applied"] += len(compiler.plan.applied)
    counters["ridgeline"]["refused"] += len(compiler.plan.refused)
    if program.training and chosen.tolerance > 0:
        compiler.plan.note(
            "gradients are recorded, so the weights count as trained and none is quantised; to"
            " infer, call within torch.no_grad(), or freeze them with requires_grad_(False)"
        )
    if chosen.on_plan is not None:
        chosen.on_plan(compiler.plan)
    return run


def _options(options: dict[str, Any] | None, mode: str | None) -> Options:
    known = [f.name for f in fields(Options)]
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise PluginError(f"unknown options {unknown}; ridgeline takes {known}")
    if mode not in (None, "default"):
        raise PluginError(f"mode={mode!r} is Inductor's; ridgeline takes options={{'target': ...}}")
    chosen = Options(**(options or {}))
    if chosen.on_plan is not None and not callable(chosen.on_plan):
        raise PluginError(f"on_plan is {chosen.on_plan!r}; pass a function of a plan")
    return chosen


def _program(
    traced: fx.GraphModule, inputs: Sequence[Any], folded: Sequence[int], training: bool
) -> Program:
    """The graph as a `Program` whose inputs at `folded` are constants, so that they can be
    quantised and packed."""
    module, copied = copy_graph(traced)
    placeholders = traced.graph.find_nodes(op="placeholder")
    for i in folded:
        node = copied[placeholders[i]]
        name = f"constant_{node.name}"
        module.register_parameter(name, inputs[i])
        with module.graph.inserting_before(node):
            attribute = module.graph.get_attr(name)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        module.graph.erase_node(node)
    module.recompile()
    free = [_concrete(x) for i, x in enumerate(inputs) if i not in folded]
    phase = "training" if training else "forward"
    return Program.from_graph(module, free, phase=phase, training=training)


def _concrete(value: Any) -> Any:
    """A free size as the number it has in this call, so that programs can be run on it."""
    return number(value) if isinstance(value, torch.SymInt) else value


def _inductor(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    decompositions: dict[Any, Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    with torch.compiler.config.patch(cache_key_tag=code_version()):
        return compile_fx(gm, list(example_inputs), decompositions=decompositions)
