"""What does a pruned network take on a microcontroller, beside dense C of the same network?"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from benchmarks.c import SEED, Network, networks
from benchmarks.common import Benchmark, Column, Row
from relief_export.cgen.lower import lower
from relief_export.cgen.mcu import Code, coded, generate
from relief_export.cgen.quantised import quantised
from relief_export.device.emulator import emulate
from relief_export.device.measure import measure
from relief_export.errors import InputError
from relief_export.formats import FORMATS, Options
from relief_export.formats.int8 import quantise
from relief_export.graph.prepare import fold
from relief_export.graph.shrink import shrink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CORES = ("cortex-m0plus", "cortex-m4f", "rv32imc", "avr")
CODES: tuple[Code, ...] = ("f32", "int8", "codebook16", "q8")
PACKED = {"f32": "packed", "int8": "packed-int8", "codebook16": "packed-codebook16", "q8": "packed-int8"}
"""Value code -> the packed ONNX format of the same values."""
_KEYWORDS = """g (float[n, 10, 49] x) => (float[n, 12] y)
{ a = Conv<pads=[4,4], strides=[2]>(x, w0, b0) c = Relu(a) d = Conv<pads=[1,1]>(c, w1, b1) e = Relu(d)
  f = Conv<pads=[1,1]>(e, w2, b2) h = Relu(f) i = GlobalAveragePool(h) j = Flatten(i) y = Gemm<transB=1>(j, w3, b3) }"""


def keywords() -> Network:
    """Return a keyword spotter of usual size: 49 frames of 10 coefficients, 12 words; 15 % of the kernels at random."""
    rng = np.random.default_rng(SEED)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for k, shape in enumerate(((64, 10, 9), (64, 64, 3), (64, 64, 3), (12, 64))):
        arrays[f"w{k}"] = (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        arrays[f"b{k}"] = rng.normal(size=shape[0]).astype(np.float32) * np.float32(0.1)

    def built(share: float) -> ir.Model:
        from tests.graph.helpers import build  # noqa: PLC0415

        drawn = np.random.default_rng(SEED)
        kept = {
            name: array * (drawn.random(array.shape[:2]) < share)[..., None].astype(np.float32)
            if array.ndim == 3
            else array
            for name, array in arrays.items()
        }
        return build(_KEYWORDS, kept)

    x = rng.normal(size=(1, 10, 49)).astype(np.float32)
    return Network("keywords 15 %", fold(built(1.0)), shrink(fold(built(0.15))).model, x)


def _later(make: Callable[[], Network]) -> Iterator[Network]:
    yield make()


def run() -> list[Row]:
    """Measure every program of every network on every core."""
    rows = []
    # The fixtures' LeNets; RELIEF_DEVICES=3 takes the keyword spotter as well, and 4 ResNet-20, which takes longest.
    found = networks()
    order = itertools.chain(itertools.islice(found, 2), _later(keywords), found)
    for network in itertools.islice(order, int(os.environ.get("RELIEF_DEVICES", "2"))):
        with tempfile.TemporaryDirectory() as scratch:
            packed = _packed(network, Path(scratch))
            for name, folder in _programs(network, Path(scratch)):
                rows.append(_row(network, name, folder, packed.get(name)))
    return rows


def _packed(network: Network, folder: Path) -> dict[str, int]:
    options = Options(calibration=_samples(network))
    return {
        f"sparse {code}": FORMATS[form].write(network.shrunk, folder / f"{form}.onnx", options).bytes
        for code, form in PACKED.items()
    }


def _samples(network: Network) -> np.ndarray[Any, Any]:
    return np.random.default_rng(SEED).normal(size=(32, *network.x.shape[1:])).astype(np.float32)


def _programs(network: Network, scratch: Path) -> Iterator[tuple[str, Path]]:
    """Yield a name and a folder for each program."""
    options = Options(calibration=_samples(network))
    for which, model in (("original", network.original), ("shrunk", network.shrunk)):
        for values in ("f32", "int8"):
            made = model if values == "f32" else quantise(model, options)[0]
            folder = _emx(made, network, scratch / f"emx-{which}-{values}")
            if folder is not None:
                yield f"emx-onnx-cgen {values}, {which}", folder
    for code in CODES:
        integers = None
        try:
            if code == "q8":
                plan, integers = quantised(quantise(network.shrunk, options)[0])
            else:
                plan = coded(lower(network.shrunk), code)
            for form in ("dense", "sparse") if code in {"f32", "q8"} else ("sparse",):
                program = generate(plan, code, dense=form == "dense", quantisation=integers)
                folder = scratch / f"{form}-{code}"
                folder.mkdir()
                for file, content in program.files.items():
                    (folder / file).write_bytes(content)
                yield f"{form} {code}", folder
        except InputError as error:
            print(f"{network.name}, {code}: {error}", file=sys.stderr)


def _emx(model: ir.Model, network: Network, folder: Path) -> Path | None:
    """Return a folder with the dense C of emx-onnx-cgen behind our interface; None where it is not installed."""
    command = shutil.which("emx-onnx-cgen")
    if command is None:
        return None
    folder.mkdir()
    ir.save(model, folder / "model.onnx")
    batch = model.graph.inputs[0].shape
    symbol = None if batch is None or isinstance(batch[0], int) else batch[0].value
    dimension = () if symbol is None else ("--input-dim", f"{symbol}=1")
    done = subprocess.run(  # noqa: S603
        [command, "compile", "model.onnx", "emx.inc", "--model-name", "emx", *dimension,
         "--large-weight-threshold", "0",
         # No heap, which a program without an operating system has not: activations lie on the stack.
         "--large-temp-threshold", "0"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        print(f"emx-onnx-cgen, {network.name}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    outputs = lower(network.shrunk).output.size
    (folder / "net.h").write_text(
        f"#define NET_INPUT_SIZE {network.x.size}\n#define NET_OUTPUT_SIZE {outputs}\n#define NET_ARENA_BYTES 0\n"
        "void net_run(const float *input, float *output, void *arena);\n"
    )
    (folder / "net.c").write_text(
        '#include "emx.inc"\n#include "net.h"\n'
        "void net_run(const float *input, float *output, void *arena)\n{\n"
        "    (void)arena;\n    emx((const void *)input, (void *)output);\n}\n"
    )
    return folder


def _row(network: Network, program: str, folder: Path, packed: int | None) -> Row:
    """Return one row: for each core CORE flash_CORE, library_CORE, ram_CORE, stack_CORE, count_CORE, reason_CORE."""
    row: Row = {"network": network.name, "program": program, "packed_bytes": packed}
    for core in CORES:
        row |= {f"{key}_{core}": None for key in ("flash", "library", "ram", "stack", "count", "reason")}
        try:
            found = measure(folder, target=core, optimise="2")
            row |= {
                f"flash_{core}": found.flash, f"library_{core}": found.flash - found.objects,
                f"ram_{core}": found.ram, f"stack_{core}": found.stack,
            }  # fmt: skip
            slow = core != "cortex-m4f" and "q8" not in program
            # Expands the weights into floats on the stack, beyond what the emulated boards have.
            slow |= program.startswith("emx-onnx-cgen int8")
            if slow and not ("lenet" in network.name and "sparse" in program):
                row[f"reason_{core}"] = "not run in the emulator"
            else:
                row[f"count_{core}"] = int(emulate(folder, core, network.x, optimise="2").counts.mean())
        except InputError as error:
            row[f"reason_{core}"] = str(error)[:160]
        shown = (row[f"{key}_{core}"] for key in ("flash", "count", "reason"))
        print(f"{network.name}, {program}, {core}:", *shown, file=sys.stderr, flush=True)
    return row


_NOTE = (
    "Flash: code, tables and library routines, linked (`text + data`). The library's share on M0+ is floats in "
    "software, which a firmware that computes with floats anyway has already. RAM: variables, arena, the caller's "
    "input and output, and the deepest stack. Counts are instructions that QEMU ran, on AVR cycles of simavr; no "
    "caches, no wait states; none where a program does not fit the chip, none of dense floats without an FPU, which "
    "take the emulator minutes, and none of emx-onnx-cgen's int8, which expands the weights into floats on the stack."
    " One sample, -O2, floats in and out. *emx-onnx-cgen* is dense C by another generator, of the float file and of "
    "the int8 file; *dense* our own generator with every weight stored and multiplied, the twin of *sparse*. Packed "
    "ONNX: the file of the same values. The LeNets are really trained and relieved. RELIEF_DEVICES=4 adds a keyword "
    "spotter and ResNet-20, both with random weights and random kernels. q8 is bit for bit ONNX Runtime's integer "
    "kernels."
)
_SHORT = {"cortex-m4f": "M4F", "cortex-m0plus": "M0+", "rv32imc": "RV32IMC", "avr": "AVR"}

BENCHMARK = Benchmark(
    name="devices",
    question="What does a pruned network take on a microcontroller, beside dense C of the same network?",
    run=run,
    columns=(
        Column("network", "network"),
        Column("program", "program"),
        Column("packed_bytes", "packed ONNX, bytes", ",d"),
        *(Column(f"flash_{core}", f"flash {short}", ",d") for core, short in _SHORT.items()),
        Column("library_cortex-m0plus", "library of M0+", ",d"),
        *(Column(f"ram_{core}", f"RAM {_SHORT[core]}", ",d") for core in ("cortex-m4f", "avr")),
        *(Column(f"count_{core}", f"{'cycles' if core == 'avr' else 'instructions'} {short}", ",d")
          for core, short in _SHORT.items()),
    ),
    seeds=(SEED,),
    note=_NOTE,
)  # fmt: skip
