"""What a rank says of its transport."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ridgeline.cost_model import transport
from ridgeline.cost_model.transport import KINDS, transport_of, transport_path


def probed(folder: str) -> dict[str, Any]:
    """Measured, kept by this rank where `folder` is; asked for again, and once more without it."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RIDGELINE_CACHE_DIR", str(Path(folder) / str(dist.get_rank())))
    patch.setattr(transport, "STEADY", float("inf"))
    first, again = (transport_of(dist.group.WORLD) for _ in range(2))
    kept = json.loads(transport_path(dist.group.WORLD).read_text())
    if dist.get_rank() == 1:
        transport_path(dist.group.WORLD).write_text("{")
    return {
        "same": first == again == transport_of(dist.group.WORLD),
        "kept": kept,
        "seconds": [first.seconds(kind, 2**20) for kind in KINDS],
    }
