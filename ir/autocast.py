"""torch.autocast made explicit: the casts it would make, as nodes of the graph.

Tracing records operations above autocast, so a graph that was captured under it has the right
dtypes in ``meta["val"]`` and none of the casts. What autocast does to an operation is a policy of
ATen/autocast_mode.h (lower precision, float32, widest type, float32 by the `dtype` argument). The
policy is read off torch itself: each node runs on its fake values under autocast, the casts of its
arguments are recorded and inserted, and without autocast the same run must then make no cast more
or less and give the same dtypes. An operation that does not pass, such as one that casts inside, is
refused.
"""

import functools
import operator
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from ridgeline.ir.capture_errors import CaptureError

aten = torch.ops.aten
Casting = tuple[tuple[str, torch.dtype], ...]
"""The devices for which autocast is on, each with its lower precision; empty where it is off."""

_DEVICES = ("cpu", "cuda")
_DISSOLVED = {
    aten.einsum.default: (1,),
    aten.tensordot.default: (0, 1),
    aten.inner.default: (0, 1),
}
"""Operations that torch takes apart into products of lower precision: positions of the operands."""
_KERNELS_CAST = (aten.bilinear.default, aten.linalg_pinv.default, aten.linalg_pinv.atol_rtol_tensor)
"""Operations whose kernels call products, which autocast casts, and fake values do not show it."""


def active() -> Casting:
    """What holds for the calling thread. Raises CaptureError for devices that no pass knows."""
    on = torch.is_autocast_enabled
    found = tuple((d, torch.get_autocast_dtype(d)) for d in _DEVICES if on(d))
    if not found and torch._C._is_any_autocast_enabled():
        raise CaptureError(
            f"autocast is on for another device than {' or '.join(_DEVICES)}; convert the model"
            " instead, as model.to(torch.bfloat16), or leave the autocast block"
        )
    return found


def disabled() -> Any:
    """A context in which autocast is off: for graphs whose casts are nodes."""
    return torch._C._DisableAutocast()


