"""A Dynamo graph over DTensors as a graph over the tensors that this rank holds.

    y = f(x, W)    ->    y_r = f_r(x_r, W_r), with the collectives that redistributions are

torch.export has no form for DTensors, and Dynamo's graph does not show what they send. So the graph
is run once on fake DTensors, and what they do with their local tensors is recorded: an operation of
plain tensors before dispatch, as all programs have it (`scaled_dot_product_attention` is one node),
and one that reads a DTensor below, where DTensor has planned it (`linear` is `t`, `mm` and views,
of which the normal form makes a `linear` again). A graph without DTensors stays what it is.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._ops import _set_mode_pre_dispatch, unset_mode_pre_dispatch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils._pytree import tree_leaves

from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.program import SHARDED, WEIGHT


class LocalGraphError(RidgelineError):
    """A graph over DTensors that cannot be written on local tensors."""


@dataclass(frozen=True, slots=True)
class LocalGraph:
    """The graph, and the way to and from it.

    module: takes the values of the inputs at `held`, of DTensors the local tensors; others are
    meshes, which are constants. specs: of each output that is a DTensor, else None.
    """

    module: fx.GraphModule
    held: tuple[int, ...]
    specs: tuple[Any, ...]
    distributed: bool

    def inputs(self, given: Sequence[Any]) -> list[Any]:
        """What `module` takes of the values that the Dynamo graph does."""
        return [_local(given[i]) for i in self.held] if self.distributed else list(given)

    def outputs(self, values: Sequence[Any]) -> Sequence[Any]:
        """What the Dynamo graph returns where `module` returns `values`."""
        if not any(self.specs):
            return values
        return tuple(
            value if spec is None else DTensor(value, spec, requires_grad=False)
            for value, spec in zip(values, self.specs, strict=True)
        )


def local_graph(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> LocalGraph:
    """Trace Dynamo's graph to pre-dispatch ATen on local tensors, each node with the module and
    line that it came from.

    Raises LocalGraphError where it carries no fake tensors, or returns a DTensor of free size, and
    whatever torch raises where it cannot be traced.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    values = [n.meta.get("example_value") for n in placeholders]
    given = [
        x if v is None or isinstance(x, DeviceMesh) else v
        for x, v in zip(example_inputs, values, strict=True)
    ]
    # The placeholders' own mode: Dynamo gives back ends another, with the same symbols.
    locals_ = map(_local, given)
    mode = next((v.fake_mode for v in locals_ if isinstance(v, FakeTensor)), None)
    if mode is None:
        raise LocalGraphError("the graph's placeholders carry no fake tensors")
    held = tuple(i for i, x in enumerate(given) if not isinstance(x, DeviceMesh))
    results: list[Any] = []

    def run(*flat: Any) -> list[Any]:
        whole = list(given)
        for i, x in zip(held, flat, strict=True):
            whole[i] = (
                DTensor(x, given[i]._spec, requires_grad=False) if _is_dtensor(given[i]) else x
            )
        results[:] = _Interpreter(gm).run(*whole)
        return [_local(x) for x in results]

    with mode, preserve_node_meta():
        traced = make_fx(run, pre_dispatch=True, _allow_non_fake_inputs=True)(
            *(_local(given[i]) for i in held)
        )
    for i, node in zip(held, traced.graph.find_nodes(op="placeholder"), strict=True):
        if isinstance(example_inputs[i], nn.Parameter):
            node.meta[WEIGHT] = True
        if _is_dtensor(given[i]) and not all(p.is_replicate() for p in given[i].placements):
            node.meta[SHARDED] = _dimension(given[i])
    distributed = any(map(is_distributed, [*given, *results]))
    return LocalGraph(traced, held, tuple(map(_spec, results)), distributed)


class _Interpreter(fx.Interpreter):
    """Runs a graph, what reads a DTensor or a mesh below pre-dispatch."""

    def run_node(self, n: fx.Node) -> Any:
        read = tree_leaves(self.fetch_args_kwargs_from_env(n))
        if n.op != "output" and any(is_distributed(x) for x in read):
            with _below_pre_dispatch():
                return super().run_node(n)
        return super().run_node(n)


@contextlib.contextmanager
def _below_pre_dispatch() -> Iterator[None]:
    """Record in the same trace, but what is left after autograd and compositions are dispatched."""
    mode: Any = unset_mode_pre_dispatch(torch._C._TorchDispatchModeKey.PROXY)
    try:
        with ProxyTorchDispatchMode(mode.tracer, mode.tracing_mode):
            yield
    finally:
        _set_mode_pre_dispatch(mode)


def is_distributed(value: Any) -> bool:
    """Is it a DTensor, or a mesh of ranks?"""
    return isinstance(value, DTensor | DeviceMesh)


def _is_dtensor(value: Any) -> bool:
    return isinstance(value, DTensor)


def _local(value: Any) -> Any:
    """What a rank holds of a value, arrived where it was under way."""
    if isinstance(value, DTensor):
        value = value._local_tensor
    return value.wait() if isinstance(value, AsyncCollectiveTensor) else value


def _dimension(value: Any) -> int | None:
    """The one dimension along which a DTensor is split; None where there is no such."""
    parts = [p for p in value.placements if not p.is_replicate()]
    return parts[0].dim % value.ndim if len(parts) == 1 and isinstance(parts[0], Shard) else None


def _spec(value: Any) -> Any:
    if not _is_dtensor(value):
        return None
    if not all(isinstance(n, int) for n in (*value.shape, *value.stride())):
        raise LocalGraphError(
            f"the graph returns a DTensor of shape {tuple(value.shape)}, which changes from call to"
            " call; return value.to_local(), or compile with dynamic=False"
        )
    return value._spec
