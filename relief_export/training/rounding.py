"""Trained rounding: weights of few different values, or of int8 steps, that a training has got used to.

With C the entries of a tensor's codebook, k-means at first, and a the entry nearest to a kept weight w::

    W_ij = C_a(ij)      dL/dC_k = Σ_{a(ij) = k} dL/dW_ij      dL/dw_ij = dL/dW_ij

The entries are trained as in Han, Mao, Dally, arXiv 1510.00149, section 3. There a is fixed; here the weights behind it
are trained, too, so that one moves to another entry where that helps: entries and biases alone are too few numbers to
make up for the rounding. For int8, with a scale s_c an output channel and a range an activation tensor::

    W_c = s_c · rint(w_c / s_c),  s_c = max |w_c| / 127      x = s_x · (rint(x / s_x + z) - z)

where the gradient passes the rounding as if it were not there. In both cases what a file stores beside the weights in
16 bits (codebooks and biases) is rounded to halves in training already, so that a file adds no rounding of its own.

The rounded weights are the *folded* ones: a batch norm behind a layer becomes a factor of its weights in every exported
file. Here its factor is moved into the weights first, and the batch norm is left with the shift alone.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from relief_export.codebooks import codebook
from relief_export.errors import InputError
from relief_export.layers import NORMS, connected_layers, joins, tensor_name
from relief_export.training import distributed
from relief_export.training.fit import FitResult, evaluate, fit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from relief_export.progress import Progress
    from relief_export.recipe import QuantiseConfig, TrainConfig
    from relief_export.training.data import DataSet, Split

_STEPS = 127
"""Largest int8 step of a weight; -128 is not used, so that the steps are symmetric."""
_FOLDED = 1e-4
"""Largest error of an output, relative to the largest one, that moving batch norm into weights may make (float32)."""


@dataclass(frozen=True)
class Rounded:
    """What trained rounding did to a network.

    Attributes:
        fit: The training; its best epoch is in the network.
        untrained: Validation accuracy of the rounded network before the training.
        values: Name of each rounded weight -> number of different non-zero values it holds now.
    """

    fit: FitResult
    untrained: float
    values: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a record."""
        return asdict(self)


def check_values(model: nn.Module, config: QuantiseConfig) -> None:
    """Refuse a number of values that a weight of ``model`` is too small for.

    Raises:
        InputError: A weight has fewer entries than values are asked for.
    """
    if isinstance(config.values, str):
        return
    for name, layer in connected_layers(model):
        if layer.weight.numel() < config.values:
            size = layer.weight.numel()
            raise InputError(f"quantise.values = {config.values}, but {tensor_name(name, 'weight')} has {size} weights")


