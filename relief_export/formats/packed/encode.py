"""What a packed file stores of each weight: which units, at which positions, with which values. Arrays in, arrays out.

A *unit* is one element, or one whole kernel of a convolution whose kernels are pruned as a whole. A *stream* is what is
coded together: the small weights of one value code, or one large weight.

Positions p_0 < p_1 < … < p_{k−1} of the stored units in a universe of n:

    u8      gaps as bytes: a byte w < 255 ends one position, a byte 255 only advances:
            p_j = Σ of all bytes up to the j-th that is not 255. Decoded in the fewest passes.
    rice    each gap g is ⌈g / 2^l⌉, in unary, and what that is too much, in l bits. With h_j where the j-th one stands
            in the unary bits and r_i the l-bit words:  p_j = 2^l h_j − Σ_{i≤j} r_i.  This is Golomb's code (S. W.
            Golomb, "Run-length encodings", 1966) with a power of two (R. F. Rice, 1979); for random positions it takes
            about 0.1 bit a position more than the entropy. l = 0 is a bitmap.

Values:

    raw        as they are, in their own type
    f16        w ≈ float32(h), h the nearest half: relative error at most 2^−11 for normal halves
    codebook   w = table[i]. A weight of at most 16 (256) different values is stored exactly; of more, the table holds
               the centres of one-dimensional k-means (minimal Σ (w − c)²), rounded to halves.

The decoded value is 0 exactly where the weight is 0, so no code changes which connections exist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from relief_export.codebooks import codebook, has_more, nearest
from relief_export.formats.onnx_file import positive_zeros

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relief_export.formats.artifact import Values

Array: TypeAlias = np.ndarray[Any, Any]

ALONE = 1 << 18
"""Weights with this many elements and more have a stream of their own: decoding one needs no Split and less memory."""
FAST_ABOVE = 1 << 19
"""In universes above this, bit codes cost the runtime time at load: several passes over every bit."""
_WORTH = 1.125
"""There, they must make positions and values together smaller by this."""
SMALLEST = 32
"""Tensors with fewer elements stay initializers, vectors that become halves apart."""
_BLOCK = 1 << 20
"""Elements that are worked on at a time, so that temporaries stay small beside the weight they are made from."""
_TENSOR_BITS, _UNARY_BITS, _STREAM_BITS = 8 * 40, 8 * 110, 8 * 160
"""What the nodes of a weight take, those of rice beyond those of u8, and those of a stream: about, to choose codes."""
_MOST = 256
"""Indices that words of at most 8 bits tell apart."""
_VECTORS = 1 << 10


@dataclass(frozen=True)
class Coded:
    """The values of one tensor in a code.

    Attributes:
        code: raw, f16 or codebook.
        symbols: What is stored of each element, in the tensor's shape: values, halves, or indices into ``table``.
        table: The values of a codebook, float32: zero, then ascending ones that are not.
    """

    code: Literal["raw", "f16", "codebook"]
    symbols: Array
    table: Array | None = None

    def decoded(self, rows: slice = slice(None)) -> Array:
        """Return ``rows`` of the tensor that a reader gets."""
        symbols = self.symbols[rows]
        if self.table is not None:
            return np.asarray(self.table[symbols])
        return symbols if self.code == "raw" else symbols.astype(np.float32)

    @property
    def bits(self) -> int:
        """Bits that one stored symbol takes."""
        return 8 * self.symbols.itemsize if self.table is None else index_bits(self.table.size - 1)


@dataclass(frozen=True)
class Item:
    """One weight on its way into a stream: ``units`` is the flat boolean mask of its stored units."""

    name: str
    coded: Coded
    kernel: tuple[int, ...]
    units: Array

    @property
    def unit(self) -> int:
        """Elements of a unit."""
        return math.prod(self.kernel)

    @property
    def stored(self) -> Array:
        """The symbols that are stored, ``(k, *kernel)``."""
        stored: Array = self.coded.symbols.reshape(-1, *self.kernel)[self.units]
        # A kernel that is stored whole may hold -0.0, which is not to come back.
        return positive_zeros(stored)

    @property
    def estimated_bits(self) -> float:
        """About how many bits its positions and values take."""
        count = int(np.count_nonzero(self.units))
        return position_bits(count, self.units.size) + count * self.unit * self.coded.bits


def blocks(length: int, step: int = 0) -> Iterator[slice]:
    """Cut the indices 0 … ``length`` − 1 into slices of ``step``, or of a block."""
    step = step or _BLOCK
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def row_blocks(array: Array) -> Iterator[slice]:
    """Cut the first axis of ``array`` into slices of about a block of elements."""
    return blocks(len(array), max(1, _BLOCK // max(1, array[:1].size)))


def index_bits(size: int) -> int:
    """Return the bits of an index below ``size``."""
    return max(1, (size - 1).bit_length())


# Units and streams


def make_item(name: str, array: Array, coded: Coded) -> Item:
    """Choose the unit, an element or a whole kernel, that takes fewer bits for ``array`` in ``coded``."""
    support = array != 0
    single = Item(name, coded, (), support.ravel())
    kernel = array.shape[2:]
    if math.prod(kernel) < 2:
        return single
    whole = Item(name, coded, kernel, support.reshape(-1, math.prod(kernel)).any(axis=1))
    if coded.table is not None and coded.table.size > _MOST and not whole.stored.all():
        return single  # a kernel's zeros would need one index more than a byte has
    return min(whole, single, key=lambda item: item.estimated_bits)


def is_worth(item: Item, size: int) -> bool:
    """Return True if ``item`` takes fewer bytes than the ``size`` of its plain values."""
    # Vectors of halves are cut from one constant and need hardly any nodes of their own.
    vector = item.coded.code == "f16" and item.coded.symbols.ndim == 1
    return item.estimated_bits + (8 * 5 if vector else _TENSOR_BITS) < 8 * size


def streams(items: list[Item]) -> list[list[Item]]:
    """Divide the weights into streams: large ones alone, the others by value code, type and kernel."""
    groups: dict[object, list[Item]] = {}
    for item in _few_kernels(items):
        symbols, code = item.coded.symbols, item.coded.code
        vector = code == "f16" and symbols.ndim == 1
        kind = code if item.coded.table is not None else symbols.dtype.name
        key = item.name if symbols.size >= ALONE else (kind, item.kernel, vector)
        groups.setdefault(key, []).append(item)
    return [_whole(group) for group in groups.values()]


def _few_kernels(items: list[Item]) -> list[Item]:
    """Take the small weights of a kernel's shape for single elements where that saves more nodes than it costs bits."""
    small = [item for item in items if item.kernel and item.coded.symbols.size < ALONE]
    single = {item.name: Item(item.name, item.coded, (), item.coded.symbols.ravel() != 0) for item in small}
    plain = set()
    for kernel in {item.kernel for item in small}:
        group = [item for item in small if item.kernel == kernel]
        if sum(single[item.name].estimated_bits - item.estimated_bits for item in group) < _STREAM_BITS:
            plain |= {item.name for item in group}
    return [single[item.name] if item.name in plain else item for item in items]


