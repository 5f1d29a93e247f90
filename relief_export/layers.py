"""What relief acts on: the layers whose connections are scored, the joins, and the norms that follow a neuron."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeAlias

from torch import nn

from relief_export.errors import InputError
from relief_export.schema import did_you_mean
from relief_export.state import bare

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

_GPT2_LINEAR = "transformers.pytorch_utils.Conv1D"
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
JOIN_BUFFERS = ("residual_mask", "shortcut_mask")
"""A module with these two buffers, one entry a channel, called as ``join(residual, shortcut)``, is a residual join."""

Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def connected_layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Yield the name and module of every linear and convolution layer, in the order of definition."""
    for name, module in bare(model).named_modules():
        if isinstance(module, (nn.Linear, *CONVS)) or is_transposed(module):
            yield name, module  # a transposed one has the same two parameters


def is_transposed(layer: nn.Module) -> bool:
    """Return whether a layer is the linear layer of GPT-2, whose weight is ``(in, out)``.

    It is called ``Conv1D`` and is known by where it is defined: this package does not import transformers.
    """
    # The whole line of ancestors, so that a subclass is known, too.
    return any(f"{kind.__module__}.{kind.__name__}" == _GPT2_LINEAR for kind in type(layer).__mro__)


def outputs_first(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight, or its mask, as ``(out, in/groups, *kernel)`` whichever way the layer keeps it, and back."""
    return weight.T if is_transposed(layer) else weight


def own_tensors(name: str, layer: Layer) -> dict[str, nn.Parameter]:
    """Return the parameters of a layer by ``weight`` and, where it has one, ``bias``.

    Raises:
        InputError: One of them is computed from other tensors, as by pruning or a parametrisation.
    """
    found = {tensor: value for tensor in ("weight", "bias") if (value := getattr(layer, tensor)) is not None}
    for tensor, value in found.items():
        if not isinstance(value, nn.Parameter):
            raise InputError(
                f"the {tensor} of layer {name!r} is computed from other tensors: make it a plain parameter, "
                "with prune.remove or parametrize.remove_parametrizations of torch.nn.utils"
            )
    return found


def joins(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name and module of every residual join."""
    for name, module in bare(model).named_modules():
        # Known by its buffers and not by its class: a user's own join serves as well.
        if all(buffer in dict(module.named_buffers(recurse=False)) for buffer in JOIN_BUFFERS):
            yield name, module


def tensor_name(layer: str, tensor: str) -> str:
    """Return the ``state_dict`` name of a layer's tensor; the root module itself has the empty name."""
    return f"{layer}.{tensor}" if layer else tensor


def check_globs(patterns: Iterable[str], names: Iterable[str], key: str) -> None:
    """Refuse a pattern of layer names that matches nothing.

    Raises:
        InputError: A pattern matches no layer and no join.
    """
    known = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise InputError(f"{key}: no layer matches {pattern!r}{did_you_mean(pattern, known)}")
