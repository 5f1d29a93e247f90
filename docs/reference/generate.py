"""Write the pages of this folder that are made from the code: `python -m docs.reference.generate`, or make reference.

json.md comes from the dataclasses and tables that the commands print with --json, ops.md from the table of operators,
cli.md from the commands' own help, api.md from the docstrings of what the package exports. Tests compare all of them
with what lies here.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from pathlib import Path
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

import click
from click.testing import CliRunner

import relief_export
from relief_export.cli import SECTIONS, cli
from relief_export.cli.answers import ANSWERS
from relief_export.cli.common import SCHEMA, Envelope
from relief_export.errors import Failure

HERE = Path(__file__).parent
_NAMES = {
    str: "string",
    int: "whole number",
    float: "number",
    bool: "true or false",
    types.NoneType: "null",
    Any: "any",
}

_HEAD = f"""# What the commands print with --json

Every command prints one JSON object on stdout and nothing else there; progress and sentences go to stderr. This page is
made from the code.

**Stability.** Schema {SCHEMA}: a key that is named here keeps its name and meaning as long as `schema` is {SCHEMA}; new
keys may come. Keys that are not named here may change. Sizes end in `_bytes`, times are seconds, accuracies and shares
are fractions of 1. A change of accuracy is negative where accuracy is lost. Exit codes: 0 `ok`, 1 not `ok`, 2 wrong
usage or bad input, 3 a fault of relief-export, 130 interrupted; after 2, 3 and 130 `error` has the sentence.

Recipes, manifests and records have a version or are checked against this program's keys when they are read; files of
the formats follow [formats.md](../formats.md). The names that `relief_export` exports are the Python interface.
"""


def json_page() -> str:
    """Return the page about JSON."""
    lines = [_HEAD, "## The envelope", "", *_table(Envelope), "## Failure", "", *_table(Failure)]
    tables: dict[str, Any] = {}
    for command, answer in ANSWERS.items():
        lines += [f"## `{command}`", "", _summary(answer), "", *_table(answer)]
        _collect(answer, tables)
    lines += ["## Tables", ""]
    for name in sorted(tables):
        lines += [f"### {name}", "", _summary(tables[name]), "", *_table(tables[name])]
    return "\n".join(lines).rstrip() + "\n"


def ops_page() -> str:
    """Return the page about operators: what the command prints."""
    printed = CliRunner().invoke(cli, ["ops"], standalone_mode=False).output
    head = (
        "# Operators\n\nHow `relief-export shrink` handles each ONNX operator, as `relief-export ops` prints it. "
        "`relief-export ops model.onnx` lists those of a model.\n\n- **rule**: dead channels are followed through it.\n"
        "- **opaque**: it reads or mixes all channels, so they stay.\n- An operator that is not here is unknown: what "
        "it touches stays, and `--strict` refuses the model. [Adding one](../adding_an_op.md) is a row and a test.\n"
    )
    return f"{head}\n```text\n{printed.rstrip()}\n```\n"


def cli_page() -> str:
    """Return the page about the command line: the help of each command."""
    lines = [
        "# Command line",
        "",
        "What `relief-export COMMAND --help` prints. [JSON](json.md) has what `--json` prints.",
        "",
    ]
    lines += ["```text", _help(cli, "relief-export"), "```", ""]
    for title, commands in SECTIONS.items():
        lines += [f"## {title}", ""]
        for command in commands:
            lines += [f"### {command.name}", "", "```text", _help(command, f"relief-export {command.name}"), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _help(command: click.Command, name: str) -> str:
    # A width of its own, so that the page does not depend on the terminal it is made in.
    context = click.Context(command, info_name=name, terminal_width=110, help_option_names=["-h", "--help"])
    return "\n".join(line.rstrip() for line in command.get_help(context).splitlines())


def api_page() -> str:
    """Return the page about the Python interface: signature and docstring of each public name; needs torch."""
    lines = [
        "# Python",
        "",
        "What `import relief_export as rx` offers. The names on this page are the public interface; what changes in",
        "them is in CHANGES.md. Whatever is wrong with an input is raised as a `ReliefError`, in one sentence.",
        "",
    ]
    for name in relief_export.__all__:
        thing = getattr(relief_export, name)
        if not callable(thing):
            continue
        if getattr(thing, "__name__", name) != name:
            lines += [f"## rx.{name}", "", f"Another name of [rx.{thing.__name__}](#rx{thing.__name__}).", ""]
            continue
        lines += [
            f"## rx.{name}",
            "",
            "```text",
            f"{name}{_parameters(thing)}",
            "",
            inspect.getdoc(thing) or "",
            "```",
            "",
        ]
        lines += _methods(name, thing)
    lines += ["## What they return", "", "The functions above make these; those with a `table` print as one.", ""]
    for result in _results():
        lines += [f"### {result.__name__}", "", "```text", inspect.getdoc(result) or "", "```", ""]
        fields = [field.name for field in dataclasses.fields(result)]
        own = [k for k, v in vars(result).items() if isinstance(v, property) and not k.startswith("_")]
        lines += [
            f"Fields: {', '.join(f'`{each}`' for each in (*fields, *own))}.",
            "",
            *_methods(result.__name__, result),
        ]
    return "\n".join(lines).rstrip() + "\n"


def _results() -> tuple[type, ...]:
    """Return the classes of what the public functions return."""
    from relief_export.evaluation import Audit, Comparison, Validation  # noqa: PLC0415  the other pages need no torch
    from relief_export.formats import Artifact, Manifest  # noqa: PLC0415
    from relief_export.graph.cost import Cost  # noqa: PLC0415
    from relief_export.graph.shrink import ShrinkResult  # noqa: PLC0415
    from relief_export.relief.loop import Relieved  # noqa: PLC0415
    from relief_export.training.rounding import Rounded  # noqa: PLC0415

    return Relieved, Rounded, Manifest, Artifact, Validation, ShrinkResult, Comparison, Audit, Cost


def _methods(name: str, thing: Any) -> list[str]:  # noqa: ANN401
    """Return signature and docstring of each public method of a class; nothing of a function."""
    lines: list[str] = []
    if isinstance(thing, type):
        for method, function in vars(thing).items():
            if method.startswith("_") or not (callable(function) or isinstance(function, (classmethod, staticmethod))):
                continue
            bound = getattr(thing, method)
            lines += ["```text", f"{name}.{method}{_parameters(bound)}", "", inspect.getdoc(bound) or "", "```", ""]
    return lines


def _parameters(thing: Any) -> str:  # noqa: ANN401
    """Return a signature without its types, which the docstring says in words."""
    if isinstance(thing, type) and issubclass(thing, Exception):
        return "(message)"
    signature = inspect.signature(thing)
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _is_table(annotation: object) -> bool:
    return is_typeddict(annotation) or (isinstance(annotation, type) and dataclasses.is_dataclass(annotation))


def _fields(table: Any) -> dict[str, Any]:  # noqa: ANN401  a TypedDict is no type to mypy
    return get_type_hints(table, include_extras=True)


def _collect(table: Any, found: dict[str, Any]) -> None:  # noqa: ANN401
    """Add every table that ``table`` refers to."""
    waiting = list(_fields(table).values())
    while waiting:
        annotation = waiting.pop()
        if _is_table(annotation):
            if annotation.__name__ not in found:
                found[annotation.__name__] = annotation
                waiting += _fields(annotation).values()
        else:
            waiting += [each for each in get_args(annotation) if not isinstance(each, str)]


def _kind(annotation: Any) -> str:  # noqa: ANN401
    """Return a type in words, tables as links."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if _is_table(annotation):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    if origin is NotRequired:
        return f"{_kind(arguments[0])}, may be absent"
    if origin in {Union, types.UnionType}:
        return " or ".join(_kind(each) for each in arguments)
    if origin is Literal:
        return " or ".join(f"`{each}`" for each in arguments)
    if origin in {list, tuple, dict}:
        return f"{'table' if origin is dict else 'list'} of {_kind(arguments[-1 if origin is dict else 0])}"
    return _NAMES[annotation]


