"""Masks: parameter or buffer name -> boolean array of its shape, True = kept.

The file is safetensors: one boolean tensor a name, and one metadata entry, ``relief_export``, a JSON object of
``format``, ``version`` and ``weights_sha256``, the SHA-256 of the weights file that the masks belong to, or null.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from relief_export import records
from relief_export.errors import InputError, IntegrityError
from relief_export.relief.layers import connected_layers, own_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FORMAT = "relief-export masks"
VERSION = 1


@dataclass(frozen=True)
class Count:
    """Connections as the paper counts them: entries of weights and biases of layers, batch norm left out."""

    dense: int
    kept: int

    @property
    def compression(self) -> float:
        """Dense over kept; infinite where nothing is kept."""
        return self.dense / self.kept if self.kept else float("inf")

    def to_dict(self) -> dict[str, int]:
        """Return plain data."""
        return asdict(self)


class Masks(Mapping[str, Tensor]):
    """An immutable mapping of names to boolean CPU tensors; a name that is not there is kept whole."""

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        self._masks = {name: mask.detach().to("cpu", torch.bool) for name, mask in (masks or {}).items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __and__(self, other: Mapping[str, Tensor]) -> Masks:
        """Return masks that keep what both keep: what is masked in one stays masked."""
        both = dict(self._masks)
        for name, mask in other.items():
            both[name] = both[name] & mask if name in both else mask
        return Masks(both)

    def same(self, other: Mapping[str, Tensor]) -> bool:
        """Return whether both mask exactly the same entries."""
        return all(
            torch.equal(self[name], other[name])
            if name in self and name in other
            else bool((self if name in self else other)[name].all())
            for name in {*self, *other}
        )

    def check(self, model: nn.Module) -> None:
        """Refuse masks that do not fit the network.

        Raises:
            InputError: A name the network does not have, or another shape.
        """
        tensors = model.state_dict()
        for name, mask in self.items():
            if name not in tensors:
                raise InputError(f"the masks name {name!r}, which the network does not have")
            if tensors[name].shape != mask.shape:
                shapes = f"{tuple(mask.shape)}, the network's tensor {tuple(tensors[name].shape)}"
                raise InputError(f"the mask of {name!r} has shape {shapes}")

    def apply_(self, model: nn.Module) -> dict[str, int]:
        """Set every masked entry of the network to exactly zero, in place.

        Returns:
            Tensor name -> number of its masked entries that were not zero before; only where there were some.

        Raises:
            InputError: The masks do not fit the network.
        """
        self.check(model)
        tensors = model.state_dict()
        changed: dict[str, int] = {}
        for name, mask in self.items():
            tensor, masked = tensors[name], ~mask.to(tensors[name].device)
            if disagreeing := int((tensor[masked] != 0).sum()):
                changed[name] = disagreeing
            # Filled, not multiplied: NaN times zero is NaN.
            tensor.masked_fill_(masked, 0)
        return changed

    def count(self, model: nn.Module) -> Count:
        """Count the connections of the network, and those that these masks keep."""
        layers = self.count_layers(model).values()
        return Count(sum(layer.dense for layer in layers), sum(layer.kept for layer in layers))

    def count_layers(self, model: nn.Module) -> dict[str, Count]:
        """Count the connections of each linear and convolution layer; a shared parameter counts once.

        Raises:
            InputError: A weight or bias is computed from other tensors.
        """
        counts: dict[str, Count] = {}
        seen: set[int] = set()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for name, layer in connected_layers(model):
            own = [t for t in own_tensors(name, layer).values() if id(t) not in seen]
            seen.update(id(t) for t in own)
            kept = sum(int(self[n].sum()) if (n := names[id(t)]) in self else t.numel() for t in own)
            counts[name] = Count(sum(t.numel() for t in own), kept)
        return counts

    def save(self, path: Path, weights: Path | None = None) -> None:
        """Write the masks to ``path``, atomically; the same masks give the same bytes.

        Args:
            path: The file to write.
            weights: The weights file that the masks belong to.
        """
        belongs = records.sha256(weights) if weights else None
        about = {"format": FORMAT, "version": VERSION, "weights_sha256": belongs, "masks_sha256": _digest(self)}
        # One metadata entry only: safetensors writes several in an order that changes from run to run.
        data = safetensors.torch.save(
            {name: self[name].contiguous() for name in sorted(self)}, {"relief_export": json.dumps(about)}
        )
        records.write_bytes(path, data)

    @classmethod
    def load(cls, path: Path, weights: Path | None = None) -> Masks:
        """Read masks written by `save`.

        Args:
            path: The file.
            weights: Refuse the masks where they belong to other weights than this file; None does not check.

        Raises:
            InputError: There is no such file.
            IntegrityError: The file is damaged, foreign, of another version, or belongs to other weights.
        """
        about = _read_about(path)
        if about.get("format") != FORMAT or about.get("version") != VERSION:
            raise IntegrityError(f"{path} is not a file of masks of version {VERSION}: write it with this program")
        if weights is not None and about.get("weights_sha256") != records.sha256(weights):
            raise IntegrityError(
                f"{path} belongs to other weights than {weights}: use the pair that was written together"
            )
        tensors = safetensors.torch.load_file(path)
        if foreign := next((name for name, mask in tensors.items() if mask.dtype != torch.bool), None):
            raise IntegrityError(f"{path}: the mask of {foreign!r} is {tensors[foreign].dtype}, not bool")
        if about.get("masks_sha256") != _digest(tensors):
            raise IntegrityError(f"{path} is damaged: its masks are not those that were written; make it again")
        return cls(tensors)


def _digest(masks: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of names, shapes and entries: safetensors notices no flipped bit."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(f"{name} {tuple(masks[name].shape)}\n".encode())
        digest.update(masks[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_about(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("relief_export", "{}"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise IntegrityError(f"{path} is not a whole safetensors file ({error})") from None
    return about if isinstance(about, dict) else {}
