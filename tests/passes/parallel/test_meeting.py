"""What ranks say before each call: whatever differs is found, whatever is alike goes on."""

import pytest

from gloo import on_ranks
from gloo.meetings import (
    apart,
    fails_after_the_last_collective,
    in_threads,
    late,
    with_another_default_device,
)

EXTREME = "numbers in inputs that are large or not finite differs (rank 0: "
FLOATS = "floats in inputs differs (rank 0: a sum of "
APART = {
    "first": "right",
    "first of the other": "right",
    "two models": "model differs (rank 0: number 0, Scaled",
    "a scale, to capture": "no tensors differs (rank 0: float 1.5, rank 1: float 2.5)",
    "both scale": "right",
    "a scale": "no tensors differs (rank 0: float 1.0, rank 1: float 2.0)",
    "NaN": EXTREME + "0, rank 1: 1 (",
    "inf": EXTREME + "0, rank 1: 1 (",
}
for _fill in ("-inf", "-3e+38", "-1e+09"):
    APART[f"{_fill}, alike"] = "right"
    APART[f"{_fill}, other activations"] = FLOATS
    APART[f"{_fill}, another mask"] = EXTREME + "0, 30 ("


@pytest.fixture(scope="module")
def told() -> list[dict]:
    return on_ranks(2, apart)


@pytest.mark.parametrize("attempt", APART)
def test_what_differs_is_found(attempt: str, told: list[dict]) -> None:
    for each in told:
        assert "error" not in each, each
        assert APART[attempt] in each[attempt]
        assert each[attempt].startswith(("right", "RankMismatch: "))


def test_every_attempt_is_expected(told: list[dict]) -> None:
    assert {*APART, "keys"} == set(told[0]) == set(told[1])


def test_the_store_does_not_grow(told: list[dict]) -> None:
    """Calls alike leave nothing in it, and of those that differ the last alone is there."""
    assert [each["keys"] for each in told] == [[0, 0], [0, 0]]


def test_a_failure_after_the_last_collective_leaves_the_ranks_in_step() -> None:
    lost = "RankLost: rank 1 of 2 failed: OutOfMemoryError: no memory for logits"
    own = "OutOfMemoryError: no memory for logits"
    first, failed = on_ranks(2, fails_after_the_last_collective)
    assert first == ["right", "right", lost, "right", "right"]
    assert failed == ["right", own, lost, "right", "right"]


def test_threads_take_turns() -> None:
    assert on_ranks(2, in_threads) == [["right"] * 12] * 2


def test_a_rank_that_comes_while_others_ask_is_not_lost() -> None:
    assert on_ranks(2, late) == [["right", "right"]] * 2


def test_the_default_device_is_not_where_ranks_meet() -> None:
    assert on_ranks(2, with_another_default_device) == [["right", "right"]] * 2
