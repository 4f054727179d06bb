"""A refused rewrite as a file of its own: site, replacement and the input on which they differ."""

import hashlib
import logging
import pprint
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import fx

from ridgeline.codegen.kernel import constant
from ridgeline.ir.cache_dir import cache_dir

log = logging.getLogger(__name__)

_HEADER = '''\
"""{title}

Run it where ridgeline can be imported: it prints the relative error of the replacement in float64.
"""

import torch
from torch import device, inf, nan  # names that generated code uses

import ridgeline.passes  # registers the operators
from ridgeline.passes.adversarial import adversarial
from ridgeline.passes.certify import relative_error


class Site(torch.nn.Module):
{site}

class Replacement(torch.nn.Module):
{replacement}

SHAPES = {shapes}
DTYPES = {dtypes}

if __name__ == "__main__":
    inputs = dict(adversarial(SHAPES, DTYPES))[{case!r}]
    print("relative error", relative_error(Replacement()(*inputs), Site()(*inputs)))
'''


def write_reproducer(
    title: str,
    site: fx.GraphModule,
    replacement: fx.GraphModule,
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[torch.dtype],
    case: str,
) -> Path | None:
    """Write a runnable file into the cache directory; None, and a warning, where it can't be.

    case: the name of the input set of `ridgeline.passes.adversarial` that shows the difference.
    """
    text = _HEADER.format(
        title=title,
        site=_body(site),
        replacement=_body(replacement),
        shapes=pprint.pformat(list(shapes)),
        dtypes=f"[{', '.join(map(str, dtypes))}]",
        case=case,
    )
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    path = cache_dir() / "reproducers" / f"{digest}.py"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        log.warning("the reproducer is not written: %s", error)
        return None
    return path


def _body(module: fx.GraphModule) -> str:
    """The class body: constants as buffers, then the code that torch.fx generates."""
    lines = []
    for node in module.graph.find_nodes(op="get_attr"):
        value = constant(node)
        literal = f"torch.tensor({value.tolist()}, dtype={value.dtype})"
        lines.append(f"    self.register_buffer({node.target!r}, {literal})")
    start = ["def __init__(self):", "    super().__init__()", *lines] if lines else []
    return textwrap.indent("\n".join([*start, module.code.strip()]), "    ") + "\n"
