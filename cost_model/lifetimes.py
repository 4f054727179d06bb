"""How much memory a program's values take, beside its weights and caches: live bytes by step.

    live(t) = sum of the bytes of values born by step t and read at t or later + workspace(t)

A step is a node of the graph, in order; views, and writes in place, belong to the value that they
are of. Counted as compiled: what an elementwise operation, a norm or a softmax makes for one other
such operation alone is formed and read in one kernel, and never stored; and what such a kernel
makes takes the place of an operand of the same kind that nothing reads afterwards. Inputs and
weights are not counted, nor values held `elsewhere` (caches, which stay); results live to the end,
and so do inputs that are `kept` (caches, until those that replace them are handed over).

workspace(t), where a kernel stores more than its result, is that of

    attention of torch     without a fused kernel (`fused`), scores and their softmax:
                           2 B H Sq Skv max(4, itemsize) bytes, and K and V once for each head of Q
    softmax on a CPU       the exponentials in fp32 where the result has fewer bytes: 4 B an entry

Source: torch's `_scaled_dot_product_attention_math`, and what Inductor makes of both; measured
peaks in tests/cost_model/test_lifetimes.py. Run one by one, without Inductor, the former takes
2.75 arrays in place of two.
"""

import functools
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from ridgeline.cost_model.count import argument, is_free, tensors_of
from ridgeline.cost_model.target import Target
from ridgeline.ir.sizes import numbers
from ridgeline.ir.symbolic import size_expression

aten = torch.ops.aten
_ROWWISE = frozenset(
    (
        *("softmax", "_softmax", "log_softmax", "_log_softmax", "layer_norm", "native_layer_norm"),
        *("rms_norm", "group_norm", "native_group_norm", "to", "_to_copy", "type_as", "clone"),
    )
)
_SOFTMAX = frozenset(("softmax", "_softmax", "log_softmax", "_log_softmax"))
_ATTENTION = "scaled_dot_product_attention"
_NO_FLASH = ("sm_70", "sm_75")


@dataclass(frozen=True, slots=True)
class Replaced:
    """nodes: of a site that one kernel takes the place of; outs: those of them that the rest of the
    graph reads."""

    nodes: tuple[fx.Node, ...]
    outs: tuple[fx.Node, ...]


@dataclass(slots=True)
class _Value:
    """Memory that one node fills. readers: whatever reads it, or a view of it, but views. fused: it
    is never stored. in_place: it takes the place of an operand. exponentials: bytes that a CPU
    keeps beside, for each of its own."""

    node: fx.Node
    born: int
    last: int
    kind: int
    fused: bool = False
    in_place: bool = False
    exponentials: int = 0
    readers: list[fx.Node] = field(default_factory=list)


