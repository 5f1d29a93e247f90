"""A model made ready for analysis: one opset, no functions, constants folded, shapes that follow from the inputs.

Fold what is constant: masks, weight chains and shapes, then batch norm.

Batch norm after a linear map ``y = W x + b`` is ``γ (y - μ) / sqrt(σ² + ε) + β = (s W) x + (s (b - μ) + β)`` with
``s = γ / sqrt(σ² + ε)``, one number an output channel; a running variance of exactly 0 is legal, since ε is positive.

Source: ONNX operators BatchNormalization-15 (inference), Reshape-14.

Static shapes of every value of a model at one batch size, for what counts bytes and operations.
"""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from onnxscript.version_converter import ConvertVersionPass

from relief_export.errors import InputError, UnsupportedModelError
from relief_export.graph.initializers import (
    add_initializer,
    constant_array,
    constant_tensor,
    drop_unused,
    is_read,
    node_graphs,
)
from relief_export.graph.ops import operator
from relief_export.graph.reshape_targets import plain_reshapes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from numpy.typing import NDArray

_OPSET = 13
"""Older models are converted to this version, the first in which Split, Squeeze and ReduceSum have axes as inputs."""
_METADATA = 512
"""Bytes that folding may add as integers or truth values: shapes, amounts of padding, axes. Weights never grow."""
_UNLIMITED = 1 << 62
_LOG = logging.getLogger(__name__)

_DISGUISES = {("", "GroupNormalization"): "InstanceNormalization", ("ai.onnx.ml", "ZipMap"): "Unknown"}
"""Operators that shape inference sees as others: it knows no GroupNormalization, whose output has the shape of its
input as here, and gives ZipMap's output a type, a map, that onnx_ir cannot hold."""


def simplify(model: ir.Model) -> ir.Model:
    """Return a copy with inlined functions, folded constants, lifted weights, known shapes and plain Reshape targets.

    Shapes follow from the inputs and constants alone. What a file states of the shapes of intermediate values and of
    outputs is forgotten: exporters leave batch 1 there, runtimes only warn, and a Reshape target read from it computes
    something else. Models of an opset before 13 are converted. Names of initializers that are not folded, and names,
    types and shapes of inputs and outputs are not changed.

    Raises:
        UnsupportedModelError: The model needs an opset before 13 and cannot be converted.
    """
    with _library_logs():
        copy = _current(model)
        if copy.functions:
            common.InlinePass()(copy)
        _hold_weights(copy)
        forget_shapes(copy)
        infer_shapes(copy)
        _skip_identities(copy.graph)
        plain_reshapes(copy)  # lengths that follow from a target are numbers to the folder
        common.RemoveUnusedNodesPass()(copy)
        unnamed = [node for graph in copy.graphs() for node in graph if not node.name]
        with suppress(RuntimeError):  # the folder stumbles over an operator: what it has folded until there stands
            fold_constants(
                copy,
                onnx_shape_inference=True,
                # Whether a result is too large is decided by _may_fold, which compares it with what it replaces.
                input_size_limit=_UNLIMITED,
                output_size_limit=_UNLIMITED,
                should_fold=partial(_may_fold, paying=_paying(copy.graph)),
            )
        for node in unnamed:
            node.name = ""  # the folder names them, and a file would store that
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(copy)
        common.RemoveUnusedNodesPass()(copy)
        forget_shapes(copy)  # lengths that got a name before more was known keep it otherwise
        infer_shapes(copy)
        # Folding makes more targets known, and the shapes behind those follow only now.
        if plain_reshapes(copy):
            infer_shapes(copy)
        common.RemoveUnusedNodesPass()(copy)
    drop_unused(copy.graph)
    return copy


