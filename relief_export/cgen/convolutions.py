"""Which kernel of a host program serves a convolution, and where each of its weights begins to read.

Three templates of kernels/ can: ``conv_rows.c`` keeps a tile of rows in registers, ``conv_flat.c`` goes over a plane
as if it were one row, and ``conv_sums.c`` adds up one sum for each column of the kernel and shifts them together.
What a template costs, what memory it needs and what it is filled in with stand here together, for they follow from
the same sizes. Costs are cycles of a core with two multiply-adds and two loads a cycle, at 8 lanes and at 16, because
one file serves both.

Strided convolutions read a copy in which each plane is split by row and column modulo the stride (``pack.c``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from relief_export.cgen.plan import Convolution

CAPS = (16, 8, 4)
"""Lengths of vectors, beside single floats."""
TILE = 8
"""Vectors of sums that stay in registers."""
LANES = (8, 16)
"""Lanes for which kernels are chosen: their costs are added."""
_SUMS = 12
"""Vectors of sums of ``conv_sums.c``, which needs a register for each column of the kernel besides."""
_MARGIN = 16
"""Floats before the first sum of conv_sums.c: columns to the left of the plane are read, and thrown away."""


@dataclass(frozen=True)
class Choice:
    """The kernel that serves a convolution.

    Attributes:
        rows: Rows of a tile of conv_rows.c; 0 takes conv_flat.c, or conv_sums.c with ``sums``.
        cap: Longest vector that fits a row of the result.
        elements: Single weights instead of whole kernels.
        taps: (kh·kw) offsets of a kernel's weights from the place of its plane; a single 0 for elements.
        offsets: (kh, kw) the same, for elements too.
        packed: The parts of a plane of a strided convolution, None where the map is read as it lies.
        packed_size: Floats of all of them.
    """

    rows: int
    cap: int
    elements: bool
    taps: tuple[int, ...]
    offsets: NDArray[np.int64]
    packed: Packed | None
    packed_size: int
    sums: bool = False

    @property
    def name(self) -> str:
        """What the list of choices calls it."""
        unit = "elements" if self.elements else "kernels"
        return f"{unit}, {'rows' if self.rows else 'sums' if self.sums else 'flat'}{', packed' if self.packed else ''}"

    def reads(self, first: NDArray[np.int64], used: NDArray[np.int64], at: int) -> NDArray[np.int64]:
        """Return where each weight begins to read, (channels, kh, kw); for channels without a kernel it means nothing.

        Args:
            first: (channels,) where each begins.
            used: Channels that a kept kernel reads: only these are packed.
            at: Where the packed parts lie, if there are any.
        """
        if self.packed is None:
            return first[:, None, None] + self.offsets
        places = np.zeros((len(first), *self.offsets.shape), np.int64)
        places[used] = at + self.packed.plane * np.arange(len(used))[:, None, None] + self.offsets
        return places

    def entries(
        self, outputs: int, kept: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]], places: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Return where the entries of each output channel begin, and for all entries where they read, and the weights.

        ``kept`` is what ``Convolution.kernels`` returns, ``places`` what ``reads`` does.
        """
        o, i, weights = kept
        if self.elements:
            chosen = weights != 0
            counts, where, values = chosen.sum(axis=(1, 2)), places[i][chosen], weights[chosen]
        else:
            # conv_rows.c begins at the first weight, conv_flat.c adds the offset of each to the plane's place.
            # conv_sums.c begins at the first column of the plane.
            where = places[i, 0, 0] - (0 if self.rows else self.taps[0])
            counts, values = np.ones(len(o), np.int64), weights.ravel()
        first = np.concatenate([[0], np.cumsum(np.bincount(o, counts, outputs).astype(np.int64))])
        return first, where, values

    def scratch(self, step: Convolution, pitch: int) -> int:
        """Return the floats that the kernel needs for itself; ``pitch`` is that of what it reads."""
        if self.rows:
            return self.packed_size
        packed = -(-self.packed_size // 16) * 16
        height, width = step.extent
        if self.sums:
            part = _padded((height - 1) * pitch + step.source.shape[2])
            return _MARGIN + int(step.weight.shape[3]) * part + height * width + 16
        return packed + _padded((height - 1) * pitch + width) + height * width + 16

    def template(self, step: Convolution, pitch: int) -> tuple[str, dict[str, Any]]:
        """Return the file of kernels/ and what is put into it, beside what every kernel of a convolution has."""
        kh, kw = step.weight.shape[2:]
        height, width = computed(step)
        if self.rows:
            size, columns = (kh, kw), _columns(step, self.offsets)
            if self.elements:
                size, columns = (1, 1), [[_Part(0, ((0, 0),))]]
            return "conv_rows.c", {
                "rows": self.rows, "kh": size[0], "kw": size[1], "columns": columns, "half": self.rows // 2,
                "pairs": _pairs(self.cap, self.rows, size[0]),
            }  # fmt: skip
        if self.sums:
            in_width, before = step.source.shape[2], step.pads[1]
            count = (height - 1) * pitch + in_width
            return "conv_sums.c", {
                "count": count, "part": _padded(count), "margin": _MARGIN, "in_width": in_width,
                "tile": _sums_tile(kw), "kh": kh, "kw": kw, "before": before,
                "edges": before > 0 or kw - 1 - before > in_width - width,
            }  # fmt: skip
        count = (height - 1) * pitch + width
        vectors = -(-count // LANES[0])
        # Small planes leave registers free: several partial sums, so that an addition need not wait for the last one.
        chains = max(1, min(4, TILE // vectors, len(self.taps)))
        return "conv_flat.c", {
            "count": count, "count_padded": _padded(count), "tile": min(TILE, 2 * vectors),
            "taps": [int(t) for t in self.taps], "chains": chains,
        }  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """A plane split by row and column modulo the strides."""

    phases: tuple[dict[str, int], ...]
    plane: int
    pitch: int
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, step: Convolution) -> Packed:
        """Return the parts that a convolution reads."""
        (sy, sx), (dy, dx), (top, left, _, _) = step.strides, step.dilations, step.pads
        kh, kw = step.weight.shape[2:]
        _, height, width = step.source.shape
        out_height, out_width = step.extent
        rows = out_height + (kh - 1) * dy // sy + 1
        pitch = out_width + (kw - 1) * dx // sx
        bases: dict[tuple[int, int], int] = {}
        offsets = np.zeros((kh, kw), np.int64)
        phases = []
        # Several taps can fall into one phase, and some phases may never be read: only those that are get a part.
        for i, j in np.ndindex(kh, kw):
            phase = (i * dy % sy, j * dx % sx)
            if phase not in bases:
                bases[phase] = len(bases) * rows * pitch
                # Row y of a part is row y * sy + phase - top of the plane.
                first = [max(0, -(-(pad - p) // s)) for p, pad, s in zip(phase, (top, left), (sy, sx), strict=True)]
                last = [
                    min(n, (size - 1 + pad - p) // s + 1)
                    for n, size, p, pad, s in zip(
                        (rows, pitch), (height, width), phase, (top, left), (sy, sx), strict=True
                    )
                ]
                phases.append({
                    "base": bases[phase], "y0": first[0], "y1": last[0], "x0": first[1], "x1": last[1],
                    "dy": phase[0] - top, "dx": phase[1] - left,
                    # There are vectors of neighbours and of every second element.
                    "cap": longest(last[1] - first[1]) if sx <= 2 else 1,
                })  # fmt: skip
            offsets[i, j] = bases[phase] + i * dy // sy * pitch + j * dx // sx
        return cls(tuple(phases), len(bases) * rows * pitch, pitch, offsets)


@dataclass(frozen=True)
class _Part:
    """Weights of one column of a kernel that read the same rows of the same part of a plane, some rows further down.

    Attributes:
        base: Where the first of them begins, from the place of the kernel.
        taps: (row of the kernel, rows of the part further down) of each.
    """

    base: int
    taps: tuple[tuple[int, int], ...]

    @property
    def reach(self) -> int:
        """Return the rows that are read beyond those of the result."""
        return max(down for _, down in self.taps)


def _columns(step: Convolution, offsets: NDArray[np.int64]) -> list[list[_Part]]:
    """Return for each column of a kernel its weights by the part that they read: there are several with strides."""
    (kh, kw), stride, dilation = offsets.shape, step.strides[0], step.dilations[0]
    phases = [[i for i in range(kh) if i * dilation % stride == phase] for phase in range(stride)]
    return [
        [
            _Part(
                int(offsets[rows[0], j] - offsets[0, 0]),
                tuple((i, (i - rows[0]) * dilation // stride) for i in rows),
            )
            for rows in phases if rows
        ]
        for j in range(kw)
    ]  # fmt: skip


def computed(step: Convolution) -> tuple[int, int]:
    """Return height and width of what is computed: an odd last row or column is in no window of a 2 x 2 pool."""
    height, width = step.extent
    return (height // 2 * 2, width // 2 * 2) if step.pool else (height, width)


def wants_no_sides(step: Convolution) -> bool:
    """Return True if a convolution of stride 1 is faster on planes that have no border at their sides."""
    width, sides = step.source.shape[2], max(step.pads[1], step.pads[3])
    if not sides:
        return False
    without, with_ = options(step, width, sides=False), options(step, width + sides, sides=True)
    return bool(without) and without[0][0] < min(cost for cost, _ in with_)


def options(step: Convolution, pitch: int, *, sides: bool) -> list[tuple[float, Choice]]:
    """Return what can serve a convolution, each with its cost in cycles.

    Args:
        step: The convolution.
        pitch: Of the rows of its source, for stride 1.
        sides: There are zeros at the left and the right of each row, as many as it reads.
    """
    kh, kw = step.weight.shape[2:]
    height, width = computed(step)
    _, read, weights = step.kernels()
    kernels, elements = len(weights), int(np.count_nonzero(weights))
    (dy, dx), (top, left, _, right) = step.dilations, step.pads
    if step.strides != (1, 1):
        packed = Packed.of(step)
        used = len(np.unique(read))
        offsets, size, pitch = packed.offsets, used * packed.plane, packed.pitch
    else:
        packed, size = None, 0
        offsets = np.add.outer((np.arange(kh) * dy - top) * pitch, np.arange(kw) * dx - left)
    plain = step.strides == (1, 1) and step.dilations == (1, 1)
    cap = longest(width)
    found: list[tuple[float, Choice]] = []
    # Wider padding than that of a result as wide as its source would want two tests for an edge.
    if plain and 1 < kw <= _SUMS // 2 and left + right < kw:
        cost = _cost_of_sums(step, (height, width), pitch)
        found.append((cost, Choice(0, cap, False, (-left,), offsets, None, 0, sums=True)))
    if not sides:
        return found
    flat = [0.8 * _reading(n) * -(-((height - 1) * pitch + width) // n) + 1.5 for n in LANES]
    taps = tuple(offsets.ravel().tolist())
    found.append((
        sum(kernels * (each * kh * kw + 2) for each in flat), Choice(0, cap, False, taps, offsets, packed, size)
    ))  # fmt: skip
    found.append((sum(elements * (each + 2) for each in flat), Choice(0, cap, True, (0,), offsets, packed, size)))
    if cap > 1:
        reach = [part.reach for part in _columns(step, offsets)[0]]
        # A tile holds both rows of a pooling window, so its height must be even there.
        for rows in range(2 if step.pool else 1, min(TILE, height) + 1, 2 if step.pool else 1):
            whole = single = 0.0
            for lanes in LANES:
                tiles = -(-width // min(cap, lanes)) * -(-height // rows)
                if lanes == 16 and _pairs(cap, rows, kh):
                    loads = (2.5 * sum(rows // 2 + more for more in reach) + kh) / 2
                    sums = rows * kh / 4 * max(1.0, TILE / rows)
                else:
                    loads = (sum(rows + more for more in reach) * _reading(min(cap, lanes)) + kh) / 2
                    sums = rows * kh / 2 * max(1.0, TILE / rows)
                whole += tiles * kernels * (kw * max(loads, sums) + 4)
                single += tiles * elements * (rows * 0.6 * _reading(min(cap, lanes)) + 3)
            found.append((whole, Choice(rows, cap, False, (int(offsets[0, 0]),), offsets, packed, size)))
            found.append((single, Choice(rows, cap, True, (0,), offsets, packed, size)))
    return found


def _cost_of_sums(step: Convolution, extent: tuple[int, int], pitch: int) -> float:
    """Return the cycles of conv_sums.c."""
    kh, kw = step.weight.shape[2:]
    (height, width), tile, kernels = extent, _sums_tile(kw), len(step.kernels()[2])
    count = (height - 1) * pitch + step.source.shape[2]
    cost = 0.0
    for lanes in LANES:
        full, rest = divmod(-(-count // lanes), tile)
        for vectors in (tile,) * full + (rest,) * bool(rest):
            loads = kh * (vectors * _reading(lanes) + kw) / 2
            # Below so many sums each multiply-add waits for the one before it.
            chains = vectors * kw * (kh if count <= lanes else 1)
            cost += kernels * (max(loads, kh * kw * vectors / 2 * max(1.0, TILE / chains)) + 4)
        # Putting them together; the next channel's sums begin meanwhile.
        cost += len(step.weight) * (height * -(-width // min(longest(width), lanes)) * kw * 0.4 + 4)
    return cost


def _reading(lanes: int) -> float:
    """Return the loads that one of a vector counts for: where it begins anywhere, it lies in two lines of a cache."""
    return 1.5 if lanes == 16 else 1.0


def _pairs(cap: int, rows: int, kh: int) -> bool:
    """Return True if conv_rows.c takes two rows at once where vectors are twice as long as a row."""
    # With fewer rows in a kernel, reading two halves costs what the longer vectors save.
    return cap == 8 and kh >= 3 and rows >= 4 and rows % 2 == 0


def _sums_tile(kw: int) -> int:
    """Return the vectors of a tile of conv_sums.c."""
    return max(1, _SUMS // int(kw))


def _padded(count: int) -> int:
    """Return the floats of a flat plane with what the last tile writes beyond it, at any length of vector."""
    return (-(-count // 16) + TILE) * 16


def longest(width: int) -> int:
    """Return the longest vector that fits a row."""
    return next((cap for cap in CAPS if cap <= width), 1)
