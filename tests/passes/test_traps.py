"""What looks like attention and is not quite: refused with the reason, or rewritten and equal."""

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


def softmax_over_queries(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / 4, -2) @ v


def key_permuted_without_transpose(q, k, v):
    return torch.softmax(q @ k.permute(0, 1, 3, 2).reshape(k.shape).transpose(2, 3), -1) @ v


def weights_returned_too(q, k, v):
    p = torch.softmax(q @ k.transpose(-1, -2) / 4, -1)
    return p @ v, p


def scores_returned_too(q, k, v):
    z = q @ k.transpose(-1, -2) * 0.25
    return torch.softmax(z, -1) @ v, z


def weights_sharpened(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / 4, -1).square() @ v


def squashed(q, k, v):
    return torch.softmax(5 * torch.sigmoid(q @ k.transpose(-1, -2) / 20), -1) @ v


def temperature(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) * q.abs().mean(), -1) @ v


def scale_per_head(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) * q.abs().mean((2, 3), keepdim=True), -1) @ v


def mask_with_alpha(q, k, v):
    mask = torch.linspace(-1, 1, S).expand(S, S)
    return torch.softmax(torch.add(q @ k.transpose(-1, -2), mask, alpha=2), -1) @ v


def boolean_added_as_number(q, k, v):
    i, j = _indices(q, k)
    return torch.softmax(q @ k.transpose(-1, -2) / 4 + (j <= i), -1) @ v


def fills_that_do_not_exclude(q, k, v):
    i, j = _indices(q, k)
    return _filled(q, k, v, j > i, -5.0)


def values_on_the_left(q, k, v):
    return v.transpose(2, 3) @ torch.softmax(q @ k.transpose(-1, -2) / 4, -1)


def bias_per_key(q, k, v):
    return _attend(q, k, v, torch.linspace(-3, 3, S))


def mask_widens_the_batch(q, k, v):
    mask = torch.linspace(-1, 1, 3 * S * S).view(3, 1, S, S)
    return _attend(q[:1], k[:1], v[:1], mask)


def mask_widens_the_heads(q, k, v):
    mask = torch.linspace(-1, 1, 3 * S * S).view(1, 3, S, S)
    return _attend(q[:, :1], k[:, :1], v[:, :1], mask)


@pytest.mark.parametrize(
    ("trap", "reason"),
    [
        (softmax_over_queries, "is -2, where -1 is needed"),
        (weights_returned_too, "inside the site, is also read by the model's return value"),
        (scores_returned_too, "inside the site, is also read by the model's return value"),
        (weights_sharpened, "is read by 'square' at "),
        (squashed, "mul"),
        (temperature, "where a number known before the run is needed"),
        (scale_per_head, "where a number known before the run is needed"),
        (mask_with_alpha, "add"),
        (boolean_added_as_number, "torch.bool and is added to the scores as a number"),
        (values_on_the_left, "softmax"),
        (mask_widens_the_batch, "widens scores of shape [1, 4, 7, 7]"),
        (mask_widens_the_heads, "widens scores of shape"),
    ],
)
def test_refused_with_the_reason(rewrite, assert_equal, trap, reason):
    inputs = _qkv()
    result = rewrite(trap, inputs)
    assert result.attentions == []
    assert reason in result.reasons
    assert_equal(result(*inputs), trap(*inputs))


# -- rewritten: the unusual part is carried along --------------------------------------------------


def tensor_scale_on_the_query(q, k, v):
    return torch.softmax((q * q.abs().mean()) @ k.transpose(-1, -2), -1) @ v


def scale_per_feature(q, k, v):
    return torch.softmax((q * torch.linspace(0.5, 2, D)) @ k.transpose(-1, -2) / 4, -1) @ v


def negative_scale(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) * -0.5, -1) @ v


def small_penalty(q, k, v):
    i, j = _indices(q, k)
    return _attend(q, k, v, torch.where(j <= i, 0.0, -3.0))


def alibi(q, k, v):
    i, j = _indices(q, k)
    slopes = torch.tensor([2.0**-n for n in range(H)])[:, None, None]
    return _attend(q, k, v, slopes * (j - i).float())


def learned_bias(q, k, v):
    return _attend(q, k, v, torch.linspace(-3, 3, H * S * S).view(1, H, S, S))


def anticausal(q, k, v):
    i, j = _indices(q, k)
    return _attend(q, k, v, torch.where(j >= i, 0.0, -INF))


def window(q, k, v):
    i, j = _indices(q, k)
    return _attend(q, k, v, torch.where((j <= i) & (j > i - 3), 0.0, -INF))


def every_second_key(q, k, v):
    return _filled(q, k, v, _indices(q, k)[1] % 2 == 1)


def multiplied_masks(q, k, v):
    i, j = _indices(q, k)
    return _filled(q, k, v, ((j <= i) * (j > i - 3)).logical_not())


def mask_compared_with_zero(q, k, v):
    return _filled(q, k, v, torch.ones(S, S, dtype=torch.bool).tril() == 0)


def integer_mask_compared_with_zero(q, k, v):
    return _filled(q, k, v, torch.ones(S, S, dtype=torch.bool).tril().long() == 0)


def one_minus_integer_mask(q, k, v):
    return _filled(q, k, v, (1 - torch.ones(S, S, dtype=torch.bool).tril().long()).bool())


def integer_conjunction(q, k, v):
    i, j = _indices(q, k)
    return _filled(q, k, v, ((i & 3) == (j & 3)).logical_not())


