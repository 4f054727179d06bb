"""The log of predicted against measured: lines come back, it stays small, it has a switch."""

import pytest

from ridgeline.cost_model import record


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RIDGELINE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(record.SWITCH, raising=False)
    return tmp_path / "cache"


def test_lines_come_back_in_order():
    assert list(record.entries()) == []
    for i in range(3):
        record.append("cpu", "norm", f"case {i}", 1e-6, 2e-6)
    found = list(record.entries())
    assert [e.what for e in found] == ["case 0", "case 1", "case 2"]
    assert (found[0].target, found[0].kind, found[0].measured) == ("cpu", "norm", 2e-6)


def test_it_can_be_switched_off(monkeypatch, folder):
    monkeypatch.setenv(record.SWITCH, "0")
    record.append("cpu", "norm", "case", 1e-6, 2e-6)
    assert not folder.exists()


def test_it_stays_small(monkeypatch, folder):
    monkeypatch.setattr(record, "LARGEST", 2000)
    for i in range(100):
        record.append("cpu", "norm", f"case {i}", 1e-6, 2e-6)
    assert record.log_path().stat().st_size < 2500
    assert [e.what for e in record.entries()][-1] == "case 99"


def test_a_foreign_line_is_left_out_and_said(caplog):
    record.append("cpu", "norm", "case", 1e-6, 2e-6)
    with record.log_path().open("a") as file:
        file.write("not json\n")
    assert len(list(record.entries())) == 1
    assert "not a line of this log" in caplog.text


def test_a_log_that_cannot_be_written_costs_only_the_log(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RIDGELINE_CACHE_DIR", str(tmp_path / "file"))
    record.append("cpu", "norm", "case", 1e-6, 2e-6)
    assert "isn't logged" in caplog.text
