"""Gradients are never lost in silence: what an eval-mode call gives is marked, and asking is an
error that says what to do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ridgeline
from ridgeline.passes.inference_only import GradientError, marked

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


class Layers(nn.Module):
    """Something trainable, something frozen and a buffer, under a forward to be tried."""

    def __init__(self, computed: Callable[["Layers", Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.body = nn.Linear(8, 8).requires_grad_(False)
        self.table = nn.Parameter(torch.ones(3, 8), requires_grad=False)
        self.register_buffer("bank", torch.ones(3, 8))
        self.computed = computed

    def forward(self, x: Tensor) -> Any:
        return self.computed(self, x)


def layers(computed: Callable[[Layers, Tensor], Any]) -> Layers:
    torch.manual_seed(0)
    return Layers(computed).eval()


def written(m: Layers, x: Tensor) -> tuple[Tensor, ...]:
    """A write through a view reaches all of the memory, and nothing that was read before."""
    whole = torch.zeros(3, 8)
    before, apart = whole * 2, m.body(x)
    copy = apart.detach()
    whole[:, 0].copy_(m.layer(x)[:, 0])
    apart[0].add_(m.layer(x)[0])
    return whole, before, apart, copy, whole.exp()


HISTORIES = {
    "own tensors": lambda m, x: (m.layer(x), m.table, m.bank, m.layer.weight),
    "views of own": lambda m, x: (m.layer.bias[:4], m.table[:1], m.bank[0], m.table.t()),
    "inputs": lambda m, x: (m.layer(x), x, x[:, :4], x * 2, x + m.bank),
    "frozen encoder": lambda m, x: (F.silu(m.body(x)), m.layer(F.silu(m.body(x)))),
    "detached": lambda m, x: (m.layer(x).detach(), m.layer(x).detach() + x, m.layer(x)),
    "masks": lambda m, x: ((m.layer(x) > 0).float(), torch.zeros_like(m.layer(x)), m.layer(x) > 0),
    "created": lambda m, x: (m.layer(x).new_ones(3), m.layer(x).argmax(-1).float(), torch.ones(2)),
    "several": lambda m, x: (*m.layer(x).max(-1), *m.layer(x).sort(), *m.layer(x).chunk(2, -1)),
    "an argument itself": lambda m, x: (m.layer.weight.contiguous(), m.table.float(), x.float()),
    "nothing": lambda m, x: (),
    "written": written,
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", HISTORIES)
def test_only_what_depends_on_something_trainable_requires_gradients(name, lowering):
    model = layers(HISTORIES[name])
    fast = optimized(model, lowering)
    for _ in range(2):
        results, got = model(X), fast(X)
        assert [r.requires_grad for r in got] == [r.requires_grad for r in results]
        torch.testing.assert_close(got, results)
    assert fast.captures == 1
    assert not fast.fallbacks
    assert not X.requires_grad


@pytest.mark.filterwarnings("default")
def test_the_callers_own_tensors_get_no_history(lowering):
    model = layers(lambda m, x: (m.layer(x) + m.table, m.table, m.bank))
    fast = optimized(model, lowering)
    _, table, bank = fast(X)
    assert table is model.table
    assert bank is fast.bank
    for own in (table, bank):
        assert not own.requires_grad
        assert own.is_leaf
    copy.deepcopy([model, bank])
    model(X)[0].sum().backward()
    model.requires_grad_(False)


def test_features_of_a_frozen_encoder_train_a_probe():
    fast = optimized(layers(lambda m, x: (F.silu(m.body(x)), m.layer(m.body(x)))))
    probe = nn.Linear(8, 1)
    features, logits = fast(X)
    probe(features).sum().backward()
    assert probe.weight.grad is not None
    features.numpy()
    with pytest.raises(GradientError):
        logits.sum().backward()


IN_PLACE = {
    "one": lambda m, x: (m.layer(x)[:, 0],),
    "transposed": lambda m, x: (m.layer(x).t(), m.layer(x + 1).view(-1)),
    "with its base": lambda m, x: (lambda h: (h, h[:, 0]))(m.layer(x)),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", IN_PLACE)
def test_results_that_are_views_may_be_written(name, lowering):
    model = layers(IN_PLACE[name])
    results, got = model(X), optimized(model, lowering)(X)
    for each in (results, got):
        each[0].mul_(2)
        each[-1].add_(1)
    torch.testing.assert_close(got, results)
    assert all(r.requires_grad for r in got)


def test_freezing_and_thawing_is_seen():
    model = layers(lambda m, x: (m.layer(x), m.body(x), m.layer(m.body(x))))
    fast = optimized(model)
    for layer, body in ((True, False), (False, False), (False, True), (True, True), (True, False)):
        model.layer.requires_grad_(layer)
        model.body.requires_grad_(body)
        assert [r.requires_grad for r in fast(X)] == [layer, body, layer or body]
    assert fast.captures == 1


def test_a_call_looks_at_no_parameter_beyond_the_first_that_requires_gradients():
    class Unasked:
        @property
        def requires_grad(self) -> bool:
            raise AssertionError("looked at")

    result, first = torch.ones(2), torch.ones(1, requires_grad=True)
    assert marked([result], (((first, Unasked()), (0,)),))[0].requires_grad
    with torch.no_grad():
        assert marked([result], (((Unasked(),), (0,)),))[0] is result
    with torch.inference_mode(), torch.enable_grad():
        assert marked([result], (((Unasked(),), (0,)),))[0] is result


@pytest.mark.filterwarnings("default")  # torch.export looks at .grad of the state
def test_a_state_handed_back_in_is_said_to_make_the_code_one_with_a_backward():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor, state: Tensor) -> Tensor:
            return torch.tanh(self.layer(x) + state)

    def notes(*, grad: bool) -> str:
        fast = ridgeline.optimize(Recurrent().eval(), target="cpu", strict=True, lowering="eager")
        state = torch.zeros(3, 8)
        with torch.set_grad_enabled(grad):
            for _ in range(2):
                state = fast(X, state)
        return " ".join(fast.plan.notes)

    said = "code with a backward, and its weights are not quantised"
    assert said in notes(grad=True)
    assert "torch.no_grad()" in notes(grad=True)
    assert said not in notes(grad=False)


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
