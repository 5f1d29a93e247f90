"""How a stage runs: skipped when its record says that nothing it depends on changed, resumed when it was interrupted.

A stage is up to date when its record holds the same parts of the recipe and the same SHA-256 of every input, and its
outputs are there. The record is written last; an interrupted stage has none, and goes on from the checkpoints that it
finds, which know by themselves what they belong to.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relief_export.errors import InputError, ReliefError
from relief_export.formats import artifact
from relief_export.recipe import Recipe, load_recipe
from relief_export.records import RECORDS, Record, as_read, read_record, sha256, write_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from relief_export.progress import Progress

Outcome = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What a stage works on.

    Attributes:
        folder: The build folder.
        recipe: The resolved recipe.
        progress: Where to report it; None where nobody looks.
        data: Samples for validation, instead of the recipe's test set.
        strict: Validation fails where generated C cannot be compiled.
        captured: The network's graph under "graph", once a stage has captured it, for the later stages of this process:
            tracing takes seconds. It is not kept on the disk, where it would outlive the code that it was traced from.
    """

    folder: Path
    recipe: Recipe
    progress: Progress | None = None
    data: Path | None = None
    strict: bool = False
    captured: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def network(self) -> str:
        """Folder in the build folder of the network that is shipped: the quantised one where the recipe asks for it."""
        return "relieved" if self.recipe.quantise is None else "quantised"

    @property
    def maker(self) -> str:
        """Name of the stage that makes it."""
        return "relieve" if self.recipe.quantise is None else "quantise"


@dataclass(frozen=True)
class Stage:
    """One row of the table of stages.

    Attributes:
        name: What the command line calls it.
        keys: The recipe's keys that it depends on.
        inputs: Globs in the build folder of the files it reads; ``{network}`` is the folder of the shipped network.
        outputs: Files in the build folder it leaves beside the record, likewise.
        after: Name of the stage that it goes on from, whose record must be readable; ``{maker}`` is the one that made
            the shipped network.
        work: Does it and returns the record's outcome; ``ok`` in it is False where the answer is no, and
            ``provisional`` True where the stage has to be run again before its record counts.
        everyone: Whether every process of a distributed run takes part.
        whole: Whether ``work`` replaces the folder as a whole, so that an interrupted run leaves the old one.
        reads: Whether it leaves nothing but its record, so that others like it may work in the build folder too.
    """

    name: str
    keys: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    work: Callable[[Job], Outcome]
    everyone: bool = False
    whole: bool = False
    reads: bool = False
    after: str | None = None

    @property
    def record(self) -> str:
        """Path of its record in the build folder, written last."""
        return RECORDS[self.name]

    def dependencies(self, job: Job) -> dict[str, Any]:
        """Return the parts of the recipe and the hashes of the inputs that decide the outcome.

        Raises:
            InputError: An input is missing, or the stage before has no record.
            IntegrityError: The record of the stage before is damaged.
        """
        resolved = job.recipe.to_dict()
        inputs = self._hashes(job)
        if self.after is not None:
            maker = self.after.format(maker=job.maker)
            # For its errors alone: weights may lie there although their stage was interrupted.
            read_record(job.folder / RECORDS[maker], maker)
        return {"recipe": {key: resolved.get(key) for key in self.keys}, "inputs": inputs}

    def _hashes(self, job: Job) -> dict[str, str]:
        found: dict[str, str] = {}
        folder = job.folder
        # By content and not by time: a copied or checked-out build folder is still up to date.
        for pattern in (given.format(network=job.network) for given in self.inputs):
            # This stage's own record is left out where it lies beside its inputs.
            files = sorted(path for path in folder.glob(pattern) if path.is_file() and path != folder / self.record)
            if not files:
                raise InputError(f"{folder / pattern} does not exist: the stage before {self.name!r} writes it")
            found |= {path.relative_to(folder).as_posix(): sha256(path) for path in files}
        if self.name == "train" and job.recipe.model.weights is not None:
            weights = Path(job.recipe.model.weights)
            if not weights.is_file():
                raise InputError(f"model.weights: {weights} does not exist")
            found["model.weights"] = sha256(weights)
        return found

    def finished(self, job: Job, needs: dict[str, Any]) -> Record | None:
        """Return the record if it still holds, else None."""
        path = job.folder / self.record
        try:
            record = read_record(path, self.name)
        except ReliefError:
            return None  # absent, or damaged: the stage is run again and replaces it
        # Such an answer was given without the full test set, so it must not stand once that can be had.
        if record.outcome.get("provisional"):
            return None
        try:
            # A setting that is younger than the record was, then, what is now its default.
            settings = {key: Recipe.part(key, record.recipe.get(key)) for key in self.keys}
        except InputError:
            return None  # it has a setting that is none any more
        same = record.inputs == needs["inputs"] and settings == needs["recipe"]
        return (
            record
            if same and all(_sound(job.folder / name.format(network=job.network)) for name in self.outputs)
            else None
        )


