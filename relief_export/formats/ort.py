"""ONNX Runtime's own format for mobile and reduced builds, with the list of operators that such a build needs.

It is written from the sparse form, whose indices the format keeps compactly. Optimisations that depend on the writing
machine's processor are left out.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import onnxruntime
from onnxruntime.tools.ort_format_model import create_config_from_models

from relief_export.errors import UnsupportedModelError
from relief_export.formats import sparse
from relief_export.formats.artifact import EXACT, Artifact, File, Options
from relief_export.formats.container import open_session
from relief_export.records import atomic_path

if TYPE_CHECKING:
    import onnx_ir as ir

logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)  # it announces each file it writes
_PROCESSOR_SPECIFIC = ["NchwcTransformer"]


def operators_path(path: Path) -> Path:
    """Return where the required-operators list of the model at ``path`` is kept."""
    return path.with_suffix(".required_operators.config")


def write(model: ir.Model, path: Path, options: Options) -> Artifact:
    """Write ``model`` in the runtime's own format, and beside it the operators it needs.

    Raises:
        UnsupportedModelError: ONNX Runtime refuses the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        sparse.write(model, source, Options(verify=False))
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4
        settings.add_session_config_entry("session.save_model_format", "ORT")
        with atomic_path(path) as temporary:
            settings.optimized_model_filepath = str(temporary)
            try:
                onnxruntime.InferenceSession(
                    str(source), settings, providers=["CPUExecutionProvider"], disabled_optimizers=_PROCESSOR_SPECIFIC
                )
            except Exception as error:  # noqa: BLE001 - the runtime's exceptions share no other base
                reason = " ".join(str(error).split())[:300]
                raise UnsupportedModelError(f"ONNX Runtime cannot convert this model ({reason})") from None
    with atomic_path(operators_path(path)) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the tool leaves its open file to the garbage collector
        create_config_from_models([path.resolve()], temporary.resolve(), enable_type_reduction=False)
    if options.verify:
        open_session(path)
    files = tuple(File.of(path.parent, file) for file in (path, operators_path(path)))
    return Artifact(path.name, "ort", files, EXACT, options.to_dict())


def read(path: Path) -> NoReturn:
    """Refuse: the format is the runtime's own and goes one way.

    Raises:
        UnsupportedModelError: Always.
    """
    raise UnsupportedModelError(
        f"{path} is in ONNX Runtime's own format, which goes one way: use the .onnx it came from"
    )
