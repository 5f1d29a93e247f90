"""Streams: positions and values of one or more weights, coded together and decoded into one flat buffer.

A unit of the buffer is one weight, or one whole kernel of a convolution where kernels are gone. Small weights of one
value code share a stream, divided by density where that pays; large weights have one of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from onnx import TensorProto, numpy_helper

from relief_export.formats import positions, values

if TYPE_CHECKING:
    from relief_export.formats.builder import Builder

Array: TypeAlias = np.ndarray[Any, Any]

SMALLEST = 32
"""Tensors with fewer elements stay initializers."""
ALONE = 1 << 18
"""Weights with this many elements and more have a stream of their own."""
STREAM_BITS, TENSOR_BITS = 8 * 220, 8 * 40
"""What the nodes of a stream, and of each weight in it, take."""


@dataclass(frozen=True)
class Item:
    """One weight on its way into a stream: ``units`` is the boolean mask of its stored units, in order."""

    name: str
    coded: values.Coded
    unit: int
    units: Array

    @property
    def key(self) -> tuple[str, str, int]:
        """What a stream's weights have in common."""
        return self.coded.code, self.coded.symbols.dtype.name, self.unit

    @property
    def stored(self) -> Array:
        """Return the symbols that are stored, ``(k,)`` or ``(k, unit)``."""
        table = self.coded.symbols.reshape(-1, self.unit)[self.units]
        return table if self.unit > 1 else table[:, 0]


def is_index_list(array: Array) -> bool:
    """Say whether ``array`` is a strictly ascending int64 vector, such as the features that a Gather keeps."""
    plain = array.dtype == np.int64 and array.ndim == 1 and array.size >= SMALLEST
    return bool(plain and array[0] >= 0 and (np.diff(array) > 0).all())


def emit_list(builder: Builder, indices: Array, out: str) -> str:
    """Add an index list as positions, name it ``out``, and return the name of its code."""
    universe = int(indices[-1]) + 1
    code = positions.choose(indices, universe)
    builder.rename(code.emit_wide(builder, indices, universe), out)
    return code.name


def make_item(name: str, array: Array, coded: values.Coded) -> Item:
    """Choose the unit, a weight or a whole kernel, that takes fewer bits for ``array`` in ``coded``."""
    support = array != 0
    single = Item(name, coded, 1, support.ravel())
    kernel = int(np.prod(array.shape[2:], dtype=np.int64))
    if kernel == 1 or array.ndim < 3:
        return single
    whole = Item(name, coded, kernel, support.reshape(-1, kernel).any(axis=1))
    return min(whole, single, key=bits)


def bits(item: Item) -> float:
    """Return about how many bits ``item`` takes in a stream."""
    count = int(np.count_nonzero(item.units))
    return positions.estimate_bits(count, item.units.size) + count * item.unit * values.bits(item.coded)


def divide(items: list[Item]) -> list[list[Item]]:
    """Divide the weights into streams: large ones alone, the others by code, unit and density where that pays."""
    streams = [[item] for item in items if item.coded.symbols.size >= ALONE]
    groups: dict[tuple[str, str, int], list[Item]] = {}
    for item in items:
        if item.coded.symbols.size < ALONE:
            groups.setdefault(item.key, []).append(item)
    for group in groups.values():
        streams.extend(_by_density(sorted(group, key=lambda item: float(item.units.mean()))))
    return streams


def _by_density(group: list[Item]) -> list[list[Item]]:
    counts = np.cumsum([0, *(np.count_nonzero(item.units) for item in group)])
    sizes = np.cumsum([0, *(item.units.size for item in group)])

    def cost(start: int, end: int) -> float:
        return STREAM_BITS + positions.estimate_bits(int(counts[end] - counts[start]), int(sizes[end] - sizes[start]))

    total = len(group)
    cut = min(range(1, total), key=lambda at: cost(0, at) + cost(at, total), default=0)
    if not cut or cost(0, cut) + cost(cut, total) >= cost(0, total):
        return [group]
    return _by_density(group[:cut]) + _by_density(group[cut:])


