"""Masks that other tools left behind, as `Masks` of a given network.

Nothing is unpickled with code execution allowed. A mask that disagrees with its weight (masked, but the weight is not
zero) is reported by the number of such entries, and the mask wins: the weight counts as zero from then on.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from relief_export.capture import plain_copy
from relief_export.errors import InputError, IntegrityError
from relief_export.relief.layers import connected_layers, joins, tensor_name
from relief_export.relief.masks import Masks

_AUTHORS_RESNET = re.compile(r"conv1\.mask|layer\d+\.\d+\.(conv\d+|shortcut)\.mask|linear\.(weight|bias)\.mask")
"""Names in the mask files of the NNrelief authors' ResNets."""


@dataclass(frozen=True)
class ReadMasks:
    """Masks, and where they disagree with the weights they were read for.

    Attributes:
        masks: What to keep.
        disagreements: Tensor name -> number of masked entries whose weight is not zero.
    """

    masks: Masks
    disagreements: dict[str, int]


def read_masks(source: Path | nn.Module | Mapping[str, Any] | Sequence[Any], model: nn.Module) -> ReadMasks:
    """Read masks in any of the known forms and check them against a network.

    Args:
        source: A file (safetensors of this package, or what ``torch.save`` wrote of the following forms), a module
            pruned by ``torch.nn.utils.prune``, a dict of NNI's form ``{layer: {"weight": mask, "bias": mask}}``, the
            NNrelief authors' list ``[w0, b0, w1, b1, ...]`` or ResNet dict, or a dict of tensor names.
        model: The network that the masks are for.

    Raises:
        InputError: The form is not known, or names or shapes do not fit the network.
        IntegrityError: The file is damaged, or holds more than tensors.
    """
    content = _load(source) if isinstance(source, Path) else source
    masks = _convert(content, model)
    plain = plain_copy(model)  # a pruned network's weight is the masked one
    masks.check(plain)
    return ReadMasks(masks, disagreements(masks, plain))


def disagreements(masks: Masks, model: nn.Module) -> dict[str, int]:
    """Count the masked entries whose weight is not zero, by tensor; tensors without any are left out."""
    state = model.state_dict()
    counts = {name: int((state[name].cpu()[~mask] != 0).sum()) for name, mask in masks.items()}
    return {name: count for name, count in counts.items() if count}


def zeros(model: nn.Module) -> Masks:
    """Return the masks that a network's exact zeros amount to, over the weights and biases of its layers."""
    plain = plain_copy(model)
    state = plain.state_dict()
    return Masks({name: state[name] != 0 for name in _layer_tensors(plain)})


def _load(path: Path) -> Any:  # noqa: ANN401  a torch file holds any of the forms
    if path.suffix == ".safetensors":
        return Masks.load(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol, of a file that is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, struct.error) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise IntegrityError(f"{path} is damaged or holds more than tensors ({reason}): it is not loaded") from None


def _convert(content: Any, model: nn.Module) -> Masks:  # noqa: ANN401  any of the forms
    if isinstance(content, Masks):
        return content
    if isinstance(content, nn.Module):
        return _from_prune(content)
    if isinstance(content, Mapping) and content:
        if all(isinstance(value, Mapping) for value in content.values()):
            return _from_nni(content)
        if any(_AUTHORS_RESNET.fullmatch(str(name)) for name in content):
            return _from_authors_resnet(content, model)
        return Masks({str(name): _tensor(str(name), value) for name, value in content.items()})
    if isinstance(content, Sequence) and not isinstance(content, str) and content:
        return _from_authors_list(content, model)
    raise InputError(f"a {type(content).__name__} is no known form of masks, or it is empty")


def _from_prune(module: nn.Module) -> Masks:
    suffix = "_mask"
    found = {
        name.removesuffix(suffix): buffer
        for name, buffer in module.named_buffers()
        if name.endswith(suffix) and f"{name.removesuffix(suffix)}_orig" in dict(module.named_parameters())
    }
    if not found:
        raise InputError(f"{type(module).__name__} has nothing pruned by torch.nn.utils.prune")
    return Masks(found)


def _from_nni(content: Mapping[str, Mapping[str, Any]]) -> Masks:
    return Masks(
        {
            tensor_name(layer, tensor): _tensor(tensor_name(layer, tensor), mask)
            for layer, masks in content.items()
            for tensor, mask in masks.items()
            if mask is not None
        }
    )


def _from_authors_list(content: Sequence[Any], model: nn.Module) -> Masks:
    """Pair the positional list with the weights and biases of the network's layers, in their order of definition."""
    names = _layer_tensors(model)
    if len(names) != len(content):
        raise InputError(f"the list has {len(content)} masks, the network {len(names)} weights and biases of layers")
    return Masks({name: _tensor(name, mask) for name, mask in zip(names, content, strict=True)})


def _from_authors_resnet(content: Mapping[str, Any], model: nn.Module) -> Masks:
    """Rename the authors' masks; ``shortcut`` multiplies the shortcut's channels at the block's join."""
    blocks = {name.rpartition(".")[0]: name for name, _ in joins(model)}
    for block in blocks:
        if f"{block}.shortcut.mask" not in content:
            raise InputError(
                f"the masks lack '{block}.shortcut.mask': without its shortcut masks a residual network is another one "
                "than was trained, and its weights do not hold them"
            )
    masks: dict[str, Tensor] = {}
    for key, value in content.items():
        layer, mask = key.removesuffix(".mask"), _tensor(key, value)
        block = layer.removesuffix(".shortcut")
        if block == layer:
            masks[layer if layer.startswith("linear.") else f"{layer}.weight"] = mask
        elif block in blocks:
            masks[f"{blocks[block]}.shortcut_mask"] = mask.flatten()
        else:
            raise InputError(f"the network has no residual join in {block!r} for the mask {key!r}")
    return Masks(masks)


def _layer_tensors(model: nn.Module) -> list[str]:
    return [
        tensor_name(name, tensor)
        for name, layer in connected_layers(model)
        for tensor in ("weight", "bias")
        if getattr(layer, tensor) is not None
    ]


def _tensor(name: str, value: Any) -> Tensor:  # noqa: ANN401  checked here
    mask = torch.as_tensor(value) if not isinstance(value, (str, Mapping, type(None))) else None
    if mask is None or not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError(f"the mask of {name!r} holds something else than zeros and ones")
    return mask.bool()
