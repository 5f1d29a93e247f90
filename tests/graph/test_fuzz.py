"""Random networks: the shrunk model is the masked one, in ONNX Runtime, with optimisations off and on."""

from __future__ import annotations

import os

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relief_export.graph.cost import cost
from relief_export.graph.shrink import shrink
from tests.graph.builder import random_network

NETWORKS = int(os.environ.get("RELIEF_FUZZ", "500"))
RELATIVE = 1e-5  # of the output's scale
LEVELS = (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)


def run(model: ir.Model, x: np.ndarray, level: ort.GraphOptimizationLevel) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def size(model: ir.Model) -> tuple[int, int]:
    arrays = [v.const_value for v in model.graph.initializers.values()]
    return sum(a.size for a in arrays if a.dtype.is_floating_point()), sum(a.nbytes for a in arrays)


@settings(
    max_examples=NETWORKS, deadline=None, database=None, derandomize=NETWORKS == 500,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.data(), st.integers(0, 2**32 - 1))
def test_shrunk_is_masked(data: st.DataObject, seed: int) -> None:
    model = random_network(lambda options: data.draw(st.sampled_from(options)), seed)
    result = shrink(model)
    x = np.random.default_rng(seed).normal(size=(3, 3, 6, 6)).astype(np.float32)
    for level in LEVELS:
        for reference, found in zip(run(model, x, level), run(result.model, x, level), strict=True):
            assert reference.shape == found.shape
            scale = max(float(np.abs(reference).max()), 1e-3)
            assert float(np.abs(reference - found).max()) / scale <= RELATIVE
    parameters, stored = size(model)
    after_parameters, after_stored = size(result.model)
    assert after_parameters <= parameters
    assert cost(result.model).macs.structural <= cost(model).macs.structural
    if result.modified:
        assert after_stored <= stored + 32 * len(list(model.graph))
    assert not shrink(result.model).modified
