"""The one place that opens ONNX Runtime sessions: on the CPU, silent, deterministic, errors in one sentence."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from relief_export.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

_UNKNOWN_OPERATOR = re.compile(
    r"(\w\S*?)(?:\(-?\d+\))? is not a registered function/op|find an implementation for (\S+)"
)


def load(
    source: Path | bytes,
    *,
    name: str,
    optimised: bool = True,
    threads: int = 0,
    fault: type[InputError] = UnsupportedModelError,
    save: Path | None = None,
    without: Collection[str] = (),
    settings: dict[str, str] | None = None,
) -> ort.InferenceSession:
    """Load a model into ONNX Runtime.

    Args:
        source: An ``.onnx`` or ``.ort`` file, or the bytes of one.
        name: What messages call it.
        optimised: All graph optimisations, or none.
        threads: Intra-op threads; 0 leaves the choice to ONNX Runtime.
        fault: What is raised where the runtime refuses the file for another reason than an operator that it lacks.
        save: Where the runtime leaves the model as it optimised it.
        without: Optimisers to leave out.
        settings: Session configuration entries.

    Raises:
        UnsupportedModelError: The model has an operator that the runtime does not know.
        InputError: The runtime refuses it; of the class ``fault``.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = (
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL if optimised else ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    )
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.use_deterministic_compute = True
    options.log_severity_level = 4
    own = {
        # Threads that wait by spinning take the cores from whatever else runs, and then from each other.
        "session.intra_op.allow_spinning": "0",
        # The int8 kernels for x86 processors without VNNI add pairs of products in 16 bits, which overflows for large
        # weights beside each other: outputs of a pruned LeNet-5 moved by more than their own size. With this they take
        # other kernels there, whose sums are those of every other processor; elsewhere it changes nothing.
        "session.x64quantprecision": "1",
    }
    for key, value in {**own, **(settings or {})}.items():
        options.add_session_config_entry(key, value)
    if save is not None:
        options.optimized_model_filepath = str(save)
    model = source if isinstance(source, bytes) else str(source)
    try:
        return ort.InferenceSession(
            model, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(without)
        )
    except Exception as error:  # noqa: BLE001 - the runtime's exceptions share no other base
        unknown = _UNKNOWN_OPERATOR.search(str(error))
        if unknown or isinstance(error, runtime.NotImplemented):
            operator = next(filter(None, unknown.groups()), "") if unknown else reason(error)
            raise UnsupportedModelError(
                f"{name} has operator {operator}, which this ONNX Runtime does not know"
            ) from None
        raise fault(f"ONNX Runtime cannot load {name} ({reason(error)}): write it again") from None


def reason(error: Exception) -> str:
    """Return what the runtime says, without its codes and source paths, in one line."""
    text = str(error).split("Status Message:")[-1].split(" : ")[-1]
    return " ".join(re.sub(r"/\S+", "", text).split())[:200].rstrip(". ")
