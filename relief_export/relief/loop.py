"""The relief loop around anybody's way to train and to measure a network.

Round k scores the network as it is, selects, removes what is disconnected, keeps masked what earlier rounds
masked, goes back to the initial weights where it should rewind, and retrains. Among the rounds whose validation
accuracy is at most ``accuracy_drop`` below the dense network's, the one with the fewest connections is the result.
(arXiv 2109.10795)
"""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from relief_export.calling import first_samples, inputs_of
from relief_export.errors import InputError, IntegrityError
from relief_export.layers import (
    check_globs,
    connected_layers,
    joins,
    outputs_first,
    tensor_name,
)
from relief_export.printing import Prints, TextTable, percent, points
from relief_export.records import as_read
from relief_export.relief.activity import measure_activity
from relief_export.relief.disconnection import Disconnector
from relief_export.relief.history import History, Round, from_main
from relief_export.relief.masks import Masks
from relief_export.relief.scores import Scores, random_scores, score, size_scores
from relief_export.relief.selection import Alpha, select, select_largest
from relief_export.state import apply_masks, bare, digest_of, restore, snapshot, tensors_of
from relief_export.training import distributed, fit

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from relief_export.calling import Forward, Output
    from relief_export.progress import Progress
    from relief_export.recipe import ReliefConfig, TrainConfig
    from relief_export.training.data import DataSet, Split

    Retrain = Callable[[nn.Module, Masks, int, Path | None], float | None]
    """Trains the network in place under masks; is given the round's number and where it may keep a checkpoint.
    Returns the highest test accuracy of any epoch, only to be reported, or None."""
    Measure = Callable[[nn.Module], float]
    """Returns an accuracy, a fraction."""

CALIBRATION_BATCH = 100

_ROUNDING = 1e-12
"""A loss of exactly what is allowed passes, whatever the last bit of the difference says."""
_BISECTIONS = 12
"""Steps towards a given share of connections: to within a 4,000th of all of them."""
_ONLY_CHOOSES = frozenset({"rounds", "patience", "accuracy_drop"})
"""Settings on which no round depends: they say how many there are, and which of them is the result."""


