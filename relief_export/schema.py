"""Plain data to frozen dataclasses, driven by the annotations alone.

``convert(value, annotation, key)`` returns what the annotation wants or refuses the value in one sentence with the key.
A field says what is possible with ``Annotated[type, Rule(...)]``; nothing about a key is written anywhere else.

Two strictnesses, for two kinds of tables: a dataclass is configuration, in which an unknown key is a typing mistake; a
``TypedDict`` is a record of a program's own, which may hold more than the reader asks for.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from relief_export.errors import InputError

T = TypeVar("T")
Converter = Callable[[Any, Any, str], object]

_NAMES: dict[Any, str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    types.NoneType: "absent",
}


OWN = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"
"""A user's own function: package.module:function."""
_UNITS = {
    "b": 1,
    "k": 1024, "kib": 1024, "kb": 1000,
    "m": 1024**2, "mib": 1024**2, "mb": 1000**2,
    "g": 1024**3, "gib": 1024**3, "gb": 1000**3,
}  # fmt: skip
# The digits are bounded, so that no text overflows a float.
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([a-z]*)\s*", re.IGNORECASE)
_SHARE = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(%?)\s*")


def parse_size(text: object) -> int:
    """Return bytes: "256KiB" and "256k" are 256·1024 (as linkers count), "256kB" is 256·1000, "256B" is itself.

    Raises:
        InputError: It is no size. A bare number is refused too: 256 is taken for KiB as often as for bytes.
    """
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise InputError(f"{text!r} is no size: write a number with B, k, KiB, kB, M, MiB, MB, G, GiB or GB")
    return int(float(match[1]) * unit)


def parse_share(text: object) -> float:
    """Return a fraction: "2%" is 0.02, and so are "0.02" and the number 0.02.

    Raises:
        InputError: It is neither. A whole number without % is refused too, but for 0, and whatever is above 1: 2 is
            meant as 2 % as often as it is meant as twice.
    """
    match = _SHARE.fullmatch(text) if isinstance(text, str) else None
    if match is not None and match[2]:
        return float(match[1]) / 100
    whole = isinstance(text, int) if match is None else "." not in match[1]
    value = math.nan if match is None else float(match[1])
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        value = float(text)
    how = 'write a percentage such as "2%", or a fraction such as 0.02'
    if not 0 <= value < math.inf:
        raise InputError(f"{text!r} is no share: {how}")
    if value > 1 or (value and whole):
        raise InputError(f"{text!r} may be a percentage or a multiple: {how}")
    return value


def is_size(text: str) -> bool:
    """Return True if ``parse_size`` takes it."""
    try:
        parse_size(text)
    except InputError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value of the right type must still be: ``text`` completes "must be …"."""

    text: str
    holds: Callable[[Any], bool]


class Checked:
    """Base of the configuration dataclasses: the same checks whether read from a file or built in Python."""

    def __post_init__(self) -> None:
        for name, annotation in fields_of(type(self)).items():
            # The dataclasses are frozen, and lists are to become tuples all the same.
            object.__setattr__(self, name, convert(getattr(self, name), annotation, name))


def fields_of(cls: type) -> dict[str, Any]:
    """Return the resolved annotation of each field of the dataclass ``cls``, in order."""
    # With the extras, for the rules are in what Annotated adds to a type.
    hints = get_type_hints(cls, include_extras=True)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls)}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return '; did you mean "x"?', or the whole list where nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f'; did you mean "{close[0]}"?' if close else f"; known: {', '.join(known)}"


def build(cls: type[T], content: object, key: str) -> T:
    """Build the dataclass ``cls`` from a table of plain data found at ``key`` ("" at the top).

    Raises:
        InputError: A key is unknown or missing, or a value is of the wrong type or impossible.
    """
    if not isinstance(content, Mapping):
        raise InputError(f"{key} must be a table, not {_shown(content)}")
    prefix = f"{key}." if key else ""
    hints = fields_of(cls)
    # Before what is missing: of a misspelt key both are true, and its spelling is the cause.
    for name in content:
        if name not in hints:
            if name in (renamed := getattr(cls, "RENAMED", {})):
                raise InputError(f"{prefix}{name} is now {prefix}{renamed[name]}")
            raise InputError(f"{prefix}{name} is not a key{did_you_mean(name, hints)}")
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]  # T is a dataclass
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in content:
            raise InputError(f"{prefix}{item.name} is missing")
    values = {name: convert(value, hints[name], prefix + name) for name, value in content.items()}
    try:
        return cls(**values)
    except InputError as error:  # each value is possible, but not all of them together
        raise InputError(f"{key}: {error}" if key else str(error)) from None


def convert(value: object, annotation: Any, key: str) -> Any:  # noqa: ANN401  # annotations are any object
    """Return ``value`` as ``annotation`` wants it: lists become tuples, whole numbers may stand for numbers.

    Raises:
        InputError: The value is of the wrong type or breaks a rule; the sentence names ``key``.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return value
    if is_typeddict(annotation):
        check(value, annotation, key)
        return value
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return value if isinstance(value, annotation) else build(annotation, value, key)
    converter: Converter = _CONVERTERS.get(origin, _plain)
    return converter(value, annotation if origin is None else arguments, key)


