"""Run an artifact in an emulator of its processor: outputs, instructions, and the stack that it really used."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from relief_export.device.toolchain import FIRMWARE, Program, Toolchain, require, run
from relief_export.errors import InputError, UnsupportedModelError
from relief_export.printing import counted
from relief_export.targets import core_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relief_export.targets import Core

Array: TypeAlias = np.ndarray[Any, Any]

_TIMEOUT = 300.0
"""Seconds that an emulator may take for all samples."""
_TYPES = {"float": np.float32, "int8_t": np.int8, "uint8_t": np.uint8}
# Where the MPS2 board with the security extension has its code and data, seen from the secure side it starts in.
_SECURE = ("-Wl,--defsym=flash_origin=0x10000000", "-Wl,--defsym=ram_origin=0x38000000")
_SECTION = 512
"""Bytes kept free in an AVR's flash beside program and samples."""


@dataclass(frozen=True)
class Run:
    """What came of it.

    Attributes:
        outputs: ``(samples, outputs)``, float32, or integers where the network's outputs are.
        counts: ``(samples,)`` instructions, or clock cycles (see ``Core.unit``), int64.
        stack_bytes: The deepest stack of ``net_run``, without its caller's.
    """

    outputs: Array
    counts: Array
    stack_bytes: int


def emulate(folder: Path, target: str, x: Array, *, optimise: str = "s", defines: Sequence[str] = ()) -> Run:
    """Run an artifact over samples.

    Args:
        folder: What ``convert --to c`` wrote.
        target: A board or a core.
        x: ``(samples, ...)``, of the type of the network's inputs.
        optimise: Level of optimisation: ``s``, ``2``, ...
        defines: Macros to compile with, such as ``NET_QUANTIZED_IO``.

    Raises:
        InputError: The samples do not fit the network, the program does not fit the chip, or the run fails.
        MissingToolError: The compiler or the emulator is not installed.
        UnsupportedModelError: There is no emulator of that core.
    """
    core = core_of(target)
    if not core.emulator:
        raise UnsupportedModelError(f"there is no emulator for {core.title} here: run on another target")
    require(core.emulator[0], f"running on {target}", core.emulator_install)
    toolchain, program = Toolchain.of(target=target), Program.find(folder)
    macros = toolchain.macros(program, defines)
    kind = _TYPES[macros.get("NET_INPUT_TYPE", "float")]
    samples = np.ascontiguousarray(x.reshape(len(x), -1))
    # Nothing is converted: floats given to a network of integers would be other numbers without a warning.
    if samples.dtype != kind or samples.shape[1] != int(macros["NET_INPUT_SIZE"], 0) or not len(samples):
        raise InputError(
            f"{folder} takes {macros['NET_INPUT_SIZE']} {np.dtype(kind)} a sample: the data have {samples.shape[1]} "
            f"{samples.dtype} for each of {counted(len(samples), 'sample')}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        job = _Job(core, toolchain, program, Path(scratch), optimise, tuple(defines), macros)
        return (_on_avr if core.family == "avr" else _on_qemu)(job, samples)


@dataclass(frozen=True)
class _Job:
    core: Core
    toolchain: Toolchain
    program: Program
    scratch: Path
    optimise: str
    defines: tuple[str, ...]
    macros: dict[str, str]

    @property
    def output_type(self) -> np.dtype[Any]:
        return np.dtype(_TYPES[self.macros.get("NET_OUTPUT_TYPE", "float")])

    @property
    def outputs(self) -> int:
        return int(self.macros["NET_OUTPUT_SIZE"], 0)

    def objects(self) -> list[Path]:
        return self.toolchain.compile(self.program, self.scratch, optimise=self.optimise, defines=self.defines)

    def flags(self) -> tuple[str, ...]:
        """Flags of the harness, which includes the network's header."""
        folder = self.program.folder.resolve()
        return (*(f"-D{name}" for name in self.defines), *self.program.aliases, f"-I{folder}", f"-O{self.optimise}")


def _on_qemu(job: _Job, samples: Array) -> Run:
    """Let the program read the samples and write its results through semihosting, in the scratch folder."""
    elf, family = job.scratch / "program.elf", job.core.family
    sources = [*job.objects(), FIRMWARE / f"start_{family}.c", FIRMWARE / "harness.c"]
    secure = _SECURE if "cortex-m33" in job.core.name else ()
    job.toolchain.link(
        sources, elf, flags=(*job.flags(), "-Wl,--no-warn-rwx-segments", f"-T{FIRMWARE / family}.ld", *secure)
    )
    (job.scratch / "samples.bin").write_bytes(samples.tobytes())
    run((*job.core.emulator, str(elf)), job.scratch, _TIMEOUT)
    row = np.dtype([("output", job.output_type, (job.outputs,)), ("ticks", "<u8")])
    results = (job.scratch / "results.bin").read_bytes()
    # The last four bytes are the stack's, written at the end, so a run that broke off is too short.
    if len(results) != len(samples) * row.itemsize + 4:
        raise InputError(
            f"{job.program.folder} did not run to its end on {job.core.title}: it left {len(results)} bytes"
        )
    rows = np.frombuffer(results, row, len(samples))
    counts = rows["ticks"].astype(np.int64) * job.core.ticks_per_count
    return Run(rows["output"].copy(), counts, int.from_bytes(results[-4:], "little"))


def _on_avr(job: _Job, samples: Array) -> Run:
    """Put as many samples into the flash as there is room for, run, and go on with the next."""
    objects = job.objects()
    chip = next(flag.partition("=")[2] for flag in job.toolchain.command if flag.startswith("-mmcu="))
    outputs: list[Array] = []
    counts: list[int] = []
    # One sample first: only the linked program shows how much flash is left for more.
    deepest, room = 0, 1
    while len(counts) < len(samples):
        part = samples[len(counts) : len(counts) + room]
        (job.scratch / "samples.bin").write_bytes(part.tobytes())
        elf = job.scratch / "program.elf"
        flags = (*job.flags(), f"-DSAMPLES={len(part)}", f"-Wa,-I{job.scratch}")
        # The harness comes last, so that the samples lie behind the network's tables.
        job.toolchain.link([*objects, FIRMWARE / "harness_avr.c"], elf, flags=flags, start=True)
        size = job.toolchain.sections(elf)
        memory = _avr_memory(job)
        # The table names the core's own chip, but a board may have a smaller or larger one.
        emulator = [word if word != "atmega1284p" else chip for word in job.core.emulator]
        printed = run((*emulator, str(elf)), job.scratch, _TIMEOUT)
        # The emulator prints each line in colour and its end as a full stop.
        values = {kind: re.findall(rf"{kind}([0-9a-f]+)\.", printed) for kind in "RCS"}
        if len(values["S"]) > 1:
            raise InputError(f"{job.program.folder} runs its stack into its data on {chip}: it needs a larger chip")
        if len(values["C"]) != len(part) or len(values["R"]) != len(part) * job.outputs or len(values["S"]) != 1:
            raise InputError(f"{job.program.folder} did not run to its end on {chip}: its stack may lack room")
        stack = int.from_bytes(bytes.fromhex(values["S"][0]), "little")
        deepest = max(deepest, stack)
        counts += [int.from_bytes(bytes.fromhex(value), "little") for value in values["C"]]
        outputs.append(np.frombuffer(bytes.fromhex("".join(values["R"])), job.output_type).reshape(len(part), -1))
        room = len(part) + (memory["FLASH"] - size.text - size.data - _SECTION) // max(part[0].nbytes, 1)
    return Run(np.concatenate(outputs), np.array(counts, np.int64), deepest)


def _avr_memory(job: _Job) -> dict[str, int]:
    """Return the bytes of RAM and flash that the compiler's headers give the chip."""
    found = run((*job.toolchain.command, "-include", "avr/io.h", "-dM", "-E", "-xc", "/dev/null"))
    ends = {name: int(match[1], 0) for name in ("RAMEND", "RAMSTART", "FLASHEND")
            if (match := re.search(rf"^#define {name} \(?(0x[0-9A-Fa-f]+|\d+)", found, re.MULTILINE))}  # fmt: skip
    return {"RAM": ends["RAMEND"] + 1 - ends["RAMSTART"], "FLASH": ends["FLASHEND"] + 1}
