"""--phase, --batch and --context of the command line, in the words of `optimize` and `whatif`."""

import re

from ridgeline.ir.errors import RidgelineError
from ridgeline.passes.workload import PHASES, Workload, WorkloadError, check_number


class NumberError(RidgelineError, ValueError):
    """An option that takes whole numbers, and got something else."""


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """``1,8,64`` or ``1k,32k`` (k = 1024), of --batch or --context. Raises NumberError, and
    WorkloadError for more than makes sense."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d{0,299})(k?)", part.strip().lower())
        if match is None:
            raise NumberError(
                f"{option} is {text!r}; expected positive numbers as 1,8,64 or 1k,32k, found"
                f" {part!r}"
            )
        number = int(match[1]) * (1024 if match[2] else 1)
        check_number(option.removeprefix("--"), number, option)
        found.append(number)
    return tuple(dict.fromkeys(found))


def workload(phase: str, batch: str, context: str) -> Workload:
    """What `ridgeline.optimize(phase=, batch=, context=)` takes. Numbers by phase are written as
    ``prefill=1,decode=64``. Raises NumberError, and WorkloadError as `optimize` does."""
    return Workload(_number(batch, "--batch"), _number(context, "--context"), phase or None)  # pyright: ignore[reportArgumentType]


def check_phase(asked: Workload, phase: str) -> None:
    """Of a command that captures one call, of `phase`: is anything asked meant for it? Raises
    WorkloadError."""
    if (asked.batch, asked.context) != (None, None) and asked.of(phase) == (None, None):
        raise WorkloadError(
            f"MODEL's example inputs are captured as {phase}, and --batch and --context are meant"
            f" for other phases; leave --phase out, or name {phase}"
        )


def _number(text: str, option: str) -> int | dict[str, int] | None:
    if not text:
        return None
    if "=" not in text:
        return _one(text, option)
    by_phase: dict[str, int] = {}
    for part in text.split(","):
        phase, _, number = (piece.strip() for piece in part.partition("="))
        if phase not in PHASES or phase in by_phase:
            raise NumberError(
                f"{option} is {text!r}; by phase, give some of {', '.join(PHASES)} once each, as"
                f" prefill=1,decode=64, found {part.strip()!r}"
            )
        by_phase[phase] = _one(number, option)
    return by_phase


def _one(text: str, option: str) -> int:
    try:
        numbers = whole_numbers(text, option)
    except NumberError:
        numbers = ()
    if len(numbers) != 1:
        raise NumberError(
            f"{option} is {text!r}; expected one positive number, as 8 or 4k, or one by phase, as"
            " prefill=1,decode=64"
        )
    return numbers[0]
