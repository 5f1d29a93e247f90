"""The Python interface: relief and export for any ``nn.Module``, shrink and validation for any ONNX model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from relief_export.errors import InputError, MissingExtraError
from relief_export.formats import Manifest, from_proto, read_manifest
from relief_export.formats import read as read_model
from relief_export.printing import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import onnx
    import onnx_ir as ir
    from torch import Tensor, nn

    from relief_export.calling import Forward, Inputs, Output
    from relief_export.evaluation import Audit, ByName, Comparison, Validation
    from relief_export.formats import Artifact, Tolerance
    from relief_export.graph.cost import Cost
    from relief_export.graph.shrink import ShrinkResult
    from relief_export.progress import Progress
    from relief_export.recipe import TrainConfig
    from relief_export.relief.loop import Loop, Relieved
    from relief_export.relief.masks import Masks
    from relief_export.relief.retraining import Loss, Metric, Task
    from relief_export.training.data import DataSet
    from relief_export.training.rounding import Rounded

    Array = np.ndarray[Any, Any]
    Pair = tuple[Tensor, Tensor]


def relieve(
    model: nn.Module,
    data: DataSet | Mapping[str, Any] | Iterable[Any],
    *,
    rounds: int = 5,
    train: TrainConfig | Mapping[str, Any] | None = None,
    retrain: Callable[[nn.Module, Masks], None] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    task: Task = "classification",
    loss: Loss | None = None,
    metric: Metric | None = None,
    forward: Forward | None = None,
    output: Output | None = None,
    init: Mapping[str, Tensor] | None = None,
    relieve_frozen: bool = False,
    seed: int = 0,
    folder: str | Path | None = None,
    force: bool = False,
    progress: Progress | bool | None = None,
    **settings: Any,  # noqa: ANN401
) -> Relieved:
    """Find the few connections of a trained network that still solve the task, in place.

    Either ``data`` is ``{"train": ..., "validation": ...}`` (and ``"test"``, if wanted), each a pair ``(x, y)`` of
    ready inputs and labels or batches of them, such as a DataLoader, and this package retrains for ``task``; or
    ``retrain`` and ``evaluate`` are given, and ``data``, a list of batches, a DataLoader or whatever else can be gone
    through again and again, measures the activity.

    The network as it was is remembered, and `export` takes it for the original to compare with.

    Args:
        model: A trained network of any architecture; its linear and convolution layers are relieved, and what other
            layers hold, such as recurrent ones or the projections inside an attention, is left as it is and named in
            the result's ``left_whole``. So are frozen layers. Weights that are computed from others (weight norm,
            spectral norm, parametrisations) become plain parameters of the same value.
        data: See above. A batch is a tensor, a tuple of inputs and labels, or a dictionary; see `calling`.
        rounds: How often to prune and retrain.
        train: The retraining; 10 epochs of Adam by default.
        retrain: Trains the network in place; must call ``masks.apply_(model)`` after every optimizer step.
        evaluate: Returns the accuracy on held-out samples, a fraction; any number that ``float`` takes.
        task: What the built-in retraining minimises and measures: classification, regression, multilabel or
            segmentation; see `retraining`.
        loss: ``loss(outputs, labels)`` instead of the task's.
        metric: ``metric(outputs, labels)`` of a batch instead of the task's, at most 1, higher is better.
        forward: ``forward(model, batch)`` calls the network on a batch of another form.
        output: What of the network's outputs counts: a key, a position, or a function; by default all of them.
        init: Initial weights, for ``rewind=True``.
        relieve_frozen: Relieve layers whose weight needs no gradient too.
        seed: Draws the calibration samples and the retraining.
        folder: Where the rounds are kept; an interrupted call with the same arguments, the trained ``model`` among
            them, goes on from there. A folder that is not of a relief is refused.
        force: Lose the rounds of other settings that the folder holds.
        progress: Called as ``progress(task, done, total, note)``; True draws bars.
        **settings: Other fields of ``recipe.ReliefConfig``: alpha_conv, alpha_fc, samples, accuracy_drop, skip, ...

    Returns:
        ``.masks``, ``.chosen`` and the ``.history`` of rounds; ``model`` holds the chosen weights.

    Raises:
        InputError: An argument is wrong, the network cannot be captured, or it fails on the data.
    """
    _need_torch("relief_export.relieve")
    from relief_export.capture import check_ready, make_plain
    from relief_export.recipe import ReliefConfig, TrainConfig
    from relief_export.relief.loop import recipe_loop
    from relief_export.relief.retraining import Retraining, batches_loop
    from relief_export.schema import build, convert, fields_of
    from relief_export.state import bare, digest_of, snapshot, tensors_of

    check_ready(model)
    known, of_training = fields_of(ReliefConfig), fields_of(TrainConfig)
    if misplaced := next((key for key in settings if key not in known and key in of_training), None):
        raise InputError(
            f"{misplaced} is a key of the retraining: give train={{'{misplaced}': {settings[misplaced]!r}}}"
        )
    config = build(ReliefConfig, {"rounds": rounds, **settings}, "")
    where = None if folder is None else Path(folder)
    if (retrain is None) != (evaluate is None):
        raise InputError("retrain and evaluate belong together: give both, or neither and data with labels")
    # Before the loop, because only a plain parameter can be masked.
    make_plain(bare(model))
    # Three ways to be called, which differ in their loop alone: apart, each would hand on all of these arguments.
    with _shown(progress) as told:
        if retrain is None or evaluate is None:
            if not any(parameter.requires_grad for parameter in model.parameters()):
                raise InputError(
                    "no parameter of the network needs a gradient, so there is nothing to retrain: unfreeze it with "
                    "requires_grad_(True), or give retrain and evaluate"
                )
            settled = TrainConfig(epochs=10) if train is None else convert(train, TrainConfig, "train")
            # Whatever is the user's own goes to the plain loop, since that of the recipes knows classifiers alone.
            own = loss is not None or metric is not None or forward is not None or output is not None
            if own or task != "classification" or not _is_pairs(data):
                parts = _batches(data, settled.batch)
                work = Retraining(
                    **parts,
                    config=settled,
                    task=task,
                    loss=loss,
                    metric=metric,
                    forward=forward,
                    output=output,
                    seed=seed,
                )
                loop = batches_loop(work, config, progress=told, frozen=relieve_frozen)
            else:
                splits = _data_set(data, model)
                loop = recipe_loop(model, splits, config, settled, seed=seed, progress=told, frozen=relieve_frozen)
        else:
            loop = _own_loop(data, retrain, evaluate, seed=seed, forward=forward, output=output, frozen=relieve_frozen)
        # A second relief goes on from the first: the original is still the network before both.
        before = _remembered(model) or snapshot(model)
        found = loop.run(model, config, init=init, folder=where, force=force, progress=told)
    # After the loop, when the digest is that of the network as the caller gets it.
    _ORIGINALS[bare(model)] = before, digest_of(tensors_of(model))
    return found


prune = relieve


def quantise(
    model: nn.Module,
    data: DataSet | Mapping[str, Any],
    masks: Mapping[str, Tensor] | None = None,
    *,
    values: int | str = 16,
    epochs: int = 5,
    lr: float = 1e-3,
    train: TrainConfig | Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> Rounded:
    """Round the weights of a classifier to few values, in place, with a training that makes up for it.

    A file in the format packed-codebook16 is then exact to the network, as are int8 files to one of ``values="int8"``
    up to their activations.

    Args:
        model: A trained network, relieved or not; masked entries must be zero.
        data: ``{"train": (x, y), "validation": (x, y)}``: ready inputs and labels.
        masks: Parameter name -> True where it is kept, such as `relieve` returns.
        values: How many different non-zero values each weight may hold at most, or "int8".
        epochs: Of Adam in one cycle; the best by validation is kept.
        lr: The highest learning rate.
        train: What else a training needs, such as the batch.
        seed: Draws the order of the samples.
        progress: Called as ``progress(task, done, total, note)``; True draws bars.

    Raises:
        InputError: An argument is wrong, or a weight has fewer entries than values are asked for.
    """
    _need_torch("relief_export.quantise")
    from relief_export.recipe import QuantiseConfig, TrainConfig
    from relief_export.schema import build, convert
    from relief_export.state import apply_masks, bare, digest_of, tensors_of
    from relief_export.training.rounding import round_weights

    config = build(QuantiseConfig, {"values": values, "epochs": epochs, "lr": lr}, "")
    settled = TrainConfig(epochs=epochs) if train is None else convert(train, TrainConfig, "train")
    before = _remembered(model)
    network, kept = bare(model), masks or {}
    apply_masks(network, kept)
    with _shown(progress) as told:
        done = round_weights(network, _data_set(data, network), kept, config, settled, seed=seed, progress=told)
    if before is not None:
        _ORIGINALS[network] = before, digest_of(tensors_of(model))
    return done


_ORIGINALS: WeakKeyDictionary[Any, tuple[dict[str, Any], str]] = WeakKeyDictionary()
"""Network -> the state before its relief, and the digest of the one after, as long as the network is there."""


def _remembered(model: nn.Module) -> dict[str, Any] | None:
    """Return the state before the relief that left the network as it is, or None: it may have been trained since."""
    from relief_export.state import bare, digest_of, tensors_of

    if bare(model) not in _ORIGINALS:
        return None
    state, digest = _ORIGINALS[bare(model)]
    # Weights that changed since then make another network, to which the old original does not belong.
    return state if digest == digest_of(tensors_of(model)) else None


@contextmanager
def _shown(progress: Progress | bool | None) -> Iterator[Progress | None]:
    """Yield the callback, or one that draws bars where ``progress`` is True."""
    from relief_export.progress import bars

    if callable(progress):
        yield progress
    else:
        with bars(wanted=bool(progress)) as drawn:
            yield drawn


def _own_loop(
    data: Any,  # noqa: ANN401  whatever can be gone through
    retrain: Callable[[nn.Module, Masks], None],
    evaluate: Callable[[nn.Module], float],
    *,
    seed: int,
    **how: Any,  # noqa: ANN401  fields of Loop
) -> Loop:
    from relief_export.relief.loop import Loop

    if isinstance(data, Iterator):
        raise InputError("data can be gone through only once: give a list of batches or a DataLoader")
    if not hasattr(data, "__iter__") or isinstance(data, Mapping):
        raise InputError(
            f"with retrain and evaluate, data is a list of batches or a DataLoader, not a {type(data).__name__}"
        )

    def run_theirs(network: nn.Module, masks: Masks, *_: object) -> None:
        retrain(network, masks)

    return Loop(calibration=data, retrain=run_theirs, evaluate=evaluate, key={"seed": seed}, **how)


def _is_pairs(data: object) -> bool:
    """Return whether data are splits of ready tensors or arrays; what is neither is judged there too."""
    from relief_export.training.data import DataSet

    if isinstance(data, DataSet) or not isinstance(data, Mapping) or not data:
        return True
    return all(_is_pair(part) for part in data.values())


def _is_pair(part: object) -> bool:
    return isinstance(part, (tuple, list)) and len(part) == 2 and all(hasattr(item, "shape") for item in part)


def _batches(data: object, size: int) -> dict[str, Any]:
    """Return the batches of each split; pairs of tensors are cut into batches, in a new order each time to train.

    Raises:
        InputError: A split is missing or unknown, or is no batches.
    """
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    splits = _splits(data)
    found: dict[str, Any] = {"test": None}
    for name, part in splits.items():
        if _is_pair(part):
            x, y = map(torch.as_tensor, part)
            if len(x) != len(y) or not len(x):
                raise InputError(f"data[{name!r}] holds {len(x)} inputs and {len(y)} labels")
            train = name == "train"
            # Batch norm cannot normalise a single sample.
            last = train and len(x) > size and len(x) % size == 1
            found[name] = DataLoader(TensorDataset(x, y), batch_size=size, shuffle=train, drop_last=last)
        elif hasattr(part, "__iter__") and not isinstance(part, (torch.Tensor, np.ndarray, str, Mapping)):
            found[name] = part
        else:
            raise InputError(
                f"data[{name!r}] must be a pair (x, y) of inputs and labels, or batches of them, "
                f"not a {type(part).__name__}"
            )
    return found


def _splits(data: object) -> Mapping[str, Any]:
    """Return the splits by name.

    Raises:
        InputError: It is no mapping, or a split is missing or unknown.
    """
    from relief_export.schema import did_you_mean

    if not isinstance(data, Mapping):
        raise InputError('data must be {"train": (x, y), "validation": (x, y)}, or give retrain and evaluate')
    if unknown := next((name for name in data if name not in _SPLITS), None):
        raise InputError(f"data has no split {unknown!r}{did_you_mean(str(unknown), _SPLITS)}")
    if missing := next((name for name in _SPLITS[:2] if name not in data), None):
        raise InputError(f"data lacks {missing!r}: give {{'train': (x, y), 'validation': (x, y)}}")
    return data


def _data_set(data: object, model: nn.Module) -> DataSet:
    """Return the splits of a mapping of pairs of inputs and labels.

    Raises:
        InputError: A split is missing, unknown, or of another form, or its labels are no classes.
    """
    import torch

    from relief_export.training.data import DataSet, Split

    if isinstance(data, DataSet):
        return data
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    splits, given = {}, _splits(data)
    for name, pair in given.items():
        x, y = map(torch.as_tensor, pair)
        if y.ndim != 1 or not len(y) or bool((y != y.long()).any() or (y < 0).any()):
            raise InputError(
                f"the labels of {name!r} must be classes, one whole number from 0 on a sample: "
                "for another task give task=, or retrain and evaluate"
            )
        # NumPy's float64 is no other number than the float32 of the network.
        splits[name] = Split.of(x.to(kind) if x.is_floating_point() else x, y)
    x, y = (torch.as_tensor(part) for part in given["train"])
    test = splits.get("test", splits["validation"])
    return DataSet(splits["train"], splits["validation"], test, int(y.max()) + 1, tuple(x.shape[1:]))


_SPLITS = ("train", "validation", "test")


def export(
    model: nn.Module,
    example_input: Inputs,
    folder: str | Path,
    *,
    masks: Mapping[str, Tensor] | None = None,
    original: nn.Module | None = None,
    formats: Sequence[str] = ("dense", "csr"),
    samples: Any = None,  # noqa: ANN401  inputs of any form, or a pair of them and labels
    calibration: Any = None,  # noqa: ANN401  inputs of any form
    forward: Forward | None = None,
    output: Output | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    progress: Progress | bool | None = None,
) -> Manifest:
    """Write a network as a small exact ONNX model and in other formats, with the manifest that `validate` needs.

    A network in half precision is converted to float32: PyTorch and ONNX Runtime round float16 differently, and only
    float32 can be proven. Its weights are exact in float32; ``packed-f16`` ships them as half again, within the
    tolerance that this format states.

    Args:
        model: Any network that `capture` takes; it is not changed.
        example_input: One batch: a tensor, a tuple of the arguments of ``forward``, or a dictionary of them.
        folder: Where the files go; an existing folder must be one that an export wrote, and is replaced.
        masks: Parameter name -> True where it is kept; without them the zeros in the weights decide.
        original: The network before relief, the baseline of every saving; by default the one that `relieve` was given,
            where ``model`` is as `relieve` left it, else ``model`` itself.
        formats: Any names of ``relief_export.formats.FORMATS``; dense is always written.
        samples: Inputs, or a pair of inputs and labels, for the stored reference; by default ``example_input``, without
            labels.
        calibration: Inputs for int8 and packed-int8; by default those of the reference.
        forward: ``forward(model, batch)`` calls the network, where that is no plain call.
        output: What of the network's outputs is shipped: a key, a position, or a function of them; by default all
            tensors.
        input_names: Names of the model's inputs; by default those of the arguments of ``forward``.
        output_names: Names of its outputs; by default ``output``, or the keys of what the network gives.
        progress: Called as ``progress(task, done, total, note)``; True draws bars.

    Raises:
        InputError: An argument is wrong, the folder is somebody else's, or the network cannot be captured.
    """
    _need_torch("relief_export.export")
    from relief_export.capture import capture, plain_copy
    from relief_export.formats import FORMATS, Options
    from relief_export.graph.prepare import fold
    from relief_export.stages.export_stages import MANIFEST, Samples, write_artifacts
    from relief_export.state import apply_masks

    # Refused before the capture, which may take long.
    if unknown := sorted(set(formats) - set(FORMATS)):
        raise InputError(f"there is no format {unknown[0]!r}: choose from {', '.join(FORMATS)}")
    if calibration is not None and not any(FORMATS[name].calibrated for name in formats):
        raise InputError("calibration is for int8 and packed-int8: leave it out, or export one of them")
    target = Path(folder)
    # An export replaces the folder as a whole, so a folder without a manifest must be empty.
    if target.exists() and not (target / MANIFEST).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is no folder that an export wrote: name another one")
    how: dict[str, Any] = {"forward": forward, "output": output}
    names: dict[str, Any] = {"input_names": input_names, "output_names": output_names}
    inputs, y = _samples(samples, example_input)
    with _shown(progress) as told:
        graphs = {
            "original": fold(capture(_original(model, original), example_input, **how, **names)),
            "masked": fold(capture(model, example_input, masks=masks, **how, **names)),
        }
        # PyTorch computes the reference in float32, like the graph that was captured.
        masked = plain_copy(model).cpu().float()
        apply_masks(masked, masks or {})
        x, logits = _reference(masked, example_input, inputs, graphs["masked"], **how)
        given = x if calibration is None else _by_name(masked, example_input, calibration, graphs["masked"])
        reference = Samples(x, None if y is None else y.cpu().numpy(), logits, "reference")
        write_artifacts(graphs, reference, target, formats, Options(calibration=given), progress=told)
    return read_manifest(target)


_BATCH = 256
"""Samples of one forward pass over the reference: all of them at once may need more memory than there is."""


def _original(model: nn.Module, original: nn.Module | None) -> nn.Module:
    """Return the network that every saving is counted against: the one given, or the one that `relieve` was given."""
    from relief_export.capture import plain_copy
    from relief_export.state import restore

    if original is not None or (state := _remembered(model)) is None:
        return model if original is None else original
    copied = plain_copy(model)
    restore(copied, state)
    return copied


def _samples(samples: Any, example: Inputs) -> tuple[Inputs, Tensor | None]:  # noqa: ANN401  any of the forms
    """Return the reference's inputs and, where there are some, labels.

    Raises:
        InputError: They are of no known form.
    """
    import torch

    if samples is None:
        return example, None
    arrays = (torch.Tensor, np.ndarray)
    pair = isinstance(samples, (tuple, list)) and len(samples) == 2
    # Two arrays may be inputs of a network of two, or inputs and labels: the example's form decides.
    if pair and (isinstance(example, arrays) or not isinstance(samples[0], arrays)):
        inputs, y = samples
        return _as_tensors(inputs), None if y is None else torch.as_tensor(y)
    if isinstance(samples, (*arrays, Mapping)) or (
        isinstance(samples, (tuple, list)) and not isinstance(example, arrays)
    ):
        return _as_tensors(samples), None
    raise InputError(f"samples is a pair (x, y) of inputs and labels, or inputs alone, not a {type(samples).__name__}")


def _as_tensors(values: Any) -> Any:  # noqa: ANN401  any nesting of arrays
    import torch

    if isinstance(values, np.ndarray):
        return torch.from_numpy(values)
    if isinstance(values, Mapping):
        return {name: _as_tensors(value) for name, value in values.items()}
    return type(values)(map(_as_tensors, values)) if type(values) in (tuple, list) else values


def _tensors(network: nn.Module, example: Inputs, inputs: Inputs) -> list[Tensor]:
    """Return the tensors among the inputs in the order of the example's, on the CPU, in float32 where they are floats.

    Raises:
        InputError: They are of another form than the example.
    """
    from relief_export.calling import input_leaves

    if isinstance(example, Mapping) and isinstance(inputs, Mapping):
        if lacking := next((name for name in example if name not in inputs), None):
            raise InputError(f"the samples lack the input {lacking!r} of the example: they have {', '.join(inputs)}")
        # Arrays are paired with the graph's inputs by position, so they are put into the example's order.
        inputs = {name: inputs[name] for name in example}
    wanted, found = (list(input_leaves(given)) for given in (example, inputs))
    if [name for name, _ in wanted] != [name for name, _ in found] or not found:
        raise InputError(
            f"the samples hold {counted(len(found), 'tensor')} and the example {len(wanted)}: "
            "give both in the same form"
        )
    if len({len(tensor) for _, tensor in found}) > 1:
        raise InputError(f"the samples of the inputs of {type(network).__name__} are of different numbers")
    return [(t.float() if t.is_floating_point() else t).detach().cpu() for _, t in found]


def _by_name(network: nn.Module, example: Inputs, inputs: Any, graph: ir.Model) -> ByName:  # noqa: ANN401
    """Return the samples as arrays: of one input, or of each by its name in the graph."""
    tensors = _tensors(network, example, _as_tensors(inputs))
    names = [str(value.name) for value in graph.graph.inputs]
    return tensors[0].numpy() if len(names) == 1 else dict(zip(names, (t.numpy() for t in tensors), strict=True))


def _reference(
    network: nn.Module,
    example: Inputs,
    inputs: Inputs,
    graph: ir.Model,
    *,
    forward: Forward | None,
    output: Output | None,
) -> tuple[ByName, ByName]:
    """Return the samples and what the network gives for them, by the names of the graph, in PyTorch."""
    import torch

    from relief_export.calling import Flat
    from relief_export.state import network_errors

    flat = Flat(network, example, forward=forward, output=output).eval()
    tensors = _tensors(network, example, inputs)
    cut = [[tensor[start : start + _BATCH] for tensor in tensors] for start in range(0, len(tensors[0]), _BATCH)]
    batch = [tensor[None] for tensor in tensors]
    with torch.no_grad(), network_errors(network, inputs, as_batch=lambda: flat(*batch)):
        parts = [[out.numpy() for out in flat(*given)] for given in cut]
    outputs = [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]
    names = [str(value.name) for value in graph.graph.outputs]
    logits = outputs[0] if len(names) == 1 else dict(zip(names, outputs, strict=True))
    return _by_name(network, example, inputs, graph), logits


def validate(folder: str | Path, x: Any = None, y: Any = None, logits: Any = None) -> Validation:  # noqa: ANN401
    """Check every file of an exported folder against the masked network, in ONNX Runtime; ``.ok`` is the answer.

    Arrays and tensors may be given alike, and of several inputs or outputs a tuple in the model's order, or a mapping.

    Args:
        folder: What `export` wrote, or a build folder.
        x: Samples; by default the stored reference.
        y: Labels of the first output, for accuracies.
        logits: The network's own outputs for ``x``; by default the masked network in ONNX Runtime gives them.
    """
    from relief_export import evaluation

    folder = Path(folder)
    folder = folder / "artifacts" if (folder / "artifacts").is_dir() else folder
    if x is None:
        stored = evaluation.load_arrays(folder / "reference.npz")
        x, y, logits = stored.x, stored.y, stored.logits
    session = None
    if isinstance(x, (tuple, list)) or isinstance(logits, (tuple, list)):
        # Opened for its names alone, which put a tuple into an order.
        session = evaluation.open_session(folder / "masked.onnx", optimised=False)
    inputs, outputs = ((), ()) if session is None else (session.inputs, session.outputs)
    given = _arrays(x, inputs, "x")
    assert given is not None  # noqa: S101  loaded where it was not given
    labels = None if y is None else _array(y)
    return evaluation.validate(folder, given, labels, _arrays(logits, outputs, "logits"))


def _arrays(values: Any, names: Sequence[str], what: str) -> ByName | None:  # noqa: ANN401  any of the forms
    """Return arrays of what may be tensors: of one input or output, or of several by their names."""
    if values is None:
        return None
    if isinstance(values, Mapping):
        return {str(name): _array(value) for name, value in values.items() if value is not None}
    if isinstance(values, (tuple, list)):
        if len(values) != len(names):
            raise InputError(
                f"{what} holds {counted(len(values), 'array')}, and the model has {len(names)}: {', '.join(names)}"
            )
        named = dict(zip(names, map(_array, values), strict=True))
        return next(iter(named.values())) if len(named) == 1 else named
    return _array(values)


def _array(values: Any) -> Array:  # noqa: ANN401  a tensor on any device, a list or an array
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def convert(
    source: str | Path, target: str | Path, to: str, *, calibration: str | Path | None = None, verify: bool = True
) -> Artifact:
    """Write a model file, or a folder of SciPy matrices, in another format; what ``relief-export convert`` does.

    Args:
        source: A model in any format that can be read, or a folder with artifacts, whose dense file is meant.
        target: The file or folder to write.
        to: A name of ``relief_export.formats.FORMATS``.
        calibration: An .npz file of samples, for int8 and packed-int8.
        verify: Open the result in ONNX Runtime before it is kept.

    Raises:
        InputError: There is no such model or format, or calibration is missing.
    """
    from relief_export.conversion import convert_file
    from relief_export.formats import FORMATS
    from relief_export.schema import did_you_mean
    from relief_export.subjects import model_path

    if to not in FORMATS:
        raise InputError(f"there is no format {to!r}{did_you_mean(to, FORMATS)}")
    samples = None if calibration is None else Path(calibration)
    return convert_file(model_path(Path(source)), Path(target), to, calibration=samples, verify=verify)


def compare(
    a: str | Path,
    b: str | Path,
    x: Any,  # noqa: ANN401  arrays or tensors, or a mapping of them
    y: Any = None,  # noqa: ANN401
    *,
    tolerance: float | Tolerance = 1e-4,
) -> Comparison:
    """Compare two models on the same samples in ONNX Runtime, optimisations off and on; ``.ok`` is the answer.

    Args:
        a: The reference: a model file, a csr folder, or a folder with artifacts.
        b: The other one.
        x: Samples ``(N, ...)``, arrays or tensors; of several inputs a mapping of them by name.
        y: Labels ``(N,)`` of the first output, for accuracies.
        tolerance: Largest relative error, or a ``relief_export.formats.Tolerance``.
    """
    from relief_export import evaluation
    from relief_export.subjects import model_path

    given = _arrays(x, (), "x")
    if given is None:
        raise InputError("x is missing: give the samples to compare on")
    labels = None if y is None else _array(y)
    return evaluation.compare(model_path(Path(a)), model_path(Path(b)), given, y=labels, tolerance=tolerance)


def audit(
    subject: str | Path,
    *,
    flash: str | None = None,
    ram: str | None = None,
    target: str | None = None,
    file: str | None = None,
    accuracy_drop: float | str = 0.0,
    baseline: str | Path | None = None,
    max_growth: float | str | None = None,
) -> Audit:
    """Measure a model, or every file of an exported folder, and check one against a budget; ``.ok`` is the answer.

    Args:
        subject: A model file, a csr folder, what `export` wrote, or a build folder.
        flash: What there is of flash, such as "256KiB".
        ram: What there is of RAM.
        target: A board's name, whose sizes count where they are not given.
        file: The file to check; by default the smallest that fits.
        accuracy_drop: Largest loss of accuracy that the tolerance of a chosen file may allow, such as 0.01 or "1%".
        baseline: An older model or folder to compare sizes with.
        max_growth: By which share of the baseline's size a file may have grown, such as "2%" or 0.02.

    Raises:
        InputError: A size, share or name is wrong, or there is no such model.
    """
    from relief_export import evaluation

    budget = evaluation.Budget.of(flash=flash, ram=ram, target=target, file=file, accuracy_drop=accuracy_drop)
    older = None if baseline is None else Path(baseline)
    return evaluation.audit(Path(subject), budget, baseline=older, max_growth=max_growth)


def shrink(model: str | Path | ir.Model | onnx.ModelProto, *, strict: bool = False) -> ShrinkResult:
    """Remove every disconnected neuron from an ONNX model, exactly, into a new one: the result's ``.model``."""
    from relief_export.graph.prepare import fold
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
