"""What can only fail late is refused before the training, and a user's own network is blamed for its own errors."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from torch import nn

from relief_export.cli import run
from relief_export.records import locked
from relief_export.training import models

TINY = ("--set", "data.limit=40", "--set", "train.epochs=1", "--set", "train.batch=8", "--set", "train.milestones=[]")


def no_gradient(_gradient):
    raise ValueError("no gradient\nof this")


class Network(nn.Module):
    """A linear classifier of 28 x 28 pictures that fails as it is told to."""

    def __init__(self, fault):
        super().__init__()
        self.fc, self.fault = nn.Linear(784, 10), fault

    def forward(self, x):
        if self.fault == "small":
            x = x.unfold(3, 64, 1)  # a patch that is larger than the picture
        if self.fault == "data" and x.sum() > 1e9:
            x = 2 * x
        y = self.fc(x.flatten(1))
        if self.fault == "backward" and self.training:
            y.register_hook(no_gradient)
        return y


REFUSED = {
    "a network that is too large for the pictures": ("small", (), "samples of 1 x 28 x 28: maximum size"),
    "a network without gradients": (
        "backward",
        (),
        "1 x 28 x 28: no gradient of this: set data.size",
    ),
    "a network that no graph can hold": ("data", (), "Network"),
    "a pattern that skips nothing": (
        "",
        ("relief.skip=['conv*']",),
        "relief.skip: no layer matches 'conv*'",
    ),
    "an alpha of no layer": ("", ("relief.alpha={'fx' = 0.5}",), "relief.alpha: no layer matches 'fx'"),
    "a board that does not exist": ("", ("audit.target='toaster'",), "there is no target 'toaster'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_fail_later_is_refused_before_the_training(name, tmp_path, monkeypatch, capsys):
    fault, settings, named = REFUSED[name]
    monkeypatch.setitem(models.ZOO, "faulty", lambda _shape, _classes: Network(fault))
    flags = [part for setting in ("model.name=faulty", *settings) for part in ("--set", setting)]
    assert run(["train", "digits-lenet5", "--out", str(tmp_path / "b"), *TINY, *flags, "--json"]) == 2
    printed = capsys.readouterr()
    error = json.loads(printed.out)["error"]
    assert named in error
    assert len(printed.err.splitlines()) == 1
    assert not list((tmp_path / "b").glob("dense/weights*"))
    assert not list((tmp_path / "b").glob("dense/checkpoint*"))


def test_a_network_that_is_whole_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.ZOO, "faulty", lambda _shape, _classes: Network(""))
    whole = ("--set", "model.name=faulty", "--set", "relief.alpha={'f*' = 0.5}", "--json")
    assert run(["train", "digits-lenet5", "--out", str(tmp_path / "b"), *TINY, *whole]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_a_run_does_not_join_another_one_in_its_folder(tmp_path, capsys):
    with locked(tmp_path):
        assert run(["train", "digits-lenet5", "--out", str(tmp_path), *TINY]) == 2
    assert f"process {os.getpid()} works in {tmp_path}: wait for it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_two_runs_of_one_recipe_into_one_folder(tmp_path, capsys):
    folder = tmp_path / "two"
    brief = (
        "--set",
        "relief.rounds=1",
        "--set",
        "relief.retrain.epochs=1",
        "--set",
        "relief.retrain.milestones=[]",
    )
    call = ["run", "digits-lenet300-100", *TINY, *brief, "--out", str(folder)]
    with subprocess.Popen([sys.executable, "-m", "relief_export", *call], stdout=subprocess.PIPE) as first:
        while first.poll() is None and not (folder / ".lock").exists():
            time.sleep(0.01)
        while first.poll() is None and not (folder / ".lock").stat().st_size:
            time.sleep(0.01)
        assert run([*call, "--json"]) == 2
        printed = capsys.readouterr()
        assert f"process {first.pid} works in {folder}: wait for it" in json.loads(printed.out)["error"]
        assert len(printed.err.splitlines()) == 1
        first.communicate()
    assert first.returncode == 0


@pytest.mark.parametrize("name", ["alexnet", "vit_b_16"])
def test_pictures_that_are_too_small_for_a_network_of_torchvision(name, tmp_path, capsys):
    numbers = np.random.default_rng(0)
    for part in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "pictures" / part).mkdir(parents=True)
        for k in range(12):
            pixels = numbers.integers(0, 256, (28, 28, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / part / f"{k}.png")
    settings = (f"model.name=torchvision:{name}", "data.source=folder", f"data.folder={tmp_path / 'pictures'}")
    flags = [part for setting in settings for part in ("--set", setting)]
    assert run(["train", "digits-lenet5", "--out", str(tmp_path / "b"), *TINY, *flags, "--json"]) == 2
    printed = capsys.readouterr()
    error = json.loads(printed.out)["error"]
    assert f'the network "torchvision:{name}" fails on samples of 3 x 28 x 28' in error
    assert printed.err.splitlines() == [f"Error: {error}"]


@pytest.mark.parametrize(("size", "file"), [(64, "init.safetensors"), (3500, "checkpoint.pt")])
def test_a_disk_that_is_full_names_the_file(size, file, tmp_path, capsys):
    """At the first weights, and in the middle of a checkpoint; torch's writer does not say that the disk is full."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(small)]
    if os.name != "posix" or os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk takes the right to mount one")
    try:
        assert run(["run", "digits-lenet300-100", *TINY, "--out", str(small / "b"), "--json"]) == 2
    finally:
        subprocess.run(["umount", str(small)], check=True)
    printed = capsys.readouterr()
    error = json.loads(printed.out)["error"]
    assert f"dense/{file}: the " in error
    assert "cannot be written" in error
    assert printed.err.splitlines()[-1] == f"Error: {error}"
