"""Samples during which others had the cores do not count, and are taken again."""

import math
import time

import pytest

from ridgeline.tools import undisturbed
from ridgeline.tools.undisturbed import AGREEING, Samples, time_calls, waited_seconds


class Machine:
    """A clock on which each call takes `seconds`, and others take cores as `waits` says."""

    def __init__(self, seconds, waits):
        self.now = self.waited = 0.0
        self.seconds, self.waits, self.calls = seconds, waits, 0

    def call(self):
        self.calls += 1
        lost = self.waits(self.calls)
        self.now += self.seconds + lost
        self.waited += lost

    def time(self, patience):
        (found,) = time_calls([self.call], 4, 0.01, patience, lambda: self.now, lambda: self.waited)
        return found


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(undisturbed, "PAUSE_S", 0.0)


def test_a_quiet_machine_needs_no_patience():
    machine = Machine(1e-3, lambda call: 0.0)
    found = machine.time(patience=100.0)
    assert found.least == pytest.approx(1e-3)
    assert (len(found.seconds), found.disturbed) == (4, 0)
    assert found.doubt == pytest.approx(0.0, abs=1e-9)


def test_disturbed_samples_are_taken_again():
    machine = Machine(1e-3, lambda call: 5e-3 if call % 40 < 30 else 0.0)
    found = machine.time(patience=100.0)
    assert found.disturbed > 0
    assert len(found.seconds) >= AGREEING
    assert found.least == pytest.approx(1e-3)


def test_what_is_never_undisturbed_stays_in_doubt_once_the_patience_is_over():
    machine = Machine(1e-3, lambda call: 1e-3)
    found = machine.time(patience=1.0)
    assert found.seconds == []
    assert found.doubt == found.least == math.inf
    assert 1.0 < machine.now < 2.0


def test_the_doubt_is_how_far_the_least_samples_disagree():
    assert Samples([1.0, 1.1, 1.3, 2.0]).doubt == pytest.approx(0.3)
    assert Samples([1.0, 1.1]).doubt == math.inf


def test_the_system_tells_how_long_threads_waited():
    before = waited_seconds()
    time.sleep(0.001)
    assert waited_seconds() >= before >= 0.0
