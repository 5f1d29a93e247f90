"""The stages that train: the dense network, then relief; both need torch, and torchrun's processes share them."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relief_export.errors import InputError, ReliefError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    import numpy as np
    import onnx_ir as ir
    from torch import nn

    from relief_export.recipe import Recipe
    from relief_export.relief.masks import Masks
    from relief_export.stages.engine import Job, Outcome
    from relief_export.training.data import DataSet


_REHEARSAL = 8
"""Samples that show, before hours of training, that the later steps take the network and its settings."""


def train(job: Job) -> Outcome:
    """Train the dense network; leaves its initial and its best weights.

    Raises:
        InputError: The network cannot take the recipe's pictures, or a later step would refuse the recipe.
    """
    from relief_export.relief.masks import Masks
    from relief_export.stages.engine import is_main_process
    from relief_export.training.checkpoints import load_start, save_weights
    from relief_export.training.fit import evaluate, fit

    folder, recipe = job.folder / "dense", job.recipe
    data, model = load_task(recipe)
    if recipe.model.weights is not None:
        load_start(model, Path(recipe.model.weights))
    # Before the first weights are written, so that no training is lost to what a later step refuses.
    job.captured["graph"] = _rehearse(recipe, data, model)
    if is_main_process():
        save_weights(model, folder / "init.safetensors")
    checkpoint = folder / "checkpoint.pt"
    with blaming_the_network(recipe, data.input_shape):
        result = fit(model, data, recipe.train, seed=recipe.seed, checkpoint=checkpoint, progress=job.progress)
    if is_main_process():
        save_weights(model, folder / "weights.safetensors")
        # Only now: whoever is killed before it finds the last epoch done and writes the weights again.
        checkpoint.unlink(missing_ok=True)
    return {
        "fit": result.to_dict(),
        "validation": evaluate(model, data.validation).accuracy,
        "test": evaluate(model, data.test).accuracy,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "connections": Masks().count(model).dense,
        "input_shape": list(data.input_shape),
        "classes": data.classes,
        "samples": {name: len(getattr(data, name)) for name in ("train", "validation", "test")},
    }


def _rehearse(recipe: Recipe, data: DataSet, model: nn.Module) -> ir.Model:
    """Go through the later steps on a few samples with the untrained network, which stays as it is; return its graph.

    Raises:
        InputError: A pattern of relief.skip or relief.alpha matches no layer, the network does not take the samples, or
            its batch norm cannot be moved into its weights, which quantise asks for.
        UnsupportedModelError: The network cannot be captured as a graph.
    """
    import torch

    from relief_export.capture import capture
    from relief_export.relief.loop import check_layers
    from relief_export.training.rounding import fold_norms

    # A copy, since moving batch norm into the weights changes them.
    network = copy.deepcopy(model).eval()
    x, _ = data.train.take(_REHEARSAL, seed=recipe.seed).tensors()
    check_layers(network, recipe.relief)
    with blaming_the_network(recipe, data.input_shape):
        with torch.no_grad():
            network(x)
        if recipe.quantise is not None:
            fold_norms(network, x)
            # Another copy, because what is exported has its batch norm, as it was trained.
            network = copy.deepcopy(model).eval()
        return capture(network.cpu(), x[:2])


@contextmanager
def blaming_the_network(recipe: Recipe, shape: tuple[int, ...]) -> Iterator[None]:
    """Turn what a network's own code raises, whatever it is, into one sentence that names the network.

    Raises:
        UnsupportedModelError: An error went through the network's forward, or its gradients.
    """
    try:
        yield
    # Such an error has its one sentence already.
    except ReliefError:
        raise
    except Exception as error:
        if not _went_through_a_network(error.__traceback__):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        sample = " x ".join(map(str, shape))
        advice = "lower train.batch" if "out of memory" in reason.lower() else "set data.size or another model.name"
        raise UnsupportedModelError(
            f'the network "{recipe.model.name}" fails on samples of {sample}: {reason.rstrip(".")}: {advice}'
        ) from error


def _went_through_a_network(traceback: TracebackType | None) -> bool:
    """Return True if one frame is torch's call of a module or its backward pass."""
    while traceback is not None:
        path = traceback.tb_frame.f_code.co_filename.replace("\\", "/")
        # A network's code may lie anywhere, in the user's files or in another library: the frame of torch's call tells.
        if path.endswith(("torch/nn/modules/module.py", "torch/autograd/graph.py")):
            return True
        traceback = traceback.tb_next
    return False


