"""Mixtures: the dispatch against all experts computed, the router's gradient, the balance."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ridgeline.cost_model import load_target
from ridgeline.passes.shift_add_vit import (
    MixtureOfPrimitives,
    ShiftAddError,
    balance_loss,
    expert_latencies,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def mixture(latencies=(1.0, 1.0), capacity=2.0, **options) -> MixtureOfPrimitives:
    return MixtureOfPrimitives(nn.Linear(32, 24), latencies, capacity=capacity, **options).eval()


def dense(layer: MixtureOfPrimitives, x: Tensor) -> Tensor:
    """Both experts everywhere, and the chosen one gathered."""
    both = torch.stack((layer.mult(x), layer.shift(x)), -2)
    chosen = layer.routed(x)[..., None, None].expand(*x.shape[:2], 1, both.shape[-1])
    return both.gather(-2, chosen).squeeze(-2)


def biased(layer: MixtureOfPrimitives, towards: float) -> MixtureOfPrimitives:
    """A router that prefers the first expert by `towards`."""
    with torch.no_grad():
        layer.router.bias[:] = torch.tensor([towards, 0.0])
    return layer


@torch.no_grad()
def test_the_dispatch_equals_the_dense_gather():
    layer = mixture()
    for tokens in (1, 2, 17):
        x = torch.randn(5, tokens, 32)
        assert layer.capacities(tokens) == (tokens, tokens)
        torch.testing.assert_close(layer(x), dense(layer, x))
    counts = layer.routed(x).sum(1)
    assert (counts > 0).all()
    assert (counts < tokens).all()


@torch.no_grad()
@pytest.mark.parametrize("towards", [100.0, -100.0])
def test_one_expert_takes_all_and_the_other_none(towards):
    layer, x = biased(mixture(), towards), torch.randn(3, 9, 32)
    expert = layer.mult if towards > 0 else layer.shift
    torch.testing.assert_close(layer(x), expert(x))
    layer.train()
    torch.testing.assert_close(layer(x), expert(x))


@torch.no_grad()
def test_overflow_goes_to_the_other_expert_the_least_certain_first():
    layer, x = biased(mixture((3.0, 1.0), capacity=1.0), 100.0), torch.randn(3, 16, 32)
    most, rest = layer.capacities(16)
    assert (most, rest) == (4, 12)
    y, logits = layer(x), layer.router(x)
    margin = logits[..., 0] - logits[..., 1]
    served = margin.argsort(1, descending=True)[:, :most]
    expected = layer.shift(x)
    for sample, tokens in enumerate(served):
        expected[sample, tokens] = layer.mult(x[sample, tokens])
    torch.testing.assert_close(y, expected)


@torch.no_grad()
def test_multiplications_are_saved():
    seen = []
    layer = mixture((3.0, 1.0), capacity=1.25)
    for expert in (layer.mult, layer.shift):
        expert.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    layer(torch.randn(2, 64, 32))
    assert seen == list(layer.capacities(64)) == [20, 60]


@torch.no_grad()
def test_a_result_does_not_depend_on_the_batch():
    layer, x = mixture((2.0, 1.0), capacity=1.0), torch.randn(6, 12, 32)
    whole = layer(x)
    for sample in range(6):
        torch.testing.assert_close(layer(x[sample : sample + 1]), whole[sample : sample + 1])


def test_training_values_are_those_of_the_chosen_expert_and_the_router_learns():
    layer, x = mixture(), torch.randn(4, 9, 32)
    with torch.no_grad():
        expected = dense(layer, x)
    layer.train()
    y = layer(x)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    # dL/dp_j = <grad, E_j(x)>, taken through the softmax
    p = layer.router(x).softmax(-1)
    scores = torch.stack([(grad * e(x)).sum(-1) for e in (layer.mult, layer.shift)], -1)
    d_logits = p * (scores - (p * scores).sum(-1, keepdim=True))
    wanted = torch.einsum("bnj,bnk->jk", d_logits, x)
    torch.testing.assert_close(layer.router.weight.grad, wanted, rtol=1e-3, atol=1e-4)
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("latencies", [(6.0, 4.0), (1.0, 9.0), (1.0, 1.0)])
def test_the_loss_is_least_where_tokens_are_as_one_over_latency(latencies):
    layer = mixture(latencies).train()
    tokens = 100
    losses = {}
    for mult in range(1, tokens):
        # a certain router: p and P are the numbers of tokens
        logits = torch.full((1, tokens, 2), -50.0)
        logits[:, :mult, 0], logits[:, mult:, 1] = 50.0, 50.0
        losses[mult] = layer._imbalance(logits.softmax(-1), logits).item()
    best = min(losses, key=losses.__getitem__)
    assert best == round(tokens * layer.shares[0])
    assert losses[best] < 1e-9
    assert layer.shares[0] * latencies[0] == pytest.approx(layer.shares[1] * latencies[1])


@pytest.mark.parametrize(("latencies", "faster"), [((1.0, 4.0), 0), ((4.0, 1.0), 1)])
def test_the_router_learns_to_prefer_the_faster_expert(latencies, faster):
    layer, x = mixture(latencies).train(), torch.randn(8, 16, 32)
    optimizer = torch.optim.Adam(layer.router.parameters(), 0.02)
    for _ in range(80):
        layer(x)
        loss = balance_loss(layer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    taken = (layer.routed(x) == faster).float().mean().item()
    assert taken == pytest.approx(0.8, abs=0.1)


def test_the_loss_can_be_asked_for_only_after_a_call_and_hinders_no_copy():
    layer = mixture().train()
    with pytest.raises(ShiftAddError, match="none of the model's 1 mixtures"):
        balance_loss(layer)
    layer(torch.randn(2, 3, 32))
    assert balance_loss(layer).requires_grad
    assert copy.deepcopy(layer).balance is None


def test_latencies_are_those_of_the_cost_model():
    linear = nn.Linear(4096, 4096)
    mult, shift = expert_latencies(linear, load_target("cpu"), tokens=1)
    assert 0 < shift < mult  # one token reads the weights and does little else
    later, _ = expert_latencies(linear, load_target("cpu"), tokens=1000)
    assert later > mult


def test_bad_options_and_inputs_are_refused():
    with pytest.raises(ShiftAddError, match="latencies"):
        mixture((0.0, 1.0))
    with pytest.raises(ShiftAddError, match="capacity"):
        mixture(capacity=0.5)
    with pytest.raises(ShiftAddError, match="tokens of samples"):
        mixture()(torch.randn(4, 32))
