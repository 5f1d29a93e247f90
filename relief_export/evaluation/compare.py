"""Two networks on the same samples: how far their outputs are apart, checked against a tolerance.

With reference outputs ``r`` and outputs ``o``, both ``(N, ...)``::

    absolute error   max and mean of |o − r|
    relative error   max |o − r| / max |r|          (one scale for the whole set: logits near zero blow nothing up)
    agreement        share of samples with argmax o = argmax r
    accuracy         share of samples with argmax o = y, and its difference to the reference's

Only scores ``(N, classes)``, of two classes and more, have predictions; single numbers, maps and sequences are checked
by their errors alone. A sample with a NaN has no prediction: it agrees with nothing, not even with another NaN, and is
never right.

The worst sample is the one with the largest absolute error.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from relief_export.errors import Failure, InputError
from relief_export.evaluation.samples import check_labels, size
from relief_export.evaluation.sessions import open_session
from relief_export.formats import Tolerance
from relief_export.formats.artifact import check_listed
from relief_export.printing import Prints, TextTable, counted, percent, points

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from relief_export.evaluation.samples import ByName
    from relief_export.progress import Progress

Array: TypeAlias = np.ndarray[Any, Any]

_ROUNDING = 1e-12
"""A loss of exactly what is allowed passes, whatever the last bit of the difference says."""


@dataclass(frozen=True)
class Agreement:
    """The distance between two networks; fractions are 0 to 1.

    Attributes:
        max_error: Largest absolute error. mean_error: Mean absolute error. relative_error: Largest, in units of the
            reference's scale. The three are None where an output is not a finite number.
        same_predictions: Share of equal predictions; None where there are none. disagreeing: Number of unequal ones.
        accuracy: Share of right predictions; None without labels. accuracy_change: That minus the reference's.
        worst_sample: Index of the sample with the largest error, or of the first that is not finite.
        first_disagreement: Index of the first sample whose prediction differs; None where all agree.
    """

    max_error: float | None
    mean_error: float | None
    relative_error: float | None
    same_predictions: float | None
    disagreeing: int
    accuracy: float | None
    accuracy_change: float | None
    worst_sample: int
    first_disagreement: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Check:
    """One tolerance checked against one number.

    Attributes:
        file: Whose tolerance. optimised: In which session; None where it is about the file.
        code: What was checked: "sha256", "loads", "compiled", "finite", "relative_error", "predictions" or "accuracy".
        actual: The number; of the accuracy its change, negative where it is lost. limit: What was allowed.
        worst_sample: The sample to look at first. message: One sentence.
    """

    file: str
    optimised: bool | None
    code: str
    ok: bool
    actual: float | None
    limit: float | None
    worst_sample: int | None
    message: str

    @property
    def failure(self) -> Failure:
        """The check as a gate reports it."""
        unit = {"relative_error": "ratio", "predictions": "fraction", "accuracy": "fraction"}.get(self.code, "")
        return Failure(self.code, self.file, self.actual, self.limit, unit, self.message)


def failures(checks: Iterable[Check]) -> tuple[Failure, ...]:
    """Return one failure for each file and quantity: the worst, where both optimisation levels fail alike."""
    found: dict[tuple[str, str], Check] = {}
    for check in checks:
        key = (check.file, check.code)
        if not check.ok and (key not in found or _badness(check) > _badness(found[key])):
            found[key] = check
    return tuple(check.failure for check in found.values())


def _badness(check: Check) -> float:
    if check.actual is None:
        # No number at all, as for an output that is not finite, is worse than any number.
        return math.inf
    return -check.actual if check.code == "accuracy" else check.actual  # the one that is worse the lower it is


def measure(outputs: Array, reference: Array, y: Array | None = None) -> Agreement:
    """Compare outputs ``(N, ...)`` with the reference's.

    Raises:
        InputError: The shapes differ, or hold nothing.
    """
    if outputs.shape != reference.shape:
        raise InputError(f"outputs have shape {outputs.shape}, the reference {reference.shape}: use one set of samples")
    if not outputs.size:
        raise InputError(f"outputs have shape {outputs.shape}: there is nothing to compare")
    # In float64, so that the difference of two nearly equal outputs adds no rounding of its own.
    flat, expected = (np.asarray(a, dtype=np.float64).reshape(len(a), -1) for a in (outputs, reference))
    # Infinity minus infinity is reported below, as an output that is not finite.
    with np.errstate(invalid="ignore"):
        error = np.abs(flat - expected)
    by_sample = error.max(axis=1)
    finite = bool(np.isfinite(by_sample).all())
    scores = classes(outputs.shape) > 0
    # Two different marks, so that two samples without a prediction do not agree; labels are never negative.
    chosen, wanted = _predictions(flat, none=-1), _predictions(expected, none=-2)
    differ = np.flatnonzero((chosen != wanted) & scores)
    scale = float(np.abs(expected).max())
    largest = float(by_sample.max())
    accuracy = None if y is None else float((chosen == y).mean())
    return Agreement(
        max_error=largest if finite else None,
        mean_error=float(error.mean()) if finite else None,
        # A reference of nothing but zeros has no scale: the absolute error has to do.
        relative_error=(largest / scale if scale else largest) if finite else None,
        same_predictions=1 - differ.size / len(flat) if scores else None,
        disagreeing=differ.size,
        accuracy=accuracy,
        accuracy_change=None if y is None or accuracy is None else accuracy - float((wanted == y).mean()),
        worst_sample=int(by_sample.argmax() if finite else np.flatnonzero(~np.isfinite(by_sample))[0]),
        first_disagreement=int(differ[0]) if differ.size else None,
    )


def classes(shape: tuple[int, ...]) -> int:
    """Return how many classes outputs of a shape score, two or more; 0 where they are no such scores."""
    return shape[1] if len(shape) > 1 and shape[1] > 1 and all(size == 1 for size in shape[2:]) else 0


def _predictions(outputs: Array, *, none: int) -> Array:
    """Return the class of each sample, and ``none`` for one with a NaN, which argmax would name as a class."""
    return np.where(np.isnan(outputs).any(axis=1), none, outputs.argmax(axis=1))


def judge(found: Agreement, tolerance: Tolerance, file: str, *, optimised: bool) -> list[Check]:
    """Check what was measured against what is allowed; each tolerance gives one check, passed or not."""
    where = f"{file} (optimisations {'on' if optimised else 'off'})"
    worst = found.worst_sample

    def check(code: str, actual: float | None, limit: float, message: str, *, ok: bool, sample: int | None) -> Check:
        return Check(file, optimised, code, ok, actual, limit, sample, f"{where}: {message}")

    if found.max_error is None:
        message = f"an output of sample {worst} is not a finite number"
        # Alone: no other measure means anything of such outputs.
        return [check("finite", None, 0.0, message, ok=False, sample=worst)]
    checks = []
    if tolerance.relative_error is not None and found.relative_error is not None:
        error, limit = found.relative_error, tolerance.relative_error
        message = f"relative error {error:.3g}, {limit:g} allowed, worst at sample {worst}"
        checks.append(check("relative_error", error, limit, message, ok=error <= limit, sample=worst))
    # A bound on the relative error and no loss of accuracy promise the same predictions, not only as many right ones.
    exact, first = tolerance.accuracy_drop == 0 and tolerance.relative_error is not None, found.first_disagreement
    if found.same_predictions is None:
        if not checks:
            message = "the outputs are no scores of classes, so no accuracy can be checked: bound the relative error"
            checks.append(check("predictions", None, tolerance.accuracy_drop, message, ok=False, sample=None))
    elif exact or found.accuracy is None:
        # Without labels: no more accuracy can be lost than predictions differ.
        share, limit = 1 - found.same_predictions, tolerance.accuracy_drop
        predictions = counted(found.disagreeing, "prediction")
        differ = "differs" if found.disagreeing == 1 else "differ"
        message = f"{predictions} ({percent(share)}) {differ}, {percent(limit)} allowed"
        message += "" if first is None else f", the first at sample {first}"
        checks.append(check("predictions", share, limit, message, ok=share <= limit, sample=first))
    if found.accuracy_change is not None:
        change, limit = found.accuracy_change, tolerance.accuracy_drop
        moved = f"{points(abs(change))} {'below' if change < 0 else 'above'}" if change else "equal to"
        message = f"accuracy {percent(found.accuracy)} is {moved} the reference's, a loss of {points(limit)} is allowed"
        message += f", worst at sample {worst}"
        # A gain is never a failure.
        checks.append(check("accuracy", change, -limit, message, ok=change >= -limit - _ROUNDING, sample=worst))
    return checks


class Judged(Prints):
    """What every result that rests on checks has: the answer, its reasons, and both as plain data."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    @property
    def failures(self) -> tuple[Failure, ...]:
        """The checks that did not pass, one for each file and what was checked of it."""
        return failures(self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, ``ok`` first."""
        found = asdict(self)  # type: ignore[call-overload]  # whoever inherits is a dataclass
        return {"ok": self.ok, "failures": [asdict(each) for each in self.failures], **found}


@dataclass(frozen=True)
class Comparison(Judged):
    """How far the second model is from the first.

    Attributes:
        outputs: Name of each output of the first model -> agreement, optimisations on.
        checks: Every output against the tolerance, optimisations off and on.
    """

    first: str
    second: str
    samples: int
    tolerance: Tolerance
    outputs: dict[str, Agreement]
    checks: tuple[Check, ...]

    def table(self) -> TextTable:
        """Return how far each output is from that of the first model."""
        rows = [
            (
                name,
                "not finite" if found.relative_error is None else f"{found.relative_error:.3g}",
                percent(found.same_predictions),
                percent(found.accuracy),
                "-" if found.accuracy_change is None else f"{100 * found.accuracy_change:+.2f}",
            )
            for name, found in self.outputs.items()
        ]
        heads = ("output", "relative error", "same prediction", "accuracy of the second", "points against the first")
        answer = "within the tolerance" if self.ok else f"FAILED: {self.failures[0].message}"
        samples = counted(self.samples, "sample")
        return TextTable(f"{self.second} against {self.first}, {samples}: {answer}", heads, rows)


def compare(
    a: Path,
    b: Path,
    x: ByName,
    *,
    y: Array | None = None,
    tolerance: float | Tolerance,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two models in ONNX Runtime, optimisations off and on.

    Args:
        a: The reference; an ``.onnx`` or ``.ort`` file, or a folder of SciPy matrices.
        b: The other one.
        x: Samples ``(N, ...)`` of both models' inputs.
        y: Labels ``(N,)`` for the accuracies of the first output.
        tolerance: What ``b`` may differ by. A number bounds the relative error and asks for equal predictions;
            ``Tolerance(None, 0.01)`` lets the accuracy fall by one point and any output differ.
        progress: Called for every batch.

    Raises:
        InputError: The samples or labels do not fit, or the models have different outputs.
        IntegrityError: A model is damaged, or differs from the manifest beside it.
        UnsupportedModelError: A model has no batch axis, or an operator the runtime does not know.
    """
    limits = tolerance if isinstance(tolerance, Tolerance) else Tolerance(tolerance, 0.0)
    for path in (a, b):
        # The runtime opens files itself, and knows of no manifest beside them.
        check_listed(path)
    found: dict[str, Agreement] = {}
    checks: list[Check] = []
    # Plain first: what is kept of both, the agreement, is then that of the runtime as it is used.
    for optimised in (False, True):
        first, second = (open_session(path, optimised=optimised) for path in (a, b))
        names = first.outputs
        if len(names) != len(second.outputs):
            raise InputError(
                f"{a} has {len(names)} outputs and {b} has {len(second.outputs)}: give two forms of one model"
            )
        pairs = zip(first.run(x, progress=progress), second.run(x, progress=progress), strict=True)
        for index, (name, (expected, got)) in enumerate(zip(names, pairs, strict=True)):
            labels = y if index == 0 else None
            if labels is not None:
                check_labels(labels, size(x), classes(expected.shape))
            found[name] = measure(got, expected, labels)
            where = b.name if len(names) == 1 else f"{b.name}, output {name!r}"
            checks += judge(found[name], limits, where, optimised=optimised)
    return Comparison(str(a), str(b), size(x), limits, found, tuple(checks))
