"""Where ridgeline keeps files between runs."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$RIDGELINE_CACHE_DIR`, or ~/.cache/ridgeline; it need not exist yet."""
    folder = os.environ.get("RIDGELINE_CACHE_DIR")
    return Path(folder) if folder else Path.home() / ".cache" / "ridgeline"
