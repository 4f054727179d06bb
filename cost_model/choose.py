"""One joint decision: which options to take, as a mixed-integer program.

    maximise    sum_i gain_i x_i                                   x_i in {0, 1}
    subject to  x_i + x_j <= 1             for i, j that conflict (cliques as one row)
                sum_i error_i² x_i <= error_budget²                errors add as root sum of squares
                base_memory_bytes + sum_i memory_i x_i + peak <= capacity_bytes
                peak >= bytes_t - sum_i freed_ti x_i               for every step t of `peaks`

and, where a byte of the peak has a price, gain - price · peak is what is maximised.

An option with `count` c stands for c alike, each beside copies of its own of what it conflicts with
(a model repeats its layers): options that conflict have one count. Were there no budget and no
capacity, every copy would take what one takes; where that holds both, it is the optimum. Where not,

    x_i in {0 .. c_i},   sum over a clique of x_i <= c

whose optimum stands if its numbers can be dealt to copies so that none holds two that conflict (in
perfect graphs they can; here they are dealt greedily). Else the copies become options of their own.

Ties go to the option listed first. Solved by HiGHS through `scipy.optimize.milp`: to the optimum up
to EXACT_UP_TO options, within LARGE_GAP of it above. Above, the linear relaxation comes first: with
conflicts as cliques, few of its options are fractional; they are rounded down, what still fits is
added, and the result stands where it is within LARGE_GAP of the relaxation's bound.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ridgeline.cost_model.quiet import quiet_c
from ridgeline.ir.errors import RidgelineError

# Proving the last thousandth of a large knapsack takes minutes.
EXACT_UP_TO, LARGE_GAP = 500, 1e-3


class InfeasibleChoice(RidgelineError):
    """No set of options satisfies the constraints."""


class InvalidOption(RidgelineError):
    """An option that can't enter a choice."""


@dataclass(frozen=True, slots=True)
class Option:
    """gain: what the objective wins, in its own unit (seconds, joules, bytes, FLOPs).

    memory_bytes: added to the device's memory (negative: freed). error: relative, >= 0.
    conflicts: keys of options that can't be taken beside this one; need not be mutual. count: how
    many alike it stands for; gain, memory_bytes and error are of one.
    """

    key: str
    gain: float
    memory_bytes: int = 0
    error: float = 0.0
    conflicts: frozenset[str] = frozenset()
    count: int = 1


@dataclass(frozen=True, slots=True)
class Step:
    """A moment of a program: bytes that are alive then beside the weights, and by how many of them
    each option, by key, makes it less. Such an option counts once."""

    bytes: int
    freed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choice:
    """chosen: keys, in the order listed. gain, memory_bytes (base included), error: their sums.
    times: key -> how many of an option's count are taken."""

    chosen: tuple[str, ...]
    gain: float
    memory_bytes: int
    error: float
    times: dict[str, int] = field(default_factory=dict)


def solve(
    options: Sequence[Option],
    *,
    error_budget: float = 0.0,
    capacity_bytes: int | None = None,
    base_memory_bytes: int = 0,
    steps: Sequence[Step] = (),
    price_of_peak: float = 0.0,
) -> Choice:
    """The options that win the most.

    steps: when more is held than the base; price_of_peak: what a byte less at the fullest is worth.
    Raises InvalidOption (keys twice, unknown conflicts, figures that aren't finite) and
    InfeasibleChoice (the base doesn't fit the memory and no option frees enough).
    """
    _checked(options, error_budget, steps)
    limits = error_budget, capacity_bytes, base_memory_bytes, steps, price_of_peak
    if all(o.count == 1 for o in options):
        taken = _solved(options, *limits)
        return _choice(
            [(o, 1) for o, x in zip(options, taken, strict=True) if x], base_memory_bytes
        )
    single = [replace(o, count=1) for o in options]
    each = _solved(single, np.inf if error_budget > 0 else 0.0, None, 0)
    choice = _choice(
        [(o, o.count) for o, x in zip(options, each, strict=True) if x], base_memory_bytes
    )
    peak = max((_left(step, choice.times) for step in steps), default=0)
    fits = capacity_bytes is None or choice.memory_bytes + peak <= capacity_bytes
    if fits and choice.error <= error_budget and not price_of_peak:
        return choice
    _check_memory(options, capacity_bytes, base_memory_bytes)
    many = _solved(options, *limits)
    if _can_be_dealt(options, many):
        return _choice(
            [(o, int(x)) for o, x in zip(options, many, strict=True) if x], base_memory_bytes
        )
    copies = [(o, c) for o in options for c in range(o.count)]
    taken = _solved([_copy(o, c) for o, c in copies], *limits)
    times = Counter(o.key for (o, _), x in zip(copies, taken, strict=True) if x)
    return _choice([(o, times[o.key]) for o in options if o.key in times], base_memory_bytes)


