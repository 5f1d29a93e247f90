"""The manifest of an artifacts folder: every file with its format, bytes, SHA-256 and promised tolerance."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from relief_export import formats  # for its table, once it is there: it imports this module
from relief_export.errors import IntegrityError
from relief_export.formats.artifact import Artifact, File, read_files
from relief_export.records import read_json, sha256, write_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

NAME = "manifest.json"
VERSION = 1


def inside(folder: Path, path: str, where: str) -> Path:
    """Resolve ``path``, which must lie in ``folder`` once links are followed.

    Raises:
        IntegrityError: It is absolute, leaves the folder, or is not a plain relative path.
    """
    plain = PurePosixPath(path)
    parts_ok = bool(path) and "\\" not in path and "\0" not in path and ":" not in path and ".." not in plain.parts
    if not parts_ok or plain.is_absolute():
        raise IntegrityError(f"{where}: path {path!r} points outside its folder: do not use this file")
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
    if path.stat().st_size != size:
        raise IntegrityError(f"{path} has {path.stat().st_size} bytes where {where} says {size}: export again")
    if sha256(path) != digest:
        raise IntegrityError(f"{path} differs from its SHA-256 in {where}: export again")


@dataclass(frozen=True)
class Manifest:
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
        files = [file for file in self.references if file.path in {name, f"{name}.data"}]
        if not files:
            raise IntegrityError(f"{self.folder / NAME} does not list {name}, so it may be anything: export again")
        self._check(files)

    def _check(self, files: Iterable[File]) -> None:
        where = str(self.folder / NAME)
        for file in files:
            check_file(inside(self.folder, file.path, where), file.bytes, file.sha256, where)


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
    references = read_files(content.get("references", []), str(path))
    names: set[str] = set()
    for artifact in artifacts:
        if artifact.format not in formats.FORMATS:
            raise IntegrityError(
                f"{path} gives {artifact.name!r} the unknown format {artifact.format!r}; "
                f"there are {', '.join(formats.FORMATS)}: export again"
            )
        if artifact.name in names:
            raise IntegrityError(f"{path} lists {artifact.name!r} twice: export again")
        names.add(artifact.name)
        for name in (artifact.name, *(file.path for file in artifact.files)):
            inside(folder, name, str(path))
    for file in references:
        inside(folder, file.path, str(path))
    return Manifest(folder, artifacts, extra, references)


def check_listed(path: Path) -> None:
    """Check ``path`` against the manifest beside it, where there is one that lists it.

    Raises:
        IntegrityError: The manifest is damaged, or a file differs from it.
    """
    folder = path.parent
    if not (folder / NAME).is_file() or "artifacts" not in read_json(folder / NAME):
        return  # none, or a web page's or another program's file of that name
    manifest = read_manifest(folder)
    for artifact in manifest.artifacts:
        if artifact.name == path.name:
            manifest.check(artifact)
    if any(file.path == path.name for file in manifest.references):
        manifest.check_reference(path.name)
