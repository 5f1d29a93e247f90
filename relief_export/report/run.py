"""One run as its records tell it: a build folder's, or those of a folder that an export alone wrote.

The report is made from what is read here and from nothing else. A folder that ``relief_export.export`` wrote has no
training to tell of: ``rounds`` is empty there, and ``validation`` is None until the folder has been validated.
"""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from relief_export.errors import InputError, IntegrityError
from relief_export.evaluation.validation import NOT_PROVEN
from relief_export.formats import FORMATS
from relief_export.records import DEVICE_RECORDS, RECORDS, Record, read_record, sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

Table = dict[str, Any]

_MANIFEST = "manifest.json"
OPTIONAL = frozenset({"quantise", "audit"})
NOT_LOADED = frozenset(name for name, form in FORMATS.items() if not form.loadable)
"""Formats that no runtime loads as they are."""


@dataclass(frozen=True)
class File:
    """One artifact: its size, and the worst of what validation measured of it.

    Attributes:
        name: Its name in the artifacts' folder. format: Its key in ``formats.FORMATS``. values: Code of its values.
        bytes: On disk, all its files.
        accuracy: On the test set in ONNX Runtime, None where nothing was labelled.
        error: Largest relative error of a logit, over all checks.
        agreement: Lowest share of equal predictions, over all checks.
        ok: Whether every check passed; None where validation did not see it.
        exact: Whether its tolerance allows no other prediction than the pruned network's.
        loads: Whether ONNX Runtime takes it as it is.
    """

    name: str
    format: str
    bytes: int
    exact: bool
    loads: bool
    values: str
    accuracy: float | None = None
    error: float | None = None
    agreement: float | None = None
    ok: bool | None = None
    not_proven: str = ""


@dataclass(frozen=True)
class Layer:
    """Stored parameters and MACs of one layer of the original: dense, structural (0 once gone), non-zero."""

    name: str
    op: str
    parameters: tuple[int, int, int]
    macs: tuple[int, int, int]


@dataclass(frozen=True)
class Run:
    """One folder. Fractions are 0 to 1, sizes bytes, times seconds; figures are (dense, structural, non-zero).

    Attributes:
        folder: Where it lies; ``artifacts`` is the folder of its files in it, "" where they lie in it themselves.
        records: By stage, those that are there.
        feeds: Arrays of reference.npz that the model is given -> shape of one sample.
        input_shape: Of one sample that the network was trained on. samples: Of each split.
        accuracy: Network -> (validation, test).
        connections: Weights and biases, dense and pruned; None where no pruning was recorded.
        rounds: The pruning rounds, as recorded.
        chosen: Index in it of the round that was chosen.
        floor: Lowest validation accuracy that the recipe accepts.
        sizes: original and masked, both also after gzip, and the entropy bounds of float32 and int8 values.
        breakdowns: File -> its bytes by part, which add up to it. bounds: Value code -> the entropy bound in bytes.
        tensors: Bytes of each weight by format.
        stayed: Reasons for which dead channels stayed; ``removed`` what went, layer by layer.
        validation: Outcome of the validation; None where there was none.
        device: Outcomes of runs in emulators. outdated: Those of programs that are no longer the ones that ran.
    """

    folder: Path
    artifacts: str
    records: dict[str, Record]
    costs: dict[str, tuple[int, int, int]]
    paper_flops: tuple[int, int]
    layers: tuple[Layer, ...]
    files: tuple[File, ...]
    sizes: dict[str, int]
    breakdowns: dict[str, dict[str, int]]
    bounds: dict[str, float]
    tensors: tuple[Table, ...]
    removed: tuple[Table, ...]
    stayed: tuple[Table, ...]
    arena: dict[str, Table | None]
    feeds: dict[str, tuple[int, ...]] = field(default_factory=dict)
    input_shape: tuple[int, ...] = ()
    samples: dict[str, int] = field(default_factory=dict)
    accuracy: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    connections: tuple[int, int] | None = None
    rounds: tuple[Table, ...] = ()
    chosen: int = 0
    floor: float | None = None
    inputs: InputUse | None = None
    validation: Table | None = None
    audit: Table | None = None
    device: tuple[Table, ...] = ()
    outdated: tuple[Table, ...] = ()

    @property
    def recipe(self) -> Table:
        """The resolved recipe, as plain data."""
        return self.records["export"].recipe

    @property
    def name(self) -> str:
        """The recipe's name, and that of the folder where it is another: a run with other seeds or settings."""
        folder = self.folder.resolve().name
        name = str(self.recipe.get("name", folder))
        return name if folder == name else f"{name} ({folder})"

    @property
    def ok(self) -> bool:
        """Whether validation passed; False where there was none."""
        return self.validation is not None and bool(self.validation["ok"])

    def smallest(self, *, exact: bool) -> File | None:
        """Return the smallest file that ONNX Runtime loads, of the exact ones or of all, none that failed a check."""
        # Without a validation nothing was checked, and every file is as good as the others.
        passed = {True} if self.validation is not None else {None}
        fit = [file for file in self.files if file.ok in passed and file.loads and (file.exact or not exact)]
        return min(fit, key=lambda file: file.bytes, default=None)


