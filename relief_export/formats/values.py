"""Codes for the values of weights, decoded by standard ONNX operators.

    raw         the values as they are, in their own type
    f16         w ≈ float32(h), h the nearest half: relative error at most 2^−11 for normal halves
    int8        w ≈ s_c · q, one scale s_c = max |w_c| / 127 an output channel c, |q| >= 1 where w ≠ 0
    codebook    w ≈ s · B[i], 16 or 256 centres, stored as halves, by k-means over the non-zero values of a tensor
                (s = 1), or of several small ones, each with a scale s, where that costs little precision

The decoded value is 0 exactly where the weight is 0, so no code changes which connections exist.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from onnx import TensorProto

from relief_export.formats import blocks
from relief_export.formats.kmeans import codebook, is_more, nearest
from relief_export.formats.positions import SLOW_ABOVE

if TYPE_CHECKING:
    from collections.abc import Callable

    from relief_export.formats.builder import Builder

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Coded:
    """The values of one tensor in a code.

    Attributes:
        code: Its name in ``BITS``.
        symbols: What is stored, in the tensor's shape.
        table: The centres of a codebook.
        scale: The scales of int8, or the one of a shared codebook, in a shape that broadcasts over the tensor.
    """

    code: str
    symbols: Array
    table: Array | None = None
    scale: Array | None = None

    @property
    def has_zero(self) -> bool:
        """Say whether symbol 0 stands for zero."""
        return self.table is None or self.table[0] == 0

    def decoded(self, rows: slice = slice(None)) -> Array:
        """Return ``rows`` of the tensor that a reader gets; only non-zero weights of it mean something."""
        symbols = self.symbols[rows]
        if self.table is not None:
            values = np.asarray(self.table[symbols])
        else:
            values = symbols if self.code == "raw" else symbols.astype(np.float32)
        return values if self.scale is None else values * _part(self.scale, rows)


def _part(scale: Array, rows: slice) -> Array:
    return scale[rows] if len(scale) > 1 else scale


def bits(coded: Coded) -> int:
    """Return the bits one stored value takes."""
    return 4 if coded.code == "codebook16" else 8 * coded.symbols.itemsize


def encode(array: Array, code: str, axis: int) -> Coded:
    """Put ``array`` into ``code``; what the code cannot hold (overflow, NaN, another type) stays raw.

    Args:
        array: A tensor; only float32 of two axes and more loses precision, vectors of float32 go to f16 at most, and
            a single number stays as it is.
        code: A value of ``Options.values``; f32 is raw.
        axis: The output-channel axis, for int8.
    """
    if array.dtype != np.float32 or code == "f32" or not array.ndim:
        return Coded("raw", array)
    if not all(np.isfinite(array[rows]).all() for rows in blocks.rows(array)):
        return Coded("raw", array)
    if array.ndim < 2 or code == "f16":
        return _f16(array)
    coded, count = _ENCODERS[code](array, axis), int(np.count_nonzero(array))
    if coded.code != "raw" and _cost(coded, count) <= 16 * count:
        return coded  # halves could not take less
    return min(coded, _f16(array), key=lambda found: _cost(found, count))


def _cost(coded: Coded, count: int) -> int:
    """Return the bits of ``count`` values with what goes with them."""
    extra = (0 if coded.table is None else 2 * coded.table.size) + (0 if coded.scale is None else coded.scale.nbytes)
    return count * bits(coded) + 8 * extra


def _f16(array: Array) -> Coded:
    with np.errstate(over="ignore"):
        halves = array.astype(np.float16)
    kept = all(
        np.isfinite(halves[rows]).all() and np.array_equal(halves[rows] != 0, array[rows] != 0)
        for rows in blocks.rows(array)
    )
    return Coded("f16", halves) if kept else Coded("raw", array)


def _int8(array: Array, axis: int) -> Coded:
    others = tuple(other for other in range(array.ndim) if other != axis)
    highest, lowest = (of(axis=others, keepdims=True, initial=0.0) for of in (array.max, array.min))
    largest = np.maximum(highest, -lowest)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    with np.errstate(over="ignore"):
        usable = np.isfinite(1 / scale).all()
    if not usable:
        return Coded("raw", array)  # scales so small that they are subnormal
    symbols = np.empty(array.shape, np.int8)
    for rows in blocks.rows(array):
        weights = array[rows]
        quantised = np.clip(np.rint(weights / _part(scale, rows)), -127, 127)
        symbols[rows] = np.where((quantised == 0) & (weights != 0), np.sign(weights), quantised)
    return Coded("int8", symbols, scale=scale)


def _codebook(name: str, size: int) -> Callable[[Array, int], Coded]:
    def code(array: Array, _: int) -> Coded:
        # Where whole kernels may be stored, or zeros between positions, index 0 is zero.
        weights = array[array != 0]
        filled = array.size > SLOW_ABOVE and _FILLED * array.size < weights.size < array.size
        zero = np.zeros(1 if array.ndim > 2 or (filled and is_more(weights, size)) else 0, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # of values near the end of float32
            centres = codebook(weights, size - zero.size)
            halves = centres.astype(np.float16).astype(np.float32)
        if not centres.size or not np.isfinite(halves).all() or (halves == 0).any():
            return Coded("raw", array)  # nothing to code, or centres beyond the range of halves
        symbols = np.zeros(array.shape, np.uint8)
        for rows in blocks.rows(array):
            weights = array[rows]
            np.copyto(symbols[rows], nearest(weights, halves) + np.uint8(zero.size), where=weights != 0)
        return Coded(name, symbols, table=np.concatenate([zero, halves]))

    return code


_SHARED_SIZE = 1 << 18
_FILLED = 0.19
"""Share of non-zeros of a large tensor above which u4 positions are filled, see ``positions.emit_filled``."""
_MANY = 1 << 12
"""Symbols from which on they are looked up by GatherElements: a longer name, but a fifth of Gather's time at load."""
_ALIKE = 1.35
_NORMAL = 0.0115
"""Squared error, relative to the variance, of the best 16 levels for a normal distribution (Max, 1960)."""

