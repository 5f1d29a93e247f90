"""What each stage leaves in its record: the fields that later stages, the report or the command line read of it.

A record may hold more; what is named here is there, and of this type, or the record is refused when it is read. Sizes
are bytes, times seconds, accuracies fractions of 1. The tables are JSON objects, hence ``TypedDict``.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class FitFigures(TypedDict):
    """Of a training: the best test accuracy of any epoch, where it was watched; it decides nothing."""

    peak_test_accuracy: NotRequired[float | None]


class Train(TypedDict):
    """The dense network; accuracies of the validation and the test split, None where a split is empty."""

    fit: FitFigures
    validation: float | None
    test: float | None
    input_shape: list[int]
    classes: int
    samples: dict[str, int]


class Count(TypedDict):
    """Weights and biases before pruning and after."""

    dense: int
    kept: int


class Round(TypedDict):
    """One pruning round; round 0 is the dense network."""

    round: int
    accuracy_before: float | None
    accuracy: float
    test_accuracy: float | None
    peak_test_accuracy: NotRequired[float | None]
    dense: int
    kept: int
    layers: dict[str, Count]
    seconds: dict[str, float]


class Rounds(TypedDict):
    """The relief loop: its rounds, the one that was chosen, and the loss of accuracy that was allowed.

    Attributes:
        note: Why the dense network was chosen although there were rounds; empty otherwise.
    """

    chosen: int
    accuracy_drop: float
    history: list[Round]
    note: NotRequired[str]


class Relieve(TypedDict):
    """The pruned network."""

    relief: Rounds
    validation: float | None
    test: float | None
    connections: Count


class Quantise(TypedDict):
    """The network of few values; ``values`` is None where the recipe asks for none, and then there is no more."""

    values: int | str | None
    validation: NotRequired[float | None]
    test: NotRequired[float | None]


class Columns(TypedDict):
    """One quantity of a network: as it was dense (None where that is unknown), as stored, and without its zeros."""

    dense: int | None
    structural: int
    nonzero: int


class LayerCost(TypedDict):
    """What one layer stores and computes."""

    weight: str | None
    op: str
    parameters: int
    parameters_nonzero: int
    macs: int
    macs_nonzero: int


class CostFigures(TypedDict):
    """The cost of one network."""

    parameters: Columns
    macs: Columns
    flops: Columns
    paper_flops: int
    layers: list[LayerCost]


class Costs(TypedDict):
    """The dense network, and what is left of it once its dead channels are gone."""

    original: CostFigures
    shrunk: CostFigures


class TensorEntry(TypedDict):
    """One activation."""

    name: str
    tensor_bytes: int


class ArenaEntry(TypedDict):
    """The plan of one network's activations and where it is largest."""

    arena_bytes: int
    lower_bound_bytes: int
    peak: str
    peak_op: str
    peak_tensors: list[TensorEntry]
    excluded: str


class Arenas(TypedDict):
    """The activations of the dense network and of what is left; None where the size of one is not known."""

    original: ArenaEntry | None
    shrunk: ArenaEntry | None


class Removed(TypedDict):
    """What a layer lost."""

    layer: str
    outputs_before: int
    outputs_after: int
    inputs_before: int
    inputs_after: int
    weights_before: int
    weights_after: int


class Stayed(TypedDict):
    """Zero channels that could not be removed, and why."""

    layer: str
    side: str
    count: int
    reason: str


class Removal(TypedDict):
    """What the removal of dead channels took and left."""

    removed: list[Removed]
    stayed: list[Stayed]


class WeightSizes(TypedDict):
    """One weight in each format, by the code of its values."""

    name: str
    shape: list[int]
    nonzeros: int
    dense_bytes: int
    packed_bytes: dict[str, float]
    bound_bytes: dict[str, float]


class TotalSizes(TypedDict):
    """All weights together."""

    bound_bytes: dict[str, float]


class Ledger(TypedDict):
    """The bytes of every weight."""

    tensors: list[WeightSizes]
    total: TotalSizes


class Baseline(TypedDict):
    """A plain ONNX file that the others are measured against."""

    file_bytes: int
    gzip_bytes: int


