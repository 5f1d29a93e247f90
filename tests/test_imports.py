"""What works without torch, and what must not be imported before it is needed."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

ROOT = Path(__file__).parents[1]
MODEL = """
<ir_version: 9, opset_import: ["" : 18]>
net (float[batch, 4] x) => (float[batch, 2] y)
<float[3, 4] w = {1, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 3}, float[3] b = {0, 0, 1},
 float[2, 3] v = {1, 5, 2, -1, 7, 0}, float[2] c = {0.5, -0.5}>
{ h = Gemm <transB = 1> (x, w, b)
  r = Relu (h)
  y = Gemm <transB = 1> (r, v, c) }
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "in.onnx")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(20, 4)).astype(np.float32), y=rng.integers(0, 2, 20))
    return tmp_path


def test_importing_the_package_loads_neither_torch_nor_a_runtime():
    done = python("import relief_export, sys; print([m for m in ('torch', 'onnxruntime', 'onnx') if m in sys.modules])")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_a_room_imports_only_rooms_below_it():
    """As the table of docs/design.md has them; what only annotations need does not count."""
    table = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").partition("## The rooms from inside")[0]
    rows = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    floor = {name: k for k, row in enumerate(rows) for name in re.findall(r"`(\w+)(?:/|\.py)`", row)}
    assert {"cli", "api", "state", "graph"} <= set(floor)
    upward = []
    for path in sorted((ROOT / "relief_export").rglob("*.py")):
        own = floor.get(path.relative_to(ROOT / "relief_export").parts[0].removesuffix(".py"))
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typing = {
            id(n)
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
            for n in ast.walk(block)
        }
        for node in ast.walk(tree):
            if own is None or not isinstance(node, ast.ImportFrom) or id(node) in typing:
                continue
            package, *inner = (node.module or "").split(".")
            read = {inner[0]} if inner else {alias.name for alias in node.names}
            if package == "relief_export":
                upward += [f"{path.name} reads {room}" for room in read if floor.get(room, own) < own]
    assert upward == []


def test_help_loads_neither_torch_nor_a_runtime():
    code = "from relief_export.cli import run; import sys; run(['run', '--help'])\n"
    done = python(code + "assert not {'torch', 'onnxruntime', 'numpy', 'rich'} & set(sys.modules), 'heavy'")
    assert done.returncode == 0, done.stderr
    assert "digits-lenet5" in done.stdout


def test_rooms_import_without_torch(without_torch):
    rooms = ("graph", "formats", "device", "evaluation", "report", "cli", "stages", "api", "conversion")
    code = (
        "import importlib, pkgutil\n"
        f"for name in {rooms!r}:\n"
        "    room = importlib.import_module(f'relief_export.{name}')\n"
        "    for module in pkgutil.walk_packages(getattr(room, '__path__', []), room.__name__ + '.'):\n"
        "        print(importlib.import_module(module.name).__name__)\n"
    )
    done = without_torch(code)
    assert done.returncode == 0, done.stderr
    assert {"relief_export.graph.shrink", "relief_export.formats.packed"} <= set(done.stdout.split())


def test_commands_on_onnx_files_work_without_torch(folder: Path, without_torch):
    commands = [
        ["--help"],
        ["cost", "in.onnx", "--json"],
        ["shrink", "in.onnx", "out.onnx", "--json"],
        ["convert", "in.onnx", "packed.onnx", "--to", "packed", "--json"],
        ["convert", "in.onnx", "csr", "--to", "csr", "--json"],
        ["convert", "csr", "back.onnx", "--to", "dense", "--json"],
        ["convert", "in.onnx", "int8.onnx", "--to", "int8", "--calibration", "data.npz", "--json"],
        ["compare", "in.onnx", "out.onnx", "--data", "data.npz", "--json"],
        ["compare", "in.onnx", "packed.onnx", "--data", "data.npz", "--json"],
        ["audit", "out.onnx", "--flash", "1MiB", "--ram", "64KiB", "--json"],
        ["recipes", "--json"],
    ]
    code = f"from relief_export.cli import run\nfor c in {commands!r}:\n    assert run(c) == 0, c\n"
    done = without_torch(code, cwd=folder)
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(printed) == len(commands) - 1
    assert printed[0]["result"]["cost"]["parameters"]["structural"] == 23
    # Neuron 1 has no incoming connection and no bias; inputs are never removed from the interface.
    assert printed[1]["result"]["cost"]["after"]["parameters"]["structural"] < 23


def test_training_without_torch_says_which_extra_to_install(tmp_path: Path, without_torch):
    recipe = Path(__file__).parent.parent / "pipelines" / "digits-lenet5.toml"
    code = "import sys; from relief_export.cli import run; sys.exit(run(['train', sys.argv[1]]))"
    done = without_torch(code, str(recipe), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "Error: this command needs torch, which is not installed: pip install 'relief-export[torch]'"
    ]
