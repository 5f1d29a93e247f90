"""The built-in retraining on anybody's batches and for other tasks than classification.

`training.fit` trains the classifiers of the recipes, on splits in memory, in several processes, resumable at the epoch.
Here is the plain loop for the rest: batches as a DataLoader yields them, a task with its loss and its metric, the same
optimizers and schedules. An interrupted relief goes on at the round.

A metric is at most 1, and higher is better: the relief's accuracy_drop is a difference of it::

    classification   share of right classes             outputs (n, classes), labels (n,)
    regression       R² = 1 - Σ(ŷ - y)² / Σ(y - ȳ)²      outputs and labels of one shape
    multilabel       F1 over all decisions              outputs (n, labels), labels of zeros and ones
    segmentation     mean over classes of IoU           outputs (n, classes, H, W), labels (n, H, W), 255 ignored
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F  # noqa: N812  the field's name for it
from torch import Tensor

from relief_export.calling import batch_size, like, outputs_of, run_batch
from relief_export.errors import InputError
from relief_export.relief.activity import evaluating
from relief_export.relief.loop import Loop
from relief_export.schema import did_you_mean
from relief_export.state import bare, describe, first_line, mask_enforcer, restore, snapshot
from relief_export.training.fit import learning_rate, make_optimizer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from relief_export.calling import Forward, Output
    from relief_export.progress import Progress
    from relief_export.recipe import ReliefConfig, TrainConfig
    from relief_export.relief.masks import Masks

Task = Literal["classification", "regression", "multilabel", "segmentation"]
Loss: TypeAlias = Callable[[Any, Any], Tensor]
"""``loss(outputs, labels)`` of a batch, a mean over its samples."""
Metric: TypeAlias = Callable[[Any, Any], "float | Tensor"]
"""``metric(outputs, labels)`` of a batch, at most 1, higher is better; batches are averaged by their samples."""

_LABELS = ("labels", "label", "targets", "target", "y")
"""Keys under which a batch that is a mapping may keep its labels."""
_IGNORED = 255
"""Class of the pixels that nobody has labelled, by the habit of the segmentation data sets."""


class _Counts:
    """Sums over batches from which a metric follows."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, sums: Tensor) -> None:
        """Add the sums of a batch, float64; a batch with more classes makes room for them."""
        sums = sums.detach().double().cpu()
        if self.sums is None or self.sums.shape == sums.shape:
            self.sums = sums if self.sums is None else self.sums + sums
            return
        size = max(len(self.sums), len(sums))
        self.sums = sum(F.pad(part, (0, 0, 0, size - len(part))) for part in (self.sums, sums))  # type: ignore[assignment]


