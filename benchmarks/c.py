"""Do connections become time? Generated C beside ONNX Runtime and others, one sample at a time on one core.

Processor time, the least of many interleaved measurements. ONNX Runtime is called with its inputs
and outputs bound; a model of one Identity shows what such a call costs by itself. C is called in a loop in C. The
networks other than the LeNets have random weights and random kernels, as many of each layer as the recorded run kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from benchmarks.common import RESULTS, ROOT, Benchmark, Column, Row
from relief_export.cgen.compiler import find_compiler
from relief_export.cgen.emit import generate
from relief_export.formats import FORMATS, Options
from relief_export.graph.prepare import fold
from relief_export.graph.shrink import shrink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

ROUNDS, SECONDS, SEED = 25, 0.008, 0
SETS = {"AVX-512": ("x86-64-v4", "avx512f"), "AVX2": ("x86-64-v3", "avx2"), "SSE2": ("x86-64", "sse2")}
"""Instruction set -> GCC's name of the processor, and the flag of /proc/cpuinfo that it needs."""
FLOORS = {
    ("resnet20 14 %", "AVX-512"): 7.0, ("resnet20 14 %", "AVX2"): 4.0,
    ("resnet20 5 %", "AVX-512"): 14.0, ("resnet20 5 %", "AVX2"): 8.0,
    ("vgg-like", "AVX-512"): 20.0, ("vgg-like", "AVX2"): 12.0,
    ("lenet5", "AVX-512"): 13.0, ("lenet5", "AVX2"): 7.0,
    ("lenet300-100", "AVX-512"): 8.0, ("lenet300-100", "AVX2"): 8.0,
    ("resnet18 10 %", "AVX-512"): 5.0, ("resnet18 5 %", "AVX-512"): 8.0,
}  # fmt: skip
"""Least speed-up over the original network in ONNX Runtime; a run that misses one fails."""
SHRUNK_FLOOR = 1.0
"""Least speed-up of C with AVX2 over the shrunk network in ONNX Runtime."""

LOOP = """\
#include <time.h>
#include "net.h"
double timed(const float *in, float *out, void *arena, int n)
{
    struct timespec a, b;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &a);
    for (int i = 0; i < n; i++)
        net_run(in, out, arena);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &b);
    return (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec);
}
"""
PEAK = """\
#include <time.h>
typedef float vec __attribute__((vector_size(4 * LANES)));
double peak(int n)
{
    struct timespec s, t;
    vec a[10], x, y;
    for (int k = 0; k < LANES; k++) x[k] = 1.0f / (k + 2), y[k] = 1.0f;
    for (int k = 0; k < 10; k++) a[k] = x + (float)k;
    vec a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3], a4 = a[4], a5 = a[5], a6 = a[6], a7 = a[7], a8 = a[8], a9 = a[9];
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &s);
    for (int i = 0; i < n; i++) {
        a0 = a0 * x + y, a1 = a1 * x + y, a2 = a2 * x + y, a3 = a3 * x + y, a4 = a4 * x + y;
        a5 = a5 * x + y, a6 = a6 * x + y, a7 = a7 * x + y, a8 = a8 * x + y, a9 = a9 * x + y;
        __asm__ volatile("" : "+x"(a0), "+x"(a1), "+x"(a2), "+x"(a3), "+x"(a4));
        __asm__ volatile("" : "+x"(a5), "+x"(a6), "+x"(a7), "+x"(a8), "+x"(a9));
    }
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    a0 = a0 + a1 + a2 + a3 + a4 + a5 + a6 + a7 + a8 + a9;
    volatile float sink = a0[0];
    (void)sink;
    return 10.0 * LANES * n / ((double)(t.tv_sec - s.tv_sec) + 1e-9 * (double)(t.tv_nsec - s.tv_nsec));
}
"""


@dataclass(frozen=True)
class Network:
    """A network before and after pruning, folded; ``x`` is one sample."""

    name: str
    original: ir.Model
    shrunk: ir.Model
    x: np.ndarray[Any, Any]


# Networks -------------------------------------------------------------------------------------------------------------


def networks() -> Iterator[Network]:
    """Yield the fixtures' LeNets and random networks with the counts of recorded runs."""
    from tests.relieved import FILES, load  # noqa: PLC0415  # needs torch

    for file in FILES:
        kept = load(file)
        shape = tuple(kept.x.shape[1:])
        yield _network(file.stem.removeprefix("mnist-"), kept.about["model"], kept.model, shape)
    resnet, vgg = _layers("cifar10-resnet20-short"), _layers("cifar10-vgg-like-short")
    yield _pruned("resnet20 14 %", "resnet20", resnet, 1.0)
    yield _pruned("resnet20 5 %", "resnet20", resnet, 0.05 / _share(resnet))
    yield _pruned("vgg-like", "vgg-like", vgg, 1.0, chain=True)
    yield _pruned("resnet18 10 %", "resnet18", None, 0.10, side=64)
    yield _pruned("resnet18 5 %", "resnet18", None, 0.05, side=64)


