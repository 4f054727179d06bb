"""What ranks make of caches that lie, or are filled, in another way on one of them."""

from gloo import on_ranks
from gloo.cached import of_other_lengths, uneven


def test_a_cache_that_lies_otherwise_on_one_rank_alone_is_captured_on_both() -> None:
    """A prefill, a step on its cache, and a step on a step's cache: rank 0 would need no third
    graph, and ran the second one alone until its timeout."""
    first, second = on_ranks(2, uneven)
    assert "trace" not in first, first
    assert (first["heads"], second["heads"]) == (1, 2)
    assert max(first["errors"] + second["errors"]) <= 1e-6
    assert first["captures"] == second["captures"] == 3


def test_caches_of_other_lengths_are_told_apart() -> None:
    """A cut cache gave wrong sums in silence: each rank's own attention read other tokens."""
    for told in on_ranks(2, of_other_lengths):
        assert "trace" not in told, told
        growing, static = told[:3], told[3:]
        for right, apart, again in (growing, static):
            assert (right, again) == ("right", "right")
            assert apart.startswith("RankMismatch: ")
            assert "lengths of caches differs (rank 0: float32[2, 6, 8] x 4, " in growing[1]
            assert "6 x 2, rank 1: " in static[1]
