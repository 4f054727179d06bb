"""What `drop_in` asks of a compiler, and what it tells it of each call."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from ridgeline.ir.call import Call
from ridgeline.ir.program import Program


class CompileProgram(Protocol):
    """Program -> a function on its flat inputs; knows which weights its code has folded.

    A call of a model that is split over ranks is all ranks' call: `deciding`, `meet` and
    `compiling` are where they hear of each other. In one process they are nothing.
    """

    plan: Any

    def __call__(self, program: Program, /) -> Callable[..., Any]: ...

    def deciding(self) -> AbstractContextManager[None]:
        """Around what finds the graph of a call."""
        return nullcontext()

    def meet(self, what: str, call: Call) -> AbstractContextManager[None]:
        """Around `what` is done for a call: all ranks do the same, and one call at a time."""
        return nullcontext()

    def compiling(self) -> AbstractContextManager[None]:
        """Around a capture and what is made of it."""
        return nullcontext()

    def stale(self) -> bool:
        """Has a folded weight been changed since?"""
        ...

    def forget(self) -> None:
        """Start anew: folded weights and decisions are dropped."""
        ...

    def release(self, program: Program) -> None:
        """The code made of this program is given up."""
        ...
