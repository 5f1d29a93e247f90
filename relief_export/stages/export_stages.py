"""The stages that write files and check them: export needs torch for the capture; validate and audit do without."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx_ir as ir

from relief_export import evaluation
from relief_export.errors import InputError
from relief_export.formats import FORMATS, Options, gzip_bytes, ledger, onnx_file, size_breakdown, write_manifest
from relief_export.graph.arena import UnknownSizeError, plan_arena
from relief_export.graph.cost import cost
from relief_export.graph.shrink import ShrinkResult, shrink
from relief_export.records import RECORDS, Record, atomic_folder, atomic_path
from relief_export.subjects import model_path

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from relief_export.progress import Progress
    from relief_export.recipe import AuditConfig
    from relief_export.stages.engine import Job, Outcome

BASELINES = ("original", "masked")
"""``NAME.onnx`` in the artifacts' folder: the dense network, and the masked one before anything was removed."""

MANIFEST = "manifest.json"
TEST_SET = "test set"


class Samples(NamedTuple):
    """Inputs ``x``, labels ``y`` and the masked network's ``logits``; where they come from."""

    x: evaluation.ByName
    y: np.ndarray[Any, Any] | None
    logits: evaluation.ByName | None
    source: str


def export(job: Job) -> Outcome:
    """Capture, fold and shrink the relieved network, and write it in every format of the recipe, all or nothing."""
    graphs, reference, calibration = _capture(job)
    config = job.recipe.export
    options = Options(calibration=calibration)
    return write_artifacts(graphs, reference, job.folder / "artifacts", config.formats, options, progress=job.progress)


def write_artifacts(
    graphs: dict[str, ir.Model],
    reference: Samples,
    target: Path,
    names: Iterable[str],
    options: Options,
    *,
    progress: Progress | None = None,
) -> Outcome:
    """Shrink the masked graph and write it to the folder ``target``, which appears whole or not at all.

    Args:
        graphs: ``original`` and ``masked``, folded.
        reference: What is kept in reference.npz.
        target: The artifacts' folder; an old one is replaced.
        names: Formats beside dense, which is always written.
        options: What the writers are given.
        progress: Told of each format.

    Returns:
        What the record of the export holds.
    """
    started = time.perf_counter()
    # Before the folder is begun: where the model is refused, there is nothing to clear away.
    result = shrink(graphs["masked"])
    # Dense first and once: the other files are compared with it.
    chosen = tuple(dict.fromkeys(("dense", *names)))
    # All that the folder holds is written in here, record included: an interrupted export leaves the old one.
    with atomic_folder(target) as folder:
        baselines = {name: _baseline(graphs[name], folder / f"{name}.onnx") for name in BASELINES}
        artifacts = []
        for done, name in enumerate(chosen):
            if progress is not None:
                progress("export", done + 1, len(chosen), name)
            artifacts.append(FORMATS[name].write(result.model, folder / FORMATS[name].suffix, options))
        given = {"x": reference.x, "y": reference.y, "logits": reference.logits}
        arrays = {
            k: v for what, held in given.items() if held is not None for k, v in evaluation.named(what, held).items()
        }
        with atomic_path(folder / "reference.npz") as path:
            np.savez(path, **arrays)  # type: ignore[arg-type]  # its one keyword of its own is no array's name
        outcome = _figures(graphs, result) | {"baselines": baselines, "artifacts": [a.to_dict() for a in artifacts]}
        names = (*(f"{name}.onnx" for name in BASELINES), *(artifact.name for artifact in artifacts))
        found = {name: size_breakdown(folder / name) for name in names}
        outcome["size_breakdowns"] = {name: parts.to_dict() for name, parts in found.items() if parts is not None}
        references = [
            folder / "reference.npz",
            *(file for name in BASELINES for file in onnx_file.files(folder / f"{name}.onnx")),
        ]
        extra = {key: outcome[key] for key in ("cost", "shrink", "baselines")}
        write_manifest(folder, artifacts, extra, references=references)
        inputs = evaluation.named("x", reference.x)
        outcome["inputs"] = {name: list(array.shape[1:]) for name, array in inputs.items()}
        # The report of a folder that no stage wrote is made from this; a stage's own record takes its place.
        seconds = round(time.perf_counter() - started, 3)
        Record("export", {}, {}, seconds, outcome).write(folder / Path(RECORDS["export"]).name)
    return outcome


def _capture(job: Job) -> tuple[dict[str, ir.Model], Samples, np.ndarray[Any, Any]]:
    """Return the folded baselines, the reference sample, and training inputs for calibration."""
    from relief_export.capture import capture
    from relief_export.graph.prepare import fold
    from relief_export.stages.training_stages import load_network, load_task
    from relief_export.training.checkpoints import load_weights
    from relief_export.training.fit import evaluate

    recipe = job.recipe
    data, model = load_task(recipe)
    sample = data.test.take(recipe.export.reference_samples, seed=recipe.seed)
    x, y = sample.tensors()
    load_weights(model, job.folder / "dense" / "weights.safetensors")
    # One capture for both baselines. Two samples, because torch.export takes an axis of length 1 for a constant.
    captured = job.captured.get("graph") or capture(model, x[:2])
    graphs = {"original": fold(with_values(captured, _state(model)))}
    load_network(model, job.folder, job.network)
    graphs["masked"] = fold(with_values(captured, _state(model)))
    logits = evaluate(model, sample, logits=True).logits
    assert logits is not None  # noqa: S101  asked for
    calibration = data.train.take(recipe.export.calibration_samples, seed=recipe.seed).tensors()[0].numpy()
    return graphs, Samples(x.numpy(), y.numpy(), logits.numpy(), "reference"), calibration


