"""Vector operations in LLVM IR, one at a time, beside torch's."""

import pytest
import torch

from ridgeline.codegen.tvm.isa import ISAS, best_isa
from ridgeline.codegen.tvm.llvm_helpers import llvm_helpers
from ridgeline.codegen.tvm.runtime import compile_kernel

T = pytest.importorskip("tvm.script").tirx

SPECIAL = (0.0, -0.0, 1e-45, 1e-40, 3.3e38, 3.4e38, torch.inf, torch.nan)


def _kernel(isa: str):
    @T.prim_func
    def narrow(x_handle: T.handle, y_handle: T.handle):
        T.func_attr({"global_symbol": "narrow", "tirx.noalias": True})
        x = T.match_buffer(x_handle, (4096,), "float32", align=1)
        y = T.match_buffer(y_handle, (4096,), "int16", align=1)
        with T.attr(0, "pragma_import_llvm", llvm_helpers(isa)):
            for i in T.serial(4096 // 16):
                y[T.ramp(i * 16, 1, 16)] = T.call_extern(
                    "int16x16", "rl_cvtbf16", x[T.ramp(i * 16, 1, 16)]
                )

    return narrow


@pytest.mark.parametrize("isa", ISAS[: ISAS.index(best_isa()) + 1])
def test_bf16_is_rounded_as_torch_rounds_it(isa):
    whole = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0))
    whole[:2048] &= ~0x7FFF  # ties, to even
    x = whole.to(torch.int32).view(torch.float32)
    x[-2 * len(SPECIAL) :] = torch.tensor([*SPECIAL, *(-v for v in SPECIAL)])
    if isa == "avx512_bf16":  # whose instruction takes subnormal numbers for zeros
        x[x.abs() < torch.finfo().tiny] = 0.0
    y = torch.empty(4096, dtype=torch.int16)
    compile_kernel(_kernel(isa), isa)(x, y)
    got, expected = y.view(torch.bfloat16), x.to(torch.bfloat16)
    assert (got.isnan() == expected.isnan()).all()
    assert torch.equal(got[~got.isnan()], expected[~got.isnan()])


@pytest.mark.parametrize("isa", ISAS[:-1])
def test_lesser_processors_are_given_no_conversion_that_llvm_makes_a_call_of(isa):
    lines = llvm_helpers(isa).splitlines()
    assert not [line for line in lines if "fptrunc" in line and "bfloat" in line]