def check(value: object, table: Any, key: str) -> None:  # noqa: ANN401  # a TypedDict is no type to mypy
    """Check that ``value`` holds every required key of the ``TypedDict`` called ``table``, each of its type.

    Raises:
        InputError: It is no table, or a key is missing or of another type; the sentence names it.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"{key} must be a table, not {_shown(value)}")
    for name, annotation in get_type_hints(table, include_extras=True).items():
        optional = get_origin(annotation) is NotRequired
        if name in value:
            convert(value[name], get_args(annotation)[0] if optional else annotation, f"{key}.{name}")
        elif not optional:
            raise InputError(f"{key}.{name} is missing")


def _plain(value: object, annotation: Any, key: str) -> object:  # noqa: ANN401
    if annotation is float and type(value) is int:
        value = float(value)
    # The exact type, because True is an int to isinstance.
    if type(value) is not annotation:
        raise InputError(f"{key} must be {_NAMES[annotation]}, not {_shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{key} must be a finite number, not {value}")
    return value


def _annotated(value: object, arguments: tuple[Any, ...], key: str) -> object:
    value = convert(value, arguments[0], key)
    for rule in arguments[1:]:
        if value is not None and not rule.holds(value):
            raise InputError(f"{key} must be {rule.text}, not {_shown(value)}")
    return value


def _literal(value: object, choices: tuple[Any, ...], key: str) -> object:
    if value not in choices:
        raise InputError(f"{key} cannot be {_shown(value)}{did_you_mean(str(value), choices)}")
    return value


def _union(value: object, choices: tuple[Any, ...], key: str) -> object:
    # The exact type first, so that 1 stays a whole number in `float | int`.
    plain = [choice for choice in choices if type(value) is choice]
    candidates = plain or [choice for choice in choices if choice is not types.NoneType]
    for choice in candidates[:-1]:
        try:
            return convert(value, choice, key)
        except InputError:
            continue
    # Outside of the try, so that the last choice's sentence is what the user reads.
    return convert(value, candidates[-1], key)


def _list(value: object, arguments: tuple[Any, ...], key: str) -> list[object]:
    return list(_tuple(value, arguments, key))


def _tuple(value: object, arguments: tuple[Any, ...], key: str) -> tuple[object, ...]:
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{key} must be a list, not {_shown(value)}")
    return tuple(convert(item, arguments[0], f"{key}[{place}]") for place, item in enumerate(value))


def _dict(value: object, arguments: tuple[Any, ...], key: str) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise InputError(f"{key} must be a table, not {_shown(value)}")
    return {name: convert(item, arguments[1], f"{key}.{name}") for name, item in value.items()}


_CONVERTERS: dict[Any, Converter] = {
    Annotated: _annotated,
    Literal: _literal,
    Union: _union,
    types.UnionType: _union,
    list: _list,
    tuple: _tuple,
    dict: _dict,
}


def plain(value: object) -> Any:  # noqa: ANN401  # plain data is any of the JSON types
    """Return dataclasses, tuples and tables as dictionaries and lists; fields that are None are left out."""
    if dataclasses.is_dataclass(value):
        pairs = ((item.name, getattr(value, item.name)) for item in dataclasses.fields(value))
        return {name: plain(held) for name, held in pairs if held is not None}
    if isinstance(value, Mapping):
        return {name: plain(held) for name, held in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _shown(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
