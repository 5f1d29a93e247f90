"""Compilers for other processors: find one, compile an artifact with it, read what the linker made."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from relief_export.errors import InputError, MissingToolError
from relief_export.targets import CORES, TARGETS, core_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relief_export.targets import Core

FIRMWARE = Path(__file__).parent / "firmware"
# Functions and tables in sections of their own, so that the linker drops what the network does not use.
_FLAGS = ("-std=gnu99", "-ffunction-sections", "-fdata-sections")
_NO_PART = re.compile(r"example|main|test|.*_ort")
"""Names of C files in an artifact that are no part of a program for a device: examples, ONNX Runtime's operator."""


@dataclass(frozen=True)
class Program:
    """The C sources of an artifact.

    Attributes:
        name: Of the network: the header is ``NAME.h``, the function ``NAME_run``, the macros begin with ``NAME_``.
        sources: File names within the folder that are compiled, sorted.
    """

    folder: Path
    name: str
    sources: tuple[str, ...]

    @classmethod
    def find(cls, folder: Path) -> Program:
        """Recognise the network in an artifact's folder.

        Raises:
            InputError: There is no header of a network, or more than one.
        """
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder: give the one that 'convert --to c' wrote")
        found = [
            (header, match[1])
            for header in sorted(folder.glob("*.h"))
            if (match := re.search(r"^#define (\w+)_ARENA_BYTES\b", header.read_text(errors="replace"), re.MULTILINE))
        ]
        if not found:  # laid out for a project: the one folder below that holds a header with its source
            nested = [p for p in sorted(folder.rglob("*.c")) if (p.parent / f"{p.stem}.h").is_file()]
            if len(nested) == 1 and nested[0].parent != folder:
                return cls.find(nested[0].parent)
        if len(found) != 1:
            count = "no header of a network" if not found else f"{len(found)} headers of networks"
            raise InputError(f"{folder} has {count}: give the folder that 'convert --to c' wrote")
        header, _ = found[0]
        name = header.stem
        sources = [
            path.name
            for path in sorted(folder.iterdir())
            if path.suffix in {".c", ".S"} and not _NO_PART.fullmatch(path.stem)
        ]
        if f"{name}.c" not in sources:
            raise InputError(f"{folder} has {header.name} but no {name}.c: convert the model again")
        return cls(folder, name, tuple(sources))

    @property
    def aliases(self) -> tuple[str, ...]:
        """Flags under which a harness that knows a network as NET finds one of another name."""
        header = f'-DNET_HEADER="{self.name}.h"'
        if self.name == "net":
            return (header,)
        upper = self.name.upper()
        text = (self.folder / f"{self.name}.h").read_text(errors="replace")
        macros = re.findall(rf"^#define {upper}_((?:IN|OUT)PUT_(?:SIZE|TYPE)|ARENA_BYTES)\b", text, re.MULTILINE)
        return (
            header,
            f"-Dnet_run={self.name}_run",
            *(f"-DNET_{macro}={upper}_{macro}" for macro in dict.fromkeys(macros)),
        )


@dataclass(frozen=True)
class Sections:
    """What ``size`` says of a linked program, in bytes."""

    text: int
    data: int
    bss: int


