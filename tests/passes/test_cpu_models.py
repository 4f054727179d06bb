"""Whole models of transformers on the CPU, compiled: the kernels ran, and the outputs are right."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ridgeline.codegen import lower as lowering
from ridgeline.passes import optimize
from ridgeline.passes.drop_in import OptimizedModule

transformers = pytest.importorskip("transformers")
pytest.importorskip("tvm")

# Inductor warns of its own parts when it is first imported; as an error it would not compile.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LAYERS = 1
IMAGE = 32
"""Pixels along a side: 65 tokens, enough for the kernel to pay without a causal mask."""
_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS}
_BUILD = {
    "llama": lambda **options: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **_SIZES, num_attention_heads=4, num_key_value_heads=2, vocab_size=99,
            max_position_embeddings=64, **options,
        )
    ),
    "gpt2": lambda **options: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=64, n_layer=LAYERS, n_head=4, vocab_size=99, n_positions=64,
            bos_token_id=1, eos_token_id=2, **options,
        )
    ),
    "bert": lambda **options: transformers.BertModel(
        transformers.BertConfig(
            **_SIZES, num_attention_heads=4, vocab_size=99, max_position_embeddings=64, **options
        )
    ),
    "vit": lambda **options: transformers.ViTModel(
        transformers.ViTConfig(
            **_SIZES, num_attention_heads=4, image_size=IMAGE, patch_size=4, **options
        )
    ),
}  # fmt: skip


@pytest.fixture
def compiled_graphs(monkeypatch) -> Iterator[list[torch.fx.GraphModule]]:
    """The graphs that Inductor was given to compile."""
    graphs: list[torch.fx.GraphModule] = []
    compile_graph = lowering.compile_graph

    def record(module: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        graphs.append(module)
        return compile_graph(module, *args, **kwargs)

    monkeypatch.setattr(lowering, "compile_graph", record)
    with torch.no_grad():
        yield graphs


def _made(name: str, implementation: str) -> tuple[nn.Module, nn.Module]:
    """(the model in float32, the same in float64)."""
    both = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = _BUILD[name](attn_implementation=implementation).eval()
        for parameter in model.parameters():  # attention far from uniform
            if parameter.dim() == 2:
                parameter.mul_(4)
        both.append(model.to(dtype))
    return both[0], both[1]


def _assert_close(got: Tensor, model: Tensor, exact: Tensor) -> None:
    """At most three times as far from float64 as the model itself in float32, or 1e-6."""

    def distance(x: Tensor) -> float:
        return ((x - exact).norm() / exact.norm()).item()

    assert got.dtype == torch.float32
    assert got.shape == exact.shape
    assert distance(got) <= max(3 * distance(model), 1e-6)


def _assert_attention_ran(fast: OptimizedModule, graphs: list[torch.fx.GraphModule]) -> None:
    """Each graph holds one kernel call for each layer, and no attention in another form."""
    applied = [d for d in fast.plan.applied if d.rewrite == "flash_attention"]
    assert len(applied) == LAYERS * fast.captures
    assert (fast.fallbacks, fast.plan.notes) == ({}, [])
    assert "tvm" in {k.backend for k in fast.plan.kernels if k.op == "ridgeline::attention"}
    assert len(graphs) == fast.captures
    for module in graphs:
        targets = [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
        assert targets.count("ridgeline.tvm_attention.default") == LAYERS
        assert not {t for t in targets if "softmax" in t or "scaled_dot_product" in t}


def _inputs(name: str, batch: int, length: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)}
    mask = torch.ones(batch, length, dtype=torch.long)
    if name == "bert":  # the batch's first sequence is shorter
        mask[0, length - 2 :] = 0
    ids = torch.randint(3, 99, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask} | (
        {} if name == "bert" else {"use_cache": False}
    )


def _widened(inputs: dict[str, Any]) -> dict[str, Any]:
    floating = {k for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return {k: v.double() if k in floating else v for k, v in inputs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", _BUILD)
def test_models(name, implementation, compiled_graphs):
    model, exact = _made(name, implementation)
    fast = optimize(model, (), _inputs(name, 3, 9), target="cpu")
    for batch, length in ((3, 9), (2, 14)):  # the second runs in the graph compiled for the first
        inputs = _inputs(name, batch, length)
        got, expected, truth = fast(**inputs), model(**inputs), exact(**_widened(inputs))
        assert type(got) is type(expected)
        rows = inputs["attention_mask"].bool() if name == "bert" else slice(None)
        _assert_close(got[0][rows], expected[0][rows], truth[0][rows])
    assert fast.captures == 1
    _assert_attention_ran(fast, compiled_graphs)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding(cache, compiled_graphs):
    model, exact = _made("llama", "sdpa")
    fast = optimize(model, target="cpu")
    ids = _inputs("llama", 2, 7)["input_ids"]

    def steps(run: nn.Module) -> list[Tensor]:
        """Logits [2,V] after the prompt and after each of five tokens, the same for each model."""
        states = (
            transformers.StaticCache(config=model.config, max_cache_len=16)
            if cache == "static"
            else transformers.DynamicCache()
        )
        found = []
        for start, end in ((0, 7), *((n, n + 1) for n in range(7, 12))):
            given = torch.cat((ids, ids), dim=1)[:, start:end].contiguous()
            out = run(
                input_ids=given,
                past_key_values=states,
                use_cache=True,
            )
            assert out.past_key_values is states
            assert states.get_seq_length() == end
            found.append(out.logits[:, -1])
        return found

    for got, expected, truth in zip(steps(fast), steps(model), steps(exact), strict=True):
        _assert_close(got, expected, truth)
    # A dynamic cache holds other strides after the prompt than after a token.
    assert fast.captures <= (2 if cache == "static" else 3)
    assert {d.phase.split()[0] for d in fast.plan.applied} == {"prefill", "decode"}
    _assert_attention_ran(fast, compiled_graphs)
