"""Sparse ONNX: ``sparse_initializer`` with flat ascending INT64 indices, for each tensor where that takes fewer bytes.

A non-zero costs its own bytes and 8 for the index, so float32 pays above 66.7 % zeros and int8 above 88.9 %. ONNX
Runtime makes the tensors dense at load: this saves disk, not memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from relief_export.errors import IntegrityError
from relief_export.formats.artifact import EXACT, Artifact, File, Options, check_listed
from relief_export.formats.onnx_file import canonical, check_claim, graphs, load_proto, save_proto, to_ir, to_proto

if TYPE_CHECKING:
    from pathlib import Path

Array: TypeAlias = np.ndarray[Any, Any]

INDEX_BYTES = 8
_DTYPES = frozenset(["float32", "float64", "int8", "uint8", "int32", "int64"])


def write(model: ir.Model, path: Path, options: Options) -> Artifact:
    """Write ``model`` with sparse initializers that ONNX Runtime has opened.

    Raises:
        UnsupportedModelError: ONNX Runtime refuses the model.
    """
    prepared, notes, stored = canonical(model), [], []
    for value in list(prepared.graph.initializers.values()):
        if value.const_value is None or value.name is None or value.const_value.dtype == ir.DataType.STRING:
            continue
        array = value.const_value.numpy()
        if array.dtype.name not in _DTYPES or array.ndim == 0 or value.is_graph_input() or value.is_graph_output():
            continue  # ONNX Runtime gives a sparse initializer out as a sparse tensor
        if int(np.count_nonzero(array)) * (array.itemsize + INDEX_BYTES) < array.nbytes:
            stored.append(_to_sparse(array, value.name))
            prepared.graph.initializers.pop(value.name)
        elif array.ndim > 1 and array.dtype.kind == "f":
            notes.append(f"{value.name} stays dense: it has too few zeros")
    proto = to_proto(prepared)
    proto.graph.sparse_initializer.extend(stored)
    save_proto(proto, path, verify=options.verify)
    return Artifact(path.name, "sparse", (File.of(path.parent, path),), EXACT, options.to_dict(), tuple(notes))


def _to_sparse(array: Array, name: str) -> onnx.SparseTensorProto:
    indices = np.flatnonzero(array)
    values = numpy_helper.from_array(array.ravel()[indices], name)
    return onnx.SparseTensorProto(values=values, indices=numpy_helper.from_array(indices), dims=array.shape)


def densify(proto: onnx.ModelProto, path: Path) -> None:
    """Replace, in place, every sparse initializer and sparse Constant, in subgraphs too, by a dense one.

    Raises:
        IntegrityError: An index is out of range or not ascending, or the shape is out of proportion to the file.
    """
    nodes = [node for function in proto.functions for node in function.node]
    for graph in graphs(proto.graph):
        graph.initializer.extend(_to_dense(tensor, path) for tensor in graph.sparse_initializer)
        del graph.sparse_initializer[:]
        nodes.extend(graph.node)
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor"):
                attribute.CopyFrom(helper.make_attribute("value", _to_dense(attribute.sparse_tensor, path)))


def _to_dense(tensor: onnx.SparseTensorProto, path: Path) -> onnx.TensorProto:
    where = f"{path}, tensor {tensor.values.name!r}"
    count = int(np.prod(list(tensor.dims), dtype=object))
    try:
        values, indices = (numpy_helper.to_array(part, str(path.parent)) for part in (tensor.values, tensor.indices))
    except (ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"{where}: damaged data ({' '.join(str(error).split())[:120]})") from None
    check_claim(count, values.itemsize, path.stat().st_size, where)
    if indices.ndim == 2:  # coordinates, which other writers may use
        if indices.shape[1] != len(tensor.dims) or (indices < 0).any() or (indices >= list(tensor.dims)).any():
            raise IntegrityError(f"{where}: an index is out of range: write it again")
        indices = np.ravel_multi_index(tuple(indices.T), tuple(tensor.dims))
    ascending = indices.ndim == 1 and indices.shape == values.shape and (np.diff(indices) > 0).all()
    if not ascending or (indices.size and (indices[0] < 0 or indices[-1] >= count)):
        raise IntegrityError(f"{where}: indices are out of range or not ascending: write it again")
    dense = np.zeros(count, values.dtype)
    dense[indices] = values
    return numpy_helper.from_array(dense.reshape(tuple(tensor.dims)), tensor.values.name)


def read(path: Path) -> ir.Model:
    """Read an ONNX file with sparse initializers as a plain dense model.

    Raises:
        InputError: There is no such file.
        IntegrityError: It is damaged or differs from its manifest.
    """
    check_listed(path)
    proto = load_proto(path)
    densify(proto, path)
    return to_ir(proto, path)