def _state(model: nn.Module) -> dict[str, np.ndarray[Any, Any]]:
    """Return copies of the network's tensors, which do not follow when other weights are loaded into it."""
    return {name: tensor.cpu().numpy().copy() for name, tensor in model.state_dict().items()}


def with_values(captured: ir.Model, state: dict[str, np.ndarray[Any, Any]]) -> ir.Model:
    """Return a captured graph with other numbers in it: the structure of a network does not depend on its weights."""
    # Cloned and not captured again: tracing takes far longer than swapping numbers.
    model = captured.clone()
    for name, value in model.graph.initializers.items():
        if name in state:
            value.const_value = ir.tensor(state[name], name=name)
    return model


def _figures(graphs: dict[str, ir.Model], result: ShrinkResult) -> Outcome:
    original = cost(graphs["original"])
    others = {"masked": graphs["masked"], "shrunk": result.model}
    arenas = {"original": _arena(graphs["original"]), "shrunk": _arena(result.model)}
    return {
        "cost": {"original": original.to_dict()}
        | {name: cost(model, baseline=original).to_dict() for name, model in others.items()},
        "arena": {name: plan for name, (plan, _) in arenas.items()},
        "arena_unknown": next((reason for _, reason in arenas.values() if reason), None),
        "shrink": result.to_dict(),
        "ledger": ledger(result.model).to_dict(),
    }


def _arena(model: ir.Model) -> tuple[Outcome | None, str | None]:
    """Return the plan of the activations, or None and why there is none: the file is as good without."""
    try:
        return plan_arena(model).to_dict(), None
    except UnknownSizeError as error:
        return None, str(error)


def _baseline(model: ir.Model, path: Path) -> Outcome:
    artifact = FORMATS["dense"].write(model, path, Options())
    squeezed = sum(_gzip_bytes(path.parent / file.path) for file in artifact.files)
    return {"path": path.name, "file_bytes": artifact.bytes, "gzip_bytes": squeezed, "sha256": artifact.files[0].sha256}


def _gzip_bytes(path: Path) -> int:
    """Return the size of ``path`` as gzip would leave it, read in blocks."""
    with path.open("rb") as file:
        return gzip_bytes(iter(lambda: file.read(1 << 20), b""))


def validate(job: Job) -> Outcome:
    """Check every file against the masked network on the full test set, and time them.

    Where torch is not installed, or ``data`` is given, the outcome is marked provisional: it is no answer for the full
    test set.
    """
    samples = _samples(job)
    folder = job.folder / "artifacts"
    found = evaluation.validate(folder, samples.x, samples.y, samples.logits, strict=job.strict, progress=job.progress)
    models = {name: folder / f"{name}.onnx" for name in BASELINES}
    # Either of a file's two sessions says that it runs here: C without a compiler has none, and is not timed.
    models |= {each.file: folder / each.file for each in found.measurements if each.optimised}
    # The time of a file that computes something else is of no interest.
    latency = evaluation.measure_latency(models, samples.x) if found.ok else []
    return found.to_dict() | {
        "source": samples.source,
        "provisional": samples.source != TEST_SET,
        "latency": [each.to_dict() for each in latency],
    }


def _samples(job: Job) -> Samples:
    """Return the full test set with the masked network's logits, or what can be had without torch or on given data."""
    if importlib.util.find_spec("torch") is None:
        return stored_samples(job.folder / "artifacts", job.data)
    from relief_export.stages.training_stages import load_task, shipped_logits

    if job.data is not None:
        given = stored_samples(job.folder / "artifacts", job.data)
        return given._replace(logits=shipped_logits(job, evaluation.Arrays(given.x).one_input))
    data, _ = load_task(job.recipe)
    x, y = (tensor.numpy() for tensor in data.test.tensors())
    return Samples(x, y, shipped_logits(job, x), TEST_SET)


def stored_samples(folder: Path, data: Path | None) -> Samples:
    """Return the samples of ``data``, or the reference sample that the export left in ``folder``."""
    stored = folder / "reference.npz"
    found = evaluation.load_arrays(stored) if data is None else evaluation.load_arrays(data, model_path(folder))
    if data is None and found.logits is None:
        raise InputError(f"{folder / 'reference.npz'} has no array 'logits': export again")
    return Samples(found.x, found.y, None if data else found.logits, str(data or "reference.npz"))


def audit(job: Job) -> Outcome:
    """Check what the artifacts take against the recipe's budget."""
    return evaluation.audit(job.folder, budget(job.recipe.audit)).to_dict()


def budget(config: AuditConfig) -> evaluation.Budget:
    """Return the budget of a recipe."""
    return evaluation.Budget.of(**asdict(config))
