"""Runs the linear layer with a rational function in Triton's interpreter; prints {case: error}.

A script, started by test_linear_rational.py in a process of its own: the interpreter is chosen by
an environment variable that Triton reads when a kernel is defined.
"""

import json
import sys

import torch
from interpreted_group_rational import relative

from ridgeline.codegen.triton.linear_rational import linear_rational
from ridgeline.ir.group_rational import FORMS
from ridgeline.ir.linear_rational import SIDES, reference

HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16
# tokens, N, K, (rows of a, of b), m, n, dtype, bias
CASES = {
    "ragged": (37, 42, 66, (6, 6), 5, 4, SINGLE, True),
    "groups-of-whole-tiles": (33, 96, 96, (3, 3), 5, 4, HALF, True),
    "shared-numerator": (17, 40, 24, (1, 4), 3, 2, SINGLE, False),
    "shared-denominator": (20, 24, 40, (2, 1), 2, 3, BRAIN, True),
    "one-row-of-both": (1, 17, 19, (1, 1), 0, 1, SINGLE, True),
    "many-rows-of-tiles": (300, 32, 16, (2, 2), 1, 1, SINGLE, False),
}


def errors() -> dict[str, float]:
    found = {}
    for name, (tokens, n, k, groups, m, degree, dtype, with_bias) in CASES.items():
        for form in FORMS:
            for side in SIDES:
                x, weight = (
                    torch.randn(3, tokens, 2 * k)[0, :, ::2],
                    torch.randn(k, n).t() * k**-0.5,
                )
                bias = torch.randn(n) if with_bias else None
                if form == "abs_coefficients":  # which has a pole where its argument is below 0
                    x, weight = x.abs(), weight.abs()
                    bias = None if bias is None else bias.abs()
                x, weight = x.to(dtype), weight.to(dtype)
                x[0, :2], x[-1] = 0, 100 * x[-1]
                a, b = torch.randn(groups[0], m + 1), 0.3 * torch.rand(groups[1], degree)
                tiles = {"block_m": 16, "block_n": 32, "block_k": 16, "num_warps": 4}
                given = (x, weight, bias, a, b)
                options = {"form": form, "side": side}
                y = linear_rational(*given, **options, group=4, num_stages=1, **tiles)
                # Rounded where the law rounds: to x's dtype, in front of the products.
                wide = reference(*(None if t is None else t.double() for t in given), **options)
                if side == "input" and dtype != SINGLE:
                    wide = reference(x.float(), weight.float(), bias, a, b, **options).double()
                found[f"{name}-{form}-{side}"] = relative(y, wide)
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    json.dump(errors(), sys.stdout)
