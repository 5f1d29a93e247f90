"""One model file in, one out: what ``shrink`` and ``convert`` do to models of any origin."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relief_export import formats
from relief_export.errors import InputError, UnsupportedModelError
from relief_export.formats import csr, onnx_file
from relief_export.formats.runtime import load
from relief_export.graph.cost import Cost, cost
from relief_export.graph.prepare import fold, with_dimensions
from relief_export.graph.shrink import ShrinkResult, shrink

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import onnx_ir as ir


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
            "file_bytes": {"before": self.bytes_before, "after": self.artifact.bytes},
            "notes": list(self.artifact.notes),
        }


def shrink_file(
    source: Path,
    target: Path,
    *,
    strict: bool = False,
    dimensions: Mapping[str, int] | None = None,
    verify: bool = True,
) -> Shrunk:
    """Fold and shrink the model at ``source`` and write it to ``target`` as dense ONNX.

    Raises:
        InputError: ``source`` is absent, no ONNX model, or has a file that ``target`` would replace.
        UnsupportedModelError: The model has something the rewrite must not guess about.
    """
    # Before the model is there: to look into a file takes twice its size for a moment.
    form = formats.compact_form(source) if source.exists() else None
    model, stored = _read(source, target)
    if dimensions:
        model = with_dimensions(model, dimensions)
    # Of the model as it was read, not as it was folded: the savings of both are shown.
    before = cost(model)
    result = shrink(fold(model), strict=strict)
    del model  # a file is written from copies of the weights: those that were cut need not be there too
    after = cost(result.model, baseline=before)
    gc.collect()  # what the analysis knew refers to itself in circles, and the runtime is about to need the room
    artifact = _write(result.model, source, target, "dense", formats.Options(verify=verify))
    if form is not None:
        note = (
            f"the input was {form} ({stored:,} bytes), what was written is not ({artifact.bytes:,} bytes): "
            f"convert --to {form} makes {target.name} {form} again"
        )
        artifact = replace(artifact, notes=(*artifact.notes, note))
    return Shrunk(result, before, after, stored, artifact)


def convert_file(
    source: Path,
    target: Path,
    kind: str,
    *,
    calibration: Path | None = None,
    verify: bool = True,
    program: str = "net",
    onnxruntime: bool = False,
    dimensions: Mapping[str, int] | None = None,
    quantized_io: bool = False,
    layout: str | None = None,
) -> formats.Artifact:
    """Write the model at ``source``, in any readable format, to ``target`` as ``kind``.

    Args:
        source: A model file or a csr folder.
        target: Where to write.
        kind: A name of ``formats.FORMATS``.
        calibration: Samples of the input, for formats that are calibrated.
        verify: Open what was written in ONNX Runtime. A source that the runtime does not load either, because of
            operators of one's own, is converted all the same, and a note says that nothing was opened.
        program: What generated C is called.
        onnxruntime: Add an operator for ONNX Runtime to it.
        dimensions: Sizes of symbolic axes by name, which generated C needs.
        quantized_io: Let integers in and out be the default of a c-mcu-q8 program.
        layout: Arrange a c-mcu program for "arduino", "zephyr" or "esp-idf".

    Raises:
        InputError: ``source`` is absent or no model, or has a file that ``target`` would replace, or the samples that
            the format needs are missing or those given are of no use to it.
        UnsupportedModelError: The format cannot hold the model.
    """
    check_calibration([kind], given=calibration is not None)
    if layout is not None and not kind.startswith("c-mcu"):
        raise InputError(f"--layout arranges programs for microcontrollers: use --to c-mcu or leave it out with {kind}")
    if quantized_io and kind != "c-mcu-q8":
        raise InputError(f"--quantized-io is for --to c-mcu-q8: leave it out with {kind}")
    model, _ = _read(source, target)
    options = formats.Options(
        calibration=calibration, verify=verify, program=program, onnxruntime=onnxruntime, dimensions=dimensions,
        quantized_io=quantized_io, layout=layout,
    )  # fmt: skip
    return _write(model, source, target, kind, options)


def check_calibration(kinds: Iterable[str], *, given: bool) -> None:
    """Check that calibration samples are given exactly where one of the formats ``kinds`` needs them.

    Raises:
        InputError: They are missing, or would be ignored.
    """
    names = [name for name, form in formats.FORMATS.items() if form.calibrated]
    wanted = [kind for kind in kinds if kind in names]
    if wanted and not given:
        raise InputError(f"{wanted[0]} is calibrated on samples of the input: give --calibration X.npz with an array x")
    if given and not wanted:
        raise InputError(f"--calibration is for --to {' and '.join(names)}: leave it out")


def _write(model: ir.Model, source: Path, target: Path, kind: str, options: formats.Options) -> formats.Artifact:
    """Write ``model``; where ONNX Runtime refuses what was written, find out whether the source is to blame."""
    form = formats.FORMATS[kind]
    try:
        return form.write(model, target, options)
    except UnsupportedModelError:
        try:  # the graph of a csr folder is a model of its own, whose inputs are the weights
            load(source / csr.GRAPH if source.is_dir() else source, name=str(source))
        except UnsupportedModelError as error:
            refusal = str(error)
        else:
            raise
    if form.made_by_runtime:
        raise UnsupportedModelError(f"{kind} is made by ONNX Runtime, which has to load the source: {refusal}")
    written = form.write(model, target, replace(options, verify=False))
    note = f"not opened in ONNX Runtime, which does not load the source either: {refusal}"
    return replace(written, notes=(*written.notes, note))


def _read(source: Path, target: Path) -> tuple[ir.Model, int]:
    """Read a model that is to be written to ``target``; return the bytes of its files, too.

    Raises:
        InputError: ``source`` is absent or no model, or has a file that ``target`` would replace.
    """
    # Weights are mapped from the source while the target, and where it is dense NAME.data, is written or removed. Its
    # files are looked for before it is read, which for a moment takes as much memory again.
    files = _files(source) if source.exists() else []
    for own in files:
        for written in (target, onnx_file.data_path(target)):
            if written.exists() and own.exists() and written.samefile(own):
                what = "the input itself" if own == source else "the external data of the input"
                raise InputError(f"{written} is {what}: write to another file")
    stored = sum(own.stat().st_size for own in files if own.is_file())
    return formats.read(source), stored


def _files(path: Path) -> list[Path]:
    return [path, *filter(Path.is_file, path.rglob("*"))] if path.is_dir() else onnx_file.files(path)
