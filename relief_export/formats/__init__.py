"""The file formats: one table, the same verbs in each.

A row says everything that the rest of the program asks about a format; nobody else keeps a list of their names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import onnx
from google.protobuf.message import DecodeError

from relief_export.format_names import FORMAT_NAMES, FormatName
from relief_export.formats import c, csr, dense, int8, ort, packed, sparse
from relief_export.formats.artifact import (
    EXACT,
    VALUES,
    Artifact,
    File,
    Manifest,
    Options,
    Tolerance,
    Values,
    check_listed,
    read_manifest,
    write_manifest,
)
from relief_export.formats.onnx_file import from_proto, load_proto, to_ir, to_proto
from relief_export.formats.sizes import Ledger, SizeBreakdown, gzip_bytes, ledger, size_breakdown

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx_ir as ir

    from relief_export.cgen.connections import Code

__all__ = [
    "EXACT",
    "FORMATS",
    "FORMAT_NAMES",
    "VALUES",
    "Artifact",
    "File",
    "Format",
    "FormatName",
    "Ledger",
    "Manifest",
    "Options",
    "SizeBreakdown",
    "Tolerance",
    "Values",
    "from_proto",
    "gzip_bytes",
    "ledger",
    "read",
    "read_manifest",
    "size_breakdown",
    "to_proto",
    "write_manifest",
]


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Attributes:
        name: Its key: what recipes, the command line and manifests call it.
        suffix: Name of its file, or folder, in an artifacts folder.
        write: Writes a model, verified in ONNX Runtime where the format is loaded by it.
        read: Gives the plain dense model back; None for a format that goes one way.
        tolerance: How far it may be from the dense file.
        values: Code in which it stores the weights' values: what its entropy bound is counted with.
        loadable: Whether ONNX Runtime loads the file as it is.
        calibrated: Whether it needs samples of the model's input.
        made_by_runtime: Whether ONNX Runtime itself makes it, and so has to know every operator.
        unpacked: Whether a runtime holds the weights in RAM at their dense size, since the file has them in another
            form; otherwise they may stay in flash.
    """

    name: FormatName
    suffix: str
    write: Callable[[ir.Model, Path, Options], Artifact]
    read: Callable[[Path], ir.Model] | None
    tolerance: Tolerance = EXACT
    values: Values = "f32"
    loadable: bool = True
    calibrated: bool = False
    made_by_runtime: bool = False
    unpacked: bool = False

    @property
    def lossy(self) -> bool:
        """Whether predictions may differ from those of the dense file."""
        return self.tolerance.accuracy_drop > 0


def _packed(name: FormatName, values: Values) -> Format:
    write = partial(packed.write, values=values, name=name)
    tolerance = packed.TOLERANCES[values]
    return Format(name, f"model.{name}.onnx", write, packed.read, tolerance, values, unpacked=True)


def _mcu(name: FormatName, code: Code, tolerance: Tolerance) -> Format:
    write = partial(c.write_mcu, code=code, name=name, tolerance=tolerance)
    values: Values = "int8" if code == "q8" else code
    integers = code == "q8"
    return Format(
        name, name, write, None, tolerance, values, loadable=False, calibrated=integers, made_by_runtime=integers
    )


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("dense", "model.onnx", dense.write, dense.read),
        Format("sparse", "model.sparse.onnx", sparse.write, sparse.read, unpacked=True),
        _packed("packed", "f32"),
        _packed("packed-f16", "f16"),
        Format(
            "packed-int8", "model.packed-int8.onnx", int8.write_packed, packed.read, int8.TOLERANCE, "int8",
            calibrated=True, made_by_runtime=True, unpacked=True,
        ),
        _packed("packed-codebook16", "codebook16"),
        _packed("packed-codebook256", "codebook256"),
        Format("csr", "csr", csr.write, csr.read, loadable=False, unpacked=True),
        Format(
            "int8", "model.int8.onnx", int8.write, dense.read, int8.TOLERANCE, "int8",
            calibrated=True, made_by_runtime=True,
        ),
        Format("ort", "model.ort", ort.write, None, made_by_runtime=True),
        Format("c", "c", c.write, None, c.TOLERANCE, loadable=False),
        _mcu("c-mcu", "f32", c.TOLERANCE),
        _mcu("c-mcu-int8", "int8", int8.TOLERANCE),
        _mcu("c-mcu-codebook16", "codebook16", packed.TOLERANCES["codebook16"]),
        _mcu("c-mcu-q8", "q8", int8.TOLERANCE),
    )
}  # fmt: skip


def compact_form(path: Path) -> FormatName | None:
    """Return in which form a model leaves the zeros of its weights out, or None where they are stored or it is none."""
    if path.is_dir():
        return "csr"
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError:  # reading it says what is wrong
        return None
    if packed.is_packed(proto):
        return "packed"
    return "sparse" if proto.graph.sparse_initializer else None


def read(path: Path) -> ir.Model:
    """Read a model in any readable format, which is recognised from the file itself, as a plain dense one.

    Raises:
        InputError: There is no such file.
        IntegrityError: It is damaged, or differs from the manifest beside it.
        UnsupportedModelError: It is in ONNX Runtime's own format, or generated C.
    """
    if c.is_program(path):
        c.refuse(path)
    if path.is_dir():
        return csr.read(path)
    if path.suffix == ".ort":
        ort.refuse(path)
    check_listed(path)
    proto = load_proto(path)
    sparse.densify(proto, path)
    if packed.is_packed(proto):
        packed.unpack(proto, path)
    return to_ir(proto, path)
