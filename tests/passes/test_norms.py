"""Norms in the spellings of models: found once, equal; near misses refused with the true reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ridgeline.cost_model import load_target
from ridgeline.ir.capture import capture
from ridgeline.ir.normalize import normalize
from ridgeline.passes import PASSES
from ridgeline.passes.apply import apply
from ridgeline.passes.base import Setting
from ridgeline.passes.certify import EQUIVALENCE_LIMIT, equivalence, relative_error
from ridgeline.passes.norms import NORMS
from ridgeline.passes.observe import Observation
from ridgeline.passes.optimize import optimize
from ridgeline.passes.propose import propose
from ridgeline.passes.weights import WeightStore

SIZE = 24
ROUNDING = {torch.float32: 5e-7, torch.bfloat16: 8e-3}


class Model(nn.Module):
    """A function of this module (with weights w, w32 and b) and the inputs."""

    def __init__(self, function, dtype=torch.float32) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(SIZE).to(dtype))
        self.b = nn.Parameter(torch.randn(SIZE).to(dtype))
        self.w32 = nn.Parameter(torch.randn(SIZE))

    def forward(self, *inputs: Tensor):
        return self.function(self, *inputs)


def unit(h: Tensor, eps: float = 1e-6) -> Tensor:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def llama(m, x):
    return m.w * unit(x.float()).to(x.dtype)


def olmo(m, x):
    return (m.w * unit(x.float())).to(x.dtype)


def gemma(m, x):
    return (unit(x.float()) * (1.0 + m.w.float())).type_as(x)


def t5(m, x):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return m.w * (x * torch.rsqrt(variance + 1e-6)).to(x.dtype)


def mamba(m, x):
    gated = x.float() * F.silu((2 * x).float())
    return m.w * unit(gated, 1e-5).to(x.dtype)


def squared(m, x):
    return x * (x.square().mean(dim=2, keepdim=True) + 1e-6).pow(-0.5) * m.w


def divided(m, x):
    return x / torch.sqrt((x * x).mean(-1, True) + 1e-6) * m.w


def reciprocal(m, x):
    return x * (1 / torch.sqrt((x**2).mean(-1, True) + 1e-6)) * m.w


def wide_weight(m, x):
    return m.w32 * unit(x.float()).to(x.dtype)


def cohere(m, x):
    h = x.float()
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    return (m.w.float() * ((h - mean) * torch.rsqrt(variance + 1e-5))).to(x.dtype)


def by_hand(m, x):
    centered = x - x.mean(-1, keepdim=True)
    return centered / torch.sqrt((centered * centered).mean(-1, keepdim=True) + 1e-5) * m.w + m.b


def by_var(m, x):
    variance = x.var(-1, keepdim=True, unbiased=False)
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-5) * m.w + m.b


SPELLINGS = {
    "rms_norm": {
        "Llama": llama,
        "OLMo": olmo,
        "Gemma": gemma,
        "T5": t5,
        "Mamba2, gated": mamba,
        "square, power": squared,
        "product, division": divided,
        "power, reciprocal": reciprocal,
        "F.rms_norm": lambda m, x: F.rms_norm(x, (SIZE,), m.w, 1e-6),
        "F.rms_norm, no weight": lambda m, x: F.rms_norm(x, (SIZE,), None, 1e-6),
        "no weight": lambda m, x: unit(x.float()).to(x.dtype),
        "a gate after it": lambda m, x: unit(x.float()).to(x.dtype) * F.silu(x),
        "a factor after it": lambda m, x: llama(m, x) * 1.5,
    },
    "layer_norm": {
        "F.layer_norm": lambda m, x: F.layer_norm(x, (SIZE,), m.w, m.b),
        "no bias": lambda m, x: F.layer_norm(x, (SIZE,), m.w, None, 1e-6),
        "no weight": lambda m, x: F.layer_norm(x, (SIZE,)),
        "Cohere": cohere,
        "by hand": by_hand,
        "by var": by_var,
    },
    "add_rms_norm": {
        "stream": lambda m, x, r: (llama(m, h := x + r), h),
        "stream read twice": lambda m, x, r: (gemma(m, h := r + x).sin(), h.cos(), h * 2),
        "sum read by the norm alone": lambda m, x, r: llama(m, x + r),
    },
    "add_layer_norm": {
        "stream": lambda m, x, r: (F.layer_norm(h := x + r, (SIZE,), m.w, m.b), h),
        "by hand": lambda m, x, r: (by_hand(m, h := x + r), h),
    },
}


def rewritten(function, *inputs, target="a100", passes=(NORMS,), dtype=torch.float32):
    """(graph before, graph with all candidates that do not overlap, candidates, refusals)."""
    torch.manual_seed(0)
    model = Model(function, dtype).eval()
    with torch.no_grad():
        program = capture(model, inputs).program
        module = normalize(program.module)
        setting = Setting(load_target(target), False, 0.0, None, WeightStore())
        candidates, refusals = propose(passes, module, setting)
        taken, chosen = set(), []
        for candidate in candidates:
            assert equivalence(candidate, {}).relative_error <= EQUIVALENCE_LIMIT
            if not taken.intersection(candidate.site.nodes):
                chosen.append(candidate)
                taken.update(candidate.site.nodes)
        return module, apply(module, chosen), candidates, refusals


def drawn(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 5, SIZE, generator=generator).to(dtype) for _ in range(count)]


def operations(module):
    return [
        n.target._opname
        for n in module.graph.nodes
        if getattr(n.target, "namespace", "") == "ridgeline"
    ]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, named in SPELLINGS.items() for name in named]
)
def test_every_spelling_is_rewritten_once_and_equal(op, name, dtype):
    inputs = drawn(2 if op.startswith("add") else 1, dtype)
    before, after, candidates, refusals = rewritten(SPELLINGS[op][name], *inputs, dtype=dtype)
    assert refusals == []
    assert operations(after) == [op]
    assert len({c.site.outs[0] for c in candidates}) == 1
    with torch.no_grad():
        got, expected = after(*inputs), before(*inputs)
    assert [y.dtype for y in got] == [y.dtype for y in expected]
    assert relative_error(got, expected) <= ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_a_rounding_before_a_wider_weight_is_kept(dtype):
    _, after, _, refusals = rewritten(wide_weight, *drawn(1, dtype), dtype=dtype)
    assert operations(after) == (["rms_norm"] if dtype == torch.float32 else [])
    if dtype != torch.float32:
        assert f"rounds to {dtype} inside, where the result is torch.float32" in str(refusals)


def test_constants_are_those_of_the_model():
    _, after, _, _ = rewritten(gemma, *drawn(1))
    (call,) = (n for n in after.graph.nodes if n.target is torch.ops.ridgeline.rms_norm.default)
    assert call.kwargs == {"eps": 1e-6, "shift": 1.0}
    assert [n.target for n in after.graph.nodes if n.op == "call_function"] == [call.target]


def test_a_stream_of_two_layers():
    def layers(m, x, r):
        h = x + r
        h2 = h + F.linear(llama(m, h), m.w.outer(m.b))
        return F.linear(llama(m, h2), m.w.outer(m.b)) + h2

    inputs = drawn(2)
    before, after, _, _ = rewritten(layers, *inputs)
    assert operations(after) == ["add_rms_norm", "add_rms_norm"]
    with torch.no_grad():
        assert relative_error(after(*inputs), before(*inputs)) <= 2e-6


def test_one_sum_with_two_norms_is_added_once():
    def parallel(m, x, r):
        h = x + r
        return llama(m, h), F.layer_norm(h, (SIZE,), m.w, m.b), h

    inputs = drawn(2)
    before, after, candidates, _ = rewritten(parallel, *inputs)
    assert sorted(operations(after)) in (
        ["add_layer_norm", "rms_norm"],
        ["add_rms_norm", "layer_norm"],
    )
    assert sorted(c.variant for c in candidates) == [
        "LayerNorm", "LayerNorm of a sum", "RMSNorm", "RMSNorm of a sum",
    ]  # fmt: skip
    assert relative_error(after(*inputs), before(*inputs)) <= 5e-7


def test_a_reader_of_the_sum_before_the_norm():
    def early(m, x, r):
        h = x + r
        early = h.exp()
        return llama(m, h), early

    inputs = drawn(2)
    before, after, _, _ = rewritten(early, *inputs)
    assert operations(after) == ["add_rms_norm"]
    assert relative_error(after(*inputs), before(*inputs)) <= 5e-7


def test_broadcast_sums_stay_outside():
    def bias_added(m, x):
        return llama(m, x + m.b)

    _, after, candidates, _ = rewritten(bias_added, *drawn(1))
    assert [c.variant for c in candidates] == ["RMSNorm"]
    assert operations(after) == ["rms_norm"]


def unbiased(m, x):
    deviation = torch.sqrt(x.var(-1, keepdim=True) + 1e-5)
    return (x - x.mean(-1, keepdim=True)) / deviation * m.w + m.b


def mean_read(m, x):
    variance = x.pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(variance + 1e-6) * m.w + variance


def other_scaled(m, x, y):
    return y * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


TRAPS = {
    "the unbiased variance": (unbiased, "is True, where"),
    "the mean is read": (mean_read, "inside the site, is also read by 'add' at "),
    "another tensor is scaled": (other_scaled, "and 'flat_1' is what is scaled by it"),
    "another dimension": (
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
        "is -2, where",
    ),
    "two dimensions": (
        lambda m, x: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-6),
        "is [-2, -1], where",
    ),
    "eps outside the root": (
        lambda m, x: x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + 1e-6),
        "is read by 'add' at ",
    ),
    "a sum instead of a mean": (
        lambda m, x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6),
        "'sum' at ",
    ),
    "eps by default": (
        lambda m, x: F.rms_norm(x.bfloat16(), (SIZE,), m.w.bfloat16()),
        "the eps that torch chooses",
    ),
    "eps is a tensor": (
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.w32[0]),
        "where a number known before the run is needed",
    ),
    "over two dimensions": (lambda m, x: F.layer_norm(x, (5, SIZE)), "[5, 24]"),
    "float64": (lambda m, x: unit(x.double()), "computes in torch.float64"),
    "transposed rows": (
        lambda m, x: unit(x.transpose(0, 1).exp()), "do not lie in memory one after the other",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAPS)
def test_near_misses_are_refused_with_the_reason(name):
    function, reason = TRAPS[name]
    inputs = drawn(function.__code__.co_argcount - 1)
    _, after, candidates, refusals = rewritten(function, *inputs)
    assert candidates == []
    assert operations(after) == []
    assert any(reason in r.reject.reason for r in refusals), [r.reject.reason for r in refusals]


def test_a_write_between_the_read_and_the_norm_is_seen():
    def written(m, x):
        variance = x.pow(2).mean(-1, keepdim=True)
        x.mul_(2)
        return x * torch.rsqrt(variance + 1e-6)

    _, _, candidates, refusals = rewritten(written, *drawn(1))
    assert candidates == []
    assert any("what is scaled by it" in r.reject.reason for r in refusals)


def test_a_write_between_the_sum_and_the_norm_is_seen():
    def written(m, x, r):
        h = x + r
        x.mul_(2)
        return llama(m, h), h

    _, _, candidates, refusals = rewritten(written, *drawn(2))
    assert candidates == []
    assert any("changes 'flat_0' in place" in r.reject.reason for r in refusals)


def test_a_row_too_long_for_a_gpu_block():
    x = torch.randn(2, 20000)
    _, _, candidates, refusals = rewritten(lambda m, x: unit(x), x)
    assert candidates == []
    assert "20000 elements does not fit" in refusals[0].reject.reason
    _, _, candidates, _ = rewritten(lambda m, x: unit(x), x, target="cpu")
    assert len(candidates) == 1


@torch.no_grad()
def test_a_plan_lists_kernels_certificates_and_refusals():
    pytest.importorskip("tvm")
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8)).eval()
    x = torch.randn(300, 64)
    fast = optimize(model, (x,), target="cpu", lowering="eager")
    (applied,) = (d for d in fast.plan.applied if d.rewrite == "norm")
    assert applied.variant == "LayerNorm"
    assert applied.certificate is not None
    assert applied.certificate.relative_error <= EQUIVALENCE_LIMIT
    assert [k.op for k in fast.plan.kernels] == ["ridgeline::layer_norm"]
    torch.testing.assert_close(fast(x), model(x))
    fast = optimize(model, (x[:1],), target="cpu", lowering="eager")
    (refused,) = (d for d in fast.plan.refused if d.rewrite == "norm")
    assert refused.refused_by == "cost"
    assert "µs as it is" in refused.reason


def test_neighbouring_rewrites_follow_each_other():
    """A 4-bit layer reads the norm's result, the next norm reads that layer's."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.LayerNorm(128), nn.LayerNorm(128)
            self.up, self.down = nn.Linear(128, 128), nn.Linear(128, 128)

        def forward(self, x: Tensor) -> Tensor:
            h = x + self.up(self.first(x))
            return h + self.down(self.second(h))

    torch.manual_seed(0)
    x = torch.randn(2, 3, 128)
    with torch.no_grad():
        program = capture(Layers().eval(), (x,)).program
        module = normalize(program.module)
        observed = Observation(module, program)
        setting = Setting(load_target("a100"), False, 0.5, observed, WeightStore())
        candidates, _ = propose(PASSES, module, setting)
        first = {c.site.outs[0]: c for c in reversed(candidates)}
        chosen = [c.rewrite.prepare(c, setting) for c in first.values()]
        for order in (chosen, chosen[::-1]):
            after = apply(module, order)
            assert sorted(operations(after)) == [
                "add_layer_norm", "layer_norm", "quantized_linear", "quantized_linear",
            ]  # fmt: skip
            assert relative_error(after(x), module(x)) < 0.3
