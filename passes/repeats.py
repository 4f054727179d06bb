"""Sites that repeat: the layers of a model are alike, and one of them tells what all are worth.

Sites that share nodes, or whose candidates do, are one block. Blocks are alike where

    structure  their nodes call the same operations with the same literals, on each other in the
               same way, and on values from outside of the same dtypes, sizes (as expressions of the
               program's symbols) and strides
    answers    every pass makes the same of every site of theirs: works, errors, bytes, refusals

What a pass makes of a site at other sizes follows from its structure. What it looks at beyond that
(values of constants, proofs about masks, writes in place, who else reads a weight) knows no sizes,
so that answers are compared once, in full, for each target.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from ridgeline.cost_model import Replaced
from ridgeline.ir.match import Site
from ridgeline.ir.symbolic import size_expression
from ridgeline.passes.base import Candidate
from ridgeline.passes.propose import Found, Refusal, Weighed


@dataclass(frozen=True)
class Repeats:
    """found: the sites of one block of each kind. counts: site -> how many are like it, itself
    included. misses: refusals that are of no site. blocks: site -> the nodes of its block, and of
    those that are like it, each in order."""

    found: list[Found]
    counts: dict[Site, int]
    misses: list[Weighed]
    blocks: dict[Site, list[list[fx.Node]]]

    @cached_property
    def _alike(self) -> dict[fx.Node, list[list[fx.Node]]]:
        return {node: alike for alike in self.blocks.values() for node in alike[0]}

    def hold(self, weighed: Iterable[Weighed]) -> bool:
        """Does every candidate stay within its block, as those did that were compared?"""
        return all(
            set(self.blocks[w.site][0]).issuperset(c.site.nodes)
            for w in weighed
            if w.site is not None
            for c in w.candidates
        )

    def copies(self, candidate: Candidate) -> list[Replaced]:
        """The site of a candidate, and those that are like it."""
        site = candidate.site
        first, *others = self._alike[site.nodes[0]]
        place = {node: i for i, node in enumerate(first)}
        return [
            Replaced(*(tuple(nodes[place[n]] for n in of) for of in (site.nodes, site.outs)))
            for nodes in (first, *others)
        ]

    def kept(self, weighed: Iterable[Weighed]) -> list[Weighed]:
        """Of everything weighed, what is of a site of `found`, or of none."""
        return [w for w in weighed if w.site is None or w.site in self.counts]


def repeats(found: Sequence[Found], weighed: Sequence[Weighed]) -> Repeats:
    """Sort the blocks of sites in a graph; `weighed`: every site of `found`, at any sizes."""
    pass_of = {site: f.rewrite.name for f in found for site in f.sites}
    first: dict[Any, list[Weighed]] = {}
    alike: dict[Any, list[list[fx.Node]]] = {}
    for block in _blocks(weighed):
        nodes = sorted({n for w in block for n in _nodes(w)})
        key = _key(block, nodes, pass_of)
        first.setdefault(key, block)
        alike.setdefault(key, []).append(nodes)
    counts = {w.site: len(alike[key]) for key, block in first.items() for w in block if w.site}
    blocks = {w.site: alike[key] for key, block in first.items() for w in block if w.site}
    kept = [replace(f, sites=[s for s in f.sites if s in counts], misses=()) for f in found]
    return Repeats(kept, counts, [w for w in weighed if w.site is None], blocks)


def kinds(nodes: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """Node -> a number that it shares with the calls that do the same on values of the same
    kind."""
    numbers: dict[Any, int] = {}
    found: dict[fx.Node, int] = {}
    for node in nodes:
        bodies = isinstance(node.target, torch._ops.HigherOrderOperator)  # graphs of their own
        key = node if bodies else _Structure([node])(node)
        found[node] = numbers.setdefault(key, len(numbers))
    return found


def _described(value: Any) -> Any:
    """Dtype, sizes and strides of a value, sizes as expressions."""
    if isinstance(value, Tensor):
        sizes = tuple(map(size_expression, value.shape))
        return value.dtype, sizes, tuple(map(size_expression, value.stride())), value.device.type
    if isinstance(value, torch.SymInt):
        return size_expression(value)
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return value if isinstance(value, bool | int | float | None) else repr(value)


def _blocks(weighed: Sequence[Weighed]) -> list[list[Weighed]]:
    """Sites by what they share, each block in the order weighed."""
    owner: dict[fx.Node, int] = {}
    parent = list(range(len(weighed)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for i, w in enumerate(weighed):
        for node in _nodes(w):
            a, b = sorted((root(i), root(owner.setdefault(node, i))))
            parent[b] = a
    blocks: dict[int, list[Weighed]] = {}
    for i, w in enumerate(weighed):
        if w.site is not None:
            blocks.setdefault(root(i), []).append(w)
    return list(blocks.values())


def _nodes(weighed: Weighed) -> set[fx.Node]:
    sites = [c.site for c in weighed.candidates] + ([weighed.site] if weighed.site else [])
    return {n for site in sites for n in site.nodes}


def _key(block: list[Weighed], nodes: list[fx.Node], pass_of: dict[Site, str]) -> Any:
    """Equal for blocks that are alike."""
    structure = _Structure(nodes)
    return (
        tuple(map(structure, nodes)),
        tuple((pass_of[w.site], _said(w, structure)) for w in block if w.site),
    )


def _said(weighed: Weighed, structure: "_Structure") -> Any:
    """A site, and what its pass makes of it."""
    site = weighed.site
    assert site is not None
    return (
        site.pattern,
        tuple(site.literals.items()),
        structure.plain((site.bind, site.nodes, site.outs)),
        tuple(_offer(c, structure) for c in weighed.candidates),
        None if weighed.refusal is None else _reason(weighed.refusal),
    )


def _offer(c: Candidate, structure: "_Structure") -> Any:
    at = structure.plain((c.site.nodes, c.site.outs))
    return c.variant, c.before, c.after, c.error, c.memory_bytes, at


def _reason(refusal: Refusal) -> tuple[str, str]:
    """Without the names of nodes, which are each layer's own."""
    return refusal.by, re.sub(r"'[^']*'", "''", refusal.reject.reason)


class _Structure:
    """Nodes in order, as values that are equal for nodes that are alike."""

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self.inside = {node: i for i, node in enumerate(nodes)}
        self.outside: dict[fx.Node, int] = {}

    def __call__(self, node: fx.Node) -> Any:
        target = node.target if node.op == "call_function" else None
        return (
            node.op,
            target,
            self.plain((node.args, node.kwargs)),
            _described(node.meta.get("val")),
        )

    def plain(self, value: Any) -> Any:
        """Arguments, with nodes by their place inside, or by what comes in from outside."""
        if isinstance(value, fx.Node):
            if value in self.inside:
                return "inside", self.inside[value]
            where = self.outside.setdefault(value, len(self.outside))
            constant = value.op if value.op != "call_function" else ""
            return "outside", where, constant, _described(value.meta.get("val"))
        if isinstance(value, list | tuple):
            return tuple(map(self.plain, value))
        if isinstance(value, dict):
            return tuple((key, self.plain(each)) for key, each in value.items())
        if isinstance(value, slice):
            return "slice", *map(self.plain, (value.start, value.stop, value.step))
        return type(value).__name__, value
