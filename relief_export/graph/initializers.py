"""New constants and names of a graph, and those that nothing reads any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_INNER = "relief_export.names_in_subgraphs"


def free_name(graph: ir.Graph, name: str) -> str:
    """Return ``name``, or the first ``name_K`` that no value of the graph has."""
    taken = {v.name for v in graph.inputs} | {out.name for node in graph for out in node.outputs}
    inner = _names_in_subgraphs(graph)
    free, k = name, 0
    while free in taken or free in graph.initializers or free in inner:
        k += 1
        free = f"{name}_{k}"
    return free


def _names_in_subgraphs(graph: ir.Graph) -> frozenset[str]:
    """Return the names inside control flow, which no pass changes: looked for once, as it takes long."""
    if _INNER not in graph.meta:
        found: set[str] = set()
        for inner in graph.subgraphs():
            values = (*inner.inputs, *inner.initializers.values(), *(out for node in inner for out in node.outputs))
            found.update(str(value.name) for value in values)
        graph.meta[_INNER] = frozenset(found)
    names: frozenset[str] = graph.meta[_INNER]
    return names


def add_initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """Register ``array`` under ``name``, or under the first free ``name_K``."""
    free = free_name(graph, name)
    array = np.ascontiguousarray(array)
    value = ir.Value(
        name=free,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=free),
    )
    graph.register_initializer(value)
    return value


def node_graphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the graphs that a node of control flow holds."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def drop_unused(graph: ir.Graph) -> None:
    """Remove every constant that no node reads and that is neither an input nor an output of the graph."""
    for name in [n for n, v in graph.initializers.items() if not v.uses()]:
        value = graph.initializers[name]
        if not value.is_graph_input() and not value.is_graph_output():
            del graph.initializers[name]


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer or Constant node that no caller can override, or None."""
    return None if value is None or value.is_graph_input() else ir.convenience.get_const_tensor(value)


def constant_array(value: ir.Value | None) -> NDArray[np.generic] | None:
    """Return the array of an initializer that no caller can override, or None."""
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.numpy()


def is_read(value: ir.Value) -> bool:
    """Tell whether a node reads a value or the graph returns it."""
    return bool(value.uses()) or value.is_graph_output()
