"""How near does each format come to the entropy bound, and what does it cost to load and to run?"""

from __future__ import annotations

import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from benchmarks.common import ROOT, Benchmark, Column, Row, interleave
from relief_export.formats import FORMATS, Options, Values, dense, ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SEED = 0
ZEROS = (0.80, 0.90, 0.95)
LARGE_ZEROS = (0.9,)
LOADS, RUNS = 5, 21
MLP = """<ir_version: 8, opset_import: ["": 18]> mlp (float[N,784] x) => (float[N,10] y) {
  a = Gemm <transB = 1> (x, w1, b1) b = Relu (a) c = Gemm <transB = 1> (b, w2, b2) d = Relu (c)
  y = Gemm <transB = 1> (d, w3, b3) }"""
CONV = """<ir_version: 8, opset_import: ["": 18]> conv (float[N,64,16,16] x) => (float[N,128,16,16] y) {
  a = Conv <pads = [1,1,1,1]> (x, w1, b1) b = Relu (a) c = Conv <pads = [1,1,1,1]> (b, w2, b2) d = Relu (c)
  y = Conv <pads = [1,1,1,1]> (d, w3, b3) }"""
LARGE = """<ir_version: 8, opset_import: ["": 18]> large (float[N,4096] x) => (float[N,1024] y) {
  a = Gemm <transB = 1> (x, w1, b1) b = Relu (a) y = Gemm <transB = 1> (b, w2, b2) }"""
SHAPES = {
    "unstructured": (MLP, ((1024, 784), (1024, 1024), (10, 1024))),
    "whole kernels": (CONV, ((128, 64, 3, 3), (128, 128, 3, 3), (128, 128, 3, 3))),
    "21 M weights": (LARGE, ((4096, 4096), (1024, 4096))),
}
_PEAK = (
    "import sys, onnxruntime as ort\n"
    "peak = lambda: next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))\n"
    "base = peak()\n"
    "s = ort.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
    "print(1024 * (peak() - base))"
)


def synthetic(kind: str, zeros: float) -> ir.Model:
    """Return a network of three layers with exactly the given share of zeros in every weight."""
    rng = np.random.default_rng(SEED)
    text, shapes = SHAPES[kind]
    proto = onnx.parser.parse_model(text)
    for index, shape in enumerate(shapes, 1):
        units = shape[:2] if kind == "whole kernels" else shape
        count = int(np.prod(units))
        kept = np.zeros(count, bool)
        kept[rng.permutation(count)[: round(count * (1 - zeros))]] = True
        weight = rng.normal(size=shape) * kept.reshape(units + (1,) * (len(shape) - len(units))) / np.sqrt(shape[1])
        bias = rng.normal(size=shape[0])
        for name, array in (("w", weight), ("b", bias)):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), f"{name}{index}"))
    return ir.from_proto(proto)


def inputs(path: Path, batch: int) -> dict[str, Any]:
    """Return seeded normal inputs for the model at ``path``."""
    rng = np.random.default_rng(SEED)
    found = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs()
    return {value.name: rng.normal(size=[batch, *value.shape[1:]]).astype(np.float32) for value in found}


def peak_bytes(path: Path) -> int:
    """Return how much the peak of resident memory grows in a fresh process that opens ``path``."""
    done = subprocess.run([sys.executable, "-c", _PEAK, path], check=True, capture_output=True, text=True)  # noqa: S603
    return int(done.stdout)


def cpu_seconds(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median processor time of each call, interleaved, each time in a fresh copy of this process.

    Unlike wall time it ignores other programs. In one process the heap that earlier calls leave behind decides whether
    a call touches new pages or old ones, which changes its time threefold; a copy finds the same heap every time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(LOADS):
        for name, call in calls.items():
            reader, writer = os.pipe()
            child = os.fork()
            if not child:
                started = time.process_time()
                call()
                os.write(writer, repr(time.process_time() - started).encode())
                os._exit(0)
            os.close(writer)
            with os.fdopen(reader) as pipe:
                seconds[name].append(float(pipe.read()))
            os.waitpid(child, 0)
    return {name: statistics.median(found) for name, found in seconds.items()}


def write_all(model: ir.Model, folder: Path) -> dict[str, tuple[Path, int, str]]:
    """Write every format; return name -> path, bytes, and the value code its bound is counted with."""
    dense.write(model, folder / "model.onnx", Options())
    samples = next(iter(inputs(folder / "model.onnx", 64).values()))
    written: dict[str, tuple[Path, int, str]] = {}
    for name, form in FORMATS.items():
        if name.startswith("c-") or name == "c":  # has a benchmark of its own, against compilers
            continue
        artifact = form.write(model, folder / form.suffix, Options(calibration=samples))
        written[name] = folder / form.suffix, artifact.bytes, form.values
    return written


def measure(network: str, model: ir.Model, zeros: float | None) -> list[Row]:
    """Return one row a format of ``model``."""
    total = ledger(model).total
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = write_all(model, folder)
        runnable = {label: path for label, (path, _, _) in written.items() if path.is_file()}
        feeds = inputs(folder / "model.onnx", 8)
        settings = ort.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = 1, 4

        def opener(path: Path) -> ort.InferenceSession:
            return ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])

        loads = interleave({label: partial(opener, path) for label, path in runnable.items()}, repeats=LOADS)
        cpu = cpu_seconds({label: partial(opener, path) for label, path in runnable.items()})
        sessions = {label: opener(path) for label, path in runnable.items()}
        calls: dict[str, Callable[[], object]] = {
            label: partial(session.run, None, feeds) for label, session in sessions.items()
        }
        runs = interleave(calls, repeats=RUNS, warmup=10)
        peaks = {label: peak_bytes(path) for label, path in runnable.items()}
    rows = []
    for label, (_, size, values) in written.items():
        row: Row = {"network": network, "zeros": zeros, "format": label, "bytes": size}
        row |= {
            "bound": total.bound[values],
            "to_bound": size / total.bound[values],
            "to_dense": written["dense"][1] / size,
        }
        if label in runnable:
            row |= loads[label].to_dict("load_") | runs[label].to_dict("run_") | {"peak_bytes": peaks[label]}
            row["load_cpu_s"] = cpu[label]
            row["load_to_dense"] = cpu[label] / cpu["dense"]
            row["run_to_dense"] = runs[label].median / runs["dense"].median
        rows.append(row)
    return rows