def _sound(path: Path) -> bool:
    """Return whether an output is there and, where it is the manifest, can be read."""
    if path.name != artifact.NAME:
        return path.exists()
    try:
        artifact.read_manifest(path.parent)
    except ReliefError:
        return False
    return True


@dataclass(frozen=True)
class Done:
    """What came of a stage."""

    stage: str
    skipped: bool
    seconds: float
    outcome: Outcome = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether the answer is yes; stages that give no answer are always ok."""
        return bool(self.outcome.get("ok", True))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; the answer and its reasons come first and are not repeated in the outcome."""
        outcome = {key: value for key, value in self.outcome.items() if key not in {"ok", "failures"}}
        answer = {"ok": self.ok, "failures": self.outcome.get("failures", [])}
        return answer | {"stage": self.stage, "skipped": self.skipped, "seconds": self.seconds, "outcome": outcome}


def is_main_process() -> bool:
    """Return whether this is the process that writes: the only one, or rank 0 of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Leave the resolved recipe in the build folder, where the later stages find it; an equal one is not touched."""
    path, text = folder / "recipe.toml", recipe.to_toml()
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_bytes(path, text.encode())


def read_recipe(folder: Path) -> Recipe:
    """Read the recipe that ``write_recipe`` left.

    Raises:
        InputError: ``folder`` is no build folder.
    """
    if not (folder / "recipe.toml").is_file():
        raise InputError(f"{folder} is no build folder: it has no recipe.toml; run the stage 'train' first")
    return load_recipe(folder / "recipe.toml")


def perform(stage: Stage, job: Job, *, force: bool) -> Done:
    """Run ``stage``, or skip it where its record still holds."""
    needs = stage.dependencies(job)
    record = None if force else stage.finished(job, needs)
    wait = synchronise if stage.everyone else _alone
    wait()  # every process has decided before any writes
    path = job.folder / stage.record
    if record is not None:
        if is_main_process() and record.outcome.get("ok", True):
            path.touch()  # for Make: newer than what it was compared with
        return Done(stage.name, skipped=True, seconds=record.seconds, outcome=record.outcome)
    # A stage that replaces its folder as a whole keeps the old record until then.
    if is_main_process() and not stage.whole:
        _prepare(path, force=force)
    wait()
    start = time.perf_counter()
    # Whoever goes on from here must see what a run that finds this stage done will see.
    outcome: Outcome = as_read(stage.work(job))
    seconds = round(time.perf_counter() - start, 3)
    wait()
    if is_main_process():
        Record(stage.name, job.recipe.to_dict(), needs["inputs"], seconds, outcome).write(path)
        if not outcome.get("ok", True) or outcome.get("provisional"):
            os.utime(path, (0, 0))  # the record stays readable, and Make asks again
    wait()
    return Done(stage.name, skipped=False, seconds=seconds, outcome=outcome)


def _prepare(record: Path, *, force: bool) -> None:
    """Withdraw the old record, so that an interrupted stage never looks done; what the stage can go on from stays."""
    record.unlink(missing_ok=True)
    if force and record.name == "record.json":  # else it lies in the build folder, which is not the stage's own
        shutil.rmtree(record.parent, ignore_errors=True)


def synchronise() -> None:
    """Wait for the other processes of a distributed run; alone, do nothing (and import nothing)."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from relief_export.training import distributed

        distributed.barrier()


def _alone() -> None:
    """Wait for nobody: the stage belongs to the main process."""