def _whole(stream: list[Item]) -> list[Item]:
    """Store the zeros of ``stream`` too where their symbols take fewer bits than positions."""
    total = sum(item.units.size for item in stream)
    count = sum(int(np.count_nonzero(item.units)) for item in stream)
    tables = [item.coded.table.size for item in stream if item.coded.table is not None]
    if not count or max(tables, default=0) > _MOST:
        return stream
    bits = max(item.coded.bits for item in stream)
    more = (index_bits(max(tables)) if tables else bits) * total - bits * count
    vectors = stream[0].coded.code == "f16" and stream[0].coded.symbols.ndim == 1 and total < _VECTORS
    # Biases are cut from the other halves without nodes of their own.
    if more * stream[0].unit > position_bits(count, total) + _UNARY_BITS and not vectors:
        return stream
    return [Item(item.name, item.coded, item.kernel, np.ones_like(item.units)) for item in stream]


# Positions


def locate(flags: Array) -> Array:
    """Return the ascending indices, int32 where they fit, of what is true in ``flags: (n,)``."""
    # Filled block by block: NumPy alone would hold int64 indices of the whole weight.
    found = np.empty(np.count_nonzero(flags), np.int32 if flags.size <= np.iinfo(np.int32).max else np.int64)
    done = 0
    for span in blocks(flags.size):
        here = np.flatnonzero(flags[span])
        found[done : done + here.size] = here + span.start
        done += here.size
    return found


def gap_bytes(positions: Array) -> Array:
    """Return the u8 code of ascending ``positions``.

    Example: 1, 4, 28, 600 become 1, 3, 24, 255, 255, 62.
    """
    parts, before = [], 0
    for span in blocks(positions.size):
        gaps = np.diff(positions[span], prepend=positions.dtype.type(before))
        before = int(positions[span.stop - 1])
        escapes = gaps // 255
        words = np.full(gaps.size + int(escapes.sum()), 255, np.uint8)
        words[np.cumsum(escapes + 1) - 1] = gaps - 255 * escapes
        parts.append(words)
    return np.concatenate(parts)


def rice_parts(positions: Array, low: int) -> tuple[Array, Array]:
    """Return the rice code of ascending ``positions``, at least one: the unary bits and the words of ``low`` bits.

    Example: 1, 4, 19 with two low bits are the unary bits 0, 1, 1, 0, 0, 0, 1 and the words 3, 1, 1.
    """
    gaps = np.diff(positions, prepend=0)
    highs = (gaps + ((1 << low) - 1)) >> low
    ones = np.cumsum(highs)
    unary = np.zeros(int(ones[-1]) + 1, np.uint8)
    unary[ones] = 1
    return unary, (highs << low) - gaps


