"""Rows of tokens on their way to the ranks: the laws, and memory of their own."""

import pytest
import torch

from ridgeline.ir.token_rows import SUM_PARTS, TOKEN_ROWS


@pytest.mark.parametrize(("start", "rows"), [(0, 5), (0, 8), (3, 2), (4, 3), (5, 2), (9, 1)])
def test_rows_beyond_the_last_are_zero(start: int, rows: int) -> None:
    x = torch.randn(5, 3)
    padded = torch.cat([x, torch.zeros(6, 3)])
    y = TOKEN_ROWS.overload(x, start, rows)
    assert torch.equal(y, padded[start : start + rows])
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_parts_are_summed_in_a_wide_dtype(dtype: torch.dtype) -> None:
    """256 + 1 + ... + 1: in bfloat16, where 256 + 1 is 256, a chain of sums would lose the ones."""
    parts = torch.cat([torch.full((2, 3), 256.0), torch.ones(14, 3)]).to(dtype)
    y = SUM_PARTS.overload(parts, 8)
    assert y.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(y.double(), torch.full((2, 3), 263.0, dtype=torch.float64))
