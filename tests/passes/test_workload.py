"""`optimize(phase=, batch=, context=)`: rewrites chosen for sizes other than the example's."""

import pytest
import torch
from torch import nn

from ridgeline import optimize
from ridgeline.cost_model import InfeasibleChoice, Lifetimes, Replaced, load_target
from ridgeline.ir.capture import capture
from ridgeline.passes.merged_linear import MERGED_LINEAR
from ridgeline.passes.quantized_linear import QUANTIZED
from ridgeline.passes.workload import Workload, WorkloadError, lifetimes, sizes_of, state_bytes

transformers = pytest.importorskip("transformers")


class Pair(nn.Module):
    """Two layers of one input: on a GPU one product at few rows, two at many."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(512, 512, bias=False) for _ in range(2))

    def forward(self, x):
        return self.a(x) * self.b(x)


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def rewrites(fast):
    return sorted({d.rewrite for d in fast.plan.applied})


OPTIONS = {"target": "a100", "lowering": "eager", "passes": (MERGED_LINEAR,)}


@torch.no_grad()
def test_another_batch_chooses_other_rewrites_for_the_same_inputs():
    torch.manual_seed(0)
    model, x = Pair().eval().bfloat16(), torch.randn(4, 512).bfloat16()
    few, many = (optimize(model, (x,), batch=b, **OPTIONS) for b in (2, 262144))
    assert (rewrites(few), rewrites(many)) == (["merged_linear"], [])
    assert "forward: rewrites are chosen, and times predicted, for batch 262144" in many.plan.notes
    predicted = [fast.plan.predicted["forward"]["before"]["flops"] for fast in (few, many)]
    assert predicted[1] == predicted[0] * 131072
    for fast in (few, many):
        torch.testing.assert_close(fast(x), model(x), atol=0.1, rtol=0.05)
        assert fast.captures == 1


@torch.no_grad()
def test_one_artifact_holds_phases_chosen_for_numbers_of_their_own():
    model = llama()
    ids = torch.randint(3, 96, (2, 9))
    fast = optimize(
        model, target="a100", lowering="eager", tolerance=0.3, passes=(QUANTIZED,),
        batch={"prefill": 1, "decode": 8}, context={"decode": 4096},
    )  # fmt: skip
    text = fast.generate(ids, max_new_tokens=4, do_sample=False)
    assert text.shape == (2, 13)
    assert {"prefill", "decode"} <= fast.plan.predicted.keys()
    notes = " / ".join(fast.plan.notes)
    assert "prefill: rewrites are chosen, and times predicted, for batch 1 and context 9" in notes
    assert "decode: rewrites are chosen, and times predicted, for batch 8 and context 4096" in notes


@torch.no_grad()
def test_a_phase_alone_leaves_the_other_as_captured():
    workload = Workload(batch=8, context=100, phase="decode")
    assert workload.of("decode") == (8, 100)
    assert workload.of("prefill") == (None, None)
    assert Workload(batch=8).of("forward") == (8, None)
    assert Workload(context={"decode": 3}).of("prefill") == (None, None)


@torch.no_grad()
def test_a_fixed_batch_decides_as_it_is_and_the_plan_says_so():
    model, x = Pair().eval().bfloat16(), torch.randn(1, 512).bfloat16()
    fast = optimize(model, (x,), batch=64, **OPTIONS)
    assert rewrites(fast) == ["merged_linear"]
    assert any("batch 1 fixed" in note and "batch=64 was asked" in note for note in fast.plan.notes)


@torch.no_grad()
def test_the_caches_of_that_context_take_memory():
    model, cache = llama(), transformers.DynamicCache(config=llama().config)
    model(torch.ones(2, 5, dtype=torch.long), past_key_values=cache)
    call = {"input_ids": torch.ones(2, 1, dtype=torch.long), "past_key_values": cache}
    program = capture(model, (), call).program
    sizes = sizes_of(program, 16, 1000)
    assert (sizes.batch, sizes.context, sizes.fixed) == (16, 1000, ())
    from ridgeline.ir.sizes import sizes_at

    with sizes_at(sizes.values):
        assert state_bytes(program) == 2 * 2 * 16 * 2 * 1001 * 32 * 4
        old = 2 * 2 * 16 * 2 * 1000 * 32 * 4  # held until all of the new ones are handed over
        held = lifetimes(program.module.graph, program.results)
        assert len(held.kept) == 4
        without = Lifetimes(held.graph, held.elsewhere).live_bytes(load_target("a100"))
        assert (held.live_bytes(load_target("a100")) == without + old).all()
        assert (held.live_bytes(load_target("a100"), [_a_site(held.graph)]) >= old).all()
    too_many = 2 * load_target("a100").memory_bytes // (2 * 2 * 2 * 32 * 4)
    with pytest.raises(InfeasibleChoice, match="and the device"):
        optimize(model, (), call, target="a100", lowering="eager", batch=2, context=too_many)


def _a_site(graph):
    node = graph.find_nodes(op="call_function", target=torch.ops.aten.silu.default)[0]
    return Replaced((node,), (node,))


@torch.no_grad()
def test_caches_updated_in_place_are_there_once():
    model = llama()
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    model(torch.ones(2, 5, dtype=torch.long), past_key_values=cache)
    call = {"input_ids": torch.ones(2, 1, dtype=torch.long), "past_key_values": cache}
    program = capture(model, (), call).program
    assert state_bytes(program) >= 2 * 2 * 2 * 2 * 64 * 32 * 4
    assert not lifetimes(program.module.graph, program.results).kept


@torch.no_grad()
def test_the_plan_counts_caches_old_and_new():
    model, cache = llama(), transformers.DynamicCache(config=llama().config)
    model(torch.ones(2, 1000, dtype=torch.long), past_key_values=cache)
    old = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    call = {"input_ids": torch.ones(2, 1, dtype=torch.long), "past_key_values": cache}
    (figures,) = optimize(model, (), call, target="h100", lowering="eager").plan.predicted.values()
    after = figures["after"]  # whose attention stores no scores
    assert after["state_bytes"] == old // 1000 * 1001
    assert old < after["live_bytes"] < 1.1 * old


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phase": "train", "batch": 1}, "phase is 'train'; choose one of prefill, decode"),
        ({"phase": "decode"}, "neither batch nor context"),
        ({"batch": 0}, "batch is 0; pass an integer of at least 1"),
        ({"context": -4}, "context is -4"),
        ({"batch": 2.5}, "batch is 2.5"),
        ({"batch": True}, "batch is True"),
        ({"batch": {"decode": 0}}, "batch is 0"),
        ({"batch": {"sampling": 3}}, "by phase, name some of"),
        ({"batch": {}}, "by phase, name some of"),
        ({"batch": {"decode": 3}, "phase": "decode"}, "leave phase= out"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(WorkloadError, match=message):
        optimize(Pair().eval(), **OPTIONS, **options)
