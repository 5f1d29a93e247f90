"""Rules of LSTM, GRU and RNN: a hidden unit is a row of every gate, a column of the recurrent weights and an output.

A unit is always zero where its candidate is: ``c̃ = g(W_c x + R_c h + b_c)`` with nothing but zeros behind it, a zero
initial state and ``g(0) = 0``. Whatever its gates are, the state then is a sum of products with zero. Units may hold
each other at zero, so the largest set is looked for that is consistent. A unit is needed where an output of it is, or
where a needed unit reads it.

Source: ONNX operators LSTM-14 (gates i, o, f, c), GRU-14 (z, r, h), RNN-14.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from relief_export.graph.channels import varying
from relief_export.graph.rules.base import ChannelFacts, LayerFacts, NodeContext, ParameterUse, Rule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from relief_export.graph.rewrite import RemovalPlan

Array = np.ndarray[Any, np.dtype[Any]]

_KEEP_ZERO = frozenset({"Tanh", "Relu", "Softsign"})
_KNOWN = _KEEP_ZERO | {"Sigmoid", "HardSigmoid"}
_WEIGHT, _RECURRENT, _BIAS, _LENGTHS, _STATE, _CELL, _PEEPHOLES = 1, 2, 3, 4, 5, 6, 7


@dataclass(frozen=True)
class Cell:
    """What a recurrent node found out about itself.

    Attributes:
        weight: (directions, gates * hidden, inputs). recurrent: (directions, gates * hidden, hidden).
        ids: Units of the hidden units, the same for all directions: (hidden,).
        zero: Hidden units that are always zero, in all directions: (hidden,).
        zero_in: Inputs that are always zero: (inputs,).
    """

    weight: Array
    recurrent: Array
    ids: NDArray[np.int64]
    zero: NDArray[np.bool_]
    zero_in: NDArray[np.bool_]

    def by_unit(self, array: Array) -> Array:
        """View an array of (directions, gates * hidden, …) as (directions, gates, hidden, …)."""
        return array.reshape(len(array), -1, len(self.ids), *array.shape[2:])

    def read(self, array: Array, units: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which columns of a weight some gate of the given units reads."""
        return np.asarray((self.by_unit(array)[:, :, units] != 0).any(axis=(0, 1, 2)))