@contextmanager
def reading(folder: Path, stage: str) -> Iterator[None]:
    """Turn a record of an unexpected shape into one sentence that names it.

    Raises:
        IntegrityError: The code in the block did not find in the stage's record what it looked for.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else f"is malformed ({error})"
        where = f"{folder / RECORDS.get(stage, DEVICE_RECORDS)}, the record of stage {stage!r},"
        raise IntegrityError(f"{where} {what}: remove it and run the stage again") from None


def read_run(folder: Path) -> Run:
    """Read every record of a build folder, or of a folder that an export wrote.

    Raises:
        InputError: It is neither, or a record is missing; the message names the file and its stage.
        IntegrityError: A record is damaged, lacks what the page needs, or is of other files than lie in the folder.
    """
    alone = (folder / _MANIFEST).is_file()
    if not alone and not any((folder / path).exists() for path in RECORDS.values()):
        raise InputError(f"{folder} is no build folder, and has no {_MANIFEST}: give what a run or an export wrote")
    # A folder of files alone: what a build folder has in artifacts/ and beside it lies together.
    paths = {"export": "record.json", "validate": RECORDS["validate"]} if alone else RECORDS
    found = {}
    for stage, name in paths.items():
        if (folder / name).exists():
            found[stage] = read_record(folder / name, stage)
            _check_current(folder, found[stage])
        elif stage not in OPTIONAL and not (alone and stage == "validate"):
            advice = "export again" if alone else f"run stage {stage!r} first"
            raise InputError(f"{folder / name} does not exist: {advice}")
    facts: Table = {"folder": folder, "records": found, "artifacts": "" if alone else "artifacts/"}
    readers = {"train": _train, "relieve": _relieve, "quantise": _quantise, "export": _export, "validate": _validate}
    for stage, read in readers.items():
        if stage in found:
            with reading(folder, stage):
                # In the order of the stages: each reader goes on from what the earlier ones found.
                facts |= read(found[stage].outcome, facts)
    if "audit" in found:
        facts["audit"] = found["audit"].outcome
    facts |= _device(folder)
    if "relieve" in found and facts["layers"]:
        masks = folder / "relieved" / "masks.safetensors"
        facts["inputs"] = input_use(masks, facts["layers"][0].name, facts["input_shape"])
    return Run(**facts)


def _check_current(folder: Path, record: Record) -> None:
    """Refuse a record whose stage read other files than are there now: its figures are not theirs."""
    for name, digest in record.inputs.items():
        if (folder / name).is_file() and sha256(folder / name) != digest:
            raise IntegrityError(
                f"{folder / name} is not the file that stage {record.stage!r} read: run {record.stage!r} again"
            )


def _device(folder: Path) -> Table:
    """Read the records of emulated runs, apart by whether the program is still the one that ran.

    A new export makes them outdated, and no stage renews them: the page does without, and says so.
    """
    found: dict[bool, list[Table]] = {True: [], False: []}
    for path in sorted(folder.glob(DEVICE_RECORDS)):
        record = read_record(path, "run-on")
        files = {folder / name: digest for name, digest in record.inputs.items()}
        current = bool(files) and all(file.is_file() and sha256(file) == digest for file, digest in files.items())
        found[current].append(record.outcome)
    return {"device": tuple(found[True]), "outdated": tuple(found[False])}


def _train(outcome: Table, _: Table) -> Table:
    accuracy = {"dense": (outcome["validation"], outcome["test"])}
    return {
        "accuracy": accuracy,
        "input_shape": tuple(outcome["input_shape"]),
        "samples": outcome["samples"],
        "peak": outcome["fit"].get("peak_test_accuracy"),
    }


def _relieve(outcome: Table, facts: Table) -> Table:
    relief = outcome["relief"]
    # The dense network was trained by another stage, which alone knows the peak of its epochs.
    first = relief["history"][0] | {"peak_test_accuracy": facts.pop("peak")}
    return {
        "accuracy": facts["accuracy"] | {"relieved": (outcome["validation"], outcome["test"])},
        "connections": (outcome["connections"]["dense"], outcome["connections"]["kept"]),
        "rounds": (first, *relief["history"][1:]),
        "chosen": relief["chosen"],
        "floor": relief["history"][0]["accuracy"] - relief["accuracy_drop"],
    }


def _quantise(outcome: Table, facts: Table) -> Table:
    if outcome["values"] is None:
        return {}
    return {"accuracy": facts["accuracy"] | {"quantised": (outcome["validation"], outcome["test"])}}


def _export(outcome: Table, _: Table) -> Table:
    original, shrunk = outcome["cost"]["original"], outcome["cost"]["shrunk"]
    figures = {name: (original[name], shrunk[name]) for name in ("parameters", "macs", "flops")}
    baselines, bounds = outcome["baselines"], outcome["ledger"]["total"]["bound_bytes"]
    return {
        "costs": {name: (b["structural"], a["structural"], a["nonzero"]) for name, (b, a) in figures.items()},
        "paper_flops": (original["paper_flops"], shrunk["paper_flops"]),
        "layers": _layers(original["layers"], shrunk["layers"]),
        "files": tuple(_file(entry) for entry in outcome["artifacts"]),
        "sizes": {
            "original": baselines["original"]["file_bytes"],
            "masked": baselines["masked"]["file_bytes"],
            "gzip": baselines["original"]["gzip_bytes"],
            "masked gzip": baselines["masked"]["gzip_bytes"],
            **{f"bound {code}": round(bounds[code]) for code in ("f32", "int8")},
        },
        "breakdowns": outcome["size_breakdowns"],
        "bounds": bounds,
        "tensors": tuple(outcome["ledger"]["tensors"]),
        "removed": tuple(outcome["shrink"]["removed"]),
        "stayed": tuple(outcome["shrink"]["stayed"]),
        "arena": outcome["arena"],
        "feeds": {name: tuple(shape) for name, shape in outcome.get("inputs", {}).items()},
    }


def _file(entry: Table) -> File:
    exact = entry["tolerance"]["accuracy_drop"] == 0
    size = sum(file["file_bytes"] for file in entry["files"])
    form = entry["format"]
    code = FORMATS[form].values if form in FORMATS else "f32"  # of an older version
    return File(entry["name"], form, size, exact, form not in NOT_LOADED, code)


def _layers(before: list[Table], after: list[Table]) -> tuple[Layer, ...]:
    """Pair the layers of two cost tables by the name of their weight; what is not in ``after`` is gone."""
    # By the weight, whose name a shrink keeps, and not by position: layers may be gone.
    left = {layer["weight"]: layer for layer in after if layer["weight"]}
    gone = {"parameters": 0, "parameters_nonzero": 0, "macs": 0, "macs_nonzero": 0}
    return tuple(
        Layer(
            layer["weight"].removesuffix(".weight"),
            layer["op"],
            (layer["parameters"], now["parameters"], now["parameters_nonzero"]),
            (layer["macs"], now["macs"], now["macs_nonzero"]),
        )
        for layer in before
        if layer["weight"]
        for now in [left.get(layer["weight"], gone)]
    )


def _validate(outcome: Table, facts: Table) -> Table:
    """Join what validation measured to the files: the worst of a file's sessions stands for it."""
    files = tuple(_judged(file, outcome) for file in facts["files"])
    exported = next((file.accuracy for file in files if file.format == "dense"), None)
    # A folder that an export alone wrote has no trainings: all that is known is what validation measured.
    known: Table = facts.get("accuracy") or {"pruned": (None, outcome["reference_accuracy"])}
    accuracy = known | {"exported, in ONNX Runtime": (None, exported)}
    return {"files": files, "validation": outcome, "accuracy": accuracy}


