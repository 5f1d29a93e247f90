"""SciPy: one sparse array a weight, the biases, and the weightless graph; the folder alone rebuilds the ONNX model.

A weight of shape ``(out, in, kh, kw)`` is the matrix ``(out, in·kh·kw)``. Where whole kernels are gone it is stored in
blocks of 1 × kh·kw (BSR) if that takes fewer bytes. ``graph.onnx`` is a sound ONNX model whose last inputs are the
weights.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir
import scipy.sparse as sp

from relief_export.errors import InputError, IntegrityError
from relief_export.formats.artifact import EXACT, Artifact, File, Options
from relief_export.formats.container import canonical, check_claim, load_proto, save_proto, to_ir, to_proto
from relief_export.formats.manifest import check_file, check_listed, inside
from relief_export.formats.npz import read_npy, read_sparse
from relief_export.records import atomic_folder, read_json, write_json

if TYPE_CHECKING:
    from pathlib import Path

Array: TypeAlias = np.ndarray[Any, Any]

INDEX, GRAPH, VERSION = "index.json", "graph.onnx", 1
_DTYPES = {"float32": np.float32, "float64": np.float64, "int8": np.int8, "uint8": np.uint8}
_LAYOUTS = ("csr", "bsr", "dense")


@dataclass(frozen=True)
class Entry:
    """One tensor of the folder, as ``index.json`` lists it.

    Attributes:
        name: Name of the initializer.
        position: Its place among the initializers.
        overridable: Whether the initializer is an input of the original graph as well.
        layout: ``csr``, ``bsr`` (1 × kh·kw blocks) or ``dense`` (.npy).
        dtype: NumPy's name of the value type.
        shape: Shape of the tensor; the matrix is ``(shape[0], product of the rest)``.
        stored: Stored entries (csr), blocks (bsr) or elements (dense).
        file: File name in the folder, with ``bytes`` and ``sha256``.
    """

    name: str
    position: int
    overridable: bool
    layout: str
    dtype: str
    shape: tuple[int, ...]
    stored: int
    file: str
    bytes: int
    sha256: str


def write(model: ir.Model, path: Path, options: Options) -> Artifact:
    """Write the folder ``path``; a folder there is replaced only if it is one of ours.

    Raises:
        InputError: ``path`` is something else that this writer must not replace.
    """
    if path.exists() and not (path / INDEX).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} exists and is not a csr folder: give a new folder, this one is left alone")
    prepared = canonical(model)
    with atomic_folder(path) as folder:
        entries = [_write_tensor(value, place, folder) for place, value in _extracted(prepared)]
        for entry in entries:
            value = prepared.graph.initializers.pop(entry.name)
            value.const_value = None
            if not entry.overridable:
                prepared.graph.inputs.append(value)
        save_proto(to_proto(prepared), folder / GRAPH)
        graph = asdict(File.of(folder, folder / GRAPH))
        write_json(
            folder / INDEX, {"version": VERSION, "graph": graph, "tensors": [asdict(entry) for entry in entries]}
        )
    names = (INDEX, GRAPH, *(entry.file for entry in entries))
    notes = tuple(
        f"{e.name} stays dense: its CSR would be larger" for e in entries if e.layout == "dense" and len(e.shape) > 1
    )
    files = tuple(File.of(path.parent, path / name) for name in names)
    return Artifact(path.name, "csr", files, EXACT, options.to_dict(), notes)


def _extracted(model: ir.Model) -> list[tuple[int, ir.Value]]:
    """Return position and value of each initializer that goes to a file of its own."""
    found = []
    for place, value in enumerate(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING or value.is_graph_output():
            continue
        array = tensor.numpy()
        if array.dtype.name in _DTYPES and array.ndim >= (1 if array.dtype.kind == "f" else 2):
            found.append((place, value))
    return found


def _write_tensor(value: ir.Value, position: int, folder: Path) -> Entry:
    assert value.name is not None  # noqa: S101 - an initializer has a name
    assert value.const_value is not None  # noqa: S101 - the canonical form has every value
    array = np.ascontiguousarray(value.const_value.numpy()).reshape(value.const_value.numpy().shape)
    layout, content = _choose(array)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", value.name).strip(".")[:80] or "tensor"
    suffix = ".npy" if layout == "dense" else ".npz"
    taken = {file.name.lower() for file in folder.iterdir()} | {INDEX, GRAPH}
    name = stem + suffix if (stem + suffix).lower() not in taken else f"{stem}-{position}{suffix}"
    if isinstance(content, np.ndarray):
        np.save(folder / name, content, allow_pickle=False)
        stored = content.size
    else:
        sp.save_npz(folder / name, content)
        stored = content.indices.size
    file = File.of(folder, folder / name)
    dtype, shape, overridable = array.dtype.name, array.shape, value.is_graph_input()
    return Entry(value.name, position, overridable, layout, dtype, shape, stored, name, file.bytes, file.sha256)


def _sizes(array: Array) -> dict[str, int]:
    """Return layout -> bytes before compression."""
    if array.ndim < 2 or array.size == 0 or array.size >= 2**31:
        return {"dense": array.nbytes}
    kernel = int(np.prod(array.shape[2:], dtype=np.int64))
    support = array != 0
    rows = 4 * (array.shape[0] + 1)
    sizes = {"csr": rows + int(support.sum()) * (4 + array.itemsize), "dense": array.nbytes}
    if kernel > 1:
        blocks = int(support.reshape(-1, kernel).any(axis=1).sum())
        sizes["bsr"] = rows + blocks * (4 + kernel * array.itemsize)
    return sizes


def layout_bytes(array: Array) -> int:
    """Return the bytes of ``array`` in its smallest layout, before compression."""
    return min(_sizes(array).values())


def _choose(array: Array) -> tuple[str, Any]:
    sizes = _sizes(array)
    layout = min(sizes, key=sizes.__getitem__)
    if layout == "dense":
        return layout, array
    matrix, kernel = array.reshape(array.shape[0], -1), int(np.prod(array.shape[2:], dtype=np.int64))
    if layout == "csr":
        return layout, _to_csr(matrix)
    return layout, _to_bsr(matrix, kernel)


def _to_csr(matrix: Array) -> Any:  # noqa: ANN401 - scipy's stubs have no common type for this
    made = sp.csr_array(matrix)
    indices, indptr = made.indices.astype(np.int32), made.indptr.astype(np.int32)
    return sp.csr_array((made.data, indices, indptr), shape=matrix.shape)


def _to_bsr(matrix: Array, kernel: int) -> Any:  # noqa: ANN401 - scipy's stubs have no common type for this
    mask = (matrix != 0).reshape(matrix.shape[0], -1, kernel).any(axis=2)
    rows, columns = np.nonzero(mask)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=matrix.shape[0]))]).astype(np.int32)
    data = matrix.reshape(*mask.shape, kernel)[rows, columns][:, None, :]
    return sp.bsr_array((data, columns.astype(np.int32), indptr), shape=matrix.shape)


def read(path: Path) -> ir.Model:
    """Rebuild the ONNX model from the folder ``path`` alone, bit for bit.

    Raises:
        InputError: There is no such folder.
        IntegrityError: A file is missing, renamed, damaged, or not what the index lists.
    """
    check_listed(path)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder: give the csr folder that export wrote")
    graph, entries = _read_index(path)
    where = str(path / INDEX)
    for file in (graph, *(File(entry.file, entry.bytes, entry.sha256) for entry in entries)):
        check_file(inside(path, file.path, where), file.bytes, file.sha256, where)
    model = to_ir(load_proto(path / graph.path), path / graph.path)
    values = list(model.graph.initializers.values())
    inputs = {value.name: value for value in model.graph.inputs}
    for entry in entries:
        value = inputs.get(entry.name)
        shape = (
            value.shape.numpy() if value is not None and value.shape is not None and value.shape.is_static() else None
        )
        if value is None or shape != entry.shape or value.dtype is None or value.dtype.numpy() != np.dtype(entry.dtype):
            raise IntegrityError(f"{where}: tensor {entry.name!r} does not fit an input of {GRAPH}: export again")
        value.const_value = ir.Tensor(_read_tensor(path, entry), name=entry.name)
        values.insert(entry.position, value)
        if not entry.overridable:
            model.graph.inputs.remove(value)
    model.graph.initializers.clear()
    for value in values:
        model.graph.register_initializer(value)
    return model


def _read_index(path: Path) -> tuple[File, list[Entry]]:
    content = read_json(path / INDEX)
    if content.get("version") != VERSION:
        raise IntegrityError(f"{path / INDEX} has version {content.get('version')!r}, this program reads {VERSION}")
    try:
        graph = File(**content["graph"])
        entries = [Entry(**{**entry, "shape": tuple(entry["shape"])}) for entry in content["tensors"]]
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{path / INDEX} is malformed ({error}): export again") from None
    names = [entry.name for entry in entries]
    if not all(map(_sound, entries)) or len(set(names)) != len(names):
        raise IntegrityError(f"{path / INDEX} has a malformed entry: export again")
    if not isinstance(graph.path, str) or type(graph.bytes) is not int:
        raise IntegrityError(f"{path / INDEX} has a malformed entry for its graph: export again")
    return graph, entries


def _sound(entry: Entry) -> bool:
    kinds = {"str": str, "int": int, "bool": bool, "tuple[int, ...]": tuple}
    if not all(type(getattr(entry, f.name)) is kinds[str(f.type)] for f in fields(entry)):
        return False
    sizes = all(type(size) is int and 0 <= size < 2**31 for size in entry.shape) and len(entry.shape) <= 32
    known = entry.layout in _LAYOUTS and entry.dtype in _DTYPES
    return sizes and known and entry.position >= 0 and 0 <= entry.stored < 2**31


def _read_tensor(path: Path, entry: Entry) -> Array:
    file, dtype = path / entry.file, np.dtype(_DTYPES[entry.dtype])
    check_claim(int(np.prod(entry.shape, dtype=object)), dtype.itemsize, entry.bytes, f"{path / INDEX}, {entry.name!r}")
    if entry.layout == "dense":
        return read_npy(file, dtype, entry.shape)
    if len(entry.shape) < 2:
        raise IntegrityError(f"{path / INDEX}: {entry.name!r} has too few axes for a matrix: export again")
    block = int(np.prod(entry.shape[2:], dtype=np.int64)) if entry.layout == "bsr" else 1
    shape = (entry.shape[0], int(np.prod(entry.shape[1:], dtype=np.int64)))
    if 0 in entry.shape or entry.stored * block > shape[0] * shape[1]:
        raise IntegrityError(f"{path / INDEX}: {entry.name!r} stores more than its shape holds: export again")
    matrix = read_sparse(file, entry.layout, dtype, shape, stored=entry.stored, block=block)
    return np.asarray(matrix.toarray()).reshape(entry.shape)
