"""A kernel as one file that a user can take away: it needs torch and triton, not ridgeline."""

import re
from pathlib import Path

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.triton.config import Config

# What the emitted self-check launches where the caller names no configuration.
_DEFAULTS = {
    "attention": Config((("BLOCK_M", 64), ("BLOCK_N", 32)), num_warps=4, num_stages=2),
    "attention_decode": Config(
        (("BLOCK_M", 16), ("BLOCK_N", 64)), num_warps=4, num_stages=2, splits=4
    ),
    "gated": Config((("BLOCK", 2048),), num_warps=4, num_stages=1),
    "rotary": Config((("BLOCK_H", 8),), num_warps=4, num_stages=1),
    "quantized_linear": Config((("BLOCK_M", 16), ("BLOCK_N", 64)), num_warps=4, num_stages=4),
    "attention_backward": Config((("BLOCK_M", 32), ("BLOCK_N", 64)), num_warps=4, num_stages=1),
    "coded_linear": Config((("BLOCK_M", 16), ("BLOCK_N", 64)), num_warps=4, num_stages=3),
    "binary_attention": Config(
        (("BLOCK_T", 32), ("BLOCK_M", 32)), num_warps=4, num_stages=2, splits=2
    ),
    "group_rational": Config((("BLOCK_M", 128), ("BLOCK_C", 8)), num_warps=4, num_stages=1),
    "linear_rational": Config(
        (("BLOCK_M", 64), ("BLOCK_N", 64), ("BLOCK_K", 32)), num_warps=4, num_stages=3
    ),
    "norm": Config((("BLOCK_M", 2), ("BLOCK_N", 1024)), num_warps=4, num_stages=1),
}
_SPLIT = ("attention_decode", "quantized_linear", "coded_linear", "binary_attention")
_OURS = re.compile(
    r"^from ridgeline\.codegen\.triton\.(\w+) import (?:\([^)]*\)|.+)\n", re.MULTILINE
)


def _source(file: str) -> str:
    """The text of a file of this folder, with those that it imports from in place."""
    text = (Path(__file__).parent / f"{file}.py").read_text()
    return _OURS.sub(lambda found: _source(found[1]), text)


def standalone_source(kernel: str, config: Config | None = None) -> str:
    """The source of a kernel: its law, kernels, launcher, a configuration and a self-check.

    kernel: the name of its file, as "attention" or "rotary"; config: as a compiled kernel
    carries it. Run as a script, the file compares the kernel with float64 on the GPU, or in
    Triton's interpreter under TRITON_INTERPRET=1. Raises UnsupportedProblem for another name.
    """
    if kernel not in _DEFAULTS:
        raise UnsupportedProblem(f"expected a kernel of {', '.join(_DEFAULTS)}, found {kernel!r}")
    config = config or _DEFAULTS[kernel]
    launch = config.launch()
    if kernel in _SPLIT:
        launch["splits"] = config.splits
    return (
        f"# Written by ridgeline: {kernel}, configuration {config}.\n"
        f"{_source(kernel)}\n\n"
        f"CONFIG = {launch!r}\n\n"
        'if __name__ == "__main__":\n'
        '    error = self_check("cpu" if INTERPRETED else "cuda", **CONFIG)\n'
        '    print(f"relative error against float64: {error:.1e}")\n'
    )
