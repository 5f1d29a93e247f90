"""New constants of a graph, and those that nothing reads any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from numpy.typing import NDArray


def add_initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """Register ``array`` under ``name``, or under the first free ``name_K``."""
    taken = {v.name for v in graph.inputs} | set(graph.initializers)
    taken |= {out.name for node in graph for out in node.outputs} if name in taken else set()
    free, k = name, 0
    while free in taken:
        k += 1
        free = f"{name}_{k}"
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
