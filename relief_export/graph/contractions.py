"""The operators that multiply and accumulate: one table of operator -> how often each weight element is used.

Every contraction is brought to one form: a weight of ``(groups, out, in, kernel)`` elements, each used ``repeats``
times, and a bias added to ``outputs`` numbers. Sources: the ONNX operator specification (opset 25) and ONNX Runtime's
contrib operators.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from relief_export.graph.shapes import elements, static_shape

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]


class Kind(Enum):
    """Which of the paper's two formulas a contraction falls under."""

    CONVOLUTION = "convolution"
    LINEAR = "linear"


@dataclass(frozen=True)
class Contraction:
    """One node's multiply-accumulates.

    Attributes:
        weight: The constant factor; None where both factors are activations.
        shape: (groups, out, in, kernel elements) of the weight, whatever its layout in the file.
        mask: True where the weight is not zero, as ``shape``; None where there is no weight.
        repeats: How often each weight element is used at the model's batch.
        outputs: Numbers that the node writes. bias: The constant added to them.
    """

    node: ir.Node
    kind: Kind
    weight: ir.Value | None
    shape: tuple[int, int, int, int]
    mask: Mask | None
    repeats: int
    outputs: int
    bias: ir.Value | None

    @property
    def macs(self) -> int:
        """Multiply-accumulates, zeros included."""
        return self.repeats * math.prod(self.shape)


@dataclass(frozen=True)
class Slots:
    """At which inputs an operator takes its factors, the weight's zero point and the bias."""

    data: int = 0
    weight: int = 1
    zero: int | None = None
    bias: int | None = None


def contraction(node: ir.Node) -> Contraction | str | None:
    """Return what a node multiplies and accumulates, None for nothing, or why that cannot be said."""
    key = (node.domain, node.op_type)
    if key in RULES:
        slots = RULES[key].keywords["slots"]
        needed = (_input(node, slots.data), _input(node, slots.weight), node.outputs[0])
        if any(elements(value) is None for value in needed):
            return "the shape of a factor or of the output is unknown"
        return RULES[key](node)
    if key in UNCOUNTED:
        return UNCOUNTED[key]
    if key in FREE or (not node.domain and onnx.defs.has(node.op_type)):
        return None
    return "the operator is unknown"


def stored(value: ir.Value | None) -> ir.Value | None:
    """Follow a constant through Transpose, Reshape, DequantizeLinear and the like to the tensor in the file."""
    while value is not None and ir.convenience.get_const_tensor(value) is None:
        node = value.producer()
        if node is None or node.op_type not in _THROUGH:
            return None
        value = node.inputs[0]
    return value


def nonzero_mask(value: ir.Value | None) -> Mask | None:
    """Return True where a constant, or what Transpose, Reshape, Mul … make of constants, is not exactly zero."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return np.asarray(tensor.numpy() != 0, dtype=np.bool_)
    node = value.producer()
    rule = _THROUGH.get(node.op_type) if node is not None and not node.domain else None
    return None if rule is None or node is None else rule(node)


def is_constant(value: ir.Value | None) -> bool:
    """Say whether a value is computed from constants alone, by whatever operators."""
    pending, seen = [value], set()
    while pending:  # no recursion: networks are deeper than Python's stack
        factor = pending.pop()
        if factor is None or ir.convenience.get_const_tensor(factor) is not None:
            continue
        node = factor.producer()
        if node is None:
            return False
        if node not in seen:
            seen.add(node)
            pending.extend(node.inputs)
    return True


def _same(node: ir.Node) -> Mask | None:
    return nonzero_mask(node.inputs[0])


def _transposed(node: ir.Node) -> Mask | None:
    mask = nonzero_mask(node.inputs[0])
    perm = node.attributes.get_ints("perm", ())
    return mask if mask is None else mask.transpose(*perm)


def _reshaped(node: ir.Node) -> Mask | None:
    mask, shape = nonzero_mask(node.inputs[0]), static_shape(node.outputs[0])
    return None if mask is None or shape is None else mask.reshape(shape)


def _product(node: ir.Node) -> Mask | None:
    first, second = (nonzero_mask(value) for value in node.inputs)
    return None if first is None or second is None else first & second


def _dequantized(node: ir.Node) -> Mask | None:
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    return _against_zero_point(node.inputs[0], zero, node.attributes.get_int("axis", 1))


def _against_zero_point(value: ir.Value | None, zero: ir.Value | None, axis: int) -> Mask | None:
    """Return where a quantised constant differs from its zero point, a number or one along ``axis``."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or zero is None:
        return nonzero_mask(value)
    point = ir.convenience.get_const_tensor(zero)
    if point is None:
        return None
    points, weight = point.numpy(), tensor.numpy()
    if points.size > 1:
        points = points.reshape([-1 if i == axis % weight.ndim else 1 for i in range(weight.ndim)])
    return np.asarray(weight != points, dtype=np.bool_)


_THROUGH: dict[str, Callable[[ir.Node], Mask | None]] = {
    **dict.fromkeys(("Identity", "Cast", "Dropout", "QuantizeLinear"), _same),
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Flatten"), _reshaped),
    "Transpose": _transposed,
    "Mul": _product,
    "DequantizeLinear": _dequantized,
}


def _input(node: ir.Node, index: int | None) -> ir.Value | None:
    return node.inputs[index] if index is not None and index < len(node.inputs) else None


def _dims(value: ir.Value | None) -> tuple[int, ...]:
    """Return a shape that ``contraction`` has found to be known."""
    shape = static_shape(value)
    if shape is None:
        raise AssertionError("shapes are checked before a rule is asked")
    return shape


