"""What a model is calibrated on, from a file: a text with its tokenizer, or token ids."""

from pathlib import Path
from typing import Any

import torch

from ridgeline.ir.errors import RidgelineError
from ridgeline.passes.quantization.calibrate import Batch
from ridgeline.passes.quantization.data import calibration_batches


class CalibrationError(RidgelineError):
    """A calibration file, or the tokenizer beside it, that cannot be used."""


def read_calibration(file: Path, tokenizer: Any = None) -> list[Batch]:
    """Batches from ``text.txt``, which needs the `tokenizer`, or from ``ids.pt``, in which
    `torch.save` put token ids [T] or [n, L] or a list of batches.

    Raises CalibrationError, and QuantizationError as `calibration_batches` does, where there are
    too few tokens.
    """
    if file.suffix == ".txt":
        if tokenizer is None:
            raise CalibrationError(
                f"{file} is a text; pass --tokenizer FOLDER with it, or token ids saved by"
                " torch.save as a .pt file"
            )
        return calibration_batches(_text(file), tokenizer)
    if file.suffix == ".pt":
        return calibration_batches(_saved(file))
    raise CalibrationError(f"{file} should be a text (.txt) or token ids of torch.save (.pt)")


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, by transformers, which is asked for no file elsewhere."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise CalibrationError(
            "--tokenizer needs transformers: pip install 'ridgeline[demo]'"
        ) from error
    if not folder.is_dir():
        raise CalibrationError(f"--tokenizer: {folder} is no folder")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of many kinds, by tokenizer class
        raise CalibrationError(f"--tokenizer: {folder} holds no tokenizer: {error}") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{file} is no text in UTF-8: {error}") from error


def _saved(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CalibrationError(f"{file} cannot be read: {error.strerror}") from error
    except Exception as error:  # zip, pickle and version errors of many kinds
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CalibrationError(f"{file} holds no tensors of torch.save: {first}") from error
