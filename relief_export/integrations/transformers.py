"""Hugging Face transformers: ``relieve`` retrains and measures with a Trainer.

    rx.relieve(model, batches, output="logits", retrain=retrain_with(make_trainer),
               evaluate=evaluate_with(make_trainer, "eval_accuracy"))

where ``make_trainer(model, callbacks)`` returns a new Trainer for the model with these callbacks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from relief_export.errors import InputError
from relief_export.schema import did_you_mean
from relief_export.state import mask_enforcer

try:
    from transformers import TrainerCallback
except ModuleNotFoundError:
    raise InputError("relief_export.integrations.transformers needs it: pip install transformers accelerate") from None

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn


class KeepMasked(TrainerCallback):  # type: ignore[misc]  # an untyped base
    """Keeps masked weights at zero after every step of the optimizer, whatever its momentum does."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = masks

    def on_train_begin(self, *_: object, model: nn.Module, **__: object) -> None:
        """Check the masks and mask the network."""
        self._enforce = mask_enforcer(model, self._masks)
        self._enforce()

    def on_step_end(self, *_: object, **__: object) -> None:
        """Mask again: the optimizer has stepped, and nothing was saved or measured since."""
        self._enforce()


def retrain_with(make_trainer: Callable[[nn.Module, list[Any]], Any]) -> Callable[..., None]:
    """Return ``retrain`` for `relieve`."""
    return lambda model, masks: make_trainer(model, [KeepMasked(masks)]).train()


def evaluate_with(make_trainer: Callable[[nn.Module, list[Any]], Any], metric: str) -> Callable[..., float]:
    """Return ``evaluate`` for `relieve`: a metric of ``Trainer.evaluate``."""

    def evaluate(model: nn.Module) -> float:
        found = make_trainer(model, []).evaluate()
        if metric not in found:
            raise InputError(f"the trainer measures no {metric!r}{did_you_mean(metric, found)}")
        return float(found[metric])

    return evaluate
