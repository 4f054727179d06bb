"""What gloo takes here: measured by all ranks together, kept, and the same on all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from gloo import on_ranks
from ridgeline.cost_model import transport
from ridgeline.cost_model.transport import KINDS, Transport, transport_of, transport_path


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


def test_a_transport_is_measured_once(tmp_path: Path) -> None:
    first, second = on_ranks(2, probed, str(tmp_path))
    assert "error" not in first, first
    assert first == second
    assert first["same"]
    assert first["kept"]["world"] == 2
    assert all(seconds > 0 for seconds in first["seconds"])


def test_a_line_through_two_messages() -> None:
    own = Transport(2, dict.fromkeys(KINDS, 1e-4), dict.fromkeys(KINDS, 1e-9))
    assert own.seconds("all_reduce", 1e6) == pytest.approx(1.1e-3)
    assert "all_reduce 100 us + 1.00 GB/s" in str(own)
    with pytest.raises(KeyError):
        own.seconds("broadcast", 1)
