"""Compact arrays over the axes of a tensor, and how views act on them.

Everything the analyses know of a tensor of shape ``(d_1, …, d_r)`` - which unit an element belongs to, its constant
value, whether it is live - is an array of rank ``r`` whose axes have length ``d_k`` where the fact varies along the
axis and 1 where it does not. A feature map ``(N, C, H, W)`` is described by an array ``(1, C, 1, 1)``, its flattened
form ``(N, C*H*W)`` by ``(1, C*H*W)``. NumPy's broadcasting then is the semantics of ONNX's elementwise operators, and
the view operators (Reshape, Transpose, Slice, …) act on the description as they act on the tensor.

Sources: ONNX operators, multidirectional broadcasting; reshape is row-major.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Shape = tuple[int | None, ...]
# Larger than any real length, and a prime: no product of stated lengths equals one with it by accident, so that runs
# of axes with equal products are those that hold the unknown one on both sides.
_PRIME = 2_147_483_647


class LayoutError(Exception):
    """A view does something to the varying axes that a compact array cannot express; the caller pins the tensor."""


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]]:
    """Split two shapes of equal size into the shortest runs of axes with equal products."""
    groups, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        start_i, start_j, left, right = i, j, 1, 1
        if i < len(before) and j < len(after):
            left, right, i, j = before[i], after[j], i + 1, j + 1
        # Always the smaller product grows: it is the only one that can still reach the other.
        while left != right:
            if left < right and i < len(before):
                left, i = left * before[i], i + 1
            elif right < left and j < len(after):
                right, j = right * after[j], j + 1
            else:
                raise LayoutError("the shapes do not hold the same number of elements")
        # Axes of length 1 at the end of either shape join the last run.
        while (i == len(before) and j < len(after) and after[j] == 1) or (i < len(before) and j == len(after)):
            if i < len(before) and before[i] != 1:
                raise LayoutError("the shapes do not hold the same number of elements")
            i, j = (i + 1, j) if i < len(before) else (i, j + 1)
        if (start_i, start_j) == (i, j):
            raise LayoutError("the shapes do not hold the same number of elements")
        groups.append((range(start_i, i), range(start_j, j)))
    return groups


def known(before: Shape, after: Shape) -> tuple[list[int], list[int]]:
    """Replace the one dimension that a shape does not state, in both consistently, by a multiple of a large prime.

    With ``B`` and ``A`` the products of what is stated, ``u_B B = u_A A`` means that ``u_B`` is a multiple of
    ``A / gcd(A, B)`` and ``u_A`` the same multiple of ``B / gcd(A, B)``.

    Raises:
        LayoutError: More than one dimension is unknown on a side, or the sizes disagree.
    """
    if before.count(None) > 1 or after.count(None) > 1:
        raise LayoutError("more than one dimension is unknown")
    stated_before, stated_after = (math.prod(d for d in shape if d is not None) for shape in (before, after))
    if None in before and None in after and stated_before and stated_after:
        common = _PRIME * stated_before * stated_after // math.gcd(stated_before, stated_after)
        free_before, free_after = common // stated_before, common // stated_after
    elif None in before or not stated_before or not stated_after:
        free_before = free_after = _PRIME
    elif stated_before % stated_after:
        raise LayoutError("the shapes do not hold the same number of elements")
    else:
        free_before, free_after = 1, stated_before // stated_after
    return (
        [free_before if d is None else d for d in before],
        [free_after if d is None else d for d in after],
    )


def reshape(array: NDArray[Any], before: Shape, after: Shape) -> NDArray[Any]:
    """Carry a compact array of a tensor of shape ``before`` through a row-major reshape to ``after``.

    Raises:
        LayoutError: A varying axis is merged with one of unknown length.
    """
    left, right = known(before, after)
    expanded, result = [1] * len(left), [1] * len(right)
    for axes_in, axes_out in _groups(left, right):
        if all(array.shape[k] == 1 for k in axes_in):
            continue
        wide = [k for k in axes_in if left[k] != 1]
        wide_out = [k for k in axes_out if right[k] != 1]
        # The axis only changes its place or gains neighbours of length 1, for which an unknown length will do.
        if len(wide) == len(wide_out) == 1:
            expanded[wide[0]] = result[wide_out[0]] = array.shape[wide[0]]
            continue
        # To merge or split an axis its length must be counted in elements, and a stand-in has none.
        if any(before[k] is None for k in axes_in):
            raise LayoutError("a varying axis is merged with one of unknown length")
        for k in axes_in:
            expanded[k] = left[k]
        for k in axes_out:
            result[k] = right[k]
    return np.broadcast_to(array, expanded).reshape(result)


def constant_axes(array: NDArray[Any]) -> tuple[int, ...]:
    """Return the axes longer than 1 along which a compact array does not vary."""
    # NaN is "unknown" in arrays of constants and has to equal itself here, else no such axis would ever be dropped.
    lines = ((k, np.broadcast_to(array.take([0], k), array.shape)) for k, n in enumerate(array.shape) if n > 1)
    return tuple(k for k, first in lines if np.array_equal(array, first, equal_nan=array.dtype.kind == "f"))


def drop_axes(array: NDArray[Any], axes: Sequence[int]) -> NDArray[Any]:
    """Shorten the given axes to length 1, keeping the first entry."""
    for k in axes:
        array = array.take([0], k) if array.shape[k] > 1 else array
    return array


def fit(values: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Describe ``values`` by a compact array of ``shape``: NaN (unknown) where they vary along an axis of length 1.

    Args:
        values: Compact array of the same rank.
        shape: Axes of length 1 or of the length in ``values``.
    """
    for k, n in enumerate(shape):
        if n == 1 and values.shape[k] > 1:
            first = values.take([0], k)
            values = np.where((values == first).all(axis=k, keepdims=True), first, np.nan)
    return np.broadcast_to(values, shape)


def undo_broadcast(flags: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Undo broadcasting: an element of the operand of ``shape`` is flagged where any element it reached is.

    Args:
        flags: Compact array of an elementwise operator's output.
        shape: Compact shape of one operand, of at most the same rank, aligned at the last axis.
    """
    extra = flags.ndim - len(shape)
    if extra > 0:
        flags = np.asarray(flags.any(axis=tuple(range(extra))))
    for k, n in enumerate(shape):
        if n == 1 and flags.shape[k] > 1:
            flags = np.asarray(flags.any(axis=k, keepdims=True))
    return np.broadcast_to(flags, shape)


def varying(array: NDArray[Any]) -> tuple[int, ...]:
    """Return the axes of a compact array that are longer than 1."""
    return tuple(k for k, n in enumerate(array.shape) if n > 1)


def axis_indices(keep: NDArray[np.bool_]) -> dict[int, NDArray[np.int64]] | None:
    """Write a compact keep mask as the product of one index list an axis, or return None where it is none."""
    axes = varying(keep)
    # The lists of all lines that keep anything: their product holds every kept element, and is the mask itself exactly
    # where it holds no more of them.
    lists = {k: np.flatnonzero(keep.any(axis=tuple(j for j in range(keep.ndim) if j != k))) for k in axes}
    size = int(np.prod([len(v) for v in lists.values()], dtype=np.int64)) if axes else int(keep.sum())
    return lists if size == int(keep.sum()) else None