def without(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as it runs with autocast off."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with disabled():
            return function(*args, **kwargs)

    return run


def make_explicit(module: fx.GraphModule, casting: Casting) -> None:
    """Insert into `module`, captured under `casting`, what autocast would do; regions of another
    casting inside it are dissolved into the graph.

    Raises CaptureError naming an operation whose policy cannot be written as casts.
    """
    states, regions = _states(module, casting)
    if not (regions or casting):
        return
    held: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    for node, state in states.items():
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        # Autocast has no policy for what writes in place, and a run would change the fake values.
        writes = node.target._schema.is_mutable
        if state and not writes:
            _cast_arguments(node, state, held)
        if regions:
            _retype(node, writes)
    module.graph.lint()
    module.recompile()


def _states(module: fx.GraphModule, casting: Casting) -> tuple[dict[fx.Node, Casting], int]:
    """Every node with the casting that holds there, and the number of regions, whose marks are
    taken out."""
    _refuse_split(module.graph)
    for node in list(module.graph.nodes):
        if node.target is torch.ops.higher_order.wrap_with_autocast:
            _inline(node, module)
    entered: list[tuple[fx.Node, Casting, dict[Any, torch.dtype]]] = []
    states: dict[fx.Node, Casting] = {}
    regions = 0
    # A region that names no dtype has the one around it, which stays set where autocast is off.
    dtypes: dict[Any, torch.dtype] = {d: torch.get_autocast_dtype(d) for d in _DEVICES}
    for node in list(module.graph.nodes):
        if node.target is torch.amp.autocast_mode._enter_autocast:
            entered.append((node, casting, dtypes))
            device, dtype, enabled = node.args[:3]
            dtypes = {**dtypes, device: dtype or dtypes.get(device)}  # pyright: ignore[reportAssignmentType]
            casting = tuple(pair for pair in casting if pair[0] != device)
            casting = (*casting, (device, dtypes[device])) if enabled else casting
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            opened, casting, dtypes = entered.pop()
            regions += 1
            module.graph.erase_node(node)
            module.graph.erase_node(opened)
        else:
            states[node] = casting
    return states, regions


def _refuse_split(graph: fx.Graph) -> None:
    """torch.export splits a region where the model sets grad mode inside it, and forgets the mode:
    gradients would flow where the model stops them. Two regions in a row may be such a split."""
    region, before = torch.ops.higher_order.wrap_with_autocast, None
    for node in graph.nodes if torch.is_grad_enabled() else ():
        if node.op == "get_attr" or node.target is operator.getitem:
            continue
        if node.target is region and before is not None and before.args[:3] == node.args[:3]:
            raise CaptureError(
                "the model sets grad mode inside an autocast region, or enters the same region"
                " twice in a row, which cannot be told apart; set grad mode outside of the region,"
                " or use detach() in place of torch.no_grad()"
            )
        before = node if node.target is region else None


def _inline(node: fx.Node, module: fx.GraphModule) -> None:
    """wrap_with_autocast(device, dtype, enabled, cache, body, *operands) -> its body between the
    marks of a region."""
    device, dtype, enabled, cache, body, *operands = node.args
    inner: Any = module.get_submodule(str(body.target))  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    _refuse_split(inner.graph)
    graph = module.graph
    with graph.inserting_before(node):
        mark = graph.call_function(
            torch.amp.autocast_mode._enter_autocast, (device, dtype, enabled, cache)
        )
        copied = dict(zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True))
        for own in inner.graph.nodes:
            if own.op not in ("placeholder", "output"):
                copied[own] = graph.node_copy(own, lambda n: copied[n])
        graph.call_function(torch.amp.autocast_mode._exit_autocast, (mark,))
    (results,) = next(iter(inner.graph.find_nodes(op="output"))).args
    results = results if isinstance(results, Sequence) else (results,)
    for user in list(node.users):  # a region returns a tuple
        user.replace_all_uses_with(copied[results[user.args[1]]])
        graph.erase_node(user)
    graph.erase_node(node)
    graph.erase_node(body)  # pyright: ignore[reportArgumentType]
    for own in list(copied.values()):
        if own.target is torch.ops.higher_order.wrap_with_autocast:
            _adopt(own, inner, module)
            _inline(own, module)


def _adopt(region: fx.Node, inner: fx.GraphModule, module: fx.GraphModule) -> None:
    """Give `module` the body of a region that was copied into its graph, under a free name."""
    body: Any = region.args[4]
    name, tries = f"{body.target}_inner", 0
    while hasattr(module, name):
        tries += 1
        name = f"{body.target}_inner_{tries}"
    module.add_module(name, inner.get_submodule(str(body.target)))
    body.target = name


