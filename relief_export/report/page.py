"""One self-contained HTML page and its Markdown twin, from the records of folders alone.

The order of the page: the verdict, the leading figures, then the sections. Both renderings are made of the same views,
so that they cannot say different things.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from relief_export.errors import InputError
from relief_export.printing import counted
from relief_export.records import write_bytes
from relief_export.report import charts, sections
from relief_export.report.numbers import NONE, format_bytes, format_percent, format_points, format_ratio, percent
from relief_export.report.run import read_run, reading
from relief_export.report.sections import Section, TableView
from relief_export.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from relief_export.report.run import Run


_SECTIONS: tuple[tuple[str, Callable[[Run], Section | None]], ...] = (
    ("relieve", sections.accuracy),
    ("export", sections.files),
    ("export", sections.costs),
    ("relieve", sections.rounds),
    ("relieve", sections.layers),
    ("relieve", sections.inputs),
    ("export", sections.removal),
    ("export", sections.breakdown),
    ("validate", sections.latency),
    ("audit", sections.audit),
    ("run-on", sections.device),
    ("export", sections.usage),
    ("export", sections.provenance),
)
"""The order of the page, each with the stage whose record it reads; what has nothing to say of a run is left out."""


@dataclass(frozen=True)
class View:
    """One run: the verdict, its leading figures (label, value, against what), and the sections."""

    name: str
    description: str
    reproduces: str
    ok: bool
    answer: str
    reason: str
    figures: tuple[tuple[str, str, str], ...]
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class Comparison:
    """Several runs at a glance."""

    table: TableView
    chart: Markup | None


def view(run: Run) -> View:
    """Lay out one run.

    Raises:
        IntegrityError: A record lacks a figure; the message names it with its stage.
    """
    found = []
    for stage, section in _SECTIONS:
        # A section reads far into a record: what it misses there is reported by the record's name.
        with reading(run.folder, stage):
            found.append(section(run))
    with reading(run.folder, "validate"):
        answer, reason = verdict(run)
    return View(
        name=run.name,
        description=_sentence(run.recipe.get("description")),
        reproduces=_sentence(run.recipe.get("reproduces")),
        ok=run.ok,
        answer=answer,
        reason=reason,
        figures=_figures(run),
        sections=tuple(section for section in found if section is not None),
    )


def verdict(run: Run) -> tuple[str, str]:
    """Say in one sentence how much smaller the same outputs are, and in a few more what that was measured on."""
    original, validation = run.sizes["original"], run.validation
    exact, smallest = run.smallest(exact=True), run.smallest(exact=False)
    smaller = (
        "No smaller" if exact is None or exact.bytes >= original else f"{format_ratio(original, exact.bytes)} smaller"
    )
    if validation is None:
        return "Not validated yet.", f"{smaller}, as far as bytes go: run relief-export validate on this folder."
    on = (
        f"{counted(len(validation['checks']), 'check')} in ONNX Runtime, {counted(validation['samples'], 'sample')} of "
    )
    on += _source(validation)
    if not run.ok:
        wrong = [file.name for file in run.files if file.ok is False]
        first = validation["failures"][0]["message"]
        return (
            "Other outputs than the pruned network.",
            f"Validation failed for {', '.join(wrong) or 'a file'} ({on}): {first}.",
        )
    answer = f"{smaller}, same outputs as the pruned network"
    dense, pruned = (run.accuracy.get(name, (None, None))[1] for name in ("dense", "relieved"))
    if dense is not None and pruned is not None:
        points = format_points(pruned, dense)
        answer += "; the original's test accuracy" if points == "+0.00" else f"; {points} points against the original"
    reason = f"Every file ({len(run.files)}) is within its tolerance ({on})."
    if dense is not None and pruned is not None:
        reason += f" Test accuracy {percent(pruned)}, of the original {percent(dense)}."
    if exact is not None and exact.bytes < original:
        reason += (
            f" {exact.name} has {format_bytes(exact.bytes)} where the dense ONNX file has {format_bytes(original)}."
        )
    # Where the smallest file is an exact one, there is no second file to tell of.
    if smallest is not None and smallest != exact and exact is not None:
        change = format_points(smallest.accuracy, exact.accuracy)
        moved = {"+0.00": "the same accuracy", NONE: "an accuracy that was not measured"}.get(
            change, f"{change} points of accuracy"
        )
        reason += f" {smallest.name}, quantised, has {format_bytes(smallest.bytes)}"
        reason += f" ({format_ratio(original, smallest.bytes)} smaller) and {moved}."
    return (
        f"Provisional: {answer[:1].lower()}{answer[1:]}." if validation.get("provisional") else f"{answer}."
    ), reason


def _sentence(text: str | None) -> str:
    return f"{text.rstrip('.')}." if text else ""


def _source(validation: dict[str, Any]) -> str:
    source = str(validation.get("source", "data that were given"))
    return "the test set" if source == "test set" else source


def _figures(run: Run) -> tuple[tuple[str, str, str], ...]:
    parameters, macs, best = run.costs["parameters"], run.costs["macs"], run.smallest(exact=False)
    figures = []
    if known := {name: percent(test) for name, (_, test) in run.accuracy.items() if test is not None}:
        *before, last = known.items()
        detail = ", ".join(f"{sections.NETWORKS.get(name, name)} {value}" for name, value in reversed(before))
        figures.append(("Test accuracy", last[1], f"ONNX Runtime; {detail}" if detail else "ONNX Runtime"))
    if run.connections is not None:
        dense, kept = run.connections
        detail = f"{kept:,} of {dense:,} weights and biases, {format_ratio(dense, kept)} fewer"
        figures.append(("Density", format_percent(kept / dense), detail))
    figures += [
        ("Parameters stored", f"{parameters[1]:,}", f"of {parameters[0]:,}; {parameters[2]:,} are not zero"),
        ("MACs", f"{macs[1]:,}", f"of {macs[0]:,}; {macs[2]:,} with a non-zero weight"),
    ]
    if best is not None:
        detail = f"{best.name}; the dense file has {format_bytes(run.sizes['original'])}"
        figures.append(("Smallest file", format_bytes(best.bytes), detail))
    return tuple(figures)


def compare(runs: Sequence[Run]) -> Comparison:
    """Put several runs side by side, and every verified file of theirs on one chart."""
    heads = (
        "run",
        "validation",
        "density",
        "test accuracy",
        "against dense",
        "smallest file",
        "bytes",
        "smaller",
    )
    rows = []
    points = []
    for run in runs:
        best, dense = run.smallest(exact=False), run.accuracy.get("dense", (None, None))[1]
        share = NONE if run.connections is None else format_percent(run.connections[1] / run.connections[0])
        cells: tuple[str, ...] = (NONE,) * 5
        if best is not None:
            sizes = (f"{best.bytes:,}", format_ratio(run.sizes["original"], best.bytes))
            cells = (percent(best.accuracy), format_points(best.accuracy, dense), best.name, *sizes)
        rows.append(
            (run.name, "not run" if run.validation is None else "passed" if run.ok else "FAILED", share, *cells)
        )
        files = [(file.name, file.bytes, file.accuracy) for file in run.files if file.ok and file.accuracy is not None]
        start = [] if dense is None else [("original", run.sizes["original"], dense)]
        points.append((run.name, start + files))
    drawn = [(name, found) for name, found in points if found]
    return Comparison(TableView(heads, tuple(rows), words=(5,)), charts.pareto_chart(drawn) if drawn else None)


@dataclass(frozen=True)
class ReportPaths:
    """Where the two renderings were written."""

    html: Path
    markdown: Path


def build_report(folders: Sequence[Path], out: Path) -> ReportPaths:
    """Write ``out/report.html`` and ``out/report.md`` about one run, or one page that compares several.

    Args:
        folders: Build folders or folders that an export wrote, in the order of the page.
        out: Folder of the pages; made where it does not exist.

    Raises:
        InputError: No folder, a record is missing (the message names file and stage), or the output cannot be written.
        IntegrityError: A record is damaged, or older than the files it speaks of.
    """
    if not folders:
        raise InputError("a report needs at least one folder")
    runs = [read_run(folder) for folder in folders]
    single = len(runs) == 1
    # All views are made before the first file is written: a record that lacks a figure leaves the old page.
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
        # A misspelt name would otherwise be an empty place on the page that nobody notices.
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
