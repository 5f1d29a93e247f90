"""The relief loop around anybody's way to train and to measure a network.

Iteration k scores the network as it is, selects, removes what is disconnected, keeps masked what earlier iterations
masked, goes back to the initial weights where it should rewind, and retrains. Among the iterations whose validation
accuracy is within the tolerance of the dense network's, the one with the fewest connections is the result.
(arXiv 2109.10795)
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from relief_export.errors import InputError, IntegrityError
from relief_export.relief.activity import measure_activity
from relief_export.relief.disconnection import Disconnector
from relief_export.relief.journal import Iteration, Journal, from_main
from relief_export.relief.layers import connected_layers, tensor_name
from relief_export.relief.masks import Masks
from relief_export.relief.scores import score
from relief_export.relief.selection import Alpha, select
from relief_export.training import distributed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from relief_export.progress import Progress
    from relief_export.recipe import ReliefConfig

    Retrain = Callable[[nn.Module, Masks, int, Path | None], float | None]
    """Trains the network in place under masks; is given the iteration's number and where it may keep a checkpoint.
    Returns the highest test accuracy of any epoch, only to be reported, or None."""
    Measure = Callable[[nn.Module], float]
    """Returns an accuracy, a fraction."""

_ROUNDING = 1e-12
"""A loss of exactly the tolerance is allowed, whatever the last bit of the difference says."""


@dataclass(frozen=True)
class Relieved:
    """What relief found; the network's weights are those of the chosen iteration, its masked entries zero.

    Attributes:
        iteration: The chosen iteration; 0 is the dense network.
        masks: Its masks.
        history: Every iteration, the dense network first.
        tolerance: Validation accuracy that was allowed to be lost.
    """

    iteration: int
    masks: Masks
    history: tuple[Iteration, ...]
    tolerance: float

    @property
    def chosen(self) -> Iteration:
        """The row of the chosen iteration."""
        return self.history[self.iteration]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a record; masks are a file of their own."""
        return {
            "iteration": self.iteration,
            "tolerance": self.tolerance,
            "history": [asdict(row) for row in self.history],
        }


