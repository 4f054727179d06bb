"""The joint decision against brute force, its constraints, its ties, its errors."""

import dataclasses
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.cost_model import InfeasibleChoice, InvalidOption, Option, Step, choose, solve
from ridgeline.tools import bench_choose

KEYS = "abcdefg"


@st.composite
def instances(draw):
    count = draw(st.integers(1, len(KEYS)))
    names = KEYS[:count]
    options = [
        Option(
            key=name,
            gain=draw(st.integers(-5, 20)) / 4,
            memory_bytes=draw(st.integers(-3, 5)),
            error=draw(st.sampled_from([0.0, 0.1, 0.2, 0.3])),
            conflicts=frozenset(draw(st.sets(st.sampled_from(names), max_size=3))),
        )
        for name in names
    ]
    budget = draw(st.sampled_from([0.0, 0.15, 0.25, 0.4]))
    return options, budget, draw(st.none() | st.integers(0, 12)), draw(st.integers(0, 8))


def feasible(chosen, budget, capacity, base):
    keys = {o.key for o in chosen}
    return (
        not any((o.conflicts - {o.key}) & keys for o in chosen)
        and sum(o.error**2 for o in chosen) <= budget**2 + 1e-9
        and (capacity is None or base + sum(o.memory_bytes for o in chosen) <= capacity)
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(instances())
def test_equals_brute_force(instance):
    options, budget, capacity, base = instance
    sets = (
        chosen
        for size in range(len(options) + 1)
        for chosen in itertools.combinations(options, size)
        if feasible(chosen, budget, capacity, base)
    )
    best = max((sum(o.gain for o in chosen) for chosen in sets), default=None)
    arguments = {"error_budget": budget, "capacity_bytes": capacity, "base_memory_bytes": base}
    if best is None:
        with pytest.raises(InfeasibleChoice):
            solve(options, **arguments)
        return
    choice = solve(options, **arguments)
    taken = [o for o in options if o.key in choice.chosen]
    assert feasible(taken, budget, capacity, base)
    assert choice.gain == pytest.approx(best)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(instances(), st.lists(st.integers(1, 3), min_size=3, max_size=3))
def test_counts_are_as_good_as_copies(instance, counts):
    """Options that stand for several, against each of those by itself."""
    options, budget, capacity, base = instance
    joined = any(o.conflicts - {o.key} for o in options)  # those that conflict have one count
    options = [
        dataclasses.replace(o, count=counts[0 if joined else i % len(counts)])
        for i, o in enumerate(options)
    ]
    copies = [
        dataclasses.replace(
            o, key=f"{o.key}{n}", conflicts=frozenset(f"{k}{n}" for k in o.conflicts), count=1
        )
        for o in options
        for n in range(o.count)
    ]
    arguments = {"error_budget": budget, "capacity_bytes": capacity, "base_memory_bytes": base}
    try:
        expected = solve(copies, **arguments)
    except InfeasibleChoice:
        with pytest.raises(InfeasibleChoice):
            solve(options, **arguments)
        return
    choice = solve(options, **arguments)
    taken = [o for o in options for _ in range(choice.times.get(o.key, 0))]
    assert choice.gain == pytest.approx(expected.gain) == sum(o.gain for o in taken)
    assert choice.memory_bytes == base + sum(o.memory_bytes for o in taken)
    assert capacity is None or choice.memory_bytes <= capacity
    assert choice.error**2 == pytest.approx(sum(o.error**2 for o in taken))
    assert choice.error <= budget + 1e-9
    assert all(0 < choice.times[o.key] <= o.count for o in options if o.key in choice.chosen)


def _peak(steps, taken):
    return max(0, *(s.bytes - sum(n for k, n in s.freed.items() if k in taken) for s in steps))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    instances(),
    st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(-2, 6), min_size=8, max_size=8)),
             min_size=1, max_size=4),
    st.sampled_from([0.0, 0.5]),
)  # fmt: skip
def test_the_fullest_step_equals_brute_force(instance, drawn, price):
    """Steps at which more is held, of which options free some; a byte of the fullest may count."""
    options, budget, capacity, base = instance
    steps = [
        Step(size, {o.key: n for o, n in zip(options, freed, strict=False)})
        for size, freed in drawn
    ]

    def peak(chosen):
        return _peak(steps, {o.key for o in chosen})

    sets = [
        chosen
        for size in range(len(options) + 1)
        for chosen in itertools.combinations(options, size)
        if feasible(chosen, budget, None if capacity is None else capacity - peak(chosen), base)
    ]
    arguments = {
        "error_budget": budget, "capacity_bytes": capacity, "base_memory_bytes": base,
        "steps": steps, "price_of_peak": price,
    }  # fmt: skip
    if not sets:
        with pytest.raises(InfeasibleChoice):
            solve(options, **arguments)
        return
    best = max(sum(o.gain for o in chosen) - price * peak(chosen) for chosen in sets)
    choice = solve(options, **arguments)
    taken = [o for o in options if o.key in choice.chosen]
    assert tuple(taken) in sets
    assert choice.gain - price * peak(taken) == pytest.approx(best)


