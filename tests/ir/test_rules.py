"""Every rule of the normal form, checked by itself: after each single step the graph is run in
float64 and must give what it gave before, on random and on adversarial inputs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ridgeline.ir import normalize as normal
from ridgeline.ir.capture import capture
from ridgeline.ir.normalize import normalize
from ridgeline.ir.rules.exact import EXACT

B, H, S, D = 2, 3, 5, 4
MIN = torch.finfo(torch.float32).min

Q = K = V = (B, H, S, D)
FLAT = (B * H, S, D)


def _keep() -> Tensor:
    """Row 0 keeps nothing, row 1 everything."""
    keep = torch.tensor([[i != 0 and (j <= i or i == 1) for j in range(S)] for i in range(S)])
    return keep.expand(B, 1, S, S).clone()


@dataclass(frozen=True)
class Constant:
    """A parameter of the model."""

    shape: tuple[int, ...]


def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def _after_sinks(scores: Tensor) -> Tensor:
    return softmax(scores - scores.amax(-1, keepdim=True))


W, BIAS = Constant((6, D)), Constant((6,))

CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "assertion": (
        lambda x: (torch.ops.aten._assert_tensor_metadata(x, None, None, torch.float64), x + 1)[1],
        (Q,),
    ),
    "identity": (lambda x: F.dropout(x.to(x.dtype).clone(), 0.0)[:] * 1 + 2, (Q,)),
    "names": (lambda x, y: x.true_divide(y.abs() + 1), (Q, Q)),
    "bmm": (lambda x, y: torch.bmm(x, y.transpose(1, 2)), (FLAT, FLAT)),
    "narrow": (lambda x: x.narrow(2, 1, 3) + 1, (Q,)),
    "number first": (lambda m, x: torch.where(m, 0.0, x), (_keep, (B, H, S, S))),
    "movedim": (lambda x: x.movedim(1, 3) + 1, (Q,)),
    "mT": (lambda x: x.mT + 1, (Q,)),
    "permute swaps": (lambda x: x.permute(0, 2, 1, 3) + 1, (Q,)),
    "negative dimensions": (lambda x: torch.softmax(x.transpose(-1, -2), 3), (Q,)),
    "transposed twice": (lambda x: x.transpose(1, 2).transpose(1, 2) + 1, (Q,)),
    "new_ones": (lambda x: torch.ones_like(x) + x.new_ones(2, 1, 1, 1) + x, (Q,)),
    "likeness": (lambda x, y: x.float().type_as(y) + y[:1].expand_as(x), (Q, Q)),
    "softmax of a dtype": (lambda x: torch.softmax(x.float(), -1, dtype=torch.float64), (Q,)),
    "sdpa": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), (Q, K, V)),
    "square": (lambda x: torch.square(x) + x * x, (Q,)),
    "root": (lambda x: (x.abs() + 1) ** -0.5 + (x.abs() + 1) ** 0.5, (Q,)),
    "layer norm": (lambda x: F.layer_norm(x, (D,)), (Q,)),
    "rms norm": (lambda x: F.rms_norm(x.float(), (D,)).double(), (Q,)),
    "einsum": (lambda q, k: softmax(torch.einsum("bhid,bhjd->bhij", q, k)), (Q, K)),
    "einsum, swapped": (lambda q, k: softmax(torch.einsum("bhjd,bhid->bhij", k, q)), (Q, K)),
    "baddbmm": (
        lambda s, q, k: torch.baddbmm(s, q, k.transpose(1, 2), beta=0.5, alpha=0.25),
        ((B * H, S, S), FLAT, FLAT),
    ),
    "heads in one dimension": (
        lambda q, k: (q.flatten(0, 1) @ k.flatten(0, 1).transpose(1, 2)).view(B, H, S, S),
        (Q, K),
    ),
    "transposed product": (lambda q, k: softmax((k @ q.transpose(2, 3)).transpose(2, 3)), (Q, K)),
    "linear by matmul": (lambda x, w: x @ w.t(), ((B, S, D), W)),
    "linear by addmm": (lambda x, w, b: torch.addmm(b, x, w.t()), ((S, D), W, BIAS)),
    "bias apart": (lambda x, w, b: F.linear(x, w) + b, ((B, S, D), W, BIAS)),
    "linear between views": (
        lambda x, w: F.linear(x.view(-1, D), w).view(B, S, 6),
        ((B, S, D), W),
    ),
    "plus nought": (lambda q, k: softmax(q @ k.mT + 0), (Q, K)),
    "root of the width": (lambda q, k: softmax(q @ k.mT / torch.tensor(D).sqrt()), (Q, K)),
    "divided": (lambda q, k: softmax((q @ k.mT) / 3.0), (Q, K)),
    "scaled query": (lambda q, k: softmax((q * 0.3) @ (k / 2).mT), (Q, K)),
    "two scales": (lambda q, k: softmax((q @ k.mT) * 0.3 / 4), (Q, K)),
    "bias taken off": (lambda q, k, a: softmax(q @ k.mT - a), (Q, K, (H, S, S))),
    "by exponentials": (
        lambda q, k: (e := (s := q @ k.mT).sub(s.amax(-1, keepdim=True)).exp()) / e.sum(-1, True),
        (Q, K),
    ),
    "by logarithms": (lambda q, k: F.log_softmax(q @ k.mT, -1).exp(), (Q, K)),
    "by logsumexp": (lambda q, k: ((s := q @ k.mT) - s.logsumexp(-1, keepdim=True)).exp(), (Q, K)),
    "shifted": (lambda q, k: softmax((s := q @ k.mT) - s.amax(-1, keepdim=True)), (Q, K)),
    "two fills": (
        lambda q, k, m: softmax((q @ k.mT).masked_fill(~m, MIN).masked_fill(m[:, :, :1], MIN)),
        (Q, K, _keep),
    ),
    "fill": (lambda q, k, m: softmax((q @ k.mT).masked_fill(~m, MIN)), (Q, K, _keep)),
    "where": (lambda q, k, m: softmax(torch.where(m, q @ k.mT, MIN)), (Q, K, _keep)),
    "two biases": (lambda q, k, a, b: softmax(q @ k.mT + a + b), (Q, K, (H, S, S), (B, 1, 1, S))),
    "bias and mask": (
        lambda q, k, a, m: softmax(torch.where(m, 0.0, MIN) + (q @ k.mT + a)),
        (Q, K, (H, S, S), _keep),
    ),
    "scaled sum": (lambda q, k, a: softmax((q @ k.mT + a) * 0.25), (Q, K, (H, S, S))),
    "scaled mask": (
        lambda q, k, m: softmax((q @ k.mT + torch.where(m, 0.0, MIN)) * 0.25),
        (Q, K, _keep),
    ),
    "fill over a bias": (
        lambda q, k, a, m: softmax((q @ k.mT + a).masked_fill(~m, MIN)),
        (Q, K, (1, H, 1, S), _keep),
    ),
    "where over a bias": (
        lambda q, k, a, m: softmax(torch.where(m, a + q @ k.mT, MIN)),
        (Q, K, (H, S, S), _keep),
    ),
    "bias in three dimensions": (
        lambda q, k, a, m: softmax(
            torch.baddbmm(a, q, k.mT, alpha=0.5).view(B, H, S, S) + torch.where(m, 0.0, MIN)
        ),
        (FLAT, FLAT, (B * H, 1, S), _keep),
    ),
    "never below the least number": (
        lambda q, k, m: softmax(
            torch.max(q @ k.mT + torch.where(m, 0.0, MIN), torch.tensor(-float("inf")))
        ),
        (Q, K, _keep),
    ),
    "weights in three dimensions": (
        lambda q, k: softmax((q @ k.mT).flatten(0, 1)).view(B, H, S, S),
        (Q, K),
    ),
    "operand copied": (
        lambda q, k, v: softmax(q.contiguous() @ k.mT.contiguous()) @ v.flip(2).contiguous(),
        (Q, K, V),
    ),
    "bias of a narrower dtype": (
        lambda q, k, m: softmax((q @ k.mT + torch.where(m, 0.5, MIN)) + torch.ones(S).bfloat16()),
        (Q, K, _keep),
    ),
    "inner": (lambda x, w: torch.inner(x, w), (Q, W)),
    "tensordot": (lambda x, w: torch.tensordot(x, w, ([3], [1])), (Q, W)),
    "tensordot, the other way": (
        lambda x, w: torch.tensordot(x, w, ([-1], [-2])),
        ((B, 6), W),
    ),
    "weight first": (lambda x, w: (w @ x.mT).mT, (FLAT, W)),
    "convolution of one position": (
        lambda x, w, b: F.conv1d(x.mT, w[..., None], b).mT,
        (FLAT, W, BIAS),
    ),
    "square of a magnitude": (lambda x: x.abs().square(), (Q,)),
    "mean unsqueezed": (lambda x: x.mean(2).unsqueeze(2) + x.mean(-1).unsqueeze(-1), (Q,)),
    "mean from a sum": (lambda x: x.sum(-1, True) / D + x.sum(2, True) * (1 / S), (Q,)),
    "variance and mean": (
        lambda x: sum(torch.var_mean(x, -1, keepdim=True)) + sum(torch.var_mean(x, correction=0)),
        (Q,),
    ),
    "variance from a deviation": (
        lambda x: x.std(-1, unbiased=False, keepdim=True) ** 2 + x.std(2, keepdim=True) ** 2,
        (Q,),
    ),
    "glu": (lambda x: F.glu(x, 1) * F.glu(x[:, :2], -3), ((B, 2, S, D),)),
    "sinks first": (
        lambda q, k, v, s: _after_sinks(torch.cat((s, q @ k.mT), -1))[..., 1:] @ v,
        (Q, K, V, (B, H, S, 1)),
    ),
    "sinks last, by length": (
        lambda q, k, v, s: softmax(torch.cat((q @ k.mT, s), -1)).narrow(3, 0, S) @ v,
        (Q, K, V, (B, H, S, 1)),
    ),
    "maximum of sinks and scores": (
        lambda q, k, v, s: _after_sinks(torch.cat((q @ k.mT, s), -1))[..., :-1].contiguous() @ v,
        (Q, K, V, (B, H, S, 1)),
    ),
    "scale in three dimensions": (
        lambda q, k: softmax((q @ k.mT / 2).unflatten(0, (B, H))),
        (FLAT, FLAT),
    ),
}


class _Function(torch.nn.Module):
    """A function whose last arguments may be constants."""

    def __init__(self, function: Callable[..., Any], constants: list[Tensor]) -> None:
        super().__init__()
        self.function = function
        self.constants = torch.nn.ParameterList(constants)

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args, *self.constants)


def _case(name: str, magnitude: float = 1.0) -> tuple[_Function, tuple[Tensor, ...]]:
    """The module and its inputs."""
    function, shapes = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * magnitude

    inputs = [x() if callable(x) else random(x) for x in shapes if not isinstance(x, Constant)]
    constants = [random(x.shape) for x in shapes if isinstance(x, Constant)]
    return _Function(function, constants).eval(), tuple(inputs)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """(module, check) -> the rules that fired in `normalize`, by name; `check` runs after each."""

    def watched(module: fx.GraphModule, check: Callable[[str], None]) -> list[str]:
        fired: list[str] = []

        def watch(rule: Any) -> Any:
            def step(node: fx.Node) -> bool:
                changed = rule(node)
                if changed:
                    fired.append(rule.__name__)
                    assert len(fired) < 100, f"no end: {fired[-8:]}"
                    check(rule.__name__)
                return changed

            return step

        exact, everything = map(watch, EXACT), map(watch, normal.REASSOCIATING)
        with monkeypatch.context() as patch:
            patch.setattr(normal, "EXACT", tuple(exact))
            patch.setattr(normal, "REASSOCIATING", tuple(everything))
            normalize(module)
        return fired

    return watched


@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 30.0])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_each_step_keeps_the_function(steps, name, magnitude):
    model, inputs = _case(name, magnitude)
    module, expected = capture(model, inputs, dynamic=False).program.module, model(*inputs)

    def check(rule: str) -> None:
        (got,) = fx.Interpreter(module).run(*inputs)
        worst = (got - expected).abs().max().item()
        assert worst <= 1e-12 * max(1.0, expected.abs().max().item()), (rule, worst)
        if any(rule == r.__name__ for r in EXACT):
            assert torch.equal(got, last[0]), f"{rule} changed a bit"
        last[0] = got

    last = list(fx.Interpreter(module).run(*inputs))
    assert steps(module, check), "no rule has anything to say to this case"
    assert steps(module, check) == [], "the normal form of a normal form is itself"


@torch.no_grad()
def test_every_rule_has_a_case(steps):
    fired: set[str] = set()
    for name in CASES:
        program = capture(*_case(name), dynamic=False).program
        fired |= set(steps(program.module, lambda rule: None))
    missing = {rule.__name__ for rule in normal.REASSOCIATING} - fired
    assert not missing


def test_a_bias_that_does_not_absorb_is_scaled_with_the_scores(normal_form):
    """A fill of -1e4 is a bias like any other: (s + a) c has a c in it."""

    def scores(q: Tensor, k: Tensor) -> Tensor:
        keep = torch.ones(S, S, dtype=torch.bool).tril()
        return softmax((q @ k.mT + torch.where(keep, 0.0, -1e4)) * 1e-3)

    q, k = torch.randn(2, B, H, S, D, dtype=torch.float64)
    module = normal_form(scores, q, k)
    assert math.isclose((module(q, k)[0] - scores(q, k)).abs().max().item(), 0.0, abs_tol=1e-12)
