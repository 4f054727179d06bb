"""Layers that are held as codes: their products in the dtype that is quickest.

Law: `ridgeline.ir.quantized_linear`, `multiply`. A model of `ridgeline.reparameterize` leaves it to
the compiler how the products with its codes are formed:

    in x's own dtype      what the model says
    int16, by lookup      binary codes, CPU, few rows: x in fixed point, sums of four activations
                          looked up by the codes; it rounds x to 2**-13 of a block's largest
    bfloat16              CPU with bf16 products that are faster: x rounded to 2**-9 of itself, with
                          many rows the weight too

The codes stay as they are. Layers of one input that are coded alike are proposed side by side too:
one set of tables and one call for all of them, for a second copy of their codes.

Approximate: the error is what the rounding does to the layer's output on the example inputs.
Source: LUT-GEMM and T-MAC (lookup of partial sums).
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, fx

from ridgeline.ir.match import Reject, Site
from ridgeline.ir.provenance import said
from ridgeline.ir.quantized_linear import MANY_ROWS, QUANTIZED_LINEAR, fixed_point
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.coded_sites import (
    POSITIONS,
    after,
    apply,
    before,
    call_of,
    constants_of,
    copied_bytes,
    one_by_one,
    side_by_side,
    weight_of,
)
from ridgeline.passes.quantization import QuantizationError, QuantizedWeight
from ridgeline.passes.quantized_forms import Form, bf16_is_faster, rows_at
from ridgeline.passes.shift_add_linear import FEW_ROWS
from ridgeline.passes.weights import SKETCHED_ROWS


def search(graph: fx.Graph) -> tuple[list[Site], list[Reject]]:
    """Layers whose products nobody has chosen yet, each and side by side."""
    sites = [*one_by_one(graph), *side_by_side(graph)]
    return [s for s in sites if s.outs[0].kwargs.get("multiply") is None], []


def accepts(site: Site, setting: Setting) -> Sequence[Candidate] | Reject:
    """A candidate per other dtype of products that a kernel of the target has."""
    alone, out, x = len(site.outs) == 1, site.outs[0], site.bind["x"]
    try:
        weights = [weight_of(node) for node in site.outs]
        codec = weights[0].codec
    except QuantizationError as error:  # a call of the op by hand, in a form that has no name
        return Reject(str(error), out) if alone else []
    products = _products(x, codec.scheme, setting)
    if not products:
        return []
    if setting.training or setting.tolerance <= 0:
        reason, way = (
            ("the model is being trained", "call model.eval() before ridgeline.optimize")
            if setting.training
            else ("approximate, and tolerance is 0", "pass tolerance > 0, such as tolerance=0.01")
        )
        return Reject(reason, out, way) if alone else []
    if not setting.observed.finite(x):
        reason = f"{said(x)} is infinite or NaN on the example inputs"
        way = "capture with inputs on which the model is finite"
        return Reject(reason, x, way) if alone else []
    memory = copied_bytes(site)
    codes = [node.args[POSITIONS["packed"]] for node in site.outs]
    rows = setting.observed(x)
    beside = "" if alone else f", {len(site.outs)} layers side by side"
    found = []
    for multiply in products:
        call = call_of(site, multiply)
        parts = [
            setting.weights.memo(
                (x, packed.target, multiply), partial(rounding_error, rows, weight, multiply)
            )
            for packed, weight in zip(codes, weights, strict=True)
        ]
        error = sum(part**2 for part in parts) ** 0.5
        form = Form(codec, multiply, error, memory, after(call, site))
        found.append(
            Candidate(
                rewrite=CODED_PRODUCTS,
                site=site,
                call=call,
                before=before(site),
                after=form.work,
                variant=form.variant + beside,
                error=error,
                memory_bytes=memory,
                preconditions=(constants_of(site),),
            )
        )
    return found


def _products(x: fx.Node, scheme: str, setting: Setting) -> list[torch.dtype]:
    """Dtypes other than x's own in which a kernel of the target forms the products."""
    found = []
    cpu = setting.target.kind == "cpu"
    if cpu and scheme == "binary" and rows_at(x) <= FEW_ROWS:
        found.append(torch.int16)
    if x.meta["val"].dtype == torch.float32 and bf16_is_faster(setting.target):
        found.append(torch.bfloat16)
    return found


def rounding_error(x: Tensor, weight: QuantizedWeight, multiply: torch.dtype) -> float:
    """‖rounded - exact‖ / ‖exact‖ of x Ŵᵀ with products in `multiply`, on up to SKETCHED_ROWS rows
    spread over the weight; x [m,K]."""
    part = _spread(weight)
    rows, wide = x.detach().float(), part.dequantize()
    if part.permutation is not None:  # fixed point has its blocks among the stored columns
        order = part.permutation.long()
        rows, wide = rows[:, order], wide[:, order]
    whole = rows @ wide.T
    rounded = fixed_point(rows) if multiply == torch.int16 else rows.to(multiply).float()
    many = multiply == torch.bfloat16 and len(rows) >= MANY_ROWS
    other = wide.to(multiply).float() if many else wide
    difference = (rounded @ other.T - whole).norm()
    return (difference / whole.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()


def _spread(weight: QuantizedWeight) -> QuantizedWeight:
    """Some of its rows, or all of them where rows share their groups."""
    step = 1 if weight.group_rows > 1 else -(-len(weight.packed) // SKETCHED_ROWS)
    kept = {n: t[::step] for n, t in weight.tensors.items() if n != "permutation"}
    return dataclasses.replace(weight, **kept)


CODED_PRODUCTS = Pass(
    name="coded_products",
    op=QUANTIZED_LINEAR,
    exactness="approximate",
    patterns=tuple,
    search=search,
    accepts=accepts,
    apply=apply,
    rounding={"float32": 2e-6, "bfloat16": 4e-3, "float16": 6e-4},
)
