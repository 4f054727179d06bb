"""Ranks that differ, fail, end or stay away: a clear error on the others, and no deadlock."""

import pytest

from gloo import on_ranks
from gloo.calls import out_of_step
from gloo.work import (
    ends_before,
    ends_between,
    fails,
    fails_when_run,
    goes_on_after_failures,
    other_batch,
    other_model,
    other_setting,
    other_version,
    stays_away,
)


@pytest.mark.parametrize(
    ("work", "differs"),
    [
        (other_model, "model"),
        (other_setting, "config.rms_norm_eps"),
        (other_version, "torch"),
        (other_batch, "shapes of inputs"),
    ],
)
def test_ranks_that_differ_are_told_apart_on_all(work, differs: str) -> None:
    for told in on_ranks(3, work, 1, timeout=30):
        assert told["error"] == "RankMismatch"
        assert f"{differs} differs (rank 0: " in told["message"]


def test_a_failure_is_known_to_the_others() -> None:
    first, failed = on_ranks(2, fails, 1)
    assert failed["error"] == "Unparallel"
    assert first["error"] == "RankLost"
    assert "rank 1 of 2 failed: Unparallel: no attention or MLP" in first["message"]


def test_the_group_is_of_use_after_failures_that_all_have_seen() -> None:
    first, second = on_ranks(2, goes_on_after_failures)
    assert first == ["Unparallel", "RankLost", "right"]
    assert second == ["Unparallel", "Unparallel", "right"]


OUT_OF_STEP = {
    "fails while traced": "no rows of this table",
    "after it": "right",
    "another length": "shapes of inputs differs (rank 0: int64[2, 7], rank 1: int64[2, 8])",
    "other ids": "integers in inputs differs (rank 0: ",
    "another kind of call": "what is run differs (rank 0: graph 0, rank 1: a new graph)",
    "captures again, and fails": "what is run differs (rank 0: graph 0, rank 1: a new graph)",
    "an argument of no use": "CaptureError: an argument is a object",
    "at last": "right",
    "captures": "1 2",
    "other activations": "floats in inputs differs (rank 0: a sum of ",
    "gradients": "InferenceOnly: expected a call without gradients, found one that records them",
    "the same": "right",
}
"""Attempt -> what all ranks say of it; the group is of use after each."""


def test_calls_that_ranks_do_not_make_alike() -> None:
    for rank, told in enumerate(on_ranks(2, out_of_step)):
        assert "error" not in told, told
        assert told.keys() == OUT_OF_STEP.keys()
        for attempt, said in told.items():
            assert OUT_OF_STEP[attempt] in said, attempt
            known = said.startswith(("right", "1 2", "RankMismatch", "InferenceOnly"))
            failed = "CaptureError: " if rank == 1 else "RankLost: rank 1 of 2 failed: CaptureError"
            assert known or said.startswith(failed), said


def test_a_failure_in_a_timed_run_is_known_while_the_others_wait_for_it() -> None:
    """The rank that failed lives until the other has said what it knows."""
    first, failed = on_ranks(2, fails_when_run, 1, timeout=120)
    assert failed["error"] == "CompileError"
    assert "no memory for it" in failed["message"]
    assert first["error"] == "RankLost"
    assert "rank 1 of 2 failed: CompileError: " in first["message"]
    assert "ValueError: no memory for it" in first["message"]


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (ends_before, "waited 3 s for rank 1 to agree on the model"),
        (ends_between, "of 3 waited for another rank, which has ended"),
    ],
)
def test_a_rank_that_ends(work, said: str) -> None:
    first, ended, last = on_ranks(3, work, 1, timeout=3)
    assert ended is None
    assert {first["error"], last["error"]} == {"RankLost"}
    assert said in first["message"]


def test_a_rank_that_stays_away() -> None:
    first, away = on_ranks(2, stays_away, 1, timeout=3)
    assert first["error"] == "RankLost"
    assert away is None or "error" in away
