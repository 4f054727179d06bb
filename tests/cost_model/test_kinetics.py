"""Kinetics: golden values worked by hand, and the exact sparse sum against the plain one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.cost_model import load_target
from ridgeline.cost_model.kinetics import Decoder, context_sum, dense, intensity, sparse

SMALL = Decoder(parameters=1000, heads=8, kv_heads=2, head_dim=4)


def test_dense_golden():
    cost = dense(SMALL, prompt=100, generated=10, trials=3, sharing=6)
    assert cost.compute == 3 * (2 * 1000 * 10 + 2 * (200 + 10) * 10 * 8 * 4)
    assert cost.memory == 2 * (200 + 3 * 10) * 10 * 2 * 4
    assert cost.parameter_reads == 3 * 1000 * 10 / 6
    assert cost.eflops(562.5) == cost.compute + 562.5 * (cost.memory + 5000)


def test_sparse_golden():
    cost = sparse(SMALL, prompt=100, generated=10, budget=50, trials=3, block=16)
    assert cost.compute == 3 * (20000 + 4 * 500 * 32 + (210 // 16) * 10 * 32)
    assert cost.memory == 3 * 4 * 500 * 8 + (230 // 16) * 10 * 8


@given(st.integers(0, 300), st.integers(0, 200), st.integers(0, 200))
def test_context_sum_is_exact(budget, prompt, generated):
    plain = sum(min(budget, prompt + t) for t in range(generated))
    assert context_sum(budget, prompt, generated) == plain


def test_published_intensity_of_b200():
    assert intensity(load_target("b200")) == pytest.approx(562.5)
