"""Pictures by number, held in one tensor or decoded from files when asked for."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

from relief_export.errors import InputError, IntegrityError
from relief_export.records import atomic_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_CHANNELS = 3
_WORKERS = 8


class Pixels(Protocol):
    """Pictures by number: ``(N, C, H, W)`` uint8, or ready float32 inputs of any shape."""

    def batches(self, rows: Iterable[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
        """Yield the pictures of each of ``rows`` (numbers, on the CPU), on ``device``."""
        ...


class MemoryPixels:
    """Pictures in one tensor, copied once to each device that asks."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._copies = {tensor.device: tensor}

    def batches(self, rows: Iterable[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
        """Yield the pictures of each of ``rows``, on ``device``."""
        if device not in self._copies:
            self._copies[device] = self.tensor.to(device)
        for numbers in rows:
            yield self._copies[device][numbers.to(device)]


@dataclass(frozen=True)
class FilePixels(Dataset[torch.Tensor]):
    """Picture files, each decoded to RGB, cut to a centred square where needed and resized to ``side``.

    Attributes:
        files: Path of each picture, or (archive, name in it).
        side: None where all pictures have one size.
    """

    files: tuple[tuple[str, str], ...]
    side: int | None = None
    _archives: dict[str, zipfile.ZipFile] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.files)

    def __getstate__(self) -> dict[str, object]:
        # An open file cannot be pickled, and a shared one would share its position.
        return self.__dict__ | {"_archives": {}}  # worker processes open their own

    def __getitem__(self, number: int) -> torch.Tensor:
        """Return the picture ``number`` as ``(3, H, W)`` uint8.

        Raises:
            IntegrityError: The file is not a readable picture.
        """
        container, name = self.files[number]
        try:
            source = Path(container) / name if Path(container).is_dir() else io.BytesIO(self._read(container, name))
            with Image.open(source) as picture:
                rgb = picture.convert("RGB")
        # Pillow raises SyntaxError, too, for some damaged files.
        except (UnidentifiedImageError, OSError, zipfile.BadZipFile, SyntaxError) as error:
            raise IntegrityError(f"{container}/{name} is not a readable picture ({error})") from None
        if self.side is not None and rgb.size != (self.side, self.side):
            rgb = ImageOps.fit(rgb, (self.side, self.side), Image.Resampling.BILINEAR)
        # np.array copies, while np.asarray would give a read-only view of the picture.
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)

    def _read(self, container: str, name: str) -> bytes:
        if container not in self._archives:
            self._archives[container] = zipfile.ZipFile(container)
        return self._archives[container].read(name)

    @property
    def nbytes(self) -> int:
        """Bytes of all pictures once decoded."""
        return len(self) * self[0].numel()

    def decode(self, numbers: torch.Tensor) -> torch.Tensor:
        """Decode pictures into one ``(N, 3, H, W)`` uint8 tensor.

        Raises:
            InputError: The pictures have different sizes.
        """
        first = self[int(numbers[0])]
        decoded = torch.empty((len(numbers), *first.shape), dtype=torch.uint8)

        def place(row: int) -> None:
            picture = self[int(numbers[row])]
            if picture.shape != first.shape:
                container, name = self.files[int(numbers[row])]
                sizes = f"{tuple(picture.shape[1:])}, others {tuple(first.shape[1:])}"
                raise InputError(f"{container}/{name} has size {sizes}: set data.size to one side for all")
            decoded[row] = picture

        # Threads are enough here: Pillow releases the interpreter's lock while it decodes.
        with ThreadPoolExecutor(_processors()) as pool:
            # The list asks for every result, so that an error in a thread is raised here.
            list(pool.map(place, range(len(numbers)), chunksize=64))
        return decoded

    def batches(self, rows: Iterable[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
        """Yield the pictures of each of ``rows``, on ``device``, decoded ahead by worker processes."""
        order = [numbers.tolist() for numbers in rows]
        # For a few batches the start of a process costs more than it saves: then this process decodes.
        workers = min(_WORKERS, _processors(), len(order) // 4)
        pinned = device.type == "cuda"
        for pictures in DataLoader(self, batch_sampler=order, num_workers=workers, pin_memory=pinned):
            yield pictures.to(device, non_blocking=pinned)


def _processors() -> int:
    """Return the processors that this process may run on, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cached(pixels: FilePixels) -> torch.Tensor:
    """Decode all pictures, or read what an earlier run decoded from the same files.

    The copy is in the user's cache, named after every file's path, size and time; a data root is never written.
    """
    stamps = {container: _stamp(Path(container)) for container, _ in pixels.files if not Path(container).is_dir()}
    key = hashlib.sha256(repr((pixels.side, pixels.files, stamps)).encode())
    for container, name in pixels.files:
        if container not in stamps:
            key.update(repr(_stamp(Path(container) / name)).encode())
    path = cache_folder() / "decoded" / f"{key.hexdigest()[:32]}.safetensors"
    try:
        return load_file(path)["pixels"]
    # A damaged copy is no error of the user's: it is made again and replaced.
    except (OSError, SafetensorError):
        decoded = pixels.decode(torch.arange(len(pixels)))
    with atomic_path(path) as temporary:
        save_file({"pixels": decoded}, temporary)
    return decoded


def cache_folder() -> Path:
    """Return the folder for downloads and decoded pictures: XDG_CACHE_HOME or ~/.cache, then relief-export."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relief-export"


def resized(pixels: torch.Tensor, side: int | None) -> torch.Tensor:
    """Resize uint8 pictures ``(N, C, H, W)`` to ``side`` x ``side``, bilinear; None keeps them."""
    if side is None or tuple(pixels.shape[2:]) == (side, side):
        return pixels
    scaled = F.interpolate(pixels.float(), (side, side), mode="bilinear", antialias=True)
    return scaled.round().clamp(0, 255).byte()


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