def _judged(file: File, outcome: Table) -> File:
    sessions = [found["agreement"] for found in outcome["measurements"] if found["file"] == file.name]
    checks = [check for check in outcome["checks"] if check["file"] == file.name]
    verdicts = [check["ok"] for check in checks]
    # Generated C, where validation had no compiler.
    unproven = NOT_PROVEN if any(check["code"] == "compiled" and check["ok"] for check in checks) else ""

    def worst(key: str, pick: Callable[..., float]) -> float | None:
        return pick((session[key] for session in sessions if session[key] is not None), default=None)

    return replace(
        file,
        accuracy=worst("accuracy", min),
        error=worst("relative_error", max),
        agreement=worst("same_predictions", min),
        # What could not be compiled has neither passed nor failed.
        ok=None if unproven and all(verdicts) else all(verdicts) if verdicts else None,
        not_proven=unproven,
    )


_HEADER = 8  # bytes: the length of the header, little-endian


@dataclass(frozen=True)
class InputUse:
    """How many weights of the first layer read each input.

    Attributes:
        pixels: (height, width), weights over all channels, where the first layer is linear on pictures; else empty.
        channels: Weights (kernels, for a convolution) that read each channel, and how many there were of each.
    """

    pixels: tuple[tuple[int, ...], ...]
    channels: tuple[tuple[int, int], ...]


