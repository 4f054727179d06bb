"""What a wrong rule of the normal form would do is seen: the graph before it is the reference."""

import pytest
import torch
from torch import Tensor, nn

import ridgeline
from ridgeline.ir import normalize as normal
from ridgeline.passes.drop_in import OptimizedModule

Q = (2, 4, 16, 8)


def _spelt(forward, *buffers: Tensor) -> nn.Module:
    class Spelt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i, buffer in enumerate(buffers):
                self.register_buffer(f"b{i}", buffer)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return forward(q, k, v, *(getattr(self, f"b{i}") for i in range(len(buffers))))

    return Spelt().eval()


def _inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(Q, generator=generator) for _ in range(3))


@torch.no_grad()
def _check(model: nn.Module, taken: bool | None = None) -> OptimizedModule:
    fast = ridgeline.optimize(model, _inputs(), target="cpu", lowering="eager")
    if taken is not None:
        assert bool(fast.plan.applied) == taken
    got, expected = fast(*_inputs()), model(*_inputs())
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert got.stride() == expected.stride()
    return fast


def _randint(low: int, high: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(low, high, (16, 16), generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(torch.uint8, 0, 3), (torch.bool, 0, 2), (torch.int8, -128, 0), (torch.bfloat16, -99, 99)],
    ids=str,
)
def test_biases_of_narrow_dtypes(dtype, low, high):
    a, b = _randint(low, high, dtype), _randint(low, high, dtype).T
    keep = torch.ones(16, 16, dtype=torch.bool).tril(-1)
    lowest = torch.finfo(torch.float32).min
    spellings = [
        lambda q, k, v, a, b, _: ((q @ k.mT) + a + b).softmax(-1) @ v,
        lambda q, k, v, a, b, _: ((q @ k.mT + a) * 0.3).softmax(-1) @ v,
        lambda q, k, v, a, b, keep: (q @ k.mT + a).masked_fill(~keep, lowest).softmax(-1) @ v,
    ]
    if dtype != torch.bool:
        spellings.append(lambda q, k, v, a, b, _: ((q @ k.mT) - a).softmax(-1) @ v)
    for spelling in spellings:
        _check(_spelt(spelling, a, b, keep))


@pytest.mark.parametrize(
    "constant",
    [
        lambda: torch.tensor(200, dtype=torch.uint8) + torch.tensor(57, dtype=torch.uint8),
        lambda: torch.tensor(100, dtype=torch.int8) * torch.tensor(3, dtype=torch.int8),
        lambda: -torch.tensor(1, dtype=torch.uint8) / 64,
        lambda: (torch.tensor(300.0).half() * torch.tensor(300.0).half()).reciprocal(),
    ],
)
def test_constants_wrap_and_overflow_as_the_model_says(constant):
    _check(_spelt(lambda q, k, v: ((q @ k.mT) * constant()).softmax(-1) @ v))


@pytest.mark.parametrize(
    "forward",
    [
        lambda q, k, v: ((q @ k.mT).softmax(-1) @ v * 2).view(q.shape[0], -1),
        lambda q, k, v: ((q @ k.mT).softmax(-1) @ v).add_(q).view(2, -1),
        lambda q, k, v: ((q @ k.mT).softmax(-1) @ v).relu() * 2,
        lambda q, k, v: ((q @ k.mT).softmax(-1) @ v).sigmoid().view(8, 16, 8).chunk(2, 0)[1],
    ],
)
def test_layout_is_kept_behind_elementwise_operations(forward):
    _check(_spelt(forward), taken=True)


@torch.no_grad()
def test_a_write_through_reshape_reaches_the_result():
    class Scaled(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
            y = ((q @ k.mT).softmax(-1) @ v) * 1.5
            y.reshape(-1)[:40].mul_(f)
            return y

    inputs = _inputs()
    fast = ridgeline.optimize(Scaled(), (*inputs, torch.ones(())), target="cpu", lowering="eager")
    zero = torch.zeros(())
    torch.testing.assert_close(fast(*inputs, zero), Scaled()(*inputs, zero))


@torch.no_grad()
def test_a_norm_of_three_values_costs_no_other_norm():
    class Norms(nn.Module):
        def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            variance = z.var(-1, unbiased=False, keepdim=True)
            mixed = (x - y.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()
            return mixed * torch.rsqrt(mixed.pow(2).mean(-1, keepdim=True) + 1e-6)

    fast = ridgeline.optimize(Norms(), _inputs(), target="cpu", lowering="eager")
    assert {d.refused_by for d in fast.plan.refused} <= {"pattern", "cost", "precondition"}
    torch.testing.assert_close(fast(*_inputs()), Norms()(*_inputs()))


def test_a_wrong_rule_is_seen_and_the_captured_graph_runs(monkeypatch):
    def wrong(node: torch.fx.Node) -> bool:
        if node.target is not torch.ops.aten.relu.default:
            return False
        node.target = torch.ops.aten.abs.default
        return True

    monkeypatch.setattr(normal, "REASSOCIATING", (*normal.REASSOCIATING, wrong))
    fast = _check(_spelt(lambda q, k, v: (q @ k.mT).softmax(-1) @ v - v.relu()), taken=False)
    (given_back,) = [d for d in fast.plan.refused if d.refused_by == "certificate"]
    assert "moves the outputs" in given_back.reason


@torch.no_grad()
def test_a_product_of_every_pair_keeps_its_shape():
    weight = nn.Parameter(torch.randn(8, 8))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.tensordot(x, self.weight, dims=0)

    x = torch.randn(8)
    fast = ridgeline.optimize(Outer(), (x,), target="cpu", lowering="eager")
    torch.testing.assert_close(fast(x), Outer()(x))
