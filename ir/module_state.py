"""What a forward changes in its modules beside parameters and buffers: state no graph can carry.

A counter, a list of past inputs, a tensor kept under a plain name: a graph would hold the value of
the one call that was traced. `ModuleState` sees every assignment to an attribute, and what is put
into or taken from a container or plain object that an attribute holds; deeper changes it does not.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

_OWN = set(vars(nn.Module()))
"""torch's own attributes: parameters, buffers, submodules, hooks, the mode."""
_NOTES = {"_output_capturing_hooks_installed"}
"""transformers' note that a module has its hooks: these stay too."""
_VALUES = (bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device)
_OPAQUE = (*_VALUES, Tensor, nn.Module, type, type(None), torch.Generator)


class ModuleState:
    """The plain attributes of a model's modules, as they were when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = dict(_holders(model))

    def restore(self) -> list[str]:
        """Put everything back; return the paths of what had been changed."""
        changed = []
        after = dict(_holders(self._model))
        for key, (path, holder, held) in self._before.items():
            now = after[key][2] if key in after else _contents(holder)
            if not _same(held, now):
                _refill(holder, held)
                different = [n for n in held.keys() | now.keys() if not _equal(held, now, n)]
                named = isinstance(holder, nn.Module) and len(different) == 1
                changed.append(f"{path}.{different[0]}".lstrip(".") if named else path)
        return changed


@contextlib.contextmanager
def plain_tensors_kept(model: nn.Module) -> Iterator[list[str]]:
    """Tensors under plain names are real while a model is traced: what the block writes into them
    is undone at its end, and their paths are put into the list."""
    tensors = [
        (f"{path}.{name}".lstrip("."), value, value._version, value.detach().clone())
        for path, holder, contents in dict(_holders(model)).values()
        for name, value in contents.items()
        if isinstance(value, Tensor) and not value.is_inference()
    ]
    changed: list[str] = []
    try:
        yield changed
    finally:
        for path, value, version, before in tensors:
            if value._version != version:
                value.detach().copy_(before)
                changed.append(path)


def _holders(model: nn.Module) -> Iterator[tuple[int, tuple[str, Any, dict[Any, Any]]]]:
    """id -> (path, object, contents) of every module, and of what its plain attributes hold."""
    for path, module in model.named_modules():
        contents = _contents(module)
        yield id(module), (path, module, contents)
        for name, value in contents.items():
            if _is_container(value):
                yield id(value), (f"{path}.{name}".lstrip("."), value, _contents(value))


def _is_container(value: Any) -> bool:
    if isinstance(value, list | dict | set | deque):
        return True
    return not isinstance(value, (*_OPAQUE, tuple, Callable)) and hasattr(value, "__dict__")


def _contents(holder: Any) -> dict[Any, Any]:
    if isinstance(holder, nn.Module):
        # torch's own hooks, as weight_norm's and pruning's, compute an attribute anew in every call
        hooks = holder._forward_pre_hooks.values()
        own = [hook for hook in hooks if type(hook).__module__.startswith("torch.")]
        derived = {getattr(hook, name, "") for hook in own for name in ("name", "_tensor_name")}
        kept = _OWN | _NOTES | derived
        return {name: value for name, value in vars(holder).items() if name not in kept}
    if isinstance(holder, dict):
        return dict(holder)
    if isinstance(holder, list | deque):
        return dict(enumerate(holder))
    if isinstance(holder, set):
        return dict.fromkeys(holder)
    return dict(vars(holder))


def _refill(holder: Any, contents: dict[Any, Any]) -> None:
    if isinstance(holder, list | deque):
        holder.clear()
        holder.extend(contents.values())
    elif isinstance(holder, set | dict):
        holder.clear()
        holder.update(contents)
    else:
        for name in _contents(holder).keys() - contents.keys():
            del vars(holder)[name]
        vars(holder).update(contents)


def _same(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    return a.keys() == b.keys() and all(_equal(a, b, name) for name in a)


def _equal(a: dict[Any, Any], b: dict[Any, Any], name: Any) -> bool:
    if name not in a or name not in b:
        return False
    x, y = a[name], b[name]
    return x is y or (type(x) is type(y) and isinstance(x, _VALUES) and x == y)
