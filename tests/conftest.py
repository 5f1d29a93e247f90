"""What every test shares: one thread a process, no display, and one run of the demonstration."""

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

import pytest
from filelock import FileLock

# Set before NumPy and torch are imported: the tests run in parallel processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

ROOT = Path(__file__).parent.parent
DEMO = ("digits-lenet5", "--set", "train.epochs=2", "--set", "relief.iterations=1")
"""The demonstration, with fewer epochs and one iteration."""


@dataclass(frozen=True)
class Demo:
    """One run of the demonstration: its build folder, and what the command printed with --json."""

    folder: Path
    printed: dict[str, Any]

    def copy(self, target: Path) -> Path:
        """Return a copy of the build folder that a test may spoil; times of files are kept."""
        return Path(shutil.copytree(self.folder, target))


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Run the demonstration once, for all test processes."""
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
    return Demo(folder, json.loads(printed.read_text()))


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
