"""Post-training quantisation of linear weights: codecs, data-free search, GPTQ, calibration."""

from torch import Tensor

from ridgeline.passes.quantization.calibrate import collect_hessians, stream_hessians
from ridgeline.passes.quantization.codec import Codec, QuantizationError, QuantizedWeight
from ridgeline.passes.quantization.gptq import gptq
from ridgeline.passes.quantization.search import calibration_free, round_to_nearest
from ridgeline.passes.quantization.store import bits_per_weight, load_quantized, save_quantized

__all__ = [
    "Codec",
    "QuantizationError",
    "QuantizedWeight",
    "bits_per_weight",
    "calibration_free",
    "collect_hessians",
    "gptq",
    "load_quantized",
    "quantize",
    "round_to_nearest",
    "save_quantized",
    "stream_hessians",
]


def quantize(weight: Tensor, codec: Codec, hessian: Tensor | None = None) -> QuantizedWeight:
    """`weight` [N,K] in `codec`: without loss if it is on the codec's grid, else as near as known.

    hessian: fp32 [K,K] of `collect_hessians`; with it GPTQ minimises the layer's output error,
        without it `calibration_free` the weight's. Where rounding to nearest is bit-exact (a
        checkpoint that was quantised so before), it is the answer in both cases.
    """
    nearest = round_to_nearest(weight, codec)
    if bool((nearest.dequantize() == weight.float()).all()):
        return nearest
    return calibration_free(weight, codec) if hessian is None else gptq(weight, codec, hessian)
