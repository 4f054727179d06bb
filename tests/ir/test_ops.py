"""The operations as torch sees them: schemas, fakes, gradients and laws of every `ridgeline::` op.

What the norms compute and their gradients are in test_norms.py.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline import ir
from ridgeline.ir.attention import ATTENTION
from ridgeline.ir.binary_attention import BINARY_ATTENTION
from ridgeline.ir.gated import GATED_ACTIVATION
from ridgeline.ir.group_rational import GROUP_RATIONAL, GROUP_RATIONAL_BACKWARD
from ridgeline.ir.layer_norm import ADD_LAYER_NORM, LAYER_NORM
from ridgeline.ir.linear_rational import LINEAR_RATIONAL
from ridgeline.ir.norm_rational import LAYER_NORM_RATIONAL
from ridgeline.ir.op import Op
from ridgeline.ir.quantized_linear import MANY_ROWS, QUANTIZED_LINEAR, pack_codes, unpack_codes
from ridgeline.ir.rms_norm import ADD_RMS_NORM, RMS_NORM
from ridgeline.ir.rotary import ROTARY
from ridgeline.ir.token_rows import SUM_PARTS, TOKEN_ROWS

ops = torch.ops.ridgeline


def _drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _grad(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return _drawn(*shape, seed=seed, dtype=dtype).requires_grad_()


def _codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


QUANTIZED = pack_codes(_codes(5, 9, 4), 4), _drawn(5, 3, seed=1).abs()
FOUR_BIT = {"bits": 4, "group_size": 4}
CALLS: dict[str, tuple[Op, tuple[Any, ...], dict[str, Any]]] = {
    "attention": (
        ATTENTION,
        (_grad(2, 4, 3, 5), _grad(2, 2, 6, 5, seed=1), _grad(2, 2, 6, 7, seed=2)),
        {"scale": 0.4, "diagonal": 3},
    ),
    "attention with a mask": (
        ATTENTION,
        (*(_grad(1, 2, 3, 4, seed=i, dtype=torch.float32) for i in range(3)), _drawn(1, 1, 3, 3)),
        {"scale": 0.5},
    ),
    "attention with a boolean mask": (
        ATTENTION,
        (*(_grad(1, 2, 3, 4, seed=i) for i in range(3)), _drawn(3, 3) > 0),
        {"scale": 0.5},
    ),
    "attention on strided views": (
        ATTENTION,
        tuple(_drawn(2, 3, 4, 5, seed=i).mT.requires_grad_() for i in range(3)),
        {"scale": 0.5, "diagonal": 0},
    ),
    "attention with sinks": (
        ATTENTION,
        (*(_grad(1, 2, 3, 4, seed=i) for i in range(3)), None, _grad(2, seed=3)),
        {"scale": 0.5},
    ),
    "attention in bfloat16": (
        ATTENTION,
        tuple(_grad(1, 2, 3, 4, seed=i, dtype=torch.bfloat16) for i in range(3)),
        {"scale": 0.5},
    ),
    "layer_norm_rational": (
        LAYER_NORM_RATIONAL,
        (_drawn(2, 3, 8), _drawn(8, seed=1), None, _drawn(2, 4, seed=2), _drawn(1, 2, seed=3)),
        {"eps": 1e-5},
    ),
    "layer_norm_rational in bfloat16": (
        LAYER_NORM_RATIONAL,
        (
            _drawn(2, 3, 32, dtype=torch.bfloat16),
            *(None, _drawn(32, seed=1, dtype=torch.float32)),
            *(_drawn(n, 3, seed=n, dtype=torch.float32) for n in (1, 2)),
        ),
        {"eps": 1e-5, "form": "abs_sum"},
    ),
    "linear_rational": (
        LINEAR_RATIONAL,
        (
            *(_drawn(2, 3, 5), _drawn(8, 5, seed=1), _drawn(8, seed=2)),
            *(_drawn(2, 4, seed=3), _drawn(1, 2, seed=4)),
        ),
        {},
    ),
    "linear_rational of its input in bfloat16": (
        LINEAR_RATIONAL,
        (
            *(_drawn(n, 6, seed=n, dtype=torch.bfloat16) for n in (3, 4)),
            None,
            *(_drawn(n, 3, seed=n, dtype=torch.float32) for n in (1, 2)),
        ),
        {"form": "abs_sum", "side": "input"},
    ),
    "quantized_linear": (
        QUANTIZED_LINEAR,
        (_grad(2, 3, 9, dtype=torch.float32), *QUANTIZED, None, _grad(5, dtype=torch.float32)),
        FOUR_BIT,
    ),
    "quantized_linear with zero points": (
        QUANTIZED_LINEAR,
        (_grad(1, 9, dtype=torch.bfloat16), *QUANTIZED, _codes(5, 3, 4, seed=2)),
        FOUR_BIT | {"multiply": torch.bfloat16},
    ),
    "quantized_linear with minima": (
        QUANTIZED_LINEAR,
        (_drawn(9), *QUANTIZED, _drawn(5, 3, seed=3)),
        FOUR_BIT,
    ),
    "rms_norm": (RMS_NORM, (_grad(2, 3, 5), _grad(5, seed=1)), {"eps": 1e-3, "shift": 1.0}),
    "rms_norm without a weight": (RMS_NORM, (_grad(2, 3, 5),), {"eps": 1e-3}),
    "add_rms_norm": (
        ADD_RMS_NORM,
        (_grad(2, 3, 5), _grad(2, 3, 5, seed=1), _grad(5, seed=2)),
        {"eps": 1e-3},
    ),
    "layer_norm": (LAYER_NORM, (_grad(2, 3, 5), _grad(5, seed=1), _grad(5, seed=2)), {"eps": 1e-3}),
    "layer_norm on a view": (
        LAYER_NORM,
        (_drawn(5, 3).t().requires_grad_(), None, None),
        {"eps": 1e-3},
    ),
    "add_layer_norm": (
        ADD_LAYER_NORM,
        (*(_grad(2, 5, seed=i) for i in range(2)), *(_grad(5, seed=i) for i in range(2, 4))),
        {"eps": 1e-3},
    ),
    "gated_activation": (
        GATED_ACTIVATION,
        (_grad(2, 3, 5), _grad(2, 3, 5, seed=1)),
        {"activation": "silu"},
    ),
    "rotary": (
        ROTARY,
        (
            _grad(2, 3, 4, 6),
            _grad(2, 1, 4, 6, seed=1),
            _grad(1, 4, 6, seed=2),
            _grad(1, 4, 6, seed=3),
        ),
        {"interleaved": False},
    ),
    "group_rational": (
        GROUP_RATIONAL,
        (_grad(3, 6), _grad(2, 4, seed=1), _grad(1, 3, seed=2)),
        {"form": "abs_sum", "sign0": 1},
    ),
    "binary_attention": (
        BINARY_ATTENTION,
        (
            *(_grad(2, 2, 5, 8), _grad(2, 2, 7, 8, seed=1), _grad(2, 2, 7, 4, seed=2)),
            *(torch.zeros(2, 8), torch.full((2, 8), 0.1)),
        ),
        {},
    ),
    "group_rational_backward": (
        GROUP_RATIONAL_BACKWARD,
        (_grad(3, 6, seed=3), _grad(3, 6), _grad(2, 4, seed=1), _grad(2, 3, seed=2)),
        {},
    ),
    "token_rows": (TOKEN_ROWS, (_drawn(6, 4), 2, 9), {}),
    "sum_parts": (SUM_PARTS, (_drawn(6, 4, dtype=torch.bfloat16), 3), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_torch_accepts_the_op(name):
    """Schema, autograd registration, fakes, and AOTAutograd with static and with free sizes."""
    op, args, kwargs = CALLS[name]
    torch.library.opcheck(op.overload, args, kwargs)


def test_every_op_is_checked():
    modules = [import_module(f"ridgeline.ir.{m.name}") for m in iter_modules(ir.__path__)]
    ours = {v.name for module in modules for v in vars(module).values() if isinstance(v, Op)}
    assert ours == {op.name for op, _, _ in CALLS.values()}


# -- attention -------------------------------------------------------------------------------------


def _attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> Tensor:
    """The law row by row, with the excluded keys left out instead of masked."""
    out = q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        j = keep[i].nonzero().flatten()
        if len(j):
            p = torch.softmax(scale * k[b, h // group, j].double() @ q[b, h, i].double(), 0)
            out[b, h, i] = p @ v[b, h // group, j].double()
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("diagonal", [None, 0, 2, -2, -9, 9])
def test_attention_is_its_law(dtype, diagonal):
    q, k, v = (
        _drawn(2, 4, 5, 7, dtype=dtype) * 3,
        _drawn(2, 2, 6, 7, seed=1, dtype=dtype),
        _drawn(2, 2, 6, 3, seed=2, dtype=dtype),
    )
    keep = torch.ones(5, 6, dtype=torch.bool)
    keep = keep if diagonal is None else keep.tril(diagonal)
    expected = _attention(q, k, v, keep, 0.3)
    got = ops.attention(q, k, v, scale=0.3, diagonal=diagonal)
    assert got.dtype == dtype
    unit = torch.finfo(dtype).eps if dtype.itemsize < 4 else torch.finfo(dtype).eps * 8
    torch.testing.assert_close(got.double(), expected, rtol=unit, atol=unit)
    masked = ops.attention(q, k, v, keep, scale=0.3)
    torch.testing.assert_close(masked.double(), expected, rtol=unit, atol=unit)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (1, 6), (1, 1, 5, 6), (2, 4, 5, 6), (2, 1, 1, 6)])
def test_attention_broadcasts_its_mask(shape):
    q, k, v = _drawn(2, 4, 5, 8), _drawn(2, 4, 6, 8, seed=1), _drawn(2, 4, 6, 8, seed=2)
    mask = _drawn(*shape, seed=3)
    expected = F.scaled_dot_product_attention(q, k, v, mask.expand(2, 4, 5, 6), scale=0.3)
    torch.testing.assert_close(ops.attention(q, k, v, mask, scale=0.3), expected)


def test_attention_of_large_scores_is_finite():
    q = torch.full((1, 1, 2, 4), 1e4)
    k = torch.stack((torch.full((4,), 1e4), torch.full((4,), -1e4)))[None, None]
    v = torch.tensor([[1.0], [2.0]])[None, None]
    assert torch.equal(ops.attention(q, k, v, scale=1.0), torch.ones(1, 1, 2, 1))


@pytest.mark.parametrize(("queries", "keys", "batch"), [(0, 3, 1), (3, 0, 1), (2, 3, 0)])
def test_attention_of_nothing(queries, keys, batch):
    q, k, v = _drawn(batch, 2, queries, 4), _drawn(batch, 2, keys, 4), _drawn(batch, 2, keys, 4)
    assert torch.equal(ops.attention(q, k, v, scale=1.0), torch.zeros(batch, 2, queries, 4))


def test_a_sink_is_a_key_without_a_value():
    q, k, v = _drawn(1, 4, 3, 2), _drawn(1, 2, 4, 2, seed=1), _drawn(1, 2, 4, 3, seed=2)
    sinks, keep = torch.tensor([0.5, -torch.inf, 3.0, -40.0]), _drawn(3, 4, seed=3) > 0
    keep[1] = False
    out = ops.attention(q, k, v, keep, sinks.double(), scale=0.7)
    wider = [torch.cat((x, x.new_zeros(1, 2, 1, x.shape[3])), 2) for x in (k, v)]
    column = sinks.double()[None, :, None, None].expand(1, 4, 3, 1)
    scores = torch.zeros(3, 4).masked_fill(~keep, -torch.inf).expand(1, 4, 3, 4)
    bias = torch.cat((scores.double(), column), -1)
    torch.testing.assert_close(out, ops.attention(q, *wider, bias, scale=0.7))


@pytest.mark.parametrize("mask", ["none", "boolean", "floating", "broadcast"])
@pytest.mark.parametrize("diagonal", [None, 0, -1])
@pytest.mark.parametrize(("with_sinks", "soft_cap"), [(False, None), (True, None), (True, 0.8)])
def test_gradients_of_attention(mask, diagonal, with_sinks, soft_cap):
    # With diagonal -1 the first row has no key: its gradient is 0, not NaN.
    q, k, v = _grad(1, 4, 3, 2), _grad(1, 2, 4, 2, seed=1), _grad(1, 2, 4, 3, seed=2)
    given = {
        "none": None,
        "boolean": _drawn(3, 4, seed=3) > -0.5,
        "floating": _grad(1, 4, 3, 4, seed=3),
        "broadcast": _grad(1, 1, 1, 4, seed=3),
    }[mask]
    sinks = _grad(4, seed=4) if with_sinks else None
    assert torch.autograd.gradcheck(
        lambda *a: ops.attention(*a, scale=0.7, diagonal=diagonal, soft_cap=soft_cap),
        (q, k, v, given, sinks),
    )


# -- quantised linear ------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 2, 7, 8])
@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_undone(bits, columns):
    codes = _codes(3, columns, bits)
    packed = pack_codes(codes, bits)
    assert packed.shape == (3, -(-columns * bits // 8))
    assert torch.equal(unpack_codes(packed, bits, columns), codes)


def _weight(codes: Tensor, scale: Tensor, offset: Tensor | None, group: int, bits: int) -> Tensor:
    """ŵ of the law, entry by entry, in float64."""
    weight = torch.empty(codes.shape, dtype=torch.float64)
    for n, k in torch.cartesian_prod(*map(torch.arange, codes.shape)).tolist():
        s, code, g = scale[n, k // group].item(), codes[n, k].item(), k // group
        if offset is None:
            weight[n, k] = s * (code - 2 ** (bits - 1))
        elif offset.is_floating_point():
            weight[n, k] = s * code + offset[n, g].item()
        else:
            weight[n, k] = s * (code - offset[n, g].item())
    return weight


@pytest.mark.parametrize("scheme", ["symmetric", "zero_point", "minimum"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("features", "group"), [(8, 4), (9, 4), (3, 32), (7, 1)])
def test_quantized_linear_is_its_law(features, group, bits, scheme):
    groups = -(-features // group)
    codes, scale = _codes(5, features, bits), _drawn(5, groups, seed=1)
    offset = {
        "symmetric": None,
        "zero_point": _codes(5, groups, bits, seed=2),
        "minimum": _drawn(5, groups, seed=2),
    }[scheme]
    x, bias = _drawn(2, 3, features, seed=3), _drawn(5, seed=4)
    weight = _weight(codes, scale, offset, group, bits)
    exact = x.double() @ weight.T + bias.double()
    got = ops.quantized_linear(
        x, pack_codes(codes, bits), scale, offset, bias, bits=bits, group_size=group
    )
    # Rounding in fp32 is relative to the terms of the sum, which may cancel.
    terms = x.abs().double() @ weight.abs().T + bias.abs().double()
    assert got.dtype == torch.float32
    assert ((got - exact).abs() <= 4 * features * torch.finfo(torch.float32).eps * terms).all()


@pytest.mark.parametrize("rows", [1, MANY_ROWS - 1, MANY_ROWS])
def test_products_are_formed_in_the_dtype_asked_for(rows):
    codes, scale = _codes(5, 8, 4), _drawn(5, 2, seed=1)
    x = _drawn(rows, 8, seed=2)
    got = ops.quantized_linear(
        x, pack_codes(codes, 4), scale, bits=4, group_size=4, multiply=torch.bfloat16
    )
    weight = _weight(codes, scale, None, 4, 4).float()
    if rows >= MANY_ROWS:
        weight = weight.bfloat16().float()
    torch.testing.assert_close(got, x.bfloat16().float() @ weight.T)
    assert got.dtype == torch.float32


@pytest.mark.parametrize("offset", [None, "zero_point", "minimum"])
def test_gradients_of_the_quantized_linear_are_those_of_a_linear(offset):
    codes, scale = _codes(5, 9, 4), _drawn(5, 3, seed=1)
    given = {None: None, "zero_point": _codes(5, 3, 4), "minimum": _drawn(5, 3, seed=2)}[offset]
    weight = _weight(codes, scale, given, 4, 4).float()
    x, bias = _drawn(2, 3, 9, seed=3).requires_grad_(), _drawn(5, seed=4).requires_grad_()
    out = ops.quantized_linear(x, pack_codes(codes, 4), scale, given, bias, bits=4, group_size=4)
    seed = _drawn(*out.shape, seed=5)
    ours = torch.autograd.grad(out, (x, bias), seed)
    theirs = torch.autograd.grad(F.linear(x, weight, bias), (x, bias), seed)
    torch.testing.assert_close(ours, theirs)
