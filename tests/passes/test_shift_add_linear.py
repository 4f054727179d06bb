"""Which layers become sums and shifts, under which objective, and what the plan says of it."""

import dataclasses
import re

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import ridgeline
from ridgeline.cost_model import load_target
from ridgeline.ir.capture import capture
from ridgeline.ir.quantized_linear import QUANTIZED_LINEAR
from ridgeline.passes import PASSES, shift_add_linear
from ridgeline.passes.compiler import Compiler
from ridgeline.passes.plan_text import render
from ridgeline.passes.quantization import (
    Codec,
    QuantizationError,
    QuantizedWeight,
    collect_hessians,
    quantize,
)
from ridgeline.passes.quantization.layer import QuantizedLinear
from ridgeline.passes.quantized_linear import QUANTIZED
from ridgeline.passes.shift_add_linear import FEW_ROWS, SHIFT_ADD
from ridgeline.passes.weights import SKETCHED_ROWS, WeightStore

CPU = {
    "kind": "cpu", "peaks": {"float32": 2.2e9, "bfloat16": 4.4e9}, "bandwidth_bytes_per_s": 3e8,
    "caches": ((2**12, 1e10), (2**17, 4e9), (2**21, 1.5e9)), "spread": 0.0, "threads": 2,
    "launch_s": 2e-6, "fork_s": 3e-6, "gemm_efficiency": 0.9, "bandwidth_efficiency": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def cpu():
    """A CPU like two Zen 4 cores, but a hundred times slower and with a sixteenth of their caches:
    small layers have the proportions of large ones."""
    return dataclasses.replace(load_target("a100"), name="desk", arch="x86_64", **CPU)


class Stack(nn.Module):
    """Residual layers; 256 features lie in no inner cache."""

    def __init__(self, features: int = 256, layers: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Linear(features, features, bias=False) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return x


class Beside(nn.Module):
    """Three layers of one input, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(256, 256), nn.Linear(256, 128, bias=False)
        self.v = nn.Linear(256, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x)[..., :128] * self.k(x) + self.v(x)


def rewritten(model, x, target, *, tolerance, objective="latency", passes=(QUANTIZED, SHIFT_ADD),
              calibrated=True):  # fmt: skip
    """(compiler, rewritten graph module) of one call."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    hessians = {}
    if calibrated:
        batches = [torch.randn(512, x.shape[-1], dtype=x.dtype) for _ in range(4)]
        found = collect_hessians(model, names, batches)
        hessians = {f"{name}.weight": h for name, h in found.items()}
    with torch.no_grad():
        program = capture(model.eval(), (x,)).program
        compiler = Compiler(
            target, tolerance=tolerance, objective=objective, passes=passes, hessians=hessians
        )
        return compiler, compiler.rewrite(program)


def variants(compiler: Compiler) -> list[str]:
    return [d.variant for d in compiler.plan.applied]


def test_two_bits_are_looked_up_for_one_row(cpu):
    model, x = Stack(layers=2), torch.randn(1, 256)
    compiler, module = rewritten(model, x, cpu, tolerance=0.6)
    assert variants(compiler) == ["2-bit binary g128, by lookup"] * 2
    calls = module.graph.find_nodes(op="call_function", target=QUANTIZED_LINEAR.overload)
    assert [(c.kwargs["codec"], c.kwargs["bits"], c.kwargs["multiply"]) for c in calls] == [
        ("binary", 2, torch.int16)
    ] * 2
    with torch.no_grad():
        expected = model(x)
        error = (module(x)[0] - expected).norm() / expected.norm()
    assert error == pytest.approx(compiler.plan.measured["forward"], rel=1e-3)
    assert 0.01 < error <= 0.6


def test_at_four_bits_the_plain_kernel_wins_and_the_plan_says_so(cpu, monkeypatch):
    monkeypatch.setattr(shift_add_linear, "BINARY", shift_add_linear.BINARY[-1:])
    compiler, _ = rewritten(Stack(layers=2), torch.randn(1, 256), cpu, tolerance=0.3)
    assert {d.rewrite for d in compiler.plan.applied} == {"quantized_linear"}
    refused = [d for d in compiler.plan.refused if d.rewrite == "shift_add_linear"]
    assert len(refused) == 2
    for d in refused:
        assert d.refused_by == "cost"
        sides = re.search(
            r"quantized_linear is better there: ([\d.]+) µs as 4-bit .*, ([\d.]+) µs as"
            r" 4-bit binary g128, by lookup",
            d.reason,
        )
        assert sides is not None, d.reason
        assert float(sides[1]) < float(sides[2])
        assert "out of passes=" in d.needed


def test_many_rows_are_not_looked_up(cpu):
    for rows, lookup in ((FEW_ROWS, True), (FEW_ROWS + 1, False)):
        compiler, _ = rewritten(
            Stack(128, 1), torch.randn(rows, 128), cpu, tolerance=0.6, objective="energy",
            passes=(SHIFT_ADD,),
        )  # fmt: skip
        assert ["lookup" in v for v in variants(compiler)] == [lookup]


def test_objectives_take_different_codecs(cpu):
    """Many rows: products bound the time, and integers are decoded faster than planes; fewer
    bits take less memory, and less energy on their way."""
    model, x = Stack(128, 1), torch.randn(64, 128)
    taken = {
        objective: variants(rewritten(model, x, cpu, tolerance=0.6, objective=objective)[0])
        for objective in ("latency", "memory", "energy")
    }
    assert taken["latency"] == ["8-bit symmetric g32, bf16 products"]
    assert taken["memory"] == taken["energy"] == ["2-bit binary g128, bf16 products"]


def test_a_gpu_takes_planes_in_the_inputs_own_dtype():
    model, x = Stack(256, 1).bfloat16(), torch.randn(1, 256, dtype=torch.bfloat16)
    compiler, _ = rewritten(
        model, x, "a100", tolerance=0.6, objective="memory", passes=(SHIFT_ADD,)
    )
    assert compiler.plan.applied
    assert not any("lookup" in v for v in variants(compiler))


def test_layers_side_by_side_are_one_product(cpu, monkeypatch):
    monkeypatch.setattr(shift_add_linear, "BINARY", shift_add_linear.BINARY[:1])
    model, x = Beside(), torch.randn(1, 256)
    compiler, module = rewritten(model, x, cpu, tolerance=0.9, passes=(SHIFT_ADD,))
    (call,) = module.graph.find_nodes(op="call_function", target=QUANTIZED_LINEAR.overload)
    assert variants(compiler) == ["2-bit binary g128, by lookup, 3 layers side by side"]
    assert call.meta["val"].shape == (1, 512)
    with torch.no_grad():
        expected = model(x)
        assert (module(x)[0] - expected).norm() <= 0.9 * expected.norm()


def test_layers_that_were_not_calibrated_stay(cpu):
    compiler, _ = rewritten(
        Beside(), torch.randn(1, 256), cpu, tolerance=0.6, objective="memory", calibrated=False,
        passes=(SHIFT_ADD,),
    )  # fmt: skip
    assert compiler.plan.applied == []
    assert {d.at.partition(":")[0] for d in compiler.plan.refused} == {"q", "k", "v"}
    assert {d.refused_by for d in compiler.plan.refused} == {"precondition"}
    assert all("not calibrated" in d.reason for d in compiler.plan.refused)
    assert all("pass calibration=" in d.needed for d in compiler.plan.refused)


def test_a_hessian_that_is_none_costs_its_layer_alone(cpu):
    model, x = Beside(), torch.randn(1, 256)
    hessians = {f"{n}.weight": torch.rand(256).diag() for n in "qk"} | {
        "v.weight": torch.zeros(256, 256)
    }
    with torch.no_grad():
        compiler = Compiler(
            cpu, tolerance=0.6, objective="memory", passes=(SHIFT_ADD,), hessians=hessians
        )
        compiler.rewrite(capture(model.eval(), (x,)).program)
    assert {d.at.partition(":")[0] for d in compiler.plan.applied} == {"q", "k"}
    (refused,) = compiler.plan.refused
    assert refused.at.partition(":")[0] == "v"
    assert "no positive diagonal" in refused.reason


def test_both_passes_refuse_for_themselves(cpu):
    compiler, module = rewritten(Stack(128, 1), torch.randn(2, 128), cpu, tolerance=0.0)
    assert {(d.rewrite, d.reason) for d in compiler.plan.refused} == {
        (name, "approximate, and tolerance is 0")
        for name in ("quantized_linear", "shift_add_linear")
    }
    assert not module.graph.find_nodes(op="call_function", target=QUANTIZED_LINEAR.overload)


# -- what the chooser weighs ----------------------------------------------------------------------


def test_a_sketch_is_the_real_thing_on_some_rows():
    torch.manual_seed(0)
    weight, x = torch.randn(300, 256), torch.randn(500, 256) * torch.rand(256) * 4
    codec, store = Codec(3, 128, "binary"), WeightStore({"w": 2 / 500 * x.T @ x})
    part, coded = store.sketch("w", weight, codec)
    assert len(part) == len(coded.packed) <= SKETCHED_ROWS
    whole = store.refined("w", weight, codec)
    assert len(whole.packed) == 300

    def error(rows, quantized):
        return ((x @ (quantized.dequantize() - rows).T).norm() / (x @ rows.T).norm()).item()

    assert error(part, coded) == pytest.approx(error(weight, whole), rel=0.15)
    assert store.sketch("w", weight, codec)[1] is coded


def drawn(weight: Tensor, codec: Codec, hessian: Tensor, **options) -> QuantizedWeight:
    """Random codes; scales fp32 where the weight is large; row scales; the input's permutation."""
    n, k = weight.shape
    planes = [codec.bits] if codec.scheme == "binary" else []
    scale = torch.rand(n, codec.groups(k), *planes)
    return QuantizedWeight(
        torch.randint(256, (n, k * codec.bits // 8), dtype=torch.uint8),
        scale if weight.abs().max() > 100 else scale.half(), None, codec.bits, codec.group_size, k,
        codec.codec, terms=max(codec.terms, 1), row_scale=torch.rand(n).half(),
        permutation=hessian.diagonal().argsort().short(),
    )  # fmt: skip


@pytest.mark.parametrize("codec", [Codec(3, 64, "binary"), Codec(8, 64, "shift", terms=2)], ids=str)
def test_stacked_weights_are_their_parts(codec, monkeypatch):
    monkeypatch.setattr("ridgeline.passes.weights.descend", drawn)
    torch.manual_seed(0)
    weights = {"a": torch.randn(96, 128), "b": 1e5 * torch.randn(64, 128)}
    store = WeightStore(dict.fromkeys(weights, torch.rand(128).diag()))
    parts = [store.refined(n, w, codec).dequantize() for n, w in weights.items()]
    whole = store.stacked(tuple(weights), codec)
    assert torch.equal(whole.dequantize(), torch.cat(parts))
    assert whole.scale.dtype == torch.float32
    assert whole.row_scale is not None
    assert torch.equal(store.refined("b", weights["b"], codec).dequantize(), parts[1])
    held = store.refined("b", weights["b"], codec).packed
    assert held.untyped_storage().data_ptr() == whole.packed.untyped_storage().data_ptr()


def test_weights_of_two_orders_are_not_stacked(monkeypatch):
    monkeypatch.setattr("ridgeline.passes.weights.descend", drawn)
    codec, store = Codec(3, 64, "binary"), WeightStore({n: torch.rand(128).diag() for n in "ab"})
    for name in "ab":
        store.refined(name, torch.randn(64, 128), codec)
    with pytest.raises(QuantizationError, match="one permutation"):
        store.stacked(("a", "b"), codec)


# -- the account ----------------------------------------------------------------------------------


def printed(compiler: Compiler) -> str:
    console = Console(width=200, highlight=False)
    with console.capture() as text:
        render(compiler.plan, console=console)
    return text.get()


def test_the_plan_shows_time_weights_and_energy_side_by_side(cpu):
    compiler, _ = rewritten(Stack(256, 2), torch.randn(1, 256), cpu, tolerance=0.6)
    figures = compiler.plan.predicted["forward"]
    assert figures["before"]["held_bytes"] == 2 * 256 * 256 * 4
    (applied, *_) = compiler.plan.applied
    held = sum(figure.weight_bytes for figure in [d.after for d in compiler.plan.applied])
    assert figures["after"]["held_bytes"] == held
    assert applied.after.energy_joules < applied.before.energy_joules
    text = printed(compiler)
    assert re.search(r"  weights 524 kB -> [\d.]+ kB \([\d.]+x less\); energy [\d.]+ µJ ->", text)
    assert re.search(r"\+ shift_add_linear .* µs -> .* µs, 524 kB -> .* kB, .* µJ -> .* µJ", text)


def test_layers_that_are_quantised_already_are_named(cpu):
    model = Stack(256, 3)
    for i in (0, 1):
        coded = quantize(model.layers[i].weight, Codec(4, 64, "symmetric"))
        model.layers[i] = QuantizedLinear(coded)
    compiler, module = rewritten(
        model, torch.randn(1, 256), cpu, tolerance=0.6, objective="memory", calibrated=False
    )
    assert compiler.plan.notes == [
        "already quantised: 2 layers as 4-bit symmetric g64, 4.25 bits per weight: layers.{0-1}"
    ]
    calls = module.graph.find_nodes(op="call_function", target=QUANTIZED_LINEAR.overload)
    assert len(calls) == 3
    assert [d.at.partition(":")[0] for d in compiler.plan.applied] == ["layers.2"]


def test_it_is_one_of_the_passes():
    assert PASSES.index(SHIFT_ADD) == PASSES.index(QUANTIZED) + 1


@torch.no_grad()
def test_what_was_chosen_runs_by_kernels_and_keeps_the_tolerance(cpu):
    pytest.importorskip("tvm", reason="CPU kernels are generated by TVM")
    model, x = Stack(layers=2).eval(), torch.randn(1, 256)
    batches = [torch.randn(512, 256) for _ in range(2)]
    fast = ridgeline.optimize(
        model, (x,), target=cpu, tolerance=0.6, calibration=batches, lowering="eager"
    )
    assert {d.variant for d in fast.plan.applied} == {"2-bit binary g128, by lookup"}
    assert [k.backend for k in fast.plan.kernels] == ["tvm"]
    assert not any("reference" in note for note in fast.plan.notes)
    assert (fast(x) - model(x)).norm() <= 0.6 * model(x).norm()


@torch.no_grad()
def test_a_model_that_was_saved_quantised_is_loaded_and_runs_by_kernels(cpu, tmp_path):
    pytest.importorskip("tvm", reason="CPU kernels are generated by TVM")
    model, x = Stack(layers=2).eval(), torch.randn(1, 256)
    hessian = 2 * torch.eye(256)
    for i in range(2):
        coded = quantize(model.layers[i].weight, Codec(3, 64, "binary"), hessian)
        model.layers[i] = QuantizedLinear(coded, multiply=torch.int16)
    ridgeline.save_quantized(model, tmp_path, calibrated_on="noise")
    back = ridgeline.load_quantized(Stack(layers=2).eval(), tmp_path)
    fast = ridgeline.optimize(back, (x,), target=cpu, lowering="eager")
    assert [k.backend for k in fast.plan.kernels] == ["tvm"]
    (note,) = fast.plan.notes
    assert note.startswith("already quantised: 2 layers as 3-bit binary g64, 3.75 bits per weight")
    assert (fast(x) - model(x)).norm() <= 1e-4 * model(x).norm()
