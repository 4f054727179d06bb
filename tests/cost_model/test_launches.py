"""The queue between host and device, by hand and by its laws."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.cost_model import Stream, Work, estimate, launch_queue, load_target
from ridgeline.cost_model.launches import queue

TIMES = st.lists(st.floats(1e-7, 1e-3), min_size=1, max_size=20)


def test_by_hand():
    found = queue([3.0, 1.0, 5.0, 1.0], 2.0)
    # issued at 2, 4, 6, 8; started at 2, 5, 6, 11
    assert found.latency == 12.0
    assert found.tklqt == (2 - 0) + (5 - 2) + (6 - 4) + (11 - 6)
    assert found.idle == 2.0
    assert (found.host, found.device, found.host_bound) == (8.0, 10.0, False)


@given(TIMES, st.floats(1e-6, 1e-4))
def test_laws(times, host):
    found = queue(times, host)
    count = len(times)
    assert found.latency >= max(sum(times), count * host) * (1 - 1e-9)
    assert found.latency <= (sum(times) + count * host) * (1 + 1e-9)
    assert found.tklqt >= count * host * (1 - 1e-9)
    assert found.idle >= host * (1 - 1e-6)


@given(TIMES)
def test_nothing_queues_behind_a_slow_host(times):
    host = 2 * max(times)
    found = queue(times, host)
    assert found.tklqt == pytest.approx(len(times) * host)
    assert found.host_bound
    assert found.latency == pytest.approx(len(times) * host + times[-1])


def test_tklqt_is_constant_in_the_batch_until_the_device_bounds():
    a100 = load_target("a100")
    tklqt = []
    for batch in (1, 2, 4, 8, 1 << 14):
        work = Work((Stream(1e4 * batch, 1e4 * batch),) * 50)
        found = launch_queue(work, a100)
        tklqt.append(found.tklqt)
        eager = estimate(work, a100, launch="eager")
        assert eager.seconds == pytest.approx(found.latency)
        assert found.host_bound == (batch < 1 << 14)
    assert tklqt[:4] == pytest.approx([tklqt[0]] * 4)
    assert tklqt[4] > 2 * tklqt[0]
