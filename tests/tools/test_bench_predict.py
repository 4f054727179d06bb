"""`ridgeline bench predict`: every case is timed, over shapes that were not seen before."""

from typer.testing import CliRunner

from ridgeline.tools import bench_predict
from ridgeline.tools.cli import app


def test_every_case_is_timed(monkeypatch):
    seen = []
    predict = bench_predict.predict

    def counted(*args, **shape):
        seen.append((args, tuple(shape.items())))
        return predict(*args, **shape)

    monkeypatch.setattr(bench_predict, "CALLS", 3)
    monkeypatch.setattr(bench_predict, "predict", counted)
    result = CliRunner().invoke(app, ["bench", "predict", "--rounds", "2"])
    assert result.exit_code == 0, result.output
    for target, op, *_ in bench_predict.CASES:
        assert f"{target} {op}" in result.output
    assert len(set(seen)) == len(seen) == len(bench_predict.CASES) * 7  # one before the rounds