@contextmanager
def _library_logs() -> Iterator[list[logging.LogRecord]]:
    """Collect what onnx_ir and onnxscript log, tracebacks among it, instead of leaving it on stderr.

    They log what is no fault of the model's user (a value without a type, an operator that is not folded), and go on.
    """
    found: list[logging.LogRecord] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record)
            _LOG.debug("%s: %s", record.name, record.getMessage())

    collector = Collector()
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript")]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(collector)
        # Handlers of the root logger would print the records all the same.
        logger.propagate = False
    try:
        yield found
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.removeHandler(collector)
            logger.propagate = propagate


def _current(model: ir.Model) -> ir.Model:
    """Return a copy of a model in an opset that the rules are written for."""
    copy = model.clone()
    if "ai.onnx" in copy.opset_imports:  # the long name of the domain ""
        copy.opset_imports.setdefault("", copy.opset_imports.pop("ai.onnx"))
    constants = {v for v in copy.graph.inputs if not is_overridable(model, v)}
    if constants:  # version 4 of the format is the first in which a constant need not be listed as an input
        copy.ir_version = max(copy.ir_version, 4)
        for value in constants:
            copy.graph.inputs.remove(value)
    opset = copy.opset_imports.get("")
    if opset is not None and opset < _OPSET:
        _convert(copy, opset)
    return copy


def _convert(copy: ir.Model, opset: int) -> None:
    """Bring a model of an old opset to the rules' own, in place, with onnx's converter and what it leaves undone."""
    if opset < 9 and any(node.op_type == "Scan" and node.domain == "" for graph in copy.graphs() for node in graph):
        raise _unconverted(opset, "Scan went over a batch until version 8, which it no longer does")
    names = [[str(v.name) for v in group] for group in (copy.graph.inputs, copy.graph.outputs)]
    # The converter logs what went wrong and goes on, so the cause is taken from its log.
    with _library_logs() as logs:
        ConvertVersionPass(_OPSET, fallback=True)(copy)
    found = [[str(v.name) for v in group] for group in (copy.graph.inputs, copy.graph.outputs)]
    # For the same reason success is read from the result. Callers rely on the names of inputs and outputs.
    if copy.opset_imports.get("") != _OPSET or found != names:
        causes = [str(record.exc_info[1]) for record in logs if record.exc_info]
        raise _unconverted(opset, " ".join((causes or ["it changes the inputs or outputs"])[-1].split())[:200])
    for graph in copy.graphs():
        for node in list(graph):
            if node.op_type == "Resize" and node.domain == "":
                _restate_resize(node, opset)
            elif node.op_type == "Hardmax" and node.domain == "":
                _flatten_hardmax(graph, node)


def _unconverted(opset: int, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the model uses opset {opset}, and onnx's version converter cannot bring it to {_OPSET} ({reason}): "
        "export it again with a newer opset"
    )


def _restate_resize(node: ir.Node, opset: int) -> None:
    """Say in the words of today what a Resize or Upsample of an old opset did: the converter keeps its words.

    Up to version 10 the position ``i`` was read at ``i / scale``, and the nearest one was the one below, or above where
    the map becomes smaller (as ONNX Runtime does; the standard left it open). Today's defaults are other ones. In
    version 11 an empty ``scales`` said that there are sizes; today that is one input too many.

    Source: ONNX Runtime, core/providers/cpu/tensor/upsamplebase.h, NearestMode::SIMPLE.
    """
    if opset > 10:
        scales, sizes = [*node.inputs, None, None, None][2:4]
        array = constant_array(sizes)
        if sizes is not None and (array is None or array.size):
            node.replace_input_with(2, None)
        elif sizes is not None and scales is not None:
            node.resize_inputs(3)
        return
    node.replace_input_with(1, None)  # the region of interest that the converter makes up
    node.attributes["coordinate_transformation_mode"] = ir.AttrString("coordinate_transformation_mode", "asymmetric")
    if node.attributes.get_string("mode", "nearest") != "nearest":
        return
    factors = constant_array(node.inputs[2])
    smaller = np.zeros(1, np.bool_) if opset < 10 else None if factors is None else factors[factors != 1] < 1
    if smaller is None or smaller.any() != smaller.all():
        raise _unconverted(opset, f"the nearest pixel of {node.name or 'a Resize'} depends on the direction")
    rounding = "ceil" if smaller.any() else "floor"
    node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", rounding)


