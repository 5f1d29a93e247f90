"""The parts a page is laid out in: sections of tables, charts and words, the same for HTML and Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markupsafe import Markup


@dataclass(frozen=True)
class TableView:
    """Rows of cells under heads; the first column, and those in ``words``, hold words, the others numbers."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    words: tuple[int, ...] = ()
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """One section: text, charts (each with its caption), tables, code, a note."""

    title: str
    text: str = ""
    charts: tuple[tuple[Markup, str], ...] = ()
    tables: tuple[TableView, ...] = ()
    code: str = ""
    language: str = ""
    note: str = ""
