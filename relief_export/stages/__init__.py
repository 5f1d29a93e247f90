"""Train -> relieve -> quantise -> export -> validate -> audit -> report: files in, files out."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from relief_export.errors import InputError
from relief_export.records import locked
from relief_export.stages import learning, shipping
from relief_export.stages.engine import Done, Job, Stage, is_main_process, perform, read_recipe, write_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator
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
            work=learning.train,
            everyone=True,
        ),
        Stage(
            "relieve",
            keys=(*_LEARNING, "relief"),
            inputs=("dense/weights.safetensors", "dense/init.safetensors"),
            outputs=("relieved/weights.safetensors", "relieved/masks.safetensors"),
            work=learning.relieve,
            everyone=True,
        ),
        Stage(
            "quantise",
            keys=(*_LEARNING, "quantise"),
            inputs=("relieved/weights.safetensors", "relieved/masks.safetensors"),
            outputs=_NETWORK,
            work=learning.quantise,
            everyone=True,
            after="relieve",
        ),
        Stage(
            "export",
            keys=("seed", "data", "model", "export"),
            inputs=("dense/weights.safetensors", *_NETWORK),
            outputs=("artifacts/manifest.json", "artifacts/model.onnx", "artifacts/reference.npz"),
            work=shipping.export,
            whole=True,
            after="{maker}",
        ),
        Stage(
            "validate",
            keys=("seed", "data", "model"),
            inputs=(*_NETWORK, "artifacts/**/*"),
            outputs=(),
            work=shipping.validate,
        ),
        Stage(
            "audit",
            keys=("audit",),
            inputs=("artifacts/manifest.json",),
            outputs=(),
            work=shipping.audit,
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
) -> Done:
    """Run one stage on a build folder; one that is up to date is skipped unless ``force``.

    Args:
        name: A key of ``STAGES``.
        folder: The build folder.
        recipe: Left in the folder first; by default the folder's own.
        force: Start afresh.
        progress: Called as ``progress(task, done, total, note)``.
        data: Samples for validation, instead of the recipe's test set.

    Raises:
        InputError: ``folder`` is no build folder, another process works in it, an earlier stage has not been run, or
            a later stage would refuse the recipe.
    """
    resolved = recipe or read_recipe(folder)
    check_settings(resolved)
    with _alone_in(folder), _processes():
        if recipe is not None and is_main_process():
            write_recipe(recipe, folder)
        return perform(STAGES[name], Job(folder, resolved, progress, data), force=force)


def check_settings(recipe: Recipe) -> None:
    """Check what a late stage reads of a recipe, so that no training is lost to a slip of the pen.

    Raises:
        InputError: A key of [audit] cannot be used.
    """
    try:
        shipping.budget(recipe.audit)
    except InputError as error:
        raise InputError(f"[audit] of the recipe {recipe.name!r}: {error}") from None


def validate(folder: Path, *, data: Path | None = None, progress: Progress | None = None) -> Done:
    """Validate the artifacts of a build folder, or of any folder with a manifest (which gets no record)."""
    if (folder / "recipe.toml").is_file():
        return run_stage("validate", folder, force=True, progress=progress, data=data)
    from relief_export import evaluation
    from relief_export.formats import read_manifest

    start = time.perf_counter()
    read_manifest(folder)  # before the samples, so that a wrong folder is called wrong and not its samples
    samples = shipping.stored_samples(folder, data)
    found = evaluation.validate(folder, samples.x, samples.y, samples.logits, progress=progress)
    outcome = found.to_dict() | {"source": samples.source}
    return Done("validate", skipped=False, seconds=round(time.perf_counter() - start, 3), outcome=outcome)


def audit(subject: Path, *, flash: str | None = None, ram: str | None = None, target: str | None = None) -> Done:
    """Hold a build folder or a model file against a budget; what is not given comes from the folder's recipe."""
    from relief_export import evaluation
    from relief_export.recipe import AuditConfig

    given = {key: value for key, value in (("flash", flash), ("ram", ram), ("target", target)) if value is not None}
    if (subject / "recipe.toml").is_file():
        recipe = read_recipe(subject)
        recipe = replace(recipe, audit=replace(recipe.audit, **given))
        with _alone_in(subject):
            return perform(STAGES["audit"], Job(subject, recipe), force=True)
    outcome = evaluation.audit(subject, shipping.budget(AuditConfig(**given))).to_dict()
    return Done("audit", skipped=False, seconds=0.0, outcome=outcome)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the build folder's lock, once for all processes of a distributed run."""
    if not is_main_process():
        yield
        return
    with locked(folder):
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
