"""The demonstration through all stages: the files it leaves, what is skipped, what is refused, what survives a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

from relief_export import capture, stages
from relief_export.cli import run
from relief_export.errors import InputError, IntegrityError
from relief_export.formats import read_manifest
from relief_export.recipe import load_recipe
from relief_export.records import locked, read_json, sha256, write_json
from tests.answers import check_answer

ROOT = Path(__file__).parent.parent
SETTINGS = {"train.epochs": "2", "relief.rounds": "1"}

LEFT = {
    ".lock",
    "recipe.toml",
    "dense/init.safetensors",
    "dense/record.json",
    "dense/weights.safetensors",
    "relieved/history.jsonl",
    "relieved/masks.safetensors",
    "relieved/record.json",
    "relieved/relief.json",
    "relieved/weights.safetensors",
    "quantised/record.json",
    "relieved/rounds/01/masks.safetensors",
    "relieved/rounds/01/weights.safetensors",
    "artifacts/manifest.json",
    "artifacts/masked.onnx",
    "artifacts/model.int8.onnx",
    "artifacts/model.onnx",
    "artifacts/model.ort",
    "artifacts/model.packed-int8.onnx",
    "artifacts/model.packed-codebook16.onnx",
    "artifacts/model.packed.onnx",
    "artifacts/model.required_operators.config",
    "artifacts/model.sparse.onnx",
    "artifacts/original.onnx",
    "artifacts/record.json",
    "artifacts/reference.npz",
    "validation.json",
    "audit.json",
    "report.html",
    "report.md",
}


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def built(demo, tmp_path):
    """A copy of the demonstration's build folder that may be spoiled."""
    return demo.copy(tmp_path / "built")


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}


def change_one_weight(path: Path) -> None:
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    array = onnx.numpy_helper.to_array(largest).copy()
    array.ravel()[np.abs(array).argmax()] *= -1.5
    largest.CopyFrom(onnx.numpy_helper.from_array(array, largest.name))
    onnx.save(model, path)


def test_demo_leaves_exactly_these_files(demo):
    folders = ("artifacts/csr/", "artifacts/c/")
    left = {path for path in contents(demo.folder) if not path.startswith(folders)}
    assert left == LEFT
    listed = {file["path"] for entry in read_json(demo.folder / "artifacts/manifest.json")["artifacts"]
              for file in entry["files"]}  # fmt: skip
    guarded = {file["path"] for file in read_json(demo.folder / "artifacts/manifest.json")["references"]}
    assert guarded == {"masked.onnx", "original.onnx", "reference.npz"}
    on_disk = {path.removeprefix("artifacts/") for path in contents(demo.folder) if path.startswith("artifacts/")}
    assert on_disk - listed == {"manifest.json", "masked.onnx", "original.onnx", "record.json", "reference.npz"}
    assert listed <= on_disk


@pytest.mark.parametrize("command", ["train digits-lenet5 --out", "relieve", "prune", "quantise", "export", "report"])
def test_stages_answer_as_the_reference_says(built, command, capsys):
    flags = _flags() if command.startswith("train") else []
    assert run([*command.split(), str(built), *flags, "--json"]) == 0
    check_answer(json.loads(capsys.readouterr().out))


def test_closing_figures_are_those_of_the_files(demo):
    printed, artifacts = demo.printed, demo.folder / "artifacts"
    masks = load_file(demo.folder / "relieved/masks.safetensors")
    assert printed["weights"]["dense"] == 431_080
    assert printed["weights"]["kept"] == sum(int(mask.sum()) for mask in masks.values())
    assert printed["parameters"]["dense"] == 431_080
    assert printed["macs"]["dense"] == 2_293_000
    sizes = {file["file"]: file["file_bytes"] for file in printed["files"]}
    for entry in read_json(artifacts / "manifest.json")["artifacts"]:
        assert sizes.pop(entry["name"]) == sum((artifacts / file["path"]).stat().st_size for file in entry["files"])
    assert not sizes
    latency = {row["name"]: row for row in read_json(demo.folder / "validation.json")["outcome"]["latency"]}
    for file in printed["files"]:  # generated C is not timed where there is no compiler
        assert file["seconds_per_sample"] == latency.get(file["file"], {"median": None})["median"]
    assert printed["original_bytes"] == (artifacts / "original.onnx").stat().st_size
    assert Path(printed["report"]).is_file()
    assert Path(printed["model"]) == artifacts / "model.onnx"


