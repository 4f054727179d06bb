"""The second pass of a linear layer whose columns were cut into parts: the parts' sum.

This file needs only torch and triton.
"""

import triton
import triton.language as tl


@triton.jit
def quantized_linear_reduce(
    workspace_ptr,
    bias_ptr,
    out_ptr,
    elements,
    out_features,
    splits,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = workspace[0] + workspace[1] + ... + bias, always in this order. Grid: (ceil(MN/BLOCK),).

    The fixed order makes the result bitwise repeatable, which atomic addition does not.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        total += tl.load(workspace_ptr + at, mask=inside, other=0.0)
        workspace_ptr += elements
    if BIAS:
        total += tl.load(bias_ptr + at % out_features, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)
