"""Codes for ascending positions p_0 < p_1 < … < p_{k−1} in a universe of n, decoded by standard ONNX operators.

gap codes (u4, u8, u16), with E the largest code word, 15, 255 or 65535:
    words w < E each end one position, a word E only advances:  p_j = Σ of all words up to the j-th that is not E.
bitmap:  bit i is 1 exactly where i is a position.
Elias-Fano with l = the integer that makes it shortest:  l bit planes of the low parts, then the high parts in unary,
    so that the j-th one stands at h_j:  p_j = 2^l (h_j − j) + Σ_i 2^i low_{i,j}.

Bits fill bytes from the most significant end. Operator versions: BitShift, Compress, CumSum, Range 11; Split 13.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from onnx import TensorProto

if TYPE_CHECKING:
    from collections.abc import Callable

    from relief_export.formats.builder import Builder

Array: TypeAlias = np.ndarray[Any, Any]

SLOW_ABOVE = 1 << 19
"""Universes above this use gap codes only: bit codes cost the runtime several passes over every bit at load."""


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
    emit: Callable[[Builder, Array, int], str]
    wide: bool = False
    slow: bool = False

    def emit_wide(self, builder: Builder, positions: Array, universe: int) -> str:
        """Emit the positions as int64."""
        name = self.emit(builder, positions, universe)
        return name if self.wide else builder.node("Cast", name, to=TensorProto.INT64)


def gap_words(positions: Array, escape: int) -> Array:
    """Return the words of a gap code as int64; every word lies in 0 … ``escape``."""
    gaps = np.diff(positions, prepend=0)
    escapes = gaps // escape
    if not escapes.any():
        return gaps
    words = np.full(gaps.size + int(escapes.sum()), escape, np.int64)
    words[np.cumsum(escapes + 1) - 1] = gaps - escapes * escape
    return words


def _emit_gaps(builder: Builder, positions: Array, dtype: type[np.unsignedinteger[Any]], escape: int) -> str:
    words = gap_words(positions, escape)
    if escape == 15:
        narrow = builder.nibbles(words)
    else:
        narrow = builder.node("Cast", builder.constant(words.astype(dtype)), to=TensorProto.INT32)
    sums = builder.node("CumSum", narrow, builder.constant(0))
    if words.size == positions.size:
        return sums
    ends = builder.node("Less", narrow, builder.constant(escape, np.int32))
    found = builder.node("Compress", sums, ends, axis=0)
    return builder.declare(found, TensorProto.INT32, [positions.size])


def _unpack_bits(builder: Builder, bits: Array) -> str:
    """Store bits, whole bytes of them, and return them as uint8 0 or 1, flat."""
    packed = builder.constant(np.packbits(bits)[:, None])
    shifts = builder.constant(np.arange(7, -1, -1, dtype=np.uint8))
    shifted = builder.node("BitShift", packed, shifts, direction="RIGHT")
    odd = builder.node("Mod", shifted, builder.constant(2, np.uint8))
    return builder.node("Reshape", odd, builder.constant([bits.size]))


def _ones(builder: Builder, bits: str, found: int) -> str:
    """Return the indices of the ones among flat ``bits``, ``(1, found)``."""
    return builder.declare(builder.node("NonZero", bits), TensorProto.INT64, [1, found])


def _emit_bitmap(builder: Builder, positions: Array, universe: int) -> str:
    bits = np.zeros(-(-universe // 8) * 8, np.uint8)
    bits[positions] = 1
    return builder.node(
        "Reshape", _ones(builder, _unpack_bits(builder, bits), positions.size), builder.constant([positions.size])
    )


def low_bits(positions: Array, universe: int) -> int:
    """Return the number l of low bits that makes Elias-Fano shortest: l·k + k + ⌊p_max / 2^l⌋ bits."""
    last = int(positions[-1]) if positions.size else universe
    return min(range(24), key=lambda low: low * positions.size + (last >> low))


def _emit_elias_fano(builder: Builder, positions: Array, universe: int) -> str:
    count, low = positions.size, low_bits(positions, universe)
    high = positions >> low
    unary = np.zeros(count + int(high[-1]), np.uint8)
    unary[high + np.arange(count)] = 1
    planes = (positions >> np.arange(low)[:, None]) & 1
    bits = np.concatenate([planes.ravel().astype(np.uint8), unary])
    bits = np.concatenate([bits, np.zeros(-bits.size % 8, np.uint8)])
    stored = _unpack_bits(builder, bits)
    lows = ""
    if low:
        lows, stored = builder.split(stored, [low * count, bits.size - low * count])
    ones = builder.node("Mul", _ones(builder, stored, count), builder.constant(1 << low))
    line = builder.node("Range", *(builder.constant(value) for value in (0, count << low, 1 << low)))
    result = builder.node("Sub", ones, line)
    if low:
        table8 = builder.node("Reshape", lows, builder.constant([low, count]))
        table = builder.node("Cast", table8, to=TensorProto.INT64)
        powers = builder.constant([1 << bit for bit in range(low)])
        result = builder.node("Add", result, builder.node("MatMul", powers, table))
    return builder.node("Reshape", result, builder.constant([count]))


def _gap_code(name: str, bits: int) -> Code:
    escape = 2**bits - 1
    dtype = np.uint8 if bits <= 8 else np.uint16

    def size(positions: Array, _: int) -> float:
        escapes = int((np.diff(positions, prepend=0) // escape).sum())
        return (positions.size + escapes) * bits / 8 + (150 if escapes else 50)

    def emit(builder: Builder, positions: Array, _: int) -> str:
        return _emit_gaps(builder, positions, dtype, escape)

    return Code(name, size, emit)


def _elias_fano_size(positions: Array, universe: int) -> float:
    low = low_bits(positions, universe)
    return (low * positions.size + positions.size + (int(positions[-1]) >> low)) / 8 + 370


CODES: tuple[Code, ...] = (
    _gap_code("u8", 8),
    _gap_code("u4", 4),
    _gap_code("u16", 16),
    Code("elias-fano", _elias_fano_size, _emit_elias_fano, wide=True, slow=True),
    Code("bitmap", lambda _, universe: universe / 8 + 170, _emit_bitmap, wide=True, slow=True),
)


def choose(positions: Array, universe: int) -> Code:
    """Return the code that takes the fewest bytes for ``positions``, at least one, in ``universe``."""
    allowed = [code for code in CODES if universe <= SLOW_ABOVE or not code.slow]
    return min(allowed, key=lambda code: code.size(positions, universe))


def estimate_bits(count: int, universe: int) -> float:
    """Return about how many bits the best code takes for ``count`` of ``universe`` positions, before any is tried."""
    if count == 0:
        return 0.0
    return min(float(universe), count * (math.log2(max(universe / count, 1.0)) + 2.0), 16.0 * count)
