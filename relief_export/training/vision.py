"""The one module that imports torchvision.

Only its models and datasets are used here, and they are plain Python. But ``import torchvision`` registers fake kernels
for its compiled operators, which fails with "operator torchvision::nms does not exist" where that library cannot load
(a CPU build of torch beside a torchvision that was compiled for CUDA). There the missing schemas are declared, and the
import is made again; a matching pair imports at the first attempt.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch

from relief_export.errors import MissingExtraError

if TYPE_CHECKING:
    from types import ModuleType

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# A library's definitions live as long as the object does.
_DECLARED: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Import torchvision, declaring the operators that its import needs when, and only when, they are absent.

    Raises:
        MissingExtraError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError:
        raise MissingExtraError("this data set or model", "torchvision") from None
    except RuntimeError as error:
        if "operator torchvision::" not in str(error) or not declare_missing():
            raise
    return importlib.import_module("torchvision")


def declare_missing() -> tuple[str, ...]:
    """Declare the schemas that are absent and return their names."""
    missing = tuple(name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name))
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in missing:
            library.define(_SCHEMAS[name])  # type: ignore[no-untyped-call]
        _DECLARED.append(library)
    return missing
