"""Rules of the products of two activations, ``y[i, j] = Σ_k a[i, k] b[k, j]`` by head, in an attention or as one node.

In ``softmax(q kᵀ) v`` the axes are (batch, head, time, feature). Features of ``q`` and ``k`` meet in the sum: they go
together, where either is always zero. A feature of ``v`` is one of the result. Heads go where all operands lose them:
when nothing reads a head's result, its weights are not needed, and so neither are its queries and keys.

Source: ONNX operators MatMul-13, Attention-23.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from relief_export.graph.channels import fit, undo_broadcast, varying
from relief_export.graph.initializers import is_read
from relief_export.graph.rules.base import ChannelFacts, NodeContext, Rule

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from relief_export.graph.rewrite import RemovalPlan

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class SummedAxis:
    """Whether units vary along the axis that a product of two activations sums over."""

    varies: bool


class Contraction(Rule):
    """MatMul of two activations of known rank."""

    def forward(self, ctx: NodeContext) -> list[ChannelFacts]:
        """Tie what is summed over; give the result the units of the operand whose rows or columns count units."""
        facts_of = [ctx.facts(0), ctx.facts(1)]
        shape = ctx.out_shape()
        if any(f is None or f.rank < 2 or len(f.shape) != f.rank for f in facts_of) or len(shape) < 2:
            return super().forward(ctx)
        a, b = (_lift(f.ids, len(shape)) for f in facts_of if f is not None)
        if not all(_covers(f, other) for f, other in zip(facts_of, (b, a), strict=True) if f is not None):
            return super().forward(ctx)
        rows, columns, inner = a.shape[-2] > 1, b.shape[-1] > 1, a.shape[-1] > 1
        # Units along rows and columns would make each element of the result a pair, and it can have only one unit.
        if (rows and columns) or a.shape[-1] != b.shape[-2] or (inner and (rows or columns)):
            return super().forward(ctx)
        full = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
        # The operand that gives its units must have one for each place of the result, in every head.
        if (rows and a.shape != full) or (columns and b.shape != full):
            return super().forward(ctx)
        if inner:
            ctx.tie(a, b.swapaxes(-1, -2))
        # What is summed over leaves no trace in the result, whose units then are its own.
        ids = a if rows else b if columns else ctx.walk.fresh(full)
        ctx.note(SummedAxis(inner))
        return [ChannelFacts(shape, ids, self._const(ctx, full))]

    @staticmethod
    def _const(ctx: NodeContext, full: tuple[int, ...]) -> NDArray[np.float64]:
        """Know a sum of zeros, and the mean of a number with weights that add up to one."""
        zero_a, zero_b = _zeros(ctx)
        sums = (zero_a[..., :, :, None] | zero_b[..., None, :, :]).all(axis=-2)
        const = np.where(np.broadcast_to(sums, full), 0.0, np.nan)
        weights, facts = ctx.source.producer(), ctx.facts(1)
        if (
            weights is not None
            and facts is not None
            and weights.op_type == "Softmax"
            and not ctx.recall(SummedAxis).varies
        ):
            axis = weights.attributes.get_int("axis", -1)
            if axis in (-1, len(full) - 1) and ctx.walk.facts_of[ctx.source].rank == len(full):
                return np.where(np.isnan(const), fit(_lift(facts.const, len(full)), full), const)
        return const

    def backward(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """A factor is needed unless the other is zero, which then must stay so; both, where they go together."""
        zero_a, zero_b = (z[..., :, :, None] if k == 0 else z[..., None, :, :] for k, z in enumerate(_zeros(ctx)))
        wanted = live[0][..., :, None, :]
        if ctx.recall(SummedAxis).varies:
            # A feature goes on both sides at once, so that a zero on one frees the other as well.
            terms = wanted & ~zero_a & ~zero_b
            return self._shares(ctx, terms, terms)
        # Where both are zero the second one must stay so, since the first need not.
        return self._shares(ctx, wanted & ~zero_b, wanted & (zero_b | ~zero_a))

    @staticmethod
    def _shares(
        ctx: NodeContext, first: NDArray[np.bool_], second: NDArray[np.bool_]
    ) -> list[NDArray[np.bool_] | None]:
        """Collect needs of terms (…, i, k, j) by element of each operand."""
        shapes = [ctx.walk.facts_of[v].ids.shape for v in ctx.node.inputs[:2] if v is not None]
        needs = np.asarray(first.any(axis=-1)), np.asarray(second.any(axis=-3))
        return [undo_broadcast(need, shape) for need, shape in zip(needs, shapes, strict=True)]

    def must_stay_live(self, ctx: NodeContext, plan: RemovalPlan) -> dict[int, tuple[NDArray[np.bool_], str]]:
        """A zero factor that stays must be zero, or its partner's garbage would count."""
        return _spoiled(ctx, plan, _zeros(ctx)) if ctx.recall(SummedAxis).varies else {}

    def require(self, ctx: NodeContext, plan: RemovalPlan) -> list[tuple[NDArray[np.int64], str]]:
        """Keep the same heads in both operands and the result."""
        rank = len(ctx.out_shape())
        return _same_places(ctx, plan, [*ctx.node.inputs[:2], ctx.result], rank, range(rank - 2))