def encoding(values: Values, zeros: float, layers: int, millions: int = 100) -> Row:
    """Encode a large network in a process of its own and return how its peak of memory compares with the model's."""
    command = [sys.executable, "-m", "benchmarks.formats", values, str(zeros), str(layers), str(millions)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)  # noqa: S603 - our own module
    weights, peak, seconds, size = (float(word) for word in done.stdout.split())
    network = f"encode {millions} M weights in {layers} layer{'s' if layers > 1 else ''}"
    row: Row = {"network": network, "zeros": zeros, "format": f"packed {values}", "bytes": int(size)}
    return row | {
        "to_dense": weights / size,
        "peak_bytes": int(peak),
        "peak_to_model": peak / weights,
        "encode_s": seconds,
    }


def encode_once(values: Values, zeros: float, layers: int, millions: int) -> str:
    """Encode ``layers`` layers, ``millions`` of weights in all; return bytes, peak, seconds and size as text."""
    from relief_export.formats import packed  # noqa: PLC0415

    rng = np.random.default_rng(SEED)
    nodes, tensors = [], []
    width = millions * 1_000_000 // layers // 3200
    for index in range(layers):
        weight = rng.standard_normal((3200, width), dtype=np.float32)
        for row in weight:  # little memory, so that the peak is the encoder's
            row[rng.random(width, dtype=np.float32) < zeros] = 0
        tensors.append(ir.Tensor(weight, name=f"w{index}"))
        nodes.append(onnx.helper.make_node("MatMul", ["x", f"w{index}"], [f"y{index}"]))
    outs = [onnx.helper.make_tensor_value_info(f"y{i}", 1, ["N", width]) for i in range(len(nodes))]
    shapes = [onnx.helper.make_tensor_value_info("x", 1, ["N", 3200])]
    stubs = [onnx.helper.make_tensor_value_info(f"w{i}", 1, [3200, width]) for i in range(len(tensors))]
    graph = onnx.helper.make_graph(nodes, "g", [*shapes, *stubs], outs)
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8))
    for tensor, value in zip(tensors, list(model.graph.inputs)[1:], strict=True):
        value.const_value = tensor
        model.graph.register_initializer(value)
    del model.graph.inputs[1:]
    base, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        artifact = packed.write(model, Path(folder) / "m.onnx", Options(verify=False), values=values)
    seconds, weights = time.perf_counter() - started, sum(tensor.nbytes for tensor in tensors)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
    return f"{weights} {weights + grown} {seconds} {artifact.bytes}"


def relieved() -> dict[str, ir.Model]:
    """Return the really relieved networks of tests/data, shrunk."""
    from relief_export.capture import capture  # noqa: PLC0415 - torch
    from relief_export.graph.prepare import fold  # noqa: PLC0415
    from relief_export.graph.shrink import shrink  # noqa: PLC0415
    from tests.relieved import FILES, load  # noqa: PLC0415

    networks = {path.stem: load(path) for path in FILES}
    return {
        name: shrink(fold(capture(found.model, found.x[:2], masks=found.masks))).model
        for name, found in networks.items()
    }


def run() -> list[Row]:
    """Measure the synthetic networks, the relieved ones of tests/data and of build folders, and large encodings."""
    rows = [
        row
        for kind in SHAPES
        for zeros in (LARGE_ZEROS if kind == "21 M weights" else ZEROS)
        for row in measure(kind, synthetic(kind, zeros), zeros)
    ]
    for name, model in relieved().items():
        rows += measure(name, model, None)
    for path in sorted((ROOT / "build").glob("*/artifacts/model.onnx")):
        rows += measure(path.parent.parent.name, dense.read(path), None)
    codes: tuple[Values, ...] = ("f32", "codebook16")
    return rows + [encoding(*case) for case in itertools.product(codes, (0.9,), (1, 10))]


BENCHMARK = Benchmark(
    name="formats",
    question="How many bytes does each format take beside the entropy bound, and what do loading and running cost?",
    run=run,
    columns=(
        Column("network", "network"),
        Column("zeros", "zeros, %", ".0f", 100),
        Column("format", "format"),
        Column("bytes", "bytes", ",.0f"),
        Column("to_bound", "bytes / bound", ".3f"),
        Column("to_dense", "times smaller than dense", ".1f"),
        Column("load_to_dense", "load / dense", ".2f"),
        Column("run_to_dense", "run / dense", ".3f"),
        Column("peak_bytes", "peak memory at load, bytes", ",.0f"),
    ),
    seeds=(SEED,),
    note="bytes are whole files, container included; the bound is that of docs/formats.md for the same precision of "
    "values, weights only. load is the processor time of one session creation in a process forked for it, median of "
    f"{LOADS}, interleaved with the dense file; run is batch 8 on one thread, median wall time of {RUNS}, interleaved "
    "with the dense file in one process. Peak memory is the growth of a fresh process that opens the file.",
)

if __name__ == "__main__":
    print(encode_once(cast("Values", sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
