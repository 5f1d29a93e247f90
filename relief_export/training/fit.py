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
    device = distributed.device()
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    _synchronise([*model.parameters(), *model.buffers()])
    enforce = mask_enforcer(model, masks or {})
    enforce()
    optimizer = make_optimizer(model, config)
    optimizer.register_step_post_hook(lambda *_: enforce())
    state = Checkpoint(fingerprint(model, masks or {}, asdict(config), seed, data.train.labels))
    if checkpoint is not None and checkpoint.exists():
        state.resume(checkpoint, model, optimizer)
    resumed_at = state.epoch
    with _reproducible(device), skipping(model, masks or {}):
        if config.epochs == 0:
            came = evaluate(model, data.validation)
            state.note(0, model, came.accuracy, came.loss)
        loop = _Loop(model, optimizer, data, config, seed=seed, device=device)
        for epoch in range(state.epoch, config.epochs):
            line = loop.run(epoch, _teller(progress, task, config.epochs, epoch, state.history))
            state.note(epoch + 1, model, line.validation_accuracy, line.validation_loss, asdict(line))
            if checkpoint is not None and distributed.is_main():
                state.save(checkpoint, model, optimizer)
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
    classes = int(split.labels.max()) + 1 if len(split) else 0
    model.eval()
    with torch.no_grad():
        for x, y in split.batches(batch, device=where, shard=shard):
            out = logits_of(model(x), classes).float()
            loss = F.cross_entropy(out, y, reduction="sum")
            totals += torch.stack(
                [(out.argmax(1) == y).sum().double(), loss.double(), loss.new_tensor(len(y)).double()]
            )
            if logits:
                found.append(out.cpu())
    model.train(training)
    correct, loss_sum, count = (totals if logits else distributed.all_reduce(totals)).tolist()
    if count == 0:
        raise InputError("there are no samples to measure the network on")
    return Evaluation(correct / count, loss_sum / count, int(count), torch.cat(found) if logits else None)


class _Loop:
    """What stays the same from epoch to epoch."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: DataSet,
        config: TrainConfig,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self.model, self.optimizer, self.data, self.config = model, optimizer, data, config
        self.seed, self.device, self.world = seed, device, distributed.world()
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        wrap = self.world > 1 and any(parameter.requires_grad for parameter in model.parameters())
        self.forward: nn.Module = DistributedDataParallel(model) if wrap else model

    def run(self, epoch: int, tell: Callable[[int, int], None]) -> Epoch:
        """Run epoch number ``epoch``, from 0, and measure it."""
        started = time.monotonic()
        config, train = self.config, self.data.train
        steps = train.steps(config.batch, world=self.world)
        first = learning_rate(config, epoch * steps, steps)
        seed = self.seed * 1_000_003 + epoch
        generator = torch.Generator().manual_seed(seed % 2**63)
        torch.manual_seed((seed + (distributed.rank() << 40)) % 2**63)  # what the model draws
        self.model.train()
        total, done = torch.zeros((), dtype=torch.float64, device=self.device), 0
        shard = (distributed.rank(), self.world)
        batches = train.batches(
            config.batch, shuffle=generator, augment=self.data.augment, device=self.device, shard=shard
        )
        for number, (x, y) in enumerate(batches):
            size = min(config.batch, len(train) - done)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(config, epoch * steps + number, steps)
            total += self.step(x, y, size).double()
            done += size
            tell(done, len(train))
        _synchronise(self.model.buffers())  # each process has its own batch norm statistics
        mean = float(distributed.all_reduce(total)) / done if done else math.nan
        found = evaluate(self.model, self.data.validation)
        self.check(epoch, done, mean, found.loss)
        watched = evaluate(self.model, self.data.test).accuracy if config.watch_test else None
        return Epoch(epoch + 1, first, mean, found.accuracy, found.loss, time.monotonic() - started, watched)

    def step(self, x: torch.Tensor, y: torch.Tensor, size: int) -> torch.Tensor:
        """Take one optimizer step on this process's part of a batch of ``size`` samples; return its summed loss."""
        with torch.autocast(self.device.type, _DTYPES[self.config.precision], enabled=self.config.precision != "fp32"):
            out = logits_of(self.forward(x.contiguous(memory_format=self.layout) if x.ndim == 4 else x))
        loss = F.cross_entropy(out.float(), y, reduction="sum", label_smoothing=self.config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        # Gradients are averaged over processes, so the sum over all of them is the mean over the batch.
        (loss * (self.world / size)).backward()  # type: ignore[no-untyped-call]  # not in torch's stubs
        self.optimizer.step()
        return loss.detach()

    def check(self, epoch: int, done: int, *losses: float) -> None:
        """Refuse an epoch that had no batch or diverged."""
        if not done:
            raise InputError(f"{len(self.data.train)} training samples make no batch: at least 2 a process are needed")
        if not all(map(math.isfinite, losses)):
            raise InputError(
                f"the training diverged in epoch {epoch + 1} (loss {losses[0]}): lower train.lr = {self.config.lr}"
            )


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a training, over all parameters of the network."""
    return _OPTIMIZERS[config.optimizer](_groups(model, config), config)


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
    groups = {config.weight_decay: list(model.parameters())}
    if config.decay == "weights" and config.weight_decay:
        weights = [parameter for parameter in groups[config.weight_decay] if parameter.ndim > 1]
        others = [parameter for parameter in groups[config.weight_decay] if parameter.ndim <= 1]
        groups = {config.weight_decay: weights, 0.0: others}
    return [{"params": held, "weight_decay": decay} for decay, held in groups.items() if held]


def _adam(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=config.lr, fused=True)


def _adamw(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def _sgd(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)


_OPTIMIZERS = {"adam": _adam, "adamw": _adamw, "sgd": _sgd}


def _synchronise(tensors: Iterator[torch.Tensor] | list[torch.Tensor]) -> None:
    for tensor in tensors:
        distributed.broadcast(tensor.detach())


@contextlib.contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """Keep the caller's generators, and use only convolutions that give the same bits each time."""
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
