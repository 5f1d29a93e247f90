"""The one place that opens ONNX Runtime sessions: on the CPU, silent, deterministic, errors in one sentence.

But for ``relief_export/runtime.py``, whose session belongs to the caller, with the caller's options.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from relief_export.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

_UNKNOWN_OPERATOR = re.compile(
    r"(\w\S*?)(?:\(-?\d+\))? is not a registered function/op|find an implementation for (\S+)"
)

_VERSION = tuple(map(int, ort.__version__.split(".")[:2]))
_LOOKS_FOR_PERM = (1, 31)
"""The first version that does not end the process where `_fatal_transpose` finds something."""


def load(
    source: Path | bytes,
    *,
    name: str,
    optimised: bool = True,
    threads: int = 0,
    fault: type[InputError] = UnsupportedModelError,
    save: Path | None = None,
    without: Collection[str] = (),
    settings: Mapping[str, str] | None = None,
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
        InputError: The runtime refuses it, or would end the process; of the class ``fault``.
    """
    # Nothing catches an abort, so such a model is not given to the runtime at all.
    if optimised and _VERSION < _LOOKS_FOR_PERM and (fatal := _fatal_transpose(source)):
        raise fault(
            f"{name}: ONNX Runtime {ort.__version__} ends the process on Transpose {fatal!r}, which states no perm "
            "behind a DequantizeLinear by channel: write it again with relief-export convert, which states it, or "
            f"install onnxruntime {'.'.join(map(str, _LOOKS_FOR_PERM))}"
        )
    options = _options(optimised=optimised, threads=threads, settings=settings or {})
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


def _options(*, optimised: bool, threads: int, settings: Mapping[str, str]) -> ort.SessionOptions:
    """Return what every session here has alike: the same outputs in every run, whatever else the machine does."""
    options = ort.SessionOptions()
    options.graph_optimization_level = (
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL if optimised else ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    )
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.use_deterministic_compute = True
    # Only what ends a run: whatever it refuses is raised too, and becomes a sentence of ours.
    options.log_severity_level = 4
    own = {
        # Threads that wait by spinning take the cores from whatever else runs, and then from each other.
        "session.intra_op.allow_spinning": "0",
        # The int8 kernels for x86 processors without VNNI add pairs of products in 16 bits, which overflows for large
        # weights beside each other: outputs of a pruned LeNet-5 moved by more than their own size. With this they take
        # other kernels there, whose sums are those of every other processor; elsewhere it changes nothing.
        "session.x64quantprecision": "1",
    }
    for key, value in {**own, **settings}.items():
        options.add_session_config_entry(key, value)
    return options


def _fatal_transpose(source: Path | bytes) -> str:
    """Return the output of a Transpose that ONNX Runtime before 1.31 cannot load when it optimises, or nothing.

    It moves a DequantizeLinear by channel behind the Transpose and reads ``perm``, which may be absent, unchecked.
    """
    try:
        # What is no protobuf, such as an .ort file, was optimised when it was written.
        proto = onnx.load_model_from_string(source) if isinstance(source, bytes) else _parsed(source)
    except (DecodeError, OSError):
        return ""
    pending = [proto.graph]
    while pending:
        graph = pending.pop()
        sizes = {tensor.name: tensor.dims for tensor in graph.initializer}
        constants = (node for node in graph.node if node.op_type == "Constant")
        sizes |= {node.output[0]: a.t.dims for node in constants for a in node.attribute if a.name == "value"}
        # A scale of which nothing is known may be one by channel.
        by_channel = {
            node.output[0]
            for node in graph.node
            if node.op_type == "DequantizeLinear" and list(sizes.get(node.input[1], [2])) not in ([], [1])
        }
        for node in graph.node:
            if node.op_type == "Transpose" and node.input[0] in by_channel and not node.attribute:
                return str(node.output[0])
            pending += [inner for a in node.attribute for inner in (a.g, *a.graphs) if inner.node]
    return ""


def _parsed(path: Path) -> onnx.ModelProto:
    return onnx.ModelProto() if path.suffix == ".ort" else onnx.load(path, load_external_data=False)


def reason(error: Exception) -> str:
    """Return what the runtime says, without its codes and source paths, in one line."""
    text = str(error).split("Status Message:")[-1].split(" : ")[-1]
    return " ".join(re.sub(r"/\S+", "", text).split())[:200].rstrip(". ")
