"""The order of a graph in two parts: one part's sends are under way while the other computes.

With a_0, a_1, ... what part a sends, and b_0, b_1, ... part b:

    ... a_0  ... b_0  wait a_0 ... a_1  wait b_0 ... b_1  ...

Before each send comes what it is computed from, and nothing else: so a wait stands where its value
is first needed, as late as it can, and between a send and its wait lies the other part's work.
Sends are in this one order on all ranks, whatever kernels each has chosen.
"""

from collections.abc import Iterator
from itertools import zip_longest

from torch import fx

from ridgeline.ir.aliases import sharing, writes
from ridgeline.passes.parallel.collectives import is_collective
from ridgeline.passes.parallel.token_region import PART


def in_turn(graph: fx.Graph) -> None:
    """Order the nodes of a graph in place; nothing else of it is changed."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    after = _after_writes(graph, place)
    first = [n for n in graph.nodes if n.op in ("placeholder", "get_attr")]
    done = set(first)
    order = list(first)
    for node in (*_sends(graph), *graph.nodes):
        new: set[fx.Node] = set()
        stack = [node]
        while stack:
            at = stack.pop()
            if at in done or at in new:
                continue
            new.add(at)
            stack += [*at.all_input_nodes, *after.get(at, ())]
        order += sorted(new, key=place.__getitem__)
        done |= new
    end = graph.output_node()
    for node in order:
        if node is not end:
            end.prepend(node)


def _sends(graph: fx.Graph) -> Iterator[fx.Node]:
    """The parts' collectives by turns, then those that read both parts."""
    sends = [n for n in graph.nodes if is_collective(n)]
    a, b = ([n for n in sends if n.meta.get(PART) == part] for part in (0, 1))
    for pair in zip_longest(a, b):
        yield from (n for n in pair if n is not None)
    yield from (n for n in sends if n.meta.get(PART) is None)


def _after_writes(graph: fx.Graph, place: dict[fx.Node, int]) -> dict[fx.Node, list[fx.Node]]:
    """What must come before a node though it is no operand: writes to memory that it reads or
    writes, and reads of memory that it writes."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        for value in node.all_input_nodes if node.op == "call_function" else ():
            if node not in writes(value):
                continue
            for user in {u for shared in sharing(value) for u in shared.users} - {node}:
                earlier, later = sorted((user, node), key=place.__getitem__)
                found.setdefault(later, []).append(earlier)
    return found
