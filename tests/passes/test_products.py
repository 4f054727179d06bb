"""One definition of attention and of a linear layer, however its products are spelt."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ridgeline.ir.capture import capture
from ridgeline.ir.normalize import normalize

aten = torch.ops.aten
B, H, S, D = 2, 4, 7, 16


def _qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, S, D, generator=generator) for _ in range(3)]


def _scaled(q, k):
    return q @ k.transpose(-1, -2) / 4


def einsum_heads_second(q, k, v):
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / 4
    return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(scores, -1), v)


def einsum_lengths_second(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.25
    return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), v)


def einsum_key_first(q, k, v):
    scores = torch.einsum("...kd,...qd->...qk", k, q) * 0.25
    return torch.einsum("...kd,...qk->...qd", v, torch.softmax(scores, -1))


def bmm_of_flattened_heads(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)).div(4), -1)
    return torch.bmm(weights, v).view(B, H, S, D) if q.shape[0] == B * H else None


def bmm_and_back(q, k, v):
    shape = q.shape
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(*shape[:3], shape[2])
    weights = torch.softmax(scores * 0.25, -1)
    return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).view(shape)


def repeated_key_copied(q, k, v):
    k, v = k[:, ::2], v[:, ::2]
    k = k[:, :, None].expand(B, H // 2, 2, S, D).reshape(B, H, S, D)
    v = v[:, :, None].expand(B, H // 2, 2, S, D).reshape(B, H, S, D)
    scores = q @ k.swapdims(2, 3).contiguous() * 0.25
    return torch.softmax(scores, -1) @ v


def baddbmm_with_a_bias(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    bias = torch.linspace(-1, 1, q.shape[1])[None, None].expand(q.shape[0], q.shape[1], -1)
    scores = torch.baddbmm(bias, q, k.mT, beta=0.5, alpha=0.25)
    return torch.bmm(torch.softmax(scores, -1), v)


def key_first(q, k, v):
    return torch.softmax((k @ q.mT).mT * 0.25, -1) @ v


def weights_last(q, k, v):
    return (v.mT @ torch.softmax(_scaled(q, k), -1).mT).mT


def three_dimensions(q, k, v):
    return torch.softmax(_scaled(q[:, 0], k[:, 0]), -1) @ v[:, 0]


def one_matrix_each(q, k, v):
    return torch.softmax(_scaled(q[0, 0], k[0, 0]), -1) @ v[0, 0]


def values_of_one_batch(q, k, v):
    return torch.softmax(_scaled(q, k), -1) @ v[:1]


def query_of_one_batch(q, k, v):
    return torch.softmax(_scaled(q[:1], k), -1) @ v


def grouped_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)


def grouped_causal_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], is_causal=True, enable_gqa=True)


def scale_in_a_tensor(q, k, v):
    return torch.softmax((q @ k.mT) * torch.tensor(0.25), -1) @ v


def root_of_a_tensor(q, k, v):
    return torch.softmax((q @ k.mT).true_divide(torch.sqrt(torch.tensor(16.0))), -1) @ v


def power_of_a_tensor(q, k, v):
    return torch.softmax(torch.tensor(16.0) ** -0.5 * q @ k.mT, -1) @ v


def fill_in_a_tensor(q, k, v):
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    scores = _scaled(q, k).masked_fill(~keep, torch.tensor(-math.inf))
    return torch.softmax(scores, -1) @ v


def where_the_fill_first(q, k, v):
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return torch.softmax(torch.where(~keep, -math.inf, _scaled(q, k)), -1) @ v


def where_of_full(q, k, v):
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    scores = _scaled(q, k)
    return torch.softmax(torch.where(~keep, torch.full_like(scores, -1e38), scores), -1) @ v


def bias_subtracted(q, k, v):
    return torch.softmax(_scaled(q, k) - torch.linspace(0, 1, k.shape[2]), -1) @ v


def softmax_by_hand(q, k, v):
    scores = _scaled(q, k)
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True) @ v


def softmax_by_hand_with_max(q, k, v):
    scores = _scaled(q, k)
    e = torch.exp(scores - scores.max(dim=-1, keepdim=True).values.detach())
    return (e * e.sum(dim=3, keepdim=True).reciprocal()) @ v


def softmax_of_shifted_scores(q, k, v):
    scores = _scaled(q, k)
    return torch.softmax(scores - scores.amax(dim=-1, keepdim=True), dim=-1) @ v


def softmax_from_its_logarithm(q, k, v):
    return torch.exp(torch.log_softmax(_scaled(q, k), -1)) @ v


def softmax_from_logsumexp(q, k, v):
    scores = _scaled(q, k)
    return torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True)) @ v


@pytest.mark.parametrize(
    "function",
    [
        *(einsum_heads_second, einsum_lengths_second, einsum_key_first, bmm_and_back),
        *(baddbmm_with_a_bias, key_first, weights_last, three_dimensions, one_matrix_each),
        *(values_of_one_batch, query_of_one_batch, grouped_sdpa, grouped_causal_sdpa),
        *(scale_in_a_tensor, root_of_a_tensor, power_of_a_tensor, fill_in_a_tensor),
        *(where_the_fill_first, where_of_full, bias_subtracted, softmax_by_hand),
        *(softmax_by_hand_with_max, softmax_of_shifted_scores, softmax_from_its_logarithm),
        softmax_from_logsumexp,
    ],
)
def test_attention_is_found_once_and_equal(rewrite, assert_equal, function):
    inputs = _qkv()
    result = rewrite(function, inputs)
    assert len(result.attentions) == 1, result.reasons
    assert_equal(result(*inputs), function(*inputs), factor=3)


def softmax_by_hand_over_queries(q, k, v):
    e = torch.exp(_scaled(q, k))
    return e / e.sum(-2, keepdim=True) @ v


def softmax_over_two_dimensions(q, k, v):
    e = torch.exp(_scaled(q, k))
    return e / e.sum((-2, -1), keepdim=True) @ v


def another_sum(q, k, v):
    e = torch.exp(_scaled(q, k))
    return e / (e.sum(-1, keepdim=True) + 1) @ v


def shifted_per_key(q, k, v):
    scores = _scaled(q, k)
    return torch.softmax(scores - scores.amax(-2, keepdim=True), -1) @ v


def einsum_of_the_wrong_letters(q, k, v):
    scores = torch.einsum("bhqd,bhkd->bhkq", q, k) / 4
    return torch.softmax(scores, -1) @ v


def buffer_as_scale(q, k, v):
    return torch.softmax((q @ k.mT) * v.abs().mean(), -1) @ v


@pytest.mark.parametrize(
    "function",
    [
        *(softmax_by_hand_over_queries, softmax_over_two_dimensions, another_sum),
        *(shifted_per_key, einsum_of_the_wrong_letters, buffer_as_scale),
    ],
)
def test_what_is_another_function_stays_what_it_is(rewrite, assert_equal, function):
    inputs = _qkv()
    result = rewrite(function, inputs)
    assert_equal(result(*inputs), function(*inputs), factor=3)


class _Layer(nn.Module):
    """y = x Wᵀ + b in the spelling given."""

    def __init__(self, forward, *, transposed: bool = False) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn((8, 5) if transposed else (5, 8)))
        self.b = nn.Parameter(torch.randn(5))
        self.spelt = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.spelt(x, self.w, self.b)


LINEARS = {
    "linear": _Layer(lambda x, w, b: F.linear(x, w, b)),
    "matmul": _Layer(lambda x, w, b: x @ w.t() + b),
    "matmul, mT, bias first": _Layer(lambda x, w, b: b + x @ w.mT),
    "matmul, kept transposed": _Layer(lambda x, w, b: x @ w + b, transposed=True),
    "addmm": _Layer(lambda x, w, b: torch.addmm(b, x.view(-1, 8), w.t()).view(2, 3, 5)),
    "Conv1D": _Layer(
        lambda x, w, b: torch.addmm(b, x.view(-1, x.size(-1)), w).view(*x.shape[:-1], 5),
        transposed=True,
    ),
    "mm": _Layer(lambda x, w, b: torch.mm(x.reshape(-1, 8), w.t()).reshape(2, 3, 5) + b),
    "einsum": _Layer(lambda x, w, b: torch.einsum("bsk,nk->bsn", x, w) + b),
    "einsum, weight first": _Layer(lambda x, w, b: torch.einsum("nk,bsk->bsn", w, x) + b),
    "bmm": _Layer(lambda x, w, b: torch.bmm(x, w.t().expand(2, 8, 5)) + b),
    "baddbmm": _Layer(
        lambda x, w, b: torch.baddbmm(b.expand(2, 3, 5), x, w.t().unsqueeze(0).expand(2, -1, -1))
    ),
}


@pytest.mark.parametrize("name", LINEARS)
@torch.no_grad()
def test_a_linear_layer_has_one_spelling(name):
    x = torch.randn(2, 3, 8)
    layer = LINEARS[name].eval()
    captured = capture(layer, (x,))
    module = normalize(captured.program.module)
    called = [n.target for n in module.graph.nodes if n.op == "call_function"]
    assert called.count(aten.linear.default) == 1, module.graph
    assert not {aten.matmul.default, aten.addmm.default, aten.einsum.default} & set(called)
    torch.testing.assert_close(module(x)[0], layer(x), rtol=1e-5, atol=1e-6)
