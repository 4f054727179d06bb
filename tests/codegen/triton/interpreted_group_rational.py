"""Runs the rational function's kernels in Triton's interpreter; prints {case: error} as JSON.

A script, started by test_group_rational.py in a process of its own: the interpreter is chosen by an
environment variable that Triton reads when a kernel is defined.
"""

import json
import sys

import torch
from torch import Tensor

from ridgeline.codegen.triton import group_rational as kernels
from ridgeline.codegen.triton.norm import norm
from ridgeline.ir.group_rational import FORMS, backward_reference, reference
from ridgeline.ir.norm_rational import reference as norm_law

HALF, SINGLE = torch.float16, torch.float32
# rows, C, (rows of a, of b), m, n, dtype, sign0
CASES = {
    "ragged-rows": (37, 24, (2, 2), 5, 4, SINGLE, 1),
    "shared-numerator": (70, 24, (1, 2), 5, 4, HALF, 0),
    "shared-denominator": (19, 36, (3, 1), 3, 2, SINGLE, 1),
    "constant-numerator": (30, 20, (4, 4), 0, 3, SINGLE, 0),
    "odd-width": (30, 17, (1, 1), 6, 1, SINGLE, 1),
    "one-row": (1, 16, (2, 2), 5, 4, SINGLE, 1),
}


def relative(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return float("inf")
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def errors() -> dict[str, float]:
    found = {}
    for name, (rows, channels, groups, m, n, dtype, sign0) in CASES.items():
        for form in FORMS:
            grad, x = torch.randn(2, rows, 2 * channels).to(dtype)[..., ::2]
            x, grad = x[:, :channels], grad[:, :channels]
            if form == "abs_coefficients":  # which has a pole where x < 0
                x = x.abs()
            x[0, :3] = 0
            a, b = torch.randn(groups[0], m + 1), 0.3 * torch.rand(groups[1], n)
            b[0, 0] = 0
            tiles = {"block_m": 4, "block_c": 8, "num_warps": 4, "num_stages": 1}
            wide = [t.double() for t in (grad, x, a, b)]
            y = kernels.group_rational(x, a, b, form=form, **tiles)
            grads = kernels.group_rational_backward(grad, x, a, b, form=form, sign0=sign0, **tiles)
            law = backward_reference(*wide, form=form, sign0=sign0)
            found[f"{name}-{form}-y"] = relative(y, reference(*wide[1:], form=form))
            for what, own, expected in zip(("dx", "da", "db"), grads, law, strict=True):
                found[f"{name}-{form}-{what}"] = relative(own, expected)
    return found


# rows, C, (rows of a, of b), m, n, dtype
NORMS = {
    "groups": (5, 48, (4, 4), 5, 4, SINGLE),
    "shared-numerator": (3, 40, (1, 8), 3, 2, HALF),
    "one-row-of-both": (2, 17, (1, 1), 0, 1, SINGLE),
}


def norm_errors() -> dict[str, float]:
    found = {}
    for name, (rows, channels, groups, m, n, dtype) in NORMS.items():
        for form in FORMS:
            x, weight = torch.randn(rows, channels).to(dtype), torch.randn(channels)
            bias = torch.randn(channels).to(dtype)
            if form == "abs_coefficients":  # which has a pole where the argument is below 0
                weight, bias = 0.1 * weight, bias.abs() + 1
            a, b = torch.randn(groups[0], m + 1), 0.3 * torch.rand(groups[1], n)
            tiles = {"block_m": 2, "block_n": 64, "num_warps": 4, "num_stages": 1}
            y, _ = norm(x, None, weight, bias, a, b, eps=1e-5, center=True, form=form, **tiles)
            wide = [t.double() for t in (x, weight, bias, a, b)]
            found[f"norm-{name}-{form}"] = relative(y, norm_law(*wide, eps=1e-5, form=form))
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    json.dump(errors() | norm_errors(), sys.stdout)
