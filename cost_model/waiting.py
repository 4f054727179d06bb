"""How long this process has waited for cores that others had.

Linux counts, for each thread, the time in which it could have run and no core was free: the second
number of ``/proc/self/task/*/schedstat``, in nanoseconds. Where no system counts it, nothing is
known of neighbours, and times are taken as they are.
"""

from pathlib import Path

TASKS = Path("/proc/self/task")


def waited_seconds() -> float:
    """Seconds that the threads of this process have waited so far, together; 0 where nobody
    counts."""
    total = 0
    try:
        for task in TASKS.iterdir():
            total += int((task / "schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):  # a thread has ended meanwhile, or there is no file
        pass
    return total * 1e-9