@dataclass(frozen=True)
class Toolchain:
    """A C compiler with the flags of a processor.

    Attributes:
        command: The compiler and its flags.
        title: What people call the processor.
        core: Its row in ``CORES``; None for a compiler that was given as a command.
    """

    command: tuple[str, ...]
    title: str
    core: Core | None = None

    @classmethod
    def of(cls, *, target: str | None = None, cc: str | None = None) -> Toolchain:
        """Take a board's or core's compiler, or the one that a command line names.

        Raises:
            InputError: There is no such target, or the command is empty.
            MissingToolError: The compiler is not installed; the message names what brings it.
        """
        if cc is not None:
            command = tuple(shlex.split(cc))
            if not command:
                raise InputError("--cc is empty: give a compiler with its flags, as in 'arm-none-eabi-gcc -mcpu=...'")
            # Only to say how to get it: the flags of a given command are the caller's own.
            core = next((core for core in CORES.values() if core.compiler == Path(command[0]).name), None)
            require(command[0], "measuring with --cc", core.install if core else "put it on the PATH")
            return cls(command, command[0])
        if target is None:
            raise InputError("measuring needs a compiler: give --target NAME, or --cc with a compiler and its flags")
        core = core_of(target)
        require(core.compiler, f"building for {target}", core.install)
        board = TARGETS.get(target)
        flags = (board.flags if board else ()) or core.flags
        # picolibc is found through its specs; newlib's smaller build is what firmware is usually linked with.
        specs = {"riscv": ("--specs=picolibc.specs",), "arm": ("--specs=nano.specs",)}.get(core.family, ())
        return cls((core.compiler, *flags, *specs), board.title if board else core.title, core)

    def macros(self, program: Program, defines: Sequence[str] = ()) -> dict[str, str]:
        """Return what the network's header defines, by the names of a network called net."""
        # The preprocessor is asked, for what the header defines depends on the macros given.
        flags = (*(f"-D{name}" for name in defines), "-dM", "-E", "-include", f"{program.name}.h", "-xc", "/dev/null")
        found = dict(re.findall(r"^#define (\w+) (.*)$", self._run(flags, program.folder), re.MULTILINE))
        prefix = f"{program.name.upper()}_"
        return {f"NET_{key[len(prefix) :]}": value for key, value in found.items() if key.startswith(prefix)}

    def compile(
        self, program: Program, into: Path, *, optimise: str, extra: Sequence[str] = (), defines: Sequence[str] = ()
    ) -> list[Path]:
        """Compile every source of an artifact and return the object files.

        Raises:
            InputError: The compiler refuses a source.
        """
        objects = []
        defined = [f"-D{name}" for name in defines]
        for source in program.sources:
            made = into / f"{source}.o"
            flags = (*_FLAGS, f"-O{optimise}", *defined, *extra, "-I.", "-c", source, "-o", str(made))
            self._run(flags, program.folder)
            objects.append(made)
        return objects

    def link(self, sources: Sequence[Path], elf: Path, *, flags: Sequence[str], start: bool = False) -> None:
        """Link objects and C files, with the compiler's own start code or without.

        Raises:
            InputError: It cannot be linked, for example because it does not fit.
        """
        bare = () if start else ("-nostartfiles",)
        command = (*_FLAGS, *flags, *bare, "-Wl,--gc-sections", *map(str, sources), "-o", str(elf), "-lm")
        # Libraries are searched in order, so they come behind everything that needs them.
        self._run((*command, "-lc", "-lgcc"), elf.parent)

    @cached_property
    def machine(self) -> str:
        """What the compiler builds for, as in arm-none-eabi."""
        return self._run(("-dumpmachine",), Path()).split()[0]

    @cached_property
    def version(self) -> str:
        """The compiler's version, on which every size depends."""
        # GCC before 7, which AVR's often is, knows the second alone; later ones may cut it short.
        return self._run(("-dumpfullversion", "-dumpversion"), Path()).split()[0]

    @property
    def family(self) -> str:
        """The start of ``machine`` without the number of bits: arm, riscv, avr, xtensa, x86_64, ..."""
        return re.sub(r"(?<=riscv)\d+", "", self.machine.partition("-")[0])

    def sections(self, elf: Path) -> Sections:
        """Return the sizes of a program's sections."""
        numbers = re.search(r"^\s*(\d+)\s+(\d+)\s+(\d+)\s", self.tool("size", str(elf)), re.MULTILINE)
        assert numbers is not None  # noqa: S101  # of a file that the linker has just written
        return Sections(*map(int, numbers.groups()))

    def tool(self, name: str, *arguments: str) -> str:
        """Run one of the compiler's companions, such as ``size``, and return what it prints."""
        # The companions carry the compiler's prefix, as in arm-none-eabi-size.
        program = re.sub(r"(gcc|clang|cc|g\+\+)(-[\d.]+)?$", name, self.command[0])
        return run((require(program, "measuring", "it comes with the compiler, put both on the PATH"), *arguments))

    def _run(self, arguments: Sequence[str], folder: Path) -> str:
        return run((*self.command, *arguments), folder)


def require(program: str, what: str, remedy: str) -> str:
    """Return where a program is.

    Raises:
        MissingToolError: It is not installed.
    """
    if (path := shutil.which(program)) is None:
        raise MissingToolError(what, program, remedy)
    return path


def run(command: Sequence[str], folder: Path | None = None, timeout: float | None = None) -> str:
    """Run a command and return what it printed, errors last.

    Raises:
        InputError: It failed, or took longer than ``timeout`` seconds.
    """
    try:
        done = subprocess.run(  # noqa: S603  the command is the user's compiler, or a row of the table of cores
            command, cwd=folder, capture_output=True, text=True, errors="replace", check=False, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"{command[0]} did not end within {timeout:.0f} seconds: give fewer samples") from None
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        # The linker's last error says only that it failed: what does not fit or is missing tells more.
        telling = ("will not fit|overflowed|not within region|undefined reference", "error")
        found = [line for pattern in telling for line in said if re.search(pattern, line)]
        worst = (found or said[-1:] or [f"exit code {done.returncode}"])[0]
        raise InputError(f"{Path(command[0]).name} failed ({' '.join(worst.split())[:300]})")
    return done.stdout + done.stderr
