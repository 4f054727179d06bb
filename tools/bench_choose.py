"""How long the joint choice takes: knapsacks of random options, with conflicts and memory.

Options lie in sites of four that exclude each other, as the codecs of a layer do; their error uses
up a budget that holds about half of the sites; a tenth frees memory that a device lacks.
"""

import random
import statistics
import time
from collections.abc import Iterator

from ridgeline.cost_model import Option, solve

SITE = 4
COUNTS = (100, 1000, 10_000)


def options(count: int, seed: int = 0) -> list[Option]:
    """`count` options in sites of SITE."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        site = range(i - i % SITE, min(i - i % SITE + SITE, count))
        rivals = frozenset(str(j) for j in site if j != i)
        gain, error = draw.uniform(-1e-5, 4e-5), draw.uniform(1e-4, 1e-2)
        found.append(Option(str(i), gain, draw.randint(-2000, 500), error, rivals))
    return found


def cases(rounds: int) -> Iterator[tuple[int, float, int]]:
    """(options, median seconds, options taken) of each count."""
    for count in COUNTS:
        given = options(count)
        budget = 5e-3 * (count / SITE / 2) ** 0.5
        seconds, taken = [], 0
        for _ in range(rounds):
            start = time.perf_counter()
            chosen = solve(
                given, error_budget=budget, capacity_bytes=10**6, base_memory_bytes=10**6
            )
            seconds.append(time.perf_counter() - start)
            taken = len(chosen.chosen)
        yield count, statistics.median(seconds), taken
