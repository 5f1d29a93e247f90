"""The decoding operators of packed models in NumPy, for readers that want the weights back without a runtime.

Nothing is allocated before its size is compared with the bytes of the file, so a hostile model cannot ask for more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

from relief_export.errors import IntegrityError
from relief_export.formats.container import check_claim

if TYPE_CHECKING:
    from collections.abc import Callable

Array: TypeAlias = np.ndarray[Any, Any]
Attributes: TypeAlias = dict[str, Any]


def _elementwise(function: Callable[[Array, Array], Array]) -> Callable[[list[Array], Attributes], list[Array]]:
    return lambda inputs, _: [np.asarray(function(inputs[0], inputs[1]))]


def _cast(inputs: list[Array], attributes: Attributes) -> list[Array]:
    return [inputs[0].astype(helper.tensor_dtype_to_np_dtype(attributes["to"]))]


def _constant_of_shape(inputs: list[Array], attributes: Attributes) -> list[Array]:
    value = numpy_helper.to_array(attributes["value"]) if "value" in attributes else np.zeros(1, np.float32)
    return [np.full(inputs[0].tolist(), value[0])]


def _split(inputs: list[Array], _: Attributes) -> list[Array]:
    data, sizes = inputs
    if sizes.min() < 0 or sizes.sum() != len(data):
        raise ValueError(f"Split into {sizes.sum()} of {len(data)}")
    return np.split(data, np.cumsum(sizes)[:-1])


def _check_positions(indices: Array, count: int) -> None:
    if indices.size and (indices[0] < 0 or indices[-1] >= count or (np.diff(indices) <= 0).any()):
        raise ValueError(f"positions are not ascending within 0 to {count - 1}")


def _scatter_elements(inputs: list[Array], _: Attributes) -> list[Array]:
    data, indices, updates = inputs
    if data.ndim != 1 or indices.shape != updates.shape:
        raise ValueError("positions and values differ in number")
    _check_positions(indices, len(data))
    data = data.copy()
    data[indices] = updates
    return [data]


def _scatter_nd(inputs: list[Array], _: Attributes) -> list[Array]:
    data, indices, updates = inputs
    if indices.shape != (len(updates), 1) or updates.shape[1:] != data.shape[1:]:
        raise ValueError("positions and values differ in number")
    _check_positions(indices[:, 0], len(data))
    data = data.copy()
    data[indices[:, 0]] = updates
    return [data]


def _max_unpool(inputs: list[Array], _: Attributes) -> list[Array]:
    updates, indices, shape = inputs
    if updates.shape != indices.shape or updates.ndim != 3 or shape.tolist()[:2] != [1, 1] or shape.size != 3:
        raise ValueError("positions and values differ in number")
    _check_positions(indices[0, 0], int(shape[2]))
    data = np.zeros(shape.tolist(), updates.dtype)
    data[0, 0, indices[0, 0]] = updates[0, 0]
    return [data]


def _gather(inputs: list[Array], _: Attributes) -> list[Array]:
    table, indices = inputs
    if indices.size and (indices.min() < 0 or indices.max() >= len(table)):
        raise ValueError(f"an index is outside the table of {len(table)}")
    return [table[indices]]


def _gather_elements(inputs: list[Array], _: Attributes) -> list[Array]:
    if any(part.ndim != 1 for part in inputs):
        raise ValueError("a codebook or its indices have several axes")
    return _gather(inputs, {})


def _matmul_integer(inputs: list[Array], _: Attributes) -> list[Array]:
    if any(part.dtype != np.uint8 for part in inputs):
        raise ValueError("words are not of bits")
    return [np.asarray(np.matmul(*(part.astype(np.int32) for part in inputs)))]


def _compress(inputs: list[Array], _: Attributes) -> list[Array]:
    data, mask = inputs
    return [data[: len(mask)][mask[: len(data)]]]


OPERATORS: dict[str, Callable[[list[Array], Attributes], list[Array]]] = {
    "Add": _elementwise(np.add),
    "BitwiseAnd": _elementwise(np.bitwise_and),
    "BitShift": _elementwise(np.right_shift),
    "Cast": _cast,
    "Compress": _compress,
    "Concat": lambda inputs, _: [np.concatenate(inputs)],
    "ConstantOfShape": _constant_of_shape,
    "CumSum": lambda inputs, _: [np.cumsum(inputs[0], dtype=inputs[0].dtype)],
    "Div": _elementwise(np.floor_divide),
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Identity": lambda inputs, _: inputs,
    "Less": _elementwise(np.less),
    "MatMul": _elementwise(np.matmul),
    "MatMulInteger": _matmul_integer,
    "MaxUnpool": _max_unpool,
    "Mod": _elementwise(np.mod),
    "Mul": _elementwise(np.multiply),
    "NonZero": lambda inputs, _: [np.stack(np.nonzero(inputs[0])).astype(np.int64)],
    "Reshape": lambda inputs, _: [inputs[0].reshape(inputs[1].tolist())],
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Sign": lambda inputs, _: [np.sign(inputs[0])],
    "Split": _split,
    "Sub": _elementwise(np.subtract),
}


def _claim(op: str, inputs: list[Array]) -> int:
    """Return how many elements the outputs of ``op`` have."""
    if op in {"ConstantOfShape", "MaxUnpool"}:
        return int(np.prod(inputs[-1].tolist(), dtype=object))
    if op in {"Gather", "GatherElements"}:
        return int(inputs[1].size * np.prod(inputs[0].shape[1:], dtype=object))
    if op == "Concat":
        return sum(part.size for part in inputs)
    if op in {"Add", "BitShift", "BitwiseAnd", "Div", "Less", "Mod", "Mul", "Sub"}:
        return int(np.prod(np.broadcast_shapes(inputs[0].shape, inputs[1].shape), dtype=object))
    return max(part.size for part in inputs)


def decode(proto: onnx.ModelProto, stored: int, where: str) -> None:
    """Evaluate, in place, every node that depends on initializers alone; its outputs become initializers.

    Raises:
        IntegrityError: Such a node is none of the decoding operators, or its operands do not fit.
    """
    inputs = {value.name for value in proto.graph.input}
    known = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer if tensor.name not in inputs
    }
    rest: list[onnx.NodeProto] = []
    made: dict[str, Array] = {}
    for node in proto.graph.node:
        if node.domain or node.op_type not in OPERATORS or not all(name in known for name in node.input):
            rest.append(node)
            continue
        operands = [known[name] for name in node.input]
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        try:
            check_claim(_claim(node.op_type, operands), 8, stored, f"{where}, {node.op_type} {node.output[0]!r}")
            results = OPERATORS[node.op_type](operands, attributes)
        except (ValueError, TypeError, IndexError, KeyError, ZeroDivisionError, OverflowError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise IntegrityError(f"{where}: {node.op_type} {node.output[0]!r} is damaged ({reason})") from None
        known.update(zip(node.output, results, strict=False))
        made.update(zip(node.output, results, strict=False))
    del proto.graph.node[:]
    proto.graph.node.extend(rest)
    wanted = {name for node in rest for name in node.input} | {value.name for value in proto.graph.output}
    proto.graph.initializer.extend(numpy_helper.from_array(made[name], name) for name in made if name in wanted)
