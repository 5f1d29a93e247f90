"""Make drives the stages: only what changed is rebuilt, in a project of its own so that recipes can be edited."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from relief_export.records import read_json

ROOT = Path(__file__).parent.parent
SETTINGS = "--set train.epochs=1 --set relief.rounds=1 --set relief.accuracy_drop=1"
FILES = ("dense/record.json", "relieved/record.json", "artifacts/record.json", "artifacts/model.onnx")


@pytest.fixture
def project(tmp_path):
    """The Makefile and two recipes, copied."""
    (tmp_path / "pipelines").mkdir()
    recipes = ("pipelines/digits-lenet5.toml", "pipelines/digits-lenet300-100.toml")
    for name in ("Makefile", "pipelines/rules.mk", *recipes):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def own_environment() -> dict[str, str]:
    """Return the environment without an outer make's: what that was given would win over the project's Makefile."""
    given = {"STAMP", "BIN", "VENV", "BUILD", "JOBS"}
    return {key: value for key, value in os.environ.items() if not (key.startswith("MAKE") or key in given)}


def make(project: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    here = [f"BIN={Path(sys.executable).parent}", "STAMP=", f"SETTINGS={SETTINGS}"]
    return subprocess.run(
        ["make", *here, *arguments], cwd=project, env=own_environment(), capture_output=True, text=True, check=check
    )


def stages_of(printed: str) -> list[tuple[str, str]]:
    words = [line.split() for line in printed.splitlines() if " -m relief_export " in line]
    return [
        (row[3], next(word for word in row if "digits-" in word).strip("'").removeprefix("build/")) for row in words
    ]


def test_make_builds_two_recipes_at_once_then_only_what_changed(project):
    planned = stages_of(make(project, "-n", "digits-lenet5").stdout)
    order = ["train", "relieve", "quantise", "export", "validate", "audit", "report"]
    assert [stage for stage, _ in planned] == order
    assert not (project / "build").exists()

    names = ("digits-lenet5", "digits-lenet300-100")
    built = stages_of(make(project, "-j2", *names).stdout)
    assert sorted(built) == sorted((stage, name) for stage in order for name in names)
    for name in names:
        assert all((project / "build" / name / file).is_file() for file in (*FILES, "report.html", "report.md"))
        assert read_json(project / "build" / name / "validation.json")["outcome"]["ok"] is True

    assert make(project, "-q", *names, check=False).returncode == 0  # nothing to do
    record = (project / "build/digits-lenet5/dense/record.json").read_bytes()

    recipe = project / "pipelines/digits-lenet5.toml"
    recipe.write_text(recipe.read_text().replace('"sparse", "packed", ', ""))
    assert make(project, "-q", "digits-lenet300-100", check=False).returncode == 0
    printed = make(project, "digits-lenet5").stdout
    assert "train: test accuracy" in printed
    assert printed.count("up to date") == 3  # training, relief and rounding
    assert (project / "build/digits-lenet5/dense/record.json").read_bytes() == record
    assert not (project / "build/digits-lenet5/artifacts/model.packed.onnx").exists()
    assert make(project, "-q", "digits-lenet5", check=False).returncode == 0

    (project / "build/digits-lenet300-100/artifacts/record.json").unlink()
    assert [stage for stage, _ in stages_of(make(project, "-n", "digits-lenet300-100").stdout)] == order[3:]

    make(project, "clean-digits-lenet5")
    assert not (project / "build/digits-lenet5").exists()
    assert (project / "build/digits-lenet300-100").exists()


def test_variant_is_a_target_of_its_own(project):
    planned = stages_of(make(project, "-n", "digits-lenet5@sgd").stdout)
    assert {name for _, name in planned} == {"digits-lenet5@sgd"}
    assert len(planned) == 7


def test_unknown_recipe_is_refused(project):
    done = make(project, "digits-lenet6", check=False)
    assert done.returncode == 2
    assert "digits-lenet6" in done.stderr


def test_recipes_lists_the_names(project):
    printed = make(project, "recipes").stdout
    assert re.search(r"^digits-lenet5  ", printed, re.MULTILINE)
    assert re.search(r"^digits-lenet300-100  ", printed, re.MULTILINE)


def test_help_names_the_two_commands(project):
    printed = make(project).stdout
    assert "demo " in printed
    assert "test " in printed
    assert "clean-% " in printed


def test_venv_is_made_once_from_the_constraints():
    command = ["make", "-n", "-B", "VENV=/nowhere/.venv", "venv"]
    plan = subprocess.run(command, cwd=ROOT, env=own_environment(), capture_output=True, text=True, check=True).stdout
    assert "/nowhere/.venv/bin/python -m pip install" in plan
    assert "-c pipelines/constraints.txt -e '.[torch,test]'" in plan


def test_check_is_what_ci_runs():
    plan = subprocess.run(["make", "-n", "STAMP=", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for tool in ("ruff check .", "ruff format --check .", "mypy", "pytest -n"):
        assert tool in plan
    script = (ROOT / ".ci/run").read_text()
    assert script.index("make test") < script.index("make demo")
    assert os.access(ROOT / ".ci/run", os.X_OK)
