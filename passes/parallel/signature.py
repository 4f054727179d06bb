"""What a rank says of its code and its model, so that ranks with others are found out."""

import hashlib
import importlib.metadata
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ridgeline.codegen.code_version import code_version

SAMPLED = 64
"""Numbers taken of each matrix: enough to tell checkpoints apart."""

_ORIGIN = ("_name_or_path", "transformers_version")
"""Settings that say where a config comes from."""


def versions() -> dict[str, str]:
    """Of torch, of ridgeline, and of the operations' own code."""
    return {
        "torch": torch.__version__,
        "ridgeline": importlib.metadata.version("ridgeline"),
        "operations": code_version(),
    }


def libraries(model: nn.Module) -> dict[str, str]:
    """Name -> version of the packages, such as transformers, whose modules the model is made of."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    roots = sorted({kind.__module__.partition(".")[0] for kind in kinds} - {"torch", "ridgeline"})
    found = {name: getattr(sys.modules.get(name), "__version__", None) for name in roots}
    return {name: str(version) for name, version in found.items() if version is not None}


def model_signature(model: nn.Module) -> str:
    """Class, names, shapes, dtypes, and some numbers of every weight and buffer."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return f"{type(model).__name__} {digest_of(named, SAMPLED)}"


def settings_of(model: nn.Module) -> dict[str, str]:
    """ "config.name" -> value, of a model of transformers, without those that say where they were
    loaded from; {} of another. Epsilons, windows and activations are in no weight."""
    settings = getattr(getattr(model, "config", None), "to_dict", dict)()
    return {f"config.{k}": repr(v) for k, v in settings.items() if k not in _ORIGIN}


def digest_of(tensors: Iterable[tuple[str, Tensor]], sampled: int | None = None) -> str:
    """SHA-256 over names, shapes, dtypes and values: all, or about `sampled` of each matrix."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta" and tensor.numel():
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            flat = real.detach().reshape(-1)
            every = sampled is None or tensor.dim() < 2
            step = 1 if every else max(1, flat.numel() // sampled)
            digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