def _summary(table: Any) -> str:  # noqa: ANN401
    """Return the first paragraph of a docstring."""
    return " ".join((inspect.getdoc(table) or "").split("\n\n")[0].split())


def _meanings(table: Any) -> dict[str, str]:  # noqa: ANN401
    """Return what the section Attributes of a docstring says of each field."""
    text = " ".join((inspect.getdoc(table) or "").partition("Attributes:")[2].split())
    names = "|".join(_fields(table))
    parts = re.split(rf"(?:^|(?<=[.;] ))((?:{names})(?:, (?:{names}))*): ", text)
    parts[2::2] = [re.sub(r"\bNone\b", "null", part) for part in parts[2::2]]
    return {name: parts[k + 1].strip() for k in range(1, len(parts) - 1, 2) for name in parts[k].split(", ")}


def _table(table: Any) -> list[str]:  # noqa: ANN401
    meanings, fields = _meanings(table), _fields(table)
    if not meanings:
        rows = [f"| `{name}` | {_kind(annotation)} |" for name, annotation in fields.items()]
        return ["| key | value |", "| --- | --- |", *rows, ""]
    rows = [
        # A pipe would end the cell.
        f"| `{name}` | {_kind(annotation)} | {meanings.get(name, '').replace('|', chr(92) + '|')} |"
        for name, annotation in fields.items()
    ]
    return ["| key | value | meaning |", "| --- | --- | --- |", *rows, ""]


PAGES = {"json.md": json_page, "ops.md": ops_page, "cli.md": cli_page, "api.md": api_page}


def main() -> None:
    """Write the pages."""
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
