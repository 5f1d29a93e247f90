"""Streams: positions and values of one or more weights, coded together and decoded into one flat buffer.

A unit of the buffer is one weight, or one whole kernel of a convolution where kernels are gone. Small weights of one
value code share a stream, divided by density where that pays; large weights have one of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from onnx import TensorProto, numpy_helper

from relief_export.formats import blocks, positions, values
from relief_export.formats.onnx_file import positive_zeros

if TYPE_CHECKING:
    from relief_export.formats.builder import Builder

Array: TypeAlias = np.ndarray[Any, Any]

SMALLEST = 32
"""Tensors with fewer elements stay initializers, vectors of halves apart."""
ALONE = 1 << 18
"""Weights with this many elements and more have a stream of their own."""
_WORTH = 0.04
"""Share of its values by which a stream may grow to be decoded in fewer passes."""
_SCATTER_BITS = 8 * 60
"""What placing kernels takes more than looking them up."""
_NARROW = 1 << 17
"""Elements of a stream from which on int8 is placed as bytes."""
_SMALL = 1 << 17
"""Elements of a network below which bytes come before the time to load."""
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
    def key(self) -> tuple[str, str, tuple[int, ...]]:
        """What a stream's weights have in common."""
        return self.coded.code, self.coded.symbols.dtype.name, self.kernel

    @property
    def kernel(self) -> tuple[int, ...]:
        """The shape of a unit, ``()`` for one element."""
        return self.coded.symbols.shape[2:] if self.unit > 1 else ()

    @property
    def stored(self) -> Array:
        """Return the symbols that are stored, ``(k,)`` or ``(k, *kernel)``."""
        return positive_zeros(self.coded.symbols.reshape(-1, *self.kernel)[self.units])


def is_index_list(array: Array) -> bool:
    """Say whether ``array`` is a strictly ascending int64 vector, such as the features that a Gather keeps."""
    plain = array.dtype == np.int64 and array.ndim == 1 and array.size >= SMALLEST
    return bool(plain and array[0] >= 0 and (np.diff(array) > 0).all())


def emit_list(builder: Builder, indices: Array, out: str, *, gaps: bool = True) -> str:
    """Add an index list as positions, name it ``out``, and return the name of its code."""
    universe = int(indices[-1]) + 1
    code = positions.choose(indices, universe, gaps=gaps)
    builder.rename(code.emit_wide(builder, indices), out)
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


def make_items(found: list[tuple[str, Array]], coded: list[values.Coded]) -> list[Item]:
    """Make the items of named arrays, with one codebook for the small ones among them.

    Kernels of larger networks need a codebook with zero in it to load quickly, and have one of their own.
    """
    items = [make_item(name, array, own) for (name, array), own in zip(found, coded, strict=True)]
    small = sum(item.coded.symbols.size for item in items) < _SMALL
    plain = [i for i, item in enumerate(items) if item.unit == 1 or (small and _kernels(found[i][1], item).all())]
    for chosen, zero in ((plain, False), ([] if small else sorted({*range(len(items))} - {*plain}), True)):
        shared = values.share([found[i][1] for i in chosen], [coded[i] for i in chosen], zero=zero)
        for i, code in zip(chosen, shared, strict=True):
            items[i] = replace(items[i], coded=code)
    return items


def _kernels(array: Array, item: Item) -> Array:
    return np.asarray(array.reshape(-1, item.unit)[item.units] != 0)


def smallest(array: Array) -> int:
    """Return how many elements ``array`` must have to be packed; any vector may be one of halves among others."""
    return 4 if array.dtype == np.float32 and array.ndim == 1 else SMALLEST


def tensor_bits(item: Item) -> int:
    """Return about how many bits the nodes of ``item`` take, without those of its stream."""
    return 8 * 5 if item.coded.code == "f16" and item.coded.symbols.ndim == 1 else TENSOR_BITS


def bits(item: Item) -> float:
    """Return about how many bits ``item`` takes in a stream."""
    count = int(np.count_nonzero(item.units))
    return positions.estimate_bits(count, item.units.size) + count * item.unit * values.bits(item.coded)


