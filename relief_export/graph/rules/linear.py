"""Operators that mix channels with constant weights, all seen alike: a matrix of kernels, in groups.

Rules of the operators that mix channels with constant weights: Conv, ConvTranspose, Gemm, MatMul, linear Einsum.

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

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from relief_export.graph.channels import varying
from relief_export.graph.rules.base import ChannelFacts, LayerFacts, NodeContext, ParameterUse, Rule

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from relief_export.graph.rewrite import RemovalPlan
    from relief_export.graph.rules.base import NodeContext

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

    ctx: NodeContext
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
        array = self.ctx.array(1)
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
        seen = self.ctx.walk.nonzero
        key = (self.ctx.node.inputs[1], self.out_axis, self.in_axis, self.groups)
        if key not in seen:
            nonzero = self.grouped(self.weight != 0)
            seen[key] = np.asarray(nonzero.any(axis=tuple(range(3, nonzero.ndim)))) if nonzero.ndim > 3 else nonzero
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
                # The taps are added first: a constant input is the same number under each of them.
                total[here] += block.reshape(*block.shape[:2], -1).sum(axis=2, dtype=np.float64) @ own[chosen]
        return total


def conv(ctx: NodeContext) -> Matrix | None:
    """See a Conv: weight (out, in/groups, k…)."""
    weight = ctx.array(1)
    if weight is None or weight.ndim < 3:
        return None
    pads = ctx.node.attributes.get_ints("pads", ())
    padded = any(pads) or ctx.node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return Matrix(ctx, weight.shape, 0, 1, ctx.integer("group", 1), 1, PADDED if padded else "")


def conv_transpose(ctx: NodeContext) -> Matrix | None:
    """See a ConvTranspose: weight (in, out/groups, k…)."""
    weight = ctx.array(1)
    if weight is None or weight.ndim < 3:
        return None
    return Matrix(ctx, weight.shape, 1, 0, ctx.integer("group", 1), 1, border=TRANSPOSED)


def gemm(ctx: NodeContext) -> Matrix | None:
    """See a Gemm whose second operand is constant."""
    weight, facts = ctx.array(1), ctx.facts(0)
    attributes = ctx.node.attributes
    if weight is None or facts is None or ctx.integer("transA", 0):
        return None
    if attributes.get_float("alpha", 1.0) != 1 or attributes.get_float("beta", 1.0) != 1:
        return None
    bias, out_axis = ctx.array(2), 0 if ctx.integer("transB", 0) else 1
    # A bias that also varies along the batch is no number of a channel.
    if bias is not None and bias.size != 1 and not bias.size == bias.shape[-1] == weight.shape[out_axis]:
        return None
    return Matrix(ctx, weight.shape, out_axis, 1 - out_axis, 1, 1, border="")


def matmul(ctx: NodeContext) -> Matrix | None:
    """See a MatMul with a constant right operand (…, in, out), whose leading axes broadcast with the data's."""
    weight, facts = ctx.array(1), ctx.facts(0)
    if weight is None or weight.ndim < 2 or facts is None or facts.rank < 2:
        return None
    rank, border = max(facts.rank, weight.ndim), STACKED if weight.size > weight.shape[-1] * weight.shape[-2] else ""
    return Matrix(ctx, weight.shape, weight.ndim - 1, weight.ndim - 2, 1, facts.rank - 1, border, rank - 1, rank)


def einsum(ctx: NodeContext) -> Matrix | None:
    """See an Einsum that sums one axis of the data against a constant and gives it another one: ``bti,io->bto``."""
    weight, facts = ctx.array(1), ctx.facts(0)
    operands, arrow, result = ctx.node.attributes.get_string("equation", "").replace(" ", "").partition("->")
    if weight is None or facts is None or not arrow or operands.count(",") != 1 or "." in operands + result:
        return None
    data, stored = operands.split(",")
    if any(len(set(names)) < len(names) for names in (data, stored, result)):
        return None
    if (len(data), len(stored)) != (facts.rank, weight.ndim):
        return None
    summed, made = set(data) - set(result), set(stored) - set(data)
    if len(summed) != 1 or len(made) != 1 or not summed <= set(stored) or not made <= set(result):
        return None
    c, o = summed.pop(), made.pop()
    # A new bias could only be added along the last axis.
    flat = len(stored) == 2 and result.endswith(o)
    places = (stored.index(o), stored.index(c), 1, data.index(c))
    return Matrix(ctx, weight.shape, *places, "" if flat else STACKED, result.index(o), len(result))