_ENCODERS: dict[str, Callable[[Array, int], Coded]] = {
    "int8": _int8,
    "codebook16": _codebook("codebook16", 16),
    "codebook256": _codebook("codebook256", 256),
}


def share(arrays: list[Array], own: list[Coded], *, zero: bool = False) -> list[Coded]:
    """Give the small tensors among those in 16-entry codebooks one table, and each a scale, where it costs little.

    A tensor takes part where the squared error of its weights is at most 1.5 times that of its own table, or 2.25
    times that of the best table for normal weights, and never where its own table is exact.

    Args:
        arrays: The tensors.
        own: Their codes; others than codebook16 stay as they are.
        zero: Keep index 0 of the table for zero.
    """
    chosen = [i for i, coded in enumerate(own) if coded.code == "codebook16" and arrays[i].size < _SHARED_SIZE]
    while len(chosen) > 1:
        shared = _joint([arrays[i] for i in chosen], np.zeros(int(zero), np.float32))
        kept = [i for i, coded in zip(chosen, shared, strict=True) if _is_near(arrays[i], coded, own[i])]
        if kept == chosen:
            by_index = dict(zip(chosen, shared, strict=True))
            return [by_index.get(i, coded) for i, coded in enumerate(own)]
        chosen = kept
    return own


def _joint(arrays: list[Array], zero: Array) -> list[Coded]:
    values = [array[array != 0] for array in arrays]
    spreads = np.array([np.sqrt(np.mean(part.astype(np.float64) ** 2)) for part in values])
    # one scale fits several that are nearly alike, and a scale of 1 needs no node
    alike = np.abs(np.log(np.divide.outer(spreads, spreads))) < math.log(_ALIKE)
    ratios = spreads / spreads[int(alike.sum(axis=0).argmax())]
    ratios[np.abs(np.log(ratios)) < math.log(_ALIKE)] = 1
    with np.errstate(all="ignore"):
        scales = [ratio.reshape(1) for ratio in ratios.astype(np.float16).astype(np.float32)]
        scaled = np.concatenate([part / scale for part, scale in zip(values, scales, strict=True)])
        halves = codebook(scaled, 16 - zero.size).astype(np.float16).astype(np.float32)
    table = np.concatenate([zero, halves])
    found = []
    for array, scale in zip(arrays, scales, strict=True):
        nearby = nearest(array / scale, halves) + np.uint8(zero.size)
        symbols = np.where(array != 0, nearby, np.uint8(0)).astype(np.uint8)
        found.append(Coded("codebook16", symbols, table=table, scale=scale))
    return found


def _is_near(array: Array, shared: Coded, own: Coded) -> bool:
    least = _loss(array, own)
    return least > 0 and _loss(array, shared) <= max(
        1.5 * least, 2.25 * _NORMAL * float(np.square(array, dtype=np.float64).sum())
    )


def _loss(array: Array, coded: Coded) -> float:
    """Return the squared error of the weights that are not zero; infinite where one would become zero."""
    support = array != 0
    decoded = coded.decoded()[support]
    if not np.isfinite(decoded).all() or (decoded == 0).any():
        return math.inf
    return float(((decoded - array[support]).astype(np.float64) ** 2).sum())


def emit(builder: Builder, parts: list[tuple[Coded, Array]], *, narrow: bool = False) -> str:
    """Add the values of several tensors in one code and return the name of the decoded ``(k,)`` or ``(k, *kernel)``.

    Args:
        builder: Where constants and nodes go.
        parts: For each tensor its code and the symbols to store, ``(k_t,)`` or ``(k_t, *kernel)``.
        narrow: Leave them as the symbols that are stored.
    """
    code = parts[0][0].code
    symbols = np.concatenate([stored for _, stored in parts]) if len(parts) > 1 else parts[0][1]
    if code == "raw" or narrow:
        return builder.constant(symbols)
    if code == "f16" and symbols.ndim == 1:
        return builder.halves(symbols)
    if not code.startswith("codebook"):
        return builder.node("Cast", builder.constant(symbols), to=TensorProto.FLOAT)
    tables = [coded.table for coded, _ in parts if coded.table is not None]
    runs = [list(run) for _, run in itertools.groupby(range(len(parts)), key=lambda i: id(tables[i]))]
    looked = [np.concatenate([parts[i][1].ravel() for i in run]) for run in runs]
    if code == "codebook16":
        pieces = [builder.symbols(words) for words in looked]
    else:
        indices = builder.node("Cast", builder.constant(symbols.ravel()), to=TensorProto.INT32)
        pieces = builder.split(indices, [words.size for words in looked]) if len(looked) > 1 else [indices]
    found = [
        builder.node("GatherElements" if words.size >= _MANY else "Gather", builder.halves(tables[run[0]]), piece)
        for run, words, piece in zip(runs, looked, pieces, strict=True)
    ]
    values = builder.node("Concat", *found, axis=0) if len(found) > 1 else found[0]
    return builder.node("Reshape", values, builder.constant(list(symbols.shape))) if symbols.ndim > 1 else values
