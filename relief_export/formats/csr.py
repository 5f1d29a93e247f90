"""SciPy: one sparse array a weight, the biases, and the weightless graph; the folder alone rebuilds the ONNX model.

A weight of shape ``(out, in, kh, kw)`` is the matrix ``(out, in·kh·kw)``. Where whole kernels are gone it is stored in
blocks of 1 × kh·kw (BSR) if that takes fewer bytes. ``graph.onnx`` is a sound ONNX model whose last inputs are the
weights.

The arrays are read as data from strangers: a zip's directory and an .npy header may claim anything, so every claim is
compared with what ``index.json`` lists before anything is decompressed; no pickle is ever loaded.
"""

from __future__ import annotations

import io
import re
import tokenize
import zipfile
import zlib
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir
import scipy.sparse as sp

from relief_export.errors import InputError, IntegrityError
from relief_export.formats.artifact import EXACT, Artifact, File, Options, check_file, check_listed, inside
from relief_export.formats.onnx_file import canonical, check_claim, load_proto, save_proto, to_ir, to_proto
from relief_export.records import atomic_folder, read_json, write_json

if TYPE_CHECKING:
    from pathlib import Path

Array: TypeAlias = np.ndarray[Any, Any]
Sparse: TypeAlias = "sp.csr_array[Any] | sp.bsr_array[Any]"

INDEX, GRAPH, VERSION = "index.json", "graph.onnx", 1
_DTYPES = {"float32": np.float32, "float64": np.float64, "int8": np.int8, "uint8": np.uint8}
_LAYOUTS = ("csr", "bsr", "dense")
_HEADER = 4096
_MEMBERS = ("indices", "indptr", "format", "shape", "data", "_is_array")
"""What ``save_npz`` writes; the last one only since SciPy 1.12."""


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
    # The folder is replaced as a whole, so a wrong path must not cost anyone their files.
    if path.exists() and not (path / INDEX).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} exists and is not a csr folder: give a new folder, this one is left alone")
    prepared = canonical(model)
    with atomic_folder(path) as folder:
        entries = [_write_tensor(value, place, folder) for place, value in _extracted(prepared)]
        for entry in entries:
            value = prepared.graph.initializers.pop(entry.name)
            value.const_value = None
            if not entry.overridable:
                # A weight without a value is a sound model only as an input.
                prepared.graph.inputs.append(value)
        save_proto(to_proto(prepared), folder / GRAPH)
        made = File.of(folder, folder / GRAPH)
        graph = {"path": made.path, "bytes": made.file_bytes, "sha256": made.sha256}
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
        # Integer vectors and single numbers are mostly shapes and axes, which belong to the graph.
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
    # Some file systems do not tell upper from lower case.
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
    return Entry(value.name, position, overridable, layout, dtype, shape, stored, name, file.file_bytes, file.sha256)


def _sizes(array: Array) -> dict[str, int]:
    """Return layout -> bytes before compression."""
    # Indices are int32, and a matrix needs two axes.
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
    # The type is fixed, since the reader expects it and the size was compared with it.
    indices, indptr = made.indices.astype(np.int32), made.indptr.astype(np.int32)
    return sp.csr_array((made.data, indices, indptr), shape=matrix.shape)


def _to_bsr(matrix: Array, kernel: int) -> Any:  # noqa: ANN401 - scipy's stubs have no common type for this
    # Built by hand, so that the blocks are in order and no block of zeros is stored.
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
        check_file(inside(path, file.path, where), file.file_bytes, file.sha256, where)
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
        # Entries are in ascending order, so that each finds those before it in their places.
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
        stated = content["graph"]
        graph = File(stated["path"], stated["bytes"], stated["sha256"])
        entries = [Entry(**{**entry, "shape": tuple(entry["shape"])}) for entry in content["tensors"]]
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{path / INDEX} is malformed ({error}): export again") from None
    names = [entry.name for entry in entries]
    # JSON may hold any type in any place, and everything below relies on the types.
    if not all(map(_sound, entries)) or len(set(names)) != len(names):
        raise IntegrityError(f"{path / INDEX} has a malformed entry: export again")
    if not isinstance(graph.path, str) or type(graph.file_bytes) is not int:
        raise IntegrityError(f"{path / INDEX} has a malformed entry for its graph: export again")
    return graph, entries


def _sound(entry: Entry) -> bool:
    kinds = {"str": str, "int": int, "bool": bool, "tuple[int, ...]": tuple}
    # Not isinstance, for which True is an integer.
    if not all(type(getattr(entry, f.name)) is kinds[str(f.type)] for f in fields(entry)):
        return False
    sizes = all(type(size) is int and 0 <= size < 2**31 for size in entry.shape) and len(entry.shape) <= 32
    known = entry.layout in _LAYOUTS and entry.dtype in _DTYPES
    return sizes and known and entry.position >= 0 and 0 <= entry.stored < 2**31


