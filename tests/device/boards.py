"""The folders of examples/ for the projects that microcontrollers are programmed in: a relieved LeNet-5 as C.

``python -m tests.device.boards`` writes them again, as ``relief-export convert lenet5.onnx FOLDER --to
c-mcu-codebook16 --name digits --layout LAYOUT`` does.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
from safetensors.numpy import load_file

from relief_export.cli import run
from relief_export.format_names import LAYOUTS

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
LENET5 = ROOT / "tests" / "data" / "mnist-lenet5.safetensors"
NAME = "digits"

# Written out, because the names of nodes, which the C repeats, would otherwise change with the version of PyTorch.
TEXT = """<ir_version: 9, opset_import: ["" : 18]> lenet5 (float[n, 1, 28, 28] pixels) => (float[n, 10] scores)
{
    [first] a = Conv(pixels, conv1_weight, conv1_bias)
    [relu1] b = Relu(a)
    [pool1] c = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(b)
    [second] d = Conv(c, conv2_weight, conv2_bias)
    [relu2] e = Relu(d)
    [pool2] f = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(e)
    [flat] g = Flatten(f)
    [third] h = Gemm<transB = 1>(g, fc1_weight, fc1_bias)
    [relu3] i = Relu(h)
    [fourth] scores = Gemm<transB = 1>(i, fc2_weight, fc2_bias)
}"""
SHAPES = {"conv1": (20, 1, 5, 5), "conv2": (50, 20, 5, 5), "fc1": (500, 800), "fc2": (10, 500)}


def lenet5() -> tuple[onnx.ModelProto, np.ndarray]:
    """Return the relieved LeNet-5 of tests/data as ONNX, and its pictures (N, 1, 28, 28) float32."""
    tensors = load_file(LENET5)
    model = onnx.parser.parse_model(TEXT)
    for layer, shape in SHAPES.items():
        for name, size in ((f"{layer}.weight", shape), (f"{layer}.bias", shape[:1])):
            mask = np.ones(size, bool)
            if (bits := tensors.get(f"mask:{name}")) is not None:
                mask = np.unpackbits(bits, count=mask.size).astype(bool).reshape(size)
            values = np.zeros(size, np.float32)
            values[mask] = tensors[f"kept:{name}"]
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, name.replace(".", "_")))
    return model, tensors["x"]


def write(layout: str, folder: Path, scratch: Path) -> None:
    """Write one layout into a new folder, through the command that users call."""
    model, _ = lenet5()
    source, shrunk = scratch / "lenet5.masked.onnx", scratch / "lenet5.onnx"
    onnx.save(model, source)
    for command in (
        ["shrink", str(source), str(shrunk)],
        ["convert", str(shrunk), str(folder), "--to", "c-mcu-codebook16", "--name", NAME, "--layout", layout],
    ):
        assert run(command) == 0, command


def main() -> None:
    """Write all layouts again."""
    import tempfile  # noqa: PLC0415  only needed here

    for layout in LAYOUTS:
        shutil.rmtree(EXAMPLES / layout, ignore_errors=True)
        with tempfile.TemporaryDirectory() as scratch:
            write(layout, EXAMPLES / layout, Path(scratch))


if __name__ == "__main__":
    main()
