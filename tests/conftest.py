"""What every test shares: one thread a process, no display, and one run of the demonstration."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import onnxruntime
import pytest
from filelock import FileLock

from tests.graph.builder import newest_opset

# Set before NumPy and torch are imported: the tests run in parallel processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

ROOT = Path(__file__).parent.parent
DEMO = ("digits-lenet5", "--set", "train.epochs=2", "--set", "relief.rounds=1")
"""The demonstration, with fewer epochs and one round."""


_parse_model = onnx.parser.parse_model
_PARSES_QUOTED_NAMES = tuple(map(int, onnx.__version__.split(".")[:2])) >= (1, 18)


def _parse_on_any_version(text: str) -> onnx.ModelProto:
    """Read ONNX text with the oldest supported onnx too, whose parser has no quoted names; skip what is too new to run.

    A quoted name is read as a word that occurs nowhere else, and given back afterwards.
    """
    opset = max(map(int, re.findall(r'""\s*:\s*(\d+)', text)), default=0)
    if opset > newest_opset():
        pytest.skip(f"opset {opset} is newer than onnx {onnx.__version__} or onnxruntime {onnxruntime.__version__}")
    if _PARSES_QUOTED_NAMES:
        return _parse_model(text)
    head, body = text.split(">", 1)  # the domains of the header are strings of their own
    # Not the strings of attributes, which follow a "=", nor domains, which a ":" follows or precedes.
    quoted = re.findall(r'(?<![=:])(?<![=:] )"([\w./:]+)"(?!\s*:)', body)
    words = {name: f"quoted_{i}_" for i, name in enumerate(dict.fromkeys(quoted))}
    for name, word in words.items():
        body = body.replace(f'"{name}"', word)
    model = _parse_model(f"{head}>{body}")
    back = {word: name for name, word in words.items()}
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = back.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [back.get(name, name) for name in node.input]
        node.output[:] = [back.get(name, name) for name in node.output]
    return model


onnx.parser.parse_model = _parse_on_any_version  # the tests call it by its full name


# What old versions cannot run: part of a test's name -> the package, the first version that can, and what it is.
_NEEDS = {
    "test_every_rule_is_an_operator_that_exists": ("onnx", "1.18", "operators of later opsets"),
    "test_batch_norm_stays_where_folding_would_be_wrong[training]": ("onnx", "1.17", "the training mode of today"),
    "LayerNormalization-scale-by-channel": ("onnxruntime", "1.20", "a scale that is broadcast"),
    "[ReduceMean-no-op]": ("onnxruntime", "1.18", "axes that are absent"),
    "test_float16_and_double": ("onnxruntime", "1.18", "a fused Gemm of float64"),
    "test_bfloat16_constants_are_numbers": ("onnx", "1.18", "bfloat16 in the reference implementation"),
    "test_layers_without_inputs_or_outputs_are_left_alone": ("onnxruntime", "1.18", "an empty Gemm"),
    "test_reason_names_the_operator_that_pins": ("onnx", "1.18", "names of nodes in its text form"),
    "test_what_the_quantiser_logs_stays_off_stderr": ("onnxruntime", "1.18", "an instance norm that is quantised"),
    "test_the_mask_of_a_join_keeps_its_zeros": ("onnxruntime", "1.20", "a mask quantised as activations are"),
    "test_what_is_not_known_is_no_bare_number": ("onnx", "1.17", "shapes behind an operator that it does not know"),
    "int8-ort]": ("onnxruntime", "1.20", "a smaller layout of .ort files"),
    "[DequantizeLinear, transposed]": ("onnxruntime", "1.31", "a Transpose without perm behind DequantizeLinear"),
}
_INSTALLED = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the files that import torch, or the rooms that do, where torch is not installed."""
    if importlib.util.find_spec("torch") is not None or not collection_path.match("test_*.py"):
        return None
    imports = r"^(import|from) (torch|relief_export\.(training|relief|capture))\b"
    return True if re.search(imports, collection_path.read_text(encoding="utf-8"), re.MULTILINE) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what the installed onnx or onnxruntime is too old to run, each test with its reason."""
    for item in items:
        for part, (package, version, what) in _NEEDS.items():
            if part in item.name and _numbers(_INSTALLED[package]) < _numbers(version):
                item.add_marker(pytest.mark.skip(reason=f"{what}: {package} {version} or later"))


@dataclass(frozen=True)
class Demo:
    """One run of the demonstration: its build folder, and the result that the command printed with --json."""

    folder: Path
    printed: dict[str, Any]

    def copy(self, target: Path) -> Path:
        """Return a copy of the build folder that a test may spoil; times of files are kept."""
        return Path(shutil.copytree(self.folder, target))


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Run the demonstration once, for all test processes."""
    pytest.importorskip("torch")
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, printed = base / "demo", base / "demo.json"
    with FileLock(base / "demo.lock"):
        if not printed.exists():
            command = [sys.executable, "-m", "relief_export", "run", *DEMO, "--out", str(folder), "--json"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert done.stderr == ""  # no warning, and no progress where there is no terminal
            printed.write_text(done.stdout)
    return Demo(folder, json.loads(printed.read_text())["result"])


@pytest.fixture(scope="session")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code in an environment that has everything but torch and what comes with its extra."""
    packages = tmp_path_factory.mktemp("without_torch")
    absent = re.compile(
        r"(torch|torchvision|torchgen|functorch|safetensors|sklearn|scikit_learn|_virtualenv)\b|.*\.pth$"
    )
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not absent.match(entry.name.lower()):
            (packages / entry.name).symlink_to(entry)

    def run(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(packages)))}
        command = [sys.executable, "-S", "-c", code, *arguments]  # -S: no site-packages but the ones linked here
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)

    return run


def assert_tables_are_whole(markdown: str) -> None:
    """Every block of table lines is a table: a header, a rule, one row or more, and as many cells in each."""
    blocks = re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    assert blocks
    for lines in map(str.splitlines, blocks):
        assert re.fullmatch(r"\|(?: :?-+:? \|)+", "".join(lines[1:2])), lines  # a blank line inside takes its place
        assert len(lines) > 2, lines
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, lines
