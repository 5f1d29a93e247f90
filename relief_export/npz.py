"""Arrays of a user's .npz file: the one reader of samples, labels and calibration; nothing in a file is executed.

SciPy's matrices in a csr folder, which come with a manifest that says what to expect, are read more strictly in
``formats.csr``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from relief_export.errors import InputError, IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

Array: TypeAlias = np.ndarray[Any, Any]


def read_npz(path: Path, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Array]:
    """Read the arrays whose names are ``wanted``; the others are not even unpacked.

    Raises:
        InputError: There is no such file, it is a single array, or holds pickled objects.
        IntegrityError: The file is damaged or of another kind.
    """
    try:
        with _opened(path) as file:
            return {key: _array(file, key, path) for key in file.files if wanted(key)}
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give an .npz file with arrays of samples") from None
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - what damaged archives and headers raise shares no other base
        # NumPy takes any foreign file for a pickle, and advises to load it.
        why = "another kind of file" if "pickle" in str(error) else " ".join(str(error).split())[:120]
        raise IntegrityError(f"{path} is no readable .npz file ({why}): write it with numpy.savez") from None


def of_inputs(arrays: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
    """Return the samples of the inputs ``names``, as far as there are any, whichever way the arrays are called.

    ``x.NAME`` or ``NAME`` is that of an input; of a model's one input so is ``x``.
    """
    found = {}
    for name in names:
        # The surest first: an input may be called x, or y like the labels.
        keys = (f"x.{name}", name, *(("x",) if len(names) == 1 else ()))
        if key := next((key for key in keys if key in arrays), None):
            found[name] = arrays[key]
    return found


def _opened(path: Path) -> np.lib.npyio.NpzFile:
    loaded = np.load(path, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise InputError(f"{path} is a single array: save x and y with numpy.savez")
    return loaded


def _array(file: Any, key: str, path: Path) -> Array:  # noqa: ANN401 - NumPy's NpzFile is untyped
    try:
        array: Array = file[key]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise InputError(f"{path}: array {key!r} holds pickled objects, which are never loaded: save numbers") from None
    return array