def round_weights(
    model: nn.Module,
    data: DataSet,
    masks: Mapping[str, Tensor],
    config: QuantiseConfig,
    train: TrainConfig,
    *,
    seed: int,
    calibration: Split | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Rounded:
    """Round the weights of a trained, masked network in place, and train it to make up for it.

    Args:
        model: The network, its masked entries zero.
        data: ``train`` is fitted, ``validation`` chooses the epoch.
        masks: Parameter or buffer name -> True where it is kept.
        config: How many values, and the training.
        train: What else a training needs: batch, precision, memory layout.
        seed: Draws the order of the samples and the augmentation.
        calibration: Samples that give the ranges of int8 activations; those that the int8 file is calibrated with.
        checkpoint: Where the training keeps its state.
        progress: Called as ``progress("quantise", done, total, note)``.

    Raises:
        InputError: A weight has fewer entries than values are asked for.
    """
    check_values(model, config)
    device = distributed.device()
    model.to(device)
    example = next(data.train.batches(2, device=device))[0]
    # First of all: codebooks and scales must be those of the weights that a file will hold.
    norms = fold_norms(model, example)
    wrapped: _Rounded
    if isinstance(config.values, str):  # "int8"
        batches = (calibration or data.train.take(256, seed=seed)).batches(256, device=device)
        wrapped = _Int8(model, masks, norms, [x for x, _ in batches])
    else:
        wrapped = _Codebooks(model, masks, norms, config.values)
    wrapped.to(device)
    # Measured before the activations are rounded too, which happens in the context below alone.
    untrained = evaluate(wrapped, data.validation).accuracy
    settings = replace(
        train, epochs=config.epochs, lr=config.lr, optimizer="adam", schedule="one-cycle",
        milestones=(), warmup=None, weight_decay=0.0, nesterov=False, watch_test=False,
        shift=train.shift if config.shift is None else config.shift,
    )  # fmt: skip
    with wrapped.hooked():
        result = fit(
            wrapped,
            data,
            settings,
            # The network is a child of the wrapper, so its tensors have longer names there.
            masks={f"model.{name}": mask for name, mask in masks.items()},
            seed=seed,
            checkpoint=checkpoint,
            progress=progress,
            task="quantise",
        )
    wrapped.write()
    # The wrapper held its batch norms in evaluation mode: they follow the mode again from here on.
    model.train(wrapped.training)
    held = dict(model.named_parameters())
    values = {name: len(set(held[name].detach().flatten().tolist()) - {0.0}) for name in wrapped.rounded}
    return Rounded(result, untrained, values)


def fold_norms(model: nn.Module, x: Tensor) -> list[tuple[nn.Module, nn.Module]]:
    """Move the factor of every batch norm that reads nothing but a layer's output into the layer's weight, in place.

    The network computes the same in evaluation mode, and the exporter's folding then multiplies by exactly 1::

        γ / sqrt(σ² + ε) · (W x + b - μ) + β  =  (scale · W) x + (scale · (b - μ) + β),  scale = γ / sqrt(σ² + ε)

    Args:
        model: Any network.
        x: A batch of inputs: which layer a norm follows shows when the network runs.

    Returns:
        Layer and batch norm of each pair. A channel whose γ is zero keeps it; its weights become zero.

    Raises:
        InputError: The network then computes something else: a layer's output goes elsewhere, too.
    """
    pairs, training = _following_norms(model, x), model.training
    model.eval()
    with torch.no_grad():
        before = model(x)
        for layer, norm in pairs:
            # Noted before the weight is overwritten: such a channel must stay exactly zero, not become a factor of 1.
            dead = norm.weight == 0
            # In float64, so that the one rounding to float32 happens at the end.
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.double()
            shift = scale * (bias - norm.running_mean.double()) + norm.bias.double()
            layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)).float())
            if layer.bias is not None:
                layer.bias.zero_()
            norm.bias.copy_(shift)
            norm.weight.copy_((~dead).float())
            norm.running_mean.zero_()
            # With it σ² + ε is 1, and the exporter's own folding divides by 1.
            norm.running_var.fill_(1 - norm.eps)
        after = model(x)
    model.train(training)
    # Whether a layer's output is read elsewhere too is not seen from its hooks, but shows in the outputs.
    if (after - before).abs().max() > _FOLDED * before.abs().max():
        raise InputError("a batch norm cannot be moved into the layer before it, whose output is read elsewhere too")
    return pairs


