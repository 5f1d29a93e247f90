"""An ONNX file from elsewhere, made smaller without changing what it computes, and held to a budget, without torch.

Run it with `python examples/onnx_from_elsewhere.py [MODEL.onnx] [FOLDER]`. Without a model it makes one, as another
tool might leave it: a small perceptron that was pruned, so that some neurons have lost all their inputs or outputs.
The same from a shell: `relief-export shrink`, `relief-export compare`, `relief-export audit`.
"""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

import relief_export as rx

FLASH = 128 * 1024
"""The budget, in bytes."""


def pruned_model() -> onnx.ModelProto:
    """Return a network 64 -> 300 -> 100 -> 10 with nine weights in ten zeroed, and some neurons whole."""
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in (("w1", (300, 64)), ("w2", (100, 300)), ("w3", (10, 100))):
        weight = (rng.normal(size=shape) / np.sqrt(shape[1])).astype(np.float32)
        weight[rng.random(shape) < 0.9] = 0
        weights[name] = weight
    weights["w1"][::3] = 0  # a third of the hidden neurons has no input left: each is a constant, its bias
    weights["w2"][:, 1::3] = 0  # another third is read by nobody
    weights |= {"b1": rng.normal(size=300).astype(np.float32), "b2": rng.normal(size=100).astype(np.float32)}
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h1"], transB=1),
        helper.make_node("Relu", ["h1"], ["a1"]),
        helper.make_node("Gemm", ["a1", "w2", "b2"], ["h2"], transB=1),
        helper.make_node("Relu", ["h2"], ["a2"]),
        helper.make_node("Gemm", ["a2", "w3"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "elsewhere",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def main(source: Path | None, folder: Path) -> None:
    """Shrink ``source``, prove it, and say whether it fits."""
    folder.mkdir(parents=True, exist_ok=True)
    if source is None:
        source = folder / "elsewhere.onnx"
        onnx.save(pruned_model(), source)
    target = folder / "small.onnx"

    result = rx.shrink(source)
    onnx.save(ir.to_proto(result.model), target)
    before, after = rx.cost(source), rx.cost(target)
    print(f"parameters {before.parameters.structural:,} -> {after.parameters.structural:,}")
    print(f"bytes      {source.stat().st_size:,} -> {target.stat().st_size:,}")

    # Do not take our word for it: run both.
    sessions = [ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]) for path in (source, target)]
    entry = sessions[0].get_inputs()[0]
    shape = [size if isinstance(size, int) else 100 for size in entry.shape]
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    original, shrunk = (session.run(None, {entry.name: x})[0] for session in sessions)
    error = float(np.abs(original - shrunk).max() / np.abs(original).max())
    print(f"largest difference of any output, relative to the largest output: {error:.1e}")

    fits = target.stat().st_size <= FLASH
    print(f"{'within' if fits else 'over'} the budget of {FLASH:,} bytes")
    sys.exit(0 if fits and error < 1e-5 else 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None, Path(sys.argv[2] if len(sys.argv) > 2 else "elsewhere"))
