"""What a run is: frozen dataclasses read from TOML and checked on reading.

The text under a field is its documentation; docs/recipes.md lists every key with its default (a test compares them).
"""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from relief_export.errors import InputError
from relief_export.format_names import FormatName  # noqa: TC001 - its annotations are read to check a recipe
from relief_export.printing import counted
from relief_export.schema import OWN, Checked, Rule, build, convert, did_you_mean, fields_of, is_size, plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# Rules stand here and not in the annotations: a lambda inside a postponed annotation does not see this module's names.
Count = Annotated[int, Rule("at least 1", lambda value: value >= 1)]
CountOrZero = Annotated[int, Rule("0 or more", lambda value: value >= 0)]
Seed = Annotated[int, Rule("0 or more and below 2^62", lambda value: 0 <= value < 2**62)]
Share = Annotated[float, Rule("in (0, 1]", lambda value: 0 < value <= 1)]
Positive = Annotated[float, Rule("above 0", lambda value: value > 0)]
PositiveOrZero = Annotated[float, Rule("0 or more", lambda value: value >= 0)]
Drop = Annotated[float, Rule("in [0, 1]", lambda value: 0 <= value <= 1)]
BelowOne = Annotated[float, Rule("in [0, 1)", lambda value: 0 <= value < 1)]
Shares = Annotated[
    tuple[Share, ...], Rule("falling shares", lambda value: all(b < a for a, b in itertools.pairwise(value)))
]
Milestones = Annotated[tuple[Count, ...], Rule("ascending epochs", lambda value: list(value) == sorted(set(value)))]
HeldOut = Annotated[
    float | int,
    Rule("a share in (0, 1) or a number of samples", lambda v: v >= 1 if isinstance(v, int) else 0 < v < 1),
]
Name = Annotated[str, Rule("letters, digits and ._@- only", lambda v: re.fullmatch(r"[A-Za-z0-9][\w.@-]*", v))]
Own = Annotated[str, Rule("package.module:function", lambda value: re.fullmatch(OWN, value))]
Size = Annotated[str, Rule('a size like "256KiB"', is_size)]

Values = Annotated[
    int | str, Rule('a number from 2 to 256, or "int8"', lambda v: 2 <= v <= 256 if isinstance(v, int) else v == "int8")
]


