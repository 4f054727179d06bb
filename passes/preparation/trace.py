"""Which channel of which producer every channel of a linear layer's input is.

Two things give channels that can be turned or scaled by a change of constants alone:

    linear    y = x Wᵀ + b             rows of W and b
    vector    y = t * (w + shift) + b  a norm's weight [K] and bias, or any other such product

Law: from the input of a linear layer (a consumer) a route leads back to its producer through what
moves numbers only, through P V for the values V of attention (any P that does not depend on V: the
sum runs over tokens, channels stay what they are), through products with other numbers, and through
relu, for which relu(s y) = s relu(y), s > 0. Then the channels' numbers 0..N-1 are sent along the
route by the very operations that stand there, so that heads, groups of heads that share a key/value
head, merged projections and permutations need no case of their own.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.normalize import is_cast
from ridgeline.ir.provenance import said

aten = torch.ops.aten
MOVES = frozenset({
    operator.getitem, aten.view.default, aten.reshape.default, aten._unsafe_view.default,
    aten.flatten.using_ints, aten.unflatten.int, aten.transpose.int, aten.permute.default,
    aten.t.default, aten.mT.default, aten.movedim.int, aten.expand.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.contiguous.default,
    aten.clone.default, aten.alias.default, aten.detach.default, aten.slice.Tensor,
    aten.select.int, aten.narrow.default, aten.split.Tensor, aten.split.sizes,
    aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.repeat.default,
    aten.repeat_interleave.self_int,
})  # fmt: skip
"""Their results hold numbers of their first operand and no others."""
ATTENTION = aten.scaled_dot_product_attention.default
SUMS = {ATTENTION: 2, aten.matmul.default: 1, aten.bmm.default: 1}
"""P V -> the place of V among the operands."""
HOMOGENEOUS = (aten.relu.default, aten.leaky_relu.default)
PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
Edge = tuple[fx.Node, fx.Node, int]
"""(value, its reader, its place among the reader's operands)."""


class Unfit(RidgelineError):
    """Channels that cannot be folded; the message says why."""


@dataclass(frozen=True, slots=True)
class Producer:
    """Where channels come from: the node, the get_attr nodes of its constants, and which way the
    weight lies (`transposed`: [K,N]); a vector's weight counts from -shift."""

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    vector: bool = False
    transposed: bool = False
    shift: float = 0.0


@dataclass(frozen=True, slots=True)
class Route:
    """From a producer to a consumer's input, the last edge first."""

    producer: Producer
    edges: tuple[Edge, ...]

    @property
    def turnable(self) -> bool:
        """Do rotations of a head's channels pass? Through one sum over tokens, and no product with
        a number of the channel's own."""
        readers = [reader for _, reader, _ in self.edges[1:]]
        alone = not any(r.target in HOMOGENEOUS or _of_two_tensors(r) for r in readers)
        return alone and sum(r.target in SUMS for r in readers) == 1


def linear_of(node: fx.Node) -> Producer | None:
    """The linear layer that the node is; None where its weight is no constant."""
    if node.target is not aten.linear.default:
        return None
    _, weight, *rest = node.args
    bias = rest[0] if rest else None
    transposed = isinstance(weight, fx.Node) and weight.target is aten.t.default
    if transposed:
        weight = weight.args[0]
    if not _constant(weight) or not (bias is None or _constant(bias)):
        return None
    return Producer(node, weight, bias, transposed=transposed)


def routes(consumer: fx.Node) -> tuple[list[Route], list[fx.Node]]:
    """Ways from the input of a linear layer back to producers, and where others ended."""
    found: list[Route] = []
    ends: list[fx.Node] = []
    open_ways: list[tuple[Edge, ...]] = [((consumer.args[0], consumer, 0),)]  # pyright: ignore
    while open_ways:
        way = open_ways.pop()
        node = way[-1][0]
        if producer := linear_of(node) or _vector(node):
            found.append(Route(producer, way))
        elif places := _places(node):
            open_ways += [(*way, (node.args[i], node, i)) for i in places]  # pyright: ignore
        else:
            ends.append(node)
    return found, ends


def _places(node: fx.Node) -> Iterable[int]:
    """Operands through which channels may come."""
    if node.target in MOVES or node.target in HOMOGENEOUS or is_cast(node):
        return (0,)
    if node.target in SUMS:
        return (SUMS[node.target],)
    if node.target in PRODUCTS:
        both = node.target is aten.mul.Tensor
        return [i for i in (0, 1)[: 1 + both] if isinstance(node.args[i], fx.Node)]
    return ()


def _of_two_tensors(node: fx.Node) -> bool:
    return node.target in PRODUCTS and all(isinstance(a, fx.Node) for a in node.args[:2])


def _constant(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _vector(node: fx.Node) -> Producer | None:
    """A norm or a product with a constant vector, its bias included."""
    if node.target in (aten.layer_norm.default, aten.rms_norm.default):
        _, shape, *rest = node.args
        weight = rest[0] if rest else None
        layer = node.target is aten.layer_norm.default
        bias = rest[1] if layer and len(rest) > 1 else None
        fits = len(shape) == 1 and _constant(weight) and (bias is None or _constant(bias))  # pyright: ignore
        return Producer(node, weight, bias, vector=True) if fits else None  # pyright: ignore
    if node.target is aten.mul.Tensor:
        for i in (0, 1):
            weight, shift = _shifted(node.args[i])
            if weight is not None and _along_channels(weight, node):
                return Producer(node, weight, None, vector=True, shift=shift)
    if node.target is aten.add.Tensor and not node.kwargs:
        for product, bias in (node.args, node.args[::-1]):
            if _constant(bias) and isinstance(product, fx.Node) and len(product.users) == 1:
                inner = _vector(product)
                plain = inner is not None and inner.bias is None and _along_channels(bias, node)
                if inner is not None and plain:
                    return Producer(node, inner.weight, bias, vector=True, shift=inner.shift)  # pyright: ignore
    return None


def _shifted(value: Any) -> tuple[fx.Node | None, float]:
    """(w, c) of w + c, as in norms whose weight counts from -1."""
    shift = 0.0
    if isinstance(value, fx.Node) and value.target is aten.add.Tensor and not value.kwargs:
        numbers = [a for a in value.args if isinstance(a, int | float)]
        others = [a for a in value.args if isinstance(a, fx.Node)]
        if len(numbers) != 1 or len(others) != 1:
            return None, 0.0
        value, shift = others[0], float(numbers[0])
    return (value, shift) if _constant(value) else (None, 0.0)


def _along_channels(weight: Any, node: fx.Node) -> bool:
    return tuple(weight.meta["val"].shape) == tuple(node.meta["val"].shape[-1:])


def sent(start: fx.Node, numbers: Tensor, edges: Iterable[Edge]) -> dict[fx.Node, Any]:
    """What the nodes behind `start` hold where it holds `numbers` (shape of its value, integer)."""
    into: dict[fx.Node, Edge] = {}
    for edge in edges:
        if into.setdefault(edge[1], edge) != edge:
            raise Unfit(f"{said(edge[1])} reads the channels twice")
    held: dict[fx.Node, Any] = {start: numbers}
    for node in start.graph.nodes:
        if node in into and into[node][0] in held:
            held[node] = moved(node, held[into[node][0]])
    return held


def moved(node: fx.Node, numbers: Any) -> Any:
    """The numbers in the result of a node that a route passes through."""
    if node.target in SUMS:
        return first_token(node, numbers).expand(node.meta["val"].shape)
    if is_cast(node) or node.target in HOMOGENEOUS:
        return numbers
    if node.target in PRODUCTS:
        return numbers.expand(node.meta["val"].shape)
    # What lies in order there may lie otherwise here, where a product's numbers are expanded.
    target: Any = aten.reshape.default if node.target == aten.view.default else node.target
    return target(numbers, *node.args[1:], **node.kwargs)


def first_token(node: fx.Node, numbers: Tensor) -> Tensor:
    """[..., 1, D] of values [..., S, D] whose channels are the same for every token, heads repeated
    as attention does; Unfit where they are not."""
    first = numbers[..., :1, :]
    if numbers.dim() < 2 or not bool((numbers == first).all()):
        raise Unfit(f"{said(node)} sums over channels")
    if node.target is ATTENTION and first.dim() > 2:
        heads = node.meta["val"].shape[-3]
        first = first.repeat_interleave(heads // first.shape[-3], -3)
    return first.expand(*node.meta["val"].shape[:-2], 1, first.shape[-1])
