"""Reshape targets that a model computes from its input's shape, written as constants with 0 (copy) and -1 (the rest).

``Reshape(x, Concat(Unsqueeze(Gather(Shape(x), 0), 0), [-1]))`` is what exporters make of ``x.view(x.size(0), -1)``. Its
target is followed symbolically: an entry is a product of a number and named lengths, so that ``-1`` can be worked out
by division. A reshape that splits an axis which a transpose in front of it moved as a whole changes places with the
transpose, as in ``(B, H, T, D) -> (B H, T, D) -> (B H, D, T) -> (B, H, D, T)``, which is one transpose.

Source: ONNX operators Shape-15, Reshape-14.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from relief_export.graph.initializers import add_initializer, free_name, node_graphs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_PLAIN = re.compile(r"[A-Za-z_?][\w.?]*")
_REST = -1
_READERS = frozenset({"Gather", "Shape", "Slice", "Squeeze"})
"""Operators that pick lengths."""


@dataclass(frozen=True)
class Length:
    """The length of an axis: a number times named lengths, the names in order."""

    factor: int
    names: tuple[str, ...] = ()

    def __mul__(self, other: Length) -> Length:
        return Length(self.factor * other.factor, tuple(sorted(self.names + other.names)))

    def over(self, other: Length) -> Length | None:
        """Divide, None where that is no such product."""
        names = Counter(self.names)
        # Unlike the operator -, this keeps negative counts, which show that a name does not divide.
        names.subtract(other.names)
        if not other.factor or self.factor % other.factor or any(n < 0 for n in names.values()):
            return None
        return Length(self.factor // other.factor, tuple(sorted(names.elements())))

    @property
    def dimension(self) -> int | ir.SymbolicDim:
        """The length as a dimension of a shape."""
        if not self.names:
            return self.factor
        return ir.SymbolicDim("*".join(self.names if self.factor == 1 else (str(self.factor), *self.names)))


Entries = list[Length]
ONE = Length(1)


def plain_reshapes(model: ir.Model) -> bool:
    """Give every Reshape whose target is computed a constant one where it is known but for one length, in place.

    Shapes that follow from a target are inferred on the way, so that a target behind it is known as well.

    Returns:
        Whether any was; shapes behind it may then be inferred further.
    """
    changed, news = False, set[ir.Value]()
    for node in model.graph:
        if any(value in news for value in node.inputs):
            news.update(_infer(node, model.opset_imports))
        if node.op_type in _READERS and node.domain == "":
            changed = _number(model.graph, node) or changed
        if node.op_type != "Reshape" or node.domain != "" or None in node.inputs[:2]:
            continue
        source, target, out = node.inputs[0], node.inputs[1], node.outputs[0]
        entries = _resolved(node)
        if source is None or target is None or entries is None:
            continue
        shape = ir.Shape([entry.dimension for entry in entries])
        if out.shape != shape:
            out.shape = shape
            news.add(out)
        numbers = None if ir.convenience.get_const_tensor(target) is not None else _numbers(lengths(source), entries)
        if numbers is not None:
            value = add_initializer(model.graph, f"{out.name}_shape", np.array(numbers, np.int64))
            node.replace_input_with(1, value)
            # The new target writes a copied length as 0, which this attribute would turn into an empty axis.
            node.attributes.pop("allowzero", None)
            changed = True
    # A list, because joining inserts nodes; and last, when the shapes on the way are known.
    for node in list(model.graph):
        changed = _join(model.graph, node) or changed
    return changed


def _number(graph: ir.Graph, node: ir.Node) -> bool:
    """Put a constant in the place of lengths that are numbers whatever the input is."""
    out = node.outputs[0]
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if out.is_graph_output() or not out.uses() or out.shape is None or not out.shape.is_static():
        return False
    if node.op_type != "Shape" and (source is None or source.op_type != "Shape"):
        return False
    entries = _whole(follow(out))
    if entries is None:
        return False
    array = np.array(entries, np.int64).reshape([d for d in out.shape if isinstance(d, int)])
    out.replace_all_uses_with(add_initializer(graph, f"{out.name}_known", array))
    return True


def lengths(value: ir.Value | None) -> Entries | None:
    """Return the lengths of a value's axes, None where their number is unknown; one without a name is like no other."""
    if value is None or value.shape is None:
        return None
    return [_length(d, f"?{value.name}.{axis}") for axis, d in enumerate(value.shape)]


def _length(dimension: int | ir.SymbolicDim, unnamed: str) -> Length:
    if isinstance(dimension, int):
        return Length(dimension)
    parts = (dimension.value or unnamed).split("*")
    if not all(part.isdigit() or _PLAIN.fullmatch(part) for part in parts):
        return Length(1, (dimension.value or unnamed,))  # a sum
    names = sorted(part for part in parts if not part.isdigit())
    return Length(math.prod(int(part) for part in parts if part.isdigit()), tuple(names))


