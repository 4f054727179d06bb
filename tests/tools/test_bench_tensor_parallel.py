"""The bench of residual adds and norms: its forms compute the same, and it says which is taken."""

from gloo import on_ranks
from ridgeline.tools.bench_tensor_parallel import rows_of, table


def test_a_round_of_one_shape() -> None:
    first, second = on_ranks(2, rows_of, ((6, 16),), ("float32",), "eager", 1, "a100")
    assert "error" not in first, first
    assert first == second  # the slowest rank's times, on both
    (row,) = first
    assert all(seconds > 0 for seconds in row["seconds"])
    assert row["predicted"] == []  # an A100 is predicted by other laws
    assert table(2, first).row_count == 1
