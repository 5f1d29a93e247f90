"""THE op table: what each ONNX operator does to channels. Adding an operator is one line here and one test.

Three outcomes: an operator has a rule; it is declared ``OPAQUE`` (it reads or mixes all channels); or it is not in the
table, then it is unknown: everything that it touches stays, and it is counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from scipy import special

from relief_export.graph.channels import LayoutError
from relief_export.graph.computed import (
    ADDED,
    DEQUANTIZED,
    DIVIDED,
    MULTIPLIED,
    RESHAPED,
    SAME,
    SUBTRACTED,
    TRANSPOSED,
    FromConstants,
)
from relief_export.graph.rules.base import ChannelFacts, NodeContext, Rule
from relief_export.graph.rules.elementwise import (
    Elementwise,
    PerChannel,
    Product,
    Quotient,
    nary,
    unary,
    with_attributes,
)
from relief_export.graph.rules.linear import Linear, conv, conv_transpose, einsum, gemm, matmul
from relief_export.graph.rules.moves import (
    Concat,
    DepthToSpace,
    Expand,
    Flatten,
    Gather,
    Lengths,
    MovesElements,
    Pad,
    Reshape,
    Resize,
    Slice,
    SpaceToDepth,
    Split,
    squeeze,
    tile,
    transpose,
    unsqueeze,
)
from relief_export.graph.rules.norms import BatchNorm, ChannelNorm, Quantize, dequantize, quantize
from relief_export.graph.rules.products import Contraction, FusedAttention
from relief_export.graph.rules.recurrent import Recurrent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]


@dataclass(frozen=True)
class Operator:
    """All that is known of one operator.

    Attributes:
        rule: What it does to channels.
        alias: Its first output holds the bytes of its first input: it needs no memory of its own.
        decided_by: How many of its inputs decide its value, where the shape or type of the others is enough.
        neutral: Operand -> the number at which the result is the other operand.
        weight_outputs: Axis of its second input that counts output channels, where a batch norm can become part of it.
        integer_kernels: Runtimes recognise the integer kernels that they have by it, so it is never folded.
        constant: How its value follows from constants that a file stores in a narrower type.
    """

    rule: Rule
    alias: bool = False
    decided_by: int | None = None
    neutral: Mapping[int, float] = field(default_factory=dict)
    weight_outputs: int | None = None
    integer_kernels: bool = False
    constant: FromConstants | None = None


_PLAIN = ("alias", "decided_by", "neutral", "weight_outputs", "integer_kernels")

OPAQUE = Rule()
REDUCE = MovesElements(lambda ctx, facts, array: _reduce(ctx, facts, array))  # noqa: PLW0108 - defined below
IDENTITY = unary(lambda x: x)


def _cast(ctx: NodeContext, x: Sequence[Array]) -> Array:
    """Cast-13: round to the nearest float, cut towards zero, or compare with zero; other types are not known."""
    dtype = ctx.result.dtype
    with np.errstate(all="ignore"):
        if dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            return x[0].astype(dtype.numpy()).astype(np.float64)
        if dtype == ir.DataType.BOOL:
            return np.where(x[0] != 0, 1.0, 0.0)
    if dtype in (ir.DataType.INT32, ir.DataType.INT64):
        return np.where(np.abs(x[0]) < 2.0**31, np.trunc(x[0]), np.nan)
    return np.full_like(x[0], np.nan)


def _trains(ctx: NodeContext) -> bool:
    """Tell whether a Dropout may be random: its third input is anything but a constant False."""
    if len(ctx.node.inputs) < 3 or ctx.node.inputs[2] is None:
        return False
    mode = ctx.array(2)
    return mode is None or bool(mode.any())


def _clip(ctx: NodeContext, x: Sequence[Array]) -> Array:
    low = x[1] if len(x) > 1 and ctx.node.inputs[1] is not None else -np.inf
    high = x[2] if len(x) > 2 and ctx.node.inputs[2] is not None else np.inf
    return np.minimum(np.maximum(x[0], low), high)


def _gelu(ctx: NodeContext, x: Sequence[Array]) -> Array:
    v = x[0]
    if ctx.node.attributes.get_string("approximate", "none") == "tanh":
        return np.asarray(0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))))
    return np.asarray(0.5 * v * (1 + special.erf(v / np.sqrt(2))))


def _softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


def _one_axis(default: int) -> PerChannel:
    """Make the rule of an operator that mixes along the attribute ``axis`` and no other."""
    return PerChannel(lambda _: False, lambda s: [s.integer("axis", default)], keeps_zero=False)


def _from_axis(default: int) -> PerChannel:
    """Make the rule of an operator that mixes along ``axis`` and all behind it."""

    def axes(ctx: NodeContext) -> Sequence[int]:
        rank = len(ctx.out_shape()) or 1
        return range(ctx.integer("axis", default) % rank, rank)

    return PerChannel(lambda _: False, axes, keeps_zero=False)


def _choose(_: NodeContext, x: Sequence[Array]) -> Array:
    """Where-16: known where the condition is, or where both sides are the same number."""
    condition, first, second = np.broadcast_arrays(*x)
    either = np.where(first == second, first, np.nan)
    return np.where(np.isnan(condition), either, np.where(condition != 0, first, second))


def _running_axis(ctx: NodeContext) -> Sequence[int]:
    """CumSum-14: along one axis that is an input, along any where it is not constant."""
    axis = ctx.array(1)
    return range(len(ctx.out_shape())) if axis is None else [int(axis.reshape(-1)[0])]


def _reduced_axes(ctx: NodeContext, rank: int) -> list[int]:
    axes = ctx.array(1)
    if axes is None or not axes.size:
        listed = ctx.node.attributes.get_ints("axes", ())
        if axes is None and len(ctx.node.inputs) > 1 and ctx.node.inputs[1] is not None:
            return list(range(rank))
        noop = ctx.integer("noop_with_empty_axes", 0)
        none = [] if noop else list(range(rank))
        return [a % rank for a in listed] or none
    return [int(a) % rank for a in axes.reshape(-1)]


def _reduce(ctx: NodeContext, _: ChannelFacts, array: NDArray[np.generic]) -> list[NDArray[np.generic]]:
    axes = _reduced_axes(ctx, array.ndim)
    if any(array.shape[a] > 1 for a in axes):
        raise LayoutError("all channels are reduced to one number")
    if array.dtype.kind == "f" and ctx.node.op_type not in ("ReduceMean", "ReduceMax", "ReduceMin"):
        array = np.where(array == 0, 0.0, np.nan)  # the number of positions may depend on the input
    if ctx.integer("keepdims", 1):
        return [array]
    return [array.squeeze(tuple(axes))]


def _place(ctx: NodeContext, _: ChannelFacts, array: NDArray[np.generic]) -> list[NDArray[np.generic]]:
    """ArgMax-13: a position along one axis, which is left out unless it is kept."""
    axis = ctx.integer("axis", 0) % array.ndim
    if array.shape[axis] > 1:
        raise LayoutError("channels are compared with each other")
    if array.dtype.kind == "f":
        array = np.full(array.shape, np.nan)
    return [array if ctx.integer("keepdims", 1) else array.squeeze(axis)]


def _average_keeps(ctx: NodeContext) -> bool:
    """Padding that is counted dilutes the border."""
    attributes = ctx.node.attributes
    padded = any(attributes.get_ints("pads", ())) or attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
    diluted = ctx.integer("count_include_pad", 0) and (padded or ctx.integer("ceil_mode", 0))
    return not diluted


_ROWS: dict[str, Rule | Operator] = {
    # linear maps
    "Conv": Operator(Linear(conv, has_bias=True), weight_outputs=0),
    "ConvTranspose": Operator(Linear(conv_transpose, has_bias=True), weight_outputs=1),
    "Gemm": Operator(Linear(gemm, has_bias=True), weight_outputs=1),
    "Einsum": Linear(einsum, has_bias=False),
    "MatMul": Linear(matmul, has_bias=False, activations=Contraction()),
    "Attention": FusedAttention(),
    # recurrent layers
    "GRU": Recurrent(gates=3, candidate=2, activations=2),
    "LSTM": Recurrent(gates=4, candidate=3, activations=3),
    "RNN": Recurrent(gates=1, candidate=0, activations=1),
    # normalisation
    "BatchNormalization": BatchNorm(),
    "InstanceNormalization": ChannelNorm(grouped=False),
    "GroupNormalization": ChannelNorm(grouped=True),
    "LpNormalization": _one_axis(-1),
    "LayerNormalization": _from_axis(-1),
    "RMSNormalization": _from_axis(-1),
    # activations
    "Abs": unary(np.abs),
    "Acos": unary(np.arccos, partial=True),
    "Acosh": unary(np.arccosh, partial=True),
    "Asin": unary(np.arcsin, partial=True),
    "Asinh": unary(np.arcsinh),
    "Atan": unary(np.arctan),
    "Atanh": unary(np.arctanh, partial=True),
    "Cast": Operator(Elementwise(_cast), constant=SAME),
    "CastLike": Operator(PerChannel(lambda _: False, lambda _: []), decided_by=1),
    "Ceil": unary(np.ceil),
    "Celu": with_attributes(lambda x, a: np.maximum(x, 0) + np.minimum(0, a * np.expm1(x / a)), alpha=1.0),
    "Clip": Elementwise(_clip),
    "Cos": unary(np.cos),
    "Cosh": unary(np.cosh, partial=True),
    "Dropout": Operator(PerChannel(lambda s: not _trains(s), lambda _: []), alias=True),
    "Elu": with_attributes(lambda x, a: np.where(x < 0, a * np.expm1(x), x), alpha=1.0),
    "Erf": unary(special.erf),
    "Exp": unary(np.exp, partial=True),
    "Floor": unary(np.floor),
    "Gelu": Elementwise(_gelu),
    "HardSigmoid": with_attributes(lambda x, a, b: np.clip(a * x + b, 0, 1), alpha=0.2, beta=0.5),
    "HardSwish": unary(lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    "Identity": Operator(IDENTITY, alias=True, constant=SAME),
    "IsInf": unary(np.zeros_like),  # what is known is finite
    "IsNaN": unary(np.zeros_like),
    "LeakyRelu": with_attributes(lambda x, a: np.where(x < 0, a * x, x), alpha=0.01),
    "Log": unary(np.log, partial=True),
    "Mish": unary(lambda x: x * np.tanh(_softplus(x))),
    "Neg": unary(np.negative),
    "Not": unary(np.logical_not),
    "Reciprocal": unary(np.reciprocal, partial=True),
    "Relu": unary(lambda x: np.maximum(x, 0)),
    "Round": unary(np.rint),
    "Selu": with_attributes(
        lambda x, a, g: g * np.where(x < 0, a * np.expm1(x), x), alpha=1.6732632423543772, gamma=1.0507009873554805
    ),
    "Shrink": with_attributes(lambda x, b, t: np.where(x < -t, x + b, np.where(x > t, x - b, 0)), bias=0.0, lambd=0.5),
    "Sigmoid": unary(special.expit),
    "Sign": unary(np.sign),
    "Sin": unary(np.sin),
    "Sinh": unary(np.sinh, partial=True),
    "Softplus": unary(_softplus),
    "Softsign": unary(lambda x: x / (1 + np.abs(x))),
    "Sqrt": unary(np.sqrt, partial=True),
    "Swish": with_attributes(lambda x, a: x * special.expit(a * x), alpha=1.0),
    "Tan": unary(np.tan, partial=True),
    "Tanh": unary(np.tanh),
    "ThresholdedRelu": with_attributes(lambda x, a: np.where(x > a, x, 0), alpha=1.0),
    # arithmetic with broadcasting
    "Add": Operator(nary(np.add), neutral={0: 0.0, 1: 0.0}, constant=ADDED),
    "Div": Operator(Quotient(), neutral={1: 1.0}, constant=DIVIDED),
    "Max": Elementwise(lambda _, x: np.maximum.reduce(np.broadcast_arrays(*x))),
    "Mean": Elementwise(lambda _, x: np.mean(np.broadcast_arrays(*x), axis=0)),
    "Min": Elementwise(lambda _, x: np.minimum.reduce(np.broadcast_arrays(*x))),
    "Mul": Operator(Product(), neutral={0: 1.0, 1: 1.0}, constant=MULTIPLIED),
    "PRelu": nary(lambda x, slope: np.where(x < 0, slope * x, x)),
    "Pow": Elementwise(lambda _, x: np.power(x[0], x[1]), partial=True),
    "Sub": Operator(nary(np.subtract), neutral={1: 0.0}, constant=SUBTRACTED),
    "Sum": Elementwise(lambda _, x: np.sum(np.broadcast_arrays(*x), axis=0)),
    "Where": Elementwise(_choose, annihilates=True),
    "And": nary(np.logical_and),
    "Equal": nary(np.equal),
    "Greater": nary(np.greater),
    "GreaterOrEqual": nary(np.greater_equal),
    "Less": nary(np.less),
    "LessOrEqual": nary(np.less_equal),
    "Or": nary(np.logical_or),
    "Xor": nary(np.logical_xor),
    # quantisation
    "DequantizeLinear": Operator(Quantize(dequantize), integer_kernels=True, constant=DEQUANTIZED),
    "QuantizeLinear": Operator(Quantize(quantize), integer_kernels=True),
    # space
    "AveragePool": PerChannel(_average_keeps),
    "GlobalAveragePool": PerChannel(),
    "GlobalLpPool": PerChannel(lambda _: False),
    "GlobalMaxPool": PerChannel(),
    "LpPool": PerChannel(lambda _: False),
    "LRN": PerChannel(lambda _: False, lambda _: [1]),
    "MaxPool": PerChannel(),
    "ReduceL1": REDUCE,
    "ReduceL2": REDUCE,
    "ReduceMax": REDUCE,
    "ReduceMean": REDUCE,
    "ReduceMin": REDUCE,
    "ReduceSum": REDUCE,
    "ReduceSumSquare": REDUCE,
    "Resize": Resize(),
    "Upsample": Resize(),
    # views
    "Concat": Concat(),
    "DepthToSpace": DepthToSpace(),
    "Expand": Expand(),
    "Flatten": Operator(Flatten(), alias=True),
    "Gather": Gather(),
    "Pad": Pad(),
    "Reshape": Operator(Reshape(), alias=True, constant=RESHAPED),
    "Slice": Slice(),
    "SpaceToDepth": SpaceToDepth(),
    "Split": Split(),
    "Squeeze": Operator(MovesElements(squeeze, permutes=True), alias=True, constant=RESHAPED),
    "Tile": MovesElements(tile),
    "Transpose": Operator(MovesElements(transpose, permutes=True), constant=TRANSPOSED),
    "Unsqueeze": Operator(MovesElements(unsqueeze, permutes=True), alias=True, constant=RESHAPED),
    # one axis is mixed, the others pass
    "ArgMax": MovesElements(_place),
    "ArgMin": MovesElements(_place),
    "Hardmax": _one_axis(-1),
    "LogSoftmax": _one_axis(-1),
    "Softmax": _one_axis(-1),
    "CumSum": PerChannel(lambda _: False, _running_axis),
    "GridSample": PerChannel(lambda _: False, aligned=False),
    "RoiAlign": PerChannel(lambda _: False, lambda s: [0, *range(2, len(s.out_shape()))], aligned=False),
    "TopK": PerChannel(lambda _: True, lambda s: [s.integer("axis", -1)], aligned=False, twins=True),
    "Trilu": PerChannel(lambda _: False, lambda _: [-2, -1]),
    # only lengths are read
    "Shape": Operator(Lengths(), decided_by=0),
    "Size": Operator(Lengths(), decided_by=0),
    # opaque: they read or mix all channels, or run other graphs
    "ConstantOfShape": OPAQUE,
    "ConvInteger": OPAQUE,
    "GatherElements": OPAQUE,
    "GatherND": OPAQUE,
    "If": OPAQUE,
    "Loop": OPAQUE,
    "MatMulInteger": OPAQUE,
    "NonMaxSuppression": OPAQUE,
    "OneHot": OPAQUE,
    "QLinearConv": OPAQUE,
    "QLinearMatMul": OPAQUE,
    "Scan": OPAQUE,
    "Range": OPAQUE,
    "ScatterElements": OPAQUE,
    "ScatterND": OPAQUE,
}

OPERATORS: dict[str, Operator] = {n: row if isinstance(row, Operator) else Operator(row) for n, row in _ROWS.items()}
"""Operator of ONNX's own domain -> all that is known of it."""
RULES: dict[str, Rule] = {name: row.rule for name, row in OPERATORS.items()}
UNKNOWN = Operator(Rule())
"""What stands for an operator that is not in the table."""
UNKNOWN.rule.reason = "pinned by unknown operator"


def operator(node: ir.Node) -> Operator:
    """Return what is known of a node's operator."""
    return OPERATORS.get(node.op_type, UNKNOWN) if node.domain in ("", "ai.onnx") else UNKNOWN


def operator_table() -> list[dict[str, Any]]:
    """Return the table as plain data, a row an operator in alphabetical order.

    ``outcome`` is ``rule`` or ``opaque``; ``handled`` says in one line what the rule holds of all its operators; the
    other keys are those of ``Operator``, functions left out.
    """
    rows = []
    for name, row in sorted(OPERATORS.items()):
        opaque = row.rule is OPAQUE
        facts = {key: getattr(row, key) for key in _PLAIN}
        handled = "" if opaque else (type(row.rule).__doc__ or "").split("\n")[0].rstrip(".")
        rows.append({"operator": name, "outcome": "opaque" if opaque else "rule", "handled": handled, **facts})
    return rows