def _right(outputs: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([(outputs.argmax(1) == labels).sum(), torch.tensor(len(labels), device=labels.device)])


def _squares(outputs: Tensor, labels: Tensor) -> Tensor:
    error, y = (outputs.double() - labels.double()), labels.double()
    count = torch.tensor(float(y.numel()), dtype=torch.float64, device=y.device)
    # Sums and not a mean of R² over batches: the variance of the labels is that of the whole set.
    return torch.stack([error.square().sum(), y.sum(), y.square().sum(), count])


def _decisions(outputs: Tensor, labels: Tensor) -> Tensor:
    # The loss takes logits, and a logit above 0 is a probability above one half.
    chosen, wanted = outputs > 0, labels > 0.5
    return torch.stack([(chosen & wanted).sum(), (chosen != wanted).sum()])


def _overlaps(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return for each class (true positives, false positives and negatives), (classes, 2)."""
    known = labels != _IGNORED
    chosen, wanted = outputs.argmax(1)[known], labels[known]
    classes = outputs.shape[1]
    both = torch.bincount(wanted[chosen == wanted], minlength=classes)
    either = torch.bincount(wanted, minlength=classes) + torch.bincount(chosen, minlength=classes) - both
    return torch.stack([both, either - both], dim=1)


def _share(sums: Tensor) -> float:
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def _explained(sums: Tensor) -> float:
    error, total, squares, count = sums.tolist()
    spread = squares - total**2 / count
    return 1 - error / spread if spread > 0 else math.nan


def _f1(sums: Tensor) -> float:
    return float(2 * sums[0] / (2 * sums[0] + sums[1])) if sums.any() else math.nan


def _mean_overlap(sums: Tensor) -> float:
    # A class that neither occurs nor is predicted would be 0 / 0.
    there = sums[sums.sum(1) > 0]
    return float((there[:, 0] / there.sum(1)).mean()) if len(there) else math.nan


def _segmentation_loss(outputs: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(outputs, labels, ignore_index=_IGNORED, label_smoothing=label_smoothing)


@dataclass(frozen=True)
class _Kind:
    """What belongs to a task: its loss, the sums of a batch, the metric of the sums, and whether labels are classes."""

    loss: Loss
    sums: Callable[[Tensor, Tensor], Tensor]
    metric: Callable[[Tensor], float]
    classes: bool


_TASKS: dict[str, _Kind] = {
    "classification": _Kind(F.cross_entropy, _right, _share, classes=True),
    "regression": _Kind(F.mse_loss, _squares, _explained, classes=False),
    "multilabel": _Kind(F.binary_cross_entropy_with_logits, _decisions, _f1, classes=False),
    "segmentation": _Kind(_segmentation_loss, _overlaps, _mean_overlap, classes=True),
}


@dataclass(frozen=True)
class Retraining:
    """Trains and measures a network on batches.

    Attributes:
        train, validation, test: Batches that can be gone through again and again; ``test`` may be absent.
        config: Optimizer, schedule and epochs.
        task: Which loss and metric, where they are not given.
        loss, metric: One's own.
        forward, output: How the network is called on a batch, and which of its outputs the loss is given.
        seed: Draws what the network itself draws, such as dropout.
    """

    train: Iterable[Any]
    validation: Iterable[Any]
    test: Iterable[Any] | None
    config: TrainConfig
    task: Task = "classification"
    loss: Loss | None = None
    metric: Metric | None = None
    forward: Forward | None = None
    output: Output | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in _TASKS:
            raise InputError(f"there is no task {self.task!r}{did_you_mean(str(self.task), get_args(Task))}")
        smoothable = self.loss is None and _TASKS[self.task].classes
        for key, possible in (("label_smoothing", smoothable), ("channels_last", False), ("watch_test", False)):
            if getattr(self.config, key) and not possible:
                raise InputError(f"train.{key} is for tensors of classes trained by this package: leave it out here")
        for name, batches in (("train", self.train), ("validation", self.validation), ("test", self.test)):
            # An iterator would be empty from the second epoch on, and nothing would say so.
            if isinstance(batches, Iterator):
                raise InputError(
                    f"the batches of {name!r} can be gone through only once: give a list of batches or a DataLoader"
                )

    def fit(self, model: nn.Module, masks: Masks, number: int, progress: Progress | None, name: str) -> None:
        """Train in place under masks; the best epoch by validation is loaded at the end."""
        config, enforce = self.config, mask_enforcer(model, masks)
        optimizer = make_optimizer(model, config)
        loss_of: Callable[..., Any] = self.loss or _TASKS[self.task].loss
        if config.label_smoothing:
            # Smoothing spreads a target over classes: no other loss knows the word.
            if self.loss is not None or not _TASKS[self.task].classes:
                raise InputError("label_smoothing belongs to the built-in losses of classes: leave it at 0 for another")
            loss_of = partial(loss_of, label_smoothing=config.label_smoothing)
        # With no epoch at all, or a metric that is NaN each time, the network stays as it was.
        best, best_metric = snapshot(model), -math.inf
        steps = _length(self.train)
        with torch.random.fork_rng(devices=[]):
            for epoch in range(config.epochs):
                # From the epoch's number, as in `fit`, so that an epoch draws the same whatever went before it.
                torch.manual_seed((self.seed + number) * 1_000_003 + epoch)
                model.train()
                for step, batch in enumerate(self.train):
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(config, epoch * steps + step, steps)
                    with torch.autocast(_device(model), torch.bfloat16, enabled=config.precision == "bf16"):
                        outputs, labels = self._run(model, batch)
                        loss = self._checked(loss_of, outputs, labels)
                    if not bool(torch.isfinite(loss)):
                        raise InputError(f"the training diverged in epoch {epoch + 1} (loss {float(loss)}): lower lr")
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    enforce()
                    if progress is not None:
                        note = f"epoch {epoch + 1} of {config.epochs}, loss {float(loss.detach()):.3g}"
                        progress(name, epoch * steps + step + 1, config.epochs * steps, note)
                if (metric := self.measure(model, self.validation)) > best_metric:
                    best, best_metric = snapshot(model), metric
        restore(model, best)

    def measure(self, model: nn.Module, batches: Iterable[Any]) -> float:
        """Return the metric over batches, in evaluation mode."""
        kind, counts = _TASKS[self.task], _Counts()
        with evaluating(bare(model)), torch.no_grad():
            for batch in batches:
                outputs, labels = self._run(model, batch)
                if self.metric is None:
                    counts.add(self._checked(kind.sums, outputs, labels))
                else:
                    value = float(self._checked(self.metric, outputs, labels))
                    size = batch_size(batch)
                    counts.add(torch.tensor([value * size, size]))
        if counts.sums is None:
            raise InputError("there are no samples to measure the network on")
        return _share(counts.sums) if self.metric is not None else kind.metric(counts.sums)

    def _run(self, model: nn.Module, batch: Any) -> tuple[Any, Any]:  # noqa: ANN401  any form of batch
        """Return the outputs that the loss is given, one tensor where there is one, and the labels, on its device."""
        found = outputs_of(model, run_batch(model, batch, self.forward), self.output)
        outputs: Any = next(iter(found.values())) if len(found) == 1 else found
        labels = like(model, _labels(batch))
        if isinstance(outputs, Tensor) and isinstance(labels, Tensor) and self.loss is None:
            # Only for the losses of this package: a user's own loss is given what the batches hold.
            labels = labels.long() if _TASKS[self.task].classes else labels.to(outputs.dtype)
        return outputs, labels

    def _checked(self, function: Callable[[Any, Any], Any], outputs: Any, labels: Any) -> Any:  # noqa: ANN401
        try:
            return function(outputs, labels)
        except Exception as error:
            own = "" if self.loss or self.metric else f"; the task is {self.task}, see task="
            shapes = f"outputs {describe(outputs)} and labels {describe(labels)}"
            raise InputError(f"{shapes} do not go together: {first_line(error)}{own}") from error


def _labels(batch: Any) -> Any:  # noqa: ANN401  any form of batch
    """Return the labels of a batch: the last item of a tuple, or the entry of that name."""
    if isinstance(batch, Mapping):
        name = next((name for name in _LABELS if name in batch), None)
        if name is None:
            raise InputError(f"a batch has no labels: it has the keys {', '.join(map(str, batch))}, not 'labels'")
        return batch[name]
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[-1]
    raise InputError("a batch has no labels: give tuples (inputs, labels), or dictionaries with 'labels'")


def _device(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


def _length(batches: Iterable[Any]) -> int:
    return len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)


class _Seeded:
    """Batches in the same order each time: those that calibrate must not depend on how often they were asked for."""

    def __init__(self, batches: Iterable[Any], seed: int) -> None:
        self._batches, self._seed = batches, seed

    def __iter__(self) -> Iterator[Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            yield from self._batches


def batches_loop(
    retraining: Retraining, config: ReliefConfig, *, progress: Progress | None = None, frozen: bool = False
) -> Loop:
    """Return the relief loop that retrains and measures on batches.

    Args:
        retraining: The data, the task and the training.
        config: The loop's settings.
        progress: Called as ``progress(task, done, total, note)``.
        frozen: Whether layers whose weight needs no gradient are relieved too.
    """

    def retrain(model: nn.Module, masks: Masks, number: int, _checkpoint: Path | None) -> None:
        retraining.fit(model, masks, number, progress, f"retrain {number}/{config.rounds}")

    test = retraining.test
    return Loop(
        calibration=_Seeded(retraining.train, retraining.seed),
        retrain=retrain,
        evaluate=lambda model: retraining.measure(model, retraining.validation),
        test=None if test is None else lambda model: retraining.measure(model, test),
        key={"retrain": asdict(retraining.config), "seed": retraining.seed, "task": retraining.task},
        forward=retraining.forward,
        output=retraining.output,
        frozen=frozen,
    )
