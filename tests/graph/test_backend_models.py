"""onnx's own test models, of every operator and with weights of real layers, through shrink, sparse, packed and csr.

``RELIEF_BACKEND=1`` takes all that ONNX Runtime runs; by default every converted layer and one operator's test in 16.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from relief_export import formats
from relief_export.errors import UnsupportedModelError
from relief_export.graph.prepare import fold
from relief_export.graph.shrink import shrink

ROUNDED = 2e-5  # of the output's scale: products are added in another order
KINDS = ("simple", "pytorch-operator", "pytorch-converted")
EVERY = 1 if os.environ.get("RELIEF_BACKEND") else 16
FORMATS = ("sparse", "packed", "csr")
LOOSE = ("test_affine_grid_2d_expanded", "test_affine_grid_2d_align_corners_expanded")
"""They give Range a list of one number where it takes a number: the runtime notices once the constants are plain."""
RANDOM = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}


@cache
def generated() -> dict[str, tuple[onnx.ModelProto, list]]:
    """Return name -> (model, inputs) of the tests that onnx generates for its operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases  # noqa: PLC0415 - generating them takes seconds

        return {
            case.name: (case.model, case.data_sets[0][0])
            for case in collect_testcases(None)[::EVERY]
            if case.name not in LOOSE
        }


def stored() -> list[Path]:
    root = Path(onnx.__file__).parent / "backend/test/data"
    return sorted(path for kind in KINDS for path in (root / kind).glob("test_*") if (path / "model.onnx").exists())


def load(folder: Path) -> tuple[onnx.ModelProto, list]:
    """Read one of the tests that lie in a folder each."""
    model = onnx.load(folder / "model.onnx")
    inputs = []
    for k in range(len(list((folder / "test_data_set_0").glob("input_*.pb")))):
        tensor = onnx.TensorProto()
        tensor.ParseFromString((folder / f"test_data_set_0/input_{k}.pb").read_bytes())
        inputs.append(numpy_helper.to_array(tensor))
    return model, inputs


def run(proto: onnx.ModelProto, inputs: list) -> list | None:
    """Return the outputs, or None where the runtime cannot run the model."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        return session.run(None, dict(zip(names, inputs, strict=False)))
    except Exception:  # noqa: BLE001 - the runtime's exceptions share no other base
        return None


def assert_equal(reference: object, found: object) -> None:
    if isinstance(reference, list):
        for a, b in zip(reference, found, strict=True):
            assert_equal(a, b)
    elif isinstance(reference, np.ndarray) and reference.dtype.kind in "fc":
        assert (reference.shape, reference.dtype) == (found.shape, found.dtype)
        a, b = reference.astype(np.complex128), found.astype(np.complex128)
        assert np.array_equal(np.isfinite(a), np.isfinite(b))
        finite = np.isfinite(a)
        # A step of float16 is 1e-3 of the number.
        step = ROUNDED if reference.dtype.itemsize > 2 else 4e-3
        assert np.abs(a[finite] - b[finite]).max(initial=0) <= step * max(np.abs(a[finite]).max(initial=0), 1)
    elif isinstance(reference, np.ndarray):
        assert np.array_equal(reference, found)
    else:
        assert reference == found


def check(proto: onnx.ModelProto, inputs: list, folder: Path) -> bool:
    """Compare all that becomes of a model with the model; return whether the runtime runs it."""
    reference = run(proto, inputs)
    if reference is None or RANDOM & {node.op_type for node in proto.graph.node}:
        return False
    model = ir.from_proto(proto)
    try:
        folded = fold(model)
    except UnsupportedModelError as error:
        if "cannot bring it to 13" in str(error):
            return False
        raise
    for result in (folded, shrink(model).model, shrink(folded).model):
        assert_equal(reference, run(ir.to_proto(result), inputs))
    for name in FORMATS:
        path = folder / f"model.{name}"
        formats.FORMATS[name].write(folded, path, formats.Options())
        assert_equal(reference, run(ir.to_proto(formats.FORMATS[name].read(path)), inputs))
    return True


@pytest.mark.parametrize("folder", stored(), ids=lambda path: path.name)
def test_stored_models(folder, tmp_path):
    check(*load(folder), tmp_path)


def test_generated_models(tmp_path):
    wrong, ran = {}, 0
    for name, (proto, inputs) in generated().items():
        try:
            ran += check(proto, inputs, tmp_path / name)
        except Exception as error:  # noqa: BLE001 - all of them, then named
            wrong[name] = f"{type(error).__name__}: {error}"
    assert wrong == {}
    assert ran >= len(generated()) // 2