def test_a_step_is_made_less_by_options_that_count_once():
    with pytest.raises(InvalidOption, match="counts once"):
        solve([Option("a", 1.0, count=2)], steps=[Step(5, {"a": 1})])
    with pytest.raises(InfeasibleChoice, match=r"holds 10 bytes, and at least 3 more at its full"):
        solve(
            [Option("a", 1.0)], capacity_bytes=12, base_memory_bytes=10, steps=[Step(5, {"a": 2})]
        )


def test_odd_circles_of_conflicts_are_not_shared_out_twice():
    """Each of five beside its neighbours: two copies take four, though pairs would allow five."""
    conflicts = [frozenset({str((i + 1) % 5)}) for i in range(5)]
    options = [Option(str(i), 1.0, 1, 0.0, conflicts[i], count=2) for i in range(5)]
    assert solve(options).gain == 4
    large = Option("large", 0.1, 10, count=2)  # all that is wanted does not fit
    assert solve([*options, large], capacity_bytes=5).gain == 4


def test_gains_of_microseconds_are_told_apart():
    rivals = [Option("slow", 1e-7), Option("fast", 1.1e-7, conflicts=frozenset({"slow"}))]
    assert solve(rivals).chosen == ("fast",)


def test_ties_go_to_the_first():
    everyone = frozenset("abc")
    options = [Option(k, 1.0, conflicts=everyone - {k}) for k in "abc"]
    assert solve(options).chosen == ("a",)
    assert solve(options[::-1]).chosen == ("c",)


def test_errors_add_as_root_sum_of_squares():
    options = [Option(k, 1.0, error=0.03) for k in "abcd"]
    assert len(solve(options, error_budget=0.06).chosen) == 4  # sqrt(4) · 0.03
    assert len(solve(options, error_budget=0.059).chosen) == 3
    assert solve(options).chosen == ()
    assert solve(options, error_budget=0.06).error == pytest.approx(0.06)


def test_memory_is_freed_where_needed():
    shrink = Option("shrink", -1.0, memory_bytes=-50)
    choice = solve([shrink, Option("fast", 5.0, 10)], capacity_bytes=100, base_memory_bytes=120)
    assert choice.chosen == ("shrink", "fast")
    assert choice.memory_bytes == 80
    with pytest.raises(InfeasibleChoice, match=r"120 bytes and the device 60.*at most 50"):
        solve([shrink], capacity_bytes=60, base_memory_bytes=120)


