"""What a writer takes and leaves: options, files, the promised tolerance, and the manifest of an artifacts folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from relief_export.errors import IntegrityError
from relief_export.format_names import FORMAT_NAMES
from relief_export.printing import Prints, TextTable
from relief_export.records import read_json, sha256, write_json

if TYPE_CHECKING:
    from collections.abc import Iterable

Values = Literal["f32", "f16", "int8", "codebook16", "codebook256"]
VALUES: tuple[Values, ...] = get_args(Values)
"""How a format may store the values of the weights."""

NAME = "manifest.json"
VERSION = 2


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
        calibration: Samples of the model's input for int8: an array ``(N, ...)``, those of several inputs by their
            names, or an .npz file whose array ``x`` (or whose only array) holds them.
        external_bytes: A dense model with more bytes of weights keeps them in ``NAME.data`` beside it; protobuf ends
            at 2 GiB.
        verify: Open the written file in ONNX Runtime, which takes the memory of the whole model once more.
        program: What generated C is called: NAME.c, NAME_run.
        onnxruntime: Generated C comes with an operator for ONNX Runtime.
        dimensions: Sizes of symbolic axes by name, for formats that fix them.
        quantized_io: Integers in and out are the default of a c-mcu-q8 program.
        layout: Arrange the files of a c-mcu program for "arduino", "zephyr" or "esp-idf".
    """

    calibration: np.ndarray[Any, Any] | Mapping[str, np.ndarray[Any, Any]] | Path | None = field(
        default=None, compare=False
    )
    # A little below the limit, which leaves room for the graph.
    external_bytes: int = 2_000_000_000
    verify: bool = True
    program: str = "net"
    onnxruntime: bool = False
    dimensions: Mapping[str, int] | None = field(default=None, compare=False)
    quantized_io: bool = False
    layout: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what decides the written bytes, as plain data."""
        source = self.calibration
        # Samples are described and not stored, since there may be many.
        described = None if source is None else str(source)
        if isinstance(source, np.ndarray):
            described = f"array {source.shape}"
        elif isinstance(source, Mapping):
            described = ", ".join(f"{name} {array.shape}" for name, array in source.items())
        return {"calibration": described, "external_bytes": self.external_bytes}


@dataclass(frozen=True)
class File:
    """One file of an artifact; ``path`` is relative to the artifacts' folder, with forward slashes."""

    path: str
    file_bytes: int
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
        return sum(file.file_bytes for file in self.files)

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
        # A manifest may come from a stranger, and everything below relies on the keys and types.
        if not isinstance(data, dict) or set(data) != known:
            raise IntegrityError(
                f"{where}: an artifact's entry is malformed, it must have {sorted(known)}: export again"
            )
        tolerance = _read_tolerance(data["tolerance"], where)
        files = _read_files(data["files"], where)
        typed = isinstance(data["notes"], list) and all(isinstance(note, str) for note in data["notes"])
        typed = typed and isinstance(data["name"], str) and isinstance(data["format"], str)
        if not files or not typed or not isinstance(data["options"], dict):
            raise IntegrityError(f"{where}: the entry of an artifact, {data['name']!r}, is malformed: export again")
        return cls(data["name"], data["format"], files, tolerance, data["options"], tuple(data["notes"]))


def _read_files(entries: object, where: str) -> tuple[File, ...]:
    """Rebuild a list of files from plain data.

    Raises:
        IntegrityError: It is no list, or a key is missing, unknown or of a wrong type.
    """
    kinds = {"path": str, "file_bytes": int, "sha256": str}
    for entry in entries if isinstance(entries, list) else [entries]:
        # The exact types, since True would pass for an integer.
        if not isinstance(entry, dict) or {key: type(value) for key, value in entry.items()} != kinds:
            raise IntegrityError(
                f"{where}: a file's entry is malformed, it must have path, file_bytes, sha256: export again"
            )
    return tuple(File(**entry) for entry in entries) if isinstance(entries, list) else ()


def _read_tolerance(data: object, where: str) -> Tolerance:
    bounds = data if isinstance(data, dict) and set(data) == {"relative_error", "accuracy_drop"} else {"": None}
    relative = bounds.get("relative_error")
    numbers: list[Any] = [bounds.get("accuracy_drop"), 0.0 if relative is None else relative]
    # Python's JSON knows NaN and Infinity, with which any difference would pass.
    if not all(type(bound) in {int, float} and 0 <= bound < math.inf for bound in numbers):
        raise IntegrityError(f"{where}: an artifact is malformed, with no sound tolerance: export again")
    return Tolerance(**bounds)


def inside(folder: Path, path: str, where: str) -> Path:
    """Resolve ``path``, which must lie in ``folder`` once links are followed.

    Raises:
        IntegrityError: It is absolute, leaves the folder, or is not a plain relative path.
    """
    plain = PurePosixPath(path)
    # A backslash and a drive's colon matter to Windows only, but a manifest travels.
    parts_ok = bool(path) and "\\" not in path and "\0" not in path and ":" not in path and ".." not in plain.parts
    if not parts_ok or plain.is_absolute():
        raise IntegrityError(f"{where}: path {path!r} points outside its folder: do not use this file")
    # A link inside the folder may lead out of it, which the path alone does not show.
    resolved = (folder / plain).resolve()
    if not resolved.is_relative_to(folder.resolve()):
        raise IntegrityError(f"{where}: path {path!r} leads outside its folder through a link: do not use this file")
    return folder / plain


def check_file(path: Path, size: int, digest: str, where: str) -> None:
    """Compare a file's size and SHA-256 with what ``where`` promises.

    Raises:
        IntegrityError: The file is absent or differs.
    """
    if not path.is_file():
        raise IntegrityError(f"{path} is missing though {where} lists it: export again")
    # The size first: it costs nothing, while the hash reads the whole file.
    if path.stat().st_size != size:
        raise IntegrityError(f"{path} has {path.stat().st_size} bytes where {where} says {size}: export again")
    if sha256(path) != digest:
        raise IntegrityError(f"{path} differs from its SHA-256 in {where}: export again")


