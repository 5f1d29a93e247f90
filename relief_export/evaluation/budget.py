"""The gate: what a file takes of the flash and what running it takes of the RAM, against a budget or an older file.

For each file::

    flash   its real bytes, external data included
    RAM     the planned arena of its activations at batch 1
            + the weights that a runtime unpacks into memory when it loads the file

Weights that lie in a file as they are used (dense, int8) can stay in flash and count there alone; those of the sparse,
packed, csr and ort formats are unpacked, and count in both. Code, stack and a runtime's own memory are in neither.

One file of a folder is checked against the budget: the named one, or else the smallest that fits among those that are
exact. A file that may lose accuracy is only taken when it is named, or when its tolerance is within ``accuracy_drop``.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relief_export import formats
from relief_export.errors import Failure, InputError, UnsupportedModelError
from relief_export.evaluation.validation import require_files
from relief_export.formats import onnx_file
from relief_export.formats.sizes import entropy_bound
from relief_export.graph.arena import plan_arena
from relief_export.graph.prepare import with_dimensions
from relief_export.printing import Prints, TextTable, percent
from relief_export.schema import did_you_mean, parse_share, parse_size
from relief_export.subjects import artifacts_folder, dense_of, is_single
from relief_export.targets import TARGETS, Target

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

    from relief_export.graph.arena import ArenaPlan

_NOT_LOADED = frozenset(name for name, form in formats.FORMATS.items() if not form.loadable)
"""Formats that no runtime loads as they are: listed, and only checked when they are named."""
_LARGEST = 3
_UNCOMPILED = "is generated C, whose flash is known once it is compiled: add --measure and a --target or --cc"


@dataclass(frozen=True)
class Budget:
    """What there is, and which file has to fit.

    Attributes:
        flash, ram: Bytes; None where they are not limited.
        target: The board that they are of.
        file: Name of the file to check; by default the smallest that fits is chosen.
        accuracy_drop: Largest accuracy (a fraction) that a chosen file's tolerance may allow to be lost; 0 chooses
            among the exact files.
    """

    flash: int | None = None
    ram: int | None = None
    target: Target | None = None
    file: str | None = None
    accuracy_drop: float = 0.0

    @classmethod
    def of(
        cls,
        *,
        flash: str | None = None,
        ram: str | None = None,
        target: str | None = None,
        file: str | None = None,
        accuracy_drop: float | str = 0.0,
    ) -> Budget:
        """Read sizes such as "256KiB", a share, and a name of ``TARGETS``, whose sizes the given ones replace.

        Raises:
            InputError: A size, the share or the target's name is wrong.
        """
        if target is not None and target not in TARGETS:
            raise InputError(f"there is no target {target!r}{did_you_mean(target, TARGETS)}")
        board = None if target is None else TARGETS[target]
        return cls(
            parse_size(flash) if flash is not None else (board.flash if board else None),
            parse_size(ram) if ram is not None else (board.ram if board else None),
            board,
            file,
            parse_share(accuracy_drop),
        )


@dataclass(frozen=True)
class FileSize:
    """What one file takes.

    Attributes:
        file: Its name. format: Its key in ``formats.FORMATS``; the file's suffix where no manifest says it.
        accuracy_drop: Accuracy that its tolerance allows to be lost; 0 for an exact file, None where it is not known.
        flash_bytes: Real bytes, all its files; None of generated C, whose source is no measure of what it compiles to.
        ram_bytes: Arena and unpacked weights; None where an activation has no known size.
        arena_bytes: The activations at batch 1. unpacked_bytes: Weights that a runtime makes of it at load.
        ram_unknown: Why ``ram_bytes`` is None.
        loads: Whether ONNX Runtime takes it as it is.
    """

    file: str
    format: str
    accuracy_drop: float | None
    flash_bytes: int | None
    ram_bytes: int | None
    arena_bytes: int | None
    unpacked_bytes: int
    ram_unknown: str | None
    loads: bool

    def fits(self, budget: Budget) -> bool:
        """Return True if it is within both budgets, as far as they are given."""
        flash = budget.flash is None or (self.flash_bytes is not None and self.flash_bytes <= budget.flash)
        return flash and (budget.ram is None or (self.ram_bytes is not None and self.ram_bytes <= budget.ram))


@dataclass(frozen=True)
class Growth:
    """The checked file beside an older one; changes are fractions of the older size, positive where it grew.

    Attributes:
        baseline: The older model or folder. file: Its file that was compared.
        flash_change, ram_change: None where a size is unknown, or was nothing.
        limit: The largest change that is allowed; None where none was given.
    """

    baseline: str
    file: str
    flash_bytes: int | None
    ram_bytes: int | None
    flash_change: float | None
    ram_change: float | None
    limit: float | None

    @property
    def where(self) -> str:
        """The compared file with its folder, or the one path where the baseline is the file itself."""
        return self.baseline if Path(self.baseline).name == self.file else f"{self.file} of {self.baseline}"


@dataclass(frozen=True)
class Audit(Prints):
    """What the files take, and whether the checked one fits.

    Attributes:
        subject: What was audited. budget: Against what.
        files: Every file. checked: The name of the one that the budget is about.
        weights_gzip_bytes: The weights, zeros in place, compressed. weights_bound_bytes: Entropy bound of their
            positions and float32 values. Both of weights alone, without what a file adds.
        arena: Plan for the activations of the checked file; None where the size of one is unknown.
        growth: Beside an older model, where one was given.
        notes: What a reader has to know, such as that the target runs no ONNX.
        failures: One for each budget that is exceeded.
    """

    subject: str
    budget: Budget
    files: tuple[FileSize, ...]
    checked: str
    weights_gzip_bytes: int
    weights_bound_bytes: int
    arena: ArenaPlan | None
    growth: Growth | None = None
    notes: tuple[str, ...] = ()
    failures: tuple[Failure, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether everything fits."""
        return not self.failures

    @property
    def asked(self) -> bool:
        """Whether there was anything to check: a budget, or a limit to the growth."""
        return self._limited or self._growth_limited

    @property
    def _limited(self) -> bool:
        return self.budget.flash is not None or self.budget.ram is not None

    @property
    def _growth_limited(self) -> bool:
        return self.growth is not None and self.growth.limit is not None

    @property
    def verdict(self) -> str:
        """The answer in words, which name what was asked for and nothing else."""
        # "Within budget" would be a promise where nothing was compared with anything.
        if not self.asked:
            return f"{self.checked}: no budget was given, nothing was checked"
        codes = {failure.code for failure in self.failures}
        parts = []
        if self._limited:
            parts.append("over budget" if codes & {"flash", "ram"} else "within budget")
        if self._growth_limited:
            grown = codes & {"flash_growth", "ram_growth"}
            parts.append("grown by more than is allowed" if grown else "grown by no more than is allowed")
        return f"{self.checked}: {', '.join(parts)}"

    @property
    def size(self) -> FileSize:
        """The row of the checked file."""
        return next(row for row in self.files if row.file == self.checked)

    def table(self) -> TextTable:
        """Return what every file takes; the one that the budget is about is marked."""
        rows = [
            (
                f"{row.file}{' <- checked' if self.asked and row.file == self.checked and len(self.files) > 1 else ''}",
                row.format,
                *("unknown" if size is None else f"{size:,}" for size in (row.flash_bytes, row.ram_bytes)),
            )
            for row in self.files
        ]
        # With the reasons, since who prints an answer of no wants to know by how much.
        title = "; ".join((self.verdict, *(failure.message for failure in self.failures)))
        return TextTable(title, ("file", "format", "flash, bytes", "RAM, bytes"), rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, ``ok`` first; of the arena, the tensors at its peak."""
        budget, plan = self.budget, self.arena
        return {
            "ok": self.ok,
            "failures": [asdict(each) for each in self.failures],
            "subject": self.subject,
            "budget": {
                "flash_bytes": budget.flash,
                "ram_bytes": budget.ram,
                "target": budget.target and {"name": budget.target.name, "title": budget.target.title},
                "file": budget.file,
                "accuracy_drop": budget.accuracy_drop,
            },
            "checked": self.checked,
            "verdict": self.verdict,
            "files": [asdict(row) for row in self.files],
            "weights_gzip_bytes": self.weights_gzip_bytes,
            "weights_bound_bytes": self.weights_bound_bytes,
            "arena": None if plan is None else plan.to_dict(),
            "growth": self.growth and asdict(self.growth),
            "notes": list(self.notes),
        }


def audit(
    subject: Path,
    budget: Budget,
    *,
    dimensions: Mapping[str, int] | None = None,
    baseline: Path | None = None,
    max_growth: float | str | None = None,
) -> Audit:
    """Measure a model, or every file of an artifacts or build folder, and check one of them against a budget.

    Args:
        subject: A model file, a csr folder, an artifacts folder, or a build folder.
        budget: What has to fit where.
        dimensions: Symbolic lengths of the inputs -> numbers, as in ``{"H": 224}``; see ``with_dimensions``.
        baseline: An older model or folder, of which the same file is compared.
        max_growth: Largest growth over the baseline that is allowed, a fraction or a percentage such as "2%".

    Raises:
        InputError: There is no such file or folder, a listed file is missing, no file may be chosen, or the growth is
            no share or has no baseline.
        IntegrityError: A file differs from the manifest.
        UnsupportedModelError: RAM is limited and the size of an activation is unknown.
    """
    if max_growth is not None and baseline is None:
        # A limit without effect is refused, since its user believes that it had one.
        raise InputError("the largest growth (max_growth) needs something to compare with: give a baseline")
    limit = None if max_growth is None else parse_share(max_growth)
    # Bytes of source code are no bytes of flash.
    if formats.c.is_program(subject):
        raise InputError(f"{subject} {_UNCOMPILED}")
    found = _measure(subject, dimensions or {})
    chosen = _choose(subject, found, budget)
    row, arena = found[chosen].size, found[chosen].arena
    if budget.ram is not None and row.ram_bytes is None:
        raise UnsupportedModelError(
            f"{subject} cannot be checked against a budget of RAM: {row.ram_unknown}, or set symbolic "
            "lengths with --dim NAME=SIZE"
        )
    failures = [*_over_budget(row, arena, budget)]
    growth = None
    if baseline is not None:
        older = _measure(baseline, dimensions or {})
        # The same file where the older folder has it: a change of format is no growth of the network.
        named = chosen if chosen in older else _choose(baseline, older, replace(budget, file=None))
        growth = _growth(baseline, row, older[named].size, limit)
        failures += _grown(row, growth)
    squeezed, bound = _compressed(found[chosen].network)
    rows = tuple(each.size for each in found.values())
    notes = _notes(budget.target)
    return Audit(str(subject), budget, rows, chosen, squeezed, bound, arena, growth, notes, tuple(failures))


@dataclass(frozen=True)
class _Measured:
    """A file's size, the plan of its activations, and its network, dense in memory."""

    size: FileSize
    arena: ArenaPlan | None
    network: ir.Model


def _measure(subject: Path, dimensions: Mapping[str, int]) -> dict[str, _Measured]:
    """Measure every file of ``subject``, by name."""
    files: dict[str, tuple[Path, str, float | None, list[Path], ir.Model]] = {}
    if is_single(subject):
        paths = [*subject.iterdir()] if subject.is_dir() else onnx_file.files(subject)
        form = "csr" if subject.is_dir() else subject.suffix.lstrip(".")
        files[subject.name] = (subject, form, None, paths, formats.read(subject))
    else:
        manifest = formats.read_manifest(artifacts_folder(subject))
        dense = formats.read(manifest.path(dense_of(manifest)))
        for artifact in manifest.artifacts:
            require_files(manifest.folder, artifact)
            # Sizes of a file that somebody has changed since are no sizes of this export.
            manifest.check(artifact)
            path, paths = manifest.path(artifact), [manifest.folder / file.path for file in artifact.files]
            # Formats that go one way hold the network of the dense file.
            network = dense if formats.FORMATS[artifact.format].read is None else formats.read(path)
            files[artifact.name] = (path, artifact.format, artifact.tolerance.accuracy_drop, paths, network)
    found = {}
    for name, (path, form, drop, paths, network) in files.items():
        size, arena, unknown = sum(each.stat().st_size for each in paths if each.is_file()), None, None
        try:
            # An activation of unknown size is no failure yet: only a budget of RAM needs the plan.
            arena = plan_arena(with_dimensions(network, dimensions) if dimensions else network)
        except UnsupportedModelError as error:
            unknown = str(error)
        unpacked = _unpacked_bytes(path, form, network)
        planned = None if arena is None else arena.bytes
        if formats.c.is_program(path):
            # The program has a plan of its own, with borders around its maps, of which the network knows nothing.
            planned = formats.c.about(path).arena_bytes
        need = None if planned is None else planned + unpacked
        flash = None if formats.c.is_program(path) else size
        row = FileSize(name, form, drop, flash, need, planned, unpacked, unknown, form not in _NOT_LOADED)
        found[name] = _Measured(row, arena, network)
    return _with_names(found)


def _with_names(found: dict[str, _Measured]) -> dict[str, _Measured]:
    """Give the plans of packed files the names of the file that they were packed from.

    Packing shortens names, and a message about ``B`` helps nobody to make an activation smaller.
    """
    by_format = {each.size.format: each.arena for each in found.values()}
    named = {}
    for name, each in found.items():
        packed = each.size.format.startswith("packed")
        plain = by_format.get("int8" if each.size.format == "packed-int8" else "dense") if packed else None
        own = each.arena
        # The same network has the same plan; of another one the names would be wrong.
        same = plain is not None and own is not None and _figures(plain) == _figures(own)
        named[name] = replace(each, arena=plain) if same else each
    return named


def _figures(plan: ArenaPlan) -> tuple[object, ...]:
    places = [(each.bytes, each.first, each.last, each.offset) for each in plan.tensors]
    return plan.bytes, plan.lower_bound, plan.peak_op, sorted(places)


def _unpacked_bytes(path: Path, form: str, network: ir.Model) -> int:
    """Return the bytes of the weights that are not in the file as they are used: a runtime makes them in memory."""
    stored: set[str] = set()
    # A program reads its tables where they lie.
    if formats.c.is_program(path):
        return 0
    if form == "ort":
        # Written from the sparse form, and unpacked like it.
        with tempfile.TemporaryDirectory() as folder:
            sparse = Path(folder) / "model.onnx"
            formats.FORMATS["sparse"].write(network, sparse, formats.Options(verify=False))
            stored = _plain(sparse)
    elif path.is_file():
        stored = _plain(path)
    values = network.graph.initializers.items()
    return sum(
        value.const_value.nbytes for name, value in values if value.const_value is not None and name not in stored
    )


def _plain(path: Path) -> set[str]:
    """Return the names of the tensors that an ONNX file stores as they are."""
    return {tensor.name for tensor in onnx_file.load_proto(path).graph.initializer}


def _choose(subject: Path, found: Mapping[str, _Measured], budget: Budget) -> str:
    """Return the name of the file that the budget is about."""
    if budget.file is not None:
        if budget.file not in found:
            raise InputError(f"{subject} has no file {budget.file!r}{did_you_mean(budget.file, found)}")
        if found[budget.file].size.flash_bytes is None:
            raise InputError(f"{budget.file} of {subject} {_UNCOMPILED}")
        return budget.file
    if is_single(subject):
        return next(iter(found))
    loaded = [each.size for each in found.values() if each.size.loads]
    allowed = [row for row in loaded if (row.accuracy_drop or 0.0) <= budget.accuracy_drop]
    if not allowed:
        what = "no file that a runtime loads" if not loaded else "no exact file"
        raise InputError(f"{subject} has {what}: export a dense one, allow an accuracy_drop, or name a file")
    # Where none fits, the smallest is checked: its failures say by how much.
    return min(allowed, key=lambda row: (not row.fits(budget), row.flash_bytes or 0)).file


def _over_budget(row: FileSize, arena: ArenaPlan | None, budget: Budget) -> list[Failure]:
    found = []
    if budget.flash is not None and row.flash_bytes is not None and row.flash_bytes > budget.flash:
        message = f"flash: {row.file} has {row.flash_bytes:,} bytes; the budget is {budget.flash:,}"
        found.append(Failure("flash", row.file, row.flash_bytes, budget.flash, "bytes", message))
    if budget.ram is not None and row.ram_bytes is not None and arena is not None and row.ram_bytes > budget.ram:
        parts = f"an arena of {arena.bytes:,} (lower bound {arena.lower_bound:,})"
        parts += f" and {row.unpacked_bytes:,} of weights that are unpacked at load" if row.unpacked_bytes else ""
        tensors = ", ".join(f"{tensor.name} {tensor.bytes:,}" for tensor in arena.peak_tensors[:_LARGEST])
        message = (
            f"RAM: {row.file} needs {row.ram_bytes:,} bytes, {parts}; the budget is {budget.ram:,}; "
            f"the arena peaks at {arena.peak_op} {arena.peak!r}, with {tensors} bytes"
        )
        found.append(Failure("ram", row.file, row.ram_bytes, budget.ram, "bytes", message))
    return found


def _growth(baseline: Path, row: FileSize, older: FileSize, limit: float | None) -> Growth:
    def change(now: int | None, then: int | None) -> float | None:
        # From nothing to something is no ratio.
        return None if now is None or not then else now / then - 1

    flash, ram = change(row.flash_bytes, older.flash_bytes), change(row.ram_bytes, older.ram_bytes)
    return Growth(str(baseline), older.file, older.flash_bytes, older.ram_bytes, flash, ram, limit)


def _grown(row: FileSize, growth: Growth) -> list[Failure]:
    found = []
    for code, now, then, change in (
        ("flash", row.flash_bytes, growth.flash_bytes, growth.flash_change),
        ("ram", row.ram_bytes, growth.ram_bytes, growth.ram_change),
    ):
        if growth.limit is not None and change is not None and change > growth.limit:
            message = (
                f"{'RAM' if code == 'ram' else code}: {row.file} needs {now:,} bytes, "
                f"{percent(change, sign=True)} against {then:,} of {growth.where}; "
                f"{percent(growth.limit)} more is allowed"
            )
            found.append(Failure(f"{code}_growth", row.file, change, growth.limit, "fraction", message))
    return found


def _notes(target: Target | None) -> tuple[str, ...]:
    if target is None or target.core is None:
        return ()
    note = f"ONNX Runtime does not run on {target.title}: these are the sizes of files, to plan with; "
    return (f"{note}what runs there is the C program of the format c, which audit --measure compiles",)


def _compressed(model: ir.Model) -> tuple[int, int]:
    """Return the bytes of the dense weights after gzip, and the entropy bound of their float32 values and positions."""
    weights = [
        value.const_value.numpy()
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.dtype.is_floating_point() and value.const_value.size
    ]
    bound = sum(entropy_bound(array) for array in weights)
    return formats.gzip_bytes(np.ascontiguousarray(array).tobytes() for array in weights), math.ceil(bound)
