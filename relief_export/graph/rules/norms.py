"""Rules of normalisations and of quantisation.

Batch norm in inference is ``s (x - μ) + β`` with ``s = γ / sqrt(σ² + ε)``: a channel with ``γ = 0`` is the constant
``β``. Instance and group norm use statistics of the input itself: of one channel, or of a group of channels, which then
stays or goes as a whole.

Source: ONNX operators BatchNormalization-15, InstanceNormalization-6, GroupNormalization-21, QuantizeLinear-13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from relief_export.graph.channels import varying
from relief_export.graph.initializers import is_read
from relief_export.graph.rules.base import ChannelFacts, NodeContext, ParameterUse, Rule
from relief_export.graph.rules.elementwise import Elementwise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from relief_export.graph.rewrite import RemovalPlan

Array = np.ndarray[Any, np.dtype[Any]]

# Elements are quantised by a saturating round: (low, high) by ONNX type.
_RANGES = {
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT16: (-32768, 32767),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT4: (-8, 7),
}


@dataclass(frozen=True)
class NormFacts:
    """What a batch norm found out about itself.

    Attributes:
        zero_scale: Channels whose scale is zero (compact). zero_in: Channels whose input is always zero: (channels,).
    """

    zero_scale: NDArray[np.bool_]
    zero_in: NDArray[np.bool_]


class BatchNorm(Rule):
    """BatchNormalization with constant parameters, in inference."""

    finite_operands = True

    def forward(self, ctx: NodeContext) -> list[ChannelFacts]:
        """Pass units on; a channel is constant where its input or its scale's absence makes it so."""
        facts = ctx.facts(0)
        parameters = [ctx.array(k) for k in range(1, 5)]
        # Further outputs are statistics of the batch, which only training computes.
        training = ctx.integer("training_mode", 0) or any(is_read(v) for v in ctx.node.outputs[1:])
        if facts is None or training or set(varying(facts.ids)) - {1} or facts.rank < 2:
            return super().forward(ctx)
        if any(p is None for p in parameters):
            return super().forward(ctx)
        # Constants are followed in float64 and rounded only where they are stored again.
        gamma, beta, mean, variance = (p.astype(np.float64) for p in parameters if p is not None)
        scale = gamma / np.sqrt(variance + ctx.node.attributes.get_float("epsilon", 1e-5))
        x = facts.const.reshape(-1)
        # An unknown x is NaN, which a scale of zero must not pass on.
        const = np.where(scale == 0, beta, scale * (x - mean) + beta)
        ids = (
            facts.ids
            if facts.ids.size == len(scale)
            else np.broadcast_to(facts.ids, [len(scale) if k == 1 else 1 for k in range(facts.rank)])
        )
        for index in range(1, 5):
            ctx.use_axis(index, 0, ids.reshape(-1))
        ctx.note(NormFacts((scale == 0).reshape(ids.shape), np.broadcast_to(x == 0, len(scale))))
        return [ChannelFacts(ctx.out_shape(), ids, const.reshape(ids.shape))]

    def backward(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """A channel is needed where its output is and its scale is not zero."""
        facts = ctx.walk.facts_of[ctx.source]
        need = live[0] & ~ctx.recall(NormFacts).zero_scale
        if facts.ids.size == 1:
            need = np.full(facts.ids.shape, need.any())
        return [need, None, None, None, None]

    def rewrite(self, ctx: NodeContext, plan: RemovalPlan) -> None:
        """Cut the four parameter vectors."""
        kept = plan.kept(ctx.result)
        if 1 in kept:
            for index in range(1, 5):
                plan.constant(ctx.node, index, {0: kept[1]})

    def use(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> dict[int, ParameterUse]:
        """The parameters of a dead channel are dead; those behind an always-zero neuron are constant."""
        use = ParameterUse(~live[0].reshape(-1), ctx.recall(NormFacts).zero_in)
        return dict.fromkeys(range(1, 5), use)


class ChannelNorm(Rule):
    """InstanceNormalization and GroupNormalization: per-channel scale and bias, statistics of the input.

    Args:
        grouped: Channels are normalised in groups (attribute ``num_groups``), which then live and die together.
    """

    def __init__(self, *, grouped: bool) -> None:
        self.grouped = grouped

    def forward(self, ctx: NodeContext) -> list[ChannelFacts]:
        """Pass units on; tie those whose statistics are shared."""
        facts, scale, bias = ctx.facts(0), _parameter(ctx, 1), _parameter(ctx, 2)
        if facts is None or scale is None or bias is None or facts.rank < 2:
            return super().forward(ctx)
        channels = facts.shape[1]
        if channels is None or facts.ids.shape[1] != channels or scale.size != channels:
            return super().forward(ctx)
        ids = facts.ids
        groups = ctx.integer("num_groups", 1) if self.grouped else channels
        rows = ids.reshape(groups, -1) if not set(varying(ids)) - {1} else np.moveaxis(ids, 1, 0).reshape(channels, -1)
        if self.grouped and set(varying(ids)) - {1}:
            return super().forward(ctx)
        # A mean over several units would change if one of them went.
        ctx.tie(rows, np.broadcast_to(rows[:, :1], rows.shape))
        # A flat channel is its own mean, but not to the last bit: only zero is sure to come out as the bias.
        along = [-1 if k == 1 else 1 for k in range(facts.rank)]
        zero = (facts.const == 0).all(axis=tuple(k for k in range(facts.rank) if k != 1))
        zero = np.repeat(zero.reshape(groups, -1).all(axis=1), channels // groups)
        known = (zero | (scale == 0)) & (ctx.node.attributes.get_float("epsilon", 1e-5) > 0)  # else 0 / 0
        const = np.where(known.reshape(along), bias.astype(np.float64).reshape(along), np.nan)
        for index in (1, 2):
            ctx.use_axis(index, 0, ids.reshape(-1) if ids.size == channels else np.zeros(channels, np.int64))
        return [ChannelFacts(ctx.out_shape(), ids, np.broadcast_to(const, ids.shape))]

    def backward(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """All that shares its statistics with a live channel is needed."""
        flags = live[0]
        if self.grouped:
            groups = ctx.integer("num_groups", 1)
            rows = flags.reshape(groups, -1)
            flags = np.broadcast_to(rows.any(axis=1, keepdims=True), rows.shape).reshape(flags.shape)
        else:
            flags = np.broadcast_to(
                flags.any(axis=tuple(k for k in range(flags.ndim) if k != 1), keepdims=True), flags.shape
            )
        return [flags, *Rule.backward(self, ctx, live)[1:]]

    def rewrite(self, ctx: NodeContext, plan: RemovalPlan) -> None:
        """Cut scale, bias and the number of groups."""
        facts, kept = ctx.facts(0), plan.kept(ctx.result)
        if facts is None or 1 not in kept:
            return
        for index in (1, 2):
            expanded = _expanded(ctx, index)
            if expanded is None:
                plan.constant(ctx.node, index, {0: kept[1]})
            else:
                plan.replace(expanded, 1, np.array([len(kept[1])], np.int64))
                # The shape of the value is stated apart from the target and would be wrong otherwise.
                expanded.outputs[0].shape = ir.Shape([len(kept[1])])
        if self.grouped:
            groups = ctx.integer("num_groups", 1)
            plan.attribute(ctx.node, "num_groups", len(np.unique(kept[1] // (facts.ids.shape[1] // groups))))


def _expanded(ctx: NodeContext, index: int) -> ir.Node | None:
    """Return the node that makes a scale or shift out of one number for all channels, as torch writes group norm."""
    value = ctx.node.inputs[index]
    node = value.producer() if value is not None else None
    if value is None or node is None or node.op_type != "Expand" or node.domain or len(value.uses()) > 1:
        return None
    number, target = (ctx.walk.constant(v) for v in node.inputs)
    known = number is not None and target is not None and number.size == 1 and target.shape == (1,)
    return node if known and not value.is_graph_output() else None


def _parameter(ctx: NodeContext, index: int) -> Array | None:
    """Return a scale or shift, None where it is not constant."""
    expanded = _expanded(ctx, index)
    if expanded is None:
        return ctx.array(index)
    number, target = (ctx.walk.constant(v) for v in expanded.inputs)
    assert number is not None  # noqa: S101 - as _expanded has it
    assert target is not None  # noqa: S101
    return np.broadcast_to(number.reshape(1), (int(target[0]),))


class Quantize(Elementwise):
    """QuantizeLinear and DequantizeLinear with constant scale and zero point."""

    def forward(self, ctx: NodeContext) -> list[ChannelFacts]:
        """Treat as elementwise, the parameters of one axis aligned with it."""
        facts = ctx.facts(0)
        scale = ctx.array(1)
        if facts is None or scale is None or scale.size != 1 or (len(ctx.node.inputs) > 2 and ctx.array(2) is None):
            return Rule.forward(self, ctx)
        return super().forward(ctx)

    def _const(self, ctx: NodeContext, rank: int) -> NDArray[np.float64]:
        if ctx.node.op_type == "QuantizeLinear" and _quantized_type(ctx) not in _RANGES:  # float8 rounds otherwise
            return np.full((1,) * rank, np.nan)
        return super()._const(ctx, rank)


def quantize(ctx: NodeContext, x: Sequence[Array]) -> Array:
    """QuantizeLinear-13: round half to even, saturate."""
    zero = x[2] if len(x) > 2 else np.zeros(())
    low, high = _RANGES[_quantized_type(ctx)]
    return np.clip(np.rint(x[0] / x[1].reshape(())) + zero.reshape(()), low, high)


def dequantize(_: NodeContext, x: Sequence[Array]) -> Array:
    """DequantizeLinear-13."""
    zero = x[2] if len(x) > 2 else np.zeros(())
    return (x[0] - zero.reshape(())) * x[1].reshape(())


def _quantized_type(ctx: NodeContext) -> ir.DataType:
    value = ctx.node.inputs[2] if len(ctx.node.inputs) > 2 else None
    return (value.dtype if value is not None else ctx.result.dtype) or ir.DataType.UINT8
