"""Attention with sinks through compiled code: one number per head joins the softmax."""

import copy

import pytest
import torch
from torch import Tensor, nn

import ridgeline

HEADS, DIM = 4, 16


class Sinks(nn.Module):
    """Attention of gpt-oss: `shape` is that of the sinks before they are expanded."""

    def __init__(self, *shape: int, masked: bool) -> None:
        super().__init__()
        self.sinks, self.masked = nn.Parameter(torch.randn(*shape)), masked

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.mT * DIM**-0.5
        if self.masked:
            scores = scores + mask
        column = self.sinks.expand(*q.shape[:3], 1)
        weights = torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1]
        return (weights @ v).transpose(1, 2).flatten(2)


def _inputs(queries: int, keys: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(queries)
    q, k, v = (torch.randn(2, HEADS, n, DIM, generator=generator) for n in (queries, keys, keys))
    keep = torch.ones(queries, keys, dtype=torch.bool).tril(-1)  # the first row keeps nothing
    return q, k, v, torch.zeros(queries, keys).masked_fill(~keep, -torch.inf)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(HEADS, 1, 1), (1, 1, 1, 1)], ids=str)
@torch.no_grad()
def test_compiled_code_equals_float64(masked, shape):
    torch.manual_seed(0)
    model = Sinks(*shape, masked=masked).eval()
    fast = ridgeline.optimize(model, _inputs(24, 30), target="cpu")
    (decision,) = fast.plan.applied
    assert decision.rewrite == "flash_attention"
    assert "one sink per head, whose weight is dropped" in decision.certificate.preconditions
    assert [k.backend for k in fast.plan.kernels] == ["tvm"]
    for queries, keys in ((24, 30), (2, 9)):
        inputs = _inputs(queries, keys)
        exact = copy.deepcopy(model).double()(*(x.double() for x in inputs))
        assert (fast(*inputs) - exact).norm() <= 1e-6 * exact.norm()


@torch.no_grad()
def test_sinks_of_each_query_are_refused_with_the_reason():
    model = Sinks(HEADS, 24, 1, masked=False).eval()
    fast = ridgeline.optimize(model, _inputs(24, 30), target="cpu", lowering="eager")
    (decision,) = fast.plan.refused
    assert "are not one number per head" in decision.reason
    assert "expand one number per head" in decision.needed
    inputs = _inputs(24, 30)
    torch.testing.assert_close(fast(*inputs), model(*inputs))
