"""PyTorch Lightning: ``relieve`` retrains and measures with Trainers.

    rx.relieve(module, train_loader, retrain=retrain_with(make_trainer, train_loader),
               evaluate=evaluate_with(make_trainer, "val_acc", val_loader))

where ``make_trainer(callbacks)`` returns a new Trainer with these callbacks and whatever else it should have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from relief_export.errors import InputError
from relief_export.schema import did_you_mean
from relief_export.state import mask_enforcer

try:
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError:
    raise InputError("relief_export.integrations.lightning needs lightning: pip install lightning") from None

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn


class KeepMasked(Callback):  # type: ignore[misc]  # an untyped base
    """Keeps masked weights at zero after every step of the optimizer, whatever its momentum does."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = masks

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:  # noqa: ANN401, ARG002  Lightning's signature
        """Check the masks and mask the network."""
        self._enforce = mask_enforcer(pl_module, self._masks)
        self._enforce()

    def on_train_batch_end(self, *_: object, **__: object) -> None:
        """Mask again; the optimizer has stepped, or its gradients were only added up."""
        self._enforce()


def retrain_with(make_trainer: Callable[[list[Any]], Any], *data: Any) -> Callable[..., None]:  # noqa: ANN401
    """Return ``retrain`` for `relieve`; ``data`` are the loaders or the data module of ``Trainer.fit``."""
    return lambda module, masks: make_trainer([KeepMasked(masks)]).fit(module, *data)


def evaluate_with(make_trainer: Callable[[list[Any]], Any], metric: str, *data: Any) -> Callable[..., float]:  # noqa: ANN401
    """Return ``evaluate`` for `relieve`: a metric that the module logs in its validation step."""

    def evaluate(module: nn.Module) -> float:
        found = make_trainer([]).validate(module, *data, verbose=False)[0]
        if metric not in found:
            raise InputError(f"the module logs no {metric!r} in its validation step{did_you_mean(metric, found)}")
        return float(found[metric])

    return evaluate
