"""Reshape targets that a model computes from its input's shape, written as constants with 0 (copy) and -1 (the rest).

``Reshape(x, Concat(Unsqueeze(Gather(Shape(x), 0), 0), [-1]))`` is what exporters make of ``x.view(x.size(0), -1)``. Its
target is followed symbolically: an entry is a number or the length of an axis of some value.

Source: ONNX operators Shape-15, Reshape-14.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from relief_export.graph.initializers import add_initializer

if TYPE_CHECKING:
    from collections.abc import Callable

Entries = list[int | ir.SymbolicDim]


def plain_reshapes(model: ir.Model) -> bool:
    """Give every Reshape whose target is computed a constant one where it is known but for the batch, in place.

    Returns:
        Whether any was; shapes behind it may then be inferred further.
    """
    changed = False
    for node in model.graph:
        source, target = (*node.inputs, None, None)[:2]
        if node.op_type != "Reshape" or node.domain != "" or source is None or target is None:
            continue
        if ir.convenience.get_const_tensor(target) is not None:
            continue
        numbers = _target(source, follow(target)) or _target(source, _lengths(node.outputs[0]))
        if numbers is None:
            continue
        value = add_initializer(model.graph, f"{node.outputs[0].name}_shape", np.array(numbers, np.int64))
        node.replace_input_with(1, value)
        node.attributes.pop("allowzero", None)
        node.outputs[0].shape = None
        changed = True
    return changed


def follow(value: ir.Value | None) -> Entries | None:
    """Return the entries of a vector (or the one of a number) that is computed from shapes, None where unknown."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return [int(n) for n in tensor.numpy().reshape(-1)] if tensor.size < 64 else None
    node = value.producer()
    known = _FOLLOW.get(node.op_type) if node is not None and node.domain == "" else None
    return None if node is None or known is None else known(node)


def _lengths(value: ir.Value | None) -> Entries | None:
    return None if value is None or value.shape is None else list(value.shape)


def _target(source: ir.Value, entries: Entries | None) -> list[int] | None:
    """Write a target with numbers only; None where two lengths are unknown or an axis is empty."""
    if entries is None or 0 in entries:
        return None
    lengths = _lengths(source) or []
    numbers = []
    for axis, entry in enumerate(entries):
        if isinstance(entry, int):
            numbers.append(entry)
            continue
        copied = axis < len(lengths) and entry.value is not None and lengths[axis] == entry
        numbers.append(0 if copied else -1)
    return numbers if numbers.count(-1) <= 1 else None


def _shape(node: ir.Node) -> Entries | None:
    lengths = _lengths(node.inputs[0])
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 1 << 31)
    return None if lengths is None else lengths[start:end]


def _gather(node: ir.Node) -> Entries | None:
    entries, places = follow(node.inputs[0]), follow(node.inputs[1])
    if entries is None or places is None or any(not isinstance(p, int) for p in places):
        return None
    return [entries[p] for p in places if isinstance(p, int)]


def _slice(node: ir.Node) -> Entries | None:
    entries, *bounds = (follow(v) for v in node.inputs[:3])
    if entries is None or len(node.inputs) > 4 or any(b is None or not isinstance(b[0], int) for b in bounds):
        return None
    start, end = (b[0] for b in bounds if b)
    return entries[start:end] if isinstance(start, int) and isinstance(end, int) else None


def _concat(node: ir.Node) -> Entries | None:
    parts = [follow(v) for v in node.inputs]
    return None if any(p is None for p in parts) else [e for p in parts if p for e in p]


def _same(node: ir.Node) -> Entries | None:
    return follow(node.inputs[0])


_FOLLOW: dict[str, Callable[[ir.Node], Entries | None]] = {
    "Cast": _same,
    "Concat": _concat,
    "Gather": _gather,
    "Identity": _same,
    "Shape": _shape,
    "Slice": _slice,
    "Squeeze": _same,
    "Unsqueeze": _same,
}
