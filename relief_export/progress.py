"""Progress bars with an ETA, on stderr, and only on a terminal unless asked for."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import TaskID

    Progress = Callable[[str, int, int, str], None]


@contextmanager
def bars(*, wanted: bool | None = None) -> Iterator[Progress | None]:
    """Yield a callback ``progress(task, done, total, note)`` that draws bars, or None where nobody looks.

    Args:
        wanted: True draws always, False never, None when stderr is a terminal.
    """
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as drawn:

        def update(task: str, done: int, total: int, note: str) -> None:
            if task not in tasks:
                tasks[task] = drawn.add_task(task, total=total, note=note)
            drawn.update(tasks[task], completed=done, total=total, note=note)

        yield update