def _weight_mask(node: ir.Node, slots: Slots, axis: int) -> Mask | None:
    weight, zero = _input(node, slots.weight), _input(node, slots.zero)
    return nonzero_mask(weight) if zero is None else _against_zero_point(weight, zero, axis)


_COMPUTED = "its weight is computed from other constants when the model is loaded: count the model that was packed"


def _conv(node: ir.Node, *, slots: Slots, transposed: bool = False) -> Contraction | str:
    """Weight (out, in/groups, *kernel) used once a position of out; transposed, (in, out/groups, *kernel) and of in."""
    weight = _input(node, slots.weight)
    first, second, *kernel = _dims(weight)
    groups = node.attributes.get_int("group", 1)
    split = (groups, first // groups, second, math.prod(kernel))
    mask = _weight_mask(node, slots, 0)
    if mask is None and is_constant(weight):
        return _COMPUTED
    data, result = _dims(_input(node, slots.data)), _dims(node.outputs[0])
    swept = data if transposed else result
    grouped = None if mask is None else mask.reshape(split)
    if transposed:
        split = (groups, second, first // groups, split[3])
        grouped = None if grouped is None else grouped.transpose(0, 2, 1, 3)
    return Contraction(
        node,
        Kind.CONVOLUTION,
        None if mask is None else weight,
        split,
        grouped,
        swept[0] * math.prod(swept[2:]),
        math.prod(result),
        _bias(node, slots),
    )


def _matmul(node: ir.Node, *, slots: Slots) -> Contraction | str:
    """Factors (…, M, K) and (…, K, N), where Gemm may store either transposed; the constant one is the weight."""
    values = (_input(node, slots.data), _input(node, slots.weight))
    flips = [bool(node.attributes.get_int(name, 0)) for name in ("transA", "transB")]
    masks = (nonzero_mask(values[0]), _weight_mask(node, slots, -2 if flips[1] else -1))
    if any(mask is None and is_constant(value) for mask, value in zip(masks, values, strict=True)):
        return _COMPUTED
    side = 1 if masks[1] is not None else 0
    # Bring the weight to (…, in, out): a left factor is stored (out, in), a right one (in, out).
    flip, shape = flips[side] == (side == 1), _dims(values[side])
    mask = masks[side]
    if len(shape) == 1:
        shape, mask, flip = (shape[0], 1), None if mask is None else mask[:, None], False
    *lead, ins, outs = (*shape[:-2], shape[-1], shape[-2]) if flip else shape
    split = (math.prod(lead), outs, ins, 1)
    if mask is not None:
        mask = (mask if flip else mask.swapaxes(-1, -2)).reshape(split)
    result = math.prod(_dims(node.outputs[0]))
    return Contraction(
        node,
        Kind.LINEAR,
        None if mask is None else values[side],
        split,
        mask,
        result // max(1, split[0] * outs),
        result,
        _bias(node, slots),
    )


def _bias(node: ir.Node, slots: Slots) -> ir.Value | None:
    """Return the node's own bias, or the constant that a sole following Add brings."""
    bias = _input(node, slots.bias)
    uses = tuple(node.outputs[0].uses())
    if bias is not None or len(uses) != 1 or node.outputs[0].is_graph_output():
        return bias
    adder, index = uses[0].node, uses[0].idx
    if adder.op_type != "Add" or adder.domain:
        return None
    other = adder.inputs[1 - index]
    return other if nonzero_mask(other) is not None else None


_MS = "com.microsoft"
RULES: dict[tuple[str, str], partial[Contraction | str]] = {
    ("", "Conv"): partial(_conv, slots=Slots(bias=2)),
    ("", "ConvTranspose"): partial(_conv, slots=Slots(bias=2), transposed=True),
    ("", "ConvInteger"): partial(_conv, slots=Slots(zero=3)),
    ("", "QLinearConv"): partial(_conv, slots=Slots(weight=3, zero=5, bias=8)),
    ("", "Gemm"): partial(_matmul, slots=Slots(bias=2)),
    ("", "MatMul"): partial(_matmul, slots=Slots()),
    ("", "MatMulInteger"): partial(_matmul, slots=Slots(zero=3)),
    ("", "QLinearMatMul"): partial(_matmul, slots=Slots(weight=3, zero=5)),
    (_MS, "FusedConv"): partial(_conv, slots=Slots(bias=2)),
    (_MS, "FusedGemm"): partial(_matmul, slots=Slots(bias=2)),
    (_MS, "FusedMatMul"): partial(_matmul, slots=Slots()),
    (_MS, "QGemm"): partial(_matmul, slots=Slots(weight=3, zero=5, bias=6)),
}

_FLOW = "control flow: what runs depends on the input"
_RECURRENT = "recurrent operators are not counted"
UNCOUNTED: dict[tuple[str, str], str] = {
    **{("", name): _FLOW for name in ("If", "Loop", "Scan", "SequenceMap")},
    **{("", name): _RECURRENT for name in ("LSTM", "GRU", "RNN")},
    **{("", name): "the operator has no rule" for name in ("Attention", "DeformConv", "Einsum", "DFT", "STFT")},
}

# Contrib operators that multiply and accumulate nothing; every other operator of a foreign domain is unknown.
FREE: frozenset[tuple[str, str]] = frozenset(
    (_MS, name)
    for name in (
        "BiasGelu", "DequantizeLinear", "FastGelu", "Gelu", "QLinearAdd", "QLinearAveragePool", "QLinearConcat",
        "QLinearGlobalAveragePool", "QLinearLeakyRelu", "QLinearMul", "QLinearSigmoid", "QLinearSoftmax",
        "QuantizeLinear", "QuickGelu", "SkipLayerNormalization",
    )
)  # fmt: skip
