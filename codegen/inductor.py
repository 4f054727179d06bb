"""Lower a rewritten graph: one compiled call instead of one dispatch per node.

A batch-1 decode step reads each weight once, so it should take

    t = bytes / bandwidth + sum over calls of the call's overhead,

and the second term is what this module makes small. Inductor fuses what lies between the
`ridgeline::` calls into C++ loops, and calls the ops themselves through the dispatcher. It is
entered at `compile_fx`, below dynamo: no frame is traced and no dynamo guard is evaluated, because
the caller already chose this graph by its own guards. What compiled code takes for granted about
its inputs is checked here instead (`inductor_inputs`), once per call and for the inputs only.

For training the same compiler makes a forward and a backward. `ridgeline::` operations that have
no backward kernel are given to it as their laws, so that it fuses them, and the explicit formulas
of their gradients, with what stands beside them.

Caches stay in place: AOTAutograd makes ``index_copy_`` on an input functional, Inductor puts it
back, so a mutated input is written and never copied.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from ridgeline.codegen.code_version import code_version
from ridgeline.codegen.errors import BackendMissing
from ridgeline.codegen.inductor_inputs import Check, InputMismatch, input_check
from ridgeline.ir.gated import GATED_ACTIVATION
from ridgeline.ir.layer_norm import ADD_LAYER_NORM, LAYER_NORM
from ridgeline.ir.rms_norm import ADD_RMS_NORM, RMS_NORM
from ridgeline.ir.rotary import ROTARY


@dataclass(frozen=True, slots=True)
class Compiled:
    """run: a function of the flat inputs that returns the flat outputs. accepts: whether such
    inputs lie as it was compiled for; where they do not, a call raises InputMismatch."""

    run: Callable[..., tuple[Any, ...]]
    accepts: Callable[..., bool]

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        return self.run(*inputs)


def _any_inputs(*inputs: Any) -> bool:
    return True


# Why each differs from Inductor's default:
_SETTINGS: dict[str, Any] = {
    # An assertion per input, per weight and per custom op's result; inputs are checked here.
    "size_asserts": False,
    "alignment_asserts": False,
    "nan_asserts": False,
    # A thread team costs microseconds to start: loops below 2 x this many elements (all of a
    # batch-1 decode step but the attention) run on the calling thread.
    "cpp.min_chunk_size": 4096,
    # The team's size is read at run time, so that torch.set_num_threads() is obeyed.
    "cpp.dynamic_threads": True,
    # Freezing would hold every remaining float weight twice, once packed.
    "freezing": False,
    # Settings under which the result would not be a plain function of the inputs.
    "cpp_wrapper": False,
    "triton.cudagraphs": False,
}


WITHOUT_BACKWARD_KERNEL = (
    *(RMS_NORM, ADD_RMS_NORM, LAYER_NORM, ADD_LAYER_NORM),
    *(GATED_ACTIVATION, ROTARY),
)
"""Bound by memory: in training, Inductor makes loops of their laws and of their gradients."""


_TRAINING: dict[str, Any] = {
    # Dropout draws what the model itself would: a seed gives the same run with and without us.
    "fallback_random": True,
}


_SENDING: dict[str, Any] = {
    # To free memory early it would wait for each collective where it is sent; the graph's own order
    # has other work between the two (`passes.parallel.in_turn`).
    "reorder_for_peak_memory": False,
}


class NoCompiler(BackendMissing):
    """Inductor needs a C++ compiler and there is none; eager lowering needs none."""


def compile_graph(
    module: fx.GraphModule, example_inputs: Sequence[Any], *, dynamic: bool, training: bool = False
) -> Compiled:
    """Compile `module` with Inductor.

    module: pre-dispatch ATen and `ridgeline::` nodes, weights as `get_attr`; neither it nor its
        tensors are changed. Mutations of inputs and of buffers are kept.
    example_inputs: one per placeholder, real or fake: tensors, SymInts, or plain constants, and a
        constant is compiled in.
    dynamic: True takes shapes from the placeholders' ``meta["val"]``, whose symbolic sizes stay
        free; False specialises on the example inputs.
    training: gradients flow to the inputs and parameters that require them now; where another set
        of parameters requires them at a call, the call compiles anew.

    Returns a function of the flat inputs that returns the flat outputs as a tuple, without
    gradients unless `training`. A call raises InputMismatch where dtype, shape or strides are not
    what was compiled.
    Raises NoCompiler without a C++ compiler.
    """
    _require_compiler()
    graph, outputs = _prepared(module)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if len(placeholders) != len(example_inputs):
        raise InputMismatch(
            f"expected one example input for each of the {len(placeholders)} placeholders, "
            f"found {len(example_inputs)}"
        )
    values = [
        node.meta.get("val", example) if dynamic else example
        for node, example in zip(placeholders, example_inputs, strict=True)
    ]
    free = _burn_constants(graph, placeholders, values)
    values = [values[i] for i in free]
    if not any(isinstance(leaf, fx.Node) for leaf in outputs) and not _has_effects(graph):
        return _constant(outputs)
    owner = fx.GraphModule(module, graph)
    if not training:
        run, check = _lower(owner, values)
        return _bind(run, check, len(placeholders), free, outputs)
    for i, value in zip(free, values, strict=True):
        if isinstance(value, torch.Tensor) and example_inputs[i].requires_grad:
            value.requires_grad_()
    return _bind(*_trained(owner, values), len(placeholders), free, outputs, training=True)


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's own, and the laws of `WITHOUT_BACKWARD_KERNEL`, which write nothing in place: they
    are put in below the stage that would make that functional."""
    from torch._inductor.decomposition import select_decomp_table

    laws = {op.overload: op.reference for op in WITHOUT_BACKWARD_KERNEL}
    return {**select_decomp_table(), **laws}


