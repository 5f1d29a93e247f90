"""The audit: real bytes of each format against the flash, the planned arena against the RAM."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from relief_export import formats
from relief_export.device.targets import TARGETS, Target
from relief_export.errors import Failure, InputError, UnsupportedModelError
from relief_export.evaluation.validation import artifacts_folder, require_files
from relief_export.formats import onnx_file
from relief_export.formats.sizes import entropy_bound
from relief_export.formats.values import encode
from relief_export.graph.arena import plan_arena

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

    from relief_export.graph.arena import ArenaPlan

_UNITS = {
    "": 1, "b": 1,
    "k": 1024, "kib": 1024, "kb": 1000,
    "m": 1024**2, "mib": 1024**2, "mb": 1000**2,
    "g": 1024**3, "gib": 1024**3, "gb": 1000**3,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([a-z]*)\s*", re.IGNORECASE)
_NOT_LOADED = frozenset(name for name, form in formats.FORMATS.items() if not form.loadable)
"""Formats that no runtime loads as they are: listed, but never what is held against the flash."""
_LARGEST = 3


def parse_size(text: str) -> int:
    """Return bytes: "256KiB" and "256k" are 256·1024 (as linkers count), "256kB" is 256·1000, "4096" is itself.

    Raises:
        InputError: It is no size.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise InputError(f"{text!r} is no size: write a number with B, k, KiB, kB, M, MiB, MB, G, GiB or GB")
    return int(float(match[1]) * unit)


@dataclass(frozen=True)
class Budget:
    """What there is: bytes of flash and of RAM, each None where it is not limited."""

    flash: int | None = None
    ram: int | None = None
    target: Target | None = None

    @classmethod
    def of(cls, *, flash: str | None = None, ram: str | None = None, target: str | None = None) -> Budget:
        """Read sizes such as "256KiB" and a name of ``TARGETS``, whose own sizes the given ones replace.

        Raises:
            InputError: A size or the target's name is wrong.
        """
        if target is not None and target not in TARGETS:
            raise InputError(f"there is no target {target!r}; there are {', '.join(TARGETS)}")
        board = None if target is None else TARGETS[target]
        return cls(
            parse_size(flash) if flash is not None else (board.flash if board else None),
            parse_size(ram) if ram is not None else (board.ram if board else None),
            board,
        )


@dataclass(frozen=True)
class FlashRow:
    """One format's real bytes, all files; ``fits`` is None without a budget and for a format that no runtime loads."""

    name: str
    format: str
    bytes: int
    fits: bool | None


@dataclass(frozen=True)
class Audit:
    """The bill against the budget.

    Attributes:
        flash: Every format. chosen: The smallest that a runtime loads, which is held against the budget.
        gzip_bytes: The dense weights compressed. bound_bytes: Entropy bound of their positions and float32 values.
        arena: Plan for the activations of the dense model at batch 1; None where the size of one is unknown.
        arena_unknown: Why there is no plan; None where there is one.
        failures: One sentence for each budget that is exceeded.
    """

    subject: str
    budget: Budget
    flash: tuple[FlashRow, ...]
    chosen: str
    gzip_bytes: int
    bound_bytes: int
    arena: ArenaPlan | None
    arena_unknown: str | None
    failures: tuple[Failure, ...]

    @property
    def ok(self) -> bool:
        """Whether everything fits."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, ``ok`` first; of the arena, the tensors at its peak."""
        plan = None if self.arena is None else self.arena.to_dict()
        arena = plan and {key: value for key, value in plan.items() if key != "tensors"}
        return {
            "ok": self.ok,
            "failures": [asdict(each) for each in self.failures],
            "subject": self.subject,
            "budget": asdict(self.budget),
            "flash": [asdict(row) for row in self.flash],
            "chosen": self.chosen,
            "gzip_bytes": self.gzip_bytes,
            "bound_bytes": self.bound_bytes,
            "arena": arena,
            "arena_unknown": self.arena_unknown,
        }


