"""The workflows' own lines are run as they stand, in a clone as GitHub's checkout makes it.

Only what GitHub provides is stood for: the checkout, Python, the package from the index, the upload. A step's shell,
its conditions and the branch of a pull request are taken as GitHub documents them.
"""

import fnmatch
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import relief_export as rx

ROOT = Path(__file__).parent.parent
WORKFLOWS = ROOT / ".github" / "workflows"
SHELLS = {None: ["bash", "-e"], "bash": ["bash", "--noprofile", "--norc", "-eo", "pipefail"]}
"""What GitHub runs a step with on Linux: without ``shell``, and with ``shell: bash``."""
MODEL = Path("models/digits")


def read(name):
    content = yaml.safe_load((WORKFLOWS / name).read_text(encoding="utf-8"))
    return content, content[True]  # YAML 1.1 reads the key `on` as a boolean


def git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def export(folder, hidden, seed=0):
    """Write a network as the artifacts of a build: its file, the manifest and samples with their logits."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 4))
    x = torch.randn(32, 1, 8, 8)
    shutil.rmtree(folder, ignore_errors=True)
    rx.export(model, x[:1], folder, formats=("dense",), samples=(x, model(x).argmax(1)))


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A repository whose main has a network, and whose branches change it in one way each."""
    folder = tmp_path_factory.mktemp("origin")
    git(folder, "init", "-q", "-b", "main")

    def commit(branch):
        git(folder, "add", "-A")
        git(folder, "commit", "-q", "-m", branch)

    export(folder / MODEL, 16)
    commit("main")
    for branch, hidden in (("smaller", 12), ("grown", 20), ("too-large", 30_000)):
        git(folder, "switch", "-q", "-c", branch, "main")
        export(folder / MODEL, hidden)
        commit(branch)
    for branch in ("damaged", "another"):
        git(folder, "switch", "-q", "-c", branch, "main")
        file, manifest = folder / MODEL / "model.onnx", folder / MODEL / "manifest.json"
        before = file.read_bytes()
        if branch == "damaged":
            file.write_bytes(before[:-1])
        else:  # as large, with hashes that are right
            other = tmp_path_factory.mktemp("other")
            export(other, 16, seed=1)
            shutil.copy(other / file.name, file)
            digests = [hashlib.sha256(content).hexdigest() for content in (before, file.read_bytes())]
            manifest.write_text(manifest.read_text().replace(*digests))
        commit(branch)
    git(folder, "switch", "-q", "main")
    return folder


@dataclass
class Step:
    """One step that ran: its name or its command, its exit code, what it printed."""

    name: str
    code: int
    printed: str


@pytest.fixture
def programs(tmp_path):
    """Return a PATH: relief-export without torch, as its install brings it, and a pip that knows only that install."""
    folder = tmp_path / "bin"
    folder.mkdir()
    code = "import sys; sys.modules['torch'] = None; from relief_export.cli import main; main()"
    command = shlex.join([sys.executable, "-c", code])
    (folder / "relief-export").write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {command} "$@"\n')
    (folder / "pip").write_text('#!/bin/sh\n[ "$*" = "install relief-export" ]\n')
    for program in folder.iterdir():
        program.chmod(0o755)
    return f"{folder}{os.pathsep}/usr/local/bin{os.pathsep}/usr/bin{os.pathsep}/bin"


def checkout(origin, branch, folder, options):
    """Clone as actions/checkout does: the pull request alone, unless fetch-depth is 0."""
    depth = options.get("fetch-depth", 1)
    git(origin, "clone", "-q", "--no-local", f"file://{origin}", str(folder), "--branch", branch,
        *([f"--depth={depth}", "--single-branch"] if depth else []))  # fmt: skip


def perform(job, branch, origin, folder, path):
    """Run a job's steps in order, as a pull request of ``branch`` into main; return those that did anything."""
    work = folder / "work" / "checkout"
    done, failed = [], False
    for step in job["steps"]:
        action, condition, options = step.get("uses", "").partition("@")[0], step.get("if"), step.get("with", {})
        assert condition in {None, "always()"}, f"this test does not know the condition of {step}"
        if failed and condition is None:
            continue
        match action:
            case "actions/checkout":
                checkout(origin, branch, work, options)
            case "actions/setup-python":
                pass
            case "actions/upload-artifact":
                done.append(Step(action, 0, (work / options["path"]).read_text()))
            case "":
                done.append(shell(step, work, folder, path))
                failed |= done[-1].code != 0
            case _:
                raise AssertionError(f"this test does not know {action}")
    return done


