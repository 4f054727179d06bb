"""Every site of every pass: its candidates, or the reason why it has none."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from ridgeline.codegen.triton.arch import unknown
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


@dataclass(frozen=True, slots=True, eq=False)
class Weighed:
    """What a pass makes of one site: its candidates, or the reason why it has none. site: None
    where the refusal is of no site: a near miss, or a defect."""

    site: Site | None
    candidates: Sequence[Candidate] = ()
    refusal: Refusal | None = None


def propose(
    passes: Sequence[Pass], module: fx.GraphModule, setting: Setting
) -> tuple[list[Candidate], list[Refusal]]:
    """Look for every pass in a normalised graph; nothing is rewritten.

    A pass that stops with an error is a defect, which costs that pass and not the user's model.
    """
    weighed = weigh(find_sites(passes, module.graph), module.graph, setting)
    candidates = [c for w in weighed for c in w.candidates]
    return candidates, [w.refusal for w in weighed if w.refusal is not None]


_MUTATES = "does the graph write memory that others may read?"


def weigh(found: Sequence[Found], graph: fx.Graph, setting: Setting) -> list[Weighed]:
    """What the passes make of the sites found, for this target and at these sizes
    (`ridgeline.ir.sizes`)."""
    weighed: list[Weighed] = []
    if _MUTATES not in setting.proofs:
        setting.proofs[_MUTATES] = mutates(graph)
    for each in found:
        error = each.error
        if error is None:
            try:
                weighed += _weighed(each, setting.proofs[_MUTATES], setting)
                continue
            except Exception as stopped:
                log.exception(
                    "a defect of ridgeline, please report it: %s stopped", each.rewrite.name
                )
                error = stopped
        reason = f"the pass stopped ({type(error).__name__}: {error}); please report it"
        defect = Refusal(each.rewrite, Reject(reason, graph.output_node()), "defect")
        weighed.append(Weighed(None, refusal=defect))
    return weighed


def _weighed(found: Found, in_place: bool, setting: Setting) -> list[Weighed]:
    """`weigh` for one pass."""
    rewrite = found.rewrite
    weighed = [Weighed(None, refusal=Refusal(rewrite, m, "pattern")) for m in found.misses]
    for site in found.sites:
        exact = rewrite.exactness != "approximate"
        answer = (exact and rounds_inside(site)) or _kernels_missing(rewrite, site, setting)
        answer = answer or rewrite.accepts(site, setting)
        if in_place and not isinstance(answer, Reject) and answer:
            answer = changed_inside(answer[0]) or answer
        if isinstance(answer, Reject):
            refusal = Refusal(rewrite, answer, "precondition")
            weighed.append(Weighed(site, refusal=refusal))
        else:
            weighed.append(Weighed(site, answer))
    return weighed


def _kernels_missing(rewrite: Pass, site: Site, setting: Setting) -> Reject | None:
    """A refusal where the operation would run by its reference, slower than what it replaces."""
    target = setting.target
    problem = "" if target.kind == "cpu" or rewrite.op is None else unknown(target.arch)
    if not problem:
        return None
    return Reject(
        f"no kernel of {rewrite.name} is built for {target.name}: {problem}",
        site.outs[0],
        "choose a target of one of these architectures",
    )


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
