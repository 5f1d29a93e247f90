"""Many generated programs in one library, so that a compiler runs once for all of them."""

from __future__ import annotations

import os
import random
import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from relief_export.cgen.compiler import Compiler, Library, find_compiler
from relief_export.cgen.emit import sources
from relief_export.cgen.lower import lower
from relief_export.errors import UnsupportedModelError
from tests.graph.builder import random_network
from tests.graph.helpers import random_feeds, run
from tests.graph.test_fuzz import exact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import onnx_ir as ir

RELATIVE = 1e-5  # of the output's scale
COMPILER = find_compiler()
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")

DRIVER = """\
#include <stdio.h>
#include <stdlib.h>
%(includes)s
#define RUN(name, upper) do { \\
    float *in = (float *)malloc(sizeof(float) * upper##_INPUT_SIZE); \\
    float *out = (float *)malloc(sizeof(float) * upper##_OUTPUT_SIZE); \\
    void *arena; int i; \\
    if (posix_memalign(&arena, 64, upper##_ARENA_BYTES)) return 1; \\
    for (i = 0; i < upper##_INPUT_SIZE; i++) if (scanf("%%f", in + i) != 1) return 1; \\
    name##_run(in, out, arena); \\
    for (i = 0; i < upper##_OUTPUT_SIZE; i++) printf("%%.9g ", out[i]); \\
    printf("\\n"); free(in); free(out); free(arena); } while (0)
int main(void) { %(runs)s return 0; }
"""


@dataclass(frozen=True)
class Case:
    name: str
    x: np.ndarray
    expected: np.ndarray
    arena: int
    model: ir.Model
    coded: np.ndarray | None = None
    """What the outputs are in float64 with the weights as the program stores them, where it stores others."""

    def error(self, found: np.ndarray) -> float:
        """Return how far outputs are from the runtime's, or by how much they are further off than those are.

        The runtime computes in float32 too: where sums cancel, its own rounding is what differs, and float64 judges. Of
        a program with other weights the runtime only tells how much float32 may lose in such a network.
        """
        reference = self.expected if self.coded is None else self.coded
        scale = max(float(np.abs(reference).max()), 1e-3)
        error = float(np.abs(found - reference).max()) / scale
        if not error > RELATIVE:
            return error
        (right,) = exact(self.model, self.x)
        if self.coded is not None:
            lost = float(np.abs(self.expected - right).max()) / max(float(np.abs(right).max()), 1e-3)
            return error if error > 2 * lost else 0.0
        own, theirs = (float(np.abs(values - right).max()) / scale for values in (found, self.expected))
        return error if own > theirs else own - theirs


def network(seed: int) -> ir.Model:
    choose = random.Random(seed).choice  # noqa: S311  # no secret
    return random_network(lambda options: choose(list(options)), seed)


def write(
    folder: Path, name: str, model: ir.Model, generate: Callable[[ir.Model, str], dict[str, bytes]] | None = None
) -> Case:
    """Generate a program in ``folder``, for hosts unless told how, and ask ONNX Runtime what it should compute."""
    files = sources(lower(model), name) if generate is None else generate(model, name)
    for file, content in files.items():
        if file != "example.c":
            (folder / file).write_bytes(content)
    feeds = random_feeds(model, n=1, batch=1)
    arena = re.search(r"ARENA_BYTES (\d+)", files[f"{name}.h"].decode())
    assert arena is not None
    return Case(name, next(iter(feeds.values())), run(model, feeds)[0], int(arena[1]), model)


def networks(
    folder: Path,
    seeds: Iterator[int] | range,
    count: int,
    generate: Callable[[ir.Model, str], dict[str, bytes]] | None = None,
) -> list[Case]:
    """Write the first ``count`` random networks that the format takes."""
    cases: list[Case] = []
    for seed in seeds:
        try:
            cases.append(write(folder, f"n{seed}", network(seed), generate))
        except UnsupportedModelError:
            continue
        if len(cases) == count:
            break
    return cases


def failures(folder: Path, cases: Sequence[Case], flags: Sequence[str], compiler: Compiler | None = None) -> list[str]:
    """Compile all and return one line for each that is wrong."""
    compiler = compiler or COMPILER
    assert compiler is not None
    target = folder / f"all{abs(hash((compiler, tuple(flags))))}.so"
    stems = [stem for case in cases for stem in (case.name, f"{case.name}_weights")]
    compiler.build([path for stem in stems if (path := folder / f"{stem}.c").is_file()], target, flags)
    wrong = []
    for case in cases:
        program = Library(target, case.name, (case.x.size, case.expected.size), case.arena)
        program._memory[:] = 0xFF  # NaN: whatever is read before it is written shows
        found = program.run(case.x).reshape(case.expected.shape)
        error = case.error(found)
        if not error <= RELATIVE:
            wrong.append(f"{case.name}: {error:.1e} with {' '.join(flags)}")
    return wrong


def sanitized(folder: Path, cases: Sequence[Case], flags: Sequence[str]) -> list[str]:
    """Run all under the sanitizers."""
    assert COMPILER is not None
    return executed(folder, cases, COMPILER.command, ("-g", *SANITIZERS, *flags))


def executed(
    folder: Path, cases: Sequence[Case], compiler: Sequence[str], flags: Sequence[str], emulator: Sequence[str] = ()
) -> list[str]:
    """Run all in one process of its own, each in an arena of exactly its size; return what is wrong."""
    text = DRIVER % {
        "includes": "\n".join(f'#include "{case.name}.h"' for case in cases),
        "runs": " ".join(f"RUN({case.name}, {case.name.upper()});" for case in cases),
    }
    (folder / "driver.c").write_text(text)
    files = ("driver.c", *(f"{case.name}.c" for case in cases))
    subprocess.run([*compiler, "-D_GNU_SOURCE", *flags, *files, "-o", "driver", "-lm"], cwd=folder, check=True)
    numbers = " ".join(f"{v:.9g}" for case in cases for v in case.x.ravel().tolist())
    done = subprocess.run(
        [*emulator, "./driver"], cwd=folder, input=numbers, capture_output=True, text=True, check=False,
        env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"},
    )  # fmt: skip
    if done.returncode:
        return done.stderr.splitlines()[:20]
    wrong = []
    for case, line in zip(cases, done.stdout.splitlines(), strict=True):
        found = np.array(line.split(), np.float32).reshape(case.expected.shape)
        error = case.error(found)
        if not error <= RELATIVE:
            wrong.append(f"{case.name}: {error:.1e}")
    return wrong
