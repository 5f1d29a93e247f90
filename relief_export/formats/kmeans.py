"""One-dimensional k-means: minimise Σ (x_i − c_{a(i)})² over the centres c.

The values are sorted once; in one dimension every cluster is then a run, so a Lloyd step is a binary search of the
midpoints between centres and a difference of prefix sums: O(k log n), whatever the number of values.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

_STEPS = 200
_SAMPLE = 1 << 22
"""Of more values than this as many, drawn at random from a fixed seed, stand for all."""


def is_more(values: Array, size: int) -> bool:
    """Say whether ``values`` are more than ``size`` different ones; a sample of them shows it for almost all."""
    return any(np.unique(part).size > size for part in (values[: 4 * size], values))


def codebook(values: Array, size: int) -> Array:
    """Return at most ``size`` ascending float32 centres for ``values`` (any shape); deterministic.

    Where no more than ``size`` different values exist they are the centres themselves, so nothing is lost.
    """
    values = values.ravel()
    if not is_more(values, size):
        return np.unique(values).astype(np.float32)
    if values.size > _SAMPLE:  # at random: an even stride may meet the same channels again and again
        values = values[np.random.default_rng(0).integers(0, values.size, _SAMPLE)]
    ordered = np.sort(values)
    total = np.concatenate([[0.0], np.cumsum(ordered, dtype=np.float64)])
    middles = (np.arange(size) + 0.5) / size
    ends = np.linspace(ordered[0], ordered[-1], size)
    starts = (np.quantile(ordered, middles), ends, ordered[0] + middles * (ordered[-1] - ordered[0]))
    return min((_lloyd(ordered, total, start) for start in starts), key=lambda found: found[1])[0]


def _lloyd(ordered: Array, total: Array, centres: Array) -> tuple[Array, float]:
    for _ in range(_STEPS):
        edges = _edges(ordered, centres)
        counts = np.diff(edges)
        sums = np.diff(total[edges])
        moved = np.where(counts > 0, sums / np.maximum(counts, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    edges = _edges(ordered, centres)
    counts, sums = np.diff(edges), np.diff(total[edges])
    # Σ (x − c)² without the part that does not depend on c
    loss = float((counts * centres**2 - 2 * centres * sums).sum())
    return np.unique(centres.astype(np.float32)), loss


def _edges(ordered: Array, centres: Array) -> Array:
    inner = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2, side="right")
    return np.concatenate([[0], inner, [ordered.size]])


def nearest(values: Array, centres: Array) -> Array:
    """Return, as uint8, the index of the centre nearest to each value; the lower one on a tie."""
    if centres.size == 0:
        return np.zeros(values.shape, np.uint8)
    middles = (centres[1:].astype(np.float64) + centres[:-1]) / 2
    return np.searchsorted(middles, values, side="left").astype(np.uint8)
