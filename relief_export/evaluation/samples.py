"""Test sets: arrays x, y and logits, and the check that they fit each other.

Of a model with several inputs the file holds an array ``x.NAME`` for each, of one with several outputs ``logits.NAME``.
Where the model is known, arrays that are called like its inputs will do as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from relief_export.errors import InputError
from relief_export.formats.artifact import check_listed
from relief_export.npz import of_inputs, read_npz
from relief_export.printing import counted

Array: TypeAlias = np.ndarray[Any, Any]
ByName: TypeAlias = Array | Mapping[str, Array]
"""The array ``(N, ...)`` of a model's one input or output, or those of several by their names."""


@dataclass(frozen=True)
class Arrays:
    """Samples ``x: (N, ...)``, labels ``y: (N,)`` and reference logits ``(N, classes)``; the last two may be absent."""

    x: ByName
    y: Array | None = None
    logits: ByName | None = None

    @property
    def one_input(self) -> Array:
        """The samples of a model's one input.

        Raises:
            InputError: They are of several.
        """
        if isinstance(self.x, Mapping):
            raise InputError(
                f"the samples are of {counted(len(self.x), 'input')} ({', '.join(self.x)}): give a model of one"
            )
        return self.x


def size(samples: ByName) -> int:
    """Return the number of samples."""
    return len(next(iter(samples.values()), ())) if isinstance(samples, Mapping) else len(samples)


def part(samples: ByName, start: int, stop: int) -> ByName:
    """Return the samples from ``start`` to before ``stop``."""
    if isinstance(samples, Mapping):
        return {name: array[start:stop] for name, array in samples.items()}
    return samples[start:stop]


def named(what: str, arrays: ByName) -> dict[str, Array]:
    """Return arrays under the names that they have in a file."""
    return (
        {f"{what}.{name}": array for name, array in arrays.items()} if isinstance(arrays, Mapping) else {what: arrays}
    )


def load_arrays(path: str | Path, model: Path | None = None) -> Arrays:
    """Read ``x``, and where they are there ``y`` and ``logits``, from an ``.npz`` file; nothing in it is executed.

    Args:
        path: The file.
        model: What the samples are for: where there is no ``x``, arrays with the names of its inputs are taken, but for
            ``y`` and ``logits``.

    Raises:
        InputError: There is no such file, no array ``x`` or of an input, or an array of pickled objects.
        IntegrityError: The file is damaged, or differs from the manifest beside it that lists it.
    """
    path = Path(path)
    found = read_npz(path, lambda key: key.partition(".")[0] in {"x", "y", "logits"})
    # Samples that an export wrote are as much a part of the proof as its models.
    check_listed(path)
    x, logits = (_by_name(found, what) for what in ("x", "logits"))
    if x is None:
        x = _by_inputs(path, model)
    for name, array in named("x", x).items():
        if not array.ndim:
            raise InputError(f"{path}: array {name!r} is a single number: give samples along its first axis")
        if not len(array):
            raise InputError(f"{path}: array {name!r} holds no samples: save some")
        if len(array) != size(x):
            raise InputError(f"{path}: array {name!r} holds {len(array)} samples, another one {size(x)}")
    return Arrays(x, found.get("y"), logits)


def _by_inputs(path: Path, model: Path | None) -> ByName:
    """Read the arrays that are called like the inputs of ``model``."""
    from relief_export.evaluation.sessions import input_names  # noqa: PLC0415  sessions are fed with samples

    # Only now, since a model has to be loaded for its names.
    names = () if model is None else input_names(model)
    free = [name for name in names if name.partition(".")[0] not in {"y", "logits"}]
    found = of_inputs(read_npz(path, lambda key: key in free), names)
    if not found:
        own = f", or that of the model's input: {', '.join(names)}" if names else ""
        raise InputError(f"{path} has no array 'x': save the samples under that name{own}")
    return found if len(names) > 1 else next(iter(found.values()))


def _by_name(found: Mapping[str, Array], what: str) -> ByName | None:
    several = {key.removeprefix(f"{what}."): array for key, array in found.items() if key.startswith(f"{what}.")}
    # Names first: a model of several inputs has no plain x.
    return several or found.get(what)


def check_labels(y: Array, samples: int, classes: int) -> None:
    """Check labels ``(N,)`` against the number of samples and classes.

    Raises:
        InputError: No classes, wrong shape or type, or a label outside 0 … classes - 1.
    """
    if classes < 1:
        raise InputError("labels y need outputs (samples, classes), which these are not: give samples alone")
    if y.shape != (samples,):
        raise InputError(f"labels y have shape {y.shape} for {samples} samples: give one label a sample")
    # Floats that happen to be whole are refused too: they are more often scores than labels.
    if y.dtype.kind not in "iu":
        raise InputError(f"labels y are {y.dtype}: give whole numbers")
    wrong = np.flatnonzero((y < 0) | (y >= classes))
    if wrong.size:
        raise InputError(f"label {y[wrong[0]]} of sample {wrong[0]} is outside 0 to {classes - 1}")