class Recurrent(Rule):
    """LSTM, GRU or RNN with constant weights.

    Args:
        gates: Number of gates, the candidate among them.
        candidate: Which of them is the candidate.
        activations: How many activations a direction has; all but the first follow a candidate or state.
    """

    finite_operands = True

    def __init__(self, gates: int, candidate: int, activations: int) -> None:
        self.gates = gates
        self.candidate = candidate
        self.activations = activations

    def forward(self, ctx: NodeContext) -> list[ChannelFacts]:
        """Give every hidden unit a unit of its own, and work out which are always zero."""
        facts, weight, recurrent = ctx.facts(0), ctx.array(_WEIGHT), ctx.array(_RECURRENT)
        if facts is None or weight is None or recurrent is None or not weight.size or not recurrent.size:
            return super().forward(ctx)
        if facts.rank != 3 or set(varying(facts.ids)) - {2} or facts.ids.shape[2] not in (1, weight.shape[2]):
            return super().forward(ctx)
        names = ctx.node.attributes.get_strings("activations", ())
        if any(ctx.facts(k) is not None for k in (_BIAS, _PEEPHOLES)) or not set(names) <= _KNOWN:
            return super().forward(ctx)
        # A unit is cut from all parameters at once, which another reader of one of them could not follow.
        shared = [k for k in (_WEIGHT, _RECURRENT, _BIAS, _PEEPHOLES) if not ctx.exclusive(k)]
        if shared:
            return ctx.give_up(f"{ctx.node.inputs[shared[0]].name} of {ctx.label} is shared")  # type: ignore[union-attr]
        if (lengths := ctx.facts(_LENGTHS)) is not None:
            ctx.pin(lengths.ids, f"read as a parameter by {ctx.label}")
        hidden = recurrent.shape[2]
        ids = ctx.walk.fresh((hidden,))
        for index in (_STATE, _CELL):
            state = ctx.facts(index)
            if state is not None and set(varying(state.ids)) - {state.rank - 1}:
                return super().forward(ctx)
            if state is not None:
                ctx.tie(state.ids.reshape(-1), ids)
            elif ctx.array(index) is not None:
                ctx.use_axis(index, 2, ids)
        zero_in = np.broadcast_to(facts.const.reshape(-1) == 0, weight.shape[2])
        zero = self._zero(ctx, weight, recurrent, zero_in)
        ctx.note(Cell(weight, recurrent, ids, zero, zero_in))
        const = np.where(zero, 0.0, np.nan)
        nonzero = (weight != 0).any(axis=0).reshape(self.gates, hidden, -1).any(axis=0)[None]
        ctx.note(LayerFacts(nonzero, const))
        ranks = (4, 3, 3)[: len(ctx.node.outputs)]
        shapes = [(*(1 for _ in range(rank - 1)), hidden) for rank in ranks]
        return [ChannelFacts(ctx.out_shape(k), ids.reshape(s), const.reshape(s)) for k, s in enumerate(shapes)]

    def _zero(self, ctx: NodeContext, weight: Array, recurrent: Array, zero_in: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return the hidden units that stay at zero in all directions."""
        directions, hidden = recurrent.shape[0], recurrent.shape[2]
        names = ctx.node.attributes.get_strings("activations", ())
        # A gate may have any value; only what the candidate and the state go through must keep zero.
        behind = [n for k, n in enumerate(names) if k % self.activations or self.activations == 1]
        if not set(behind) <= _KEEP_ZERO:
            return np.zeros(hidden, np.bool_)
        rows = slice(self.candidate * hidden, (self.candidate + 1) * hidden)
        zero = ~(weight[:, rows][..., ~zero_in] != 0).any(axis=2) & self._no_bias(ctx, directions, hidden)
        for index in (_STATE, _CELL):
            zero &= _starts_at_zero(ctx, index, hidden)
        reads = recurrent[:, rows] != 0
        while True:
            # Starting from all candidates and striking out leaves the largest set whose units may hold each other at
            # zero.
            left = zero & ~(reads & ~zero[:, None, :]).any(axis=2)
            if (left == zero).all():
                # Both directions share their hidden units, so that one is cut only where it is zero in each.
                return np.asarray(zero.all(axis=0))
            zero = left

    def _no_bias(self, ctx: NodeContext, directions: int, hidden: int) -> NDArray[np.bool_]:
        bias = ctx.array(_BIAS)
        if bias is None:
            return np.ones((directions, hidden), np.bool_)
        both = bias.reshape(directions, 2, self.gates, hidden)[:, :, self.candidate]
        if ctx.node.op_type == "GRU" and ctx.integer("linear_before_reset", 0):
            return np.asarray((both == 0).all(axis=1))  # the reset gate multiplies the second
        # The two biases are only ever added, so that they may also cancel.
        return np.asarray(both[:, 0] == -both[:, 1])

    def backward(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """A unit is needed where an output of it is or a needed unit reads it; zeros are read by nobody."""
        cell = ctx.recall(Cell)
        needed = np.logical_or.reduce([flags.reshape(-1) for flags in live])
        while True:
            more = needed | (cell.read(cell.recurrent, needed & ~cell.zero) & ~cell.zero)
            if (more == needed).all():
                break
            needed = more
        ctx.recall(LayerFacts).needed = needed
        facts = ctx.walk.facts_of[ctx.source]
        read = cell.read(cell.weight, needed & ~cell.zero) & ~cell.zero_in
        needs: list[NDArray[np.bool_] | None] = [None for _ in ctx.node.inputs]
        needs[0] = read.reshape(facts.ids.shape) if facts.ids.size > 1 else np.full(facts.ids.shape, read.any())
        for index in (_LENGTHS, _STATE, _CELL):
            state = ctx.facts(index)
            if state is not None:
                whole = index == _LENGTHS or state.ids.size == 1
                needs[index] = np.ones(state.ids.shape, np.bool_) if whole else needed.reshape(state.ids.shape)
        return needs

    def require(self, ctx: NodeContext, plan: RemovalPlan) -> list[tuple[NDArray[np.int64], str]]:
        """Keep the units that only other units read."""
        del plan
        asked = ctx.recall(LayerFacts).needed
        needed = ctx.recall(Cell).ids[slice(0, 0) if asked is None else asked]
        return [(needed, f"read by another unit of {ctx.label}")] if needed.size else []

    def rewrite(self, ctx: NodeContext, plan: RemovalPlan) -> None:
        """Cut gates, columns and states; erase what reads zeros that stay, since those need not be zeros any more."""
        cell = ctx.recall(Cell)
        keep, keep_in = plan.kept_ids(cell.ids), plan.mask(ctx.source, len(cell.zero_in))
        weight, recurrent = cell.weight.copy(), cell.recurrent.copy()
        weight[:, :, cell.zero_in] = 0
        recurrent[:, :, cell.zero] = 0
        arrays = {_WEIGHT: weight[:, :, keep_in], _RECURRENT: recurrent[:, :, keep]}
        for index in (_BIAS, _PEEPHOLES):
            array = ctx.array(index)
            if array is not None:
                arrays[index] = array
        for index, array in arrays.items():
            plan.replace(ctx.node, index, cell.by_unit(array)[:, :, keep].reshape(len(array), -1, *array.shape[2:]))
        for index in (_STATE, _CELL):
            if ctx.array(index) is not None:
                plan.constant(ctx.node, index, {2: np.flatnonzero(keep)})
        plan.attribute(ctx.node, "hidden_size", int(keep.sum()))

    def use(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> dict[int, ParameterUse]:
        """All gates of a unit that is not needed, or that is always zero, are dead, and so is what reads a zero."""
        del live
        cell = ctx.recall(Cell)
        needed = ctx.recall(LayerFacts).needed
        dead = cell.zero if needed is None else ~needed | cell.zero
        columns = {_WEIGHT: cell.zero_in, _RECURRENT: cell.zero}
        uses = {}
        for index in (_WEIGHT, _RECURRENT, _BIAS):
            array = ctx.array(index)
            if array is not None:
                flags = np.zeros(array.shape, np.bool_)
                cell.by_unit(flags)[:, :, dead] = True
                if index in columns:
                    flags[:, :, columns[index]] = True
                uses[index] = ParameterUse(flags, np.zeros(array.shape, np.bool_))
        return uses


def _starts_at_zero(ctx: NodeContext, index: int, hidden: int) -> NDArray[np.bool_]:
    """Return which hidden units an initial state holds at zero for every sample: (directions or 1, hidden)."""
    state, array = ctx.facts(index), ctx.array(index)
    if state is not None:
        return np.broadcast_to(state.const.reshape(1, -1) == 0, (1, hidden))
    if array is None:
        return np.ones((1, hidden), np.bool_)
    axis = 0 if ctx.integer("layout", 0) else 1
    return np.asarray((array == 0).all(axis=axis))
