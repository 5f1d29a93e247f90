"""Rules of normalisations and of quantisation.

Batch norm in inference is ``s (x - μ) + β`` with ``s = γ / sqrt(σ² + ε)``: a channel with ``γ = 0`` is the constant
``β``. Instance and group norm use statistics of the input itself: of one channel, or of a group of channels, which then
stays or goes as a whole.

Source: ONNX operators BatchNormalization-15, InstanceNormalization-6, GroupNormalization-21, QuantizeLinear-13.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from relief_export.graph.elementwise import Elementwise
from relief_export.graph.flow import Flow, Rule, Site, Use
from relief_export.graph.fold import is_read
from relief_export.graph.layout import varying

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from relief_export.graph.cutting import Cut

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


class BatchNorm(Rule):
    """BatchNormalization with constant parameters, in inference."""

    finite_operands = True

    def forward(self, site: Site) -> list[Flow]:
        """Pass units on; a channel is constant where its input or its scale's absence makes it so."""
        flow = site.flow(0)
        parameters = [site.array(k) for k in range(1, 5)]
        training = site.integer("training_mode", 0) or any(is_read(v) for v in site.node.outputs[1:])
        if flow is None or training or set(varying(flow.ids)) - {1} or flow.rank < 2:
            return super().forward(site)
        if any(p is None for p in parameters):
            return super().forward(site)
        gamma, beta, mean, variance = (p.astype(np.float64) for p in parameters if p is not None)
        scale = gamma / np.sqrt(variance + site.node.attributes.get_float("epsilon", 1e-5))
        x = flow.const.reshape(-1)
        const = np.where(scale == 0, beta, scale * (x - mean) + beta)
        ids = (
            flow.ids
            if flow.ids.size == len(scale)
            else np.broadcast_to(flow.ids, [len(scale) if k == 1 else 1 for k in range(flow.rank)])
        )
        for index in range(1, 5):
            site.use_axis(index, 0, ids.reshape(-1))
        site.cache.update(zero_scale=(scale == 0).reshape(ids.shape), zero_in=np.broadcast_to(x == 0, len(scale)))
        return [Flow(site.out_shape(), ids, const.reshape(ids.shape))]

    def backward(self, site: Site, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """A channel is needed where its output is and its scale is not zero."""
        flow = site.trace.flows[site.source]
        need = live[0] & ~site.cache["zero_scale"]
        if flow.ids.size == 1:
            need = np.full(flow.ids.shape, need.any())
        return [need, None, None, None, None]

    def rewrite(self, site: Site, cut: Cut) -> None:
        """Cut the four parameter vectors."""
        kept = cut.kept(site.result)
        if 1 in kept:
            for index in range(1, 5):
                cut.constant(site.node, index, {0: kept[1]})

    def use(self, site: Site, live: list[NDArray[np.bool_]]) -> dict[int, Use]:
        """The parameters of a dead channel are dead; those behind an always-zero neuron are constant."""
        use = Use(~live[0].reshape(-1), site.cache["zero_in"])
        return dict.fromkeys(range(1, 5), use)


class ChannelNorm(Rule):
    """InstanceNormalization and GroupNormalization: per-channel scale and bias, statistics of the input.

    Args:
        grouped: Channels are normalised in groups (attribute ``num_groups``), which then live and die together.
    """

    def __init__(self, *, grouped: bool) -> None:
        self.grouped = grouped

    def forward(self, site: Site) -> list[Flow]:
        """Pass units on; tie those whose statistics are shared."""
        flow, scale, bias = site.flow(0), site.array(1), site.array(2)
        if flow is None or scale is None or bias is None or flow.rank < 2:
            return super().forward(site)
        channels = flow.shape[1]
        if channels is None or flow.ids.shape[1] != channels or scale.size != channels:
            return super().forward(site)
        ids = flow.ids
        groups = site.integer("num_groups", 1) if self.grouped else channels
        rows = ids.reshape(groups, -1) if not set(varying(ids)) - {1} else np.moveaxis(ids, 1, 0).reshape(channels, -1)
        if self.grouped and set(varying(ids)) - {1}:
            return super().forward(site)
        site.tie(rows, np.broadcast_to(rows[:, :1], rows.shape))
        # A flat channel is its own mean, but not to the last bit: only zero is sure to come out as the bias.
        along = [-1 if k == 1 else 1 for k in range(flow.rank)]
        zero = (flow.const == 0).all(axis=tuple(k for k in range(flow.rank) if k != 1))
        zero = np.repeat(zero.reshape(groups, -1).all(axis=1), channels // groups)
        known = (zero | (scale == 0)) & (site.node.attributes.get_float("epsilon", 1e-5) > 0)  # else 0 / 0
        const = np.where(known.reshape(along), bias.astype(np.float64).reshape(along), np.nan)
        for index in (1, 2):
            site.use_axis(index, 0, ids.reshape(-1) if ids.size == channels else np.zeros(channels, np.int64))
        return [Flow(site.out_shape(), ids, np.broadcast_to(const, ids.shape))]

    def backward(self, site: Site, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """All that shares its statistics with a live channel is needed."""
        flags = live[0]
        if self.grouped:
            groups = site.integer("num_groups", 1)
            rows = flags.reshape(groups, -1)
            flags = np.broadcast_to(rows.any(axis=1, keepdims=True), rows.shape).reshape(flags.shape)
        else:
            flags = np.broadcast_to(
                flags.any(axis=tuple(k for k in range(flags.ndim) if k != 1), keepdims=True), flags.shape
            )
        return [flags, None, None]

    def rewrite(self, site: Site, cut: Cut) -> None:
        """Cut scale, bias and the number of groups."""
        flow, kept = site.flow(0), cut.kept(site.result)
        if flow is None or 1 not in kept:
            return
        for index in (1, 2):
            cut.constant(site.node, index, {0: kept[1]})
        if self.grouped:
            groups = site.integer("num_groups", 1)
            cut.attribute(site.node, "num_groups", len(np.unique(kept[1] // (flow.ids.shape[1] // groups))))


class Quantize(Elementwise):
    """QuantizeLinear and DequantizeLinear with constant scale and zero point."""

    def forward(self, site: Site) -> list[Flow]:
        """Treat as elementwise, the parameters of one axis aligned with it."""
        flow = site.flow(0)
        scale = site.array(1)
        if flow is None or scale is None or scale.size != 1 or (len(site.node.inputs) > 2 and site.array(2) is None):
            return Rule.forward(self, site)
        return super().forward(site)

    def _const(self, site: Site, rank: int) -> NDArray[np.float64]:
        if site.node.op_type == "QuantizeLinear" and _quantized_type(site) not in _RANGES:  # float8 rounds otherwise
            return np.full((1,) * rank, np.nan)
        return super()._const(site, rank)


def quantize(site: Site, x: Sequence[Array]) -> Array:
    """QuantizeLinear-13: round half to even, saturate."""
    zero = x[2] if len(x) > 2 else np.zeros(())
    low, high = _RANGES[_quantized_type(site)]
    return np.clip(np.rint(x[0] / x[1].reshape(())) + zero.reshape(()), low, high)


def dequantize(_: Site, x: Sequence[Array]) -> Array:
    """DequantizeLinear-13."""
    zero = x[2] if len(x) > 2 else np.zeros(())
    return (x[0] - zero.reshape(())) * x[1].reshape(())


def _quantized_type(site: Site) -> ir.DataType:
    value = site.node.inputs[2] if len(site.node.inputs) > 2 else None
    return (value.dtype if value is not None else site.result.dtype) or ir.DataType.UINT8
