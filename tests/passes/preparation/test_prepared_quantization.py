"""Preparation before quantisation: the better of two is taken, and both numbers are told."""

import re

import pytest
import torch
from torch import Tensor, nn

import ridgeline
from ridgeline.passes.quantization import Codec, QuantizationError

CODEC = Codec(3, 64, "minimum")
WIDE = 64


class Outliers(nn.Module):
    """A few inputs of the first layer are loud, and a few of the second."""

    def __init__(self, loud: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(WIDE)
        self.up, self.down = nn.Linear(WIDE, 2 * WIDE), nn.Linear(2 * WIDE, WIDE)
        with torch.no_grad():
            self.norm.weight[::16] *= loud
            self.up.weight[:, ::16] /= loud
            self.up.weight[::24] *= loud
            self.down.weight[:, ::24] /= loud

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


def quantized(model: nn.Module, batches: list[Tensor], **options):
    return ridgeline.reparameterize(
        model, "shift_add_linear", codec=CODEC, calibration=batches, distillation=False, **options
    )


def test_auto_takes_the_better_and_tells_both_numbers() -> None:
    model = Outliers(30).eval()
    batches = [torch.randn(256, WIDE) for _ in range(8)]
    held = {k: v.clone() for k, v in model.state_dict().items()}
    plain = quantized(model, batches)
    new = quantized(model, batches, preparation="auto")
    line = next(x for x in new.report if x.path == "preparation")
    with_them, without = map(float, re.findall(r"with(?:out| them) ([\d.e+-]+)", line.reason))
    assert "2 rotations and scales folded" in line.reason
    assert with_them < without
    assert all(torch.equal(v, held[k]) for k, v in model.state_dict().items())
    x = torch.randn(1000, WIDE)
    with torch.no_grad():
        errors = [(m(x) - model(x)).norm() for m in (new, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_auto_leaves_a_model_that_cannot_be_captured_as_it_is() -> None:
    class Branching(Outliers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    model, batches = Branching(3).eval(), [torch.randn(256, WIDE) for _ in range(2)]
    new = quantized(model, batches, preparation="auto")
    assert any(x.path == "preparation" and x.reason.startswith("none: ") for x in new.report)
    with pytest.raises(ridgeline.RidgelineError):
        quantized(model, batches, preparation="rotation")


def test_layers_that_stay_are_not_folded_into() -> None:
    model, batches = Outliers(30).eval(), [torch.randn(256, WIDE) for _ in range(2)]
    new = quantized(model, batches, preparation="rotation", ignore=["down"])
    assert torch.equal(new.down.weight, model.down.weight)
    assert not torch.equal(new.norm.weight, model.norm.weight)


def test_another_preparation_is_refused() -> None:
    with pytest.raises(QuantizationError, match="preparation is 'hadamard'"):
        quantized(Outliers(1), [torch.randn(9, WIDE)], preparation="hadamard")