def relieve(job: Job) -> Outcome:
    """Find the few connections that matter; leaves the weights, the masks and the history of the loop."""
    from relief_export.relief.loop import recipe_loop
    from relief_export.stages.engine import is_main_process
    from relief_export.training.checkpoints import load_weights, save_weights
    from relief_export.training.fit import evaluate

    folder, recipe = job.folder / "relieved", job.recipe
    data, model = load_task(recipe)
    # Two loads into one network: the first only for the tensors that it returns, the second to stay.
    init = load_weights(model, job.folder / "dense" / "init.safetensors")
    load_weights(model, job.folder / "dense" / "weights.safetensors")
    loop = recipe_loop(model, data, recipe.relief, recipe.train, seed=recipe.seed, progress=job.progress)
    with blaming_the_network(recipe, data.input_shape):
        # The build folder is the recipe's: a changed recipe makes again what depends on it.
        done = loop.run(model, recipe.relief, init=init, folder=folder, force=True, progress=job.progress)
    if is_main_process():
        weights = folder / "weights.safetensors"
        save_weights(model, weights)
        done.masks.save(folder / "masks.safetensors", weights)
    return {
        "relief": done.to_dict(),
        "validation": evaluate(model, data.validation).accuracy,
        "test": evaluate(model, data.test).accuracy,
        "connections": done.masks.count(model).to_dict(),
    }


def quantise(job: Job) -> Outcome:
    """Round the relieved network to few values by training; leaves its weights and masks.

    Where the recipe has no [quantise] there is nothing to do, and the record says so.
    """
    from relief_export.stages.engine import is_main_process
    from relief_export.training.checkpoints import save_weights
    from relief_export.training.fit import evaluate
    from relief_export.training.rounding import round_weights

    folder, recipe = job.folder / "quantised", job.recipe
    if recipe.quantise is None:
        return {"values": None}
    data, model = load_task(recipe)
    masks = load_network(model, job.folder, "relieved")
    checkpoint = folder / "checkpoint.pt"
    with blaming_the_network(recipe, data.input_shape):
        done = round_weights(
            model,
            data,
            masks,
            recipe.quantise,
            recipe.train,
            seed=recipe.seed,
            calibration=data.train.take(recipe.export.calibration_samples, seed=recipe.seed),
            checkpoint=checkpoint,
            progress=job.progress,
        )
    # Rounding leaves zeros alone, but what is written is masked by the masks and by nothing that was computed.
    masks.apply_(model)
    if is_main_process():
        weights = folder / "weights.safetensors"
        save_weights(model, weights)
        masks.save(folder / "masks.safetensors", weights)
        checkpoint.unlink(missing_ok=True)
    return {
        "values": recipe.quantise.values,
        "rounding": done.to_dict(),
        "validation": evaluate(model, data.validation).accuracy,
        "test": evaluate(model, data.test).accuracy,
    }


def load_task(recipe: Recipe) -> tuple[DataSet, nn.Module]:
    """Return the data of a recipe and its untrained network.

    Raises:
        InputError: The data are not there, or the network does not fit them or the rounding that the recipe asks for.
    """
    from relief_export.training.data import load_data
    from relief_export.training.models import build_model
    from relief_export.training.rounding import check_values

    data = load_data(recipe.data, recipe.seed)
    model = build_model(recipe.model, data.input_shape, data.classes, recipe.seed)
    if recipe.quantise is not None:
        check_values(model, recipe.quantise)
    return data, model


def load_network(model: nn.Module, folder: Path, network: str) -> Masks:
    """Load the weights of a build folder's ``network``, "relieved" or "quantised", masks applied; return the masks."""
    from relief_export.relief.masks import Masks
    from relief_export.training.checkpoints import load_weights

    weights = folder / network / "weights.safetensors"
    load_weights(model, weights)
    masks = Masks.load(folder / network / "masks.safetensors", weights)
    masks.apply_(model)
    return masks


def shipped_logits(job: Job, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the shipped network's outputs ``(N, classes)`` for inputs ``x``, ``(N, ...)`` float32."""
    import torch

    from relief_export.records import RECORDS, read_record
    from relief_export.training.data import Split
    from relief_export.training.fit import evaluate
    from relief_export.training.models import build_model

    recipe = job.recipe
    facts = read_record(job.folder / RECORDS["train"], "train").outcome
    shape = tuple(facts["input_shape"])
    if x.shape[1:] != shape or x.dtype.kind != "f":
        raise InputError(f"the samples x are {x.dtype} {x.shape}, the network takes floating-point (N, *{shape})")
    model = build_model(recipe.model, shape, facts["classes"], recipe.seed)
    load_network(model, job.folder, job.network)
    # The labels are made up: only the logits are read.
    split = Split.of(torch.from_numpy(x.astype("float32")), torch.zeros(len(x), dtype=torch.int64))
    logits = evaluate(model, split, logits=True).logits
    assert logits is not None  # noqa: S101  asked for
    return logits.numpy()
