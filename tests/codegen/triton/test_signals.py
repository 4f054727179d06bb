"""The barrier's PTX, executed instruction by instruction in random orders of all ranks' threads."""

import random

import pytest

pytest.importorskip("triton", reason="the barrier is a Triton function")

from ridgeline.codegen.triton import signals
from tests.codegen.triton.ptx import Machine, Thread, Trap

TEXT = signals._BARRIER.value
TABLE, PADS, PAD_BYTES = 0x1000, 0x100000, 0x1000
LIMIT = 10_000_000


class Ranks:
    """W ranks' pads in one memory, and the threads of their blocks."""

    def __init__(self, world: int, blocks: list[int]) -> None:
        self.world, self.blocks, self.machine = world, blocks, Machine()
        for rank in range(world):
            self.machine.memory[TABLE + 8 * rank] = self.pad(rank)
            for word in range(max(blocks) * world):
                self.machine.memory[self.pad(rank) + 4 * word] = 0

    def pad(self, rank: int) -> int:
        return PADS + PAD_BYTES * rank

    def words(self) -> list[int]:
        return [v for address, v in self.machine.memory.items() if address >= PADS]

    def barrier(self, rank: int, block: int, limit: int = LIMIT) -> list[Thread]:
        """A warp of the block; threads beyond the ranks have nothing to do."""
        operands = (TABLE, rank, self.world, block, self.blocks[rank], limit)
        return [Thread(TEXT, operands, thread, self.machine) for thread in range(self.world + 2)]


def advance(thread: Thread, steps: int) -> None:
    for _ in range(steps):
        thread.step()


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_no_block_leaves_before_its_peers_came(world: int, seed: int) -> None:
    rounds, blocks = 3, 2
    ranks, draw = Ranks(world, [blocks] * world), random.Random(seed)
    entered = {(r, b): 1 for r in range(world) for b in range(blocks)}
    running = {at: ranks.barrier(*at) for at in entered}
    while running:
        at = draw.choice(list(running))
        thread = draw.choice([t for t in running[at] if not t.done])
        advance(thread, draw.randrange(1, 30))
        if not all(t.done for t in running[at]):
            continue
        rank, block = at
        # Leaving round k, every peer's block of this number has come to round k.
        assert all(entered[peer, block] >= entered[at] for peer in range(world))
        if entered[at] == rounds:
            del running[at]
        else:
            entered[at] += 1
            running[at] = ranks.barrier(rank, block)
    assert not any(ranks.words())  # ready for the next launch
    put = [address for op, address in ranks.machine.order if "release" in op]
    taken = [address for op, address in ranks.machine.order if "acquire" in op]
    assert len(put) == len(taken) == rounds * blocks * world * (world - 1)
    assert sorted(put) == sorted(taken)
    # Every signal has a word of its own: [block, sender] in the receiver's pad.
    assert set(put) == {
        ranks.pad(owner) + 4 * (block * world + sender)
        for owner in range(world)
        for sender in range(world)
        for block in range(blocks)
        if sender != owner
    }


def test_another_grid_traps_at_once() -> None:
    for first in (0, 1):
        ranks = Ranks(2, [2, 3])
        threads = {rank: ranks.barrier(rank, 0)[1 - rank] for rank in (0, 1)}
        order = [first, 1 - first]
        for _ in range(200):
            for rank in order:
                try:
                    threads[rank].step()
                except Trap:
                    assert ranks.machine.clock < 1000
                    break
            else:
                continue
            break
        else:
            pytest.fail("expected a trap")
        assert not any(thread.done for thread in threads.values())


def test_a_peer_that_stays_away_ends_the_kernel() -> None:
    ranks = Ranks(2, [1, 1])
    waits = ranks.barrier(0, 0, limit=5000)[1]
    with pytest.raises(Trap):
        advance(waits, 20_000)
    assert 5000 < ranks.machine.clock < 6000
    assert ranks.machine.memory[ranks.pad(1)] == 1  # it had put its own signal
    # The word that nobody took holds up the next put, which traps too.
    puts = ranks.barrier(0, 0, limit=5000)[1]
    with pytest.raises(Trap):
        advance(puts, 20_000)


def test_only_a_thread_per_peer_signals() -> None:
    ranks = Ranks(4, [1] * 4)
    for thread in (1, 4, 5):  # the own rank, and threads beyond the ranks
        idle = ranks.barrier(1, 0)[thread]
        advance(idle, 100)
        assert idle.done
    assert ranks.machine.order == []


def test_the_interpreter_knows_what_it_runs() -> None:
    thread = Thread("{ popc.b32 %a, %b; }", (), 0, Machine())
    with pytest.raises(NotImplementedError, match=r"popc\.b32"):
        thread.step()
