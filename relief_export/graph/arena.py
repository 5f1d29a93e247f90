"""A static plan of the memory for activations: where each tensor lies in one arena, and how small the arena could be.

Nodes run in the order of the file. A tensor is live from the node that writes it (the first, for an input of the
graph) to the last node that reads it (the end, for an output of the graph); tensors that are live at the same time must
not overlap::

    lower bound = max over nodes of the bytes live while the node runs   ≤   arena

Offsets come from greedy best-fit assignment (Pisarchyk and Lee, "Efficient memory management for deep neural net
inference", 2020) in several orders; the smallest plan wins. Reshape, Flatten and the like share their input's bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from relief_export.errors import UnsupportedModelError
from relief_export.graph.cost import node_label, op_name
from relief_export.graph.ops import operator
from relief_export.graph.prepare import data_inputs, elements, with_static_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

ALIGNMENT = 16
"""Every tensor starts at a multiple of this many bytes, and takes a multiple, as in TensorFlow Lite Micro."""

EXCLUDED = (
    "weights and other constants, the runtime itself, kernels' scratch buffers, and tensors inside control flow; "
    "no operators are fused and none writes over its input"
)


class UnknownSizeError(UnsupportedModelError):
    """An activation's size follows from numbers that are known only when the model runs: there is no plan."""


@dataclass(frozen=True)
class ArenaTensor:
    """One activation (with all the reshapes of it) in the arena.

    Attributes:
        name: Of the value. bytes: Taken, rounded up to the alignment. offset: From the arena's start.
        first: Index of the node that writes it. last: Index of the last node that reads it, inclusive.
    """

    name: str
    bytes: int
    first: int
    last: int
    offset: int = 0


@dataclass(frozen=True)
class ArenaPlan:
    """The plan.

    Attributes:
        bytes: Size of the arena. lower_bound: No plan for this order of execution can be smaller.
        batch: Samples at once.
        peak: Name of the node at which most bytes are live; ``peak_op`` its operator.
        peak_tensors: What is live there, largest first.
        tensors: Every tensor with its place, largest first.
        excluded: What the figure does not contain.
    """

    bytes: int
    lower_bound: int
    batch: int
    peak: str
    peak_op: str
    peak_tensors: tuple[ArenaTensor, ...]
    tensors: tuple[ArenaTensor, ...]
    excluded: str = EXCLUDED

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: of the tensors those at the peak alone, which say what to make smaller."""
        return {
            "arena_bytes": self.bytes,
            "lower_bound_bytes": self.lower_bound,
            "peak": self.peak,
            "peak_op": self.peak_op,
            "peak_tensors": [{"name": each.name, "tensor_bytes": each.bytes} for each in self.peak_tensors],
            "excluded": self.excluded,
        }


def plan_arena(model: ir.Model, batch: int = 1) -> ArenaPlan:
    """Place the activations of a model, at a batch size, in one arena.

    Raises:
        UnsupportedModelError: The shape or the element type of an activation is unknown, or no node computes anything.
    """
    static = with_static_shapes(model, batch)
    graph, inputs = static.graph, data_inputs(static)
    known = _constants(graph, inputs)
    nodes = [node for node in graph if not known.issuperset(node.outputs)]
    if not nodes:
        raise UnsupportedModelError(
            f"graph {graph.name!r} computes nothing from its inputs (are all connections masked?): "
            "there is no arena to plan"
        )
    tensors = _lifetimes(inputs, nodes)
    live = _live_bytes(tensors, len(nodes))
    bound = int(live.max())
    plan = place_best(tensors)
    peak = int(live.argmax())
    placed = tuple(sorted(plan, key=lambda t: (-t.bytes, t.first, t.name)))
    return ArenaPlan(
        bytes=arena_bytes(plan),
        lower_bound=bound,
        batch=batch,
        peak=node_label(nodes[peak]),
        peak_op=op_name(nodes[peak]),
        peak_tensors=tuple(tensor for tensor in placed if tensor.first <= peak <= tensor.last),
        tensors=placed,
    )


def arena_bytes(tensors: Iterable[ArenaTensor]) -> int:
    """Return the end of the last byte of placed tensors."""
    return max((tensor.offset + tensor.bytes for tensor in tensors), default=0)


def place(tensors: Sequence[ArenaTensor]) -> tuple[ArenaTensor, ...]:
    """Give each tensor, in the order given, the smallest gap it fits among those placed that live at the same time."""
    count = len(tensors)
    first, last, size = (np.array([getattr(t, key) for t in tensors]) for key in ("first", "last", "bytes"))
    offset = np.zeros(count, dtype=np.int64)
    for i in range(count):
        rivals = np.flatnonzero((first[:i] <= last[i]) & (first[i] <= last[:i]))
        rivals = rivals[np.argsort(offset[rivals], kind="stable")]
        # The free bytes before each rival begin where all the rivals below it have ended.
        ends = np.maximum.accumulate(offset[rivals] + size[rivals])
        starts = np.concatenate(([0], ends))
        gaps = offset[rivals] - starts[:-1]
        fitting = np.flatnonzero(gaps >= size[i])
        offset[i] = starts[fitting[np.argmin(gaps[fitting])]] if fitting.size else starts[-1]
    return tuple(replace(tensor, offset=int(at)) for tensor, at in zip(tensors, offset, strict=True))


_ORDERS: tuple[Callable[[ArenaTensor], tuple[int, ...]], ...] = (
    lambda t: (-t.bytes, t.first),  # greedy by size
    lambda t: (-t.bytes * (t.last - t.first + 1), t.first),  # by bytes times lifetime
    lambda t: (-(t.last - t.first), -t.bytes, t.first),  # long-lived first: they lie at the bottom
    lambda t: (t.first, -t.bytes),  # as they appear
    lambda t: (-t.last, -t.bytes),  # as they go, backwards
)


def place_best(tensors: Sequence[ArenaTensor]) -> tuple[ArenaTensor, ...]:
    """Give each tensor its place, in the order of several that takes the fewest bytes."""
    # Greedy placement has no order that is best for every network. The name breaks ties, so that a model always gets
    # the same plan.
    ordered = (sorted(tensors, key=lambda tensor: (*order(tensor), tensor.name)) for order in _ORDERS)
    return min((place(one) for one in ordered), key=arena_bytes)


def _live_bytes(tensors: Iterable[ArenaTensor], steps: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the bytes live while each node runs."""
    change = np.zeros(steps + 1, dtype=np.int64)
    for tensor in tensors:
        change[tensor.first] += tensor.bytes
        # The last reader still needs the bytes, so they are free one node later.
        change[tensor.last + 1] -= tensor.bytes
    return np.cumsum(change[:-1])


