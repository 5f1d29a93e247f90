"""What a command is given: a model file, a folder of SciPy matrices, an artifacts folder or a build folder.

Every command takes each of them, so that nobody has to know which part of a build folder a command is about.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from relief_export.errors import InputError
from relief_export.formats import read_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from relief_export.formats import Artifact, Manifest

_MANIFEST = "manifest.json"
_SINGLE = ("index.json", "program.json")
"""What makes a folder one model: a csr folder has the first, a folder of generated C the second."""
KINDS = "a model file, a csr folder, an artifacts folder (with manifest.json) or a build folder (with artifacts/)"


def is_single(subject: Path) -> bool:
    """Return True if ``subject`` is one model: a file, a csr folder, or a folder of generated C.

    Raises:
        InputError: It does not exist.
    """
    if not subject.exists():
        raise InputError(f"{subject} does not exist: give {KINDS}")
    return not subject.is_dir() or any((subject / name).is_file() for name in _SINGLE)


def artifacts_folder(subject: Path) -> Path:
    """Return the folder of the artifacts: the one given, or the one in a build folder.

    Raises:
        InputError: It is neither.
    """
    folder = subject / "artifacts" if (subject / "artifacts").is_dir() else subject
    if not (folder / _MANIFEST).is_file():
        what = "does not exist" if not subject.exists() else f"has no {_MANIFEST}" if subject.is_dir() else "is a file"
        raise InputError(
            f"{subject} {what}: give an artifacts folder (with {_MANIFEST}) or a build folder (with artifacts/)"
        )
    return folder


def model_path(subject: Path) -> Path:
    """Return the one model that ``subject`` stands for: itself, or the dense ONNX file of its artifacts.

    Raises:
        InputError: It is no model and no folder with artifacts.
    """
    if is_single(subject):
        return subject
    try:
        manifest = read_manifest(artifacts_folder(subject))
    except InputError as error:
        # Where there is something, what is wrong with it says more than that there is no model.
        if (subject / _MANIFEST).is_file() or (subject / "artifacts").is_dir():
            raise
        raise InputError(f"{subject} holds no model: give {KINDS}") from error
    return manifest.path(dense_of(manifest))


def dense_of(manifest: Manifest) -> Artifact:
    """Return the dense artifact, or the first one where there is none.

    Raises:
        InputError: The manifest lists nothing.
    """
    if not manifest.artifacts:
        raise InputError(f"{manifest.folder / _MANIFEST} lists no artifact: export again")
    return next((each for each in manifest.artifacts if each.format == "dense"), manifest.artifacts[0])
