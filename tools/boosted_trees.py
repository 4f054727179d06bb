"""Symmetric trees, boosted: a residual of ln seconds from features of a shape.

    f(x) = offset + Σ over trees of value[2⁵ (x_a > cut_a) + … + (x_f > cut_f)]

Every tree asks the same six questions of all its leaves, so that an evaluation is one comparison
of arrays. Each fits what the trees before it left, in an L1 loss by reweighting.
Source: CatBoost's oblivious trees (Prokhorenkova et al., NeurIPS 2018).
"""

from typing import Any

import numpy as np

TREES = 200
DEPTH = 6  # at most 8: answers are the bits of a byte
RATE = 0.15
BINS = 32  # quantiles between which a question may cut
SHARE = 0.5  # of the features that a tree may ask for
RIDGE = 0.5  # rows' worth of zeros in every leaf
SMALL = 0.05  # errors up to this are squared
ROWS = 1  # of the data for each tree, so that few rows get few trees


def boosted(x: np.ndarray, y: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Trees for y[rows] of x[rows, features]: offset, features, cuts [tree, depth], values [tree,
    leaf], in lists. Without a feature that varies there are no trees."""
    rng = np.random.default_rng(seed)
    inner = np.linspace(0, 1, BINS + 1)[1:-1]
    cuts = [np.unique(np.round(np.quantile(v, inner), 4)) for v in x.T]  # as they are written
    cuts = [c[(c >= v.min()) & (c < v.max())] for c, v in zip(cuts, x.T, strict=True)]
    varies = np.array([j for j, c in enumerate(cuts) if len(c)], dtype=int)
    # x > cuts[q] where bins > q
    bins = np.stack([np.searchsorted(c, v) for c, v in zip(cuts, x.T, strict=True)], 1)
    offset = round(float(np.median(y)), 4)
    left = y - offset
    trees: dict[str, list[Any]] = {"features": [], "cuts": [], "values": []}
    for _ in range(min(TREES, len(y) // ROWS) if len(varies) else 0):
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
        value = np.round(RATE * total / (mass + RIDGE), 4)
        left = left - value[leaf]
        trees["features"].append([f for f, _ in chosen])
        trees["cuts"].append([c for _, c in chosen])
        trees["values"].append(value.tolist())
    return {"offset": offset, **trees}


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
