"""Results that print as a small table, in a terminal and in a notebook."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class TextTable(NamedTuple):
    """A heading, the columns' names and the rows; the first column is a name, the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    def text(self) -> str:
        """Return the table for a terminal, columns aligned."""
        cells = [[str(cell) for cell in row] for row in (self.columns, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(pairs))
            for pairs in (tuple(zip(row, widths, strict=True)) for row in cells)
        ]
        return "\n".join(line.rstrip() for line in (self.title, *lines))

    def html(self) -> str:
        """Return the table for a notebook."""

        def row(cells: Sequence[object], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        head = f"<caption>{escape(self.title)}</caption><thead>{row(self.columns, 'th')}</thead>"
        return f"<table>{head}<tbody>{body}</tbody></table>"


class Prints:
    """Base of results that know their table; ``repr`` of a dataclass stays as it is."""

    def table(self) -> TextTable:
        """Return what is printed."""
        raise NotImplementedError

    def __str__(self) -> str:
        """Return the table as text."""
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()

    def _repr_pretty_(self, printer: object, cycle: bool) -> None:
        """Print the table in IPython too, where it would show the ``repr``."""
        del cycle
        printer.text(str(self))  # type: ignore[attr-defined]  # IPython's printer, which is not imported here


def percent(share: float | None, *, sign: bool = False) -> str:
    """Write a fraction as a percentage, a change with its sign; a dash where it is unknown."""
    return "-" if share is None else f"{100 * share:{'+' if sign else ''}.2f} %"


def points(share: float) -> str:
    """Write a difference of two percentages, given as a fraction, in points."""
    size = 100 * share
    # A change too small for two digits is still one.
    return f"{size:{'.2f' if not size or abs(size) >= 0.01 else '.2g'}} points"


def counted(count: int, what: str) -> str:
    """Write a number with what it counts, "1 file" and "2 files"; ``what`` is the singular of a regular noun."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
