"""Attention's backward kernel against the law in float64, and how a training graph gets it."""

import functools
import math

import pytest
import torch
from torch import nn

import ridgeline
from ridgeline.codegen.tvm import attention_training as cpu
from ridgeline.codegen.tvm.isa import host_isa
from ridgeline.ir.attention import reference

OP = cpu.OP


def operands(batch, heads, key_heads, queries, length, dim, value_dim, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = (heads, queries, dim), (key_heads, length, dim), (key_heads, length, value_dim)
    q, k, v = (torch.randn(batch, *shape).to(dtype) for shape in shapes)
    return q, k, v, torch.randn(batch, heads, queries, value_dim).to(dtype)


def gradients(attention, tensors, grad, mask=None, sinks=None, **options):
    """Of q, k, v and, where there are any, of the sinks, by `attention`."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    wide = leaves[0].dtype == torch.float64
    if mask is not None and wide and mask.is_floating_point():
        mask = mask.double()
    if sinks is not None:
        sinks = sinks.to(leaves[0].dtype).detach().clone().requires_grad_()
        leaves.append(sinks)
    out = attention(*leaves[:3], mask, sinks, **options)
    out.backward(grad.to(out.dtype))
    return [leaf.grad for leaf in leaves]


def saved(*args, **options):
    return OP(*args, **options)[0]


def off(found, expected):
    error = (found.double() - expected).norm() / expected.norm().clamp_min(1e-300)
    return float(error)


CASES = {
    "plain": {},
    "causal": {"diagonal": 0},
    "bottom-right": {"diagonal": 61},
    "rows without keys": {"diagonal": -20},
    "capped": {"diagonal": 0, "soft_cap": 3.0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(2, 4, 2, 70, 131, 64, 64), (1, 3, 1, 129, 40, 24, 40)])
def test_gradients_are_those_of_the_law(shape, case):
    q, k, v, grad = operands(*shape)
    options = {"scale": 0.3, **CASES[case]}
    found = gradients(saved, (q, k, v), grad, **options)
    expected = gradients(reference, (q.double(), k.double(), v.double()), grad, **options)
    assert [off(f, e) < 2e-6 for f, e in zip(found, expected, strict=True)] == [True] * 3


SHORT = (1, 2, 7, 15, 16, 17, 31, 33, 63)
"""Lengths that fill no tile, and no vector but one."""


@pytest.mark.parametrize("kind", ["plain", "causal", "boolean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_lengths(dtype, kind):
    limit = 2e-6 if dtype == torch.float32 else 8e-3
    for length in SHORT:
        for queries in (length, max(1, length - 5)):
            q, k, v, grad = operands(3, 4, 2, queries, length, 24, 16, dtype)
            q, grad = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, grad))
            rest = {"scale": 0.2, "diagonal": 0} if kind == "causal" else {"scale": 0.2}
            if kind == "boolean":
                rest["mask"] = torch.randn(3, 1, queries, length) > 0
            found = gradients(saved, (q, k, v), grad, **rest)
            wide = [x.double() for x in (q, k, v)]
            expected = gradients(reference, wide, grad.double(), **rest)
            for f, e in zip(found, expected, strict=True):
                # of a row that sees one key, dq is a rounding of zero: numbers near 1 cancel
                assert (f.double() - e).norm() <= limit * (e.norm() + 2 * e.numel() ** 0.5)


@pytest.mark.parametrize("kind", ["boolean", "additive", "one for all heads", "turned", "lowest"])
def test_masks_and_sinks(kind):
    q, k, v, grad = operands(2, 4, 2, 37, 70, 32, 32)
    torch.manual_seed(1)
    mask = torch.randn(2, 4, 37, 70)
    mask[:, 0, 3] = -math.inf  # rows that see nothing but the sink
    masks = {
        "boolean": mask > 0,
        "additive": mask,
        "one for all heads": mask[:1, :1],
        # what transformers fills with; row 3 sees all keys alike: their scores are lost in it
        "lowest": torch.zeros(2, 1, 37, 70).masked_fill(mask[:, :1] < 0, torch.finfo().min),
        "turned": mask.transpose(2, 3).contiguous().transpose(2, 3),
    }
    for sinks in (None, torch.randn(4)):
        rest = {"mask": masks[kind], "sinks": sinks, "scale": 0.2}
        found = gradients(saved, (q, k, v), grad, **rest)
        expected = gradients(reference, (q.double(), k.double(), v.double()), grad, **rest)
        for f, e in zip(found, expected, strict=True):
            assert off(f, e) < 2e-6


@pytest.fixture(params=["as it is", "widened"])
def reading(request, monkeypatch):
    """bf16 operands multiplied as they are, and in fp32."""
    if request.param == "as it is" and host_isa() != "avx512_bf16":
        pytest.skip("this CPU does not multiply bf16")
    dtype = torch.bfloat16 if request.param == "as it is" else torch.float32
    monkeypatch.setattr(cpu, "read_as", lambda own: own if own == torch.float32 else dtype)
    cpu.kernel.cache_clear()
    yield
    cpu.kernel.cache_clear()


@pytest.mark.parametrize("shape", [(1, 4, 2, 90, 91, 64, 64), (2, 2, 1, 33, 130, 24, 40)])
def test_bf16_is_rounded_once_or_in_products(reading, shape):
    q, k, v, grad = operands(*shape, torch.bfloat16)
    mask = torch.randn(shape[0], 1, shape[3], shape[4]) > -1
    for options in ({"diagonal": 0}, {"mask": mask}, {"soft_cap": 2.0, "diagonal": 5}):
        rest = {"scale": 0.125} | options
        found = gradients(saved, (q, k, v), grad, **rest)
        expected = gradients(reference, (q.double(), k.double(), v.double()), grad.double(), **rest)
        for f, e in zip(found, expected, strict=True):
            assert f.dtype == torch.bfloat16
            assert off(f, e) < 8e-3


def test_fp16_is_rounded_once():
    q, k, v, grad = operands(1, 4, 2, 90, 90, 64, 64, torch.float16)
    rest = {"scale": 0.125, "diagonal": 0}
    found = gradients(saved, (q, k, v), grad, **rest)
    expected = gradients(reference, (q.double(), k.double(), v.double()), grad.double(), **rest)
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == torch.float16
        assert off(f, e) < 6e-4


def test_strides_and_dimensions_that_are_no_multiple_of_eight():
    q, k, v, grad = operands(2, 2, 2, 33, 33, 20, 12)
    packed = torch.cat((q, k, v), -1)
    views = packed[..., :20], packed[..., 20:40], packed[..., 40:]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    column_wise = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    expected = gradients(reference, (q.double(), k.double(), v.double()), grad, scale=0.2)
    for tensors in (views, turned, column_wise):
        found = gradients(saved, tensors, grad, scale=0.2)
        assert all(off(f, e) < 2e-6 for f, e in zip(found, expected, strict=True))


def test_extreme_scores_give_no_nan():
    q, k, v, grad = operands(1, 1, 1, 70, 70, 16, 16)
    q[:, :, 0], q[:, :, 1] = 1e4, 0.0
    options = {"scale": 30.0, "diagonal": 0}
    found = gradients(saved, (q, k, v), grad, **options)
    expected = gradients(reference, (q.double(), k.double(), v.double()), grad, **options)
    for f, e in zip(found, expected, strict=True):
        assert bool(f.isfinite().all())
        # dp - delta cancels to a rounding of dp, which scale q = 3e5 makes large in dk
        assert off(f, e) < 1e-2


def test_the_same_numbers_every_time_and_few_heads_are_shared_out():
    assert cpu._chunks(8, 16, 2) == 1
    assert cpu._chunks(3, 16, 2) == 2
    assert cpu._chunks(1, 1, 2) == 1
    q, k, v, grad = operands(1, 3, 1, 200, 200, 32, 32)
    options = {"scale": 0.2, "diagonal": 0}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = gradients(saved, (q, k, v), grad, **options)
        for _ in range(3):
            again = gradients(saved, (q, k, v), grad, **options)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(before)
    expected = gradients(reference, (q.double(), k.double(), v.double()), grad, **options)
    assert all(off(f, e) < 2e-6 for f, e in zip(first, expected, strict=True))


@pytest.mark.parametrize(("dim", "value_dim"), [(8, 8), (20, 8), (24, 40)])
def test_gradients_are_laid_out_as_their_fake_ones(dim, value_dim):
    """Inductor's code reads them by the strides that were promised."""
    q, k, v, grad = operands(2, 2, 1, 7, 9, dim, value_dim)
    out, stats = cpu.attention_saved(q, k, v, scale=0.3)
    found = cpu.attention_backward(grad, q, k, v, None, out, stats, scale=0.3)
    assert all(f.is_contiguous() for f in found)


def test_nothing_to_attend_to():
    q, k, v, grad = operands(1, 2, 2, 5, 0, 16, 16)
    assert all(not g.any() for g in gradients(saved, (q, k, v), grad, scale=1.0))


def test_second_derivatives_and_gradients_of_masks_are_the_laws():
    q, k, v, grad = operands(1, 2, 1, 9, 11, 16, 16)
    mask = torch.randn(1, 2, 9, 11, requires_grad=True)
    saved(q.requires_grad_(), k, v, mask, scale=0.3).backward(grad)
    wide = mask.detach().double().requires_grad_()
    reference(q.detach().double(), k.double(), v.double(), wide, scale=0.3).backward(grad.double())
    assert off(mask.grad, wide.grad) < 2e-6

    def penalty(attention, x):
        x = x.detach().requires_grad_()
        out = attention(x, k.to(x.dtype), v.to(x.dtype), scale=0.3)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    assert off(penalty(saved, q), penalty(reference, q.double())) < 2e-5


class Block(nn.Module):
    """Two attentions, one causal, between linear layers."""

    def __init__(self):
        super().__init__()
        self.project, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        for causal in (True, False):
            q, k, v = self.project(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
            x = x + self.out(y.transpose(1, 2).flatten(2))
        return x


@pytest.mark.filterwarnings("default")  # Dynamo and Inductor warn of their own parts
@pytest.mark.parametrize("door", ["optimize", "plugin"])
def test_training_runs_the_kernels_and_gets_the_gradients(door):
    torch.manual_seed(0)
    model, x = Block().train(), torch.randn(2, 250, 64)
    plans = []
    if door == "optimize":
        fast = ridgeline.optimize(model, target="cpu").train()
    else:
        options = {"target": "cpu", "on_plan": plans.append}
        fast = torch.compile(model, backend="ridgeline", options=options)
    loss = functools.partial(torch.nn.functional.mse_loss, target=torch.ones_like(x))
    loss(fast(x)).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    if door == "optimize":
        plans = [fast.plan]
        found = {n: p.grad.clone() for n, p in fast.named_parameters()}
    kernels = [k for plan in plans for k in plan.kernels if k.op == "ridgeline::attention"]
    assert any("forward and backward" in k.configuration for k in kernels)
    model.zero_grad()
    loss(model(x)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)
