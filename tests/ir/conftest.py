"""What the tests of capture share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ridgeline.ir.call import flatten
from ridgeline.ir.capture import Captured


class _Function(nn.Module):
    """A function of the module and its arguments, as a module."""

    def __init__(self, function: Any, **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def _run(captured: Captured, *args: Any, **kwargs: Any) -> Any:
    call = flatten(args, kwargs)
    assert captured.guards.accept(call.flat)
    return captured.finish(call, captured.program.module(*call.flat))


def _same(got: Any, expected: Any) -> None:
    """Equal in type, structure, dtype and every bit."""
    assert type(got) is type(expected)
    if isinstance(expected, Tensor):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        _same(list(got.values()), list(expected.values()))
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            _same(a, b)
    else:
        assert got == expected


@pytest.fixture(scope="session")
def module_of() -> Callable[..., nn.Module]:
    """(function, **members) -> a module in eval mode whose forward is function(module, ...)."""
    return lambda function, **members: _Function(function, **members).eval()


@pytest.fixture(scope="session")
def run() -> Callable[..., Any]:
    """(captured, *args, **kwargs) -> what the captured program gives for a call it accepts."""
    return _run


@pytest.fixture(scope="session")
def same() -> Callable[[Any, Any], None]:
    """(got, expected): equal in type, structure, dtype and every bit."""
    return _same
