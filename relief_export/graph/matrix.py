"""Linear operators with constant weights, all seen alike: a matrix of kernels, in groups.

Source: ONNX operators Conv-11, ConvTranspose-11, Gemm-13, MatMul-13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from relief_export.graph.flow import Site

Array = np.ndarray[Any, np.dtype[Any]]

_BLOCK = 1 << 22  # weights that are converted to float64 at a time


@dataclass(frozen=True)
class Matrix:
    """A linear operator's weight, seen in groups.

    Attributes:
        weight: The stored array.
        out_axis: Axis of ``weight`` that counts output channels; for a transposed convolution those of one group.
        in_axis: Axis of ``weight`` that counts input channels; for a convolution those of one group.
        groups: Number of groups.
        data_axis: Axis of the activations, input and output, that counts channels.
        border: A flat input does not give a flat output.
    """

    weight: Array
    out_axis: int
    in_axis: int
    groups: int
    data_axis: int
    border: bool

    def grouped(self, array: Array) -> Array:
        """View an array of the weight's shape (trailing axes kept) as (groups, out/groups, in/groups, …)."""
        if self.out_axis == 0:  # (out, in/groups, …)
            return array.reshape(self.groups, -1, *array.shape[1:])
        moved = array.reshape(self.groups, -1, *array.shape[1:])  # (in, out/groups, …)
        return moved.swapaxes(1, 2)

    def nonzero(self) -> NDArray[np.bool_]:
        """Return nz: (groups, out/groups, in/groups) bool."""
        taps = tuple(range(2, self.weight.ndim))
        return self.grouped((self.weight != 0).any(axis=taps) if taps else self.weight != 0)

    def contribution(self, values: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return what constant inputs add to some outputs: (rows,) float64, in blocks that bound the memory.

        Args:
            values: (in,) value of each constant input channel, 0 for the others.
            rows: Output channels, over all groups.
        """
        ins = len(values) // self.groups
        outs = self.grouped(self.weight).shape[1]
        total = np.zeros(len(rows))
        for group in np.unique(rows // outs):
            here = rows // outs == group
            own = values[group * ins : (group + 1) * ins]
            columns = np.flatnonzero(own)
            weight = self.grouped(self.weight)[group]
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
    return Matrix(weight, 0, 1, site.integer("group", 1), 1, padded)


def conv_transpose(site: Site) -> Matrix | None:
    """See a ConvTranspose: weight (in, out/groups, k…)."""
    weight = site.array(1)
    if weight is None or weight.ndim < 3:
        return None
    return Matrix(weight, 1, 0, site.integer("group", 1), 1, border=True)


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
    return Matrix(weight, out_axis, 1 - out_axis, 1, 1, border=False)


def matmul(site: Site) -> Matrix | None:
    """See a MatMul with a constant right operand (in, out)."""
    weight, flow = site.array(1), site.flow(0)
    if weight is None or weight.ndim != 2 or flow is None or flow.rank < 2:
        return None
    return Matrix(weight, 1, 0, 1, flow.rank - 1, border=False)


def ungroup(blocks: list[Array], matrix: Matrix) -> Array:
    """Put (out/groups, in/groups, …) blocks back into the order in which the weight is stored."""
    if matrix.out_axis == 0:
        return np.concatenate(blocks, axis=0)
    return np.concatenate([b.swapaxes(0, 1) for b in blocks], axis=0)
