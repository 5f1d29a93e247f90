"""Packed ONNX: positions and values in a few bytes, rebuilt by standard operators that ONNX Runtime folds at load.

``encode`` says what is stored of each weight, ``emit`` writes it as constants and nodes, ``decode`` reads it back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir
from onnx.external_data_helper import load_external_data_for_model

from relief_export.errors import IntegrityError, UnsupportedModelError
from relief_export.formats.artifact import EXACT, Artifact, File, Options, Tolerance, Values, check_listed
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
from relief_export.formats.packed import encode
from relief_export.formats.packed.decode import decode
from relief_export.formats.packed.emit import (
    Builder,
    drop_defaults,
    emit_list,
    emit_stream,
    short_names,
    shorten,
    value_names,
)

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

Array: TypeAlias = np.ndarray[Any, Any]

MARK, VERSION = "packed", 2
OPSET = 13
_PLAIN = "network"
"""What the graph of an unpacked model is called: its first name is not stored."""
TOLERANCES: dict[Values, Tolerance] = {
    "f32": EXACT,
    "f16": Tolerance(relative_error=1e-2, accuracy_drop=0.005),
    "codebook256": Tolerance(relative_error=None, accuracy_drop=0.01),
    "codebook16": Tolerance(relative_error=None, accuracy_drop=0.02),
}
DTYPES = frozenset(["float16", "float32", "float64", "int8", "uint8", "int16", "uint16", "int32", "int64"])
_LARGEST = 1 << 30
_BIASED = {"Conv", "ConvTranspose", "Gemm"}


def write(model: ir.Model, path: Path, options: Options, *, values: Values = "f32", name: str = "packed") -> Artifact:
    """Write ``model`` as packed ONNX that ONNX Runtime has opened at its default settings.

    Args:
        model: Any model; it is not changed.
        path: Where to write.
        options: ``verify`` is all that matters.
        values: How the values of its weights are stored. Where every weight has few enough different values, a
            codebook is exact, and the artifact promises that.
        name: What the format of the result is called.

    Raises:
        UnsupportedModelError: The model's opset is below 13, or ONNX Runtime refuses it.
    """
    prepared = lifted(model)
    opset = prepared.opset_imports.setdefault("", OPSET)  # which a model of foreign operators alone does not import
    if opset < OPSET:
        raise UnsupportedModelError(f"packed needs opset {OPSET}, the model has {opset}: use onnx.version_converter")
    # Before the weights are collected, so that nothing is packed that no node reads.
    _drop_unused(prepared)
    weights, notes = _weights(prepared)
    # Index lists are positions themselves, and are stored as such rather than as values at positions.
    lists = {name: array for name, array in weights.items() if encode.is_index_list(array)}
    items, worst = _items({name: array for name, array in weights.items() if name not in lists}, values)
    packed = {item.name for item in items}
    notes += [
        f"{name} stays dense: it has too few zeros"
        for name, array in weights.items()
        if name not in packed and array.ndim > 1 and array.dtype.kind == "f"
    ]
    notes += [f"largest error of a weight: {worst[0]:.3g} of the largest in {worst[1]}"] if worst[0] else []
    # The arrays of a large model are held no longer than needed, here and below.
    del weights
    for packed_name in (*lists, *packed):
        prepared.graph.initializers.pop(packed_name)
    clean_zeros(prepared)  # only what stays dense is copied
    proto = to_proto(prepared)
    drop_defaults(proto)
    # New names avoid those of the model, which stay until everything is renamed.
    builder = Builder(short_names(set(value_names(proto))), opset)
    for list_name, indices in lists.items():
        emit_list(builder, indices, list_name)
    for stream in encode.streams(items):
        emit_stream(builder, stream)
    del items
    builder.finish()
    _put_in_front(proto, builder)
    # Only now is it known how often each name is used.
    shorten(proto)
    # The graph's name is the mark, since metadata is stripped when the file is written.
    proto.graph.name = f"{MARK}{VERSION}"
    save_proto(proto, path, verify=options.verify)
    # Where no weight was changed, even a code of few values is exact.
    tolerance = TOLERANCES[values] if worst[0] else EXACT
    return Artifact(path.name, name, (File.of(path.parent, path),), tolerance, options.to_dict(), tuple(notes))


def _put_in_front(proto: onnx.ModelProto, builder: Builder) -> None:
    nodes = [*builder.nodes, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    builder.tensors.reverse()
    while builder.tensors:  # one at a time: each is copied
        proto.graph.initializer.append(builder.tensors.pop())
    proto.graph.value_info.extend(builder.shapes)


def _drop_unused(model: ir.Model) -> None:
    """Leave out, in place, what nothing uses, and biases of zeros: relief masks many, and operators do without them.

    Source: ONNX operators Conv-1, ConvTranspose-1, Gemm-11.
    """
    for node in model.graph:
        own = node.op_type in _BIASED and not node.domain  # a model's own functions may need all inputs
        bias = node.inputs[2] if own and len(node.inputs) == 3 else None
        # A bias of zeros that is an input may be replaced by the caller.
        if bias is None or bias.const_value is None or bias.is_graph_input() or bias.const_value.numpy().any():
            continue
        node.resize_inputs(2)
    for value in list(model.graph.initializers.values()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            model.graph.initializers.pop(str(value.name))


def _weights(model: ir.Model) -> tuple[dict[str, Array], list[str]]:
    """Return the arrays that may be packed, by name, and notes on those that are large but may not."""
    found: dict[str, Array] = {}
    notes = []
    for value in model.graph.initializers.values():
        if value.const_value is None or value.name is None or value.const_value.dtype == ir.DataType.STRING:
            continue
        array = value.const_value.numpy()
        # any vector of float32 may be one of halves among others
        smallest = 4 if array.dtype == np.float32 and array.ndim == 1 else encode.SMALLEST
        if array.dtype.name not in DTYPES or array.size < smallest:
            continue
        if value.is_graph_input():
            notes.append(f"{value.name} stays dense: it is an input as well, so that a caller may replace it")
        elif array.size * max(array.itemsize, 4) > _LARGEST:
            notes.append(f"{value.name} stays dense: ONNX Runtime folds no value above 1 GiB at its default settings")
        else:
            found[value.name] = array
    return found, notes


def _items(weights: dict[str, Array], values: Values) -> tuple[list[encode.Item], tuple[float, str]]:
    """Return the weights that become smaller, and the largest relative error of an element with the weight's name.

    Where the values of every weight of two axes and more are kept exactly, those of vectors are too; else vectors and
    tables become halves.
    """
    coded = {name: encode.encode(array, values) for name, array in weights.items()}
    exact = all(encode.error(array, coded[name]) == 0 for name, array in weights.items() if array.ndim > 1)
    items, worst = [], (0.0, "")
    for name, array in weights.items():
        chosen = coded[name]
        if values != "f32" and array.dtype == np.float32 and np.isfinite(array).all():
            narrow = encode.halves(array)
            if not exact:
                chosen = encode.smaller(array, encode.in_halves(chosen), narrow)
            elif encode.error(array, narrow) == 0:
                chosen = encode.smaller(array, chosen, narrow)
            else:
                chosen = encode.smaller(array, chosen, encode.Coded("raw", array))
        item = encode.make_item(name, array, chosen)
        if encode.is_worth(item, array.nbytes):
            items.append(item)
            worst = max(worst, (encode.error(array, chosen), name))
    return items, worst


def is_packed(proto: onnx.ModelProto) -> bool:
    """Return True if ``proto`` is one of ours, of any version."""
    return proto.graph.name.startswith(MARK) and proto.graph.name.removeprefix(MARK).isdigit()


def read(path: Path) -> ir.Model:
    """Read a packed model back as a plain dense one, with the short names it was given.

    Raises:
        InputError: There is no such file.
        IntegrityError: It is damaged, differs from its manifest, or is of another version.
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
        raise IntegrityError(
            f"{path} is packed in version {proto.graph.name.removeprefix(MARK)}, this program reads {VERSION}: "
            "pack the network again (a runtime still loads the file)"
        )
    stored = sum(file.stat().st_size for file in (path, *external_files(proto, path)))
    load_external_data_for_model(proto, str(path.parent))
    decode(proto, stored, str(path))
    del proto.graph.value_info[:]
    used = {name for graph in graphs(proto.graph) for node in graph.node for name in node.input}
    used |= {value.name for value in (*proto.graph.output, *proto.graph.input)}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    # The mark goes with what it marks: a plain file under it would be taken for a packed one.
    proto.graph.name = _PLAIN
