"""Does a program of integers compute the same bits on every processor as ONNX Runtime does?"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.c import SEED
from benchmarks.common import RESULTS, Benchmark, Column, Row
from benchmarks.devices import CORES, TITLES, as_integers, chosen
from relief_export.cgen.mcu import generate
from relief_export.cgen.quantised import quantised
from relief_export.device.emulator import emulate
from relief_export.formats import Options
from relief_export.formats.int8 import quantise
from relief_export.records import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.c import Network

Array = np.ndarray[Any, Any]
SAMPLES = 1000
PIECE = 50
"""Samples that an emulator is given at a time, for it may take five minutes for them."""


def run() -> list[Row]:
    """Run every sample on every core, with int8 in and out and with floats, and count the outputs that differ.

    A row that an earlier run left of the same program is kept: LeNet-5 alone takes AVR's emulator ten minutes.
    """
    rows = []
    for network in chosen():
        x = pictures(network)
        with tempfile.TemporaryDirectory() as scratch:
            rows += list(_rows(network, x, Path(scratch)))
    return rows


def pictures(network: Network) -> Array:
    """Return ``(SAMPLES, ...)`` float32: a fixture's pictures, moved and with noise; noise for other networks."""
    from tests.relieved import FILES, load  # noqa: PLC0415  # needs torch

    rng = np.random.default_rng(SEED)
    noise = rng.normal(size=(SAMPLES, *network.x.shape[1:])).astype(np.float32)
    for file in FILES:
        if file.stem.removeprefix("mnist-") == network.name:
            kept = load(file).x.numpy()
            moved = [np.roll(kept[k % len(kept)], rng.integers(-3, 4, 2), (-2, -1)) for k in range(SAMPLES)]
            return np.stack(moved) + noise * rng.uniform(0, 0.5, (SAMPLES, *[1] * (kept.ndim - 1))).astype(np.float32)
    return noise


def _earlier() -> dict[tuple[str, ...], Row]:
    path = RESULTS / "devices_exact.json"
    found = read_json(path)["rows"] if path.is_file() else []
    return {tuple(row[key] for key in ("network", "core", "io", "program")): row for row in found}


def _rows(network: Network, x: Array, folder: Path) -> Iterator[Row]:
    from tests.cgen.test_mcu import in_onnx_runtime  # noqa: PLC0415  # needs pytest

    model = quantise(network.shrunk, Options(calibration=x[:64]))[0]
    plan, integers = quantised(model)
    files = generate(plan, "q8", quantisation=integers).files
    for file, content in files.items():
        (folder / file).write_bytes(content)
    program, earlier = hashlib.sha256(files["net.c"]).hexdigest(), _earlier()
    floats = in_onnx_runtime(model, x).reshape(len(x), -1)  # type: ignore[no-untyped-call]  # a helper of the tests
    scale, zero = integers.maps[plan.maps[int(plan.locate(plan.output)[0][0])].start]
    numbers = np.rint(floats / np.float32(scale)).astype(np.int64) + zero
    given = as_integers(x, *integers.maps[plan.maps[0].start])
    for core in CORES:
        for io, (inputs, expected, defines) in {
            "int8": (given, numbers, ("NET_QUANTIZED_IO",)),
            "float": (x, floats, ()),
        }.items():
            if row := earlier.get((network.name, TITLES[core], io, program)):
                yield row
                continue
            # Rounding the input is the same code in all samples, and AVR's emulator is slow.
            count = SAMPLES // 10 if (core, io) == ("avr", "float") else SAMPLES
            different, counts = 0, []
            for start in range(0, count, PIECE):
                piece = slice(start, min(start + PIECE, count))
                ran = emulate(folder, core, inputs[piece], optimise="2", defines=defines)
                different += int((ran.outputs != expected[piece]).sum())
                counts += ran.counts.tolist()
                print(f"{network.name}, {core}, {io}: {piece.stop}, {different} differ", file=sys.stderr, flush=True)
            yield {
                "network": network.name, "core": TITLES[core], "io": io, "program": program, "samples": count,
                "outputs": count * expected.shape[1], "different": different,
                "classes": len(set(floats[:count].argmax(1).tolist())),
                "mean_count": float(np.mean(counts)), "largest_count": max(counts),
            }  # fmt: skip


_NOTE = (
    f"{SAMPLES:,} samples (on AVR with floats in and out a tenth of them): the fixture's pictures, moved by up to 3 "
    "pixels and with noise; the relieved LeNets, quantised on 64 of them. The reference is the int8 model in ONNX "
    "Runtime. Outputs that differ in any bit are counted. Instructions in QEMU, on AVR (an ATmega1284P) cycles in "
    "simavr, at -O2."
)

BENCHMARK = Benchmark(
    name="devices_exact",
    question="Does a program of integers compute the same bits on every processor as ONNX Runtime does?",
    run=run,
    columns=(
        Column("network", "network"),
        Column("core", "core"),
        Column("io", "in and out"),
        Column("samples", "samples", ",d"),
        Column("classes", "classes predicted", ",d"),
        Column("outputs", "outputs", ",d"),
        Column("different", "differ", ",d"),
        Column("mean_count", "instructions a sample, mean", ",.0f"),
        Column("largest_count", "most", ",d"),
    ),
    seeds=(SEED,),
    note=_NOTE,
)
