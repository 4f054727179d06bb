"""The types that passes are made of: a pass is a value, not a subclass."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

from ridgeline.cost_model import Target, Work
from ridgeline.ir.match import Pattern, Reject, Site
from ridgeline.ir.op import Op

Exactness = Literal["exact", "reassociating", "approximate"]
"""exact: the same real function, one rounding less at most; reassociating: equal in real
arithmetic; approximate: a different function, allowed only under a tolerance."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a pass may look at besides the site.

    target: the machine; training: gradients must flow; tolerance: the user's error budget.
    observed: node -> its value on the example inputs (read only by approximate passes);
        ``observed.finite(node)``: is all of it finite; ``observed.values(node)``: what it ranges
        over; an `observe.Observation`.
    weights: the store of quantised weights, shared by all graphs of one `optimize`.
    proofs: what was found out about nodes of this graph, for the sites that ask again.
    """

    target: Target
    training: bool
    tolerance: float
    observed: Any
    weights: Any
    proofs: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A proposal; nothing is rewritten yet.

    call: what the pass needs to rewrite the site (opaque to everybody else).
    variant: which of the pass's forms, e.g. "4-bit minimum g32"; "" where there is one.
    before, after: work of the site as it stands and as it would be.
    error: expected relative error of the site's output, 0 when equal in real arithmetic.
    memory_bytes: weights held after, less weights held before.
    preconditions: what was proven about values and structure, in sentences.
    """

    rewrite: "Pass"
    site: Site
    call: Any
    before: Work
    after: Work
    variant: str = ""
    error: float = 0.0
    memory_bytes: int = 0
    preconditions: tuple[str, ...] = ()

    @property
    def at(self) -> str:
        """Module path and node, as ``model.layers.0.self_attn:softmax``."""
        return location(self.site.outs[0])


@dataclass(frozen=True, slots=True)
class Pass:
    """One piece of knowledge about models.

    op: what it puts into the graph; None where that is ATen's own. patterns: the spellings, traced
    at first use. search: finds sites, and near misses, that no
    traced pattern can name (bounds of slices that depend on sizes). accepts: a site -> every
    candidate for it, or the reason why there is none. prepare: once chosen, the costly part (fold
    or refine weights). apply: (candidate, nodes of the copy, graph module) -> rewrites the
    copy in place. rounding: largest relative Frobenius error of a kernel against the op's
    reference, by dtype.
    """

    name: str
    op: Op | None
    exactness: Exactness
    patterns: Callable[[], tuple[Pattern, ...]]
    accepts: Callable[[Site, Setting], "list[Candidate] | Reject"]
    apply: Callable[[Candidate, Mapping[fx.Node, fx.Node], fx.GraphModule], fx.Node]
    search: Callable[[fx.Graph], tuple[list[Site], list[Reject]]] = lambda graph: ([], [])
    prepare: Callable[[Candidate, Setting], Candidate] = lambda candidate, setting: candidate
    rounding: Mapping[str, float] = field(default_factory=dict)


_DYNAMO = re.compile(r"^L\['\w+'\]\.?")
"""How Dynamo's paths begin: with the local variable that held the model."""


def location(node: fx.Node) -> str:
    """Module path and node name; the path is the innermost module that the node came from."""
    stack = node.meta.get("nn_module_stack") or {}
    # torch files nodes of no module under a placeholder path.
    paths = [p for p, *_ in stack.values() if p and not p.startswith("_empty_nn_module_stack")]
    path = _DYNAMO.sub("", paths[-1]) if paths else ""
    return f"{path}:{node.name}" if path else node.name