def test_nothing_to_choose():
    assert solve([]).chosen == ()
    with pytest.raises(InfeasibleChoice):
        solve([], capacity_bytes=1, base_memory_bytes=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([Option("a", 1.0), Option("a", 1.0)], "one key"),
        ([Option("a", float("nan"))], "finite gain"),
        ([Option("a", 1.0, error=-1.0)], "error >= 0"),
        ([Option("a", 1.0, conflicts=frozenset("z"))], "unknown"),
        ([Option("a", 1.0, conflicts=frozenset("b"), count=3), Option("b", 1.0)], "stands for 3"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(InvalidOption, match=message):
        solve(options)


def test_many_options_come_within_the_gap_of_the_bound():
    """Ten thousand, in sites of four, with both budgets: no bound of theirs is far away."""
    given = bench_choose.options(10_000)
    limits = {"error_budget": 0.15, "capacity_bytes": 10**6, "base_memory_bytes": 10**6}
    choice = solve(given, **limits)
    taken = [o for o in given if o.key in set(choice.chosen)]
    assert len({int(o.key) // bench_choose.SITE for o in taken}) == len(taken)
    assert choice.error <= 0.15 * (1 + 1e-6)
    assert choice.memory_bytes <= 10**6
    # A part of it, solved to the optimum, wins no more in proportion than its share of the bound.
    exact = solve(given[:400], error_budget=0.15 / 5, capacity_bytes=10**6, base_memory_bytes=10**6)
    assert choice.gain == pytest.approx(25 * exact.gain, rel=0.1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(instances())
def test_the_way_for_many_options_equals_brute_force_within_its_gap(instance):
    options, budget, capacity, base = instance
    arguments = {"error_budget": budget, "capacity_bytes": capacity, "base_memory_bytes": base}
    with pytest.MonkeyPatch.context() as patch:
        try:
            exact = solve(options, **arguments)
        except InfeasibleChoice:
            return
        patch.setattr(choose, "EXACT_UP_TO", 0)
        choice = solve(options, **arguments)
    assert choice.gain >= exact.gain - choose.LARGE_GAP * max(1.0, abs(exact.gain))
    taken = [o for o in options if o.key in choice.chosen]
    assert feasible(taken, budget, capacity, base)


@pytest.mark.parametrize("price", [0.0, 1e-5])
@pytest.mark.parametrize("kinds", [0, 40])
def test_steps_take_the_way_for_many_options_too(kinds, price, monkeypatch):
    """A step that nobody frees is part of the base, and of others the peak is one more column."""
    draw = random.Random(0)
    options, steps = [], [Step(3_000), Step(2_000)]
    for i in range(400):
        for key, other in ((f"a{i}", f"b{i}"), (f"b{i}", f"a{i}")):
            memory = draw.randint(0, 30) if i >= kinds else 0
            conflicts = frozenset([other])
            error = draw.random() * 1e-3 if i >= kinds else 0.0
            options.append(Option(key, draw.random(), memory, error, conflicts))
    for i in range(kinds):
        steps.append(Step(5_000, {f"a{i}": 3_000, f"b{i}": draw.randint(-500, 1_500)}))
    capacity = 30_000 if kinds else 10_000
    limits = {"capacity_bytes": capacity, "error_budget": 0.01, "base_memory_bytes": 4_000}
    limits |= {"steps": steps, "price_of_peak": price}

    def value(choice):
        return choice.gain - price * _peak(steps, set(choice.chosen))

    asked, milp = [], choose.milp

    def seen(*args, **kwargs):
        asked.append(kwargs["integrality"].max())
        return milp(*args, **kwargs)

    monkeypatch.setattr(choose, "milp", seen)
    choice = solve(options, **limits)
    assert asked == [0]
    assert choice.memory_bytes + _peak(steps, set(choice.chosen)) <= capacity
    assert choice.error <= 0.01 + 1e-9
    monkeypatch.setattr(choose, "_rounded", lambda *_: None)
    other = solve(options, **limits)
    assert asked == [0, 0, 1]
    assert value(choice) >= value(other) - 2 * choose.LARGE_GAP * abs(value(other))
