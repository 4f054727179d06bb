"""Rational functions in plain torch: found in any spelling, in their own form, or refused."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ridgeline
from ridgeline.cost_model import load_target, work_of
from ridgeline.ir.capture import capture
from ridgeline.ir.normalize import normalize
from ridgeline.passes.apply import apply
from ridgeline.passes.base import Setting
from ridgeline.passes.certify import EQUIVALENCE_LIMIT, equivalence
from ridgeline.passes.group_rational import GROUP_RATIONAL_PASS
from ridgeline.passes.propose import propose
from ridgeline.passes.weights import WeightStore

Law = Callable[[Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    """`law` of (x [..., C], a [rows, m+1], b [G, n]) with G = 4."""

    def __init__(self, law: Law, m: int = 5, n: int = 4, rows: int = 4) -> None:
        super().__init__()
        self.law = law
        self.a, self.b = nn.Parameter(torch.randn(rows, m + 1)), nn.Parameter(torch.rand(4, n))

    def forward(self, x: Tensor) -> Tensor:
        return self.law(x, self.a, self.b)


def _columns(c: Tensor) -> list[Tensor]:
    return [c[:, i, None] for i in range(c.shape[1])]


def _horner(columns: list[Tensor], z: Tensor) -> Tensor:
    total = columns[-1]
    for c in reversed(columns[:-1]):
        total = total * z + c
    return total


def kernel_horner(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    z = x.view(*x.shape[:-1], 4, -1)
    bottom = 1 + _horner(_columns(b.abs()), z.abs()) * z.abs()
    return (_horner(_columns(a), z) / bottom).view(x.shape)


def kernel_powers(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    z = x.unflatten(-1, (4, -1))
    top = sum(c * z**i for i, c in enumerate(_columns(a)))
    bottom = sum(((c * z**i).abs() for i, c in enumerate(_columns(b), 1)), start=1.0)
    return (top / bottom).flatten(-2)


def safe_pade(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    z = x.view(*x.shape[:-1], 4, -1)
    bottom = torch.abs(z * _horner(_columns(b), z)) + 1
    return (_horner(_columns(a), z) / bottom).reshape(x.shape)


def kat(x: Tensor, a: Tensor, b: Tensor, magnitudes: bool = False) -> Tensor:
    """As the public KAT_Group computes it without its GPU kernels."""
    batch, length, channels = x.shape
    z = x.view(batch, length, 4, channels // 4).permute(2, 0, 1, 3).contiguous()
    z = z.view(4, batch * length * (channels // 4))
    powers, above = [torch.ones_like(z)], [torch.ones_like(z)]
    for _ in range(a.shape[1] - 1):
        powers.append(powers[-1] * z if len(powers) > 1 else z)
        above.append(above[-1] * z.abs() if magnitudes else powers[-1])
    a = a.repeat(4 // len(a), 1)
    top = torch.bmm(a.unsqueeze(1), torch.stack(powers, dim=1)).squeeze(1)
    ones, zeros = (
        f(4, n, dtype=b.dtype)
        for f, n in ((torch.ones, 1), (torch.zeros, a.shape[1] - b.shape[1] - 1))
    )
    c = torch.cat([ones, b, zeros], dim=1)
    bottom = torch.bmm(c.abs().unsqueeze(1), torch.stack(above, dim=1)).squeeze(1)
    y = top.div(bottom).view(4, batch, length, channels // 4)
    return y.permute(1, 2, 0, 3).contiguous().view(batch, length, channels)


def unsplit(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The groups are a dimension of their own all the while."""
    z = x.view(*x.shape[:-1], 4, -1) * 2.0
    return _horner(_columns(a), z) / (1 + _horner(_columns(b.abs()), z.abs()) * z.abs())


SPELLINGS = {
    "kernel-horner": (kernel_horner, "abs_terms"),
    "kernel-powers": (kernel_powers, "abs_terms"),
    "safe-pade": (safe_pade, "abs_sum"),
    "kat": (kat, "abs_coefficients"),
    "kat-magnitudes": (lambda x, a, b: kat(x, a, b, True), "abs_terms"),
    "unsplit": (unsplit, "abs_terms"),
}


def _propose(model: nn.Module, x: Tensor):
    program = capture(model, [x]).program
    module = normalize(program.module)
    setting = Setting(load_target("cpu"), program.training, 0.0, lambda n: n, WeightStore())
    return module, *propose((GROUP_RATIONAL_PASS,), module, setting)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("rows", [4, 1])