def _check_memory(
    options: Sequence[Option], capacity_bytes: int | None, base_memory_bytes: int
) -> None:
    """Raises InfeasibleChoice where the base does not fit whatever is taken."""
    if capacity_bytes is None or base_memory_bytes <= capacity_bytes:
        return
    freeing = [replace(o, gain=-o.memory_bytes, count=1) for o in options]
    taken = _solved(freeing, np.inf, None, 0)
    freed = -sum(o.memory_bytes * o.count for o, x in zip(options, taken, strict=True) if x)
    if base_memory_bytes - freed > capacity_bytes:
        kept = [float(x) for x in taken]
        memory = capacity_bytes, base_memory_bytes, ()
        raise InfeasibleChoice(_does_not_fit(options, kept, memory))


def _can_be_dealt(options: Sequence[Option], times: np.ndarray) -> bool:
    """Can each option go to as many copies, none of which holds two that conflict?"""
    index = {o.key: i for i, o in enumerate(options)}
    against: list[set[int]] = [set() for _ in options]
    for i, o in enumerate(options):
        for j in (index[key] for key in o.conflicts if index[key] != i):
            against[i].add(j)
            against[j].add(i)
    held: dict[int, set[int]] = {}
    for i in sorted(np.flatnonzero(times), key=lambda i: -len(against[i])):
        taken = {copy for j in against[i] for copy in held.get(j, ())}
        free = [copy for copy in range(options[i].count) if copy not in taken]
        if len(free) < times[i]:
            return False
        held[i] = set(free[: int(times[i])])
    return True


def _copy(option: Option, number: int) -> Option:
    """One of the options that `option` stands for."""
    if option.count == 1:
        return option
    return replace(
        option,
        key=f"{option.key} {number}",
        conflicts=frozenset(f"{key} {number}" for key in option.conflicts),
        count=1,
    )


def _choice(taken: Sequence[tuple[Option, int]], base_memory_bytes: int) -> Choice:
    """Of options, and how often each is taken."""
    return Choice(
        chosen=tuple(o.key for o, _ in taken),
        gain=sum(times * o.gain for o, times in taken),
        memory_bytes=base_memory_bytes + sum(times * o.memory_bytes for o, times in taken),
        error=float(np.sqrt(sum(times * o.error**2 for o, times in taken))),
        times={o.key: times for o, times in taken},
    )


def _left(step: Step, times: Mapping[str, int]) -> int:
    """Bytes of a step beside the options taken."""
    return step.bytes - sum(freed for key, freed in step.freed.items() if times.get(key))


def _solved(
    options: Sequence[Option],
    error_budget: float,
    capacity_bytes: int | None,
    base_memory_bytes: int,
    steps: Sequence[Step] = (),
    price_of_peak: float = 0.0,
) -> np.ndarray:
    """How often to take each option. An infinite budget bounds nothing."""
    rows, limits = _conflicts(options, {o.key: i for i, o in enumerate(options)})
    if 0 < error_budget < np.inf:
        # Scaled so that the tolerance of the solver is relative to the budget.
        rows.append([(i, (o.error / error_budget) ** 2) for i, o in enumerate(options) if o.error])
        limits.append(1.0)
    always = max((step.bytes for step in steps if not step.freed), default=0)  # of the peak
    above = [step for step in steps if step.freed and _highest(step) > always]
    unit = max(capacity_bytes or 1, *(step.bytes for step in above), 1)
    index, peak = {o.key: i for i, o in enumerate(options)}, len(options)
    if capacity_bytes is not None:
        rows.append([(i, o.memory_bytes / unit) for i, o in enumerate(options) if o.memory_bytes])
        rows[-1] += [(peak, 1.0)] if above else []
        limits.append((capacity_bytes - base_memory_bytes - always) / unit)
    for step in above:
        freed = [(index[key], -freed / unit) for key, freed in step.freed.items() if freed]
        rows.append([*freed, (peak, -1.0)])
        limits.append((always - step.bytes) / unit)
    allowed = np.array([error_budget > 0 or o.error == 0 for o in options], dtype=float)
    memory = capacity_bytes, base_memory_bytes, steps
    price = price_of_peak * unit if above else None
    return _maximise(options, rows, limits, allowed, memory, price)


