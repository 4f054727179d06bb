"""Hessians of a model's linear layers: their values, what is shared, what is held, what is run."""

import pytest
import torch
from torch import nn

from ridgeline.passes.quantization import HessiansOnDemand, QuantizationError, collect_hessians


class Block(nn.Module):
    """q and k read one tensor, `out` another; `idle` is never called."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, inner), nn.Linear(width, inner)
        self.out, self.idle = nn.Linear(inner, width), nn.Linear(width, width)
        self.runs = 0

    def forward(self, x, *, scale=1.0):
        h = x.tanh() * scale
        y = self.out(self.q(h) * self.k(h).sigmoid())
        self.runs += 1
        return y


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(Block(12, 20), Block(12, 20))


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [torch.randn(2, 5, 12), torch.randn(1, 3, 12), torch.randn(4, 1, 12)]


NAMES = ["1.out", "0.q", "0.k", "0.out", "1.q", "1.k"]


def test_values_are_those_of_the_law(model, batches):
    hessians = collect_hessians(model, NAMES, batches)
    assert sorted(hessians) == sorted(NAMES)
    rows = torch.cat([b.reshape(-1, 12) for b in batches]).tanh().double()
    expected = 2 / len(rows) * rows.T @ rows
    torch.testing.assert_close(hessians["0.q"].double(), expected, rtol=1e-6, atol=1e-7)
    assert hessians["0.q"].dtype == torch.float32


def test_readers_of_one_input_share_one_hessian(model, batches):
    hessians = collect_hessians(model, NAMES, batches)
    assert hessians["0.q"] is hessians["0.k"]
    assert hessians["0.q"] is not hessians["1.q"]
    assert len({id(h) for h in hessians.values()}) == 4


def test_hessians_on_demand_keep_to_the_limit(model, batches):
    whole, limit = collect_hessians(model, NAMES, batches), 4 * (12**2 + 20**2)
    lazy = HessiansOnDemand(model, NAMES, batches, byte_limit=limit)
    order = ["0.q", "0.k", "0.out", "1.q", "1.k", "1.out"]
    assert list(lazy) == [f"{name}.weight" for name in order]
    assert "0.idle.weight" not in lazy
    for name in (*order, "0.q"):
        assert torch.equal(lazy[f"{name}.weight"], whole[name])
        held = {id(h): h.nbytes for h in lazy._held.values()}
        assert sum(held.values()) <= limit


def test_a_chunk_costs_one_pass_over_the_batches(model, batches):
    lazy = HessiansOnDemand(model, NAMES, batches, byte_limit=4 * (12**2 + 20**2))
    before = model[1].runs
    assert [lazy[name].isfinite().all() for name in lazy]
    # The pass for block 0 stops inside it, that for block 1 inside that: no forward is completed.
    assert model[1].runs == before


def test_what_fits_is_computed_at_once(model, batches):
    lazy = HessiansOnDemand(model, NAMES, batches)
    with torch.no_grad():
        model[0].out.weight.zero_()
    assert torch.equal(lazy["1.q.weight"], lazy["1.k.weight"])
    after = collect_hessians(model, ["1.q"], batches)["1.q"]
    assert not torch.allclose(lazy["1.q.weight"], after)


def test_a_pass_stops_after_the_last_layer_of_its_chunk(model, batches):
    collect_hessians(model, ["0.q", "0.k"], batches)
    # The first run finds who shares what and runs through; the counted runs stop inside block 0.
    assert [block.runs for block in model] == [1, 1]


def test_batches_may_be_tuples_or_mappings(model, batches):
    block = model[0]
    plain = collect_hessians(block, ["q"], [2 * b for b in batches])["q"]
    assert torch.equal(plain, collect_hessians(block, ["q"], [(2 * b,) for b in batches])["q"])
    named = collect_hessians(block, ["q"], [{"x": b, "scale": 2.0} for b in batches])["q"]
    single = collect_hessians(block, ["q"], batches)["q"]
    torch.testing.assert_close(named, 4 * single)


def test_transformers_conv1d_is_read_transposed():
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(7, 5)
    x = torch.randn(9, 5)
    hessian = collect_hessians(nn.Sequential(conv), ["0"], [x])["0"]
    torch.testing.assert_close(hessian, 2 / 9 * x.T @ x)


def test_progress_counts_every_batch(model, batches):
    calls = []
    collect_hessians(model, NAMES, batches, progress=lambda *at: calls.append(at))
    assert calls == [(i, 3) for i in range(1, 4)]


def test_the_model_is_left_as_it_was(model, batches):
    model.train()
    collect_hessians(model, NAMES, batches)
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_cannot_be_calibrated_is_refused(model, batches):
    with pytest.raises(QuantizationError, match=r"no calibration batch reached 0\.idle"):
        collect_hessians(model, ["0.q", "0.idle"], batches)
    with pytest.raises(QuantizationError, match=r"needs layers and batches"):
        collect_hessians(model, ["0.q"], [])
    with pytest.raises(QuantizationError, match=r"expected nn\.Linear"):
        collect_hessians(model, ["0"], batches)
    with pytest.raises(QuantizationError, match="above the limit of 100"):
        collect_hessians(model, ["0.q"], batches, byte_limit=100)
    with pytest.raises(QuantizationError, match="above the limit of 100"):
        HessiansOnDemand(model, ["0.q"], batches, byte_limit=100)
    with pytest.raises(QuantizationError, match=r"inputs of 0\.q hold NaN"):
        collect_hessians(model, ["0.q"], [torch.full((2, 12), torch.nan)])
