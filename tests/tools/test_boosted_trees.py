"""Boosted trees: steps are found on points held out, noise is left; numbers and arrays agree."""

import numpy as np

from ridgeline.cost_model.calibration import _arrays, of_trees
from ridgeline.tools.boosted_trees import COUNTS, DEPTH, boosted


def _steps(x: np.ndarray) -> np.ndarray:
    return 0.3 * (x[:, 0] > 4) - 0.2 * (x[:, 1] % 2) * (x[:, 0] <= 4)


def _rows(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 9, (n, 3)).astype(float)


def test_steps_and_their_interaction_are_found_on_points_held_out():
    x = _rows(600, 0)
    y = _steps(x)
    y[::50] += 5.0  # outliers, which an L1 loss leaves alone
    found = _arrays(boosted(np.c_[x, x[:, 1] % 2], y, np.arange(600)))
    new = _rows(200, 1)
    error = of_trees(found, (*new.T, new[:, 1] % 2)) - _steps(new)
    assert np.abs(error).max() < 0.05


def test_a_number_is_predicted_as_in_an_array():
    x = _rows(300, 2)
    residual = boosted(x, _steps(x) + x[:, 2] / 100, np.arange(300))
    trees, leaves = np.shape(residual["values"])
    assert trees in COUNTS
    assert leaves == 1 << DEPTH
    found = _arrays(residual)
    many = of_trees(found, tuple(x.T))
    one = [of_trees(found, tuple(map(float, row))) for row in x]
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-12)


def test_what_other_layers_do_not_share_gets_no_trees():
    rng = np.random.default_rng(4)
    layer = np.repeat(np.arange(60), 5)
    x = np.c_[layer, rng.integers(0, 9, 300)].astype(float)
    noise = rng.normal(size=60)[layer]  # alike within a layer, unlike any other's
    assert not boosted(x, noise, layer)["values"]
    assert boosted(x, noise, np.arange(300))["values"]


def test_few_layers_are_told_apart_too():
    x = _rows(300, 5)
    y = _steps(x)
    for layer in (np.zeros(300, int), 3 * np.arange(300) % 9, 7 + 3 * (np.arange(300) % 2)):
        assert boosted(x, y, layer)["values"]


def test_what_never_varies_has_an_offset_and_no_trees():
    found = boosted(np.ones((40, 2)), np.full(40, 0.25), np.arange(40))
    assert found == {"offset": 0.25, "features": [], "cuts": [], "values": []}
    assert of_trees(_arrays(found), (1.0, 1.0)) == 0.25


def test_a_feature_of_one_value_is_never_asked_for():
    x = _rows(200, 3)
    found = boosted(np.c_[np.full(200, 7.0), x], _steps(x), np.arange(200))
    assert 0 not in {f for tree in found["features"] for f in tree}
