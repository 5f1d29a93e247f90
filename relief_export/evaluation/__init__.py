"""ONNX Runtime as the judge: validation, comparison, latency and the audit. Results have ``to_dict()``; no torch."""

from relief_export.evaluation.budget import Audit, Budget, FileSize, Growth, audit
from relief_export.evaluation.compare import Comparison, compare
from relief_export.evaluation.latency import Latency, measure_latency
from relief_export.evaluation.samples import Arrays, ByName, load_arrays, named, part
from relief_export.evaluation.sessions import Session, open_session
from relief_export.evaluation.validation import Validation, validate
from relief_export.targets import TARGETS, Target

__all__ = [
    "TARGETS",
    "Arrays",
    "Audit",
    "Budget",
    "ByName",
    "Comparison",
    "FileSize",
    "Growth",
    "Latency",
    "Session",
    "Target",
    "Validation",
    "audit",
    "compare",
    "load_arrays",
    "measure_latency",
    "named",
    "open_session",
    "part",
    "validate",
]
