"""Importance of every connection, from the weights and the mean absolute activity.

With a_j, A_j from ``activity.py``, ⋆ the layer's own correlation (stride, padding, dilation), P output positions::

    linear:  s_ij = |w_ij| · a_j                 bias: |b_i|
    conv:    s_ij = ‖ |K_ij| ⋆ A_j ‖             bias: |b_i| · ‖1_P‖   (√P for l2, P for l1)
    join:    r_c = ‖A_c‖_F of the residual, s_c of the shortcut

No convolution is needed. With U_j ``(P, K)`` the windows of A_j (K = kernel volume) and k = |K_ij| flattened,
|K_ij| ⋆ A_j = U_j k, so that ‖U_j k‖₁ = (1ᵀ U_j) k, as nothing is negative, and ‖U_j k‖₂² = kᵀ (U_jᵀ U_j) k: a Gram
matrix of K × K for each input channel serves all filters. Nothing cancels, since every term is non-negative.

A layer that was called on inputs of several sizes has a score for each; they are averaged by their numbers of samples.
(arXiv 2109.10795, section 3)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from relief_export.errors import InputError
from relief_export.layers import (
    CONVS,
    JOIN_BUFFERS,
    connected_layers,
    is_transposed,
    joins,
    outputs_first,
    own_tensors,
)
from relief_export.state import bare

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from relief_export.relief.activity import Activity, MeanMap

PositionNorm = Literal["l1", "l2"]
Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d

_WINDOW_ENTRIES = 1 << 23
"""At most this many float64 entries of unfolded windows at once (64 MiB)."""


@dataclass(frozen=True)
class LayerScore:
    """Scores of one layer's connections, float64 on the CPU.

    Attributes:
        weight: ``(out, in/groups)``: one a weight (linear) or kernel (convolution).
        bias: ``(out,)``, or None.
        weight_name, bias_name: The parameters' names.
        shape: ``(out, in/groups, *kernel)``, of the weight.
        transposed: Whether the layer keeps its weight as ``(in, out)``.
    """

    weight: Tensor
    bias: Tensor | None
    weight_name: str
    bias_name: str | None
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def is_conv(self) -> bool:
        """Whether a connection is a kernel."""
        return len(self.shape) > 2


@dataclass(frozen=True)
class Scores:
    """Scores of a whole network; ``joins`` holds ``(channels, 2)``: residual, shortcut."""

    layers: dict[str, LayerScore]
    joins: dict[str, Tensor]


def score(model: nn.Module, activity: Activity, *, position_norm: PositionNorm = "l2") -> Scores:
    """Score every connection of every layer that has an activity.

    Parameters shared by several layers are scored once, by the sum over these layers.

    Args:
        model: The network as it is at the start of the round, earlier masks applied.
        activity: Its mean absolute inputs.
        position_norm: Norm over the output positions of a convolution.

    Raises:
        InputError: A weight is NaN or infinite, or computed from other tensors.
    """
    names = {id(parameter): name for name, parameter in bare(model).named_parameters()}
    layers: dict[str, LayerScore] = {}
    owner: dict[int, str] = {}
    for name, layer in connected_layers(model):
        if name not in activity.layers:
            continue
        # For its check alone: a weight that is computed from others cannot be masked.
        own_tensors(name, layer)
        # In float64, so that scores differ by what the weights are and not by how they were summed.
        weight = layer.weight.detach().double().abs()
        bias = None if layer.bias is None else layer.bias.detach().double().abs()
        if not all(bool(torch.isfinite(t).all()) for t in (weight, bias) if t is not None):
            raise InputError(f"layer {name!r} has weights that are NaN or infinite")
        weight = outputs_first(layer, weight)
        scored, positions = _score_layer(layer, weight, activity.layers[name], position_norm)
        made = LayerScore(
            scored.cpu(),
            None if bias is None else (bias * positions).cpu(),
            names[id(layer.weight)],
            None if layer.bias is None else names[id(layer.bias)],
            tuple(weight.shape),
            is_transposed(layer),
        )
        # The first layer's name stands for a shared weight, as its mask does.
        first = owner.setdefault(id(layer.weight), name)
        layers[first] = made if first == name else _add(layers[first], made)
    pairs = {name: _score_join(join, activity.joins[name]) for name, join in joins(model) if name in activity.joins}
    return Scores(layers, pairs)


def size_scores(model: nn.Module, names: Collection[str]) -> Scores:
    """Score every connection by its size alone: the root mean square of its weights, |w| for a linear layer.

    The mean, and not the sum, makes a kernel and a single weight comparable over the whole network. Joins have no size.

    Args:
        model: The network as it is at the start of the round, earlier masks applied.
        names: The layers to score.
    """
    known = {id(parameter): name for name, parameter in bare(model).named_parameters()}
    layers: dict[str, LayerScore] = {}
    seen: set[int] = set()
    for name, layer in connected_layers(model):
        if name in names and id(layer.weight) not in seen:
            seen.add(id(layer.weight))
            weight = outputs_first(layer, layer.weight.detach().double())
            sizes = weight.flatten(2).square().mean(dim=2).sqrt() if weight.ndim > 2 else weight.abs()
            layers[name] = LayerScore(
                sizes.cpu(),
                None if layer.bias is None else layer.bias.detach().double().abs().cpu(),
                known[id(layer.weight)],
                None if layer.bias is None else known[id(layer.bias)],
                tuple(weight.shape),
                is_transposed(layer),
            )
    return Scores(layers, {})


def random_scores(scores: Scores, seed: int) -> Scores:
    """Replace the scores of all connections that are not zero by random ones, drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(tensor: Tensor) -> Tensor:
        # From 1 on, so that what is zero already stays behind everything else.
        return (torch.rand(tensor.shape, generator=generator).double() + 1) * (tensor > 0)

    layers = {name: replace(layer, weight=drawn(layer.weight)) for name, layer in scores.layers.items()}
    return Scores(layers, {})