def _flatten_hardmax(graph: ir.Graph, node: ir.Node) -> None:
    """Give a Hardmax the matrix that it made of its input before version 13: the converter does it for Softmax only."""
    rows = ir.node("Flatten", [node.inputs[0]], {"axis": node.attributes.get_int("axis", 1)})
    found = ir.node("Hardmax", [rows.outputs[0]], {"axis": 1})
    shape = ir.node("Shape", [node.inputs[0]])
    graph.insert_before(node, [rows, found, shape])
    node.op_type = "Reshape"
    node.attributes.clear()
    node.resize_inputs(2)
    node.replace_input_with(0, found.outputs[0])
    node.replace_input_with(1, shape.outputs[0])


def is_overridable(model: ir.Model, value: ir.Value) -> bool:
    """Return True if a caller feeds this graph input, or may feed it in the place of its initializer.

    Before version 4 of the format every initializer had to be listed as an input, and runtimes take it for a constant.
    """
    return model.ir_version >= 4 or value.name not in model.graph.initializers


def _hold_weights(model: ir.Model) -> None:
    """Hold every initializer as one array, in place: a tensor inside a protobuf is copied whenever it is looked at."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.serde.TensorProtoTensor) and value.dtype != ir.DataType.STRING:
                tensor = value.const_value
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)


def forget_shapes(model: ir.Model, *, foreign: bool = False) -> None:
    """Drop the shapes that are stated for anything but the inputs and initializers of the main graph, in place.

    Args:
        model: The model.
        foreign: Leave those of operators of other domains, which nothing can infer.
    """
    for graph in model.graphs():
        for node in graph:
            if foreign and node.domain not in ("", "ai.onnx"):
                continue
            for value in node.outputs:
                value.shape = None
        if graph is not model.graph:
            for value in graph.inputs:  # a runtime wants to know the rank of what a loop carries
                value.shape = None if value.shape is None else ir.Shape([None] * len(value.shape))


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
    # A copy that came out larger is given up, but a converted one is kept, since the rules need its opset.
    converted = copy.opset_imports.get("") != model.opset_imports.get("")
    return copy if converted or file_size(copy) <= file_size(model) else model.clone()


def file_size(model: ir.Model) -> int:
    """Return about how many bytes a file of a model takes: its constants, nodes and functions, without descriptions."""
    stored: int = 0
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:  # and in protobuf the name, the axes, the type, and where each of them begins
            stored += int(value.const_value.nbytes) + len(name) + 2 * len(value.const_value.shape) + 8
    nodes = sum(int(ir.serde.serialize_node(node).ByteSize()) + 2 for node in model.graph)
    return stored + nodes + sum(int(ir.serde.serialize_function(f).ByteSize()) for f in model.functions.values())


def restore_interface(model: ir.Model, original: ir.Model) -> None:
    """Give inputs and outputs the shapes as they were stated, and other values what was stated of them, in place.

    A file states the type and shape of an intermediate value only where the original did: what inference adds would
    make it larger. Where a stated shape is not what follows from the inputs, the latter is written.
    """
    values = (*model.graph.inputs, *model.graph.outputs)
    # Constants that an old format lists as inputs were taken out of the copy, and the two must pair up.
    inputs = [v for v in original.graph.inputs if is_overridable(original, v)]
    for value, stated in zip(values, (*inputs, *original.graph.outputs), strict=True):
        value.shape = None if stated.shape is None else stated.shape.copy()
    known = {value.name: value for value in _inner_values(original)}
    for value in _inner_values(model):
        # The folder leaves notes on what it made, which a file would store.
        value.metadata_props.pop("pkg.onnxscript.optimizer.folded_from", None)
        before = known.get(value.name)
        if before is None or (before.type is None and before.shape is None):
            value.type = value.shape = None
        else:
            value.type = before.type if value.type is None else value.type
            value.shape = _restated(value.shape, before.shape)


def _inner_values(model: ir.Model) -> Iterator[ir.Value]:
    """Yield every value that a file may describe apart from the inputs and outputs of the main graph."""
    for graph in model.graphs():
        main = graph is model.graph
        yield from () if main else graph.inputs
        yield from (v for node in graph for v in node.outputs if not (main and v.is_graph_output()))


def _restated(computed: ir.Shape | None, stated: ir.Shape | None) -> ir.Shape | None:
    """Join what was computed of a shape with the names that were stated for its lengths; the numbers are computed."""
    if computed is None or stated is None or len(computed) != len(stated):
        return stated if computed is None else computed
    pairs = zip(computed, stated, strict=True)
    return ir.Shape([b if not isinstance(a, int) and not isinstance(b, int) else a for a, b in pairs])


def infer_shapes(model: ir.Model) -> None:
    """Fill in the shapes of intermediate values as far as they follow from the inputs and constants, in place."""
    disguised = [(n, n.op_type) for graph in model.graphs() for n in graph if (n.domain, n.op_type) in _DISGUISES]
    for node, _ in disguised:
        node.op_type = _DISGUISES[node.domain, node.op_type]
    try:
        with _library_logs():
            common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    finally:
        for node, op in disguised:
            node.op_type = op


def _may_fold(node: ir.Node, *, paying: frozenset[ir.Node]) -> bool | None:
    """Refuse folding that grows the model; None leaves the decision to the folder's own rules."""
    # Runtimes compute with quantised weights in integers; folded, these would be floats.
    if node.domain != "" or operator(node).integer_kernels:
        return None
    pays = node in paying or _growth(node.outputs, [node]) <= 0
    # The folder leaves ConstantOfShape alone unless told otherwise: TorchScript computes the amounts of a Pad by it.
    return pays if node.op_type == "ConstantOfShape" or not pays else None


