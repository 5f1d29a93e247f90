"""Mean absolute activity of every layer's input, in one streaming pass.

With X_j the input of channel j, over all samples n (and over all calls, where a layer is used more than once)::

    linear: a_j = mean_n |x_j|     (in,)
    conv:   A_j = mean_n |X_j|     (in, *spatial)
    join:   the same map of each of its two inputs, times its present mask

A layer that is called on maps of several sizes, as a detection head on the levels of its pyramid, has one map for each
size. Sums are kept in float64 and only their present value, so memory does not grow with the number of samples.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from relief_export.calling import batch_size, call, first_samples, inputs_of, run_batch
from relief_export.errors import InputError
from relief_export.layers import CONVS, JOIN_BUFFERS, connected_layers, joins
from relief_export.state import bare
from relief_export.training import distributed

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from relief_export.calling import Forward

_BLOCKS = 25
"""Into about how many blocks of rows a batch is cut for its sum."""
_SIZES = 32
"""Of maps of so many sizes a layer keeps the means; photographs each of its own size would fill the memory."""


@dataclass(frozen=True)
class MeanMap:
    """The mean of |x| over ``rows`` samples: ``mean: (in,)`` or ``(in, *spatial)``, float64, on the model's device."""

    mean: Tensor
    rows: int


@dataclass(frozen=True)
class Activity:
    """Mean absolute inputs, in the order in which the network calls its layers.

    Attributes:
        samples: How many samples were seen, over all processes.
        layers: Layer name -> one mean for each size of its input: one for linear layers.
        joins: Join name -> the maps of residual and shortcut, each ``(channels, *spatial)``.
    """

    samples: int
    layers: dict[str, tuple[MeanMap, ...]]
    joins: dict[str, tuple[Tensor, Tensor]]


class _Mean:
    """Running sums of |x| over rows ``(rows, *shape)`` and their number, one for each shape."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sums: dict[torch.Size, Tensor] = {}
        self.rows: dict[torch.Size, int] = {}

    def add(self, x: Tensor) -> None:
        """Add rows ``x: (rows, *shape)``."""
        total = _sum(x.detach().abs())
        if total.shape in self.sums:
            self.sums[total.shape] += total
        elif len(self.sums) < _SIZES:
            self.sums[total.shape] = total
        else:
            raise InputError(
                f"the input of layer {self.name!r} has more than {_SIZES} sizes, the last {tuple(total.shape)}: give "
                "calibration samples of a few sizes"
            )
        self.rows[total.shape] = self.rows.get(total.shape, 0) + x.shape[0]

    def means(self) -> tuple[MeanMap, ...]:
        """Return the means over everything added, by all processes.

        Raises:
            InputError: An activity was NaN or infinite, or other processes saw other sizes.
        """
        # Sorted, because every process must reduce the same map at the same time, whichever size it met first.
        shapes = sorted(self.sums)
        seen = distributed.all_reduce(torch.tensor([len(shapes)]))
        if int(seen) != len(shapes) * distributed.world():
            raise InputError(f"the processes saw inputs of other sizes in layer {self.name!r}: give all the same sizes")
        found = []
        for shape in shapes:
            total = self.sums[shape]
            rows = torch.tensor(self.rows[shape], dtype=torch.float64, device=total.device)
            distributed.all_reduce(total)
            distributed.all_reduce(rows)
            if not bool(torch.isfinite(total).all()):
                raise InputError(f"the input of layer {self.name!r} is NaN or infinite on the calibration samples")
            found.append(MeanMap(total / rows, int(rows)))
        return tuple(found)

    def mean(self) -> Tensor:
        """Return the one mean of what has one size.

        Raises:
            InputError: There are several.
        """
        if len(self.sums) != 1:
            raise InputError(f"the inputs of join {self.name!r} change their size: give all samples the same size")
        return self.means()[0].mean


def _sum(x: Tensor) -> Tensor:
    """Return the sum of ``(rows, *shape)`` over rows, exactly as float64 adds.

    Blocks of rows are added to a float64 block first: on a CPU ``x.sum(0, dtype=torch.float64)`` takes several times as
    long, because it converts one number at a time.
    """
    first, *others = torch.split(x, max(1, len(x) // _BLOCKS))
    # A copy in float64; the last block may be shorter than the first, which is why only its own rows are added.
    total = first.double()
    for block in others:
        total[: len(block)] += block
    return total.sum(dim=0)


def measure_activity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    samples: int | None = None,
    skip: Collection[str] = (),
    forward: Forward | None = None,
) -> Activity:
    """Run the network over calibration batches and keep the mean absolute input of every layer and join.

    The network runs in evaluation mode without gradients; batch-norm statistics, gradients and the training mode of
    every module are as before when this returns. Under ``torch.distributed`` each process brings its own batches and
    all get the same means. A layer that the network never calls has no activity.

    Args:
        model: Any network with linear and convolution layers, or a wrapper of it.
        batches: Batches of the forms that `calling` lists; moved to the network's device and type.
        samples: Stop after this many samples of this process; None takes all.
        skip: Names of layers and joins (globs) that are not measured.
        forward: Calls the network on a batch, where the batches are of another form.

    Raises:
        InputError: No samples, a batch of no known form, a network that fails, or a NaN or infinite activity.
    """
    # Hooks go to the network inside a wrapper, whose names are those of the masks.
    network = bare(model)
    means: dict[str, list[_Mean]] = {}
    handles = [
        module.register_forward_pre_hook(_hook(name, module, means), with_kwargs=True)
        for name, module in (*connected_layers(network), *joins(network))
        if not any(fnmatchcase(name, pattern) for pattern in skip)
    ]
    try:
        with evaluating(network), torch.no_grad():
            seen = _run(network, batches, samples, forward)
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
        # A join holds two means and a layer one: the number tells them apart.
        layers={name: kept[0].means() for name, kept in means.items() if len(kept) == 1},
        joins={name: (kept[0].mean(), kept[1].mean()) for name, kept in means.items() if len(kept) == 2},
    )


def _run(model: nn.Module, batches: Iterable[Any], samples: int | None, forward: Forward | None) -> int:
    seen = 0
    for batch in batches:
        given = batch if forward is not None else inputs_of(model, batch)
        if samples is not None:
            given = first_samples(given, samples - seen)
        if size := batch_size(given):
            run_batch(model, given, forward or call)
            seen += size
        if samples is not None and seen >= samples:
            break
    return seen


def _hook(name: str, module: nn.Module, means: dict[str, list[_Mean]]) -> Any:  # noqa: ANN401  torch's hook type
    def rows(x: Tensor) -> Tensor:
        if not isinstance(module, CONVS):
            # A linear layer reads its last axis: every position, as of a sequence, counts as a row.
            return x.reshape(-1, x.shape[-1])
        if isinstance(module, CONVS) and x.ndim == module.weight.ndim - 1:
            return x[None]  # an unbatched sample
        return x

    def layer(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        # Some networks call their layers by keyword.
        x = args[0] if args else next(iter(kwargs.values()))
        means.setdefault(name, [_Mean(name)])[0].add(rows(x))

    def join(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        pair = (*args, *kwargs.values())
        for mean, x in zip(means.setdefault(name, [_Mean(name), _Mean(name)]), pair, strict=True):
            mean.add(x)

    return join if all(hasattr(module, buffer) for buffer in JOIN_BUFFERS) else layer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and each back into its own mode afterwards."""
    # One mode a module: a user may have frozen a batch norm in evaluation mode, which train() would undo.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
