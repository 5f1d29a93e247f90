"""What a wheel must do where it is installed and torch is not: `make wheel` runs this with that environment's Python.

Not collected by pytest: it tests the installed package, from a folder outside the checkout.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx.parser

MODEL = """<ir_version: 9, opset_import: ["" : 18]>
net (float[batch, 4] x) => (float[batch, 2] y)
<float[3, 4] w = {1, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 3}, float[3] b = {0, 0, 1},
 float[2, 3] v = {1, 5, 2, -1, 7, 0}, float[2] c = {0.5, -0.5}>
{ h = Gemm <transB = 1> (x, w, b)  r = Relu (h)  y = Gemm <transB = 1> (r, v, c) }
"""


def relief(folder: Path, *arguments: str) -> dict:
    """Run the installed command and return what it prints with --json."""
    command = [str(Path(sys.executable).with_name("relief-export")), *arguments, "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
    assert done.stderr == "", done.stderr
    return json.loads(done.stdout)


def main() -> None:
    """Cost, audit, shrink, convert and compare one small model; list the recipes."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        onnx.save(onnx.parser.parse_model(MODEL), folder / "in.onnx")
        np.savez(folder / "data.npz", x=np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32))
        relief(folder, "shrink", "in.onnx", "small.onnx")
        weights = onnx.load(folder / "small.onnx").graph.initializer
        rows = {weight.dims[0] for weight in weights if len(weight.dims) == 2}
        assert 3 not in rows, "the dead neuron is still there"
        relief(folder, "convert", "small.onnx", "small.packed.onnx", "--to", "packed")
        relief(folder, "compare", "in.onnx", "small.packed.onnx", "--data", "data.npz")
        relief(folder, "cost", "small.onnx")
        relief(folder, "audit", "small.onnx", "--flash", "64KiB", "--ram", "16KiB")
        recipes = relief(folder, "recipes")["result"]["recipes"]
        assert "digits-lenet5" in {recipe["name"] for recipe in recipes}, "the wheel has no recipes"
    print("cost, audit, shrink, convert, compare and recipes work from the wheel, without torch")  # noqa: T201


if __name__ == "__main__":
    main()
