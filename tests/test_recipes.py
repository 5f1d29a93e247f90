"""Every recipe, found by glob, goes through all stages at a tiny scale: made-up pictures, one epoch, one round."""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relief_export import capture as capturing
from relief_export import stages
from relief_export.recipe import Recipe, load_recipe
from relief_export.records import read_json
from relief_export.relief import disconnection
from relief_export.stages import export_stages

ROOT = Path(__file__).parent.parent
TREES = {"cifar10": (10, 32), "cifar100": (100, 32), "tiny-imagenet-200": (200, 64)}
"""Folder of pictures -> classes and side."""
TINY = {
    "data.limit": "12",
    "data.validation": "0.3",
    "train.epochs": "1",
    "train.batch": "6",
    "train.milestones": "[]",
    "relief.rounds": "1",
    "relief.samples": "12",
    "relief.accuracy_drop": "1",
    # A strict selection leaves a small network, so that writing and running it takes little time.
    "relief.alpha_conv": "0.3",
    "relief.alpha_fc": "0.3",
    "export.formats": '["dense", "csr"]',
    "export.reference_samples": "8",
    "export.calibration_samples": "8",
}
RETRAIN = {"relief.retrain.epochs": "1", "relief.retrain.milestones": "[]"}


def _tiny(path: Path) -> Recipe:
    return load_recipe(path, TINY | (RETRAIN if load_recipe(path).relief.retrain else {}))


def _distinct() -> dict[str, Recipe]:
    """Recipe names -> the recipe at tiny scale; recipes that then differ in nothing but words are run once."""
    found: dict[str, tuple[list[str], Recipe]] = {}
    for path in sorted((ROOT / "pipelines").glob("*.toml")):
        recipe = _tiny(path)
        key = repr(replace(recipe, name="any", description="", reproduces=""))
        found.setdefault(key, ([], recipe))[0].append(path.stem)
    return {" and ".join(names): recipe for names, recipe in found.values()}


RECIPES = _distinct()


def _write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="session")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with noise in the place of every data set, two pictures a class."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("MNIST", "FashionMNIST"):
        for part, count in (("train", 40), ("t10k", 20)):
            _write_idx(root / name / "raw" / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28)))
            _write_idx(root / name / "raw" / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    for name, (classes, side) in TREES.items():
        for part, label in ((part, label) for part in ("train", "test") for label in range(classes)):
            folder = root / name / part / f"{label:03}"
            folder.mkdir(parents=True)
            for number in range(2 if part == "train" else 1):
                picture = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(picture).save(folder / f"{number}.png")
    return root


@pytest.fixture
def captured_once(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Capture each network once, for relief and export alike, and put the present weights into the graph.

    Tracing takes most of the time of these tests; the demonstration is captured anew in every stage.
    """
    graphs, capture = {}, capturing.capture

    def once(module, example, **options):
        key = repr(module)
        if key not in graphs:
            graphs[key] = capture(module, example, **options)
        state = {name: tensor.detach().cpu().numpy().copy() for name, tensor in module.state_dict().items()}
        return export_stages.with_values(graphs[key], state)

    monkeypatch.setattr(capturing, "capture", once)
    monkeypatch.setattr(disconnection, "capture", once)
    return graphs


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipe_goes_through_all_stages(recipe, made_up, captured_once, tmp_path, monkeypatch):
    monkeypatch.setenv("RELIEF_DATA", str(made_up))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / recipe.name
    stages.write_recipe(recipe, folder)
    done = {name: stages.run_stage(name, folder) for name in stages.STAGES}
    assert all(stage.ok for stage in done.values()), done["validate"].outcome["failures"]
    connections = done["relieve"].outcome["connections"]
    assert 0 < connections["kept"] < connections["dense"]
    cost = done["export"].outcome["cost"]["shrunk"]
    assert cost["parameters"]["structural"] <= cost["parameters"]["dense"]
    assert cost["unknown"] == []
    assert len(captured_once) == 1
    assert read_json(folder / "validation.json")["outcome"]["samples"] == done["train"].outcome["samples"]["test"]


def test_every_recipe_is_there():
    assert "digits-lenet5" in " and ".join(RECIPES).split(" and ")
