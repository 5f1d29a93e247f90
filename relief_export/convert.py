"""One model file in, one out: what ``shrink`` and ``convert`` do to models of any origin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relief_export import formats
from relief_export.errors import InputError
from relief_export.formats import container
from relief_export.graph.cost import Cost, cost
from relief_export.graph.fold import fold
from relief_export.graph.shrink import ShrinkResult, shrink

if TYPE_CHECKING:
    import onnx_ir as ir

_VALUES: dict[str, formats.Values] = {"codebook": "codebook256"}
"""Short names of the values of packed weights."""
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
        }


def shrink_file(source: Path, target: Path, *, strict: bool = False) -> Shrunk:
    """Fold and shrink the model at ``source`` and write it to ``target`` as dense ONNX.

    Raises:
        InputError: ``source`` is absent, no ONNX model, or has a file that ``target`` would replace.
        UnsupportedModelError: The model has something the rewrite must not guess about.
    """
    model = _read(source, target)
    result = shrink(fold(model), strict=strict)
    before = cost(model)
    after = cost(result.model, baseline=before)
    artifact = formats.FORMATS["dense"].write(result.model, target, formats.Options())
    return Shrunk(result, before, after, _bytes(source), artifact)


def convert_file(
    source: Path, target: Path, kind: str, *, values: str = "f32", calibration: Path | None = None
) -> formats.Artifact:
    """Write the model at ``source``, in any readable format, to ``target`` as ``kind``.

    Raises:
        InputError: ``source`` is absent or no model, or has a file that ``target`` would replace, or int8 is asked for
            without calibration samples.
    """
    if "int8" in kind and calibration is None:
        raise InputError(f"{kind} is calibrated on samples of the input: give --calibration X.npz with an array x")
    model = _read(source, target)
    options = formats.Options(values=_VALUES.get(values, values), calibration=calibration)  # type: ignore[arg-type]
    return formats.FORMATS[_KINDS.get(kind, kind)].write(model, target, options)


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
