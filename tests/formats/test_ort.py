import numpy as np
import pytest

from relief_export import formats
from relief_export.errors import UnsupportedModelError
from relief_export.formats import Options, dense, ort


def test_the_runtime_loads_it_with_the_same_outputs(tmp_path, make_lenet, run, capfd):
    dense.write(make_lenet(), tmp_path / "model.onnx", Options())
    artifact = ort.write(make_lenet(), tmp_path / "model.ort", Options())
    expected = run(tmp_path / "model.onnx")
    assert np.abs(run(tmp_path / "model.ort") - expected).max() <= 1e-5 * np.abs(expected).max()
    assert artifact.bytes < (tmp_path / "model.onnx").stat().st_size
    assert capfd.readouterr() == ("", "")


def test_the_operators_a_reduced_build_needs_are_listed(tmp_path, make_lenet):
    artifact = ort.write(make_lenet(), tmp_path / "model.ort", Options())
    assert [file.path for file in artifact.files] == ["model.ort", "model.required_operators.config"]
    listed = (tmp_path / "model.required_operators.config").read_text()
    assert "ai.onnx;" in listed
    assert "MaxPool" in listed


def test_it_goes_one_way(tmp_path, make_lenet):
    ort.write(make_lenet(), tmp_path / "model.ort", Options())
    with pytest.raises(UnsupportedModelError, match="goes one way"):
        formats.read(tmp_path / "model.ort")
