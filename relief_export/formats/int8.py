"""Static int8 quantisation (QDQ) by ONNX Runtime: symmetric weights, a scale an output channel, calibrated activations.

Symmetric, because any other zero point turns exact zeros into something else. A kept weight too small for its channel's
scale becomes ±1 step instead of 0, so the quantised network has exactly the connections of the original.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnxruntime import quantization

from relief_export.errors import InputError, UnsupportedModelError
from relief_export.formats import packed
from relief_export.formats.artifact import Artifact, File, Options, Tolerance
from relief_export.formats.onnx_file import canonical, load_proto, save_model, to_ir
from relief_export.formats.runtime import reason
from relief_export.npz import of_inputs, read_npz

if TYPE_CHECKING:
    from collections.abc import Iterator

Array: TypeAlias = np.ndarray[Any, Any]

# Rounding to eight bits leaves no useful bound on a single output.
TOLERANCE = Tolerance(relative_error=None, accuracy_drop=0.01)
_BATCH = 32


class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Feeds the calibration samples to the quantiser."""

    def __init__(self, batches: list[dict[str, Array]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._batches, None)


def write(model: ir.Model, path: Path, options: Options) -> Artifact:
    """Write ``model`` quantised to int8, calibrated on ``options.calibration``.

    Raises:
        InputError: There are no calibration samples, or they do not fit the model's inputs.
        UnsupportedModelError: The opset is below 13 or ONNX Runtime cannot quantise or load the model.
    """
    quantised, notes = quantise(model, options)
    saved = save_model(quantised, path, verify=options.verify, external_bytes=options.external_bytes)
    files = tuple(File.of(path.parent, file) for file in saved)
    return Artifact(path.name, "int8", files, TOLERANCE, options.to_dict(), notes)


def write_packed(model: ir.Model, path: Path, options: Options) -> Artifact:
    """Write ``model`` quantised to int8 and then packed: the runtime unpacks int8 weights and runs integer kernels.

    Raises:
        InputError: There are no calibration samples, or they do not fit the model's inputs.
        UnsupportedModelError: The opset is below 13 or ONNX Runtime cannot quantise or load the model.
    """
    quantised, notes = quantise(model, options)
    written = packed.write(quantised, path, options)
    return Artifact(path.name, "packed-int8", written.files, TOLERANCE, options.to_dict(), notes)


def quantise(model: ir.Model, options: Options) -> tuple[ir.Model, tuple[str, ...]]:
    """Return the QDQ model and notes on it; every weight has the same zeros before and after.

    Raises:
        InputError: There are no calibration samples, or they do not fit the model's inputs.
        UnsupportedModelError: The opset is below 13 or ONNX Runtime cannot quantise the model.
    """
    prepared = canonical(model)
    if prepared.opset_imports.get("", 13) < 13:
        raise UnsupportedModelError("int8 needs opset 13 for a scale a channel: convert it with onnx.version_converter")
    batches = _batches(prepared, options.calibration)
    originals = {
        v.name: v.const_value.numpy() for v in prepared.graph.initializers.values() if v.const_value is not None
    }
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        prepared.metadata_props["onnx.quant.pre_process"] = "onnxruntime.quant"  # it warns about models without this
        ir.save(prepared, before)
        try:
            with _silent():
                quantization.quantize_static(
                    before,
                    after,
                    _Reader(batches),
                    per_channel=True,
                    extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
                )
        except Exception as error:  # noqa: BLE001 - the quantiser's exceptions share no other base
            raise UnsupportedModelError(f"ONNX Runtime cannot quantise this model ({reason(error)})") from None
        proto = load_proto(after)
        _keep_scales_at_masks(proto)
        share = _keep_support(proto, originals)
        if share is None:
            return to_ir(proto, after), ("no weight was quantised: no operator that ONNX Runtime quantises has one",)
        return to_ir(proto, after), (f"share of zeros in quantised weights: {share:.6f} before and after",)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep what the quantiser logs and warns of off stderr, where an error is one sentence."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    # The runtime logs from C++, where Python's logging has no say.
    ort.set_default_logger_severity(4)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ort.set_default_logger_severity(2)  # its own default; there is no way to ask
        logging.disable(level)


def _batches(model: ir.Model, source: Array | Mapping[str, Array] | Path | None) -> list[dict[str, Array]]:
    """Cut the samples into what the model takes at a time: its fixed first axis, or a batch.

    An input that is a single number gets the same one each time, or one after the other from a vector of them.

    Raises:
        InputError: There are no calibration samples, or too few for an input.
    """
    inputs = {str(v.name): v for v in model.graph.inputs if v.name not in model.graph.initializers}
    arrays = _samples(list(inputs), source)
    fixed: dict[str, int] = {}
    """Samples that an input takes at a time, where that is not free."""
    for name, value in inputs.items():
        array, rank = arrays[name], None if value.shape is None else value.shape.rank()
        # Samples are often stored in another precision than the model takes, and the runtime converts nothing.
        if array.dtype.kind == "f" and value.dtype is not None and value.dtype.is_floating_point():
            arrays[name] = array.astype(value.dtype.numpy(), copy=False)
        if not array.ndim and rank != 0:
            raise InputError(f"calibration samples of input {name!r} are a single number: give samples along an axis")
        first = 1 if rank == 0 else value.shape[0] if value.shape is not None else None
        if array.ndim and isinstance(first, int):
            fixed[name] = first
            if len(array) < first:
                raise InputError(f"input {name!r} takes {first} calibration samples at a time, there are {len(array)}")
    most = min((len(array) for array in arrays.values() if array.ndim), default=1)
    steps = min((len(arrays[name]) // size for name, size in fixed.items()), default=-(-most // _BATCH))
    # No batch may be empty.
    steps = min(steps, most)
    parts = {name: _cut(array, steps, fixed.get(name), inputs[name].shape) for name, array in arrays.items()}
    return [{name: part[step] for name, part in parts.items()} for step in range(steps)]


def _cut(array: Array, steps: int, size: int | None, shape: ir.Shape | None) -> list[Array]:
    if not array.ndim:
        return [array] * steps
    if shape is not None and shape.rank() == 0:
        return [np.asarray(number) for number in array[:steps]]
    # All inputs are cut into the same number of batches, so that their samples stay together.
    return np.array_split(array if size is None else array[: steps * size], steps)


def _samples(names: list[str], source: Array | Mapping[str, Array] | Path | None) -> dict[str, Array]:
    """Return the calibration samples of each input.

    Raises:
        InputError: There are none, none of an input, or such that are not finite.
        IntegrityError: The file is damaged.
    """
    if source is None:
        raise InputError("int8 needs calibration samples: give an .npz file with an array x of the model's inputs")
    if isinstance(source, np.ndarray):
        arrays = {"x": source}
    elif isinstance(source, Mapping):
        arrays = dict(source)
    else:
        arrays = read_npz(source)
    # One array for one input needs no name.
    only = dict(zip(names, arrays.values(), strict=True)) if len(names) == len(arrays) == 1 else {}
    arrays = of_inputs(arrays, names) or only
    empty = [name for name in names if name in arrays and not arrays[name].size]
    if empty:
        raise InputError(f"calibration samples of input {empty[0]!r} are none: save some")
    missing = [name for name in names if name not in arrays]
    if missing or not names:
        raise InputError(
            f"calibration samples lack an array for input {missing}: name the arrays as the inputs, or one x"
        )
    for name in names:
        if arrays[name].dtype.kind == "f" and not np.isfinite(arrays[name]).all():
            raise InputError(f"calibration samples of input {name!r} hold NaN or infinity: give finite numbers")
    return {name: arrays[name] for name in names}


def _keep_scales_at_masks(proto: onnx.ModelProto) -> None:
    """Give what a factor of zeros and ones makes of an activation the activation's own scale.

    Every integer is then kept as it is or becomes the zero point: nothing is rounded a second time.
    """
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    producers = {name: node for node in proto.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    # In the order of the nodes, so that a mask of a mask finds the scale that the first was given.
    for node in proto.graph.node:
        operands = [producers.get(name) for name in node.input] if node.op_type == "Mul" else []
        if any(each is None or each.op_type != "DequantizeLinear" for each in operands) or len(operands) != 2:
            continue
        constant = [each is not None and all(name in tensors for name in each.input) for each in operands]
        if sorted(constant) != [False, True]:
            continue
        mask, activation = operands[constant.index(True)], operands[constant.index(False)]
        assert mask is not None and activation is not None  # noqa: S101, PT018  # none is missing, see above
        q, scale, zero = (onnx.numpy_helper.to_array(tensors[name]) for name in mask.input)
        if scale.size != 1 or not np.isin(np.float32((q.astype(np.int64) - zero) * scale).round(6), (0, 1)).all():
            continue
        following = readers.get(node.output[0], [])
        if [each.op_type for each in following] != ["QuantizeLinear"]:
            continue
        for each in (*following, *readers.get(following[0].output[0], [])):
            each.input[1:] = activation.input[1:]


def _keep_support(proto: onnx.ModelProto, originals: dict[str | None, Array]) -> float | None:
    """Move kept weights that were rounded to zero to ±1 step; return the share of zeros, None without a weight.

    Raises:
        UnsupportedModelError: A zero did not stay zero.
    """
    zeros = total = 0
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for tensor in proto.graph.initializer:
        weight = originals.get(tensor.name.removesuffix("_quantized"))
        # ONNX Runtime's quantiser stores a weight under its name with this ending; biases are int32.
        if weight is None or not tensor.name.endswith("_quantized") or tensor.data_type != onnx.TensorProto.INT8:
            continue
        quantised = onnx.numpy_helper.to_array(tensor)
        zero = onnx.numpy_helper.to_array(tensors[tensor.name.removesuffix("quantized") + "zero_point"])
        # A factor that is no weight may have a zero point, and its zeros are there.
        if (quantised[weight == 0] != (zero if zero.ndim == 0 else 0)).any():
            raise UnsupportedModelError(f"quantisation turned zeros of {tensor.name!r} into values")
        if zero.any():  # no weight but a factor, such as the mask of a join: quantised as activations are
            continue
        lost = (quantised == 0) & (weight != 0)
        fixed = np.where(lost, np.sign(weight), quantised).astype(np.int8)
        tensor.CopyFrom(onnx.numpy_helper.from_array(fixed, tensor.name))
        zeros += int((fixed == 0).sum())
        total += fixed.size
    return zeros / total if total else None
