"""Where dense wins: single layers with some of their connections, as generated C beside dense ONNX Runtime.

Measured as in c.py; docs/c_format.md takes its break-even points from the record.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks import c
from benchmarks.common import Benchmark, Column, Row
from relief_export.cgen.emit import generate
from relief_export.formats import FORMATS, Options

SEED = 0
SHARES = (0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0)
LAYERS: dict[str, tuple[tuple[int, ...], int, bool]] = {
    "3x3, 64 to 64 at 32x32": ((64, 64, 3, 3), 32, True),
    "3x3, 256 to 256 at 8x8": ((256, 256, 3, 3), 8, True),
    "3x3, 512 to 512 at 4x4": ((512, 512, 3, 3), 4, True),
    "5x5, 20 to 50 at 12x12": ((50, 20, 5, 5), 12, True),
    "3x3, 64 to 64 at 32x32, single weights": ((64, 64, 3, 3), 32, False),
    "1x1, 128 to 128 at 56x56": ((128, 128, 1, 1), 56, False),
    "1x1, 256 to 256 at 7x7": ((256, 256, 1, 1), 7, False),
    "fully connected, 784 to 300": ((300, 784), 0, False),
    "fully connected, 4096 to 4096": ((4096, 4096), 0, False),
}
"""Name -> shape of the weight, side of the map, and whether whole kernels go."""


def _model(weight: np.ndarray[Any, Any], side: int) -> ir.Model:
    """Return a model of one layer; a map of side 4 and more keeps its size, but for kernels of 5 x 5."""
    shape = [1, weight.shape[1], *([side] * 2 if side else [])]
    x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", const_value=ir.tensor(weight, name="w"))
    w.shape, w.type = ir.Shape(weight.shape), ir.TensorType(ir.DataType.FLOAT)
    if side:
        border = weight.shape[2] // 2 if weight.shape[2] < 5 else 0
        node = ir.node("Conv", [x, w], {"pads": [border] * 4, "kernel_shape": list(weight.shape[2:])}, name="layer")
        result = [1, len(weight), *([side + 2 * border - weight.shape[2] + 1] * 2)]
    else:
        node = ir.node("Gemm", [x, w], {"transB": 1}, name="layer")
        result = [1, len(weight)]
    (y,) = node.outputs
    y.name, y.shape, y.type = "y", ir.Shape(result), x.type
    graph = ir.Graph([x], [y], nodes=[node], initializers=[w], opset_imports={"": 18}, name="layer")
    return ir.Model(graph, ir_version=9)


def run() -> list[Row]:
    """Measure every layer at every share."""
    rows: list[Row] = []
    for layer, (shape, side, kernels) in LAYERS.items():
        for share in SHARES:
            rng = np.random.default_rng(SEED)
            weight = rng.normal(size=shape).astype(np.float32)
            masked = shape[:2] if kernels else shape
            kept = rng.permutation(int(np.prod(masked)))[: round(share * np.prod(masked))]
            mask = np.zeros(masked, bool)
            mask.flat[kept] = True
            weight[~mask] = 0
            row = _measure(_model(weight, side)) | {"layer": layer, "kept": share}
            rows.append(row)
            print(f"{layer:40} {share:4.0%} " + " ".join(
                f"{name} {row[f'{name}_times']:.2f}x" for name in c.instruction_sets() if f"{name}_times" in row
            ) + f" {row['kernel']}", file=sys.stderr)  # fmt: skip
    return rows


def _measure(model: ir.Model) -> Row:
    """Time one layer in ONNX Runtime and as C."""
    sets = {name: flags for name, flags in c.instruction_sets().items() if name != "SSE2"}
    shape = model.graph.inputs[0].shape
    assert shape is not None
    x = np.random.default_rng(SEED + 1).normal(size=shape.numpy()).astype(np.float32)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        FORMATS["dense"].write(model, folder / "layer.onnx", Options())
        files, _, program = generate(model)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        timer, expected = c.bound(folder / "layer.onnx", x)
        timers = {"dense": timer} | {name: c.compiled(folder, flags, x, expected) for name, flags in sets.items()}
        seconds = c.interleaved(timers)
    found: Row = {"kernel": program.choices[0]["kernel"], "dense_us": seconds["dense"] * 1e6}
    for name in sets:
        found |= {f"{name}_us": seconds[name] * 1e6, f"{name}_times": seconds["dense"] / seconds[name]}
    return found


BENCHMARK = Benchmark(
    name="c_layers",
    question="Up to which share of its connections is a layer faster as generated C than dense in ONNX Runtime?",
    run=run,
    columns=(
        Column("layer", "layer"),
        Column("kept", "connections kept", ".0%"),
        Column("kernel", "kernel"),
        Column("dense_us", "dense in ONNX Runtime, microseconds", ",.1f"),
        Column("AVX-512_us", "C, AVX-512", ",.1f"),
        Column("AVX-512_times", "times faster", ".1f"),
        Column("AVX2_us", "C, AVX2", ",.1f"),
        Column("AVX2_times", "times faster", ".1f"),
    ),
    seeds=(SEED, SEED + 1),
    note=f"One sample at a time, one core, least processor time of {c.ROUNDS} interleaved measurements. Weights are "
    "random; of convolutions larger than 1x1 whole kernels go, where it does not say single weights.",
)