def ungroup(blocks: list[Array], matrix: Matrix) -> Array:
    """Put (out/groups, in/groups, …) blocks back into the order in which the weight is stored."""
    if matrix.groups == 1:
        return np.moveaxis(blocks[0], (0, 1), (matrix.out_axis, matrix.in_axis))
    if matrix.out_axis == 0:
        return np.concatenate(blocks, axis=0)
    return np.concatenate([b.swapaxes(0, 1) for b in blocks], axis=0)


@dataclass(frozen=True)
class LinearFacts:
    """What a linear operator found out about itself.

    Attributes:
        matrix: Its weight. absorbed: Inputs whose constant can go into the bias: (in,), over all groups.
        const_in: Value of each input that is constant, NaN for the others: (in,) float64.
    """

    matrix: Matrix
    absorbed: NDArray[np.bool_]
    const_in: NDArray[np.float64]


class Linear(Rule):
    """Convolutions and matrix products with a constant weight, whose rows and columns are cut.

    Args:
        see: Returns the operator's matrix, or None where its form is not one of the above.
        has_bias: The third input, where present, is a bias vector.
        activations: The rule of a product of two activations.
    """

    finite_operands = True

    def __init__(
        self, see: Callable[[NodeContext], Matrix | None], *, has_bias: bool, activations: Rule | None = None
    ) -> None:
        self.see = see
        self.has_bias = has_bias
        self.activations = activations

    def choose(self, ctx: NodeContext) -> Rule:
        """Tell a layer from a product of two activations."""
        if self.activations is None or len(ctx.activations()) < 2:
            return self
        weights = any(v is not None and v.const_value is not None for v in ctx.node.inputs)  # that a caller may replace
        return self if weights else self.activations

    def forward(self, ctx: NodeContext) -> list[ChannelFacts]:
        """Give every output channel a unit of its own and work out which are constant."""
        matrix, facts = self.see(ctx), ctx.facts(0)
        if matrix is None or facts is None or ctx.facts(2) is not None or self._blocked(ctx, matrix):
            return super().forward(ctx)
        if not matrix.size:
            return super().forward(ctx)
        axis = matrix.data_axis
        if set(varying(facts.ids)) - {axis} or (matrix.groups > 1 and _splits_quantised(ctx, matrix)):
            return super().forward(ctx)
        nonzero = matrix.nonzero()
        groups, outs, ins = nonzero.shape
        # Where the input's rank is unknown, a convolution has that of its weight.
        rank = matrix.rank or max(facts.rank, len(matrix.shape) if axis == 1 else facts.rank)
        shape = [groups * outs if k == matrix.output_axis else 1 for k in range(rank)]
        const_in = np.broadcast_to(facts.const.reshape(-1), groups * ins)
        absorbed = ~np.isnan(const_in) & ((const_in == 0) | (not matrix.border))
        if ctx.quantised(1) or (self.has_bias and not _is_stored(ctx, 2)):
            absorbed &= const_in == 0  # a bias that is computed from integers cannot hold every number
        ctx.note(LinearFacts(matrix, absorbed, const_in))
        ids = ctx.walk.fresh(shape)
        const = self._const(ctx, nonzero, absorbed).reshape(shape)
        ctx.note(LayerFacts(nonzero, const.reshape(-1)))
        self._share(ctx, matrix, facts, ids)
        return [ChannelFacts(ctx.out_shape(), ids, const)]

    def _blocked(self, ctx: NodeContext, matrix: Matrix) -> bool:
        channels = matrix.shape[matrix.in_axis] * (matrix.groups if matrix.in_axis else 1)
        facts = ctx.facts(0)
        if facts is None or facts.rank <= matrix.data_axis:
            # Rank 0 stands for an unknown rank, which nothing speaks against.
            return facts is None or facts.rank > 0
        return facts.ids.shape[matrix.data_axis] not in (1, channels)

    def _share(self, ctx: NodeContext, matrix: Matrix, facts: ChannelFacts, ids: NDArray[np.int64]) -> None:
        ins, outs = matrix.shape[matrix.in_axis], matrix.shape[matrix.out_axis]
        rows, columns = ids.reshape(-1), np.broadcast_to(facts.ids.reshape(-1), len(ctx.recall(LinearFacts).const_in))
        if matrix.groups > 1:  # the grouped axis of the weight counts only one group's channels
            rows = rows if len(rows) == outs else np.zeros(outs, np.int64)
            columns = columns if len(columns) == ins else np.zeros(ins, np.int64)
        ctx.use_axis(1, matrix.out_axis, rows)
        ctx.use_axis(1, matrix.in_axis, columns)
        if self.has_bias and (bias := ctx.array(2)) is not None and bias.size > 1:
            ctx.use_axis(2, bias.ndim - 1, ids.reshape(-1))

    def _const(self, ctx: NodeContext, nonzero: NDArray[np.bool_], absorbed: NDArray[np.bool_]) -> NDArray[np.float64]:
        groups, outs, ins = nonzero.shape
        const = ~_reads(nonzero, ~absorbed.reshape(groups, ins)).reshape(-1)
        result = np.full(groups * outs, np.nan)
        rows = np.flatnonzero(const)
        values = np.where(absorbed, ctx.recall(LinearFacts).const_in, 0.0)
        result[rows] = self._bias(ctx, groups * outs)[rows] + ctx.recall(LinearFacts).matrix.contribution(values, rows)
        return result

    def _bias(self, ctx: NodeContext, channels: int) -> NDArray[np.float64]:
        bias = ctx.array(2) if self.has_bias else None
        if bias is None:
            return np.zeros(channels)
        return np.broadcast_to(bias.astype(np.float64).reshape(-1), channels)

    def backward(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """An input channel is needed where a live output reads it and it cannot be absorbed."""
        facts = ctx.walk.facts_of[ctx.source]
        nonzero = ctx.recall(LayerFacts).nonzero
        groups, outs, _ = nonzero.shape
        wanted = (live[0].reshape(-1) & np.isnan(ctx.recall(LayerFacts).const_out)).reshape(groups, outs)
        read = _read_by(nonzero, wanted).reshape(-1) & ~ctx.recall(LinearFacts).absorbed
        flat = ~np.isnan(ctx.recall(LinearFacts).const_in)
        ctx.deferred = None
        # Merging moves kernels onto one representative, which another group or another reader of the weight does not
        # have.
        if ctx.recall(LinearFacts).matrix.border and groups == 1 and ctx.exclusive(1):
            ctx.deferred = _narrow(read & flat, facts)
            read = read & ~flat
        return [_narrow(read, facts), *(None for _ in ctx.node.inputs[1:])]

    def require(self, ctx: NodeContext, plan: RemovalPlan) -> list[tuple[NDArray[np.int64], str]]:
        """Keep the groups of a grouped convolution equal, and one input for a layer that has outputs left."""
        groups, outs, ins = ctx.recall(LayerFacts).nonzero.shape
        source, value = ctx.source, ctx.result
        keep_in = plan.mask(source, groups * ins).reshape(groups, ins)
        keep_out = plan.mask(value, groups * outs).reshape(groups, outs)
        if groups == 1:
            missing_in = np.zeros_like(keep_in)
            # Even a layer whose inputs are all absorbed must read something.
            missing_in[0, 0] = keep_out.any() and not keep_in.any()
            missing_out, reason = np.zeros_like(keep_out), f"the last input of {ctx.label}"
        else:
            active = np.logical_or(keep_in.any(axis=1), keep_out.any(axis=1))
            missing_in, missing_out = _fill_up(keep_in, active), _fill_up(keep_out, active)
            reason = f"equal groups at {ctx.label}"
        ids_in = np.broadcast_to(ctx.walk.facts_of[source].ids.reshape(-1), groups * ins)
        ids_out = ctx.walk.facts_of[value].ids.reshape(-1)
        pairs = [(ids_in[missing_in.reshape(-1)], reason), (ids_out[missing_out.reshape(-1)], reason)]
        return [(ids, why) for ids, why in pairs if len(ids)]

    def rewrite(self, ctx: NodeContext, plan: RemovalPlan) -> None:
        """Absorb and merge constants, then cut rows, columns and groups."""
        matrix = ctx.recall(LinearFacts).matrix
        groups, outs, ins = ctx.recall(LayerFacts).nonzero.shape
        keep_in = plan.mask(ctx.source, groups * ins)
        keep_out = plan.mask(ctx.result, groups * outs)
        grouped = matrix.grouped(matrix.weight)
        if plan.gone(ctx.result):
            return
        merged = self._merge(ctx, plan, grouped)
        changed = merged is not None
        grouped = grouped if merged is None else merged
        touched = self._absorb(ctx, plan, keep_out)
        if (touched & keep_in).any():
            # It may be a view of the stored array, which must not change. An absorbed channel that stays for others is
            # erased, or it would count twice.
            grouped = grouped if changed else grouped.copy()
            grouped.swapaxes(1, 2)[touched.reshape(groups, ins)] = 0
            changed = True
        if keep_in.all() and keep_out.all() and not changed:
            return
        bias = ctx.array(2) if self.has_bias and not touched.any() else None
        # A bias of one number fits whatever is left.
        if bias is not None and bias.size > 1 and not keep_out.all():
            plan.constant(ctx.node, 2, {bias.ndim - 1: np.flatnonzero(keep_out)})
        # The plan cuts where the array is stored, and once for all that share it.
        if groups == 1 and not changed:
            lists = {matrix.out_axis: np.flatnonzero(keep_out), matrix.in_axis: np.flatnonzero(keep_in)}
            plan.constant(ctx.node, 1, lists)
            return
        active = keep_in.reshape(groups, ins).any(axis=1) | keep_out.reshape(groups, outs).any(axis=1)
        rows, columns = keep_out.reshape(groups, outs), keep_in.reshape(groups, ins)
        if matrix.out_axis == 0 and columns[active].all() and not changed:  # whole rows, as they are stored
            plan.constant(ctx.node, 1, {0: np.flatnonzero(keep_out)})
            plan.attribute(ctx.node, "group", int(active.sum()))
            return
        blocks = [grouped[g][np.ix_(rows[g], columns[g])] for g in np.flatnonzero(active)]
        plan.replace(ctx.node, 1, ungroup(blocks, matrix).astype(matrix.weight.dtype, copy=False))
        if groups > 1:
            plan.attribute(ctx.node, "group", int(active.sum()))

    def _merge(self, ctx: NodeContext, plan: RemovalPlan, grouped: Array) -> Array | None:
        """Move the kernels of constants that padding forbids to absorb onto their representative."""
        live, facts = plan.live(ctx.source), ctx.walk.facts_of[ctx.source]
        if ctx.deferred is None or not (ctx.deferred & ~live).any():
            return None
        const, channels = ctx.recall(LinearFacts).const_in, grouped.shape[2]
        lost = np.flatnonzero(np.broadcast_to((ctx.deferred & ~live).reshape(-1), channels))
        usable = live & ~np.isnan(facts.const) & (facts.const != 0)
        # The others are divided by this constant, so that the largest keeps the merged kernels small.
        target = int(np.argmax(np.where(np.broadcast_to(usable.reshape(-1), channels), np.abs(const), -1)))
        # Many kernels may end up in one, so they are added in float64 and rounded once.
        result = grouped.astype(np.float64)
        result[0, :, target] += np.tensordot(result[0][:, lost], const[lost] / const[target], axes=(1, 0))
        result[0, :, lost] = 0
        return result.astype(grouped.dtype)

    def _taken(self, ctx: NodeContext, plan: RemovalPlan) -> NDArray[np.bool_]:
        """Return the input channels whose non-zero constant goes into the bias: (in,) bool."""
        const = ctx.recall(LinearFacts).const_in
        taken = ctx.recall(LinearFacts).absorbed & (const != 0) & ctx.recall(LayerFacts).nonzero.any(axis=1).reshape(-1)
        result: NDArray[np.bool_] = taken & ~np.broadcast_to(plan.live(ctx.source).reshape(-1), const.shape)
        return result

    def must_stay_live(self, ctx: NodeContext, plan: RemovalPlan) -> dict[int, tuple[NDArray[np.bool_], str]]:
        """A new bias pays only where columns go for it, and only in a weight of one's own can a column be erased."""
        taken = self._taken(ctx, plan)
        if not taken.any() or plan.gone(ctx.result):
            return {}
        facts, stays = ctx.walk.facts_of[ctx.source], plan.mask(ctx.source, len(taken))
        if (taken & stays).any() and not ctx.exclusive(1):
            return {0: (_narrow(taken & stays, facts), f"a constant that {ctx.label} multiplies by a shared weight")}
        bias, weight = ctx.array(2) if self.has_bias else None, ctx.node.inputs[1]
        # A bias of its own takes the constants without growing.
        if bias is not None and ctx.exclusive(2):
            return {}
        uses = 1 if weight is None else len(weight.uses())
        new = uses - (uses > 1 and bias is not None)  # biases, beside the one that all of them did without
        if int((~stays).sum()) >= new:
            return {}
        return {0: (_narrow(taken, facts), f"a constant that would need a bias of its own at {ctx.label}")}

    def _absorb(self, ctx: NodeContext, plan: RemovalPlan, keep_out: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Add the absorbed constants to the bias; return the columns that were: (in,) bool."""
        const, taken = ctx.recall(LinearFacts).const_in, self._taken(ctx, plan)
        if not taken.any() or plan.gone(ctx.result):
            return np.zeros_like(taken)
        rows, matrix = np.flatnonzero(keep_out), ctx.recall(LinearFacts).matrix
        shift = matrix.contribution(np.where(taken, const, 0.0), rows)
        bias = self._bias(ctx, len(keep_out))[rows] + shift
        dtype = ctx.result.dtype.numpy() if ctx.result.dtype is not None else matrix.weight.dtype
        plan.bias(ctx, bias.astype(dtype), self.has_bias)
        return taken

    def use(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> dict[int, ParameterUse]:
        """Weights of dead outputs and of inputs that are always zero are dead."""
        matrix = ctx.recall(LinearFacts).matrix
        groups, outs, ins = ctx.recall(LayerFacts).nonzero.shape
        dead_out = ~np.broadcast_to(live[0].reshape(-1), groups * outs)
        zero_in = ctx.recall(LinearFacts).const_in == 0
        dead = dead_out.reshape(groups, outs, 1) | zero_in.reshape(groups, 1, ins)
        taps = [1] * (len(matrix.shape) - 2)
        blocks, shape = ungroup([d.reshape(*d.shape, *taps) for d in dead], matrix), matrix.shape
        uses = {1: ParameterUse(np.broadcast_to(blocks, shape), np.zeros(shape, np.bool_))}
        bias = ctx.array(2) if self.has_bias else None
        if bias is not None and bias.size == len(dead_out):
            uses[2] = ParameterUse(dead_out.reshape(bias.shape), np.zeros(bias.shape, np.bool_))
        return uses


def _reads(nonzero: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which outputs read any of the ``chosen`` inputs: (groups, in/groups) -> (groups, out/groups)."""
    rows = [(nonzero[:, block] & chosen[:, None]).any(axis=2) for block in _blocks(nonzero)]
    return np.concatenate(rows, axis=1)


def _read_by(nonzero: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which inputs any of the ``chosen`` outputs reads: (groups, out/groups) -> (groups, in/groups)."""
    groups, _, ins = nonzero.shape
    read = np.zeros((groups, ins), np.bool_)
    for block in _blocks(nonzero):
        read |= (nonzero[:, block] & chosen[:, block, None]).any(axis=1)
    return read


def _blocks(nonzero: NDArray[np.bool_]) -> list[slice]:
    """Divide a layer's outputs: the layer at once would be one more copy of it, and outside the cache."""
    groups, outs, ins = nonzero.shape
    step = max(1, _BLOCK // max(1, groups * ins))
    return [slice(start, start + step) for start in range(0, max(1, outs), step)]


def _narrow(flags: NDArray[np.bool_], facts: ChannelFacts) -> NDArray[np.bool_]:
    """Write flags by channel as a compact array of the input."""
    if facts.ids.size == 1:
        return np.full(facts.ids.shape, bool(flags.any()))
    return flags.reshape(facts.ids.shape)


def _fill_up(keep: NDArray[np.bool_], active: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which removed channels must stay so that every active group keeps as many as the largest, at least one."""
    target = max(int(keep.sum(axis=1).max(initial=0)), 1)
    need = np.where(active, target - keep.sum(axis=1), 0)
    rank = np.cumsum(~keep, axis=1)  # the first removed ones, by index
    return ~keep & (rank <= need[:, None])


def _splits_quantised(ctx: NodeContext, matrix: Matrix) -> bool:
    """Tell a quantised weight in groups of several inputs, which cannot be cut by axis."""
    value = ctx.node.inputs[1]
    return value in ctx.walk.computed and matrix.nonzero().shape[2] > 1


def _is_stored(ctx: NodeContext, index: int) -> bool:
    """Tell whether a constant input is absent or an initializer that no caller can override."""
    value = ctx.node.inputs[index] if index < len(ctx.node.inputs) else None
    return value is None or (value.is_initializer() and not value.is_graph_input())
