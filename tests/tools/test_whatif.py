"""`ridgeline whatif`: decisions and flips per target, without weights; options without sense."""

import dataclasses
import functools
import io
import json
import re

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

from ridgeline.cost_model import load_target
from ridgeline.ir.capture import capture
from ridgeline.passes import PASSES
from ridgeline.passes.what_if import Answer, Firing, WhatIf
from ridgeline.passes.workload import Sizes, WorkloadError
from ridgeline.tools import whatif
from ridgeline.tools.cli import app
from ridgeline.tools.whatif_flips import Ranges, flips
from ridgeline.tools.whatif_model import QuestionError, spans
from ridgeline.tools.whatif_table import flip_lines, host_lines, letter, refusal_lines, said

pytest.importorskip("transformers")
LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "vocab_size": 32000,
}  # fmt: skip
TARGETS = "a100", "h100", "mi300x", "cpu"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    """Two layers of a 7B-class Llama."""
    file = tmp_path_factory.mktemp("config") / "config.json"
    file.write_text(json.dumps({**LLAMA_7B, "num_hidden_layers": 2}))
    return str(file)


@pytest.fixture(scope="module")
def questions(config) -> whatif.Questions:
    return whatif.Questions(whatif.Request(config, TARGETS))


# -- decisions and flips per target ----------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_decisions_and_flips_of_a_7b_layer(golden, questions, phase, target):
    lines = []
    for context in (1024, 32768):
        for batch in (1, 8, 64):
            answer = questions.ask(phase, target, batch, context)
            fires = "; ".join(said(n, f) for n, f in answer.firing.items() if f.made)
            fires = (fires or "nothing") if answer.fits else "does not fit"
            lines.append(f"context {context}, batch {batch}: {fires}")
    found = flips(lambda batch: questions.ask(phase, target, batch, 1024), 256)
    lines += [f"context 1024: {name}: {ranges}" for name, ranges in found.items()]
    golden(f"whatif_{phase}_{target}", "\n".join(lines) + "\n")


def test_a_flip_is_where_the_decision_changes(questions):
    found = flips(lambda batch: questions.ask("decode", "a100", batch, 1024), 512)
    ((first, last),) = found["quantized_linear"].fires
    assert first == 1
    assert 1 < last < 512
    most = [
        questions.ask("decode", "a100", batch, 1024).firing["quantized_linear"].most
        for batch in (last, last + 1)
    ]
    assert most == [True, False]


@torch.no_grad()
def test_the_answer_is_what_optimize_chooses_on_a_real_program():
    """A capture at those sizes, weighed with its values, chooses the same exact rewrites."""
    from ridgeline.passes.compiler import Compiler

    transformers = pytest.importorskip("transformers")
    settings = {**LLAMA_7B, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1,
                "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()

    def step(batch: int, length: int):
        return capture(model, (torch.ones(batch, length, dtype=torch.long), None)).program

    free = WhatIf(step(3, 17), [p for p in PASSES if p.exactness != "approximate"])
    for target, batch, length in (("a100", 2, 64), ("h100", 16, 128), ("l4", 5, 300)):
        answer = free.at(load_target(target), batch, length)
        compiler = Compiler(target, passes=PASSES)
        compiler.rewrite(step(batch, length))
        chosen = {d.rewrite for d in compiler.plan.applied}
        assert {name for name, firing in answer.firing.items() if firing.made} == chosen


def test_a_7b_needs_no_weights(questions):
    answer = questions.ask("decode", "a100", 8, 1024)
    kv = 2 * 2 * 8 * 32 * (1024 + 1) * 128 * 2  # layers, k and v, batch, heads, tokens, size, bytes
    assert answer.state == kv
    parameters = 2 * 32000 * 4096 + 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    assert answer.weights[0] == pytest.approx(2 * parameters, rel=1e-3)
    assert answer.weights[1] < answer.weights[0] / 2
    assert answer.after.seconds < answer.before.seconds
    for program in (questions.what_if(phase)[0].program for phase in questions.phases):
        held = program.module.graph.find_nodes(op="get_attr")
        devices = {n.meta["val"].device.type for n in held if n.meta["val"].dim() == 2}
        assert devices == {"meta"}


def test_a_tied_embedding_stays_beside_its_quantised_head(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**LLAMA_7B, "num_hidden_layers": 1, "tie_word_embeddings": True}))
    (span,) = spans(str(file), ("decode",), torch.bfloat16)
    question = WhatIf(span.programs["decode"], PASSES)
    answer = question.at(load_target("l4"), 1, 1024)
    assert answer.firing["quantized_linear"].made == 8
    table, layer = 2 * 32000 * 4096, 4 * 4096**2 + 3 * 4096 * 11008
    bits = 4 + 16 / 128
    expected = table + bits / 8 * (layer + 32000 * 4096)
    assert answer.weights[1] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("context", "windowed"), [(1024, 63), (48, 48)])