def _constants(graph: ir.Graph, inputs: Sequence[ir.Value]) -> set[ir.Value]:
    """Return what is known before the first input: a runtime computes it once and keeps it with the weights.

    The shape of a value is known as well, since all shapes are static here.
    """
    known = set(graph.initializers.values()) - set(inputs)
    for node in graph:
        facts_of = any(_bodies(attribute) for attribute in node.attributes.values())
        deciding = node.inputs[: operator(node).decided_by]
        if not facts_of and all(value is None or value in known for value in deciding):
            known.update(node.outputs)
    return known


def _lifetimes(inputs: Sequence[ir.Value], nodes: Sequence[ir.Node]) -> list[ArenaTensor]:
    """Return each activation with the first and the last node that need it, not placed yet."""
    steps = _steps(nodes)
    # Chains of reshapes end at one root, which alone takes part in the plan.
    roots: dict[ir.Value, ir.Value] = {}
    spans: dict[ir.Value, list[int]] = {}

    def see(value: ir.Value, first: int, *, root: ir.Value) -> None:
        roots[value] = root
        readers = [steps[node] for node, _ in value.uses() if node in steps]
        ends = len(nodes) - 1 if value.is_graph_output() else max(readers, default=first)
        span = spans.setdefault(root, [first, ends])
        # A reshape shares its root's bytes, which are needed for as long as either is read.
        span[1] = max(span[1], ends)

    for value in inputs:
        see(value, 0, root=value)
    for index, node in enumerate(nodes):
        for slot, value in enumerate(node.outputs):
            # An optional output that is left out has no name and takes no bytes.
            if value.name:
                source = node.inputs[0] if operator(node).alias and slot == 0 else None
                see(value, index, root=value if source is None else roots.get(source, value))
    return [ArenaTensor(str(value.name), _bytes(value), *span) for value, span in spans.items()]


def _steps(nodes: Sequence[ir.Node]) -> dict[ir.Node, int]:
    """Return when each node runs; what is inside a branch or a loop body runs with the node that holds it."""
    steps = {node: index for index, node in enumerate(nodes)}
    for index, node in enumerate(nodes):
        for inner in (graph for attribute in node.attributes.values() for graph in _bodies(attribute)):
            steps.update(dict.fromkeys(ir.traversal.RecursiveGraphIterator(inner), index))
    return steps


def _bodies(attribute: ir.Attr) -> Sequence[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else ()


def _bytes(value: ir.Value) -> int:
    count, dtype = elements(value), value.dtype
    if count is None or dtype is None or dtype == ir.DataType.STRING:
        raise UnknownSizeError(
            f"tensor {value.name!r} has no known size (shape {value.shape}, type {dtype}): "
            "give the model static shapes except for the batch"
        )
    # Types narrower than a byte have a fraction as their item size.
    size = math.ceil(count * dtype.itemsize)
    return -(-size // ALIGNMENT) * ALIGNMENT
