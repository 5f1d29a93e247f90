"""The file formats: one table, the same verbs in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from relief_export.formats import csr, dense
from relief_export.formats.artifact import EXACT, VALUES, Artifact, File, Options, Tolerance, Values
from relief_export.formats.manifest import Manifest, read_manifest, write_manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx_ir as ir

__all__ = [
    "EXACT",
    "FORMATS",
    "VALUES",
    "Artifact",
    "File",
    "Format",
    "Manifest",
    "Options",
    "Tolerance",
    "Values",
    "read",
    "read_manifest",
    "write_manifest",
]


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Attributes:
        name: Its key, and what the command line calls it.
        suffix: What follows ``model`` in an artifacts folder; ``csr`` is a folder of that name.
        write: Writes a model, verified in ONNX Runtime where the format is loaded by it.
        read: Gives the plain dense model back.
    """

    name: str
    suffix: str
    write: Callable[[ir.Model, Path, Options], Artifact]
    read: Callable[[Path], ir.Model]


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("dense", "model.onnx", dense.write, dense.read),
        Format("csr", "csr", csr.write, csr.read),
    )
}


def read(path: Path) -> ir.Model:
    """Read a model in any readable format, which is recognised from the file itself."""
    return csr.read(path) if path.is_dir() else dense.read(path)
