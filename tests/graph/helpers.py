"""Small graphs in ONNX text syntax, run in ONNX Runtime with optimisations off and on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
from onnx import numpy_helper

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

LEVELS = (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)


def build(text: str, arrays: Mapping[str, NDArray] | None = None, *, opset: int = 20, domain: str = "") -> ir.Model:
    """Build a checked model from the text of its graph and the arrays of its initializers.

    Args:
        text: ``g (float[n, 4] x) => (float[n, 2] y) { y = Relu(x) }``, as ``onnx.parser`` reads it.
        arrays: Initializer name -> array.
        opset: Version of the standard operators.
        domain: A further operator domain that the text uses.
    """
    foreign = f', "{domain}" : 1' if domain else ""
    # Version 21 of the default domain brought version 10 of the format, which the oldest runtimes do not read.
    version = 10 if opset > 20 else 9
    proto = onnx.parser.parse_model(f'<ir_version: {version}, opset_import: ["" : {opset}{foreign}]> {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in (arrays or {}).items())
    if not domain:
        onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def run(model: ir.Model, feeds: Mapping[str, NDArray], level: ort.GraphOptimizationLevel = LEVELS[0]) -> list[NDArray]:
    """Return all outputs of a model in ONNX Runtime."""
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def random_feeds(model: ir.Model, seed: int = 0, **lengths: int) -> dict[str, NDArray]:
    """Return normal random inputs of the model's types, symbolic axes of the stated lengths (3 where not stated)."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        shape = [d if isinstance(d, int) else lengths.get(str(d.value), 3) for d in value.shape]
        feeds[value.name] = rng.normal(size=shape).astype(value.dtype.numpy())
    return feeds


def worst_error(reference: ir.Model, found: ir.Model, feeds: Mapping[str, NDArray]) -> float:
    """Return the largest difference of any output, relative to that output's scale, optimisations off and on."""
    worst = 0.0
    for level in LEVELS:
        for a, b in zip(run(reference, feeds, level), run(found, feeds, level), strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert np.array_equal(np.isfinite(a), np.isfinite(b))
            if a.size:
                difference = np.abs(a.astype(np.float64) - b.astype(np.float64)).max()
                worst = max(worst, float(difference) / max(float(np.abs(a).max()), 1e-6))
    return worst


def assert_same(reference: ir.Model, found: ir.Model, feeds: Mapping[str, NDArray], *, relative: float) -> None:
    """Require equal outputs within ``relative`` of their scale, optimisations off and on."""
    error = worst_error(reference, found, feeds)
    assert error <= relative, f"outputs moved by {error:.1e} of their scale"


def arrays_of(model: ir.Model) -> dict[str, NDArray]:
    """Return all initializers by name."""
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


def parameters(model: ir.Model) -> int:
    """Count the elements of all floating-point constants."""
    return sum(a.size for a in arrays_of(model).values() if a.dtype.kind == "f")


def stored_bytes(model: ir.Model) -> int:
    """Return the bytes of the whole file."""
    return len(ir.to_proto(model).SerializeToString())


def interface(model: ir.Model) -> list[tuple[str, str, str]]:
    """Return name, type and shape of every input and output."""
    return [(str(v.name), str(v.dtype), str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]


def assert_sound(model: ir.Model, result: ir.Model, feeds: Mapping[str, NDArray], *, relative: float) -> None:
    """Require what every shrunk model must be: legal, equal, no larger, with the same interface."""
    onnx.checker.check_model(ir.to_proto(result))
    assert_same(model, result, feeds, relative=relative)
    assert interface(result) == interface(model)
    assert parameters(result) <= parameters(model)