def _following_norms(model: nn.Module, x: Tensor) -> list[tuple[Any, Any]]:
    """Return (layer, batch norm) where the norm was given the very tensor that the layer returned."""
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensor too, so that its id is not given again
    pairs: list[tuple[Any, Any]] = []

    def left(layer: nn.Module, _: Any, out: Tensor) -> None:  # noqa: ANN401  torch's hooks
        made[id(out)] = layer, out

    def reached(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        if norm.affine and norm.track_running_stats and (found := made.pop(id(inputs[0]), None)):
            pairs.append((found[0], norm))

    hooks = [layer.register_forward_hook(left) for _, layer in connected_layers(model)]
    hooks += [part.register_forward_pre_hook(reached) for part in model.modules() if isinstance(part, NORMS)]
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            model(x)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    # A layer or a norm that is called several times would be scaled several times.
    counts = [id(part) for pair in pairs for part in pair]
    return [pair for pair in pairs if all(counts.count(id(part)) == 1 for part in pair)]


class _StraightThrough(torch.autograd.Function):
    """Return the rounded value; its gradient goes to the value that was rounded."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:  # noqa: ANN401, ARG004
        """Return ``rounded``."""
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401, ARG004
        """Pass the gradient on."""
        return grads[0], None


def _straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    passed: Tensor = _StraightThrough.apply(value, rounded)  # type: ignore[no-untyped-call]
    return passed


def _half(value: Tensor) -> Tensor:
    return _straight_through(value, value.half().float())


class _Rounded(nn.Module):
    """A network whose weights are computed from what is trained; the base of both kinds of rounding.

    The weights themselves take no part in the training, nor do the biases and factors that batch norm has taken over.
    Batch norm that follows a layer stays in evaluation mode: it is a shift, not a normalisation, from here on.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor], norms: list[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.model = model
        self.norms = [norm for _, norm in norms]
        self.rounded: dict[str, Tensor | None] = {}
        """Name of each rounded weight -> its mask, None where it is kept whole."""
        # By identity and not by name: a shared weight has several names and is rounded once.
        weights = {id(layer.weight) for _, layer in connected_layers(model)}
        taken = {id(t) for layer, norm in norms for t in (layer.bias, norm.weight) if t is not None}
        self.vectors: list[str] = []
        for name, parameter in model.named_parameters():
            if id(parameter) in weights:
                mask = masks.get(name)
                self.rounded[name] = None if mask is None else mask.to(parameter.device)
            elif id(parameter) in taken:
                parameter.requires_grad_(False)
            # What remains of one axis is what files store in 16 bits: biases and the shifts of norms.
            elif parameter.ndim == 1:
                self.vectors.append(name)

    def train(self, mode: bool = True) -> _Rounded:
        """Set the mode, but leave the batch norms that became shifts in evaluation mode."""
        super().train(mode)
        for norm in self.norms:
            norm.eval()
        return self

    def weights(self) -> dict[str, Tensor]:
        """Return the rounded weights by name, differentiable."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Return everything the network computes with instead of its own parameters."""
        held = dict(self.model.named_parameters())
        return self.weights() | {name: _half(held[name]) for name in self.vectors}

    def forward(self, x: Tensor) -> Any:  # noqa: ANN401  whatever the network returns
        """Run the network with rounded weights."""
        return functional_call(self.model, self.tensors(), (x,))

    def write(self) -> None:
        """Write the rounded tensors into the network, and let all of it be trained again."""
        with torch.no_grad():
            held = dict(self.model.named_parameters())
            for name, tensor in self.tensors().items():
                held[name].copy_(tensor)
        self.model.requires_grad_()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Round activations, too, where the kind of rounding does, as long as the context lasts."""
        yield


class _Codebooks(_Rounded):
    """Each weight holds at most ``size`` different non-zero values."""

    def __init__(
        self, model: nn.Module, masks: Mapping[str, Tensor], norms: list[tuple[nn.Module, nn.Module]], size: int
    ) -> None:
        super().__init__(model, masks, norms)
        self.tables, self.free = nn.ParameterList(), nn.ParameterList()
        held = dict(model.named_parameters())
        for place, name in enumerate(self.rounded):
            weight = held[name].detach().flatten()
            # The weight itself is only a shape from here on: its kept entries are parameters of their own.
            held[name].requires_grad_(False)
            # The zeros stay outside of the parameters, so that the training cannot revive them.
            kept = weight.nonzero().flatten()
            # Files that store whole kernels keep one code of a convolution's table for zero.
            entries = codebook(weight[kept].cpu().numpy(), size if held[name].ndim == 2 else size - 1)
            self.tables.append(nn.Parameter(torch.from_numpy(entries)))
            self.free.append(nn.Parameter(weight[kept].clone()))
            self.register_buffer(f"kept{place}", kept)

    def weights(self) -> dict[str, Tensor]:
        """Replace each kept weight by the nearest entry of its table."""
        held, found = dict(self.model.named_parameters()), {}
        for place, (name, table, free) in enumerate(zip(self.rounded, self.tables, self.free, strict=True)):
            entries = _half(table)
            values = entries[_nearest(free.detach(), entries.detach())]
            # The weight's own gradient, too: w - w is zero, and its derivative is not.
            values = values + (free - free.detach())
            whole = torch.zeros_like(held[name]).flatten()
            found[name] = whole.index_copy(0, self.get_buffer(f"kept{place}"), values).view(held[name].shape)
        return found


def _nearest(values: Tensor, entries: Tensor) -> Tensor:
    """Return the index of the entry nearest to each value; a training may have put the entries out of order."""
    ordered, order = entries.sort()
    return order[torch.bucketize(values, (ordered[1:] + ordered[:-1]) / 2)]


class _Int8(_Rounded):
    """Each output channel's weights are multiples of a 127th of the largest, and layers read quantised activations."""

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        norms: list[tuple[nn.Module, nn.Module]],
        batches: list[Tensor],
    ) -> None:
        super().__init__(model, masks, norms)
        parts = [part for _, part in (*connected_layers(model), *joins(model))]
        self.ranges = _input_ranges(model, parts, batches)

    def weights(self) -> dict[str, Tensor]:
        """Round the weights to steps; a kept weight is one step at least, as the file format keeps it."""
        held, found = dict(self.model.named_parameters()), {}
        for name, mask in self.rounded.items():
            weight = held[name]
            with torch.no_grad():
                scale = weight.flatten(1).abs().amax(dim=1).div(_STEPS).view(-1, *[1] * (weight.ndim - 1))
                steps = torch.where(scale > 0, weight / scale, 0).round()
                kept = weight != 0 if mask is None else mask
                # A step of zero would be a connection that the masks keep and the file has lost.
                steps = torch.where((steps == 0) & kept, weight.sign(), steps)
            found[name] = _straight_through(weight, steps * scale)
        return found

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Round what layers and joins read to 256 steps of the range that the calibration samples showed."""

        def quantise(part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(
                # An input that was zero on every sample has no scale to divide by.
                x if low == high else _fake_quantise(x, low, high)
                for x, (low, high) in zip(inputs, self.ranges[part], strict=True)
            )

        hooks = [part.register_forward_pre_hook(quantise) for part in self.ranges]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _fake_quantise(x: Tensor, low: float, high: float) -> Tensor:
    """Round ``x`` to 256 steps from ``low`` to ``high``, one of which is exactly zero; what lies outside is clipped."""
    scale = (high - low) / 255
    return torch.fake_quantize_per_tensor_affine(x.float(), scale, round(-low / scale), 0, 255)


def _input_ranges(
    model: nn.Module, parts: list[nn.Module], batches: list[Tensor]
) -> dict[nn.Module, list[tuple[float, float]]]:
    """Return the least and largest entry, zero included, of each input of each of ``parts`` over the batches."""
    found: dict[nn.Module, list[tuple[float, float]]] = {}

    def look(part: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Ranges start at zero and only grow, because zero must be one of the steps: padding is zero.
        seen = found.get(part, [(0.0, 0.0)] * len(inputs))
        found[part] = [
            (min(low, float(x.min())), max(high, float(x.max()))) for x, (low, high) in zip(inputs, seen, strict=True)
        ]

    hooks = [part.register_forward_pre_hook(look) for part in parts]
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            for x in batches:
                model(x)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found
