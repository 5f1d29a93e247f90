"""Small problems that train in a moment."""

from __future__ import annotations

import torch
from torch import nn

from relief_export.training.data import DataSet, Split

CLASSES = 3


def data(samples=96, seed=0, *, side=8, augment=False, noise=0.25):
    """Noisy pictures of which each class has its own pattern."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(CLASSES, 1, side, side, generator=generator)

    def split(count):
        y = torch.arange(count) % CLASSES
        blur = noise * torch.randn(count, 1, side, side, generator=generator)
        return Split.of((patterns[y] + blur).clamp(0, 1).mul(255).byte(), y)

    return DataSet(split(samples), split(48), split(48), CLASSES, (1, side, side), augment=augment)


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def convolutional(seed=0):
    """A convolution with batch norm, dropout that draws random numbers, and a linear layer."""
    torch.manual_seed(seed)
    features = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2))
    return nn.Sequential(features, nn.Flatten(), nn.Linear(54, CLASSES))


def states_equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