def _layers(run: str) -> dict[str, dict[str, int]]:
    layers: dict[str, dict[str, int]] = json.loads((RESULTS / "runs" / f"{run}.json").read_text())["layers"]
    return layers


def _share(layers: Mapping[str, Mapping[str, int]]) -> float:
    return sum(row["kept"] for row in layers.values()) / sum(row["dense"] for row in layers.values())


def _build(name: str, shape: tuple[int, ...], classes: int = 10) -> nn.Module:
    import torch  # noqa: PLC0415

    from relief_export.recipe import ModelConfig  # noqa: PLC0415
    from relief_export.training.models import build_model  # noqa: PLC0415

    assert len(shape) == 3
    model = build_model(ModelConfig(name), (shape[0], shape[1], shape[2]), classes, seed=SEED).eval()
    torch.manual_seed(SEED)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def _network(name: str, model: str, pruned: nn.Module, shape: tuple[int, ...]) -> Network:
    import torch  # noqa: PLC0415

    from relief_export.capture import capture  # noqa: PLC0415

    zeros = torch.zeros(2, *shape)
    x = np.random.default_rng(SEED).normal(size=(1, *shape)).astype(np.float32)
    return Network(name, fold(capture(_build(model, shape), zeros)), shrink(fold(capture(pruned, zeros))).model, x)


