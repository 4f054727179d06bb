"""The drop-in copy: equal results, graphs reused, the caller's module untouched."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ridgeline.codegen.inductor_inputs import InputMismatch
from ridgeline.ir.capture import CaptureError
from ridgeline.ir.program import Program
from ridgeline.passes.compile_program import CompileProgram
from ridgeline.passes.drop_in import OptimizedModule, optimized_copy


class _Notes:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


class _Identity(CompileProgram):
    """Lowering that runs each program as captured."""

    def __init__(self) -> None:
        self.plan = _Notes()
        self.released: list[Program] = []
        self.forgotten = 0

    def __call__(self, program: Program) -> Any:
        return program.module

    def stale(self) -> bool:
        return False

    def forget(self) -> None:
        self.forgotten += 1

    def release(self, program: Program) -> None:
        self.released.append(program)


def _copy(model: nn.Module, **options: Any) -> OptimizedModule:
    return optimized_copy(model, _Identity(), **options)


class _Keyed(nn.Module):
    def forward(self, d: dict[str, Tensor], scale: float | None = 2.0) -> dict[str, Tensor]:
        x = d["x"] if "x" in d else d["y"] * 10
        return {"out": x if scale is None else x * scale}


class _Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x


class _Boxed(nn.Module):
    def forward(self, x: Tensor, box: Any) -> Tensor:
        return x * box.value


class _Box:
    def __init__(self, value: float) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "box"


def test_capturing_ahead_refuses_as_a_call_does() -> None:
    with torch.no_grad():
        fast, x = _copy(_Branch().eval()), torch.ones(3, 4)
        fast.capture(x)
        assert "x.sum().item()" in "".join(fast.fallbacks.values())
        assert torch.equal(fast(x), 2 * x)
        with pytest.raises(CaptureError, match="values of a tensor"):
            _copy(_Branch().eval(), strict=True).capture(x)


@pytest.mark.parametrize("change", ["to", "data", "assign"])
@torch.no_grad()
def test_weights_that_move_are_noticed(change: str) -> None:
    model, x = nn.Linear(4, 4).eval(), torch.randn(3, 4)
    fast = _copy(model)
    fast(x)
    if change == "to":
        model.to(torch.float64)
        x = x.double()
    elif change == "data":
        model.weight.data = torch.ones(4, 4)
    else:
        fast.weight = nn.Parameter(torch.ones(4, 4))
        model.weight = fast.weight
    assert torch.equal(fast(x), model(x))
    assert fast._ridgeline.compile_program.forgotten == 1


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0
        self.layer = nn.Linear(3, 3)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.factor + self.shift


@torch.no_grad()
def test_what_is_replaced_in_the_copy_is_noticed() -> None:
    fast, x = _copy(_Scaled().eval()), torch.randn(2, 3)

    def holds() -> bool:
        return torch.equal(fast(x), fast.layer(x) * fast.factor + fast.shift)

    assert holds()
    fast.factor = 5.0
    assert holds()
    fast.shift = fast.shift * 3
    assert holds()
    fast.layer = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    assert holds()
    assert fast.captures == 4


class _Selects(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x[:, 0] > 0] * 2


@torch.no_grad()
def test_sizes_that_depend_on_values_run_the_original_code() -> None:
    fast, x = _copy(_Selects().eval()), torch.tensor([[1.0, 2.0], [-1.0, 3.0]])
    assert torch.equal(fast(x), torch.tensor([[2.0, 4.0]]))
    assert "depends on the values of a tensor" in "".join(fast.fallbacks.values())


@torch.no_grad()
def test_graphs_beyond_the_limit_are_released_oldest_first() -> None:
    fast = _copy(_Keyed().eval(), max_graphs=2)
    for scale in (1.0, 2.0, 3.0):
        fast({"x": torch.ones(3)}, scale=scale)
    assert (fast.captures, len(fast._ridgeline.compile_program.released)) == (3, 1)


@torch.no_grad()
def test_alternating_strides_compile_once_each() -> None:
    class Strict(_Identity):
        def __call__(self, program: Program) -> Any:
            strides = program.inputs[0].stride()

            def run(x: Tensor) -> Any:
                if x.stride() != strides:
                    raise InputMismatch("strides")
                return program.module(x)

            return run

    model = nn.Linear(4, 4).eval()
    fast = optimized_copy(model, Strict())
    x = torch.randn(3, 4)
    for _ in range(4):
        for given in (x, x.t().contiguous().t()):
            assert torch.equal(fast(given), model(given))
    assert fast.captures == 2


@torch.no_grad()
def test_autocast_has_a_graph_of_its_own() -> None:
    model, x = nn.Linear(4, 4).eval(), torch.randn(3, 4)
    fast = _copy(model)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, expected = fast(x), model(x)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected)
        assert torch.equal(fast(x), model(x))
    assert (fast.captures, fast.fallbacks) == (2, {})


@torch.no_grad()
def test_the_signature_holds_structure_and_none() -> None:
    fast, x = _copy(_Keyed().eval()), torch.ones(3, 4)
    assert torch.equal(fast({"x": x})["out"], 2 * x)
    assert torch.equal(fast({"y": x})["out"], 20 * x)
    assert torch.equal(fast({"x": x}, scale=None)["out"], x)


@torch.no_grad()
def test_another_size_reuses_the_graph_and_size_one_does_not() -> None:
    model = nn.Linear(4, 2).eval()
    fast = _copy(model)
    for rows in (3, 7, 1):
        x = torch.randn(rows, 4)
        assert torch.equal(fast(x), model(x))
    assert fast.captures == 2


@torch.no_grad()
def test_opaque_arguments_run_the_original_code() -> None:
    fast, x = _copy(_Boxed().eval()), torch.ones(3, 4)
    for value in (1.0, 5.0):
        assert torch.equal(fast(x, _Box(value)), value * x)
    assert fast.captures == 0
    assert len(fast.fallbacks) == 1


@torch.no_grad()
def test_data_dependent_branches_fall_back_or_raise() -> None:
    fast, x = _copy(_Branch().eval()), torch.ones(3, 4)
    assert torch.equal(fast(x), 2 * x)
    assert torch.equal(fast(-x), -x)
    (reason,) = fast.fallbacks.values()
    assert "x.sum().item()" in reason
    with pytest.raises(CaptureError, match="values of a tensor"):
        _copy(_Branch().eval(), strict=True)(x)


def test_the_callers_module_is_never_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    model[2].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fast = _copy(model)
    with torch.no_grad():
        fast(torch.randn(8, 4))
    fast.eval()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert fast[0].weight is model[0].weight


@torch.no_grad()
def test_a_submodules_mode_is_part_of_the_signature() -> None:
    fast, x = _copy(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()), torch.ones(64, 4)
    fast(x)
    fast[1].train()
    assert (fast(x) == 0).any()


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.slow
def test_generate_gives_equal_tokens(cache: str | None) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=99, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    fast = _copy(model)
    assert isinstance(fast, transformers.LlamaForCausalLM)
    for length in (7, 11):
        ids = torch.randint(3, 99, (2, length))
        mask = torch.ones_like(ids)
        mask[0, :3] = 0  # left padding
        options = {
            "attention_mask": mask, "max_length": 16, "do_sample": False, "pad_token_id": 0,
            "cache_implementation": cache,
        }  # fmt: skip
        assert torch.equal(fast.generate(ids, **options), model.generate(ids, **options))
    assert (fast.captures, fast.fallbacks) == (2, {})