def emit_stream(builder: Builder, stream: list[Item], outs: dict[str, str]) -> None:
    """Add one stream to ``builder``; the weight called x in ``stream`` becomes the value ``outs[x]``."""
    unit, sizes = stream[0].unit, [item.units.size for item in stream]
    units = np.concatenate([item.units for item in stream]) if len(stream) > 1 else stream[0].units
    found = np.flatnonzero(units)
    shape = [int(units.size), unit] if unit > 1 else [int(units.size)]
    coded = stream[0].coded
    kind = coded.symbols.dtype if coded.code == "raw" else np.dtype(np.float32)
    if found.size in (0, units.size):
        buffer = (
            values.emit(builder, [(i.coded, i.stored) for i in stream], unit)
            if found.size
            else _zeros(builder, shape, kind)
        )
    else:
        parts = [(item.coded, item.stored) for item in stream if item.units.any()]
        place = _unpool if _is_large(stream) and kind == np.float32 else _scatter
        buffer = place(builder, found, shape, values.emit(builder, parts, unit), kind)
    last = [_tail(item) for item in stream]
    names = [outs[item.name] if not tail else next(builder.names) for item, tail in zip(stream, last, strict=True)]
    if len(stream) > 1:
        names = builder.split(buffer, sizes, names)
    elif not last[0]:
        builder.rename(buffer, outs[stream[0].name])
    else:
        names = [buffer]
    for item, name, tail in zip(stream, names, last, strict=True):
        if tail:
            _shape(builder, item, name, outs[item.name])


def _tail(item: Item) -> bool:
    return item.coded.symbols.ndim != 1 or item.unit > 1


def _shape(builder: Builder, item: Item, name: str, out: str) -> None:
    shape = builder.constant(list(item.coded.symbols.shape))
    if item.coded.scale is None:
        builder.node("Reshape", name, shape, out=out)
    else:
        builder.node("Mul", builder.node("Reshape", name, shape), builder.constant(item.coded.scale), out=out)


def _zeros(builder: Builder, shape: list[int], kind: np.dtype[Any]) -> str:
    value = numpy_helper.from_array(np.zeros(1, kind))
    return builder.node("ConstantOfShape", builder.constant(shape), **({} if kind == np.float32 else {"value": value}))


def _is_large(stream: list[Item]) -> bool:
    """Say whether a stream is one large weight of single elements, which ends in a Reshape."""
    return len(stream) == 1 and stream[0].unit == 1 and stream[0].units.size >= ALONE and _tail(stream[0])


def _unpool(builder: Builder, found: Array, shape: list[int], stored: str, _: np.dtype[Any]) -> str:
    """Place float32 values in zeros, ``(1, 1, n)``, without a buffer of zeros first: a third of the time at load."""
    row = builder.constant([1, 1, found.size])
    code = positions.choose(found, shape[0])
    indices = builder.node("Reshape", code.emit_wide(builder, found, shape[0]), row)
    cube = [1, 1, *shape]
    updates = builder.node("Reshape", stored, row)
    name = builder.node("MaxUnpool", updates, indices, builder.constant(cube), kernel_shape=[1])
    return builder.declare(name, TensorProto.FLOAT, cube)


def _scatter(builder: Builder, found: Array, shape: list[int], stored: str, kind: np.dtype[Any]) -> str:
    code = positions.choose(found, shape[0])
    zeros = _zeros(builder, shape, kind)
    if len(shape) == 1:
        return builder.node("ScatterElements", zeros, code.emit(builder, found, shape[0]), stored)
    rows = builder.node("Reshape", code.emit_wide(builder, found, shape[0]), builder.constant([found.size, 1]))
    return builder.node("ScatterND", zeros, rows, stored)
