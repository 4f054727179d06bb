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


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Where a pass might fire, whatever the target and the sizes: its sites and near misses, or
    the error with which it stopped looking."""

    rewrite: Pass
    sites: Sequence[Site] = ()
    misses: Sequence[Reject] = ()
    error: Exception | None = None


def find_sites(passes: Sequence[Pass], graph: fx.Graph) -> list[Found]:
    """Look for every pass in a normalised graph."""
    found = []
    for rewrite in passes:
        try:
            found.append(Found(rewrite, *_sites(rewrite, graph)))
        except Exception as error:
            log.exception("a defect of ridgeline, please report it: %s stopped", rewrite.name)
            found.append(Found(rewrite, error=error))
    return found


def propose(
    passes: Sequence[Pass], module: fx.GraphModule, setting: Setting
) -> tuple[list[Candidate], list[Refusal]]:
    """Look for every pass in a normalised graph; nothing is rewritten.

    A pass that stops with an error is a defect, which costs that pass and not the user's model.
    """
    return weigh(find_sites(passes, module.graph), module.graph, setting)


def weigh(
    found: Sequence[Found], graph: fx.Graph, setting: Setting
) -> tuple[list[Candidate], list[Refusal]]:
    """What the passes make of the sites found, for this target and at these sizes
    (`ridgeline.ir.sizes`)."""
    candidates: list[Candidate] = []
    refusals: list[Refusal] = []
    in_place = mutates(graph)
    for each in found:
        error = each.error
        if error is None:
            try:
                proposed, refused = _proposals(each, in_place, setting)
                candidates += proposed
                refusals += refused
                continue
            except Exception as stopped:
                log.exception(
                    "a defect of ridgeline, please report it: %s stopped", each.rewrite.name
                )
                error = stopped
        reason = f"the pass stopped ({type(error).__name__}: {error}); please report it"
        refusals.append(Refusal(each.rewrite, Reject(reason, graph.output_node()), "defect"))
    return candidates, refusals


def _proposals(
    found: Found, in_place: bool, setting: Setting
) -> tuple[list[Candidate], list[Refusal]]:
    """`weigh` for one pass."""
    rewrite = found.rewrite
    candidates: list[Candidate] = []
    refusals = [Refusal(rewrite, miss, "pattern") for miss in found.misses]
    for site in found.sites:
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
