"""The bench of residual adds and norms: its forms compute the same, and it says which is taken."""

import multiprocessing

import pytest

from gloo import on_ranks
from ridgeline.tools.bench_tensor_parallel import measure, rows_of, table, verdict


def test_a_round_of_one_shape() -> None:
    first, second = on_ranks(2, rows_of, ((6, 16),), ("float32",), "eager", 1, "a100")
    assert "error" not in first, first
    assert first == second  # the slowest rank's times, on both
    (row,) = first
    assert all(seconds > 0 for seconds in row["seconds"])
    assert row["predicted"] == []  # an A100 is predicted by other laws
    assert table(2, first).row_count == 1
    assert verdict(first).endswith("times as long as norms on all tokens at worst")


def test_what_prediction_would_have_taken() -> None:
    """By hand: the shard wins below 0.9 of the time on all tokens."""
    rows = [
        {"seconds": [2.0, 1.0, 1.0], "predicted": [1.0, 0.5], "shard": True},
        {"seconds": [2.0, 4.0, 2.2], "predicted": [0.5, 0.46], "shard": False},
    ]
    assert verdict(rows) == (
        "the measured choice took 1.10 times as long as norms on all tokens at worst; prediction"
        " takes the same at 2 of 2 sizes, and norms on all took 2.0 to 4.0 times as long as"
        " predicted, in the median 3.0"
    )


def test_a_rank_that_fails_leaves_no_other_behind() -> None:
    with pytest.raises(RuntimeError, match="a rank failed"):
        measure(2, shapes=((6, 16),), dtypes=("no_dtype",), lowering="eager", rounds=1)
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("ForkServer")]


def test_it_starts_its_ranks_by_itself() -> None:
    options = {"dtypes": ("float32",), "lowering": "eager", "rounds": 1, "target": "a100"}
    (row,) = measure(2, shapes=((6, 16),), **options)
    assert (row["shape"], len(row["seconds"])) == ((6, 16), 3)
