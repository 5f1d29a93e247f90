"""What the page says of one run, read from the records of its build folder and from nothing else."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from relief_export.errors import InputError, IntegrityError
from relief_export.formats import FORMATS
from relief_export.records import RECORDS, Record, read_record, sha256
from relief_export.report.inputs import InputUse, input_use

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Table = dict[str, Any]

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
        exact: Whether it promises every prediction of the relieved network.
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


@dataclass(frozen=True)
class Layer:
    """Stored parameters and MACs of one layer of the original: dense, structural (0 once gone), non-zero."""

    name: str
    op: str
    parameters: tuple[int, int, int]
    macs: tuple[int, int, int]


@dataclass(frozen=True)
class Run:
    """One build folder. Fractions are 0 to 1, sizes bytes, times seconds; figures are (dense, structural, non-zero).

    Attributes:
        input_shape: Of one sample. samples: Of each split.
        accuracy: Row label -> (validation, test).
        iterations: The relief loop's history, as recorded.
        chosen: Index in it of the iteration that was exported.
        floor: Lowest validation accuracy that relief was allowed.
        sizes: original and masked, both also after gzip, and the entropy bounds of float32 and int8 values.
        anatomy: File -> the bytes of its parts, which add up to it. bounds: Value code -> the entropy bound in bytes.
        tensors: The ledger's rows: bytes of each weight by format.
        kept: Reasons for which a zero row or column stayed; ``removed`` what went, layer by layer.
    """

    folder: Path
    records: dict[str, Record]
    input_shape: tuple[int, ...]
    samples: dict[str, int]
    accuracy: dict[str, tuple[float | None, float | None]]
    connections: tuple[int, int]
    iterations: tuple[Table, ...]
    chosen: int
    floor: float
    costs: dict[str, tuple[int, int, int]]
    paper_flops: tuple[int, int]
    layers: tuple[Layer, ...]
    files: tuple[File, ...]
    sizes: dict[str, int]
    anatomy: dict[str, dict[str, int]]
    bounds: dict[str, float]
    tensors: tuple[Table, ...]
    removed: tuple[Table, ...]
    kept: tuple[Table, ...]
    arena: dict[str, Table]
    inputs: InputUse | None
    validation: Table
    audit: Table | None

    @property
    def recipe(self) -> Table:
        """The resolved recipe, as plain data."""
        return self.records["export"].recipe

    @property
    def name(self) -> str:
        """The recipe's name, and that of the folder where it is another: a run with other seeds or settings."""
        name, folder = str(self.recipe["name"]), self.folder.resolve().name
        return name if folder == name else f"{name} ({folder})"

    @property
    def ok(self) -> bool:
        """Whether validation passed."""
        return bool(self.validation["ok"])

    def smallest(self, *, exact: bool) -> File | None:
        """Return the smallest file that passed validation and that ONNX Runtime loads, of the exact ones or of all."""
        fit = [file for file in self.files if file.ok and file.loads and (file.exact or not exact)]
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
        where = f"{folder / RECORDS[stage]}, the record of stage {stage!r},"
        raise IntegrityError(f"{where} {what}: remove it and run the stage again") from None


def read_run(folder: Path) -> Run:
    """Read every record of ``folder``.

    Raises:
        InputError: A record is missing; the message names the file and its stage.
        IntegrityError: A record is damaged, lacks what the page needs, or is of other files than lie in the folder.
    """
    found = {}
    for stage, name in RECORDS.items():
        if (folder / name).exists():
            found[stage] = read_record(folder / name, stage)
            _check_current(folder, found[stage])
        elif stage not in OPTIONAL:
            raise InputError(f"{folder / name} does not exist: run stage {stage!r} first")
    facts: Table = {"folder": folder, "records": found, "audit": None}
    readers = {"train": _train, "relieve": _relieve, "quantise": _quantise, "export": _export, "validate": _validate}
    for stage, read in readers.items():
        if stage in found:
            with reading(folder, stage):
                facts |= read(found[stage].outcome, facts)
    if "audit" in found:
        facts["audit"] = found["audit"].outcome
    first = facts["layers"][0].name if facts["layers"] else ""
    inputs = input_use(folder / "relieved" / "masks.safetensors", first, facts["input_shape"])
    return Run(inputs=inputs, **facts)


def _check_current(folder: Path, record: Record) -> None:
    """Refuse a record whose stage read other files than are there now: its figures are not theirs."""
    for name, digest in record.inputs.items():
        if (folder / name).is_file() and sha256(folder / name) != digest:
            raise IntegrityError(
                f"{folder / name} is not the file that stage {record.stage!r} read: run {record.stage!r} again"
            )


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
    first = relief["history"][0] | {"peak_test_accuracy": facts.pop("peak")}
    return {
        "accuracy": facts["accuracy"] | {"relieved": (outcome["validation"], outcome["test"])},
        "connections": (outcome["connections"]["dense"], outcome["connections"]["kept"]),
        "iterations": (first, *relief["history"][1:]),
        "chosen": relief["iteration"],
        "floor": relief["history"][0]["accuracy"] - relief["tolerance"],
    }


def _quantise(outcome: Table, facts: Table) -> Table:
    if outcome["values"] is None:
        return {}
    return {"accuracy": facts["accuracy"] | {"quantised": (outcome["validation"], outcome["test"])}}


def _export(outcome: Table, _: Table) -> Table:
    original, shrunk = outcome["cost"]["original"], outcome["cost"]["shrunk"]
    figures = {name: (original[name], shrunk[name]) for name in ("parameters", "macs", "flops")}
    baselines, bounds = outcome["baselines"], outcome["ledger"]["total"]["bound"]
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
        "anatomy": outcome["anatomy"],
        "bounds": bounds,
        "tensors": tuple(outcome["ledger"]["tensors"]),
        "removed": tuple(outcome["shrink"]["removed"]),
        "kept": tuple(outcome["shrink"]["kept"]),
        "arena": outcome["arena"],
    }


def _file(entry: Table) -> File:
    exact = entry["tolerance"]["accuracy_drop"] == 0
    size = sum(file["bytes"] for file in entry["files"])
    form = entry["format"]
    code = FORMATS[form].values if form in FORMATS else "f32"  # of an older version
    return File(entry["name"], form, size, exact, form not in NOT_LOADED, code)


def _layers(before: list[Table], after: list[Table]) -> tuple[Layer, ...]:
    """Pair the layers of two cost tables by the name of their weight; what is not in ``after`` is gone."""
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
    accuracy = facts["accuracy"] | {"exported, in ONNX Runtime": (None, exported)}
    return {"files": files, "validation": outcome, "accuracy": accuracy}


def _judged(file: File, outcome: Table) -> File:
    sessions = [found["agreement"] for found in outcome["measurements"] if found["artifact"] == file.name]
    verdicts = [check["ok"] for check in outcome["checks"] if check["artifact"] == file.name]

    def worst(key: str, pick: Callable[..., float]) -> float | None:
        return pick((session[key] for session in sessions if session[key] is not None), default=None)

    return replace(
        file,
        accuracy=worst("accuracy", min),
        error=worst("relative_error", max),
        agreement=worst("agreement", min),
        ok=all(verdicts) if verdicts else None,
    )
