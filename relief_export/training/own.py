"""A user's own network and data in a recipe: ``package.module:function``, from the Python path or the present folder.

``model.name = "mine:network"`` calls ``network(input_shape, classes, **options)`` for an ``nn.Module``;
``data.source = "mine:splits"`` calls ``splits()`` for ``{"train": (x, y), "validation": (x, y), "test": (x, y)}``,
arrays or tensors. Importing a module runs it: a recipe that names one is to be trusted like a program.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from relief_export.errors import InputError, ReliefError
from relief_export.schema import did_you_mean
from relief_export.training.data import DataSet, Split, stratified

if TYPE_CHECKING:
    from relief_export.recipe import DataConfig

_SPLITS = ("train", "validation", "test")


def function_at(name: str, key: str) -> Callable[..., Any]:
    """Import ``package.module:function``, which the recipe's ``key`` names.

    Raises:
        InputError: There is no such module or function, or importing it fails.
    """
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # `python -m` has it, the installed command has not
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f'{key} = "{name}": module {module_name} cannot be imported ({what})') from error
    # Callable and no more: a class of networks serves as well as a function.
    found = getattr(module, attribute, None)
    if not callable(found):
        known = [each for each in vars(module) if callable(getattr(module, each)) and not each.startswith("_")]
        hint = did_you_mean(attribute, known) if known else ""
        raise InputError(f'{key} = "{name}": module {module_name} has no function "{attribute}"{hint}')
    function: Callable[..., Any] = found
    return function


def call(function: Callable[..., Any], name: str, key: str, *arguments: object, **options: object) -> Any:  # noqa: ANN401
    """Call a user's function; whatever it raises becomes one sentence.

    Raises:
        InputError: It failed.
    """
    try:
        return function(*arguments, **options)
    # Such an error has its one sentence already.
    except ReliefError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f'{key} = "{name}" fails when it is called ({what})') from error


def load_own_data(config: DataConfig, seed: int) -> DataSet:
    """Return what the user's function gives; without a validation split, ``data.validation`` is cut from training.

    Raises:
        InputError: The function fails or gives something else, or a key is set that is for built-in sources.
    """
    where = f'data.source = "{config.source}"'
    for key, given in (("folder", config.folder), ("size", config.size), ("root", config.root)):
        if given is not None:
            raise InputError(f"data.{key} is for the built-in sources: {where} prepares its own samples")
    if config.normalize != "none":
        raise InputError(f"data.normalize is for the built-in sources: {where} prepares its own samples")
    given = call(function_at(config.source, "data.source"), config.source, "data.source")
    # A user who builds splits of this package has prepared everything, the validation split too.
    if isinstance(given, DataSet):
        return given
    if not isinstance(given, Mapping) or "train" not in given or not set(given) <= set(_SPLITS):
        raise InputError(
            f'{where} must return {{"train": (x, y), "validation": (x, y), "test": (x, y)}}, the last two if there are '
            f"such splits, not {_shown(given)}"
        )
    pairs = {name: _pair(pair, f"{where}: split {name!r}") for name, pair in given.items()}
    if "validation" not in pairs:
        x, y = pairs["train"]
        count = config.validation if isinstance(config.validation, int) else round(config.validation * len(y))
        if not 0 < count < len(y):
            raise InputError(f"data.validation = {config.validation} cannot be cut from {len(y)} training samples")
        held = torch.zeros(len(y), dtype=torch.bool)
        held[stratified(y, count, seed)] = True
        pairs |= {"train": (x[~held], y[~held]), "validation": (x[held], y[held])}
    if config.limit is not None:
        rows = {name: stratified(y, config.limit, seed) for name, (_, y) in pairs.items()}
        pairs = {name: (x[rows[name]], y[rows[name]]) for name, (x, y) in pairs.items()}
    splits = {name: Split.of(*pair) for name, pair in pairs.items()}
    x, y = pairs["train"]
    # The very same object: the relief loop recognises it and then reports no test accuracy.
    test = splits.get("test", splits["validation"])
    # Over all splits, because a class may be missing from a small training split.
    classes = max(int(labels.max()) for _, labels in pairs.values()) + 1
    return DataSet(splits["train"], splits["validation"], test, classes, tuple(x.shape[1:]), augment=config.augment)


def _pair(pair: object, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InputError(f"{where} must be a pair (x, y) of samples and labels, not {_shown(pair)}")
    try:
        x, y = map(torch.as_tensor, pair)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{where} holds no arrays of numbers ({error})") from None
    if y.ndim != 1 or len(x) != len(y) or not len(y) or bool((y != y.long()).any() or (y < 0).any()):
        raise InputError(
            f"{where}: labels {tuple(y.shape)} must be one whole number from 0 for each of {len(x)} samples"
        )
    return (x.float() if x.is_floating_point() else x), y.long()


def _shown(value: object) -> str:
    return f"a table with {', '.join(map(str, value))}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
