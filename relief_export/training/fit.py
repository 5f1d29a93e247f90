"""Fit a network, masked or not, resumable at the epoch.

After every optimizer step  w <- w * mask  for all masked tensors at once: no momentum or weight decay revives one.

Everything random in an epoch is drawn from (seed, epoch): a resumed training needs no generator's state and ends where
an uninterrupted one ends, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch.nn.parallel import DistributedDataParallel

from relief_export.errors import InputError
from relief_export.state import mask_enforcer, restore
from relief_export.training import distributed
from relief_export.training.checkpoints import Checkpoint, fingerprint
from relief_export.training.models import logits_of
from relief_export.training.skipping import skipping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import nn

    from relief_export.progress import Progress
    from relief_export.recipe import TrainConfig
    from relief_export.training.data import DataSet, Split

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Epoch:
    """One line of a training's history: accuracies are fractions, losses are means over samples.

    ``lr`` is the learning rate of the epoch's first step.
    """

    epoch: int
    lr: float
    loss: float
    validation_accuracy: float
    validation_loss: float
    seconds: float
    test_accuracy: float | None = None
    """Only where the recipe watches it."""


@dataclass(frozen=True)
class FitResult:
    """What a training did: ``best`` counts epochs from 1; ``resumed_at`` is the number of epochs found done.

    ``peak_test_accuracy`` is the highest of any epoch, where it was watched: what a choice by the test set would have
    reported. No choice is made by it.
    """

    best: int
    validation_accuracy: float
    history: tuple[Epoch, ...]
    seconds: float
    resumed_at: int
    peak_test_accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a record."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluation:
    """Accuracy (a fraction), mean cross-entropy, and where asked for ``logits: (N, classes)`` float32 on the CPU."""

    accuracy: float
    loss: float
    samples: int
    logits: torch.Tensor | None = None


def fit(
    model: nn.Module,
    data: DataSet,
    config: TrainConfig,
    *,
    masks: Mapping[str, torch.Tensor] | None = None,
    seed: int,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    task: str = "train",
) -> FitResult:
    """Train ``model`` in place, on the accelerator if there is one; its best epoch by validation is loaded at the end.

    Args:
        model: The network; it stays on the device it was trained on.
        data: ``train`` is fitted and ``validation`` chooses the epoch; ``test`` is read only to be watched.
        config: The recipe's training.
        masks: Parameter or buffer name -> True where it is kept; what is not is exactly zero from the start to the end.
        seed: Draws the order, the augmentation and what the model itself draws.
        checkpoint: Where the state is kept after each epoch; one that is there and of this very training goes on.
        progress: Called as ``progress(task, done, total, note)`` after each batch, in the main process.
        task: The name that ``progress`` hears.

    Raises:
        InputError: A mask fits no tensor, the loss is not finite, or there are too few samples for one batch.
        IntegrityError: The checkpoint is damaged.
    """
    started = time.monotonic()
    device, masks = distributed.device(), masks or {}
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    _synchronise([*model.parameters(), *model.buffers()])
    # Enforced once before the first step, so that no masked entry takes part in the first forward pass.
    enforce = mask_enforcer(model, masks)
    enforce()
    optimizer = make_optimizer(model, config, captured=_captures(config, device))
    # After the step, and not on the gradients: momentum and weight decay move a weight whose gradient is zero.
    optimizer.register_step_post_hook(lambda *_: enforce())
    state = Checkpoint(fingerprint(model, masks, asdict(config), seed, data.train.labels))
    if checkpoint is not None and checkpoint.exists():
        state.resume(checkpoint, model, optimizer)
    resumed_at = state.epoch
    shard = rank, world = distributed.rank(), distributed.world()
    samples, steps = len(data.train), data.train.steps(config.batch, world=world)
    # In one piece down to the checkpoint: what an epoch draws, computes, measures and keeps depends on what came before
    # it, and is read in that order. What stands by itself is in the functions below.
    with _reproducible(device), skipping(model, masks):
        # Without this there would be no best state to restore below.
        if config.epochs == 0:
            came = evaluate(model, data.validation)
            state.note(0, model, came.accuracy, came.loss)
        step = (_CapturedStep if _captures(config, device) else _Step)(model, optimizer, config)
        for epoch in range(state.epoch, config.epochs):
            began = time.monotonic()
            # Everything random is drawn from the seed and the epoch's number, so that a resumed training needs the
            # state of no generator. Processes draw the same order, from which each takes its share, but not the same
            # dropout.
            # A large factor keeps seeds apart: no epoch of one seed draws what an epoch of the next one does.
            draw = (seed * 1_000_003 + epoch) % 2**63
            torch.manual_seed((draw + (rank << 40)) % 2**63)
            batches = data.train.batches(
                config.batch,
                shuffle=torch.Generator().manual_seed(draw),
                augment=data.augment,
                shift=config.shift,
                device=device,
                shard=shard,
            )
            tell = _teller(progress, task, config.epochs, epoch, state.history)
            model.train()
            # The sum stays on the device: reading it after each batch would make the host wait for the accelerator.
            loss, done = torch.zeros((), dtype=torch.float64, device=device), 0
            for number, (x, y) in enumerate(batches):
                size = min(config.batch, samples - done)  # over all processes
                loss += step(x, y, size, learning_rate(config, epoch * steps + number, steps)).double()
                done += size
                tell(done, samples)
            if not done:
                raise InputError(f"{samples} training samples make no batch: at least 2 a process are needed")
            # Each process has batch norm statistics of its own; the main process's are the network's.
            _synchronise(model.buffers())
            mean = float(distributed.all_reduce(loss)) / done
            found = evaluate(model, data.validation)
            if not (math.isfinite(mean) and math.isfinite(found.loss)):
                # Running statistics may overflow where those of the batches do not: then only validation tells.
                raise InputError(
                    f"the training diverged in epoch {epoch + 1} (loss {mean}"
                    f"{f', {found.loss} on the validation set' if math.isfinite(mean) else ''}): "
                    f"lower train.lr = {config.lr}"
                )
            watched = evaluate(model, data.test).accuracy if config.watch_test else None
            first, spent = learning_rate(config, epoch * steps, steps), time.monotonic() - began
            line = Epoch(epoch + 1, first, mean, found.accuracy, found.loss, spent, watched)
            state.note(epoch + 1, model, found.accuracy, found.loss, asdict(line))
            # The checkpoint is the last thing of an epoch: whoever is killed before it does the epoch again.
            if checkpoint is not None and distributed.is_main():
                state.save(checkpoint, model, optimizer)
    # Chosen by validation, not the last epoch: a retraining may be at its best in the middle.
    restore(model, state.best)
    distributed.barrier()
    history = tuple(Epoch(**line) for line in state.history)
    peak = max((line.test_accuracy for line in history if line.test_accuracy is not None), default=None)
    return FitResult(state.best_epoch, state.best_accuracy, history, time.monotonic() - started, resumed_at, peak)


def evaluate(model: nn.Module, split: Split, *, batch: int = 1000, logits: bool = False) -> Evaluation:
    """Measure ``model`` on ``split`` in evaluation mode and float32, where the model is.

    With several processes each takes its share and all must call; with ``logits`` each takes all and none waits.
    """
    where = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    shard = (0, 1) if logits else (distributed.rank(), distributed.world())
    training, totals = model.training, torch.zeros(3, dtype=torch.float64, device=where)
    found: list[torch.Tensor] = []
    # A label beyond the outputs would make the cross-entropy fail inside a kernel, without a word that helps.
    classes = int(split.labels.max()) + 1 if len(split) else 0
    model.eval()
    with torch.no_grad():
        for x, y in split.batches(batch, device=where, shard=shard):
            out = logits_of(model(x), classes).float()
            # Summed, not averaged: batches and processes may hold different numbers of samples.
            loss = F.cross_entropy(out, y, reduction="sum")
            totals += torch.stack(
                [(out.argmax(1) == y).sum().double(), loss.double(), loss.new_tensor(len(y)).double()]
            )
            if logits:
                found.append(out.cpu())
    # Left as it was found, because a measurement must not change how the caller goes on.
    model.train(training)
    correct, loss_sum, count = (totals if logits else distributed.all_reduce(totals)).tolist()
    if count == 0:
        raise InputError("there are no samples to measure the network on")
    return Evaluation(correct / count, loss_sum / count, int(count), torch.cat(found) if logits else None)


class _Step:
    """One optimizer step, operation by operation."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        self.optimizer, self.config, self.world = optimizer, config, distributed.world()
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        # DistributedDataParallel refuses a network in which nothing needs a gradient.
        wrap = self.world > 1 and any(parameter.requires_grad for parameter in model.parameters())
        self.forward: nn.Module = DistributedDataParallel(model) if wrap else model

    def __call__(self, x: torch.Tensor, y: torch.Tensor, size: int, lr: float) -> torch.Tensor:
        """Take a step on this process's part of a batch of ``size`` samples and return the summed loss of that part."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)  # where it is: a captured step reads it there
            else:
                group["lr"] = lr
        return self.run(x.contiguous(memory_format=self.layout) if x.ndim == 4 else x, y, size)

    def run(self, x: torch.Tensor, y: torch.Tensor, size: int) -> torch.Tensor:
        """Take the step at the learning rate that is set."""
        dtype = _DTYPES[self.config.precision]
        # Without autocast's cache of converted weights, whose entries a captured step would read after their time.
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=self.caches):
            out = logits_of(self.forward(x))
        loss = F.cross_entropy(out.float(), y, reduction="sum", label_smoothing=self.config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        # Gradients are averaged over processes, so the sum over all of them is the mean over the batch.
        (loss * (self.world / size)).backward()  # type: ignore[no-untyped-call]  # not in torch's stubs
        self.optimizer.step()
        return loss.detach()

    caches = True


class _CapturedStep(_Step):
    """One optimizer step as a CUDA graph: its some hundred kernels are launched together.

    Small networks are bound by the launches. The first whole batch is run three times to let libraries choose and
    allocate, and what that did to the network and the optimizer is taken back; then the step is recorded once. Batches
    of another size, as the last of an epoch, are run operation by operation.
    """

    caches = False
    _WARM_UP = 3

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        super().__init__(model, optimizer, config)
        self.model = model
        self.graph: torch.cuda.CUDAGraph | None = None
        self.x = self.y = self.loss = torch.empty(0)

    def run(self, x: torch.Tensor, y: torch.Tensor, size: int) -> torch.Tensor:
        """Take the step, recorded if the batch is whole."""
        if size != self.config.batch:
            return super().run(x, y, size)
        if self.graph is None:
            self._capture(x, y, size)
        self.x.copy_(x)
        self.y.copy_(y)
        assert self.graph is not None  # noqa: S101  captured by the lines before
        self.graph.replay()
        # The next replay writes into the same memory.
        return self.loss.clone()

    def _capture(self, x: torch.Tensor, y: torch.Tensor, size: int) -> None:
        self.x, self.y = x.clone(memory_format=torch.preserve_format), y.clone()
        # The tensor is held beside its copy, so that its id cannot be given to another one meanwhile.
        held = {id(tensor): (tensor, tensor.detach().clone()) for tensor in self._state()}
        # CUDA graphs ask for a warm-up on a stream other than the default one, joined to it on both sides.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # not in torch's stubs
        stream.wait_stream(torch.cuda.current_stream())
        # Warming up draws dropout: the generator is put back, as if those steps had never been.
        random = torch.cuda.get_rng_state()
        with torch.cuda.stream(stream):
            for _ in range(self._WARM_UP):
                super().run(self.x, self.y, size)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for tensor in self._state():
                # What the optimizer made while warming up starts from zero, as it would have.
                tensor.copy_(held[id(tensor)][1]) if id(tensor) in held else tensor.zero_()
        torch.cuda.set_rng_state(random)
        self.graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)  # the gradients' memory becomes the graph's own
        with torch.cuda.graph(self.graph):
            self.loss = super().run(self.x, self.y, size)

    def _state(self) -> list[torch.Tensor]:
        """Return every tensor that a step changes."""
        moments = [value for held in self.optimizer.state.values() for value in held.values()]
        own = [*self.model.parameters(), *self.model.buffers(), *moments]
        return [tensor for tensor in own if isinstance(tensor, torch.Tensor)]


def _captures(config: TrainConfig, device: torch.device) -> bool:
    return config.cuda_graph and device.type == "cuda" and distributed.world() == 1


def make_optimizer(model: nn.Module, config: TrainConfig, *, captured: bool = False) -> torch.optim.Optimizer:
    """Return the optimizer of a training, over all parameters of the network.

    Args:
        model: The network.
        config: The training.
        captured: Keep the learning rate and the count of steps on the network's device, where a CUDA graph reads them.
    """
    rate: float | torch.Tensor = config.lr
    if captured:
        rate = torch.tensor(config.lr, device=next(model.parameters()).device)
    groups, fused = _groups(model, config), True
    if config.optimizer == "sgd":
        momentum, nesterov = config.momentum, config.nesterov
        return torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=nesterov, fused=fused)
    if config.optimizer == "rmsprop":
        # It has no fused form. Momentum as in the training scripts of torchvision and timm; torch's own default is 0.
        return torch.optim.RMSprop(groups, lr=rate, momentum=config.momentum, capturable=captured)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=rate, fused=fused, capturable=captured)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step, a function of nothing but its number: a resumed training needs no state.

    Args:
        config: The training; see ``TrainConfig.schedule``.
        step: Optimizer steps before this one, from 0.
        steps: Optimizer steps of an epoch.
    """
    total = max(config.epochs * steps, 1)
    rise = (config.warmup if config.warmup is not None else _RISE.get(config.schedule, 0.0) * config.epochs) * steps
    if config.schedule == "one-cycle":
        # As torch's OneCycleLR: the top is reached at step `rise` - 1, the bottom at the very last step.
        top, last = max(rise - 1, 0), max(total - 1, 1)
        if step < top:
            return _half_cosine(config.lr / _START, config.lr, step / top)
        return _half_cosine(config.lr, config.lr / _START / _END, (step - top) / max(last - top, 1))
    if step < rise:
        return config.lr * (step + 1) / (rise + 1)
    if config.schedule == "cosine":
        return _half_cosine(config.lr, 0.0, (step - rise) / max(total - rise, 1))
    return config.lr * config.gamma ** sum(milestone * steps <= step for milestone in config.milestones)


