"""Two parts of the tokens in turn: one part's collectives run beside the other's computation.

    parts a, b of the tokens (`parts`, `apart`), and their sends by turns (`in_turn`)

Sequences of a batch are split where there are enough; else the tokens of each sequence are, where
attention is proven causal: part b reads the keys and values of part a. Where it is cut is a matter
of waves: with t(n) tiles of a product on n tokens, and as many of them at once as the machine has
cores, waves(a) + waves(b) = waves(n) where that can be (`ridgeline.cost_model.wave_split`), and for
a GPU where the schedule is predicted fastest (`choose_schedule`). Source: Gond et al., TokenWeave,
2025 (arXiv:2505.11329), section 4.
"""

from dataclasses import dataclass
from math import prod

import sympy
import torch
from torch import fx

from ridgeline.cost_model import (
    InvalidSite,
    InvalidStack,
    InvalidTarget,
    Stack,
    Target,
    choose_schedule,
)
from ridgeline.cost_model.tensor_parallel import wave_split, waves
from ridgeline.ir.match import Reject
from ridgeline.ir.sizes import number, numbers
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.parallel.apart import Cut
from ridgeline.passes.parallel.parts import Parts, sizes_known

functional = torch.ops._c10d_functional
NAME = "token_weave"
SEQUENCES = 4
"""Of a batch that is split: halves of one sequence leave nothing to run beside."""
TOKENS = 64
"""Of sequences that are split, unless it is asked for: fewer are latency alone."""
GPU_TILE, CPU_TILE = 128, 16
"""Rows of a product that a core computes together: a thread block's, a register tile's."""


def find_cut(graph: fx.Graph, *, asked: bool) -> Cut | Reject:
    """Where the graph, with collectives in normal form, can be cut in the middle, or why not.

    asked: whether few tokens are split too.
    """
    sums = graph.find_nodes(op="call_function", target=functional.all_reduce.default)
    end = graph.output_node()
    if not sums:
        return Reject("nothing is summed over the ranks, so nothing can run beside", end)
    lead = shape_of(sums[0].args[0])[:-1]
    count = prod(numbers(sums[0].args[0].meta["val"].shape[:-1]))
    known, whys = sizes_known(graph), [_undivided(lead, count, end)]
    blocked: Reject | None = None
    for dim, size in enumerate(lead):
        sequences = dim == 0 and len(lead) > 1
        if size not in known:
            continue
        node, own = known[size]
        extent = number(node.meta["val"].shape[own])
        least = SEQUENCES if sequences else (4 if asked else TOKENS)
        if extent < least:
            what = "sequences" if sequences else "tokens of a sequence"
            few = Reject(f"{extent} {what} are fewer than {least}", end, "use longer prompts")
            whys.append(few)
            continue
        parts = Parts(graph, size)
        if parts.blocked is None:
            place = list(graph.find_nodes(op="placeholder")).index(node), own
            return Cut("sequences" if sequences else "tokens", size, place)
        blocked = blocked or parts.blocked
    return blocked or whys[-1]


def _undivided(lead: list[sympy.Expr], count: int, end: fx.Node) -> Reject:
    """Why sums over [*lead, hidden] have no dimension of tokens that could be cut."""
    if all(size.is_Integer for size in lead) and lead[-1] != 1:
        return Reject(
            f"{count} tokens, a size that is fixed in this graph",
            end,
            "let the length change from call to call",
        )
    if len(lead) > 1 and lead[-1] == 1:
        fixed = ", whose number is fixed in this graph" if lead[0].is_Integer and count > 1 else ""
        return Reject(f"{count} tokens, one of each sequence{fixed}", end)
    return Reject(
        f"{count} tokens in a dimension of size {sympy.prod(lead)}, which is no input's",
        end,
        "keep sequences and their tokens in two dimensions",
    )


@dataclass(frozen=True, slots=True)
class Chosen:
    """cut: with its tile; said: the sizes and waves of both parts; wins: what is predicted, None
    where it is not; told: every schedule's time, or why there is none."""

    cut: Cut
    said: str
    wins: bool | None = None
    told: str = ""


def choose_cut(
    graph: fx.Graph, cut: Cut, world: int, target: Target, stack: Stack | None
) -> Chosen:
    """`cut`, moved to where the target's waves are fewest, or a GPU's schedule fastest."""
    count = _extent(graph, cut)
    wide = [n for n in graph.nodes if n.target is torch.ops.aten.linear.default]
    columns = max((number(n.meta["val"].shape[-1]) for n in wide), default=1)
    if target.kind == "cpu":
        chosen = _moved(cut, wave_split(count, columns, target.threads, CPU_TILE), CPU_TILE)
        return Chosen(chosen, _said(chosen, count, columns, target.threads, CPU_TILE))
    sizes, wins, told = wave_split(count, columns, target.cores, GPU_TILE), None, ""
    try:
        if stack is None:
            raise InvalidStack("the model's config does not say its shape")
        sums = graph.find_nodes(op="call_function", target=functional.all_reduce.default)
        tokens = prod(numbers(sums[0].args[0].meta["val"].shape[:-1]))
        schedules = choose_schedule(stack, tokens, world, target)
        wins, told = schedules.chosen == "weave", "; ".join(map(str, schedules.schedules))
        if cut.what == "tokens" and tokens == count and schedules["weave"].split:
            a, b = schedules["weave"].split
            sizes = a, b
    except (InvalidSite, InvalidStack, InvalidTarget) as error:
        told = f"not predicted: {error}"
    tile = GPU_TILE if cut.what == "tokens" and sizes[0] % GPU_TILE == 0 else 1
    chosen = _moved(cut, sizes if tile > 1 else (-(-count // 2), count // 2), tile)
    return Chosen(chosen, _said(chosen, count, columns, target.cores, GPU_TILE), wins, told)


def _extent(graph: fx.Graph, cut: Cut) -> int:
    index, dim = cut.place
    return number(list(graph.find_nodes(op="placeholder"))[index].meta["val"].shape[dim])


def _moved(cut: Cut, sizes: tuple[int, int], tile: int) -> Cut:
    """The cut whose first part has that size, for this count of tokens."""
    if cut.what == "sequences" or sizes[0] % tile:
        return cut
    half = -(-sum(sizes) // (2 * tile)) * tile
    return Cut(cut.what, cut.symbol, cut.place, tile, sizes[0] - half)


def _said(cut: Cut, count: int, columns: int, cores: int, tile: int) -> str:
    a, b = cut.sizes(count)
    if cut.what == "sequences":
        return f"sequences {a} + {b}"
    rounds = [waves(n, columns, cores, tile) for n in (count, a, b)]
    return (
        f"tokens {a} + {b}; {columns} columns take {rounds[0]} waves of {tile} x {tile} tiles on"
        f" {cores} cores whole, {rounds[1]} + {rounds[2]} in parts"
    )
