"""ShiftAddViT: a pretrained vision transformer made of additions and shifts, and trainable."""

from ridgeline.passes.shift_add_vit.additive_attention import AdditiveAttention
from ridgeline.passes.shift_add_vit.build import Replaced, shift_add_vit
from ridgeline.passes.shift_add_vit.errors import ShiftAddError
from ridgeline.passes.shift_add_vit.freeze import freeze
from ridgeline.passes.shift_add_vit.latency import expert_latencies
from ridgeline.passes.shift_add_vit.mixture import MixtureOfPrimitives, balance_loss
from ridgeline.passes.shift_add_vit.operations import Operations, count_operations
from ridgeline.passes.shift_add_vit.shift_linear import ShiftLinear

__all__ = [
    "AdditiveAttention",
    "MixtureOfPrimitives",
    "Operations",
    "Replaced",
    "ShiftAddError",
    "ShiftLinear",
    "balance_loss",
    "count_operations",
    "expert_latencies",
    "freeze",
    "shift_add_vit",
]
