"""Shared fixtures."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from ridgeline.cost_model import probe, record
from ridgeline.cost_model.host_times import ProbeSizes
from ridgeline.cost_model.target import parse_target
from ridgeline.ir.normalize import normalize
from ridgeline.tools.allocator import keep_freed_memory


def pytest_configure() -> None:
    keep_freed_memory()  # faults of fresh pages take some tests a sixth of their time


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/golden/*.txt instead of comparing"
    )
    parser.addoption(
        "--generate",
        type=int,
        default=None,
        metavar="N",
        help="N random spellings and N random traps of each meaning, other ones at each run",
    )


@pytest.fixture(autouse=True, scope="session")
def steady_cpu() -> Iterator[None]:
    """The host's instruction sets with the figures of a quiet machine without AMX, for which torch
    has attention of its own: what the tests decide for "cpu" must not hang on who else is using it,
    nor on which of these machines it is."""
    figures = {
        "cores": 2,
        "threads": 2,
        "memory_gb": 64,
        "bandwidth_gb_per_s": 40.0,
        "cache_bandwidth_gb_per_s": [350.0, 350.0, 350.0],
        "cache_kib": [64, 2048, 32768],
        "launch_us": 2.5,
        "fork_us": 0.7,
        "spread": 0.02,
        "peaks_tflops": {"float32": 0.2, "bfloat16": 0.44, "int8": 0.87},
    }
    light = ProbeSizes(gemm=64, dram_bytes=2**16, rounds=2, repeats=1, seconds=1e-4)
    probed = probe.probe(light)
    figures["features"] = [f for f in probed["features"] if not f.startswith("amx")]
    host = parse_target(probed | figures, "the tests")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(record.SWITCH, "0")  # the machine's own log is none of theirs
        patch.setattr(probe, "probe_host", functools.wraps(probe.probe_host)(lambda: host))
        yield


@pytest.fixture(autouse=True)
def _no_hidden_defect(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """ridgeline goes on without a pass that stops with an error; its tests do not. A test that
    expects a defect clears `caplog`."""
    yield
    hidden = [r.getMessage() for r in caplog.get_records("call") if "a defect of" in r.getMessage()]
    assert not hidden, hidden


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """(name, text): the text is that of tests/golden/NAME.txt."""

    def check(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"no {path}: run pytest with --update-golden and review it"
        assert text == path.read_text()

    return check


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


@pytest.fixture
def normal_form() -> Callable[..., fx.GraphModule]:
    """(function or module, *args, dynamic=None) -> its graph in normal form, parameters lifted."""

    def build(function: Callable[..., Any], *args: Any, dynamic: Any = None) -> fx.GraphModule:
        module = function if isinstance(function, nn.Module) else _Function(function)
        shapes = {"args": dynamic} if isinstance(module, _Function) and dynamic else dynamic
        exported = torch.export.export(module, args, dynamic_shapes=shapes, strict=False)
        return normalize(exported.graph_module)

    return build
