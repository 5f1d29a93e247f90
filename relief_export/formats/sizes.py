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

from relief_export.formats import csr, packed, sparse
from relief_export.formats.artifact import VALUES, Values
from relief_export.formats.onnx_file import canonical, external_files
from relief_export.formats.packed import encode
from relief_export.formats.packed.emit import Builder, emit_list, emit_stream, field_bytes, short_names

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import onnx_ir as ir
    from onnx import SparseTensorProto, TensorProto

Array: TypeAlias = np.ndarray[Any, Any]


def gzip_bytes(blocks: Iterable[bytes | memoryview]) -> int:
    """Return how many bytes gzip (RFC 1952, level 6, its default) makes of ``blocks`` one after the other."""
    # 31 is 15, the largest window, and 16, which asks for gzip's own header.
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


_NO_SIZES = {"name", "shape", "nonzeros", "position_code"}


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
        return {"tensors": [_plain(row) for row in self.rows], "total": _plain(self.total)}


def _plain(row: Row) -> dict[str, Any]:
    """Return a row with the unit in the key of each size."""
    return {key if key in _NO_SIZES else f"{key}_bytes": value for key, value in asdict(row).items()}


def ledger(model: ir.Model) -> Ledger:
    """Count the bytes of every numeric initializer of ``model`` in each format, graph and container left out."""
    rows = []
    for value in canonical(model).graph.initializers.values():
        array = value.const_value.numpy() if value.const_value is not None else np.zeros(0)
        if array.dtype.name in packed.DTYPES and value.name is not None:
            rows.append(_row(value.name, array, channel_axis(value)))
    return Ledger(tuple(rows))


_CHANNEL_AXES = {"Conv": 0, "ConvTranspose": 1, "MatMul": -1, "Gemm": -1}


def channel_axis(value: ir.Value) -> int:
    """Return the axis of ``value`` that its first consumer maps to output channels."""
    for node, _ in value.uses():
        axis = _CHANNEL_AXES.get(node.op_type, 0)
        transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", False)
        rank = len(value.shape or ())
        return 0 if transposed or not rank else axis % rank
    return 0


def _row(name: str, array: Array, axis: int) -> Row:
    nonzeros = int(np.count_nonzero(array))
    coded = {code: _coded(array, code, axis) for code in VALUES}
    own = {code: _stream_bytes(name, array, found) for code, found in coded.items()}
    content = np.ascontiguousarray(array).tobytes()
    return Row(
        name=name,
        shape=array.shape,
        nonzeros=nonzeros,
        position_code=own["f32"][1],
        dense=array.nbytes,
        gzip=gzip_bytes([content]),
        sparse=min(array.nbytes, nonzeros * (array.itemsize + sparse.INDEX_BYTES)),
        csr=csr.layout_bytes(array),
        packed={code: size for code, (size, _) in own.items()},
        bound={code: _bound(array, found, code) for code, found in coded.items()},
    )


def _coded(array: Array, code: Values, axis: int) -> encode.Coded:
    """Return ``array`` in a value code; one that it cannot take falls back to raw, as in the packed format."""
    # A single number is never packed, and has no rows to be encoded by.
    if not array.size or not array.ndim or (code == "int8" and (array.dtype != np.float32 or array.ndim < 2)):
        return encode.Coded("raw", array)
    if code != "int8":
        coded = encode.encode(array, code)
        return coded if code == "f32" else encode.smaller(array, coded, encode.halves(array))
    others = tuple(other for other in range(array.ndim) if other != axis)
    largest = np.abs(array).max(axis=others, keepdims=True)
    with np.errstate(all="ignore"):
        # Divided first, since 127 times a large float32 overflows.
        steps = np.clip(np.rint(127 * (array / np.where(largest > 0, largest, 1))), -127, 127)
    if not np.isfinite(steps).all():
        return encode.Coded("raw", array)
    # As the int8 format does, a kept weight never becomes zero.
    return encode.Coded("raw", np.where((steps == 0) & (array != 0), np.sign(array), steps).astype(np.int8))


