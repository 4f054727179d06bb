"""Layers that repeat: weighed once, they answer as they do one by one."""

import dataclasses
import json
from collections import Counter

import pytest
import torch

from ridgeline.cost_model import Gemm, Lifetimes, load_target, work_of_graph
from ridgeline.ir.normalize import normalize
from ridgeline.ir.sizes import sizes_at
from ridgeline.passes import PASSES
from ridgeline.passes.base import Setting
from ridgeline.passes.compiler import weight_bytes
from ridgeline.passes.decide import choose
from ridgeline.passes.propose import propose
from ridgeline.passes.room import Room
from ridgeline.passes.unobserved import UnknownWeights, Unobserved
from ridgeline.passes.what_if import ALLOWED, WhatIf
from ridgeline.passes.workload import sizes_of, state, state_bytes
from ridgeline.tools.whatif_model import spans

pytest.importorskip("transformers")
LLAMA = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 5,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512,
}  # fmt: skip
GEMMA = {  # every other layer sees a window of 64 tokens
    "model_type": "gemma2", "hidden_size": 512, "intermediate_size": 1024, "head_dim": 64,
    "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512,
    "sliding_window": 64,
}  # fmt: skip


@pytest.fixture(scope="module", params=[LLAMA, GEMMA], ids=["llama", "gemma2"])
def by_phase(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "config.json"
    file.write_text(json.dumps(request.param))
    return spans(str(file), (), torch.bfloat16, (1024,))[0].programs


def _one_by_one(program, target, batch, context):
    """(outputs made by pass, weights held, gain) of a choice over every site."""
    module, sizes = normalize(program.module), sizes_of(program, batch, context)
    setting = Setting(target, False, ALLOWED, Unobserved(), UnknownWeights())
    with sizes_at(sizes.values):
        candidates, _ = propose(PASSES, module, setting)
        choice = choose(
            candidates,
            target,
            tolerance=ALLOWED,
            objective="latency",
            sensitivity=0.0,
            weight_bytes=weight_bytes(module),
            state_bytes=state_bytes(program),
            room=Room(Lifetimes(module.graph, state(module.graph, program.results)), target),
        )
    made: dict[str, int] = {}
    for c in choice.chosen:
        made[c.rewrite.name] = made.get(c.rewrite.name, 0) + len(c.site.outs)
    held = weight_bytes(module) + sum(c.memory_bytes for c in choice.chosen)
    return made, held, sum(choice.worth[c] for c in choice.chosen)


def _products(work):
    return Counter(kernel for kernel in work.kernels if isinstance(kernel, Gemm))


@pytest.mark.parametrize("target", ["a100", "l4", "cpu"])
def test_the_answer_is_that_of_every_site_by_itself(by_phase, target):
    target = load_target(target)
    for program in by_phase.values():
        question = WhatIf(program, PASSES)
        for batch, context in ((1, 1024), (96, 1024), (7, 4096)):
            answer = question.at(target, batch, context)
            made, held, gain = _one_by_one(program, target, batch, context)
            assert {n: f.made for n, f in answer.firing.items() if f.made} == made
            # Above five hundred options the solver stops a thousandth before the optimum.
            assert answer.weights[1] == pytest.approx(held, rel=2e-3)
            assert answer.before.seconds - answer.after.seconds == pytest.approx(gain, rel=2e-3)
            with sizes_at(answer.sizes.values):
                assert _products(answer.work_before) == _products(work_of_graph(question.graph))
        repeats = question._repeats[target]
        assert max(repeats.counts.values()) >= 3  # layers were taken together at all


def test_layers_of_a_window_are_a_kind_of_their_own(by_phase):
    (first, *_), layers = by_phase.values(), 5
    question = WhatIf(first, PASSES)
    question.at(load_target("a100"), 8, 1024)
    repeats = question._repeats[load_target("a100")]
    sites = {s for f in repeats.found if f.rewrite.name == "flash_attention" for s in f.sites}
    counts = sorted(repeats.counts[site] for site in sites)
    assert counts in ([layers], [3, 3])


def test_where_memory_is_short_some_layers_are_rewritten_and_others_not(by_phase):
    """At a batch where 4 bits lose time, and as much memory as half of them free."""
    program = by_phase["prefill"]
    a100 = load_target("a100")
    question = WhatIf(program, PASSES)
    free = question.at(a100, 256, 1024)
    coded = free.firing["quantized_linear"]
    weights = free.weights[0]
    for kept in (0.95, 0.7, 0.5):
        small = dataclasses.replace(
            a100, memory_bytes=int(free.state + free.live[1] + kept * weights)
        )
        answer = question.at(small, 256, 1024)
        made, held, gain = _one_by_one(program, small, 256, 1024)
        assert answer.weights[1] + answer.state + answer.live[1] <= small.memory_bytes
        assert answer.firing["quantized_linear"].made > coded.made
        assert answer.before.seconds - answer.after.seconds == pytest.approx(gain, rel=5e-3)
        assert held <= small.memory_bytes - answer.state - answer.live[1]
        assert made["quantized_linear"] == pytest.approx(
            answer.firing["quantized_linear"].made, abs=2
        )


def test_what_does_not_fire_says_why_with_both_sides(by_phase):
    answer = WhatIf(by_phase["prefill"], PASSES).at(load_target("a100"), 64, 1024)
    losses = [u for u in answer.unfired if u.name == "quantized_linear" and u.before is not None]
    assert losses
    for u in losses:
        assert u.sites > 0
        assert u.form.startswith("4-bit")
        assert 0 < u.before < answer.before.seconds
        assert u.kind in ("not better", "gain within the doubt") or u.before > u.after
    (uncalibrated,) = {u.kind for u in answer.unfired if u.name == "shift_add_linear"}
    assert "not calibrated" in uncalibrated
