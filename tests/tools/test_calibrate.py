"""`ridgeline calibrate`: its cases are what it says, it stores what it finds, it refuses noise."""

import dataclasses
import io
from contextlib import nullcontext

import pytest
from rich.console import Console

from ridgeline.cost_model import Norm, Work, probe, record
from ridgeline.cost_model.estimate import kind_of
from ridgeline.cost_model.refine import FEWEST, Measurement, left_out, read, refine
from ridgeline.tools import calibrate
from ridgeline.tools.calibrate_cases import MOST, cases
from ridgeline.tools.undisturbed import Samples

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


def _measured(left_out=0):
    kinds = "norm", "elementwise"
    times = [
        Measurement(kind, f"{kind} {i}", 1e-6 * 2**i, 1e-7, 1e-6, 0.0, 3e-6 * 2**i)
        for kind in kinds
        for i in range(FEWEST)
    ]
    return calibrate.Measured(tuple(times), 0.03, tuple(f"case {i}" for i in range(left_out)), 0.2)


def _run(monkeypatch, left_out=0, **options):
    monkeypatch.setattr(calibrate, "cases", lambda: ())
    monkeypatch.setattr(calibrate, "measure", lambda *given: _measured(left_out))
    text = io.StringIO()
    calibrate.run(Console(file=text, width=100), lambda s: nullcontext(), **options)
    return " ".join(text.getvalue().split())


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
    text = _run(monkeypatch)
    stored = read(probe.refinement_path(), host)
    assert stored.keys() == {"norm", "elementwise"}
    assert "stored in" in text
    assert "20 % of the samples were disturbed and do not count" in text
    assert len(list(record.entries())) == 2 * FEWEST
    log = io.StringIO()
    calibrate.show(Console(file=log, width=100))
    assert "8 measurements" in log.getvalue()


def test_a_few_disturbed_cases_are_left_out(monkeypatch, host):
    assert "left out, as never undisturbed: case 0, case 1" in _run(monkeypatch, 2)
    assert probe.refinement_path().exists()


def test_noise_is_refused(monkeypatch, host):
    with pytest.raises(calibrate.NoisyMachine, match=r"disturbed 8 of 16 benchmarks.*--patience"):
        _run(monkeypatch, 8)
    noisy = dataclasses.replace(host, spread=0.4)
    monkeypatch.setattr(probe, "steady_host", lambda patience: noisy)
    with pytest.raises(calibrate.NoisyMachine, match="by 40 %, where at most 15 % is expected"):
        _run(monkeypatch)
    assert not probe.refinement_path().exists()


def test_a_dry_run_stores_nothing(monkeypatch, host):
    assert "nothing is stored" in _run(monkeypatch, 8, dry=True)
    assert not probe.refinement_path().exists()


def test_cases_in_doubt_are_left_out_and_calling_is_subtracted(monkeypatch, host):
    work = Work((Norm(64, 576),))
    built = [(name, lambda: None, work) for name in ("steady", "noisy", "one element")]
    samples = (
        Samples([2e-5] * 3, 1),
        Samples([2e-5, 3e-5, 3e-5]),
        Samples([5e-6 + host.launch_s] * 3),
    )
    monkeypatch.setattr(calibrate, "time_calls", lambda *given: list(samples))
    found = calibrate.measure(host, built, 1.0)
    (measured,) = found.measurements
    assert (measured.name, measured.kind) == ("steady", "norm")
    assert measured.measured == pytest.approx(1.5e-5)
    assert found.left_out == ("noisy",)
    assert found.disturbed == pytest.approx(0.1)


def test_the_held_out_error_is_of_fits_without_the_case(host):
    kept = [
        Measurement("norm", f"norm {i}", 1e-6 * 2**i, 0.0, 0.0, 0.0, 2e-6 * 2**i) for i in range(6)
    ]
    out = Measurement("norm", "an odd one", 1e-6, 0.0, 0.0, 0.0, 20e-6)
    alone = left_out([*kept, out])[-1]
    assert alone == pytest.approx(2e-6, rel=0.2)
    others = [dataclasses.replace(out, name=f"odd {i}") for i in range(6)]
    assert 1.1 * alone < left_out([*kept, *others, out])[-1]
    found = calibrate.Measured((*kept, out), 0.0)
    text = io.StringIO()
    Console(file=text, width=100).print(calibrate.table(found, refine(found.measurements)))
    row = next(line for line in text.getvalue().splitlines() if "ridgeline's kernels" in line)
    assert row.split()[2] == "7"


def test_an_empty_log_says_so(host):
    text = io.StringIO()
    calibrate.show(Console(file=text, width=100))
    assert "nothing logged yet" in text.getvalue()
