"""Codebooks: few values that stand for many, k-means in one dimension.

The packed formats, the C programs for microcontrollers and the trained rounding choose the same values for the same
weights: otherwise a network that was rounded to a codebook would not be that of its file.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

_STEPS = 200
_SAMPLE = 1 << 22
"""Of more values than this as many, drawn at random from a fixed seed, stand for all in k-means."""


def codebook(values: Array, size: int) -> Array:
    """Return at most ``size`` ascending float32 values that stand for ``values`` (any shape); deterministic.

    Where there are no more than ``size`` different ones they are these themselves; else the centres of k-means.
    """
    values = values.ravel()
    return np.unique(_centres(values, size).astype(np.float32) if has_more(values, size) else values)


def nearest(values: Array, table: Array) -> Array:
    """Return the index of the entry of the ascending ``table`` nearest to each value; the lower one on a tie."""
    # In float64, where the sum of two large float32 does not overflow.
    middles = (table[1:].astype(np.float64) + table[:-1]) / 2
    return np.searchsorted(middles, values, side="left").astype(np.uint8)


def has_more(values: Array, size: int) -> bool:
    """Return True if ``values`` are more than ``size`` different ones; a few of them show it for almost all."""
    return any(np.unique(part).size > size for part in (values[: 4 * size], values))


def _centres(values: Array, size: int) -> Array:
    """Return at most ``size`` ascending centres of ``values``, the best of three fixed starts; deterministic.

    The values are sorted once; in one dimension every cluster is then a run, so a Lloyd step is a binary search of the
    midpoints between centres and a difference of prefix sums.
    """
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
        counts, sums = _clusters(ordered, total, centres)
        # A centre without values stays, so that a later step may find it some.
        moved = np.where(counts > 0, sums / np.maximum(counts, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    counts, sums = _clusters(ordered, total, centres)
    # Σ (x − c)² without the part that does not depend on c
    return centres, float((counts * centres**2 - 2 * centres * sums).sum())


def _clusters(ordered: Array, total: Array, centres: Array) -> tuple[Array, Array]:
    """Return number and sum of the values nearest to each centre."""
    inner = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2, side="right")
    edges = np.concatenate([[0], inner, [ordered.size]])
    return np.diff(edges), np.diff(total[edges])
