"""Where data sets lie and how their files are read: one function a source, all in the table ``SOURCES``.

A data root is RELIEF_DATA, else the recipe's ``data.root``, else the user's cache. It may be read-only.
"""

from __future__ import annotations

import gzip
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from relief_export.errors import InputError, IntegrityError, MissingExtraError
from relief_export.training.pixels import FilePixels, MemoryPixels, cache_folder, resized
from relief_export.training.vision import import_torchvision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from relief_export.recipe import DataConfig

_DIGITS_SIDE = 28
_DIGITS_TEST = 360
_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
_FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Raw:
    """Labelled pictures before anything is chosen: ``labels`` is ``(N,)`` int64."""

    pixels: MemoryPixels | FilePixels
    labels: torch.Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


def data_root(config: DataConfig) -> Path:
    """Return the folder under which data sets are looked for.

    Raises:
        InputError: A root was named but does not exist.
    """
    named = os.environ.get("RELIEF_DATA") or config.root
    if named is None:
        return cache_folder()
    root = Path(named).expanduser()
    if not root.is_dir():
        origin = "RELIEF_DATA" if os.environ.get("RELIEF_DATA") else "data.root"
        raise InputError(f"the data root {root} does not exist: set {origin} to the folder that holds the data sets")
    return root


def spread(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Choose ``count`` of the samples, each class by its share (within one sample); return their indices, ascending.

    The samples are put in random order, then grouped by class; ``count`` equidistant places of that list are taken.
    """
    total = len(labels)
    if count >= total:
        return torch.arange(total)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    grouped = order[labels[order].sort(stable=True).indices]
    places = (torch.arange(count) * 2 + 1) * total // (2 * count)
    return grouped[places].sort().values


def _digits(config: DataConfig) -> tuple[Raw, Raw]:
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415  # only this source needs it
    except ModuleNotFoundError:
        raise MissingExtraError('data.source = "digits"', "scikit-learn") from None
    bunch = load_digits()
    scans = torch.from_numpy(bunch.images).float().mul(255 / 16).round().byte()[:, None]
    pixels = resized(scans, config.size or _DIGITS_SIDE)
    labels = torch.from_numpy(bunch.target).long()
    test = torch.zeros(len(labels), dtype=torch.bool)
    test[spread(labels, _DIGITS_TEST, seed=0)] = True  # a fixed split, whatever the recipe's seed
    names = tuple(str(digit) for digit in range(10))
    return tuple(Raw(MemoryPixels(pixels[part]), labels[part], names) for part in (~test, test))  # type: ignore[return-value]


def _idx(config: DataConfig, *, dataset: str, folders: tuple[str | Path, ...]) -> tuple[Raw, Raw]:
    """Read the four IDX files of MNIST or a relative of it."""
    root = data_root(config)
    places = [root / folder for folder in folders]
    found = next((place for place in places if _idx_file(place, "train-images-idx3-ubyte")), None)
    if found is None:
        found = _download(root, dataset) / dataset / "raw"
    return _idx_part(found, "train", config), _idx_part(found, "t10k", config)


def _idx_part(folder: Path, part: str, config: DataConfig) -> Raw:
    images = read_idx(_idx_file(folder, f"{part}-images-idx3-ubyte") or folder / f"{part}-images-idx3-ubyte")
    labels = read_idx(_idx_file(folder, f"{part}-labels-idx1-ubyte") or folder / f"{part}-labels-idx1-ubyte")
    if len(images) != len(labels):
        raise IntegrityError(f"{folder} has {len(images)} {part} images but {len(labels)} labels")
    pixels = resized(torch.from_numpy(images)[:, None], config.size)
    return Raw(MemoryPixels(pixels), torch.from_numpy(labels).long(), tuple(str(label) for label in range(10)))


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read an IDX file of unsigned bytes, gzipped or not.

    Raises:
        InputError: There is no such file.
        IntegrityError: The file is truncated, damaged or not IDX.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, rank = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{rank}I", content, 4)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist (nor {path.name}.gz)") from None
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise IntegrityError(f"{path} is not a whole IDX file ({error}): fetch it again") from None
    offset = 4 + 4 * rank
    if zero != 0 or kind != 0x08 or len(content) - offset != np.prod(shape, dtype=np.int64):
        raise IntegrityError(f"{path} is not a whole IDX file of bytes: fetch it again")
    return np.frombuffer(content, np.uint8, offset=offset).reshape(shape).copy()


def _cifar(config: DataConfig, *, dataset: str, folder: str, batches: str) -> tuple[Raw, Raw]:
    """Read a CIFAR from a tree or zips of pictures, or as torchvision stores it."""
    root = data_root(config)
    if (root / folder).is_dir():
        return _tree(root / folder, config)
    place = root if (root / batches).is_dir() else _download(root, dataset)
    # torchvision compares each batch file with its known MD5 before it unpickles it.
    kind = getattr(import_torchvision().datasets, dataset)
    try:
        parts = [kind(place, train=train, download=False) for train in (True, False)]
    except RuntimeError:
        raise IntegrityError(f"{place / batches} is damaged or incomplete: remove it and fetch it again") from None
    return tuple(
        Raw(
            MemoryPixels(resized(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), config.size)),
            torch.tensor(part.targets),
            tuple(part.classes),
        )
        for part in parts
    )  # type: ignore[return-value]


def _folder(config: DataConfig) -> tuple[Raw, Raw]:
    if config.folder is None:
        raise InputError('data.source = "folder" needs data.folder, the tree of train/CLASS/ and test/CLASS/ pictures')
    return _tree(data_root(config) / Path(config.folder).expanduser(), config)


def _tiny_imagenet(config: DataConfig) -> tuple[Raw, Raw]:
    return _tree(data_root(config) / "tiny-imagenet-200", config)


def _tree(folder: Path, config: DataConfig) -> tuple[Raw, Raw]:
    """Read picture trees PART/CLASS/…, archives PART.zip and PART-N.zip of them, and Tiny-ImageNet's labelled val/."""
    if not folder.is_dir():
        raise InputError(
            f"there is no {folder}: put the {config.source} pictures there, or set RELIEF_DATA to another root"
        )
    annotations = folder / "val" / "val_annotations.txt"
    train = _members(folder, "train")
    test = _annotated(annotations) if annotations.is_file() else _members(folder, "test") or _members(folder, "val")
    for part, members in (("train", train), ("test", test)):
        if not members:
            raise InputError(f"{folder} has no {part}/CLASS/ pictures (nor {part}.zip)")
    classes = tuple(sorted({name for name, _ in train}))
    unknown = {name for name, _ in test} - set(classes)
    if unknown:
        raise InputError(f'{folder} has test pictures of class "{min(unknown)}", which has no training pictures')
    return _raw(train, classes, config), _raw(test, classes, config)


Member = tuple[str, tuple[str, str]]
"""Class name, and where the picture lies: (folder or archive, name in it)."""


def _raw(members: list[Member], classes: tuple[str, ...], config: DataConfig) -> Raw:
    numbers = {name: number for number, name in enumerate(classes)}
    labels = torch.tensor([numbers[name] for name, _ in members])
    return Raw(FilePixels(tuple(file for _, file in members), config.size), labels, classes)


def _members(folder: Path, part: str) -> list[Member]:
    return sorted(_found(folder, part))


def _found(folder: Path, part: str) -> Iterator[Member]:
    for path in (folder / part).rglob("*") if (folder / part).is_dir() else ():
        inside = path.relative_to(folder / part).parts
        if len(inside) > 1 and path.suffix.lower() in _PICTURES:
            yield inside[0], (str(folder), str(path.relative_to(folder)))
    for archive in (*folder.glob(f"{part}.zip"), *folder.glob(f"{part}-*.zip")):
        try:
            with zipfile.ZipFile(archive) as opened:
                names = opened.namelist()
        except (zipfile.BadZipFile, OSError) as error:
            raise IntegrityError(f"{archive} is not a whole zip archive ({error}): fetch it again") from None
        for name in names:
            pieces = Path(name).parts
            if len(pieces) > 2 and pieces[0] == part and Path(name).suffix.lower() in _PICTURES:
                yield pieces[1], (str(archive), name)


def _annotated(annotations: Path) -> list[Member]:
    """Read Tiny-ImageNet's list: picture, class and box, separated by tabs."""
    rows = [line.split("\t") for line in annotations.read_text().splitlines() if line]
    return [(row[1], (str(annotations.parent / "images"), row[0])) for row in rows]


def _download(root: Path, dataset: str) -> Path:
    """Fetch a torchvision data set into ``root`` where it may be written, else into the cache; return the folder."""
    target = root if os.access(root, os.W_OK) else cache_folder()
    target.mkdir(parents=True, exist_ok=True)
    kind = getattr(import_torchvision().datasets, dataset)
    try:
        for train in (True, False):
            kind(target, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{dataset} is not under {root} and could not be downloaded ({error}): "
            "set RELIEF_DATA to the folder that holds it"
        ) from None
    return target


SOURCES: dict[str, Callable[[DataConfig], tuple[Raw, Raw]]] = {
    "digits": _digits,
    "mnist": partial(_idx, dataset="MNIST", folders=("MNIST/raw", "mnist", "mnist/raw")),
    "fashion-mnist": partial(
        _idx, dataset="FashionMNIST", folders=("FashionMNIST/raw", "fashion-mnist", _FASHION_DEBIAN)
    ),
    "cifar10": partial(_cifar, dataset="CIFAR10", folder="cifar10", batches="cifar-10-batches-py"),
    "cifar100": partial(_cifar, dataset="CIFAR100", folder="cifar100", batches="cifar-100-python"),
    "tiny-imagenet": _tiny_imagenet,
    "folder": _folder,
}
"""Name of a source -> its training and test samples."""