@dataclass(frozen=True)
class Relieved(Prints):
    """What relief found; the network's weights are those of the chosen round, its masked entries zero.

    Attributes:
        round: The chosen round; 0 is the dense network.
        masks: Its masks.
        history: Every round, the dense network first.
        accuracy_drop: Validation accuracy that was allowed to be lost.
        left_whole: Module name -> why relief did not touch its weights; of the network itself the parameter's name.
    """

    round: int
    masks: Masks
    history: tuple[Round, ...]
    accuracy_drop: float
    left_whole: dict[str, str] = field(default_factory=dict)

    @property
    def chosen(self) -> Round:
        """The row of the chosen round."""
        return self.history[self.round]

    def table(self) -> TextTable:
        """Return the rounds as a table; the chosen one is marked."""
        rows = [
            (
                f"{row.round}{' <- chosen' if row.round == self.round else ''}",
                f"{row.kept:,}",
                percent(row.kept / row.dense),
                percent(row.accuracy_before),
                percent(row.accuracy),
                *((percent(row.test_accuracy),) if self.history[0].test_accuracy is not None else ()),
            )
            for row in self.history
        ]
        columns = ["round", "weights", "density", "before retraining", "accuracy"]
        columns += ["test"] if self.history[0].test_accuracy is not None else []
        chosen = self.chosen
        whole = f"; left whole: {', '.join(self.left_whole)}" if self.left_whole else ""
        density = f"density {percent(chosen.kept / chosen.dense)} ({chosen.kept:,} of {chosen.dense:,} weights)"
        note = f"; {self.note}" if self.note else ""
        title = f"{density}, accuracy {percent(chosen.accuracy)}{note}{whole}"
        return TextTable(title, columns, rows)

    @property
    def note(self) -> str:
        """Why the dense network is the result although there were rounds; empty where one of them was acceptable."""
        if len(self.history) == 1 or any(row.eligible for row in self.history[1:]):
            return ""
        return (
            f"no round stayed within {points(self.accuracy_drop)} of the dense network: give more epochs, smaller "
            "steps (larger alpha_conv and alpha_fc, or larger shares in keep) or a larger accuracy_drop"
        )

    def plot(self, axes: Any = None) -> Any:  # noqa: ANN401  matplotlib's axes, which are untyped here
        """Draw accuracy over density, one point a round, and return the axes.

        Args:
            axes: Matplotlib axes to draw into; by default those of a new figure.
        """
        import matplotlib.pyplot as plt  # noqa: PLC0415  nobody waits for it who does not draw

        axes = axes if axes is not None else plt.subplots()[1]
        density = [row.kept / row.dense for row in self.history]
        axes.plot(density, [row.accuracy for row in self.history], marker="o", label="validation")
        if self.history[0].test_accuracy is not None:
            axes.plot(density, [row.test_accuracy for row in self.history], marker="s", label="test")
        axes.axhline(self.history[0].accuracy - self.accuracy_drop, linestyle=":", color="grey", label="lowest allowed")
        axes.plot(density[self.round], self.chosen.accuracy, marker="o", markersize=14, fillstyle="none", color="black")
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_xlabel("density (share of weights kept)")
        axes.set_ylabel("accuracy")
        axes.legend()
        return axes

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a record; masks are a file of their own."""
        return {
            "chosen": self.round,
            "accuracy_drop": self.accuracy_drop,
            "history": [asdict(row) for row in self.history],
            "left_whole": self.left_whole,
            "note": self.note,
        }


@dataclass(frozen=True)
class Loop:
    """The relief loop around anybody's way to train and to measure a network.

    Attributes:
        calibration: Batches, of the forms that `calling` lists, that can be gone through repeatedly.
        retrain: Trains in place; must leave masked entries zero (``masks.apply_`` after each optimizer step).
        evaluate: The accuracy that choices are made by.
        test: An accuracy that is only reported.
        key: What else the rounds depend on: an interrupted loop goes on only where this is the same.
        forward, output: How the network is called on a batch, and what of its outputs counts.
        frozen: Whether layers whose weight needs no gradient are relieved too.
    """

    calibration: Iterable[Any]
    retrain: Retrain
    evaluate: Measure
    test: Measure | None = None
    key: Mapping[str, Any] | None = None
    forward: Forward | None = None
    output: Output | None = None
    frozen: bool = False

    def run(
        self,
        model: nn.Module,
        config: ReliefConfig,
        *,
        init: Mapping[str, Tensor] | None = None,
        masks: Masks | None = None,
        folder: Path | None = None,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Relieved:
        """Relieve ``model`` in place.

        Args:
            model: The dense, trained network, or a wrapper of it.
            config: The loop's settings.
            init: The initial weights; needed to rewind.
            masks: What is masked from the start.
            folder: Where history, masks and weights of the rounds are kept; an interrupted loop goes on from there.
            force: Remove the rounds of other settings from the folder.
            progress: Called as ``progress(task, done, total, note)``, in the main process.

        Raises:
            InputError: Rewinding without initial weights, an empty calibration set, a setting that fits no layer, a
                network that cannot be captured, or a folder of other settings.
        """
        if config.rewind and init is None:
            raise InputError("relief.rewind needs the network's initial weights")
        check_layers(model, config, frozen=self.frozen)
        start = masks or Masks()
        # Before the dense network is measured, because what is masked from the start is no part of it.
        apply_masks(model, start)
        return _Run(self, model, config, init, History(folder), progress=progress).run(start, force=force)


def check_layers(model: nn.Module, config: ReliefConfig, *, frozen: bool = False) -> None:
    """Refuse settings that fit no layer of the network, before any time is spent on it.

    Args:
        model: The network.
        config: The loop's settings.
        frozen: Whether layers whose weight needs no gradient are relieved too.

    Raises:
        InputError: A pattern of ``relief.alpha`` or ``relief.skip`` matches no layer and no join, or no layer is left
            to be relieved.
    """
    layers = dict(connected_layers(model))
    if not layers:
        raise InputError(
            f"{type(bare(model)).__name__} has no linear or convolution layer: there is nothing to relieve"
        )
    # Joins too: they have scores of their own, and may be skipped or given an α.
    names = [*layers, *(name for name, _ in joins(model))]
    check_globs(config.alpha, names, "relief.alpha")
    check_globs(config.skip, names, "relief.skip")
    whole = _left_whole(model, config.skip, frozen=frozen)
    # Every round would otherwise be the dense network, trained again.
    if set(layers) <= set(whole):
        raise InputError(
            f"every layer of {type(bare(model)).__name__} is left whole ({next(iter(layers))!r} is "
            f"{whole[next(iter(layers))]}): relieve frozen layers with relieve_frozen=True, or skip fewer"
        )


def _left_whole(model: nn.Module, skip: Sequence[str], *, frozen: bool) -> dict[str, str]:
    """Return which modules with weights relief does not touch, and why."""
    layers = dict(connected_layers(model))
    found: dict[str, str] = {}
    for name, module in bare(model).named_modules():
        kind = type(module).__name__
        if name not in layers:
            held = [own for own, parameter in module.named_parameters(recurse=False) if parameter.ndim > 1]
            if held and name:
                found[name] = f"{kind}, whose connections are not scored"
            # The network itself has no name: what it holds beside its layers, such as embeddings of positions, has.
            elif held:
                found |= dict.fromkeys(held, f"a parameter of {kind} itself, whose connections are not scored")
        elif _any_matches(name, skip):
            found[name] = f"{kind}, which relief.skip names"
        elif not frozen and not layers[name].weight.requires_grad:
            found[name] = f"{kind} that is frozen"
    # Joins have no weights; a skipped one is left whole too.
    return found | {name: "a join, which relief.skip names" for name, _ in joins(model) if _any_matches(name, skip)}


class _Run:
    """One loop in progress; ``states`` holds the weights of the latest round and of the best so far."""

    def __init__(
        self,
        loop: Loop,
        model: nn.Module,
        config: ReliefConfig,
        init: Mapping[str, Tensor] | None,
        history: History,
        *,
        progress: Progress | None,
    ) -> None:
        self.loop, self.model, self.config, self.past, self.progress = loop, model, config, history, progress
        own = tensors_of(model)
        # Clones, because the initial weights given may be the tensors of the very network that is trained.
        self.init = {name: init[name].clone() for name in own if name in init} if init is not None else None
        self.alpha = Alpha(config.alpha_conv, config.alpha_fc, config.alpha)
        # A layer that is left whole is not measured, not selected from and not cleared of what is disconnected.
        self.left_whole = _left_whole(model, config.skip, frozen=loop.frozen)
        self.states: dict[int, tuple[dict[str, Any], Masks]] = {}
        self.disconnector: Disconnector | None = None
        self.unknown: dict[str, int] = {}

    def run(self, start: Masks, *, force: bool) -> Relieved:
        found = self.past.open(self._key(start), force=force)
        rows = [replace(row, eligible=self._within(found, row.accuracy)) for row in found]
        # Another accuracy_drop gives other verdicts on the same rounds, which need no new training.
        if rows != found:
            self.past.record(rows)
        # Later rounds that a longer loop left behind stay in the folder and are not looked at.
        rows = self._wanted(rows)
        self.states[0] = snapshot(self.model), start
        if not self._done(rows):
            from_main(self._capture)  # a network that cannot be captured is known before hours are spent on it
        if not rows:
            rows = [self._finish([], start, {}, None, started=time.perf_counter())]
        for number in sorted({best_of(rows), len(rows) - 1} - {0}):  # the latest last: the loop goes on from it
            self._resume(number)
        masks = self.states[len(rows) - 1][1]
        while not self._done(rows):
            self._tell(rows)
            masks = self._iterate(rows, masks)
        self._tell(rows)
        best = best_of(rows)
        state, masks = self.states[best]
        restore(self.model, state)
        return Relieved(best, masks, tuple(rows), self.config.accuracy_drop, self.left_whole)

    def _wanted(self, rows: list[Round]) -> list[Round]:
        """Return the finished rounds that a loop with these settings would have made."""
        # Fewer rounds or less patience than last time: the loop must end where a fresh one would.
        for count in range(1, len(rows)):
            if self._done(rows[:count]):
                return rows[:count]
        return rows

    def _done(self, rows: Sequence[Round]) -> bool:
        return len(rows) > self.config.rounds or self._given_up(rows)

    def _capture(self) -> None:
        if self.disconnector is None and self.config.rounds:
            batch = next(iter(self.loop.calibration), None)
            if batch is None:
                raise InputError("the calibration set is empty: relief needs at least one sample")
            inputs = batch if self.loop.forward is not None else inputs_of(self.model, batch)
            self.disconnector = Disconnector(
                self.model,
                first_samples(inputs, 1),
                forward=self.loop.forward,
                output=self.loop.output,
                whole=self._whole_parameters(),
            )

    def _whole_parameters(self) -> set[str]:
        """Return the names of all that must not be masked: of layers that are left whole, and what is frozen."""
        network = bare(self.model)
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        # A frozen parameter could not make up for what is masked.
        frozen = {n for n, p in network.named_parameters() if not (p.requires_grad or self.loop.frozen)}
        layers = [layer for name, layer in connected_layers(network) if name in self.left_whole]
        return frozen | {names[id(own)] for layer in layers for own in layer.parameters(recurse=False)}

    def _resume(self, number: int) -> None:
        masks = self.past.masks(number)
        if masks is None:
            raise IntegrityError(f"the masks of round {number} are gone: remove the folder to start afresh")
        self.past.load(number, bare(self.model))
        self.states[number] = snapshot(self.model), masks

    def _iterate(self, rows: list[Round], masks: Masks) -> Masks:
        """Prune and retrain once, append the row and return the new masks."""
        number, started = len(rows), time.perf_counter()
        seconds: dict[str, float] = {}
        # An interrupted round goes on with the very masks that its retraining's checkpoint was made under.
        found = self.past.masks(number)
        masks = found if found is not None else self._prune(masks, seconds, number)
        self.past.begin(number, masks)
        apply_masks(self.model, masks)
        # Before rewinding, because the initial weights would say nothing about what pruning cost.
        before = self._measure(self.loop.evaluate)
        if self.config.rewind and self.init is not None:
            restore(self.model, self.init)
            apply_masks(self.model, masks)
        with _timed(seconds, "retraining"):
            peak = self.loop.retrain(self.model, masks, number, self.past.checkpoint(number))
        # A user's own training may forget the masks, and accuracies would then be those of another network.
        if revived := apply_masks(self.model, masks):
            names = ", ".join(revived)
            raise InputError(f"the retraining let masked entries of {names} grow: apply_ the masks after each step")
        rows.append(self._finish(rows, masks, seconds, before, started=started, peak=peak))
        return masks

    def _prune(self, masks: Masks, seconds: dict[str, float], number: int) -> Masks:
        """Score, select and remove what is disconnected; what is masked stays masked."""
        if self.config.keep:
            return self._prune_to(self.config.keep[number - 1], masks, seconds, number)
        with _timed(seconds, "scoring"):
            selected = masks & self._select()
        with _timed(seconds, "disconnection"):
            return from_main(lambda: self._disconnect(selected))

    def _select(self) -> Masks:
        """Select from all layers as one pass measured them, or from the linear ones after the convolutions."""
        scored = self._worth(0)
        if self.config.measure == "at once":
            # One process selects: a last bit that differs between processes must not make two networks.
            return from_main(lambda: select(scored, self.alpha))
        # The order of the authors' code: what the linear layers receive comes from convolutions that are pruned.
        convs = Scores({name: layer for name, layer in scored.layers.items() if layer.is_conv}, scored.joins)
        first = from_main(lambda: select(convs, self.alpha))
        apply_masks(self.model, first)  # they are final whatever comes, so the network may as well be masked now
        again = self._score((*self.left_whole, *convs.layers, *convs.joins))
        return first & from_main(lambda: select(again, self.alpha))

    def _prune_to(self, share: float, masks: Masks, seconds: dict[str, float], number: int) -> Masks:
        """Prune until no more than ``share`` of all connections, rounded, is left, what is disconnected taken away.

        The selection is governed by one number, of which less is kept the larger it is: a bisection finds the largest
        network within the share. Where even the mildest selection keeps less, that one it is.
        """
        with _timed(seconds, "scoring"):
            scored = self._worth(number)
        alphas = [self.alpha.of(name, is_conv=layer.is_conv) for name, layer in scored.layers.items()]
        # Up to where the mildest layer, too, lets everything but its largest connections go.
        # An α of 1 lets nothing go, whatever its factor.
        steepest = 1 / (1 - max((alpha for alpha in alphas if alpha < 1), default=0.0))

        def pruned(severity: float) -> Masks:
            if self.config.score in ("activity", "magnitude"):
                found = select(scored, self.alpha.scaled(severity * steepest))
            else:
                found = select_largest(scored, 1 - severity)
            return self._disconnect(masks & found)

        def bisected() -> Masks:
            # The steepest selection first, so that there is an answer even where no step meets the share.
            low, high, best = 0.0, 1.0, pruned(1.0)
            for _ in range(_BISECTIONS):
                middle = (low + high) / 2
                found = pruned(middle)
                count = found.count(self.model)
                if count.kept <= share * count.dense + 0.5:  # a share that was computed from a count
                    high, best = middle, found
                else:
                    low = middle
            return best

        with _timed(seconds, "disconnection"):
            return from_main(bisected)

    def _worth(self, number: int) -> Scores:
        """Return what each connection is worth, by the recipe's score."""
        if self.config.score == "activity":
            return self._score(self.left_whole)
        layers = [name for name, _ in connected_layers(self.model) if name not in self.left_whole]
        sizes = size_scores(self.model, layers)
        if self.config.score == "random":
            return random_scores(sizes, 1000 * int((self.loop.key or {}).get("seed", 0)) + number)
        return sizes

    def _score(self, skip: Collection[str]) -> Scores:
        activity = measure_activity(
            self.model, self.loop.calibration, samples=self.config.samples, skip=skip, forward=self.loop.forward
        )
        for name, layer in connected_layers(self.model):
            if name not in activity.layers and name not in skip:
                # A layer without an activity has no score, and its weights cannot be told apart.
                self.left_whole.setdefault(name, f"{type(layer).__name__} that calibration never called")
        return score(self.model, activity, position_norm=self.config.position_norm)

    def _disconnect(self, masks: Masks) -> Masks:
        self._capture()
        assert self.disconnector is not None  # noqa: S101  made by the line before
        found = self.disconnector(self.model, masks)
        self.unknown = found.unknown
        return found.masks

    def _measure(self, measure: Measure) -> float:
        """Return what a measure says, which must be an accuracy.

        Raises:
            InputError: It is no number, NaN, or a percentage.
        """
        value: Any = measure(self.model)
        try:
            accuracy = float(value)
        except (TypeError, ValueError):
            raise InputError(
                f"evaluate returned a {type(value).__name__}: it must return the accuracy, a number"
            ) from None
        # NaN compares with nothing: it would be beyond every drop without a word.
        if math.isnan(accuracy):
            raise InputError("evaluate returned NaN: nothing can be chosen by it")
        if accuracy > 1:
            raise InputError(f"evaluate returned {accuracy:g}: it must return a fraction, at most 1, not a percentage")
        return accuracy

    def _finish(
        self,
        rows: Sequence[Round],
        masks: Masks,
        seconds: dict[str, float],
        before: float | None,
        *,
        started: float,
        peak: float | None = None,
    ) -> Round:
        """Measure and record the network as it is now."""
        accuracy = self._measure(self.loop.evaluate)
        test = self._measure(self.loop.test) if self.loop.test else None
        count = masks.count(self.model)
        row = from_main(
            lambda: Round(
                round=len(rows),
                accuracy_before=before,
                accuracy=accuracy,
                test_accuracy=test,
                peak_test_accuracy=peak,
                dense=count.dense,
                kept=count.kept,
                eligible=self._within(rows, accuracy),
                layers=_architecture(self.model, masks),
                unknown=self.unknown,
                seconds={**seconds, "all": time.perf_counter() - started},
            )
        )
        best = best_of([*rows, row])
        # Two states at most, whatever the number of rounds: each is a whole network.
        self.states = {k: state for k, state in self.states.items() if k == best}
        self.states[row.round] = snapshot(self.model), masks
        self.past.finish([*rows, row], bare(self.model))
        return row

    def _within(self, rows: Sequence[Round], accuracy: float) -> bool:
        return not rows or accuracy >= rows[0].accuracy - self.config.accuracy_drop - _ROUNDING

    def _given_up(self, rows: Sequence[Round]) -> bool:
        patience = self.config.patience
        return patience is not None and len(rows) > patience and not any(r.eligible for r in rows[-patience:])

    def _key(self, start: Masks) -> dict[str, Any]:
        """Return what the rounds depend on: not their number, nor what only chooses among them."""
        config = {k: v for k, v in asdict(self.config).items() if k not in {*_ONLY_CHOOSES, "retrain"}}
        key = {"version": 1, "config": config, **(self.loop.key or {})}
        tensors = tensors_of(self.model)
        key |= {"start": digest_of(tensors), "masks": digest_of(start), "init": digest_of(self.init or {})}
        # Tuples become lists, which would differ from those of an earlier run.
        plain: dict[str, Any] = as_read(key)
        return plain

    def _tell(self, rows: Sequence[Round]) -> None:
        if self.progress is not None and distributed.is_main():
            last = rows[-1]
            note = f"density {percent(last.kept / last.dense)}, validation accuracy {percent(last.accuracy)}"
            self.progress("relief", len(rows) - 1, self.config.rounds, note)


