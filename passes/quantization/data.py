"""Calibration data in the forms users have it, as batches of one window each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ridgeline.passes.quantization.calibrate import Batch
from ridgeline.passes.quantization.codec import QuantizationError

WINDOW = 512
"""Tokens of a window: long enough for a model's habits, short enough for a laptop's memory."""

LEAST_TOKENS = 2048
"""Fewer say too little of a layer's inputs: their Hessian has as many directions as tokens, and
what it does not see is rounded blindly."""


def calibration_batches(
    calibration: Any, tokenizer: Any = None, *, window: int = WINDOW
) -> list[Batch]:
    """Batches that a model is called with, from

    a text, with the `tokenizer` that turns it into ids (transformers' convention: `.input_ids`);
    token ids [T], cut into windows, or [n, L], one window each;
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
        return calibration_batches(torch.tensor(ids), window=window)
    if isinstance(calibration, Tensor):
        return _windows(calibration, window)
    if isinstance(calibration, Mapping) or not isinstance(calibration, Iterable):
        raise QuantizationError(
            f"calibration is {type(calibration).__name__}; pass a text with its tokenizer, a tensor"
            " of token ids, or a list of batches"
        )
    batches = list(calibration)
    if not batches:
        raise QuantizationError("calibration holds no batch; pass at least one")
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
