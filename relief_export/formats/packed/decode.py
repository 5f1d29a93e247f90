"""Packed files read back: ONNX Runtime evaluates the decoding nodes one at a time, under guard.

What a node computes is ONNX Runtime's business alone, so a reader's weights are those of a session by construction.
What is ours is the guard: a file from a stranger may ask for anything, and every node's outputs are compared with the
bytes of the file before the runtime is asked for them. docs/formats.md lists attack and answer.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

from relief_export.errors import IntegrityError
from relief_export.formats import runtime
from relief_export.formats.onnx_file import check_claim, check_total, graphs

if TYPE_CHECKING:
    from collections.abc import Callable

Array: TypeAlias = np.ndarray[Any, Any]

# Elements of all outputs of an operator, from its inputs.
_Claim: TypeAlias = "Callable[[list[Array]], int]"


def _largest(inputs: list[Array]) -> int:
    return max(array.size for array in inputs)


def _broadcast(inputs: list[Array]) -> int:
    return math.prod(np.broadcast_shapes(*(array.shape for array in inputs)))


def _shaped(inputs: list[Array]) -> int:
    return math.prod(int(size) for size in inputs[0].ravel())


def _product(inputs: list[Array]) -> int:
    first, second = inputs[:2]
    columns = int(second.shape[-1]) if second.ndim > 1 else 1
    return int(math.prod(first.shape[:-1]) * math.prod(second.shape[:-2]) * columns)


def _looked_up(inputs: list[Array]) -> int:
    return int(inputs[1].size * max(1, inputs[0].size // max(1, min(inputs[0].shape, default=1))))


OPERATORS: dict[str, _Claim] = {
    "BitShift": _broadcast,
    "BitwiseAnd": _broadcast,
    "Cast": _largest,
    "Compress": _largest,
    "Concat": lambda inputs: sum(array.size for array in inputs),
    "ConstantOfShape": _shaped,
    "CumSum": _largest,
    "Div": _broadcast,
    "Expand": lambda inputs: max(inputs[0].size, 1) * math.prod(int(size) for size in inputs[1].ravel()),
    "Gather": _looked_up,
    "GatherElements": lambda inputs: inputs[1].size,
    "Less": _broadcast,
    "MatMul": _product,
    "MatMulInteger": _product,
    "Mod": _broadcast,
    "NonZero": lambda inputs: inputs[0].size * max(1, inputs[0].ndim),
    "Reshape": _largest,
    "ScatterElements": _largest,
    "ScatterND": _largest,
    "Sign": _largest,
    "Split": _largest,
    "Sub": _broadcast,
}
"""What a decoding subgraph consists of, and how many elements each operator gives."""


def decode(proto: onnx.ModelProto, stored: int, where: str) -> None:
    """Evaluate, in place, every decoding node that depends on initializers alone; its outputs become initializers.

    Args:
        proto: A packed model, its external data loaded.
        stored: Bytes of its files.
        where: What messages call it.

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
        # What depends on an input, or is no decoding operator, is the network itself.
        if len(operands) < len(node.input) or not _is_ours(node, operands):
            rest.append(node)
            continue
        results = _evaluate(node, operands, made, proto, stored, where)
        known |= results
        made |= results
        uses.subtract(node.input)
        for name in {*node.input, *node.output}:
            if uses[name] <= 0:  # nothing uses it any more
                known.pop(name, None)
                made.pop(name, None)
    del proto.graph.node[:]
    proto.graph.node.extend(rest)
    wanted = _uses(proto)
    proto.graph.initializer.extend(numpy_helper.from_array(made[name], name) for name in made if name in wanted)


def _is_ours(node: onnx.NodeProto, operands: list[Array]) -> bool:
    """Return True if ``node`` may belong to a decoding subgraph; others stay for whoever runs the model."""
    if node.domain or node.op_type not in OPERATORS or not operands:
        return False
    if node.op_type == "Cast":
        return all(attribute.i != onnx.TensorProto.STRING for attribute in node.attribute)
    # Decoding multiplies by a vector only; a product of matrices belongs to the network.
    return not node.op_type.startswith("MatMul") or operands[0].ndim == 1


def _evaluate(  # noqa: PLR0917 - a node, its operands, and what its outputs are compared with
    node: onnx.NodeProto, operands: list[Array], made: dict[str, Array], proto: onnx.ModelProto, stored: int, where: str
) -> dict[str, Array]:
    what = f"{where}, {node.op_type} {node.output[0]!r}"
    try:
        # Before the runtime is asked, which would allocate whatever the node claims.
        claim = OPERATORS[node.op_type](operands)
    except (ValueError, IndexError) as error:
        raise IntegrityError(f"{what} is damaged ({error}): do not use this file") from None
    # Eight bytes is the widest type that these operators give.
    check_claim(claim, 8, stored, what)
    check_total(8 * claim + sum(array.nbytes for array in made.values()), stored, what)
    names = [f"i{index}" for index in range(len(operands))]
    outs = [f"o{index}" for index in range(len(node.output))]
    # Names of the file do not matter here, and an operand may occur twice under one name.
    alone = onnx.NodeProto(op_type=node.op_type, input=names, output=outs, attribute=node.attribute)
    graph = helper.make_graph(
        [alone],
        "decode",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in zip(names, operands, strict=True)
        ],
        [onnx.ValueInfoProto(name=name) for name in outs],
    )
    model = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    session = runtime.load(model.SerializeToString(), name=what, optimised=False, threads=1, fault=IntegrityError)
    try:
        results = session.run(None, dict(zip(names, operands, strict=True)))
    except Exception as error:  # noqa: BLE001 - the runtime's exceptions share no other base
        raise IntegrityError(f"{what} is damaged ({runtime.reason(error)}): do not use this file") from None
    return dict(zip(node.output, results, strict=True))


def _array(tensor: onnx.TensorProto, where: str) -> Array:
    try:
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise IntegrityError(f"{where}, tensor {tensor.name!r}: damaged data ({reason})") from None


def _uses(proto: onnx.ModelProto) -> Counter[str]:
    """Count how often each value is used, by nodes and as an output, in subgraphs too."""
    uses: Counter[str] = Counter()
    for graph in graphs(proto.graph):
        uses.update(name for node in graph.node for name in node.input)
        uses.update(value.name for value in graph.output)
    return uses
