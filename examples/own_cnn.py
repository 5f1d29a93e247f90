"""One's own CNN, from training to a proven artifact: train it, find the connections that matter, export, validate.

Run it with `python examples/own_cnn.py [FOLDER]`; it takes half a minute on a laptop and downloads nothing: the data
are scikit-learn's 1,797 scans of handwritten digits.
"""

import copy
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import relief_export as rx


class Net(nn.Module):
    """Two convolutions and two linear layers: any module with one input and one output would do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 2 * 2, 64)
        self.classes = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, 10) of images (N, 1, 8, 8)."""
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.classes(torch.relu(self.hidden(x.flatten(1))))


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int) -> None:
    """Train as anybody would; relief needs nothing from this loop but the weights."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


def main(folder: Path) -> None:
    """Train, relieve, export and validate into ``folder``."""
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # (1797, 1, 8, 8), in 0..1
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))  # the scans come writer by writer
    x, y = x[order], y[order]
    train_set, validation_set, test_set = ((x[a:b], y[a:b]) for a, b in ((0, 1200), (1200, 1500), (1500, 1797)))

    model = Net()
    train(model, *train_set, epochs=15)
    dense = copy.deepcopy(model)  # relief works in place, and the savings are measured against this one

    # Three rounds of pruning by activity and retraining; the smallest network within 1 point of accuracy is kept.
    alphas = {"alpha_conv": 0.85, "alpha_fc": 0.85}  # share of each neuron's activity to keep; less prunes faster
    found = rx.relieve(model, {"train": train_set, "validation": validation_set}, rounds=3, **alphas)
    print(f"{found.chosen.kept:,} of {found.chosen.dense:,} connections are left")

    formats = ("packed", "csr")  # dense is always written
    manifest = rx.export(model, x[:1], folder, masks=found.masks, original=dense, formats=formats, samples=test_set)
    for artifact in manifest.artifacts:
        print(f"{artifact.name:24} {artifact.bytes:>8,} bytes")

    # In ONNX Runtime, against the masked PyTorch network, sample by sample.
    result = rx.validate(folder, test_set[0].numpy(), test_set[1].numpy())
    print("every file is the network that was trained" if result.ok else "\n".join(map(str, result.failures)))
    sys.exit(0 if result.ok else 1)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "own_cnn"))
