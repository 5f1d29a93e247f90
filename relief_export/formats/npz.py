"""SciPy's .npz and NumPy's .npy read as data from strangers: bounded by what is expected, nothing executed.

A zip's directory and an .npy header may claim anything, so the caller says what must be there, the claims are compared
with that before anything is decompressed, and only then are bytes read; no pickle is ever loaded.
"""

from __future__ import annotations

import io
import tokenize
import zipfile
import zlib
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import scipy.sparse as sp

from relief_export.errors import IntegrityError

if TYPE_CHECKING:
    from pathlib import Path

Array: TypeAlias = np.ndarray[Any, Any]
Sparse: TypeAlias = "sp.csr_array[Any] | sp.bsr_array[Any]"

_HEADER = 4096
_MEMBERS = ("indices", "indptr", "format", "shape", "data", "_is_array")


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


def read_npy(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
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
            if len(infos) != len(archive.infolist()) or set(infos) != set(limits):
                raise IntegrityError(f"{path} is not a SciPy sparse array: it holds {sorted(infos)[:8]}")
            for name, info in infos.items():
                if info.file_size > limits[name] + _HEADER:
                    raise IntegrityError(f"{path}: {name} would unpack to {info.file_size} bytes: do not use this file")
            return {name: archive.read(info) for name, info in infos.items()}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        raise IntegrityError(f"{path} is not a sound .npz file ({' '.join(str(error).split())[:120]})") from None


def read_sparse(
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
    arrays = {name: _parse(members[name], *expected[name], f"{path}, {name}") for name in _MEMBERS}
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
    steps[starts[(starts > 0) & (starts < indices.size)] - 1] = 1  # a new row may begin anywhere
    if (steps <= 0).any():
        raise IntegrityError(f"{where}: indices are not ascending within a row: export again")