@dataclass(frozen=True)
class Loop:
    """The relief loop around anybody's way to train and to measure a network.

    Attributes:
        calibration: Batches (tensors, or tuples whose first item is the input) that can be gone through repeatedly.
        retrain: Trains in place; must leave masked entries zero (``masks.apply_`` after each optimizer step).
        evaluate: The accuracy that choices are made by.
        test: An accuracy that is only reported.
        key: What else the iterations depend on: an interrupted loop goes on only where this is the same.
    """

    calibration: Iterable[Any]
    retrain: Retrain
    evaluate: Measure
    test: Measure | None = None
    key: Mapping[str, Any] | None = None

    def run(
        self,
        model: nn.Module,
        config: ReliefConfig,
        *,
        init: Mapping[str, Tensor] | None = None,
        masks: Masks | None = None,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> Relieved:
        """Relieve ``model`` in place; see `relieve` for the arguments. ``masks`` are what is masked from the start.

        Raises:
            InputError: Rewinding without initial weights, an empty calibration set, or a setting that fits no layer.
        """
        if config.rewind and init is None:
            raise InputError("relief.rewind needs the network's initial weights")
        start = masks or Masks()
        start.apply_(model)
        return _Run(self, model, config, init, Journal(folder), progress=progress).run(start)


class _Run:
    """One loop in progress; ``states`` holds the weights of the latest iteration and of the best so far."""

    def __init__(
        self,
        loop: Loop,
        model: nn.Module,
        config: ReliefConfig,
        init: Mapping[str, Tensor] | None,
        journal: Journal,
        *,
        progress: Progress | None,
    ) -> None:
        self.loop, self.model, self.config, self.journal, self.progress = loop, model, config, journal, progress
        self.init = {name: tensor.clone() for name, tensor in init.items()} if init is not None else None
        self.alpha = Alpha(config.alpha_conv, config.alpha_fc, config.alpha, config.skip)
        self.states: dict[int, tuple[dict[str, Tensor], Masks]] = {}
        self.disconnector: Disconnector | None = None
        self.unknown: dict[str, int] = {}

    def run(self, start: Masks) -> Relieved:
        found = self.journal.open(self._key(start))
        rows = [replace(row, within_tolerance=self._within(found, row.accuracy)) for row in found]
        if rows != found:
            self.journal.record(rows)
        self.states[0] = _state(self.model), start
        if not rows:
            rows = [self._finish([], start, {}, None, started=time.perf_counter())]
        for iteration in sorted({best_of(rows), len(rows) - 1} - {0}):  # the latest last: the loop goes on from it
            self._resume(iteration)
        masks = self.states[len(rows) - 1][1]
        while len(rows) <= self.config.iterations and not self._given_up(rows):
            self._tell(rows)
            masks = self._iterate(rows, masks)
        self._tell(rows)
        best = best_of(rows)
        state, masks = self.states[best]
        self.model.load_state_dict(state)
        return Relieved(best, masks, tuple(rows), self.config.tolerance)

    def _resume(self, iteration: int) -> None:
        masks = self.journal.masks(iteration)
        if masks is None:
            raise IntegrityError(f"the masks of iteration {iteration} are gone: remove the folder to start afresh")
        self.journal.load(iteration, self.model)
        self.states[iteration] = _state(self.model), masks

    def _iterate(self, rows: list[Iteration], masks: Masks) -> Masks:
        """Prune and retrain once, append the row and return the new masks."""
        iteration, started = len(rows), time.perf_counter()
        seconds: dict[str, float] = {}
        found = self.journal.masks(iteration)
        masks = found if found is not None else self._prune(masks, seconds)
        self.journal.begin(iteration, masks)
        masks.apply_(self.model)
        before = self.loop.evaluate(self.model)
        if self.config.rewind and self.init is not None:
            self.model.load_state_dict(self.init)
            masks.apply_(self.model)
        with _timed(seconds, "retraining"):
            peak = self.loop.retrain(self.model, masks, iteration, self.journal.checkpoint(iteration))
        if revived := masks.apply_(self.model):
            names = ", ".join(revived)
            raise InputError(f"the retraining let masked entries of {names} grow: apply_ the masks after each step")
        rows.append(self._finish(rows, masks, seconds, before, started=started, peak=peak))
        return masks

    def _prune(self, masks: Masks, seconds: dict[str, float]) -> Masks:
        """Score, select and remove what is disconnected; what is masked stays masked."""
        with _timed(seconds, "scoring"):
            activity = measure_activity(self.model, self.loop.calibration, samples=self.config.samples)
            scores = score(self.model, activity, position_norm=self.config.position_norm)
            selected = from_main(lambda: masks & select(scores, self.alpha))
        with _timed(seconds, "disconnection"):
            return from_main(lambda: self._disconnect(selected))

    def _disconnect(self, masks: Masks) -> Masks:
        if self.disconnector is None:
            self.disconnector = Disconnector(self.model, _example(self.loop.calibration))
        found = self.disconnector(self.model, masks)
        self.unknown = found.unknown
        return found.masks

    def _finish(
        self,
        rows: Sequence[Iteration],
        masks: Masks,
        seconds: dict[str, float],
        before: float | None,
        *,
        started: float,
        peak: float | None = None,
    ) -> Iteration:
        """Measure and record the network as it is now."""
        accuracy = self.loop.evaluate(self.model)
        test = self.loop.test(self.model) if self.loop.test else None
        count = masks.count(self.model)
        row = from_main(
            lambda: Iteration(
                iteration=len(rows),
                accuracy_before=before,
                accuracy=accuracy,
                test_accuracy=test,
                peak_test_accuracy=peak,
                dense=count.dense,
                kept=count.kept,
                within_tolerance=self._within(rows, accuracy),
                layers=_architecture(self.model, masks),
                unknown=self.unknown,
                seconds={**seconds, "all": time.perf_counter() - started},
            )
        )
        best = best_of([*rows, row])
        self.states = {k: state for k, state in self.states.items() if k == best}
        self.states[row.iteration] = _state(self.model), masks
        self.journal.finish([*rows, row], self.model)
        return row

    def _within(self, rows: Sequence[Iteration], accuracy: float) -> bool:
        return not rows or accuracy >= rows[0].accuracy - self.config.tolerance - _ROUNDING

    def _given_up(self, rows: Sequence[Iteration]) -> bool:
        patience = self.config.patience
        return patience is not None and len(rows) > patience and not any(r.within_tolerance for r in rows[-patience:])

    def _key(self, start: Masks) -> dict[str, Any]:
        """Return what the iterations depend on: not their number, nor what only chooses among them."""
        chooses = {"iterations", "patience", "tolerance"}
        config = {k: v for k, v in asdict(self.config).items() if k not in {*chooses, "retrain"}}
        key = {"version": 1, "config": config, **(self.loop.key or {})}
        key |= {"start": _digest(self.model.state_dict()), "masks": _digest(start), "init": _digest(self.init or {})}
        plain: dict[str, Any] = json.loads(json.dumps(key))
        return plain

    def _tell(self, rows: Sequence[Iteration]) -> None:
        if self.progress is not None and distributed.is_main():
            last = rows[-1]
            note = f"{last.kept / last.dense:.1%} of connections kept, validation accuracy {last.accuracy:.2%}"
            self.progress("relief", len(rows) - 1, self.config.iterations, note)


def best_of(rows: Sequence[Iteration]) -> int:
    """Return the iteration with the fewest connections within the tolerance; among equals the most accurate."""
    return min((r.kept, -r.accuracy, r.iteration) for r in rows if r.within_tolerance)[2]


def _architecture(model: nn.Module, masks: Masks) -> dict[str, dict[str, int]]:
    """Return, for each layer, its connections and how many of its neurons have any left."""
    counts, layers = masks.count_layers(model), {}
    for name, layer in connected_layers(model):
        neurons, mask = len(layer.weight), masks.get(tensor_name(name, "weight"))
        alive = neurons if mask is None else int(mask.flatten(1).any(dim=1).sum())
        layers[name] = {**counts[name].to_dict(), "neurons": neurons, "alive": alive}
    return layers


def _example(batches: Iterable[Any]) -> Tensor:
    batch = next(iter(batches))
    x: Tensor = batch[0] if isinstance(batch, (tuple, list)) else batch
    return x[:1]


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
