"""The gate: every file of a manifest against the masked network's outputs, in ONNX Runtime, optimised and not.

Generated C is compiled with the machine's compiler, with its whole instruction set (optimised) and in plain C (not).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from relief_export import formats
from relief_export.errors import InputError, IntegrityError, MissingCompilerError
from relief_export.evaluation.compare import Agreement, Array, Check, Judged, classes, judge, measure
from relief_export.evaluation.samples import check_labels, named, size
from relief_export.evaluation.sessions import open_session
from relief_export.printing import TextTable, counted, percent
from relief_export.subjects import artifacts_folder

if TYPE_CHECKING:
    from pathlib import Path

    from relief_export.evaluation.samples import ByName
    from relief_export.progress import Progress

MASKED = "masked.onnx"
"""The masked network before anything was removed, which stands in for PyTorch where that is not installed."""
NOT_PROVEN = "not proven: no C compiler"
"""What is said of generated C that could not be compiled."""
_LISTED = "is what the manifest says"


@dataclass(frozen=True)
class Measurement:
    """One file in one session."""

    file: str
    format: str
    file_bytes: int
    optimised: bool
    seconds: float
    agreement: Agreement
    """Of the only output, or the first."""
    others: dict[str, Agreement] = field(default_factory=dict)
    """Of the others, by name."""


@dataclass(frozen=True)
class Validation(Judged):
    """What the gate found.

    Attributes:
        reference: Where the logits come from: "given" by the caller, or "masked.onnx".
        reference_accuracy: Of the reference on the same samples; None without labels.
        measurements: Each artifact that could be run, in both sessions. checks: Every tolerance, kept or not.
    """

    samples: int
    reference: str
    reference_accuracy: float | None
    measurements: tuple[Measurement, ...]
    checks: tuple[Check, ...]

    def table(self) -> TextTable:
        """Return what was measured of each file, the worse of its two sessions, and whether it passed."""
        answers: dict[str, bool] = {}
        for check in self.checks:
            # A check of a further output names it behind the file.
            file = check.file.partition(", output ")[0]
            answers[file] = answers.get(file, True) and check.ok
        rows = []
        for file, ok in answers.items():
            found = [each for each in self.measurements if each.file == file]
            errors = [each.agreement.relative_error for each in found]
            same, accuracy = (
                min((value for each in found if (value := getattr(each.agreement, key)) is not None), default=None)
                for key in ("same_predictions", "accuracy")
            )
            error = (
                "-" if not errors else "not finite" if None in errors else f"{max(filter(None, errors), default=0):.2g}"
            )
            size = f"{found[0].file_bytes:,}" if found else "-"
            rows.append((file, size, error, percent(same), percent(accuracy), "passed" if ok else "FAILED"))
        heads = ("file", "bytes", "relative error", "same predictions", "accuracy", "answer")
        title = (
            f"{'passed' if self.ok else 'FAILED'}: {counted(len(answers), 'file')}, {counted(self.samples, 'sample')}"
        )
        if self.reference_accuracy is not None:
            title += f", accuracy of the pruned network {percent(self.reference_accuracy)}"
        return TextTable(title, heads, rows)


def validate(
    folder: Path,
    x: ByName,
    y: Array | None,
    logits: ByName | None,
    *,
    only: str | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> Validation:
    """Check every file of ``folder/manifest.json`` against its tolerance.

    Args:
        folder: The artifacts' folder, or the build folder that has it.
        x: Samples ``(N, ...)``, preprocessed as the network's input; of several inputs those of each by its name.
        y: Labels ``(N,)`` of the first output; without them no accuracy is checked.
        logits: The masked PyTorch network's outputs ``(N, ...)``, of several by their names; None takes
            ``masked.onnx``, run unoptimised, which is compared with the manifest's SHA-256 first; nothing is measured
            against a file that differs.
        only: Name of the one artifact to check; by default all.
        strict: Generated C that cannot be compiled here fails; otherwise its check says that it is not proven.
        progress: Called for every batch of every session.

    Returns:
        ``ok`` is False where a file differs from the manifest, does not load, or computes something else; that is no
        exception. A file that differs from the manifest is not run.

    Raises:
        InputError: No manifest, a missing file, or samples, labels and logits that fit neither the model nor each
            other.
        UnsupportedModelError: An artifact has no batch axis, or an operator the runtime does not know.
    """
    folder = artifacts_folder(folder)
    manifest = formats.read_manifest(folder)
    if not manifest.artifacts:
        raise InputError(f"{folder / 'manifest.json'} lists no artifact: export again")
    # Given logits are a reference of their own: masked.onnx is then not read at all.
    checks = _reference_checks(manifest) if logits is None else []
    if not all(check.ok for check in checks):
        return Validation(size(x), MASKED, None, (), tuple(checks))
    reference = _masked_logits(folder, x, progress) if logits is None else logits
    _check_reference(x, y, reference)
    measurements: list[Measurement] = []
    for artifact in manifest.artifacts if only is None else (manifest[only],):
        require_files(folder, artifact)
        checks.append(_listed(manifest, artifact))
        # Bytes that somebody changed are not run: what they compute says nothing of what was exported.
        if not checks[-1].ok:
            continue
        try:
            found = [_run(manifest, artifact, x, y, reference, optimised=on, progress=progress) for on in (False, True)]
        except IntegrityError as error:
            # A file that does not load is the gate's answer, and the other files are still checked.
            checks.append(_about_file(artifact.name, "loads", str(error), ok=False))
        except MissingCompilerError:
            checks.append(_about_file(artifact.name, "compiled", NOT_PROVEN, ok=not strict))
        else:
            measurements += found
            checks += [check for each in found for check in _judged(each, artifact)]
    first = next(iter(reference.values())) if isinstance(reference, Mapping) else reference
    accuracy = None if y is None else measure(first, first, y).accuracy
    source = MASKED if logits is None else "given"
    return Validation(size(x), source, accuracy, tuple(measurements), tuple(checks))


def _judged(found: Measurement, artifact: formats.Artifact) -> Iterator[Check]:
    """Yield the checks of one session's outputs against what the format promises."""
    yield from judge(found.agreement, artifact.tolerance, artifact.name, optimised=found.optimised)
    # Where only accuracy is promised, it is that of the first output, which alone has labels.
    if artifact.tolerance.relative_error is not None:
        for name, other in found.others.items():
            where = f"{artifact.name}, output {name!r}"
            yield from judge(other, artifact.tolerance, where, optimised=found.optimised)


