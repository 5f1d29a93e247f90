"""Codes for ascending positions p_0 < p_1 < … < p_{k−1} in a universe of n, decoded by standard ONNX operators.

gap codes (u4, u8, u16), with E the largest code word, 15, 255 or 65535:
    words w < E each end one position, a word E only advances:  p_j = Σ of all words up to the j-th that is not E.
bitmap:  bit i is 1 exactly where i is a position.
rice, with l the integer that makes it shortest:  each gap g is ⌈g / 2^l⌉, in unary, and what that is too much, in l
    bits. With h_j where the j-th one stands in the unary bits and r_i the l-bit words:  p_j = 2^l h_j − Σ_{i≤j} r_i.
    This is Golomb's code (S. W. Golomb, "Run-length encodings", 1966) with a power of two (R. F. Rice, 1979); for
    random positions it takes about 0.1 bit a position more than the entropy. A bitmap is the case l = 0.

Operator versions: MatMulInteger 10; BitShift, Compress, CumSum, GatherElements 11; Mod, Sign, Split 13; BitwiseAnd 18,
in place of BitShift and Mod.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from onnx import TensorProto

from relief_export.formats import blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from relief_export.formats.builder import Builder

Array: TypeAlias = np.ndarray[Any, Any]

SLOW_ABOVE = 1 << 19
"""Universes above this use gap codes only: bit codes cost the runtime several passes over every bit at load."""
_WORDS = 8 * 33
"""Bits that the nodes for words of several bits take."""
_U4_WORTH = 1.125
"""There, u4 must also make positions and values together smaller than u8 by this: it takes seven passes more."""


@dataclass(frozen=True)
class Code:
    """One way to store positions.

    Attributes:
        name: What the ledger and the notes call it.
        size: Bytes for (positions, universe), its nodes included, to within a few tens.
        emit: Adds constants and nodes and returns the name of the positions.
        wide: Whether the positions come as int64; else as int32, which costs the runtime half the memory.
        slow: Whether it is left out for universes above ``SLOW_ABOVE``.
    """

    name: str
    size: Callable[[Array, int], float]
    emit: Callable[[Builder, Array], str]
    wide: bool = False
    slow: bool = False

    def emit_wide(self, builder: Builder, positions: Array) -> str:
        """Emit the positions as int64."""
        name = self.emit(builder, positions)
        return name if self.wide else builder.node("Cast", name, to=TensorProto.INT64)


def gap_words(gaps: Array, escape: int) -> Array:
    """Return the words of a gap code for ``gaps``; every word lies in 0 … ``escape``."""
    if gaps.max(initial=0) < escape:
        return gaps
    escapes = gaps // escape
    words = np.full(gaps.size + int(escapes.sum()), escape, gaps.dtype)
    words[np.cumsum(escapes + 1) - 1] = gaps - escapes * escape
    return words


def _emit_gaps(builder: Builder, positions: Array, dtype: type[np.unsignedinteger[Any]], escape: int) -> str:
    words = np.concatenate([gap_words(gaps, escape).astype(dtype) for _, gaps in blocks.runs(positions)])
    if escape == 15:
        if words.size > positions.size and words.size % 2:
            words = np.append(words, dtype(escape))  # an even number needs no Split
        narrow = builder.nibbles(words)
    else:
        narrow = builder.node("Cast", builder.constant(words), to=TensorProto.INT32)
    sums = builder.node("CumSum", narrow, builder.constant(0))
    if words.size == positions.size:
        return sums
    ends = builder.node("Less", narrow, builder.constant(escape, np.int32))
    found = builder.node("Compress", sums, ends, axis=0)
    return builder.declare(found, TensorProto.INT32, [positions.size])


def _rice_bits(positions: Array, low: int) -> int:
    highs = (np.diff(positions, prepend=0) + ((1 << low) - 1)) >> low
    return low * positions.size + int(highs.sum()) + 1


def low_bits(positions: Array) -> int:
    """Return the number l of low bits, 1 to 8, that makes the Rice code of ``positions``, at least one, shortest."""
    return min(range(1, 9), key=lambda low: _rice_bits(positions, low) + (_WORDS if low > 1 else 0))


def _emit_rice(builder: Builder, positions: Array, low: int) -> str:
    gaps = np.diff(positions, prepend=0)
    highs = (gaps + ((1 << low) - 1)) >> low
    ones = np.cumsum(highs)
    unary = np.zeros(int(ones[-1]) + 1, np.uint8)
    unary[ones] = 1
    found = builder.node("NonZero", builder.run(unary))
    builder.declare(found, TensorProto.INT64, [1, positions.size])
    places = builder.node("MatMul", builder.constant([1 << low]), found)
    if not low:
        return places
    rests = builder.node("CumSum", builder.words((highs << low) - gaps, low), builder.constant(0))
    return builder.node("Sub", builder.node("Cast", places, to=TensorProto.INT32), rests)


def _gap_code(name: str, bits: int) -> Code:
    escape = 2**bits - 1
    dtype = np.uint8 if bits <= 8 else np.uint16

    def size(positions: Array, _: int) -> float:
        escapes = sum(int((gaps // escape).sum()) for _, gaps in blocks.runs(positions))
        return (positions.size + escapes) * bits / 8 + (150 if escapes else 50)

    def emit(builder: Builder, positions: Array) -> str:
        return _emit_gaps(builder, positions, dtype, escape)

    return Code(name, size, emit)


def fillers(positions: Array) -> int:
    """Return how many positions in between would leave no gap of ``positions`` above 15."""
    return sum(int((np.maximum(gaps - 1, 0) // 15).sum()) for _, gaps in blocks.runs(positions))


def emit_filled(builder: Builder, positions: Array, stored: Array, count: int) -> tuple[str, Array]:
    """Add ``positions`` and their ``count`` fillers as int32; return their name, and ``stored`` with zeros for these.

    Without gaps above 15, u4 words need no escapes, and the runtime takes two passes fewer at load.
    """
    total, done = positions.size + count, 0
    words, values = np.full(total, 15, np.uint8), np.zeros(total, stored.dtype)
    for span, gaps in blocks.runs(positions):
        extra = np.maximum(gaps - 1, 0) // 15
        real = done + np.cumsum(extra + 1) - 1
        words[real] = gaps - 15 * extra
        values[real] = stored[span]
        done = int(real[-1]) + 1
    return builder.node("CumSum", builder.nibbles(words), builder.constant(0)), values


U8, U4 = _gap_code("u8", 8), _gap_code("u4", 4)
BITMAP = Code(
    "bitmap",
    lambda positions, _: (int(positions[-1]) + 1) / 8 + 170,
    lambda builder, positions: _emit_rice(builder, positions, 0),
    wide=True,
    slow=True,
)
CODES: tuple[Code, ...] = (
    U8,
    U4,
    _gap_code("u16", 16),
    Code(
        "rice",
        lambda positions, _: _rice_bits(positions, low_bits(positions)) / 8 + 260,
        lambda builder, positions: _emit_rice(builder, positions, low_bits(positions)),
        slow=True,
    ),
    BITMAP,
)


def choose(positions: Array, universe: int, *, gaps: bool = True, others: int = 0) -> Code:
    """Return the code that takes the fewest bytes for ``positions``, at least one, in ``universe``.

    Args:
        positions: Ascending, ``(k,)``.
        universe: How many there could be.
        gaps: Allow the gap codes in small universes too. Networks whose symbols and positions are all bits need one
            decoder fewer.
        others: Bytes of the values that go with the positions.
    """
    small = universe <= SLOW_ABOVE
    allowed = [code for code in CODES if (small or not code.slow) and (gaps or not small or code.slow)]
    best = min(allowed, key=lambda code: code.size(positions, universe))
    if (
        best is U4
        and not small
        and U8.size(positions, universe) + others < _U4_WORTH * (best.size(positions, universe) + others)
    ):
        return U8
    return best


def is_worth(indices: Array) -> bool:
    """Say whether an ascending index list takes fewer bytes as positions; int32 must hold them and what follows."""
    universe = int(indices[-1]) + 1
    return universe < 1 << 30 and choose(indices, universe).size(indices, universe) < indices.nbytes


def estimate_bits(count: int, universe: int) -> float:
    """Return about how many bits the best code takes for ``count`` of ``universe`` positions, before any is tried."""
    if count == 0:
        return 0.0
    return min(float(universe), count * (math.log2(max(universe / count, 1.0)) + 2.0), 16.0 * count)
