"""A name for the code of ridgeline itself, for caches of what was compiled with it."""

import functools
import hashlib
from pathlib import Path


@functools.cache
def code_version() -> str:
    """Changes with every change of an op's law, its layout or its kernels.

    Inductor keeps compiled graphs on disk by their nodes; what an op of ours does, and how its
    result lies in memory, is not among what it looks at.
    """
    digest = hashlib.sha256()
    for folder in ("ir", "codegen"):
        for path in sorted((Path(__file__).parents[1] / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return f"ridgeline-{digest.hexdigest()[:16]}"