def _read_tensor(path: Path, entry: Entry) -> Array:
    file, dtype = path / entry.file, np.dtype(_DTYPES[entry.dtype])
    # As Python's integers, which do not overflow whatever the file claims.
    check_claim(int(np.prod(entry.shape, dtype=object)), dtype.itemsize, entry.bytes, f"{path / INDEX}, {entry.name!r}")
    if entry.layout == "dense":
        return _read_npy(file, dtype, entry.shape)
    if len(entry.shape) < 2:
        raise IntegrityError(f"{path / INDEX}: {entry.name!r} has too few axes for a matrix: export again")
    block = int(np.prod(entry.shape[2:], dtype=np.int64)) if entry.layout == "bsr" else 1
    shape = (entry.shape[0], int(np.prod(entry.shape[1:], dtype=np.int64)))
    if 0 in entry.shape or entry.stored * block > shape[0] * shape[1]:
        raise IntegrityError(f"{path / INDEX}: {entry.name!r} stores more than its shape holds: export again")
    matrix = _read_sparse(file, entry.layout, dtype, shape, stored=entry.stored, block=block)
    return np.asarray(matrix.toarray()).reshape(entry.shape)


def _parse(data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], where: str) -> Array:
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        found, fortran, found_dtype = np.lib.format.read_array_header_1_0(file)
    except (ValueError, SyntaxError, tokenize.TokenError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{where} is not an .npy array ({' '.join(str(error).split())[:120]})") from None
    body = memoryview(data)[file.tell() :]
    if (
        version != (1, 0)
        or found_dtype != dtype
        or found != shape
        or fortran
        or len(body) != dtype.itemsize * int(np.prod(shape, dtype=object))
    ):
        raise IntegrityError(f"{where} holds {found_dtype} {found}, not {dtype} {shape} as listed: export again")
    return np.frombuffer(body, dtype).reshape(shape)


def _read_npy(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Read an .npy file that must hold exactly ``dtype`` and ``shape``.

    Raises:
        IntegrityError: It holds anything else.
    """
    limit = dtype.itemsize * int(np.prod(shape, dtype=object)) + _HEADER
    if path.stat().st_size > limit:
        raise IntegrityError(f"{path} is larger than {dtype} {shape} can be: export again")
    return _parse(path.read_bytes(), dtype, shape, str(path))


def _members(path: Path, limits: dict[str, int]) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            # A zip may list one name twice, and readers differ in which of the two they take.
            if len(infos) != len(archive.infolist()) or set(infos) | {_MEMBERS[-1]} != set(limits):
                raise IntegrityError(f"{path} is not a SciPy sparse array: it holds {sorted(infos)[:8]}")
            for name, info in infos.items():
                if info.file_size > limits[name] + _HEADER:
                    raise IntegrityError(f"{path}: {name} would unpack to {info.file_size} bytes: do not use this file")
            return {name: archive.read(info) for name, info in infos.items()}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        raise IntegrityError(f"{path} is not a sound .npz file ({' '.join(str(error).split())[:120]})") from None


def _read_sparse(
    path: Path, layout: str, dtype: np.dtype[Any], shape: tuple[int, int], *, stored: int, block: int
) -> Sparse:
    """Read what ``scipy.sparse.save_npz`` wrote, with every claim checked.

    Args:
        path: The .npz file.
        layout: ``csr`` or ``bsr``.
        dtype: Type of the values.
        shape: Rows and columns.
        stored: Number of stored entries (csr) or blocks (bsr).
        block: Columns of a 1 × block block; 1 for csr.

    Raises:
        IntegrityError: Anything differs, or an index is out of range or not ascending within its row.
    """
    rows, columns = shape
    index = np.dtype(np.int32)
    data_shape = (stored,) if layout == "csr" else (stored, 1, block)
    expected = {
        "indices": (index, (stored,)),
        "indptr": (index, (rows + 1,)),
        "format": (np.dtype("S3"), ()),
        "shape": (np.dtype(np.int64), (2,)),
        "data": (dtype, data_shape),
        "_is_array": (np.dtype(np.bool_), ()),
    }
    limits = {name: kind.itemsize * int(np.prod(size, dtype=object)) for name, (kind, size) in expected.items()}
    members = _members(path, limits)
    arrays = {name: _parse(members[name], *expected[name], f"{path}, {name}") for name in _MEMBERS if name in members}
    if arrays["format"].item() != layout.encode() or tuple(arrays["shape"].tolist()) != shape:
        raise IntegrityError(f"{path} is a {arrays['format'].item()!r} of {arrays['shape']}, not {layout} {shape}")
    _check_indices(arrays["indices"], arrays["indptr"], columns // block, str(path))
    kind = sp.csr_array if layout == "csr" else sp.bsr_array
    matrix: Sparse = kind((arrays["data"], arrays["indices"], arrays["indptr"]), shape=shape)
    try:
        matrix.check_format(full_check=True)
    except ValueError as error:
        raise IntegrityError(f"{path} is not a sound {layout} matrix ({error}): export again") from None
    return matrix


def _check_indices(indices: Array, indptr: Array, columns: int, where: str) -> None:
    if indptr[0] != 0 or indptr[-1] != indices.size or (np.diff(indptr) < 0).any():
        raise IntegrityError(f"{where}: indptr does not ascend from 0 to {indices.size}: export again")
    if indices.size and not (indices.min() >= 0 and indices.max() < columns):
        raise IntegrityError(f"{where}: an index is out of range 0 to {columns - 1}: export again")
    steps = np.diff(indices)
    starts = indptr[1:-1]
    # Empty rows at either end begin where there is no step.
    steps[starts[(starts > 0) & (starts < indices.size)] - 1] = 1  # a new row may begin anywhere
    if (steps <= 0).any():
        raise IntegrityError(f"{where}: indices are not ascending within a row: export again")
