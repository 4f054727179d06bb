"""Calls of one optimised model that differ in what its signature does not show."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from ridgeline.passes.compiler import OptimizeError
from ridgeline.passes.optimize import optimize

LOWERINGS = ["eager", "inductor"]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * 2 + y


class Writes(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return x * y


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_one_tensor_given_twice_is_another_signature(lowering):
    fast, x, y = optimize(Sum().eval(), lowering=lowering), draw(3, 4), draw(4, 4)[:3]
    torch.testing.assert_close(fast(x, x), x * 3)
    torch.testing.assert_close(fast(x, y), x * 2 + y)
    torch.testing.assert_close(fast(y, y), y * 3)
    assert (fast.captures, fast.fallbacks) == (2, {})


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_written_arguments_that_share_memory_run_the_original(lowering):
    fast = optimize(Writes().eval(), lowering=lowering)
    x, y, both = draw(3, 4), draw(5, 4)[:3].clone(), draw(5, 4)
    expected = (x + 1) * y
    torch.testing.assert_close(fast(x, y), expected)
    known = both.clone()
    torch.testing.assert_close(fast(both[:3], both[2:]), Writes()(known[:3], known[2:]))
    torch.testing.assert_close(both, known)
    assert "shares memory with another" in next(iter(fast.fallbacks.values()))
    expected = (x + 1) * y
    torch.testing.assert_close(fast(x, y), expected)
    assert fast.captures == 1


def test_inputs_get_gradients_after_a_call_without():
    fast, x = optimize(nn.Linear(4, 4).eval()), draw(3, 4).requires_grad_()
    with torch.no_grad():
        assert not fast(x).requires_grad
    fast(x).sum().backward()
    assert x.grad is not None
    assert fast.captures == 2


def test_a_mistake_leaves_the_graphs_in_use(caplog, capfd):
    fast = optimize(nn.Linear(8, 8).eval(), (draw(4, 8),))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            fast(draw(4, 9))
    assert (fast.fallbacks, fast.plan.notes) == ({}, [])
    assert not [r for r in caplog.records if r.levelno > logging.INFO]
    assert capfd.readouterr().err == ""
    fast(draw(5, 8))
    assert fast.captures == 1


class Unmasked(nn.Module):
    """Runs on any input, but is captured for floats only."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.is_floating_point() else x[x > 0]


def test_a_refused_kind_of_call_leaves_the_others():
    fast = optimize(Unmasked().eval())
    whole = torch.tensor([1, -2, 3])
    for _ in range(2):
        torch.testing.assert_close(fast(whole), torch.tensor([1, 3]))
    assert (fast.captures, len(fast.fallbacks)) == (0, 1)
    fast(draw(3))
    assert (fast.captures, len(fast.fallbacks)) == (1, 1)


class _Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


class _Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return x + len(self.seen)


class _Keeps(nn.Module):
    last = None

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.last is None else x + self.last
        self.last = y.detach()
        return y


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(1)
        return x + self.total


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (_Counter, "forward changes 0.calls, "),
        (_Remembers, "forward changes 0.seen, "),
        (_Keeps, "forward changes 0.last, "),
        (_Plain, "forward changes 0.total, "),
    ],
)
def test_state_in_plain_attributes_stays_with_the_original_code(kind, said):
    model, again = nn.Sequential(kind()).eval(), nn.Sequential(kind()).eval()
    fast = optimize(model)
    for n in (3, 3, 3):
        torch.testing.assert_close(fast(draw(n, 4)), again(draw(n, 4)))
    (reason,) = fast.fallbacks.values()
    assert said in reason
    assert any(reason in note for note in fast.plan.notes)


def test_products_with_a_free_size():
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.shape[0] + x / x.shape[0]

    fast = optimize(Scaled().eval())
    for n in (2, 3, 7):
        torch.testing.assert_close(fast(draw(n, 3)), Scaled()(draw(n, 3)))
    assert (fast.captures, fast.fallbacks) == (1, {})


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_first_calls_from_several_threads(lowering):
    layers = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).eval()
    models = [optimize(m, lowering=lowering) for m in (layers, nn.Sequential(layers, nn.Tanh()))]
    inputs = [draw(2 + i % 3, 8) for i in range(8)]
    with torch.no_grad():
        expected = [[layers(x) for x in inputs], [layers(x).tanh() for x in inputs]]

    @torch.no_grad()
    def run(job: tuple[int, int]) -> Tensor:
        return models[job[0]](inputs[job[1]])

    jobs = [(m, i) for i in range(8) for m in range(2)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, jobs))
    for (m, i), result in zip(jobs, results, strict=True):
        torch.testing.assert_close(result, expected[m][i])
    assert [(m.captures, m.fallbacks) for m in models] == [(1, {})] * 2


def test_backward_hooks_of_parts_run():
    model, seen = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).train(), []
    fast = optimize(model)
    fast[0].register_full_backward_hook(lambda *_: seen.append(1))
    fast(draw(3, 4).requires_grad_()).sum().backward()
    assert seen == [1]
    assert "a hook" in next(iter(fast.fallbacks.values()))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"args": torch.zeros(2, 4)}, "args is Tensor; pass a tuple"),
        ({"tolerance": "0.1"}, "tolerance is '0.1'"),
        ({"ignore": "lm_head"}, "ignore is 'lm_head'; pass a list"),
        ({"ignore": ["1.nothing"]}, "no module of the model matches '1.nothing'"),
        ({"passes": ["norm"]}, "'norm' is no pass"),
        ({"max_graphs": 0}, "max_graphs is 0"),
    ],
)
def test_unusable_arguments(options, said):
    with pytest.raises(OptimizeError, match=said):
        optimize(nn.Sequential(nn.Linear(4, 4)), **options)
