"""Small relieved networks as fixtures: really trained, really pruned, a few kilobytes each.

``python -m tests.relieved build/NAME ...`` keeps the relieved networks of build folders in tests/data. A file holds,
for each tensor of the ``state_dict``, its mask as bits (``mask:NAME``, where it has one) and the values that are kept
(``kept:NAME``, in order), and a few pictures of the test set as the network sees them (``x``). Its metadata says how to
make it again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from benchmarks.runs import command
from relief_export.recipe import ModelConfig
from relief_export.records import read_record
from relief_export.relief.masks import Masks
from relief_export.stages.engine import read_recipe
from relief_export.stages.training_stages import load_network, load_task
from relief_export.training.models import build_model

DATA = Path(__file__).parent / "data"
FILES = sorted(DATA.glob("*.safetensors"))
PICTURES = 16


@dataclass(frozen=True)
class Relieved:
    """A network with its masks, pictures ``x: (N, C, H, W)`` float32, and what its file says of it."""

    model: nn.Module
    masks: Masks
    x: torch.Tensor
    about: dict[str, Any]


def load(path: Path) -> Relieved:
    """Read a fixture and build its network, in evaluation mode."""
    with safe_open(path, framework="np") as file:
        about = json.loads(file.metadata()["about"])
    tensors = load_file(path)
    x = torch.from_numpy(tensors.pop("x"))
    model = build_model(ModelConfig(about["model"]), tuple(x.shape[1:]), about["classes"], seed=0).eval()
    state, masks = model.state_dict(), {}
    for name, tensor in state.items():
        mask = np.ones(tensor.shape, bool)
        if (bits := tensors.get(f"mask:{name}")) is not None:
            mask = np.unpackbits(bits, count=mask.size).astype(bool).reshape(mask.shape)
            masks[name] = torch.from_numpy(mask)
        values = np.zeros(mask.shape, tensors[f"kept:{name}"].dtype)
        values[mask] = tensors[f"kept:{name}"]
        tensor.copy_(torch.from_numpy(values))
    return Relieved(model, Masks(masks), x, about)


def keep(folder: Path, out: Path) -> Path:
    """Write the relieved network of a build folder as a fixture and return its path."""
    recipe = read_recipe(folder)
    data, model = load_task(recipe)
    masks = load_network(model, folder, "relieved")
    tensors = {"x": data.test.take(PICTURES, seed=0).tensors()[0].numpy()}
    for name, tensor in model.state_dict().items():
        values, mask = tensor.numpy(), masks.get(name)
        if mask is not None:
            tensors[f"mask:{name}"] = np.packbits(mask.numpy())
            values = values[mask.numpy()]
        tensors[f"kept:{name}"] = values.ravel()
    relief = read_record(folder / "relieved" / "record.json", "relieve").outcome
    about = {
        "command": command(recipe.to_dict()),
        "model": recipe.model.name,
        "classes": data.classes,
        "connections": relief["connections"],
        "test_accuracy": relief["test"],
    }
    path = out / f"{folder.resolve().name.partition('@')[0]}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"about": json.dumps(about)})
    return path


def main() -> None:
    """Keep the named build folders."""
    parser = argparse.ArgumentParser(prog="python -m tests.relieved", description="Keep relieved networks as fixtures.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="build/NAME")
    for folder in parser.parse_args().folders:
        print(keep(folder, DATA))  # noqa: T201  what a command answers


if __name__ == "__main__":
    main()
