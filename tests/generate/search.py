"""Random cases in batches, one capture each, until one fails; then the plainest that fails."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from generate.case import Case
from generate.verdict import Verdict, examine, shrunk

CASES = 80
"""Without ``--generate``: the same ones at each run."""
BATCH = 20


def search(
    config: pytest.Config, cases: st.SearchStrategy[Case], fails: Callable[[Verdict], bool]
) -> None:
    """Examine random cases; a failure is an AssertionError with the module's source."""
    wanted = config.getoption("--generate")
    batches = -(-(wanted or CASES) // BATCH)

    @settings(
        max_examples=batches,
        derandomize=wanted is None,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # `shrunk` needs one export per axis, not one per byte
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.lists(cases, min_size=BATCH, max_size=BATCH),
        st.sampled_from((False, False, False, True)),
    )
    def run(batch: list[Case], dynamic: bool) -> None:
        if not failed:  # else hypothesis would print the whole batch
            failed.extend(filter(fails, examine(batch, dynamic=dynamic)))

    failed: list[Verdict] = []
    run()
    if failed:
        raise AssertionError(str(shrunk(failed[0], fails)))
