"""What gloo takes here: measured by all ranks together, kept, and the same on all."""

from pathlib import Path

import pytest

from gloo import on_ranks
from gloo.transports import probed
from ridgeline.cost_model.transport import KINDS, Transport


def test_a_transport_is_measured_once(tmp_path: Path) -> None:
    first, second = on_ranks(2, probed, str(tmp_path))
    assert first == second, (first, second)
    assert first["same"]
    assert first["kept"]["world"] == 2
    assert all(seconds > 0 for seconds in first["seconds"])


def test_a_line_through_two_messages() -> None:
    own = Transport(2, dict.fromkeys(KINDS, 1e-4), dict.fromkeys(KINDS, 1e-9))
    assert own.seconds("all_reduce", 1e6) == pytest.approx(1.1e-3)
    assert "all_reduce 100 us + 1.00 GB/s" in str(own)
    with pytest.raises(KeyError):
        own.seconds("broadcast", 1)
