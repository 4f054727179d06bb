"""Linear layers with constant weights -> `ridgeline::quantized_linear` (MARLIN-style).

Law: see `ridgeline.ir.quantized_linear`. Approximate: proposed only under a tolerance, in several
forms (bits, group, scheme, and for fp32 models the dtype of the products), from which the chooser
takes one or none. A form that holds the weight without loss has error 0. Source: Frantar et al.,
MARLIN; Badri and Shaji, HQQ; Frantar et al., GPTQ.
"""

from collections.abc import Sequence

from ridgeline.ir.match import Reject, Site
from ridgeline.ir.quantized_linear import QUANTIZED_LINEAR
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.quantization import Codec
from ridgeline.passes.quantized_forms import Layer, Products, floating_products
from ridgeline.passes.quantized_sites import apply, patterns, prepare, propose_forms
from ridgeline.passes.side_by_side import search

CODECS = (
    Codec(bits=4, group_size=128, scheme="symmetric"),
    Codec(bits=4, group_size=64, scheme="zero_point"),
    Codec(bits=4, group_size=32, scheme="minimum"),
    Codec(bits=8, group_size=32, scheme="symmetric"),
)
"""From the fewest bits per weight to the most."""


def offer(layers: Sequence[Layer], setting: Setting) -> list[tuple[Codec, Products]]:
    """Every codec, with the products that the machine is fast at."""
    products = floating_products(layers, setting)
    return [(codec, products) for codec in CODECS]


def accepts(site: Site, setting: Setting) -> list[Candidate] | Reject:
    """Every form of the layers of `site`, or why they stay."""
    return propose_forms(QUANTIZED, offer, site, setting)


QUANTIZED = Pass(
    name="quantized_linear",
    op=QUANTIZED_LINEAR,
    exactness="approximate",
    patterns=patterns,
    search=search,
    accepts=accepts,
    prepare=prepare,
    apply=apply,
    rounding={"float32": 2e-6, "bfloat16": 4e-3, "float16": 6e-4},
)