@dataclass(frozen=True)
class DataConfig(Checked):
    """Which samples the network sees, and how they are prepared."""

    source: Own | Literal["digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "tiny-imagenet", "folder"]
    """A built-in data set, or one's own: "package.module:function" that returns the splits, arrays of x and y."""
    root: str | None = None
    """Data root; the environment variable RELIEF_DATA wins over it."""
    folder: str | None = None
    """For source "folder": a tree of train/CLASS/ and test/CLASS/ pictures, absolute or inside the data root."""
    validation: HeldOut = 0.1
    """Share or number of training samples held out for every choice; the test set decides nothing."""
    augment: bool = False
    """Random crop with padding 4 and horizontal flip, in batches."""
    normalize: Literal["none", "imagenet"] = "none"
    """none: pixels / 255; imagenet: then ImageNet's mean and standard deviation of each colour."""
    size: Count | None = None
    """Side to which pictures are resized; absent keeps them (digits, 8 x 8 scans, become 28 x 28)."""
    limit: Count | None = None
    """At most this many samples of each split, stratified (for trying things out)."""
    placement: Literal["auto", "memory", "stream"] = "auto"
    """memory: uint8 on the training device; stream: decoded by worker processes; auto decides by size."""


@dataclass(frozen=True)
class ModelConfig(Checked):
    """Which network: a zoo name, ``torchvision:NAME``, or one's own, ``package.module:function``."""

    name: str
    options: dict[str, str | int | float | bool] = field(default_factory=dict)
    """Options of that network, such as shortcut = "B" for a residual network."""
    weights: str | None = None
    """A file of weights to start from, safetensors or a state_dict of torch.save; with train.epochs = 0 they stay."""


@dataclass(frozen=True)
class TrainConfig(Checked):
    """One training: optimizer, and how its learning rate runs."""

    epochs: CountOrZero
    optimizer: Literal["adam", "adamw", "rmsprop", "sgd"] = "adam"
    lr: Positive = 1e-3
    """The highest learning rate of the training."""
    milestones: Milestones = ()
    """Of "steps": epochs after which the learning rate is multiplied by gamma."""
    gamma: Share = 0.1
    schedule: Literal["steps", "cosine", "one-cycle"] = "steps"
    """steps: multiplied by gamma at the milestones; cosine: falls to 0 along half a cosine; one-cycle: rises from
    lr / 25 to lr, then falls to lr / 250,000, both along half a cosine."""
    warmup: PositiveOrZero | None = None
    """Epochs, also parts of one, over which the rate rises; absent is 0, and 30 % of the epochs for one-cycle."""
    weight_decay: PositiveOrZero = 0.0
    decay: Literal["all", "weights"] = "all"
    """What weight decay pulls at: everything, or only weights, not batch norm's terms and biases."""
    momentum: BelowOne = 0.9
    """Of SGD and RMSprop; Adam does not use it."""
    nesterov: bool = False
    """SGD with Nesterov's momentum."""
    label_smoothing: BelowOne = 0.0
    """Share of the target that is spread evenly over all classes; measured losses are without it."""
    shift: CountOrZero = 0
    """Pictures are shifted at random by up to so many pixels in both directions; data.augment does more than that."""
    batch: Count = 128
    """Samples of one step, over all processes together."""
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    cuda_graph: bool = False
    """Record the optimizer step as a CUDA graph, where there is one CUDA device and one process: for small networks,
    which are bound by the launches of their kernels."""
    watch_test: bool = False
    """Measure the test set after each epoch too: it decides nothing, and shows what a choice by it would have been."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule != "steps" and self.milestones:
            raise InputError(f'milestones belong to schedule = "steps": "{self.schedule}" needs milestones = []')
        if self.warmup and self.epochs and self.warmup >= self.epochs:
            raise InputError(
                f"warmup = {self.warmup:g} epochs leave none of {self.epochs} for the rest of the schedule"
            )
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise InputError(f'nesterov needs optimizer = "sgd" with a momentum above 0, not "{self.optimizer}"')


@dataclass(frozen=True)
class ReliefConfig(Checked):
    """The relief loop: how it prunes, retrains and chooses."""

    RENAMED: ClassVar[dict[str, str]] = {"iterations": "rounds"}
    """What keys were called in earlier versions -> what they are called now."""

    rounds: CountOrZero
    alpha_conv: Share = 0.95
    alpha_fc: Share = 0.95
    score: Literal["activity", "magnitude", "magnitude-global", "random"] = "activity"
    """What a connection is worth. activity: the method; the others show what it is worth itself: magnitude is its size
    alone, compared within each neuron as activity is; magnitude-global compares sizes over the whole network."""
    keep: Shares = ()
    """Share of all connections that each round keeps, in place of what α keeps; absent lets α decide."""
    samples: Count = 1000
    """Training samples that measure the activity."""
    measure: Literal["at once", "layerwise"] = "at once"
    """at once: all layers are measured on the same pass; layerwise: linear ones on the already pruned convolutions."""
    position_norm: Literal["l1", "l2"] = "l2"
    """How a convolution's scores are summed over output positions."""
    rewind: bool = False
    """Retrain from the initial weights; false goes on from the present ones."""
    accuracy_drop: Drop = 0.01
    """Validation accuracy (a fraction) that may be lost against the dense network."""
    patience: Count | None = None
    """Stop after this many rounds in a row that lose more; absent runs all."""
    alpha: dict[str, Share] = field(default_factory=dict)
    """Layer name (glob) -> α, over alpha_conv and alpha_fc."""
    skip: tuple[str, ...] = ()
    """Layer names (globs) that are left whole."""
    retrain: TrainConfig | None = None
    """The training after each pruning; keys that are not given are those of [train]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score in ("magnitude-global", "random") and not self.keep:
            raise InputError(f'score = "{self.score}" has no α: say with keep what share each round keeps')
        if self.keep and self.rounds > len(self.keep):
            raise InputError(f"keep gives shares for {counted(len(self.keep), 'round')}, but there are {self.rounds}")
        if self.measure == "layerwise" and (self.keep or self.score != "activity"):
            raise InputError('measure = "layerwise" belongs to score = "activity" without keep')


@dataclass(frozen=True)
class QuantiseConfig(Checked):
    """Trained rounding of the relieved network: a training with Adam in one cycle, without weight decay."""

    values: Values
    """A number: each weight holds at most so many different non-zero values; "int8": steps of its channel's scale."""
    epochs: CountOrZero = 5
    """0 rounds to the nearest value and leaves it at that."""
    lr: Positive = 1e-3
    shift: CountOrZero | None = None
    """As train.shift; absent is as there."""


@dataclass(frozen=True)
class ExportConfig(Checked):
    """Which formats are written beside model.onnx, and how."""

    formats: tuple[FormatName, ...] = ("dense", "csr")
    reference_samples: Count = 256
    calibration_samples: Count = 256


@dataclass(frozen=True)
class AuditConfig(Checked):
    """What the audit checks, and against what."""

    flash: Size | None = None
    """Bytes that the file may have, as in "256KiB"."""
    ram: Size | None = None
    """Bytes that running it may take: activations at batch 1, and weights that are unpacked at load."""
    target: str | None = None
    """A board whose memories are the budget; docs/audit.md lists them."""
    file: str | None = None
    """Name of the file to check; absent chooses the smallest that fits among those that accuracy_drop allows."""
    accuracy_drop: Drop = 0.0
    """Accuracy (a fraction) that the tolerance of a chosen file may allow to be lost; 0 chooses among exact files."""


@dataclass(frozen=True)
class Recipe(Checked):
    """One run from training to report, resolved."""

    name: Name
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    relief: ReliefConfig
    description: str = ""
    reproduces: str = ""
    """The published system and where its settings come from."""
    seed: Seed = 0
    quantise: QuantiseConfig | None = None
    """Trained rounding between relief and export; absent exports the relieved network as it is."""
    export: ExportConfig = field(default_factory=ExportConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        tables = {"train": self.train, "relief.retrain": self.relief.retrain, "quantise": self.quantise}
        for key, table in tables.items():
            if self.data.augment and table is not None and table.shift:
                raise InputError(f"{key}.shift: data.augment shifts by up to 4 pixels already; leave one of them out")

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data; ``from_dict`` gives an equal recipe."""
        result: dict[str, Any] = plain(self)
        return result

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str) -> Recipe:
        """Build a recipe from plain data that was found in ``where``.

        Raises:
            InputError: A key is unknown or missing, or a value is of the wrong type or impossible.
        """
        try:
            return build(cls, content, "")
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    @classmethod
    def part(cls, key: str, content: object) -> Any:  # noqa: ANN401  # plain data is any of the JSON types
        """Return one key of a recipe, from plain data, as plain data with today's defaults for what it does not name.

        Raises:
            InputError: A key in it is unknown or missing, or a value is of the wrong type or impossible.
        """
        return None if content is None else plain(convert(content, fields_of(cls)[key], key))

    def to_toml(self) -> str:
        """Return the resolved recipe as TOML that ``load_recipe`` reads back."""
        return "\n".join(_toml_lines(self.to_dict(), ())) + "\n"


def load_recipe(path_or_name: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe: the path of a .toml file or a name from ``recipe_folder()``, with ``@VARIANT`` after it if wanted.

    Later wins: the file, its table ``variants.VARIANT``, ``overrides`` (``{"train.epochs": "2"}``; values are TOML, and
    what is not TOML is a string). Last, keys that ``relief.retrain`` does not give are taken from ``train``.

    Raises:
        InputError: No such recipe or variant, not TOML, or not a valid recipe.
    """
    path, variant = _locate(str(path_or_name))
    content, variants = _read(path)
    # A name may be all digits, which TOML reads as a number.
    content["name"] = str(content.get("name", path.stem))
    if variant is not None:
        if variant not in variants:
            raise InputError(f'{path} has no variant "{variant}"{did_you_mean(variant, variants)}')
        content = _merge(content, variants[variant])
        content["name"] += f"@{variant}"
    for key, value in (overrides or {}).items():
        content = _merge(content, _parse_override(key, value))
    relief, train = content.get("relief"), content.get("train")
    # Nothing is checked yet: a table may still be any value, which from_dict refuses in one sentence.
    if isinstance(relief, dict) and isinstance(relief.get("retrain"), dict) and isinstance(train, dict):
        # After the overrides, so that train.lr given on the command line reaches the retraining too.
        relief["retrain"] = train | relief["retrain"]
    return Recipe.from_dict(content, str(path))


def parse_overrides(settings: Iterable[str]) -> dict[str, str]:
    """Split "train.epochs=2" settings into the mapping that ``load_recipe`` takes."""
    pairs = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f'the setting "{setting}" has no "=": write it like train.epochs=2')
        pairs[key.strip()] = value.strip()
    return pairs


def recipe_folder() -> Path:
    """Return the folder that recipe names stand for: pipelines/ here, else the package's own."""
    here, package = Path("pipelines"), Path(__file__).resolve().parent
    installed, checkout = package / "pipelines", package.parent / "pipelines"
    # The checkout's folder is the last resort, even where it is empty, so that messages can name it.
    return next((folder for folder in (here, installed) if any(folder.glob("*.toml"))), checkout)


def recipe_names() -> tuple[str, ...]:
    """Return the names of the recipes in ``recipe_folder()``, sorted.

    Raises:
        InputError: There are none, which no installation is without.
    """
    folder = recipe_folder()
    names = tuple(sorted(path.stem for path in folder.glob("*.toml")))
    if not names:
        raise InputError(f"there are no recipes in {folder}: install relief-export again, or give a .toml file")
    return names


def recipe_variants(path_or_name: str | Path) -> tuple[str, ...]:
    """Return the names of a recipe's variants, sorted."""
    return tuple(sorted(_read(_locate(str(path_or_name))[0])[1]))


def _locate(text: str) -> tuple[Path, str | None]:
    name, at, variant = text.rpartition("@")
    # A file's own name may hold an "@": then it is the file that is meant.
    if not at or not re.fullmatch(r"[A-Za-z0-9_-]+", variant) or Path(text).is_file():
        name, variant = text, ""
    path = Path(name)
    if path.suffix != ".toml" and not path.is_file():
        if name not in recipe_names():
            raise InputError(f'there is no recipe "{name}" in {recipe_folder()}{did_you_mean(name, recipe_names())}')
        path = recipe_folder() / f"{name}.toml"
    return path, variant or None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return what a recipe's file says, and its variants."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the recipe {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None
    variants = content.pop("variants", {})
    if not isinstance(variants, dict) or not all(isinstance(variant, dict) for variant in variants.values()):
        raise InputError(f"{path}: variants must be tables of the keys that differ, like [variants.sgd.train]")
    return content, variants


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def _parse_override(key: str, value: str) -> dict[str, Any]:
    try:
        try:
            return tomllib.loads(f"{key} = {value}")
        except tomllib.TOMLDecodeError:  # a bare word is a string
            return tomllib.loads(f"{key} = {_toml_value(value)}")
    except tomllib.TOMLDecodeError:
        raise InputError(f'the setting "{key}={value}" has no valid key: write it like train.epochs=2') from None


def _toml_lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterable[str]:
    if path:
        yield f"\n[{'.'.join(map(_toml_key, path))}]"
    # Single values before tables: in TOML whatever follows a header belongs to that table.
    for key, value in table.items():
        if not isinstance(value, dict):
            yield f"{_toml_key(key)} = {_toml_value(value)}"
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _toml_lines(value, (*path, key))


def _toml_key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: object) -> str:
    """JSON's strings, numbers, booleans and lists are TOML's, but for its pairs of surrogates and a bare DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
