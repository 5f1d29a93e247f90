"""Where the bytes are: of each weight by format, beside the least that any code could take, and of a written file.

The entropy bound of a tensor of n units of which k are stored, a unit being one weight, or a whole kernel of a
convolution where that gives fewer bits, with v = k · (weights a unit) values, is in bits

    log2 C(n, k)  +  v · h,     log2 C(n, k) = (ln Γ(n+1) − ln Γ(k+1) − ln Γ(n−k+1)) / ln 2

where h is 32 for float32 (the width of the type otherwise), 16 for f16, and for int8 and codebooks the empirical
entropy −Σ_s f_s log2 f_s of the tensor's stored symbols. A strictly ascending int64 vector is k places
among its last entry + 1, and nothing else. Scales and centres are not counted. It is the least
for codes that know n, k and the symbols' frequencies and nothing else.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
from onnx.external_data_helper import uses_external_data
from scipy.special import gammaln

from relief_export.formats import csr, packed, positions, sparse, streams, values
from relief_export.formats.artifact import VALUES
from relief_export.formats.builder import Builder, field_bytes, short_names
from relief_export.formats.onnx_file import canonical, external_files

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import onnx_ir as ir
    from onnx import SparseTensorProto, TensorProto

Array: TypeAlias = np.ndarray[Any, Any]


def gzip_bytes(blocks: Iterable[bytes | memoryview]) -> int:
    """Return how many bytes gzip (RFC 1952, level 6, its default) makes of ``blocks`` one after the other."""
    squeezer = zlib.compressobj(6, zlib.DEFLATED, 31)
    total = sum(len(squeezer.compress(block)) for block in blocks)
    return total + len(squeezer.flush())


@dataclass(frozen=True)
class Row:
    """One tensor, or the total.

    Attributes:
        name: Name of the initializer.
        shape: Its shape; empty for the total.
        nonzeros: Weights that are not zero.
        position_code: How packed stores the positions when the tensor has a stream of its own; ``dense`` for none.
        dense: Bytes of the plain values.
        gzip: Bytes of the plain values after gzip.
        sparse: Bytes of values and INT64 indices, or of the dense values where those are fewer.
        csr: Bytes of SciPy's arrays before compression, or of the dense values where those are fewer.
        packed: Value code -> bytes of a stream of its own with its nodes, or of the dense values where those are fewer.
        bound: Value code -> the entropy bound in bytes.
    """

    name: str
    shape: tuple[int, ...]
    nonzeros: int
    position_code: str
    dense: int
    gzip: int
    sparse: int
    csr: int
    packed: dict[str, int]
    bound: dict[str, float]


@dataclass(frozen=True)
class Ledger:
    """The bytes of every weight by format."""

    rows: tuple[Row, ...]

    @property
    def total(self) -> Row:
        """Sum of all tensors."""
        summed = {
            key: sum(getattr(row, key) for row in self.rows) for key in ("nonzeros", "dense", "gzip", "sparse", "csr")
        }
        by_code: dict[str, Any] = {
            key: {code: sum(getattr(row, key)[code] for row in self.rows) for code in VALUES}
            for key in ("packed", "bound")
        }
        return Row(name="total", shape=(), position_code="", **summed, **by_code)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"tensors": [asdict(row) for row in self.rows], "total": asdict(self.total)}


def ledger(model: ir.Model) -> Ledger:
    """Count the bytes of every numeric initializer of ``model`` in each format, graph and container left out."""
    rows = []
    for value in canonical(model).graph.initializers.values():
        array = value.const_value.numpy() if value.const_value is not None else np.zeros(0)
        if array.dtype.name in packed.DTYPES and value.name is not None:
            rows.append(_row(value.name, array, packed.channel_axis(value)))
    return Ledger(tuple(rows))


def _row(name: str, array: Array, axis: int) -> Row:
    nonzeros = int(np.count_nonzero(array))
    by_code: dict[str, tuple[float, int, str]] = {}
    for code in VALUES:
        # a value code that the tensor cannot take falls back to raw, as in the packed format
        coded = values.encode(array, code, axis) if array.size else values.Coded("raw", array)
        by_code[code] = (entropy_bound(array, coded), *_stream_bytes(name, array, coded))
    packed_bytes = {code: found[1] for code, found in by_code.items()}
    bound = {code: found[0] for code, found in by_code.items()}
    content = np.ascontiguousarray(array).tobytes()
    return Row(
        name=name,
        shape=array.shape,
        nonzeros=nonzeros,
        position_code=by_code["f32"][2],
        dense=array.nbytes,
        gzip=gzip_bytes([content]),
        sparse=min(array.nbytes, nonzeros * (array.itemsize + sparse.INDEX_BYTES)),
        csr=csr.layout_bytes(array),
        packed=packed_bytes,
        bound=bound,
    )


def _stream_bytes(name: str, array: Array, coded: values.Coded) -> tuple[int, str]:
    if array.size < streams.SMALLEST:
        return array.nbytes, "dense"
    builder = Builder(short_names({name}))
    if streams.is_index_list(array):
        code = streams.emit_list(builder, array, name)
    else:
        item = streams.make_item(name, array, coded)
        streams.emit_stream(builder, [item])
        found, universe = np.flatnonzero(item.units), item.units.size
        code = positions.choose(found, universe).name if 0 < found.size < universe else "none"
    builder.finish()
    return (builder.bytes, code) if builder.bytes < array.nbytes else (array.nbytes, "dense")


def entropy_bound(array: Array, coded: values.Coded) -> float:
    """Return the bound of the module's formula in bytes."""
    if streams.is_index_list(array):
        return _places(int(array[-1]) + 1, array.size) / 8
    support = array != 0
    kernel = int(np.prod(array.shape[2:], dtype=np.int64)) if array.ndim >= 3 and array.size else 1
    masks = [support.ravel()] + ([support.reshape(-1, kernel).any(axis=1)] if kernel > 1 else [])
    return min(_bits(coded, mask, array.size // max(mask.size, 1)) for mask in masks) / 8


def _places(n: int, k: int) -> float:
    return float(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)) / math.log(2)


def _bits(coded: values.Coded, mask: Array, unit: int) -> float:
    n, k = mask.size, int(np.count_nonzero(mask))
    places = _places(n, k)
    stored = coded.symbols.reshape(n, unit)[mask] if n else coded.symbols
    if coded.code in {"raw", "f16"}:
        return places + 8 * stored.nbytes
    counts = np.unique(stored, return_counts=True)[1]
    return places + float(-(counts * np.log2(counts / max(stored.size, 1))).sum())


@dataclass(frozen=True)
class Anatomy:
    """Bytes of each part.

    Attributes:
        weights: The data of the constants: values, and the positions of those that are not zero where they are stored.
        headers: Names, types and shapes of the constants.
        decoding: Nodes that make weights of other constants, and the shapes stated for them.
        network: Nodes that depend on an input.
        container: All else.
    """

    weights: int
    headers: int
    decoding: int
    network: int
    container: int

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        """Return plain data."""
        return asdict(self)


def anatomy(path: Path) -> Anatomy | None:
    """Take apart an ONNX file with its external data, or a csr folder; None for what is neither.

    Raises:
        OSError: There is no such file.
    """
    if path.is_dir():
        sizes = {file: file.stat().st_size for file in path.iterdir()}
        weights = sum(size for file, size in sizes.items() if file.suffix in {".npy", ".npz"})
        network = sum(size for file, size in sizes.items() if file.suffix == ".onnx")
        return Anatomy(weights, 0, 0, network, sum(sizes.values()) - weights - network)
    if path.suffix != ".onnx":
        return None
    proto = onnx.load(path, load_external_data=False)
    graph = proto.graph
    known = {tensor.name for tensor in graph.initializer} | {tensor.values.name for tensor in graph.sparse_initializer}
    known -= {value.name for value in graph.input}
    decoding = network = 0
    for node in graph.node:
        if all(not name or name in known for name in node.input):
            known.update(node.output)
            decoding += field_bytes(node)
        else:
            network += field_bytes(node)
    decoding += sum(field_bytes(value) for value in graph.value_info if value.name in known)
    data = sum(_data(tensor) for tensor in graph.initializer) + sum(_sparse_data(t) for t in graph.sparse_initializer)
    headers = sum(field_bytes(tensor) for tensor in (*graph.initializer, *graph.sparse_initializer)) - data
    rest = path.stat().st_size - data - headers - decoding - network
    beside = sum(file.stat().st_size for file in external_files(proto, path))
    return Anatomy(data + beside, headers, decoding, network, rest)


def _sparse_data(tensor: SparseTensorProto) -> int:
    return _data(tensor.values) + _data(tensor.indices)


def _data(tensor: TensorProto) -> int:
    """Return the bytes of a tensor's elements in the file, without the tag and length of their field."""
    if uses_external_data(tensor):
        return 0
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data)
    bare = type(tensor)()
    bare.CopyFrom(tensor)
    for field in ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data"):
        bare.ClearField(field)
    return int(tensor.ByteSize() - bare.ByteSize())