def test_accuracy_is_that_of_the_runtime_on_the_test_pictures(demo):
    """Independent of this package's data pipeline: the pictures of the stored sample are scikit-learn's."""
    session = ort.InferenceSession(demo.folder / "artifacts/model.onnx", providers=["CPUExecutionProvider"])
    stored = np.load(demo.folder / "artifacts/reference.npz")
    (logits,) = session.run(None, {session.get_inputs()[0].name: stored["x"]})
    scale = np.abs(stored["logits"]).max()
    assert np.abs(logits - stored["logits"]).max() <= 1e-5 * scale
    assert (logits.argmax(1) == stored["logits"].argmax(1)).all()
    # The sample is stratified, so its accuracy is near that of the whole test set, and far above chance.
    accuracy = (logits.argmax(1) == stored["y"]).mean()
    assert accuracy == pytest.approx(demo.printed["accuracy"]["onnx_runtime"], abs=0.03)
    assert stored["x"].mean() == pytest.approx(load_digits().images.mean() / 16, abs=0.02)
    assert demo.printed["accuracy"]["onnx_runtime"] == demo.printed["accuracy"]["pruned"]


def test_second_run_changes_nothing(built):
    before = contents(built)
    assert stages.run(load_recipe("digits-lenet5", SETTINGS), built)
    assert contents(built) == before


