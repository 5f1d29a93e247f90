"""What the analyses know while they walk over a graph, and the protocol that an operator's rule follows.

A *unit* is a set of tensor elements that are removed together: an output channel of a convolution and all its copies in
the activations, poolings and flattened features behind it. Units are integers; ``PINNED`` is the one that always
stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from relief_export.errors import UnsupportedModelError
from relief_export.graph.computed import Axes, FromConstants, evaluate, operand_axes
from relief_export.graph.initializers import constant_array

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from relief_export.graph.channels import Shape
    from relief_export.graph.rewrite import RemovalPlan

PINNED = 0
Found = TypeVar("Found")


@dataclass(frozen=True)
class ChannelFacts:
    """What is known of one activation.

    Attributes:
        shape: Length of each axis, None where it is not known.
        ids: Compact array of units.
        const: Compact array of the same shape: the value of an element that is the same number at every position for
            every input, NaN where there is no such number. float64.
    """

    shape: Shape
    ids: NDArray[np.int64]
    const: NDArray[np.float64]

    @property
    def rank(self) -> int:
        """Number of axes."""
        return self.ids.ndim


@dataclass(frozen=True)
class ParameterUse:
    """Entries of one parameter, as boolean arrays of its shape.

    Attributes:
        dead: The entry cannot influence any output of the graph.
        constant: The entry belongs to a channel whose input to this operator is exactly zero for every input of the
            graph: a batch norm's scale and shift behind a neuron without incoming connections.
    """

    dead: NDArray[np.bool_]
    constant: NDArray[np.bool_]


@dataclass
class LayerFacts:
    """What is known of a layer that mixes channels with weights.

    Attributes:
        nonzero: Which outputs read which inputs: (groups, out/groups, in/groups) bool.
        const_out: Value of each output that is constant, NaN for the others.
        needed: Outputs that some graph output depends on, where that is not the liveness of the first output.
    """

    nonzero: NDArray[np.bool_]
    const_out: NDArray[np.float64]
    needed: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Tie:
    """Units that must be removed together, pair by pair, and why.

    Attributes:
        left: Units. right: The unit that each is tied to.
        at: Label of the node that ties them.
        shared: Name of the constant that two nodes share, where that is what ties them. other: The other node.
    """

    left: NDArray[np.int64]
    right: NDArray[np.int64]
    at: str
    shared: str = ""
    other: str = ""

    def reason(self, label: str) -> str:
        """Say it to the node of that label."""
        if self.shared:
            return f"shares {self.shared} with {self.other if self.at == label else self.at}"
        return f"tied at {self.at}"


@dataclass
class Walk:
    """State of one forward walk.

    Attributes:
        flows: What is known of each activation.
        computed: Values computed from initializers alone that stay nodes -> how, and where their axes lie.
        ties: Units that must be removed together.
        pins: Unit arrays that must stay, with the reason.
        axes: Shared constant and axis -> the units that its first use put there, and the label of that node.
        nonzero: Weight and how it is seen -> which of its kernels are not zero, once for all layers that share it.
        evaluated: Computed values that are in use at the moment: they are large, and evaluated again when needed again.
    """

    facts_of: dict[ir.Value, ChannelFacts] = field(default_factory=dict)
    computed: dict[ir.Value, tuple[FromConstants, Axes]] = field(default_factory=dict)
    ties: list[Tie] = field(default_factory=list)
    pins: list[tuple[NDArray[np.int64], str]] = field(default_factory=list)
    axes: dict[tuple[ir.Value, int], tuple[NDArray[np.int64], str]] = field(default_factory=dict)
    nonzero: dict[tuple[ir.Value | None, int, int, int], NDArray[np.bool_]] = field(default_factory=dict)
    evaluated: WeakValueDictionary[ir.Value, NDArray[np.generic]] = field(default_factory=WeakValueDictionary)
    count: int = 1

    def fresh(self, shape: Sequence[int]) -> NDArray[np.int64]:
        """Return an array of new units."""
        size = int(np.prod(shape, dtype=np.int64))
        ids = np.arange(self.count, self.count + size, dtype=np.int64).reshape(shape)
        self.count += size
        return ids

    def pin(self, ids: NDArray[np.int64], reason: str) -> None:
        """Keep the given units."""
        self.pins.append((np.unique(ids), reason))

    def unknown_facts(self, value: ir.Value) -> ChannelFacts:
        """Describe a value of which nothing is known and nothing may be removed."""
        shape = static_shape(value)
        # One place stands for the whole tensor, since all of it is the pinned unit.
        compact = (1,) * len(shape)
        return ChannelFacts(shape, np.full(compact, PINNED), np.full(compact, np.nan))

    def constant(self, value: ir.Value | None) -> NDArray[np.generic] | None:
        """Return the array of a constant, or None for an activation or an absent input."""
        if value is None or value in self.facts_of:
            return None
        if value not in self.computed:
            return constant_array(value)
        found = self.evaluated.get(value)
        if found is None:
            node = value.producer()
            assert node is not None  # noqa: S101 - it is computed
            found = evaluate(
                node, self.computed[value][0], [a for v in node.inputs if (a := self.constant(v)) is not None]
            )
            self.evaluated[value] = found
        return found

    def computes_constant(self, node: ir.Node, how: FromConstants) -> bool:
        """Take note of a node that only computes a constant from stored ones; return whether it does."""
        result = node.outputs[0]
        arrays = [self.constant(v) for v in node.inputs if v is not None]
        # A graph output is seen by the caller and may not be cut as a weight is.
        if len(node.outputs) > 1 or result.is_graph_output() or not arrays or any(a is None for a in arrays):
            return False
        axes = operand_axes(node, how, [a for a in arrays if a is not None])
        if axes is None:
            return False
        self.computed[result] = (how, axes)
        return True

    def operands(self, value: ir.Value) -> list[tuple[ir.Value, dict[int, int]]]:
        """Return what a computed constant is computed from, each with the axes of the result that lie in it."""
        node = value.producer()
        if value not in self.computed or node is None:
            return []
        return list(zip([v for v in node.inputs if v is not None], self.computed[value][1], strict=True))

    def stored(self, value: ir.Value) -> ir.Value:
        """Return the largest tensor in the file behind a constant."""
        while operands := self.operands(value):
            # A weight has at least as many elements as its scales and zero points.
            value = max((v for v, _ in operands), key=lambda v: _size(self.constant(v)))
        return value

    def shared(self, value: ir.Value) -> bool:
        """Tell whether a constant, or one that it is computed from, has more than one use."""
        return len(value.uses()) > 1 or any(self.shared(v) for v, _ in self.operands(value))

    def use_axis(self, value: ir.Value, axis: int, ids: NDArray[np.int64], label: str) -> list[Tie]:
        """State that an axis of a constant counts the units ``ids`` for a node, in what it is computed from too.

        Returns:
            What its other uses state otherwise. The units of a tie may differ in number: then nothing may be cut.
        """
        conflicts = []
        if len(value.uses()) > 1:
            # The first use says what the axis counts, and every later one is compared with it.
            known, first = self.axes.setdefault((value, axis), (ids, label))
            if known.shape != ids.shape or (known != ids).any():
                conflicts.append(Tie(known, ids, label, str(value.name), first))
        for operand, axes in self.operands(value):
            if axis in axes:
                conflicts += self.use_axis(operand, axes[axis], ids, label)
        return conflicts


def _size(array: NDArray[np.generic] | None) -> int:
    return 0 if array is None else array.size


class NodeContext:
    """One node as its rule sees it: inputs, attributes, and the trace to write into."""

    def __init__(self, node: ir.Node, walk: Walk) -> None:
        self.node = node
        self.walk = walk
        # One rule serves all nodes of an operator, so what it finds out about a node is kept here.
        self._found: dict[type, Any] = {}
        self._stated_axes: set[tuple[int, int]] = set()
        self.given_up = False
        self.reason = ""
        """Why the rule has given up."""
        self.refused: Rule | None = None
        """The rule that has given up."""
        self.captured: list[ir.Value] = []
        """Activations that the node's subgraphs read from outside."""
        self.deferred: NDArray[np.bool_] | None = None
        """Constant input channels that a zero-padded convolution needs, set by its backward rule."""

    def note(self, found: object) -> None:
        """Keep what a rule found out about its node, by its type."""
        self._found[type(found)] = found

    def find(self, kind: type[Found]) -> Found | None:
        """Return what a rule noted of that type, None where none did."""
        found: Found | None = self._found.get(kind)
        return found

    def recall(self, kind: type[Found]) -> Found:
        """Return what this node's rule noted of that type in its forward walk."""
        found: Found = self._found[kind]
        return found

    @property
    def source(self) -> ir.Value:
        """The first input, for operators that cannot do without."""
        value = self.node.inputs[0]
        if value is None:
            raise UnsupportedModelError(f"{self.label} has no first input: check the model with onnx.checker")
        return value

    @property
    def result(self) -> ir.Value:
        """The first output."""
        return self.node.outputs[0]

    def integer(self, name: str, default: int) -> int:
        """Return an integer attribute."""
        return int(self.node.attributes.get_int(name, default))

    @property
    def label(self) -> str:
        """Operator and name, for reasons and reports."""
        return f"{self.node.op_type} {self.node.name or self.node.outputs[0].name}"

    def facts(self, index: int) -> ChannelFacts | None:
        """Return what is known of an activation, None for a constant or absent input."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return None if value is None else self.walk.facts_of.get(value)

    def array(self, index: int) -> NDArray[Any] | None:
        """Return the array of a constant input, None for an activation or absent input."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return self.walk.constant(value)

    def activations(self) -> list[ChannelFacts]:
        """Return all activations among the inputs."""
        return [f for i in range(len(self.node.inputs)) if (f := self.facts(i)) is not None]

    def out_shape(self, index: int = 0) -> Shape:
        """Return the inferred shape of an output."""
        return static_shape(self.node.outputs[index])

    def tie(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
        """Require that broadcast partners are removed together."""
        left, right = np.broadcast_arrays(a, b)
        different = left != right
        # A tie of a unit with itself says nothing.
        if different.any():
            self.walk.ties.append(Tie(left[different], right[different], self.label))

    def pin(self, ids: NDArray[np.int64], reason: str) -> None:
        """Keep the given units."""
        self.walk.pin(ids, reason)

    def pin_parameters(self) -> None:
        """Keep whole the activations behind the first one, which the operator reads as parameters."""
        for facts in self.activations()[1:]:
            self.pin(facts.ids, f"read as a parameter by {self.label}")

    def use_axis(self, index: int, axis: int, ids: NDArray[np.int64]) -> None:
        """State that axis ``axis`` of constant input ``index`` counts the units ``ids``; other uses must agree."""
        value = self.node.inputs[index]
        # A constant with one reader is free to be cut as that reader needs it.
        if value is None or not self.walk.shared(value):
            return
        self._stated_axes.add((index, axis))
        for tie in self.walk.use_axis(value, axis, ids.reshape(-1), self.label):
            # Axes of different lengths have no pairs to tie, so that neither may be cut.
            if tie.left.shape == tie.right.shape:
                different = tie.left != tie.right
                self.walk.ties.append(replace(tie, left=tie.left[different], right=tie.right[different]))
            else:
                self.pin(tie.right, f"shares {tie.shared} with {tie.other}, which reads it otherwise")
                self.pin(tie.left, f"shares {tie.shared} with {tie.at}, which reads it otherwise")

    def pin_shared(self) -> None:
        """Keep whole the axes of shared constants that this node's rule said nothing about."""
        for index, value in enumerate(self.node.inputs):
            if value is None or value in self.walk.facts_of or not self.walk.shared(value):
                continue
            array = self.array(index)
            for axis in range(0 if array is None else array.ndim):
                if (index, axis) not in self._stated_axes and array is not None:
                    # Zero is the pinned unit: what the other uses count along this axis then stays as well.
                    self.use_axis(index, axis, np.zeros(array.shape[axis], np.int64))

    def give_up(self, reason: str) -> list[ChannelFacts]:
        """Keep whole all that the node reads and writes; the engine then treats it as unknown in every respect."""
        self.given_up, self.reason = True, reason
        # Nothing is known of how the outputs depend on the inputs any more, so that all of them stay.
        for facts in self.activations():
            self.pin(facts.ids, reason)
        return [self.walk.unknown_facts(value) for value in self.node.outputs]

    def exclusive(self, index: int) -> bool:
        """Tell whether this node alone uses a constant input, so that its values may change."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        if value is None:
            return True
        return value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_output()

    def quantised(self, index: int) -> bool:
        """Tell whether a constant input is dequantised from integers, which runtimes have kernels of their own for."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        # A transpose or a reshape may stand between the integers and the layer.
        while value is not None and value in self.walk.computed:
            node = value.producer()
            if node is None or node.op_type == "DequantizeLinear":
                return True
            value = node.inputs[0]
        return False


class Rule:
    """How an operator passes units, constants and liveness on, and how it is rewritten.

    The default is a rule for an operator of which nothing is known: all that it touches stays.
    """

    reason = "pinned by"
    finite_operands = False
    """A NaN or Inf among the constant operands is refused: it would make every constant unknowable."""
    drops_operands = False
    """The operator can do without an operand of which nothing is left."""

    def choose(self, ctx: NodeContext) -> Rule:
        """Return the rule of this node, where an operator has several forms."""
        del ctx
        return self

    def forward(self, ctx: NodeContext) -> list[ChannelFacts]:
        """Describe the outputs; state ties and pins."""
        return ctx.give_up(f"{self.reason} {ctx.label}")

    def backward(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """Return, for each input that is an activation, which of its elements the live outputs need."""
        del live
        # To need too much is always safe, so this is the answer for whatever has no better one.
        facts_of = (ctx.facts(i) for i in range(len(ctx.node.inputs)))
        return [None if f is None else np.ones(f.ids.shape, np.bool_) for f in facts_of]

    def require(self, ctx: NodeContext, plan: RemovalPlan) -> list[tuple[NDArray[np.int64], str]]:
        """Return units that the operator cannot do without, given what else is kept."""
        del ctx, plan
        return []

    def must_stay_live(self, ctx: NodeContext, plan: RemovalPlan) -> dict[int, tuple[NDArray[np.bool_], str]]:
        """Return, by input, elements that should have stayed live, and why: without them it is wrong or costs more."""
        del ctx, plan
        return {}

    def rewrite(self, ctx: NodeContext, plan: RemovalPlan) -> None:
        """Remove what is cut from the node's parameters and attributes, in place."""

    def use(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> dict[int, ParameterUse]:
        """Return the use of each constant input, by index; inputs left out are used whole."""
        del ctx, live
        return {}


def static_shape(value: ir.Value) -> Shape:
    """Return the shape of a value with None for symbolic dimensions; an unknown rank counts as a scalar."""
    if value.shape is None:
        return ()
    return tuple(d if isinstance(d, int) else None for d in value.shape)
