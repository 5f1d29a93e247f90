"""The operators that multiply and accumulate: one table of operator -> how often each weight element is used.

Every contraction is brought to one form: a weight of ``(groups, out, in, kernel)`` elements, each used ``repeats``
times, and a bias added to ``outputs`` numbers. Sources: the ONNX operator specification (opset 25) and ONNX Runtime's
contrib operators.

What a model costs: parameters, multiply-accumulates and operations at batch 1, each in named columns.

- *dense*: the figure of the original model, where one is given as ``baseline``;
- *structural*: what this graph stores and computes, zeros included;
- *non-zero*: the same with every weight that is exactly zero skipped.

One MAC is one product of a contraction (convolution, matrix product) added to a sum; elementwise operations,
normalisations, pooling and softmax are not counted. A convolution counts every kernel element at every output
position, also over the padding. ``FLOPs = 2·MACs + bias additions``, where a bias is that of the node or a constant
that an Add right after it brings. The paper's own formula (arXiv 2109.10795) is kept apart and never
mixed with these::

    convolution  2·H'·W'·(Cin·k² + 1)·Cout        linear  (2·in − 1)·out

with a channel counted as whole where any of its kernels is not zero (Cin and Cout of each group, for grouped ones).

Parameters are the stored elements of every floating-point constant with at least one axis, and of every constant that
is the weight or the bias of a contraction, whatever its type. A batch normalisation's mean and variance are stored too,
so they are counted, although PyTorch calls them buffers. A tensor that several nodes share is counted once as stored
and once for each node that reads it as used.

Against other counters on torchvision networks: ``torch.utils.flop_counter`` reports 2·MACs of the same contractions, so
it equals ``2·macs``; fvcore's ``FlopCountAnalysis`` reports MACs under the name FLOPs and adds batch normalisations and
pooling to them, so it equals ``macs`` for its operators ``conv``, ``linear``, ``addmm``, ``matmul`` and ``bmm``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from relief_export.graph.prepare import data_inputs, elements, static_shape, with_static_shapes
from relief_export.printing import Prints, TextTable, counted

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

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
    if key in COUNTED:
        slots = COUNTED[key].keywords["slots"]
        needed = (_input(node, slots.data), _input(node, slots.weight), node.outputs[0])
        # Checked once for all, so that the rules may take every shape for known.
        if any(elements(value) is None for value in needed):
            return "the shape of a factor or of the output is unknown"
        return COUNTED[key](node)
    if key in UNCOUNTED:
        return UNCOUNTED[key]
    # Those of ONNX's own operators that multiply and accumulate are in COUNTED or UNCOUNTED.
    if key in FREE or (not node.domain and onnx.defs.has(node.op_type)):
        return None
    return "the operator is unknown"


def stored(value: ir.Value | None) -> ir.Value | None:
    """Follow a constant through Transpose, Reshape, DequantizeLinear and the like to the tensor in the file."""
    # A weight counts as what the file stores, under the name that it has there.
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
        # A constant that several nodes share would otherwise be followed once for each path to it.
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
    # A single zero point broadcasts by itself, several have to be laid along their axis.
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
    # A constant whose zeros cannot be seen would be counted as if it had none.
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
    # The same holds for a factor here, which would pass for an activation.
    if any(mask is None and is_constant(value) for mask, value in zip(masks, values, strict=True)):
        return _COMPUTED
    side = 1 if masks[1] is not None else 0
    # Bring the weight to (…, in, out): a left factor is stored (out, in), a right one (in, out).
    flip, shape = flips[side] == (side == 1), _dims(values[side])
    mask = masks[side]
    # A vector is one column of inputs on either side, as in NumPy's matmul.
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
        # An empty layer has no outputs to divide by.
        result // max(1, split[0] * outs),
        result,
        _bias(node, slots),
    )


def _bias(node: ir.Node, slots: Slots) -> ir.Value | None:
    """Return the node's own bias, or the constant that a sole following Add brings."""
    bias = _input(node, slots.bias)
    uses = tuple(node.outputs[0].uses())
    # An addition belongs to the layer only where nothing else reads what is added to.
    if bias is not None or len(uses) != 1 or node.outputs[0].is_graph_output():
        return bias
    adder, index = uses[0].node, uses[0].idx
    if adder.op_type != "Add" or adder.domain:
        return None
    other = adder.inputs[1 - index]
    return other if nonzero_mask(other) is not None else None


_MS = "com.microsoft"
COUNTED: dict[tuple[str, str], partial[Contraction | str]] = {
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


_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16})


@dataclass(frozen=True)
class Columns:
    """One figure three times; ``dense`` is None where no original model was given."""

    dense: int | None
    structural: int
    nonzero: int


@dataclass(frozen=True)
class Ratio:
    """A share between 0 and 1: over the weights of contractions (what pruning masks), and over all parameters."""

    prunable: float
    all: float


