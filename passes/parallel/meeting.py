"""Before each call of a split model its ranks say which call it is: no rank runs a graph alone.

    decide (flatten, guards) -> meet -> run the graph
                                     -> capture and compile, which agree -> meet -> run the graph

A graph's collectives match by order and by size alone. A rank that runs a graph while another
captures one, or that has inputs of another length, waits for ever, or is ended by its transport;
one with other ids or other activations gives wrong sums. So each call begins with one collective
of a few numbers:

    d    of what is to run, of shapes and strides, and of the values of integers and booleans
    s    sum of x_i cos(i) over floats x, of at most `SAMPLED` of each input, and |x|

Where all d are equal and no two s differ by more than `APART` |x|, the call goes on; else every
rank says in words what it is about to do (`Ranks.agree`), and raises. A rank that fails before this
takes part with d = -1, and waits for nobody. Caches hold each rank's own heads and are left out.

This is done where the group has gloo for tensors on the CPU. Others would have to wait for their
device at each call.
"""

import contextlib
import hashlib
import math
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ridgeline.ir.call import Call
from ridgeline.passes.parallel.agree import RankLost, RankMismatch, Ranks

SAMPLED, EXACT = 1024, 2**16
"""How many floats, and integers or booleans, of an input are looked at; of more, every n-th."""
APART = 1e-2
"""Of |x|: more than the last bits of bfloat16 that two machines may round apart."""
_FAILED = -1.0
_LOOK = timedelta(seconds=1)
"""Between two looks at what others have said, while this rank waits for them."""


class Meeting:
    """What one rank says at the beginning of its calls."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.held = "gloo" in _backend_on_cpu(ranks.group)

    @contextlib.contextmanager
    def deciding(self) -> Iterator[None]:
        """What raises inside, before this rank has met the others, is made known to them."""
        try:
            yield
        except (RankMismatch, RankLost):
            raise
        except Exception as error:
            self.ranks.say_failed(error)
            if self.held:
                self._send([_FAILED, 0.0, 0.0])  # the others come later, or have called already
            raise

    def meet(self, what: str, call: Call) -> None:
        """Return where all ranks are about to do the same on the same inputs.

        Raises:
            RankMismatch: on all ranks, saying who is about to do what.
            RankLost: a rank failed before, has ended, or did not call within the timeout.
        """
        if not self.held:
            return
        tensors = [x for x in call.leaves if isinstance(x, Tensor)]
        exact = [x for x in tensors if not (x.is_floating_point() or x.is_complex())]
        total, size = _checksum([x for x in tensors if x.is_floating_point()])
        shapes = ", ".join(f"{_name(x)}{list(x.shape)}" for x in tensors)
        strides = ", ".join(str(list(x.stride())) for x in tensors)
        integers = [_some(x, EXACT).cpu().contiguous() for x in exact]
        values = _digest(b"".join(x.numpy().tobytes() for x in integers))
        said = [float(_digest(f"{what} {shapes} {strides} {values}".encode())), total, size]
        found = self._waited(*self._send(said))
        digests, totals, sizes = torch.stack(found, 1)
        apart = totals.max() - totals.min() > APART * sizes.max()
        if len(set(digests.tolist())) > 1 or bool(apart) or bool(totals.isnan().any()):
            first = " ".join(str(x[:8].tolist()) for x in integers)
            facts = {"what is run": what, "shapes of inputs": shapes, "strides of inputs": strides}
            facts["integers in inputs"] = f"{values:012x}, the first {first}"
            facts["floats in inputs"] = f"a sum of {total:.8g}" if apart else ""
            self.ranks.agree("this call", facts)

    def _send(self, said: list[float]) -> tuple[dist.Work, list[Tensor]]:
        mine = torch.tensor(said, dtype=torch.float64)
        every = [torch.empty_like(mine) for _ in range(self.ranks.world)]
        work = dist.all_gather(every, mine, group=self.ranks.group, async_op=True)
        assert work is not None
        return work, every

    def _waited(self, work: dist.Work, every: list[Tensor]) -> list[Tensor]:
        end = time.monotonic() + self.ranks.timeout.total_seconds()
        while True:
            try:
                work.wait(min(_LOOK, self.ranks.timeout))
                return every
            except RuntimeError as error:
                self.ranks.refuse_failed()
                if work.is_completed() or time.monotonic() > end:
                    raise self.ranks.lost(error) from error


def _backend_on_cpu(group: dist.ProcessGroup) -> str:
    try:
        return group._get_backend(torch.device("cpu")).name()
    except RuntimeError:
        return ""


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _digest(data: bytes) -> int:
    """A number that float64 holds."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=6).digest())


def _some(x: Tensor, most: int) -> Tensor:
    return x.detach().reshape(-1)[:: max(1, -(-x.numel() // most))]


def _checksum(floats: list[Tensor]) -> tuple[float, float]:
    total = square = 0.0
    for x in floats:
        some = _some(x, SAMPLED).cpu().double()
        total += float(some @ torch.arange(len(some), dtype=torch.float64).cos())
        square += float(some.square().sum())
    return total, math.sqrt(square)
