"""The command line: options -> one call -> echo.

Exit codes: 0 done; 1 the answer is no; 2 wrong usage or bad input, in one sentence on stderr; 3 an error that nobody
foresaw, with a file to report it with; 130 interrupted.
Commands import what they need when they run, so that ``--help`` and everything that takes an ``.onnx`` work without
torch.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from importlib.util import find_spec
from typing import TYPE_CHECKING

import click

from relief_export.cli import devices, models, networks, pipeline
from relief_export.cli.common import echo_error
from relief_export.errors import MissingExtraError, ReliefError
from relief_export.records import versions
from relief_export.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence

UNFORESEEN = 3
"""Exit code of an error that nobody foresaw: neither an answer of no nor a user's mistake."""
_EXTRA = ("torch", "torchvision", "safetensors", "sklearn")


class _Sections(click.Group):
    """Lists the commands by what they work on and in the order of their use, not by the alphabet."""

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one block of names and short descriptions a section."""
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(command.name or "", command.get_short_help_str(200)) for command in commands])


SECTIONS = {
    "From a recipe to files": pipeline.COMMANDS,
    "Models of any origin, without PyTorch": models.COMMANDS,
    "Files of PyTorch networks": networks.COMMANDS,
    "Microcontrollers": devices.COMMANDS,
}


@click.group(cls=_Sections, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(VERSION, prog_name="relief-export")
def cli() -> None:
    """Prune a network, ship it as a small exact file, and check that file against the network on test data.

    \b
    relief-export run digits-lenet5                     train, prune, export, validate, audit, report
    relief-export shrink model.onnx small.onnx          remove dead channels, exactly, from any ONNX model
    relief-export audit model.onnx --flash 256KiB       does it fit?

    Every command takes --json. Exit codes: 0 done, 1 the answer is no, 2 wrong usage or bad input, 3 a fault of ours.
    """


for _command in (command for commands in SECTIONS.values() for command in commands):
    cli.add_command(_command)


def _sentence(error: Exception) -> str:
    """Return what went wrong; the system's own errors name the file that cannot be read or written."""
    # Of a rename the second name is the one that was to be written.
    if isinstance(error, OSError) and (name := error.filename2 or error.filename):
        return f"{name}: {error.strerror}"
    return str(error)


def _unforeseen(arguments: Sequence[str]) -> str:
    """Keep the traceback of the present exception in a file, and return the sentence that says how to report it."""
    kind, error, _ = sys.exc_info()
    what = " ".join(f"{kind.__name__ if kind else ''}: {error}".split())[:300]
    report = f"relief-export {' '.join(arguments)}\n\n{traceback.format_exc()}\n{json.dumps(versions(), indent=1)}\n"
    with tempfile.NamedTemporaryFile("w", prefix="relief-export-", suffix=".txt", delete=False) as file:
        file.write(report)
    return f"this is a fault of relief-export ({what}): report it with the file {file.name}, which has the traceback"


def _explained(error: BaseException, arguments: Sequence[str]) -> tuple[str, int]:
    """Return the sentence about what ended a command, and the exit code."""
    if isinstance(error, click.ClickException):
        return " ".join(error.format_message().split()), 2
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return "interrupted; run the same command again to go on", 130
    if isinstance(error, (ReliefError, OSError)):
        return _sentence(error), getattr(error, "exit_code", 2)
    package = (getattr(error, "name", None) or "").split(".")[0]
    if isinstance(error, ModuleNotFoundError) and package in _EXTRA:
        # Which of the extra's packages is asked for first is a matter of import order: torch is the one people know.
        missing = "torch" if find_spec("torch") is None else package
        return str(MissingExtraError("this command", missing)), MissingExtraError.exit_code
    return _unforeseen(arguments), UNFORESEEN


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; mistakes become one sentence on stderr."""
    if not arguments:
        # Not left to click: it raises the help as an error from 8.2 on, and before that prints it and returns 0.
        click.echo(cli.get_help(click.Context(cli, info_name="relief-export")), err=True)
        return 2
    try:
        # Not click's own mode, which ends the process and prints its errors in a form of its own.
        return cli.main(list(arguments), prog_name="relief-export", standalone_mode=False) or 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last resort has a code of its own
        message, code = _explained(error, arguments)
        click.echo(f"Error: {message}", err=True)
        if "--json" in arguments:
            echo_error(message, next((word for word in arguments if not word.startswith("-")), ""))
        return code


def main() -> None:
    """Enter from the console script."""
    sys.exit(run(sys.argv[1:]))
