"""The CPU kernels of gated activation and rotary embedding against float64."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("tvm", reason="the CPU kernels need tvm")

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.tvm import gated, rotary
from ridgeline.ir.gated import ACTIVATIONS
from ridgeline.ir.gated import reference as gated_law
from ridgeline.ir.rotary import reference as rotary_law

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def close(got: Tensor, expected: Tensor) -> None:
    error = (got.double() - expected).norm() / expected.norm()
    assert error <= ROUNDING[got.dtype]


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gated_reads_halves_of_a_packed_tensor(activation, dtype):
    torch.manual_seed(0)
    for shape in ((2, 3, 2 * 77), (5, 2 * 16), (2, 2, 3, 2 * 5)):
        gate, up = (3 * torch.randn(shape)).to(dtype).chunk(2, -1)
        got = gated.gated_activation(gate, up, activation=activation)
        assert got.is_contiguous()
        close(got, gated_law(gate.double(), up.double(), activation=activation))


@pytest.mark.parametrize("isa", ["generic", None])
def test_gated_extremes(isa):
    x = torch.tensor([[[-torch.inf, torch.inf, torch.nan, -1e4, 1e4, 88.0, -88.0, 0.0] * 3]])
    for activation in ("silu", "sigmoid", "relu"):
        got = torch.empty_like(x)
        gated.kernel(activation, torch.float32, False, isa)(x, torch.ones_like(x), got)
        expected = gated_law(x, torch.ones_like(x), activation=activation)
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-5, atol=1e-30)


def test_gated_other_strides_and_nothing():
    gate, up = torch.randn(4, 9, 6).transpose(1, 2), torch.randn(4, 6, 9)
    got = gated.gated_activation(gate, up, activation="silu")
    close(got, gated_law(gate.double(), up.double(), activation="silu"))
    assert gated.gated_activation(gate[:0], up[:0], activation="silu").shape == (0, 6, 9)
    column = torch.randn(1, 4, 5).permute(1, 2, 0)  # contiguous to torch, its last stride 20
    for given in (column, torch.ones(()).expand(1, 1), torch.randn(5)[::5]):
        got = gated.gated_activation(given, given, activation="silu")
        close(got, gated_law(given.double(), given.double(), activation="silu"))
    with pytest.raises(UnsupportedProblem, match="one shape"):
        gated.gated_activation(gate, up[:, :3], activation="silu")
    with pytest.raises(UnsupportedProblem, match="activation"):
        gated.gated_activation(gate, up, activation="swish")


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "size"), [(64, 64), (80, 36), (16, 6)])
def test_rotary(dim, size, interleaved, dtype):
    torch.manual_seed(0)
    q = torch.randn(2, 7, 5, dim).to(dtype).transpose(1, 2)
    k = torch.randn(2, 3, 7, dim).to(dtype)
    # halves differ, and q keeps the values that it is given
    for batch, angle in ((1, torch.float32), (2, dtype)):
        cos, sin = (torch.randn(batch, 7, size).to(angle) for _ in range(2))
        packed = rotary.rotary(q, k, cos, sin, interleaved=interleaved)
        wide = (x.double() for x in (q, k, cos, sin))
        expected = rotary_law(*wide, interleaved=interleaved)
        for got, right in zip(packed.transpose(1, 2).split((5, 3), 1), expected, strict=True):
            close(got, right)
            assert torch.equal(got[..., size:].double(), right[..., size:])


def test_rotary_of_a_query_alone_with_other_strides():
    q = torch.randn(1, 4, 8, 3).transpose(2, 3)
    cos, sin = torch.randn(2, 1, 3, 8)
    got = rotary.rotary(q, q[:, :0], cos, sin.double().float(), interleaved=False)
    expected, _ = rotary_law(q.double(), q[:, :0].double(), cos.double(), sin.double(),
                             interleaved=False)  # fmt: skip
    close(got.transpose(1, 2), expected)
    with pytest.raises(UnsupportedProblem):
        rotary.rotary(q, q[:, :0], cos[..., :5], sin[..., :5], interleaved=False)


def test_results_do_not_depend_on_threads():
    gate, up = torch.randn(2, 40, 2, 1030).unbind(2)
    q, angles = torch.randn(1, 9, 300, 64), torch.randn(2, 1, 300, 64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = gated.gated_activation(gate, up, activation="gelu")
            found.append((y, rotary.rotary(q, q[:, :3], *angles, interleaved=True)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_inside_a_compiled_graph():
    gated.register_lowering()
    rotary.register_lowering()

    def model(x, cos, sin):
        y = torch.ops.ridgeline.tvm_gated_activation(*(x * 2).chunk(2, -1), activation="silu")
        q = y.unflatten(-1, (4, 8)).transpose(1, 2)
        return torch.ops.ridgeline.tvm_rotary(q, q[:, :2], cos, sin, interleaved=False) + 1

    compiled = torch.compile(model, dynamic=True, fullgraph=True)
    with torch.inference_mode():
        for length in (5, 6):
            inputs = torch.randn(2, length, 64), *torch.randn(2, 1, length, 8)
            torch.testing.assert_close(compiled(*inputs), model(*inputs))
