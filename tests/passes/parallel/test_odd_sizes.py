"""Parts whose sizes are differences are certified with tokens enough for both."""

import sympy
import torch
from torch import Tensor, nn

import ridgeline
from ridgeline.passes.certify import _odd_values


def test_odd_values_leave_no_part_empty() -> None:
    s, t = sympy.symbols("s t", integer=True, positive=True)
    assert _odd_values([s, t], [s, t]) == {s: 3, t: 7}
    assert _odd_values([s, t], [s, t - 20, s + t]) == {s: 15, t: 31}
    assert _odd_values([s], [s - s**2]) is None


class Rest(nn.Module):
    """Two products of what lies beyond 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(64, 64, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        rest = x[:, 16:]
        return self.a(rest) * self.b(rest)


def test_the_rest_of_a_sequence_is_certified() -> None:
    model, x = Rest().eval(), torch.randn(2, 40, 64)
    fast = ridgeline.optimize(model, target="a100", lowering="eager")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    (line,) = [d for d in fast.plan.applied if d.rewrite == "merged_linear"]
    assert line.certificate is not None
    assert "=31" in line.certificate.cases[0]
