"""Which values of a graph are stored, and from which step to which.

Views, and writes in place, belong to the value that they are of. Counted as compiled: what an
elementwise operation, a norm or a softmax makes for one other such operation alone is formed and
read in one kernel, and never stored; and what such a kernel makes takes the place of an operand of
the same kind that nothing reads afterwards. Results live to the end.

One kernel in place of a site stores nothing of what the site's own nodes alone read. What that
changes lies around the site, and is looked for there:

    values that the site reads or makes     who reads them, and until when
    values formed in a kernel with those    which kernel that is, and until when it reads others
    values made of any of these             whether they take an operand's place
"""

from collections import ChainMap
from collections.abc import Collection, Iterable, Iterator, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from ridgeline.cost_model.views import is_free, tensors_of
from ridgeline.ir.symbolic import size_expression

_ROWWISE = frozenset(
    (
        *("softmax", "_softmax", "log_softmax", "_log_softmax", "layer_norm", "native_layer_norm"),
        *("rms_norm", "group_norm", "native_group_norm", "to", "_to_copy", "type_as", "clone"),
    )
)
_SOFTMAX = frozenset(("softmax", "_softmax", "log_softmax", "_log_softmax"))
_ATTENTION = "scaled_dot_product_attention"


@dataclass(frozen=True, slots=True)
class Replaced:
    """nodes: of a site that one kernel takes the place of; outs: those of them that the rest of the
    graph reads."""

    nodes: tuple[fx.Node, ...]
    outs: tuple[fx.Node, ...]


@dataclass(slots=True)
class Value:
    """Memory that one node fills, from step `born` to `last`. kind: of tensors. readers: whatever
    reads it, or a view of it, but views. fused: it is never stored. in_place: it takes the place of
    an operand. exponentials: bytes that a CPU keeps beside, for each of its own."""

    node: fx.Node
    kind: int
    readers: list[fx.Node]
    fused: bool
    born: int = 0
    last: int = 0
    in_place: bool = False
    exponentials: int = 0


