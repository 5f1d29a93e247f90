"""Masks made by torch.nn.utils.prune: read them, export the network without them, and prove the files.

Run it with `python examples/masks_from_prune.py [FOLDER]`. Any method of torch's pruning will do, structured or not:
what counts is the masks that it leaves on the modules.
"""

import copy
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import prune

import relief_export as rx


def main(folder: Path) -> None:
    """Prune a network with torch, export it to ``folder`` and validate the files."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 5)).eval()
    dense = copy.deepcopy(model)
    prune.ln_structured(model[0], "weight", amount=0.5, n=2, dim=0)  # half of the neurons lose all their inputs ...
    prune.l1_unstructured(model[2], "weight", amount=0.8)  # ... and four weights in five go wherever they are small

    # The modules still hold weight_orig and weight_mask; the masks are read by the names of the plain network.
    masks = rx.read_masks(model, dense).masks
    for name, mask in masks.items():
        print(f"{name:10} {int(mask.sum()):>6,} of {mask.numel():,} weights kept")

    x = torch.randn(256, 32)
    manifest = rx.export(
        dense, x[:1], folder, masks=masks, formats=("sparse", "packed"), samples=(x, model(x).argmax(1))
    )
    for artifact in manifest.artifacts:
        print(f"{artifact.name:24} {artifact.bytes:>8,} bytes")
    sys.exit(0 if rx.validate(folder).ok else 1)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "from_prune"))