def follow(value: ir.Value | None) -> Entries | None:
    """Return the entries of a vector (or the one of a number) that is computed from shapes, None where unknown."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        # Shapes are short: a longer constant is data.
        return [Length(int(n)) for n in tensor.numpy().reshape(-1)] if tensor.size < 64 else None
    node = value.producer()
    known = _FOLLOW.get(node.op_type) if node is not None and node.domain == "" else None
    return None if node is None or known is None else known(node)


def _resolved(node: ir.Node) -> Entries | None:
    """Return the lengths that a Reshape gives, those that it copies and the rest worked out."""
    source, out = lengths(node.inputs[0]), node.outputs[0]
    entries = follow(node.inputs[1])
    if entries is None:
        return lengths(out)
    unknown = [Length(1, (f"?{out.name}.{axis}",)) for axis in range(len(entries))]
    copies = not node.attributes.get_int("allowzero", 0)
    for axis, entry in enumerate(entries):
        if entry.factor == 0:
            if source is None or not copies or axis >= len(source):
                return None
            entries[axis] = source[axis]
    if Length(_REST) in entries:
        axis = entries.index(Length(_REST))
        stated = math.prod((e for k, e in enumerate(entries) if k != axis), start=ONE)
        rest = None if source is None else math.prod(source, start=ONE).over(stated)
        # A name of its own for this length leaves the others known.
        entries[axis] = unknown[axis] if rest is None else rest
    return None if any(entry.factor <= 0 for entry in entries) else entries


def _numbers(source: Entries | None, entries: Entries) -> list[int] | None:
    """Write a target with numbers only; None where two lengths are unknown or an axis is empty."""
    known = source or []
    numbers = []
    for axis, entry in enumerate(entries):
        copied = axis < len(known) and known[axis] == entry
        # Only one length may be left open, so whatever can be copied is.
        numbers.append(entry.factor if not entry.names else 0 if copied else _REST)
    return None if numbers.count(_REST) > 1 or any(e.factor == 0 for e in entries) else numbers


def _infer(node: ir.Node, opsets: dict[str, int]) -> list[ir.Value]:
    """Infer the shapes of one node again; return the outputs of which more is known."""
    operands = {str(v.name): v for v in node.inputs if v is not None}
    if node.domain != "" or list(node_graphs(node)) or any(v.type is None for v in operands.values()):
        return []
    types, data = {}, {}
    for name, value in operands.items():
        assert value.type is not None  # noqa: S101 - checked above
        types[name] = ir.serde.serialize_type(value.type)
        if value.shape is not None:
            ir.serde.serialize_shape_into(types[name], value.shape)
        tensor = ir.convenience.get_const_tensor(value)
        # Axes and targets decide a shape. Weights do not, and would be serialised for nothing.
        if tensor is not None and tensor.size < 64:
            data[name] = ir.serde.serialize_tensor(tensor)
    if node.op_type == "GroupNormalization":  # onnx has no inference for it
        like = node.inputs[0]
        return [v for v in node.outputs if like is not None and _learn(v, like.shape)]
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets[""], "")
        found = onnx.shape_inference.infer_node_outputs(schema, ir.serde.serialize_node(node), types, data)
    except (onnx.shape_inference.InferenceError, onnx.defs.SchemaError, onnx.checker.ValidationError, RuntimeError):
        return []  # what an exporter writes of sequences does not always satisfy the schema
    return [
        v
        for v in node.outputs
        if v.name in found and _learn(v, ir.serde.deserialize_type_proto_for_shape(found[v.name]))
    ]


def _learn(value: ir.Value, shape: ir.Shape | None) -> bool:
    """Join a new inference of a value's shape with what was known; return whether that is news."""
    if shape is None or shape == value.shape:
        return False
    if value.shape is not None and len(value.shape) == len(shape):
        pairs = zip(shape, value.shape, strict=True)
        shape = ir.Shape([b if isinstance(b, int) or a == ir.SymbolicDim(None) else a for a, b in pairs])
    changed = shape != value.shape
    value.shape = shape
    return changed


def _join(graph: ir.Graph, node: ir.Node) -> bool:
    """Make one transpose, at most behind one reshape, of a reshape, a transpose and a reshape."""
    perm = node.attributes.get_ints("perm", ())
    ends = _ends(node) if node.op_type == "Transpose" and node.domain == "" and perm else None
    if ends is None:
        return False
    source, second = ends
    before, moved, after = lengths(source), lengths(node.inputs[0]), lengths(second.outputs[0])
    if before is None or moved is None or after is None or len(moved) != len(perm):
        return False
    runs = _runs([moved[p] for p in perm], after)
    # The split comes before the transpose, so its runs lie in the order of the axes in front of it.
    by_axis = [] if runs is None else [run for _, run in sorted(zip(perm, runs, strict=True), key=lambda pair: pair[0])]
    split = [after[k] for run in by_axis for k in run]
    numbers = _numbers(before, split)
    if runs is None or numbers is None:
        return False
    starts = np.cumsum([0, *(len(run) for run in by_axis)])
    order = [int(starts[axis]) + k for axis in perm for k in range(len(by_axis[axis]))]
    # Where nothing has to be split, the transpose alone is left.
    if split != before:
        target = add_initializer(graph, f"{second.outputs[0].name}_split", np.array(numbers, np.int64))
        source = _insert(graph, second, ir.node("Reshape", [source, target]), split)
    out = _insert(graph, second, ir.node("Transpose", [source], attributes={"perm": order}), after)
    old, name = second.outputs[0], second.outputs[0].name
    old.replace_all_uses_with(out)
    old.name, out.name = free_name(graph, f"{name}_before"), name  # by which its shape is looked up
    return True


