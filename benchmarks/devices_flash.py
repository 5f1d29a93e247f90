"""Does a program with its code fit into the packed ONNX file and two kilobytes, and if not, what is too much?"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.c import SEED
from benchmarks.common import Benchmark, Column, Row
from benchmarks.devices import CORES, TITLES, Program, chosen, ours
from relief_export.device.measure import measure
from relief_export.errors import InputError

if TYPE_CHECKING:
    from benchmarks.c import Network

ALLOWED = 2000
"""Bytes that a program may take beyond the packed ONNX file of the same values."""
_BYTES = {"float": 4, "int8_t": 1, "uint8_t": 1, "uint16_t": 2, "int32_t": 4, "uint32_t": 4}
_OPTIMISE = "s"


def run() -> list[Row]:
    """Measure the flash of every program of ours on every core."""
    rows = []
    for network in chosen():
        with tempfile.TemporaryDirectory() as scratch:
            rows += [
                _row(network, program, core) for program in ours(network, Path(scratch), dense=False) for core in CORES
            ]
    return rows


def _row(network: Network, program: Program, core: str) -> Row:
    """Return one row, whose sizes are None where the program does not fit the chip."""
    tables = _tables(program.folder / "net.c")
    row: Row = {"network": network.name, "program": program.name.removeprefix("sparse "), "core": TITLES[core]}
    row |= {"packed_bytes": program.packed, "tables": tables, "code": None, "library": None, "flash": None}
    row |= {"over": None, "over_without_library": None, "reason": None}
    try:
        found = measure(program.folder, target=core, optimise=_OPTIMISE, defines=program.defines)
    except InputError as error:
        return row | {"reason": str(error)[:300]}
    assert program.packed is not None
    allowed = program.packed + ALLOWED
    return row | {
        "code": found.objects_bytes - tables,
        "library": found.flash_bytes - found.objects_bytes,
        "flash": found.flash_bytes,
        "over": found.flash_bytes - allowed,
        "over_without_library": found.objects_bytes - allowed,
    }


def _tables(source: Path) -> int:
    """Return the bytes of the constants in a generated file."""
    found = re.findall(r"^static const (\w+) \w+\[(\d+)\] NET_ROM", source.read_text(), re.MULTILINE)
    return sum(_BYTES[kind] * int(count) for kind, count in found)


_NOTE = (
    "Measured as `audit --measure` does, at -Os, floats in and out where nothing else is said. Flash = tables + code + "
    "library. On cores without an FPU the library of the float programs is addition and multiplication in software, "
    "which a firmware that computes with floats anyway has already. *Beyond*: flash less the packed ONNX file of the "
    f"same values and {ALLOWED:,} bytes; negative is within. The networks are those of *Devices*. Empty where a "
    "program does not fit the chip. The command measures the LeNets; RELIEF_DEVICES=4 in front adds the other two."
)

BENCHMARK = Benchmark(
    name="devices_flash",
    question="Does a program with its code fit into its packed ONNX file and 2 kB, and if not, what is too much?",
    run=run,
    columns=(
        Column("network", "network"),
        Column("program", "values"),
        Column("core", "core"),
        Column("packed_bytes", "packed ONNX, bytes", ",d"),
        Column("tables", "tables", ",d"),
        Column("code", "code", ",d"),
        Column("library", "library", ",d"),
        Column("flash", "flash", ",d"),
        Column("over", "beyond", "+,d"),
        Column("over_without_library", "beyond, without library", "+,d"),
    ),
    seeds=(SEED,),
    note=_NOTE,
)
