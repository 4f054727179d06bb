"""The passes, in the order in which a plan lists them; which apply is one joint decision."""

from ridgeline.passes.base import Pass
from ridgeline.passes.flash_attention import FLASH_ATTENTION
from ridgeline.passes.layer_norm import LAYER_NORM_PASS
from ridgeline.passes.quantized_linear import QUANTIZED
from ridgeline.passes.rms_norm import RMS_NORM_PASS

PASSES: tuple[Pass, ...] = (FLASH_ATTENTION, QUANTIZED, RMS_NORM_PASS, LAYER_NORM_PASS)
