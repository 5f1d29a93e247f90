"""Constants that stay computed, so that a file keeps the type in which it stores its weights.

Weights stored as float16, bfloat16 or int8 become floats by ``Cast``, ``Mul`` or ``DequantizeLinear``. Folding these
would make the file two to four times as large, so the nodes stay; the analyses see the numbers that they compute, and
what is cut from the result is cut from the stored tensors behind it.

Source: ONNX operators Cast-13, DequantizeLinear-21, Transpose-13, Unsqueeze-13, multidirectional broadcasting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir

Array = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int, ...]
Axes = list[dict[int, int]]
"""For each operand: axis of the result -> axis of the operand, where that is longer than 1."""


def evaluate(node: ir.Node, how: FromConstants, arrays: Sequence[Array]) -> Array:
    """Compute what a node makes of constants, in the type of its output."""
    result = how.value(node, arrays)
    dtype = node.outputs[0].dtype
    return result if dtype is None else result.astype(dtype.numpy(), copy=False)


def operand_axes(node: ir.Node, how: FromConstants, arrays: Sequence[Array]) -> Axes | None:
    """Return where the axes of a node's result lie in its operands; None where it cannot be cut along an axis."""
    if any(a.dtype.kind in "OSUc" for a in arrays):
        return None
    return how.axes(node, [a.shape for a in arrays])


def _dequantize(node: ir.Node, arrays: Sequence[Array]) -> Array:
    # In float32 as ONNX Runtime does it: float64 here would make constants that no session ever sees.
    x, scale = arrays[0].astype(np.float32), arrays[1].astype(np.float32)
    zero = arrays[2].astype(np.float32) if len(arrays) > 2 else np.zeros_like(scale)
    # One scale for all stays a scalar or a single number, which broadcasts whatever the axis is.
    if scale.ndim == 1 and scale.size > 1:
        axis = node.attributes.get_int("axis", 1) % x.ndim
        line = [-1 if k == axis else 1 for k in range(x.ndim)]
        scale, zero = scale.reshape(line), zero.reshape(line)
    return (x - zero.reshape(scale.shape)) * scale


def _dequantized_axes(node: ir.Node, shapes: Sequence[Shape]) -> Axes | None:
    if node.attributes.get_int("block_size", 0):
        return None  # scales by block cannot be cut along an axis
    whole = {k: k for k, n in enumerate(shapes[0]) if n > 1}
    axis = node.attributes.get_int("axis", 1) % max(len(shapes[0]), 1)
    return [whole, *({axis: 0} if shape and shape[0] > 1 else {} for shape in shapes[1:])]


def _broadcast_axes(_: ir.Node, shapes: Sequence[Shape]) -> Axes:
    rank = max(len(shape) for shape in shapes)
    return [{k + rank - len(shape): k for k, n in enumerate(shape) if n > 1} for shape in shapes]


def _transposed_axes(node: ir.Node, shapes: Sequence[Shape]) -> Axes:
    return [dict(enumerate(_perm(node, len(shapes[0]))))]


def _perm(node: ir.Node, rank: int) -> list[int]:
    return list(node.attributes.get_ints("perm", range(rank)[::-1]))


def _unsqueezed_axes(node: ir.Node, shapes: Sequence[Shape]) -> Axes | None:
    """Match the axes that are longer than 1, in order."""
    shape = node.outputs[0].shape
    if shape is None or not shape.is_static():
        return None
    after = [(k, n) for k, n in enumerate(shape) if n != 1]
    before = [(k, n) for k, n in enumerate(shapes[0]) if n != 1]
    if [n for _, n in after] != [n for _, n in before]:
        return None
    return [{a: b for (a, _), (b, _) in zip(after, before, strict=True)}, *({} for _ in shapes[1:])]


def _reshaped(node: ir.Node, arrays: Sequence[Array]) -> Array:
    shape = node.outputs[0].shape
    assert shape is not None  # noqa: S101 - its axes were asked for first
    return arrays[0].reshape(shape.numpy())


def _arithmetic(function: Callable[[Array, Array], Array]) -> Callable[[ir.Node, Sequence[Array]], Array]:
    def value(_: ir.Node, arrays: Sequence[Array]) -> Array:
        # A division by zero is the model's own; where a rule needs finite numbers, shrink refuses the tensor by name.
        with np.errstate(all="ignore"):
            return function(arrays[0], arrays[1])

    return value


@dataclass(frozen=True)
class FromConstants:
    """How an operator makes a constant of constants.

    Attributes:
        value: The result for (node, arrays). axes: Where the axes of the result lie, for (node, shapes).
    """

    value: Callable[[ir.Node, Sequence[Array]], Array]
    axes: Callable[[ir.Node, Sequence[Shape]], Axes | None]


SAME = FromConstants(lambda _, arrays: arrays[0], _broadcast_axes)
DEQUANTIZED = FromConstants(_dequantize, _dequantized_axes)
ADDED, DIVIDED, MULTIPLIED, SUBTRACTED = (
    FromConstants(_arithmetic(function), _broadcast_axes) for function in (np.add, np.divide, np.multiply, np.subtract)
)
TRANSPOSED = FromConstants(lambda node, arrays: arrays[0].transpose(_perm(node, arrays[0].ndim)), _transposed_axes)
RESHAPED = FromConstants(_reshaped, _unsqueezed_axes)
