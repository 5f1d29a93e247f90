"""Random networks: the shrunk model is the masked one, in ONNX Runtime, with optimisations off and on.

Where a source in float32 is itself off, the judge is the same network in float64: the shrunk one must not be further
from it. One that rounds activations may take another step at the last bit: it is wrong where it is so for every input.
"""

from __future__ import annotations

import os
import random

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from relief_export.graph.cost import cost
from relief_export.graph.shrink import shrink
from tests.graph.builder import Drawn, any_network, newest_opset

NETWORKS = int(os.environ.get("RELIEF_FUZZ", "500"))
FIRST = int(os.environ.get("RELIEF_FUZZ_FIRST", "0"))
PIECE = 50
"""Networks of one test: what was tried counts when a long run is stopped, and processes share the pieces."""
RELATIVE = 1e-5  # of the output's scale
LEVELS = (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
INPUTS = 3
UNRUN = PIECE // 10 if newest_opset() < 21 else 0
"""Networks of a piece that the runtime may refuse as they were drawn, which says nothing of the shrunk ones: 1.17 makes
a Gemm of a MatMul of three axes before a BatchNormalization, and loses the rank of a quantised GroupNormalization."""
KEPT_AS_FLOAT = {"Resize": (2,)}
"""Operator -> inputs that are float32 whatever the network computes in."""


class NotRunError(Exception):
    """The runtime refuses a network as it was drawn."""


def run(model: ir.Model, x: np.ndarray, level: ort.GraphOptimizationLevel) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    # By default the runtime rounds activations in front of weights stored as int8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def exact(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    """Run a network in float64, by onnx's reference implementation."""
    proto = ir.to_proto(model)
    kept = {
        node.input[i] for node in proto.graph.node for i in KEPT_AS_FLOAT.get(node.op_type, ()) if i < len(node.input)
    }
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name not in kept:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for node in proto.graph.node:
        for attribute in node.attribute if node.op_type == "Cast" else ():
            attribute.i = onnx.TensorProto.DOUBLE if attribute.i == onnx.TensorProto.FLOAT else attribute.i
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    del proto.graph.value_info[:]
    return ReferenceEvaluator(proto).run(None, {"x": x.astype(np.float64)})


def error(reference: list[np.ndarray], found: list[np.ndarray]) -> float:
    worst = 0.0
    for a, b in zip(reference, found, strict=True):
        assert a.shape == b.shape
        assert np.isfinite(b).all()
        worst = max(worst, float(np.abs(a - b).max()) / max(float(np.abs(a).max()), 1e-3))
    return worst


def without_descriptions(model: ir.Model) -> ir.Model:
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    return ir.from_proto(proto)


def is_wrong(drawn: Drawn, found: ir.Model, x: np.ndarray) -> bool:
    # The runtime believes stated shapes when it optimises and when it reuses memory.
    legal = without_descriptions(drawn.model) if drawn.stale else drawn.model
    for level in LEVELS:
        try:
            source = run(legal, x, level)
        except Exception as refusal:
            raise NotRunError(str(refusal)) from refusal
        result = run(found, x, level)
        if error(source, result) > RELATIVE:
            truth = exact(drawn.model, x)
            if error(truth, result) > max(RELATIVE, 2 * error(truth, source)):
                return True
    return False


def size(model: ir.Model) -> int:
    """Return the bytes of a file, without descriptions of intermediate values."""
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    return proto.ByteSize()


def parameters(model: ir.Model) -> int:
    """Count what is stored of weights; single numbers are bounds, attributes in old opsets."""
    arrays = [v.const_value for v in model.graph.initializers.values()]
    return sum(a.size for a in arrays if a.dtype.is_floating_point() and len(a.shape))


@pytest.mark.parametrize("first", range(FIRST, FIRST + NETWORKS, PIECE))
def test_shrunk_is_masked(first: int) -> None:
    """``any_network(random.Random(seed).choice, seed)`` draws one that is named here again."""
    wrong, unrun = {}, {}
    for seed in range(first, min(first + PIECE, FIRST + NETWORKS)):
        try:
            check(any_network(random.Random(seed).choice, seed), seed)  # noqa: S311 - no secrets
        except NotRunError as error:
            unrun[seed] = str(error)
        except Exception as error:  # noqa: BLE001 - all of them, then named
            wrong[seed] = f"{type(error).__name__}: {error}"
    assert wrong == {}
    assert len(unrun) <= UNRUN, unrun


def check(drawn: Drawn, seed: int) -> None:
    """Require of one network what every shrunk one must be: right, no larger, and left alone by a second run."""
    result = shrink(drawn.model)
    rng = np.random.default_rng(seed)
    inputs = [rng.normal(size=(3, 3, 6, 6)).astype(np.float32) for _ in range(INPUTS if drawn.rounds else 1)]
    if result.modified:
        assert not all(is_wrong(drawn, result.model, x) for x in inputs)
    else:  # stale shapes included, which the runtime may refuse in the source as it does here
        assert ir.to_proto(result.model) == ir.to_proto(drawn.model)
    assert parameters(result.model) <= parameters(drawn.model)
    before, after = cost(drawn.model), cost(result.model)
    if not any("shape" in unknown.reason for unknown in before.unknown):  # it is legal at the batch that is counted
        assert after.macs.structural <= before.macs.structural
    if drawn.model.opset_imports[""] == result.model.opset_imports[""]:
        assert size(result.model) <= size(drawn.model)
    again = shrink(result.model)
    assert not again.modified
    assert size(again.model) == size(result.model)
