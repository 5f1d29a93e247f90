"""Rules of the operators that mix channels with constant weights: Conv, ConvTranspose, Gemm, MatMul, linear Einsum.

All are seen as ``y[o] = b[o] + Σ_c Σ_k W[o, c, k] x[c, …]`` in groups. Write ``nz[o, c]`` where any ``W[o, c, k] ≠ 0``.

- A constant input channel of value ``v_c`` is *absorbed*: ``b[o] += v_c Σ_k W[o, c, k]``. Under zero padding (and in a
  transposed convolution, whose windows overlap unevenly) the border sees fewer taps, so only ``v_c = 0`` may be; so too
  where a stack of weights gives each place its own sum.
- Such an output channel is constant itself where every ``c`` with ``nz[o, c]`` is absorbed.
- An input channel is live where ``nz[o, c]`` for a live, not constant ``o``, and it is not absorbed.
- Constants that padding forbids to absorb are *merged*: ``W[o, r, k] += W[o, m, k] v_m / v_r`` for one representative
  ``r`` of the tensor, which is exact because both channels are flat and see the same border.

A weight that several nodes use is cut for all or for none. Each of them absorbs into a bias of its own.

Source: ONNX operators Conv-11, ConvTranspose-11, Gemm-13, MatMul-13, Einsum-12.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from relief_export.graph.flow import Flow, Rule, Site, Use
from relief_export.graph.layout import varying
from relief_export.graph.matrix import Matrix, ungroup

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from relief_export.graph.cutting import Cut

Array = np.ndarray[Any, np.dtype[Any]]


class Linear(Rule):
    """Convolutions and matrix products with a constant weight, whose rows and columns are cut.

    Args:
        see: Returns the operator's matrix, or None where its form is not one of the above.
        has_bias: The third input, where present, is a bias vector.
        activations: The rule of a product of two activations.
    """

    finite_operands = True

    def __init__(
        self, see: Callable[[Site], Matrix | None], *, has_bias: bool, activations: Rule | None = None
    ) -> None:
        self.see = see
        self.has_bias = has_bias
        self.activations = activations

    def choose(self, site: Site) -> Rule:
        """Tell a layer from a product of two activations."""
        if self.activations is None or len(site.flows()) < 2:
            return self
        weights = any(
            v is not None and v.const_value is not None for v in site.node.inputs
        )  # that a caller may replace
        return self if weights else self.activations

    def forward(self, site: Site) -> list[Flow]:
        """Give every output channel a unit of its own and work out which are constant."""
        matrix, flow = self.see(site), site.flow(0)
        if matrix is None or flow is None or site.flow(2) is not None or self._blocked(site, matrix):
            return super().forward(site)
        if not matrix.size:
            return super().forward(site)
        axis = matrix.data_axis
        if set(varying(flow.ids)) - {axis} or (matrix.groups > 1 and _splits_quantised(site, matrix)):
            return super().forward(site)
        nonzero = matrix.nonzero()
        groups, outs, ins = nonzero.shape
        rank = matrix.rank or max(flow.rank, len(matrix.shape) if axis == 1 else flow.rank)
        shape = [groups * outs if k == matrix.output_axis else 1 for k in range(rank)]
        const_in = np.broadcast_to(flow.const.reshape(-1), groups * ins)
        absorbed = ~np.isnan(const_in) & ((const_in == 0) | (not matrix.border))
        if site.quantised(1) or (self.has_bias and not _is_stored(site, 2)):
            absorbed &= const_in == 0  # a bias that is computed from integers cannot hold every number
        site.cache.update(matrix=matrix, nonzero=nonzero, absorbed=absorbed, const_in=const_in)
        ids = site.trace.fresh(shape)
        const = self._const(site, nonzero, absorbed).reshape(shape)
        site.cache["const_out"] = const.reshape(-1)
        self._share(site, matrix, flow, ids)
        return [Flow(site.out_shape(), ids, const)]

    def _blocked(self, site: Site, matrix: Matrix) -> bool:
        channels = matrix.shape[matrix.in_axis] * (matrix.groups if matrix.in_axis else 1)
        flow = site.flow(0)
        if flow is None or flow.rank <= matrix.data_axis:
            return flow is None or flow.rank > 0
        return flow.ids.shape[matrix.data_axis] not in (1, channels)

    def _share(self, site: Site, matrix: Matrix, flow: Flow, ids: NDArray[np.int64]) -> None:
        ins, outs = matrix.shape[matrix.in_axis], matrix.shape[matrix.out_axis]
        rows, columns = ids.reshape(-1), np.broadcast_to(flow.ids.reshape(-1), len(site.cache["const_in"]))
        if matrix.groups > 1:  # the grouped axis of the weight counts only one group's channels
            rows = rows if len(rows) == outs else np.zeros(outs, np.int64)
            columns = columns if len(columns) == ins else np.zeros(ins, np.int64)
        site.use_axis(1, matrix.out_axis, rows)
        site.use_axis(1, matrix.in_axis, columns)
        if self.has_bias and (bias := site.array(2)) is not None and bias.size > 1:
            site.use_axis(2, bias.ndim - 1, ids.reshape(-1))

    def _const(self, site: Site, nonzero: NDArray[np.bool_], absorbed: NDArray[np.bool_]) -> NDArray[np.float64]:
        groups, outs, ins = nonzero.shape
        by_group = absorbed.reshape(groups, 1, ins)
        const = ~(nonzero & ~by_group).any(axis=2).reshape(-1)
        result = np.full(groups * outs, np.nan)
        rows = np.flatnonzero(const)
        values = np.where(absorbed, site.cache["const_in"], 0.0)
        result[rows] = self._bias(site, groups * outs)[rows] + site.cache["matrix"].contribution(values, rows)
        return result

    def _bias(self, site: Site, channels: int) -> NDArray[np.float64]:
        bias = site.array(2) if self.has_bias else None
        if bias is None:
            return np.zeros(channels)
        return np.broadcast_to(bias.astype(np.float64).reshape(-1), channels)

    def backward(self, site: Site, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """An input channel is needed where a live output reads it and it cannot be absorbed."""
        flow = site.trace.flows[site.source]
        nonzero = site.cache["nonzero"]
        groups, outs, _ = nonzero.shape
        wanted = (live[0].reshape(-1) & np.isnan(site.cache["const_out"])).reshape(groups, outs, 1)
        read = (nonzero & wanted).any(axis=1).reshape(-1) & ~site.cache["absorbed"]
        flat = ~np.isnan(site.cache["const_in"])
        site.deferred = None
        if site.cache["matrix"].border and groups == 1 and site.exclusive(1):
            site.deferred = _narrow(read & flat, flow)
            read = read & ~flat
        return [_narrow(read, flow), *(None for _ in site.node.inputs[1:])]

    def require(self, site: Site, cut: Cut) -> list[tuple[NDArray[np.int64], str]]:
        """Keep the groups of a grouped convolution equal, and one input for a layer that has outputs left."""
        groups, outs, ins = site.cache["nonzero"].shape
        source, value = site.source, site.result
        keep_in = cut.mask(source, groups * ins).reshape(groups, ins)
        keep_out = cut.mask(value, groups * outs).reshape(groups, outs)
        if groups == 1:
            missing_in = np.zeros_like(keep_in)
            missing_in[0, 0] = keep_out.any() and not keep_in.any()
            missing_out, reason = np.zeros_like(keep_out), f"the last input of {site.label}"
        else:
            active = np.logical_or(keep_in.any(axis=1), keep_out.any(axis=1))
            missing_in, missing_out = _fill_up(keep_in, active), _fill_up(keep_out, active)
            reason = f"equal groups at {site.label}"
        ids_in = np.broadcast_to(site.trace.flows[source].ids.reshape(-1), groups * ins)
        ids_out = site.trace.flows[value].ids.reshape(-1)
        pairs = [(ids_in[missing_in.reshape(-1)], reason), (ids_out[missing_out.reshape(-1)], reason)]
        return [(ids, why) for ids, why in pairs if len(ids)]

    def rewrite(self, site: Site, cut: Cut) -> None:
        """Absorb and merge constants, then cut rows, columns and groups."""
        matrix: Matrix = site.cache["matrix"]
        groups, outs, ins = site.cache["nonzero"].shape
        keep_in = cut.mask(site.source, groups * ins)
        keep_out = cut.mask(site.result, groups * outs)
        grouped = matrix.grouped(matrix.weight)
        if cut.gone(site.result):
            return
        merged = self._merge(site, cut, grouped)
        changed = merged is not None
        grouped = grouped if merged is None else merged
        touched = self._absorb(site, cut, keep_out)
        if (touched & keep_in).any():
            grouped = grouped if changed else grouped.copy()
            grouped.swapaxes(1, 2)[touched.reshape(groups, ins)] = 0
            changed = True
        if keep_in.all() and keep_out.all() and not changed:
            return
        bias = site.array(2) if self.has_bias and not touched.any() else None
        if bias is not None and bias.size > 1 and not keep_out.all():
            cut.constant(site.node, 2, {bias.ndim - 1: np.flatnonzero(keep_out)})
        if groups == 1 and not changed:
            lists = {matrix.out_axis: np.flatnonzero(keep_out), matrix.in_axis: np.flatnonzero(keep_in)}
            cut.constant(site.node, 1, lists)
            return
        active = keep_in.reshape(groups, ins).any(axis=1) | keep_out.reshape(groups, outs).any(axis=1)
        rows, columns = keep_out.reshape(groups, outs), keep_in.reshape(groups, ins)
        blocks = [grouped[g][np.ix_(rows[g], columns[g])] for g in np.flatnonzero(active)]
        cut.replace(site.node, 1, ungroup(blocks, matrix).astype(matrix.weight.dtype, copy=False))
        if groups > 1:
            cut.attribute(site.node, "group", int(active.sum()))

    def _merge(self, site: Site, cut: Cut, grouped: Array) -> Array | None:
        """Move the kernels of constants that padding forbids to absorb onto their representative."""
        live, flow = cut.live(site.source), site.trace.flows[site.source]
        if site.deferred is None or not (site.deferred & ~live).any():
            return None
        const, channels = site.cache["const_in"], grouped.shape[2]
        lost = np.flatnonzero(np.broadcast_to((site.deferred & ~live).reshape(-1), channels))
        usable = live & ~np.isnan(flow.const) & (flow.const != 0)
        target = int(np.argmax(np.where(np.broadcast_to(usable.reshape(-1), channels), np.abs(const), -1)))
        result = grouped.astype(np.float64)
        result[0, :, target] += np.tensordot(result[0][:, lost], const[lost] / const[target], axes=(1, 0))
        result[0, :, lost] = 0
        return result.astype(grouped.dtype)

    def _taken(self, site: Site, cut: Cut) -> NDArray[np.bool_]:
        """Return the input channels whose non-zero constant goes into the bias: (in,) bool."""
        const = site.cache["const_in"]
        taken = site.cache["absorbed"] & (const != 0) & site.cache["nonzero"].any(axis=1).reshape(-1)
        result: NDArray[np.bool_] = taken & ~np.broadcast_to(cut.live(site.source).reshape(-1), const.shape)
        return result

    def regret(self, site: Site, cut: Cut) -> dict[int, tuple[NDArray[np.bool_], str]]:
        """A new bias pays only where columns go for it, and only in a weight of one's own can a column be erased."""
        taken = self._taken(site, cut)
        if not taken.any() or cut.gone(site.result):
            return {}
        flow, stays = site.trace.flows[site.source], cut.mask(site.source, len(taken))
        if (taken & stays).any() and not site.exclusive(1):
            return {0: (_narrow(taken & stays, flow), f"a constant that {site.label} multiplies by a shared weight")}
        bias, weight = site.array(2) if self.has_bias else None, site.node.inputs[1]
        if bias is not None and site.exclusive(2):
            return {}
        uses = 1 if weight is None else len(weight.uses())
        new = uses - (uses > 1 and bias is not None)  # biases, beside the one that all of them did without
        if int((~stays).sum()) >= new:
            return {}
        return {0: (_narrow(taken, flow), f"a constant that would need a bias of its own at {site.label}")}

    def _absorb(self, site: Site, cut: Cut, keep_out: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Add the absorbed constants to the bias; return the columns that were: (in,) bool."""
        const, taken = site.cache["const_in"], self._taken(site, cut)
        if not taken.any() or cut.gone(site.result):
            return np.zeros_like(taken)
        rows, matrix = np.flatnonzero(keep_out), site.cache["matrix"]
        shift = matrix.contribution(np.where(taken, const, 0.0), rows)
        bias = self._bias(site, len(keep_out))[rows] + shift
        dtype = site.result.dtype.numpy() if site.result.dtype is not None else matrix.weight.dtype
        cut.bias(site, bias.astype(dtype), self.has_bias)
        return taken

    def use(self, site: Site, live: list[NDArray[np.bool_]]) -> dict[int, Use]:
        """Weights of dead outputs and of inputs that are always zero are dead."""
        matrix: Matrix = site.cache["matrix"]
        groups, outs, ins = site.cache["nonzero"].shape
        dead_out = ~np.broadcast_to(live[0].reshape(-1), groups * outs)
        zero_in = site.cache["const_in"] == 0
        dead = dead_out.reshape(groups, outs, 1) | zero_in.reshape(groups, 1, ins)
        taps = [1] * (len(matrix.shape) - 2)
        blocks, shape = ungroup([d.reshape(*d.shape, *taps) for d in dead], matrix), matrix.shape
        uses = {1: Use(np.broadcast_to(blocks, shape), np.zeros(shape, np.bool_))}
        bias = site.array(2) if self.has_bias else None
        if bias is not None and bias.size == len(dead_out):
            uses[2] = Use(dead_out.reshape(bias.shape), np.zeros(bias.shape, np.bool_))
        return uses


def _narrow(flags: NDArray[np.bool_], flow: Flow) -> NDArray[np.bool_]:
    """Write flags by channel as a compact array of the input."""
    if flow.ids.size == 1:
        return np.full(flow.ids.shape, bool(flags.any()))
    return flags.reshape(flow.ids.shape)


def _fill_up(keep: NDArray[np.bool_], active: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which removed channels must stay so that every active group keeps as many as the largest, at least one."""
    target = max(int(keep.sum(axis=1).max(initial=0)), 1)
    need = np.where(active, target - keep.sum(axis=1), 0)
    rank = np.cumsum(~keep, axis=1)  # the first removed ones, by index
    return ~keep & (rank <= need[:, None])


def _splits_quantised(site: Site, matrix: Matrix) -> bool:
    """Tell a quantised weight in groups of several inputs, which cannot be cut by axis."""
    value = site.node.inputs[1]
    return value in site.trace.computed and matrix.nonzero().shape[2] > 1


def _is_stored(site: Site, index: int) -> bool:
    """Tell whether a constant input is absent or an initializer that no caller can override."""
    value = site.node.inputs[index] if index < len(site.node.inputs) else None
    return value is None or (value.is_initializer() and not value.is_graph_input())