_RISE = {"one-cycle": 0.3}
"""Share of the steps that a schedule rises for where the recipe gives no warm-up."""
_START, _END = 25.0, 1e4
"""A one-cycle schedule starts at lr / 25 and ends at a ten-thousandth of that (Smith and Topin, arXiv 1708.07120;
the numbers are those of torch's OneCycleLR)."""


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def _groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Return the optimizer's groups of parameters: with ``decay = "weights"`` those of one axis are not decayed."""
    # Keyed by the decay. A decay of 0 never reaches the split below, so the two keys cannot be the same.
    groups = {config.weight_decay: list(model.parameters())}
    if config.decay == "weights" and config.weight_decay:
        weights = [parameter for parameter in groups[config.weight_decay] if parameter.ndim > 1]
        others = [parameter for parameter in groups[config.weight_decay] if parameter.ndim <= 1]
        groups = {config.weight_decay: weights, 0.0: others}
    return [{"params": held, "weight_decay": decay} for decay, held in groups.items() if held]


def _synchronise(tensors: Iterator[torch.Tensor] | list[torch.Tensor]) -> None:
    for tensor in tensors:
        distributed.broadcast(tensor.detach())


@contextlib.contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """Keep the caller's generators, and use only convolutions that give the same bits each time."""
    # Benchmarking picks kernels by their speed at the moment, which may give other bits in the next run.
    exact = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=torch.backends.cudnn.allow_tf32
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []), exact:
        yield


def _teller(
    progress: Progress | None, task: str, epochs: int, epoch: int, history: list[dict[str, Any]]
) -> Callable[[int, int], None]:
    accuracy = f", validation {100 * history[-1]['validation_accuracy']:.2f} %" if history else ""
    note = f"epoch {epoch + 1} of {epochs}{accuracy}"

    def tell(done: int, samples: int) -> None:
        if progress is not None and distributed.is_main():
            progress(task, epoch * samples + done, epochs * samples, note)

    return tell
