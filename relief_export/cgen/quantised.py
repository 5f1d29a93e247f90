"""A quantised model as a plan with integers: what the C of ``q8`` computes with.

ONNX Runtime runs a layer between QuantizeLinear and DequantizeLinear on integers. With x = s_x (q_x − z_x), weights
w = s_w q_w, a bias in units of s_x s_w, and y = s_y (q_y − z_y)::

    q_y = clamp(z_y + round(float(Σ q_w (q_x − z_x) + b) · (s_x s_w / s_y)))        halves to even, in float32

Two maps are added as ONNX Runtime's QLinearAdd does it for x86 processors with AVX2, where all activations are
unsigned, that is with every q and z 128 larger than those of signed ones::

    q_y = clamp(round(fma(q_a, s_a/s_y, fma(q_b, s_b/s_y, z_y − fma(s_a/s_y, z_a, s_b/s_y · z_b)))))       in float32

The plan is that of the model without its Q and DQ nodes; each of its maps has a scale and a zero point, each layer its
integers. The part with z_x is known beforehand and goes into the bias: Σ q_w q_x + (b − z_x Σ q_w). Borders hold z_x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir

from relief_export.cgen.lower import lower
from relief_export.cgen.plan import Convolution, Linear, Move, Plan, Pool, Reduce, Step
from relief_export.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relief_export.cgen.plan import Map, Op

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


@dataclass(frozen=True)
class Addition:
    """A map that is added to what a step computes, in whole numbers of 2^-shift.

    Attributes:
        own: Scale and zero point of what the step computes before the addition.
        factor, other: What the step's integer and the map's are multiplied by. offset: What is added.
        first: Whether the step's integer is the first operand, which is added last.
        zero: Of the map, for elements that are no connection.
        unsigned: What makes an integer unsigned: 128, or 0 where it is.
    """

    own: tuple[float, int]
    factor: int
    other: int
    offset: int
    shift: int
    first: bool
    zero: int
    unsigned: int


@dataclass
class Quantisation:
    """The integers of a plan.

    Attributes:
        type: The C type of all maps, int8_t or uint8_t.
        maps: Scale and zero point of each map, by ``Map.start``.
        weights: (weight, bias) of each Convolution and Linear, by ``id`` of the step.
        scales: (O,) float32, what a sum is multiplied by, by ``id`` of the step.
        additions: Of the steps with an Add in their chain, by ``id`` of the step.
    """

    type: str
    maps: dict[int, tuple[float, int]] = field(default_factory=dict)
    weights: dict[int, tuple[Array, Array]] = field(default_factory=dict)
    scales: dict[int, Array] = field(default_factory=dict)
    additions: dict[int, Addition] = field(default_factory=dict)

    def copy(self) -> Quantisation:
        """Return one that can grow without changing this one."""
        return Quantisation(self.type, dict(self.maps), dict(self.weights), dict(self.scales), dict(self.additions))

    def rename(self, before: Step, after: Step) -> None:
        """Let a step have the integers of the one that it replaces."""
        self.weights[id(after)], self.scales[id(after)] = self.weights[id(before)], self.scales[id(before)]
        if id(before) in self.additions:
            self.additions[id(after)] = self.additions[id(before)]

    @property
    def bounds(self) -> tuple[int, int]:
        """Return the smallest and the largest integer of a map."""
        return (-128, 127) if self.type == "int8_t" else (0, 255)

    def own(self, step: Step) -> tuple[float, int]:
        """Return scale and zero point of what a step computes, before anything is added to it."""
        addition = self.additions.get(id(step))
        return addition.own if addition else self.maps[step.out.start]

    def range(self, step: Step, *, added: bool = False) -> tuple[int, int]:
        """Return between what a step's outputs lie: its type's range and that of its activation.

        Of a step with an addition: what it computes itself, or ``added`` what it writes.
        """
        low, high = self.bounds
        scale, zero = self.maps[step.out.start] if added else self.own(step)
        before, after = _around_add(step.chain)
        for op in after if added else before:
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


def _around_add(chain: list[Op]) -> tuple[list[Op], list[Op]]:
    """Return what is done before an addition and what after it; all is before where there is none."""
    for k, op in enumerate(chain):
        if op.operand is not None:
            return chain[:k], chain[k + 1 :]
    return chain, []


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
    _check_scales(plain.graph, activations)
    following = _following_sums(plain.graph)
    plan = lower(plain, remove=False)  # the integers are those of the layers as they are
    found = Quantisation(kind)
    own = _assign_scales(plan, activations, following, found)
    for step in plan.steps:
        if id(step) in own:
            found.additions[id(step)] = _addition(step, own[id(step)], plan, found)
        _check(step, plan, found)
        if isinstance(step, Convolution | Linear):
            _add_layer(step, plan, found, constants)
    return plan, found


def _assign_scales(
    plan: Plan, activations: dict[str, tuple[float, int]], following: dict[str, str], found: Quantisation
) -> dict[int, tuple[float, int]]:
    """Give every map its scale and zero point; return what steps with a sum compute before it, by ``id``.

    Raises:
        UnsupportedModelError: A map has none, because it is computed in floats; the message names it.
    """
    own = {}
    found.maps |= {m.start: activations[m.name] for m in plan.maps if m.name in activations}
    for step in plan.steps:
        start = step.out.start
        if any(op.operand is not None for op in step.chain) and start in found.maps:
            own[id(step)] = found.maps[start]
            # A map has the name of the node that it began with; what it holds in the end is the sum.
            found.maps[start] = activations.get(following.get(step.name, ""), found.maps[start])
        elif isinstance(step, Move) and not step.chain and start not in found.maps:
            # A copy of an operand, which no node stands for, means what its source means.
            scales = {found.maps.get(plan.maps[k].start) for k in plan.sources(step.source)}
            if len(scales) == 1 and (scale := scales.pop()) is not None:
                found.maps[start] = scale
    for m in plan.maps:
        if m.start not in found.maps:
            raise UnsupportedModelError(
                f"{m.name!r} is computed in floats, not between QuantizeLinear nodes: q8 takes none"
            )
    return own


def _check(step: Step, plan: Plan, found: Quantisation) -> None:
    """Refuse what the integers of ``q8`` do not compute.

    Raises:
        UnsupportedModelError: A step is of another kind, or needs two scales at once.
    """
    if not isinstance(step, Convolution | Linear | Pool | Reduce | Move):
        raise UnsupportedModelError(f"{step.name}: q8 has no {type(step).__name__.lower()} of integers")
    for op in step.chain:
        if op.kind not in {"Relu", "Clip"} and op.operand is None:
            raise UnsupportedModelError(f"{step.name}: q8 has no {op.kind} of integers: write it with float arithmetic")
    if isinstance(step, Pool | Move) and any(
        found.maps[plan.maps[k].start] != found.own(step) for k in plan.sources(step.source)
    ):
        raise UnsupportedModelError(f"{step.name}: its input and output have different scales")


def _add_layer(step: Convolution | Linear, plan: Plan, found: Quantisation, constants: dict[str, _Layer]) -> None:
    layer = constants.get(step.name)
    used = [plan.maps[k] for k in plan.sources(step.source)]
    if (
        layer is None
        or len(used) != 1
        or layer.weight.size != step.weight.size
        or len(layer.weight) != len(step.weight)
    ):
        raise UnsupportedModelError(f"{step.name}: its weights are not integers of one input's scale")
    weight = layer.weight.reshape(step.weight.shape).astype(np.int64)
    offset = layer.bias.astype(np.int64)
    along = (-1, *[1] * (weight.ndim - 1))
    # A factor behind the layer is in the plan's floats already: a channel that it makes zero gets no connections.
    dead = ~step.weight.reshape(len(weight), -1).any(axis=1)
    weight, offset = np.where(dead.reshape(along), 0, weight), np.where(dead & (step.bias == 0), 0, offset)
    if not np.allclose(weight * np.broadcast_to(layer.scale, len(weight)).reshape(along), step.weight, rtol=1e-5):
        raise UnsupportedModelError(f"{step.name}: q8 takes no factor between a layer and its quantisation")
    scale, zero = found.maps[used[0].start]
    # A convolution's border holds the zero point; what a matrix reads of a border is not stored at all.
    counted = weight if isinstance(step, Convolution) else weight * (step.source >= 0)
    bias = offset - zero * counted.reshape(len(weight), -1).sum(axis=1)
    if np.abs(bias).max(initial=0) >= 2**31:
        raise UnsupportedModelError(f"{step.name}: a bias with its zero point does not fit 32 bits")
    found.weights[id(step)] = weight, bias.astype(np.int32)
    # In float32 and in this order, as in the formula above: another order can round to another integer.
    product = np.float32(scale) * layer.scale.astype(np.float32)
    found.scales[id(step)] = np.broadcast_to(product / np.float32(found.own(step)[0]), len(weight))


_KEEPING = frozenset({"Mul", "Pad", "Slice", "Gather", "Concat"})
"""Nodes that the plan has no step for, so that the integers go through them as they are."""


def _check_scales(graph: ir.Graph, activations: dict[str, tuple[float, int]]) -> None:
    """Refuse what would change integers on the way between two steps.

    Raises:
        UnsupportedModelError: The scales before and after differ; the message names the node.
    """
    for node in graph:
        if node.op_type in _KEEPING:
            computed = [v for v in (*node.inputs, *node.outputs) if v is not None and v.const_value is None]
            scales = {activations[str(v.name)] for v in computed if v.name in activations}
            if len(scales) > 1:
                raise UnsupportedModelError(f"{node.name}: q8 takes a {node.op_type} only where it keeps the scale")


def _following_sums(graph: ir.Graph) -> dict[str, str]:
    """Return for each node the Add that alone reads what it computes, at once or after an activation, or is itself."""
    found = {}
    for first in graph:
        node = first
        while node.op_type != "Add":
            readers = {user for user, _ in node.outputs[0].uses()}
            # A Mul is a factor of zeros and ones, as is checked elsewhere.
            if len(readers) != 1 or (node := readers.pop()).op_type not in _AFTER | {"Add", "Mul"}:
                break
        else:
            found[str(first.name)] = str(node.name)
    return found


def _addition(step: Step, own: tuple[float, int], plan: Plan, found: Quantisation) -> Addition:
    """Return what the formula at the top makes of a step's Add.

    Raises:
        UnsupportedModelError: It is none, or not of two maps with a scale each; the message names the step.
    """
    (op, *more) = [op for op in step.chain if op.operand is not None]
    if op.kind != "Add" or more or not isinstance(step, Convolution | Linear | Move):
        kinds = " and ".join(other.kind for other in (op, *more))
        raise UnsupportedModelError(f"{step.name}: q8 has no {kinds} of integers here: write it with float arithmetic")
    assert op.operand is not None  # noqa: S101  # it was chosen for that
    others = {found.maps[plan.maps[k].start] for k in plan.sources(op.operand)}
    if isinstance(step, Move):
        owns = {found.maps[plan.maps[k].start] for k in plan.sources(step.source)}
        own = next(iter(owns)) if len(owns) == 1 else own
    if len(others) != 1 or (isinstance(step, Convolution) and step.pool):
        raise UnsupportedModelError(f"{step.name}: q8 adds maps of one scale each, before any pooling")
    unsigned = 128 if found.type == "int8_t" else 0
    operands = [(scale, zero + unsigned) for scale, zero in (own, *others)]
    out_scale, out_zero = found.maps[step.out.start]
    try:
        first, second, offset, shift = addition(operands[:: -1 if op.swapped else 1], (out_scale, out_zero + unsigned))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{step.name}: {error}") from None
    ours, theirs = (second, first) if op.swapped else (first, second)
    ((_, other_zero),) = others
    return Addition(own, ours, theirs, offset, shift, not op.swapped, other_zero, unsigned)


def addition(operands: Sequence[tuple[float, int]], result: tuple[float, int]) -> tuple[int, int, int, int]:
    """Return the two factors, the offset and the shift with which two maps are added.

    Args:
        operands: Scale and unsigned zero point of the two, in the operator's order.
        result: Those of the sum.

    Raises:
        UnsupportedModelError: The scales are too far apart for 64 bits.
    """
    scale = np.float32(result[0])
    ratios = [np.float32(np.float32(each) / scale) for each, _ in operands]
    if not 2**-14 <= min(ratios) <= max(ratios) < 64:
        raise UnsupportedModelError("q8 cannot add maps of scales so far apart: quantise it again")
    inner = np.float32(ratios[1] * np.float32(operands[1][1]))
    # Within these ratios product and sum are exact in float64, so that it is rounded once, as a fused operation is.
    fused = np.float32(np.float64(ratios[0]) * operands[0][1] + np.float64(inner))
    numbers = [*map(float, ratios), float(np.float32(result[1]) - fused)]
    # The least power of two in which all three are whole.
    shift = max(24 - math.frexp(number)[1] for number in numbers if number)
    if shift > 46:
        raise UnsupportedModelError("q8 cannot add maps of scales so far apart: quantise it again")
    first, second, offset = (int(math.ldexp(number, shift)) for number in numbers)
    return first, second, offset, shift


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
        # Safely, which also makes them no readers of their inputs any more.
        graph.remove(node, safe=True)
        # One QuantizeLinear can feed several DequantizeLinear: it goes with the last of them.
        if not producer.outputs[0].uses():
            graph.remove(producer, safe=True)
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
