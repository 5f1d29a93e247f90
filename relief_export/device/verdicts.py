"""Two answers about a network on a device: does it fit as its compiler measures it, and does it compute the same there?

Neither needs the device. What an emulator counts are instructions; the milliseconds given with them are instructions at
one a cycle, which no core of the table beats for long and slow memories stay far behind. They are no measured time.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from relief_export.device.emulator import emulate
from relief_export.device.measure import MeasuredSizes, measure
from relief_export.device.toolchain import Program, Toolchain
from relief_export.errors import Failure, InputError
from relief_export.evaluation.budget import Budget
from relief_export.evaluation.compare import Agreement, Check, Judged, judge
from relief_export.evaluation.compare import measure as distance
from relief_export.formats.artifact import check_listed
from relief_export.printing import TextTable, percent
from relief_export.records import DEVICE_RECORDS, Record, locked
from relief_export.targets import CORES, TARGETS, core_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from relief_export.evaluation import Arrays
    from relief_export.formats import Artifact, Tolerance


@dataclass(frozen=True)
class Fit:
    """Measured sizes against a budget.

    Attributes:
        measured: By the name of the artifact's folder.
        failures: One for each size that is over the budget.
    """

    budget: Budget
    measured: dict[str, MeasuredSizes]
    failures: tuple[Failure, ...]

    @property
    def ok(self) -> bool:
        """Whether everything fits."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, ``ok`` first."""
        measured = {name: found.to_dict() for name, found in self.measured.items()}
        budget = {
            "flash_bytes": self.budget.flash,
            "ram_bytes": self.budget.ram,
            "target": self.budget.target and {"name": self.budget.target.name, "title": self.budget.target.title},
        }
        failures = [asdict(failure) for failure in self.failures]
        return {"ok": self.ok, "failures": failures, "budget": budget, "measured": measured}


def fit(
    subject: Path,
    *,
    flash: str | None = None,
    ram: str | None = None,
    target: str | None = None,
    cc: str | None = None,
    optimise: str = "s",
) -> Fit:
    """Measure every C artifact of a folder with a target's compiler, and compare its sizes with a budget.

    Args:
        subject: A folder that ``convert --to c`` wrote, an artifacts folder, or a build folder that has one.
        flash: Budget for code and tables, as in 256KiB; a board's own flash by default.
        ram: Budget for variables, arena, input, output and stack; a board's own RAM by default.
        target: A board or a core.
        cc: A compiler with its flags, in place of the target's.
        optimise: Level of optimisation: ``s``, ``2``, ...

    Raises:
        InputError: There is no C artifact, a size or name is wrong, or the compiler refuses the sources.
        MissingToolError: The compiler is not installed.
    """
    # A core alone has no memories to compare with; only a board has.
    budget = Budget.of(flash=flash, ram=ram, target=None if target in CORES else target)
    measured = {path.name: measure(path, target=target, cc=cc, optimise=optimise) for path in c_artifacts(subject)}
    failures = []
    for name, found in measured.items():
        if budget.flash is not None and found.flash_bytes > budget.flash:
            message = (
                f"flash: {name} takes {found.flash_bytes:,} bytes, {found.flash_bytes - found.objects_bytes:,} of them "
                f"library routines; the budget is {budget.flash:,}"
            )
            failures.append(Failure("flash", name, found.flash_bytes, budget.flash, "bytes", message))
        if budget.ram is not None and found.ram_bytes > budget.ram:
            taken, parts = found.to_dict(), ("arena", "input", "output", "stack", "data", "bss")
            sizes = ", ".join(f"{part} {taken[f'{part}_bytes'] or 0:,}" for part in parts)
            message = f"RAM: {name} takes {found.ram_bytes:,} bytes ({sizes}); the budget is {budget.ram:,}"
            failures.append(Failure("ram", name, found.ram_bytes, budget.ram, "bytes", message))
    return Fit(budget, measured, tuple(failures))


def c_artifacts(subject: Path) -> list[Path]:
    """Return the folders of C sources in a folder, or itself.

    Raises:
        InputError: There is none.
    """
    # The folder itself before those in it, so that an artifact's own subfolders are not taken for others.
    for place in (subject, subject / "artifacts"):
        for folders in ([place], sorted(path for path in place.glob("*") if path.is_dir())):
            found = []
            for folder in folders:
                try:
                    Program.find(folder)
                except InputError:
                    continue
                found.append(folder)
            if found:
                return found
    raise InputError(f"{subject} has no C artifact to compile: make one with 'relief-export convert MODEL OUT --to c'")


