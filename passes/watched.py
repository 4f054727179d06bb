"""What captured graphs take for granted of the modules they came from."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

RUN_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""A module's dictionaries of hooks that run with its forward or its backward."""
_GLOBAL_HOOKS = [getattr(nn.modules.module, f"_global{name}") for name in RUN_HOOKS]


@dataclass(frozen=True, slots=True)
class Watched:
    """Parameters, buffers, submodules and hooks of modules, to see whether they still stand.

    places: the dictionaries and names of all parameters, buffers and submodules; held: what was
    there. addresses: of the parameters. hooks: the dictionaries that hold any, and their keys,
    which torch never gives twice; unhooked: those that hold none. Asked in every call, when all of
    it has left the caches: what is touched counts, and loops are C's.
    """

    places: tuple[list[dict[str, Any]], list[str]]
    held: list[Any]
    parameters: list[Tensor]
    addresses: list[int]
    hooks: list[tuple[dict[Any, Any], tuple[int, ...]]]
    unhooked: list[dict[Any, Any]]

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> "Watched":
        """As `modules` are now."""
        entries = [
            (owner, name, value)
            for module in modules
            for owner in (module._parameters, module._buffers, module._modules)
            for name, value in owner.items()
        ]
        parameters = [p for m in modules for p in m._parameters.values() if p is not None]
        hooks = _GLOBAL_HOOKS + [getattr(m, name) for m in modules for name in RUN_HOOKS]
        return cls(
            ([owner for owner, _, _ in entries], [name for _, name, _ in entries]),
            [value for _, _, value in entries],
            parameters,
            list(map(Tensor.data_ptr, parameters)),
            [(held, tuple(held)) for held in hooks if held],
            [held for held in hooks if not held],
        )

    def unchanged(self) -> bool:
        """Is each one still the same, and each parameter at the same address? ``model.to(dtype)``
        keeps the tensor object and changes its memory."""
        if any(self.unhooked) or any(tuple(held) != keys for held, keys in self.hooks):
            return False
        if not all(map(operator.is_, map(dict.get, *self.places), self.held)):
            return False
        return list(map(Tensor.data_ptr, self.parameters)) == self.addresses
