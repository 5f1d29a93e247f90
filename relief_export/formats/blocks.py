"""Large arrays a block at a time, so that temporaries stay small beside the weight they are made from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

Array: TypeAlias = np.ndarray[Any, Any]

BLOCK = 1 << 20
"""Elements of a block."""


def spans(length: int, step: int | None = None) -> Iterator[slice]:
    """Cut the indices 0 … ``length`` − 1 into slices of ``step``, or of a block."""
    step = step or BLOCK
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def rows(array: Array) -> Iterator[slice]:
    """Cut the first axis of ``array`` into slices of about a block of elements."""
    return spans(len(array), max(1, BLOCK // max(1, array[:1].size)))


def locate(flags: Array) -> Array:
    """Return the ascending indices, int32 where they fit, of what is true in ``flags: (n,)``."""
    found = np.empty(np.count_nonzero(flags), np.int32 if flags.size <= np.iinfo(np.int32).max else np.int64)
    done = 0
    for span in spans(flags.size):
        here = np.flatnonzero(flags[span])
        found[done : done + here.size] = here + span.start
        done += here.size
    return found


def runs(positions: Array) -> Iterator[tuple[slice, Array]]:
    """Yield blocks of ascending ``positions`` as slices and the gap before each position, the first counted from 0."""
    before = 0
    for span in spans(positions.size):
        yield span, np.diff(positions[span], prepend=positions.dtype.type(before))
        before = int(positions[span.stop - 1])