def _stream_bytes(name: str, array: Array, coded: encode.Coded) -> tuple[int, str]:
    """Return the bytes of a stream of ``array`` alone, and how its positions are stored."""
    # The packed format leaves so small a tensor an initializer.
    if array.size < encode.SMALLEST:
        return array.nbytes, "dense"
    builder = Builder(short_names({name}))
    if encode.is_index_list(array):
        found, universe = array, int(array[-1]) + 1
        emit_list(builder, array, name)
    else:
        (stream,) = encode.streams([encode.make_item(name, array, coded)])
        found, universe = np.flatnonzero(stream[0].units), stream[0].units.size
        emit_stream(builder, stream)
    builder.finish()
    if builder.bytes >= array.nbytes:
        return array.nbytes, "dense"
    if found.size in {0, universe}:
        return builder.bytes, "none"
    return builder.bytes, "u8" if encode.choose_low(found, universe) is None else "rice"


def entropy_bound(array: Array, code: Values = "f32", axis: int = 0) -> float:
    """Return the bound of the module's formula in bytes.

    Args:
        array: A weight.
        code: How its values are stored.
        axis: The axis of output channels, which have a scale each in int8.
    """
    return _bound(array, _coded(array, code, axis), code)


def _bound(array: Array, coded: encode.Coded, code: Values) -> float:
    if encode.is_index_list(array):
        return _places(int(array[-1]) + 1, array.size) / 8
    counted = coded.code == "codebook" or (code == "int8" and coded.symbols is not array)
    support = array != 0
    kernel = math.prod(array.shape[2:]) if array.size else 1
    # Whole kernels as units take fewer positions but store the zeros inside, so either may be less.
    masks = [support.ravel()] + ([support.reshape(-1, kernel).any(axis=1)] if kernel > 1 else [])
    return min(_bits(coded.symbols, mask, array.size // max(mask.size, 1), counted) for mask in masks) / 8


def _places(n: int, k: int) -> float:
    # By logarithms, since the binomial itself is beyond the range of floats.
    return float(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)) / math.log(2)


def _bits(symbols: Array, mask: Array, unit: int, counted: bool) -> float:
    n, k = mask.size, int(np.count_nonzero(mask))
    stored = symbols.reshape(n, unit)[mask] if n else symbols
    if not counted:
        return _places(n, k) + 8 * stored.nbytes
    counts = np.unique(stored, return_counts=True)[1]
    return _places(n, k) + float(-(counts * np.log2(counts / max(stored.size, 1))).sum())


@dataclass(frozen=True)
class SizeBreakdown:
    """The bytes of one file by what takes them.

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
        return {f"{part}_bytes": size for part, size in asdict(self).items()}


def size_breakdown(path: Path) -> SizeBreakdown | None:
    """Take apart an ONNX file with its external data, or a csr folder; None for what is neither.

    Raises:
        OSError: There is no such file.
    """
    # A folder of C is not: its weights are text among text.
    if path.is_dir() and not (path / csr.INDEX).is_file():
        return None
    if path.is_dir():
        sizes = {file: file.stat().st_size for file in path.iterdir()}
        weights = sum(size for file, size in sizes.items() if file.suffix in {".npy", ".npz"})
        network = sum(size for file, size in sizes.items() if file.suffix == ".onnx")
        return SizeBreakdown(weights, 0, 0, network, sum(sizes.values()) - weights - network)
    if path.suffix != ".onnx":
        return None
    proto = onnx.load(path, load_external_data=False)
    graph = proto.graph
    known = {tensor.name for tensor in graph.initializer} | {tensor.values.name for tensor in graph.sparse_initializer}
    # An initializer that is an input may be replaced by the caller, so that nothing is decoded from it.
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
    return SizeBreakdown(data + beside, headers, decoding, network, rest)


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