def _trained(module: fx.GraphModule, values: list[Any]) -> tuple[Callable[..., Any], Check]:
    """What runs for training: compiled once per set of parameters that require gradients, which
    compiled code takes for granted and a caller may change by `requires_grad_`."""
    parameters = list(module.parameters())

    def required() -> tuple[bool, ...]:
        return tuple(p.requires_grad for p in parameters)

    first, check = _lower(module, values, training=True)
    known = {required(): first}

    def run(*inputs: Any) -> Any:
        wanted = required()
        if wanted not in known:
            known[wanted], _ = _lower(module, values, training=True)
        return known[wanted](*inputs)

    return run, check


def run_eager(module: fx.GraphModule) -> Compiled:
    """Return `module` as it stands, node by node: a function of flat inputs, without gradients."""
    graph, outputs = _prepared(module)
    run = fx.GraphModule(module, graph)

    def call(*inputs: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            return _filled(outputs, run(*inputs))

    return Compiled(call, _any_inputs)


def _require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError) as error:
        raise NoCompiler(
            "compiling the rewritten graph needs a C++ compiler, and none was found; install one "
            "(`apt install g++`, `dnf install gcc-c++`, `xcode-select --install`, Visual Studio "
            "Build Tools), name it in the environment variable CXX, or ask for lowering='eager'"
        ) from error


def _prepared(module: fx.GraphModule) -> tuple[fx.Graph, list[Any]]:
    """A copy of the graph that takes flat inputs and returns its tensor and SymInt outputs.

    Also returns the flat outputs: a node where the copy returns a value, else the constant.
    """
    graph = fx.Graph()
    result = graph.graph_copy(module.graph, {})
    outputs = tree_leaves(result, is_leaf=lambda leaf: leaf is None)
    graph.output(tuple(leaf for leaf in outputs if isinstance(leaf, fx.Node)))
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    return graph, outputs


def _burn_constants(
    graph: fx.Graph, placeholders: Sequence[fx.Node], values: Sequence[Any]
) -> list[int]:
    """Write plain constants into their users; return the positions of the inputs that remain."""
    free = []
    for position, (node, value) in enumerate(zip(placeholders, values, strict=True)):
        if isinstance(value, torch.Tensor | torch.SymInt):
            free.append(position)
            continue
        for user in list(node.users):
            replace = {node: value}
            user.args, user.kwargs = fx.map_arg(
                (user.args, user.kwargs), lambda n, replace=replace: replace.get(n, n)
            )
        graph.erase_node(node)
    return free


def _has_effects(graph: fx.Graph) -> bool:
    return any(node.op == "call_function" and node.is_impure() for node in graph.nodes)


def _constant(outputs: list[Any]) -> Compiled:
    def call(*inputs: Any) -> tuple[Any, ...]:
        return tuple(outputs)

    return Compiled(call, _any_inputs)


def _lower(
    module: fx.GraphModule, values: list[Any], training: bool = False
) -> tuple[Callable[..., Any], Check]:
    """Compile, and return the compiled function and the check of what it takes for granted."""
    from torch._guards import TracingContext, detect_fake_mode, tracing

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on import
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

    fake_mode = detect_fake_mode(values)
    environment = fake_mode.shape_env if fake_mode is not None else None
    known = len(environment.guards) if environment is not None else 0
    context = TracingContext(fake_mode) if fake_mode is not None else None
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(training),
        tracing(context),
        config.patch(_settings(module, training)),
        torch.compiler.config.patch(cache_key_tag=code_version()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on first use
        decompositions = inductor_decompositions() if training else None
        run: Any = compile_fx(module, values, decompositions=decompositions)
    assumed = []
    if environment is not None:  # a size that was fixed on the way is a number in the shapes now
        held = (environment.simplify(g.expr) for g in environment.guards[known:])
        assumed = [condition for condition in held if condition != sympy.true]
    return run, input_check(values, assumed)


def _settings(module: fx.GraphModule, training: bool) -> dict[str, Any]:
    """What Inductor is told for this graph."""
    sends = any(
        getattr(node.target, "namespace", "") == "_c10d_functional" for node in module.graph.nodes
    )
    return {**_SETTINGS, **(_TRAINING if training else {}), **(_SENDING if sends else {})}


def _filled(outputs: list[Any], values: Sequence[Any]) -> tuple[Any, ...]:
    """The flat outputs, with constants put back between the values."""
    if len(values) == len(outputs):
        return tuple(values)
    rest = iter(values)
    return tuple(next(rest) if isinstance(leaf, fx.Node) else leaf for leaf in outputs)


def _bind(
    run: Callable[..., Any],
    check: Check,
    arity: int,
    free: list[int],
    outputs: list[Any],
    training: bool = False,
) -> Compiled:
    select = None if len(free) == arity else free

    def checked(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(inputs) != arity:
            raise InputMismatch(f"expected {arity} flat inputs, found {len(inputs)}")
        if select is not None:
            inputs = tuple(inputs[i] for i in select)
        check(*inputs)
        return inputs

    def call(*inputs: Any) -> tuple[Any, ...]:
        inputs = checked(inputs)
        with torch.set_grad_enabled(training):
            return _filled(outputs, run(*inputs))

    def accepts(*inputs: Any) -> bool:
        try:
            checked(inputs)
        except InputMismatch:
            return False
        return True

    return Compiled(call, accepts)
