"""Does the smaller file run faster? One inference of each form of a network, in one process, interleaved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.common import ROOT, Benchmark, Column, Row
from relief_export.errors import InputError
from relief_export.evaluation import load_arrays, measure_latency
from relief_export.formats import read_manifest

if TYPE_CHECKING:
    from pathlib import Path

BUILD = ROOT / "build"
BASELINES = ("original", "masked")
REPEATS, WARMUP, BATCH, THREADS = 101, 20, 1, 1


def measure(folder: Path) -> list[Row]:
    """Time every form in ``folder/artifacts``: the unpruned network, the masked one, and each artifact."""
    artifacts = folder / "artifacts"
    manifest = read_manifest(artifacts)
    models = {f"{name}.onnx": artifacts / f"{name}.onnx" for name in BASELINES}
    models |= {artifact.name: manifest.path(artifact) for artifact in manifest.artifacts}
    missing = [path for path in models.values() if not path.exists()]
    if missing:
        raise InputError(f"{missing[0]} does not exist: export {folder.name} again")
    sizes = {artifact.name: artifact.bytes for artifact in manifest.artifacts}
    x = load_arrays(artifacts / "reference.npz").x
    found = measure_latency(models, x, batch=BATCH, repeats=REPEATS, warmup=WARMUP, threads=THREADS)
    base = found[0].median
    return [
        {"run": folder.name, "bytes": sizes.get(row.name, models[row.name].stat().st_size)}
        | row.to_dict()
        | {"times_faster": base / row.median}
        for row in found
    ]


def run() -> list[Row]:
    """Time every build folder that has been exported."""
    folders = sorted(path.parent.parent for path in BUILD.glob("*/artifacts/manifest.json"))
    if not folders:
        raise InputError(f"{BUILD} has no exported network to time: make digits-lenet5 first")
    return [row for folder in folders for row in measure(folder)]


BENCHMARK = Benchmark(
    name="latency",
    question="How long does one inference take, unpruned, masked, shrunk and in each format?",
    run=run,
    columns=(
        Column("run", "network"),
        Column("name", "file"),
        Column("bytes", "bytes", ",d"),
        Column("median", "median, ms", ".4f", 1000),
        Column("lower", "lower quartile", ".4f", 1000),
        Column("upper", "upper quartile", ".4f", 1000),
        Column("times_faster", "speed-up, measured", ".2f"),
        Column("load", "load, ms", ".1f", 1000),
    ),
    note=f"ONNX Runtime on the CPU, {THREADS} thread, batch {BATCH}, optimised; median and quartiles of {REPEATS} "
    "interleaved measurements after a warm-up, each of enough inferences to last 2 ms; load is one session creation.",
)
