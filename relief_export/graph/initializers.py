"""New constants and names of a graph, and those that nothing reads any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from numpy.typing import NDArray


def free_name(graph: ir.Graph, name: str) -> str:
    """Return ``name``, or the first ``name_K`` that no value of the graph has."""
    taken = {v.name for v in graph.inputs} | set(graph.initializers)
    taken |= {out.name for node in graph.all_nodes() for out in node.outputs}
    free, k = name, 0
    while free in taken:
        k += 1
        free = f"{name}_{k}"
    return free


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


def drop_unused(graph: ir.Graph) -> None:
    """Remove every constant that no node reads and that is neither an input nor an output of the graph."""
    for name in [n for n, v in graph.initializers.items() if not v.uses()]:
        value = graph.initializers[name]
        if not value.is_graph_input() and not value.is_graph_output():
            del graph.initializers[name]
