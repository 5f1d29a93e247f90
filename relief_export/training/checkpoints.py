"""Weights, and the state of a training after an epoch: written atomically, read without executing anything."""

from __future__ import annotations

import errno
import hashlib
import pickle
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from relief_export.errors import InputError, IntegrityError
from relief_export.records import atomic_path
from relief_export.state import first_line, restore, tensors_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

_VERSION = 1


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the parameters and buffers of ``model`` as safetensors, atomically; same weights, same bytes."""
    # Copies, because a file holds no two tensors with the same memory; tied weights are written twice.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors_of(model).items()}
    with atomic_path(path) as temporary:
        try:
            save_file(state, temporary)
        except SafetensorError as error:  # it says of a full disk only this
            raise OSError(errno.EIO, f"the weights cannot be written ({error})", str(path)) from None


def load_weights(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """Load what ``save_weights`` wrote into ``model``, where it is, and return the tensors, on the CPU.

    Raises:
        InputError: There is no such file.
        IntegrityError: It is damaged, or holds the weights of another network; the model is untouched.
    """
    try:
        found = load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: run the stage that writes it first") from None
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{path} is not a whole safetensors file ({error}): run its stage again") from None
    wanted = tensors_of(model)
    # Both lists, so that a tensor too many is as much of another network as one that is missing.
    # Everything is compared before anything is written, so that a refused file leaves the model untouched.
    for name in [*wanted, *found]:
        mine, theirs = (tuple(state[name].shape) if name in state else "absent" for state in (wanted, found))
        if mine != theirs:
            raise IntegrityError(f'{path} is of another network: tensor "{name}" is {theirs} there and {mine} here')
    restore(model, found)
    return found


def load_start(model: nn.Module, path: Path) -> None:
    """Load a user's own weights: a safetensors file, or a ``state_dict`` that ``torch.save`` wrote.

    Raises:
        InputError: There is no such file, it is neither, or it is of another network.
    """
    if path.suffix == ".safetensors":
        load_weights(model, path)
        return
    try:
        # A pickle can run any code when it is read: weights_only admits nothing but tensors and plain containers.
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"model.weights: {path} does not exist") from None
    except (OSError, RuntimeError, EOFError, KeyError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        detail = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(f"model.weights: {path} is no state_dict of torch.save, nor safetensors ({detail})") from None
    wanted = tensors_of(model)
    entries = found.items() if isinstance(found, dict) else ()
    tensors = {name: value for name, value in entries if isinstance(value, torch.Tensor)}
    for name in [*wanted, *tensors]:
        mine, theirs = (tuple(state[name].shape) if name in state else "absent" for state in (wanted, tensors))
        if mine != theirs:
            raise InputError(
                f'model.weights: {path} is of another network: tensor "{name}" is {theirs} there and {mine} here'
            )
    restore(model, tensors)


class Checkpoint:
    """How far a training is, and the best network so far.

    Attributes:
        key: What the training starts from; a checkpoint with another key is of another training.
        epoch: Epochs done.
        best: State of the best network: the highest validation accuracy, then the lowest loss.
        history: One table an epoch.
    """

    def __init__(self, key: str) -> None:
        self.key, self.epoch = key, 0
        self.best: dict[str, torch.Tensor] = {}
        self.best_epoch, self.best_accuracy, self.best_loss = 0, -1.0, 0.0
        self.history: list[dict[str, Any]] = []

    def note(
        self, epoch: int, model: nn.Module, accuracy: float, loss: float, line: dict[str, Any] | None = None
    ) -> None:
        """Note that ``epoch`` epochs are done, and keep the network if it is the best so far."""
        self.epoch = epoch
        if (accuracy, -loss) > (self.best_accuracy, -self.best_loss):
            self.best_epoch, self.best_accuracy, self.best_loss = epoch, accuracy, loss
            # A clone, because the training goes on in the very memory of these tensors.
            self.best = {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}
        if line is not None:
            self.history.append(line)

    def save(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write everything to ``path``, atomically."""
        state = vars(self) | {"version": _VERSION, "model": tensors_of(model), "optimizer": optimizer.state_dict()}
        # An open file, because torch refuses some names.
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch's writer says no more of a full disk
                raise OSError(errno.EIO, f"the checkpoint cannot be written ({first_line(error)})", str(path)) from None

    def resume(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Go on from ``path`` if it holds this very training; one of another training is left unused.

        Raises:
            IntegrityError: The file is damaged or no checkpoint.
        """
        try:
            state = torch.load(path, map_location=next(model.parameters()).device, weights_only=True)
            version, key = state.pop("version"), state.pop("key")
            weights, moments = state.pop("model"), state.pop("optimizer")
        except (OSError, RuntimeError, EOFError, KeyError, AttributeError, TypeError, pickle.UnpicklingError) as error:
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise IntegrityError(f"{path} is not a whole checkpoint ({detail}): remove it to start again") from None
        # No error: a build folder may still hold what an earlier recipe left, and the training then starts afresh.
        if version != _VERSION or key != self.key:
            return
        restore(model, weights)
        optimizer.load_state_dict(moments)
        vars(self).update(state)


def fingerprint(
    model: nn.Module, masks: Mapping[str, torch.Tensor], config: dict[str, Any], seed: int, labels: torch.Tensor
) -> str:
    """Hash what determines a training: initial state, masks, settings, seed, and the labels in their order."""
    digest = hashlib.sha256(repr((sorted(config.items()), seed)).encode())
    tensors = {**tensors_of(model), **{f"mask {name}": mask for name, mask in masks.items()}, "labels": labels}
    for name, tensor in tensors.items():
        # The shape too, because the same bytes may be tensors of several shapes.
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
