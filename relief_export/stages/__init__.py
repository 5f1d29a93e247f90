"""Train -> relieve -> quantise -> export -> validate -> audit -> report: files in, files out."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from relief_export.errors import InputError
from relief_export.records import RECORDS, Record, as_read, locked, sha256
from relief_export.stages import export_stages, training_stages
from relief_export.stages.engine import Done, Job, Stage, is_main_process, perform, read_recipe, write_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from relief_export.progress import Progress
    from relief_export.recipe import Recipe

__all__ = ["STAGES", "Done", "Job", "Stage", "audit", "is_main_process", "run", "run_stage", "validate", "write_recipe"]

_LEARNING = ("seed", "data", "model", "train")
_NETWORK = ("{network}/weights.safetensors", "{network}/masks.safetensors")

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "train",
            keys=_LEARNING,
            inputs=(),
            outputs=("dense/weights.safetensors", "dense/init.safetensors"),
            work=training_stages.train,
            everyone=True,
        ),
        Stage(
            "relieve",
            keys=(*_LEARNING, "relief"),
            inputs=("dense/weights.safetensors", "dense/init.safetensors"),
            outputs=("relieved/weights.safetensors", "relieved/masks.safetensors"),
            work=training_stages.relieve,
            everyone=True,
        ),
        Stage(
            "quantise",
            keys=(*_LEARNING, "quantise"),
            inputs=("relieved/weights.safetensors", "relieved/masks.safetensors"),
            outputs=_NETWORK,
            work=training_stages.quantise,
            everyone=True,
            after="relieve",
        ),
        Stage(
            "export",
            keys=("seed", "data", "model", "export"),
            inputs=("dense/weights.safetensors", *_NETWORK),
            outputs=("artifacts/manifest.json", "artifacts/model.onnx", "artifacts/reference.npz"),
            work=export_stages.export,
            whole=True,
            after="{maker}",
        ),
        Stage(
            "validate",
            keys=("seed", "data", "model"),
            inputs=(*_NETWORK, "artifacts/**/*"),
            outputs=(),
            work=export_stages.validate,
            reads=True,
        ),
        Stage(
            "audit",
            keys=("audit",),
            inputs=("artifacts/manifest.json",),
            outputs=(),
            work=export_stages.audit,
            reads=True,
        ),
    )
}
"""In the order in which they run."""


def run(recipe: Recipe, folder: Path, *, force: bool = False, progress: Progress | None = None) -> bool:
    """Take a recipe through all stages and the report; what is up to date is skipped.

    Returns:
        Whether validation passed and every budget holds. The report is made in either case.
    """
    check_settings(recipe)
    job = Job(folder, recipe, progress)
    with _alone_in(folder):
        with _processes():
            if is_main_process():
                write_recipe(recipe, folder)
            done = [perform(stage, job, force=force) for stage in STAGES.values() if stage.everyone]
        if not is_main_process():
            return all(stage.ok for stage in done)
        # Alone from here on: no other process is left to wait at a barrier.
        done += [perform(stage, job, force=force) for stage in STAGES.values() if not stage.everyone]
    if all(stage.skipped for stage in done) and (folder / "report.html").is_file():
        (folder / "report.html").touch()  # for Make, as with the records
    else:
        from relief_export.report import build_report

        build_report([folder], folder)
    return all(stage.ok for stage in done)


def run_stage(
    name: str,
    folder: Path,
    *,
    recipe: Recipe | None = None,
    force: bool = False,
    progress: Progress | None = None,
    data: Path | None = None,
    strict: bool = False,
) -> Done:
    """Run one stage on a build folder; one that is up to date is skipped unless ``force``.

    Args:
        name: A key of ``STAGES``.
        folder: The build folder.
        recipe: Left in the folder first; by default the folder's own.
        force: Start afresh.
        progress: Called as ``progress(task, done, total, note)``.
        data: Samples for validation, instead of the recipe's test set.
        strict: Validation fails where generated C cannot be compiled.

    Raises:
        InputError: ``folder`` is no build folder, another process works in it, an earlier stage has not been run, or
            a later stage would refuse the recipe.
    """
    resolved = recipe or read_recipe(folder)
    check_settings(resolved)
    with _alone_in(folder, shared=STAGES[name].reads), _processes():
        if recipe is not None and is_main_process():
            write_recipe(recipe, folder)
        return perform(STAGES[name], Job(folder, resolved, progress, data, strict=strict), force=force)


def check_settings(recipe: Recipe) -> None:
    """Check what a late stage reads of a recipe, so that no training is lost to a slip of the pen.

    Raises:
        InputError: A key of [audit] cannot be used.
    """
    try:
        export_stages.budget(recipe.audit)
    except InputError as error:
        raise InputError(f"[audit] of the recipe {recipe.name!r}: {error}") from None


def validate(
    subject: Path, *, data: Path | None = None, strict: bool = False, progress: Progress | None = None
) -> Done:
    """Validate a build folder, a folder that an export wrote, or one file of such a folder.

    The record of a build folder is that of the stage. A folder that an export wrote gets validation.json too, which the
    report reads; one file gets none. ``strict`` fails generated C that cannot be compiled here.
    """
    if (subject / "recipe.toml").is_file():
        return run_stage("validate", subject, force=True, progress=progress, data=data, strict=strict)
    from relief_export import evaluation
    from relief_export.formats import read_manifest
    from relief_export.subjects import artifacts_folder

    start = time.perf_counter()
    folder, name = (subject.parent, subject.name) if subject.is_file() else (artifacts_folder(subject), None)
    if name is not None and not (folder / "manifest.json").is_file():
        raise InputError(f"{subject} has no manifest.json beside it: give what an export wrote, or compare two models")
    read_manifest(folder)  # before the samples, so that a wrong folder is called wrong and not its samples
    samples = export_stages.stored_samples(folder, data)
    found = evaluation.validate(
        folder, samples.x, samples.y, samples.logits, only=name, strict=strict, progress=progress
    )
    outcome = as_read(found.to_dict() | {"source": samples.source, "provisional": False})
    seconds = round(time.perf_counter() - start, 3)
    # One file's answer is none for the folder, and in a build folder the record belongs to the stage.
    if name is None and not (folder.parent / "recipe.toml").is_file():
        inputs = {"manifest.json": sha256(folder / "manifest.json")}
        Record("validate", {}, inputs, seconds, outcome).write(folder / RECORDS["validate"])
    return Done("validate", skipped=False, seconds=seconds, outcome=outcome)


def audit(
    subject: Path,
    *,
    dimensions: Mapping[str, int] | None = None,
    baseline: Path | None = None,
    max_growth: float | str | None = None,
    **given: str | float | None,
) -> dict[str, Any]:
    """Check what a model or a folder takes of flash and RAM, and return the audit as plain data.

    A build folder's recipe gives what is not ``given``. Its record audit.json is written when nothing is: only then the
    answer is that of the recipe.

    Args:
        subject: A model file, a csr folder, an artifacts folder, or a build folder.
        dimensions: Symbolic lengths of the inputs -> numbers.
        baseline: An older model or folder to compare with.
        max_growth: Largest growth over it that is allowed, a fraction or a percentage such as "2%".
        given: Keys of [audit] over the recipe's: flash, ram, target, file, accuracy_drop.
    """
    from relief_export import evaluation
    from relief_export.recipe import AuditConfig

    # 0 is an answer and None is none: an accuracy_drop of 0 has to win over the recipe's.
    given = {key: value for key, value in given.items() if value is not None}
    config = AuditConfig()
    if (subject / "recipe.toml").is_file():
        recipe = read_recipe(subject)
        if not given and not dimensions and baseline is None:
            with _alone_in(subject, shared=True):
                return perform(STAGES["audit"], Job(subject, recipe), force=True).outcome
        config = recipe.audit
    limits = export_stages.budget(replace(config, **given))  # type: ignore[arg-type]  # checked where it is built
    return evaluation.audit(subject, limits, dimensions=dimensions, baseline=baseline, max_growth=max_growth).to_dict()


@contextmanager
def _alone_in(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the build folder's lock, once for all processes of a distributed run; see ``locked`` for ``shared``."""
    if not is_main_process():
        yield
        return
    with locked(folder, shared=shared):
        yield


@contextmanager
def _processes() -> Iterator[None]:
    """Join torchrun's processes for as long as stages run; alone, do nothing (and import nothing)."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    from relief_export.training import distributed

    with distributed.setup():
        yield
