"""Timing arithmetic and order, on a clock that the test moves."""

import io
import json
from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from ridgeline.tools import timing
from ridgeline.tools.timing import Spread, TimingError, Timings, dram_read_bandwidth, interleave


class FakeMachine:
    """A clock, and functions that move it by a stated cost and note that they ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def function(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(name)
            self.now += seconds

        return run


def test_order_is_rotated_every_round() -> None:
    machine = FakeMachine()
    functions = {name: machine.function(name, 0.5) for name in "abc"}
    interleave(functions, baseline="a", rounds=3, inner=1, clock=machine.clock)
    measured = machine.calls[-9:]
    assert [measured[i : i + 3] for i in (0, 3, 6)] == [list("abc"), list("bca"), list("cab")]


def test_calls_per_sample_fill_the_asked_time() -> None:
    machine = FakeMachine()
    functions = {"slow": machine.function("slow", 0.25), "fast": machine.function("fast", 0.001)}
    timings = interleave(
        functions, baseline="slow", rounds=2, seconds_per_sample=0.125, clock=machine.clock
    )
    assert dict(timings.inner) == {"slow": 1, "fast": 125}
    assert timings.seconds("fast").median == pytest.approx(0.001)
    assert timings.speedup("fast").median == pytest.approx(250.0)


def test_ratios_are_taken_round_by_round() -> None:
    """A drift that slows both sides leaves the ratio alone, though it spreads the times."""
    timings = Timings(
        baseline="a",
        samples={"a": (2.0, 4.0, 20.0), "b": (1.0, 2.0, 10.0)},
        inner={"a": 1, "b": 1},
        threads=1,
    )
    assert timings.seconds("a") == Spread(median=4.0, lower=3.0, upper=12.0, least=2.0)
    assert timings.speedup("b") == Spread(2.0, 2.0, 2.0, 2.0)


def test_one_round_has_a_degenerate_spread() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "z"}, "baseline should be one of"),
        ({"baseline": "a", "rounds": 0}, "should be positive"),
        ({"baseline": "a", "inner": 0}, "should be positive"),
        ({"baseline": "a", "seconds_per_sample": 0.0}, "should be positive"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(TimingError, match=message):
        interleave({"a": lambda: None}, **options)


def test_a_function_below_the_clock_is_refused() -> None:
    machine = FakeMachine()
    with pytest.raises(TimingError, match="give `inner`"):
        interleave({"a": machine.function("a", 0.0)}, baseline="a", clock=machine.clock)


def test_table_names_the_baseline_and_the_ceiling() -> None:
    timings = Timings("eager", {"eager": (0.004,) * 3, "x[ours]": (0.001,) * 3}, {}, threads=2)
    out = io.StringIO()
    console = Console(file=out, width=200)
    console.print(timings.table("x", bytes_read={"x[ours]": 10_000_000}, ceiling=20e9))
    text = out.getvalue()
    for part in ("speed-up over eager", "4.00x", "10.0 GB/s", "of 20.0 GB/s", "50%", "x[ours]"):
        assert part in text
    assert "median [quartiles] of 3 interleaved rounds, 2 torch threads" in text
    timings.print("y", console)
    assert "baseline" in out.getvalue()


def test_table_wants_bytes_and_ceiling_together() -> None:
    timings = Timings("a", {"a": (1.0,)}, {"a": 1}, threads=1)
    with pytest.raises(TimingError, match="together"):
        timings.table(bytes_read={"a": 1})


def test_to_dict_is_json() -> None:
    timings = Timings("a", {"a": (1.0, 2.0)}, {"a": 4}, threads=1)
    assert json.loads(json.dumps(timings.to_dict())) == {
        "baseline": "a",
        "threads": 1,
        "inner": {"a": 4},
        "samples": {"a": [1.0, 2.0]},
    }


def test_times_are_written_in_their_unit() -> None:
    written = [timing._format(t) for t in (2.5, 0.0123, 4.56e-5, 7.89e-8)]
    assert written == ["2.5 s", "12.3 ms", "45.6 us", "78.9 ns"]


def test_bandwidth_is_bytes_over_the_best_time() -> None:
    """Readings of 4, 2 and 3 seconds over 8 MB: 4 MB/s."""
    ticks = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0])
    assert dram_read_bandwidth(8, rounds=3, clock=lambda: next(ticks)) == pytest.approx(4e6)


def test_threads_are_recorded() -> None:
    timings = interleave({"a": torch.ones(64).sum}, baseline="a", rounds=1, inner=1)
    assert timings.threads == torch.get_num_threads()