class _Casts(TorchDispatchMode):
    """Records every cast: (its argument, the dtype)."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Tensor, torch.dtype]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._to_copy.default and kwargs.get("dtype") is not None:
            self.made.append((args[0], kwargs["dtype"]))
        return func(*args, **kwargs)


def _run(
    node: fx.Node, args: Any, kwargs: Any, casting: Casting
) -> tuple[list[tuple[Tensor, torch.dtype]], list[torch.dtype]]:
    """The casts that an operation makes on these fake values, and the dtypes of its results."""
    fakes = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    casts = _Casts()
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of dtypes that a device lacks
        stack.enter_context(torch.no_grad())
        stack.enter_context(disabled())
        for device, dtype in casting:
            stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
        stack.enter_context(fakes[0].fake_mode)
        stack.enter_context(enable_python_dispatcher())  # decompositions for free sizes
        stack.enter_context(casts)
        try:
            result = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        except Exception as error:  # such as lstm's, which looks into its tensors
            raise _unwritable(node) from error
    return casts.made, [t.dtype for t in tree_leaves(result) if isinstance(t, Tensor)]


def _cast_arguments(
    node: fx.Node, casting: Casting, held: dict[tuple[fx.Node, torch.dtype], fx.Node]
) -> None:
    """Put the casts that autocast makes of the node's arguments before it.

    held: casts of what is trained, made once each as autocast does.
    """
    values = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    arguments, spec = tree_flatten((node.args, node.kwargs))
    leaves = tree_leaves(values)
    if not any(isinstance(v, Tensor) and v.is_floating_point() for v in leaves):
        return
    if node.target in _KERNELS_CAST:
        raise _unwritable(node)
    made, dtypes = _run(node, *values, casting)
    plain = _unaided(node, values)
    if plain == ([dtype for _, dtype in made], dtypes):
        return  # no cast, or the operation's own, such as rms_norm's to float32 and back
    if positions := _DISSOLVED.get(node.target):  # pyright: ignore[reportCallIssue, reportArgumentType]
        operands = tree_leaves([values[0][p] for p in positions])
        low = dict(casting)[operands[0].device.type]
        made = [(v, low) for v in operands if v.is_floating_point() and v.itemsize < 8]
    wanted: dict[int, torch.dtype] = {}
    for source, dtype in made:
        wanted |= {i: dtype for i, v in enumerate(leaves) if v is source and v.dtype != dtype}
    for i, dtype in wanted.items():
        arguments[i] = _cast(node, arguments[i], dtype, held)
    args, kwargs = spec.unflatten(arguments)
    if any(a.name == "dtype" for a in node.target._schema.arguments) and not wanted:  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
        kwargs = _by_dtype(kwargs, plain, dtypes)
    node.args, node.kwargs = args, kwargs
    again = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    left, found = _run(node, *again, ())
    inner = [dtype for source, dtype in made if not any(v is source for v in leaves)]
    same = node.target in _DISSOLVED or [dtype for _, dtype in left] == inner
    if not same or found != dtypes:
        raise _unwritable(node)


def _unwritable(node: fx.Node) -> CaptureError:
    return CaptureError(
        f"what torch.autocast does inside {node.target} ({node.name}) cannot be written as casts of"
        " its arguments; convert the model instead, as model.to(torch.bfloat16), or leave the"
        " autocast block around it"
    )


def _unaided(node: fx.Node, values: Any) -> tuple[list[torch.dtype], list[torch.dtype]] | None:
    """The dtypes of the casts and of the results without autocast; None where that fails, as a
    product of two dtypes does."""
    try:
        casts, dtypes = _run(node, *values, ())
    except CaptureError:
        return None
    return [dtype for _, dtype in casts], dtypes


def _retype(node: fx.Node, writes: bool) -> None:
    """Give the recorded values the dtypes that the arguments lead to: Dynamo's graph is traced
    without its regions. What writes in place gives what it wrote to."""
    values = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    recorded = [t for t in tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]
    read = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
    if not read or not any(t.is_floating_point() for t in recorded):
        return
    plain = ([], [read[0].dtype]) if writes else _unaided(node, values)
    if plain is None or len(plain[1]) != len(recorded):
        return
    if plain[1] != [t.dtype for t in recorded]:
        left = iter(plain[1])
        with read[0].fake_mode, torch.no_grad(), disabled():  # pyright: ignore[reportAttributeAccessIssue]
            node.meta["val"] = tree_map_only(Tensor, lambda t: t.to(next(left)), node.meta["val"])


def _by_dtype(kwargs: Any, plain: Any, dtypes: list[torch.dtype]) -> Any:
    """The keyword `dtype` where that is how autocast raises the precision of a sum."""
    if plain is None or plain[1] == dtypes or len(dtypes) != 1:
        return kwargs
    return {**kwargs, "dtype": dtypes[0]}


def _cast(
    node: fx.Node,
    argument: fx.Node,
    dtype: torch.dtype,
    held: dict[tuple[fx.Node, torch.dtype], fx.Node],
) -> fx.Node:
    """A node that is `argument` in `dtype`, before `node`."""
    if (argument, dtype) in held:
        return held[argument, dtype]
    with node.graph.inserting_before(node):
        cast = node.graph.call_function(aten.to.dtype, (argument, dtype))
    cast.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    value = argument.meta["val"]
    with value.fake_mode, torch.no_grad(), disabled():
        cast.meta["val"] = value.to(dtype)
    if argument.op != "call_function" and value.requires_grad:
        held[argument, dtype] = cast
    return cast
