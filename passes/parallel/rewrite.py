"""The collectives of one graph, rewritten on all ranks alike, with an account of it.

    layouts -> region -> agree -> rewrite -> layouts and counts again

It takes, in normal form (`collectives`), what `ridgeline.ir.capture` gives, and
`ridgeline.ir.local_graph`, where what DTensor's redistributions send is in the graph.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch.distributed as dist
from torch import Tensor, fx

from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.match import Reject
from ridgeline.ir.program import WEIGHT
from ridgeline.ir.provenance import operation, source_of
from ridgeline.passes.base import location
from ridgeline.passes.compiler import OptimizeError
from ridgeline.passes.parallel.agree import LeftAsItIs, RankMismatch, Ranks
from ridgeline.passes.parallel.allreduce_rms_norm import NAME, Place, shard_tokens
from ridgeline.passes.parallel.collectives import collectives, count, other_form
from ridgeline.passes.parallel.layouts import LayoutError, Part, propagate
from ridgeline.passes.parallel.signature import digest_of
from ridgeline.passes.parallel.token_region import PART, Region, find_regions
from ridgeline.passes.plan import Decision, RefusedBy

When = Literal["measured", "predicted", "always", "never"]
"""Whether to rewrite: where it is quicker when run here, where the cost model says so of the
target, wherever it can be done, or not."""


def check_when(name: str, when: When | None) -> None:
    """Raise OptimizeError for what is none of them; None leaves the choice open."""
    if when not in (None, *get_args(When)):
        raise OptimizeError(f"{name} is {when!r}; choose one of {get_args(When)}, or None")


class ParallelDefect(RidgelineError):
    """A rewritten graph that does not send or compute what it should."""


@dataclass(slots=True)
class Account:
    """What was done to a graph; expected: the collectives that it has now, by kind."""

    expected: Counter[str]
    applied: list[Decision] = field(default_factory=list)
    refused: list[Decision] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def rewrite_collectives(
    module: fx.GraphModule,
    ranks: Ranks,
    *,
    splits: dict[str, Part] | None = None,
    results: int | None = None,
    inputs: Sequence[Any] = (),
    fuse: bool = True,
    strict: bool = True,
    label: str = "forward",
) -> Account:
    """Rewrite `module`, in normal form, in place; every rank calls this for the same graph.

    splits, results: as `propagate` takes them. inputs: what the graph's placeholders take, where
    weights are among it. fuse: whether norms move to a shard of the tokens. strict: whether a
    LayoutError of the graph as it came is raised, or refuses the rewrite, and whether a mismatch of
    the graphs is raised, or leaves them as they are: what a model does with collectives of its own
    may be right, and differ between ranks. label: the graph's name in the account.

    Raises:
        LayoutError: the graph reads a value that this rank does not hold.
        RankMismatch, RankLost: the ranks have other graphs, or one is gone.
        LeftAsItIs: on all ranks, where the graph has a collective that is in no normal form, and
            where not strict, in place of RankMismatch.
        ParallelDefect: the rewritten graph has other collectives than planned.
    """
    graph = module.graph
    regions, rejects = [], []
    other = other_form(graph)
    try:
        layouts = propagate(graph, splits or {}, results) if other is None else {}
    except LayoutError as error:
        if strict:
            raise
        rejects.append(Reject(str(error), graph.output_node()))
    else:
        if other is None:
            regions, rejects = find_regions(graph, ranks.name, ranks.world, layouts)
    try:
        ranks.agree(
            f"the captured {label} graph",
            {
                "collectives": "; ".join(collectives(graph)),
                "their form": "" if other is None else other.reason,
                "norms on a shard": "; ".join(map(region_text, regions)),
                "their weights": digest_of(replicated_weights(module, regions, inputs)),
            },
        )
    except RankMismatch as error:
        if strict:
            raise
        raise LeftAsItIs(Reject(str(error), graph.output_node())) from error
    if other is not None:
        raise LeftAsItIs(other)
    account = Account(count(graph))
    account.refused += [refusal(r, label, "precondition") for r in rejects]
    if not regions or not fuse:
        return account
    by_parts = dist.get_backend(ranks.group) == "gloo"
    seeds, exits = sum(len(r.seeds) for r in regions), sum(len(r.exits) for r in regions)
    sends = "all_to_all_single" if by_parts else "reduce_scatter_tensor"
    account.applied += [applied(seed, label, sends) for r in regions for seed in r.seeds]
    account.notes.append(f"{label}: {seeds} all_reduce -> {seeds} {sends}, {exits} all_gather")
    account.expected += Counter({sends: seeds, "all_gather_into_tensor": exits})
    account.expected -= Counter(all_reduce=seeds)
    for region in regions:
        part, before = region.seeds[0].meta.get(PART), set(graph.nodes)
        shard_tokens(module, region, Place(ranks.name, ranks.world, ranks.rank, by_parts))
        for node in set(graph.nodes) - before:
            node.meta[PART] = part
    propagate(graph, splits or {}, results)
    check_counts(module, account)
    return account


def check_counts(module: fx.GraphModule, account: Account) -> None:
    """Raise ParallelDefect where the graph has other collectives than the account says."""
    if (found := count(module.graph)) != account.expected:
        raise ParallelDefect(
            f"expected the collectives {dict(account.expected)} in the rewritten graph, found"
            f" {dict(found)}; please report it"
        )


def applied(seed: fx.Node, label: str, sends: str) -> Decision:
    variant = f"{sends}, norm on a shard of the tokens, all_gather"
    return Decision(NAME, location(seed), "reassociating", None, "", label, variant)


def refusal(reject: Reject, label: str, by: RefusedBy, name: str = NAME) -> Decision:
    at, source = location(reject.node), source_of(reject.node)
    return Decision(
        name, at, "reassociating", by, reject.reason, label, needed=reject.needed, source=source
    )


def region_text(region: Region) -> str:
    """The operations of a region with their literals, what each reads of it, and what is gathered;
    by their place, because a rank may have other nodes before them, such as those that pad its
    vocabulary."""
    place = {node: i for i, node in enumerate(region.nodes)}
    lines = []
    for n in region.nodes:
        read = [str(place[i]) for i in n.all_input_nodes if i in place]
        literals = [repr(a) for a in (*n.args, *n.kwargs.values()) if isinstance(a, int | float)]
        lines.append(f"{operation(n)}({','.join(read + literals)})")
    return " ".join((*lines, "->", *(str(place[n]) for n in region.exits)))


def replicated_weights(
    module: fx.GraphModule, regions: Sequence[Region], inputs: Sequence[Any] = ()
) -> list[tuple[str, Tensor]]:
    """The weights that regions read, each of which every rank must hold alike."""
    nodes = [node for region in regions for node in region.nodes]
    read = {n for node in nodes for n in node.all_input_nodes}
    placeholders = module.graph.find_nodes(op="placeholder")
    known = {n: _attribute(module, str(n.target)) for n in read if n.op == "get_attr"}
    known |= {
        n: x for n, x in zip(placeholders, inputs, strict=False) if n in read and WEIGHT in n.meta
    }
    return sorted((str(n.target), value) for n, value in known.items())


def _attribute(module: fx.GraphModule, name: str) -> Tensor:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value
