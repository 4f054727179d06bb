"""Memory that a program writes: what a value holds then depends on when it is read."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ridgeline
from ridgeline.ir.capture import capture
from ridgeline.ir.normalize import normalize

aten = torch.ops.aten
B, H, S, D = 2, 4, 12, 16


def _qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, S, D, generator=generator) for _ in range(3)]


def _causal(q: Tensor) -> Tensor:
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()


def mask_with_a_visible_prefix(q, k, v):
    mask = _causal(q)
    mask[:, :8] = True
    return F.scaled_dot_product_attention(q, k, v, mask)


def mask_changed_through_a_view_of_a_view(q, k, v):
    mask = _causal(q)
    mask.view(-1)[3:9].logical_not_()
    return F.scaled_dot_product_attention(q, k, v, mask[None, None])


def additive_mask_changed_afterwards(q, k, v):
    mask = torch.where(_causal(q), 0.0, float("-inf"))
    mask[:, 0] = 1.5
    return torch.softmax(q @ k.transpose(2, 3) / 4 + mask, -1) @ v


def zero_fill_changed_afterwards(q, k, v):
    zero = torch.zeros(q.shape[2], q.shape[2])
    zero[2:, 1] = -3.0
    mask = torch.where(_causal(q), zero, float("-inf"))
    return torch.softmax(q @ k.transpose(2, 3) / 4 + mask, -1) @ v


def key_changed_before(q, k, v):
    k = k.clone()
    k[:, :, 3] = 0.5
    return torch.softmax(q @ k.transpose(2, 3) / 4, -1) @ v


def mask_filled_in_place(q, k, v):
    scores = q @ k.transpose(2, 3) / 4
    scores.masked_fill_(~_causal(q), float("-inf"))
    return torch.softmax(scores, -1) @ v


def product_scaled_in_place_through_a_view(q, k, v):
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(B, H, S, S)
    scores *= 0.25
    return torch.softmax(scores, -1) @ v


def einsum_scaled_in_place(q, k, v):
    scores = torch.einsum("bhid,bhjd->bhij", q, k)
    scores *= 0.25
    return torch.softmax(scores, -1) @ v


@pytest.mark.parametrize(
    "function",
    [
        *(product_scaled_in_place_through_a_view, einsum_scaled_in_place),
        *(mask_with_a_visible_prefix, mask_changed_through_a_view_of_a_view),
        *(additive_mask_changed_afterwards, zero_fill_changed_afterwards),
        *(key_changed_before, mask_filled_in_place),
    ],
)
def test_rewritten_and_equal(rewrite, assert_equal, function):
    inputs = _qkv()
    result = rewrite(function, inputs)
    assert len(result.attentions) == 1, result.reasons
    assert_equal(result(*inputs), function(*inputs), factor=2)


def key_changed_before_the_values_are_read(q, k, v):
    k, v = k.clone(), v.clone()
    scores = q @ k.transpose(2, 3) / 4
    k.mul_(0.5)
    return torch.softmax(scores, -1) @ v, k


def query_changed_after_the_scores(q, k, v):
    q = q.clone()
    weights = torch.softmax((q * 0.25) @ k.transpose(2, 3), -1)
    q[:, :, 1] = 0.0
    return weights @ v, q


def query_changed_between_scale_and_scores(q, k, v):
    q = q.clone()
    scaled = q * 0.25
    q[:, :, 1] = 0.0
    return torch.softmax(scaled @ k.transpose(2, 3), -1) @ v, q


def repeated_heads_changed_after_the_repeat(q, k, v):
    few = k[:, :2].clone()
    many = few[:, :, None].expand(B, 2, 2, S, D).reshape(B, H, S, D)
    few[:, :, 1] = 0.0
    return F.scaled_dot_product_attention(q, many, v), few


def scores_read_through_the_view_below(q, k, v):
    flat = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT)
    scores = flat.view(B, H, S, S)
    scores *= 0.25
    return torch.softmax(scores, -1) @ v, flat + 1


def scores_read_through_a_view_above(q, k, v):
    scores = q @ k.transpose(2, 3)
    flat = scores.view(-1)
    scores *= 0.25
    return torch.softmax(scores, -1) @ v, flat + 1


@pytest.mark.parametrize(
    "function",
    [
        *(scores_read_through_the_view_below, scores_read_through_a_view_above),
        *(key_changed_before_the_values_are_read, query_changed_after_the_scores),
        *(query_changed_between_scale_and_scores, repeated_heads_changed_after_the_repeat),
    ],
)
def test_a_write_between_the_reads_is_respected(rewrite, assert_equal, function):
    inputs = _qkv()
    result = rewrite(function, inputs)
    assert_equal(result(*inputs), function(*inputs), factor=2)


def test_a_write_inside_the_site_is_the_reason(rewrite):
    result = rewrite(query_changed_after_the_scores, _qkv())
    assert result.attentions == []
    assert "in place between its use here and" in result.reasons


class _Copies(nn.Module):
    """Copies that look like nothing, and are then written."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.arange(4.0))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        doubled = x * 1
        doubled += x
        constant = torch.tensor([1.0, 2.0, 3.0, 4.0])
        constant += x
        kept = self.state * 1
        kept[0] = 7.0
        asked = x.to(x.dtype, copy=True)
        asked.add_(1)
        return doubled, constant, kept, asked, self.state + 0, x


def test_copies_that_are_written_stay_copies(assert_equal):
    model, x = _Copies().eval(), torch.randn(4)
    fast = ridgeline.optimize(model, (x,), target="a100", lowering="eager")
    for _ in range(3):
        assert_equal(fast(x), model(x))


def test_an_output_is_never_the_input_where_it_was_a_copy():
    model = _Twice().eval()
    x = torch.ones(3)
    ridgeline.optimize(model, (x,), target="a100", lowering="eager")(x).zero_()
    assert torch.equal(x, torch.ones(3))


class _Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1


class _Rescaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(512, 512), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        self.weight.mul_(0.5)
        return y


def test_a_weight_that_forward_changes_is_not_quantised():
    x = torch.randn(2, 512)
    fast = ridgeline.optimize(_Rescaled().eval(), (x,), tolerance=0.5, lowering="eager")
    assert not fast.plan.applied
    assert any("changes the weight in every call" in d.reason for d in fast.plan.refused)


def _targets(function, *inputs: Tensor) -> list[object]:
    class Model(nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return function(*args)

    module = normalize(capture(Model().eval(), inputs).program.module)
    return [n.target for n in module.graph.nodes if n.op == "call_function"]


def test_writing_a_new_value_becomes_a_plain_call():
    assert _targets(lambda x: (x + 1).mul_(3).relu_(), torch.randn(4)) == [
        *(aten.add.Tensor, aten.mul.Tensor, aten.relu.default)
    ]


def test_writing_keeps_the_dtype_that_the_result_must_have():
    assert aten.add_.Tensor in _targets(
        lambda x: (x + 1).add_(torch.ones(4, dtype=torch.float64)), torch.randn(4)
    )


def test_writing_an_input_stays():
    assert aten.add_.Tensor in _targets(lambda x: x.add_(1) * 2, torch.randn(4))
