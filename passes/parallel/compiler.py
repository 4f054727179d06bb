"""From the captured program of one rank to code, in step with the other ranks.

    normal form -> layouts -> norms on a shard of the tokens -> agree -> the passes of `optimize`

Only what is equal in real arithmetic is applied after the ranks agree, and none of it holds a
collective: ranks with other numbers of heads may choose other kernels, and still send the same.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, fx

from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.match import Reject
from ridgeline.ir.normalize import normalize
from ridgeline.ir.program import Program
from ridgeline.ir.provenance import source_of
from ridgeline.passes.apply import apply, copy_graph
from ridgeline.passes.base import Candidate, Setting, location
from ridgeline.passes.certify import relative_error
from ridgeline.passes.compiler import Compiler
from ridgeline.passes.decide import Choice
from ridgeline.passes.observe import outputs_of
from ridgeline.passes.parallel.agree import Ranks
from ridgeline.passes.parallel.allreduce_rms_norm import NAME, Place, shard_tokens
from ridgeline.passes.parallel.collectives import collectives, count, normal_form
from ridgeline.passes.parallel.layouts import propagate
from ridgeline.passes.parallel.measure import seconds_of_forms
from ridgeline.passes.parallel.signature import digest_of
from ridgeline.passes.parallel.token_region import Region, find_region
from ridgeline.passes.plan import Decision, RefusedBy
from ridgeline.passes.settle import rounding_limit

log = logging.getLogger(__name__)

Fuse = Literal["measured", "always", "never"]


class ParallelDefect(RidgelineError):
    """A rewritten graph that does not send or compute what it should."""


class ParallelCompiler(Compiler):
    """`Compiler` for a rank's model; splits: weight -> how it is split, as `propagate` takes it."""

    def __init__(
        self, target: Any, *, ranks: Ranks, splits: dict[str, str], fuse: Fuse, **options: Any
    ) -> None:
        super().__init__(target, **options)
        self.ranks, self.splits, self.fuse = ranks, splits, fuse
        self._before: fx.GraphModule | None = None

    def __call__(self, program: Program) -> Callable[..., Any]:
        with self.ranks.together():
            run = super().__call__(program)
        return self.ranks.guarded(run)

    def rewrite(self, program: Program) -> fx.GraphModule:
        self._before, _ = copy_graph(program.module)
        with program.spent("collectives"):
            expected = self._rewrite_collectives(program)
        rewritten = super().rewrite(program)
        if count(rewritten.graph) != expected:
            raise ParallelDefect(
                f"expected the collectives {dict(expected)} in the rewritten graph, found"
                f" {dict(count(rewritten.graph))}; please report it"
            )
        return rewritten

    def _rewrite_collectives(self, program: Program) -> Counter[str]:
        """Rewrite the program's graph in place; the collectives that it must then have."""
        module, label = program.module, self.plan.label(program.phase)
        normalize(module)
        normal_form(module)
        ranks = self.ranks
        layouts = propagate(module.graph, self.splits, program.results)
        region, rejects = find_region(module.graph, ranks.name, ranks.world, layouts)
        ranks.agree(
            f"the captured {label} graph",
            {
                "collectives": "; ".join(collectives(module.graph)),
                "norms on a shard": region_text(region),
                "their weights": digest_of(replicated_weights(module, region)),
            },
        )
        expected = count(module.graph)
        self.plan.refused += [self._refusal(r, label, "precondition") for r in rejects]
        if region is None or self.fuse == "never":
            return expected
        by_parts = dist.get_backend(ranks.group) == "gloo"
        worth = self._worth(region, by_parts) if self.fuse == "measured" else ""
        if worth.startswith("not"):
            self.plan.refused += [
                self._refusal(Reject(worth, seed), label, "cost") for seed in region.seeds
            ]
            return expected
        decisions = self._applied(region, label, by_parts)
        place = Place(ranks.name, ranks.world, ranks.rank, by_parts)
        shard_tokens(module, region, place)
        propagate(module.graph, self.splits, program.results)
        self.plan.applied += decisions
        sends = "all_to_all_single" if by_parts else "reduce_scatter_tensor"
        expected -= Counter(all_reduce=len(region.seeds))
        expected += Counter({sends: len(region.seeds), "all_gather_into_tensor": len(region.exits)})
        self.plan.note(
            f"{label}: {len(region.seeds)} all_reduce -> {len(region.seeds)} {sends},"
            f" {len(region.exits)} all_gather{'; ' if worth else ''}{worth}"
        )
        if (found := count(module.graph)) != expected:
            raise ParallelDefect(
                f"expected the collectives {dict(expected)} after {NAME}, found {dict(found)};"
                " please report it"
            )
        return expected

    def _worth(self, region: Region, by_parts: bool) -> str:
        """A sentence on both forms as measured; it begins with "not" where the rewrite loses."""
        value: Tensor = region.seeds[0].meta["val"]
        sizes = [s if isinstance(s, int) else s.node.hint for s in value.shape]
        tokens, size = value.numel() // value.shape[-1], sizes[-1]
        tokens = tokens if isinstance(tokens, int) else tokens.node.hint
        whole, shard = seconds_of_forms(
            self.ranks, tokens, size, value.dtype, value.device, by_parts
        )
        extra = len(region.exits) - len(region.seeds)
        told = f"[{tokens}, {size}] takes {whole:.2e} s as it is, {shard:.2e} s on a shard, here"
        if extra > 0:
            return f"not worth {extra} more gathers, of what is read besides the norms; {told}"
        return told if shard < whole else f"not faster: {told}"

    def _applied(self, region: Region, label: str, by_parts: bool) -> list[Decision]:
        sends = "all-to-all and a sum in fp32" if by_parts else "reduce-scatter"
        variant = f"{sends}, norm on a shard of the tokens, all-gather"
        return [
            Decision(NAME, location(seed), "reassociating", None, "", label, variant)
            for seed in region.seeds
        ]

    def _refusal(self, reject: Reject, label: str, by: RefusedBy) -> Decision:
        node = reject.node
        return Decision(
            NAME,
            location(node),
            "reassociating",
            by,
            reject.reason,
            label,
            needed=reject.needed,
            source=source_of(node),
        )

    def _settled(
        self,
        program: Program,
        captured: fx.GraphModule,
        module: fx.GraphModule,
        setting: Setting,
        choice: Choice,
        sound: Sequence[Candidate],
    ) -> tuple[dict[Candidate, Candidate], list[Candidate], dict[Candidate, str], float]:
        """All that is sound stays: to try rewrites one by one, as `settle` does, each rank would
        have to try the same. The outputs are compared once, and the ranks' worst error counts."""
        with program.spent("fold weights"):
            origin = {c.rewrite.prepare(c, setting): c for c in sound}
        assert self._before is not None
        with program.spent("measure"):
            run = self.ranks.guarded(outputs_of)
            expected = run(self._before, program)
            error = relative_error(run(apply(module, list(origin)), program), expected)
            (error,) = self.ranks.largest([error])
        self._before = None
        if error > (limit := rounding_limit(module)):
            raise ParallelDefect(
                f"the rewritten graph moves the outputs by {error:.1e}, where rounding explains"
                f' {limit:.0e}; please report it, and pass fuse="never" until then'
            )
        return origin, list(origin), {}, error


def region_text(region: Region | None) -> str:
    """The nodes of a region, and which of them are gathered."""
    return "" if region is None else " ".join(map(str, (*region.nodes, "->", *region.exits)))


def replicated_weights(
    module: fx.GraphModule, region: Region | None
) -> list[tuple[str, torch.Tensor]]:
    """The weights that a region reads, each of which every rank must hold alike."""
    nodes = region.nodes if region is not None else ()
    read = {n for node in nodes for n in node.all_input_nodes if n.op == "get_attr"}
    names = sorted(str(n.target) for n in read)
    return [(name, _attribute(module, name)) for name in names]


def _attribute(module: fx.GraphModule, name: str) -> torch.Tensor:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value