def _highest(step: Step) -> int:
    """Bytes of a step beside all that make it more."""
    return step.bytes - sum(min(freed, 0) for freed in step.freed.values())


def _lowest(step: Step, keys: Collection[str]) -> int:
    """Bytes of a step beside all of these that make it less."""
    return step.bytes - sum(max(freed, 0) for key, freed in step.freed.items() if key in keys)


def _checked(options: Sequence[Option], error_budget: float, steps: Sequence[Step] = ()) -> None:
    index = {o.key: o for o in options}
    if len(index) != len(options):
        raise InvalidOption("two options have one key; expected a key of its own for each")
    if not (np.isfinite(error_budget) and error_budget >= 0):
        raise InvalidOption(f"error budget: expected a finite number >= 0, found {error_budget}")
    for o in options:
        if not (np.isfinite(o.gain) and np.isfinite(o.error) and o.error >= 0):
            raise InvalidOption(
                f"option {o.key!r}: expected a finite gain and an error >= 0,"
                f" found gain {o.gain}, error {o.error}"
            )
        unknown = [key for key in o.conflicts if key not in index]
        if unknown:
            raise InvalidOption(f"option {o.key!r} conflicts with unknown {sorted(unknown)}")
        if other := [key for key in sorted(o.conflicts) if index[key].count != o.count]:
            raise InvalidOption(
                f"option {o.key!r} stands for {o.count} and conflicts with {other[0]!r}, which"
                f" stands for {index[other[0]].count}; expected one count"
            )
    for key in {key for step in steps for key in step.freed}:
        if key not in index or index[key].count != 1:
            raise InvalidOption(
                f"a step that {key!r} makes less: expected an option that counts once"
            )


def _conflicts(
    options: Sequence[Option], index: dict[str, int]
) -> tuple[list[list[tuple[int, float]]], list[float]]:
    """Rows 'at most one of these', or as many as they stand for: greedy cliques that cover every
    conflicting pair."""
    neighbours: list[set[int]] = [set() for _ in options]
    for i, o in enumerate(options):
        for j in (index[key] for key in o.conflicts if index[key] != i):
            neighbours[i].add(j)
            neighbours[j].add(i)
    uncovered = {(i, j) for i, near in enumerate(neighbours) for j in near if i < j}
    rows = []
    for i, j in sorted(uncovered):
        if (i, j) not in uncovered:
            continue
        clique = [i, j]
        for other in sorted(neighbours[i] & neighbours[j]):
            if all(other in neighbours[member] for member in clique):
                clique.append(other)
        clique.sort()
        uncovered -= {(a, b) for a in clique for b in clique}
        rows.append([(member, 1.0) for member in clique])
    return rows, [float(options[row[0][0]].count) for row in rows]


