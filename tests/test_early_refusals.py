"""What can only fail late is refused before the training, and a user's own network is blamed for its own errors."""

import json
import os

import pytest
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