def divide(items: list[Item], *, density: bool = True) -> list[list[Item]]:
    """Divide the weights into streams: large ones alone, the others by code, unit and, where that pays, density."""
    streams = [[item] for item in items if item.coded.symbols.size >= ALONE]
    groups: dict[tuple[str, str, tuple[int, ...]], list[Item]] = {}
    for item in items:
        if item.coded.symbols.size < ALONE:
            groups.setdefault(item.key, []).append(item)
    for group in groups.values():
        ordered = sorted(group, key=lambda item: float(item.units.mean()))
        streams.extend(_by_density(ordered) if density else [ordered])
    return [_filled(stream) for stream in streams]


def _filled(stream: list[Item]) -> list[Item]:
    """Store the zeros of ``stream`` too where its positions would take more and codebooks have an entry for them."""
    total, count = sum(item.units.size for item in stream), sum(int(np.count_nonzero(item.units)) for item in stream)
    spared = (total - count) * stream[0].unit * values.bits(stream[0].coded)
    if (
        not all(item.coded.has_zero for item in stream)
        or not count
        or spared > STREAM_BITS + positions.estimate_bits(count, total)
    ):
        return stream
    return [replace(item, units=np.ones_like(item.units)) for item in stream]


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


def emit_stream(builder: Builder, stream: list[Item], *, gaps: bool = True) -> None:
    """Add one stream to ``builder``; its weights become values of their names."""
    if stream[0].coded.code == "f16" and all(item.units.all() and not _tail(item) for item in stream):
        for item in stream:
            builder.halves(item.coded.symbols, item.name)
        return
    units = np.concatenate([item.units for item in stream]) if len(stream) > 1 else stream[0].units
    if _is_looked_up(stream, units):
        _look_up(builder, stream, units)
        return
    buffer = _buffer(builder, stream, units, gaps=gaps)
    last = [_tail(item) for item in stream]
    names = [item.name if not tail else next(builder.names) for item, tail in zip(stream, last, strict=True)]
    if len(stream) > 1:
        names = builder.split(buffer, [item.units.size for item in stream], names)
    elif not last[0]:
        builder.rename(buffer, stream[0].name)
    else:
        names = [buffer]
    for item, name, tail in zip(stream, names, last, strict=True):
        if tail:
            shape = builder.constant(list(item.coded.symbols.shape))
            _finish(builder, item, stream, "Reshape", name, shape)


def _is_looked_up(stream: list[Item], units: Array) -> bool:
    """Say whether one bit a kernel costs little enough more than positions: it is decoded in a third of the time."""
    count, first = int(np.count_nonzero(units)), next((item for item in stream if item.units.any()), stream[0])
    if first.unit == 1 or not first.coded.has_zero or not 0 < count < units.size:
        return False
    most = positions.estimate_bits(count, units.size) + _WORTH * count * first.unit * values.bits(first.coded)
    return units.size < most + _SCATTER_BITS


def _look_up(builder: Builder, stream: list[Item], units: Array) -> None:
    """Look every kernel up among the stored ones, the first of which is zeros, already in the shape of its weight."""
    (coded, first), *others = _parts(stream)
    first = np.concatenate([np.zeros_like(first, shape=(1, *first.shape[1:])), first])
    stored = values.emit(builder, [(coded, first), *others], narrow=_is_narrow(stream))
    flags = builder.node("Cast", builder.bits(units), to=TensorProto.INT32)
    rows = builder.node("Mul", builder.node("CumSum", flags, builder.constant(0)), flags)
    parts = builder.split(rows, [item.units.size for item in stream]) if len(stream) > 1 else [rows]
    for item, part in zip(stream, parts, strict=True):
        grid = builder.node("Reshape", part, builder.constant(list(item.coded.symbols.shape[:2])))
        _finish(builder, item, stream, "Gather", stored, grid)


def _parts(stream: list[Item]) -> list[tuple[values.Coded, Array]]:
    return [(item.coded, item.stored) for item in stream if item.units.any()]


