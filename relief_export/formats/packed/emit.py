"""Streams as ONNX: constants, and the nodes that ONNX Runtime evaluates once, when a session is created.

Bytes of a small file are mostly nodes, names and headers, so what is alike (bits, halves, short lists of integers) is
deferred: named at once and stored later, all of a kind in one constant that a Split cuts.

Operator versions: MatMulInteger 10; BitShift, Compress, CumSum, GatherElements 11; Mod, Sign, Split 13; BitwiseAnd 18,
in place of BitShift and Mod.
"""

from __future__ import annotations

import itertools
import string
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from relief_export.formats.onnx_file import graphs
from relief_export.formats.packed.encode import (
    ALONE,
    choose_low,
    gap_bytes,
    index_bits,
    locate,
    rice_parts,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from google.protobuf.message import Message

    from relief_export.formats.packed.encode import Item

Array: TypeAlias = np.ndarray[Any, Any]

_CHARACTERS = string.ascii_letters + string.digits + "_.:;,+-*/=<>()[]{}|~^!?@#$%&"
_AND_OPSET = 18
"""Opset from which on bits are cut by BitwiseAnd, which takes a third of the time of BitShift and Mod."""
_SHARED = 64
"""Constants of at most so many elements are compared with the others, and stored once."""
_VARINTS_UP_TO = 1 << 12
_FEW_LISTS = 7
_SMALL_FILE = 1 << 13
"""Lists are joined in files with fewer bytes: where shapes are computed too, the runtime needs a second pass."""
_VARINTS = {np.dtype(np.int64): "int64_data", np.dtype(np.int32): "int32_data"}


def short_names(taken: Collection[str]) -> Iterator[str]:
    """Yield a, b, …, aa, ab, … without the names in ``taken``."""
    for length in itertools.count(1):
        for letters in itertools.product(_CHARACTERS, repeat=length):
            name = "".join(letters)
            if name not in taken:
                yield name


def compact_tensor(array: Array, name: str) -> onnx.TensorProto:
    """Return ``array`` as a tensor, small integers as varints where that is shorter than raw little-endian bytes."""
    raw = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
    field = _VARINTS.get(array.dtype)
    if field is None or array.size == 0 or array.size > _VARINTS_UP_TO or array.min() < 0:
        return raw
    packed = onnx.TensorProto(dims=array.shape, data_type=raw.data_type, name=name)
    getattr(packed, field).extend(array.ravel().tolist())
    return min(raw, packed, key=lambda tensor: tensor.ByteSize())


def field_bytes(message: Message) -> int:
    """Return the bytes of ``message`` as a field of another one, with a tag of one byte and its length."""
    size: int = message.ByteSize()
    return size + 1 + max(1, -(-size.bit_length() // 7))


class Builder:
    """Collects nodes and constants; ``finish`` stores what was deferred."""

    def __init__(self, names: Iterator[str], opset: int = _AND_OPSET) -> None:
        self.names, self.opset = names, opset
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.shapes: list[onnx.ValueInfoProto] = []
        self._shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._bits: list[tuple[str, Array]] = []
        self._unary: list[tuple[str, Array]] = []
        self._halves: list[tuple[str, Array]] = []
        self._lists: list[tuple[str, Array]] = []
        self._mark = 0

    def constant(self, value: Array | list[int] | int, dtype: type = np.int64) -> str:
        """Add an initializer and return its name; an integer becomes ``dtype``, a list of integers int64."""
        array = value if isinstance(value, np.ndarray) else np.array(value, dtype)
        # The type and shape are part of it, since equal bytes alone may mean other numbers.
        key = (array.dtype.str, array.shape, array.tobytes()) if array.size <= _SHARED else None
        if key is not None and key in self._shared:
            return self._shared[key]
        name = next(self.names)
        if isinstance(value, list):
            self._lists.append((name, array))
        else:
            self.tensors.append(compact_tensor(array, name))
        if key is not None:
            self._shared[key] = name
        return name

    def node(self, op: str, *inputs: str, out: str | None = None, **attributes: object) -> str:
        """Add a node with one output and return the output's name."""
        name = out or next(self.names)
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))  # type: ignore[arg-type]
        return name

    def split(self, value: str, sizes: list[int], outs: list[str] | None = None) -> list[str]:
        """Split along the first axis and return the outputs' names."""
        names = outs or [next(self.names) for _ in sizes]
        self.nodes.append(helper.make_node("Split", [value, self.constant(sizes)], names))
        return names

    def declare(self, name: str, kind: int, shape: list[int]) -> str:
        """State the shape of a value that shape inference cannot see; the runtime folds no value of unknown size."""
        self.shapes.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def words(self, words: Array, width: int) -> str:
        """Defer ``words`` of ``width`` bits, 1 to 8, as int32."""
        if width == 1:
            return self.node("Cast", self._defer(self._bits, words), to=TensorProto.INT32)
        places = np.arange(width - 1, -1, -1, dtype=np.uint8)
        planes = (words.astype(np.uint8) >> places[:, None]) & 1
        rows = self.node("Reshape", self._defer(self._bits, planes.ravel()), self.constant([width, words.size]))
        return self.node("MatMulInteger", self.constant(1 << places), rows)

    def unary(self, bits: Array) -> str:
        """Defer ``bits`` as uint8 0 or 1; zeros may follow them."""
        return self._defer(self._unary, bits)

    def halves(self, values: Array, out: str | None = None) -> str:
        """Defer the float32 of ``values``, a vector of halves."""
        return self._defer(self._halves, values, out)

    def _defer(self, kind: list[tuple[str, Array]], values: Array, out: str | None = None) -> str:
        kind.append((out or next(self.names), values))
        return kind[-1][0]

    def finish(self) -> None:
        """Store what was deferred, ahead of the nodes that use it; nothing may be added after it."""
        self.flush()
        rest, self.nodes = self.nodes, []
        lists, self._lists = self._lists, []
        joined = compact_tensor(np.concatenate([values for _, values in lists]), "") if lists else None
        large = sum(tensor.ByteSize() for tensor in self.tensors) > _SMALL_FILE
        # A Split takes bytes too, which a few lists or long ones do not win back.
        if joined is None or large or len(lists) < _FEW_LISTS or joined.raw_data:
            self.tensors.extend(compact_tensor(values, name) for name, values in lists)
        else:
            joined.name, sizes = next(self.names), np.array([values.size for _, values in lists])
            self.tensors.append(joined)
            names = [name for name, _ in lists]
            self.nodes.append(helper.make_node("Split", [joined.name, self.constant(sizes)], names))
        self.nodes.extend(rest)

    def flush(self) -> None:
        """Store the bits and halves deferred since the last flush; lists wait for the end."""
        # ONNX wants nodes in topological order, so what stores the bits must come before what uses them.
        users = self.nodes[self._mark :]
        del self.nodes[self._mark :]
        self._flush_bits()
        if self._halves:
            stored = self.constant(np.concatenate([values for _, values in self._halves]).astype(np.float16))
            self._part(self._halves, lambda out: self.node("Cast", stored, out=out, to=TensorProto.FLOAT))
            self._halves.clear()
        self.nodes.extend(users)
        self._mark = len(self.nodes)

    def _part(self, deferred: list[tuple[str, Array]], whole: Callable[[str | None], str]) -> None:
        """Take the value that ``whole`` makes apart into what was deferred."""
        names, sizes = [name for name, _ in deferred], [values.size for _, values in deferred]
        if len(names) == 1:
            whole(names[0])
        else:
            self.split(whole(None), sizes, names)

    def _flush_bits(self) -> None:
        """Store the bits as bytes: bit j h + i of 8 h is bit 7 − j of byte i, so that 8 masks take all bytes apart.

        The unary bits come last, since zeros may follow them; where there are none, a part is added for what fills the
        last byte.
        """
        deferred = [*self._bits, *self._unary]
        if not deferred:
            return
        bits = np.concatenate([values for _, values in deferred]).astype(np.uint8)
        pad = np.zeros(-bits.size % 8, np.uint8)
        if pad.size and self._unary:
            deferred[-1] = deferred[-1][0], np.concatenate([deferred[-1][1].astype(np.uint8), pad])
        elif pad.size:
            deferred.append((next(self.names), pad))
        planes = np.concatenate([bits, pad]).reshape(8, -1)
        octets, places = self.constant(np.packbits(planes, axis=0)[0]), np.arange(7, -1, -1, dtype=np.uint8)[:, None]
        # All in bytes, and planes along the last axis: a tenth of the time of int64 with octets there.
        if self.opset < _AND_OPSET:
            shifted = self.node("BitShift", octets, self.constant(places), direction="RIGHT")
            table = self.node("Mod", shifted, self.constant(2, np.uint8))
        else:
            table = self.node("Sign", self.node("BitwiseAnd", octets, self.constant(1 << places)))
        flat = self.constant([planes.size])
        self._part(deferred, lambda out: self.node("Reshape", table, flat, out=out))
        self._bits.clear()
        self._unary.clear()

    @property
    def bytes(self) -> int:
        """Bytes that all of it takes in a graph."""
        return sum(field_bytes(part) for part in (*self.nodes, *self.tensors, *self.shapes))


# Streams


def emit_list(builder: Builder, indices: Array, out: str) -> None:
    """Add ``indices``, ascending, as positions; they become the int64 value ``out``."""
    value, wide = _positions(builder, indices, int(indices[-1]) + 1)
    if wide:
        builder.nodes[-1].output[0] = out
    else:
        builder.node("Cast", value, out=out, to=TensorProto.INT64)


def emit_stream(builder: Builder, stream: list[Item]) -> None:
    """Add one stream; its weights become values of their names."""
    coded = stream[0].coded
    if coded.code == "f16" and all(item.coded.symbols.ndim == 1 and item.units.all() for item in stream):
        for item in stream:
            builder.halves(item.coded.symbols, item.name)
        return
    units = np.concatenate([item.units for item in stream]) if len(stream) > 1 else stream[0].units
    if coded.code == "codebook" and stream[0].coded.symbols.size < ALONE:
        _emit_indices(builder, stream, units)
        return
    values = _large_values(builder, stream[0]) if coded.code == "codebook" else _values(builder, stream)
    kind = coded.symbols.dtype if coded.code == "raw" else np.dtype(np.float32)
    value_bytes = sum(int(np.count_nonzero(item.units)) * item.unit * item.coded.bits for item in stream) / 8
    buffer = _scatter(builder, units, stream[0].kernel, values, kind.type(0), value_bytes)
    for item, part in zip(stream, _parts(builder, stream, buffer), strict=True):
        builder.node("Reshape", part, builder.constant(list(item.coded.symbols.shape)), out=item.name)


def _parts(builder: Builder, stream: list[Item], buffer: str, unit: int = 1) -> list[str]:
    return builder.split(buffer, [unit * item.units.size for item in stream]) if len(stream) > 1 else [buffer]


def _stored(stream: list[Item]) -> Array:
    return np.concatenate([item.stored for item in stream]) if len(stream) > 1 else stream[0].stored


def _values(builder: Builder, stream: list[Item]) -> str:
    """Add the stored values themselves, ``(k, *kernel)``, halves as float32."""
    stored = _stored(stream)
    if stream[0].coded.code == "raw":
        return builder.constant(stored)
    if stored.ndim == 1 and stored.size < ALONE:
        return builder.halves(stored)
    return builder.node("Cast", builder.constant(stored), to=TensorProto.FLOAT)


def _emit_indices(builder: Builder, stream: list[Item], units: Array) -> None:
    """Place indices rather than values, so that one stream serves weights with tables of their own."""
    stored, tables = _stored(stream), [_table(item) for item in stream]
    size, whole = max(table.size for table in tables) - 1, bool(units.all())
    # Index 0 is zero where zeros are stored or an index is left for it; else the one after the last, which no word has.
    if not stored.all() or (index_bits(size + 1) == index_bits(size) and not whole):
        width, fill = index_bits(size + 1), 0
    else:
        stored, width, fill = stored - 1, index_bits(size), size
        tables = [table[1:] for table in tables]
        # The background has one index for all weights, so that every table needs a zero there.
        tables = tables if whole else [np.pad(table, (0, size + 1 - table.size)) for table in tables]
    buffer = _scatter_indices(builder, units, stored, width, fill)
    flat = whole and stored.ndim > 1  # nothing was placed, so the words are as they were deferred
    parts = _parts(builder, stream, buffer, stream[0].unit if flat else 1)
    for item, part, table in zip(stream, parts, tables, strict=True):
        grid = builder.node("Reshape", part, builder.constant(list(item.coded.symbols.shape)))
        builder.node("Gather", _emit_table(builder, table), grid, out=item.name)


def _scatter_indices(builder: Builder, units: Array, stored: Array, width: int, fill: int) -> str:
    """Place the indices ``stored: (k, *kernel)``, words of ``width`` bits, among copies of ``fill``."""
    found, kernel = locate(units), stored.shape[1:]
    low = None if found.size in {0, units.size} or kernel else choose_low(found, units.size, width * stored.size / 8)
    if low is None or not 0 < low <= 8 - width:
        words = builder.words(stored.ravel(), width)
        if kernel and found.size < units.size:
            words = builder.node("Reshape", words, builder.constant(list(stored.shape)))
        return _scatter(builder, units, kernel, words, np.int32(fill), width * stored.size / 8)
    # One word for the low bits of a position and its index takes fewer nodes than two.
    unary, rests = rice_parts(found, low)
    both = builder.words((rests << width) + stored, low + width)
    step = builder.constant(1 << width, np.int32)
    places = _rice(builder, unary, builder.node("Div", both, step), low, found.size)
    return builder.node(
        "ScatterElements",
        _filled(builder, [int(units.size)], np.int32(fill)),
        places,
        builder.node("Mod", both, step),
    )


def _filled(builder: Builder, shape: list[int], background: np.generic) -> str:
    """Add an array of one value."""
    # Float zeros are what ConstantOfShape gives without an attribute.
    if background.dtype == np.float32 and background == 0:
        return builder.node("ConstantOfShape", builder.constant(shape))
    return builder.node("Expand", builder.constant(np.asarray(background)), builder.constant(shape))


def _large_values(builder: Builder, item: Item) -> str:
    """Look up the stored values of one large weight, ``(k, *kernel)`` float32, before they are placed."""
    stored, table = item.stored, _table(item)
    if stored.all():
        stored, table = stored - 1, table[1:]
    shape, stored = stored.shape, stored.ravel().astype(np.uint8)
    if table.size > 16:
        words = builder.node("Cast", builder.constant(stored), to=TensorProto.INT32)
    else:  # the first half of the words in the high, the second in the low halves of the bytes
        padded = np.append(stored, np.zeros(stored.size % 2, np.uint8))
        high, low = padded.reshape(2, -1)
        octets = builder.constant((high << 4) | low)
        parts = (
            builder.node("BitShift", octets, builder.constant(4, np.uint8), direction="RIGHT"),
            builder.node("Mod", octets, builder.constant(16, np.uint8)),
        )
        words = builder.node("Cast", builder.node("Concat", *parts, axis=0), to=TensorProto.INT32)
        if padded.size > stored.size:
            words = builder.split(words, [stored.size, 1])[0]
    # A longer name than Gather, but a fifth of its time.
    values = builder.node("GatherElements", _emit_table(builder, table), words)
    return builder.node("Reshape", values, builder.constant(list(shape))) if len(shape) > 1 else values


def _table(item: Item) -> Array:
    assert item.coded.table is not None  # noqa: S101 - only codebooks come here
    return item.coded.table


def _emit_table(builder: Builder, table: Array) -> str:
    """Store a table as halves where these are its very values."""
    narrow = table.astype(np.float16)
    return builder.halves(narrow) if np.array_equal(narrow.astype(np.float32), table) else builder.constant(table)


def _scatter(  # noqa: PLR0917 - what is placed, and where
    builder: Builder, units: Array, kernel: tuple[int, ...], values: str, background: np.generic, value_bytes: float
) -> str:
    """Place ``values``, those of the stored ``units``, on a ``background``: ``(n, *kernel)``."""
    found = locate(units)
    if found.size == units.size:
        return values
    empty = _filled(builder, [int(units.size), *kernel], background)
    if not found.size:
        return empty
    places, wide = _positions(builder, found, units.size, value_bytes)
    if not kernel:
        return builder.node("ScatterElements", empty, places, values)
    # ScatterND takes int64 indices only, ScatterElements int32 as well.
    places = places if wide else builder.node("Cast", places, to=TensorProto.INT64)
    return builder.node("ScatterND", empty, builder.node("Reshape", places, builder.constant([found.size, 1])), values)


def _positions(builder: Builder, positions: Array, universe: int, value_bytes: float = 0) -> tuple[str, bool]:
    """Add ``positions`` in the shorter code; return their name, and whether they are int64 and not int32."""
    low = choose_low(positions, universe, value_bytes)
    if low is None:
        words = gap_bytes(positions)
        # CumSum takes no bytes, whose sum would overflow besides.
        gaps = builder.node("Cast", builder.constant(words), to=TensorProto.INT32)
        sums = builder.node("CumSum", gaps, builder.constant(0))
        if words.size == positions.size:
            return sums, False
        ends = builder.node("Less", gaps, builder.constant(255, np.int32))
        return builder.declare(builder.node("Compress", sums, ends, axis=0), TensorProto.INT32, [positions.size]), False
    unary, rests = rice_parts(positions, low)
    low_words = builder.words(rests, low) if low else None
    return _rice(builder, unary, low_words, low, positions.size), not low


def _rice(builder: Builder, unary: Array, rests: str | None, low: int, count: int) -> str:
    """Add the positions of a rice code, int64 where there are no low bits and int32 else."""
    ones = builder.declare(builder.node("NonZero", builder.unary(unary)), TensorProto.INT64, [1, count])
    places = builder.node("MatMul", builder.constant([1 << low]), ones)  # which drops the first axis too
    if rests is None:
        return places
    sums = builder.node("CumSum", rests, builder.constant(0))
    return builder.node("Sub", builder.node("Cast", places, to=TensorProto.INT32), sums)


# The graph around them

_WINDOWS = {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool"}
_WINDOW_DEFAULTS = {"strides": 1, "dilations": 1, "pads": 0}


def drop_defaults(proto: onnx.ModelProto) -> None:
    """Drop, in place, what a runtime can do without: node names, shapes that follow, attributes at their defaults."""
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    for graph in graphs(proto.graph):
        del graph.value_info[:], graph.quantization_annotation[:]
        if graph is not proto.graph:
            graph.name = "g"
        for node in graph.node:
            node.name = ""
            version = versions.get(node.domain)
            if version is None or not onnx.defs.has(node.op_type, node.domain):
                continue
            schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=version, domain=node.domain)
            kept = [attribute for attribute in node.attribute if not _is_default(attribute, node, schema)]
            del node.attribute[:]
            node.attribute.extend(kept)


def _is_default(attribute: onnx.AttributeProto, node: onnx.NodeProto, schema: onnx.defs.OpSchema) -> bool:
    known = schema.attributes.get(attribute.name)
    default = known.default_value if known is not None and not known.required else None
    plain = onnx.AttributeProto()
    plain.CopyFrom(attribute)
    plain.ClearField("doc_string")
    if default is not None and default.SerializeToString() == plain.SerializeToString():
        return True
    if node.domain:
        return False
    if node.op_type == "Conv" and attribute.name == "kernel_shape":  # the weight's shape
        return True
    usual = _WINDOW_DEFAULTS.get(attribute.name)  # no schema states these defaults
    return node.op_type in _WINDOWS and usual is not None and all(value == usual for value in attribute.ints)


def value_names(proto: onnx.ModelProto) -> Counter[str]:
    """Count how often each value is named; first in a tie is what is named first."""
    uses: Counter[str] = Counter()
    for graph in graphs(proto.graph):
        for node in graph.node:
            uses.update([*node.input, *node.output])
        uses.update(part.name for part in (*graph.initializer, *graph.value_info, *graph.input, *graph.output))
    return uses


def shorten(proto: onnx.ModelProto) -> None:
    """Rename the values of ``proto`` in place, the most used get the shortest names; inputs and outputs keep theirs."""
    # The empty name stands for an input that is left out.
    fixed = {value.name for value in (*proto.graph.input, *proto.graph.output)} | {""}
    fresh = short_names(fixed)
    names = {name: name if name in fixed else next(fresh) for name, _ in value_names(proto).most_common()}
    for graph in graphs(proto.graph):
        for part in (*graph.initializer, *graph.value_info, *graph.input, *graph.output):
            part.name = names.get(part.name, part.name)
        for node in graph.node:
            for side in (node.input, node.output):
                side[:] = [names[name] for name in side]
