"""How long the two experts of a mixture take on a target, by its cost model."""

from torch import nn

from ridgeline.cost_model import Gemm, Target, Work, estimate
from ridgeline.passes.quantization import Codec
from ridgeline.passes.shift_add_vit.shift_linear import ShiftLinear


def expert_latencies(linear: nn.Linear, target: Target, *, tokens: int) -> tuple[float, float]:
    """(mult, shift) seconds for `tokens` tokens: the layer as it is, and as codes of shifts."""
    n, k = linear.weight.shape
    dtype = linear.weight.dtype
    shift = ShiftLinear.of(linear)
    plain = Gemm(tokens, n, k, dtype=dtype, bias=linear.bias is not None)
    codec = Codec(shift.bits, shift.group_size, "shift", terms=shift.terms)
    coded = codec.gemm(tokens, n, k, dtype, bias=linear.bias is not None)
    first, second = (estimate(Work((gemm,)), target).seconds for gemm in (plain, coded))
    return first, second
