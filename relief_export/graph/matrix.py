"""Linear operators with constant weights, all seen alike: a matrix of kernels, in groups.

Source: ONNX operators Conv-11, ConvTranspose-11, Gemm-13, MatMul-13, Einsum-12.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from relief_export.graph.flow import Site

Array = np.ndarray[Any, np.dtype[Any]]

_BLOCK = 1 << 22  # weights that are converted to float64 at a time


PADDED = "under zero padding"
TRANSPOSED = "in a transposed convolution, whose windows overlap unevenly"
STACKED = "with weights that differ from place to place"


@dataclass(frozen=True)
class Matrix:
    """A linear operator's weight, seen in groups.

    The array is not held, so that one that is computed from a narrower type is in memory only while it is looked at.

    Attributes:
        site: The node; its second input is the weight.
        shape: Of the stored array.
        out_axis: Axis of the weight that counts output channels; for a transposed convolution those of one group.
        in_axis: Axis of the weight that counts input channels; for a convolution those of one group.
        groups: Number of groups.
        data_axis: Axis of the input that counts channels.
        border: Why a flat input does not give a flat output, empty where it does.
        result_axis: Axis of the output that counts channels, where it is another one than that of the input.
        rank: Number of the output's axes, where it is not that of the input.
    """

    site: Site
    shape: tuple[int, ...]
    out_axis: int
    in_axis: int
    groups: int
    data_axis: int
    border: str
    result_axis: int | None = None
    rank: int | None = None

    @property
    def output_axis(self) -> int:
        """Axis of the output that counts channels."""
        return self.data_axis if self.result_axis is None else self.result_axis

    @property
    def weight(self) -> Array:
        """The stored array."""
        array = self.site.array(1)
        assert array is not None  # noqa: S101 - a matrix is made of it
        return array

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    def grouped(self, array: Array) -> Array:
        """View an array of the weight's shape as (groups, out/groups, in/groups, …), other axes behind."""
        if self.groups == 1:
            return np.moveaxis(array, (self.out_axis, self.in_axis), (0, 1))[None]
        if self.out_axis == 0:  # (out, in/groups, …)
            return array.reshape(self.groups, -1, *array.shape[1:])
        moved = array.reshape(self.groups, -1, *array.shape[1:])  # (in, out/groups, …)
        return moved.swapaxes(1, 2)

    def nonzero(self) -> NDArray[np.bool_]:
        """Return nz: (groups, out/groups, in/groups) bool; layers that share a weight share the array."""
        seen = self.site.trace.nonzero
        key = (self.site.node.inputs[1], self.out_axis, self.in_axis, self.groups)
        if key not in seen:
            nonzero = self.grouped(self.weight != 0)
            seen[key] = np.asarray(nonzero.any(axis=tuple(range(3, nonzero.ndim))))
        return seen[key]

    def contribution(self, values: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return what constant inputs add to some outputs: (rows,) float64, in blocks that bound the memory.

        Args:
            values: (in,) value of each constant input channel, 0 for the others.
            rows: Output channels, over all groups.
        """
        ins = len(values) // self.groups
        whole = self.grouped(self.weight)
        outs = whole.shape[1]
        total = np.zeros(len(rows))
        for group in np.unique(rows // outs):
            here = rows // outs == group
            own = values[group * ins : (group + 1) * ins]
            columns = np.flatnonzero(own)
            weight = whole[group]
            step = max(1, _BLOCK // max(1, int(here.sum()) * (weight.size // (outs * ins))))
            for start in range(0, len(columns), step):
                chosen = columns[start : start + step]
                block = weight[np.ix_(rows[here] - group * outs, chosen)]
                total[here] += block.reshape(*block.shape[:2], -1).sum(axis=2, dtype=np.float64) @ own[chosen]
        return total


def conv(site: Site) -> Matrix | None:
    """See a Conv: weight (out, in/groups, k…)."""
    weight = site.array(1)
    if weight is None or weight.ndim < 3:
        return None
    pads = site.node.attributes.get_ints("pads", ())
    padded = any(pads) or site.node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return Matrix(site, weight.shape, 0, 1, site.integer("group", 1), 1, PADDED if padded else "")


def conv_transpose(site: Site) -> Matrix | None:
    """See a ConvTranspose: weight (in, out/groups, k…)."""
    weight = site.array(1)
    if weight is None or weight.ndim < 3:
        return None
    return Matrix(site, weight.shape, 1, 0, site.integer("group", 1), 1, border=TRANSPOSED)


def gemm(site: Site) -> Matrix | None:
    """See a Gemm whose second operand is constant."""
    weight, flow = site.array(1), site.flow(0)
    attributes = site.node.attributes
    if weight is None or flow is None or site.integer("transA", 0):
        return None
    if attributes.get_float("alpha", 1.0) != 1 or attributes.get_float("beta", 1.0) != 1:
        return None
    bias, out_axis = site.array(2), 0 if site.integer("transB", 0) else 1
    if bias is not None and bias.size != 1 and not bias.size == bias.shape[-1] == weight.shape[out_axis]:
        return None
    return Matrix(site, weight.shape, out_axis, 1 - out_axis, 1, 1, border="")


def matmul(site: Site) -> Matrix | None:
    """See a MatMul with a constant right operand (…, in, out), whose leading axes broadcast with the data's."""
    weight, flow = site.array(1), site.flow(0)
    if weight is None or weight.ndim < 2 or flow is None or flow.rank < 2:
        return None
    rank, border = max(flow.rank, weight.ndim), STACKED if weight.size > weight.shape[-1] * weight.shape[-2] else ""
    return Matrix(site, weight.shape, weight.ndim - 1, weight.ndim - 2, 1, flow.rank - 1, border, rank - 1, rank)


def einsum(site: Site) -> Matrix | None:
    """See an Einsum that sums one axis of the data against a constant and gives it another one: ``bti,io->bto``."""
    weight, flow = site.array(1), site.flow(0)
    operands, arrow, result = site.node.attributes.get_string("equation", "").replace(" ", "").partition("->")
    if weight is None or flow is None or not arrow or operands.count(",") != 1 or "." in operands + result:
        return None
    data, stored = operands.split(",")
    if any(len(set(names)) < len(names) for names in (data, stored, result)):
        return None
    if (len(data), len(stored)) != (flow.rank, weight.ndim):
        return None
    summed, made = set(data) - set(result), set(stored) - set(data)
    if len(summed) != 1 or len(made) != 1 or not summed <= set(stored) or not made <= set(result):
        return None
    c, o = summed.pop(), made.pop()
    # A new bias could only be added along the last axis.
    flat = len(stored) == 2 and result.endswith(o)
    places = (stored.index(o), stored.index(c), 1, data.index(c))
    return Matrix(site, weight.shape, *places, "" if flat else STACKED, result.index(o), len(result))


def ungroup(blocks: list[Array], matrix: Matrix) -> Array:
    """Put (out/groups, in/groups, …) blocks back into the order in which the weight is stored."""
    if matrix.groups == 1:
        return np.moveaxis(blocks[0], (0, 1), (matrix.out_axis, matrix.in_axis))
    if matrix.out_axis == 0:
        return np.concatenate(blocks, axis=0)
    return np.concatenate([b.swapaxes(0, 1) for b in blocks], axis=0)
