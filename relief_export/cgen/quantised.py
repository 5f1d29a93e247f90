"""A quantised model as a plan with integers: what the C of ``q8`` computes with.

ONNX Runtime runs a layer between QuantizeLinear and DequantizeLinear on integers. With x = s_x (q_x − z_x), weights
w = s_w q_w, a bias in units of s_x s_w, and y = s_y (q_y − z_y)::

    q_y = clamp(z_y + round(float(Σ q_w (q_x − z_x) + b) · (s_x s_w / s_y)))        halves to even, in float32

The plan is that of the model without its Q and DQ nodes; each of its maps has a scale and a zero point, each layer its
integers. The part with z_x is known beforehand and goes into the bias: Σ q_w q_x + (b − z_x Σ q_w). Borders hold z_x.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir

from relief_export.cgen.lower import lower
from relief_export.cgen.plan import Convolution, Linear, Move, Plan, Pool, Reduce, Step
from relief_export.errors import UnsupportedModelError

if TYPE_CHECKING:
    from relief_export.cgen.plan import Map

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Integers:
    """A constant behind a DequantizeLinear: ``value = (q − zero) · scale``, the scale a number or along ``axis``."""

    q: Array
    scale: Array
    zero: Array
    axis: int

    @property
    def value(self) -> Array:
        """Return the floats, as DequantizeLinear computes them."""
        along = [1] * self.q.ndim
        if self.scale.ndim and self.scale.size > 1:
            along[self.axis] = -1
        # Wide integers, for unsigned bytes would wrap around below zero.
        difference = self.q.astype(np.int64) - self.zero.astype(np.int64).reshape(along if self.zero.size > 1 else ())
        scale = self.scale.reshape(along if self.scale.size > 1 else ())
        return np.asarray(difference.astype(np.float32) * scale, np.float32)


@dataclass(frozen=True)
class _Layer:
    """Integers of a layer: weight (O, ...), bias (O,) int32 with the zero point of its input in it, scales (O,)."""

    weight: Array
    bias: Array
    scale: Array


@dataclass
class Quantisation:
    """The integers of a plan.

    Attributes:
        type: The C type of all maps, int8_t or uint8_t.
        maps: Scale and zero point of each map, by ``Map.start``.
        weights: (weight, bias) of each Convolution and Linear, by ``id`` of the step.
        scales: (O,) float32, what a sum is multiplied by, by ``id`` of the step.
    """

    type: str
    maps: dict[int, tuple[float, int]] = field(default_factory=dict)
    weights: dict[int, tuple[Array, Array]] = field(default_factory=dict)
    scales: dict[int, Array] = field(default_factory=dict)

    def copy(self) -> Quantisation:
        """Return one that can grow without changing this one."""
        return Quantisation(self.type, dict(self.maps), dict(self.weights), dict(self.scales))

    def rename(self, before: Step, after: Step) -> None:
        """Let a step have the integers of the one that it replaces."""
        self.weights[id(after)], self.scales[id(after)] = self.weights[id(before)], self.scales[id(before)]

    @property
    def bounds(self) -> tuple[int, int]:
        """Return the smallest and the largest integer of a map."""
        return (-128, 127) if self.type == "int8_t" else (0, 255)

    def range(self, step: Step) -> tuple[int, int]:
        """Return between what a step's outputs lie: its type's range and that of its activation."""
        low, high = self.bounds
        scale, zero = self.maps[step.out.start]
        for op in step.chain:
            below, above = (0.0, np.inf) if op.kind == "Relu" else op.constants
            low = max(low, zero + round_half_even(below, scale)) if np.isfinite(below) else low
            high = min(high, zero + round_half_even(above, scale)) if np.isfinite(above) else high
        return low, high

    def requantisation(self, step: Step) -> tuple[Array, Array]:
        """Return multipliers of 24 bits (O,) uint32 and shifts (O,) uint8: scale = multiplier / 2^shift, exactly."""
        return fixed_point(self.scales[id(step)])

    def mean(self, step: Reduce, source: Map) -> tuple[int, int, int]:
        """Return multiplier, shift and bias that make a mean of a plane's sum.

        As in ONNX Runtime's QLinearGlobalAveragePool, the scale is s_x / (s_y n) in float32.
        """
        (scale, zero), (out_scale, _) = self.maps[source.start], self.maps[step.out.start]
        count = step.source.shape[1] * step.source.shape[2] if step.kind == "mean" else 1
        factor = np.float32(scale) / (np.float32(out_scale) * np.float32(count))
        multiplier, shift = fixed_point(np.array([factor], np.float32))
        return int(multiplier[0]), int(shift[0]), -zero * count


def round_half_even(value: float, scale: float) -> int:
    """Return the nearest integer to a float32 quotient, within what any type holds."""
    quotient = np.float32(value) / np.float32(scale)
    return int(np.rint(np.clip(quotient, -1024, 1024)))


def fixed_point(scale: Array) -> tuple[Array, Array]:
    """Return positive float32 numbers as ``multiplier / 2^shift``, uint32 with 24 bits and uint8.

    Raises:
        UnsupportedModelError: A scale is above 2048, so that a sum of 1 would be out of every range.
    """
    # A float32 has 24 bits of significand, so the multiplier holds the scale without any rounding.
    fraction, exponent = np.frexp(np.asarray(scale, np.float32).astype(np.float64))
    multiplier, shift = np.rint(np.ldexp(fraction, 24)).astype(np.int64), 24 - exponent
    if (shift < 13).any() or (multiplier < 0).any():
        raise UnsupportedModelError(f"the model has a scale of {scale.max():g} between two layers: quantise it again")
    # So small that every sum becomes 0.
    tiny = shift > 60
    return np.where(tiny, 0, multiplier).astype(np.uint32), np.where(tiny, 60, shift).astype(np.uint8)


def quantised(model: ir.Model) -> tuple[Plan, Quantisation]:
    """Return the plan of a model in QDQ form with its integers; the model is not changed.

    Raises:
        UnsupportedModelError: It is not quantised, or a part of it is computed in floats; the message names it.
    """
    plain, activations, constants, kind = _without_qdq(model)
    if kind is None:
        raise UnsupportedModelError("the model is not quantised (no QuantizeLinear): write it as int8 first")
    plan = lower(plain, remove=False)  # the integers are those of the layers as they are
    found = Quantisation(kind)
    for m in plan.maps:
        if m.name not in activations:
            raise UnsupportedModelError(
                f"{m.name!r} is computed in floats, not between QuantizeLinear nodes: q8 takes none"
            )
        found.maps[m.start] = activations[m.name]
    for step in plan.steps:
        _check(step, plan, found)
        if isinstance(step, Convolution | Linear):
            _add_layer(step, plan, found, constants)
    return plan, found


def _check(step: Step, plan: Plan, found: Quantisation) -> None:
    """Refuse what the integers of ``q8`` do not compute.

    Raises:
        UnsupportedModelError: A step is of another kind, or needs two scales at once.
    """
    if not isinstance(step, Convolution | Linear | Pool | Reduce | Move):
        raise UnsupportedModelError(f"{step.name}: q8 has no {type(step).__name__.lower()} of integers")
    for op in step.chain:
        if op.kind not in {"Relu", "Clip"}:
            raise UnsupportedModelError(f"{step.name}: q8 has no {op.kind} of integers: write it with float arithmetic")
    if isinstance(step, Pool | Move):
        for k in np.unique(plan.locate(step.source)[0]):
            if k >= 0 and found.maps[plan.maps[int(k)].start] != found.maps[step.out.start]:
                raise UnsupportedModelError(f"{step.name}: its input and output have different scales")


def _add_layer(step: Convolution | Linear, plan: Plan, found: Quantisation, constants: dict[str, _Layer]) -> None:
    layer = constants.get(step.name)
    used = [plan.maps[int(k)] for k in np.unique(plan.locate(step.source)[0]) if k >= 0]
    if (
        layer is None
        or len(used) != 1
        or layer.weight.size != step.weight.size
        or len(layer.weight) != len(step.weight)
    ):
        raise UnsupportedModelError(f"{step.name}: its weights are not integers of one input's scale")
    weight = layer.weight.reshape(step.weight.shape).astype(np.int64)
    scale, zero = found.maps[used[0].start]
    # A convolution's border holds the zero point; what a matrix reads of a border is not stored at all.
    counted = weight if isinstance(step, Convolution) else weight * (step.source >= 0)
    bias = layer.bias.astype(np.int64) - zero * counted.reshape(len(weight), -1).sum(axis=1)
    if np.abs(bias).max(initial=0) >= 2**31:
        raise UnsupportedModelError(f"{step.name}: a bias with its zero point does not fit 32 bits")
    found.weights[id(step)] = weight, bias.astype(np.int32)
    # In float32 and in this order, as in the formula above: another order can round to another integer.
    product = np.float32(scale) * layer.scale.astype(np.float32)
    found.scales[id(step)] = np.broadcast_to(product / np.float32(found.maps[step.out.start][0]), len(weight))


def _without_qdq(model: ir.Model) -> tuple[ir.Model, dict[str, tuple[float, int]], dict[str, _Layer], str | None]:
    """Take the Q and DQ nodes out of a copy.

    Returns:
        The model in floats; scale and zero point by the name of the value or node; integers by the name of the node;
        the C type of the activations, None where nothing is quantised.
    """
    plain = model.clone()
    graph = plain.graph
    activations: dict[str, tuple[float, int]] = {}
    constants: dict[ir.Value, _Integers] = {}
    kinds = set()
    # Maps and layers are matched by the names of nodes, so every node needs one.
    for number, node in enumerate(graph):
        node.name = f"{node.op_type}_{number}" if not node.name else node.name
    # A copy of the list, for the loop removes nodes.
    # One loop for weights and activations: both take nodes out of the list that it goes through, in its order.
    for node in list(graph):
        if node.op_type != "DequantizeLinear":
            continue
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None  # noqa: S101  # the operator has it
        scale, zero = (_array(node, k) for k in (1, 2))
        producer = source.producer()
        if producer is None or producer.op_type != "QuantizeLinear":
            integers = _array(node, 0)
            if integers is None or scale is None:
                raise UnsupportedModelError(f"{node.name}: it expands what no QuantizeLinear made")
            constants[output] = _Integers(
                integers,
                scale,
                np.zeros(1, integers.dtype) if zero is None else zero,
                node.attributes.get_int("axis", 1),
            )
            value = ir.Value(name=output.name, const_value=ir.tensor(constants[output].value, name=output.name))
            constants[value] = constants.pop(output)
            ir.convenience.replace_all_uses_with(output, value)
            graph.remove(node, safe=False)
            # The old value gives its name up first, because the new one takes it.
            output.name = None
            graph.register_initializer(value)
            continue
        kept = producer.inputs[0]
        if kept is None or scale is None or scale.size != 1:
            raise UnsupportedModelError(f"{node.name}: activations with several scales are not taken")
        # ONNX means an unsigned zero where the zero point is left out.
        point = np.zeros(1, np.uint8) if zero is None else zero
        kinds.add({"i": "int8_t", "u": "uint8_t"}[point.dtype.kind])
        activations[str(kept.name)] = float(scale.ravel()[0]), int(point.ravel()[0])
        if output in graph.outputs:
            activations[str(output.name)] = activations[str(kept.name)]
            graph.outputs[list(graph.outputs).index(output)] = kept
            kept.shape, name = output.shape, output.name
            output.name = None
            kept.name = name
        ir.convenience.replace_all_uses_with(output, kept)
        graph.remove(node, safe=False)
        # One QuantizeLinear can feed several DequantizeLinear: it goes with the last of them.
        if not producer.outputs[0].uses():
            graph.remove(producer, safe=False)
    if len(kinds) > 1:
        raise UnsupportedModelError("activations are signed here and unsigned there: quantise them alike")
    return plain, activations | _by_node(graph, activations), _layers(graph, constants), next(iter(kinds), None)


_AFTER = frozenset(
    {"Relu", "Clip", "Reshape", "Flatten", "Gather", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Identity"}
)
"""What may lie between a value and the quantisation that is meant for it: what comes out in the same integers."""


def _by_node(graph: ir.Graph, activations: dict[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    """Return scale and zero point of the inputs, and of what each node computes: maps are called by nodes."""
    found = {}
    for name, computed in [(v.name, v) for v in graph.inputs] + [(node.name, node.outputs[0]) for node in graph]:
        value = computed
        while value.name not in activations and len({user for user, _ in value.uses()}) == 1:
            user = next(user for user, _ in value.uses())
            if user.op_type not in _AFTER:
                break
            value = user.outputs[0]
        if value.name in activations:
            found[str(name)] = activations[value.name]
    return found


def _layers(graph: ir.Graph, constants: dict[ir.Value, _Integers]) -> dict[str, _Layer]:
    """Return the integers of every layer with weights, outputs first."""
    layers = {}
    for node in graph:
        weight = constants.get(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
        # The formula has no term for a zero point of weights: such a layer is left out here and refused later.
        if node.op_type not in {"Conv", "Gemm", "MatMul"} or weight is None or weight.zero.any():
            continue
        q = weight.q
        if node.op_type == "MatMul" or (node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)):
            q = q.T
        third = node.inputs[2] if len(node.inputs) > 2 else None
        bias = constants[third].q if third in constants else np.zeros(len(q), np.int32)
        layers[str(node.name)] = _Layer(q, np.broadcast_to(bias.ravel(), len(q)), weight.scale.ravel())
    return layers


def _array(node: ir.Node, index: int) -> Array | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or value.const_value is None else np.asarray(value.const_value.numpy())
