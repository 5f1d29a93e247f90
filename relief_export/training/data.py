"""Data sets: where they lie, how their files are read, and their three splits in batches on the training device.

x = (pixels / 255 - mean) / std

Small sets live as uint8 on the device, larger ones are decoded by worker processes; crop, flip and normalisation are
tensor operations on a whole batch either way. The validation split is cut from the training set, stratified and seeded;
the test set is only ever measured.

The table ``SOURCES`` names the data sets. They are looked for under a data root: RELIEF_DATA, else the recipe's
``data.root``, else the user's cache. It may be read-only.
"""

from __future__ import annotations

import gzip
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it

from relief_export.errors import InputError, IntegrityError, MissingExtraError
from relief_export.training import distributed
from relief_export.training.pixels import FilePixels, MemoryPixels, cache_folder, cached, resized
from relief_export.training.vision import import_torchvision

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relief_export.recipe import DataConfig
    from relief_export.training.pixels import Pixels

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_PADDING = 4
MEMORY_LIMIT = 2 << 30
"""Bytes of pixels up to which placement "auto" keeps a data set in memory."""
_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


@dataclass(frozen=True)
class Raw:
    """Labelled pictures before anything is chosen: ``labels`` is ``(N,)`` int64."""

    pixels: MemoryPixels | FilePixels
    labels: torch.Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Split:
    """Samples of one split.

    Attributes:
        pixels: Pictures before normalisation; ``indices`` are their numbers that belong to this split.
        labels: ``(N,)`` int64 of this split's samples, on the CPU.
        mean, std: Of each channel, empty for none.
    """

    pixels: Pixels
    indices: torch.Tensor
    labels: torch.Tensor
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor) -> Split:
        """Make a split of ready inputs ``x: (N, ...)`` float32, or uint8 pictures, and labels ``y: (N,)``."""
        if len(x) != len(y):
            raise InputError(f"there are {len(x)} inputs but {len(y)} labels")
        return cls(MemoryPixels(x), torch.arange(len(x)), y.long().cpu())

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, count: int, *, seed: int) -> Split:
        """Return ``count`` samples of this split, stratified and drawn by ``seed``, or all where there are no more."""
        chosen = stratified(self.labels, count, seed)
        return Split(self.pixels, self.indices[chosen], self.labels[chosen], self.mean, self.std)

    def steps(self, size: int, *, world: int = 1) -> int:
        """Return how many shuffled batches of ``size`` samples ``batches`` yields to each of ``world`` processes."""
        # Rounded up: the last batch may be a smaller one.
        count = -(-len(self) // size)
        last = len(self) - (count - 1) * size
        # Batch norm cannot normalise a single sample: a last batch with less than two a process is left out.
        return count - (last < 2 * world) if count else 0

    def batches(
        self,
        size: int,
        *,
        shuffle: torch.Generator | None = None,
        augment: bool = False,
        shift: int = 0,
        device: torch.device | str = "cpu",
        shard: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield inputs ``(n, C, H, W)`` float32 and labels ``(n,)`` on ``device``.

        Args:
            size: Samples of a batch over all shards.
            shuffle: A generator on the CPU draws the order, and the crops and flips; None keeps the order.
            augment: Random crop with padding 4 and horizontal flip; needs ``shuffle``.
            shift: Without ``augment``, random shift of up to so many pixels in both directions; needs ``shuffle``.
            device: Where the batches are wanted.
            shard: (rank, world): this process's samples of each batch, every ``world``-th from ``rank`` on.
        """
        device = torch.device(device)
        rank, world = shard
        order = torch.arange(len(self)) if shuffle is None else torch.randperm(len(self), generator=shuffle)
        chunks = torch.split(order, size)
        if shuffle is not None:
            # Only where samples are shuffled, as for training: a measurement leaves out none.
            chunks = chunks[: self.steps(size, world=world)]
        # Every world-th sample, so that the shares of a batch differ by one sample at most, the last batch's too.
        mine = [chunk[rank::world] for chunk in chunks]
        # A generator, so that pictures in memory are fetched batch by batch.
        pictures = self.pixels.batches((self.indices[rows] for rows in mine), device)
        for chunk, rows, found in zip(chunks, mine, pictures, strict=True):
            if padding := CROP_PADDING if augment else shift:
                if found.ndim != 4:
                    raise InputError(f"samples of shape {tuple(found.shape[1:])} are no pictures: nothing to shift")
                # Drawn for the whole batch, so that one process and several see the same pictures.
                moves = torch.randint(0, 2 * padding + 1, (2, len(chunk)), generator=shuffle)[:, rank::world]
                flips = torch.randint(0, 1 + augment, (len(chunk),), generator=shuffle)[rank::world]
                found = crop_and_flip(found, moves[0], moves[1], flips == 1, padding=padding)  # noqa: PLW2901
            yield self._normalized(found), self.labels[rows].to(device)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all inputs and labels, on the CPU."""
        parts = list(self.batches(1000))
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    def _normalized(self, pixels: torch.Tensor) -> torch.Tensor:
        x = pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels
        if self.mean:
            shape = (1, -1, 1, 1)
            # Not in place: float samples are handed through as they are, and may be the caller's own tensor.
            x = (x - x.new_tensor(self.mean).view(shape)) / x.new_tensor(self.std).view(shape)
        return x


@dataclass(frozen=True)
class DataSet:
    """Three splits of the same kind of sample."""

    train: Split
    validation: Split
    test: Split
    classes: int
    input_shape: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    augment: bool = False


def load_data(config: DataConfig, seed: int) -> DataSet:
    """Load the data set of a recipe; ``seed`` draws the validation split.

    Raises:
        InputError: The data are not where they should be, or do not fit the recipe.
        IntegrityError: A file of the data set is damaged.
    """
    if ":" in config.source:
        from relief_export.training.own import load_own_data  # noqa: PLC0415  # it is made of what stands here

        return load_own_data(config, seed)
    # Downloading and decoding write files that the other processes then only read.
    with distributed.main_first():
        raw_train, raw_test = SOURCES[config.source].load(config)
        held_out = (
            config.validation if isinstance(config.validation, int) else round(config.validation * len(raw_train))
        )
        if not 0 < held_out < len(raw_train):
            raise InputError(
                f"data.validation = {config.validation} cannot be cut from {len(raw_train)} training samples"
            )
        chosen = torch.zeros(len(raw_train), dtype=torch.bool)
        chosen[stratified(raw_train.labels, held_out, seed)] = True
        rows = (~chosen).nonzero().flatten(), chosen.nonzero().flatten(), torch.arange(len(raw_test))
        # Placed once, before the splits are cut, so that training and validation share one tensor of pixels.
        train, test = _placed(raw_train, config), _placed(raw_test, config)
        splits = [_split(raw, part, config, seed) for raw, part in zip((train, train, test), rows, strict=True)]
    shape = tuple(next(splits[0].batches(1))[0].shape[1:])
    names = raw_train.classes
    return DataSet(splits[0], splits[1], splits[2], len(names), shape, names, config.augment)


def _placed(raw: Raw, config: DataConfig) -> Raw:
    """Decode the files of a small data set into memory; a limited one is decoded after the limit."""
    pixels = raw.pixels
    # Decoding all pictures for a few of them would make a trial as slow as a whole run.
    if not isinstance(pixels, FilePixels) or config.limit or _streams(pixels, config):
        return raw
    return replace(raw, pixels=MemoryPixels(cached(pixels)))


def _streams(pixels: FilePixels, config: DataConfig) -> bool:
    return config.placement == "stream" or (config.placement == "auto" and pixels.nbytes > MEMORY_LIMIT)


def _split(raw: Raw, rows: torch.Tensor, config: DataConfig, seed: int) -> Split:
    if config.limit:
        # After the validation split was cut, so that the splits stay apart whatever the limit.
        rows = rows[stratified(raw.labels[rows], config.limit, seed)]
    labels, pixels = raw.labels[rows], raw.pixels
    if isinstance(pixels, FilePixels) and config.limit and not _streams(pixels, config):
        pixels, rows = MemoryPixels(pixels.decode(rows)), torch.arange(len(rows))
    channels = pixels.tensor.shape[1] if isinstance(pixels, MemoryPixels) else len(IMAGENET_MEAN)
    if config.normalize == "imagenet" and channels != len(IMAGENET_MEAN):
        raise InputError(
            f'data.normalize = "imagenet" needs colour pictures, but {config.source} has {channels} channel'
        )
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if config.normalize == "imagenet" else ((), ())
    return Split(pixels, rows, labels, mean, std)


def crop_and_flip(
    pixels: torch.Tensor, down: torch.Tensor, right: torch.Tensor, flip: torch.Tensor, *, padding: int = CROP_PADDING
) -> torch.Tensor:
    """Pad pictures ``(N, C, H, W)`` by zeros, cut them out from (``down``, ``right``), and mirror where ``flip``."""
    device, (count, channels, height, width) = pixels.device, pixels.shape
    rows = down[:, None] + torch.arange(height)  # (N, H)
    columns = torch.arange(width).expand(count, width)
    # Mirroring is an order of columns, so crop and flip cost one gather instead of two passes.
    columns = right[:, None] + torch.where(flip[:, None], columns.flip(1), columns)  # (N, W)
    padded = F.pad(pixels, (padding,) * 4)
    samples = torch.arange(count, device=device)[:, None, None, None]
    planes = torch.arange(channels, device=device)[None, :, None, None]
    return padded[samples, planes, rows.to(device)[:, None, :, None], columns.to(device)[:, None, None, :]]


def stratified(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Choose ``count`` of the samples, each class by its share (within one sample); return their indices, ascending.

    The samples are put in random order, then grouped by class; ``count`` equidistant places of that list are taken.
    """
    total = len(labels)
    if count >= total:
        return torch.arange(total)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    # A stable sort keeps the random order within each class.
    grouped = order[labels[order].sort(stable=True).indices]
    # The middles of equal parts, in whole numbers: exact, and no class at either end is favoured.
    places = (torch.arange(count) * 2 + 1) * total // (2 * count)
    return grouped[places].sort().values


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


class Source(Protocol):
    """A kind of data set: how its files lie on the disk and are read."""

    def load(self, config: DataConfig) -> tuple[Raw, Raw]:
        """Return the training and the test samples."""
        ...


@dataclass(frozen=True)
class Digits:
    """The 1,797 scans that come with scikit-learn, enlarged to ``side``; the ``test`` samples are always the same."""

    side: int = 28
    test: int = 360

    def load(self, config: DataConfig) -> tuple[Raw, Raw]:
        """Return the training and the test samples."""
        try:
            from sklearn.datasets import load_digits  # noqa: PLC0415  # only this source needs it
        except ModuleNotFoundError:
            raise MissingExtraError('data.source = "digits"', "scikit-learn") from None
        bunch = load_digits()
        # The scans have levels 0 to 16: stretched to a byte, they are prepared like any other pictures.
        scans = torch.from_numpy(bunch.images).float().mul(255 / 16).round().byte()[:, None]
        pixels = resized(scans, config.size or self.side)
        labels = torch.from_numpy(bunch.target).long()
        test = torch.zeros(len(labels), dtype=torch.bool)
        test[stratified(labels, self.test, seed=0)] = True  # a fixed split, whatever the recipe's seed
        names = tuple(str(digit) for digit in range(10))
        return tuple(Raw(MemoryPixels(pixels[part]), labels[part], names) for part in (~test, test))  # type: ignore[return-value]


@dataclass(frozen=True)
class IdxFiles:
    """MNIST or a relative of it: four IDX files in one of ``folders`` (of the data root), else downloaded."""

    dataset: str
    folders: tuple[str | Path, ...]

    def load(self, config: DataConfig) -> tuple[Raw, Raw]:
        """Return the training and the test samples."""
        root = data_root(config)
        places = [root / folder for folder in self.folders]
        found = next((place for place in places if _idx_file(place, "train-images-idx3-ubyte")), None)
        if found is None:
            found = _download(root, self.dataset) / self.dataset / "raw"
        return _idx_part(found, "train", config), _idx_part(found, "t10k", config)


@dataclass(frozen=True)
class Cifar:
    """A CIFAR: a tree or zips of pictures in ``folder``, else torchvision's pickled ``batches``, else downloaded."""

    dataset: str
    folder: str
    batches: str

    def load(self, config: DataConfig) -> tuple[Raw, Raw]:
        """Return the training and the test samples."""
        root = data_root(config)
        if (root / self.folder).is_dir():
            return _tree(root / self.folder, config)
        place = root if (root / self.batches).is_dir() else _download(root, self.dataset)
        # torchvision compares each batch file with its known MD5 before it unpickles it.
        kind = getattr(import_torchvision().datasets, self.dataset)
        try:
            parts = [kind(place, train=train, download=False) for train in (True, False)]
        except RuntimeError:
            raise IntegrityError(
                f"{place / self.batches} is damaged or incomplete: remove it and fetch it again"
            ) from None
        return tuple(
            Raw(
                MemoryPixels(resized(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), config.size)),
                torch.tensor(part.targets),
                tuple(part.classes),
            )
            for part in parts
        )  # type: ignore[return-value]


@dataclass(frozen=True)
class PictureTree:
    """Pictures by class in a folder of the data root: ``folder``, or the recipe's own where it is None."""

    folder: str | None = None

    def load(self, config: DataConfig) -> tuple[Raw, Raw]:
        """Return the training and the test samples."""
        if (given := self.folder or config.folder) is None:
            raise InputError(
                'data.source = "folder" needs data.folder, the tree of train/CLASS/ and test/CLASS/ pictures'
            )
        return _tree(data_root(config) / Path(given).expanduser(), config)


SOURCES: dict[str, Source] = {
    "digits": Digits(),
    "mnist": IdxFiles("MNIST", ("MNIST/raw", "mnist", "mnist/raw")),
    "fashion-mnist": IdxFiles(
        "FashionMNIST", ("FashionMNIST/raw", "fashion-mnist", Path("/usr/share/datasets/fashion-mnist"))
    ),
    "cifar10": Cifar("CIFAR10", "cifar10", "cifar-10-batches-py"),
    "cifar100": Cifar("CIFAR100", "cifar100", "cifar-100-python"),
    "tiny-imagenet": PictureTree("tiny-imagenet-200"),
    "folder": PictureTree(),
}
"""``data.source`` -> where and how it is read. A new data set is a row, or a small class and a row."""


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
    # The product is taken in 64 bits: a damaged header may claim a size that overflows a smaller integer.
    if zero != 0 or kind != 0x08 or len(content) - offset != np.prod(shape, dtype=np.int64):
        raise IntegrityError(f"{path} is not a whole IDX file of bytes: fetch it again")
    # A copy, because an array over bytes cannot be written to, which torch.from_numpy warns of.
    return np.frombuffer(content, np.uint8, offset=offset).reshape(shape).copy()


def _tree(folder: Path, config: DataConfig) -> tuple[Raw, Raw]:
    """Read picture trees PART/CLASS/…, archives PART.zip and PART-N.zip of them, and Tiny-ImageNet's labelled val/."""
    if not folder.is_dir():
        raise InputError(
            f"there is no {folder}: put the {config.source} pictures there, or set RELIEF_DATA to another root"
        )
    # The test pictures of Tiny-ImageNet have no labels, so its validation pictures are the test set.
    annotations = folder / "val" / "val_annotations.txt"
    train = _members(folder, "train")
    test = _annotated(annotations) if annotations.is_file() else _members(folder, "test") or _members(folder, "val")
    for part, members in (("train", train), ("test", test)):
        if not members:
            raise InputError(f"{folder} has no {part}/CLASS/ pictures (nor {part}.zip)")
    classes = tuple(sorted({name for name, _ in train}))
    # A class without training pictures has no number, and could never be predicted.
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
    # The order of a folder's listing differs from one file system to another, and samples are drawn by number.
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
    # A data root may be shared and read-only.
    target = root if os.access(root, os.W_OK) else cache_folder()
    target.mkdir(parents=True, exist_ok=True)
    kind = getattr(import_torchvision().datasets, dataset)
    try:
        # Both parts here, so that a missing one is noticed before anything is trained.
        for train in (True, False):
            kind(target, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{dataset} is not under {root} and could not be downloaded ({error}): "
            "set RELIEF_DATA to the folder that holds it"
        ) from None
    return target
