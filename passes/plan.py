"""The account: every site, applied or refused, with the reason, the worth and the evidence."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ridgeline.codegen.kernel import KernelReport
from ridgeline.cost_model import Cost
from ridgeline.passes.base import Exactness
from ridgeline.passes.plan_text import render

RefusedBy = Literal["pattern", "precondition", "cost", "budget", "certificate", "overlap", "defect"]


NO_DIFFERENCE = 1e-3
"""A relative difference of two figures that ranks nothing."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """Evidence for one rewrite.

    kind: "equivalence" (site against replacement in float64 on adversarial inputs) or "drift"
        (measured on data).
    relative_error: the largest relative Frobenius error of the site's output; limit: what was
        allowed, of an equivalence at the site, of drift at the model's outputs.
    cases: the inputs tried; preconditions: what was proven about values and structure.
    model_error: of drift, the relative error of the model's outputs with every rewrite applied.
    """

    kind: Literal["equivalence", "drift"]
    relative_error: float
    limit: float
    cases: tuple[str, ...]
    preconditions: tuple[str, ...] = ()
    model_error: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """One line of the account, with the fields of `Plan.to_dict` and ``dump --format json``.

    at: module path and node. phase: the label of the graph. refused_by: None when applied.
    needed: the smallest change that would let a refused rewrite fire. source: ``file:line`` of the
    model's code that stands in the way. before, after: predicted cost
    of the site on the target.
    """

    rewrite: str
    at: str
    exactness: Exactness
    refused_by: RefusedBy | None
    reason: str
    phase: str = "forward"
    variant: str = ""
    needed: str = ""
    source: str = ""
    before: Cost | None = None
    after: Cost | None = None
    certificate: Certificate | None = None

    @property
    def otherwise_by_eflops(self) -> bool:
        """Do Kinetics' eFLOPs rank before and after the other way round than seconds do?"""
        if self.before is None or self.after is None:
            return False
        seconds = self.after.seconds - self.before.seconds
        eflops = self.after.eflops - self.before.eflops
        same = (
            abs(seconds) <= NO_DIFFERENCE * self.before.seconds
            or abs(eflops) <= NO_DIFFERENCE * self.before.eflops
        )
        return not same and (seconds < 0) != (eflops < 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; costs as seconds with their interval and bound."""
        plain = asdict(self)
        for side in ("before", "after"):
            plain[side] = cost_to_dict(getattr(self, side))
        return plain


def cost_to_dict(cost: Cost | None) -> dict[str, Any] | None:
    """The figures of a cost that a plan reports."""
    return None if cost is None else asdict(cost)


@dataclass(slots=True)
class Plan:
    """The whole account of one `optimize` call; graphs captured later add to it.

    predicted: seconds of each captured graph before and after, with intervals, by its label: the
        phase, numbered from the second graph of a phase on ("prefill 2").
    measured: relative error of the outputs of each graph against the unrewritten model.
    seconds: what capturing and compiling each graph took, by stage.
    notes: what else the user should know, such as which device the result runs on.
    """

    target: str
    tolerance: float
    applied: list[Decision] = field(default_factory=list)
    refused: list[Decision] = field(default_factory=list)
    predicted: dict[str, dict[str, Any]] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    kernels: list[KernelReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, sentence: str) -> None:
        """Add a note once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def label(self, phase: str) -> str:
        """The name of a further graph of that phase: "prefill", then "prefill 2", ..."""
        names = [phase, *(f"{phase} {n}" for n in range(2, len(self.predicted) + 2))]
        return next(name for name in names if name not in self.predicted)

    def drop(self, label: str) -> None:
        """Forget the decisions about one graph."""
        self.applied[:] = [d for d in self.applied if d.phase != label]
        self.refused[:] = [d for d in self.refused if d.phase != label]
        self.predicted.pop(label, None)
        self.measured.pop(label, None)
        self.seconds.pop(label, None)

    def clear(self) -> None:
        """Forget every decision; target and tolerance stay."""
        for entries in (self.applied, self.refused, self.kernels, self.notes):
            entries.clear()
        for figures in (self.predicted, self.measured, self.seconds):
            figures.clear()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for json."""
        return {
            "target": self.target,
            "tolerance": self.tolerance,
            "applied": [d.to_dict() for d in self.applied],
            "refused": [d.to_dict() for d in self.refused],
            "predicted": self.predicted,
            "measured": self.measured,
            "seconds": self.seconds,
            "kernels": [k.to_dict() for k in self.kernels],
            "notes": list(self.notes),
        }

    def print(self, *, detail: bool = False) -> None:
        """Print the plan; `detail` gives each site its own line and adds the evidence."""
        render(self, detail=detail)
