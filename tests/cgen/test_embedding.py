"""The examples of docs/c_format.md, compiled where there is a compiler for them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from relief_export.cgen.compiler import find_compiler
from relief_export.cgen.emit import sources
from relief_export.cgen.lower import lower
from tests.graph.helpers import build, run

PAGE = (Path(__file__).parents[2] / "docs" / "c_format.md").read_text(encoding="utf-8")
RELATIVE = 1e-5  # of the output's scale
RNG = np.random.default_rng(0)
pytestmark = pytest.mark.skipif(find_compiler() is None, reason="there is no C compiler")


@pytest.fixture
def program(tmp_path):
    """Write a program of 128 inputs and 5 outputs; return its folder and what it gives for inputs of 0.5."""
    weight = RNG.normal(size=(5, 128)).astype(np.float32)
    weight[RNG.random(weight.shape) < 0.9] = 0
    model = build("g (float[n, 128] x) => (float[n, 5] y) { a = Gemm<transB=1>(x, w) y = Sigmoid(a) }", {"w": weight})
    for name, content in sources(lower(model)).items():
        (tmp_path / name).write_bytes(content)
    (expected,) = run(model, {"x": np.full((1, 128), 0.5, np.float32)})
    return tmp_path, expected[0]


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def command(folder: Path, *words: str, text: str | None = None) -> str:
    done = subprocess.run(words, cwd=folder, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(printed: str, expected: np.ndarray) -> None:
    found = np.array(printed.split(), np.float32)
    assert np.abs(found - expected).max() <= RELATIVE * np.abs(expected).max()


@pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no CMake")
def test_cmake(program):
    folder, expected = program
    (folder / "CMakeLists.txt").write_text(block("cmake"))
    command(folder, "cmake", "-S", ".", "-B", "out")
    command(folder, "cmake", "--build", "out")
    check(command(folder, "./out/app", text="0.5 " * 128), expected)


@pytest.mark.skipif(shutil.which("rustc") is None or shutil.which("ar") is None, reason="there is no Rust")
def test_rust(program):
    folder, expected = program
    header = (folder / "net.h").read_text()
    text = block("rust")
    for name in ("INPUT_SIZE", "OUTPUT_SIZE", "ARENA_BYTES"):
        (size,) = re.findall(rf"#define NET_{name} (\d+)", header)
        text = re.sub(rf"const {name}: usize = \d+;", f"const {name}: usize = {size};", text)
    (folder / "main.rs").write_text(text)
    command(folder, *find_compiler().command, "-O2", "-march=native", "-c", "net.c")
    command(folder, "ar", "rcs", "libnet.a", "net.o")
    command(folder, "rustc", "-O", "-L", ".", "-l", "static=net", "main.rs")
    check(command(folder, "./main"), expected)


@pytest.mark.skipif(shutil.which("go") is None, reason="there is no Go")
def test_go(program):
    folder, expected = program
    (folder / "main.go").write_text(block("go"))
    (folder / "example.c").unlink()
    (folder / "go.mod").write_text("module app\n")
    command(folder, "go", "build", "-o", "app", ".")
    check(command(folder, "./app"), expected)
