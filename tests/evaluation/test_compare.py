"""Two models against each other, and their latency."""

import json
import math

import numpy as np
import onnx_ir as ir
import pytest

from relief_export.errors import InputError
from relief_export.evaluation import compare, measure_latency
from relief_export.evaluation.compare import measure
from relief_export.formats import Tolerance

LIMIT = 1e-6
HEADER = '<ir_version: 9, opset_import: ["" : 20]>\n'


@pytest.fixture
def pair(tmp_path):
    """Two models with two outputs: the second's second output is 1 % larger."""

    def save(name, factor):
        text = (
            "g (float[n, 3] x) => (float[n, 3] y, float[n, 3] z)"
            f"{{ y = Relu (x) k = Constant <value_float = {factor}> () z = Mul (x, k) }}"
        )
        ir.save(ir.from_onnx_text(HEADER + text), tmp_path / name)
        return tmp_path / name

    return save("a.onnx", 2.0), save("b.onnx", 2.02)


def test_every_output_is_compared(pair):
    x = np.array([[1, 2, 3], [3, 2, -5]], np.float32)
    same = compare(pair[0], pair[0], x, y=np.array([2, 1]), tolerance=LIMIT)
    assert same.ok
    assert same.outputs["y"].accuracy == 0.5
    found = compare(*pair, x, tolerance=LIMIT)
    assert not found.ok
    assert {check.file for check in found.checks if not check.ok} == {"b.onnx, output 'z'"}
    assert found.outputs["z"].max_error == pytest.approx(0.1, abs=1e-6)
    assert found.outputs["z"].relative_error == pytest.approx(0.01, abs=1e-6)
    assert found.outputs["z"].mean_error == pytest.approx(0.02 * 16 / 6, abs=1e-6)
    assert found.outputs["z"].worst_sample == 1
    title, _, *rows = str(found).splitlines()
    assert f"{pair[1]} against {pair[0]}, 2 samples: FAILED: b.onnx, output 'z'" in title
    assert [row.split() for row in rows] == [
        ["y", "0", "100.00", "%", "-", "-"],
        ["z", "0.01", "100.00", "%", "-", "-"],
    ]
    assert compare(*pair, x, tolerance=Tolerance(0.02, 0.0)).ok
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["ok"] is False


def test_a_flipped_prediction_fails_whatever_the_relative_error(tmp_path):
    for name, shift in (("a", 0.0), ("b", 1e-3)):
        text = (
            f"g (float[n, 2] x) => (float[n, 2] y) {{ k = Constant <value_floats = [{shift}, 0.0]> () y = Add (x, k) }}"
        )
        ir.save(ir.from_onnx_text(HEADER + text), tmp_path / f"{name}.onnx")
    x = np.array([[100, 0], [1, 1.0005]], np.float32)
    found = compare(tmp_path / "a.onnx", tmp_path / "b.onnx", x, tolerance=1e-4)
    assert {check.code for check in found.checks if not check.ok} == {"predictions"}
    assert found.outputs["y"].first_disagreement == 1


def test_what_cannot_be_compared_is_refused(pair, tmp_path):
    text = "g (float[n, 3] x) => (float[n, 3] y) { y = Relu (x) }"
    ir.save(ir.from_onnx_text(HEADER + text), tmp_path / "one.onnx")
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(InputError, match=r"has 2 outputs and .* has 1"):
        compare(pair[0], tmp_path / "one.onnx", x, tolerance=LIMIT)
    with pytest.raises(InputError, match="label 3 of sample 0"):
        compare(*pair, x, y=np.array([3, 0]), tolerance=LIMIT)
    with pytest.raises(InputError, match=r"absent\.onnx does not exist"):
        compare(pair[0], tmp_path / "absent.onnx", x, tolerance=LIMIT)
    for text, message in (
        (
            "g (float[n, 3] x) => (float[n, 0] y) <int64[0] none = {}> { y = Gather <axis = 1> (x, none) }",
            "is nothing to",
        ),
        ("g (float[0, 3] x) => (float[0, 3] y) { y = Relu (x) }", "cannot be run in batches of 0"),
    ):
        ir.save(ir.from_onnx_text(HEADER + text), tmp_path / "empty.onnx")
        with pytest.raises(InputError, match=message):
            compare(tmp_path / "empty.onnx", tmp_path / "empty.onnx", x, tolerance=LIMIT)


def test_a_fixed_batch_is_run_in_its_own_steps(tmp_path):
    text = "g (float[2, 3] x) => (float[2, 3] y) { y = Relu (x) }"
    ir.save(ir.from_onnx_text(HEADER + text), tmp_path / "two.onnx")
    x = np.arange(18, dtype=np.float32).reshape(6, 3)
    assert compare(tmp_path / "two.onnx", tmp_path / "two.onnx", x, tolerance=LIMIT).samples == 6
    with pytest.raises(InputError, match="5 samples cannot be run in batches of 2"):
        compare(tmp_path / "two.onnx", tmp_path / "two.onnx", x[:5], tolerance=LIMIT)


def test_latency_is_measured_on_each_model(tmp_path):
    """Each row says what it was measured with; whether one is faster than another is for benchmarks/ to say."""
    rng = np.random.default_rng(0)
    for name, width in (("narrow", 64), ("wide", 512)):
        text = (
            f"g (float[n, 64] x, float[64, {width}] a, float[{width}, {width}] b) => (float[n, {width}] y)"
            "{ h = MatMul (x, a) y = MatMul (h, b) }"
        )
        model = ir.from_onnx_text(HEADER + text)
        for value in model.graph.inputs[1:]:
            model.graph.inputs.remove(value)
            shape = [int(dim) for dim in value.shape]
            value.const_value = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=value.name)
            model.graph.register_initializer(value)
        ir.save(model, tmp_path / f"{name}.onnx")
    models = {"narrow": str(tmp_path / "narrow.onnx"), "wide": tmp_path / "wide.onnx"}
    narrow, wide = measure_latency(models, np.zeros((4, 64), np.float32), batch=4, repeats=7)
    assert (narrow.name, narrow.repeats, narrow.batch, narrow.threads) == ("narrow", 7, 4, 1)
    for row in (narrow, wide):
        assert 0 < row.lower <= row.median <= row.upper < math.inf
        assert row.machine["cores"] >= 1
    with pytest.raises(InputError, match="give at least 2, and a full batch"):
        measure_latency(models, np.zeros((4, 64), np.float32), batch=5)


def test_a_nan_is_no_prediction():
    reference = np.array([[1, 0], [1, 0], [np.nan, 0], [0, 1]])
    outputs = np.array([[2, 0], [np.nan, 0], [np.nan, 0], [0, 3]])
    found = measure(outputs, reference, np.array([0, 0, 0, 1]))
    assert (found.same_predictions, found.disagreeing, found.first_disagreement) == (0.5, 2, 1)
    assert (found.accuracy, found.accuracy_change) == (0.5, -0.25)
    assert (found.max_error, found.relative_error, found.worst_sample) == (None, None, 1)
