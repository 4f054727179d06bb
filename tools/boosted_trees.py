"""Symmetric trees, boosted: a residual of ln seconds from features of a shape.

    f(x) = offset + Σ over trees of value[2⁵ (x_a > cut_a) + … + (x_f > cut_f)]

Every tree asks the same six questions of all its leaves, so that an evaluation is one comparison
of arrays. Each fits what the trees before it left, in an L1 loss by reweighting. How many there are
is what predicts rows best that had no part in them: thousands of even measurements bear hundreds of
trees, a few hundred that scatter a dozen, and some none.
Source: CatBoost's oblivious trees (Prokhorenkova et al., NeurIPS 2018).
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

COUNTS = (0, 12, 25, 50, 100, 200, 400, 800)  # a prediction has no time for more
PATIENCE = 2  # counts that may predict no better before no more are tried
NEARLY = 1.01  # times the least error is as good
DEPTH = 6  # at most 8: answers are the bits of a byte
RATE = 0.15
BINS = 64  # quantiles between which a question may cut
SHARE = 0.8  # of the features that a tree may ask for
RIDGE = 1.0  # rows' worth of zeros in every leaf
SMALL = 0.02  # errors up to this are squared
FOLDS = 3

Tree = tuple[list[int], list[float], np.ndarray]  # features and cuts [depth], values [leaf]


def boosted(x: np.ndarray, y: np.ndarray, layer: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Trees for y[rows] of x[rows, features]: offset, features, cuts [tree, depth], values [tree,
    leaf], in lists; the fewest of COUNTS that predict nearly best in cross-validation. layer
    [rows]: integers, of which equal ones are in one of the FOLDS."""
    trees = list(islice(_grown(x, y, seed), _count(x, y, _folds(layer, seed), seed)))
    return {
        "offset": _offset(y),
        "features": [features for features, _, _ in trees],
        "cuts": [cuts for _, cuts, _ in trees],
        "values": [values.tolist() for _, _, values in trees],
    }


def _folds(layer: np.ndarray, seed: int) -> np.ndarray:
    """By the layers' numbers; in turns where that leaves a fold empty; a single layer's by row."""
    fold = layer % FOLDS
    if len(np.unique(fold)) < FOLDS:
        layers, turn = np.unique(layer, return_inverse=True)
        rows = np.random.default_rng(seed).permutation(len(layer))
        fold = (turn if len(layers) > 1 else rows) % FOLDS
    return fold


def _count(x: np.ndarray, y: np.ndarray, fold: np.ndarray, seed: int) -> int:
    """Of the fewest trees that predict each fold about best, grown on the others."""
    left, growing = y.copy(), []
    for out in np.unique(fold):
        tested = fold == out
        if not tested.all():
            left[tested] -= _offset(y[~tested])
            growing.append((tested, _grown(x[~tested], y[~tested], seed)))
    errors: list[float] = []
    for before, count in zip((0, *COUNTS), COUNTS, strict=False):
        for tested, trees in growing:
            for tree in islice(trees, count - before):
                left[tested] -= _of_tree(tree, x[tested])
        errors.append(float(np.abs(left).sum()))
        if len(errors) > PATIENCE + errors.index(min(errors)):
            break
    return next(c for c, e in zip(COUNTS, errors, strict=False) if e <= NEARLY * min(errors))


def _offset(y: np.ndarray) -> float:
    return round(float(np.median(y)), 4)


def _of_tree(tree: Tree, x: np.ndarray) -> np.ndarray:
    features, cuts, values = tree
    return values[(x[:, features] > cuts) @ (1 << np.arange(DEPTH)[::-1])]


def _grown(x: np.ndarray, y: np.ndarray, seed: int) -> Iterator[Tree]:
    """One tree after another; none without a feature that varies."""
    rng = np.random.default_rng(seed)
    inner = np.linspace(0, 1, BINS + 1)[1:-1]
    cuts = [np.unique(np.round(np.quantile(v, inner), 4)) for v in x.T]  # as they are written
    cuts = [c[(c >= v.min()) & (c < v.max())] for c, v in zip(cuts, x.T, strict=True)]
    varies = np.array([j for j, c in enumerate(cuts) if len(c)], dtype=int)
    # x > cuts[q] where bins > q
    bins = np.stack([np.searchsorted(c, v) for c, v in zip(cuts, x.T, strict=True)], 1)
    left = y - _offset(y)
    while len(varies):
        weight = 1 / np.maximum(np.abs(left) / SMALL, 1.0)
        asked = rng.permutation(varies)[: max(1, round(SHARE * len(varies)))]
        leaf = np.zeros(len(y), int)
        chosen: list[tuple[int, float]] = []
        for level in range(DEPTH):
            column, q = _best_cut(bins[:, asked], leaf, 1 << level, weight * left, weight)
            feature = int(asked[column])
            q = min(q, len(cuts[feature]) - 1)
            leaf = 2 * leaf + (bins[:, feature] > q)
            chosen.append((feature, float(cuts[feature][q])))
        total, mass = (np.bincount(leaf, v, 1 << DEPTH) for v in (weight * left, weight))
        values = np.round(RATE * total / (mass + RIDGE), 4)
        left = left - values[leaf]
        yield [f for f, _ in chosen], [c for _, c in chosen], values


def _best_cut(
    bins: np.ndarray, leaf: np.ndarray, leaves: int, pull: np.ndarray, weight: np.ndarray
) -> tuple[int, int]:
    """(column, bin) of the cut that, made in every leaf, leaves the least squares."""
    columns = bins.shape[1]
    at = bins + BINS * (leaf[:, None] + leaves * np.arange(columns))

    def below(v: np.ndarray) -> np.ndarray:
        sums = np.bincount(at.ravel(), np.repeat(v, columns), columns * leaves * BINS)
        return sums.reshape(columns, leaves, BINS).cumsum(-1)

    g, h = below(pull), below(weight)
    g_above, h_above = g[..., -1:] - g, h[..., -1:] - h
    gain = (g * g / (h + RIDGE) + g_above * g_above / (h_above + RIDGE)).sum(1)
    column, q = np.unravel_index(gain.argmax(), gain.shape)
    return int(column), int(q)