@dataclass(frozen=True)
class Manifest(Prints):
    """The artifacts of one folder.

    Attributes:
        folder: Where they lie.
        artifacts: What was exported.
        extra: Cost figures and whatever else the export recorded.
        references: Files that artifacts are compared with: the masked and the original network, the stored samples.
    """

    folder: Path
    artifacts: tuple[Artifact, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    references: tuple[File, ...] = ()

    def table(self) -> TextTable:
        """Return every artifact with its size and what it may differ by."""
        rows = [
            (
                each.name,
                each.format,
                f"{each.bytes:,}",
                "exact" if each.tolerance.accuracy_drop == 0 else f"-{100 * each.tolerance.accuracy_drop:g} points",
            )
            for each in self.artifacts
        ]
        return TextTable(f"{self.folder}", ("file", "format", "bytes", "accuracy"), rows)

    def __getitem__(self, name: str) -> Artifact:
        """Return the artifact called ``name``.

        Raises:
            IntegrityError: There is none.
        """
        found = next((artifact for artifact in self.artifacts if artifact.name == name), None)
        if found is None:
            raise IntegrityError(f"{self.folder / NAME} has no artifact {name!r}: export again")
        return found

    def path(self, artifact: Artifact) -> Path:
        """Return where the artifact lies; the path is checked to be inside the folder."""
        return inside(self.folder, artifact.name, str(self.folder / NAME))

    def check(self, artifact: Artifact) -> None:
        """Check every file of ``artifact`` against its size and SHA-256.

        Raises:
            IntegrityError: A file is absent, differs, or lies outside the folder.
        """
        self._check(artifact.files)

    def check_reference(self, name: str) -> None:
        """Check the reference ``name``, such as masked.onnx, with its external data, against size and SHA-256.

        Raises:
            IntegrityError: The manifest does not list it, or a file is absent or differs.
        """
        # External data holds the weights, so the model alone proves little.
        files = [file for file in self.references if file.path in {name, f"{name}.data"}]
        if not files:
            raise IntegrityError(f"{self.folder / NAME} does not list {name}, so it may be anything: export again")
        self._check(files)

    def _check(self, files: Iterable[File]) -> None:
        where = str(self.folder / NAME)
        for file in files:
            check_file(inside(self.folder, file.path, where), file.file_bytes, file.sha256, where)


def write_manifest(
    folder: Path,
    artifacts: Iterable[Artifact],
    extra: Mapping[str, Any] | None = None,
    *,
    references: Iterable[Path] = (),
) -> Manifest:
    """Write ``folder/manifest.json``, atomically, and return it.

    Args:
        folder: The artifacts' folder.
        artifacts: What was written to it.
        extra: Whatever else the export recorded.
        references: Files in it, external data included, that artifacts are compared with; they are hashed here.
    """
    files = tuple(File.of(folder, path) for path in references)
    manifest = Manifest(folder, tuple(artifacts), dict(extra or {}), files)
    content = {
        "version": VERSION,
        "artifacts": [artifact.to_dict() for artifact in manifest.artifacts],
        "references": [asdict(file) for file in files],
        "extra": manifest.extra,
    }
    write_json(folder / NAME, content)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read ``folder/manifest.json``; no file it lists is opened.

    Raises:
        InputError: There is no manifest.
        IntegrityError: It is malformed, of another version, or lists an unknown format, a name twice, or a path outside
            its folder.
    """
    path = folder / NAME
    content = read_json(path)
    if content.get("version") != VERSION:
        raise IntegrityError(
            f"{path} has version {content.get('version')!r}, this program reads {VERSION}: export again"
        )
    entries, extra = content.get("artifacts"), content.get("extra")
    if not isinstance(entries, list):
        raise IntegrityError(f"{path} lacks its list of artifacts: export again")
    if not isinstance(extra, dict):
        raise IntegrityError(f"{path} has an 'extra' that is no object: export again")
    artifacts = tuple(Artifact.from_dict(entry, str(path)) for entry in entries)
    references = _read_files(content.get("references", []), str(path))
    names: set[str] = set()
    for artifact in artifacts:
        if artifact.format not in FORMAT_NAMES:
            raise IntegrityError(
                f"{path} gives {artifact.name!r} the unknown format {artifact.format!r}; "
                f"there are {', '.join(FORMAT_NAMES)}: export again"
            )
        if artifact.name in names:
            raise IntegrityError(f"{path} lists {artifact.name!r} twice: export again")
        names.add(artifact.name)
        # Checked before anything is opened, so that no caller can forget to.
        for name in (artifact.name, *(file.path for file in artifact.files)):
            inside(folder, name, str(path))
    for file in references:
        inside(folder, file.path, str(path))
    return Manifest(folder, artifacts, extra, references)


def check_listed(path: Path) -> Artifact | None:
    """Check ``path`` against the manifest beside it, where there is one that lists it.

    Returns:
        The artifact that ``path`` is; None where no manifest lists it as one.

    Raises:
        IntegrityError: The manifest is damaged, or a file differs from it.
    """
    folder = path.parent
    if not (folder / NAME).is_file() or "artifacts" not in read_json(folder / NAME):
        return None  # no manifest, or a web page's or another program's file of that name
    manifest = read_manifest(folder)
    found = next((artifact for artifact in manifest.artifacts if artifact.name == path.name), None)
    if found is not None:
        manifest.check(found)
    if any(file.path == path.name for file in manifest.references):
        manifest.check_reference(path.name)
    return found
