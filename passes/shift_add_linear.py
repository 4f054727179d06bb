"""Linear layers with constant weights -> sums and shifts (ShiftAddLLM, ShiftAddViT).

Law: see `ridgeline.ir.quantized_linear`, codecs "binary" and "shift". A weight becomes q matrices
of signs with a scale per group each, or signs and right shifts; what it is multiplied with is then

    by lookup   x in fixed point; four columns' 16 signed sums are a table, in which the codes of
                each row look theirs up: no product with a weight is formed. On CPUs, for few rows:
                its time grows with them, and it wins by bytes, at 2 bits and sometimes at 3
    decoded     products in the input's own dtype, for few bytes of weight

Approximate: proposed only under a tolerance, and for calibrated layers: fitted without regard to
the inputs, binary codes lose the few large weights that real models live by. Source: You et al.,
ShiftAddLLM; Park et al., LUT-GEMM; Elhoushi et al., DeepShift.
"""

from collections.abc import Sequence

import torch

from ridgeline.ir.match import Reject, Site
from ridgeline.ir.quantized_linear import QUANTIZED_LINEAR
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.quantization import Codec
from ridgeline.passes.quantized_forms import Layer, Products, floating_products, rows_of
from ridgeline.passes.quantized_sites import apply, patterns, prepare, propose_forms
from ridgeline.passes.side_by_side import search

BINARY = tuple(Codec(bits=q, group_size=128, scheme="binary") for q in (2, 3, 4))
SHIFT = (
    Codec(bits=5, group_size=128, scheme="shift", terms=1),
    Codec(bits=8, group_size=128, scheme="shift", terms=2),
)

FEW_ROWS = 8
"""Rows up to which a product by lookup is worth offering: each makes tables of its own."""


def offer(layers: Sequence[Layer], setting: Setting) -> list[tuple[Codec, Products]] | Reject:
    """Every codec, where the layers were calibrated; by lookup too where that can pay."""
    if any(layer.name not in setting.weights.hessians for layer in layers):
        return Reject(
            "sums and shifts are fitted to how the layer is used, and it was not calibrated",
            layers[0].out,
            "pass calibration=, batches that reach this layer",
        )
    products = floating_products(layers, setting)
    few = setting.target.kind == "cpu" and rows_of(layers) <= FEW_ROWS
    by_lookup: Products = (torch.int16,) if few else ()
    return [(c, (*by_lookup, *products)) for c in BINARY] + [(c, products) for c in SHIFT]


def accepts(site: Site, setting: Setting) -> list[Candidate] | Reject:
    """Every form of the layers of `site`, or why they stay."""
    return propose_forms(SHIFT_ADD, offer, site, setting)


SHIFT_ADD = Pass(
    name="shift_add_linear",
    op=QUANTIZED_LINEAR,
    exactness="approximate",
    patterns=patterns,
    search=search,
    accepts=accepts,
    prepare=prepare,
    apply=apply,
    rounding={"float32": 2e-6, "bfloat16": 4e-3, "float16": 6e-4},
)
