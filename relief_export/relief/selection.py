"""The fewest connections of every neuron that carry the share α of what it receives.

For neuron i with scores s_i1 ≥ s_i2 ≥ … (bias included, ties in the order of their index) and S_i = Σ_j s_ij, keep the
first m with m = min { m : s_i1 + … + s_im ≥ α · S_i }, and nothing where S_i = 0. A join is a neuron with two
connections a channel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from relief_export.errors import InputError
from relief_export.layers import JOIN_BUFFERS, tensor_name
from relief_export.relief.masks import Masks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from relief_export.relief.scores import LayerScore, Scores

_BITS = 40
"""Scores are compared to 40 bits and sums to 2^-40 (1e-12): what differs only by rounding counts as equal."""


@dataclass(frozen=True)
class Alpha:
    """How much of its incoming score each neuron keeps.

    Attributes:
        conv, fc: For convolution (and joins) and for linear layers, in (0, 1].
        layers: Layer or join name (glob) -> its own value; the first that matches wins.
    """

    conv: float = 0.95
    fc: float = 0.95
    layers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, value in {"alpha_conv": self.conv, "alpha_fc": self.fc, **self.layers}.items():
            if not 0 < value <= 1:
                raise InputError(f"{key}: α must be above 0 and at most 1, not {value}")

    def scaled(self, factor: float) -> Alpha:
        """Return α that lets ``factor`` times as much of each neuron's score go, at most nearly all."""

        def scale(alpha: float) -> float:
            # Above 0, because α must be: so small a share keeps the largest connection of each neuron alone.
            return min(1.0, max(1e-9, 1 - factor * (1 - alpha)))

        return Alpha(scale(self.conv), scale(self.fc), {name: scale(value) for name, value in self.layers.items()})

    def of(self, name: str, *, is_conv: bool) -> float:
        """Return the α of a layer."""
        # In the order of the recipe, so that a narrow pattern can stand before a wide one.
        own = (value for pattern, value in self.layers.items() if fnmatchcase(name, pattern))
        return next(own, self.conv if is_conv else self.fc)


def select(scores: Scores, alpha: Alpha) -> Masks:
    """Choose the connections that stay. Deterministic; always computed on the CPU.

    Returns:
        Masks of the weights and biases of all scored layers and of the buffers of all joins.
    """
    masks: dict[str, Tensor] = {}
    for name, layer in scores.layers.items():
        masks.update(_select_layer(layer, alpha.of(name, is_conv=layer.is_conv)))
    for name, pair in scores.joins.items():
        kept = keep_fewest(pair, alpha.of(name, is_conv=True))
        masks.update({tensor_name(name, buffer): kept[:, i].clone() for i, buffer in enumerate(JOIN_BUFFERS)})
    return Masks(masks)


def select_largest(scores: Scores, share: float) -> Masks:
    """Choose the connections with the largest scores of the whole network, so that ``share`` of its weights stay.

    Biases stay: as a neuron's connection like any other they would be a matter of the neuron's scale. Ties go to the
    connection that comes first.
    """
    layers = list(scores.layers.values())
    # How many weights each connection has: a kernel is one connection.
    sizes = torch.cat([torch.full((layer.weight.numel(),), prod(layer.shape[2:])) for layer in layers])
    order = torch.cat([layer.weight.flatten() for layer in layers]).sort(descending=True, stable=True).indices
    # The fewest in front that hold the share; what is zero already is behind all others.
    # The half allows for a share that was computed from a count of weights.
    count = int((sizes[order].cumsum(0) <= share * int(sizes.sum()) + 0.5).sum())
    kept = torch.zeros(len(order), dtype=torch.bool)
    kept[order[:count]] = True
    masks: dict[str, Tensor] = {}
    for layer, part in zip(layers, torch.split(kept, [layer.weight.numel() for layer in layers]), strict=True):
        masks[layer.weight_name] = _expanded(layer, part.view(layer.weight.shape))
    return Masks(masks)


def keep_fewest(scores: Tensor, alpha: float) -> Tensor:
    """Return which of the scores ``(neurons, connections)`` of each neuron stay, a boolean array of the same shape."""
    split = scores.double() * (2.0 ** (53 - _BITS) + 1)
    rounded = split - (split - scores)  # Veltkamp's splitting: the upper _BITS of each mantissa
    values, order = rounded.sort(dim=1, descending=True, stable=True)
    reached = values.cumsum(dim=1)
    before = torch.nn.functional.pad(reached[:, :-1], (1, 0))  # what the larger ones carry without this one
    # Strictly below, so that nothing is kept of a neuron that receives nothing.
    kept = before < alpha * reached[:, -1:] * (1 - 2.0**-_BITS)
    return torch.zeros_like(kept).scatter_(1, order, kept)


def _select_layer(layer: LayerScore, alpha: float) -> dict[str, Tensor]:
    """Return the masks of a layer's weight, by whole kernels, and bias, its neurons' last connection."""
    scores = layer.weight if layer.bias is None else torch.cat([layer.weight, layer.bias[:, None]], dim=1)
    kept = keep_fewest(scores, alpha)
    within = layer.weight.shape[1]
    masks = {layer.weight_name: _expanded(layer, kept[:, :within])}
    if layer.bias_name is not None:
        masks[layer.bias_name] = kept[:, within].clone()
    return masks


def _expanded(layer: LayerScore, kept: Tensor) -> Tensor:
    """Return the mask of a layer's weight, of its own layout, for connections ``(out, in/groups)``."""
    kernel = kept.reshape(*layer.weight.shape, *[1] * (len(layer.shape) - 2))
    whole = kernel.expand(layer.shape)
    return (whole.T if layer.transposed else whole).contiguous()
