"""Work as a function of the free sizes: equal to what a capture at those sizes counts, and to
torch's counter of FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ridgeline.cost_model import work_of_graph
from ridgeline.ir.capture import capture
from ridgeline.ir.sizes import UnknownSize, number, sizes_at
from ridgeline.ir.symbolic import shape_of

transformers = pytest.importorskip("transformers")
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "tie_word_embeddings": True,
}  # fmt: skip
TINY = {**SMOLLM2, "num_hidden_layers": 2, "vocab_size": 96}


def llama(**settings):
    config = transformers.LlamaConfig(**settings, attn_implementation="eager")
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config).eval()


def ids(batch, length):
    return torch.zeros(batch, length, dtype=torch.long, device="meta")


def cache(model, batch, past):
    config = model.config
    filled = transformers.DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        shape = batch, config.num_key_value_heads, past, config.head_dim
        filled.update(*(torch.empty(shape, device="meta") for _ in range(2)), layer)
    return filled


def program(model, inputs, **kwargs):
    with torch.no_grad():
        return capture(model, (inputs,), {"use_cache": False, **kwargs}).program


def symbols(program):
    """Of the first input's two dimensions, as far as they are free."""
    node = program.module.graph.find_nodes(op="placeholder")[0]
    return [s for s in shape_of(node) if not s.is_Integer]


def matrix_flops(graph):
    return sum(n for (unit, _), n in work_of_graph(graph).flops.items() if unit == "matrix")


def test_a_prefill_at_other_sizes_counts_as_captured_there():
    model = llama(**TINY)
    free = program(model, ids(3, 17))
    batch, length = symbols(free)
    with sizes_at({batch: 5, length: 40}):
        asked = work_of_graph(free.module.graph)
    fixed = work_of_graph(program(model, ids(5, 40)).module.graph)
    assert asked == fixed
    assert asked != work_of_graph(free.module.graph)


def test_a_decode_step_at_other_sizes_counts_as_captured_there():
    model = llama(**TINY)

    def step(batch, past):
        call = {"past_key_values": cache(model, batch, past), "use_cache": True}
        return program(model, ids(batch, 1), **call)

    free = step(3, 17)
    held = free.module.graph.find_nodes(op="placeholder")[1]
    batch, past = (s for s in shape_of(held) if not s.is_Integer)
    with sizes_at({batch: 64, past: 1000}):
        asked = work_of_graph(free.module.graph)
    assert asked == work_of_graph(step(64, 1000).module.graph)


def test_the_products_of_smollm2_equal_torchs_counter():
    model = llama(**SMOLLM2)
    free = program(model, ids(3, 17))
    model.to_empty(device="cpu")  # transformers reads the positions that it makes
    for batch, length in ((2, 33), (4, 16)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(batch, length, dtype=torch.long), use_cache=False)
        with sizes_at(dict(zip(symbols(free), (batch, length), strict=True))):
            assert matrix_flops(free.module.graph) == counter.get_total_flops()


def test_the_products_of_a_vit_equal_torchs_counter():
    config = transformers.ViTConfig(num_hidden_layers=3, attn_implementation="eager")
    with torch.device("meta"):
        model = transformers.ViTModel(config).eval()
    image = torch.zeros(4, 3, 224, 224, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    with torch.no_grad():
        free = capture(model, (image[:2],), {}).program
    with sizes_at({symbols(free)[0]: 4}):
        assert matrix_flops(free.module.graph) == counter.get_total_flops()


def test_a_size_without_a_value_is_refused():
    free = program(llama(**TINY), ids(3, 17))
    batch, length = symbols(free)
    with pytest.raises(UnknownSize, match=f"a value for {length}"), sizes_at({batch: 2}):
        work_of_graph(free.module.graph)
    shape = free.module.graph.find_nodes(op="placeholder")[0].meta["val"].shape
    assert [number(s) for s in shape] == [3, 17]
