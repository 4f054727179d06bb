"""Traps of shapes: grouped heads, ranks, dtypes and batches around attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

B, H, S, D = 2, 4, 7, 16
INF = float("inf")
LOWEST = torch.finfo(torch.float32).min


def _qkv(
    heads: tuple[int, int] = (H, H),
    lengths: tuple[int, int] = (S, S),
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (B, heads[0], lengths[0], D),
        (B, heads[1], lengths[1], D),
        (B, heads[1], lengths[1], D),
    )
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def _indices(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | float = 0.0) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / 4 + mask, -1) @ v


def _filled(q: Tensor, k: Tensor, v: Tensor, excluded: Tensor, fill: float = -INF) -> Tensor:
    scores = (q @ k.transpose(-1, -2) * 0.25).masked_fill(excluded, fill)
    return torch.softmax(scores, -1) @ v


# -- refused: no attention, or not one that the op expresses --------------------------------------


def heads_repeated(q, k, v):
    k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(B, H, -1, D) for x in (k, v))
    return _attend(q, k, v)


def heads_interleaved(q, k, v):
    return _attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


def heads_tiled(q, k, v):
    return _attend(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))


def heads_tiled_by_expand(q, k, v):
    k, v = (x[:, None].expand(-1, 2, -1, -1, -1).reshape(B, H, -1, D) for x in (k, v))
    return _attend(q, k, v)


def keys_repeated_and_values_tiled(q, k, v):
    k = k[:, :, None].expand(-1, -1, 2, -1, -1).reshape(B, H, -1, D)
    return _attend(q, k, v.repeat(1, 2, 1, 1))


def lengths_repeated(q, k, v):
    k, v = (x[:, :, :, None].expand(-1, -1, -1, 2, -1).reshape(B, 2, -1, D) for x in (k, v))
    return _attend(q[:, :2], k, v)


def grouped_by_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@pytest.mark.parametrize(
    ("spelling", "heads"),
    [(heads_repeated, 2), (heads_tiled, H), (heads_tiled_by_expand, H), (lengths_repeated, 2)],
)
def test_key_heads_in_the_right_order(rewrite, assert_equal, spelling, heads):
    inputs = _qkv(heads=(H, 2))
    result = rewrite(spelling, inputs)
    (attention,) = result.attentions
    assert attention.args[1].meta["val"].shape[1] == heads
    assert_equal(result(*inputs), spelling(*inputs))


@pytest.mark.parametrize(
    "spelling", [heads_interleaved, keys_repeated_and_values_tiled, grouped_by_sdpa]
)
def test_other_groupings_of_heads_stay_right(rewrite, assert_equal, spelling):
    inputs = _qkv(heads=(H, 2))
    assert_equal(rewrite(spelling, inputs)(*inputs), spelling(*inputs))


def one_query_head(q, k, v):
    return _attend(q[:, :1], k, v)


def one_key_head(q, k, v):
    return _attend(q, k[:, :1], v[:, :1])


def one_value_head(q, k, v):
    return _attend(q, k, v[:, :1])


def five_dimensions(q, k, v):
    return _attend(q[None], k[None], v[None])


def scores_rounded_on_purpose(q, k, v):
    scores = (q @ k.transpose(-1, -2) / 4).bfloat16()
    return torch.softmax(scores, -1).float() @ v


def doubles(q, k, v):
    return _attend(q.double(), k.double(), v.double())


def values_of_another_dtype(q, k, v):
    return torch.softmax(q @ k.transpose(2, 3), -1).bfloat16() @ v.bfloat16()


def wide_heads(q, k, v):
    return _attend(*(x.repeat(1, 1, 1, 17) for x in (q, k, v)))


def integers_added(q, k, v):
    i, j = _indices(q, k)
    return _attend(q, k, v, j - i)


@pytest.mark.parametrize(
    ("trap", "reason"),
    [
        (one_query_head, "1 query heads read 4 key and 4 value heads"),
        (one_value_head, "4 query heads read 4 key and 1 value heads"),
        (five_dimensions, "operands have ranks"),
        (
            scores_rounded_on_purpose,
            "rounds to torch.bfloat16 inside, where the result is torch.float32",
        ),
        (doubles, "operands have dtypes ['float64']"),
        (values_of_another_dtype, "operands have dtypes ['bfloat16', 'float32']"),
        (wide_heads, "head dimensions are (272, 272, 272)"),
        (integers_added, "torch.int64 and is added"),
    ],
)
def test_preconditions_refuse_with_the_reason(rewrite, assert_equal, trap, reason):
    inputs = _qkv()
    result = rewrite(trap, inputs)
    assert result.attentions == []
    assert result.reasons.startswith("precondition: ")
    assert reason in result.reasons
    assert_equal(result(*inputs), trap(*inputs), factor=2)


def test_one_key_head_is_read_by_all(rewrite, assert_equal):
    inputs = _qkv()
    result = rewrite(one_key_head, inputs)
    assert len(result.attentions) == 1
    assert_equal(result(*inputs), one_key_head(*inputs))


def filled_at_the_lowest(q, k, v):
    i, j = _indices(q, k)
    scores = (q @ k.transpose(2, 3) / 4).masked_fill(j > i, torch.finfo(q.dtype).min)
    return torch.softmax(scores, -1) @ v


def softmax_in_fp32(q, k, v):
    return torch.softmax(q @ k.transpose(2, 3) / 4, -1, dtype=torch.float32).to(q.dtype) @ v


def scores_in_fp32(q, k, v):
    scores = q.float() @ k.transpose(2, 3).float() / 4
    return torch.softmax(scores, -1).to(v.dtype) @ v


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spelling", [filled_at_the_lowest, softmax_in_fp32, scores_in_fp32])
def test_half_precision(rewrite, assert_equal, spelling, dtype):
    inputs = _qkv(dtype=dtype)
    result = rewrite(spelling, inputs)
    assert_equal(result(*inputs), spelling(*inputs))
    exact = spelling(*(x.double() for x in inputs))
    error = (result(*inputs).double() - exact).norm()
    assert error <= 1.5 * (spelling(*inputs).double() - exact).norm()
    if spelling is softmax_in_fp32:
        assert len(result.attentions) == 1


def mask_like_another_input(q, k, v, x):
    return _filled(q, k, v, ~x.new_ones(S, S, dtype=torch.bool).tril())


def test_mask_made_like_another_input(rewrite, assert_equal):
    inputs = [*_qkv(), torch.randn(5)]
    result = rewrite(mask_like_another_input, inputs)
    (attention,) = result.attentions
    assert attention.kwargs["diagonal"] == 0
    assert_equal(result(*inputs), mask_like_another_input(*inputs))


def dropped(q, k, v):
    return F.dropout(torch.softmax(q @ k.transpose(2, 3) / 4, -1), 0.5, training=True) @ v


def dropped_by_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


@pytest.mark.parametrize("trap", [dropped, dropped_by_sdpa])
def test_active_dropout_is_refused(rewrite, assert_equal, trap):
    inputs = _qkv()
    result = rewrite(trap, inputs)
    assert result.attentions == []
    assert "dropout" in result.reasons or "is 0.5, where" in result.reasons
    torch.manual_seed(0)
    expected = trap(*inputs)
    torch.manual_seed(0)
    assert_equal(result(*inputs), expected)


def test_strided_operands(rewrite, assert_equal):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in _qkv())
    result = rewrite(_attend, (q, k, v))
    assert len(result.attentions) == 1
    assert_equal(result(q, k, v), _attend(q, k, v))


@pytest.mark.parametrize("magnitude", [1e-3, 30.0, 1e4])
def test_extreme_scores(rewrite, assert_equal, magnitude):
    inputs = [x * magnitude for x in _qkv()]
    result = rewrite(_attend, inputs)
    assert len(result.attentions) == 1
    assert_equal(result(*inputs), _attend(*inputs), factor=100 if magnitude > 1 else 1)
    assert math.isfinite(result(*inputs).sum().item())


# -- what a refused or unusual site still computes -------------------------------------------------


def two_fills(q, k, v):
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    padded = torch.arange(k.shape[2]) >= 3
    lowest = torch.finfo(torch.float32).min
    scores = (q @ k.mT / 4).masked_fill(~keep, lowest).masked_fill(padded, lowest)
    return torch.softmax(scores, -1) @ v


def two_fills_after_a_bias(q, k, v):
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    lowest = torch.finfo(torch.float32).min
    bias = torch.where(keep, 0.0, lowest)
    return torch.softmax((q @ k.mT / 4 + bias).masked_fill(keep, lowest), -1) @ v


@pytest.mark.parametrize("function", [two_fills, two_fills_after_a_bias])
def test_rows_that_keep_nothing_stay_uniform(rewrite, assert_equal, function):
    inputs = _qkv()
    assert_equal(rewrite(function, inputs)(*inputs), function(*inputs), factor=2)


@pytest.mark.parametrize("kept", [True, False])
def test_a_scale_that_guards_the_range_of_fp16(rewrite, kept):
    def guarded(q, k, v):
        weights = torch.softmax((q / 8) @ k.mT, -1)
        return (weights @ v,) if kept else (weights @ v, weights)

    inputs = [torch.full((1, 2, 4, 64), 40.0).half() for _ in range(3)]
    result = rewrite(guarded, inputs)
    for got, expected in zip(result(*inputs), guarded(*inputs), strict=True):
        assert expected.isfinite().all()
        torch.testing.assert_close(got, expected)
