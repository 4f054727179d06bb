"""What `parallelize` is given: each argument is looked at before anything is split or sent."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch import nn

from ridgeline.passes.base import Pass
from ridgeline.passes.compiler import OptimizeError, check_max_graphs
from ridgeline.passes.drop_in import DropInError, OptimizedModule


def check_arguments(model: Any, timeout: Any, passes: Any, max_graphs: int) -> None:
    """Raise OptimizeError for what cannot be used, with what was expected and found."""
    check_max_graphs(max_graphs)
    if not isinstance(model, nn.Module):
        raise OptimizeError(f"expected a torch.nn.Module as model, found {_said(model)}")
    if isinstance(model, OptimizedModule):
        raise OptimizeError(
            f"this {type(model).__name__} is split or optimised already; pass the model that"
            " parallelize or optimize was given"
        )
    if not isinstance(timeout, timedelta | None):
        raise OptimizeError(
            f"expected a datetime.timedelta or None as timeout, found {_said(timeout)}; pass"
            f" timedelta(seconds={timeout if isinstance(timeout, int | float) else 60})"
        )
    several = isinstance(passes, Sequence) and not isinstance(passes, str)
    odd = [p for p in passes if not isinstance(p, Pass)] if several else [passes]
    if odd:
        raise OptimizeError(
            "expected a sequence of ridgeline's passes (some of ridgeline.passes.all.PASSES), found"
            f" {_said(odd[0])}"
        )
    refuse_meta(model)


def refuse_whole(whole: Any) -> None:
    """Raise OptimizeError where modules are to be kept whole in a model that is not split here."""
    if not isinstance(whole, list | tuple) or whole:
        raise OptimizeError(
            f"expected no whole with split=False, found {whole!r}: nothing is split then; leave"
            " whole out"
        )


def refuse_meta(model: nn.Module) -> None:
    """Raise OptimizeError where weights or buffers hold nothing."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        raise OptimizeError(
            f"expected a model with its weights, found {len(empty)} of {len(tensors)} parameters"
            f" and buffers on the meta device ({empty[0]}); load them first (from_pretrained, or"
            " to_empty and load_state_dict). plan_parallel takes models on the meta device"
        )


def refuse_to_save(*args: Any, **kwargs: Any) -> None:
    """Stands for `save_pretrained` on a part: a folder of one rank's weights loads as no model."""
    raise DropInError(
        "expected a whole model to save, found one rank's part; call save_pretrained of the model"
        " that parallelize was given, on one rank. state_dict() is this rank's weights alone"
    )


def _said(value: Any) -> str:
    return f"{value!r:.60} ({type(value).__name__})" if value is not None else "None"
