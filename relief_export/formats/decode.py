"""The decoding operators of packed models in NumPy, for readers that want the weights back without a runtime.

Operators are evaluated in the forms that the writer uses; a node in any other form stays a node. Nothing is allocated
before its size, and that of all values alive, is compared with the bytes of the file, so a hostile model cannot ask for
more.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

from relief_export.errors import IntegrityError
from relief_export.formats.onnx_file import check_claim, check_total, graphs

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
    if indices.size and (indices.min() < -len(table) or indices.max() >= len(table)):
        raise ValueError(f"an index is outside the table of {len(table)}")
    return [table[indices]]


def _matmul_integer(inputs: list[Array], _: Attributes) -> list[Array]:
    return [np.asarray(np.matmul(*(part.astype(np.int32) for part in inputs)))]


def _reshape(inputs: list[Array], _: Attributes) -> list[Array]:
    data, shape = inputs
    return [data.reshape([data.shape[i] if size == 0 else size for i, size in enumerate(shape.tolist())])]


def _compress(inputs: list[Array], _: Attributes) -> list[Array]:
    data, mask = inputs
    return [data[: len(mask)][mask[: len(data)]]]


OPERATORS: dict[str, Callable[[list[Array], Attributes], list[Array]]] = {
    "BitShift": _elementwise(np.right_shift),
    "BitwiseAnd": _elementwise(np.bitwise_and),
    "Cast": _cast,
    "Compress": _compress,
    "Concat": lambda inputs, _: [np.concatenate(inputs)],
    "ConstantOfShape": _constant_of_shape,
    "CumSum": lambda inputs, _: [np.cumsum(inputs[0], dtype=inputs[0].dtype)],
    "Gather": _gather,
    "GatherElements": _gather,
    "Identity": lambda inputs, _: inputs,
    "Less": _elementwise(np.less),
    "MatMul": _elementwise(np.matmul),
    "MatMulInteger": _matmul_integer,
    "MaxUnpool": _max_unpool,
    "Mod": _elementwise(np.mod),
    "Mul": _elementwise(np.multiply),
    "NonZero": lambda inputs, _: [np.stack(np.nonzero(inputs[0])).astype(np.int64)],
    "Reshape": _reshape,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Sign": lambda inputs, _: [np.sign(inputs[0])],
    "Split": _split,
    "Sub": _elementwise(np.subtract),
}
_NUMBERS = {getattr(onnx.TensorProto, name) for name in ("FLOAT", "INT32", "INT64")}
ATTRIBUTES: dict[str, Callable[[Attributes], bool]] = {
    "BitShift": lambda attributes: attributes == {"direction": b"RIGHT"},
    "Cast": lambda attributes: attributes.keys() == {"to"} and attributes["to"] in _NUMBERS,
    "Compress": lambda attributes: attributes == {"axis": 0},
    "Concat": lambda attributes: attributes == {"axis": 0},
    "ConstantOfShape": lambda attributes: attributes.keys() <= {"value"},
    "MaxUnpool": lambda attributes: attributes == {"kernel_shape": [1]},
}
"""What is asked of an operator's attributes; others must have none."""
_VECTORS = {"Compress", "CumSum", "GatherElements", "NonZero"}
"""Operators that are evaluated for vectors only, that is without an axis."""


def _is_known(op: str, operands: list[Array], attributes: Attributes) -> bool:
    """Say whether a node has a form that the writer uses, and that the functions here evaluate as ONNX does."""
    allowed = ATTRIBUTES.get(op)
    if (allowed is None and attributes) or (allowed is not None and not allowed(attributes)):
        return False
    if op in _VECTORS:
        return operands[0].ndim == 1
    if op in {"MatMul", "MatMulInteger"}:
        bits = op == "MatMul" or all(part.dtype == np.uint8 for part in operands)
        return len(operands) == 2 and operands[0].ndim == 1 and operands[1].ndim <= 2 and bits
    if op == "Mod":
        return all(part.dtype.kind in "iu" for part in operands)
    return op != "Split" or len(operands) == 2


def _claim(op: str, inputs: list[Array]) -> int:
    """Return how many elements the outputs of ``op`` have."""
    if op in {"ConstantOfShape", "MaxUnpool"}:
        return int(np.prod(inputs[-1].tolist(), dtype=object))
    if op in {"Gather", "GatherElements"}:
        return int(inputs[1].size * np.prod(inputs[0].shape[1:], dtype=object))
    if op == "Concat":
        return sum(part.size for part in inputs)
    if op in {"BitShift", "BitwiseAnd", "Less", "Mod", "Mul", "Sub"}:
        return int(np.prod(np.broadcast_shapes(inputs[0].shape, inputs[1].shape), dtype=object))
    return max(part.size for part in inputs)


def _array(tensor: onnx.TensorProto, where: str) -> Array:
    try:
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise IntegrityError(f"{where}, tensor {tensor.name!r}: damaged data ({reason})") from None


def _uses(proto: onnx.ModelProto) -> Counter[str]:
    """Count how often each value is read, by nodes and as an output, in subgraphs too."""
    uses: Counter[str] = Counter()
    for graph in graphs(proto.graph):
        uses.update(name for node in graph.node for name in node.input)
        uses.update(value.name for value in graph.output)
    return uses


def decode(proto: onnx.ModelProto, stored: int, where: str) -> None:
    """Evaluate, in place, every decoding node that depends on initializers alone; its outputs become initializers.

    Raises:
        IntegrityError: The operands of such a node do not fit, or claim more memory than ``stored`` bytes account for.
    """
    inputs = {value.name for value in proto.graph.input}
    known = {tensor.name: _array(tensor, where) for tensor in proto.graph.initializer if tensor.name not in inputs}
    uses = _uses(proto)
    rest: list[onnx.NodeProto] = []
    made: dict[str, Array] = {}
    for node in proto.graph.node:
        operands = [known[name] for name in node.input if name in known]
        if node.domain or node.op_type not in OPERATORS or len(operands) < len(node.input):
            rest.append(node)
            continue
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if not _is_known(node.op_type, operands, attributes):
            rest.append(node)
            continue
        what = f"{where}, {node.op_type} {node.output[0]!r}"
        try:
            claim = _claim(node.op_type, operands)
            check_claim(claim, 8, stored, what)
            check_total(8 * claim + sum(array.nbytes for array in made.values()), stored, what)
            with np.errstate(all="ignore"):  # a mask of a model's own may well overflow
                results = OPERATORS[node.op_type](operands, attributes)
        except (ValueError, TypeError, IndexError, KeyError, ZeroDivisionError, OverflowError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise IntegrityError(f"{where}: {node.op_type} {node.output[0]!r} is damaged ({reason})") from None
        known.update(zip(node.output, results, strict=False))
        made.update(zip(node.output, results, strict=False))
        uses.subtract(node.input)
        for name in {*node.input, *node.output}:
            if uses[name] <= 0:  # nobody reads it any more
                known.pop(name, None)
                made.pop(name, None)
    del proto.graph.node[:]
    proto.graph.node.extend(rest)
    wanted = _uses(proto)
    proto.graph.initializer.extend(numpy_helper.from_array(made[name], name) for name in made if name in wanted)
