"""Where a change of constants can be undone by another: producers and all who read their channels.

A site is fit where every reader of the producer's channels is a linear layer that takes part, each
constant is read once in the graph and held once by the model, and each channel of a consumer's
input is one channel of the producer whatever the token. Values that pass attention are *turned*,
head by head; all others are *scaled*, channel by channel.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ridgeline.codegen.kernel import constant
from ridgeline.ir.provenance import said
from ridgeline.passes.base import location
from ridgeline.passes.preparation.trace import (
    MOVES,
    SUMS,
    Edge,
    Producer,
    Route,
    Unfit,
    first_token,
    linear_of,
    moved,
    routes,
    sent,
)


@dataclass(frozen=True, slots=True)
class Block:
    """One head: rows [D] of the producer, and the columns [D] of the consumer that read them."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Consumer:
    """A linear layer: its module's path, which way its weight lies, for each of its K inputs the
    producer's channel, and the heads where they are turned."""

    path: str
    transposed: bool
    channels: Tensor
    blocks: tuple[Block, ...] = ()

    @property
    def weight(self) -> str:
        """The weight's name."""
        return f"{self.path}.weight"


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A producer of `count` channels, by the names of its constants, and its consumers.

    module: path of the nn.Linear or Conv1D that the producer is called as, if it is one.
    """

    weight: str
    bias: str | None
    vector: bool
    transposed: bool
    shift: float
    count: int
    module: str | None
    consumers: tuple[Consumer, ...]

    @property
    def turned(self) -> bool:
        """Rotation by heads, else scaling by channels."""
        return bool(self.consumers[0].blocks)

    @property
    def paths(self) -> tuple[str, ...]:
        """Modules whose constants change, the producer first."""
        return self.weight.rpartition(".")[0], *(c.path for c in self.consumers)

    def __str__(self) -> str:
        producer, *consumers = self.paths
        return f"{producer or self.weight} -> {', '.join(consumers)}"


def find(module: fx.GraphModule, model: nn.Module) -> tuple[list[Site], list[tuple[str, str]]]:
    """(sites in the order of execution, (path of a linear layer, why its input stays)).

    module: `model` captured with fixed sizes and normalised.
    """
    owned = _owned(module, model)
    readers: dict[fx.Node, list[tuple[fx.Node, Route]]] = defaultdict(list)
    refused: list[tuple[str, str]] = []
    for node in module.graph.nodes:
        layer = linear_of(node)
        if layer is None:
            continue
        found, ends = routes(node)
        for route in found:
            readers[route.producer.node].append((node, route))
        if not found:
            between = " and ".join(map(said, dict.fromkeys(ends)))
            refused.append(
                (_path(layer), f"its input comes from {between}, into which nothing folds")
            )
    sites, taken = [], set()
    for producer, read in readers.items():
        paths = [_path(layer) for c, _ in read if (layer := linear_of(c)) is not None]
        try:
            if others := taken & set(paths):
                raise Unfit(f"the input of {min(others)} is scaled already")
            sites.append(_site(producer, read, model, owned))
            taken |= set(paths)
        except Unfit as error:
            refused += [(path, str(error)) for path in dict.fromkeys(paths) if path not in taken]
    seen = {c.path for s in sites for c in s.consumers}
    return sites, [(path, why) for path, why in dict.fromkeys(refused) if path not in seen]


def _path(layer: Producer) -> str:
    return str(layer.weight.target).rpartition(".")[0]


def _is_layer(layer: Producer, model: nn.Module) -> bool:
    """Is it the call of a linear module, as calibration can watch it?"""
    path = _path(layer)
    module = model.get_submodule(path)
    kind = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    called = location(layer.node).partition(":")[0] == path
    return kind and called and str(layer.weight.target) == f"{path}.weight"


def _site(
    node: fx.Node, read: list[tuple[fx.Node, Route]], model: nn.Module, owned: set[str]
) -> Site:
    producer = read[0][1].producer
    for constant_node in (producer.weight, producer.bias):
        if constant_node is not None:
            _check_owned(str(constant_node.target), owned)
    if len({c for c, _ in read}) < len(read):
        raise Unfit(f"{said(node)} reaches the layer in two ways")
    edges = {edge for _, route in read for edge in route.edges}
    shape = node.meta["val"].shape
    numbers = torch.arange(shape[-1]).expand(shape)
    held = sent(node, numbers, [e for e in edges if e[1] not in dict(read)])
    used = torch.cat([held[c.args[0]].unique() for c, _ in read]).unique()
    for at in held:
        for user in _strangers(at, held[at], edges, used):
            raise Unfit(f"{said(node)} is also read by {said(user)}")
    turned = all(route.turnable for _, route in read)
    consumers = tuple(_consumer(c, r, held, model, owned, turned) for c, r in read)
    return Site(
        str(producer.weight.target),
        None if producer.bias is None else str(producer.bias.target),
        producer.vector,
        producer.transposed,
        producer.shift,
        shape[-1],
        _path(producer) if _is_layer(producer, model) else None,
        consumers,
    )


def _consumer(
    node: fx.Node,
    route: Route,
    held: dict[fx.Node, Tensor],
    model: nn.Module,
    owned: set[str],
    turned: bool,
) -> Consumer:
    layer = linear_of(node)
    assert layer is not None
    path = _path(layer)
    _check_owned(str(layer.weight.target), owned)
    if not _is_layer(layer, model):
        raise Unfit(f"{layer.weight.target} is not read by a call of an nn.Linear or Conv1D")
    rows = held[route.edges[0][0]].reshape(-1, held[route.edges[0][0]].shape[-1])
    if not bool((rows == rows[:1]).all()):
        raise Unfit(f"the channels that {path} reads differ from token to token")
    blocks = tuple(_blocks(route, held, rows[0], path)) if turned else ()
    return Consumer(path, layer.transposed, rows[0].clone(), blocks)


def _blocks(
    route: Route, held: dict[fx.Node, Tensor], channels: Tensor, path: str
) -> Iterator[Block]:
    """The heads of attention as the consumer reads them."""
    value, attention, _ = next(e for e in route.edges if e[1].target in SUMS)
    values = first_token(attention, held[value])
    shape, width = attention.meta["val"].shape, values.shape[-1]
    places = torch.arange(values.numel()).view(values.shape).expand(shape)
    x = route.edges[0][0]
    outward = route.edges[1 : route.edges.index((value, attention, SUMS[attention.target]))]
    read = sent(attention, places, outward)[x].reshape(-1, len(channels))[0]
    heads: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for column, place in enumerate(read.tolist()):
        heads[place // width].append((place % width, column))
    rows_of: dict[int, tuple[int, ...]] = {}
    for members in heads.values():
        members.sort()
        columns = tuple(column for _, column in members)
        rows = tuple(channels[list(columns)].tolist())
        if [place for place, _ in members] != list(range(width)) or len(set(rows)) < width:
            raise Unfit(f"{path} does not read whole heads")
        if any(rows_of.setdefault(row, rows) != rows for row in rows):
            raise Unfit(f"the heads that {path} reads overlap")
        yield Block(rows, columns)


def _strangers(node: fx.Node, numbers: object, edges: set[Edge], used: Tensor) -> Iterator[fx.Node]:
    """Readers of the used channels at `node` that no route knows; what only selects others of its
    channels, as the keys of a merged projection, is none."""
    for user in node.users:
        places = [i for i, a in enumerate(user.args) if a is node]
        if places and all((node, user, i) in edges for i in places):
            continue
        if user.target not in MOVES or places != [0]:
            yield user
            continue
        there = moved(user, numbers)
        if isinstance(there, Tensor) and not bool(torch.isin(there, used).any()):
            continue
        yield from _strangers(user, there, edges, used)


def _owned(module: fx.GraphModule, model: nn.Module) -> set[str]:
    """Names of parameters that one node reads and one place of the model holds."""
    slots = Counter(
        tensor.untyped_storage().data_ptr()
        for kind in (model.named_parameters, model.named_buffers)
        for _, tensor in kind(remove_duplicate=False)
    )
    nodes = list(module.graph.find_nodes(op="get_attr"))
    reads: Counter[int] = Counter()
    for node in nodes:
        reads[constant(node).untyped_storage().data_ptr()] += len(node.users)
    names = dict(model.named_parameters())
    return {
        name
        for name in {str(n.target) for n in nodes} & set(names)
        if slots[at := names[name].untyped_storage().data_ptr()] == 1 and reads[at] == 1
    }


def _check_owned(name: str, owned: set[str]) -> None:
    if name not in owned:
        raise Unfit(f"{name} is shared: it is read, or held by the model, in more than one place")
