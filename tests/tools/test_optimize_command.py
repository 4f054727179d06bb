"""`ridgeline optimize` in few bits: what it makes, keeps and says, and one line for bad options."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import ridgeline
from ridgeline.passes.quantization.layer import QuantizedLinear
from ridgeline.tools import optimize_command, smollm2
from ridgeline.tools.cli import app

MODEL = """
import torch
from torch import nn


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(96, 64), nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return x @ self.embed.weight.T


def build():
    return Tokens().eval(), (torch.arange(5)[None],)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model file, token ids, and what is no calibration data."""
    torch.manual_seed(0)
    (tmp_path / "tokens.py").write_text(MODEL)
    torch.save(torch.randint(96, (2048,)), tmp_path / "ids.pt")
    torch.save(torch.randint(96, (100,)), tmp_path / "short.pt")
    (tmp_path / "broken.pt").write_text("no zip")
    (tmp_path / "text.txt").write_text("a few words")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty").mkdir()
    return tmp_path


def invoke(folder: Path, *arguments: str):
    model = ("optimize", f"{folder / 'tokens.py'}:build", "--target", "a100")
    return CliRunner().invoke(app, [*model, *arguments])


def test_a_width_is_calibrated_kept_and_verified(folder: Path):
    saved, plan = folder / "kept", folder / "plan.json"
    result = invoke(
        folder, "--bits", "4", "--calibration", f"{folder}/ids.pt", "--save", str(saved),
        "-o", str(plan),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    printed = " ".join(result.stdout.split())
    assert "bits=4: 2 layers of 4 bits" in printed
    assert "already quantised: 2 layers as 4-bit" in printed
    assert "saved the quantised model in" in printed
    content = json.loads(plan.read_text())
    assert (content["few_bits"], content["quantized"]) == (True, str(saved))

    original = optimize_command.load_model_file(f"{folder / 'tokens.py'}:build")
    loaded = ridgeline.load_quantized(original.model, saved)
    coded = [m for m in loaded.modules() if isinstance(m, QuantizedLinear)]
    assert [layer.quantized.bits for layer in coded] == [4, 4]
    assert json.loads((saved / "config.json").read_text())["calibrated_on"] == "ids.pt"

    again = CliRunner().invoke(app, ["verify", str(plan)])
    assert again.exit_code == 0, again.output
    content["quantized"] = None
    plan.write_text(json.dumps(content))
    lost = CliRunner().invoke(app, ["verify", str(plan)])
    assert lost.exit_code == 1
    assert "run optimize with --save" in lost.stderr


def test_without_a_width_data_calibrates_what_the_plan_chooses(folder: Path, monkeypatch):
    seen = []
    compiler = optimize_command.Compiler

    def watched(*args, hessians, **options):
        seen.append(hessians)
        return compiler(*args, hessians=hessians, **options)

    monkeypatch.setattr(optimize_command, "Compiler", watched)
    result = invoke(folder, "--calibration", f"{folder}/ids.pt")
    assert result.exit_code == 0, result.output
    assert {n: tuple(h.shape) for n, h in seen[0].items()} == {
        "up.weight": (64, 64), "down.weight": (128, 128),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--bits 4", "need --calibration FILE"),
        ("--average-bits 3", "need --calibration FILE"),
        ("--bits 5 --calibration {}/ids.pt", "--bits is 5; choose one of (2, 3, 4, 8)"),
        ("--average-bits 5 --calibration {}/ids.pt", "choose 2 to 4"),
        ("--bits 4 --average-bits 3 --calibration {}/ids.pt", "not both"),
        ("--bits 4 --calibration {}/short.pt", "holds 100 tokens; pass at least 2048"),
        ("--bits 4 --calibration {}/broken.pt", "holds no tensors of torch.save"),
        ("--bits 4 --calibration {}/gone.pt", "gone.pt cannot be read: No such file"),
        ("--bits 4 --calibration {}/gone.txt --tokenizer {}", "holds no tokenizer"),
        ("--bits 4 --calibration {}/text.txt", "is a text; pass --tokenizer FOLDER"),
        ("--bits 4 --calibration {}/text.txt --tokenizer {}/no", "no is no folder"),
        ("--bits 4 --calibration {}/text.txt --tokenizer {}/empty", "holds no tokenizer"),
        ("--bits 4 --calibration {}/tokens.py", "should be a text (.txt) or token ids"),
        ("--bits 4 --calibration {}/ids.pt --tokenizer {}", "--tokenizer goes with"),
        ("--calibration {}/ids.pt --save {}/kept", "--save keeps what --bits"),
    ],
)
def test_bad_options_are_one_line_before_any_work(folder, monkeypatch, options: str, said: str):
    if "--tokenizer" in options:
        pytest.importorskip("transformers")
    monkeypatch.setattr(optimize_command, "load_model_file", lambda _: pytest.fail("loaded"))
    result = invoke(folder, *options.replace("{}", str(folder)).split())
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


class Words:
    """A tokenizer of characters, as far as the command uses one."""

    eos_token_id = 0

    def __call__(self, text: str, **options):
        ids = [1 + ord(c) % 95 for c in text]

        class Found(dict):
            input_ids = torch.tensor([ids]) if "return_tensors" in options else ids

        return Found(input_ids=Found.input_ids)

    def apply_chat_template(self, messages, **_):
        return messages[0]["content"]

    def decode(self, ids: Tensor, **_) -> str:
        return "  a line\nof text " + "".join(chr(64 + int(i) % 32) for i in ids)


def test_text_is_read_by_a_tokenizer_and_short_text_is_refused(folder: Path, monkeypatch):
    monkeypatch.setattr(optimize_command, "read_tokenizer", lambda _: Words())
    options = ("--bits", "4", "--calibration", f"{folder}/text.txt", "--tokenizer", str(folder))
    result = invoke(folder, *options)
    assert result.exit_code == 1
    assert "holds 11 tokens; pass at least 2048" in result.stderr
    (folder / "text.txt").write_bytes((folder / "latin.txt").read_bytes())
    assert "is no text in UTF-8" in invoke(folder, *options).stderr
    (folder / "text.txt").write_text("words of many kinds " * 150)
    batches = optimize_command.read_calibration(folder / "text.txt", Words())
    assert [tuple(b.shape) for b in batches] == [(1, 512)] * 5


def test_smollm2_shows_plan_text_and_speed(monkeypatch):
    """A tiny Llama stands in for it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, vocab_size=96, max_position_embeddings=256, eos_token_id=0,
        bos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    monkeypatch.setattr(smollm2, "load_model", lambda dtype=None: model)
    monkeypatch.setattr(smollm2, "load_tokenizer", Words)
    monkeypatch.setattr(smollm2, "calibration_text", lambda: "words of many kinds " * 150)
    rounds = []

    def rates(fast: nn.Module):
        from ridgeline.tools.timing import Spread

        layers = [m for m in fast.modules() if isinstance(m, QuantizedLinear)]
        rounds.append(len(layers))
        return {"compile-fp32": Spread.of([1.0]), "this": Spread.of([2.0])}

    monkeypatch.setattr(optimize_command, "decode_rates", rates)
    monkeypatch.setattr(optimize_command, "SAMPLE_TOKENS", 3)
    options = ["--target", "cpu", "--bits", "3", "--tolerance", "0.01"]
    result = CliRunner().invoke(app, ["optimize", "smollm2", *options])
    assert result.exit_code == 0, result.output
    assert rounds == [7]
    printed = " ".join(result.stdout.split())
    assert "bits=3: 7 layers of 3 bits (binary)" in printed
    assert "plan for cpu" in printed or "decode" in printed
    assert "sample text: a line of text" in printed
    assert "this 2.0" in printed
    assert printed.index("already quantised") < printed.index("sample text")
    assert printed.index("sample text") < printed.index("this 2.0")


def test_the_contenders_are_fp32_four_bits_and_the_result(monkeypatch):
    built = []

    class Session:
        def __init__(self, *args, **kwargs):
            built.append(args)

    def build(name, ids, new, cache, tolerance):
        built.append((name, cache, tolerance))
        return Session()

    monkeypatch.setattr(optimize_command.bench_decode, "prompt_ids", lambda n: torch.zeros(1, n))
    monkeypatch.setattr(optimize_command.bench_decode, "build", build)
    monkeypatch.setattr(optimize_command.bench_decode, "TorchSession", Session)
    monkeypatch.setattr(
        optimize_command.bench_decode, "compare",
        lambda sessions, baseline, rounds: (None, (list(sessions), baseline, rounds)),
    )  # fmt: skip
    monkeypatch.setattr(optimize_command.bench_decode, "rates", lambda timings, tokens: timings)
    fast = nn.Linear(1, 1)
    fast.config = None
    names, baseline, _ = optimize_command.decode_rates(fast)
    assert names == ["compile-fp32", "ridgeline 4 bit", "this"]
    assert baseline == "compile-fp32"
    assert ("ridgeline-fp32", "static", 0.02) in built