class Lifetimes:
    """The values of a graph: its structure, whatever the sizes."""

    def __init__(
        self,
        graph: fx.Graph,
        elsewhere: Collection[fx.Node] = (),
        replaced: Iterable[Replaced] = (),
        kept: Collection[fx.Node] = (),
    ) -> None:
        """replaced: sites in whose place one kernel stands: what their own nodes alone read is not
        stored. kept: inputs that count, at every step."""
        self.graph, self.elsewhere, self.kept = graph, frozenset(elsewhere), frozenset(kept)
        self.nodes = list(graph.nodes)
        self._step = {node: i for i, node in enumerate(self.nodes)}
        self._ends: dict[fx.Node, int] = {}  # node of a site -> the step of its kernel
        self._inner = set[fx.Node]()
        self._parts: list[tuple[fx.Node, ...]] = []
        for site in replaced:
            self._parts.append(site.outs)
            end = max(self._step[node] for node in site.nodes)
            inner = _inner(site)
            self._inner |= inner
            self._ends |= dict.fromkeys((*inner, *site.outs), end)
        self._values: list[_Value] = []
        self._of: dict[fx.Node, _Value] = {}
        self._kinds: dict[Any, int] = {}
        self._tensors: list[tuple[Tensor, ...]] = []  # an example of each kind of value
        self._others: dict[frozenset[Replaced], Lifetimes] = {}
        for i, node in enumerate(self.nodes):
            self._enter(i, node)
        self._join()
        self._attentions = [n for n in self.nodes if n not in self._ends and _name(n) == _ATTENTION]

    def having(self, replaced: Iterable[Replaced]) -> "Lifetimes":
        """Of the graph with one kernel in place of each of `replaced`."""
        key = frozenset(replaced)
        if not key:
            return self
        if key not in self._others:
            self._others[key] = Lifetimes(self.graph, self.elsewhere, key, self.kept)
        return self._others[key]

    def relieves(self, site: Replaced) -> bool:
        """Is less stored with one kernel in place of it?"""
        inner = _inner(site)
        return any(
            (n in self._of and self._of[n].node is n and not self._of[n].fused) for n in inner
        ) or any(_name(n) == _ATTENTION for n in site.nodes)

    def live_bytes(self, target: Target) -> np.ndarray:
        """Bytes by step, at the sizes of `ridgeline.ir.sizes`: whole numbers, to 2^53 exactly."""
        sizes = list(map(_bytes, self._tensors))
        change = [0] * (len(self.nodes) + 1)  # sums of what 64 bits may not hold
        for value in self._values:
            if value.fused:
                continue
            size = sizes[value.kind]
            change[value.born] += size
            change[value.last + 1] -= size
            beside = -size if value.in_place else 0
            if value.exponentials and target.kind == "cpu":
                beside = value.exponentials * size
            change[value.born] += beside
            change[value.born + 1] -= beside
        change[0] += _bytes(tensors_of(self.kept))
        live = list(accumulate(change[:-1]))
        for node in self._attentions:
            live[self._step[node]] += attention_workspace(node, target)
        return np.array(live, dtype=np.float64)

    def _enter(self, i: int, node: fx.Node) -> None:
        """Note what a node reads, and the value that it makes."""
        viewed = None if node in self._ends else _viewed(node)
        for operand in node.all_input_nodes:
            value = self._of.get(operand)
            if value is not None:
                value.last = i
                if operand is not viewed or _writes(node):
                    value.readers.append(node)
        if viewed is not None:
            if viewed in self._of:
                self._of[node] = self._of[viewed]
            return
        call = node.op == "call_function" and node not in self._inner
        tensors = tuple(tensors_of([node])) if call else ()
        if not tensors:
            return
        described = tuple((t.dtype, tuple(map(size_expression, t.shape))) for t in tensors)
        kind = self._kinds.setdefault(described, len(self._kinds))
        if kind == len(self._tensors):
            self._tensors.append(tensors)
        value = self._of[node] = _Value(node, i, i, kind)
        self._values.append(value)

    def _join(self) -> None:
        """Which values are never stored, and what follows from it for the others."""
        gone = {id(self._of[node]) for node in self.elsewhere if node in self._of}
        self._values = [value for value in self._values if id(value) not in gone]
        self._of = {node: value for node, value in self._of.items() if id(value) not in gone}
        for value in self._values:
            value.fused = (
                len(value.readers) == 1
                and self._fusible(value.node)
                and self._fusible(value.readers[0], reads=True)
            )
        kernels = self._kernels()
        for value in self._values:
            value.last = max((kernels[r] for r in value.readers), default=value.last)
        for outs in self._parts:  # one kernel makes them, mostly as views of one tensor
            parts = [self._of[node] for node in outs if node in self._of]
            for value in parts:
                value.last = max(part.last for part in parts)
                value.born = min(part.born for part in parts)
        for value in self._values:
            value.in_place = (
                not value.fused and self._fusible(value.node) and self._takes_a_place(value)
            )
        for node in self.nodes:
            if _name(node) in _SOFTMAX and node in self._of and node not in self._ends:
                end = self._of.get(self.nodes[kernels[node]])
                if end and (width := tensors_of([end.node])[0].dtype.itemsize) < 4:
                    end.exponentials = 4 // width

    def _kernels(self) -> dict[fx.Node, int]:
        """Node -> the step of the kernel that it is part of: of a fused value, its reader's."""
        kernels: dict[fx.Node, int] = {}
        for i, node in reversed(list(enumerate(self.nodes))):
            value = self._of.get(node)
            if node in self._ends:
                kernels[node] = self._ends[node]
            elif value is not None and value.node is node and value.fused:
                kernels[node] = kernels[value.readers[0]]
            else:
                kernels[node] = i
        return kernels

    def _takes_a_place(self, value: _Value) -> bool:
        """Does its kernel read, for the last time, a stored value of its kind?"""
        stack = [value.node]
        while stack:
            for operand in stack.pop().all_input_nodes:
                of = self._of.get(operand)
                if of is None:
                    continue
                if of.fused:
                    stack.append(of.node)
                elif of.kind == value.kind and of.last == value.born:
                    return True
        return False

    def _fusible(self, node: fx.Node, reads: bool = False) -> bool:
        """Is it formed element by element, or row by row, by code that Inductor writes? reads: or a
        reduction, which reads so."""
        if node in self._ends or not (name := _name(node)):
            return False
        tags = node.target.tags  # pyright: ignore[reportFunctionMemberAccess]
        reduces = reads and torch.Tag.reduction in tags
        return torch.Tag.pointwise in tags or name in _ROWWISE or reduces


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(prod(numbers(t.shape)) * t.dtype.itemsize for t in tensors)


