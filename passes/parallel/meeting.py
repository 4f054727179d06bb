"""Before each call of a split model its ranks say which call it is: no rank runs a graph alone.

    decide (flatten) -> meet -> run the graph that all know, or capture and compile, and run

A graph's collectives match by order and by size alone. A rank that runs a graph while another
captures one, or that has inputs of another length, waits for ever, or is ended by its transport;
one with other ids or other activations gives wrong sums. So each call begins with one collective
of a few numbers:

    d    of the model, of the weights that all hold (`held`), of the graphs that take the call's
         sizes, of its structure and plain arguments, and of what `sampled` says of its tensors
    t    how often this rank has talked to the others (`Ranks.turn`)
    f    which of these graphs take this rank's inputs as they lie, as bits, the newest first
    s    of each input of floats x, of its samples: the sum of x_i cos(i), and |x|

Where all t and all d are equal, and no two sums of an input differ by more than `APART` |x|, the
call goes on, with the newest graph that all f have; where there is none, all capture. (Caches of
one head may lie as a graph expects by their strides where those of two do not.) Where d or a sum
differs, every rank says in words what it is about to do (`Ranks.agree`), and raises. A rank that
fails before this takes part with d = -1, and waits for nobody; one that failed alone in a call that
the others finished has another t: all raise, and are in step again.

This is done where the group has gloo for tensors on the CPU. Others would have to wait for their
device at each call. Threads take turns: one call of a group at a time, from this to its end.
"""

import contextlib
import functools
import hashlib
import operator
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ridgeline.ir.call import Call
from ridgeline.passes.compile_program import Graph
from ridgeline.passes.parallel.agree import RankLost, RankMismatch, Ranks
from ridgeline.passes.parallel.held import Held
from ridgeline.passes.parallel.sampled import facts_of, sums_of

APART = 1e-2
"""Of |x|: more than the last bits of bfloat16 that two machines may round apart."""
SLOTS = 8
"""Inputs of floats that are compared one by one; the ninth shares the first's numbers."""
GRAPHS = 48
"""The newest graphs that are compared: as many bits as float64 holds, and fewer."""
_RUN, _WEIGHTS = "what is run", "weights that all ranks hold"
_ADVICE = {
    _RUN: "Where a rank has no graph that others have, it has dropped it, by refresh() or because a"
    " weight, a hook or an attribute was set there: set it on all ranks, or call refresh() on all",
    _WEIGHTS: "Where weights were changed in place after they were compared, change them on all"
    " ranks alike",
}
_FAILED = -1.0
_LOOK = timedelta(seconds=1)
"""Between two looks at what others have said, while this rank waits for them."""
_LOCKS: weakref.WeakKeyDictionary[dist.ProcessGroup, threading.RLock] = weakref.WeakKeyDictionary()


class Meeting:
    """What one rank says at the beginning of its calls.

    model: which one is called, as all ranks have agreed. weights: those that all ranks hold; None
    where the model is each rank's own.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.model = ranks, ""
        self.weights: Held | None = None
        self.held = "gloo" in _backend_on_cpu(ranks.group)
        self._lock = _LOCKS.setdefault(ranks.group, threading.RLock())

    @contextlib.contextmanager
    def deciding(self) -> Iterator[None]:
        """What raises inside, before this rank has met the others, is made known to them."""
        try:
            yield
        except (RankMismatch, RankLost):
            raise
        except Exception as error:
            with self._lock:
                self.ranks.say_failed(error)
                if self.held:
                    self._send(_FAILED)  # the others come later, or have called already
            raise

    @contextlib.contextmanager
    def meet(
        self,
        wanted: str,
        call: Call,
        known: Callable[[], Iterable[Graph]],
        fits: Callable[[Graph], bool],
    ) -> Iterator[list[Graph]]:
        """Enter where all ranks are about to do the same on the same inputs; until it is left, no
        other thread's call of the group begins.

        known: the graphs that take the call's sizes, asked when it is this thread's turn. fits:
        whether a graph's code takes the inputs as they lie. Gives the graph to be run, one for all
        ranks, or none where all are to capture.

        Raises:
            RankMismatch: on all ranks, saying who is about to do what.
            RankLost: a rank failed before, has ended, or did not call within the timeout.
        """
        with self._lock:
            with self.deciding():
                graphs = sorted(known(), key=lambda g: -g.number)[:GRAPHS]
                bits = sum(fits(graph) << i for i, graph in enumerate(graphs))
                facts, sums = self._said(wanted, call, graphs) if self.held else ({}, [])
            if self.held:
                bits = self._compared(facts, bits, sums)
            yield [graph for i, graph in enumerate(graphs) if bits >> i & 1][:1]

    def _said(
        self, wanted: str, call: Call, graphs: Sequence[Graph]
    ) -> tuple[dict[str, str], list[tuple[float, float]]]:
        """What must be equal on all ranks, and what may differ by little."""
        run = " or ".join(f"graph {graph.number}" for graph in graphs) or "a new graph"
        facts = {"model": self.model, "what is wanted": wanted, _RUN: run}
        facts[_WEIGHTS] = self.weights.said() if self.weights else ""
        return facts | facts_of(call), sums_of(call, SLOTS)

    def _compared(self, facts: dict[str, str], bits: int, sums: list[tuple[float, float]]) -> int:
        """The bits that all ranks have. Raises as `meet` does."""
        mine = float(_digest("\n".join(facts.values())))
        said = self._waited(*self._send(mine, float(bits), *(x for pair in sums for x in pair)))
        digests, turns = said[:, 0].tolist(), [int(t) for t in said[:, 1].tolist()]
        self.ranks.in_step(turns, [d == _FAILED for d in digests])
        totals, sizes = said[:, 3::2], said[:, 4::2]
        apart = totals.amax(0) - totals.amin(0) > APART * sizes.amax(0)
        if len(set(digests)) > 1 or bool(apart.any()):
            told = [f"a sum of {sums[i][0]:.8g}" for i in apart.nonzero().flatten().tolist()]
            facts |= {"floats in inputs": ", ".join(told)}
            facts |= self.weights.each() if self.weights else {}
            self.ranks.agree("this call", facts, _ADVICE)
        return functools.reduce(operator.and_, map(int, said[:, 2].tolist()))

    def _send(self, digest: float, *numbers: float) -> tuple[dist.Work, list[Tensor]]:
        mine = torch.zeros(3 + 2 * SLOTS, dtype=torch.float64, device="cpu")
        mine[: 2 + len(numbers)] = mine.new_tensor([digest, self.ranks.turn, *numbers])
        every = [torch.empty_like(mine) for _ in range(self.ranks.world)]
        work = dist.all_gather(every, mine, group=self.ranks.group, async_op=True)
        assert work is not None
        return work, every

    def _waited(self, work: dist.Work, every: list[Tensor]) -> Tensor:
        """[ranks, numbers]."""
        end = time.monotonic() + self.ranks.timeout.total_seconds()
        while True:
            done = work.is_completed()  # asked before: it may succeed while others are heard
            try:
                work.wait(min(_LOOK, self.ranks.timeout))
                return torch.stack(every)
            except RuntimeError as error:
                self.ranks.refuse_failed()
                if done or time.monotonic() > end:
                    raise self.ranks.lost(error) from error


def _backend_on_cpu(group: dist.ProcessGroup) -> str:
    try:
        return group._get_backend(torch.device("cpu")).name()
    except RuntimeError:
        return ""


def _digest(text: str) -> int:
    """A number that float64 holds."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest())
