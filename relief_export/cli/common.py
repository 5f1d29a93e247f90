"""Options that every command shares, and the one way in which results are echoed."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from relief_export.errors import Failure, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

SCHEMA = 1
"""Version of the envelope; a key that is removed or changes its meaning raises it, a new key does not."""


@dataclass(frozen=True)
class Envelope:
    """What every command prints with --json, alone on stdout.

    Attributes:
        schema: Version of this object.
        command: Which command it was.
        ok: The answer; exit code 0 or 1. False where the command ended with an error, whose exit code says which kind.
        result: What the command found; null after an error.
        failures: Every reason for an answer of no.
        error: The sentence on stderr, where the command ended with one; else null.
    """

    schema: int
    command: str
    ok: bool
    result: Any
    failures: tuple[Failure, ...]
    error: str | None = None


F = TypeVar("F", bound="Callable[..., Any]")

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else there.")
progress_option = click.option(
    "--progress/--no-progress", default=None, help="Progress on stderr; by default only on a terminal."
)
# Paths are checked by the readers, which say in one sentence what is wrong with them.
PATH = click.Path(path_type=Path)


def share(_context: click.Context, _parameter: click.Parameter, text: str | None) -> float | None:
    """Read an option that is a fraction, written as one or as a percentage; see ``schema.parse_share``."""
    from relief_export.schema import parse_share

    try:
        return None if text is None else parse_share(text)
    except InputError as error:
        raise click.BadParameter(str(error)) from None


def _dimensions(_context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, int]:
    sizes = {}
    for text in given:
        name, equals, size = text.rpartition("=")
        if not equals or not size.strip().isdecimal():
            raise click.BadParameter(f"{text!r} is no dimension: write a name and a whole number, as in H=224")
        sizes[name.strip()] = int(size)
    return sizes


dimension_option = click.option(
    "--dim",
    "dimensions",
    multiple=True,
    metavar="NAME=SIZE",
    callback=_dimensions,
    help="Length of a symbolic axis of the inputs, as in H=224; x[2]=224 for the third of input x.",
)


def recipe_options(command: F) -> F:
    """Add what ``run`` and ``train`` share: the recipe, its overrides, the build folder."""
    # As stacked decorators are applied, from the lowest up: the help lists them the other way round.
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


def echo(
    result: object,
    *,
    as_json: bool,
    lines: Iterable[str] = (),
    ok: bool | None = None,
    failures: Iterable[Failure] | None = None,
) -> None:
    """Print ``result`` in the envelope of every command as one JSON object, or ``lines`` for people.

    ``ok`` and ``failures`` are taken out of a result that has them.
    """
    if not as_json:
        for line in lines:
            click.echo(line)
        return
    context = click.get_current_context(silent=True)
    name = context.info_name if context is not None else None
    # A copy, because what goes into the envelope is taken out of it.
    plain: Any = dict(result) if isinstance(result, dict) else result
    if isinstance(plain, dict):
        found = plain.pop("failures", [])
        stated = plain.pop("ok", not found)
        ok = stated if ok is None else ok
        failures = [Failure(**each) for each in found] if failures is None else failures
    whole = Envelope(SCHEMA, name or "", bool(ok), plain, tuple(failures or ()))
    click.echo(json.dumps(asdict(whole), allow_nan=False))


def echo_error(message: str, command: str) -> None:
    """Print what ended a command, in the same envelope."""
    click.echo(json.dumps(asdict(Envelope(SCHEMA, command, ok=False, result=None, failures=(), error=message))))


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
        # As text, because rich would read brackets in a name as markup.
        grid.add_row(*(Text(str(cell)) for cell in row))
    # Rendered wide: a table that is piped or read in a log must not lose its columns.
    console = Console(file=io.StringIO(), width=200, highlight=False)
    with console.capture() as captured:
        console.print(grid)
    return [line.rstrip() for line in captured.get().splitlines()]
