"""What an artifact takes on a processor, as its own compiler and linker say: flash, RAM, the deepest stack.

The network is linked with a function that calls it and with nothing else, not even start code, so what is measured is
the network with the library routines that it needs.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relief_export.device import callgraph
from relief_export.device.toolchain import FIRMWARE, Program, Toolchain
from relief_export.errors import MissingToolError
from relief_export.targets import CORES, TARGETS, core_of

if TYPE_CHECKING:
    from collections.abc import Sequence

_BYTES = {"float": 4, "int8_t": 1, "uint8_t": 1}


@dataclass(frozen=True)
class MeasuredSizes:
    """What a C program takes of a device, as its compiler measures it.

    Attributes:
        flash_bytes: Code, tables, and the initial values of variables.
        ram_bytes: Variables, arena, input and output, and the stack as far as it is known.
        processor: What it was built for. command: The compiler, its flags and the optimisation.
        text_bytes, data_bytes, bss_bytes: Sections of the linked network.
        objects_bytes: text and data of its object files alone; the rest of the flash are library routines.
        arena_bytes, input_bytes, output_bytes: What the caller lends.
        stack_bytes: The deepest stack of a call; None where it is not known.
        stack_path: The functions that reach it. stack_doubts: Why it may be deeper, or is not known.
        estimated: Why the sizes are those of another processor; None where they are measured.
    """

    flash_bytes: int
    ram_bytes: int
    processor: str
    command: str
    text_bytes: int
    data_bytes: int
    bss_bytes: int
    objects_bytes: int
    arena_bytes: int
    input_bytes: int
    output_bytes: int
    stack_bytes: int | None
    stack_path: tuple[str, ...]
    stack_doubts: tuple[str, ...]
    estimated: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def measure(
    folder: Path,
    *,
    target: str | None = None,
    cc: str | None = None,
    optimise: str = "s",
    defines: Sequence[str] = (),
) -> MeasuredSizes:
    """Cross-compile an artifact and read what it takes.

    Args:
        folder: What ``convert --to c`` wrote.
        target: A board or a core, or
        cc: a compiler with its flags.
        optimise: Level of optimisation: ``s``, ``2``, ...
        defines: Macros to compile with, such as ``NET_QUANTIZED_IO``.

    Raises:
        InputError: The folder holds no network, or the compiler refuses it.
        MissingToolError: The compiler is not installed.
    """
    toolchain, estimated = _toolchain(target, cc)
    program = Program.find(folder)
    macros = toolchain.macros(program, defines)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        objects = toolchain.compile(program, place, optimise=optimise, extra=("-fstack-usage",), defines=defines)
        elf = place / "network.elf"
        flags = (*(f"-D{name}" for name in defines), *program.aliases, f"-I{program.folder.resolve()}", f"-O{optimise}")
        # Own scripts where there are some: picolibc's has room for 64 KiB only, and counts a stack as .bss.
        script = FIRMWARE / f"{toolchain.family}.ld"
        placed = (f"-T{script}", "-Wl,--defsym=stack_bytes=0", "-Wl,--no-warn-rwx-segments") if script.exists() else ()
        toolchain.link([*objects, FIRMWARE / "call.c"], elf, flags=(*flags, *placed, "-Wl,-e,entry"))
        sections = toolchain.sections(elf)
        # As they were before linking, so that what the libraries add can be told apart.
        alone = [toolchain.sections(made) for made in objects]
        usage = [path.read_text() for path in sorted(place.glob("*.su"))]
        stack, path, doubts = _stack(toolchain, elf, usage, program)
    given, returned = (
        int(macros[f"NET_{kind}_SIZE"], 0) * _BYTES[macros.get(f"NET_{kind}_TYPE", "float")]
        for kind in ("INPUT", "OUTPUT")
    )
    arena = int(macros["NET_ARENA_BYTES"], 0)
    return MeasuredSizes(
        flash_bytes=sections.text + sections.data,
        ram_bytes=sections.data + sections.bss + arena + given + returned + (stack or 0),
        processor=TARGETS[target].title if target in TARGETS else toolchain.title,
        command=" ".join((*toolchain.command, f"-O{optimise}", *(f"-D{name}" for name in defines))),
        text_bytes=sections.text,
        data_bytes=sections.data,
        bss_bytes=sections.bss,
        objects_bytes=sum(part.text + part.data for part in alone),
        arena_bytes=arena,
        input_bytes=given,
        output_bytes=returned,
        stack_bytes=stack,
        stack_path=path,
        stack_doubts=doubts,
        estimated=estimated,
    )


def _toolchain(target: str | None, cc: str | None) -> tuple[Toolchain, str | None]:
    """Return the compiler of a target, or that of a core like it and why the sizes are then estimated.

    Raises:
        MissingToolError: It is not installed, and no other core's compiler says about the same.
    """
    try:
        return Toolchain.of(target=target, cc=cc), None
    except MissingToolError as error:
        # A compiler that was named by the caller gets no substitute: the error is the answer there.
        stand_in = core_of(target).stand_in if target is not None else None
        if stand_in is None:
            raise
        return Toolchain.of(target=stand_in), f"{error}; these are the sizes for {CORES[stand_in].title}"


def _stack(
    toolchain: Toolchain, elf: Path, usage: list[str], program: Program
) -> tuple[int | None, tuple[str, ...], tuple[str, ...]]:
    """Return the deepest stack, who reaches it, and doubts."""
    family = toolchain.family
    if family not in callgraph.FAMILIES:
        return None, (), (f"the call graph of {toolchain.machine} is not read",)
    frames, varying = callgraph.stated_frames(usage)
    listing = toolchain.tool("objdump", "-d", "--no-show-raw-insn", str(elf))
    address = 3 if "atmega2560" in " ".join(toolchain.command) else 2  # more than 128 KiB need a third byte
    found = callgraph.deepest(listing, family, f"{program.name}_run", frames, address=address)
    return found.bytes, found.path, (*varying, *found.doubts)