def one_row_for_all_queries(q, k, v):
    keep = torch.arange(k.shape[2])[None, :] <= torch.arange(1)[:, None] + 3
    return _filled(q, k, v, ~keep)


def one_row_of_a_triangle(q, k, v):
    return _filled(q, k, v, ~torch.ones(1, S, dtype=torch.bool).tril(3))


def rows_from_the_end(q, k, v):
    triangle = torch.ones(S, S, dtype=torch.bool).tril()
    rows, columns = torch.arange(S)[:, None] - 2, torch.arange(S)[None, :]
    return F.scaled_dot_product_attention(q, k, v, triangle[rows, columns])


def narrow_integers_wrap(q, k, v):
    i, j = _indices(q, k)
    return _filled(q, k, v, (j + 253).to(torch.uint8) > (i + 253).to(torch.uint8))


def mask_of_the_inputs_dtype(q, k, v):
    return _filled(q, k, v, ~q.new_ones(S, S, dtype=torch.bool).tril())


def mask_made_like_a_third_tensor(q, k, v):
    hidden = torch.cat((q, k), -1)
    return _filled(q, k, v, ~hidden.new_ones(S, S, dtype=torch.bool).tril())


def mask_from_values(q, k, v):
    i, j = _indices(q, k)
    return _filled(q, k, v, j > i + (q[0, 0, :, :1] > 0).long())


def fully_masked_rows_at_the_lowest(q, k, v):
    i, j = _indices(q, k)
    return _filled(q, k, v, (j > i) | (i >= 4), LOWEST)


def strictly_causal_at_the_lowest(q, k, v):
    i, j = _indices(q, k)
    return _filled(q, k, v, j >= i, LOWEST)


def fully_masked_rows_of_sdpa(q, k, v):
    i, j = _indices(q, k)
    return F.scaled_dot_product_attention(q, k, v, (j <= i) & (i < 4))


def strictly_causal_sdpa(q, k, v):
    i, j = _indices(q, k)
    return F.scaled_dot_product_attention(q, k, v, j < i)


def two_triangles(q, k, v):
    i, j = _indices(q, k)
    return F.scaled_dot_product_attention(q, k, v, (j <= i) & (j <= i + 1))


def scale_twice(q, k, v):
    return torch.softmax((q * 0.5) @ (k * 0.5).transpose(-1, -2) / 0.7 * 1.1, -1) @ v


@pytest.mark.parametrize(
    "trap",
    [
        *(tensor_scale_on_the_query, scale_per_feature, negative_scale, small_penalty, alibi),
        *(bias_per_key, learned_bias, anticausal, window, every_second_key, multiplied_masks),
        *(mask_compared_with_zero, integer_mask_compared_with_zero, one_minus_integer_mask),
        *(
            integer_conjunction,
            one_row_for_all_queries,
            rows_from_the_end,
            one_row_of_a_triangle,
            narrow_integers_wrap,
        ),
        *(mask_of_the_inputs_dtype, mask_made_like_a_third_tensor, mask_from_values),
        *(fully_masked_rows_at_the_lowest, strictly_causal_at_the_lowest),
        *(fully_masked_rows_of_sdpa, strictly_causal_sdpa, two_triangles, scale_twice),
        key_permuted_without_transpose,
    ],
)
def test_rewritten_once_and_equal(rewrite, assert_equal, trap):
    inputs = _qkv()
    result = rewrite(trap, inputs)
    assert len(result.attentions) == 1, result.reasons
    assert_equal(result(*inputs), trap(*inputs), factor=2)
    for other in (3, 12):  # sizes that the graph was not captured with
        longer = [torch.randn(other, *x.shape[1:]) for x in inputs]
        assert_equal(result(*longer), trap(*longer), factor=2)


def test_fills_that_do_not_exclude_stay_as_they_are(rewrite, assert_equal):
    inputs = _qkv()
    result = rewrite(fills_that_do_not_exclude, inputs)
    assert all(n.kwargs["diagonal"] is None for n in result.attentions)
    assert_equal(result(*inputs), fills_that_do_not_exclude(*inputs))


# -- lengths, heads, dtypes, modes -----------------------------------------------------------------


def causal_from_the_top(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def causal_from_the_bottom(q, k, v):
    i, j = _indices(q, k)
    return _filled(q, k, v, j > i + (k.shape[2] - q.shape[2]))


def off_by_one(q, k, v):
    return F.scaled_dot_product_attention(
        q, k, v, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(1)
    )


@pytest.mark.parametrize("lengths", [(1, 9), (4, 9), (7, 7), (9, 4)])
@pytest.mark.parametrize("mask", [causal_from_the_top, causal_from_the_bottom, off_by_one])
def test_triangles_keep_their_alignment(rewrite, assert_equal, mask, lengths):
    inputs = _qkv(lengths=lengths)
    result = rewrite(mask, inputs)
    (attention,) = result.attentions
    expected = {
        causal_from_the_top: 0,
        causal_from_the_bottom: lengths[1] - lengths[0],
        off_by_one: 1,
    }[mask]
    # One row, whatever it keeps, is no triangle; rows without a key are not all alike.
    if lengths[0] > 1 and expected >= 0:
        assert attention.kwargs["diagonal"] == expected
    got, original = result(*inputs), mask(*inputs)
    empty = original.isnan()  # a softmax over nothing; the op gives 0, as the fused call does
    assert empty.any() == (mask is causal_from_the_bottom and expected < 0)
    assert (got[empty] == 0).all()
    assert_equal(got.masked_fill(empty, 0), original.masked_fill(empty, 0))
