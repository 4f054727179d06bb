"""The operations on a GPU agree with float64; elsewhere they refuse and keep their shapes."""

import pytest
import torch

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.triton import (
    attention_training,
    ops,  # noqa: F401 - registers the operations
)
from ridgeline.ir import attention as attention_law
from ridgeline.ir import quantized_linear as linear_law

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
# Relative Frobenius errors: the rounding of the output and, in attention, of the probabilities.
BARS = {torch.float16: 6e-4, torch.bfloat16: 4e-3, torch.float32: 2e-6}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("rows", [1, 5, 129, 700])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention(dtype: torch.dtype, rows: int, masked: bool, with_sinks: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    query = normal(2, rows, 8, 64).transpose(1, 2)
    key, value = normal(2, 2, 777, 64), normal(2, 2, 777, 64)
    mask = normal(2, 1, rows, 777) if masked else None
    sinks = normal(8) if with_sinks else None
    options = {"scale": 0.125, "diagonal": 777 - rows}
    found = torch.ops.ridgeline.triton_attention(query, key, value, mask, sinks, **options)
    wide = [None if t is None else t.double() for t in (query, key, value, mask, sinks)]
    assert relative(found, attention_law.reference(*wide, **options)) < BARS[dtype]
    again = torch.ops.ridgeline.triton_attention(query, key, value, mask, sinks, **options)
    assert torch.equal(found, again)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("rows", [5, 700])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_backward(dtype: torch.dtype, rows: int, masked: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    operands = normal(2, 8, rows, 64), normal(2, 2, 777, 64), normal(2, 2, 777, 64)
    mask = normal(2, 1, rows, 777) if masked else None
    sinks, grad = normal(8), normal(2, 8, rows, 64)
    options = {"scale": 0.125, "diagonal": 777 - rows}

    def gradients(attention, wide: bool) -> list[torch.Tensor]:
        leaves = [x.double() if wide else x.clone() for x in (*operands, sinks)]
        leaves = [x.requires_grad_() for x in leaves]
        extra = mask.double() if wide and mask is not None else mask
        out = attention(*leaves[:3], extra, leaves[3], **options)
        out.backward(grad.to(out.dtype))
        return [x.grad for x in leaves]

    saved = attention_training.OP
    found, again = (gradients(lambda *x, **o: saved(*x, **o)[0], False) for _ in range(2))
    expected = gradients(attention_law.reference, True)
    for own, repeated, exact in zip(found, again, expected, strict=True):
        assert torch.equal(own, repeated)
        assert relative(own, exact) < 3 * BARS[dtype]


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("tokens", [1, 3, 17, 64, 65, 300])
@pytest.mark.parametrize("scheme", ["symmetric", "zero_point", "minimum"])
@pytest.mark.parametrize(("bits", "group", "k"), [(4, 128, 576), (4, 32, 1000), (8, 64, 1024)])
def test_quantized_linear(dtype, tokens: int, scheme: str, bits: int, group: int, k: int) -> None:
    from ridgeline.codegen.triton.quantized_linear import pack

    torch.manual_seed(0)
    n, groups = 272, -(-k // group)
    packed = linear_law.pack_codes(torch.randint(0, 2**bits, (n, k), dtype=torch.uint8), bits)
    scale, bias = torch.rand(n, groups).to(dtype), torch.randn(n).to(dtype)
    offset = None
    if scheme == "zero_point":
        offset = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8)
    elif scheme == "minimum":
        offset = (-(2 ** (bits - 1)) * torch.rand(n, groups)).to(dtype)
    x = torch.randn(tokens, k).to(dtype)
    weight = linear_law.dequantize(
        packed, scale, offset, bits=bits, group_size=group, in_features=k
    )
    expected = x.double() @ weight.double().T + bias.double()
    words = pack(packed, bits=bits, group_size=group, in_features=k)
    tensors = [None if t is None else t.cuda() for t in (x, words, scale, offset, bias)]
    found = torch.ops.ridgeline.triton_quantized_linear(*tensors, bits=bits, group_size=group)
    assert relative(found.cpu(), expected) < BARS[dtype]
    again = torch.ops.ridgeline.triton_quantized_linear(*tensors, bits=bits, group_size=group)
    assert torch.equal(found, again)


def test_other_devices_are_refused() -> None:
    x = torch.zeros(1, 1, 4, 16)
    with pytest.raises(UnsupportedProblem, match=r"CUDA or ROCm tensors, found cpu"):
        torch.ops.ridgeline.triton_attention(x, x, x, scale=1.0)


def test_shapes_without_a_device() -> None:
    query = torch.empty(2, 8, 5, 64, device="meta", dtype=torch.float16)
    value = torch.empty(2, 2, 9, 32, device="meta", dtype=torch.float16)
    out = torch.ops.ridgeline.triton_attention(query, query[:, :2], value, scale=1.0)
    assert (out.shape, out.dtype) == ((2, 8, 5, 32), torch.float16)
    packed = torch.empty(12, 8, device="meta", dtype=torch.int32)
    y = torch.ops.ridgeline.triton_quantized_linear(query, packed, query, bits=4, group_size=64)
    assert y.shape == (2, 8, 5, 12)
