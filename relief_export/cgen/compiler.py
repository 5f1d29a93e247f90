"""The machine's C compiler: found, named, and used to build a generated program and to run it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relief_export.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

WARNINGS = ("-Wall", "-Wextra")
FAST = ("-O2", "-march=native")
"""What the machine can do: its whole instruction set."""
PLAIN = ("-O2", "-DNET_PLAIN_C")
"""C without vectors, as on a compiler that has none."""


@dataclass(frozen=True)
class Compiler:
    """A command that compiles C99, and the first line of what it says of its version."""

    command: tuple[str, ...]
    version: str

    def build(self, files: Sequence[Path], target: Path, flags: Sequence[str] = ()) -> None:
        """Compile and link C files into a shared library.

        Raises:
            IntegrityError: The compiler refuses a file.
        """
        # The binary file of the weights is included from the folder in which the compiler runs.
        folder = files[0].parent.resolve()
        names = [str(file.resolve()) for file in files]
        command = [*self.command, "-std=c99", *flags, "-shared", "-fPIC", *names, "-o", str(target.resolve()), "-lm"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            # Warnings may stand before the first error.
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            reason = " ".join(lines[:1])[:300]
            raise IntegrityError(f"{files[0]} does not compile with {' '.join(self.command)} ({reason}): export again")


def find_compiler() -> Compiler | None:
    """Return the compiler of the variable CC, else cc, gcc, clang, or that of the extra ``[c]``; or None."""
    candidates = [tuple(shlex.split(os.environ["CC"]))] if os.environ.get("CC") else []
    candidates += [("cc",), ("gcc",), ("clang",)]
    if importlib.util.find_spec("ziglang") is not None:
        candidates.append((sys.executable, "-m", "ziglang", "cc"))
    for command in candidates:
        if not command or shutil.which(command[0]) is None:
            continue
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)  # noqa: S603
        # A name on the PATH need not work: what cannot state its version is passed over.
        if done.returncode == 0:
            return Compiler(command, (done.stdout.splitlines() or [""])[0].strip())
    return None


class Library:
    """A compiled program, loaded into this process.

    Args:
        path: The shared library. name: The network's. sizes: Floats of input and output. arena: Bytes.
        own: A folder that goes when the library does. Its file must stay as long: the loader tells libraries apart by
            the numbers of their files, and a new file may get the number of one that is gone.

    Raises:
        IntegrityError: It is no library, or lacks the function.
    """

    def __init__(self, path: Path, name: str, sizes: tuple[int, int], arena: int, own: Path | None = None) -> None:
        if own is not None:
            weakref.finalize(self, shutil.rmtree, own, ignore_errors=True)
        try:
            self._function = getattr(ctypes.CDLL(str(path.resolve())), f"{name}_run")
        except (OSError, AttributeError) as error:
            raise IntegrityError(f"the program {name} has no function {name}_run ({error}): export again") from None
        self._function.restype = None
        self._function.argtypes = [ctypes.c_void_p] * 3
        self.sizes = sizes
        # 64 bytes more, to begin at a multiple of 64 wherever NumPy puts it. The array is kept, because the address
        # alone would not keep it alive.
        self._memory = np.zeros(arena + 64, np.uint8)
        self._arena = -(-self._memory.ctypes.data // 64) * 64

    def run(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """Return the outputs (N, outputs) of samples (N, ...), one after the other."""
        samples = np.ascontiguousarray(x, np.float32).reshape(len(x), -1)
        if samples.shape[1] != self.sizes[0]:
            raise ValueError(f"a sample has {samples.shape[1]} numbers, the program takes {self.sizes[0]}")
        result = np.empty((len(samples), self.sizes[1]), np.float32)
        for sample, out in zip(samples, result, strict=True):
            self._function(sample.ctypes.data, out.ctypes.data, self._arena)
        return result


def load(folder: Path, name: str, compiler: Compiler, flags: Sequence[str] = FAST) -> Library:
    """Compile the program in ``folder`` and load it.

    Raises:
        IntegrityError: It does not compile, or its header does not say what it must.
    """
    header = (folder / f"{name}.h").read_text(encoding="ascii", errors="replace")
    facts = {}
    for key in ("INPUT_SIZE", "OUTPUT_SIZE", "ARENA_BYTES"):
        words = next(
            (line.split() for line in header.splitlines() if line.startswith(f"#define {name.upper()}_{key} ")), []
        )
        if len(words) < 3 or not words[2].isdigit():
            raise IntegrityError(f"{folder / name}.h does not define {name.upper()}_{key}: export again")
        facts[key] = int(words[2])
    files = [path for stem in (name, f"{name}_weights") if (path := folder / f"{stem}.c").is_file()]
    scratch = Path(tempfile.mkdtemp(prefix="relief-export-"))
    target = scratch / f"{name}.so"
    try:
        compiler.build(files, target, flags)
        return Library(target, name, (facts["INPUT_SIZE"], facts["OUTPUT_SIZE"]), facts["ARENA_BYTES"], own=scratch)
    # An interrupt must not leave the folder behind either.
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
