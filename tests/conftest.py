"""Shared fixtures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from ridgeline.ir.normalize import normalize


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
