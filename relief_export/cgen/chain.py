"""A chain of elementwise operations as C: which operation becomes which statement on a variable, in either back end.

A back end is a ``Chain`` that says what a number, one number a channel and another map's element look like in its C.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from relief_export.cgen.c_source import Call
    from relief_export.cgen.plan import Op, View

_SYMBOLS = {"Add": "+", "Sub": "-", "Mul": "*", "Div": "/"}


class Chain(ABC):
    """Writes the operations of a step's chain into a call: its parameters, and what is done to each element ``v``."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def write(self, ops: Iterable[Op], v: str = "v", prefix: str = "") -> None:
        """Append operations on the variable ``v``; names of parameters end in ``prefix`` and the operation's number."""
        for number, op in enumerate(ops):
            self._append(op, f"{prefix}{number}", v)

    def _append(self, op: Op, k: str, v: str) -> None:
        lines = self.call.lines
        if op.kind == "Affine":
            factor = self._of_channel(f"scale{k}", op.scale, neutral=1)
            shift = self._of_channel(f"shift{k}", op.shift, neutral=0)
            right = f"{v} * {factor}" if factor else v
            lines.append(f"{v} = {right} + {shift};" if shift else f"{v} = {right};")
        elif op.kind == "PRelu":
            slope = self._of_channel(f"slope{k}", op.scale, neutral=None)
            lines.append(f"{v} = {self.if_negative(v, f'{v} * {slope}')};")
        elif op.kind == "Gate":
            self.gate(op, k, v)
        elif op.operand is not None:
            other = self.operand(op.operand, k)
            if op.kind in _SYMBOLS:
                left, right = (other, v) if op.swapped else (v, other)
                lines.append(f"{v} = {left} {_SYMBOLS[op.kind]} {right};")
            else:
                lines.append(self.extremum(op, v, other))
        else:
            lines += self.activation(op.kind, op.constants, v)

    def _of_channel(self, name: str, array: NDArray[Any] | None, *, neutral: float | None) -> str:
        """Return the C for one number a channel: a literal where all are equal, empty where they are neutral."""
        assert array is not None  # noqa: S101  # these operations have it
        first = float(array[0])
        if (array == first).all():
            return "" if first == neutral else self.number(first)
        return self.of_channel(name, array)

    @abstractmethod
    def number(self, value: float) -> str:
        """Return a number."""

    @abstractmethod
    def of_channel(self, name: str, array: NDArray[Any]) -> str:
        """Return the channel's number, of a table that becomes a parameter of that name."""

    @abstractmethod
    def operand(self, view: View, k: str) -> str:
        """Return the element of another map that stands where the variable's does."""

    @abstractmethod
    def if_negative(self, v: str, other: str) -> str:
        """Return ``other`` where the variable is negative, else the variable."""

    @abstractmethod
    def gate(self, op: Op, k: str, v: str) -> None:
        """Append the product of the variable with a chain of its own."""

    @abstractmethod
    def extremum(self, op: Op, v: str, other: str) -> str:
        """Return the statement that makes the variable the ``Max`` or ``Min`` of itself and another."""

    @abstractmethod
    def activation(self, kind: str, constants: tuple[float, ...], v: str) -> list[str]:
        """Return the statements of an activation."""
