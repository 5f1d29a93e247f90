import subprocess
import sys

import numpy as np
import pytest

from relief_export import formats
from relief_export.errors import InputError, UnsupportedModelError
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


def test_the_list_is_that_of_the_runtime_s_own_tool(tmp_path, make_lenet):
    # In a process of its own: the tool's package imports PyTorch, and leaves a file open.
    ort.write(make_lenet(), tmp_path / "model.ort", Options())
    script = (
        "import pathlib; from onnxruntime.tools.ort_format_model import create_config_from_models as c;"
        "c([pathlib.Path('model.ort').resolve()], pathlib.Path('theirs.config').resolve(), enable_type_reduction=False)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True)
    theirs = (tmp_path / "theirs.config").read_text().splitlines()
    ours = (tmp_path / "model.required_operators.config").read_text().splitlines()
    assert sorted(ours) == sorted(line for line in theirs if line and not line.startswith("#"))


def test_it_goes_one_way(tmp_path, make_lenet):
    ort.write(make_lenet(), tmp_path / "model.ort", Options())
    with pytest.raises(UnsupportedModelError, match="goes one way"):
        formats.read(tmp_path / "model.ort")


def test_another_suffix_is_refused(tmp_path, make_lenet):
    with pytest.raises(InputError, match=r"model\.onnx must end in \.ort"):
        ort.write(make_lenet(), tmp_path / "model.onnx", Options())
