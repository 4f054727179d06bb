"""What `drop_in` asks of a compiler, and what it tells it of each call."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

from ridgeline.ir.call import Call
from ridgeline.ir.capture import Captured
from ridgeline.ir.program import Program


class Graph(NamedTuple):
    """What was captured, counted, and its code, a function of the call's flat inputs."""

    number: int
    captured: Captured
    run: Callable[..., Any]


class CompileProgram(Protocol):
    """Program -> a function on its flat inputs; knows which weights its code has folded.

    A call of a model that is split over ranks is all ranks' call: `deciding`, `meet` and
    `compiling` are where they hear of each other. In one process they are nothing.
    """

    plan: Any

    def __call__(self, program: Program, /) -> Callable[..., Any]: ...

    def deciding(self) -> AbstractContextManager[None]:
        """Around what is found out about a call before `meet`."""
        return nullcontext()

    def meet(
        self, wanted: str, call: Call, known: Callable[[], Iterable[Graph]]
    ) -> AbstractContextManager[Iterable[Graph]]:
        """Around one call, or the capture of one, as is `wanted`: of the graphs that are `known` to
        take its sizes, those to be tried. All ranks try the same, or capture one more."""
        return nullcontext(known())

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
