"""What a command prints with --json, checked against the tables that docs/reference/json.md is made from."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, get_type_hints

from relief_export.cli.answers import ANSWERS
from relief_export.schema import check

TABLES = {name: table for names, table in ANSWERS.items() for name in names.split(", ")}
"""Command -> the table of its result."""
ENVELOPE = ["schema", "command", "ok", "result", "failures", "error"]
_SIZE = re.compile("byte|size|flash$|ram$|gzip$|bound$|stack$|arena$")


def sizes_in(found: object, path: str = "") -> Iterator[str]:
    """Yield the paths of numbers whose keys look like sizes without saying their unit."""
    if isinstance(found, dict):
        for key, value in found.items():
            if type(value) in {int, float} and _SIZE.search(key) and not key.endswith("_bytes"):
                yield f"{path}.{key}"
            yield from sizes_in(value, f"{path}.{key}")
    for index, item in enumerate(found if isinstance(found, list) else ()):
        yield from sizes_in(item, f"{path}[{index}]")


def check_answer(answer: dict[str, Any], command: str | None = None) -> None:
    """Check an answer's envelope, that its result has every key of the reference and no other, and the sizes' keys."""
    assert list(answer) == ENVELOPE
    table = TABLES[command or answer["command"]]
    result = answer["result"]
    check(result, table, "result")
    names = [field.name for field in dataclasses.fields(table)] if dataclasses.is_dataclass(table) else None
    assert list(result) == (names or list(get_type_hints(table)))
    assert list(sizes_in(result)) == []
