"""The file formats: one table, the same verbs in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from relief_export.formats import csr, dense, int8, ort, packed, sparse
from relief_export.formats.anatomy import Anatomy, anatomy
from relief_export.formats.artifact import EXACT, VALUES, Artifact, File, Options, Tolerance, Values
from relief_export.formats.container import load_proto, to_ir
from relief_export.formats.ledger import Ledger, ledger
from relief_export.formats.manifest import Manifest, check_listed, read_manifest, write_manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx_ir as ir

__all__ = [
    "EXACT",
    "FORMATS",
    "VALUES",
    "Anatomy",
    "Artifact",
    "File",
    "Format",
    "Ledger",
    "Manifest",
    "Options",
    "Tolerance",
    "Values",
    "anatomy",
    "ledger",
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
        Format("sparse", "model.sparse.onnx", sparse.write, sparse.read),
        Format("packed", "model.packed.onnx", packed.write, packed.read),
        Format("csr", "csr", csr.write, csr.read),
        Format("int8", "model.int8.onnx", int8.write, dense.read),
        Format("packed-int8", "model.packed-int8.onnx", int8.write_packed, packed.read),
        Format("packed-codebook16", "model.packed-codebook16.onnx", packed.write_codebook, packed.read),
        Format("ort", "model.ort", ort.write, ort.read),
    )
}


def read(path: Path) -> ir.Model:
    """Read a model in any readable format, which is recognised from the file itself, as a plain dense one.

    Raises:
        InputError: There is no such file.
        IntegrityError: It is damaged, or differs from the manifest beside it.
        UnsupportedModelError: It is in ONNX Runtime's own format.
    """
    if path.is_dir():
        return csr.read(path)
    if path.suffix == ".ort":
        ort.read(path)
    check_listed(path)
    proto = load_proto(path)
    sparse.densify(proto, path)
    if packed.is_packed(proto):
        packed.unpack(proto, path)
    return to_ir(proto, path)
