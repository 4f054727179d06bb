"""`ridgeline calibrate`: its cases are what it says, it stores what it finds, it refuses noise."""

import io
from contextlib import nullcontext

import pytest
from rich.console import Console

from ridgeline.cost_model import probe, record
from ridgeline.cost_model.estimate import kind_of
from ridgeline.cost_model.refine import FEWEST, Measurement, read
from ridgeline.tools import calibrate
from ridgeline.tools.calibrate_cases import MOST, cases

pytest.importorskip("tvm")


@pytest.fixture
def host(monkeypatch, tmp_path):
    """The tests' steady CPU in place of a probe, and a cache folder of their own."""
    monkeypatch.setenv("RIDGELINE_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(record.SWITCH, raising=False)
    target = probe.probe_host()
    monkeypatch.setattr(probe, "unrefined_host", lambda: target)
    monkeypatch.setattr(probe.probe_host, "cache_clear", lambda: None, raising=False)
    return target


def _measured(spread):
    kinds = "norm", "elementwise"
    times = [
        Measurement(kind, f"{kind} {i}", 1e-6 * 2**i, 1e-7, 1e-6, 3e-6 * 2**i)
        for kind in kinds
        for i in range(FEWEST)
    ]
    return calibrate.Measured(tuple(times), spread)


def _run(monkeypatch, spread, **options):
    monkeypatch.setattr(calibrate, "measure", lambda host: _measured(spread))
    text = io.StringIO()
    calibrate.run(Console(file=text, width=100), lambda s: nullcontext(), **options)
    return text.getvalue()


def test_there_are_enough_cases_of_each_kind_and_not_too_many(host):
    found = list(cases())
    assert len({case.name for case in found}) == len(found) <= MOST
    kinds: dict[str, int] = {}
    for case in found[:: len(found) // 12]:  # each is compiled
        call, work = case.build(host)
        call()
        longest = max(work.kernels, key=lambda k: sum(k.bytes.values()))
        kinds[kind_of(longest)] = kinds.get(kind_of(longest), 0) + 1
    assert len(kinds) >= 4


def test_what_is_found_is_stored_and_logged(monkeypatch, host):
    text = _run(monkeypatch, 0.03)
    stored = read(probe.refinement_path(), host)
    assert stored.keys() == {"norm", "elementwise"}
    assert "stored in" in text
    assert len(list(record.entries())) == 2 * FEWEST
    log = io.StringIO()
    calibrate.show(Console(file=log, width=100))
    assert "8 measurements" in log.getvalue()


def test_noise_is_refused(monkeypatch, host):
    with pytest.raises(calibrate.NoisyMachine, match="by 40 %, where at most 15 % is expected"):
        _run(monkeypatch, 0.4)
    assert not probe.refinement_path().exists()


def test_a_dry_run_stores_nothing(monkeypatch, host):
    assert "nothing is stored" in _run(monkeypatch, 0.4, dry=True)
    assert not probe.refinement_path().exists()


def test_an_empty_log_says_so(host):
    text = io.StringIO()
    calibrate.show(Console(file=text, width=100))
    assert "nothing logged yet" in text.getvalue()
