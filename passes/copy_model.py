"""A copy of a model that shares its parameters and nothing else that a forward may change.

Modules, the plain containers that they keep (lists, tuples, sets, dictionaries), methods bound to
them and partials are copied with every reference among them kept; so is memory that several
buffers share. Parameters, and all other objects, are the caller's own.
"""

import functools
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SEQUENCES = (list, tuple, set, frozenset)
_MAPPINGS = (dict, OrderedDict)


def copy_model(model: nn.Module) -> nn.Module:
    """The copy; `model` is not changed."""
    return _Copier(model.parameters()).copy(model)


def rebound(function: Any, old: object, new: object) -> Any:
    """A method of `old`, or a partial of one or with `old` among its arguments, for `new`.

    None where `function` is neither: what else it holds cannot be known.
    """
    if isinstance(function, types.MethodType) and function.__self__ is old:
        return types.MethodType(function.__func__, new)
    if not isinstance(function, functools.partial):
        return None
    inner = rebound(function.func, old, new) or function.func
    args = (new if a is old else a for a in function.args)
    kwargs = {k: new if v is old else v for k, v in function.keywords.items()}
    return functools.partial(inner, *args, **kwargs)


class _Copier:
    """Object -> its copy; what several places hold stays one object."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._made: dict[int, Any] = {}
        self._kept: list[Any] = []  # a number of `_made` must not be given to another object
        self._memory: dict[int, torch.UntypedStorage] = {
            storage.data_ptr(): storage for p in parameters for storage in _storage(p)
        }

    def copy(self, value: Any) -> Any:
        if id(value) in self._made:
            return self._made[id(value)]
        if isinstance(value, nn.Parameter):
            return value
        if isinstance(value, nn.Module):
            new = self._remember(value, object.__new__(type(value)))
            new.__dict__ = {name: self.copy(held) for name, held in value.__dict__.items()}
            return new
        if isinstance(value, Tensor):
            return self._remember(value, self._tensor(value))
        return self._plain(value)

    def _remember(self, value: Any, new: Any) -> Any:
        self._made[id(value)] = new
        self._kept.append(value)
        return new

    def _plain(self, value: Any) -> Any:
        """Containers of these very types, and what is bound to a module."""
        if type(value) in _MAPPINGS:
            new = self._remember(value, type(value)())
            new.update((name, self.copy(held)) for name, held in value.items())
            return new
        if type(value) is list:
            new = self._remember(value, [])
            new.extend(map(self.copy, value))
            return new
        if type(value) in _SEQUENCES:
            return type(value)(map(self.copy, value))
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.copy(value.__self__))
        if type(value) is functools.partial:
            args, kwargs = self.copy(value.args), self.copy(value.keywords)
            return functools.partial(self.copy(value.func), *args, **kwargs)
        return value

    def _tensor(self, tensor: Tensor) -> Tensor:
        """A tensor with the same contents; memory shared before is shared by the copies."""
        if tensor.grad_fn is not None:  # the result of a computation: no state of a module's own
            return tensor
        storage = next(_storage(tensor), None)
        if storage is None:
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)
        if storage.data_ptr() not in self._memory:
            self._memory[storage.data_ptr()] = storage.clone()
        memory = self._memory[storage.data_ptr()]
        new = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        new.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())
        return new.requires_grad_(tensor.requires_grad)


def _storage(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The memory of a plain dense tensor that has any; nothing for other kinds."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    lazy = tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
    if plain and not lazy and tensor.device.type != "meta":
        storage = tensor.untyped_storage()
        if storage.data_ptr():
            yield storage