@dataclass(frozen=True)
class LayerCost:
    """The cost of one contraction at the model's batch.

    Attributes:
        name: Name of the node. op: Its operator.
        weight: Name of the weight tensor; None where both factors are activations.
        output_shape: Shape of its output.
        parameters: Stored elements of weight and bias; ``parameters_nonzero`` those that are not zero.
        macs: Multiply-accumulates; ``macs_nonzero`` with zero weights skipped.
        flops: 2·MACs + bias additions; ``flops_nonzero`` with zero weights and zero biases skipped.
        paper_flops: The paper's formula; 0 where it has none (both factors are activations).
    """

    name: str
    op: str
    weight: str | None
    output_shape: tuple[int, ...]
    parameters: int
    parameters_nonzero: int
    macs: int
    macs_nonzero: int
    flops: int
    flops_nonzero: int
    paper_flops: int


@dataclass(frozen=True)
class UnknownCost:
    """A node whose operations are in no total, and why."""

    name: str
    op: str
    reason: str


@dataclass(frozen=True)
class Cost(Prints):
    """What a model costs.

    Attributes:
        batch: First axis of the first input that the figures hold for.
        parameters: Elements, shared tensors once. parameters_used: Shared tensors once for each reader.
        prunable: Elements of the weights of contractions, shared tensors once.
        macs: Multiply-accumulates. flops: 2·MACs + bias additions.
        paper_flops: The paper's formula. paper_flops_dense: The same of the baseline.
        sparsity: Share of exact zeros in what this model stores.
        compression: Share of the baseline's parameters that is gone or zero here; None without a baseline.
        layers: One row for each contraction. unknown: Nodes that no total includes; empty when the totals are complete.
    """

    batch: int
    parameters: Columns
    parameters_used: Columns
    prunable: Columns
    macs: Columns
    flops: Columns
    paper_flops: int
    paper_flops_dense: int | None
    sparsity: Ratio
    compression: Ratio | None
    layers: tuple[LayerCost, ...]
    unknown: tuple[UnknownCost, ...]

    def table(self) -> TextTable:
        """Return the counts as a table: as a dense network, as the network stands, and without its zeros."""
        counts = {"parameters": self.parameters, "MACs": self.macs, "FLOPs": self.flops}
        rows = [
            (name, *("-" if one is None else f"{one:,}" for one in (each.dense, each.structural, each.nonzero)))
            for name, each in counts.items()
        ]
        unknown = f", {counted(len(self.unknown), 'operator')} unknown" if self.unknown else ""
        return TextTable(f"cost at batch {self.batch}{unknown}", ("", "dense", "structural", "non-zero"), rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def cost(model: ir.Model, *, baseline: ir.Model | Cost | None = None) -> Cost:
    """Count what a model stores and computes at batch 1, zeros included and skipped.

    Args:
        model: Any ONNX model; not changed. A symbolic batch axis is taken as 1, a fixed one as it is.
        baseline: The original model, or its cost, for the dense column.

    Returns:
        The totals and a row a layer. A node that cannot be counted (unknown operator or shape, control flow) is a row
        of ``unknown``, never a silent zero.
    """
    original = baseline if isinstance(baseline, Cost) or baseline is None else cost(baseline)
    # A weight is used once for each position, so that every figure needs shapes in numbers.
    graph = with_static_shapes(model)
    layers: list[LayerCost] = []
    unknown: list[UnknownCost] = []
    weights: dict[ir.Value | None, int] = {}
    biases: set[ir.Value | None] = set()
    for node in graph.graph:
        answer = contraction(node)
        if isinstance(answer, str):
            unknown.append(UnknownCost(node_label(node), op_name(node), answer))
        elif answer is not None:
            # Counted at once: a weight that many nodes share would otherwise be held as a mask for each of them.
            layers.append(_layer(answer))
            biases.add(stored(answer.bias))
            if answer.mask is not None:
                weights[stored(answer.weight)] = int(np.count_nonzero(answer.mask))
    return _total(graph, original, layers=tuple(layers), weights=weights, biases=biases, unknown=tuple(unknown))


def node_label(node: ir.Node) -> str:
    """Return a node's name, or its first output's where it has none."""
    return node.name or node.outputs[0].name or node.op_type


def op_name(node: ir.Node) -> str:
    """Return the operator with its domain where that is not ONNX's own."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


_SCALES = {
    "QuantizeLinear": {1, 2},
    "DequantizeLinear": {1, 2},
    "QLinearConv": {1, 2, 4, 5, 6, 7},
    "QLinearMatMul": {1, 2, 4, 5, 6, 7},
}
"""Operator -> its inputs that say how numbers are stored, and are no numbers of the network's: scales, zero points."""


def _is_scale(value: ir.Value) -> bool:
    uses = value.uses()
    return bool(uses) and all(use.idx in _SCALES.get(use.node.op_type, ()) for use in uses)


@dataclass(frozen=True)
class _Parameter:
    size: int
    live: int
    readers: int


def _total(
    model: ir.Model,
    original: Cost | None,
    *,
    layers: tuple[LayerCost, ...],
    weights: Mapping[ir.Value | None, int],
    biases: Collection[ir.Value | None],
    unknown: tuple[UnknownCost, ...],
) -> Cost:
    """Add up a model's layers and constants.

    Args:
        model: It, with static shapes.
        original: The dense column.
        layers: What multiplies and accumulates.
        weights: Stored weight -> its elements that are not zero. A quantised one is zero where it equals its zero
            point, and a masked one where the mask is: the layer knows.
        biases: Stored biases.
        unknown: What was not counted.
    """
    # Weights and biases count whatever their type, or a quantised network would seem to have none.
    slots = {*biases, *weights}
    parameters = {
        value: _parameter(value, weights.get(value))
        for value in _constants(model)
        if value in slots or (_is_float_tensor(value) and not _is_scale(value))
    }

    def columns(name: str, structural: int, nonzero: int) -> Columns:
        return Columns(None if original is None else getattr(original, name).structural, structural, nonzero)

    def counted(name: str, chosen: list[_Parameter], *, each_use: bool = False) -> Columns:
        times = [item.readers if each_use else 1 for item in chosen]
        sizes = sum(item.size * n for item, n in zip(chosen, times, strict=True))
        return columns(name, sizes, sum(item.live * n for item, n in zip(chosen, times, strict=True)))

    everything = counted("parameters", list(parameters.values()))
    prunable = counted("prunable", [item for value, item in parameters.items() if value in weights])
    first = static_shape(next(iter(data_inputs(model)), None))
    return Cost(
        batch=first[0] if first else 1,
        parameters=everything,
        parameters_used=counted("parameters_used", list(parameters.values()), each_use=True),
        prunable=prunable,
        macs=columns("macs", sum(x.macs for x in layers), sum(x.macs_nonzero for x in layers)),
        flops=columns("flops", sum(x.flops for x in layers), sum(x.flops_nonzero for x in layers)),
        paper_flops=sum(x.paper_flops for x in layers),
        paper_flops_dense=None if original is None else original.paper_flops,
        sparsity=Ratio(_gone(prunable, prunable.structural), _gone(everything, everything.structural)),
        compression=None
        if original is None
        else Ratio(_gone(prunable, prunable.dense), _gone(everything, everything.dense)),
        layers=layers,
        unknown=unknown,
    )


def _gone(columns: Columns, of: int | None) -> float:
    return 1 - columns.nonzero / of if of else 0.0


def _layer(item: Contraction) -> LayerCost:
    size = math.prod(item.shape)
    live = size if item.mask is None else int(np.count_nonzero(item.mask))
    bias = nonzero_mask(item.bias)
    bias_size, bias_live = (0, 0) if bias is None else (bias.size, int(np.count_nonzero(bias)))
    additions = 0 if item.bias is None else item.outputs
    return LayerCost(
        name=node_label(item.node),
        op=op_name(item.node),
        weight=None if item.weight is None else (stored(item.weight) or item.weight).name,
        output_shape=static_shape(item.node.outputs[0]) or (),
        parameters=(0 if item.mask is None else size) + bias_size,
        parameters_nonzero=(0 if item.mask is None else live) + bias_live,
        macs=item.macs,
        macs_nonzero=item.repeats * live,
        flops=2 * item.macs + additions,
        # Each entry of a bias is added equally often, so zero entries save their share of the additions.
        flops_nonzero=2 * item.repeats * live + (additions * bias_live // bias_size if bias_size else additions),
        paper_flops=0 if item.mask is None else item.repeats * _paper(item.kind, item.mask),
    )


def _paper(kind: Kind, mask: NDArray[np.bool_]) -> int:
    """Apply the paper's formula to (groups, out, in, kernel) at one position, channels whole where any kernel lives."""
    kernels = np.any(mask, axis=3)
    outs, ins = np.any(kernels, axis=2).sum(axis=1), np.any(kernels, axis=1).sum(axis=1)  # of each group
    if kind is Kind.LINEAR:
        # A group that reads nothing costs nothing, where the formula alone would give -1.
        return int(np.sum(np.maximum(2 * ins - 1, 0) * outs))
    return int(np.sum(2 * (ins * mask.shape[3] + 1) * outs))


def _constants(model: ir.Model) -> Iterator[ir.Value]:
    """Yield every initializer and the output of every Constant node, of all graphs."""
    for graph in model.graphs():
        # A model need not have its Constant nodes lifted, and graphs inside nodes store tensors too.
        yield from (value for value in graph.initializers.values() if value.const_value is not None)
        yield from (
            node.outputs[0]
            for node in graph
            if node.op_type == "Constant" and ir.convenience.get_const_tensor(node.outputs[0]) is not None
        )


def _parameter(value: ir.Value, live: int | None) -> _Parameter:
    """Count a stored tensor's elements; ``live`` of them are not zero, where that is known already."""
    tensor = ir.convenience.get_const_tensor(value)
    array = np.zeros(0) if tensor is None else tensor.numpy()
    return _Parameter(array.size, int(np.count_nonzero(array != 0)) if live is None else live, len(value.uses()))


def _is_float_tensor(value: ir.Value) -> bool:
    tensor = ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.dtype in _FLOATS and len(tensor.shape) > 0
