"""How much memory a program's values take, beside its weights and caches: live bytes by step.

    live(t) = sum of the bytes of values born by step t and read at t or later + workspace(t)

A step is a node of the graph, in order. Which values are stored, and from when to when, is told by
`ridgeline.cost_model.values`. Inputs and weights are not counted, nor values held `elsewhere`
(caches, which stay); inputs that are `kept` are, at every step (caches, until those that replace
them are handed over).

workspace(t), where a kernel stores more than its result, is that of

    attention of torch     `ridgeline.cost_model.attention_memory`
    softmax on a CPU       the exponentials in fp32 where the result has fewer bytes: 4 B an entry

Source: what Inductor makes of both; measured peaks in tests/cost_model/test_lifetimes.py.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import accumulate
from math import prod

import numpy as np
from torch import Tensor, fx

from ridgeline.cost_model.attention_memory import attention_workspace
from ridgeline.cost_model.target import Target
from ridgeline.cost_model.values import Facts, Replaced, Value, Values
from ridgeline.cost_model.views import tensors_of
from ridgeline.ir.sizes import numbers

Pieces = tuple[tuple[int, int, int], ...]
"""(first step, step after the last, bytes), in order."""


class Lifetimes:
    """The values of a graph: its structure, whatever the sizes."""

    def __init__(
        self, graph: fx.Graph, elsewhere: Collection[fx.Node] = (), kept: Collection[fx.Node] = ()
    ) -> None:
        self.graph, self.elsewhere, self.kept = graph, frozenset(elsewhere), frozenset(kept)
        self.facts = Facts(graph)
        self.nodes = self.facts.nodes
        self._values = Values(self.facts, self.elsewhere)
        self._changes: dict[frozenset[Replaced], Values] = {}

    def live_bytes(self, target: Target, replaced: Iterable[Replaced] = ()) -> np.ndarray:
        """Bytes by step, at the sizes of `ridgeline.ir.sizes`, whole numbers and exact to 2^53; of
        the graph with one kernel in place of each of `replaced`."""
        change = self._change(self._values.stored(), self._values.attentions(), target)
        change[0] += _bytes(tensors_of(self.kept))
        live = np.array([*accumulate(change[i] for i in range(len(self.nodes)))], dtype=np.float64)
        for first, end, size in self.freed(replaced, target):
            live[first:end] -= size
        return live

    def freed(self, replaced: Iterable[Replaced], target: Target) -> Pieces:
        """By how much one kernel in place of each of `replaced` makes live bytes less; negative
        where it makes them more. What few sites change is looked for around them."""
        key = frozenset(replaced)
        if key not in self._changes:
            self._changes[key] = Values(self.facts, self.elsewhere, key, self._values)
        new = self._changes[key]
        change = self._change(new.were_stored(), new.attentions(), target)
        change.subtract(self._change(new.stored(), (), target))
        steps = sorted(step for step, size in change.items() if size)
        sizes = accumulate(change[step] for step in steps)
        pieces = zip(steps, [*steps, len(self.nodes)][1:], sizes, strict=True)
        return tuple(piece for piece in pieces if piece[2])

    def _change(
        self, values: Iterable[Value], attentions: Iterable[fx.Node], target: Target
    ) -> Counter[int]:
        """step -> how many bytes more are alive from it on: integers, which 64 bits may not
        hold."""
        change = Counter[int]()
        sizes: dict[int, int] = {}
        for value in values:
            if value.kind not in sizes:
                sizes[value.kind] = _bytes(self.facts.tensors[value.kind])
            for step, size in _steps(value, sizes[value.kind], target):
                change[step] += size
        for node in attentions:
            step, size = self.facts.step[node], attention_workspace(node, target)
            change[step] += size
            change[step + 1] -= size
        return change


def _steps(value: Value, size: int, target: Target) -> Iterator[tuple[int, int]]:
    """(step, bytes more) of a value of so many bytes."""
    yield value.born, size
    yield value.last + 1, -size
    beside = -size if value.in_place else 0
    if value.exponentials and target.kind == "cpu":
        beside = value.exponentials * size
    if beside:
        yield value.born, beside
        yield value.born + 1, -beside


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(prod(numbers(t.shape)) * t.dtype.itemsize for t in tensors)