class Baselines(TypedDict):
    """The dense network, and the masked one before anything was removed."""

    original: Baseline
    masked: Baseline


class FileEntry(TypedDict):
    """One file on the disk."""

    path: str
    file_bytes: int
    sha256: str


class ToleranceEntry(TypedDict):
    """What a format may differ by."""

    relative_error: float | None
    accuracy_drop: float


class ArtifactEntry(TypedDict):
    """One format as it was written."""

    name: str
    format: str
    files: list[FileEntry]
    tolerance: ToleranceEntry
    options: dict[str, Any]


class Export(TypedDict):
    """The files, and what the network costs before and after."""

    cost: Costs
    arena: Arenas
    arena_unknown: str | None
    shrink: Removal
    ledger: Ledger
    baselines: Baselines
    size_breakdowns: dict[str, dict[str, int]]
    artifacts: list[ArtifactEntry]
    inputs: NotRequired[dict[str, list[int]]]


class FailureEntry(TypedDict):
    """Why the answer is no; see ``errors.Failure``."""

    code: str
    file: str
    actual: float | None
    limit: float | None
    unit: str
    message: str


class AgreementEntry(TypedDict):
    """How far a file is from the reference; None where there is no such figure."""

    relative_error: float | None
    same_predictions: float | None
    accuracy: float | None


class MeasurementEntry(TypedDict):
    """One file in one session."""

    file: str
    agreement: AgreementEntry


class CheckEntry(TypedDict):
    """One tolerance that was checked."""

    file: str
    code: str
    ok: bool


class LatencyEntry(TypedDict):
    """The time of one inference."""

    name: str
    median: float
    lower: float
    upper: float
    load: float
    threads: int
    batch: int
    repeats: int
    machine: dict[str, str | int]


class Measured(TypedDict):
    """What was measured in ONNX Runtime."""

    samples: int
    reference_accuracy: float | None
    source: NotRequired[str]
    provisional: NotRequired[bool]
    measurements: list[MeasurementEntry]
    checks: list[CheckEntry]
    latency: NotRequired[list[LatencyEntry]]


class Validate(Measured):
    """The same with the answer."""

    ok: bool
    failures: list[FailureEntry]


class TargetEntry(TypedDict):
    """A board."""

    name: str
    title: str


class MemoryBudget(TypedDict):
    """What there is; None where it is not limited."""

    flash_bytes: int | None
    ram_bytes: int | None
    target: TargetEntry | None


class BudgetEntry(MemoryBudget):
    """What there is, the file that was asked for (None: the smallest that fits), and the accuracy it may lose."""

    file: str | None
    accuracy_drop: float


class SizeEntry(TypedDict):
    """What one file takes."""

    file: str
    flash_bytes: int | None
    ram_bytes: int | None
    arena_bytes: int | None
    unpacked_bytes: int
    ram_unknown: str | None


class Audit(TypedDict):
    """Sizes against a budget."""

    ok: bool
    failures: list[FailureEntry]
    budget: BudgetEntry
    checked: str
    files: list[SizeEntry]
    arena: ArenaEntry | None
    notes: list[str]


class DeviceSizes(TypedDict):
    """What the linked program takes of a target; the command is the compiler with its flags."""

    flash_bytes: int
    ram_bytes: int
    data_bytes: int
    bss_bytes: int
    arena_bytes: int
    input_bytes: int
    output_bytes: int
    stack_bytes: int | None
    stack_doubts: list[str]
    command: str


class DeviceRun(TypedDict):
    """What an emulator counted, and how far the outputs are from the reference's."""

    ok: bool
    target: str
    samples: int
    unit: str
    mean_count: float
    nominal_seconds: float | None
    agreement: AgreementEntry | None


class RunOn(TypedDict):
    """One program on one target."""

    program: str
    format: str
    title: str
    compiler_version: str
    sizes: DeviceSizes
    run: DeviceRun


OUTCOMES: dict[str, Any] = {
    "train": Train,
    "relieve": Relieve,
    "quantise": Quantise,
    "export": Export,
    "validate": Validate,
    "audit": Audit,
    "run-on": RunOn,
}
"""Stage, or run-on, -> the outcome of its record."""
