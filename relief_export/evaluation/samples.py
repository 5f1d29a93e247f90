"""Test sets: arrays x, y and logits, and the check that they fit each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from relief_export.errors import InputError, IntegrityError
from relief_export.formats.artifact import check_listed

if TYPE_CHECKING:
    from pathlib import Path

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Arrays:
    """Samples ``x: (N, ...)``, labels ``y: (N,)`` and reference logits ``(N, classes)``; the last two may be absent."""

    x: Array
    y: Array | None = None
    logits: Array | None = None


def load_arrays(path: Path) -> Arrays:
    """Read ``x``, and where they are there ``y`` and ``logits``, from an ``.npz`` file; nothing in it is executed.

    Raises:
        InputError: There is no such file, no array ``x``, or an array of pickled objects.
        IntegrityError: The file is damaged, or differs from the manifest beside it that lists it.
    """
    try:
        found = _read(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give an .npz file with arrays x and y") from None
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - what damaged archives and headers raise shares no other base
        # NumPy takes any foreign file for a pickle, and advises to load it.
        why = "another kind of file" if "pickle" in str(error) else " ".join(str(error).split())[:120]
        raise IntegrityError(f"{path} is no readable .npz file ({why}): write it with numpy.savez") from None
    check_listed(path)
    if "x" not in found:
        raise InputError(f"{path} has no array 'x': save the samples under that name")
    if not found["x"].ndim:
        raise InputError(f"{path}: array 'x' is a single number: give samples along its first axis")
    return Arrays(found["x"], found.get("y"), found.get("logits"))


def _read(path: Path) -> dict[str, Array]:
    loaded = np.load(path, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise InputError(f"{path} is a single array: save x and y with numpy.savez")
    with loaded as file:
        return {key: _array(file, key, path) for key in ("x", "y", "logits") if key in file.files}


def _array(file: Any, key: str, path: Path) -> Array:  # noqa: ANN401 - NumPy's NpzFile is untyped
    try:
        array: Array = file[key]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise InputError(f"{path}: array {key!r} holds pickled objects, which are never loaded: save numbers") from None
    return array


def check_labels(y: Array, samples: int, classes: int) -> None:
    """Check labels ``(N,)`` against the number of samples and classes.

    Raises:
        InputError: No classes, wrong shape or type, or a label outside 0 … classes - 1.
    """
    if classes < 1:
        raise InputError("labels y need outputs (samples, classes), which these are not: give samples alone")
    if y.shape != (samples,):
        raise InputError(f"labels y have shape {y.shape} for {samples} samples: give one label a sample")
    if y.dtype.kind not in "iu":
        raise InputError(f"labels y are {y.dtype}: give whole numbers")
    wrong = np.flatnonzero((y < 0) | (y >= classes))
    if wrong.size:
        raise InputError(f"label {y[wrong[0]]} of sample {wrong[0]} is outside 0 to {classes - 1}")
