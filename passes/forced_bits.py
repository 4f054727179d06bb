"""`optimize(model, bits=3)`: a width that is asked for, in the codec that suits the target."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ridgeline.cost_model import Target, Work, estimate
from ridgeline.passes.quantization import Codec, QuantizationError
from ridgeline.passes.quantized_model import (
    Progress,
    binary_codec,
    quantized_linear,
    shift_add_linear,
    summary,
    uniform_codec,
)

WIDTHS = (2, 3, 4, 8)
UNIFORM, BINARY = (4, 8), (2, 3, 4)
SHAPE = (4096, 4096)
"""N and K of the layer that codecs are weighed on, for one row."""


def forced(
    model: nn.Module,
    target: Target,
    bits: int | None,
    average_bits: float | None,
    calibration: Any,
    tokenizer: Any,
    ignore: Sequence[str],
    progress: Progress | None = None,
) -> tuple[nn.Module, str]:
    """The reparameterised model, and a sentence that says what it holds and why so.

    Raises QuantizationError for other widths, and as `quantized_model` does.
    """
    given: dict[str, Any] = {
        "calibration": calibration,
        "tokenizer": tokenizer,
        "ignore": ignore,
        "progress": progress,
    }
    if average_bits is not None or bits is None:
        new = shift_add_linear(model, bits=bits, average_bits=average_bits, **given)
        return new, f"average_bits={average_bits}: {summary(new)}"
    if bits not in WIDTHS or isinstance(bits, bool):
        raise QuantizationError(f"bits is {bits!r}; choose one of {WIDTHS}")
    seconds = {}
    if bits in UNIFORM:
        seconds["quantized_linear"] = _seconds(uniform_codec(bits), target)
    if bits in BINARY:
        seconds["shift_add_linear"] = _seconds(binary_codec(bits), target)
    method = min(seconds, key=seconds.__getitem__)
    make = {"quantized_linear": quantized_linear, "shift_add_linear": shift_add_linear}[method]
    new = make(model, bits=bits, **given)
    sides = ", ".join(f"{name} {s * 1e6:.0f} µs" for name, s in seconds.items())
    return new, f"bits={bits}: {summary(new)}; {SHAPE} for one row on {target.name}: {sides}"


def _seconds(codec: Codec, target: Target) -> float:
    """One row times a layer of SHAPE, the dtype of products that is quickest."""
    n, k = SHAPE
    products: list[torch.dtype] = [torch.bfloat16, torch.float32]
    if codec.scheme == "binary" and target.kind == "cpu":
        products.append(torch.int16)
    return min(
        estimate(Work((codec.gemm(1, n, k, dtype),)), target).seconds
        for dtype in products
        if dtype == torch.int16 or str(dtype).removeprefix("torch.") in target.peaks
    )
