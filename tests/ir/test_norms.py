"""The norm operations: torch's own functions in float64, and gradients by formula."""

import pytest
import torch
import torch.nn.functional as F

import ridgeline.ir.layer_norm
import ridgeline.ir.rms_norm  # noqa: F401 - registers the operations

ops = torch.ops.ridgeline


def tensors(*shapes, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return [x.requires_grad_(grad) for x in drawn]


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 1, 3, 5), (0, 5)], ids=str)
def test_laws_are_those_of_torch(shape):
    x, residual, weight, bias = tensors(shape, shape, (5,), (5,))
    expected = F.rms_norm(x, (5,), weight, 1e-3)
    torch.testing.assert_close(ops.rms_norm(x, weight, eps=1e-3), expected)
    torch.testing.assert_close(ops.rms_norm(x, weight - 1, eps=1e-3, shift=1.0), expected)
    torch.testing.assert_close(ops.rms_norm(x, eps=1e-3), F.rms_norm(x, (5,), None, 1e-3))
    expected = F.layer_norm(x, (5,), weight, bias, 1e-3)
    torch.testing.assert_close(ops.layer_norm(x, weight, bias, eps=1e-3), expected)
    expected = F.layer_norm(x, (5,), None, None, 1e-3)
    torch.testing.assert_close(ops.layer_norm(x, None, None, eps=1e-3), expected)
    y, total = ops.add_rms_norm(x, residual, weight, eps=1e-3)
    torch.testing.assert_close((y, total), (ops.rms_norm(total, weight, eps=1e-3), x + residual))
    y, total = ops.add_layer_norm(x, residual, weight, bias, eps=1e-3)
    expected = ops.layer_norm(total, weight, bias, eps=1e-3), x + residual
    torch.testing.assert_close((y, total), expected)


def test_the_sum_is_rounded_before_it_is_normalised():
    x, residual = tensors((3, 40), (3, 40), dtype=torch.bfloat16)
    y, total = ops.add_rms_norm(x, residual, eps=1e-6)
    assert total.dtype == y.dtype == torch.bfloat16
    assert torch.equal(total, x + residual)
    assert torch.equal(y, ops.rms_norm(total, eps=1e-6))


def test_only_the_result_is_rounded():
    x, weight = tensors((64, 96), (96,), dtype=torch.bfloat16)
    exact = F.rms_norm(x.double(), (96,), weight.double(), 1e-6)
    assert torch.equal(ops.rms_norm(x, weight, eps=1e-6), exact.bfloat16())


CALLS = {
    "rms_norm": (lambda x, r, w, b: ops.rms_norm(x, w, eps=1e-2, shift=1.0), 1),
    "rms_norm plain": (lambda x, r, w, b: ops.rms_norm(x, eps=1e-2), 1),
    "add_rms_norm": (lambda x, r, w, b: ops.add_rms_norm(x, r, w, eps=1e-2), 2),
    "layer_norm": (lambda x, r, w, b: ops.layer_norm(x, w, b, eps=1e-2), 1),
    "layer_norm plain": (lambda x, r, w, b: ops.layer_norm(x, None, None, eps=1e-2), 1),
    "add_layer_norm": (lambda x, r, w, b: ops.add_layer_norm(x, r, w, b, eps=1e-2), 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name):
    inputs = tensors((2, 3, 5), (2, 3, 5), (5,), (5,), grad=True)
    assert torch.autograd.gradcheck(CALLS[name][0], inputs)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_rounded_tensors_keep_their_dtypes(name):
    inputs = tensors((2, 3, 8), (2, 3, 8), (8,), (8,), dtype=torch.bfloat16, grad=True)
    call, results = CALLS[name]
    out = call(*inputs)
    total = sum(y.float().square().sum() for y in (out if results == 2 else (out,)))
    used = [x for x in torch.autograd.grad(total, inputs, allow_unused=True) if x is not None]
    assert used
    assert all(x.dtype == torch.bfloat16 for x in used)


def test_results_are_contiguous_and_match_the_fakes():
    x, residual = (t.transpose(0, 2) for t in tensors((5, 3, 2), (5, 3, 2)))
    (weight,) = tensors((5,))
    utils = ("test_schema", "test_faketensor")
    for op, args, kwargs in (
        (ops.rms_norm, (x, weight), {"eps": 1e-3, "shift": 1.0}),
        (ops.add_rms_norm, (x, residual, weight), {"eps": 1e-3}),
        (ops.layer_norm, (x, weight, None), {"eps": 1e-3}),
        (ops.add_layer_norm, (x, residual, weight, weight), {"eps": 1e-3}),
    ):
        torch.library.opcheck(op.default, args, kwargs, test_utils=utils)
        out = op(*args, **kwargs)
        assert all(y.is_contiguous() for y in (out if isinstance(out, tuple) else (out,)))