def _pruned(
    name: str,
    model: str,
    layers: Mapping[str, Mapping[str, int]] | None,
    factor: float,
    *,
    chain: bool = False,
    side: int = 32,
) -> Network:
    """Return a network with random kernels: ``factor`` of what each layer of a run kept, or of all it has.

    ``chain`` keeps kernels only between neurons that the run left alive, for networks whose layers follow one another.
    """
    import torch  # noqa: PLC0415

    shape = (3, side, side)
    pruned, rng = _build(model, shape), np.random.default_rng(SEED)
    alive: np.ndarray[Any, Any] | None = None
    modules = [(n, m) for n, m in pruned.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    for key, module in modules:
        weight = module.weight.data
        outputs, inputs = weight.shape[:2]
        size = weight[0, 0].numel()
        row = layers[key] if layers else {"kept": outputs * inputs * size, "alive": outputs}
        allowed = np.ones((outputs, inputs), bool)
        if chain:
            rows = np.isin(np.arange(outputs), rng.permutation(outputs)[: row["alive"]])
            allowed &= rows[:, None]
            allowed &= np.repeat(alive, inputs // len(alive))[None] if alive is not None else True
            alive = rows
        places = np.flatnonzero(allowed)
        kept = rng.permutation(places)[: max(1, round(row["kept"] * factor / size))]
        mask = np.zeros(outputs * inputs, np.float32)
        mask[kept] = 1
        weight *= torch.from_numpy(mask.reshape(outputs, inputs, *(1,) * (weight.ndim - 2)))
    return _network(name, model, pruned, shape)


# Candidates -----------------------------------------------------------------------------------------------------------


def bound(path: Path, x: np.ndarray[Any, Any]) -> tuple[Callable[[int], float], np.ndarray[Any, Any]]:
    """Return a timer of a model in ONNX Runtime on one thread, and its outputs."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    binding = session.io_binding()
    binding.bind_cpu_input(name, x)
    binding.bind_output(session.get_outputs()[0].name, "cpu")

    def timed(count: int) -> float:
        started = time.thread_time()
        for _ in range(count):
            session.run_with_iobinding(binding)
        return time.thread_time() - started

    return timed, np.asarray(session.run(None, {name: x})[0])


def compiled(
    folder: Path, flags: tuple[str, ...], x: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]
) -> Callable[[int], float]:
    """Compile the program in ``folder`` and return its timer; its outputs are compared first."""
    compiler = find_compiler()
    assert compiler is not None, "there is no C compiler"
    (folder / "loop.c").write_text(LOOP)
    files = [file for file in (folder / "net.c", folder / "net_weights.c", folder / "loop.c") if file.is_file()]
    target = folder / f"net{'-'.join(flags)}.so"
    compiler.build(files, target, ("-O2", "-D_GNU_SOURCE", *flags))
    function = ctypes.CDLL(str(target)).timed
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_void_p] * 3 + [ctypes.c_int]
    words = (folder / "net.h").read_text().split()
    memory = np.zeros(int(words[words.index("NET_ARENA_BYTES") + 1]) + 64, np.uint8)
    out = np.zeros(expected.size, np.float32)

    def timed(count: int) -> float:
        arena = -(-memory.ctypes.data // 64) * 64
        return float(function(x.ctypes.data, out.ctypes.data, arena, count))

    timed(1)
    error = np.abs(out - expected.ravel()).max() / np.abs(expected).max()
    assert error <= 1e-5, f"{folder.name} with {flags} is off by {error:.1e} of the outputs' scale"
    return timed


def _emx(
    folder: Path, model: Path, x: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]
) -> Callable[[int], float] | None:
    """Return a timer of the dense C that emx-onnx-cgen makes of a model, or None where it is not installed."""
    command = shutil.which("emx-onnx-cgen")
    compiler = find_compiler()
    if command is None or compiler is None:
        return None
    source = folder / "emx.c"
    # Large weights become a file that is read once: as text they would take its compiler minutes.
    done = subprocess.run(  # noqa: S603
        [command, "compile", str(model), str(source), "--model-name", "emx", "--input-dim", "batch=1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"emx-onnx-cgen: {done.stderr.strip().splitlines()[-1:]}"
    text = source.read_text()
    loop = LOOP.replace('#include "net.h"', "").replace("net_run(in, out, arena)", "emx(in, out), (void)arena")
    source.write_text(text + loop)
    target = folder / "emx.so"
    compiler.build([source], target, ("-O3", "-march=native", "-ffast-math", "-D_GNU_SOURCE", "-w"))
    library = ctypes.CDLL(str(target))
    if "_Bool emx_load(" in text:
        library.emx_load.restype = ctypes.c_bool
        assert library.emx_load(str(folder / "emx.bin").encode())
    function = library.timed
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_void_p] * 3 + [ctypes.c_int]
    out = np.zeros(expected.size, np.float32)

    def timed(count: int) -> float:
        return float(function(x.ctypes.data, out.ctypes.data, None, count))

    timed(1)
    _assert_close("emx-onnx-cgen", out, expected)
    return timed


def _openvino(
    model: Path, x: np.ndarray[Any, Any], expected: np.ndarray[Any, Any] | None = None
) -> Callable[[int], float] | None:
    """Return a timer of a model in OpenVINO on one thread, or None where it is not installed."""
    if importlib.util.find_spec("openvino") is None:
        return None
    import openvino  # noqa: PLC0415

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    network = core.read_model(str(model))
    network.reshape(list(x.shape))
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x))

    def timed(count: int) -> float:
        # It may compute on a thread of its own: the time of the whole process counts.
        started = time.process_time()
        for _ in range(count):
            request.infer()
        return time.process_time() - started

    timed(1)
    if expected is not None:
        _assert_close("OpenVINO", request.get_output_tensor(0).data, expected)
    return timed


def _assert_close(name: str, found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    """Check what another tool computes; 1e-4 because it may reorder sums."""
    error = np.abs(found.ravel() - expected.ravel()).max() / np.abs(expected).max()
    assert error <= 1e-4, f"{name} is off by {error:.1e} of the outputs' scale"


def _version(package: str) -> str:
    """Return an installed package's version, empty where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return ""


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """Return the instruction sets that this machine runs, as compiler flags."""
    with contextlib.suppress(OSError):
        flags = set(Path("/proc/cpuinfo").read_text().split())
        return {name: (f"-march={march}",) for name, (march, flag) in SETS.items() if flag in flags}
    return {"native": ("-march=native",)}


def _peak(lanes: int, flags: tuple[str, ...]) -> float:
    """Return the multiply-adds a second of one core, measured."""
    compiler = find_compiler()
    assert compiler is not None, "there is no C compiler"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "peak.c"
        source.write_text(PEAK)
        compiler.build(
            [source],
            source.with_suffix(".so"),
            ("-O2", "-ffp-contract=fast", "-D_GNU_SOURCE", f"-DLANES={lanes}", *flags),
        )
        function = ctypes.CDLL(str(source.with_suffix(".so"))).peak
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int]
        return max(float(function(3_000_000)) for _ in range(20))


# Measuring ------------------------------------------------------------------------------------------------------------


def measure(network: Network, peaks: Mapping[str, float]) -> list[Row]:
    """Time every form of a network; rows in microseconds."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        paths = {"original": folder / "original.onnx", "shrunk": folder / "shrunk.onnx", "int8": folder / "int8.onnx"}
        FORMATS["dense"].write(network.original, paths["original"], Options())
        FORMATS["dense"].write(network.shrunk, paths["shrunk"], Options())
        samples = np.random.default_rng(1).normal(size=(16, *network.x.shape[1:])).astype(np.float32)
        FORMATS["int8"].write(network.shrunk, paths["int8"], Options(calibration=samples))
        files, _, program = generate(network.shrunk)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        timers: dict[str, Callable[[int], float]] = {}
        expected = np.zeros(0)
        for key, path in paths.items():
            timers[f"ONNX Runtime, {key}"], found = bound(path, network.x)
            expected = found if key == "shrunk" else expected
        for name, flags in instruction_sets().items():
            timers[f"C, {name}"] = compiled(folder, flags, network.x, expected)
        timers["C, plain"] = compiled(folder, ("-DNET_PLAIN_C",), network.x, expected)
        emx, vino = (f"{name} {_version(name.lower())}".strip() for name in ("emx-onnx-cgen", "OpenVINO"))
        peers = {
            f"{emx}, shrunk": _emx(folder, paths["shrunk"], network.x, expected),
            f"{vino}, original": _openvino(paths["original"], network.x),
            f"{vino}, shrunk": _openvino(paths["shrunk"], network.x, expected),
        }
        timers |= {name: timer for name, timer in peers.items() if timer is not None}
        seconds = interleaved(timers)
    macs = sum(row["macs"] for row in program.choices)
    base, shrunk = seconds["ONNX Runtime, original"], seconds["ONNX Runtime, shrunk"]
    rows: list[Row] = []
    for name, best in seconds.items():
        key = name.removeprefix("C, ")
        peak = peaks.get(key) if name.startswith("C, ") else None
        rows.append({
            "network": network.name, "form": name, "microseconds": best * 1e6, "times_original": base / best,
            "times_shrunk": shrunk / best, "peak_share": macs / best / peak if peak else None,
            "floor": FLOORS.get((network.name, key)) if name.startswith("C, ") else None,
        })  # fmt: skip
    nothing = dict.fromkeys(("microseconds", "times_original", "times_shrunk", "peak_share", "floor"))
    absent = (f"{name}: not installed" for name, timer in peers.items() if timer is None)
    return rows + [{"network": network.name, "form": form, **nothing} for form in absent]


def interleaved(timers: Mapping[str, Callable[[int], float]]) -> dict[str, float]:
    """Return the least seconds of one call of each, over rounds in which each has its turn."""
    calls = {name: max(1, int(SECONDS / max(min(timer(1), timer(1)), 1e-7))) for name, timer in timers.items()}
    best = dict.fromkeys(timers, float("inf"))
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            best[name] = min(best[name], timer(calls[name]) / calls[name])
    return best


def _overhead() -> Row:
    """Time a model of one Identity: what a call of ONNX Runtime costs."""
    value = ir.Value(name="x", shape=ir.Shape([1, 1]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Identity", [value])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "y", value.shape, value.type
    model = ir.Model(ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 18}, name="empty"), ir_version=9)
    with tempfile.TemporaryDirectory() as folder:
        ir.save(model, Path(folder) / "empty.onnx")
        timer, _ = bound(Path(folder) / "empty.onnx", np.zeros((1, 1), np.float32))
    best = interleaved({"empty": timer})["empty"]
    return {
        "network": "one Identity", "form": "ONNX Runtime", "microseconds": best * 1e6, "times_original": None,
        "times_shrunk": None, "peak_share": None, "floor": None,
    }  # fmt: skip


def run() -> list[Row]:
    """Measure all networks; fail where a floor is missed, after all rows are printed."""
    sys.path.insert(0, str(ROOT))  # tests/ is no installed package
    peaks = {name: _peak({"AVX-512": 16, "AVX2": 8}.get(name, 4), flags) for name, flags in instruction_sets().items()}
    rows = [_overhead()]
    for network in networks():
        found = measure(network, peaks)
        rows += found
        for row in (row for row in found if row["microseconds"] is not None):
            print(
                f"{row['network']:15} {row['form']:24} {row['microseconds']:9.1f} us {row['times_original']:6.1f}x",
                file=sys.stderr,
            )
    missed = [row for row in rows if row["floor"] and row["times_original"] < row["floor"]]
    missed += [row for row in rows if row["form"] == "C, AVX2" and row["times_shrunk"] < SHRUNK_FLOOR]
    for row in missed:
        print(f"missed: {row}", file=sys.stderr)
    assert not missed, f"{len(missed)} floors are missed"
    return rows


BENCHMARK = Benchmark(
    name="c",
    question="How long does one sample take on one core, in ONNX Runtime and as generated C?",
    run=run,
    columns=(
        Column("network", "network"),
        Column("form", "form"),
        Column("microseconds", "microseconds", ",.1f"),
        Column("times_original", "times the original's speed", ".1f"),
        Column("times_shrunk", "times the shrunk one's", ".1f"),
        Column("peak_share", "share of the multiply-add peak", ".0%"),
        Column("floor", "floor", ".0f"),
    ),
    seeds=(SEED, 1),
    note=f"One sample at a time, one core. Least processor time of {ROUNDS} interleaved measurements; the dense C of "
    "emx-onnx-cgen is compiled with -O3 -march=native -ffast-math. The LeNets are relieved fixtures of the tests, the "
    "others have random kernels in the numbers that a recorded run kept, ResNet-18 that share of every layer at 64x64.",
)
