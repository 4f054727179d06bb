"""Shared fixtures."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from ridgeline.ir.normalize import normalize


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
