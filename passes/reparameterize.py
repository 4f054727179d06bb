"""`reparameterize`: a pretrained model in another form of arithmetic, by the name of the method."""

from typing import Any

from torch import nn

from ridgeline.ir.errors import RidgelineError
from ridgeline.passes.preparation import rotation
from ridgeline.passes.quantized_model import quantized_linear, shift_add_linear
from ridgeline.passes.shift_add_vit import shift_add_vit

METHODS = {
    "quantized_linear": quantized_linear,
    "rotation": rotation,
    "shift_add_linear": shift_add_linear,
    "shift_add_vit": shift_add_vit,
}


class ReparameterizeError(RidgelineError, ValueError):
    """An argument of `reparameterize` that cannot be used."""


def reparameterize(model: nn.Module, method: str, **options: Any) -> nn.Module:
    """A new model that computes `model` in another form; the caller's is never changed.

    method: "shift_add_vit" for additive attention, shift layers and mixtures, to be fine-tuned:
        options as of `ridgeline.passes.shift_add_vit.shift_add_vit`; "shift_add_linear" for
        binary-coded linear layers of 2 to 4 bits, "quantized_linear" for 4 or 8 bits with scale and
        minimum, both fitted to calibration data: options as of
        `ridgeline.passes.quantized_model.quantized_model`; "rotation" for the same function in
        weights that low bits hold better: options as of `ridgeline.passes.preparation.rotation`.
    The new model's `report` says what became of each layer, and why others stay. Hand it to
    `ridgeline.optimize` in eval mode to run it by kernels.

    Raises ReparameterizeError for another method or what is no module, and the method's own errors.
    """
    if not isinstance(model, nn.Module):
        raise ReparameterizeError(f"model is {type(model).__name__}; pass a torch.nn.Module")
    if method not in METHODS:
        raise ReparameterizeError(f"method is {method!r}; choose one of {list(METHODS)}")
    return METHODS[method](model, **options)
