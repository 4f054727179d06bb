"""What the tests of capture share: functions as modules, runs of a captured graph, equality."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ridgeline.ir.capture import Captured, flatten


class Function(nn.Module):
    """A function of the module and its arguments, as a module."""

    def __init__(self, function: Any, **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def module_of(function: Any, **members: Any) -> nn.Module:
    return Function(function, **members).eval()


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run_captured(captured: Captured, *args: Any, **kwargs: Any) -> Any:
    call = flatten(args, kwargs)
    assert captured.guards.accept(call.flat)
    return captured.finish(call, captured.program.module(*call.flat))


def assert_same(got: Any, expected: Any) -> None:
    """Equal in type, structure, dtype and every bit."""
    assert type(got) is type(expected)
    if isinstance(expected, Tensor):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        assert_same(list(got.values()), list(expected.values()))
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b)
    else:
        assert got == expected


@dataclass
class Result:
    y: Tensor


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).eval()


X, Y = random_tensor(3, 4), random_tensor(3, 4, seed=1)