@dataclass(frozen=True)
class DeviceRun(Judged):
    """A network in an emulator against a reference.

    Attributes:
        target: The board or core. samples: How many it ran.
        unit: What was counted: instructions, or clock cycles. mean_count: Of a sample. largest_count: Of any sample.
        nominal_seconds: Mean count at one a cycle of the board's clock: not measured time. None for a core alone.
        stack_bytes: The deepest stack that was seen.
        agreement: How far the outputs are from the reference's; None without one.
        equal: Share of the outputs whose every bit is the reference's. accuracy: None without labels.
        checks: The agreement against a tolerance.
        record: Where it is kept for the report; None where no manifest lists the program.
    """

    target: str
    samples: int
    unit: str
    mean_count: float
    largest_count: int
    nominal_seconds: float | None
    stack_bytes: int
    agreement: Agreement | None
    equal: float | None
    accuracy: float | None
    checks: tuple[Check, ...]
    record: str | None = None

    def table(self) -> TextTable:
        """Return what was counted and how far the outputs are from the reference's."""
        rows = [
            ("samples", f"{self.samples:,}"),
            (f"{self.unit} a sample, mean", f"{self.mean_count:,.0f}"),
            (f"{self.unit} a sample, most", f"{self.largest_count:,}"),
            ("stack, bytes", f"{self.stack_bytes:,}"),
        ]
        if self.nominal_seconds is not None:
            rows.insert(3, ("ms at one a cycle, not measured time", f"{1000 * self.nominal_seconds:,.3f}"))
        if self.agreement is not None and self.equal is not None:
            error = self.agreement.relative_error
            rows.append(("relative error", "not finite" if error is None else f"{error:.3g}"))
            rows.append(("outputs equal in every bit", percent(self.equal)))
            if self.agreement.same_predictions is not None:
                rows.append(("same prediction", percent(self.agreement.same_predictions)))
        if self.accuracy is not None:
            rows.append(("accuracy", percent(self.accuracy)))
        return TextTable(f"on {self.target}", ("", ""), rows)


def run_on(
    target: str,
    subject: Path,
    data: Arrays,
    *,
    tolerance: Tolerance,
    optimise: str = "s",
    defines: Sequence[str] = (),
) -> DeviceRun:
    """Run an artifact in an emulator over samples and compare its outputs with the reference's.

    A program that a manifest lists leaves a record in the build folder, or in the folder that an export wrote: what was
    counted and compared, with the sizes that the same compiler and flags give.

    Args:
        target: A board or a core.
        subject: What ``convert --to c`` wrote, or an artifacts folder or a build folder that has one program in C.
        data: Samples, labels and reference outputs; without the last nothing is compared.
        tolerance: How far the outputs may be from the reference's.
        optimise: Level of optimisation: ``s``, ``2``, ...
        defines: Macros to compile with, such as ``NET_QUANTIZED_IO``.

    Raises:
        InputError: There is not one program, the samples do not fit the network, the program does not fit the chip, the
            run fails, or another process works in the build folder.
        IntegrityError: The program is not the one that its manifest lists.
        MissingToolError: The compiler or the emulator is not installed.
        UnsupportedModelError: There is no emulator of that core.
    """
    programs = c_artifacts(subject)
    if len(programs) > 1:
        names = ", ".join(path.name for path in programs)
        raise InputError(f"{subject} has {len(programs)} programs in C ({names}): give the folder of one of them")
    # An only program is found in whatever folder is given; the manifest lists the one that it lies in.
    place = Program.find(programs[0]).folder.resolve()
    above = place.parent.parent
    home = above if place.parent.name == "artifacts" and (above / "recipe.toml").is_file() else place.parent
    # A folder that an export alone wrote has no stages that could work in it.
    with locked(home, shared=True) if home == above else nullcontext():
        started, listed = time.perf_counter(), check_listed(place)
        done = _run(target, programs[0], data, tolerance, optimise, defines, name=listed.name if listed else None)
        if listed is None:
            return done
        measured = measure(place, target=target, optimise=optimise, defines=defines)
        outcome = _outcome(done, listed, measured)
        inputs = {(place.parent / file.path).relative_to(home).as_posix(): file.sha256 for file in listed.files}
        path = home / DEVICE_RECORDS.replace("*", target, 1).replace("*", listed.name, 1)
        Record("run-on", {}, inputs, round(time.perf_counter() - started, 3), outcome).write(path)
        return replace(done, record=str(path))


def _outcome(done: DeviceRun, program: Artifact, measured: MeasuredSizes) -> dict[str, Any]:
    """Return what the record of a run holds."""
    return {
        "program": program.name,
        "format": program.format,
        "title": measured.processor,
        "compiler_version": Toolchain.of(target=done.target).version,
        "sizes": measured.to_dict(),
        # Without the path of this record, which says nothing in it.
        "run": {key: value for key, value in done.to_dict().items() if key != "record"},
    }


def _run(  # noqa: PLR0917  # what run_on was given
    target: str,
    folder: Path,
    data: Arrays,
    tolerance: Tolerance,
    optimise: str,
    defines: Sequence[str],
    *,
    name: str | None,
) -> DeviceRun:
    """Run the program and compare; messages call it ``name``, or by its folder."""
    given = data.one_input
    x = given.astype(np.float32) if given.dtype.kind == "f" else given
    found = emulate(folder, target, x, optimise=optimise, defines=defines)
    agreement, equal = None, None
    checks: tuple[Check, ...] = ()
    if data.logits is not None:
        expected = np.asarray(data.logits).reshape(len(x), -1)
        agreement = distance(found.outputs, expected, data.y)
        equal = float((found.outputs == expected).mean())
        checks = tuple(judge(agreement, tolerance, f"{name or folder.name} on {target}", optimised=optimise != "0"))
    clock = TARGETS[target].clock if target in TARGETS else None
    mean = float(found.counts.mean())
    return DeviceRun(
        target=target,
        samples=len(x),
        unit=core_of(target).unit,
        mean_count=mean,
        largest_count=int(found.counts.max()),
        nominal_seconds=None if clock is None else mean / clock,
        stack_bytes=found.stack_bytes,
        agreement=agreement,
        equal=equal,
        accuracy=None if data.y is None else float((found.outputs.argmax(axis=1) == data.y).mean()),
        checks=checks,
    )
