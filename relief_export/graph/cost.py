"""What a model costs: parameters, multiply-accumulates and operations at batch 1, each in named columns.

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
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from relief_export.graph.contractions import Contraction, Kind, contraction, nonzero_mask, stored
from relief_export.graph.shapes import data_inputs, static_shape, with_static_shapes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

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
class Cost:
    """The bill of a model.

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
    graph = with_static_shapes(model)
    found: list[Contraction] = []
    unknown: list[UnknownCost] = []
    for node in graph.graph:
        answer = contraction(node)
        if isinstance(answer, str):
            unknown.append(UnknownCost(node_label(node), op_name(node), answer))
        elif answer is not None:
            found.append(answer)
    return _total(graph, original, found, tuple(unknown))


def node_label(node: ir.Node) -> str:
    """Return a node's name, or its first output's where it has none."""
    return node.name or node.outputs[0].name or node.op_type


def op_name(node: ir.Node) -> str:
    """Return the operator with its domain where that is not ONNX's own."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


@dataclass(frozen=True)
class _Parameter:
    size: int
    live: int
    readers: int


def _total(model: ir.Model, original: Cost | None, found: list[Contraction], unknown: tuple[UnknownCost, ...]) -> Cost:
    # A quantised weight is zero where it equals its zero point, and a masked one where the mask is: the layer knows.
    weights = {stored(item.weight): int(np.count_nonzero(item.mask)) for item in found if item.mask is not None}
    slots = {stored(item.bias) for item in found} | weights.keys()
    parameters = {
        value: _parameter(value, weights.get(value))
        for value in _constants(model)
        if value in slots or _is_float_tensor(value)
    }
    layers = tuple(_layer(item) for item in found)

    def columns(name: str, structural: int, nonzero: int) -> Columns:
        return Columns(None if original is None else getattr(original, name).structural, structural, nonzero)

    def weigh(name: str, chosen: list[_Parameter], *, each_use: bool = False) -> Columns:
        times = [item.readers if each_use else 1 for item in chosen]
        sizes = sum(item.size * n for item, n in zip(chosen, times, strict=True))
        return columns(name, sizes, sum(item.live * n for item, n in zip(chosen, times, strict=True)))

    everything = weigh("parameters", list(parameters.values()))
    prunable = weigh("prunable", [item for value, item in parameters.items() if value in weights])
    first = static_shape(next(iter(data_inputs(model)), None))
    return Cost(
        batch=first[0] if first else 1,
        parameters=everything,
        parameters_used=weigh("parameters_used", list(parameters.values()), each_use=True),
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
        flops_nonzero=2 * item.repeats * live + (additions * bias_live // bias_size if bias_size else additions),
        paper_flops=0 if item.mask is None else item.repeats * _paper(item.kind, item.mask),
    )


def _paper(kind: Kind, mask: NDArray[np.bool_]) -> int:
    """Apply the paper's formula to (groups, out, in, kernel) at one position, channels whole where any kernel lives."""
    kernels = np.any(mask, axis=3)
    outs, ins = np.any(kernels, axis=2).sum(axis=1), np.any(kernels, axis=1).sum(axis=1)  # of each group
    if kind is Kind.LINEAR:
        return int(np.sum(np.maximum(2 * ins - 1, 0) * outs))
    return int(np.sum(2 * (ins * mask.shape[3] + 1) * outs))


def _constants(model: ir.Model) -> Iterator[ir.Value]:
    """Yield every initializer and the output of every Constant node, of all graphs."""
    for graph in model.graphs():
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
