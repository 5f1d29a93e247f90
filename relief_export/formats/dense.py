"""Dense ONNX: the canonical model with deterministic bytes; above 2 GB the weights lie in ``NAME.data`` beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relief_export.formats.artifact import EXACT, Artifact, File, Options, check_listed
from relief_export.formats.onnx_file import canonical, load_proto, save_model, to_ir

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir


def write(model: ir.Model, path: Path, options: Options) -> Artifact:
    """Write ``model`` as a dense ONNX file that ONNX Runtime has opened.

    Raises:
        UnsupportedModelError: ONNX Runtime refuses the model, or a weight has no value.
    """
    files = save_model(canonical(model), path, verify=options.verify, external_bytes=options.external_bytes)
    return Artifact(path.name, "dense", tuple(File.of(path.parent, f) for f in files), EXACT, options.to_dict())


def read(path: Path) -> ir.Model:
    """Read an ONNX file, from this program or any other; external data is mapped, never copied.

    Raises:
        InputError: There is no such file.
        IntegrityError: It is damaged, differs from its manifest, or names data outside its folder.
    """
    check_listed(path)
    return to_ir(load_proto(path), path)
