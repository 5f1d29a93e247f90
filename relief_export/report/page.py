"""One self-contained HTML page and its Markdown twin, from the records of build folders alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from relief_export.errors import InputError
from relief_export.records import write_bytes
from relief_export.report.facts import read_run
from relief_export.report.views import compare, view
from relief_export.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass(frozen=True)
class ReportPaths:
    """Where the two renderings were written."""

    html: Path
    markdown: Path


def build_report(folders: Sequence[Path], out: Path) -> ReportPaths:
    """Write ``out/report.html`` and ``out/report.md`` about one run, or one page that compares several.

    Args:
        folders: Build folders, in the order of the page.
        out: Folder of the pages; made where it does not exist.

    Raises:
        InputError: No folder, a record is missing (the message names file and stage), or the output cannot be written.
        IntegrityError: A record is damaged, or older than the files it speaks of.
    """
    if not folders:
        raise InputError("a report needs at least one build folder")
    runs = [read_run(folder) for folder in folders]
    single = len(runs) == 1
    context = {
        "title": runs[0].name if single else f"Comparison of {len(runs)} runs",
        "version": VERSION,
        "comparison": None if single else compare(runs),
        "views": [view(run) for run in runs],
    }
    paths = ReportPaths(out / "report.html", out / "report.md")
    for path, template in ((paths.html, "page.html.j2"), (paths.markdown, "page.md.j2")):
        text = environment().get_template(template).render(context)
        write_bytes(path, re.sub(r"\n{3,}", "\n\n", text).strip().encode() + b"\n")
    return paths


def environment() -> jinja2.Environment:
    """Return the templates: HTML is escaped, Markdown by the filter ``md``; an undefined name is an error."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("relief_export.report"),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.j2",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["md"] = escape_markdown
    source, _, _ = found.loader.get_source(found, "style.css")  # type: ignore[union-attr]  # given above
    found.globals["style"] = Markup(source)  # noqa: S704  our own file
    return found


def escape_markdown(text: object) -> str:
    """Escape what Markdown or HTML would read as markup, and keep a table's cell on its line."""
    escaped = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", str(text).replace("&", "&amp;").replace("<", "&lt;"))
    return " ".join(escaped.split())