def audit(subject: Path, budget: Budget) -> Audit:
    """Hold a model file, or every artifact of a build folder, against a budget.

    Args:
        subject: An ``.onnx`` file, an artifacts folder, or a build folder that has one.
        budget: Bytes of flash for the smallest file that a runtime loads, and of RAM for the activations at batch 1.

    Raises:
        InputError: There is no such file or folder, or a listed file is missing.
        UnsupportedModelError: RAM is limited and the size of an activation is unknown.
    """
    files, model_path = _files(subject)
    model = formats.read(model_path)
    arena, why = _planned(model, subject, budget.ram)
    loaded = [(name, kind, size) for name, kind, size in files if kind not in _NOT_LOADED]
    chosen, _, smallest = min(loaded, key=lambda file: file[2])
    limit = budget.flash
    rows = tuple(
        FlashRow(name, kind, size, None if limit is None or kind in _NOT_LOADED else size <= limit)
        for name, kind, size in files
    )
    failures = []
    if limit is not None and smallest > limit:
        message = f"flash: {chosen}, the smallest file, has {smallest:,} bytes; the budget is {limit:,}"
        failures.append(Failure("flash", chosen, smallest, limit, "bytes", message))
    if budget.ram is not None and arena is not None and arena.bytes > budget.ram:
        failures.append(
            Failure("ram", model_path.name, arena.bytes, budget.ram, "bytes", _too_much_ram(arena, budget.ram))
        )
    squeezed, bound = _compressed(model)
    return Audit(str(subject), budget, rows, chosen, squeezed, bound, arena, why, tuple(failures))


def _planned(model: ir.Model, subject: Path, limit: int | None) -> tuple[ArenaPlan | None, str | None]:
    """Return the plan, or why there is none, which is refused only where the RAM is limited."""
    try:
        return plan_arena(model), None
    except UnsupportedModelError as error:
        if limit is not None:
            raise UnsupportedModelError(f"{subject} cannot be held against a budget of RAM: {error}") from None
        return None, str(error)


def _compressed(model: ir.Model) -> tuple[int, int]:
    """Return the bytes of the dense weights after gzip, and the entropy bound of their float32 values and positions."""
    weights = [
        value.const_value.numpy()
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.dtype.is_floating_point() and value.const_value.size
    ]
    bound = sum(entropy_bound(array, encode(array, "f32", 0)) for array in weights)
    return formats.gzip_bytes(np.ascontiguousarray(array).tobytes() for array in weights), math.ceil(bound)


def _too_much_ram(arena: ArenaPlan, limit: int) -> str:
    tensors = ", ".join(f"{tensor.name} {tensor.bytes:,}" for tensor in arena.peak_tensors[:_LARGEST])
    return (
        f"RAM: the arena has {arena.bytes:,} bytes (lower bound {arena.lower_bound:,}); the budget is {limit:,}; "
        f"it peaks at {arena.peak_op} {arena.peak!r}, with {tensors} bytes"
    )


def _files(subject: Path) -> tuple[list[tuple[str, str, int]], Path]:
    """Return (name, format, bytes) of what is held against the flash, and the file whose activations are planned."""
    if subject.is_file():
        size = sum(file.stat().st_size for file in onnx_file.files(subject) if file.is_file())
        return [(subject.name, subject.suffix.lstrip("."), size)], subject
    if not subject.is_dir():
        raise InputError(f"{subject} does not exist: give a model or a build folder")
    folder = artifacts_folder(subject)
    manifest = formats.read_manifest(folder)
    for artifact in manifest.artifacts:
        require_files(folder, artifact)
    if all(artifact.format in _NOT_LOADED for artifact in manifest.artifacts):
        raise InputError(f"{folder} has no artifact that a runtime loads: export a dense one")
    dense = next((artifact for artifact in manifest.artifacts if artifact.format == "dense"), manifest.artifacts[0])
    sizes = [
        (artifact.name, artifact.format, sum((folder / file.path).stat().st_size for file in artifact.files))
        for artifact in manifest.artifacts
    ]
    return sizes, manifest.path(dense)
