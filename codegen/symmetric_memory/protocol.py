"""The signal protocol of `ridgeline.codegen.triton.all_reduce_norm` as steps in a partial order.

Law. One launch on one rank, whose blocks b run at the same time; W ranks, peers p:

    produce                     the partial sums of every row reach the rank's buffer
    block b    put(b, p)        pad of p [b, rank]: 0 -> token     a thread per peer; it spins while
               wait(b, p)       pad of the rank [b, p]: token -> 0     the word is another
               load(t, p), store(t, p)  for the rows t of the block (`rows_of`)
               put(b, p), wait(b, p)    again
    consume                     the next kernel reads the results

Orders that hold: a thread's own; block-wide synchronisation between signals and rows; the ends of
kernels on a stream. `release` puts the block's loads and stores before a put, `acquire` those that
follow after a wait: without them the hardware may move these across, so the order then lacks
those edges, and every interleaving of the steps that the remaining order allows can happen.

`Protocol` switches off one thing at a time, so that a checker can show that each is needed.
Sources: PTX ISA, memory consistency model; PyTorch's symmetric memory, `sync_remote_blocks`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import networkx as nx

from ridgeline.ir.errors import RidgelineError

KERNEL = -1  # the block of a step that belongs to a whole launch


class InvalidRun(RidgelineError):
    """A number of ranks, rows, blocks or launches that no run has."""


class DivergentGrids(RidgelineError):
    """Two ranks launched different numbers of blocks; the kernel ends with a trap."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """variant: "one_shot" or "two_shot" (multimem signals as two_shot). The rest is true in the
    kernels: opening and closing barrier, release and acquire semantics, a put that waits until its
    word is 0, words that carry the grid, put before wait, signal words of each stream's own.
    """

    variant: str
    opening: bool = True
    closing: bool = True
    release: bool = True
    acquire: bool = True
    compare: bool = True
    token: bool = True
    put_first: bool = True
    own_words: bool = True


@dataclass(frozen=True, slots=True)
class Step:
    """kind: "produce", "start", "put", "wait", "load", "store", "end" or "consume"; peer: the rank
    whose pad or buffer it touches; round: 0 in the opening barrier, 1 in the closing one."""

    kind: str
    rank: int
    launch: int
    block: int = KERNEL
    peer: int = -1
    row: int = -1
    round: int = -1

    def __str__(self) -> str:
        place = f"rank {self.rank}, launch {self.launch}"
        place += f", block {self.block}" if self.block != KERNEL else ""
        what = self.kind + (f" row {self.row}" if self.row >= 0 else "")
        what += f" ({('opening', 'closing')[self.round]})" if self.round >= 0 else ""
        return f"{place}: {what}" + (f" <-> rank {self.peer}" if self.peer >= 0 else "")


@dataclass(frozen=True)
class Run:
    """What is run: `rows` rows on `world` ranks, rank r with blocks[r] blocks, `launches` times.

    streams: 1, or as many as launches, which then run at the same time on buffers of their own.
    resident: how many blocks of a launch a device holds at once, None for all of them.
    """

    protocol: Protocol
    world: int
    rows: int
    blocks: tuple[int, ...]
    launches: int = 1
    streams: int = 1
    resident: int | None = None

    def __post_init__(self) -> None:
        counts = (self.rows, self.launches, *self.blocks)
        if self.world < 2 or len(self.blocks) != self.world or min(counts) < 1:
            raise InvalidRun(
                "expected 2 or more ranks, a number of blocks for each, and at least one row,"
                f" block and launch; found {self}"
            )
        if self.streams not in (1, self.launches):
            raise InvalidRun(f"expected 1 or {self.launches} streams, found {self.streams}")
        if self.protocol.variant not in ("one_shot", "two_shot"):
            raise InvalidRun(f"expected one_shot or two_shot, found {self.protocol.variant!r}")

    def token(self, rank: int) -> int:
        """The word that `rank` puts: its number of blocks, or 1 where words carry nothing."""
        return self.blocks[rank] if self.protocol.token else 1

    def rows_of(self, rank: int, block: int) -> range:
        """The rows that a block sums; the last ranks of a two-shot may have none."""
        first, own = 0, self.rows
        if self.protocol.variant == "two_shot":
            shard = -(-self.rows // self.world)
            first = rank * shard
            own = max(0, min(shard, self.rows - first))
        return range(first + block, first + own, self.blocks[rank])

    def word(self, step: Step) -> tuple[int, int, int, int]:
        """(owner, stream, block, sender): the signal word that a put or wait touches."""
        stream = step.launch if self.streams > 1 and self.protocol.own_words else 0
        owner, sender = (step.peer, step.rank) if step.kind == "put" else (step.rank, step.peer)
        return owner, stream, step.block, sender

    def signal(self, step: Step, word: int) -> int | None:
        """The word after a put or wait that finds `word`; None: the thread goes on spinning.

        Raises DivergentGrids.
        """
        token = self.token(step.rank)
        if step.kind == "put":
            return None if word and self.protocol.compare else token
        if word in (0, token):
            return 0 if word else None
        raise DivergentGrids(
            f"rank {step.rank} launched {token} blocks and rank {step.peer} {word};"
            " every rank must launch the same grid"
        )

    @cached_property
    def order(self) -> nx.DiGraph:
        """Every step, with an edge from each to those that must come after it."""
        graph = nx.DiGraph()
        for rank in range(self.world):
            previous = None
            for launch in range(self.launches):
                begin, end = (Step(k, rank, launch) for k in ("produce", "consume"))
                graph.add_edge(begin, end)
                if previous is not None and self.streams == 1:
                    graph.add_edge(previous, begin)
                previous = end
                for block in range(self.blocks[rank]):
                    graph.add_edges_from(self._block(rank, launch, block, begin, end))
        return graph

    def _block(
        self, rank: int, launch: int, block: int, begin: Step, end: Step
    ) -> Iterator[tuple[Step, Step]]:
        kernel = (rank, launch, block)
        start, stop = (Step(k, *kernel) for k in ("start", "end"))
        yield begin, start
        yield stop, end
        rows = self._rows(*kernel)
        yield from zip([start, *rows], [*rows, stop], strict=True)
        for number, kept in enumerate((self.protocol.opening, self.protocol.closing)):
            for peer in range(self.world):
                if peer == rank or not kept:
                    continue
                put, wait = (Step(k, *kernel, peer=peer, round=number) for k in ("put", "wait"))
                yield (put, wait) if self.protocol.put_first else (wait, put)
                yield from ((start, put), (start, wait), (put, stop), (wait, stop))
                if number == 0 and self.protocol.acquire:
                    yield from ((wait, row) for row in rows)
                if number == 1 and self.protocol.release:
                    yield from ((row, put) for row in rows)
                if number == 1 and self.protocol.opening:
                    # block-wide synchronisation keeps the threads of both rounds apart
                    others = [p for p in range(self.world) if p != rank]
                    for kind in ("put", "wait"):
                        opened = [Step(kind, *kernel, peer=p, round=0) for p in others]
                        yield from ((step, after) for step in opened for after in (put, wait))

    def _rows(self, rank: int, launch: int, block: int) -> list[Step]:
        """Loads and stores of a block, in order. Loads change nothing, so that for each the orders
        in which others come before or after it exist whatever its place in the list."""
        steps = []
        for row in self.rows_of(rank, block):
            kinds = ("load",) if self.protocol.variant == "one_shot" else ("load", "store")
            for kind in kinds:
                steps += [Step(kind, rank, launch, block, p, row) for p in range(self.world)]
        return steps
