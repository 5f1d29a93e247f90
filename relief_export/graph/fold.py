"""Fold what is constant: masks, weight chains and shapes, then batch norm.

Batch norm after a linear map ``y = W x + b`` is ``γ (y - μ) / sqrt(σ² + ε) + β = (s W) x + (s (b - μ) + β)`` with
``s = γ / sqrt(σ² + ε)``, one number an output channel; a running variance of exactly 0 is legal, since ε is positive.

Source: ONNX operators BatchNormalization-15 (inference), Reshape-14.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from relief_export.errors import UnsupportedModelError
from relief_export.graph.initializers import add_initializer, drop_unused
from relief_export.graph.targets import plain_reshapes

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Folding one of these can make a large tensor out of a small one, or turn int8 weights into float ones.
_GROWING = frozenset({"ConstantOfShape", "Expand", "Tile", "Range", "EyeLike", "OneHot", "DequantizeLinear"})
_SMALL = 4096  # elements: shapes, indices and per-channel vectors stay below it
_SHARED = 64  # elements that may be stored once more
_UNLIMITED = 1 << 62

# Linear operator -> axis of its weight (second input) that counts output channels.
_OUTPUT_AXIS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1}


def simplify(model: ir.Model) -> ir.Model:
    """Return a copy with inlined functions, folded constants, lifted weights, known shapes and plain Reshape targets.

    Names of initializers that are not folded, and names, types and shapes of inputs and outputs are not changed.

    Raises:
        UnsupportedModelError: The model needs an opset before 13.
    """
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if opset is not None and opset < 13:
        raise UnsupportedModelError(f"the model uses opset {opset}: convert it to opset 13 or later first")
    copy = model.clone()
    if copy.functions:
        common.InlinePass()(copy)
    _skip_identities(copy.graph)
    fold_constants(
        copy,
        onnx_shape_inference=True,
        input_size_limit=_UNLIMITED,
        output_size_limit=_UNLIMITED,
        should_fold=_may_fold,
    )
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(copy)
    common.RemoveUnusedNodesPass()(copy)
    infer_shapes(copy)
    if plain_reshapes(copy):
        infer_shapes(copy)
    common.RemoveUnusedNodesPass()(copy)
    drop_unused(copy.graph)
    return copy


def _skip_identities(graph: ir.Graph) -> None:
    """Let what reads a constant behind an Identity read the constant itself, in place."""
    for node in graph:
        if node.op_type == "Identity" and node.domain == "" and constant_array(node.inputs[0]) is not None:
            source, value = node.inputs[0], node.outputs[0]
            if source is not None and not value.is_graph_output():
                value.replace_all_uses_with(source)


def fold(model: ir.Model) -> ir.Model:
    """Return a simplified copy in which every batch norm behind a linear operator is part of its weights."""
    copy = simplify(model)
    for node in list(copy.graph):
        if node.op_type == "BatchNormalization" and node.domain == "":
            _fold_batch_norm(copy.graph, node)
    common.RemoveUnusedNodesPass()(copy)
    drop_unused(copy.graph)
    restore_interface(copy, model)
    return copy


def restore_interface(model: ir.Model, original: ir.Model) -> None:
    """Give inputs and outputs the shapes as they were stated, without what inference added, in place."""
    values = (*model.graph.inputs, *model.graph.outputs)
    for value, stated in zip(values, (*original.graph.inputs, *original.graph.outputs), strict=True):
        value.shape = None if stated.shape is None else stated.shape.copy()


def infer_shapes(model: ir.Model) -> None:
    """Fill in the shapes of intermediate values, in place."""
    common.ShapeInferencePass(data_prop=True)(model)


def _may_fold(node: ir.Node) -> bool | None:
    """Refuse folding that grows the model; None leaves the decision to the folder's own rules."""
    arrays = [(v, t) for v in node.inputs if v is not None and (t := ir.convenience.get_const_tensor(v)) is not None]
    staying = max((t.size for v, t in arrays if len(v.uses()) > 1 or v.is_graph_output()), default=0)
    if staying > max(_SHARED, sum(t.size for v, t in arrays if len(v.uses()) == 1)):
        return False
    if node.op_type in _GROWING and node.domain == "":
        size = node.outputs[0].shape
        return None if size is not None and size.is_static() and _elements(size) <= _SMALL else False
    return None


def _elements(shape: ir.Shape) -> int:
    return int(np.prod([d for d in shape if isinstance(d, int)], dtype=np.int64))


def constant_array(value: ir.Value | None) -> NDArray[np.generic] | None:
    """Return the array of an initializer that no caller can override, or None."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def is_read(value: ir.Value) -> bool:
    """Tell whether a node reads a value or the graph returns it."""
    return bool(value.uses()) or value.is_graph_output()


def _fold_batch_norm(graph: ir.Graph, node: ir.Node) -> None:
    source = node.inputs[0]
    linear = source.producer() if source is not None else None
    if source is None or linear is None or linear.op_type not in _OUTPUT_AXIS or linear.domain != "":
        return
    used_elsewhere = len(source.uses()) != 1 or source.is_graph_output() or any(is_read(o) for o in node.outputs[1:])
    weight_value = linear.inputs[1]
    parameters = [constant_array(v) for v in node.inputs[1:5]]
    weight, bias = constant_array(weight_value), _bias(linear)
    if used_elsewhere or weight is None or weight_value is None or bias is None or any(p is None for p in parameters):
        return
    if not weight_value.is_initializer() or len(weight_value.uses()) != 1 or weight_value.is_graph_output():
        return  # a shared weight would have to be stored twice
    if node.attributes.get_int("training_mode", 0):
        return  # it would use the statistics of the batch
    gamma, beta, mean, variance = (p.astype(np.float64) for p in parameters if p is not None)
    scale = gamma / np.sqrt(variance + _float(node, "epsilon", 1e-5))
    axis = _OUTPUT_AXIS[linear.op_type]
    if linear.op_type == "Gemm":
        if (
            _float(linear, "alpha", 1.0) != 1
            or _float(linear, "beta", 1.0) != 1
            or linear.attributes.get_int("transA", 0) != 0
        ):
            return
        axis = 0 if linear.attributes.get_int("transB", 0) else 1
    if linear.op_type == "ConvTranspose" and linear.attributes.get_int("group", 1) != 1:
        return
    along = [1] * weight.ndim
    along[axis] = -1
    folded = (weight.astype(np.float64) * scale.reshape(along)).astype(weight.dtype)
    shift = (scale * (bias.astype(np.float64) - mean) + beta).astype(weight.dtype)
    name = str(weight_value.name)
    linear.replace_input_with(1, None)
    del graph.initializers[name]
    linear.replace_input_with(1, add_initializer(graph, name, folded))
    bias_value = add_initializer(graph, f"{name.removesuffix('.weight')}.bias", shift)
    linear.resize_inputs(3)
    linear.replace_input_with(2, bias_value)
    result, is_output = node.outputs[0], node.outputs[0].is_graph_output()
    result.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if is_output:
        source.name = result.name  # outputs keep their names


def _bias(linear: ir.Node) -> NDArray[np.generic] | None:
    """Return the bias of a linear node as a vector (zeros where it has none), None where it is no constant vector."""
    channels = linear.outputs[0].shape
    if len(linear.inputs) < 3 or linear.inputs[2] is None:
        if channels is None or not isinstance(channels[1], int):
            return None
        return np.zeros(channels[1])
    bias = constant_array(linear.inputs[2])
    return bias if bias is not None and bias.ndim == 1 else None


def _float(node: ir.Node, name: str, default: float) -> float:
    return float(node.attributes.get_float(name, default))
