"""What stands on the page, in order: the verdict, the leading figures, then the sections, all as plain text and charts.

The HTML page and its Markdown twin are two renderings of the same views, so that they cannot say different things.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from relief_export.report import charts, closing, sections
from relief_export.report.facts import reading
from relief_export.report.layout import Section, TableView
from relief_export.report.text import NONE, format_bytes, format_percent, format_points, format_ratio, percent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from markupsafe import Markup

    from relief_export.report.facts import Run

_SECTIONS: tuple[tuple[str, Callable[[Run], Section | None]], ...] = (
    ("relieve", sections.accuracy),
    ("export", sections.costs),
    ("export", sections.files),
    ("export", sections.anatomy),
    ("relieve", sections.iterations),
    ("relieve", sections.layers),
    ("relieve", sections.inputs),
    ("export", sections.kept),
    ("validate", closing.latency),
    ("audit", closing.audit),
    ("export", closing.usage),
    ("export", closing.provenance),
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
    chart: Markup


def view(run: Run) -> View:
    """Lay out one run.

    Raises:
        IntegrityError: A record lacks a figure; the message names it with its stage.
    """
    found = []
    for stage, section in _SECTIONS:
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
    """Answer in one sentence whether it is the same network, and how much smaller."""
    validation, original = run.validation, run.sizes["original"]
    on = f"{len(validation['checks'])} checks in ONNX Runtime, {validation['samples']:,} samples of the {_source(run)}"
    exact, smallest = run.smallest(exact=True), run.smallest(exact=False)
    if not run.ok:
        wrong = [file.name for file in run.files if file.ok is False]
        first = validation["failures"][0]["message"]
        return "Not the same network.", f"Validation failed for {', '.join(wrong) or 'an artifact'} ({on}): {first}."
    reason = f"Every artifact ({len(run.files)}) kept its promise to the relieved network ({on})."
    if exact is None or exact.bytes >= original:
        answer = "The same network, but no smaller."
    else:
        answer = f"The same network, {format_ratio(original, exact.bytes)} smaller."
        reason += (
            f" {exact.name} has {format_bytes(exact.bytes)} where the dense ONNX file has {format_bytes(original)}."
        )
    if smallest is not None and smallest != exact and exact is not None:
        change = format_points(smallest.accuracy, exact.accuracy)
        moved = "keeps the accuracy" if change == "+0.00" else f"moves the accuracy by {change} points"
        reason += f" {smallest.name}, whose values are rounded, has {format_bytes(smallest.bytes)}"
        reason += f" ({format_ratio(original, smallest.bytes)}) and {moved}."
    return ("Provisional: " + answer.lower() if validation.get("provisional") else answer), reason


def _sentence(text: str | None) -> str:
    return f"{text.rstrip('.')}." if text else ""


def _source(run: Run) -> str:
    return str(run.validation.get("source", "data given"))


def _figures(run: Run) -> tuple[tuple[str, str, str], ...]:
    dense, kept = run.connections
    parameters, macs, best = run.costs["parameters"], run.costs["macs"], run.smallest(exact=False)
    accuracies = [percent(test) for _, test in run.accuracy.values()]
    share = format_percent(kept / dense)
    figures = [
        ("Test accuracy", accuracies[-1], f"ONNX Runtime; relieved {accuracies[1]}, dense {accuracies[0]}"),
        ("Connections kept", share, f"{kept:,} of {dense:,}, {format_ratio(dense, kept)} fewer"),
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
        "connections kept",
        "test accuracy",
        "against dense",
        "smallest file",
        "bytes",
        "smaller",
    )
    rows = []
    points = []
    for run in runs:
        best, dense = run.smallest(exact=False), run.accuracy["dense"][1]
        share = format_percent(run.connections[1] / run.connections[0])
        cells: tuple[str, ...] = (NONE,) * 5
        if best is not None:
            sizes = (f"{best.bytes:,}", format_ratio(run.sizes["original"], best.bytes))
            cells = (percent(best.accuracy), format_points(best.accuracy, dense), best.name, *sizes)
        rows.append((run.name, "passed" if run.ok else "FAILED", share, *cells))
        files = [(file.name, file.bytes, file.accuracy) for file in run.files if file.ok and file.accuracy is not None]
        start = [] if dense is None else [("dense", run.sizes["original"], dense)]
        points.append((run.name, start + files))
    return Comparison(TableView(heads, tuple(rows), words=(5,)), charts.pareto_chart(points))