def _inner(site: Replaced) -> set[fx.Node]:
    """The nodes of a site whose results nobody else reads."""
    nodes = set(site.nodes)
    return {n for n in nodes if n not in site.outs and nodes.issuperset(n.users)}


def attention_workspace(node: fx.Node, target: Target) -> int:
    """Bytes that torch's kernels of `scaled_dot_product_attention` store beside its result."""
    query, key, value = (tensors_of([node.args[i]])[0] for i in range(3))
    (batch, heads, q, size), (_, kv_heads, kv, _) = _dimensions(query), _dimensions(key)
    values, width = numbers(value.shape)[-1], max(4, query.dtype.itemsize)
    call = Call(
        query.dtype, query.dim(), heads, kv_heads, size, values,
        argument(node, "attn_mask") is not None, bool(argument(node, "is_causal")), q == kv,
    )  # fmt: skip
    if fused(call, target):
        return 0
    repeated = kv * (size + values) if heads != kv_heads else 0
    return width * batch * heads * (2 * q * kv + repeated)


def _dimensions(operand: Tensor) -> tuple[int, int, int, int]:
    """(batch, heads, length, features); of [batch, length, features] and [length, features] what
    is missing is 1."""
    *outer, length, features = numbers(operand.shape)
    heads = outer.pop() if len(outer) > 1 else 1
    return prod(outer), heads, length, features


@dataclass(frozen=True, slots=True)
class Call:
    """What torch chooses a kernel of attention by. square: as many queries as keys."""

    dtype: torch.dtype
    rank: int
    heads: int
    kv_heads: int
    size: int
    value_size: int
    masked: bool
    causal: bool
    square: bool


def fused(call: Call, target: Target) -> bool:
    """Has torch a kernel for it that stores no scores? On a CPU as torch says itself; on a GPU by
    what its two such kernels ask for (`sdp_utils.cpp`): flash attention two-byte numbers, heads of
    one size to 256, sm_80, no mask, and no causal mask over unequal lengths; the memory-efficient
    one heads of their own for K and V, of a multiple of 16 bytes."""
    if target.kind == "cpu":
        return _fused_on_cpu(call)
    c, half = call, call.dtype in (torch.float16, torch.bfloat16)
    flash = half and target.arch not in _NO_FLASH and c.size == c.value_size <= 256
    flash = flash and not c.masked and (c.square or not c.causal)
    aligned = all(n * c.dtype.itemsize % 16 == 0 for n in (c.size, c.value_size))
    efficient = (half or c.dtype == torch.float32) and aligned and c.heads == c.kv_heads
    return c.rank == 4 and (flash or efficient)


@functools.cache
def _fused_on_cpu(c: Call) -> bool:
    def drawn(number: int, features: int) -> Tensor:
        shape = (1, number, 2, features) if c.rank == 4 else (2,) * (c.rank - 1) + (features,)
        return torch.zeros(shape, dtype=c.dtype, device="cpu")

    operands = drawn(c.heads, c.size), drawn(c.kv_heads, c.size), drawn(c.kv_heads, c.value_size)
    mask = torch.zeros((2, 2), dtype=c.dtype, device="cpu") if c.masked else None
    grouped = c.heads != c.kv_heads
    choice = torch._fused_sdp_choice(*operands, mask, 0.0, c.causal, enable_gqa=grouped)
    return choice != torch.nn.attention.SDPBackend.MATH.value


def _name(node: fx.Node) -> str:
    target = node.target
    return target._opname if isinstance(target, OpOverload) and target.namespace == "aten" else ""


def _writes(node: fx.Node) -> bool:
    """Does it write in place?"""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _viewed(node: fx.Node) -> fx.Node | None:
    """The value that a node's result is of: what it views, or writes."""
    if node.op != "call_function":
        return None
    if getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[0], fx.Node):
        return node.args[0]
    if not isinstance(node.target, OpOverload):
        return None
    results = tensors_of([node.meta.get("val")])
    if results and (_writes(node) or is_free(node, node.target._opname, results)):
        return next((a for a in node.args if isinstance(a, fx.Node)), None)
    return None
