"""Every site of every pass: its candidates, or the reason why it has none."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from ridgeline.ir.aliases import mutates
from ridgeline.ir.match import Reject, Site, find
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.region import changed_inside, rounds_inside

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Refusal:
    """A site, or an anchor that is no site, of a pass with the reason."""

    rewrite: Pass
    reject: Reject
    by: Literal["pattern", "precondition", "defect"]


def propose(
    passes: Sequence[Pass], module: fx.GraphModule, setting: Setting
) -> tuple[list[Candidate], list[Refusal]]:
    """Look for every pass in a normalised graph; nothing is rewritten.

    A pass that stops with an error is a defect, which costs that pass and not the user's model.
    """
    candidates: list[Candidate] = []
    refusals: list[Refusal] = []
    for rewrite in passes:
        try:
            proposed, refused = _proposals(rewrite, module.graph, setting)
        except Exception as error:
            log.exception("a defect of ridgeline, please report it: %s stopped", rewrite.name)
            reason = f"the pass stopped ({type(error).__name__}: {error}); please report it"
            proposed = []
            refused = [Refusal(rewrite, Reject(reason, module.graph.output_node()), "defect")]
        candidates += proposed
        refusals += refused
    return candidates, refusals


def _proposals(
    rewrite: Pass, graph: fx.Graph, setting: Setting
) -> tuple[list[Candidate], list[Refusal]]:
    """`propose` for one pass."""
    sites, misses = _sites(rewrite, graph)
    candidates: list[Candidate] = []
    refusals = [Refusal(rewrite, miss, "pattern") for miss in misses]
    in_place = mutates(graph)
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