def _buffer(builder: Builder, stream: list[Item], units: Array, *, gaps: bool) -> str:
    """Add the units of all weights of ``stream``, ``(n,)`` or ``(n, *kernel)``."""
    coded, narrow, found = stream[0].coded, _is_narrow(stream), blocks.locate(units)
    shape = [int(units.size), *stream[0].kernel]
    kind = coded.symbols.dtype if coded.code == "raw" or narrow else np.dtype(np.float32)
    if not found.size:
        return _zeros(builder, shape, kind)
    if found.size == units.size:
        return values.emit(builder, _parts(stream), narrow=narrow)
    others = found.size * stream[0].unit * values.bits(coded) // 8
    code = positions.choose(found, units.size, gaps=gaps, others=others)
    if stream[0].unit > 1:
        rows = builder.node("Reshape", code.emit_wide(builder, found), builder.constant([found.size, 1]))
        stored = values.emit(builder, _parts(stream), narrow=narrow)
        return builder.node("ScatterND", _zeros(builder, shape, kind), rows, stored)
    unpooled = _is_large(stream) and kind == np.float32
    fillers = positions.fillers(found) if code is positions.U4 and _is_large(stream) and coded.has_zero else None
    if fillers is not None and fillers * values.bits(coded) // 8 < _WORTH * others:
        places, symbols = positions.emit_filled(builder, found, stream[0].stored, fillers)
        places = builder.node("Cast", places, to=TensorProto.INT64) if unpooled else places
        stored, count = values.emit(builder, [(coded, symbols)], narrow=narrow), symbols.size
    else:
        places, count = (code.emit_wide if unpooled else code.emit)(builder, found), found.size
        del found  # before the values are copied
        stored = values.emit(builder, _parts(stream), narrow=narrow)
    if unpooled:
        return _unpool(builder, places, count, shape, stored)
    return builder.node("ScatterElements", _zeros(builder, shape, kind), places, stored)


def _tail(item: Item) -> bool:
    return item.coded.symbols.ndim != 1 or item.unit > 1


def _finish(builder: Builder, item: Item, stream: list[Item], op: str, *inputs: str) -> None:
    """Add the node that gives ``item`` its shape, scale what it gives, and give the weight its name."""
    scale, narrow = item.coded.scale, _is_narrow(stream)
    if scale is None or (scale == 1).all():
        value = builder.node(op, *inputs, out=None if narrow else item.name)
        if narrow:
            builder.node("Cast", value, out=item.name, to=TensorProto.FLOAT)
        return
    stored = builder.constant(scale) if item.coded.table is None else builder.halves(scale)
    if op == "Reshape" and item.coded.table is not None:  # one factor, quicker on a vector than on axes that end in 1
        builder.node(op, builder.node("Mul", inputs[0], stored), *inputs[1:], out=item.name)
        return
    value = builder.node(op, *inputs)
    if narrow:
        value = builder.node("Cast", value, to=TensorProto.FLOAT)
    builder.node("Mul", value, stored, out=item.name)


def _zeros(builder: Builder, shape: list[int], kind: np.dtype[Any]) -> str:
    value = numpy_helper.from_array(np.zeros(1, kind))
    return builder.node("ConstantOfShape", builder.constant(shape), **({} if kind == np.float32 else {"value": value}))


def _is_large(stream: list[Item]) -> bool:
    """Say whether a stream is one large weight of single elements, which ends in a Reshape."""
    return len(stream) == 1 and stream[0].unit == 1 and stream[0].units.size >= ALONE and _tail(stream[0])


def _is_narrow(stream: list[Item]) -> bool:
    """Say whether a stream is placed in zeros as int8 and becomes float32 after that: a quarter of the memory."""
    return stream[0].coded.code == "int8" and sum(item.coded.symbols.size for item in stream) >= _NARROW


def _unpool(builder: Builder, places: str, count: int, shape: list[int], stored: str) -> str:
    """Place float32 values in zeros, ``(1, 1, n)``, without a buffer of zeros first: a third of the time at load."""
    row, cube = builder.constant([1, 1, count]), [1, 1, *shape]
    indices, updates = builder.node("Reshape", places, row), builder.node("Reshape", stored, row)
    name = builder.node("MaxUnpool", updates, indices, builder.constant(cube), kernel_shape=[1])
    return builder.declare(name, TensorProto.FLOAT, cube)