def _growth(results: Iterable[ir.Value], nodes: Collection[ir.Node]) -> float:
    """Return by how many bytes a file grows that stores ``results`` instead of what only ``nodes`` read."""
    size = 0.0
    for value in results:
        length = _length(value)
        if length is None or value.dtype is None:
            # What has no known size is taken for the worst, so that it is never folded by mistake.
            return math.inf
        size += length * value.dtype.itemsize
        size -= 0 if value.dtype.is_floating_point() else _METADATA
    tensors = {v: ir.convenience.get_const_tensor(v) for node in nodes for v in node.inputs if v is not None}
    for value, tensor in tensors.items():
        # Only operands that nothing else reads leave the file with the nodes.
        if tensor is not None and not value.is_graph_output() and all(use.node in nodes for use in value.uses()):
            size -= tensor.nbytes
    return size


def _length(value: ir.Value) -> int | None:
    """Return how many elements a computed constant has, None where that is not known."""
    node, shape = value.producer(), value.shape
    if shape is None or not shape.is_static():
        lengths = constant_array(node.inputs[0]) if node is not None and node.op_type == "ConstantOfShape" else None
        return None if lengths is None else math.prod(int(n) for n in lengths)
    return math.prod(d for d in shape if isinstance(d, int))


def _paying(graph: ir.Graph) -> frozenset[ir.Node]:
    """Return the nodes of constant expressions that are no larger as one tensor, though a step on the way may be.

    A mask of truth values becomes four times as large as floats, and nothing once it is multiplied into the weight.
    """
    constant: dict[ir.Node, None] = {}
    for node in graph:
        operands = [v for v in node.inputs if v is not None]
        if node.domain == "" and not operator(node).integer_kernels and operands and not list(node_graphs(node)):
            sources = [v.producer() for v in operands]
            if all(p in constant or constant_tensor(v) for p, v in zip(sources, operands, strict=True)):
                constant[node] = None
    paying: set[ir.Node] = set()
    for node in constant:
        uses = [use.node for value in node.outputs for use in value.uses()]
        # Only where constants meet the rest of the graph is there a result that the file has to store.
        if len(node.outputs) == 1 and not all(user in constant for user in uses):
            cone, pending = {node}, [node]
            while pending and len(cone) < 64:  # a longer chain is decided step by step
                behind = [v.producer() for v in pending.pop().inputs if v is not None]
                news = [p for p in behind if p is not None and p in constant and p not in cone]
                cone.update(news)
                pending.extend(news)
            if _growth(node.outputs, cone) <= 0:
                paying |= cone
    return frozenset(paying)


