"""Rule of a matrix product of two activations, ``y[i, j] = Σ_k a[i, k] b[k, j]`` by head: the two of an attention.

In ``softmax(q kᵀ) v`` the axes are (batch, head, time, feature). Features of ``q`` and ``k`` meet in the sum: they go
together, where either is always zero. A feature of ``v`` is one of the result. Heads go where all operands lose them:
when nothing reads a head's result, its weights are not needed, and so neither are its queries and keys.

Source: ONNX operator MatMul-13.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from relief_export.graph.channels import fit, undo_broadcast, varying
from relief_export.graph.rules.base import ChannelFacts, NodeContext, Rule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from relief_export.graph.rewrite import RemovalPlan

Array = np.ndarray[Any, np.dtype[Any]]


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
        if (rows and columns) or a.shape[-1] != b.shape[-2] or (inner and (rows or columns)):
            return super().forward(ctx)
        full = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
        if (rows and a.shape != full) or (columns and b.shape != full):
            return super().forward(ctx)
        if inner:
            ctx.tie(a, b.swapaxes(-1, -2))
        ids = a if rows else b if columns else ctx.walk.fresh(full)
        ctx.cache["inner"] = inner
        return [ChannelFacts(shape, ids, self._const(ctx, full))]

    @staticmethod
    def _const(ctx: NodeContext, full: tuple[int, ...]) -> NDArray[np.float64]:
        """Know a sum of zeros, and the mean of a number with weights that add up to one."""
        zero_a, zero_b = _zeros(ctx)
        sums = (zero_a[..., :, :, None] | zero_b[..., None, :, :]).all(axis=-2)
        const = np.where(np.broadcast_to(sums, full), 0.0, np.nan)
        weights, facts = ctx.source.producer(), ctx.facts(1)
        if weights is not None and facts is not None and weights.op_type == "Softmax" and not ctx.cache["inner"]:
            axis = weights.attributes.get_int("axis", -1)
            if axis in (-1, len(full) - 1) and ctx.walk.facts_of[ctx.source].rank == len(full):
                return np.where(np.isnan(const), fit(_lift(facts.const, len(full)), full), const)
        return const

    def backward(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """A factor is needed unless the other is zero, which then must stay so; both, where they go together."""
        zero_a, zero_b = (z[..., :, :, None] if k == 0 else z[..., None, :, :] for k, z in enumerate(_zeros(ctx)))
        wanted = live[0][..., :, None, :]
        if ctx.cache["inner"]:
            terms = wanted & ~zero_a & ~zero_b
            return self._shares(ctx, terms, terms)
        return self._shares(ctx, wanted & ~zero_b, wanted & (zero_b | ~zero_a))

    @staticmethod
    def _shares(
        ctx: NodeContext, first: NDArray[np.bool_], second: NDArray[np.bool_]
    ) -> list[NDArray[np.bool_] | None]:
        """Collect needs of terms (…, i, k, j) by element of each operand."""
        shapes = [ctx.walk.facts_of[v].ids.shape for v in ctx.node.inputs[:2] if v is not None]
        return [undo_broadcast(first.any(axis=-1), shapes[0]), undo_broadcast(second.any(axis=-3), shapes[1])]

    def must_stay_live(self, ctx: NodeContext, plan: RemovalPlan) -> dict[int, tuple[NDArray[np.bool_], str]]:
        """A zero factor that stays must be zero, or its partner's garbage would count."""
        if not ctx.cache["inner"] or plan.gone(ctx.result):
            return {}
        missing = {}
        for index, zero in enumerate(_zeros(ctx)):
            value = ctx.node.inputs[index]
            facts = ctx.facts(index)
            if value is None or facts is None:
                continue
            spoiled = undo_broadcast(zero, facts.ids.shape) & plan.stays(value) & ~plan.live(value)
            if spoiled.any():
                stays_for = plan.reason(facts.ids[spoiled])
                missing[index] = spoiled, stays_for or f"multiplied at {ctx.label} by a feature that stays"
        return missing

    def require(self, ctx: NodeContext, plan: RemovalPlan) -> list[tuple[NDArray[np.int64], str]]:
        """Keep the same heads in both operands and the result."""
        if plan.gone(ctx.result):
            return []
        rank = len(ctx.out_shape())
        values = [v for v in (*ctx.node.inputs[:2], ctx.result) if v is not None]
        ids = [_lift(ctx.walk.facts_of[v].ids, rank) for v in values]
        stays = [_lift(plan.stays(v), rank) for v in values]
        missing = []
        for axis in range(rank - 2):
            lines = [_line(s, axis) for s in stays if s.shape[axis] > 1]
            union = np.logical_or.reduce(lines) if lines else np.zeros(1, np.bool_)
            for units, keep in zip(ids, stays, strict=True):
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
            chosen = np.compress(line if line.any() else np.arange(len(line)) == 0, chosen, k)
    return chosen.reshape(-1)
