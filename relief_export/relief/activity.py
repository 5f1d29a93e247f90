"""Mean absolute activity of every layer's input, in one streaming pass.

With X_j the input of channel j, over all samples n (and over all calls, where a layer is used more than once)::

    linear: a_j = mean_n |x_j|     (in,)
    conv:   A_j = mean_n |X_j|     (in, *spatial)
    join:   the same map of each of its two inputs, times its present mask

Sums are kept in float64 and only their present value, so memory does not grow with the number of samples.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from relief_export.errors import InputError
from relief_export.relief.layers import CONVS, JOIN_BUFFERS, connected_layers, joins
from relief_export.training import distributed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_BLOCKS = 25
"""Into about how many blocks of rows a batch is cut for its sum."""


@dataclass(frozen=True)
class Activity:
    """Mean absolute inputs, float64, on the model's device, in the order in which the network calls its layers.

    Attributes:
        samples: How many samples were seen, over all processes.
        layers: Layer name -> ``(in,)`` for linear, ``(in, *spatial)`` for convolution layers.
        joins: Join name -> the maps of residual and shortcut, each ``(channels, *spatial)``.
    """

    samples: int
    layers: dict[str, Tensor]
    joins: dict[str, tuple[Tensor, Tensor]]


class _Mean:
    """A running sum of |x| over rows ``(rows, *shape)`` and their number."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows = 0
        self.sum: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add rows ``x: (rows, *shape)``."""
        total = _sum(x.detach().abs())
        if self.sum is None:
            self.sum = total
        elif self.sum.shape != total.shape:
            raise InputError(
                f"the input of layer {self.name!r} changes its shape from {tuple(self.sum.shape)} to "
                f"{tuple(total.shape)} during calibration: give all samples the same size"
            )
        else:
            self.sum += total
        self.rows += x.shape[0]

    def mean(self) -> Tensor:
        """Return the mean over everything added, by all processes.

        Raises:
            InputError: An activity was NaN or infinite.
        """
        total = self.sum
        if total is None:
            raise InputError(f"layer {self.name!r} was not called during calibration")
        rows = torch.tensor(self.rows, dtype=torch.float64, device=total.device)
        distributed.all_reduce(total)
        distributed.all_reduce(rows)
        if not bool(torch.isfinite(total).all()):
            raise InputError(f"the input of layer {self.name!r} is NaN or infinite on the calibration samples")
        return total / rows


def _sum(x: Tensor) -> Tensor:
    """Return the sum of ``(rows, *shape)`` over rows, exactly as float64 adds.

    Blocks of rows are added to a float64 block first: on a CPU ``x.sum(0, dtype=torch.float64)`` takes several times as
    long, because it converts one number at a time.
    """
    first, *others = torch.split(x, max(1, len(x) // _BLOCKS))
    total = first.double()
    for block in others:
        total[: len(block)] += block
    return total.sum(dim=0)


def measure_activity(model: nn.Module, batches: Iterable[Any], *, samples: int | None = None) -> Activity:
    """Run the network over calibration batches and keep the mean absolute input of every layer and join.

    The network runs in evaluation mode without gradients; batch-norm statistics, gradients and the training mode of
    every module are as before when this returns. Under ``torch.distributed`` each process brings its own batches and
    all get the same means. A layer that the network never calls has no activity.

    Args:
        model: Any network with linear and convolution layers.
        batches: Tensors, or tuples whose first item is the input; moved to the network's device.
        samples: Stop after this many samples of this process; None takes all.

    Raises:
        InputError: No samples, a batch without a tensor, a NaN or infinite activity, or a layer whose input changes
            its shape.
    """
    means: dict[str, list[_Mean]] = {}
    handles = [
        module.register_forward_pre_hook(_hook(name, module, means), with_kwargs=True)
        for name, module in (*connected_layers(model), *joins(model))
    ]
    try:
        with evaluating(model), torch.no_grad():
            seen = _run(model, batches, samples)
    finally:
        for handle in handles:
            handle.remove()
    # Asked together, so that no process waits for one that has left with an error.
    total, empty = distributed.all_reduce(torch.tensor([seen, int(seen == 0)])).tolist()
    if empty:
        raise InputError("the calibration set is empty: relief needs at least one sample for each process")
    if handles and not means:
        raise InputError("no layer was called in calibration: of a compiled network give the one that was compiled")
    return Activity(
        samples=total,
        layers={name: kept[0].mean() for name, kept in means.items() if len(kept) == 1},
        joins={name: (kept[0].mean(), kept[1].mean()) for name, kept in means.items() if len(kept) == 2},
    )


def _run(model: nn.Module, batches: Iterable[Any], samples: int | None) -> int:
    tensor = next((*model.parameters(), *model.buffers()).__iter__(), None)
    device = tensor.device if tensor is not None else torch.device("cpu")
    seen = 0
    for batch in batches:
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(x, Tensor):
            kind = type(batch).__name__
            raise InputError(f"a calibration batch is a tensor, or a tuple whose first item is the input, not a {kind}")
        if samples is not None:
            x = x[: samples - seen]
        if len(x):
            model(x.to(device, non_blocking=True))
            seen += len(x)
        if samples is not None and seen >= samples:
            break
    return seen


def _hook(name: str, module: nn.Module, means: dict[str, list[_Mean]]) -> Any:  # noqa: ANN401  torch's hook type
    def rows(x: Tensor) -> Tensor:
        if isinstance(module, nn.Linear):
            return x.reshape(-1, x.shape[-1])
        if isinstance(module, CONVS) and x.ndim == module.weight.ndim - 1:
            return x[None]  # an unbatched sample
        return x

    def layer(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = args[0] if args else kwargs["input"]
        means.setdefault(name, [_Mean(name)])[0].add(rows(x))

    def join(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        pair = (*args, *kwargs.values())
        for mean, x in zip(means.setdefault(name, [_Mean(name), _Mean(name)]), pair, strict=True):
            mean.add(x)

    return join if all(hasattr(module, buffer) for buffer in JOIN_BUFFERS) else layer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and each back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