def test_changed_export_trains_nothing_again(built, capsys):
    before = contents(built)
    arguments = ["run", "digits-lenet5", "--out", str(built), "--set", 'export.formats=["csr"]', "--json"]
    assert run([*arguments, *(part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}"))]) == 0
    after = contents(built)
    changed = {path.split("/")[0] for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed == {"recipe.toml", "artifacts", "validation.json", "audit.json", "report.html", "report.md"}
    assert "artifacts/model.packed.onnx" not in after
    answer = json.loads(capsys.readouterr().out)
    check_answer(answer)
    assert [file["file"] for file in answer["result"]["files"]] == ["model.onnx", "csr"]


def test_quantised_network_is_what_every_file_holds(built, capsys):
    relieved = contents(built / "relieved") | contents(built / "dense")
    settings = SETTINGS | {"quantise.values": "6", "quantise.epochs": "2"}
    words = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    assert run(["run", "digits-lenet5", "--out", str(built), *words, "--json"]) == 0
    assert contents(built / "relieved") | contents(built / "dense") == relieved
    found = read_json(built / "quantised/record.json")["outcome"]
    assert found["values"] == 6
    weights = load_file(built / "quantised/weights.safetensors")
    masks = load_file(built / "relieved/masks.safetensors")
    for name in ("conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"):
        kept = weights[name][masks[name]]
        assert len(np.unique(kept[kept != 0])) == found["rounding"]["values"][name] <= 6
        assert not weights[name][~masks[name]].any()
    stored = np.load(built / "artifacts/reference.npz")
    scale = np.abs(stored["logits"]).max()
    for file in ("model.onnx", "model.packed.onnx", "model.packed-codebook16.onnx"):
        session = ort.InferenceSession(built / "artifacts" / file, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {session.get_inputs()[0].name: stored["x"]})
        assert np.abs(logits - stored["logits"]).max() <= 1e-5 * scale
    capsys.readouterr()
    assert run(["quantise", str(built)]) == 0
    assert "quantise: 6 values a tensor, test accuracy" in capsys.readouterr().out
    # Without [quantise] the relieved network is exported again, and nothing is trained.
    assert stages.run(load_recipe("digits-lenet5", SETTINGS), built)
    assert contents(built / "relieved") | contents(built / "dense") == relieved
    assert read_json(built / "artifacts/record.json")["inputs"]["relieved/weights.safetensors"]


def test_changed_relief_keeps_the_dense_network(built):
    recipe = load_recipe("digits-lenet5", SETTINGS | {"relief.accuracy_drop": "0.5"})
    stages.write_recipe(recipe, built)
    dense = contents(built / "dense")
    assert stages.run_stage("train", built).skipped
    assert not stages.run_stage("relieve", built).skipped
    assert contents(built / "dense") == dense


@pytest.mark.parametrize("honest", [False, True], ids=["stale manifest", "manifest brought up to date"])
def test_one_changed_weight_fails_validation_by_name(built, honest, capsys):
    artifacts = built / "artifacts"
    change_one_weight(artifacts / "model.onnx")
    if honest:
        manifest = read_json(artifacts / "manifest.json")
        (entry,) = (entry for entry in manifest["artifacts"] if entry["name"] == "model.onnx")
        size = (artifacts / "model.onnx").stat().st_size
        entry["files"] = [{"path": "model.onnx", "file_bytes": size, "sha256": sha256(artifacts / "model.onnx")}]
        write_json(artifacts / "manifest.json", manifest)
    assert run(["validate", str(built)]) == 1
    printed = capsys.readouterr().out
    failures = [line for line in printed.splitlines() if line.startswith("FAILED")]
    assert failures
    assert all("model.onnx" in line for line in failures)
    assert read_json(built / "validation.json")["outcome"]["ok"] is False
    # Make compares times: a failed validation must be asked again.
    assert (built / "validation.json").stat().st_mtime < (artifacts / "record.json").stat().st_mtime
    assert run(["run", "digits-lenet5", "--out", str(built), "--json", *_flags()]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def _flags() -> list[str]:
    return [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]


def test_a_run_traces_the_network_once_before_it_trains(tmp_path, monkeypatch):
    traced, plain = [], capture.capture

    def count(*given, **how):
        # Relief's own capture, for the search of disconnected neurons, is the one that says how to call the network.
        traced.extend([given] * (not how))
        return plain(*given, **how)

    monkeypatch.setattr(capture, "capture", count)
    settings = (
        "train.epochs=1",
        "relief.rounds=1",
        "data.limit=60",
        'model.name="resnet20"',
        'export.formats=["dense"]',
    )
    flags = [part for setting in settings for part in ("--set", setting)]
    assert run(["run", "digits-lenet5", "--out", str(tmp_path), *flags]) == 0
    assert len(traced) == 1  # before the training
    names = ("original.onnx", "masked.onnx", "model.onnx")
    first = [(tmp_path / "artifacts" / name).read_bytes() for name in names]
    assert run(["export", str(tmp_path), "--force"]) == 0
    assert len(traced) == 2
    assert [(tmp_path / "artifacts" / name).read_bytes() for name in names] == first


def test_an_audit_runs_beside_what_only_reads_the_folder(built, capsys):
    with locked(built, shared=True):
        assert run(["audit", str(built)]) == 0
        assert run(["export", str(built)]) == 2
    assert f"a validation or an audit works in {built}" in capsys.readouterr().err


def test_validation_on_given_samples_is_provisional(built, tmp_path, capsys):
    stored = np.load(built / "artifacts/reference.npz")
    np.savez(tmp_path / "mine.npz", x=stored["x"][:50], y=stored["y"][:50])
    assert run(["validate", str(built), "--data", str(tmp_path / "mine.npz"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    check_answer(answer)
    outcome = answer["result"]["outcome"]
    assert (outcome["samples"], outcome["reference"], outcome["provisional"]) == (50, "given", True)
    assert not stages.run_stage("validate", built).skipped  # the full test set is asked again
    assert read_json(built / "validation.json")["outcome"]["samples"] == 360
    assert stages.run_stage("validate", built).skipped


def test_artifacts_alone_are_validated_without_torch(demo, tmp_path, without_torch):
    """In a process that has no torch, from the artifacts' folder alone, on stored and on given samples."""
    built = demo.copy(tmp_path / "built")
    np.savez(tmp_path / "mine.npz", x=np.load(built / "artifacts/reference.npz")["x"])
    code = (
        "import sys; from relief_export.cli import run\n"
        "folder, data = sys.argv[1:]\n"
        "assert run(['validate', folder]) == 0\n"
        "assert run(['validate', folder, '--data', data]) == 0\n"
        "assert run(['report', folder + '/..']) == 0\n"
    )
    done = without_torch(code, str(built / "artifacts"), str(tmp_path / "mine.npz"))
    assert done.returncode == 0, done.stderr
    assert "256 samples of reference.npz" in done.stdout


def test_over_budget_fails_the_run_and_still_reports(built, capsys):
    arguments = ["run", "digits-lenet5", "--out", str(built), "--set", "audit.flash=1KiB", *_flags()]
    (built / "report.html").unlink()
    assert run(arguments) == 1
    assert "FAILED" in capsys.readouterr().out
    assert (built / "report.html").is_file()
    assert run(["audit", str(built), "--flash", "8MiB"]) == 0  # the option wins over the recipe


@pytest.mark.parametrize(
    ("missing", "stage"),
    [
        ("dense/weights.safetensors", "relieve"),
        ("relieved/masks.safetensors", "export"),
        ("artifacts/manifest.json", "audit"),
    ],
)
def test_missing_input_names_the_file(built, missing, stage):
    (built / missing).unlink()
    with pytest.raises(InputError, match=missing):
        stages.run_stage(stage, built, force=True)


@pytest.mark.parametrize("damage", ["", "{}", '{"version": 1, "artifacts": [1], "extra": {}}'])
def test_a_damaged_manifest_is_written_again(built, damage):
    path = built / "artifacts" / "manifest.json"
    names = [artifact.name for artifact in read_manifest(path.parent).artifacts]
    assert stages.run_stage("export", built).skipped
    path.write_text(damage)
    assert not stages.run_stage("export", built).skipped
    manifest = read_manifest(path.parent)
    assert [artifact.name for artifact in manifest.artifacts] == names
    for artifact in manifest.artifacts:
        manifest.check(artifact)


@pytest.mark.parametrize("damage", ["", "{}", '["relieve"]'])
def test_export_goes_on_from_a_readable_record_only(built, damage):
    (built / "relieved" / "record.json").write_text(damage)
    with pytest.raises(IntegrityError, match=r"relieved.record\.json (is not|holds)"):
        stages.run_stage("export", built)


def test_weights_of_another_network_are_refused(built):
    recipe = load_recipe("digits-lenet5", SETTINGS)
    stages.write_recipe(replace(recipe, model=replace(recipe.model, name="lenet300-100")), built)
    before = contents(built / "artifacts")
    with pytest.raises(InputError, match=r"weights\.safetensors"):
        stages.run_stage("export", built)
    assert contents(built / "artifacts") == before


@pytest.mark.parametrize("moment", ["dense/checkpoint.pt", "relieved/rounds/01/retraining.pt"])
def test_killed_run_goes_on_to_the_same_network(demo, moment, tmp_path):
    """SIGKILL in training and in relief; the same command ends with the same bytes as the run that was never killed."""
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "relief_export", "run", "digits-lenet5", "--out", str(folder), *_flags()]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not (folder / moment).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (folder / moment).exists(), process.stderr.read() if process.stderr else ""
        os.kill(process.pid, signal.SIGKILL)
    assert not (folder / "artifacts").exists()
    for stage in ("train", "relieve"):
        stages.run_stage(stage, folder)
    for name in ("dense/weights.safetensors", "relieved/masks.safetensors", "relieved/weights.safetensors"):
        assert sha256(folder / name) == sha256(demo.folder / name)
    assert not (folder / "dense/checkpoint.pt").exists()


def test_several_processes_take_a_recipe_through_all_stages(tmp_path):
    """What torchrun starts: all of them learn, one exports and validates, and one object is printed."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    settings = {"train.epochs": "1", "relief.rounds": "1", "data.limit": "240", "export.formats": '["dense"]'}
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, *torchrun, "-m", "relief_export", "run", "digits-lenet300-100", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, *flags, "--json"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True
    assert (tmp_path / "report.html").is_file()
