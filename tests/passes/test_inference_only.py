"""Gradients are never lost in silence: what an eval-mode call gives is marked, and asking is an
error that says what to do."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ridgeline
from ridgeline.passes.inference_only import GradientError

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Several(nn.Module):
    """Results of every kind: computed, twice the same, an input, a parameter, no floating one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = F.silu(self.layer(x))
        return {
            "made": hidden, "again": hidden, "given": x, "weight": self.layer.weight,
            "index": hidden.argmax(),
        }  # fmt: skip


@pytest.fixture(params=["inductor", "eager"])
def lowering(request) -> str:
    return request.param


@pytest.fixture
def model() -> Several:
    torch.manual_seed(0)
    return Several().eval()


def optimized(model: nn.Module, lowering: str = "eager") -> nn.Module:
    return ridgeline.optimize(model, (X,), target="cpu", strict=True, lowering=lowering)


@pytest.mark.filterwarnings("default")  # Inductor warns of its own parts
def test_results_require_gradients_as_those_of_the_model(model, lowering):
    results, fast = model(X), optimized(model, lowering)
    got = fast(X)
    for name, expected in results.items():
        assert got[name].requires_grad == expected.requires_grad, name
        torch.testing.assert_close(got[name], expected)
    assert got["made"] is got["again"]
    assert got["given"] is X
    assert got["weight"] is model.layer.weight
    got["made"].add_(1)
    assert fast.captures == 1


def test_asking_for_the_gradients_says_what_to_do(model):
    fast, head = optimized(model), nn.Linear(8, 1)
    for ask in (
        lambda y: y.sum().backward(),
        lambda y: head(y).sum().backward(),
        lambda y: torch.autograd.grad(y.sum(), fast.layer.weight),
    ):
        with pytest.raises(GradientError, match=r"train\(\).*no_grad\(\)"):
            ask(fast(X)["made"])
    assert model.layer.weight.grad is None


def test_each_way_out_that_the_error_names(model):
    fast, head = optimized(model), nn.Linear(8, 1)
    with torch.no_grad():
        hidden = fast(X)["made"]
    head(hidden).sum().backward()
    fast(X.clone().requires_grad_())["made"].sum().backward()
    by_input = model.layer.weight.grad.clone()
    model.zero_grad()
    fast.train()(X)["made"].sum().backward()
    torch.testing.assert_close(model.layer.weight.grad, by_input)
    model.zero_grad()
    model(X)["made"].sum().backward()
    torch.testing.assert_close(model.layer.weight.grad, by_input)
    fast.eval().requires_grad_(False)
    hidden = fast(X)["made"]
    assert not hidden.requires_grad
    head(hidden).sum().backward()


def test_without_recorded_gradients_nothing_is_marked(model):
    fast = optimized(model)
    for quiet in (torch.no_grad(), torch.inference_mode()):
        with quiet:
            assert not fast(X)["made"].requires_grad


def test_caches_hold_plain_tensors():
    """As inputs that require gradients they would have the next token compiled for training."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=31, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    fast = ridgeline.optimize(model, target="cpu", strict=True, lowering="eager")
    ids = torch.randint(0, 31, (1, 5))
    first = fast(ids, use_cache=True)
    second = fast(ids[:, :1], past_key_values=first.past_key_values)
    assert first.logits.requires_grad
    assert second.logits.requires_grad
    layer = second.past_key_values.layers[0]
    assert [layer.keys.requires_grad, layer.values.requires_grad] == [False, False]
    assert "training" not in "".join(fast.plan.seconds)