def _add(first: LayerScore, second: LayerScore) -> LayerScore:
    bias = first.bias
    if bias is not None and second.bias is not None and first.bias_name == second.bias_name:
        bias = bias + second.bias
    return replace(first, weight=first.weight + second.weight, bias=bias)


def _score_join(join: nn.Module, maps: tuple[Tensor, Tensor]) -> Tensor:
    """Return ``(channels, 2)`` Frobenius norms of the masked mean maps ``(channels, *spatial)``."""
    masks = (getattr(join, buffer).detach().double() for buffer in JOIN_BUFFERS)
    norms = [A.flatten(1).norm(dim=1) * mask.flatten() for A, mask in zip(maps, masks, strict=True)]
    return torch.stack(norms, dim=1).cpu()


def _score_layer(
    layer: nn.Module, weight: Tensor, means: tuple[MeanMap, ...], norm: PositionNorm
) -> tuple[Tensor, float]:
    """Return the scores ``(out, in/groups)`` of a layer and the norm of a map of ones, over all sizes of its input."""
    total = sum(each.rows for each in means)
    scored, ones = torch.zeros(weight.shape[:2], dtype=torch.float64, device=weight.device), 0.0
    for each in means:
        one = _score_conv(layer, weight, each.mean, norm) if isinstance(layer, CONVS) else (weight * each.mean, 1.0)
        # One size is the rule, and its share is exactly 1.
        scored, ones = scored + one[0] * (each.rows / total), ones + one[1] * (each.rows / total)
    return scored, ones


def _score_conv(layer: Conv, weight: Tensor, A: Tensor, norm: PositionNorm) -> tuple[Tensor, float]:
    """Return ``(out, in/groups)`` kernel scores and the norm of a map of ones.

    Args:
        layer: The convolution, for its geometry.
        weight: ``(out, in/groups, *kernel)``, absolute values.
        A: ``(in, *spatial)``, the mean absolute input.
        norm: Norm over positions.
    """
    out, within = weight.shape[:2]
    # (out, in/g, *kernel) -> (g, in/g, out/g, K): one small matrix of absolute kernels for each input channel.
    k = weight.reshape(layer.groups, out // layer.groups, within, -1).transpose(1, 2)
    windows = _windows(layer, A)
    positions = prod(windows.shape[1 : 1 + len(layer.kernel_size)])
    if norm == "l1":
        sums = torch.cat([U.sum(dim=1) for U in _unfold(windows, k.shape[-1])])  # (in, K)
        scored = k @ sums.view(layer.groups, within, -1, 1)
        scored = scored.squeeze(-1)
    else:
        gram = torch.cat([U.mT @ U for U in _unfold(windows, k.shape[-1])])  # (in, K, K)
        scored = ((k @ gram.view(layer.groups, within, *gram.shape[1:])) * k).sum(dim=-1).sqrt()
    # (g, in/g, out/g) -> (out, in/g)
    return scored.transpose(1, 2).reshape(out, within), float(positions if norm == "l1" else positions**0.5)


def _windows(layer: Conv, A: Tensor) -> Tensor:
    """Return a view ``(in, *positions, *kernel)`` of the padded map: the layer's own windows."""
    # What the layer itself pads with: resolves 'same' (uneven for even kernels) and every padding mode.
    widths = layer._reversed_padding_repeated_twice  # noqa: SLF001
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = pad(A[None], widths, mode=mode)[0]
    for axis, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        # A view: the windows overlap, and copies of all of them at once may be too large.
        windows = windows.unfold(1 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return windows


def _unfold(windows: Tensor, volume: int) -> Iterator[Tensor]:
    """Yield ``(some channels, positions, kernel volume)`` copies of the windows, of bounded size."""
    channels = max(1, _WINDOW_ENTRIES * windows.shape[0] // max(1, windows.numel()))
    for part in torch.split(windows, channels):
        yield part.reshape(part.shape[0], -1, volume)
