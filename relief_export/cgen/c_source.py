"""C source in pieces: templates filled in, numbers and names as C, and tables and functions that exist once each.

Both back ends write with it. Whatever is equal is shared by its content: two layers with the same mask have one table
of places, and two layers of the same sizes have one function.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from relief_export.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from relief_export.cgen.plan import Plan

KERNELS = Path(__file__).parent / "kernels"
C_TYPES = {"f4": "float", "u1": "uint8_t", "i1": "int8_t", "u2": "uint16_t", "u4": "uint32_t", "i4": "int32_t"}
"""C types by kind and bytes of a dtype."""
_WIDTH = 110


@cache
def _environment() -> jinja2.Environment:
    # Strict, because a misspelt name would otherwise vanish from the C without a word.
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(KERNELS), trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True, autoescape=False,  # noqa: S701  # C is no HTML
    )  # fmt: skip


def render(template: str, **values: object) -> str:
    """Fill in one of the files of kernels/."""
    return _environment().get_template(template).render(values)


def times(sizes: Sequence[int], sign: str = " x ") -> str:
    """Return sizes as text, ``3 x 32 x 32``."""
    return sign.join(str(n) for n in sizes)


def literal(number: float) -> str:
    """Return a float32 as C; nine digits tell all of them apart. The infinite becomes the largest that there is."""
    if math.isinf(number):
        number = math.copysign(np.finfo(np.float32).max, number)
    text = f"{np.float32(number):.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def comment(text: str) -> str:
    """Return a name that cannot end the comment it stands in."""
    return re.sub(r"[^\x20-\x7e]|\*/|/\*", "?", text)


def described(plan: Plan, name: str) -> dict[str, Any]:
    """Return what the templates of a program's files say of its network; ``name`` is the prefix of its functions."""
    title = f"{plan.input_name} ({times(plan.input_shape)}) -> {plan.output_name} ({times(plan.output_shape)})"
    return {
        "name": name, "upper": name.upper(), "title": comment(title), "version": VERSION,
        "input_size": math.prod(plan.input_shape), "output_size": math.prod(plan.output_shape),
        "input_name": comment(plan.input_name), "output_name": comment(plan.output_name),
        "input_shape": times(plan.input_shape), "output_shape": times(plan.output_shape),
    }  # fmt: skip


def totals(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return connections and multiply-adds of all layers, as comments show them."""
    return {key: f"{sum(row[key] for row in rows):,}" for key in ("connections", "macs")}


def table(name: str, kind: str, array: NDArray[Any], attribute: str) -> str:
    """Return the declaration of a constant array of the C type ``kind``."""
    write = literal if kind == "float" else str
    lines, line = [], "   "
    # C has no arrays without elements.
    for word in [write(number) for number in array.ravel().tolist()] or ["0"]:
        if len(line) + len(word) + 2 > _WIDTH:
            lines.append(line)
            line = "   "
        line += f" {word},"
    body = "\n".join([*lines, line])
    return f"static const {kind} {name}[{max(1, array.size)}] {attribute} = {{\n{body}\n}};\n"


@dataclass
class Tables:
    """Constants of the program, in order of use, without repetitions: ``arrays`` has the C type and values by name."""

    arrays: dict[str, tuple[str, NDArray[Any]]] = field(default_factory=dict)
    _names: dict[tuple[str, bytes], str] = field(default_factory=dict)

    def add(self, name: str, array: NDArray[Any]) -> str:
        """Return the name of a constant array, another's where one is equal; its C type follows from its dtype."""
        array = np.ascontiguousarray(array)
        kind = C_TYPES[f"{array.dtype.kind}{array.dtype.itemsize}"]
        # By content: equal layers, and layers with equal masks, share a table.
        key = (kind, array.tobytes())
        if key not in self._names:
            self._names[key] = name
            self.arrays[name] = (kind, array)
        return self._names[key]


@dataclass
class Functions:
    """C functions of the program, in order of use, without repetitions."""

    _names: dict[str, str] = field(default_factory=dict)

    def share(self, text: str, stem: str) -> str:
        """Return the name of a function whose text calls it NAME; equal texts are one function."""
        # Compared under the placeholder: with their names in them equal functions would look different.
        if text not in self._names:
            name, k = stem, 2
            taken = set(self._names.values())
            while name in taken:
                name, k = f"{stem}_{k}", k + 1
            self._names[text] = name
        return self._names[text]

    def need(self, name: str, text: str) -> None:
        """Add a function that others call, in front of all of them: C wants it defined before."""
        if name not in self._names.values():
            self._names = {text: name} | self._names

    def texts(self) -> list[str]:
        """Return their texts under their names."""
        return [text.replace("NAME", name) for text, name in self._names.items()]


@dataclass
class Call:
    """A call under construction, and the function it will call.

    Attributes:
        parameters, arguments: Of the function beyond those that its template has, and what is given for them.
        channel: Lines of C at the start of each output channel. lines: What is done to each element ``v``.
    """

    parameters: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    channel: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def take(self, parameter: str, argument: object) -> None:
        """Add a parameter with its argument."""
        self.parameters.append(parameter)
        self.arguments.append(str(argument))
