"""Where the maps of a plan lie in the memory of a program: plane by plane, with borders of zeros where they are read.

::

    element (c, y, x)  at  base + c·plane + origin + y·pitch + x          pitch = width + max(left, right)

Rows are ``pitch`` apart: the gap between two of them is the right border of the one and the left border of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from relief_export.cgen.plan import Map, Plan, View


@dataclass
class Layout:
    """How a map lies, in elements; ``pointer + base`` is, in C, the first of them, borders included."""

    height: int
    width: int
    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0
    base: int = 0
    pointer: str = "arena"

    @property
    def pitch(self) -> int:
        """Return how far a row is from the next."""
        return self.width + max(self.left, self.right)

    @property
    def origin(self) -> int:
        """Return where the first element that is no border lies, from the start of its plane."""
        return self.top * self.pitch + self.left

    @property
    def plane(self) -> int:
        """Return how far a channel is from the next."""
        # The right border of the last row reaches beyond the last pitch by as much as the left border takes.
        return (self.top + self.height + self.bottom) * self.pitch + self.left

    @property
    def bordered(self) -> bool:
        """Return True if there is anything between the elements of the map."""
        return self.plane != self.height * self.width

    def widen(self, borders: tuple[int, int, int, int]) -> None:
        """Make the borders (top, left, bottom, right) at least so wide."""
        top, left, bottom, right = borders
        self.top, self.left = max(self.top, top), max(self.left, left)
        self.bottom, self.right = max(self.bottom, bottom), max(self.right, right)

    def at(self, extra: int = 0) -> str:
        """Return the C for the address so many elements after the start."""
        offset = self.base + extra
        return self.pointer if not offset else f"{self.pointer} {'+' if offset > 0 else '-'} {abs(offset)}"


@dataclass
class Memory:
    """The layouts of a plan's maps, by their index in ``Plan.maps``."""

    plan: Plan
    layouts: list[Layout]

    def of(self, target: Map) -> Layout:
        """Return the layout of a map."""
        return self.layouts[self.plan.index(target)]

    def address(self, view: View) -> NDArray[np.int64]:
        """Return for each element of a view its place after the pointer of its map, -1 for zeros."""
        which, inside = self.plan.locate(view)
        sizes = np.array([(m.height * m.width, m.width) for m in self.plan.maps])
        ours = np.array([(lay.base + lay.origin, lay.plane, lay.pitch) for lay in self.layouts])
        # An index of -1 reads the last map's row here; the last line replaces what comes of it.
        channel, rest = np.divmod(inside, sizes[which, 0])
        y, x = np.divmod(rest, sizes[which, 1])
        found = ours[which, 0] + channel * ours[which, 1] + y * ours[which, 2] + x
        return np.where(which >= 0, found, -1)
