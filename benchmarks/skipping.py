"""What a step of retraining costs when layers skip the neurons that have no connection left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it

from benchmarks.common import Benchmark, Column, Row, Timing, one_thread
from relief_export.layers import connected_layers, tensor_name
from relief_export.recipe import ModelConfig
from relief_export.relief.masks import Masks
from relief_export.training.models import build_model
from relief_export.training.skipping import skipping

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

SEED = 0
LEFT = (0.7, 0.5, 0.3)
REPEATS = 5
SYSTEMS: dict[str, tuple[tuple[int, int, int], int, bool]] = {
    "lenet300-100": ((1, 28, 28), 120, False),
    "lenet5": ((1, 28, 28), 120, False),
    "resnet20": ((3, 32, 32), 128, True),
    "vgg-like": ((3, 32, 32), 128, True),
}
"""Network -> input shape, batch of its recipe, and whether it is trained in bf16 and channels_last."""


def thinned(model: nn.Module, left: float) -> Masks:
    """Return masks that leave each neuron, and each input of a layer, with probability ``left``; outputs stay."""
    generator = torch.Generator().manual_seed(SEED)
    layers, masks = list(connected_layers(model)), {}
    for name, layer in layers:
        rows, columns = (torch.rand(size, generator=generator) < left for size in layer.weight.shape[:2])
        rows |= torch.tensor(name == layers[-1][0])
        kept = rows[:, None] & columns[None, :]
        masks[tensor_name(name, "weight")] = kept.reshape(*kept.shape, *(1,) * (layer.weight.ndim - 2)).expand_as(
            layer.weight
        )
        if layer.bias is not None:
            masks[tensor_name(name, "bias")] = rows
    return Masks(masks)


def stepper(model: nn.Module, x: torch.Tensor, *, low: bool) -> Callable[[], float]:
    """Return a function that trains one step and returns its processor time, in seconds."""
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=5e-4, fused=True)
    y = torch.arange(len(x)) % 10

    def step() -> float:
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = model(x)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(out.float(), y).backward()  # type: ignore[no-untyped-call]  # not in torch's stubs
        optimizer.step()
        return time.process_time() - started

    return step


def measure(name: str, left: float) -> Row:
    """Time one network with and without skipping, interleaved, on one core."""
    shape, batch, low = SYSTEMS[name]
    layout = torch.channels_last if low else torch.contiguous_format
    model = build_model(ModelConfig(name), shape, 10, SEED).to(memory_format=layout)  # type: ignore[call-overload]
    masks = thinned(model, left)
    masks.apply_(model)
    x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(SEED)).contiguous(memory_format=layout)
    step = stepper(model, x, low=low)
    whole, thin = [], []
    for repeat in range(REPEATS + 1):  # the first is for warming up
        times = [step()]
        with skipping(model, masks):
            times.append(step())
        if repeat:
            whole.append(times[0])
            thin.append(times[1])
    row: Row = {"model": name, "left": left, "batch": batch, "precision": "bf16" if low else "fp32", "threads": 1}
    row |= Timing.of(whole).to_dict("whole_") | Timing.of(thin).to_dict("thin_")
    return row | {"ratio": row["whole_median_s"] / row["thin_median_s"]}


def run() -> list[Row]:
    """Time every network on one core."""
    with one_thread():
        return [measure(name, left) for name in SYSTEMS for left in LEFT]


BENCHMARK = Benchmark(
    name="skipping",
    question="How much cheaper is a step of retraining when neurons without a connection are skipped?",
    run=run,
    columns=(
        Column("model", "network"),
        Column("left", "neurons left, %", ".0f", 100),
        Column("precision", "precision"),
        Column("whole_median_s", "whole, ms", ".1f", 1000),
        Column("thin_median_s", "skipping, ms", ".1f", 1000),
        Column("ratio", "times faster", ".2f"),
    ),
    seeds=(SEED,),
    note=f"Processor time of one training step, one thread, medians of {REPEATS} interleaved steps; neurons and inputs "
    "are left at random, independently, so a layer computes the square of the share.",
)
