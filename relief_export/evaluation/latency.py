"""Time models against each other in one process, interleaved, so that a drifting clock frequency falls on all alike."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from relief_export import records
from relief_export.errors import InputError
from relief_export.evaluation.samples import part, size
from relief_export.evaluation.sessions import Session, open_session

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from relief_export.evaluation.samples import ByName

Array: TypeAlias = np.ndarray[Any, Any]

_TICK = 2e-3  # seconds of one measurement: short calls are repeated inside it, so that the clock's grain does not show


@dataclass(frozen=True)
class Latency:
    """Wall time of one inference, in seconds.

    Attributes:
        median: Of ``repeats`` measurements; ``lower`` and ``upper`` are the quartiles around it.
        calls: Inferences in one measurement. batch: Samples in one inference. threads: Of ONNX Runtime.
        load: Wall time of the one session creation, cold; weights that are stored packed are rebuilt there, and
            generated C is compiled.
        runtime: What ran it: ONNX Runtime with its version, or the compiler of generated C with its flags. C computes
            one sample after the other on one thread, whatever the batch and the number of threads.
        machine: What it was measured on.
    """

    name: str
    median: float
    lower: float
    upper: float
    repeats: int
    calls: int
    batch: int
    threads: int
    load: float
    runtime: str
    machine: dict[str, str | int] = field(default_factory=records.machine)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def measure_latency(
    models: Mapping[str, str | Path], x: ByName, *, batch: int = 1, repeats: int = 30, warmup: int = 5, threads: int = 1
) -> list[Latency]:
    """Time one inference of each model, optimised, on the same samples.

    Args:
        models: Name -> file or folder.
        x: Samples ``(N, ...)``, by name where there are several inputs; the first ``batch`` of them are used.
        batch: Samples in one inference; a model with a fixed batch must have this one.
        repeats: Measurements of each model. They are interleaved (a, b, c, c, b, a, …) after ``warmup`` untimed calls.
        warmup: Untimed calls of each model.
        threads: Intra-op threads; one is what compares models best.

    Raises:
        InputError: Fewer than two repeats, fewer samples than ``batch``, or samples that do not fit a model.
        UnsupportedModelError: A model cannot be run; see ``open_session``.
    """
    if repeats < 2 or size(x) < batch:
        raise InputError(
            f"{repeats} repeats on {size(x)} samples in batches of {batch}: give at least 2, and a full batch"
        )
    sessions: dict[str, Session] = {}
    load: dict[str, float] = {}
    # All are open before any inference is timed: each shares memory and caches with the others as they do with it.
    for name, path in models.items():
        started = time.perf_counter()
        sessions[name] = open_session(path, name=name, threads=threads)
        load[name] = time.perf_counter() - started
    x = part(x, 0, batch)
    # Checked and converted beforehand, so that only the inference is timed.
    feeds = {name: session.feed(x) for name, session in sessions.items()}
    calls = {name: _calls(sessions[name], x, warmup) for name in models}
    seconds = _interleaved(sessions, feeds, calls, repeats)
    return [
        Latency(
            name, *_quartiles(seconds[name]), repeats, calls[name], batch, threads, load[name],
            sessions[name].runtime,
        )
        for name in models
    ]  # fmt: skip


def _calls(session: Session, x: ByName, warmup: int) -> int:
    """Warm a session up and return how many calls fill one tick of the clock."""
    for _ in range(warmup):
        session.run(x, batch=size(x))
    started = time.perf_counter()
    session.run(x, batch=size(x))
    # A clock that did not move between the two readings must not be divided by.
    return max(1, math.ceil(_TICK / max(time.perf_counter() - started, 1e-7)))


def _interleaved(
    sessions: Mapping[str, Session], feeds: Mapping[str, dict[str, Array]], calls: Mapping[str, int], repeats: int
) -> dict[str, list[float]]:
    """Return the seconds of one call in every measurement; the garbage collector rests meanwhile."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    collecting = gc.isenabled()
    # A collection would fall on whichever model happens to run, and last longer than a small inference.
    gc.disable()
    try:
        for repeat in range(repeats):
            # Forth and back, so that each model runs as often after one neighbour as after the other.
            for name in list(sessions)[:: -1 if repeat % 2 else 1]:
                run, feed, count = sessions[name].inner.run, feeds[name], calls[name]
                started = time.perf_counter()
                for _ in range(count):
                    run(None, feed)
                seconds[name].append((time.perf_counter() - started) / count)
    finally:
        if collecting:
            gc.enable()
    return seconds


def _quartiles(seconds: list[float]) -> tuple[float, float, float]:
    """Return median, lower and upper quartile."""
    # Quartiles and no mean: a single interruption by the system would move a mean of thirty.
    lower, median, upper = (float(value) for value in np.quantile(seconds, (0.25, 0.5, 0.75)))
    return median, lower, upper