def test_caches_of_sliding_windows_end_at_the_window(tmp_path, context, windowed):
    """Gemma 2: every other layer sees 64 tokens, and has 63 before the new one."""
    file = tmp_path / "config.json"
    settings = {
        "model_type": "gemma2", "hidden_size": 64, "intermediate_size": 96, "head_dim": 16,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 96, "sliding_window": 64,
    }  # fmt: skip
    file.write_text(json.dumps(settings))
    asked = whatif.Questions(whatif.Request(str(file), ("h100",), contexts=(context,)))
    token = 2 * 2 * 16 * 2  # keys and values, heads, head size, bytes
    for phase, new in (("prefill", 0), ("decode", 1)):
        held = asked.ask(phase, "h100", 8, context).state
        full = 2 * (context + new)
        window = 2 * (63 if windowed == 63 else context + new)
        assert 0 <= held - 8 * token * (full + window) <= 32  # and each window's counter


WINDOWS = {
    "model_type": "mistral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "sliding_window": 64,
}  # fmt: skip


@pytest.mark.parametrize("mixed", [False, True], ids=["windows alone", "every other layer"])
def test_contexts_on_both_sides_of_a_window_are_answered_as_each_alone(tmp_path, mixed):
    file = tmp_path / "config.json"
    others = {"model_type": "gemma2", "head_dim": 16} if mixed else {}
    file.write_text(json.dumps(WINDOWS | others))

    def asked(*contexts):
        questions = whatif.Questions(whatif.Request(str(file), ("h100",), contexts=contexts))
        return [questions.ask("decode", "h100", 8, context) for context in contexts]

    for one, alone in zip(asked(48, 1024, 4096), (48, 1024, 4096), strict=True):
        (other,) = asked(alone)
        assert (one.before, one.after, one.state) == (other.before, other.after, other.state)
    inside, full, longer = asked(48, 1024, 4096)
    assert inside.state < full.state
    assert (full.state == longer.state) == (not mixed)


def test_a_config_of_no_language_model_is_refused(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(QuestionError, match="BertForMaskedLM"):
        whatif.Questions(whatif.Request(str(file), ("h100",)))


def test_what_does_not_fit_says_so(questions):
    small = dataclasses.replace(load_target("a100"), memory_bytes=10**9)
    answer = questions.what_if("decode")[0].at(small, 8, 32768)
    assert not answer.fits
    assert answer.before is answer.after is None


def test_scores_in_memory_end_what_fits(tmp_path, monkeypatch):
    """Attention that is spelled out, at 64k tokens: 2^32 scores a head, all heads at once."""
    transformers = pytest.importorskip("transformers")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**LLAMA_7B, "num_hidden_layers": 2}))
    build = transformers.AutoModelForCausalLM.from_config
    eager = functools.partial(build, attn_implementation="eager")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", eager)
    (span,) = spans(str(file), ("prefill",), torch.float32, (65536,))
    (program,) = span.programs.values()
    scores = 4 * 32 * 65536**2
    alone, fused = (WhatIf(program, [p for p in PASSES if p.name in names]) for names in
                    ((), ("flash_attention",)))  # fmt: skip
    b200 = load_target("b200")
    assert b200.memory_bytes < scores
    assert not alone.at(b200, 1, 65536).fits
    assert alone.at(b200, 1, 65536).live[0] > scores
    answer = fused.at(b200, 1, 65536)
    assert answer.fits
    assert answer.firing["flash_attention"].made == 2
    assert answer.live[0] > scores > 8 * answer.live[1]
    # No kernel of ours is built for it.
    assert not fused.at(load_target("mi250x"), 1, 65536).fits
    assert alone.at(load_target("mi250x"), 1, 1024).fits
    # Both layers, or neither: half of them frees nothing.
    slow = dataclasses.replace(b200, memory_bytes=fused.weight_bytes + answer.state + scores // 2)
    assert fused.at(slow, 1, 65536).firing["flash_attention"].made == 2


# -- the search ------------------------------------------------------------------------------------


def _asking(fires, limit=10**9):
    asked = []

    def ask(batch: int) -> Answer:
        asked.append(batch)
        cost = "a cost" if batch <= limit else None
        firing = {"p": Firing(10, 10 * fires(batch), {})}
        return Answer(load_target("a100"), Sizes({}), (1, 1), 1, (0, 0), firing, cost, cost)

    return ask, asked


@pytest.mark.parametrize(
    ("fires", "expected"),
    [
        (lambda b: b < 53, "below batch 53"),
        (lambda b: b >= 31, "from batch 31"),
        (lambda b: 5 <= b <= 100, "from batch 5 to 100"),
        (lambda b: b < 3 or b > 77, "below batch 3 and from batch 78"),
        (lambda b: True, "always"),
    ],
)
def test_flips_are_found_to_the_batch(fires, expected):
    ask, asked = _asking(fires)
    assert str(flips(ask, 1024)["p"]) == expected
    assert len(set(asked)) < 40


def test_memory_ends_the_search():
    ask, _ = _asking(lambda b: True, limit=119)
    assert str(flips(ask, 1024)["p"]) == "always, to batch 119, the largest that fits"
    assert flips(_asking(lambda b: True, limit=0)[0], 1024) is None
    assert flips(_asking(lambda b: False)[0], 1024) == {}
    assert str(Ranges((), 1024, False)) == "never"


# -- programs and options --------------------------------------------------------------------------


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).view(4, 32, 4, 128)


