"""Options that every command shares, and the one way in which results are echoed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

F = TypeVar("F", bound="Callable[..., Any]")

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else there.")
progress_option = click.option(
    "--progress/--no-progress", default=None, help="Progress on stderr; by default only on a terminal."
)
# Paths are checked by the readers, which say in one sentence what is wrong with them.
PATH = click.Path(path_type=Path)


def recipe_options(command: F) -> F:
    """Add what ``run`` and ``train`` share: the recipe, its overrides, the build folder."""
    for option in (
        click.option("--force", is_flag=True, help="Start afresh even where everything is up to date."),
        click.option("--seed", type=int, help="Seed, over the recipe's."),
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key, as in train.epochs=2."
        ),
        click.option("--out", type=PATH, help="Build folder; build/NAME by default."),
        click.argument("recipe"),
    ):
        command = option(command)
    return command


def echo(result: object, *, as_json: bool, lines: Iterable[str] = ()) -> None:
    """Print ``result`` as one JSON object, or ``lines`` for people."""
    if as_json:
        click.echo(json.dumps(result, allow_nan=False))
    else:
        for line in lines:
            click.echo(line)


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lay out a table: the first column to the left, the others to the right; an empty row is a gap."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column, header in enumerate(headers):
        grid.add_column(header, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    # Rendered wide: a table that is piped or read in a log must not lose its columns.
    console = Console(file=io.StringIO(), width=200, highlight=False)
    with console.capture() as captured:
        console.print(grid)
    return [line.rstrip() for line in captured.get().splitlines()]
