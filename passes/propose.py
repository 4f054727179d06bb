"""Every site of every pass: its candidates, or the reason why it has none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from ridgeline.ir.aliases import mutates
from ridgeline.ir.match import Reject, Site, find
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.region import changed_inside, rounds_inside


@dataclass(frozen=True, slots=True, eq=False)
class Refusal:
    """A site, or an anchor that is no site, of a pass with the reason."""

    rewrite: Pass
    reject: Reject
    by: Literal["pattern", "precondition"]


def propose(
    passes: Sequence[Pass], module: fx.GraphModule, setting: Setting
) -> tuple[list[Candidate], list[Refusal]]:
    """Look for every pass in a normalised graph; nothing is rewritten."""
    candidates: list[Candidate] = []
    refusals: list[Refusal] = []
    in_place = mutates(module.graph)
    for rewrite in passes:
        sites, misses = _sites(rewrite, module.graph)
        refusals += [Refusal(rewrite, miss, "pattern") for miss in misses]
        for site in sites:
            exact = rewrite.exactness != "approximate"
            answer = (exact and rounds_inside(site)) or rewrite.accepts(site, setting)
            if in_place and not isinstance(answer, Reject) and answer:
                answer = changed_inside(answer[0]) or answer
            if isinstance(answer, Reject):
                refusals.append(Refusal(rewrite, answer, "precondition"))
            else:
                candidates += answer
    return candidates, refusals


def _sites(rewrite: Pass, graph: fx.Graph) -> tuple[list[Site], list[Reject]]:
    """One site per output, from the first pattern that fits, and what the pass finds by itself; the
    deepest miss per other anchor."""
    sites: dict[tuple[fx.Node, ...], Site] = {}
    misses: dict[fx.Node, Reject] = {}
    for pattern in rewrite.patterns():
        found, missed = find(pattern, graph)
        for site in found:
            sites.setdefault(site.outs[:1], site)
        for anchor, miss in missed:
            if anchor not in misses or miss.depth > misses[anchor].depth:
                misses[anchor] = miss
    own, near = rewrite.search(graph)
    for site in own:
        sites.setdefault(site.outs, site)
    covered = {node for site in sites.values() for node in site.nodes}
    unfit = [m for anchor, m in misses.items() if anchor not in covered]
    return list(sites.values()), unfit + near
