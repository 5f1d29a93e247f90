"""The harness that every benchmark shares: interleaved timing, the machine in each row, one JSON file a question.

A benchmark is a module of this folder that defines ``BENCHMARK = Benchmark(...)``; ``python -m benchmarks`` finds and
runs them all. What it compares is timed in one process and interleaved (a, b, c, a, b, c, …), so that a drifting clock
frequency or a noisy neighbour falls on all alike. docs/results.md is rendered from the files written here.
"""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relief_export import records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]


@dataclass(frozen=True)
class Timing:
    """Wall time of one candidate, in seconds: the median of ``repeats`` calls and the quartiles around it."""

    median: float
    lower: float
    upper: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summarise at least two measured wall times."""
        lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, lower, upper, len(seconds))

    def to_dict(self, prefix: str = "") -> Row:
        """Return ``{prefix}median_s``, ``{prefix}lower_s``, ``{prefix}upper_s`` and ``{prefix}repeats``."""
        return {
            f"{prefix}median_s": self.median,
            f"{prefix}lower_s": self.lower,
            f"{prefix}upper_s": self.upper,
            f"{prefix}repeats": self.repeats,
        }


@dataclass(frozen=True)
class Column:
    """One column of a benchmark's table: a row's key, the heading in docs/results.md, and a format specification.

    ``scale`` multiplies a number before it is formatted (1000 shows seconds as milliseconds).
    """

    key: str
    title: str
    format: str = ""
    scale: float = 1.0


@dataclass(frozen=True)
class Benchmark:
    """A question, what answers it, and how the answer is shown.

    Attributes:
        name: The module's name, and that of benchmarks/results/NAME.json.
        question: One sentence that the table answers.
        run: Measures and returns the rows, plain JSON data. One that takes long gives an iterator over the table as
            it grows instead: all rows, those without an answer yet included, after each step.
        columns: What docs/results.md shows of a row, in this order.
        seeds: Every seed that the measured inputs depend on.
        note: What a reader must know to read the numbers: the conventions, what was held fixed.
        own_page: Whether it is shown on docs/results/NAME.md, and not beside the others.
    """

    name: str
    question: str
    run: Callable[[], list[Row] | Iterator[list[Row]]]
    columns: tuple[Column, ...]
    seeds: tuple[int, ...] = (0,)
    note: str = ""
    own_page: bool = False

    def write(self, folder: Path = RESULTS) -> Path:
        """Run it and write ``folder/NAME.json`` atomically, the machine in each row; return the path.

        A table that grows is written after each step, so that who stops it, or what kills it, loses the step in hand.
        """
        started = time.perf_counter()
        path = folder / f"{self.name}.json"
        answer = self.run()
        for rows in [answer] if isinstance(answer, list) else answer:
            content = {
                "benchmark": self.name,
                "question": self.question,
                "note": self.note,
                "command": f"python -m benchmarks {self.name}",
                "seeds": list(self.seeds),
                "seconds": round(time.perf_counter() - started, 1),
                "versions": records.versions(),
                "own_page": self.own_page,
                "columns": [asdict(column) for column in self.columns],
                # A row that an earlier run left has its machine.
                "rows": [{"machine": records.machine()} | row for row in rows],
            }
            records.write_json(path, content)
        return path


def interleave(candidates: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 2) -> dict[str, Timing]:
    """Time every candidate ``repeats`` times, one call of each in turn, after ``warmup`` untimed rounds.

    The garbage collector is held off while the clock runs. The order of each round is drawn, from a fixed seed, so that
    no candidate always runs in the cache that the same other one, or it itself, left.

    Raises:
        ValueError: ``repeats`` is below 2, too few for a spread.
    """
    if repeats < 2:
        raise ValueError(f"repeats is {repeats}: a spread needs at least 2")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(warmup):
        for call in candidates.values():
            call()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        drawn = random.Random(0)  # noqa: S311  # no secret
        for _ in range(repeats):
            for name in drawn.sample(list(candidates), len(candidates)):
                started = time.perf_counter()
                candidates[name]()
                seconds[name].append(time.perf_counter() - started)
    finally:
        if was_enabled:
            gc.enable()
    return {name: Timing.of(values) for name, values in seconds.items()}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread as long as the context lasts: processor time is then wall time on an idle core."""
    import torch  # noqa: PLC0415  only some benchmarks need it

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