def _maximise(
    options: Sequence[Option],
    rows: Sequence[Sequence[tuple[int, float]]],
    limits: Sequence[float],
    allowed: np.ndarray,
    memory: tuple[int | None, int, Sequence[Step]],
    price_of_peak: float | None,
) -> np.ndarray:
    """Of columns, the last is the peak where it has a price, by its own unit: what it has above
    what it has in any case."""
    if not options:
        capacity, base, steps = memory
        if capacity is not None and base + max((s.bytes for s in steps), default=0) > capacity:
            raise InfeasibleChoice(_does_not_fit(options, allowed, memory))
        return np.zeros(0, dtype=int)
    gains = np.array([o.gain for o in options])
    scale = float(np.abs(gains).max()) or price_of_peak or 1.0
    # HiGHS stops within an absolute gap of 1e-6: objective in units of the typical gain; the
    # preference is large enough to decide ties and too small to outweigh a difference that counts.
    preference = np.linspace(1.0, 0.0, len(options)) * 1e-5 / len(options)
    objective = gains / scale + np.where(gains > 0, preference, 0.0)
    peak = [] if price_of_peak is None else [price_of_peak / scale]
    columns = len(options) + len(peak)
    constraints = []
    matrix = None
    if rows:
        entries = [(r, i, v) for r, row in enumerate(rows) for i, v in row]
        at_row, at_column, values = zip(*entries, strict=True) if entries else ((), (), ())
        matrix = csr_array((values, (at_row, at_column)), shape=(len(rows), columns))
        constraints = [LinearConstraint(matrix, ub=np.array(limits))]
    counts = np.array([o.count for o in options])
    large = counts.sum() > EXACT_UP_TO

    def solved(integrality: int, gap: float):
        with quiet_c():
            return milp(
                np.array([*-objective, *peak]),
                integrality=np.array([integrality] * len(options) + [0] * len(peak)),
                bounds=Bounds(0.0, np.array([*(allowed * counts), *(np.inf for _ in peak)])),
                constraints=constraints,
                options={"mip_rel_gap": gap},
            )

    relaxes = large and (counts == 1).all()
    if relaxes and (relaxed := solved(0, 0.0)).x is not None:
        found = _rounded(relaxed.x, objective * allowed, matrix, np.array(limits))
        if found is not None:
            taken, risen = found
            value = objective[taken].sum() - sum(risen * price for price in peak)
            if value >= -relaxed.fun - LARGE_GAP * abs(relaxed.fun):
                return taken.astype(int)
    result = solved(1, LARGE_GAP if large else 0.0)
    if result.x is None:
        raise InfeasibleChoice(_does_not_fit(options, allowed, memory))
    return np.rint(result.x[: len(options)]).astype(int)


def _rounded(
    relaxed: np.ndarray, objective: np.ndarray, matrix: csr_array | None, limits: np.ndarray
) -> tuple[np.ndarray, float] | None:
    """(taken, peak): the options that a relaxation takes whole, and of the others those that fit
    beside them, the most taken and the most gainful first; where the peak does not, those taken in
    part that free the most come first. None where it does not fit even so."""
    number = len(objective)
    taken = relaxed[:number] > 1 - 1e-6
    if matrix is None:
        return taken, 0.0
    columns = matrix.tocsc()
    by_peak = columns[:, [number]].toarray()[:, 0] if len(relaxed) > number else 0 * limits
    steps, hard = by_peak < 0, by_peak == 0
    slack = limits - columns[:, :number] @ taken  # beside a peak of 0

    def peak() -> float:
        return max(0.0, -slack[steps].min(initial=0.0))

    def add(i: int, among: np.ndarray) -> None:
        """Take it if there is room for it, in those rows."""
        start, stop = columns.indptr[i : i + 2]
        rows, values = columns.indices[start:stop], columns.data[start:stop]
        if (values <= slack[rows]).all(where=among[rows]):
            taken[i] = True
            slack[rows] -= values

    freed = -(steps @ columns[:, :number])
    for i in np.argsort(-freed, kind="stable"):
        if freed[i] <= 0 or (slack - by_peak * peak() >= -1e-9).all():
            break
        if not taken[i] and relaxed[i] > 1e-6:
            add(i, hard)
    risen = peak()
    slack -= by_peak * risen
    if (slack < -1e-9).any():
        return None
    for i in np.lexsort((-objective, -relaxed[:number])):
        if not taken[i] and objective[i] > 0:
            add(i, np.ones_like(hard))
    return taken, max(0.0, risen - slack[steps].min(initial=risen))


def _does_not_fit(
    options: Sequence[Option],
    allowed: Sequence[float] | np.ndarray,
    memory: tuple[int | None, int, Sequence[Step]],
) -> str:
    capacity, base, steps = memory
    ok = [o for o, allows in zip(options, allowed, strict=True) if allows]
    freed = -sum(min(o.memory_bytes, 0) * o.count for o in ok)
    keys = {o.key for o in ok}
    least = max((_lowest(step, keys) for step in steps), default=0)
    beside = f", and at least {least} more at its fullest step," if steps else ""
    return (
        f"the program holds {base} bytes{beside} and the device {capacity}; the options free at"
        f" most {freed}. Choose a device with more memory, or allow options that free more"
    )
