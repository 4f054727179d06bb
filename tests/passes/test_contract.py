"""What every pass promises, whichever rewrite it is."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ridgeline.codegen.lower import lower
from ridgeline.cost_model import Target, load_target
from ridgeline.ir.capture import capture
from ridgeline.ir.match import find
from ridgeline.ir.normalize import normalize
from ridgeline.nn import GroupRational
from ridgeline.passes import PASSES
from ridgeline.passes.apply import apply
from ridgeline.passes.base import Pass, Setting
from ridgeline.passes.certify import relative_error
from ridgeline.passes.compiler import Compiler
from ridgeline.passes.fold import fold_stacks
from ridgeline.passes.observe import Observation
from ridgeline.passes.propose import propose
from ridgeline.passes.quantization import Codec, quantize
from ridgeline.passes.quantization.layer import QuantizedLinear
from ridgeline.passes.weights import WeightStore
from tests.passes.test_group_rational import Model, kat


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v


def _attention() -> tuple[nn.Module, list[Tensor]]:
    return Attend(), [torch.randn(2, 4, 7, 16) for _ in range(3)]


def _linear() -> tuple[nn.Module, list[Tensor]]:
    return nn.Linear(128, 96), [torch.randn(2, 5, 128)]


class Beside(nn.Module):
    """Two layers of one input, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(48, 32, bias=False), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)[..., :16] * self.b(x)


def _beside() -> tuple[nn.Module, list[Tensor]]:
    return Beside(), [torch.randn(2, 5, 48)]


def _rational() -> tuple[nn.Module, list[Tensor]]:
    """As KAT's public code has it, with the denominator of its kernels."""
    model = Model(lambda x, a, b: kat(x, a, b, magnitudes=True))
    return model, [torch.randn(2, 5, 48)]


def _norm_rational() -> tuple[nn.Module, list[Tensor]]:
    model = nn.Sequential(nn.LayerNorm(48), GroupRational(48, 4, "silu")).eval()
    return model, [torch.randn(3, 7, 48)]


def _linear_rational() -> tuple[nn.Module, list[Tensor]]:
    model = nn.Sequential(nn.Linear(32, 48), GroupRational(48, 4, "silu")).eval()
    return model, [torch.randn(3, 7, 32)]


