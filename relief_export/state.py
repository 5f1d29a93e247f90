"""The tensors of a network: taken out, put back, and masked.

One meaning of "masked" for the whole project: the entry is *filled* with zero. Multiplying would leave NaN and infinity
where they were.

A network in a wrapper (``torch.compile``, ``DataParallel``, ``DistributedDataParallel``) is the network inside: names
are those of the inner ``state_dict``.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from relief_export.errors import InputError, ReliefError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_WRAPPERS = ("_orig_mod", "module")
"""Attributes under which torch.compile, and DataParallel and its relatives, keep the network."""


def bare(model: nn.Module) -> nn.Module:
    """Return the network inside the wrappers of ``torch.compile`` and of data-parallel training."""
    kinds = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch._dynamo.OptimizedModule)  # noqa: SLF001
    while isinstance(model, kinds):
        model = next(part for name in _WRAPPERS if isinstance(part := model._modules.get(name), nn.Module))  # noqa: SLF001
    return model


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers by their ``state_dict`` names; they share memory with the network.

    What a module keeps in ``get_extra_state`` may be anything; only tensors are returned.
    """
    return {name: value for name, value in bare(model).state_dict().items() if isinstance(value, Tensor)}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return a copy of the whole state on the CPU, extra state included, for `restore`."""
    return {
        name: value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in bare(model).state_dict().items()
    }


def restore(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a snapshot, or the tensors of one, into the network, where it is.

    ``load_state_dict`` of a plain dictionary is not enough: some modules ask the dictionary's metadata for a version
    (torchvision's MNASNet refuses to load without), and a file of tensors holds no extra state.
    """
    network = bare(model)
    own = network.state_dict()
    full: OrderedDict[str, Any] = OrderedDict(state)
    full.update((name, value) for name, value in own.items() if name not in full and not isinstance(value, Tensor))
    full._metadata = own._metadata  # type: ignore[attr-defined]  # noqa: SLF001  # where torch keeps it
    network.load_state_dict(full)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    # Sorted, since the order of a state_dict is that in which modules were assigned, which says nothing of the network.
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes, for NumPy has no bfloat16.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Set every masked entry of the network to exactly zero, in place.

    Args:
        model: The network, or a wrapper of it.
        masks: Parameter or buffer name -> array of its shape, true where it is kept.

    Returns:
        Tensor name -> number of its masked entries that were not zero before; only where there were some.

    Raises:
        InputError: A name that the network does not have, or another shape.
    """
    tensors = tensors_of(model)
    changed: dict[str, int] = {}
    for name, mask in _fitting(masks, tensors):
        tensor, masked = tensors[name].detach(), ~mask.to(tensors[name].device, torch.bool)
        if revived := int((tensor[masked] != 0).sum()):
            changed[name] = revived
        tensor.masked_fill_(masked, 0)
    return changed


def mask_enforcer(model: nn.Module, masks: Mapping[str, Tensor]) -> Callable[[], None]:
    """Return a function that does what `apply_masks` does, without counting, after each step of a training.

    The masks are checked and moved to their tensors' devices once.

    Raises:
        InputError: A name that the network does not have, or another shape.
    """
    tensors = tensors_of(model)
    pairs = [
        (tensors[name].detach(), ~mask.to(tensors[name].device, torch.bool)) for name, mask in _fitting(masks, tensors)
    ]

    def enforce() -> None:
        for tensor, masked in pairs:
            tensor.masked_fill_(masked, 0)

    return enforce


def check_masks(masks: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse masks that do not fit the network.

    Raises:
        InputError: A name that the network does not have, or another shape.
    """
    for _ in _fitting(masks, tensors_of(model)):
        pass


def _fitting(masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    # All are checked before the first is used: a network is never left half masked.
    for name, mask in masks.items():
        if name not in tensors:
            raise InputError(f"the masks name {name!r}, which the network does not have")
        if tensors[name].shape != mask.shape:
            shapes = f"{tuple(mask.shape)}, the network's tensor {tuple(tensors[name].shape)}"
            raise InputError(f"the mask of {name!r} has shape {shapes}")
    yield from masks.items()


@contextmanager
def network_errors(
    model: nn.Module, inputs: object = None, *, as_batch: Callable[[], object] | None = None
) -> Iterator[None]:
    """Turn whatever a user's network raises when it is called into one sentence that names it and its inputs.

    Args:
        model: The network.
        inputs: What it is called on.
        as_batch: Calls it on the same inputs with one more axis in front. Where the network takes these, a missing
            batch axis is the cause, and the sentence says so.

    Raises:
        InputError: The network raised something; what it was is the cause.
    """
    try:
        yield
    except ReliefError:
        raise
    except Exception as error:
        shown = "" if inputs is None else f" on inputs {describe(inputs)}"
        hint = "; it takes them with a batch axis in front: give a batch, as x[:1] is one and x[0] is none"
        hint = hint if as_batch is not None and _works(as_batch) else ""
        raise InputError(f"{type(bare(model)).__name__} fails{shown}: {first_line(error)}{hint}") from error


def _works(call: Callable[[], object]) -> bool:
    try:
        call()
    except Exception:  # noqa: BLE001  whatever a user's network raises, it is the first error that is reported
        return False
    return True


def describe(inputs: object) -> str:
    """Return shapes and types of the tensors in a batch, for a message."""
    if isinstance(inputs, Tensor):
        return f"{tuple(inputs.shape)} {str(inputs.dtype).removeprefix('torch.')}"
    if isinstance(inputs, dict):
        return "{" + ", ".join(f"{name}: {describe(value)}" for name, value in inputs.items()) + "}"
    if isinstance(inputs, (tuple, list)):
        return "(" + ", ".join(map(describe, inputs)) + ")"
    return type(inputs).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
