"""Packed ONNX: positions and values in a few bytes, rebuilt by standard operators that ONNX Runtime folds at load.

Which encoding is smaller decides, for every tensor: its unit, its stream, its codes, or its plain values.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir
from onnx.external_data_helper import load_external_data_for_model

from relief_export.errors import IntegrityError, UnsupportedModelError
from relief_export.formats import blocks, positions, squeeze, streams
from relief_export.formats import values as value_codes
from relief_export.formats.artifact import EXACT, Artifact, File, Options, Tolerance, Values, check_listed
from relief_export.formats.builder import Builder, short_names
from relief_export.formats.decode import decode
from relief_export.formats.onnx_file import (
    clean_zeros,
    external_files,
    graphs,
    lifted,
    load_proto,
    save_proto,
    to_ir,
    to_proto,
)

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

Array: TypeAlias = np.ndarray[Any, Any]

MARK, VERSION = "packed", 1
OPSET = 13
_LARGEST = 1 << 30
TOLERANCES: dict[str, Tolerance] = {
    "f32": EXACT,
    "f16": Tolerance(relative_error=1e-2, accuracy_drop=0.005),
    "int8": Tolerance(relative_error=None, accuracy_drop=0.01),
    "codebook256": Tolerance(relative_error=None, accuracy_drop=0.01),
    "codebook16": Tolerance(relative_error=None, accuracy_drop=0.02),
}
DTYPES = frozenset(["float16", "float32", "float64", "int8", "uint8", "int16", "uint16", "int32", "int64"])
_CHANNEL_AXES = {"Conv": 0, "ConvTranspose": 1, "MatMul": -1, "Gemm": -1}


def write(model: ir.Model, path: Path, options: Options, *, values: Values = "f32", name: str = "packed") -> Artifact:
    """Write ``model`` as packed ONNX that ONNX Runtime has opened at its default settings.

    Args:
        model: Any model; it is not changed.
        path: Where to write.
        options: ``verify`` is all that matters.
        values: How the values of its weights are stored.
        name: What the format of the result is called.

    Raises:
        UnsupportedModelError: The model's opset is below 13, or ONNX Runtime refuses it.
    """
    prepared = lifted(model)
    opset = prepared.opset_imports.setdefault("", OPSET)  # which a model of foreign operators alone does not import
    if opset < OPSET:
        raise UnsupportedModelError(f"packed needs opset {OPSET}, the model has {opset}: use onnx.version_converter")
    _drop_zero_biases(prepared)
    lists = _index_lists(prepared)
    items, notes = _items(prepared, values, set(lists))
    for packed in (*lists, *(item.name for item in items)):
        prepared.graph.initializers.pop(packed)
    clean_zeros(prepared)  # only what stays dense is copied
    proto = to_proto(prepared)
    taken = squeeze.squeeze(proto)
    small = sum(item.coded.symbols.size for item in items) < streams.ALONE
    plans = itertools.product((True, False), repeat=2) if small else [(True, True)]
    builder = min(
        (_build(Builder(short_names(taken), opset), lists, items, *plan) for plan in plans),
        key=lambda built: built.bytes,
    )
    del items
    nodes = [*builder.nodes, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    builder.tensors.reverse()
    while builder.tensors:  # one at a time: each is copied
        proto.graph.initializer.append(builder.tensors.pop())
    proto.graph.value_info.extend(builder.shapes)
    squeeze.shorten(proto)
    proto.graph.name = f"{MARK}{VERSION}"
    save_proto(proto, path, verify=options.verify)
    files = (File.of(path.parent, path),)
    return Artifact(path.name, name, files, TOLERANCES[values], options.to_dict(), tuple(notes))


def _build(builder: Builder, lists: dict[str, Array], items: list[streams.Item], density: bool, gaps: bool) -> Builder:
    """Add the decoding subgraph, with streams divided by density or not, and with gap codes or without."""
    for name, indices in lists.items():
        streams.emit_list(builder, indices, name, gaps=gaps)
    for stream in streams.divide(items, density=density):
        streams.emit_stream(builder, stream, gaps=gaps)
        if stream[0].coded.symbols.size >= streams.ALONE:
            builder.flush()
    builder.finish()
    return builder


def _drop_zero_biases(model: ir.Model) -> None:
    """Leave out, in place, biases of zeros: relief masks many, and the operators do without (Gemm since version 11)."""
    for node in model.graph:
        own = node.op_type in _CHANNEL_AXES and not node.domain  # a model's own functions may need all inputs
        bias = node.inputs[2] if own and len(node.inputs) == 3 else None
        if bias is None or bias.const_value is None or bias.is_graph_input() or bias.const_value.numpy().any():
            continue
        node.resize_inputs(2)
        if not bias.uses() and not bias.is_graph_output():
            model.graph.initializers.pop(str(bias.name))


def _index_lists(model: ir.Model) -> dict[str, Array]:
    found = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.INT64 and not value.is_graph_input():
            array = tensor.numpy()
            if streams.is_index_list(array) and positions.is_worth(array):
                found[name] = array
    return found


def _items(model: ir.Model, code: str, done: set[str]) -> tuple[list[streams.Item], list[str]]:
    """Return the weights that become smaller, and notes on the others and on the precision."""
    notes, worst = [], (0.0, "")
    found: list[tuple[str, Array]] = []
    for value in model.graph.initializers.values():
        if value.const_value is None or value.name is None or value.const_value.dtype == ir.DataType.STRING:
            continue
        array = value.const_value.numpy()
        if value.name in done or array.dtype.name not in DTYPES or array.size < streams.smallest(array):
            continue
        if value.is_graph_input():
            notes.append(f"{value.name} stays dense: it is an input as well, so that a caller may replace it")
        elif array.size * max(array.itemsize, 4) > _LARGEST:
            notes.append(f"{value.name} stays dense: ONNX Runtime folds no value above 1 GiB at its default settings")
        else:
            found.append((value.name, array))
    axes = {value.name: channel_axis(value) for value in model.graph.initializers.values()}
    coded = [value_codes.encode(array, code, axes[name]) for name, array in found]
    items = []
    for item, (name, array) in zip(streams.make_items(found, coded), found, strict=True):
        if streams.bits(item) + streams.tensor_bits(item) < 8 * array.nbytes:
            items.append(item)
            worst = max(worst, (_error(array, item.coded), name))
        elif array.ndim > 1 and array.dtype.kind == "f":
            notes.append(f"{name} stays dense: it has too few zeros")
    if worst[0] > 0:
        notes.append(f"largest error of a weight: {worst[0]:.3g} of the largest in {worst[1]}")
    return items, notes


def _error(array: Array, coded: value_codes.Coded) -> float:
    if coded.code == "raw":
        return 0.0
    largest, worst = float(max(array.max(), -array.min())), 0.0
    for rows in blocks.rows(array):
        error = np.abs(coded.decoded(rows) - array[rows])
        worst = max(worst, float(error.max(initial=0.0, where=array[rows] != 0)))
    return worst / largest if largest else 0.0


def channel_axis(value: ir.Value) -> int:
    """Return the axis of ``value`` that its first consumer maps to output channels."""
    for node, _ in value.uses():
        axis = _CHANNEL_AXES.get(node.op_type, 0)
        transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", False)
        rank = len(value.shape or ())
        return 0 if transposed or not rank else axis % rank
    return 0


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
    stored = sum(file.stat().st_size for file in (path, *external_files(proto, path)))
    load_external_data_for_model(proto, str(path.parent))
    decode(proto, stored, str(path))
    del proto.graph.value_info[:]
    used = {name for graph in graphs(proto.graph) for node in graph.node for name in node.input}
    used |= {value.name for value in (*proto.graph.output, *proto.graph.input)}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