def input_use(masks: Path, layer: str, shape: tuple[int, ...]) -> InputUse | None:
    """Count the weights left for each input of the first layer.

    Args:
        masks: The file of masks, safetensors; None is returned where it is absent or has no mask of the layer.
        layer: Name of the first layer; its mask is that of ``layer.weight``: (out, in) or (out, in, kh, kw).
        shape: Shape of one input sample, (channels, height, width) or (features,).

    Raises:
        IntegrityError: The file is damaged.
    """
    mask = _read_mask(masks, f"{layer}.weight") if masks.is_file() else None
    if mask is None or mask.ndim not in (2, 4):
        return None
    if mask.ndim == 4:  # a unit of pruning is a whole kernel
        kernels = mask.any(axis=(2, 3))
        return InputUse((), tuple((int(count), kernels.shape[0]) for count in kernels.sum(axis=0)))
    # A linear layer that does not read the input itself: its columns are no pixels.
    if mask.shape[1] != math.prod(shape):
        return None
    counts = mask.sum(axis=0).reshape(shape)
    if counts.ndim != 3:
        return InputUse((), tuple((int(count), mask.shape[0]) for count in counts.ravel()))
    area = mask.shape[0] * counts[0].size
    pixels = tuple(tuple(int(count) for count in row) for row in counts.sum(axis=0))
    return InputUse(pixels, tuple((int(count), area) for count in counts.sum(axis=(1, 2))))


def _read_mask(path: Path, name: str) -> NDArray[np.bool_] | None:
    """Read one boolean tensor of a safetensors file: a length, a JSON header, the bytes.

    NumPy alone does it, because the reader of the library comes with an extra that a report does not need.
    """
    data = path.read_bytes()
    try:
        end = _HEADER + int.from_bytes(data[:_HEADER], "little")
        entry = json.loads(data[_HEADER:end]).get(name)
        if entry is None:
            return None
        first, last = (end + offset for offset in entry["data_offsets"])
        return np.frombuffer(data[first:last], np.uint8).reshape(entry["shape"]).astype(bool)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{path} is not a whole safetensors file ({error}): run the stage 'relieve' again"
        ) from None
