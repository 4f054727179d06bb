"""Gated activations and rotary embeddings by meaning: every spelling, and near misses refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ridgeline.cost_model import load_target
from ridgeline.ir.capture import capture
from ridgeline.ir.normalize import normalize
from ridgeline.passes.apply import apply
from ridgeline.passes.base import Setting
from ridgeline.passes.certify import EQUIVALENCE_LIMIT, equivalence
from ridgeline.passes.gated import GATED
from ridgeline.passes.propose import propose
from ridgeline.passes.rotary import ROTARY_EMBEDDING
from ridgeline.passes.weights import WeightStore

I = 10  # noqa: E741
GATED_SPELLINGS = {
    "silu": lambda x: F.silu(x[..., :I]) * x[..., I:],
    "silu, commuted, chunk": lambda x: (lambda g, u: u * F.silu(g))(*x.chunk(2, -1)),
    "silu, split": lambda x: (lambda g, u: F.silu(u) * g)(*x.split(I, dim=-1)),
    "x sigmoid(x)": lambda x: _swish(x[..., :I]) * x[..., I:],
    "logistic": lambda x: x[..., I:] * _logistic(x[..., :I]),
    "sigmoid": lambda x: torch.sigmoid(x[..., :I]) * x[..., I:],
    "relu": lambda x: x[..., I:] * x[..., :I].relu(),
    "gelu": lambda x: F.gelu(x[..., :I]) * x[..., I:],
    "gelu tanh": lambda x: F.gelu(x[..., :I], approximate="tanh") * x[..., I:],
    "gelu, erf": lambda x: _erf_gelu(x[..., :I]) * x[..., I:],
    "gelu, by hand": lambda x: x[..., I:] * _tanh_gelu(x[..., :I]),
    "gelu, Horner": lambda x: _horner_gelu(x[..., :I]) * x[..., I:],
}


def _swish(x):
    return x * torch.sigmoid(x)


def _logistic(x):
    return x / (1 + torch.exp(-x))


def _erf_gelu(x):
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def _tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def _horner_gelu(x):
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def proposed(rewrite, function, inputs):
    """(graph, candidates, reasons), every candidate certified, the rewritten graph checked."""
    with torch.no_grad():
        module = normalize(capture(Function(function).eval(), inputs).program.module)
        setting = Setting(load_target("a100"), False, 0.0, lambda node: None, WeightStore())
        candidates, refusals = propose((rewrite,), module, setting)
        for candidate in candidates:
            assert equivalence(candidate, {}).relative_error <= EQUIVALENCE_LIMIT
        for got, right in zip(apply(module, candidates)(*inputs), module(*inputs), strict=True):
            torch.testing.assert_close(got, right, rtol=2e-5, atol=2e-5)
    return candidates, [r.reject.reason for r in refusals]


@pytest.mark.parametrize("spelling", list(GATED_SPELLINGS))
def test_gated_spellings(spelling):
    candidates, reasons = proposed(GATED, GATED_SPELLINGS[spelling], [torch.randn(2, 3, 2 * I)])
    assert (len(candidates), reasons) == (1, [])


NOT_GATED = {
    "activation alone": lambda x: F.silu(x) + 1,
    "x sigmoid(x) alone": lambda x: x * torch.sigmoid(x),
    "gate per row": lambda x: torch.sigmoid(x[..., :1]) * x,
    "another cubic": lambda x: 0.5 * x * (1 + torch.tanh(0.797 * (x + 0.044715 * x**3))) * x.cos(),
}


@pytest.mark.parametrize("spelling", list(NOT_GATED))
def test_what_is_no_gated_activation(spelling):
    assert proposed(GATED, NOT_GATED[spelling], [torch.randn(2, 3, 2 * I)]) == ([], [])


def test_an_activation_that_is_used_elsewhere_is_refused():
    def model(g, u):
        a = F.silu(g)
        return a * u, a + 1

    candidates, reasons = proposed(GATED, model, [torch.randn(2, 3), torch.randn(2, 3)])
    assert candidates == []
    assert "also read by" in reasons[0]


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def rotate_chunks(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def rotate_pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def turned(rotate, size, dim=1):
    def model(q, k, cos, sin):
        c, s = cos.unsqueeze(dim), sin.unsqueeze(dim)

        def one(x):
            part, rest = x[..., :size], x[..., size:]
            y = part * c + rotate(part) * s
            return y if size == x.shape[-1] else torch.cat((y, rest), dim=-1)

        return one(q), one(k)

    return model


def operands(size, dim=1):
    q, k = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16)
    cos, sin = torch.randn(2, 1, 5, size)
    return [q, k, cos, sin] if dim == 1 else [q.transpose(1, 2), k.transpose(1, 2), cos, sin]


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("size", [16, 6])
@pytest.mark.parametrize("rotate", [rotate_half, rotate_chunks, rotate_pairs])
def test_rotary_spellings(rotate, size, dim):
    model = turned(rotate, size, dim)
    candidates, reasons = proposed(ROTARY_EMBEDDING, model, operands(size, dim))
    assert reasons == []
    (candidate,) = candidates
    assert candidate.call.interleaved == (rotate is rotate_pairs)
    assert (candidate.call.k is not None, candidate.call.heads) == (True, dim)


def test_a_query_alone():
    model = turned(rotate_half, 16)
    inputs = operands(16)
    candidates, reasons = proposed(
        ROTARY_EMBEDDING, lambda q, cos, sin: model(q, q, cos, sin)[0], [inputs[0], *inputs[2:]]
    )
    assert (len(candidates), reasons) == (1, [])
    assert candidates[0].call.k is None


NEAR = {
    "halves in their own order": (
        lambda x: torch.cat((-x[..., :8], x[..., 8:]), -1), "in their own order"
    ),
    "the other sign": (lambda x: torch.cat((x[..., 8:], -x[..., :8]), -1), "opposite sense"),
    "one feature off": (lambda x: torch.cat((-x[..., 7:], x[..., :7]), -1), "not two halves"),
    "even before odd": (
        lambda x: torch.stack((-x[..., ::2], x[..., 1::2]), -1).flatten(-2), "pairs are odd, even"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(NEAR))
def test_rotary_near_misses_are_refused(kind):
    rotate, reason = NEAR[kind]
    candidates, reasons = proposed(ROTARY_EMBEDDING, turned(rotate, 16), operands(16))
    assert candidates == []
    assert len(reasons) == 2
    assert all(reason in r for r in reasons)


@pytest.mark.parametrize("rewrite", [GATED, ROTARY_EMBEDDING], ids=lambda r: r.name)
def test_gradients(rewrite):
    torch.manual_seed(0)
    ops = torch.ops.ridgeline
    if rewrite is GATED:
        for activation in ("silu", "sigmoid", "gelu", "gelu_tanh"):
            pair = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
            assert torch.autograd.gradcheck(
                lambda g, u, a=activation: ops.gated_activation(g, u, activation=a), pair
            )
        return
    for interleaved in (False, True):
        q, k, cos, sin = (
            torch.randn(shape, dtype=torch.float64, requires_grad=True)
            for shape in ((2, 3, 2, 6), (2, 1, 2, 6), (1, 2, 4), (1, 2, 4))
        )
        assert torch.autograd.gradcheck(
            lambda *t, i=interleaved: ops.rotary(*t, interleaved=i), (q, k, cos, sin)
        )
