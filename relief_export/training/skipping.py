"""Compute only what the masks leave: inputs and outputs of a layer without any connection are skipped.

With I and O the inputs and outputs of a layer that have an unmasked connection (or bias)::

    y_O = layer(x_I; W[O, I], b_O)      y elsewhere = 0

which is what the whole layer computes, since the rest of W and b is zero; only the order of its sums may differ. The
saving grows with the rounds of relief: of a network with half of its neurons left, a quarter has to be computed.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WORTH, _SHARE = 160, 0.75
"""Gathering costs more than it saves below so many multiplications saved for each number of the input, and above this
share of the layer's matrix that is left."""


@contextmanager
def skipping(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the layers of ``model`` skip what ``masks`` leave without a connection, as long as the context lasts.

    Masked entries must be zero all the while. Gradients of what is skipped are zero. Grouped convolutions are left as
    they are, and so are subclasses, which may have a forward of their own.

    Args:
        model: Any network; its parameters keep their shapes.
        masks: Parameter name -> boolean tensor, True where it is kept.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    changed: list[nn.Module] = []
    try:
        for layer in model.modules():
            # The exact type, where isinstance would let subclasses in.
            if type(layer) not in _LAYERS or getattr(layer, "groups", 1) != 1:
                continue
            mask, bias = (masks.get(names.get(id(t), "")) for t in (layer.weight, layer.bias))
            if mask is None:
                continue
            thin = _Thin(layer, mask, bias)
            if thin.saved >= _WORTH and thin.share <= _SHARE:
                # On the instance: hooks and every caller of the layer see the same module as before.
                layer.forward = thin
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            del layer.forward  # the class's own shows again


class _Thin:
    """The forward of a layer over its live inputs and outputs."""

    def __init__(self, layer: Any, mask: Tensor, bias: Tensor | None) -> None:  # noqa: ANN401  one of _LAYERS
        connected = mask.flatten(2).any(2) if mask.ndim > 2 else mask  # (out, in)
        rows = connected.any(1)
        if layer.bias is not None:
            # A neuron without connections still gives its bias, unless that is masked too.
            rows = rows | (torch.ones_like(rows) if bias is None else bias)
        self._layer, self._axis, self._outputs = layer, 1 - mask.ndim, len(mask)
        self._in, self._out = (_numbers(flags, layer.weight.device) for flags in (connected.any(0), rows))
        self.share = len(self._in) * len(self._out) / connected.numel()
        self.saved = (1 - self.share) * mask.numel() / connected.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the layer's whole output for ``x``."""
        layer = self._layer
        weight = _take(_take(layer.weight, self._out, 0), self._in, 1)
        bias = None if layer.bias is None else _take(layer.bias, self._out, 0)
        taken = _take(x, self._in, self._axis)
        # A convolution's own method knows every padding mode.
        run = F.linear if isinstance(layer, nn.Linear) else layer._conv_forward  # noqa: SLF001
        y = run(taken, weight, bias)
        placed: Tensor = _Place.apply(y, self._out, self._axis, self._outputs)  # type: ignore[no-untyped-call]
        return placed


def _numbers(flags: Tensor, device: torch.device) -> Tensor:
    """Return the numbers of the set flags, of the first one where none is set: a layer of no size helps nobody."""
    numbers = flags.nonzero().flatten()
    return (numbers if len(numbers) else numbers.new_zeros(1)).to(device)


def _take(x: Tensor, numbers: Tensor, axis: int) -> Tensor:
    taken: Tensor = _Take.apply(x, numbers, axis)  # type: ignore[no-untyped-call]  # not in torch's stubs
    return taken


def _place(part: Tensor, numbers: Tensor, axis: int, size: int) -> Tensor:
    shape = list(part.shape)
    shape[axis] = size
    whole = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=_layout(part))
    # Copied by index and not added: no number occurs twice, and so the result is the same bits each time.
    return whole.zero_().index_copy_(axis, numbers, part)


def _layout(x: Tensor) -> torch.memory_format:
    """Return the layout of ``x``, which the layers after it are quicker with than with a mixture."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


class _Take(torch.autograd.Function):
    """Select along an axis; torch's own backward adds one index at a time, though no number occurs twice here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, axis: int) -> Tensor:  # noqa: ANN401  torch's context
        """Return the entries ``numbers`` of ``x`` along ``axis``."""
        ctx.numbers, ctx.axis, ctx.size = numbers, axis, x.shape[axis]
        return x.index_select(axis, numbers).contiguous(memory_format=_layout(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:  # noqa: ANN401
        """Place the gradient among zeros."""
        wanted = _place(grads[0], ctx.numbers, ctx.axis, ctx.size) if ctx.needs_input_grad[0] else None
        return wanted, None, None


class _Place(torch.autograd.Function):
    """Place along an axis among zeros: the inverse of `_Take`."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, numbers: Tensor, axis: int, size: int) -> Tensor:  # noqa: ANN401
        """Return ``part`` at ``numbers`` along an ``axis`` of ``size``, zeros elsewhere."""
        ctx.numbers, ctx.axis = numbers, axis
        return _place(part, numbers, axis, size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        """Select the gradient."""
        return grads[0].index_select(ctx.axis, ctx.numbers), None, None, None
