"""The programs of examples/ run as they stand, and leave what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import onnx

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(folder: Path, name: str, *arguments: str | Path) -> str:
    """Run one in ``folder`` as a user would, and return what it prints."""
    command = [sys.executable, EXAMPLES / name, *arguments]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_own_cnn_becomes_proven_files(tmp_path):
    said = example(tmp_path, "own_cnn.py", "artifacts")
    assert "every file is the network that was trained" in said
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "artifacts").glob("*.onnx")}
    assert sizes["model.packed.onnx"] < sizes["model.onnx"] < sizes["original.onnx"]
    # The csr folder of this very run, by SciPy alone: convolutions are matrices of a row per filter.
    assert "hidden.weight: (" in example(tmp_path, "csr_with_scipy.py", "artifacts/csr", "hidden.weight")


def test_onnx_from_elsewhere_is_shrunk_and_within_its_budget(tmp_path):
    said = example(tmp_path, "onnx_from_elsewhere.py")
    assert "within the budget" in said
    before, after = map(int, re.search(r"parameters ([\d,]+) -> ([\d,]+)", said.replace(",", "")).groups())
    assert before == 64 * 300 + 300 * 100 + 100 * 10 + 400
    assert after < before / 2  # two of three hidden neurons are gone, and their rows and columns with them


def test_masks_of_torch_prune_are_exported(tmp_path):
    said = example(tmp_path, "masks_from_prune.py", "pruned")
    assert "0.weight    2,048 of 4,096" in said  # ln_structured took half of the 128 rows of 32
    assert onnx.load(tmp_path / "pruned" / "model.onnx").graph.initializer
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "pruned").glob("*.onnx")}
    assert sizes["model.packed.onnx"] < sizes["model.sparse.onnx"] < sizes["masked.onnx"]


def test_every_example_is_run_here():
    tested = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.name}"' in tested for path in EXAMPLES.glob("*.py"))
