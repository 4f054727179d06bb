"""The passes, in the order in which a plan lists them; which apply is one joint decision."""

from ridgeline.passes.base import Pass
from ridgeline.passes.flash_attention import FLASH_ATTENTION
from ridgeline.passes.group_rational import GROUP_RATIONAL_PASS
from ridgeline.passes.norms import NORMS
from ridgeline.passes.quantized_linear import QUANTIZED

PASSES: tuple[Pass, ...] = (FLASH_ATTENTION, QUANTIZED, NORMS, GROUP_RATIONAL_PASS)
