"""Triton kernels: templates, configurations, cross-compilation for absent GPUs, launchers.

`attention.py`, `attention_decode.py` and `quantized_linear.py` are kernels that stand alone (they
import torch and triton only). Everything else here can be imported without triton, which is asked
for by `require_triton` when something is to be compiled or launched.
"""

import importlib
from types import ModuleType

from ridgeline.codegen.errors import BackendMissing


def require_triton() -> ModuleType:
    """The triton module. Raises BackendMissing where it is not installed."""
    try:
        return importlib.import_module("triton")
    except ImportError as error:
        raise BackendMissing(
            "GPU kernels need Triton 3.6 or newer, which is not importable here"
            f" ({error}). Install it with `pip install triton`; no GPU is needed to compile."
        ) from error
