"""The Python interface: relief and export for any ``nn.Module``, shrink and validation for any ONNX model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relief_export.errors import InputError, MissingExtraError
from relief_export.formats import Manifest, from_proto, read_manifest
from relief_export.formats import read as read_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import onnx
    import onnx_ir as ir
    from torch import Tensor, nn

    from relief_export.calling import Forward, Output
    from relief_export.evaluation import Validation
    from relief_export.graph.cost import Cost
    from relief_export.graph.shrink import ShrinkResult
    from relief_export.progress import Progress
    from relief_export.recipe import TrainConfig
    from relief_export.relief.loop import Relieved
    from relief_export.relief.masks import Masks
    from relief_export.training.data import DataSet

    Array = np.ndarray[Any, Any]
    Pair = tuple[Tensor, Tensor]


def relieve(
    model: nn.Module,
    data: DataSet | Mapping[str, Any] | Iterable[Any],
    *,
    iterations: int = 5,
    train: TrainConfig | Mapping[str, Any] | None = None,
    retrain: Callable[[nn.Module, Masks], None] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    forward: Forward | None = None,
    output: Output | None = None,
    init: Mapping[str, Tensor] | None = None,
    relieve_frozen: bool = False,
    seed: int = 0,
    folder: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **settings: Any,  # noqa: ANN401
) -> Relieved:
    """Find the few connections of a trained network that still solve the task, in place.

    Either ``data`` is ``{"train": (x, y), "validation": (x, y)}`` (and ``"test"``, if wanted), tensors of ready inputs
    and labels, and this package retrains a classifier; or ``retrain`` and ``evaluate`` are given, and ``data``, a list
    of batches, a DataLoader or whatever else can be gone through again and again, measures the activity.

    Args:
        model: A trained network of any architecture; its linear and convolution layers are relieved, and what other
            layers hold, such as recurrent ones or the projections inside an attention, is left as it is and named in
            the result's ``left_whole``. So are frozen layers. Weights that are computed from others (weight norm,
            spectral norm, parametrisations) become plain parameters of the same value.
        data: See above. A batch is a tensor, a tuple of inputs and labels, or a dictionary; see `calling`.
        iterations: How often to prune and retrain.
        train: The retraining; 10 epochs of Adam by default.
        retrain: Trains the network in place; must call ``masks.apply_(model)`` after every optimizer step.
        evaluate: Returns the accuracy on held-out samples, a fraction; any number that ``float`` takes.
        forward: ``forward(model, batch)`` calls the network on a batch of another form.
        output: What of the network's outputs counts: a key, a position, or a function; by default all of them.
        init: Initial weights, for ``rewind=True``.
        relieve_frozen: Relieve layers whose weight needs no gradient too.
        seed: Draws the calibration samples and the retraining.
        folder: Where the iterations are kept; an interrupted call with the same arguments, the trained ``model`` among
            them, goes on from there. A folder that is not of a relief is refused.
        force: Lose the iterations of other settings that the folder holds.
        progress: Called as ``progress(task, done, total, note)``.
        **settings: Other fields of ``recipe.ReliefConfig``: alpha_conv, alpha_fc, samples, tolerance, rewind, skip, ...

    Returns:
        ``.masks``, ``.chosen`` and the ``.history`` of iterations; ``model`` holds the chosen weights.

    Raises:
        InputError: An argument is wrong, the network cannot be captured, or it fails on the data.
    """
    _need_torch("relief_export.relieve")
    from relief_export.capture import check_ready, make_plain
    from relief_export.recipe import ReliefConfig, TrainConfig
    from relief_export.relief.loop import Loop, recipe_loop
    from relief_export.schema import build, convert

    check_ready(model)
    config = build(ReliefConfig, {"iterations": iterations, **settings}, "")
    where = None if folder is None else Path(folder)
    if (retrain is None) != (evaluate is None):
        raise InputError("retrain and evaluate belong together: give both, or neither and data with labels")
    if retrain is None or evaluate is None:
        settled = TrainConfig(epochs=10) if train is None else convert(train, TrainConfig, "train")
        task = _data_set(data, model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise InputError(
                "no parameter of the network needs a gradient, so there is nothing to retrain: unfreeze it with "
                "requires_grad_(True), or give retrain and evaluate"
            )
        loop = recipe_loop(model, task, config, settled, seed=seed, progress=progress, frozen=relieve_frozen)
    else:
        if isinstance(data, Iterator):
            raise InputError("data can be gone through only once: give a list of batches or a DataLoader")

        def run_theirs(network: nn.Module, masks: Masks, *_: object) -> None:
            retrain(network, masks)

        loop = Loop(
            calibration=data,
            retrain=run_theirs,
            evaluate=evaluate,
            key={"seed": seed},
            forward=forward,
            output=output,
            frozen=relieve_frozen,
        )
    make_plain(model)
    return loop.run(model, config, init=init, folder=where, force=force, progress=progress)


def _data_set(data: object, model: nn.Module) -> DataSet:
    """Return the splits of a mapping of pairs of inputs and labels.

    Raises:
        InputError: A split is missing, unknown, or of another form, or its labels are no classes.
    """
    import torch

    from relief_export.schema import did_you_mean
    from relief_export.training.data import DataSet, Split

    if isinstance(data, DataSet):
        return data
    if not isinstance(data, Mapping):
        raise InputError('data must be {"train": (x, y), "validation": (x, y)}, or give retrain and evaluate')
    if unknown := next((name for name in data if name not in _SPLITS), None):
        raise InputError(f"data has no split {unknown!r}{did_you_mean(str(unknown), _SPLITS)}")
    if missing := next((name for name in _SPLITS[:2] if name not in data), None):
        raise InputError(f"data lacks {missing!r}: give {{'train': (x, y), 'validation': (x, y)}}")
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    splits = {}
    for name, pair in data.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputError(f"data[{name!r}] must be a pair (x, y) of inputs and labels, not a {type(pair).__name__}")
        x, y = map(torch.as_tensor, pair)
        if y.ndim != 1 or not len(y) or bool((y != y.long()).any() or (y < 0).any()):
            raise InputError(
                f"the labels of {name!r} must be classes, one whole number from 0 on a sample: "
                "for another task give retrain and evaluate"
            )
        # NumPy's float64 is no other number than the float32 of the network.
        splits[name] = Split.of(x.to(kind) if x.is_floating_point() else x, y)
    x, y = (torch.as_tensor(part) for part in data["train"])
    test = splits.get("test", splits["validation"])
    return DataSet(splits["train"], splits["validation"], test, int(y.max()) + 1, tuple(x.shape[1:]))


_SPLITS = ("train", "validation", "test")


def export(
    model: nn.Module,
    example_input: Tensor,
    folder: str | Path,
    *,
    masks: Mapping[str, Tensor] | None = None,
    original: nn.Module | None = None,
    formats: Sequence[str] = ("dense", "csr"),
    samples: Pair | Tensor | None = None,
    calibration: Tensor | Array | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write a network as a small exact ONNX model and in other formats, with the manifest that `validate` needs.

    Args:
        model: Any network with one input and one output, the batch in front; it is not changed. PyTorch and ONNX
            Runtime round float16 differently: convert such a network with ``float()`` to have it proven.
        example_input: One batch of inputs.
        folder: Where the files go; an existing folder must be one that an export wrote, and is replaced.
        masks: Parameter name -> True where it is kept; without them the zeros in the weights decide.
        original: The network before relief, the baseline of every saving; by default ``model`` itself.
        formats: Any names of ``relief_export.formats.FORMATS``; dense is always written.
        samples: Inputs and labels for the stored reference; by default ``example_input``, without labels.
        calibration: Inputs for int8 and packed-int8; by default those of the reference.
        progress: Called as ``progress(task, done, total, note)``.
    """
    _need_torch("relief_export.export")
    import torch

    from relief_export.capture import capture, plain_copy
    from relief_export.formats import FORMATS, Options
    from relief_export.graph.fold import fold
    from relief_export.stages.shipping import MANIFEST, Samples, ship
    from relief_export.state import apply_masks

    if unknown := sorted(set(formats) - set(FORMATS)):
        raise InputError(f"there is no format {unknown[0]!r}: choose from {', '.join(FORMATS)}")
    if calibration is not None and not any(FORMATS[name].calibrated for name in formats):
        raise InputError("calibration is for int8 and packed-int8: leave it out, or export one of them")
    if not isinstance(example_input, torch.Tensor):
        raise InputError(f"example_input is one batch, a tensor, not a {type(example_input).__name__}")
    target = Path(folder)
    if target.exists() and not (target / MANIFEST).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is no folder that an export wrote: name another one")
    graphs = {
        "original": fold(capture(model if original is None else original, example_input)),
        "masked": fold(capture(model, example_input, masks=masks)),
    }
    x, y = _samples(samples, example_input)
    masked = plain_copy(model).cpu().float()
    apply_masks(masked, masks or {})
    logits = _run_in_batches(masked, x)
    inputs = x.cpu().numpy()
    given = inputs if calibration is None else np.asarray(calibration)
    reference = Samples(inputs, None if y is None else y.cpu().numpy(), logits.numpy(), "reference")
    ship(graphs, reference, target, formats, Options(calibration=given), progress=progress)
    return read_manifest(target)


