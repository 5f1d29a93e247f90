"""What a run is: frozen dataclasses read from TOML and checked on reading."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Which samples: ``source`` is digits, mnist, fashion-mnist, cifar10, cifar100 or folder."""

    source: str
    root: str | None = None
    """Data root; the environment variable RELIEF_DATA wins over it."""
    validation: float | int = 0.1
    """Share or number of training samples held out for every choice; the test set decides nothing."""
    augment: bool = False
    """Random crop with padding 4 and horizontal flip, in batches."""
    normalize: Literal["none", "imagenet"] = "none"
    """none: pixels / 255."""
    size: int | None = None
    """Side to which pictures are resized; None keeps them."""
    limit: int | None = None
    """At most this many samples of each split (for tests)."""
    placement: Literal["auto", "memory", "stream"] = "auto"


@dataclass(frozen=True)
class ModelConfig:
    """Which network: a zoo name or ``torchvision:NAME``."""

    name: str
    options: dict[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainConfig:
    """One training: optimizer and its decay."""

    epochs: int
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-3
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    weight_decay: float = 0.0
    momentum: float = 0.9
    batch: int = 128
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False


@dataclass(frozen=True)
class ReliefConfig:
    """The relief loop. ``retrain`` overrides keys of the training for the retraining after each pruning."""

    iterations: int
    alpha_conv: float = 0.95
    alpha_fc: float = 0.95
    samples: int = 1000
    position_norm: Literal["l1", "l2"] = "l2"
    rewind: bool = False
    tolerance: float = 0.01
    """Validation accuracy (a fraction) that may be lost against the dense network."""
    patience: int | None = None
    """Stop after this many iterations in a row outside the tolerance; None runs all."""
    alpha: dict[str, float] = field(default_factory=dict)
    """Layer name (glob) -> α, over alpha_conv and alpha_fc."""
    skip: tuple[str, ...] = ()
    """Layer names (globs) that are left whole."""
    retrain: TrainConfig | None = None


@dataclass(frozen=True)
class ExportConfig:
    """Which formats are written beside model.onnx, and how."""

    formats: tuple[str, ...] = ("dense", "csr")
    values: Literal["f32", "f16", "int8", "codebook16", "codebook256"] = "f32"
    """Values of the packed format."""
    reference_samples: int = 256
    calibration_samples: int = 256


@dataclass(frozen=True)
class AuditConfig:
    """Budgets that the audit holds the artifacts against; sizes like "256KiB"."""

    flash: str | None = None
    ram: str | None = None
    target: str | None = None


@dataclass(frozen=True)
class Recipe:
    """One run from training to report, resolved."""

    name: str
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    relief: ReliefConfig
    description: str = ""
    reproduces: str = ""
    seed: int = 0
    export: ExportConfig = field(default_factory=ExportConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
