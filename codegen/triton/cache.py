"""Compiled kernels on disk, keyed by everything that their code depends on."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def folder() -> Path:
    """$RIDGELINE_CACHE_DIR/triton, or ~/.cache/ridgeline/triton."""
    root = os.environ.get("RIDGELINE_CACHE_DIR")
    return (Path(root) if root else Path.home() / ".cache" / "ridgeline") / "triton"


def key(**parts: Any) -> str:
    """A file name from the canonical JSON of `parts`."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def load(name: str) -> tuple[dict[str, Any], bytes] | None:
    """(record, binary) stored under `name`, or None."""
    record, binary = folder() / f"{name}.json", folder() / f"{name}.bin"
    try:
        found = json.loads(record.read_text()), binary.read_bytes()
    except FileNotFoundError:
        return None
    # A record is written after its binary; a digest guards against any other mixture.
    return found if hashlib.sha256(found[1]).hexdigest() == found[0]["sha256"] else None


def store(name: str, record: dict[str, Any], binary: bytes) -> None:
    """Writes both files atomically: a reader sees the old entry, the new one, or none."""
    folder().mkdir(parents=True, exist_ok=True)
    record = {**record, "sha256": hashlib.sha256(binary).hexdigest()}
    _replace(folder() / f"{name}.bin", binary)
    _replace(folder() / f"{name}.json", json.dumps(record).encode())


def _replace(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    Path(temporary).replace(path)
