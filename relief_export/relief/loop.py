"""The relief loop of a recipe: calibrated, retrained and measured on its data, with its training."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from relief_export.relief.iterations import Loop, Relieved
from relief_export.training import distributed, fit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from relief_export.progress import Progress
    from relief_export.recipe import ReliefConfig, TrainConfig
    from relief_export.relief.masks import Masks
    from relief_export.training.data import DataSet, Split

CALIBRATION_BATCH = 100


def relieve(
    model: nn.Module,
    data: DataSet,
    config: ReliefConfig,
    train: TrainConfig,
    *,
    init: Mapping[str, Tensor] | None,
    seed: int,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Relieved:
    """Run the relief loop of a recipe on a trained network, in place.

    With several processes all end with the same masks and weights. They differ from those of one process only through
    the order in which retraining adds up gradients: from the same weights both prune alike.

    Args:
        model: The dense, trained network.
        data: Training samples calibrate and retrain, validation samples choose, test samples are only reported, where
            they are others.
        config: The loop's settings; ``retrain`` falls back on ``train``.
        train: The dense network's training.
        init: The initial weights; needed to rewind.
        seed: Draws the calibration samples and, with the number of the iteration, each retraining.
        folder: Where history, masks and weights of the iterations are kept; an interrupted loop goes on from there.
        progress: Called as ``progress(task, done, total, note)``, in the main process.
    """
    settings = config.retrain or train

    def retrain(network: nn.Module, masks: Masks, iteration: int, checkpoint: Path | None) -> float | None:
        return fit.fit(
            network,
            data,
            settings,
            masks=masks,
            seed=seed + iteration,
            checkpoint=checkpoint,
            progress=progress,
            task=f"retrain {iteration}/{config.iterations}",
        ).peak_test_accuracy

    loop = Loop(
        calibration=_Calibration(data.train.take(config.samples, seed=seed), model),
        retrain=retrain,
        evaluate=lambda network: fit.evaluate(network, data.validation).accuracy,
        test=None if data.test is data.validation else lambda network: fit.evaluate(network, data.test).accuracy,
        key={"retrain": asdict(settings), "seed": seed},
    )
    return loop.run(model, config, init=init, folder=folder, progress=progress)


class _Calibration:
    """Batches of a split, this process's share of each, as often as they are wanted."""

    def __init__(self, split: Split, model: nn.Module) -> None:
        self._split, self._model = split, model

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = next(self._model.parameters()).device
        shard = (distributed.rank(), distributed.world())
        return self._split.batches(CALIBRATION_BATCH, device=device, shard=shard)
