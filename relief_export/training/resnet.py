"""ResNets whose additions carry a mask per channel, as relief needs them.

y_c = relu(residual_mask_c * residual_c + shortcut_mask_c * shortcut_c)

Both masks are buffers: they are saved in ``state_dict`` and exported with the network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import nn

from relief_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class MaskedJoin(nn.Module):
    """Add a branch and its shortcut, each multiplied by a mask per channel.

    Relief hooks this module to measure both addends; its masks' names end in ``residual_mask`` and ``shortcut_mask``.
    """

    residual_mask: torch.Tensor
    shortcut_mask: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Buffers, not parameters: no optimizer may move a mask.
        self.register_buffer("residual_mask", torch.ones(channels))
        self.register_buffer("shortcut_mask", torch.ones(channels))

    def forward(self, residual: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        """Return the masked sum of two ``(N, channels, H, W)`` tensors."""
        return residual * self.residual_mask.view(1, -1, 1, 1) + shortcut * self.shortcut_mask.view(1, -1, 1, 1)


class SubsampleAndPad(nn.Module):
    """The shortcut without parameters (option A): every ``stride``-th pixel, zero channels on both sides."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        extra = width - channels
        # F.pad counts from the last axis: width, height, then channels.
        self.padding = (0, 0, 0, 0, extra // 2, extra - extra // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, channels, H, W)`` to ``(N, width, ceil(H / stride), ceil(W / stride))``."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


def projection(channels: int, width: int, stride: int) -> nn.Module:
    """Return the shortcut with parameters (option B): a 1x1 convolution and batch norm."""
    return nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))


SHORTCUTS: dict[str, Callable[[int, int, int], nn.Module]] = {"A": SubsampleAndPad, "B": projection}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        same = stride == 1 and channels == width
        self.shortcut = nn.Identity() if same else SHORTCUTS[shortcut](channels, width, stride)
        self.join = MaskedJoin(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, channels, H, W)`` to ``(N, width, H / stride, W / stride)``."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.join(residual, self.shortcut(x)))


class ResNet(nn.Module):
    """A 3x3 stem of stride 1, one stage of basic blocks a width, global average pooling, one linear layer."""

    def __init__(
        self, channels: int, classes: int, *, widths: Sequence[int], blocks: Sequence[int], shortcut: str
    ) -> None:
        super().__init__()
        if shortcut not in SHORTCUTS:
            raise InputError(f'model.options.shortcut must be "A" or "B", not "{shortcut}"')
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        # Stages are children under the names that torchvision gives them, layer1 and so on.
        self.stages = [f"layer{place + 1}" for place in range(len(widths))]
        channels = widths[0]
        for place, (name, width, depth) in enumerate(zip(self.stages, widths, blocks, strict=True)):
            stage = nn.Sequential()
            for index in range(depth):
                # Every stage but the first halves the picture, in its first block.
                stride = 2 if place and not index else 1
                stage.append(BasicBlock(channels, width, stride, shortcut))
                channels = width
            self.add_module(name, stage)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map pictures ``(N, channels, H, W)`` to logits ``(N, classes)``."""
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.linear(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped
