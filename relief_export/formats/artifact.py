"""What a writer of a format takes and leaves: options, files, and the tolerance that it promises."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from relief_export.errors import IntegrityError
from relief_export.records import sha256

if TYPE_CHECKING:
    from pathlib import Path

Values = Literal["f32", "f16", "int8", "codebook16", "codebook256"]
VALUES: tuple[Values, ...] = ("f32", "f16", "int8", "codebook16", "codebook256")
"""How a packed format may store the values of the weights."""


@dataclass(frozen=True)
class Tolerance:
    """How far a format may be from the dense file, on the same inputs in the same runtime.

    Attributes:
        relative_error: Bound on max |a - b| / max |b| over all outputs; None promises nothing about single outputs.
        accuracy_drop: Bound on the accuracy that may be lost, as a fraction; 0.0 means that every prediction agrees.
    """

    relative_error: float | None
    accuracy_drop: float


EXACT = Tolerance(relative_error=1e-4, accuracy_drop=0.0)
"""Formats that hold the very values of the dense file; 1e-4 is for the reference network's other kernels."""


@dataclass(frozen=True)
class Options:
    """What every writer understands; a writer ignores what it has no use for.

    Attributes:
        values: How packed weights are stored.
        calibration: Samples of the model's input for int8: an array ``(N, ...)``, or an .npz file whose array ``x``
            (or whose only array) holds them.
        external_bytes: A dense model with more bytes of weights keeps them in ``NAME.data`` beside it; protobuf ends
            at 2 GiB.
        verify: Open the written file in ONNX Runtime, which takes the memory of the whole model once more.
    """

    values: Values = "f32"
    calibration: np.ndarray[Any, Any] | Path | None = field(default=None, compare=False)
    external_bytes: int = 2_000_000_000
    verify: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return what decides the written bytes, as plain data."""
        source = self.calibration
        described = f"array {source.shape}" if isinstance(source, np.ndarray) else source and str(source)
        return {"values": self.values, "calibration": described, "external_bytes": self.external_bytes}


@dataclass(frozen=True)
class File:
    """One file of an artifact; ``path`` is relative to the artifacts' folder, with forward slashes."""

    path: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, folder: Path, path: Path) -> File:
        """Measure ``path``, which lies in ``folder``."""
        return cls(path.relative_to(folder).as_posix(), path.stat().st_size, sha256(path))


@dataclass(frozen=True)
class Artifact:
    """One written format.

    Attributes:
        name: File or folder name within the artifacts' folder.
        format: Its key in ``formats.FORMATS``.
        files: Every file it consists of.
        tolerance: What it promises against the dense file.
        options: What it was written with, as plain data.
        notes: Sentences a reader should know, such as tensors that were left dense and why.
    """

    name: str
    format: str
    files: tuple[File, ...]
    tolerance: Tolerance
    options: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes on disk, all files."""
        return sum(file.bytes for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``from_dict`` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object, where: str) -> Artifact:
        """Rebuild an artifact from plain data.

        Raises:
            IntegrityError: A key is missing, unknown or of a wrong type.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or set(data) != known:
            raise IntegrityError(
                f"{where}: an artifact's entry is malformed, it must have {sorted(known)}: export again"
            )
        tolerance = _read_tolerance(data["tolerance"], where)
        files = read_files(data["files"], where)
        typed = isinstance(data["notes"], list) and all(isinstance(note, str) for note in data["notes"])
        typed = typed and isinstance(data["name"], str) and isinstance(data["format"], str)
        if not files or not typed or not isinstance(data["options"], dict):
            raise IntegrityError(f"{where}: the entry of an artifact, {data['name']!r}, is malformed: export again")
        return cls(data["name"], data["format"], files, tolerance, data["options"], tuple(data["notes"]))


def read_files(entries: object, where: str) -> tuple[File, ...]:
    """Rebuild a list of files from plain data.

    Raises:
        IntegrityError: It is no list, or a key is missing, unknown or of a wrong type.
    """
    kinds = {"path": str, "bytes": int, "sha256": str}
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, dict) or {key: type(value) for key, value in entry.items()} != kinds:
            raise IntegrityError(
                f"{where}: a file's entry is malformed, it must have path, bytes, sha256: export again"
            )
    return tuple(File(**entry) for entry in entries) if isinstance(entries, list) else ()


def _read_tolerance(data: object, where: str) -> Tolerance:
    bounds = data if isinstance(data, dict) and set(data) == {"relative_error", "accuracy_drop"} else {}
    drop, relative = bounds.get("accuracy_drop"), bounds.get("relative_error")
    for bound in (drop, 0.0 if relative is None else relative):
        if type(bound) not in {int, float} or not 0 <= bound < math.inf:
            raise IntegrityError(f"{where}: an artifact is malformed, with no sound tolerance: export again")
    return Tolerance(relative, drop)
