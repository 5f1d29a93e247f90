"""What one relief step costs beside one plain forward pass of the same samples."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch

from benchmarks.common import Benchmark, Column, Row, Timing, one_thread
from relief_export.recipe import ModelConfig
from relief_export.relief.activity import evaluating, measure_activity
from relief_export.relief.disconnection import Disconnector
from relief_export.relief.loop import CALIBRATION_BATCH
from relief_export.relief.scores import score
from relief_export.relief.selection import Alpha, select
from relief_export.training.models import build_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from relief_export.relief.masks import Masks
    from relief_export.relief.scores import PositionNorm

SAMPLES = 1000
REPEATS = 3
SYSTEMS: dict[str, tuple[tuple[int, int, int], Alpha, PositionNorm]] = {
    "lenet5": ((1, 28, 28), Alpha(0.9, 0.95), "l1"),
    "resnet20": ((3, 32, 32), Alpha(0.95, 0.99), "l2"),
    "vgg-like": ((3, 32, 32), Alpha(0.95, 0.95), "l2"),
}
"""Network -> input shape, and α and position norm of its recipe."""


def forward(model: nn.Module, batches: tuple[Tensor, ...]) -> None:
    """Run the network over all batches and keep nothing."""
    with evaluating(model), torch.inference_mode():
        for x in batches:
            model(x)


def prune(model: nn.Module, batches: tuple[Tensor, ...], alpha: Alpha, norm: PositionNorm) -> Masks:
    """Measure, score and select once."""
    return select(score(model, measure_activity(model, batches), position_norm=norm), alpha)


def cpu_seconds(call: Callable[[], object]) -> float:
    """Return the processor time of one call; with one thread it is the wall time on an idle core."""
    started = time.process_time()
    call()
    return time.process_time() - started


def measure(name: str) -> Row:
    """Time one system on one core."""
    shape, alpha, norm = SYSTEMS[name]
    model = build_model(ModelConfig(name), shape, 10, 0)
    x = torch.rand(SAMPLES, *shape, generator=torch.Generator().manual_seed(0))
    batches = torch.split(x, CALIBRATION_BATCH)
    forward_times, prune_times = [], []
    masks = prune(model, batches, alpha, norm)
    for _ in range(REPEATS):
        forward_times.append(cpu_seconds(lambda: forward(model, batches)))
        prune_times.append(cpu_seconds(lambda: prune(model, batches, alpha, norm)))
    started = time.process_time()
    disconnector = Disconnector(model, batches[0][:1])
    captured = time.process_time() - started
    disconnection = [cpu_seconds(lambda: disconnector(model, masks)) for _ in range(3)]
    forward_time, prune_time = Timing.of(forward_times), Timing.of(prune_times)
    return {
        "model": name,
        "samples": SAMPLES,
        "batch": CALIBRATION_BATCH,
        "threads": torch.get_num_threads(),
        **forward_time.to_dict("forward_"),
        **prune_time.to_dict("prune_"),
        "ratio": prune_time.median / forward_time.median,
        "disconnection_s": statistics.median(disconnection),
        "capture_s": captured,
    }


def run() -> list[Row]:
    """Time every system on one core."""
    with one_thread():
        return [measure(name) for name in SYSTEMS]


BENCHMARK = Benchmark(
    name="scoring",
    question="What does it cost to score and select every connection once, in forward passes of the same samples?",
    run=run,
    columns=(
        Column("model", "network"),
        Column("forward_median_s", "forward pass, s", ".2f"),
        Column("prune_median_s", "activity + scores + selection, s", ".2f"),
        Column("ratio", "ratio", ".2f"),
        Column("disconnection_s", "disconnection, s", ".2f"),
        Column("capture_s", "capture, once a loop, s", ".2f"),
    ),
    note=(
        f"{SAMPLES} random samples in batches of {CALIBRATION_BATCH}, freshly initialised networks; processor time of "
        f"one thread, medians of {REPEATS} interleaved measurements. Activity contains its one forward pass. "
        "Disconnection is reported apart, and so is the capture that it needs, made once for all rounds."
    ),
)
