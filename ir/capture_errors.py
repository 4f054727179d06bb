"""What could not be captured, where it stands in the model's code, and the way out."""

import contextlib
import io
import linecache
import logging
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch.fx.experimental import symbolic_shapes

from ridgeline.ir.errors import RidgelineError

log = logging.getLogger(__name__)

_LIBRARIES = tuple(str(Path(m.__file__).parent) for m in (torch,) if m.__file__)
_HERE = str(Path(__file__).parent)

NO_GENERATOR = "use tensors only, and torch's own random state"

_WAYS_OUT = (
    (
        ("DTensor",),
        "the model is made of DTensors, for which torch.export has no form: use"
        " torch.compile(model, backend='ridgeline'), which takes models of parallelize_module",
    ),
    (
        ("data-dependent", "unbacked", "Could not guard", "Could not extract specialized"),
        "the graph depends on the values of a tensor: use torch.where instead of `if`,"
        " and avoid .item(), .tolist() and int(tensor)",
    ),
    (
        ("Unsupported input type", "unexpected type", "pytree"),
        "an argument is of a type that torch.export does not know: pass tensors, numbers and"
        " containers of them, or register it with torch.utils._pytree.register_pytree_node",
    ),
    (
        ("missing a required", "unexpected keyword", "too many positional", "positional argument"),
        "the arguments are not those of the model's forward: call it as it is declared",
    ),
    (
        ("torch._C.Generator",),  # torch 2.11 stops here, 2.13 in capture.py
        f"a generator of random numbers, which no graph can carry: {NO_GENERATOR}",
    ),
    (
        ("async version of inplace op",),
        "a collective in place with async_op=True has no form in a graph: leave async_op out, or"
        " use torch.distributed._functional_collectives, y = all_reduce(x, 'sum', group)",
    ),
    (
        ("has invalid val field",),  # of c10d's own operators, as broadcast_ and all_gather_
        "a collective of torch.distributed that has no form in a graph: use the one of"
        " torch.distributed._functional_collectives, as y = broadcast(x, source, group)",
    ),
    (
        ("leaf Variable", "in-place", "inplace"),
        "a tensor that others still need is changed in place: use the out-of-place form",
    ),
)
_DEFAULT = "run the model with torch.no_grad() and eager to see whether the call itself works"


class CaptureError(RidgelineError):
    """A model, or a call of it, that torch.export cannot capture."""


def explain(error: BaseException, model: nn.Module) -> CaptureError:
    """`error` of torch.export as a CaptureError with the model's own line and the way out."""
    text = str(error)
    way_out = next((way for words, way in _WAYS_OUT if any(w in text for w in words)), _DEFAULT)
    first = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    return CaptureError(
        f"cannot capture {type(model).__name__}: {_place(error)}{first.strip().rstrip('.:')}.\n"
        f"  Way out: {way_out}."
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """If the block fails, what torch printed meanwhile (whole graphs) goes to debug logging."""
    printed, hints = io.StringIO(), logging.getLogger(symbolic_shapes.__name__)
    traces = logging.getLogger(fake_tensor.__name__)  # the whole stack of a call that cannot be

    def to_debug(record: logging.LogRecord) -> bool:
        passing = record.msg.startswith("Unable to find user code") or record.name == traces.name
        if passing:
            log.debug("torch: %s", record.getMessage())
        return not passing

    for logger in (hints, traces):
        logger.addFilter(to_debug)
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except Exception:
        if printed.getvalue():
            log.debug("torch.export printed:\n%s", printed.getvalue())
        raise
    else:
        sys.stderr.write(printed.getvalue())
    finally:
        for logger in (hints, traces):
            logger.removeFilter(to_debug)


def _place(error: BaseException) -> str:
    """``file:line: `source`: `` of the innermost frame outside torch and ridgeline."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith((*_LIBRARIES, _HERE, "<"))
    ]
    if not frames:
        return ""
    frame = frames[-1]
    line = frame.lineno or 0
    return f"{frame.filename}:{line}: `{linecache.getline(frame.filename, line).strip()}`: "