def choose_low(positions: Array, universe: int, value_bytes: float = 0) -> int | None:
    """Return the low bits of the rice code of ``positions``, or None where u8 is the better code.

    Args:
        positions: Ascending, ``(k,)``, at least one.
        universe: How many there could be.
        value_bytes: Bytes of the values that go with them. In a large universe the passes that rice takes have to
            make positions and values together smaller by an eighth.
    """
    gaps = np.diff(positions, prepend=0)

    def bits(low: int) -> int:
        return low * positions.size + int(((gaps + ((1 << low) - 1)) >> low).sum()) + (8 * 33 if low > 1 else 0)

    # Words are decoded from at most 8 bits.
    best = min(range(9), key=bits)
    escapes = int((gaps // 255).sum())
    rice, bytewise = bits(best) + _UNARY_BITS, 8 * (positions.size + escapes) + (8 * 70 if escapes else 0)
    if universe > FAST_ABOVE:
        rice = int(_WORTH * (rice + 8 * value_bytes) - 8 * value_bytes)
    return best if rice < bytewise else None


def is_index_list(array: Array) -> bool:
    """Return True if ``array`` is better stored as positions, as the features that a Gather keeps are."""
    plain = array.dtype == np.int64 and array.ndim == 1 and array.size >= SMALLEST and array[-1] < 1 << 30
    if not plain or array[0] < 0 or (np.diff(array) <= 0).any():
        return False
    return position_bits(array.size, int(array[-1]) + 1) + _UNARY_BITS < 8 * array.nbytes


def position_bits(count: int, universe: int) -> float:
    """Return about how many bits ``count`` of ``universe`` positions take, before any code is tried."""
    # Nothing and everything need no positions.
    if count in {0, universe}:
        return 0.0
    return min(float(universe), count * (math.log2(max(universe / count, 1.0)) + 2.0))


# Values


def encode(array: Array, values: Values) -> Coded:
    """Put ``array`` into the code ``values``; what that cannot hold (overflow, NaN, another type) stays raw.

    Only float32 of two axes and more takes a codebook; vectors are left to ``halves``.
    """
    if array.dtype != np.float32 or values in {"f32", "int8"} or array.ndim < (1 if values == "f16" else 2):
        return Coded("raw", array)
    if not all(np.isfinite(array[rows]).all() for rows in row_blocks(array)):
        return Coded("raw", array)
    if values == "f16":
        return halves(array)
    # Where whole kernels may be stored, an index stands for the zeros in them.
    return _codebook(array, (16 if values == "codebook16" else 256) - (array.ndim > 2))


def smaller(array: Array, *choices: Coded) -> Coded:
    """Return the choice that takes fewest bits for the values of ``array`` and for the table."""
    count = int(np.count_nonzero(array))

    def cost(coded: Coded) -> int:
        table = 0 if coded.table is None else (16 if _are_halves(coded.table) else 32) * coded.table.size
        return count * coded.bits + table

    return min(choices, key=cost)


def _are_halves(array: Array) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.array_equal(array.astype(np.float16).astype(np.float32), array))


def halves(array: Array) -> Coded:
    """Return ``array`` as halves, or as it is where a finite half cannot stand for each value that is not zero."""
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float16)
    kept = all(
        np.isfinite(narrow[rows]).all() and np.array_equal(narrow[rows] != 0, array[rows] != 0)
        for rows in row_blocks(array)
    )
    return Coded("f16", narrow) if kept else Coded("raw", array)


def in_halves(coded: Coded) -> Coded:
    """Return a codebook with its table in halves; as it is where one of these would be zero or infinite."""
    if coded.table is None:
        return coded
    with np.errstate(over="ignore"):
        table = coded.table.astype(np.float16).astype(np.float32)
    sound = np.isfinite(table).all() and np.count_nonzero(table) == np.count_nonzero(coded.table)
    return Coded(coded.code, coded.symbols, table) if sound else coded


def error(array: Array, coded: Coded) -> float:
    """Return the largest error of a weight, relative to the largest weight; 0 for what is exact."""
    if coded.code == "raw" or not array.size:
        return 0.0
    largest, worst = float(max(array.max(), -array.min())), 0.0
    for rows in row_blocks(array):
        worst = max(worst, float(np.abs(coded.decoded(rows) - array[rows]).max(initial=0.0)))
    return worst / largest if largest else 0.0


def _codebook(array: Array, size: int) -> Coded:
    """Code ``array`` with ``size`` values, or one more for a convolution that has just as many."""
    weights = array[array != 0]
    with np.errstate(over="ignore", invalid="ignore"):  # of values near the end of float32
        if has_more(weights, size + (array.ndim > 2)):
            table = np.unique(codebook(weights, size).astype(np.float16)).astype(np.float32)
        else:
            table = np.unique(weights)
    if not table.size or not np.isfinite(table).all() or (table == 0).any():
        return Coded("raw", array)  # nothing to code, or centres beyond the range of halves
    symbols = np.zeros(array.shape, np.uint8 if table.size < _MOST else np.uint16)
    for rows in row_blocks(array):
        # In the type of the symbols: NumPy 1 adds a scalar in the type of the array, where 255 + 1 is 0.
        np.copyto(symbols[rows], np.add(nearest(array[rows], table), 1, dtype=symbols.dtype), where=array[rows] != 0)
    return Coded("codebook", symbols, np.concatenate([np.zeros(1, np.float32), table]))
