"""Post-training quantisation of linear weights: codecs, searches, calibration, descent."""

from torch import Tensor

from ridgeline.passes.quantization.calibrate import (
    HessiansOnDemand,
    collect_hessians,
)
from ridgeline.passes.quantization.codec import Codec, QuantizationError, QuantizedWeight
from ridgeline.passes.quantization.descent import descend
from ridgeline.passes.quantization.gptq import gptq
from ridgeline.passes.quantization.layer import QuantizedLinear
from ridgeline.passes.quantization.levels import LINEAR
from ridgeline.passes.quantization.search import calibration_free, round_to_nearest
from ridgeline.passes.quantization.store import bits_per_weight, load_quantized, save_quantized

__all__ = [
    "Codec",
    "HessiansOnDemand",
    "QuantizationError",
    "QuantizedLinear",
    "QuantizedWeight",
    "bits_per_weight",
    "calibration_free",
    "collect_hessians",
    "descend",
    "gptq",
    "load_quantized",
    "quantize",
    "round_to_nearest",
    "save_quantized",
]


def quantize(weight: Tensor, codec: Codec, hessian: Tensor | None = None) -> QuantizedWeight:
    """`weight` [N,K] in `codec`: without loss if it is on the codec's grid, else as near as known.

    hessian: fp32 [K,K] of `collect_hessians`; with it the layer's output error is minimised
        (`descend`, or `gptq` for an integer zero point), without it the weight's
        (`calibration_free`). Where rounding to nearest is bit-exact (a checkpoint that was
        quantised so before), it is the answer in both cases.
    Raises QuantizationError for binary coding and shifts without a Hessian: fitted to the weights
    alone they destroy real models.
    """
    if codec.codec == "uniform":
        nearest = round_to_nearest(weight, codec)
        if bool((nearest.dequantize() == weight.float()).all()):
            return nearest
    if hessian is None:
        if codec.codec != "uniform":
            raise QuantizationError(
                f"{codec} is fitted to how the layer is used; pass calibration data"
            )
        return calibration_free(weight, codec)
    return (descend if codec.scheme in LINEAR else gptq)(weight, codec, hessian)
