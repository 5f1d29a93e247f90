"""Which inputs of the network are still read, from the mask of its first layer."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from relief_export.errors import IntegrityError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_HEADER = 8  # bytes: the length of the header, little-endian


@dataclass(frozen=True)
class InputUse:
    """How many connections of the first layer read each input.

    Attributes:
        pixels: (height, width), connections over all channels, where the first layer is linear on pictures; else empty.
        channels: Connections (kernels, for a convolution) that read each channel, and how many there were of each.
    """

    pixels: tuple[tuple[int, ...], ...]
    channels: tuple[tuple[int, int], ...]


def input_use(masks: Path, layer: str, shape: tuple[int, ...]) -> InputUse | None:
    """Count the connections kept per input of the first layer.

    Args:
        masks: The file of masks, safetensors; None is returned where it is absent or has no mask of the layer.
        layer: Name of the first layer; its mask is that of ``layer.weight``: (out, in) or (out, in, kh, kw).
        shape: Shape of one input sample, (channels, height, width) or (features,).

    Raises:
        IntegrityError: The file is damaged.
    """
    mask = _read_mask(masks, f"{layer}.weight") if masks.is_file() else None
    if mask is None or mask.ndim not in (2, 4):
        return None
    if mask.ndim == 4:  # a connection is a whole kernel
        kernels = mask.any(axis=(2, 3))
        return InputUse((), tuple((int(count), kernels.shape[0]) for count in kernels.sum(axis=0)))
    if mask.shape[1] != math.prod(shape):
        return None
    counts = mask.sum(axis=0).reshape(shape)
    if counts.ndim != 3:
        return InputUse((), tuple((int(count), mask.shape[0]) for count in counts.ravel()))
    area = mask.shape[0] * counts[0].size
    pixels = tuple(tuple(int(count) for count in row) for row in counts.sum(axis=0))
    return InputUse(pixels, tuple((int(count), area) for count in counts.sum(axis=(1, 2))))


def _read_mask(path: Path, name: str) -> NDArray[np.bool_] | None:
    """Read one boolean tensor of a safetensors file: a length, a JSON header, the bytes.

    NumPy alone does it, because the reader of the library comes with an extra that a report does not need.
    """
    data = path.read_bytes()
    try:
        end = _HEADER + int.from_bytes(data[:_HEADER], "little")
        entry = json.loads(data[_HEADER:end]).get(name)
        if entry is None:
            return None
        first, last = (end + offset for offset in entry["data_offsets"])
        return np.frombuffer(data[first:last], np.uint8).reshape(entry["shape"]).astype(bool)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{path} is not a whole safetensors file ({error}): run the stage 'relieve' again"
        ) from None
