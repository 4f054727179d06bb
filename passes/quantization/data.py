"""Calibration data in the forms users have it, as batches of one window each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ridgeline.passes.quantization.calibrate import Batch, run
from ridgeline.passes.quantization.codec import QuantizationError

WINDOW = 512
"""Tokens of a window: long enough for a model's habits, short enough for a laptop's memory."""

LEAST_TOKENS = 2048
"""Fewer say too little of a layer's inputs: their Hessian has as many directions as tokens, and
what it does not see is rounded blindly."""


def calibration_batches(
    calibration: Any, tokenizer: Any = None, *, model: nn.Module | None = None
) -> list[Batch]:
    """Batches that a model is called with, from

    a text, with the `tokenizer` that turns it into ids (transformers' convention: `.input_ids`);
    token ids [T], cut into windows (as long as `model` takes, and at most WINDOW), or [n, L], one
    window each;
    an iterable of batches (tensor, tuple of arguments or dict of keyword arguments): as they are.

    Raises QuantizationError for anything else, for ids that are no integers, and for a text or
    tensor of fewer than LEAST_TOKENS tokens.
    """
    if isinstance(calibration, str):
        if tokenizer is None:
            raise QuantizationError(
                "calibration is a text; pass tokenizer= with it, or pass its token ids"
            )
        ids = tokenizer(calibration, verbose=False).input_ids
        return calibration_batches(torch.tensor(ids), model=model)
    if isinstance(calibration, Tensor):
        return _checked_to_run(_windows(calibration, _longest(model)), model)
    unusable = isinstance(calibration, Mapping | bytes)
    if unusable or not isinstance(calibration, Iterable):
        raise QuantizationError(
            f"calibration is {type(calibration).__name__}; pass a text with its tokenizer, a tensor"
            " of token ids, or a list of batches"
        )
    batches = list(calibration)
    if not batches:
        raise QuantizationError("calibration holds no batch; pass at least one")
    for i, batch in enumerate(batches):
        if not isinstance(batch, Tensor | Mapping | tuple | list):
            raise QuantizationError(
                f"calibration batch {i} is {type(batch).__name__}; pass tensors, tuples of"
                " arguments or dicts of keyword arguments"
            )
    return _checked_to_run(batches, model)


def _longest(model: nn.Module | None) -> int:
    """Tokens of a window that the model takes."""
    config = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    return min(WINDOW, longest) if isinstance(longest, int) and longest > 0 else WINDOW


def _checked_to_run(batches: list[Batch], model: nn.Module | None) -> list[Batch]:
    """`batches`, of which `model` takes the first; before anything else is done with it."""
    if model is not None:
        try:
            run(model, batches[0])
        except Exception as error:  # whatever a user's model may raise
            raise QuantizationError(
                f"the model fails on the first calibration batch ({type(error).__name__}: {error})"
            ) from error
    return batches


def spread(batches: Sequence[Batch], count: int) -> list[Batch]:
    """`count` of the batches, evenly spread, or all."""
    step = max(1, len(batches) // count)
    return list(batches[: step * count : step])


def _windows(ids: Tensor, window: int) -> list[Batch]:
    if ids.dtype not in (torch.int64, torch.int32) or ids.dim() not in (1, 2):
        raise QuantizationError(
            f"calibration is {ids.dtype} {tuple(ids.shape)}; pass integer token ids [T] or [n, L],"
            " or wrap other inputs as a list of batches"
        )
    if ids.numel() < LEAST_TOKENS:
        raise QuantizationError(
            f"calibration holds {ids.numel()} tokens; pass at least {LEAST_TOKENS}, better 16,000"
        )
    if ids.dim() == 1:
        ids = ids[: len(ids) // window * window].view(-1, window)
    return list(ids.unsqueeze(1))
