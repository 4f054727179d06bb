"""MODEL on the command line: ``file.py:function``, a ``.pt2`` exported program, or ``smollm2``."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ridgeline.ir.errors import RidgelineError

SMOLLM2 = "smollm2"
MODELS = "file.py:function, program.pt2 or smollm2"
PROMPT = "The United States of America is"
EXPECTED = "a module, (module, args) or (module, args, kwargs)"


class ModelError(RidgelineError):
    """A MODEL argument that does not give a module with example inputs."""


@dataclass(frozen=True, slots=True)
class Example:
    """A module with example inputs for one call."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def load_model_file(spec: str) -> Example:
    """Load ``path/file.py:function`` (called without arguments), ``path/program.pt2``, or by the
    word ``smollm2`` SmolLM2-135M with a short prompt.

    The function returns (module, args) or (module, args, kwargs). Raises ModelError saying what
    was expected and found; an exception of the model's own code is its cause.
    """
    if spec == SMOLLM2:
        from ridgeline.tools import smollm2

        ids = smollm2.load_tokenizer()(PROMPT, return_tensors="pt").input_ids
        return Example(smollm2.load_model(), (), {"input_ids": ids, "use_cache": False})
    path, colon, name = spec.rpartition(":")
    if not colon:
        path = spec
    file = Path(path)
    if not file.exists():
        raise ModelError(f"no such file: {path} (MODEL is {MODELS})")
    if file.suffix == ".pt2":
        return _exported(file)
    if file.suffix != ".py" or not colon:
        raise ModelError(f"{spec}: MODEL is {MODELS}")
    return _example(_function(file, name), spec)


def _exported(file: Path) -> Example:
    try:
        program = torch.export.load(file)
    except Exception as error:  # zip, pickle and version errors of many kinds
        raise ModelError(f"{file} is not a program of torch.export.save: {error}") from error
    if program.example_inputs is None:
        raise ModelError(
            f"{file} holds no example inputs; export it again with torch.export.export"
        )
    args, kwargs = program.example_inputs
    return Example(program.module(), tuple(args), dict(kwargs))


def _function(file: Path, name: str) -> Callable[[], Any]:
    spec = importlib.util.spec_from_file_location(f"_ridgeline_model_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.resolve().parent))  # as `python file.py` would have it
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file does
        raise ModelError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and v.__module__ == spec.name]
        raise ModelError(f"{file} has no function {name!r}; it has: {', '.join(known) or 'none'}")
    return function


def _example(function: Callable[[], Any], spec: str) -> Example:
    try:
        result = function()
    except Exception as error:  # whatever the user's function does
        raise ModelError(f"{spec} raised {type(error).__name__}: {error}") from error
    parts = result if isinstance(result, tuple) else (result,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        raise ModelError(f"{spec} returned {_describe(result)}; expected {EXPECTED}")
    model, args, kwargs = (*parts, *((), {})[len(parts) - 1 :])
    if isinstance(args, torch.Tensor):
        args = (args,)
    if not isinstance(args, tuple | list) or not isinstance(kwargs, dict):
        raise ModelError(f"{spec} returned {_describe(result)}; expected {EXPECTED}")
    if not args and not kwargs:
        raise ModelError(f"{spec} gives no example inputs; return (module, args)")
    return Example(model.eval(), tuple(args), kwargs)


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(v).__name__ for v in value)})"
    return type(value).__name__
