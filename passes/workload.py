"""Which sizes a program is to be chosen for: batch and context, as values of its free sizes.

A program has a free symbol for its batch and one for its length where its model allows it. Of

    prefill, forward    the batch is dimension 0 of its first input, the context dimension 1:
                        the tokens (or rows) of the call
    decode              the batch likewise; the context is the length of the caches: the tokens
                        of before

What a program has fixed it is chosen for as it is, and `Sizes.fixed` says so.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy
from torch import Tensor, fx

from ridgeline.cost_model import Lifetimes
from ridgeline.ir.aliases import sharing, writes
from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.program import Phase, Program
from ridgeline.ir.sizes import captured_sizes, number, numbers
from ridgeline.ir.symbolic import shape_of

PHASES = ("prefill", "decode", "forward")
LARGEST = {"batch": 2**20, "context": 2**30}
_MEANS = {"batch": "sequences at once", "context": "tokens"}
Number = int | Mapping[str, int] | None


class WorkloadError(RidgelineError, ValueError):
    """A phase, batch or context that no program can be chosen for."""


def check_number(name: str, value: int, said: str = "") -> None:
    """Raises WorkloadError for a batch or context, called `said`, that no machine will see; sizes
    are products of several, and have to stay 64-bit integers."""
    if not 1 <= value <= LARGEST[name]:
        shown = f"{value}" if value < 10**12 else f"{float(min(value, 10**300)):.0e}"
        raise WorkloadError(
            f"{said or name} is {shown}; expected 1 to {LARGEST[name]} ({_MEANS[name]})"
        )


@dataclass(frozen=True, slots=True)
class Workload:
    """batch, context: of every phase, or by phase; None: as captured. phase: the only one that
    plain numbers are meant for; None: every one."""

    batch: Number = None
    context: Number = None
    phase: Phase | None = None

    def __post_init__(self) -> None:
        if self.phase is not None and self.phase not in PHASES:
            raise WorkloadError(f"phase is {self.phase!r}; choose one of {', '.join(PHASES)}")
        for name in ("batch", "context"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                if self.phase is not None or not value or not value.keys() <= set(PHASES):
                    raise WorkloadError(
                        f"{name} is {dict(value)!r}; by phase, name some of {', '.join(PHASES)} and"
                        " leave phase= out"
                    )
                values = list(value.values())
            else:
                values = [] if value is None else [value]
            for v in values:
                if not isinstance(v, int) or isinstance(v, bool) or v < 1:
                    raise WorkloadError(f"{name} is {v!r}; pass an integer of at least 1")
                check_number(name, v)
        if self.phase is not None and self.batch is None and self.context is None:
            raise WorkloadError(
                f"phase is {self.phase!r} and neither batch nor context is given; pass one of them,"
                " as batch=8, or leave phase= out"
            )

    def of(self, phase: str) -> tuple[int | None, int | None]:
        """(batch, context) asked of a phase."""

        def asked(value: Number) -> int | None:
            if isinstance(value, Mapping):
                return value.get(phase)
            return value if self.phase in (None, phase) else None

        return asked(self.batch), asked(self.context)


CAPTURED = Workload()
"""Every program as it was captured."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Values of every free symbol of a program, for `ridgeline.ir.sizes.sizes_at`.

    batch, context: what they come to, None where the program has no such dimension. fixed:
    sentences about what was asked and is fixed otherwise.
    """

    values: dict[sympy.Symbol, int]
    batch: int | None = None
    context: int | None = None
    fixed: tuple[str, ...] = field(default=())


def sizes_of(program: Program, batch: int | None, context: int | None) -> Sizes:
    """The sizes at which the program is to be chosen; None: as captured."""
    tensors = [n for n in program.module.graph.find_nodes(op="placeholder") if _is_tensor(n)]
    values = captured_sizes(program.module.graph)
    said: list[str] = []
    found = []
    for name, asked, at in (
        ("batch", batch, _batch(tensors)[:1]),
        ("context", context, _context(tensors, program.phase)),
    ):
        if not at:
            if asked is not None:
                said.append(f"the {program.phase} call has no {name}; {name}={asked} says nothing")
            found.append(None)
            continue
        node, dimension = at[0]
        expression, captured = shape_of(node)[dimension], number(node.meta["val"].shape[dimension])
        if asked is None or asked == captured:
            found.append(captured)
        elif expression.is_Symbol:
            # Caches of one length may have a symbol each, as those of windows that are not full.
            same = {shape_of(n)[d] for n, d in at if number(n.meta["val"].shape[d]) == captured}
            values |= dict.fromkeys((e for e in same if e.is_Symbol), asked)
            found.append(asked)
        else:
            found.append(captured)
            said.append(
                f"the {program.phase} call is captured with {name} {captured} fixed, and its"
                f" rewrites are chosen for that; {name}={asked} was asked"
            )
    return Sizes(values, *found, tuple(said))


def state(graph: fx.Graph, results: int | None) -> list[fx.Node]:
    """The caches that a call leaves behind: new tensors beyond its `results`, and inputs that it
    updates in place."""
    outputs = graph.output_node().args[0]
    new = [] if results is None else outputs[results:]  # pyright: ignore
    kept = [n for n in graph.find_nodes(op="placeholder") if _is_tensor(n) and writes(n)]
    held = (n for n in (*new, *kept) if isinstance(n, fx.Node) and _is_tensor(n))
    return list(dict.fromkeys(held))


def state_bytes(program: Program) -> int:
    """Bytes of its `state`, at the sizes of `ridgeline.ir.sizes`."""
    return bytes_of(state(program.module.graph, program.results))


def lifetimes(graph: fx.Graph, results: int | None) -> Lifetimes:
    """Of what a call holds beside its `state`. Caches come back all at once, so that those they
    replace are held to the end; one that is updated in place, or viewed, is there once."""
    new = state(graph, results)
    old = {node for cache in new for node in _grown_from(cache)}
    return Lifetimes(graph, new, kept=old.difference(*map(sharing, new)))


def _grown_from(cache: fx.Node) -> set[fx.Node]:
    """The inputs that its entries are copied from: reached through tensors of its dtype and sizes
    but for one dimension, the length."""
    value, found, seen = cache.meta["val"], set[fx.Node](), {cache}
    stack = [cache]
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            found.add(node)
        for operand in node.all_input_nodes:
            if operand not in seen and _is_tensor(operand):
                other = operand.meta["val"]
                if other.dtype == value.dtype and _but_for_one(shape_of(operand), shape_of(cache)):
                    seen.add(operand)
                    stack.append(operand)
    return found


def _but_for_one(a: Sequence[sympy.Expr], b: Sequence[sympy.Expr]) -> bool:
    return len(a) == len(b) and sum(m != n for m, n in zip(a, b, strict=True)) <= 1


def bytes_of(nodes: Iterable[fx.Node]) -> int:
    """Of the tensors that nodes hold."""
    return sum(_bytes(n.meta["val"]) for n in nodes)


def _bytes(tensor: Tensor) -> int:
    total = tensor.dtype.itemsize
    for size in numbers(tensor.shape):
        total *= size
    return total


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _batch(tensors: list[fx.Node]) -> list[tuple[fx.Node, int]]:
    return [(n, 0) for n in tensors if n.meta["val"].dim() >= 2]


def _context(tensors: list[fx.Node], phase: Phase) -> list[tuple[fx.Node, int]]:
    """Where the context is a size, free ones first."""
    if phase == "decode":  # caches: [batch, heads, length, head size]; full windows' are fixed
        caches = [n for n in tensors if n.meta["val"].dim() == 4]
        return [(n, 2) for n in sorted(caches, key=lambda n: shape_of(n)[2].is_Integer)]
    for node in tensors:
        value = node.meta["val"]
        if value.dim() == (3 if value.is_floating_point() else 2):
            return [(node, 1)]
    return []