def _ends(node: ir.Node) -> tuple[ir.Value, ir.Node] | None:
    """Return what the reshape in front of a transpose reads, and the reshape behind it, each the only user."""
    first, second = node.inputs[0].producer() if node.inputs[0] is not None else None, _only_use(node)
    reshapes = [n for n in (first, second) if n is not None and n.op_type == "Reshape" and n.domain == ""]
    if len(reshapes) < 2 or first is None or second is None or first.inputs[0] is None:
        return None
    alone = _only_use(first) is node and second.inputs[0] is node.outputs[0] and not second.outputs[0].is_graph_output()
    return (first.inputs[0], second) if alone else None


def _only_use(node: ir.Node) -> ir.Node | None:
    """Return the one node that reads a node's output, None where there are others or the graph returns it."""
    uses = list(node.outputs[0].uses())
    return uses[0].node if len(uses) == 1 and not node.outputs[0].is_graph_output() else None


def _insert(graph: ir.Graph, place: ir.Node, node: ir.Node, shape: Entries) -> ir.Value:
    old, out = place.outputs[0], node.outputs[0]
    out.name = free_name(graph, f"{old.name}_{node.op_type.lower()}")
    out.type, out.shape = old.type, ir.Shape([entry.dimension for entry in shape])
    graph.insert_before(place, node)
    return out


def _runs(merged: Entries, parts: Entries) -> list[range] | None:
    """Divide ``parts`` into one run for each merged axis whose product it is, None where that cannot be."""
    runs, end = [], 0
    for axis, whole in enumerate(merged):
        start, product = end, ONE
        # Lengths of 1 at the very end fit no axis but the last, though its product is already reached.
        while end < len(parts) and (
            end == start or product != whole or (axis == len(merged) - 1 and parts[end] == ONE)
        ):
            product, end = product * parts[end], end + 1
        if product != whole:
            return None
        runs.append(range(start, end))
    return runs if end == len(parts) else None


def _shape(node: ir.Node) -> Entries | None:
    found = lengths(node.inputs[0])
    # Python's slices treat negative and too large bounds as ONNX does.
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 1 << 31)
    return None if found is None else found[start:end]


def _whole(entries: Sequence[Length] | None) -> list[int] | None:
    """Return entries that are numbers."""
    return None if entries is None or any(e.names for e in entries) else [e.factor for e in entries]


def _gather(node: ir.Node) -> Entries | None:
    entries, places = follow(node.inputs[0]), _whole(follow(node.inputs[1]))
    if entries is None or places is None or any(not -len(entries) <= p < len(entries) for p in places):
        return None
    return [entries[p] for p in places]


def _slice(node: ir.Node) -> Entries | None:
    entries, *bounds = (follow(v) for v in node.inputs[:3])
    start, end = (_whole(b) for b in bounds)
    if entries is None or len(node.inputs) > 4 or not start or not end:
        return None
    return entries[start[0] : end[0]]


def _concat(node: ir.Node) -> Entries | None:
    parts = [follow(v) for v in node.inputs]
    return None if any(p is None for p in parts) else [e for p in parts if p for e in p]


def _same(node: ir.Node) -> Entries | None:
    return follow(node.inputs[0])


def _product(node: ir.Node) -> Entries | None:
    first, second = (follow(v) for v in node.inputs)
    if not first or not second or (len(first) != len(second) and 1 not in (len(first), len(second))):
        return None
    count = max(len(first), len(second))
    return [first[k % len(first)] * second[k % len(second)] for k in range(count)]


def _quotient(node: ir.Node) -> Entries | None:
    first, second = (follow(v) for v in node.inputs)
    if not first or not second or len(first) != 1 or len(second) != 1:
        return None
    found = first[0].over(second[0])
    return None if found is None else [found]


_FOLLOW: dict[str, Callable[[ir.Node], Entries | None]] = {
    "Cast": _same,
    "Concat": _concat,
    "Div": _quotient,
    "Gather": _gather,
    "Identity": _same,
    "Mul": _product,
    "Reshape": _same,
    "Shape": _shape,
    "Slice": _slice,
    "Squeeze": _same,
    "Unsqueeze": _same,
}
