"""What each command's ``result`` holds with --json; docs/reference/json.md is made from this, and a test checks both.

Sizes are bytes and end in ``_bytes``, times are seconds, accuracies and shares fractions of 1.
"""

from typing import Any, Literal, NotRequired, TypedDict

from relief_export import outcomes
from relief_export.device.measure import MeasuredSizes
from relief_export.device.verdicts import DeviceRun
from relief_export.evaluation.budget import FileSize, Growth
from relief_export.evaluation.compare import Agreement, Check
from relief_export.formats import Tolerance
from relief_export.graph.cost import Columns, Cost


class Accuracies(TypedDict):
    """Test accuracies of the networks of a run; null where there is no test split."""

    dense: float | None
    pruned: float | None
    quantised: NotRequired[float | None]
    onnx_runtime: float | None


class Density(TypedDict):
    """Weights and biases before pruning and after, and the share that is left."""

    dense: int
    kept: int
    density: float


class RunFile(TypedDict):
    """One file of a run, with the lower of its accuracies with ONNX Runtime's optimisations off and on."""

    file: str
    format: str
    file_bytes: int
    accuracy: float | None
    seconds_per_sample: float | None


class RunAnswer(TypedDict):
    """The closing figures of a run.

    Attributes:
        original_bytes: The dense network as an ONNX file. original_seconds_per_sample: Its time on one core.
        seconds: What each stage took.
    """

    name: str
    accuracy: Accuracies
    weights: Density
    parameters: Columns
    macs: Columns
    original_bytes: int
    original_seconds_per_sample: float | None
    files: list[RunFile]
    seconds: dict[str, float]
    report: str
    model: str


class _Stage(TypedDict):
    stage: str
    skipped: bool
    seconds: float


class TrainAnswer(_Stage):
    """The dense network was trained, or was there (``skipped``)."""

    outcome: outcomes.Train


class RelieveAnswer(_Stage):
    """The network was pruned."""

    outcome: outcomes.Relieve


class QuantiseAnswer(_Stage):
    """The pruned network was rounded to few values."""

    outcome: outcomes.Quantise


class ExportAnswer(_Stage):
    """The files were written."""

    outcome: outcomes.Export


class ValidateAnswer(_Stage):
    """The files were checked."""

    outcome: outcomes.Measured


class ReportAnswer(TypedDict):
    """Where the page and its twin were written."""

    html: str
    markdown: str


class RecipeEntry(TypedDict):
    """One recipe."""

    name: str
    variants: list[str]
    description: str
    reproduces: str


class RecipesAnswer(TypedDict):
    """The recipes that can be run by name."""

    recipes: list[RecipeEntry]


class CostPair(TypedDict):
    """The cost of a model before and after."""

    before: Cost
    after: Cost


class BytesPair(TypedDict):
    """The size of a file before and after."""

    before: int
    after: int


class Removal(TypedDict):
    """What was removed, what stayed and why, and operators by outcome with their number."""

    modified: bool
    removed: list[outcomes.Removed]
    stayed: list[outcomes.Stayed]
    unknown: dict[str, int]
    opaque: dict[str, int]


class ShrinkAnswer(TypedDict):
    """What a shrink did."""

    shrink: Removal
    cost: CostPair
    file_bytes: BytesPair
    notes: list[str]


class WrittenFile(TypedDict):
    """One file that was written."""

    path: str
    file_bytes: int
    sha256: str


class ConvertAnswer(TypedDict):
    """What a conversion wrote."""

    file: str
    file_bytes: int
    format: str
    tolerance: Tolerance
    files: list[WrittenFile]
    notes: list[str]


class CompareAnswer(TypedDict):
    """How far the second model is from the first; ``outputs`` by the names of the first model's outputs."""

    first: str
    second: str
    samples: int
    tolerance: Tolerance
    outputs: dict[str, Agreement]
    checks: list[Check]


class CostAnswer(TypedDict):
    """The cost of a model; without an arena ``arena_unknown`` says why."""

    file: str
    cost: Cost
    arena: outcomes.ArenaEntry | None
    arena_unknown: str | None


class AuditAnswer(TypedDict):
    """What every file takes; ``checked`` is the one that the budget is about, ``verdict`` the answer in words."""

    subject: str
    budget: outcomes.BudgetEntry
    checked: str
    verdict: str
    files: list[FileSize]
    weights_gzip_bytes: int
    weights_bound_bytes: int
    arena: outcomes.ArenaEntry | None
    growth: Growth | None
    notes: list[str]


class MeasureAnswer(TypedDict):
    """What C programs take; ``measured`` by the names of their folders."""

    budget: outcomes.MemoryBudget
    measured: dict[str, MeasuredSizes]


class MaskedTensor(TypedDict):
    """One tensor; ``not_zero`` counts masked entries of the file's weights that are not zero."""

    tensor: str
    shape: list[int]
    entries: int
    kept: int
    not_zero: int


class MasksAnswer(TypedDict):
    """The masks in a file of the form ``form``; ``kept`` of all ``entries`` are kept."""

    file: str
    form: str
    entries: int
    kept: int
    tensors: list[MaskedTensor]


class OperatorEntry(TypedDict):
    """One operator, and how many nodes of the model have it (0 where no model was given)."""

    operator: str
    outcome: Literal["rule", "opaque", "unknown"]
    handled: str
    nodes: int


class OpsAnswer(TypedDict):
    """The operators."""

    operators: list[OperatorEntry]


ANSWERS: dict[str, Any] = {
    "run": RunAnswer,
    "train": TrainAnswer,
    "relieve, prune": RelieveAnswer,
    "quantise": QuantiseAnswer,
    "export": ExportAnswer,
    "validate": ValidateAnswer,
    "report": ReportAnswer,
    "recipes": RecipesAnswer,
    "shrink": ShrinkAnswer,
    "convert": ConvertAnswer,
    "compare": CompareAnswer,
    "cost": CostAnswer,
    "audit": AuditAnswer,
    "audit --measure": MeasureAnswer,
    "ops": OpsAnswer,
    "masks": MasksAnswer,
    "run-on": DeviceRun,
}
"""Command, or commands, -> what ``result`` is."""
