"""Static int8 quantisation (QDQ) by ONNX Runtime: symmetric weights, a scale an output channel, calibrated activations.

Symmetric, because any other zero point turns exact zeros into something else. A kept weight too small for its channel's
scale becomes ±1 step instead of 0, so the quantised network has exactly the connections of the original.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from onnxruntime import quantization

from relief_export.errors import InputError, IntegrityError, UnsupportedModelError
from relief_export.formats import packed
from relief_export.formats.artifact import Artifact, File, Options, Tolerance
from relief_export.formats.container import canonical, load_proto, save_model, to_ir

if TYPE_CHECKING:
    from collections.abc import Iterator

Array: TypeAlias = np.ndarray[Any, Any]

TOLERANCE = Tolerance(relative_error=None, accuracy_drop=0.01)
_BATCH = 32


class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Feeds the calibration samples in batches."""

    def __init__(self, feeds: dict[str, Array], batch: int) -> None:
        count = len(next(iter(feeds.values())))
        self._batches: Iterator[dict[str, Array]] = (
            {name: array[start : start + batch] for name, array in feeds.items()} for start in range(0, count, batch)
        )

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
    plain = Options(values="f32", external_bytes=options.external_bytes, verify=options.verify)
    written = packed.write(quantised, path, plain)
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
    feeds = _feeds(prepared, options.calibration)
    batch = prepared.graph.inputs[0].shape
    size = batch[0] if batch is not None and isinstance(batch[0], int) else _BATCH
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
                    _Reader(feeds, size),
                    per_channel=True,
                    extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
                )
        except Exception as error:  # noqa: BLE001 - the quantiser's exceptions share no other base
            reason = " ".join(str(error).split())[:300]
            raise UnsupportedModelError(f"ONNX Runtime cannot quantise this model ({reason})") from None
        proto = load_proto(after)
        share = _keep_support(proto, originals)
        return to_ir(proto, after), (f"share of zeros in quantised weights: {share:.6f} before and after",)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep what the quantiser logs and warns of off stderr, where an error is one sentence."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _feeds(model: ir.Model, source: Array | Path | None) -> dict[str, Array]:
    names = [value.name for value in model.graph.inputs if value.name and value.name not in model.graph.initializers]
    if source is None:
        raise InputError("int8 needs calibration samples: give an .npz file with an array x of the model's inputs")
    if isinstance(source, np.ndarray):
        arrays = {"x": source}
    else:
        try:
            with np.load(source, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except FileNotFoundError:
            raise InputError(f"{source} does not exist: give an .npz file with calibration samples") from None
        except Exception as error:  # noqa: BLE001 - what damaged archives and headers raise shares no other base
            raise IntegrityError(
                f"{source} is not an .npz file of arrays ({' '.join(str(error).split())[:120]})"
            ) from None
    if len(names) == 1 and names[0] not in arrays:
        only = arrays.get("x", next(iter(arrays.values())) if len(arrays) == 1 else None)
        arrays = {names[0]: only} if only is not None else {}
    if not names or any(name not in arrays or not np.shape(arrays[name])[:1] > (0,) for name in names):
        raise InputError(
            f"calibration samples lack an array for input {names}: name the arrays as the inputs, or one x"
        )
    for name in names:
        if np.asarray(arrays[name]).dtype.kind == "f" and not np.isfinite(arrays[name]).all():
            raise InputError(f"calibration samples of input {name!r} hold NaN or infinity: give finite numbers")
    return {name: arrays[name] for name in names}


def _keep_support(proto: onnx.ModelProto, originals: dict[str | None, Array]) -> float:
    """Move kept weights that were rounded to zero to ±1 step; return the share of zeros, equal before and after.

    Raises:
        UnsupportedModelError: A zero did not stay zero.
    """
    zeros = total = 0
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for tensor in proto.graph.initializer:
        weight = originals.get(tensor.name.removesuffix("_quantized"))
        if weight is None or not tensor.name.endswith("_quantized") or tensor.data_type != onnx.TensorProto.INT8:
            continue
        quantised = onnx.numpy_helper.to_array(tensor)
        zero = onnx.numpy_helper.to_array(tensors[tensor.name.removesuffix("quantized") + "zero_point"])
        if (quantised[weight == 0] != (zero if zero.ndim == 0 else 0)).any():
            raise UnsupportedModelError(f"quantisation turned zeros of {tensor.name!r} into values")
        if zero.any():  # no weight but a factor, such as the mask of a join: quantised as activations are
            continue
        lost = (quantised == 0) & (weight != 0)
        fixed = np.where(lost, np.sign(weight), quantised).astype(np.int8)
        tensor.CopyFrom(onnx.numpy_helper.from_array(fixed, tensor.name))
        zeros += int((fixed == 0).sum())
        total += fixed.size
    return zeros / max(total, 1)
