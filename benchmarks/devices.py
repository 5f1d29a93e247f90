"""What does a pruned network take on a microcontroller, beside dense C of the same network?"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from benchmarks.c import SEED, Network, networks
from benchmarks.common import Benchmark, Column, Row
from relief_export.cgen.connections import Code, coded
from relief_export.cgen.lower import lower
from relief_export.cgen.mcu import generate
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
AVR_RAM = 16 * 1024
"""Of the ATmega1284P, with which the compiler and the emulator stand for AVR."""
DEAR = 5_000_000
"""Multiply-adds of floats in software that are not worth the minutes that an emulator takes for them."""
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


def chosen() -> Iterator[Network]:
    """Yield the fixtures' LeNets, then the keyword spotter, then ResNet-20, as many as RELIEF_DEVICES says (2)."""
    found = networks()
    order = itertools.chain(itertools.islice(found, 2), _later(keywords), found)
    return itertools.islice(order, int(os.environ.get("RELIEF_DEVICES", "2")))


def _later(make: Callable[[], Network]) -> Iterator[Network]:
    yield make()


@dataclass(frozen=True)
class Program:
    """A program and what it is run with.

    Attributes:
        name: The generator, the values, and which network.
        folder: Its sources.
        x: One sample ``(1, ...)``, float32 or int8.
        macs: Multiply-adds a sample. floats: Whether they are of floats.
        packed: Bytes of the packed ONNX file of the same values, None where there is none.
    """

    name: str
    folder: Path
    x: np.ndarray[Any, Any]
    macs: int
    floats: bool = True
    packed: int | None = None

    @property
    def defines(self) -> tuple[str, ...]:
        """Macros to compile it with."""
        return () if self.x.dtype == np.float32 else ("NET_QUANTIZED_IO",)


def run() -> list[Row]:
    """Measure every program of every network on every core."""
    rows = []
    for network in chosen():
        with tempfile.TemporaryDirectory() as scratch:
            programs = itertools.chain(_others(network, Path(scratch)), ours(network, Path(scratch)))
            rows += [_row(network, program) for program in programs]
    return rows


def samples(network: Network) -> np.ndarray[Any, Any]:
    """Return what integers are calibrated on."""
    return np.random.default_rng(SEED).normal(size=(32, *network.x.shape[1:])).astype(np.float32)


def ours(network: Network, scratch: Path, *, dense: bool = True) -> Iterator[Program]:
    """Yield the programs of our generator, those without masks only where ``dense``."""
    options = Options(calibration=samples(network))
    for code in CODES:
        packed = FORMATS[PACKED[code]].write(network.shrunk, scratch / f"{code}.onnx", options).bytes
        integers = None
        if code == "q8":
            plan, integers = quantised(quantise(network.shrunk, options)[0])
        else:
            plan = coded(lower(network.shrunk), code)
        for form in ("dense", "sparse") if dense and code in {"f32", "q8"} else ("sparse",):
            made = generate(plan, code, dense=form == "dense", quantisation=integers)
            folder = scratch / f"{form}-{code}"
            folder.mkdir()
            for file, content in made.files.items():
                (folder / file).write_bytes(content)
            macs = sum(layer["macs"] for layer in made.layers)
            bytes_ = packed if form == "sparse" else None
            yield Program(f"{form} {code}", folder, network.x, macs, integers is None, bytes_)
            if integers is not None and form == "sparse":
                given = as_integers(network.x, *integers.maps[plan.maps[0].start])
                yield Program("sparse q8, int8 in and out", folder, given, macs, floats=False, packed=bytes_)


def as_integers(x: np.ndarray[Any, Any], scale: float, zero: int) -> np.ndarray[Any, Any]:
    """Return samples as the int8 that a network's input means them by."""
    return (np.clip(np.rint(x / np.float32(scale)), -128 - zero, 127 - zero) + zero).astype(np.int8)


def _others(network: Network, scratch: Path) -> Iterator[Program]:
    """Yield the programs of emx-onnx-cgen, where it is installed."""
    options = Options(calibration=samples(network))
    for which, model in (("original", network.original), ("shrunk", network.shrunk)):
        macs = sum(layer["macs"] for layer in generate(lower(model), dense=True).layers)
        for values in ("f32", "int8"):
            made = model if values == "f32" else quantise(model, options)[0]
            folder = _emx(made, network, scratch / f"emx-{which}-{values}")
            if folder is not None:
                yield Program(f"emx-onnx-cgen {values}, {which}", folder, network.x, macs)


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


