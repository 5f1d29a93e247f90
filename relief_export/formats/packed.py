"""Packed ONNX: positions and values in a few bytes, rebuilt by standard operators that ONNX Runtime folds at load.

Weights of one value code go through one stream where they are small: the stream is decoded once into a flat buffer
that Split and Reshape cut into the weights. Large weights have a stream of their own. A unit of the buffer is one
weight, or one whole kernel of a convolution where kernels are gone. Which is smaller decides, for every choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from relief_export.errors import IntegrityError, UnsupportedModelError
from relief_export.formats import positions, squeeze, values
from relief_export.formats.artifact import EXACT, Artifact, File, Options, Tolerance
from relief_export.formats.builder import Builder, short_names
from relief_export.formats.container import canonical, graphs, load_proto, open_session, save_proto, to_ir
from relief_export.formats.decode import decode
from relief_export.formats.manifest import check_listed

if TYPE_CHECKING:
    from pathlib import Path

Array: TypeAlias = np.ndarray[Any, Any]

MARK, VERSION = "packed", 1
OPSET = 13
TOLERANCES: dict[str, Tolerance] = {
    "f32": EXACT,
    "f16": Tolerance(relative_error=1e-2, accuracy_drop=0.005),
    "int8": Tolerance(relative_error=None, accuracy_drop=0.01),
    "codebook256": Tolerance(relative_error=None, accuracy_drop=0.01),
    "codebook16": Tolerance(relative_error=None, accuracy_drop=0.02),
}
SMALLEST = 32
_ALONE = 1 << 20
_STREAM_BITS, _TENSOR_BITS = 8 * 220, 8 * 40  # what the nodes of a stream, and of each weight in it, take
DTYPES = frozenset(["float16", "float32", "float64", "int8", "uint8", "int16", "uint16", "int32", "int64"])
_CHANNEL_AXES = {"Conv": 0, "ConvTranspose": 1, "MatMul": -1, "Gemm": -1}


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


def write(model: ir.Model, path: Path, options: Options) -> Artifact:
    """Write ``model`` as packed ONNX that ONNX Runtime has opened at its default settings.

    Raises:
        UnsupportedModelError: The model's opset is below 13, or ONNX Runtime refuses it.
    """
    prepared = canonical(model)
    if prepared.opset_imports.get("", OPSET) < OPSET:
        raise UnsupportedModelError(
            f"packed needs opset {OPSET}, the model has {prepared.opset_imports['']}: use onnx.version_converter"
        )
    items, notes = _items(prepared, options.values)
    for item in items:
        prepared.graph.initializers.pop(item.name)
    proto = ir.to_proto(prepared)
    names = squeeze.squeeze(proto)
    builder = Builder(short_names(set(names.values())))
    for stream in _streams(items):
        emit_stream(builder, stream, {item.name: names[item.name] for item in stream})
        if stream[0].coded.symbols.size >= _ALONE:
            builder.flush()
    builder.flush()
    nodes = [*builder.nodes, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(builder.tensors)
    proto.graph.value_info.extend(builder.shapes)
    proto.graph.name = f"{MARK}{VERSION}"
    save_proto(proto, path)
    if options.verify:
        open_session(path)
    files = (File.of(path.parent, path),)
    return Artifact(path.name, "packed", files, TOLERANCES[options.values], options.to_dict(), tuple(notes))


def _items(model: ir.Model, code: str) -> tuple[list[Item], list[str]]:
    items, notes, worst = [], [], (0.0, "")
    for value in model.graph.initializers.values():
        if value.const_value is None or value.name is None or value.const_value.dtype == ir.DataType.STRING:
            continue
        array = value.const_value.numpy()
        if array.dtype.name not in DTYPES or array.size < SMALLEST:
            continue
        if value.is_graph_input():
            notes.append(f"{value.name} stays dense: it is an input as well, so that a caller may replace it")
            continue
        coded = values.encode(array, code, channel_axis(value))
        item = make_item(value.name, array, coded)
        if _bits(item) + _TENSOR_BITS >= 8 * array.nbytes:
            if array.ndim > 1 and array.dtype.kind == "f":
                notes.append(f"{value.name} stays dense: it has too few zeros")
            continue
        worst = max(worst, (_error(array, coded), value.name))
        items.append(item)
    if worst[0] > 0:
        notes.append(f"largest error of a weight: {worst[0]:.3g} of the largest in {worst[1]}")
    return items, notes


def _error(array: Array, coded: values.Coded) -> float:
    if coded.code == "raw":
        return 0.0
    support = array != 0
    if not support.any():
        return 0.0
    return float(np.abs((coded.decoded() - array)[support]).max() / np.abs(array).max())


def channel_axis(value: ir.Value) -> int:
    """Return the axis of ``value`` that its first consumer maps to output channels."""
    for node, _ in value.uses():
        axis = _CHANNEL_AXES.get(node.op_type, 0)
        transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", False)
        rank = len(value.shape or ())
        return 0 if transposed or not rank else axis % rank
    return 0


def make_item(name: str, array: Array, coded: values.Coded) -> Item:
    """Choose the unit, a weight or a whole kernel, that takes fewer bits for ``array`` in ``coded``."""
    support = array != 0
    single = Item(name, coded, 1, support.ravel())
    kernel = int(np.prod(array.shape[2:], dtype=np.int64))
    if kernel == 1 or array.ndim < 3:
        return single
    whole = Item(name, coded, kernel, support.reshape(-1, kernel).any(axis=1))
    return min(whole, single, key=_bits)


def _bits(item: Item) -> float:
    count = int(np.count_nonzero(item.units))
    return positions.estimate_bits(count, item.units.size) + count * item.unit * values.bits(item.coded)


def _streams(items: list[Item]) -> list[list[Item]]:
    """Divide the weights into streams: large ones alone, the others by code, unit and density where that pays."""
    streams = [[item] for item in items if item.coded.symbols.size >= _ALONE]
    groups: dict[tuple[str, str, int], list[Item]] = {}
    for item in items:
        if item.coded.symbols.size < _ALONE:
            groups.setdefault(item.key, []).append(item)
    for group in groups.values():
        streams.extend(_divide(sorted(group, key=lambda item: float(item.units.mean()))))
    return streams


def _divide(group: list[Item]) -> list[list[Item]]:
    counts = np.cumsum([0, *(np.count_nonzero(item.units) for item in group)])
    sizes = np.cumsum([0, *(item.units.size for item in group)])

    def cost(start: int, end: int) -> float:
        return _STREAM_BITS + positions.estimate_bits(int(counts[end] - counts[start]), int(sizes[end] - sizes[start]))

    total = len(group)
    cut = min(range(1, total), key=lambda at: cost(0, at) + cost(at, total), default=0)
    if not cut or cost(0, cut) + cost(cut, total) >= cost(0, total):
        return [group]
    return _divide(group[:cut]) + _divide(group[cut:])


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
        buffer = _scatter(builder, found, shape, values.emit(builder, parts, unit), kind)
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


def _scatter(builder: Builder, found: Array, shape: list[int], stored: str, kind: np.dtype[Any]) -> str:
    code = positions.choose(found, shape[0])
    indices = code.emit(builder, found, shape[0])
    zeros = _zeros(builder, shape, kind)
    if len(shape) == 1:
        return builder.node("ScatterElements", zeros, indices, stored)
    return builder.node("ScatterND", zeros, builder.node("Reshape", indices, builder.constant([found.size, 1])), stored)


def is_packed(proto: onnx.ModelProto) -> bool:
    """Say whether ``proto`` is one of ours, of any version."""
    return proto.graph.name.startswith(MARK) and proto.graph.name.removeprefix(MARK).isdigit()


def read(path: Path) -> ir.Model:
    """Read a packed model back as a plain dense one, with the short names it was given.

    Raises:
        InputError: There is no such file.
        IntegrityError: It is damaged, differs from its manifest, or is of a newer version.
    """
    check_listed(path)
    proto = load_proto(path)
    if is_packed(proto):
        unpack(proto, path)
    return to_ir(proto, path)


def unpack(proto: onnx.ModelProto, path: Path) -> None:
    """Replace, in place, the decoding nodes of a packed model by the weights they give.

    Raises:
        IntegrityError: The version is another, or a node is damaged.
    """
    if proto.graph.name != f"{MARK}{VERSION}":
        raise IntegrityError(f"{path} is packed in version {proto.graph.name!r}, this program reads {MARK}{VERSION}")
    decode(proto, path.stat().st_size, str(path))
    del proto.graph.value_info[:]
    used = {name for graph in graphs(proto.graph) for node in graph.node for name in node.input}
    used |= {value.name for value in (*proto.graph.output, *proto.graph.input)}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