class Facts:
    """What is true of the nodes of a graph whatever is replaced: the step of each; what it views or
    writes; its operation. tensors: an example of each kind of value."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.step = {node: i for i, node in enumerate(self.nodes)}
        self.viewed = {node: _viewed(node) for node in self.nodes}
        self.name = {node: _name(node) for node in self.nodes}
        self.tensors: list[tuple[Tensor, ...]] = []
        self._kinds: dict[Any, int] = {}
        self._kind: dict[fx.Node, int | None] = {}

    def kind(self, node: fx.Node) -> int | None:
        """Of the tensors that an operation results in: equal where dtypes and sizes are."""
        if node not in self._kind:
            made = tuple(tensors_of([node])) if node.op == "call_function" else ()
            described = tuple((t.dtype, tuple(map(size_expression, t.shape))) for t in made)
            self._kind[node] = self._kinds.setdefault(described, len(self._kinds)) if made else None
            if len(self._kinds) > len(self.tensors):
                self.tensors.append(made)
        return self._kind[node]

    def fusible(self, node: fx.Node, reads: bool = False) -> bool:
        """Is it formed element by element, or row by row, by code that Inductor writes? reads: or a
        reduction, which reads so."""
        if not (name := self.name[node]):
            return False
        tags = node.target.tags  # pyright: ignore[reportFunctionMemberAccess]
        reduces = reads and torch.Tag.reduction in tags
        return torch.Tag.pointwise in tags or name in _ROWWISE or reduces


class Values:
    """Of a graph with one kernel in place of each of some sites; beside a `base`, around these."""

    def __init__(
        self,
        facts: Facts,
        elsewhere: Collection[fx.Node] = (),
        replaced: Collection[Replaced] = (),
        base: "Values | None" = None,
    ) -> None:
        self.facts, self._base = facts, base
        self._ends: dict[fx.Node, int] = {}  # node of a site -> the step of its kernel
        self._inner = set[fx.Node]()
        for site in replaced:
            inner, end = _inner(site), max(facts.step[node] for node in site.nodes)
            self._inner |= inner
            self._ends |= dict.fromkeys((*inner, *site.outs), end)
        here = facts.nodes if base is None else base._around(replaced)
        self._roots = _over(None if base is None else base._roots)
        for node in here:
            self._roots[node] = self._root(node)
        self._gone = {self._roots[node] for node in elsewhere}
        self._values = _over(None if base is None else base._values)
        for node in here:
            self._values[node] = self._value(node)
        self._kernels = _over(None if base is None else base._kernels)
        for node in reversed(here):
            self._kernels[node] = self._kernel(node)
        for value in filter(None, map(self._values.__getitem__, here)):
            steps = [self._kernels[node] for node in value.readers]
            value.last = max(steps, default=self._seen(value.node))
        for site in replaced:  # one kernel makes its outs, mostly as views of one tensor
            parts = [value for node in site.outs if (value := self.of(node))]
            for value in parts:
                value.last = max(part.last for part in parts)
                value.born = min(part.born for part in parts)
        self._here = here if base is None else self._with_heirs(here, base)
        for value in filter(None, map(self._values.__getitem__, self._here)):
            self._place(value)

    def stored(self) -> list[Value]:
        """Those in memory at some time; beside a base, of what differs."""
        return _stored(self._values[node] for node in self._here)

    def were_stored(self) -> list[Value]:
        """What of the base stands where these `stored` are now."""
        return [] if self._base is None else _stored(map(self._base._values.get, self._here))

    def attentions(self) -> list[fx.Node]:
        """Of torch's own: those that are left, or beside a base those that were replaced."""
        left = (node for node in self.facts.nodes if node not in self._ends)
        nodes = left if self._base is None else self._ends
        return [node for node in nodes if self.facts.name[node] == _ATTENTION]

    def of(self, node: fx.Node) -> Value | None:
        """The value that a node makes, views or writes."""
        root = self._roots[node]
        return None if root is None else self._values[root]

    def _root(self, node: fx.Node) -> fx.Node | None:
        """The node that fills the memory of its result; None: an input, or nothing."""
        viewed = None if node in self._ends else self.facts.viewed[node]
        if viewed is not None:
            return self._roots[viewed]
        return None if node in self._inner or self.facts.kind(node) is None else node

    def _value(self, node: fx.Node) -> Value | None:
        if self._roots[node] is not node or node in self._gone:
            return None
        readers = list(self._readers(node))
        fused = len(readers) == 1 and self._fusible(node) and self._fusible(readers[0], reads=True)
        kind, step = self.facts.kind(node), self.facts.step[node]
        assert kind is not None
        return Value(node, kind, readers, fused, step, step)

    def _kernel(self, node: fx.Node) -> int:
        """The step of the kernel that it is part of: of a fused value, its reader's."""
        if node in self._ends:
            return self._ends[node]
        value = self._values[node]
        if value is not None and value.fused:
            return self._kernels[value.readers[0]]
        return self.facts.step[node]

    def _place(self, value: Value) -> None:
        """What it takes beside its own bytes."""
        value.in_place, value.exponentials = False, 0
        if value.fused:
            return
        made_of = list(self._made_of(value))
        width = self.facts.tensors[value.kind][0].dtype.itemsize
        if width < 4 and any(self._is_softmax(node) for node in made_of):
            value.exponentials = 4 // width
        if self._fusible(value.node):
            operands = (self.of(operand) for node in made_of for operand in node.all_input_nodes)
            value.in_place = any(
                not of.fused and of.kind == value.kind and of.last == value.born
                for of in operands
                if of is not None
            )

    def _made_of(self, value: Value) -> Iterator[fx.Node]:
        """The nodes that its kernel is made of."""
        stack = [value.node]
        while stack:
            node = stack.pop()
            yield node
            operands = map(self.of, node.all_input_nodes)
            stack.extend(of.node for of in operands if of is not None and of.fused)

    def _fusible(self, node: fx.Node, reads: bool = False) -> bool:
        return node not in self._ends and self.facts.fusible(node, reads)

    def _is_softmax(self, node: fx.Node) -> bool:
        return self.facts.name[node] in _SOFTMAX and node not in self._ends

    def _views(self, node: fx.Node) -> list[fx.Node]:
        """A node and those that view or write its result."""
        found = [node]
        for seen in found:
            found += (u for u in seen.users if self._views_it(u, seen))
        return found

    def _views_it(self, user: fx.Node, node: fx.Node) -> bool:
        return user not in self._ends and self.facts.viewed[user] is node

    def _readers(self, root: fx.Node) -> Iterator[fx.Node]:
        for node in self._views(root):
            for user in node.users:
                if not self._views_it(user, node) or _writes(user):
                    yield user

    def _seen(self, root: fx.Node) -> int:
        """The last step at which anything is made of a value, a view of it or not."""
        users = (user for node in self._views(root) for user in node.users)
        return max(map(self.facts.step.__getitem__, users), default=self.facts.step[root])

    def _around(self, replaced: Collection[Replaced]) -> list[fx.Node]:
        """Nodes whose readers, or kernels, may differ with one kernel in place of each site: of the
        sites, what views their results, what they read, and what is formed in a kernel with it."""
        stack = [node for site in replaced for node in site.nodes]
        found = {view for node in stack for view in self._views(node)}
        for node in list(stack):  # where a site's node views a value, that value counts as made
            stack += self._new(node, found)
        while stack:
            for operand in stack.pop().all_input_nodes:
                stack += self._new(operand, found)
        return sorted(found, key=self.facts.step.__getitem__)

    def _new(self, node: fx.Node, found: set[fx.Node]) -> list[fx.Node]:
        """Add the value of a node; its own if it is new and part of another's kernel."""
        value = self.of(node)
        if value is None or value.node in found:
            return []
        found.add(value.node)
        return [value.node] if value.fused else []

    def _with_heirs(self, here: Collection[fx.Node], base: "Values") -> list[fx.Node]:
        """Also the values that may now take the place of another operand, or of none: what is made,
        in one kernel, of a value that lives to another step or is no longer there."""
        found, stack = dict.fromkeys(here), list[fx.Node]()
        for node in here:
            old, new = base._values[node], self._values[node]
            if _span(old) != _span(new):
                stack += [reader for value in (old, new) if value for reader in value.readers]
        while stack:
            value = self.of(stack.pop())
            if value is not None and value.node not in found:
                found[value.node] = None
                self._values[value.node] = value = replace(value)
            if value is not None and value.fused:
                stack += value.readers
        return list(found)


def _span(value: Value | None) -> tuple[bool, int, int] | None:
    return None if value is None else (value.fused, value.born, value.last)


def _over(base: MutableMapping[fx.Node, Any] | None) -> MutableMapping[fx.Node, Any]:
    """A mapping whose entries stand before those of `base`."""
    return {} if base is None else ChainMap({}, base)


def _stored(values: Iterable[Value | None]) -> list[Value]:
    return [value for value in values if value is not None and not value.fused]


def _inner(site: Replaced) -> set[fx.Node]:
    """The nodes of a site whose results nobody else reads."""
    nodes = set(site.nodes)
    return {n for n in nodes if n not in site.outs and nodes.issuperset(n.users)}


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