class Normalise(nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _norm() -> tuple[nn.Module, list[Tensor]]:
    return Normalise(), [torch.randn(3, 7, 24), torch.randn(24)]


class Gate(nn.Module):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


def _gated() -> tuple[nn.Module, list[Tensor]]:
    return Gate(), [torch.randn(2, 5, 96) for _ in range(2)]


class Turn(nn.Module):
    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def rotate(x: Tensor) -> Tensor:
            half = x.shape[-1] // 2
            return torch.cat((-x[..., half:], x[..., :half]), dim=-1)

        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin


def _rotary() -> tuple[nn.Module, list[Tensor]]:
    shapes = (1, 4, 7, 16), (1, 2, 7, 16), (1, 7, 16), (1, 7, 16)
    return Turn(), [torch.randn(shape) for shape in shapes]


class Coded(nn.Module):
    """Layers of one input, held in 2 bits; powers of two, which no `.to(dtype)` rounds."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        codec = Codec(2, 64, "binary", terms=2)
        weights = [torch.randn(n, 128) for n in sizes]
        self.layers = nn.ModuleList(
            QuantizedLinear(quantize(w, codec, torch.eye(128)), torch.randn(len(w)))
            for w in weights
        )

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x)[..., :32] for layer in self.layers)


def _coded() -> tuple[nn.Module, list[Tensor]]:
    return Coded(32), [torch.randn(1, 3, 128)]


def _coded_beside() -> tuple[nn.Module, list[Tensor]]:
    return Coded(32, 96), [torch.randn(1, 3, 128)]


EXAMPLES: dict[str, Callable[[], tuple[nn.Module, list[Tensor]]]] = {
    "flash_attention": _attention,
    "group_rational": _rational,
    "merged_linear": _beside,
    "merged_coded": _coded_beside,
    "coded_products": _coded,
    "quantized_linear": _linear,
    "shift_add_linear": _linear,
    "norm": _norm,
    "norm_rational": _norm_rational,
    "linear_rational": _linear_rational,
    "gated_activation": _gated,
    "rotary": _rotary,
}
"""One model that each pass fits once."""

ON_CPU = ("coded_products",)
"""Passes that have nothing to offer on a GPU."""

ON_GPUS = ("linear_rational",)
"""Passes whose operation has no CPU kernel."""


def _target(rewrite: Pass) -> Target:
    a100 = load_target("a100")
    if rewrite.name not in ON_CPU:
        return a100
    peaks = {"float32": 2e11, "bfloat16": 4e11}
    return dataclasses.replace(a100, name="desk", kind="cpu", arch="x86_64", peaks=peaks)


def _put(rewrite: Pass) -> Any:
    """The operation that a pass puts into the graph."""
    return rewrite.op.overload if rewrite.op else torch.ops.aten.linear.default


def _propose(rewrite: Pass, model: nn.Module, inputs: list[Tensor]) -> Any:
    with torch.no_grad():
        program = capture(model.eval(), inputs).program
        module = normalize(program.module)
        observed = Observation(module, program)
        store = WeightStore({"weight": torch.eye(128)})  # of the linear layer, as if calibrated
        setting = Setting(_target(rewrite), False, 0.5, observed, store)
        candidates, refusals = propose((rewrite,), module, setting)
        prepared = [rewrite.prepare(c, setting) for c in candidates]
    return module, prepared, refusals


@pytest.fixture(params=PASSES, ids=lambda p: p.name)
def rewrite(request: pytest.FixtureRequest) -> Pass:
    torch.manual_seed(0)
    return request.param


def test_every_pass_has_an_example(rewrite):
    assert rewrite.name in EXAMPLES


def test_the_pass_finds_its_site_once_and_leaves_none(rewrite):
    module, candidates, refusals = _propose(rewrite, *EXAMPLES[rewrite.name]())
    assert refusals == []
    assert len({c.site.outs[0] for c in candidates}) == 1
    rewritten = apply(module, candidates[:1])
    calls = rewritten.graph.find_nodes(op="call_function", target=_put(rewrite))
    assert len(calls) == 1
    assert "nn_module_stack" in calls[0].meta or isinstance(calls[0].meta["val"], Tensor | tuple)
    assert [found for p in rewrite.patterns() for found in find(p, rewritten.graph)[0]] == []
    assert rewrite.search(rewritten.graph) == ([], [])


def test_normal_form_is_a_fixed_point(rewrite):
    module, candidates, _ = _propose(rewrite, *EXAMPLES[rewrite.name]())
    before = str(module.graph)
    assert str(normalize(module).graph) == before
    rewritten = apply(module, candidates[:1])
    before = str(rewritten.graph)
    assert str(normalize(rewritten).graph) == before


def test_the_original_graph_stays_whole(rewrite):
    module, candidates, _ = _propose(rewrite, *EXAMPLES[rewrite.name]())
    before = str(module.graph)
    apply(module, candidates[:1])
    assert str(module.graph) == before


def test_nothing_happens_where_the_pattern_is_absent(rewrite):
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.silu(x) + x.cumsum(-1)

    module, candidates, refusals = _propose(rewrite, Other(), [torch.randn(2, 5, 128)])
    assert (candidates, refusals) == ([], [])
    assert str(apply(module, []).graph) == str(module.graph)


def test_the_ops_fake_agrees_with_its_reference(rewrite):
    module, candidates, _ = _propose(rewrite, *EXAMPLES[rewrite.name]())
    for candidate in candidates:
        rewritten = apply(module, [candidate])
        (call,) = rewritten.graph.find_nodes(op="call_function", target=_put(rewrite))
        inputs = EXAMPLES[rewrite.name]()[1]
        got = rewritten(*inputs)[0]
        value = call.meta["val"]
        assert got.dtype == (value[0] if isinstance(value, tuple) else value).dtype
        assert got.shape == module(*inputs)[0].shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_keeps_the_stated_rounding(rewrite, dtype):
    model, inputs = EXAMPLES[rewrite.name]()
    inputs = [x.to(dtype) for x in inputs]
    module, candidates, _ = _propose(rewrite, model.to(dtype), inputs)
    rewritten = apply(module, candidates[:1])
    if rewrite.op is None or rewrite.name in ON_GPUS:
        pytest.skip("no kernel of ours runs it here")
    expected = rewritten(*(x.double() for x in inputs))[0]
    fold_stacks(rewritten, WeightStore())
    lowered = lower(rewritten, inputs, load_target("cpu"), "eager", training=False)
    assert [k.op for k in lowered.kernels] == [rewrite.op.qualified]
    got = lowered.run(*inputs)[0]
    assert got.dtype == dtype
    assert relative_error([got], [expected]) <= rewrite.rounding[str(dtype).removeprefix("torch.")]


def test_a_candidate_says_what_was_proven_and_what_it_costs(rewrite):
    _, candidates, _ = _propose(rewrite, *EXAMPLES[rewrite.name]())
    for candidate in candidates:
        assert candidate.preconditions
        assert candidate.before != candidate.after
        assert (candidate.error == 0) == (rewrite.exactness != "approximate")
    assert rewrite.op is None or set(rewrite.rounding) == {"float32", "bfloat16", "float16"}
    assert inspect.getdoc(inspect.getmodule(rewrite.accepts))  # the law it implements


# -- decisions per target --------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["a100", "h100", "l4"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@torch.no_grad()
def test_decisions_for_a_tiny_llama(golden, target, phase):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().bfloat16()
    cache = transformers.DynamicCache(config=config)
    if phase == "decode":
        model(torch.randint(3, 96, (1, 33)), past_key_values=cache)
    ids = torch.randint(3, 96, (1, 1 if phase == "decode" else 33))
    captured = capture(model, (ids,), {"past_key_values": cache})
    assert captured.program.phase == phase
    compiler = Compiler(target, tolerance=0.05, passes=PASSES)
    compiler.rewrite(captured.program)
    lines = [
        f"{'+' if d.refused_by is None else '-'} {d.rewrite} {d.at}"
        f" {d.refused_by or d.variant or d.exactness}"
        for d in (*compiler.plan.applied, *compiler.plan.refused)
    ]
    golden(f"llama_{phase}_{target}", "\n".join(sorted(lines)) + "\n")
