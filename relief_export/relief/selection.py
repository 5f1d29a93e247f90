"""The fewest connections of every neuron that carry the share α of what it receives.

For neuron i with scores s_i1 ≥ s_i2 ≥ … (bias included, ties in the order of their index) and S_i = Σ_j s_ij, keep the
first m with m = min { m : s_i1 + … + s_im ≥ α · S_i }, and nothing where S_i = 0. A join is a neuron with two
connections a channel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from relief_export.errors import InputError
from relief_export.relief.layers import JOIN_BUFFERS, tensor_name
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

    def of(self, name: str, *, is_conv: bool) -> float:
        """Return the α of a layer."""
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


def keep_fewest(scores: Tensor, alpha: float) -> Tensor:
    """Return which of the scores ``(neurons, connections)`` of each neuron stay, a boolean array of the same shape."""
    split = scores.double() * (2.0 ** (53 - _BITS) + 1)
    rounded = split - (split - scores)  # Veltkamp's splitting: the upper _BITS of each mantissa
    values, order = rounded.sort(dim=1, descending=True, stable=True)
    reached = values.cumsum(dim=1)
    before = torch.nn.functional.pad(reached[:, :-1], (1, 0))  # what the larger ones carry without this one
    kept = before < alpha * reached[:, -1:] * (1 - 2.0**-_BITS)
    return torch.zeros_like(kept).scatter_(1, order, kept)


def _select_layer(layer: LayerScore, alpha: float) -> dict[str, Tensor]:
    """Return the masks of a layer's weight, by whole kernels, and bias, its neurons' last connection."""
    scores = layer.weight if layer.bias is None else torch.cat([layer.weight, layer.bias[:, None]], dim=1)
    kept = keep_fewest(scores, alpha)
    within = layer.weight.shape[1]
    kernel = kept[:, :within].reshape(*layer.weight.shape, *[1] * (len(layer.shape) - 2))
    whole = kernel.expand(layer.shape)
    masks = {layer.weight_name: (whole.T if layer.transposed else whole).contiguous()}
    if layer.bias_name is not None:
        masks[layer.bias_name] = kept[:, within].clone()
    return masks