def best_of(rows: Sequence[Round]) -> int:
    """Return the round with the fewest connections that loses no more than allowed; of equals the most accurate."""
    # Never empty, since the dense network loses nothing against itself.
    return min((r.kept, -r.accuracy, r.round) for r in rows if r.eligible)[2]


def _any_matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _architecture(model: nn.Module, masks: Masks) -> dict[str, dict[str, int]]:
    """Return, for each layer, its connections and how many of its neurons have any left."""
    counts, layers = masks.count_layers(model), {}
    for name, layer in connected_layers(model):
        neurons, mask = len(outputs_first(layer, layer.weight)), masks.get(tensor_name(name, "weight"))
        alive = neurons if mask is None else int(outputs_first(layer, mask).flatten(1).any(dim=1).sum())
        layers[name] = {**counts[name].to_dict(), "neurons": neurons, "alive": alive}
    return layers


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def recipe_loop(
    model: nn.Module,
    data: DataSet,
    config: ReliefConfig,
    train: TrainConfig,
    *,
    seed: int,
    progress: Progress | None = None,
    frozen: bool = False,
) -> Loop:
    """Return the loop that retrains and measures a classifier with this package's own training.

    With several processes all end with the same masks and weights. They differ from those of one process only through
    the order in which retraining adds up gradients: from the same weights both prune alike.

    Args:
        model: The network that will be relieved.
        data: Training samples calibrate and retrain, validation samples choose, test samples are only reported, where
            they are others.
        config: The loop's settings; ``retrain`` falls back on ``train``.
        train: The dense network's training.
        seed: Draws the calibration samples and, with the number of the round, each retraining.
        progress: Called as ``progress(task, done, total, note)``, in the main process.
        frozen: Whether layers whose weight needs no gradient are relieved too.
    """
    settings = config.retrain or train

    def retrain(network: nn.Module, masks: Masks, number: int, checkpoint: Path | None) -> float | None:
        return fit.fit(
            network,
            data,
            settings,
            masks=masks,
            # A seed of its own for each retraining, so that no two go through the samples in the same order.
            seed=seed + number,
            checkpoint=checkpoint,
            progress=progress,
            task=f"retrain {number}/{config.rounds}",
        ).peak_test_accuracy

    return Loop(
        calibration=_Calibration(data.train.take(config.samples, seed=seed), model),
        retrain=retrain,
        evaluate=lambda network: fit.evaluate(network, data.validation).accuracy,
        test=None if data.test is data.validation else lambda network: fit.evaluate(network, data.test).accuracy,
        key={"retrain": asdict(settings), "seed": seed},
        frozen=frozen,
    )


class _Calibration:
    """Batches of a split, this process's share of each, as often as they are wanted."""

    def __init__(self, split: Split, model: nn.Module) -> None:
        self._split, self._model = split, model

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = next(self._model.parameters()).device
        shard = (distributed.rank(), distributed.world())
        return self._split.batches(CALIBRATION_BATCH, device=device, shard=shard)
