"""Groups of some ranks, and ranks that talk about different things."""

import pytest

from gloo import on_ranks
from gloo.groups import asks_for_another_thing, of_a_mesh, unusable


def test_groups_of_a_mesh_have_calls_of_their_own() -> None:
    for rank, told in enumerate(on_ranks(4, of_a_mesh)):
        assert "trace" not in told, told
        assert told["error"] <= 1e-6
        assert told["tokens"] == 7 + rank // 2
        assert "expected a mesh of one dimension, found ('data', 'tensor')" in told["said"]


def test_ranks_that_talk_about_different_things() -> None:
    """Of long facts the error shows what is about the place where they differ."""
    for told in on_ranks(2, asks_for_another_thing):
        other, long, same = told
        assert other.startswith("RankMismatch: ")
        assert "subject differs (rank 0: it, rank 1: what they measured)" in other
        assert "long differs (rank 0: ..., 1, 1, 1, 1, 1, 1, 0, rank 1: ..., 1" in long
        assert same == "None"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"fuse": "allways"}, "OptimizeError: fuse is 'allways'; choose one of "),
        ({"weave": "yes"}, "OptimizeError: weave is 'yes'; choose one of "),
        ({"max_graphs": 0}, "OptimizeError: max_graphs is 0; keep at least 1"),
        ({"target": "h101"}, "UnknownTarget: "),
    ],
)
def test_arguments_that_cannot_be_used_are_known_to_all(arguments: dict, error: str) -> None:
    first, second = on_ranks(2, unusable, arguments)
    assert second[0].startswith(error)
    assert first[0].startswith(f"RankLost: rank 1 of 2 failed: {error}")
    assert first[1] == second[1] == "right"
