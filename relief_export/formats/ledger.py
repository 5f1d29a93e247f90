"""Bytes of each weight by format, beside the least that any code could take.

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
from scipy.special import gammaln

from relief_export.formats import csr, packed, positions, sparse, streams, values
from relief_export.formats.artifact import VALUES
from relief_export.formats.builder import Builder, short_names
from relief_export.formats.container import canonical

if TYPE_CHECKING:
    import onnx_ir as ir

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Row:
    """One tensor, or the total.

    Attributes:
        name: Name of the initializer.
        shape: Its shape; empty for the total.
        nonzeros: Weights that are not zero.
        position_code: How packed stores the positions when the tensor has a stream of its own; ``dense`` for none.
        dense: Bytes of the plain values.
        gzip: Bytes of the plain values after gzip's compression (deflate, level 9).
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
        gzip=len(zlib.compress(content, 9)),
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