def shell(step, work, folder, path):
    script = folder / "step.sh"
    script.write_text(step["run"].replace("${{ github.base_ref }}", "main"))
    assert "${{" not in script.read_text()
    ran = subprocess.run(
        [*SHELLS[step.get("shell")], str(script)],
        cwd=work,
        env={"PATH": path, "HOME": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return Step(step.get("name", step["run"]), ran.returncode, ran.stdout)


@pytest.fixture
def pull_request(origin, tmp_path, programs):
    """Return a function that runs a job for a branch, in a clone of its own."""
    return lambda job, branch: perform(job, branch, origin, tmp_path, programs)


GATE, PROOF = "Fits the board, and has not grown", "Is still the network that was trained"


@pytest.mark.parametrize(
    ("branch", "codes", "annotated"),
    [
        ("smaller", {GATE: 0, PROOF: 0}, []),
        ("grown", {GATE: 1}, ["flash_growth", "ram_growth"]),
        ("too-large", {GATE: 1}, ["flash", "flash_growth", "ram", "ram_growth"]),
        ("damaged", {GATE: 2}, []),
        ("another", {GATE: 0, PROOF: 1}, []),
    ],
)
def test_the_size_gate_stops_what_is_too_large_has_grown_or_is_another_network(branch, codes, annotated, pull_request):
    workflow, _ = read("size-gate.yml")
    steps = {step.name: step for step in pull_request(workflow["jobs"]["budget"], branch)}
    ran = {"pip install relief-export": 0, **codes, "actions/upload-artifact": 0}
    assert {name: step.code for name, step in steps.items()} == ran, "\n".join(each.printed for each in steps.values())
    printed = steps[GATE].printed
    titles = re.findall(r"^::error file=models/digits[^,]*,title=relief-export (\w+)::", printed, re.MULTILINE)
    assert sorted(titles) == annotated
    answer = json.loads(steps["actions/upload-artifact"].printed)
    assert answer["ok"] is (codes[GATE] == 0)


def test_a_change_of_the_models_starts_the_size_gate_and_nothing_else_does(origin):
    (glob,) = read("size-gate.yml")[1]["pull_request"]["paths"]
    changed = git(origin, "diff", "--name-only", "main", "grown").split()
    assert changed
    assert all(fnmatch.fnmatch(file, glob) for file in changed)
    assert not fnmatch.fnmatch("README.md", glob)


def make_lines():
    steps = [
        (f"{path.stem}-{job}", step.get("run", ""))
        for path in sorted(WORKFLOWS.glob("*.yml"))
        for job, content in read(path.name)[0]["jobs"].items()
        for step in content["steps"]
    ]
    return [pytest.param(line, id=f"{job}-{line}") for job, line in steps if line.startswith("make ")]


@pytest.mark.parametrize("line", make_lines())
def test_every_make_line_of_a_workflow_is_a_target_that_starts_from_a_clean_clone(line, tmp_path):
    """Makes a plan only: what the targets do takes minutes and an index, and is what .ci/run does."""
    for name in ("Makefile", "pyproject.toml", "pipelines"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    target, dry = line.removeprefix("make "), ["bash", "-e", "-c", f"MAKEFLAGS=n {line}"]
    planned = subprocess.run(dry, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert planned.returncode == 0, planned.stderr
    assert "pip install" in planned.stdout, f"{target} brings nothing into a clean clone"


def test_the_workflow_of_the_tests_runs_what_ci_runs_on_every_python_that_is_promised():
    workflow, _ = read("tests.yml")
    lines = {step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step}
    script = re.findall(r"^make [\w-]+", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert {*script, "make wheel"} == lines
    tried = workflow["jobs"]["wheel"]["strategy"]["matrix"]["python-version"]
    assert tried[0] == "3.11"
    assert 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