_BATCH = 256
"""Samples of one forward pass over the reference: all of them at once may need more memory than there is."""


def _samples(samples: Pair | Tensor | None, example: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the reference's inputs and, where there are some, labels."""
    import torch

    if samples is None:
        return example, None
    if isinstance(samples, (tuple, list)) and len(samples) == 2:
        x, y = samples
        return torch.as_tensor(x), None if y is None else torch.as_tensor(y)
    if isinstance(samples, (torch.Tensor, np.ndarray)):
        return torch.as_tensor(samples), None
    raise InputError(f"samples is a pair (x, y) of inputs and labels, or inputs alone, not a {type(samples).__name__}")


def _run_in_batches(network: nn.Module, x: Tensor) -> Tensor:
    import torch

    from relief_export.calling import run_batch

    with torch.no_grad():
        parts = [run_batch(network, part) for part in x.split(_BATCH)]
    if not all(isinstance(part, torch.Tensor) for part in parts):
        raise InputError(f"{type(network).__name__} gives a {type(parts[0]).__name__}: wrap it to give the one to ship")
    return torch.cat(parts)


def validate(
    folder: str | Path,
    x: Array | Tensor | None = None,
    y: Array | Tensor | None = None,
    logits: Array | Tensor | None = None,
) -> Validation:
    """Hold every artifact of an exported folder against the masked network in ONNX Runtime; ``.ok`` is the answer.

    Args:
        folder: What `export` wrote, or a build folder.
        x: Samples; by default the stored reference.
        y: Labels, for accuracies.
        logits: The network's own outputs for ``x``; by default the masked network in ONNX Runtime gives them.
    """
    from relief_export import evaluation

    folder = Path(folder)
    folder = folder / "artifacts" if (folder / "artifacts").is_dir() else folder
    if x is None:
        stored = evaluation.load_arrays(folder / "reference.npz")
        x, y, logits = stored.x, stored.y, stored.logits
    given = _array(x)
    assert given is not None  # noqa: S101  loaded where it was not given
    return evaluation.validate(folder, given, _array(y), _array(logits))


def _array(values: Array | Tensor | None) -> Array | None:
    """Return an array of what may be a tensor, on any device, a list or an array."""
    return None if values is None else np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def shrink(model: str | Path | ir.Model | onnx.ModelProto, *, strict: bool = False) -> ShrinkResult:
    """Remove every disconnected neuron from an ONNX model, exactly, into a new one: the result's ``.model``."""
    from relief_export.graph.fold import fold
    from relief_export.graph.shrink import shrink as run

    return run(fold(_graph(model)), strict=strict)


def cost(model: str | Path | ir.Model | onnx.ModelProto) -> Cost:
    """Count parameters, MACs and FLOPs of an ONNX model, zeros included and skipped."""
    from relief_export.graph.cost import cost as run

    return run(_graph(model))


def _graph(model: str | Path | ir.Model | onnx.ModelProto) -> ir.Model:
    import onnx
    import onnx_ir as ir

    if isinstance(model, onnx.ModelProto):
        return from_proto(model)
    return model if isinstance(model, ir.Model) else read_model(Path(model))


def _need_torch(what: str) -> None:
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError(what, "torch")
