"""`torch.compile(backend="ridgeline")`: rewritten, equal to eager, in inference and in training."""

import importlib.metadata
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ridgeline.passes.compiler import Compiler
from ridgeline.passes.plan import Plan
from ridgeline.tools.plugin import backend

pytestmark = pytest.mark.filterwarnings("default")  # Dynamo and Inductor warn of their own parts


class Block(nn.Module):
    """Attention as written by hand, between two projections."""

    def __init__(self, dim: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = (q @ k.transpose(-1, -2) * 0.25).masked_fill(~causal, -torch.inf)
        return self.out((torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiled() -> Callable[..., tuple[Any, list[Plan]]]:
    """(model, **options) -> the compiled model and the list that its plans are added to."""

    def build(model: nn.Module, **options: Any) -> tuple[Any, list[Plan]]:
        plans: list[Plan] = []
        options = {"target": "a100", "on_plan": plans.append, **options}
        return torch.compile(model, backend=backend, options=options), plans

    return build


def _attentions(plans: list[Plan]) -> list[int]:
    return [sum(d.rewrite == "flash_attention" for d in p.applied) for p in plans]


@torch.no_grad()
def test_inference_is_rewritten_and_equal(compiled):
    model, x = Block().eval(), torch.randn(2, 7, 32)
    fast, plans = compiled(model)
    torch.testing.assert_close(fast(x), model(x))
    assert _attentions(plans) == [1]
    assert counters["ridgeline"]["applied"] == 1
    assert "ridgeline_module" not in vars(model)
    assert plans[0].applied[0].certificate.relative_error < 1e-9


def test_gradients_are_those_of_eager(compiled):
    model = Block().train()
    inputs = [torch.randn(2, 7, 32, requires_grad=True) for _ in range(2)]
    fast, plans = compiled(model)
    gradients = []
    for run in (model, fast):
        model.zero_grad()
        inputs[0].grad = None
        run(inputs[0]).square().sum().backward()
        gradients.append([inputs[0].grad.clone(), *(p.grad.clone() for p in model.parameters())])
    assert _attentions(plans) == [1]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_step_of_the_optimiser_is_seen(compiled):
    model, x = Block().train(), torch.randn(2, 7, 32)
    fast, _ = compiled(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        fast(x).square().sum().backward()
        optimiser.step()
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_other_lengths_compile_once_more_and_then_no_more(compiled):
    model = Block().eval()
    fast, plans = compiled(model)
    for length in (7, 9, 12, 5):
        x = torch.randn(2, length, 32)
        torch.testing.assert_close(fast(x), model(x))
    assert _attentions(plans) == [1, 1]  # once with the first length, once with any


class Broken(nn.Module):
    """Two blocks with a graph break between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


@torch.no_grad()
def test_both_sides_of_a_graph_break(compiled):
    model, x = Broken().eval(), torch.randn(2, 7, 32)
    fast, plans = compiled(model)
    torch.testing.assert_close(fast(x), model(x))
    assert _attentions(plans) == [1, 1]


@torch.no_grad()
def test_weights_changed_between_calls_are_seen(compiled):
    model, x = Block().eval(), torch.randn(2, 7, 32)
    fast, plans = compiled(model)
    fast(x)
    model.out.weight.mul_(2)
    torch.testing.assert_close(fast(x), model(x))
    assert len(plans) == 1  # no weight is folded at tolerance 0


@torch.no_grad()
def test_a_folded_weight_that_changes_is_folded_again(compiled):
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()
    x = torch.randn(4, 256)
    fast, plans = compiled(model, tolerance=0.02, objective="memory")
    fast(x)
    model[0].weight.mul_(-2)
    error = (fast(x) - model(x)).norm() / model(x).norm()
    assert len(plans) == 2
    assert 0 < error <= 0.02


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()


@torch.no_grad()
def test_modules_of_the_same_code_keep_their_own_weights(compiled):
    """Dynamo gives them one graph, with their weights as inputs."""
    blocks, x = [_mlp() for _ in range(3)], torch.randn(4, 256)
    fast, plans = compiled(lambda block, x: block(x), tolerance=0.02, objective="memory")
    for block in (*blocks, *blocks):
        assert 0 < (fast(block, x) - block(x)).norm() / block(x).norm() <= 0.02
    assert len(plans) == 3
    blocks[1][0].weight = nn.Parameter(torch.randn(512, 256))
    blocks[2][2].weight.data = torch.randn(256, 512)
    for block in blocks:
        assert 0 < (fast(block, x) - block(x)).norm() / block(x).norm() <= 0.02
    assert len(plans) == 5


@torch.no_grad()
def test_modules_are_named_as_in_the_model(compiled):
    fast, plans = compiled(_mlp(), tolerance=0.02, objective="memory", ignore=["2"])
    fast(torch.randn(4, 256))
    assert [d.at.partition(":")[0] for d in plans[0].applied] == ["0"]
    (refused,) = (d for d in plans[0].refused if d.rewrite == "quantized_linear")
    assert (refused.at.partition(":")[0], refused.reason) == ("2", "listed in ignore=")


def test_trained_weights_are_said_not_to_be_quantised(compiled):
    fast, plans = compiled(_mlp(), tolerance=0.02, objective="memory")
    fast(torch.randn(4, 256))
    assert any("call within torch.no_grad()" in note for note in plans[0].notes)
    assert "an input of the graph" in plans[0].refused[0].reason


@torch.no_grad()
def test_quantised_within_the_tolerance(compiled):
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()
    x = torch.randn(4, 256)
    fast, plans = compiled(model, tolerance=0.02, objective="memory")
    error = (fast(x) - model(x)).norm() / model(x).norm()
    assert {d.rewrite for d in plans[0].applied} == {"quantized_linear"}
    assert 0 < error <= 0.02


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"options": {"targett": "a100"}}, "unknown options.*targett.*ridgeline takes"),
        ({"mode": "max-autotune"}, "mode='max-autotune' is Inductor's"),
        ({"options": {"tolerance": 2.0}}, "tolerance is 2.0; choose"),
        ({"options": {"target": "a1000"}}, "a1000"),
        ({"options": {"tolerance": "x"}}, "tolerance is 'x'"),
        ({"options": {"on_plan": 3}}, "on_plan is 3; pass a function"),
    ],
)
@torch.no_grad()
def test_unusable_options(arguments, words):
    with pytest.raises(Exception, match=words):
        torch.compile(Block().eval(), backend=backend, **arguments)(torch.randn(2, 7, 32))


@torch.no_grad()
def test_buffers_that_change_stay_alive(compiled):
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return self.linear(x) * self.count

    model, x = Counter().eval(), torch.randn(2, 4)
    fast, _ = compiled(model)
    for step in (1, 2, 3):
        torch.testing.assert_close(fast(x), model.linear(x) * step)


@torch.no_grad()
def test_a_model_of_transformers(compiled):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=99, attn_implementation="eager",
    )  # fmt: skip
    model, ids = transformers.LlamaModel(config).eval(), torch.randint(3, 99, (2, 7))
    fast, plans = compiled(model)
    got = fast(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(got, model(ids, use_cache=False).last_hidden_state)
    assert sum(_attentions(plans)) == 2


def test_the_entry_point_is_declared():
    root = Path(__file__).resolve().parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["torch_dynamo_backends"]
    assert points == {"ridgeline": "ridgeline.tools.plugin:backend"}
    point = importlib.metadata.EntryPoint("ridgeline", points["ridgeline"], "torch_dynamo_backends")
    assert point.load() is backend


@torch.no_grad()
def test_a_defect_leaves_the_graph_to_inductor(
    compiled: Callable[..., tuple[Any, list[Plan]]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def stops(*_: Any) -> None:
        raise ZeroDivisionError("a size of nothing")

    monkeypatch.setattr(Compiler, "rewrite", stops)
    model, x = Block().eval(), torch.randn(2, 8, 32)
    fast, plans = compiled(model)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert not plans
    assert "a defect of ridgeline, please report it: Inductor gets this graph" in caplog.text
    caplog.clear()