def _fold_batch_norm(graph: ir.Graph, node: ir.Node) -> None:  # noqa: PLR0911 - one return a reason not to
    source = node.inputs[0]
    linear = source.producer() if source is not None else None
    if source is None or linear is None or operator(linear).weight_outputs is None:
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
    # In float64, so that the product is rounded to the weight's type only once.
    gamma, beta, mean, variance = (p.astype(np.float64) for p in parameters if p is not None)
    scale = gamma / np.sqrt(variance + _float(node, "epsilon", 1e-5))
    axis = operator(linear).weight_outputs or 0
    # Factors other than 1 scale the product and the bias apart, which the formula does not allow for.
    if linear.op_type == "Gemm":
        if (
            _float(linear, "alpha", 1.0) != 1
            or _float(linear, "beta", 1.0) != 1
            or linear.attributes.get_int("transA", 0) != 0
        ):
            return
        axis = 0 if linear.attributes.get_int("transB", 0) else 1
    # In groups its axis of outputs counts those of one group only, and a scale for every channel does not fit.
    if linear.op_type == "ConvTranspose" and linear.attributes.get_int("group", 1) != 1:
        return
    along = [1] * weight.ndim
    along[axis] = -1
    with np.errstate(over="ignore", invalid="ignore"):
        folded = (weight.astype(np.float64) * scale.reshape(along)).astype(weight.dtype)
        shift = (scale * (bias.astype(np.float64) - mean) + beta).astype(weight.dtype)
    if not (np.isfinite(folded).all() and np.isfinite(shift).all()):
        return  # float16 cannot hold what the two hold apart
    name = str(weight_value.name)
    # The old weight must be gone before the folded one can take its name.
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


def with_static_shapes(model: ir.Model, batch: int = 1) -> ir.Model:
    """Copy a model, inline its functions, set its batch axis and infer all shapes that follow.

    The batch axis is the first axis of each graph input where it is symbolic; a first axis that is a number stays. The
    tensors are shared with the original, which is not changed. Where plain inference stops, as at a ``Slice`` whose
    bounds are computed, the shapes of the folded model fill in. Shapes that cannot be inferred stay unknown.
    """
    copy = model.clone()
    if copy.functions:
        common.InlinePass()(copy)
    bindings = _bind_batch(copy, batch)
    # What is stated may hold for another batch.
    forget_shapes(copy, foreign=True)
    for value in _outputs(copy):
        value.shape = _bound(value.shape, bindings)
    infer_shapes(copy)
    if any(static_shape(value) is None for value in _outputs(copy)):
        _fill_in(copy)
    return copy


def _outputs(model: ir.Model) -> Iterator[ir.Value]:
    """Yield every named output of every node, those inside control flow included."""
    return (value for graph in model.graphs() for node in graph for value in node.outputs if value.name)


def _fill_in(model: ir.Model) -> None:
    """Take over the shapes that the folded model knows, by name, in place.

    Only the shapes: the model itself stays unfolded, for what is counted is what its file stores.
    """
    try:
        folded = simplify(model)
    except UnsupportedModelError:  # an old opset: what plain inference found is all there is
        return
    known = {value.name: value for value in _outputs(folded) if static_shape(value) is not None}
    for value in _outputs(model):
        found = known.get(value.name)
        if found is not None and found.shape is not None and static_shape(value) is None:
            value.shape = found.shape.copy()
            if found.dtype is not None:
                value.dtype = found.dtype
    infer_shapes(model)


