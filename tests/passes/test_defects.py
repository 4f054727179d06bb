"""A defect of one pass costs that pass: the others still rewrite, and the model still runs."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

import ridgeline
from ridgeline.passes import PASSES
from ridgeline.passes.norms import NORMS


def _stops(graph: fx.Graph) -> tuple[list, list]:
    raise ZeroDivisionError("a size of nothing")


class _Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) / 8, -1) @ v


def test_the_other_passes_still_rewrite(caplog: pytest.LogCaptureFixture) -> None:
    broken = replace(NORMS, name="broken", search=_stops)
    model, inputs = _Attention(), torch.randn(3, 1, 4, 32, 64).unbind()
    passes = (broken, *PASSES)
    fast = ridgeline.optimize(model, inputs, target="a100", passes=passes, lowering="eager")
    assert [d.rewrite for d in fast.plan.applied] == ["flash_attention"]
    (refused,) = [d for d in fast.plan.refused if d.refused_by == "defect"]
    assert (refused.rewrite, refused.at) == ("broken", "output")
    assert refused.reason == (
        "the pass stopped (ZeroDivisionError: a size of nothing); please report it"
    )
    assert [r.message for r in caplog.records if r.levelno == logging.ERROR] == [
        "a defect of ridgeline, please report it: broken stopped"
    ]
    caplog.clear()
    torch.testing.assert_close(fast(*inputs), model(*inputs))


def test_a_flattened_stack_of_scalars_is_no_rotation() -> None:
    class Scaled(nn.Module):
        def forward(self, a: Tensor, b: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return torch.stack([a.sum(), b.sum()]).view(1, 2) * x + y * z

    inputs = (torch.randn(3), torch.randn(3), *torch.randn(3, 4, 2))
    fast = ridgeline.optimize(Scaled(), inputs, target="cpu", lowering="eager")
    assert not fast.plan.applied
    torch.testing.assert_close(fast(*inputs), Scaled()(*inputs))
