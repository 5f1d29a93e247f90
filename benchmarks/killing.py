"""Kill channels of a torchvision network at random, as pruning does: the row is zero, what shifts it is not.

A *killed channel* is an output channel of a convolution or linear layer whose weights are all zero, with the scale of
the batch norm that directly follows, and with a random non-zero bias or batch-norm shift, so that it emits a constant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from relief_export.training.vision import import_torchvision

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

LINEAR = (nn.Conv2d, nn.Linear)
NORM = nn.BatchNorm2d


def build(name: str, seed: int, side: int) -> nn.Module:
    """Return a network with random weights whose logits depend on every layer.

    Heads that torchvision initialises to zero get random values, layer scales become 1, and the batch norms get the
    statistics of random pictures, so that activations neither vanish nor explode.
    """
    torch.manual_seed(seed)
    vision = import_torchvision()
    auxiliary = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    network: nn.Module = vision.models.get_model(name, weights=None, **auxiliary)
    for part in (p for p in network.modules() if isinstance(p, nn.Linear) and not p.weight.any()):
        nn.init.normal_(part.weight, std=part.in_features**-0.5)
    for key, parameter in network.named_parameters():
        if key.endswith("layer_scale"):
            nn.init.ones_(parameter)
    norms = [part for part in network.modules() if isinstance(part, NORM)]
    for norm in norms:
        norm.momentum = None  # the average of the batches seen, here of one
    if norms:
        network.eval()
        for norm in norms:
            norm.train()
        with torch.no_grad():
            network(torch.randn(4, 3, side, side))
    return network.eval()


def kill(network: nn.Module, share: float, seed: int) -> dict[str, torch.Tensor]:
    """Kill ``share`` of the channels of every layer but the last, in place.

    Returns:
        Name of each layer's weight -> its killed channels.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = [(n, p) for n, p in network.named_modules() if isinstance(p, (*LINEAR, NORM))]
    linear = [n for n, p in layers if isinstance(p, LINEAR) and not n.startswith(("AuxLogits", "aux"))]
    killed = {}
    following: Mapping[str, nn.Module | None] = {
        n: after for (n, _), (_, after) in zip(layers, [*layers[1:], ("", None)], strict=True)
    }
    for name, part in layers:
        if name not in linear[:-1] or not isinstance(part, LINEAR):
            continue
        rows = part.weight.shape[0]
        dead = torch.randperm(rows, generator=generator)[: int(share * rows)]
        after = following[name]
        with torch.no_grad():
            part.weight[dead] = 0
            for shift in _shifts(part, after, rows):
                shift[dead] = torch.randn(len(dead), generator=generator)
            if isinstance(after, NORM) and after.num_features == rows:
                after.weight[dead] = 0
                after.running_mean[dead] = 0  # type: ignore[index]
                after.running_var[dead] = 0  # type: ignore[index]
        killed[f"{name}.weight"] = dead
    return killed


def _shifts(part: nn.Module, after: nn.Module | None, rows: int) -> Iterator[torch.Tensor]:
    if isinstance(part.bias, torch.Tensor):
        yield part.bias
    if isinstance(after, NORM) and after.num_features == rows:
        yield after.bias
