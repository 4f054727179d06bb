"""Ranks that differ, fail, end or stay away: a clear error on the others, and no deadlock."""

import pytest

from gloo import on_ranks
from gloo.work import (
    ends_before,
    ends_between,
    fails,
    fails_when_run,
    goes_on_after_failures,
    other_graph,
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
        (other_graph, "collectives"),
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


def test_a_failure_in_a_timed_run_is_known_while_the_others_wait_for_it() -> None:
    first, failed = on_ranks(2, fails_when_run, 1, timeout=120)
    assert failed["error"] == "CompileError"
    assert "no memory for it" in failed["message"]
    assert first["error"] == "RankLost"
    assert "rank 1 of 2 failed: ValueError: no memory for it" in first["message"]


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (ends_before, "waited 3 s for rank 1 to agree on the model"),
        (ends_between, "rank 0 of 3 waited for another rank, which has ended"),
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