def test_a_fixed_batch_is_refused():
    program = capture(Fixed().eval(), (torch.randn(4, 128, 128),)).program
    with pytest.raises(WorkloadError, match=r"batch 4 fixed.*batch=8 was asked"):
        WhatIf(program, PASSES).at(load_target("a100"), 8, None)


BUILD = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)), (torch.ones(1, 256),)
"""


def test_a_function_is_asked_at_other_batches(tmp_path):
    file = tmp_path / "model.py"
    file.write_text(BUILD)
    (span,) = spans(f"{file}:build", (), torch.bfloat16)
    (phase, program), *others = span.programs.items()
    assert (phase, others) == ("forward", [])
    one, many = (WhatIf(program, PASSES).at(load_target("a100"), b) for b in (1, 4096))
    assert one.before.flops * 4096 == pytest.approx(many.before.flops)
    with pytest.raises(QuestionError, match="has no phase decode; it has forward"):
        spans(f"{file}:build", ("decode",), torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["no-such.json"], "expected a model's config in json"),
        (["smollm2", "--batch", "1,0"], "--batch is '1,0'; expected positive numbers"),
        (["smollm2", "--context", "1m"], "--context is '1m'"),
        (["smollm2", "--batch", "1" + 30 * "0"], "--batch is 1e[+]30; expected 1 to 1048576"),
        (["smollm2", "--batch", "2" * 400], "--batch is .*; expected positive numbers"),
        (["smollm2", "--context", "1048577k"], r"--context is \d+; expected 1 to 1073741824"),
        (["smollm2", "--dtype", "int8"], "--dtype is 'int8'"),
        (["smollm2", "--targets", ""], "at least one target"),
        (["smollm2", "--phase", "training"], "has no phase training; it has prefill, decode"),
        (["smollm2", "--plot", "plot.xyz"], "matplotlib|end it in one of"),
    ],
)
def test_nonsense_is_refused(options, message):
    result = CliRunner().invoke(app, ["whatif", *options])
    assert result.exit_code == 1
    assert re.search(message, " ".join(result.stderr.split()))


def test_the_command_prints_tables_and_flips(config):
    options = [
        "--targets",
        "a100",
        "--batch",
        "1,8",
        "--context",
        "1k",
        "--phase",
        "decode",
        "--largest-batch",
        "2",
    ]
    result = CliRunner().invoke(app, ["whatif", config, *options])
    assert result.exit_code == 0, result.stderr
    assert "decode, context 1k: 4-bit wins (quantized_linear) always on a100" in result.stdout
    assert "decode: rotary: not better: a100: " in result.stdout
    assert re.search(r"-> [\d.]+ µs, doubt [\d.]+ µs \(2 sites, batch 1, 1k\)", result.stdout)
    assert "decode: no site of group_rational" in result.stdout
    assert re.search(r"a100 +8 +1k .* -> .* GB|a100 +8 +1k .* -> .* MB", result.stdout)


def test_the_plot_is_drawn(config, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.png"
    request = whatif.Request(
        config, ("a100", "h100"), (1, 8), (1024,), ("decode",), plot=file, largest=4
    )
    whatif.run(request, *[Console(file=io.StringIO())] * 2)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_targets_share_the_words_of_a_flip():
    found = {
        ("decode", "a100", 1024): {"p": Ranges(((1, 51),), 512, False, "4-bit minimum g32")},
        ("decode", "h100", 1024): {"p": Ranges(((1, 30),), 512, False, "4-bit symmetric g128")},
        ("decode", "l4", 1024): {"p": Ranges(((1, 30),), 512, False, "4-bit symmetric g128")},
        ("decode", "v100", 1024): {"p": Ranges(((1, 9),), 9, True, "4-bit symmetric g128")},
        ("decode", "t4", 1024): None,
        ("decode", "a10", 1024): {},
        ("decode", "cpu", 1024): {"p": Ranges(((1, 512),), 512, False, "4-bit minimum g32")},
    }
    _, fits, line = flip_lines(found, 512)
    assert fits.strip() == (
        "decode, context 1k: the largest batch that fits: 9 on v100, none on t4"
    )
    assert line.strip() == (
        "decode, context 1k: 4-bit wins (p) below batch 52 on a100, 31 on h100 and l4, always on"
        " v100 and cpu, never on a10"
    )
    assert list(host_lines({("decode", t, 8): n for t, n in (("a", 1), ("b", 1), ("c", 4), ("d", 9),
                                                             ("e", 600))}, 512))[1] == (
        "  decode, context 8: never on a and b, below batch 4 on c, 9 on d, always on e"
    )  # fmt: skip


def test_letters():
    assert [letter(n) for n in (0, 25, 26, 52)] == ["A", "Z", "AA", "BA"]


def test_a_heading_stands_above_lines_alone():
    """Of a model in which no pass finds a site."""
    assert not list(flip_lines({("forward", "a100", None): {}}, 512))
    assert not list(refusal_lines([], "latency", {"forward": []}))
    assert len(list(flip_lines({("forward", "a100", None): None}, 512))) == 2
