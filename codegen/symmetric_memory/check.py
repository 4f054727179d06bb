"""Every interleaving of a protocol's steps, by breadth-first search over states.

A state is what has been done, the signal words, and for each buffer and row which launch's partial
sums or results it holds. Found are:

    stale       a load that meets other than its launch's partial sums, or a consumer that meets
                other than its launch's results
    deadlock    steps are left and none can be taken
    divergent   a wait meets the word of another grid (the kernel traps: meant to happen)

Search ends in such a state, and goes on elsewhere, so a run without findings is free of them in
all interleavings of that size. Traces are among the shortest.
"""

from collections import deque
from dataclasses import dataclass, field

from ridgeline.codegen.symmetric_memory.protocol import DivergentGrids, Run, Step
from ridgeline.ir.errors import RidgelineError

State = tuple[int, tuple[int, ...], tuple[int, ...]]


class StateLimit(RidgelineError):
    """The run has more states than were allowed."""


@dataclass(frozen=True)
class Exploration:
    """states visited; completed: whether some interleaving runs to its end; found: kind -> the
    shortest trace to it, whose last line says what went wrong."""

    states: int
    completed: bool
    found: dict[str, tuple[str, ...]]


@dataclass
class _Tables:
    """A run's steps by number, with what each needs and touches."""

    run: Run
    steps: list[Step] = field(init=False)
    needs: list[int] = field(init=False)
    word: list[int] = field(init=False)
    cell: list[int] = field(init=False)

    def __post_init__(self) -> None:
        run, graph = self.run, self.run.order
        self.steps = list(graph)
        number = {step: i for i, step in enumerate(self.steps)}
        self.needs = [sum(1 << number[p] for p in graph.predecessors(s)) for s in self.steps]
        words: dict[tuple[int, ...], int] = {}
        self.word, self.cell = [-1] * len(self.steps), [-1] * len(self.steps)
        for i, step in enumerate(self.steps):
            if step.kind in ("put", "wait"):
                self.word[i] = words.setdefault(run.word(step), len(words))
            if step.kind in ("load", "store"):
                self.cell[i] = self.cell_of(step, step.peer, step.row)
        self.words = len(words)
        self.cells = run.streams * run.world * run.rows
        self.blocks: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for i, step in enumerate(self.steps):
            if step.kind == "start":
                end = Step("end", step.rank, step.launch, step.block)
                self.blocks.setdefault((step.rank, step.launch), []).append((i, number[end]))

    def cell_of(self, step: Step, owner: int, row: int) -> int:
        buffer = step.launch if self.run.streams > 1 else 0
        return (buffer * self.run.world + owner) * self.run.rows + row

    def room(self, step: Step, done: int) -> bool:
        """Whether the device holds one more block of this launch."""
        if self.run.resident is None:
            return True
        active = sum(
            1
            for start, end in self.blocks[step.rank, step.launch]
            if done >> start & 1 and not done >> end & 1
        )
        return active < self.run.resident


class _Stale(Exception):
    pass


def _partial(launch: int) -> int:
    return 2 * launch + 1


def _result(launch: int) -> int:
    return 2 * launch + 2


def _after(tables: _Tables, i: int, state: State) -> State | None:
    """The state after step i, None where it cannot be taken now. Raises _Stale, DivergentGrids."""
    done, words, cells = state
    step, run = tables.steps[i], tables.run
    if step.kind == "start" and not tables.room(step, done):
        return None
    if step.kind in ("put", "wait"):
        at = tables.word[i]
        word = run.signal(step, words[at])
        if word is None:
            return None
        words = (*words[:at], word, *words[at + 1 :])
    elif step.kind in ("produce", "consume"):
        first = tables.cell_of(step, step.rank, 0)
        if step.kind == "produce":
            cells = (
                *cells[:first],
                *[_partial(step.launch)] * run.rows,
                *cells[first + run.rows :],
            )
        elif run.protocol.variant == "two_shot":
            held = cells[first : first + run.rows]
            if any(cell != _result(step.launch) for cell in held):
                raise _Stale(_said(held, _result(step.launch)))
    elif step.kind == "load":
        held = cells[tables.cell[i]]
        if held != _partial(step.launch):
            raise _Stale(_said((held,), _partial(step.launch)))
    elif step.kind == "store":
        at = tables.cell[i]
        cells = (*cells[:at], _result(step.launch), *cells[at + 1 :])
    return done | 1 << i, words, cells


def _said(held: tuple[int, ...], wanted: int) -> str:
    names = [
        "nothing" if not c else f"launch {(c - 1) // 2}'s {'partial sum' if c % 2 else 'result'}"
        for c in (*held, wanted)
    ]
    return f"expected {names[-1]}, found {', '.join(dict.fromkeys(names[:-1]))}"


def explore(run: Run, limit: int = 2_000_000) -> Exploration:
    """Takes every interleaving of `run`. Raises StateLimit beyond `limit` states."""
    tables = _Tables(run)
    everything = (1 << len(tables.steps)) - 1
    begin: State = (0, (0,) * tables.words, (0,) * tables.cells)
    came: dict[State, tuple[State, int] | None] = {begin: None}
    queue, found, completed = deque([begin]), {}, False
    while queue:
        state = queue.popleft()
        moved = False
        for i, need in enumerate(tables.needs):
            if state[0] >> i & 1 or need & ~state[0]:
                continue
            try:
                after = _after(tables, i, state)
            except (_Stale, DivergentGrids) as error:
                kind = "stale" if isinstance(error, _Stale) else "divergent"
                if kind not in found:
                    found[kind] = (*_trace(tables, came, state), f"{tables.steps[i]}: {error}")
                moved = True
                continue
            if after is None:
                continue
            moved = True
            if after not in came:
                if len(came) >= limit:
                    raise StateLimit(f"expected at most {limit} states; take a smaller {run}")
                came[after] = (state, i)
                queue.append(after)
        if state[0] == everything:
            completed = True
        elif not moved and "deadlock" not in found:
            waiting = [
                str(step)
                for i, step in enumerate(tables.steps)
                if not state[0] >> i & 1 and not tables.needs[i] & ~state[0]
            ]
            said = f"nothing can go on; waiting: {'; '.join(waiting)}"
            found["deadlock"] = (*_trace(tables, came, state), said)
    return Exploration(len(came), completed, found)


def _trace(tables: _Tables, came: dict[State, tuple[State, int] | None], state: State) -> list[str]:
    steps = []
    while (origin := came[state]) is not None:
        state, i = origin
        steps.append(str(tables.steps[i]))
    return steps[::-1]