class FusedAttention(Rule):
    """Attention of (batch, head, time, feature), as many heads of keys and values as of queries, without a past."""

    def forward(self, ctx: NodeContext) -> list[ChannelFacts]:
        """Tie the features of queries and keys; the result has the units of the values."""
        parts = [f for k in range(3) if (f := ctx.facts(k)) is not None and f.rank == len(f.shape) == 4]
        given = [v for v in ctx.node.inputs[4:6] if v is not None]
        if len(parts) < 3 or given or any(is_read(v) for v in ctx.node.outputs[1:]) or not _one_mask(ctx):
            return super().forward(ctx)
        heads = {(f.shape[1], f.ids.shape[1]) for f in parts}
        q, k, v = (f.ids for f in parts)
        if len(heads) > 1 or None in next(iter(heads)) or any(2 in varying(f.ids) for f in parts) or q.shape != k.shape:
            return super().forward(ctx)
        ctx.note(SummedAxis(q.shape[3] > 1))
        if ctx.recall(SummedAxis).varies:
            ctx.tie(q, k)
        for index in range(3, len(ctx.node.inputs)):
            if (other := ctx.facts(index)) is not None:
                ctx.pin(other.ids, f"read as a parameter by {ctx.label}")
        # Weights add up to one, but not where a mask leaves nothing to look at.
        masked = ctx.integer("is_causal", 0) or any(value is not None for value in ctx.node.inputs[3:])
        const = np.where(parts[2].const == 0, 0.0, np.nan) if masked else parts[2].const
        first = ChannelFacts(ctx.out_shape(), v, const)
        return [first, *(ctx.walk.unknown_facts(value) for value in ctx.node.outputs[1:])]

    def backward(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """Values are needed where the result is, and in these heads the features that are not zero on one side."""
        heads = np.asarray(live[0].any(axis=3, keepdims=True))
        zero_q, zero_k = self._zero_features(ctx)
        need = np.broadcast_to(heads & ~zero_q & ~zero_k, zero_q.shape) if ctx.recall(SummedAxis).varies else heads
        others = super().backward(ctx, live)[3:]
        return [need, need, live[0], *others]

    @staticmethod
    def _zero_features(ctx: NodeContext) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        first, second = (ctx.walk.facts_of[v].const == 0 for v in ctx.node.inputs[:2] if v is not None)
        return first, second

    def must_stay_live(self, ctx: NodeContext, plan: RemovalPlan) -> dict[int, tuple[NDArray[np.bool_], str]]:
        """A zero factor that stays must be zero, or its partner's garbage would count."""
        return _spoiled(ctx, plan, self._zero_features(ctx)) if ctx.recall(SummedAxis).varies else {}

    def require(self, ctx: NodeContext, plan: RemovalPlan) -> list[tuple[NDArray[np.int64], str]]:
        """Keep the same heads in all operands."""
        return _same_places(ctx, plan, ctx.node.inputs[:3], 4, (1,))

    def rewrite(self, ctx: NodeContext, plan: RemovalPlan) -> None:
        """State the scale, which otherwise follows from the number of features that are left."""
        features = ctx.walk.facts_of[ctx.source].shape[3]
        if 3 in plan.kept(ctx.source) and features and "scale" not in ctx.node.attributes:
            ctx.node.attributes["scale"] = ir.AttrFloat32("scale", 1 / math.sqrt(features))


def _one_mask(ctx: NodeContext) -> bool:
    """Return True if a mask, where there is one, is the same for all heads."""
    array, facts = ctx.array(3), ctx.facts(3)
    if array is not None:
        return array.ndim < 3 or array.shape[-3] == 1
    return facts is None or len(facts.shape) in (1, 2) or (len(facts.shape) > 2 and facts.shape[-3] == 1)


def _spoiled(
    ctx: NodeContext, plan: RemovalPlan, zeros: tuple[NDArray[np.bool_], NDArray[np.bool_]]
) -> dict[int, tuple[NDArray[np.bool_], str]]:
    """Return zero factors that stay although they need not be zero."""
    if plan.gone(ctx.result):
        return {}
    missing = {}
    for index, zero in enumerate(zeros):
        value = ctx.node.inputs[index]
        facts = ctx.facts(index)
        if value is None or facts is None:
            continue
        spoiled = undo_broadcast(zero, facts.ids.shape) & plan.stays(value) & ~plan.live(value)
        if spoiled.any():
            stays_for = plan.reason(facts.ids[spoiled])
            missing[index] = spoiled, stays_for or f"multiplied at {ctx.label} by a feature that stays"
    return missing


def _same_places(
    ctx: NodeContext, plan: RemovalPlan, values: Sequence[ir.Value | None], rank: int, axes: Iterable[int]
) -> list[tuple[NDArray[np.int64], str]]:
    """Return units that must stay so that all values keep the same places along some axes."""
    if plan.gone(ctx.result):
        return []
    known = [v for v in values if v is not None]
    ids = [_lift(ctx.walk.facts_of[v].ids, rank) for v in known]
    stays = [_lift(plan.stays(v), rank) for v in known]
    missing = []
    for axis in axes:
        lines = [_line(s, axis) for s in stays if s.shape[axis] > 1]
        union = np.logical_or.reduce(lines) if lines else np.zeros(1, np.bool_)
        for units, keep in zip(ids, stays, strict=True):
            # An operand that is flat along the heads serves all of them, however many are left.
            if units.shape[axis] > 1 and (lost := np.flatnonzero(union & ~_line(keep, axis))).size:
                missing.append((_beside(units, keep, axis, lost), f"the same heads at {ctx.label}"))
    return missing


def _lift(array: Array, rank: int) -> Array:
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def _covers(facts: ChannelFacts, other: NDArray[np.int64]) -> bool:
    """Return True if an operand has a unit, or length 1, for each place of a batch axis where the other has units."""
    offset = other.ndim - facts.rank
    return all(
        k < offset or facts.ids.shape[k - offset] == other.shape[k] or facts.shape[k - offset] == 1
        for k in varying(other)
        if k < other.ndim - 2
    )


def _zeros(ctx: NodeContext) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    rank = len(ctx.out_shape())
    first, second = (_lift(ctx.walk.facts_of[v].const == 0, rank) for v in ctx.node.inputs[:2] if v is not None)
    return first, second


def _line(flags: NDArray[np.bool_], axis: int) -> NDArray[np.bool_]:
    return np.asarray(flags.any(axis=tuple(k for k in range(flags.ndim) if k != axis)))


def _beside(
    units: NDArray[np.int64], keep: NDArray[np.bool_], axis: int, places: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the units at some places of an axis that lie in line with what is kept, at least one a place."""
    chosen = units.take(places, axis)
    for k in range(units.ndim):
        line = _line(keep, k)
        if k != axis and units.shape[k] > 1:
            # Where nothing is kept along an axis, its first place stands for it.
            chosen = np.compress(line if line.any() else np.arange(len(line)) == 0, chosen, k)
    return chosen.reshape(-1)
