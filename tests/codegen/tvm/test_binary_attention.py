"""The CPU kernel of attention over binary codes against float64."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("tvm", reason="the CPU kernels need tvm")

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.tvm import binary_attention
from ridgeline.codegen.tvm.isa import best_isa
from ridgeline.ir.binary_attention import BinaryAttentionError
from ridgeline.ir.binary_attention import reference as law

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
SIZES = [(2, 3, 5, 7, 16, 16), (1, 2, 1, 1, 1, 3), (2, 2, 9, 33, 40, 136)]
CASES = [*((sizes, torch.float32) for sizes in SIZES), *((SIZES[2], d) for d in list(ROUNDING)[1:])]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def operands(sizes, dtype=torch.float32) -> list[Tensor]:
    B, H, M, N, D, E = sizes
    # as a packed projection leaves them: heads beside each other, gaps between
    q, k, v = (
        torch.randn(B, n, H, 2 * d).to(dtype)[..., :d].transpose(1, 2)
        for n, d in ((M, D), (N, D), (N, E))
    )
    return [q, k, v, 0.3 * torch.randn(H, D), 0.3 * torch.randn(H, D)]


def close(got: Tensor, given: list[Tensor]) -> None:
    expected = law(*(x.double() for x in given[:3]), *given[3:])
    error = (got.double() - expected).norm() / expected.norm()
    assert error <= ROUNDING[got.dtype]


@pytest.mark.parametrize("isa", ["generic", best_isa()])
@pytest.mark.parametrize(("sizes", "dtype"), CASES, ids=str)
def test_against_float64(sizes, dtype, isa, monkeypatch):
    monkeypatch.setenv("RIDGELINE_ISA", isa)
    given = operands(sizes, dtype)
    got = binary_attention.binary_attention(*given)
    assert got.transpose(1, 2).is_contiguous()
    close(got, given)


def test_other_strides_and_mixed_dtypes():
    q, k, v, tq, tk = operands(SIZES[2])
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    close(binary_attention.binary_attention(*turned, tq, tk), [q, k, v, tq, tk])
    mixed = [q, k.bfloat16(), v.half(), tq.double(), tk]
    close(binary_attention.binary_attention(*mixed), mixed)


def test_extremes():
    q, k, v, tq, tk = operands(SIZES[0])
    q[0, 0, 0], k[0, 0, 0, 0], k[0, 0, 1, 0] = torch.nan, torch.inf, -torch.inf
    q[1, 1], tq[2] = tq[1], torch.inf  # equal is not above
    tk[0, :2] = torch.tensor([-torch.inf, torch.nan])
    close(binary_attention.binary_attention(q, k, v, tq, tk), [q, k, v, tq, tk])


def test_refusals_and_nothing():
    q, k, v, tq, tk = operands(SIZES[0])
    assert binary_attention.binary_attention(q[:, :, :0], k, v, tq, tk).shape == (2, 3, 0, 16)
    with pytest.raises(BinaryAttentionError, match="N >= 1"):
        binary_attention.binary_attention(q, k[:, :, :0], v[:, :, :0], tq, tk)
    with pytest.raises(UnsupportedProblem, match="float64"):
        binary_attention.binary_attention(q.double(), k.double(), v, tq, tk)


def test_results_do_not_depend_on_threads():
    given = operands((3, 4, 60, 60, 32, 32))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(binary_attention.binary_attention(*given))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_inside_a_compiled_graph():
    binary_attention.register_lowering()
    thresholds = 0.3 * torch.randn(2, 4, 8)

    def model(x):
        q, k, v = (x * 2).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y = torch.ops.ridgeline.tvm_binary_attention(q, k, v, *thresholds)
        return y.transpose(1, 2).flatten(2) + 1

    compiled = torch.compile(model, dynamic=True, fullgraph=True)
    with torch.inference_mode():
        for length in (5, 6):
            x = torch.randn(2, length, 96)
            torch.testing.assert_close(compiled(x), model(x))
