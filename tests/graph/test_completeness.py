"""Nothing removable is left: a brute-force oracle on networks without obstacles.

The oracle knows nothing of the engine. In float64 it perturbs the incoming weights of one channel at a time and looks
at the outputs (a channel that no output notices is dead), and looks at each channel's activation over random inputs and
positions (a channel that is always the same number is constant, and nothing in these networks forbids to fold it).
"""

from __future__ import annotations

import random

import numpy as np
import onnx_ir as ir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from relief_export.graph.shrink import shrink
from tests.graph.builder import plain_network

LINEAR = {"Conv": 0, "Gemm": 0, "MatMul": 1}  # operator -> axis of the weight that counts outputs
UNMOVED = 1e-12


def doubled(model: ir.Model) -> tuple[object, dict[str, np.ndarray], list[tuple[str, str, str]]]:
    """Rebuild a model in float64 with every linear layer's weight as an input and its result as an output."""
    proto = ir.to_proto(model)
    weights = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    weights = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in weights.items()}
    layers = [(n.op_type, n.input[1], n.output[0]) for n in proto.graph.node if n.op_type in LINEAR]
    swept = {name for _, name, _ in layers}
    inputs = [helper.make_tensor_value_info(n, TensorProto.DOUBLE, None) for n in ("x", *sorted(swept))]
    names = [o.name for o in proto.graph.output] + [result for _, _, result in layers]
    outputs = [helper.make_tensor_value_info(n, TensorProto.DOUBLE, None) for n in dict.fromkeys(names)]
    constants = [numpy_helper.from_array(a, n) for n, a in weights.items() if n not in swept]
    graph = helper.make_graph(list(proto.graph.node), "double", inputs, outputs, constants)
    rebuilt = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=9)
    return ReferenceEvaluator(rebuilt), {n: weights[n] for n in swept}, layers


def removable(model: ir.Model) -> list[str]:
    """Name every channel of every inner linear layer that the outputs do not need."""
    evaluator, weights, layers = doubled(model)
    results = [o.name for o in model.graph.outputs]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 3, 6, 6))
    reference = dict(zip(evaluator.output_names, evaluator.run(None, {"x": x, **weights}), strict=True))
    found = []
    for op, name, result in layers:
        axis, activations = LINEAR[op], reference[result]
        if result in results or (op == "MatMul" and _is_last(model, result)):
            continue
        for channel in range(weights[name].shape[axis]):
            line = activations.take(channel, 1)
            if np.ptp(line) < UNMOVED:
                found.append(f"{result}[{channel}] is always {line.flat[0]}")
                continue
            moved = weights[name].copy()
            np.moveaxis(moved, axis, 0)[channel] += rng.normal(size=np.moveaxis(moved, axis, 0)[channel].shape)
            after = evaluator.run(results, {"x": x, **weights, name: moved})
            if all(np.abs(a - reference[n]).max() < UNMOVED for n, a in zip(results, after, strict=True)):
                found.append(f"{result}[{channel}] is noticed by no output")
    return found


def _is_last(model: ir.Model, result: str) -> bool:
    """Tell a MatMul whose bias addition is the graph's output."""
    return any(
        n.op_type == "Add" and n.inputs[0].name == result and n.outputs[0].is_graph_output() for n in model.graph
    )


@settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data(), st.integers(0, 2**32 - 1))
def test_nothing_removable_is_left(data: st.DataObject, seed: int) -> None:
    model = plain_network(lambda options: data.draw(st.sampled_from(options)), seed)
    assert removable(shrink(model).model) == []


def test_oracle_finds_what_is_removable() -> None:
    """The oracle is worth something: it finds the dead channels of masked networks."""
    models = [plain_network(random.Random(seed).choice, seed) for seed in range(8)]  # noqa: S311 - for a test
    assert sum(bool(removable(m)) for m in models) >= 4