_WHY = {
    "too large": "an array above 32 KiB",
    "region .text": "flash",
    "^RAM|will not fit in region|region .data|stack": "RAM",
}
"""What compilers, linkers and our emulation say -> what the chip has too little of."""


def _row(network: Network, program: Program) -> Row:
    """Return one row: for each core CORE flash_CORE, library_CORE, ram_CORE, stack_CORE, count_CORE, reason_CORE."""
    row: Row = {"network": network.name, "program": program.name, "packed_bytes": program.packed, "macs": program.macs}
    for core in CORES:
        row |= {f"{key}_{core}": None for key in ("flash", "library", "ram", "stack", "count", "reason")}
        try:
            found = measure(program.folder, target=core, optimise="2", defines=program.defines)
            row |= {
                f"flash_{core}": found.flash_bytes, f"library_{core}": found.flash_bytes - found.objects_bytes,
                f"ram_{core}": found.ram_bytes, f"stack_{core}": found.stack_bytes,
            }  # fmt: skip
            if core == "avr" and found.ram_bytes > AVR_RAM:
                row["reason_avr"] = f"RAM: {found.ram_bytes:,} bytes, and the chip has {AVR_RAM:,}"
            elif program.floats and core != "cortex-m4f" and program.macs > DEAR:
                row[f"reason_{core}"] = f"more than {DEAR:,} multiply-adds of floats without an FPU: not run"
            else:
                ran = emulate(program.folder, core, program.x, optimise="2", defines=program.defines)
                row[f"count_{core}"] = int(ran.counts.mean())
        except InputError as error:
            row[f"reason_{core}"] = str(error)[:300]
        shown = (row[f"{key}_{core}"] for key in ("flash", "count", "reason"))
        print(f"{network.name}, {program.name}, {core}:", *shown, file=sys.stderr, flush=True)
    said = row["reason_avr"] or ""
    row["lacks_avr"] = next((why for pattern, why in _WHY.items() if re.search(pattern, said)), None)
    return row


_NOTE = (
    "Flash: code, tables and library routines, linked (`text + data`), at -O2 (what of it is library, and the sizes at "
    "-Os, are under *Devices_flash*). RAM: variables, arena, the caller's input and output, and the deepest stack. "
    "Counts are instructions that QEMU ran, on AVR cycles of simavr; no caches, no wait states; none where a program "
    f"does not fit the chip, and none of more than {DEAR:,} multiply-adds of floats on a core without an FPU, which "
    "take the emulator minutes. AVR is an ATmega1284P: 128 KiB of flash, 16 KiB of RAM; *AVR lacks* says what a "
    "program that has no figures there had too little of. One sample, floats in and out where nothing else is said. "
    "*emx-onnx-cgen* is dense C by another generator, of the float file and of the int8 file, whose int8 expands the "
    "weights into floats on the stack; *dense* our own generator with every weight stored and multiplied, the twin of "
    "*sparse*. Packed ONNX: the file of the same values. The LeNets are really trained and relieved. The keyword "
    "spotter (15 % of the kernels) and ResNet-20 (as many of each layer as a recorded run kept, 14 %) have connections "
    "drawn at random and weights that are not trained: sizes and counts do not depend on accuracy. q8 is bit for bit "
    "ONNX Runtime's integer kernels. The command measures the LeNets; RELIEF_DEVICES=4 in front adds the other two."
)
TITLES = {"cortex-m4f": "M4F", "cortex-m0plus": "M0+", "rv32imc": "RV32IMC", "avr": "AVR"}

BENCHMARK = Benchmark(
    name="devices",
    question="What does a pruned network take on a microcontroller, beside dense C of the same network?",
    run=run,
    columns=(
        Column("network", "network"),
        Column("program", "program"),
        Column("packed_bytes", "packed ONNX, bytes", ",d"),
        *(Column(f"flash_{core}", f"flash {short}", ",d") for core, short in TITLES.items()),
        *(Column(f"ram_{core}", f"RAM {TITLES[core]}", ",d") for core in ("cortex-m4f", "avr")),
        *(Column(f"count_{core}", f"{'cycles' if core == 'avr' else 'instructions'} {short}", ",d")
          for core, short in TITLES.items()),
        Column("lacks_avr", "AVR lacks"),
    ),
    seeds=(SEED,),
    note=_NOTE,
)  # fmt: skip
