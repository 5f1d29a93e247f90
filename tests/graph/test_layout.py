"""Compact arrays: a view of the description is the description of the view."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relief_export.graph.channels import (
    LayoutError,
    axis_indices,
    constant_axes,
    drop_axes,
    fit,
    known,
    reshape,
    undo_broadcast,
    varying,
)

SIZES = (1, 2, 3, 4, 6)


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Two shapes of equal size, and which axes of the first one vary."""
    before = tuple(draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=4)))
    rest, after = math.prod(before), []
    while rest > 1 and len(after) < 4:
        part = draw(st.sampled_from([d for d in range(1, rest + 1) if rest % d == 0]))
        after.append(part)
        rest //= part
    after = [*after, rest] if rest > 1 or not after else after
    return before, tuple(after), tuple(n if draw(st.booleans()) else 1 for n in before)


@given(reshapes())
def test_reshape_of_the_description_describes_the_reshape(case):
    before, after, compact = case
    array = np.arange(math.prod(compact)).reshape(compact)
    found = reshape(array, before, after)
    expected = np.broadcast_to(array, before).reshape(after)
    assert all(n in (1, d) for n, d in zip(found.shape, after, strict=True))
    assert np.array_equal(np.broadcast_to(found, after), expected)


@given(reshapes(), st.integers(1, 5))
def test_reshape_with_an_unknown_batch_holds_for_every_batch(case, batch):
    before, after, compact = case
    array = np.arange(math.prod(compact)).reshape(1, *compact)
    found = reshape(array, (None, *before), (None, *after))
    expected = np.broadcast_to(array, (batch, *before)).reshape(batch, *after)
    assert np.array_equal(np.broadcast_to(found, (batch, *after)), expected)


def test_unknown_length_on_both_sides_follows_from_the_others():
    """(n·s, c) -> (s, n, c), as an attention layer with the sequence first writes it."""
    array = np.arange(8).reshape(1, 8)
    assert reshape(array, (None, 8), (5, None, 8)).shape == (1, 1, 8)
    left, right = known((None, 8), (5, None, 4))
    assert math.prod(left) == math.prod(right)


def test_channels_merged_with_space_are_spelt_out():
    array = np.arange(3).reshape(1, 3, 1, 1)
    assert np.array_equal(reshape(array, (None, 3, 2, 2), (None, 12)), np.repeat(np.arange(3), 4)[None])


def test_what_a_compact_array_cannot_express_is_refused():
    channels = np.arange(3).reshape(1, 3, 1)
    with pytest.raises(LayoutError, match="merged with one of unknown length"):
        reshape(channels, (2, 3, None), (2, None))
    with pytest.raises(LayoutError, match="more than one dimension is unknown"):
        reshape(channels, (None, 3, None), (None, 3, 4))
    with pytest.raises(LayoutError, match="the same number of elements"):
        reshape(channels, (2, 3, 4), (5, 5))


def test_spread_undoes_broadcasting():
    flags = np.zeros((2, 3, 4), bool)
    flags[1, 2, 3] = True
    assert undo_broadcast(flags, (3, 1)).reshape(-1).tolist() == [False, False, True]
    assert undo_broadcast(flags, (1, 1, 4)).reshape(-1).tolist() == [False, False, False, True]
    assert undo_broadcast(np.array([[True, False]]), (1, 2)).tolist() == [[True, False]]


def test_fit_forgets_what_varies():
    values = np.array([[1.0, 1.0], [2.0, 3.0]])
    assert fit(values, (2, 1))[0, 0] == 1
    assert np.isnan(fit(values, (2, 1))[1, 0])
    assert fit(np.array([[4.0]]), (2, 3)).shape == (2, 3)


def test_axes():
    array = np.array([[1, 1], [2, 2]])
    assert constant_axes(array) == (1,)
    assert drop_axes(array, (1,)).tolist() == [[1], [2]]
    assert varying(array[:, :1]) == (0,)


def test_axis_indices_writes_products_only():
    keep = np.array([[True, False, True], [True, False, True]])
    lists = axis_indices(keep)
    assert lists is not None
    assert {k: v.tolist() for k, v in lists.items()} == {0: [0, 1], 1: [0, 2]}
    keep[0, 0] = False
    assert axis_indices(keep) is None
