"""A user's own network, weights and data, from a recipe to a report."""

import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from relief_export.cli import run

MINE = """
import numpy as np
import torch
from torch import nn

def network(shape, classes, *, width=16):
    inputs = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, classes))

def samples(count, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, count)
    return rng.normal(size=(count, 1, 2, 2)) + 3 * np.eye(4)[y].reshape(count, 1, 2, 2), y

def splits():
    return {"train": samples(300, 0), "test": samples(90, 1)}

def broken():
    raise OSError("the server is away")

def no_labels():
    return {"train": np.zeros((4, 2))}
"""
RECIPE = """
[data]
source = "{name}:splits"
validation = 60
[model]
name = "{name}:network"
weights = "start.pt"
[model.options]
width = 8
[train]
epochs = 0
batch = 32
[relief]
rounds = 1
alpha_fc = 0.9
[relief.retrain]
epochs = 1
[export]
formats = ["packed"]
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe of one's own in the present folder, with weights that are already trained; returns the module's name."""
    monkeypatch.chdir(tmp_path)
    name = f"mine_{tmp_path.name.replace('-', '_')}"  # a module is imported once a process
    (tmp_path / f"{name}.py").write_text(MINE)
    (tmp_path / "mine.toml").write_text(RECIPE.format(name=name))
    torch.manual_seed(0)
    start = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    torch.save(start.state_dict(), tmp_path / "start.pt")
    return name


def test_a_network_of_ones_own_goes_from_a_recipe_to_a_report(recipe, tmp_path, capsys):
    assert run(["train", "mine.toml", "--out", "b", "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)["result"]["outcome"]
    assert outcome["samples"] == {"train": 240, "validation": 60, "test": 90}
    from safetensors.torch import load_file  # noqa: PLC0415

    start, kept = torch.load("start.pt"), load_file(tmp_path / "b/dense/weights.safetensors")
    assert all(torch.equal(start[name], kept[name]) for name in start)
    assert run(["run", "mine.toml", "--out", "b", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert result["weights"]["kept"] < result["weights"]["dense"] == 4 * 8 + 8 + 8 * 3 + 3
    stored = np.load(tmp_path / "b/artifacts/reference.npz")
    session = ort.InferenceSession(tmp_path / "b/artifacts/model.packed.onnx", providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: stored["x"]})
    np.testing.assert_allclose(outputs, stored["logits"], rtol=1e-4, atol=1e-5)
    assert recipe in (tmp_path / "b/report.md").read_text().replace("\\", "")
    # Other weights are another start: the training is not up to date.
    torch.save({name: 2 * value for name, value in start.items()}, "start.pt")
    assert run(["train", "mine.toml", "--out", "b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"]["skipped"] is False


WRONG = {
    "no module": ("data.source=nowhere_at_all:splits", "module nowhere_at_all cannot be imported (ModuleNotFoundError"),
    "no function": ("model.name={name}:netwrk", 'has no function "netwrk"; did you mean "network"?'),
    "no network": ("model.name={name}:samples", "fails when it is called (TypeError"),
    "it fails": ("data.source={name}:broken", "fails when it is called (OSError: the server is away)"),
    "no pair": ("data.source={name}:no_labels", "split 'train' must be a pair (x, y)"),
    "an unknown option": ("model.options.depth=3", "fails when it is called (TypeError"),
    "weights of another": ("model.options.width=9", 'tensor "1.weight" is (8, 4) there and (9, 4) here'),
    "no weights": ("model.weights=absent.pt", "absent.pt does not exist"),
    "no state_dict": ("model.weights=mine.toml", "mine.toml is no state_dict of torch.save"),
    "a key of others": ("data.size=8", "data.size is for the built-in sources"),
    "a misspelled source": ("data.source=digit", 'data.source cannot be "digit"; did you mean "digits"?'),
}


@pytest.mark.parametrize(("setting", "named"), WRONG.values(), ids=WRONG)
def test_a_mistake_in_it_is_one_sentence(setting, named, recipe, capsys):
    assert run(["train", "mine.toml", "--out", "b", "--set", setting.format(name=recipe), "--json"]) == 2
    printed = capsys.readouterr()
    assert named in json.loads(printed.out)["error"]
    assert len(printed.err.splitlines()) == 1
