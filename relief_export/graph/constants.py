"""Whole tensors that are constant: the branch that computes one is replaced by its value."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from relief_export.graph.elementwise import Elementwise
from relief_export.graph.flow import static_shape
from relief_export.graph.initializers import add_initializer, drop_unused, free_name
from relief_export.graph.linear import Linear
from relief_export.graph.norms import BatchNorm

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from relief_export.graph.flow import Rule, Site
    from relief_export.graph.liveness import Liveness

# Operator -> (operand that may vanish, value at which it does).
_NEUTRAL = {("Add", 0): 0.0, ("Add", 1): 0.0, ("Sub", 1): 0.0, ("Mul", 0): 1.0, ("Mul", 1): 1.0, ("Div", 1): 1.0}


def substitute_constants(model: ir.Model, liveness: Liveness) -> bool:
    """Give elementwise nodes the value of an always-constant operand, and constant outputs their value, in place.

    Only where the branch behind it holds at least as many parameters as the value that replaces it.
    """
    rules = {site.node: rule for site, rule in liveness.sites}
    flows = liveness.trace.flows
    changed = False
    for site, rule in liveness.sites:
        if not isinstance(rule, Elementwise) or len(site.flows()) < 2:
            continue
        for index, value in enumerate(site.node.inputs):
            known = value is not None and value in flows and not np.isnan(flows[value].const).any()
            if known and value is not None and _pays(value, rules) and _others_cover(site, index):
                _replace_operand(model.graph, site, index, flows[value].const)
                changed = True
                break
    for index, value in enumerate(model.graph.outputs):
        if value in flows and not np.isnan(flows[value].const).any() and _pays(value, rules, output=True):
            changed = _replace_output(model.graph, index, flows[value].const) or changed
    if changed:
        common.RemoveUnusedNodesPass()(model)
        drop_unused(model.graph)
    return changed


def _pays(value: ir.Value, rules: dict[ir.Node, Rule], *, output: bool = False) -> bool:
    """Tell whether parameters that only this value needs go with it."""
    if value.is_graph_output() and not output:
        return False
    while True:
        node = value.producer()
        if node is None or len(value.uses()) > (0 if output else 1) or node not in rules:
            return False
        if isinstance(rules[node], Linear | BatchNorm):
            return True
        source = node.inputs[0]
        if source is None or sum(v is not None and v.producer() is not None for v in node.inputs) != 1:
            return False
        value, output = source, False


def _others_cover(site: Site, index: int) -> bool:
    """Tell whether the other activations alone give the output its shape."""
    shape = site.result.shape  # symbols included: one batch may be broadcast over another
    others = [v for k, v in enumerate(site.node.inputs) if k != index and v is not None and site.flow(k) is not None]
    return shape is not None and len(shape) > 0 and any(v.shape == shape for v in others)


def _array(value: ir.Value, const: NDArray[np.float64]) -> NDArray[np.generic]:
    """Return a constant in the value's type, without leading axes of length 1 and as one number where it is one."""
    if (const == const.reshape(-1)[0]).all():
        const = const.reshape(-1)[:1].reshape(())
    while const.ndim and const.shape[0] == 1:
        const = const[0]
    dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    return const.astype(dtype)


def _replace_operand(graph: ir.Graph, site: Site, index: int, const: NDArray[np.float64]) -> None:
    node, value = site.node, site.node.inputs[index]
    assert value is not None  # noqa: S101 - checked by the caller
    if len(node.inputs) == 2 and (const == _NEUTRAL.get((node.op_type, index), np.nan)).all():
        other = node.inputs[1 - index]
        if not node.outputs[0].is_graph_output() and other is not None:
            node.outputs[0].replace_all_uses_with(other)
            return
    node.replace_input_with(index, add_initializer(graph, f"{value.name}_value", _array(value, const)))


def _replace_output(graph: ir.Graph, index: int, const: NDArray[np.float64]) -> bool:
    """Expand a constant output to its shape, which may need the batch size; refuse shapes that depend on more."""
    value = graph.outputs[index]
    shape = static_shape(value)
    if not shape:
        return False
    target = add_initializer(graph, f"{value.name}_shape", np.array(shape, np.int64)) if None not in shape else None
    if target is None and (target := _target(graph, value)) is None:
        return False
    full = add_initializer(graph, f"{value.name}_value", _array(value, const))
    result = ir.node("Expand", [full, target], name="")
    name = value.name
    value.name = free_name(graph, f"{name}_computed")
    out = result.outputs[0]
    out.name, out.shape, out.type = name, value.shape, value.type
    graph.append(result)
    graph.outputs[index] = out
    return True


def _target(graph: ir.Graph, value: ir.Value) -> ir.Value | None:
    """Compute a shape of which only the first length is unknown and the same as that of an input."""
    shape, batch = static_shape(value), next((v for v in graph.inputs if len(static_shape(v)) > 0), None)
    if None in shape[1:] or batch is None or value.shape is None or batch.shape is None:
        return None
    if value.shape[0] != batch.shape[0] or value.shape[0] == ir.SymbolicDim(None):
        return None
    tail = add_initializer(graph, f"{value.name}_tail", np.array(shape[1:], np.int64))
    bounds = [add_initializer(graph, f"{value.name}_{k}", np.array([n], np.int64)) for k, n in (("from", 0), ("to", 1))]
    whole = ir.node("Shape", [batch], name="")
    first = ir.node("Slice", [whole.outputs[0], *bounds], name="")
    target = ir.node("Concat", [first.outputs[0], tail], attributes={"axis": 0}, name="")
    for part, suffix in ((whole, "shape"), (first, "batch"), (target, "target")):
        part.outputs[0].name = free_name(graph, f"{value.name}_{suffix}")
    graph.extend([whole, first, target])
    return target.outputs[0]