def require_files(folder: Path, artifact: formats.Artifact) -> None:
    """Check that every file of an artifact is there.

    Raises:
        InputError: One is missing.
    """
    missing = next((file.path for file in artifact.files if not (folder / file.path).is_file()), None)
    if missing is not None:
        raise InputError(f"{folder / missing} is missing though the manifest lists it: export again")


def _listed(manifest: formats.Manifest, artifact: formats.Artifact) -> Check:
    """Check the artifact's files against the bytes and hashes of the manifest."""
    try:
        manifest.check(artifact)
    except IntegrityError as error:
        return _about_file(artifact.name, "sha256", str(error), ok=False)
    return _about_file(artifact.name, "sha256", _LISTED, ok=True)


def _reference_checks(manifest: formats.Manifest) -> list[Check]:
    """Check the masked network's file against the manifest; a missing file is refused when it is opened."""
    if not (manifest.folder / MASKED).is_file():
        return []
    try:
        manifest.check_reference(MASKED)
    except IntegrityError as error:
        return [_about_file(MASKED, "sha256", f"the reference cannot be trusted: {error}", ok=False)]
    return [_about_file(MASKED, "sha256", _LISTED, ok=True)]


def _about_file(name: str, code: str, message: str, *, ok: bool) -> Check:
    return Check(name, None, code, ok, None, None, None, f"{name}: {message}")


def _run(
    manifest: formats.Manifest,
    artifact: formats.Artifact,
    x: ByName,
    y: Array | None,
    reference: ByName,
    *,
    optimised: bool,
    progress: Progress | None,
) -> Measurement:
    started = time.perf_counter()
    session = open_session(manifest.path(artifact), optimised=optimised)
    task = f"{artifact.name} ({'optimised' if optimised else 'plain'})"
    report = None if progress is None else lambda _name, done, total, note: progress(task, done, total, note)
    outputs = dict(zip(session.outputs, session.run(x, progress=report), strict=True))
    expected = reference if isinstance(reference, Mapping) else {session.outputs[0]: reference}
    found: dict[str, Agreement] = {}
    for name, wanted in expected.items():
        if name not in outputs:
            raise InputError(f"{artifact.name} has no output {name!r} of the reference: it has {', '.join(outputs)}")
        # Before any comparison: NumPy would broadcast (N, 1) against (N,) to N x N differences.
        if outputs[name].shape != wanted.shape:
            raise InputError(
                f"{artifact.name} gives outputs {outputs[name].shape} where the reference has {wanted.shape}: "
                "use the samples and logits of this network"
            )
        # Labels are those of the first output.
        one = measure(outputs[name], wanted, None if found else y)
        # Features and boxes have a largest entry too, and it is no class.
        found[name] = replace(one, same_predictions=None, disagreeing=0, first_disagreement=None) if found else one
    seconds = time.perf_counter() - started
    first = next(iter(found))
    return Measurement(artifact.name, artifact.format, artifact.bytes, optimised, seconds, found.pop(first), found)


def _masked_logits(folder: Path, x: ByName, progress: Progress | None) -> ByName:
    path = folder / MASKED
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the reference's logits, or export again")
    # Optimisations put sums in another order, and a reference should not depend on which a runtime's version knows.
    session = open_session(path, optimised=False)
    outputs = session.run(x, progress=progress)
    return outputs[0] if len(outputs) == 1 else dict(zip(session.outputs, outputs, strict=True))


def _check_reference(x: ByName, y: Array | None, logits: ByName) -> None:
    count = size(x)
    if not count:
        raise InputError("the test set has no samples")
    outputs = named("logits", logits)
    for name, array in outputs.items():
        if not array.ndim or len(array) != count:
            raise InputError(f"{name} have shape {array.shape} for {count} samples: give those of each sample")
    if y is not None:
        check_labels(y, count, classes(next(iter(outputs.values())).shape))