def with_dimensions(model: ir.Model, sizes: Mapping[str, int]) -> ir.Model:
    """Return a copy of a model in which symbolic lengths of the inputs are numbers.

    ``{"H": 224}`` sets every axis that the inputs name ``H``, and lengths computed from it (``2*H``); ``{"x[2]": 224}``
    the third axis of input ``x``, named or not. What the outputs state of these lengths becomes a number too.

    Raises:
        InputError: No input has such an axis, or the size is not positive or not what the model states.
    """
    copy = model.clone()
    inputs = data_inputs(copy)
    symbols = {str(d.value) for v in inputs for d in v.shape or () if not isinstance(d, int) and d.value is not None}
    axes = {f"{v.name}[{k}]": (v, k) for v in inputs for k in range(len(v.shape or ()))}
    bindings: dict[str, int] = {}
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"dimension {name} = {size} is no length: give a positive number")
        if name in symbols:
            bindings[name] = size
            continue
        if name not in axes:
            known = ", ".join([*sorted(symbols), *axes]) or "none: the model states no input shapes"
            raise InputError(f"no input has a dimension {name}: there are {known}")
        value, axis = axes[name]
        stated = value.shape[axis] if value.shape is not None else None
        if isinstance(stated, int) and stated != size:
            raise InputError(f"dimension {name} is {stated} in the model, not {size}: only symbolic ones can be set")
        if stated is not None and not isinstance(stated, int) and stated.value is not None:
            bindings[str(stated.value)] = size
        value.shape = ir.Shape([size if k == axis else d for k, d in enumerate(value.shape or ())])
    for value in (*inputs, *copy.graph.outputs, *_outputs(copy)):
        value.shape = _bound(value.shape, bindings, keep=True)
    return copy


def data_inputs(model: ir.Model) -> list[ir.Value]:
    """Return the graph inputs that a caller must feed: those without an initializer."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the shape of a value as numbers, or None where any part of it is unknown."""
    if value is None:
        return None
    shape = value.shape
    if shape is None and value.const_value is not None:
        return tuple(value.const_value.shape.numpy())
    if shape is None or not shape.is_static():
        return None
    return tuple(dim for dim in shape if isinstance(dim, int))


def elements(value: ir.Value | None) -> int | None:
    """Return the number of elements of a value, or None where its shape is unknown."""
    shape = static_shape(value)
    return None if shape is None else math.prod(shape)


def _bind_batch(model: ir.Model, batch: int) -> dict[str, int]:
    """Set the symbolic first axes of the inputs to ``batch``; return the names they had."""
    bindings: dict[str, int] = {}
    for value in data_inputs(model):
        if value.shape is None or not len(value.shape) or isinstance(value.shape[0], int):
            continue
        if value.shape[0].value is not None:
            bindings[str(value.shape[0].value)] = batch
        value.shape = ir.Shape([batch, *value.shape[1:]])
    for value in data_inputs(model):
        value.shape = _bound(value.shape, bindings)
    return bindings


def _bound(shape: ir.Shape | None, bindings: Mapping[str, int], *, keep: bool = False) -> ir.Shape | None:
    """Evaluate the symbolic axes whose symbols are all bound; forget the others unless told to keep them."""
    if shape is None:
        return None
    found = (_dimension(dim, bindings) for dim in shape)
    return ir.Shape([dim if size is None and keep else size for dim, size in zip(shape, found, strict=True)])


def _dimension(dim: int | ir.SymbolicDim, bindings: Mapping[str, int]) -> int | None:
    if isinstance(dim, int):
        return dim
    if dim.value is None or dim.value in bindings:
        return None if dim.value is None else bindings[dim.value]
    try:
        size = dim.evaluate(bindings)
    except ValueError:  # a name such as "batch size" is no expression: inference may still find the number
        return None
    return size if isinstance(size, int) else None
