"""One model file in, one out: what ``shrink`` and ``convert`` do to models of any origin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relief_export import formats
from relief_export.errors import InputError, UnsupportedModelError
from relief_export.formats import container, csr
from relief_export.graph.cost import Cost, cost
from relief_export.graph.fold import fold
from relief_export.graph.shrink import ShrinkResult, shrink

if TYPE_CHECKING:
    import onnx_ir as ir

_VALUES: dict[str, formats.Values] = {"codebook": "codebook256"}
"""Short names of the values of packed weights."""
_NEED_RUNTIME = frozenset({"int8", "packed-int8", "ort"})
_KINDS = {"onnx": "dense"}
"""Names of formats on the command line, where they differ from their keys in ``formats.FORMATS``."""


@dataclass(frozen=True)
class Shrunk:
    """What a shrink did to a file; sizes are bytes."""

    result: ShrinkResult
    before: Cost
    after: Cost
    bytes_before: int
    artifact: formats.Artifact

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "ok": True,
            "shrink": self.result.to_dict(),
            "cost": {"before": self.before.to_dict(), "after": self.after.to_dict()},
            "bytes": {"before": self.bytes_before, "after": self.artifact.bytes},
            "notes": list(self.artifact.notes),
        }


def shrink_file(source: Path, target: Path, *, strict: bool = False, verify: bool = True) -> Shrunk:
    """Fold and shrink the model at ``source`` and write it to ``target`` as dense ONNX.

    Raises:
        InputError: ``source`` is absent, no ONNX model, or has a file that ``target`` would replace.
        UnsupportedModelError: The model has something the rewrite must not guess about.
    """
    model = _read(source, target)
    result = shrink(fold(model), strict=strict)
    before = cost(model)
    after = cost(result.model, baseline=before)
    artifact = _write(result.model, source, target, "dense", formats.Options(verify=verify))
    return Shrunk(result, before, after, _bytes(source), artifact)


def convert_file(
    source: Path,
    target: Path,
    kind: str,
    *,
    values: str = "f32",
    calibration: Path | None = None,
    verify: bool = True,
) -> formats.Artifact:
    """Write the model at ``source``, in any readable format, to ``target`` as ``kind``.

    Args:
        source: A model file or a csr folder.
        target: Where to write.
        kind: The format.
        values: Values of packed weights.
        calibration: Samples for int8.
        verify: Open what was written in ONNX Runtime. A source that the runtime does not load either, because of
            operators of one's own, is converted all the same, and a note says that nothing was opened.

    Raises:
        InputError: ``source`` is absent or no model, or has a file that ``target`` would replace, int8 is asked for
            without calibration samples, or an option is given that the format has no use for.
        UnsupportedModelError: The format cannot hold the model.
    """
    if "int8" in kind and calibration is None:
        raise InputError(f"{kind} is calibrated on samples of the input: give --calibration X.npz with an array x")
    if "int8" not in kind and calibration is not None:
        raise InputError(f"--calibration is for --to int8 and packed-int8: leave it out with --to {kind}")
    if kind != "packed" and values != "f32":
        raise InputError(f"--values {values} is for --to packed: leave it out with --to {kind}")
    model = _read(source, target)
    options = formats.Options(values=_VALUES.get(values, values), calibration=calibration, verify=verify)  # type: ignore[arg-type]
    return _write(model, source, target, _KINDS.get(kind, kind), options)


def _write(model: ir.Model, source: Path, target: Path, kind: str, options: formats.Options) -> formats.Artifact:
    """Write ``model``; where ONNX Runtime refuses what was written, find out whether the source is to blame."""
    write = formats.FORMATS[kind].write
    try:
        return write(model, target, options)
    except UnsupportedModelError:
        try:  # the graph of a csr folder is a model of its own, whose inputs are the weights
            container.open_session(source / csr.GRAPH if source.is_dir() else source)
        except UnsupportedModelError as error:
            refusal = str(error)
        else:
            raise
    if kind in _NEED_RUNTIME:
        raise UnsupportedModelError(f"{kind} is made by ONNX Runtime, which has to load the source: {refusal}")
    written = write(model, target, replace(options, verify=False))
    note = f"not opened in ONNX Runtime, which does not load the source either: {refusal}"
    return replace(written, notes=(*written.notes, note))


def _read(source: Path, target: Path) -> ir.Model:
    model = formats.read(source)
    # Weights are mapped from the source while the target, and where it is dense NAME.data, is written or removed.
    for own in _files(source):
        for written in (target, container.data_path(target)):
            if written.exists() and written.samefile(own):
                what = "the input itself" if own == source else "the external data of the input"
                raise InputError(f"{written} is {what}: write to another file")
    return model


def _files(path: Path) -> list[Path]:
    return [path, *filter(Path.is_file, path.rglob("*"))] if path.is_dir() else container.files(path)


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path) if file.is_file())
