"""The queue of runs: resumable at any kill, one record a finished run, and what its log says."""

from __future__ import annotations

import importlib
import re
import time
from pathlib import Path

import pytest

from relief_export.records import read_json
from relief_export.relief import loop
from relief_export.training import checkpoints

ROOT = Path(__file__).parent.parent
TINY = ("train.epochs=2", "relief.rounds=2", "relief.retrain.epochs=1", "relief.retrain.milestones=[]")
TINY += ("train.milestones=[]", "data.limit=60", "relief.accuracy_drop=1", 'export.formats=["dense"]')


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Return a function that calls the queue on a list of two runs, and gives its exit code, output and errors."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    (tmp_path / "list.txt").write_text("# runs\ndigits-lenet300-100 # the first\n\ndigits-lenet300-100@sgd 3\n")
    places = ["--list", tmp_path / "list.txt", "--build", tmp_path / "build", "--out", tmp_path / "runs"]
    settings = [word for setting in TINY for word in ("--set", setting)]

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            importlib.import_module("benchmarks.evidence").main([*map(str, places), *settings, *arguments])
        return end.value.code, *capsys.readouterr()

    return run


def test_a_queue_stopped_in_training_and_in_relief_goes_on_and_keeps_a_record_of_each_run(
    call, tmp_path, monkeypatch, capsys
):
    save = checkpoints.Checkpoint.save
    for stop_after in (1, 2):  # in the dense training, then in the first round of pruning
        saved = []

        def stop(*arguments, saved=saved, stop_after=stop_after):
            save(*arguments)
            saved.append(1)
            if len(saved) == stop_after:
                raise KeyboardInterrupt

        monkeypatch.setattr(checkpoints.Checkpoint, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            call()
        assert not list((tmp_path / "runs").glob("*"))
    monkeypatch.setattr(checkpoints.Checkpoint, "save", save)
    dense = read_json(tmp_path / "build" / "digits-lenet300-100" / "dense" / "record.json")["outcome"]
    assert dense["fit"]["resumed_at"] == 1
    code, printed, _ = call()
    assert code == 0
    first, second = printed.splitlines()[1:]
    kept = {path.stem: read_json(path) for path in (tmp_path / "runs").glob("*.json")}
    assert set(kept) == {"digits-lenet300-100", "digits-lenet300-100@sgd-seed3"}
    found = kept["digits-lenet300-100"]
    share = found["connections"]["kept"] / found["connections"]["dense"]
    accuracy = {key: f"{100 * found['accuracy'][key]['validation']:.2f} %" for key in ("dense", "relieved")}
    assert first.startswith("digits-lenet300-100 ")
    assert f"dense {accuracy['dense']}; chosen {accuracy['relieved']} at {100 * share:.2f} %; finished in" in first
    assert second.startswith("digits-lenet300-100@sgd-seed3 ")
    assert kept["digits-lenet300-100@sgd-seed3"]["seed"] == 3
    trained = (tmp_path / "build" / "digits-lenet300-100" / "dense" / "record.json").read_bytes()
    assert call("digits-lenet300-100")[0] == 0  # everything is up to date
    assert (tmp_path / "build" / "digits-lenet300-100" / "dense" / "record.json").read_bytes() == trained
    log = (tmp_path / "build" / "evidence.log").read_text()
    queue = importlib.import_module("benchmarks.evidence")
    queue.main(["--build", str(tmp_path / "build"), "--status"])
    assert capsys.readouterr().out == log
    with queue._alone(tmp_path / "build"):
        assert call()[::2] == (2, f"a queue is running in {tmp_path / 'build'} already: see it with --status\n")


def test_a_baseline_keeps_what_relief_kept_from_the_same_dense_network(call, tmp_path):
    (tmp_path / "list.txt").write_text(
        "digits-lenet300-100\ndigits-lenet300-100 magnitude-global\ndigits-lenet300-100@sgd random\n"
    )
    names = ("digits-lenet300-100", "digits-lenet300-100-magnitude-global", "digits-lenet300-100@sgd-random")
    code, printed, errors = call(*names)
    assert code == 1, errors  # of the last one relief has not run
    assert "failed: the run digits-lenet300-100@sgd, whose shares are kept here, is not finished" in printed
    relief, baseline = (
        read_json(tmp_path / "runs" / f"digits-lenet300-100{name}.json") for name in ("", "-magnitude-global")
    )
    assert (relief["score"], baseline["score"]) == ("activity", "magnitude-global")
    assert baseline["accuracy"]["dense"] == relief["accuracy"]["dense"]
    assert len(baseline["history"]) == len(relief["history"]) == 3
    for ours, theirs in zip(relief["history"][1:], baseline["history"][1:], strict=True):
        assert 0.8 * ours["kept"] < theirs["kept"] <= ours["kept"]
    assert relief["layers"] != baseline["layers"]


def test_limited_time_ends_a_run_with_the_rounds_it_has_or_leaves_it_for_the_next_call(call, tmp_path, monkeypatch):
    assert call("--minutes", "0")[0] == 1
    assert not (tmp_path / "runs").exists()
    fit, calls, clock = loop.fit.fit, [], time.monotonic

    def slow(*arguments, **more):
        calls.append(1)
        if len(calls) == 3:  # an hour goes by after the first round: a test must not depend on the machine's speed
            monkeypatch.setattr(time, "monotonic", lambda: clock() + 3600)
        return fit(*arguments, **more)

    monkeypatch.setattr(loop.fit, "fit", slow)
    code, printed, errors = call("--minutes", "30", "digits-lenet300-100")
    assert code == 0, errors
    found = read_json(tmp_path / "runs" / "digits-lenet300-100.json")
    assert len(found["history"]) == 1 + 1
    assert "relief.rounds=1" in found["command"]
    assert found["ok"]
    assert "finished in" in printed


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (
            "digits-lenet300-100 x",
            (),
            r'list\.txt, line 1: "digits-lenet300-100 x" is not RECIPE\[@VARIANT\] \[SEED\] \[SCORE\]',
        ),
        ("\ndigits-lenet9", (), r"list\.txt, line 2: there is no recipe"),
        ("digits-lenet300-100", ("digits",), r'list\.txt has no run "digits"'),
        ("", ("--status",), r"evidence\.log does not exist: no queue was started here"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_sentence(call, tmp_path, content, arguments, message):
    (tmp_path / "list.txt").write_text(content)
    code, _, errors = call(*arguments)
    assert code == 2
    assert re.fullmatch(f"[^\n]*{message}[^\n]*\n", errors)


def test_the_list_begins_with_the_papers_systems_and_names_no_run_twice(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    queue = importlib.import_module("benchmarks.evidence")
    names = [entry.folder.name for entry in queue.read_list(queue.LIST, Path("build"), {})]
    assert len(set(names)) == len(names)
    assert names[:2] == ["cifar10-resnet20@fast", "cifar10-vgg-like@fast"]