@pytest.mark.parametrize(("m", "n"), [(5, 4), (3, 2)])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_spelling_is_found_in_its_own_form(spelling, m, n, rows):
    law, form = SPELLINGS[spelling]
    model, x = Model(law, m, n, rows).eval(), torch.randn(2, 5, 24)
    with torch.no_grad():
        module, candidates, refusals = _propose(model, x)
        assert refusals == []
        (candidate,) = candidates
        assert candidate.call.form == form
        assert equivalence(candidate, {}).relative_error <= EQUIVALENCE_LIMIT
        rewritten = apply(module, candidates)
        (got,) = rewritten(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)
    (call,) = rewritten.graph.find_nodes(op="call_function", target=GROUP_RATIONAL_PASS.op.overload)
    assert work_of(call) == candidate.after
    assert not any(
        "matmul" in str(n.target) or "div" in str(n.target) for n in rewritten.graph.nodes
    )


def test_gradients_are_those_of_the_graph():
    model, x = Model(kernel_horner).train(), torch.randn(2, 5, 24, requires_grad=True)
    with torch.no_grad():
        model.b[0] = 0  # where autograd's sign counts
    fast = ridgeline.optimize(copy.deepcopy(model), target="cpu")
    grad = torch.randn(2, 5, 24)
    found = torch.autograd.grad(fast(x), [x, *fast.parameters()], grad)
    assert [d.rewrite for d in fast.plan.applied] == ["group_rational"]
    expected = torch.autograd.grad(model(x), [x, *model.parameters()], grad)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_optimized_model_runs_the_kernel():
    model, x = Model(kat, rows=1).eval(), torch.randn(2, 5, 24)
    fast = ridgeline.optimize(model, target="cpu")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert [k.op for k in fast.plan.kernels] == ["ridgeline::group_rational"]


def signed(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    z = x.view(2, 5, 4, 6)
    return (_horner(_columns(a), z) / (1 + _horner(_columns(b), z) * z)).view(x.shape)


def mixed(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    z, (b1, b2, b3, _) = x.view(2, 5, 4, 6), _columns(b.abs())
    bottom = 1 + b1 * z.abs() + b2 * z**2 + b3 * z**3
    return (_horner(_columns(a), z) / bottom).view(x.shape)


def constant(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    z = x.view(2, 5, 4, 6)
    return _horner(_columns(a), z) / (0.1 + _horner(_columns(b.abs()), z.abs()) * z.abs())


def reversed_columns(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    z = x.view(2, 5, 4, 6)
    top = _horner(_columns(a)[::-1], z)
    return top / (1 + _horner(_columns(b.abs()), z.abs()) * z.abs())


def two_variables(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    z = x.view(2, 5, 4, 6)
    t = z.sin()
    return _horner(_columns(a), z) / (1 + _horner(_columns(b.abs()), t.abs()) * t.abs())


def read_inside(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    z = x.view(2, 5, 4, 6)
    top = _horner(_columns(a), z)
    return top / (1 + _horner(_columns(b.abs()), z.abs()) * z.abs()) + top


def other_groups(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    z = x.view(2, 5, 6, 4).transpose(2, 3).contiguous().view(2, 5, 4, 6)[:, :, :1]
    return _horner(_columns(a), z) / (1 + _horner(_columns(b.abs()), z.abs()) * z.abs())


@pytest.mark.parametrize(
    ("law", "reason"),
    [
        (signed, "keep their signs"),
        (mixed, "mixes odd powers"),
        (constant, "constant term is not 1"),
        (reversed_columns, "not all columns of 'a' in order"),
        (two_variables, "is no power of"),
        (read_inside, "is also read by"),
        (other_groups, "does not split into 4 groups"),
    ],
)
def test_what_is_another_function_is_refused(law, reason):
    with torch.no_grad():
        _, candidates, refusals = _propose(Model(law).eval(), torch.randn(2, 5, 24))
    assert candidates == []
    (refusal,) = refusals
    assert reason in refusal.reject.reason
    assert refusal.reject.needed


def test_ordinary_divisions_are_not_worth_a_line():
    def swish(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x)) + x / 3 + x / x.norm(dim=-1, keepdim=True)

    with torch.no_grad():
        _, candidates, refusals = _propose(Model(swish).eval(), torch.randn(2, 5, 24))
    assert (candidates, refusals) == ([], [])


def test_a_deep_sum_above_a_division_is_walked_in_bounds():
    def deep(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        total = x
        for _ in range(700):
            total = total + x
        return x / (1 + total)

    with torch.no_grad():
        _, candidates, refusals = _propose(Model(deep).eval(), torch.randn(2, 5, 24))
    assert (candidates, refusals) == ([], [])
