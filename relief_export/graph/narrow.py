"""Narrower layers between tensors that must stay wide: gather inputs that are read, place outputs that are not zero.

On the shared tensor of residual additions the union of all live channels stays, and a network's input stays whole. A
layer that reads only some of these channels gets a Gather in front; one whose output is partly zero gets its live rows
placed by a Pad with one zero channel and a Gather behind. Both are exact. They are applied where they save more bytes
than their indices and nodes cost, and at least ``_COPY`` multiply-accumulates for each element that is copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from relief_export.graph.initializers import add_initializer, free_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from relief_export.graph.flow import Site
    from relief_export.graph.liveness import Liveness
    from relief_export.graph.matrix import Matrix

_NODE = 100  # bytes of a node with its names in the file
_COPY = 4


def narrow(graph: ir.Graph, liveness: Liveness) -> int:
    """Narrow every layer of an analysed graph where it pays, in place; return how many."""
    gathers: dict[tuple[ir.Value, bytes], ir.Value] = {}
    count = 0
    for site, _ in liveness.sites:
        if "matrix" in site.cache and site.cache["matrix"].groups == 1 and site.exclusive(1) and site.exclusive(2):
            count += _narrow_input(graph, site, gathers)
            count += _narrow_output(graph, site)
    return count


def _narrow_input(graph: ir.Graph, site: Site, gathers: dict[tuple[ir.Value, bytes], ir.Value]) -> bool:
    matrix: Matrix = site.cache["matrix"]
    used = np.flatnonzero(site.cache["nonzero"][0].any(axis=0) & (site.cache["const_in"] != 0))
    outs, ins = site.cache["nonzero"].shape[1:]
    taps = matrix.size // (outs * ins)
    lost, source = ins - len(used), site.source
    key = (source, used.tobytes())
    price = 0 if key in gathers else 8 * len(used) + _NODE
    if not len(used) or source is None or lost * outs * taps * matrix.weight.itemsize <= price:
        return False
    if lost * outs * taps < _COPY * len(used):
        return False
    if key not in gathers:
        indices = add_initializer(graph, f"{source.name}_used", used)
        node = ir.node(
            "Gather", [source, indices], attributes={"axis": matrix.data_axis}, name=f"{indices.name}_gather"
        )
        graph.insert_before(site.node, node)
        gathers[key] = _describe(node, free_name(graph, f"{indices.name}_values"), source, matrix.data_axis, len(used))
    site.node.replace_input_with(0, gathers[key])
    _replace(graph, site.node, 1, matrix.weight.take(used, matrix.in_axis))
    return True


def _narrow_output(graph: ir.Graph, site: Site) -> bool:
    weight = site.array(1)
    matrix: Matrix = site.cache["matrix"]
    out, outs = site.result, site.cache["nonzero"].shape[1]
    bias = site.array(2)
    if weight is None or out.is_graph_output() or out.shape is None or (bias is not None and bias.size != outs):
        return False
    zero = ~(weight != 0).any(axis=tuple(k for k in range(weight.ndim) if k != matrix.out_axis))
    zero &= True if bias is None else bias.reshape(-1) == 0
    row = weight.size // outs
    lost, rank = int(zero.sum()), len(out.shape)
    price = 8 * (outs + 2 * rank) + 2 * _NODE
    if lost == outs or lost * row * weight.itemsize <= price or lost * row < 2 * _COPY * outs:
        return False
    kept = np.flatnonzero(~zero)
    order = np.full(outs, len(kept), np.int64)
    order[kept] = np.arange(len(kept))
    pads = np.zeros(2 * rank, np.int64)
    pads[rank + matrix.output_axis] = 1
    users = list(out.uses())
    pad = ir.node("Pad", [out, add_initializer(graph, f"{out.name}_pads", pads)], name=f"{out.name}_pad")
    padded = _describe(pad, free_name(graph, f"{out.name}_padded"), out, matrix.output_axis, len(kept) + 1)
    indices = add_initializer(graph, f"{out.name}_order", order)
    gather = ir.node("Gather", [padded, indices], attributes={"axis": matrix.output_axis}, name=f"{out.name}_place")
    placed = _describe(gather, free_name(graph, f"{out.name}_placed"), out, matrix.output_axis, outs)
    for use in users:
        use.node.replace_input_with(use.idx, placed)
    graph.insert_after(site.node, [pad, gather])
    out.shape = ir.Shape([len(kept) if k == matrix.output_axis else d for k, d in enumerate(out.shape)])
    _replace(graph, site.node, 1, weight.take(kept, matrix.out_axis))
    if bias is not None:
        _replace(graph, site.node, 2, bias.take(kept, bias.ndim - 1))
    return True


def _describe(node: ir.Node, name: str, like: ir.Value, axis: int, length: int) -> ir.Value:
    value = node.outputs[0]
    value.name, value.type = name, like.type
    if like.shape is not None:
        value.shape = ir.Shape([length if k == axis else d for k, d in enumerate(like.shape)])
    return value


def _replace(graph: ir.Graph, node: ir.Node, index: int, array: NDArray[np.generic]) -> None:
    """Put ``array`` in the place of an initializer that only this node uses, under its name."""
    old = node.inputs[index]
    assert old is not None  # noqa: S101 - checked by the caller
    assert old.name is not None  # noqa: S101
    node.replace_input_with(index, None)
    del graph.initializers[old.name]
    node.replace_input_with(index, add_initializer(graph, old.name, array))
