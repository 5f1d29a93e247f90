"""Data sets as three splits, prepared in batches on the training device.

x = (pixels / 255 - mean) / std

Small sets live as uint8 on the device, larger ones are decoded by worker processes; crop, flip and normalisation are
tensor operations on a whole batch either way. The validation split is cut from the training set, stratified and seeded;
the test set is only ever measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it

from relief_export.errors import InputError
from relief_export.training import distributed
from relief_export.training.pixels import FilePixels, MemoryPixels, cached
from relief_export.training.sources import SOURCES, spread

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relief_export.recipe import DataConfig
    from relief_export.training.pixels import Pixels
    from relief_export.training.sources import Raw

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_PADDING = 4
MEMORY_LIMIT = 2 << 30
"""Bytes of pixels up to which placement "auto" keeps a data set in memory."""


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
        chosen = spread(self.labels, count, seed)
        return Split(self.pixels, self.indices[chosen], self.labels[chosen], self.mean, self.std)

    def steps(self, size: int, *, world: int = 1) -> int:
        """Return how many shuffled batches of ``size`` samples ``batches`` yields to each of ``world`` processes."""
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
        device: torch.device | str = "cpu",
        shard: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield inputs ``(n, C, H, W)`` float32 and labels ``(n,)`` on ``device``.

        Args:
            size: Samples of a batch over all shards.
            shuffle: A generator on the CPU draws the order, and the crops and flips; None keeps the order.
            augment: Random crop with padding 4 and horizontal flip; needs ``shuffle``.
            device: Where the batches are wanted.
            shard: (rank, world): this process's samples of each batch, every ``world``-th from ``rank`` on.
        """
        device = torch.device(device)
        rank, world = shard
        order = torch.arange(len(self)) if shuffle is None else torch.randperm(len(self), generator=shuffle)
        chunks = torch.split(order, size)
        if shuffle is not None:
            chunks = chunks[: self.steps(size, world=world)]
        mine = [chunk[rank::world] for chunk in chunks]
        pictures = self.pixels.batches((self.indices[rows] for rows in mine), device)
        for chunk, rows, found in zip(chunks, mine, pictures, strict=True):
            if augment:
                # Drawn for the whole batch, so that one process and several see the same pictures.
                moves = torch.randint(0, 2 * CROP_PADDING + 1, (2, len(chunk)), generator=shuffle)[:, rank::world]
                flips = torch.randint(0, 2, (len(chunk),), generator=shuffle)[rank::world]
                found = crop_and_flip(found, moves[0], moves[1], flips == 1)  # noqa: PLW2901
            yield self._normalized(found), self.labels[rows].to(device)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all inputs and labels, on the CPU."""
        parts = list(self.batches(1000))
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    def _normalized(self, pixels: torch.Tensor) -> torch.Tensor:
        x = pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels
        if self.mean:
            shape = (1, -1, 1, 1)
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
    with distributed.main_first():
        raw_train, raw_test = SOURCES[config.source](config)
        held_out = (
            config.validation if isinstance(config.validation, int) else round(config.validation * len(raw_train))
        )
        if not 0 < held_out < len(raw_train):
            raise InputError(
                f"data.validation = {config.validation} cannot be cut from {len(raw_train)} training samples"
            )
        chosen = torch.zeros(len(raw_train), dtype=torch.bool)
        chosen[spread(raw_train.labels, held_out, seed)] = True
        rows = (~chosen).nonzero().flatten(), chosen.nonzero().flatten(), torch.arange(len(raw_test))
        train, test = _placed(raw_train, config), _placed(raw_test, config)
        splits = [_split(raw, part, config, seed) for raw, part in zip((train, train, test), rows, strict=True)]
    shape = tuple(next(splits[0].batches(1))[0].shape[1:])
    names = raw_train.classes
    return DataSet(splits[0], splits[1], splits[2], len(names), shape, names, config.augment)


def _placed(raw: Raw, config: DataConfig) -> Raw:
    """Decode the files of a small data set into memory; a limited one is decoded after the limit."""
    pixels = raw.pixels
    if not isinstance(pixels, FilePixels) or config.limit or _streams(pixels, config):
        return raw
    return replace(raw, pixels=MemoryPixels(cached(pixels)))


def _streams(pixels: FilePixels, config: DataConfig) -> bool:
    return config.placement == "stream" or (config.placement == "auto" and pixels.nbytes > MEMORY_LIMIT)


def _split(raw: Raw, rows: torch.Tensor, config: DataConfig, seed: int) -> Split:
    if config.limit:
        rows = rows[spread(raw.labels[rows], config.limit, seed)]
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


def crop_and_flip(pixels: torch.Tensor, down: torch.Tensor, right: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Pad pictures ``(N, C, H, W)`` by 4 zeros, cut them out from (``down``, ``right``), and mirror where ``flip``."""
    device, (count, channels, height, width) = pixels.device, pixels.shape
    rows = down[:, None] + torch.arange(height)  # (N, H)
    columns = torch.arange(width).expand(count, width)
    columns = right[:, None] + torch.where(flip[:, None], columns.flip(1), columns)  # (N, W)
    padded = F.pad(pixels, (CROP_PADDING,) * 4)
    samples = torch.arange(count, device=device)[:, None, None, None]
    planes = torch.arange(channels, device=device)[None, :, None, None]
    return padded[samples, planes, rows.to(device)[:, None, :, None], columns.to(device)[:, None, None, :]]
