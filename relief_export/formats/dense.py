"""Dense ONNX: the canonical model with deterministic bytes; above 2 GB the weights lie in ``NAME.data`` beside it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir

from relief_export.formats.artifact import EXACT, Artifact, File, Options
from relief_export.formats.container import canonical, load_proto, save_proto, to_ir
from relief_export.formats.manifest import check_listed


def write(model: ir.Model, path: Path, options: Options) -> Artifact:
    """Write ``model`` as a dense ONNX file that ONNX Runtime has opened.

    Raises:
        UnsupportedModelError: ONNX Runtime refuses the model, or a weight has no value.
    """
    prepared = canonical(model)
    save(prepared, path, options)
    data = data_path(path)
    files = (path, data) if data.exists() else (path,)
    return Artifact(path.name, "dense", tuple(File.of(path.parent, f) for f in files), EXACT, options.to_dict())


def data_path(path: Path) -> Path:
    """Return where the external data of the model at ``path`` is kept."""
    return path.with_name(path.name + ".data")


def save(prepared: ir.Model, path: Path, options: Options) -> None:
    """Write a canonical model; it is changed where its weights go to an external file."""
    weights = sum(v.const_value.nbytes for g in prepared.graphs() for v in g.initializers.values() if v.const_value)
    if weights <= options.external_bytes:
        save_proto(ir.to_proto(prepared), path, verify=options.verify)
        data_path(path).unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as folder:
        name = data_path(path).name
        ir.external_data.unload_from_model(prepared, folder, name, size_threshold_bytes=256)
        proto = ir.to_proto(prepared)
        (Path(folder) / name).replace(data_path(path))  # the data first: a model file is never without its data
        save_proto(proto, path, verify=options.verify)


def read(path: Path) -> ir.Model:
    """Read an ONNX file, from this program or any other; external data is mapped, never copied.

    Raises:
        InputError: There is no such file.
        IntegrityError: It is damaged, differs from its manifest, or names data outside its folder.
    """
    check_listed(path)
    return to_ir(load_proto(path), path)
