"""Two ONNX models on the same samples, output by output."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from relief_export.errors import Failure, InputError
from relief_export.evaluation.agreement import Agreement, Check, classes, failures, judge, measure
from relief_export.evaluation.arrays import check_labels
from relief_export.evaluation.sessions import open_session
from relief_export.formats import Tolerance

if TYPE_CHECKING:
    from pathlib import Path

    from relief_export.evaluation.sessions import Progress

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Comparison:
    """How far the second model is from the first.

    Attributes:
        outputs: Name of each output of the first model -> agreement, optimisations on.
        checks: What was held against the tolerance, optimisations off and on.
    """

    first: str
    second: str
    samples: int
    tolerance: Tolerance
    outputs: dict[str, Agreement]
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every output is within the tolerance."""
        return all(check.ok for check in self.checks)

    @property
    def failures(self) -> tuple[Failure, ...]:
        """What is beyond the tolerance, one line an output and quantity."""
        return failures(self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, ``ok`` first."""
        return {"ok": self.ok, "failures": [asdict(each) for each in self.failures], **asdict(self)}


def compare(
    a: Path,
    b: Path,
    x: Array,
    *,
    y: Array | None = None,
    tolerance: float | Tolerance,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two models in ONNX Runtime, optimisations off and on.

    Args:
        a: The reference; an ``.onnx`` or ``.ort`` file, or a folder of SciPy matrices.
        b: The other one.
        x: Samples ``(N, ...)`` of both models' one input.
        y: Labels ``(N,)`` for the accuracies of the first output.
        tolerance: What ``b`` may differ by; a number bounds the relative error and asks for equal predictions.
        progress: Called for every batch.

    Raises:
        InputError: The samples or labels do not fit, or the models have different outputs.
        UnsupportedModelError: A model has several inputs, no batch axis, or an operator the runtime does not know.
    """
    limits = tolerance if isinstance(tolerance, Tolerance) else Tolerance(tolerance, 0.0)
    found: dict[str, Agreement] = {}
    checks: list[Check] = []
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
                check_labels(labels, len(x), classes(expected.shape))
            found[name] = measure(got, expected, labels)
            where = b.name if len(names) == 1 else f"{b.name}, output {name!r}"
            checks += judge(found[name], limits, where, optimised=optimised)
    return Comparison(str(a), str(b), len(x), limits, found, tuple(checks))
