"""From a pruned PyTorch network to an exact, small ONNX artifact, proven in ONNX Runtime.

The public names are loaded when they are first used, so that importing the package imports neither torch nor
onnxruntime.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from relief_export.version import VERSION as __version__  # noqa: N811 - the name every package gives it

if TYPE_CHECKING:
    from relief_export.api import (
        audit,
        compare,
        convert,
        cost,
        export,
        prune,
        quantise,
        relieve,
        shrink,
        validate,
    )
    from relief_export.errors import ReliefError
    from relief_export.formats import Tolerance
    from relief_export.recipe import TrainConfig
    from relief_export.relief.masks import Masks, read_masks

__all__ = [
    "Masks",
    "ReliefError",
    "Tolerance",
    "TrainConfig",
    "__version__",
    "audit",
    "compare",
    "convert",
    "cost",
    "export",
    "prune",
    "quantise",
    "read_masks",
    "relieve",
    "shrink",
    "validate",
]

_HOMES = {
    "audit": "api",
    "compare": "api",
    "convert": "api",
    "cost": "api",
    "export": "api",
    "prune": "api",
    "quantise": "api",
    "relieve": "api",
    "shrink": "api",
    "validate": "api",
    "Masks": "relief.masks",
    "ReliefError": "errors",
    "Tolerance": "formats",
    "read_masks": "relief.masks",
    "TrainConfig": "recipe",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
