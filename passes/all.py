"""The passes, in the order in which a plan lists them; which apply is one joint decision."""

from ridgeline.passes.base import Pass
from ridgeline.passes.coded_products import CODED_PRODUCTS
from ridgeline.passes.flash_attention import FLASH_ATTENTION
from ridgeline.passes.gated import GATED
from ridgeline.passes.group_rational import GROUP_RATIONAL_PASS
from ridgeline.passes.linear_rational import LINEAR_RATIONAL_PASS
from ridgeline.passes.merged_coded import MERGED_CODED
from ridgeline.passes.merged_linear import MERGED_LINEAR
from ridgeline.passes.norm_rational import NORM_RATIONAL
from ridgeline.passes.norms import NORMS
from ridgeline.passes.quantized_linear import QUANTIZED
from ridgeline.passes.rotary import ROTARY_EMBEDDING
from ridgeline.passes.shift_add_linear import SHIFT_ADD

PASSES: tuple[Pass, ...] = (
    FLASH_ATTENTION,
    ROTARY_EMBEDDING,
    GATED,
    GROUP_RATIONAL_PASS,
    NORM_RATIONAL,
    LINEAR_RATIONAL_PASS,
    NORMS,
    MERGED_LINEAR,
    MERGED_CODED,
    QUANTIZED,
    SHIFT_ADD,
    CODED_PRODUCTS,
)
