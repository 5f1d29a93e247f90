"""Render docs/results.md and a page for each run from the records: ``python -m benchmarks.results``.

No number on these pages is typed: runs come from benchmarks/results/runs/*.json, benchmarks from the files beside it.
A section whose records are absent is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
import statistics
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.common import RESULTS, ROOT
from relief_export.errors import IntegrityError
from relief_export.recipe import load_recipe
from relief_export.records import read_json, write_bytes
from relief_export.report.numbers import (
    format_bytes,
    format_milliseconds,
    format_percent,
    format_points,
    format_ratio,
    format_seconds,
)
from relief_export.report.page import escape_markdown

Table = dict[str, Any]

DOCS = ROOT / "docs"
PUBLISHED = Path(__file__).with_name("published.json")
"""What others report, by data/network: accuracies are fractions, ``fewer`` is dense over kept connections, ``bytes`` of
the weights as they store them; null where a publication does not say."""
EXPORTED = "exported, in ONNX Runtime"
_HOW_FAR = re.compile(r"(seed|relief\.rounds|relief\.patience)=")
"""Settings in which runs of one group may differ."""


def render(results: Path = RESULTS) -> dict[str, str]:
    """Return the pages as Markdown, by their paths in docs/: one screen of everything, and a page for each run.

    Raises:
        IntegrityError: A record is damaged, or lacks what its section needs; the message names it.
    """
    runs = [read_json(path) | {"path": path} for path in sorted((results / "runs").glob("*.json"))]
    tables = [read_json(path) | {"path": path} for path in sorted(results.glob("*.json"))]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701  Markdown, escaped by its own filter
    )
    environment.filters |= {
        "md": escape_markdown,
        "bytes": format_bytes,
        "ms": format_milliseconds,
        "percent": lambda value: "–" if value is None else format_percent(value),
        "duration": format_seconds,
    }
    environment.globals |= {"ratio": format_ratio, "points": format_points, "cell": cell, "smallest": smallest}
    environment.globals |= {"EXPORTED": EXPORTED, "page_name": page_name}

    def page(template: str, **context: Any) -> str:  # noqa: ANN401  whatever the template shows
        text = environment.get_template(template).render(**context)
        return "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"

    try:
        seeds = [group for group in map(seed_group, _alike(runs)) if len(set(group["numbers"])) > 1]
        # Records of earlier versions do not say it.
        apart = [table for table in tables if table.get("own_page", False)]
        # A baseline is no result of its own: it stands beside the run that it is compared with.
        ours = [run for run in runs if _score(run) == "activity"]
        pages = {
            "results.md": page(
                "results.md.j2",
                runs=ours,
                seeds=seeds,
                scores=scores(runs),
                others=beside(ours),
                machines=machines(runs, tables),
                apart=apart,
            )
        }
        for run in runs:
            group = next((group for group in seeds if run["name"] in group["names"]), None)
            pages[f"results/{page_name(run)}"] = page("results_run.md.j2", run=run, group=group)
        together = [table for table in tables if not table.get("own_page", False)]
        if together:
            pages["results/benchmarks.md"] = page("results_benchmarks.md.j2", title="Benchmarks", benchmarks=together)
        for table in apart:
            title = table["benchmark"].capitalize()
            pages[f"results/{table['benchmark']}.md"] = page(
                "results_benchmarks.md.j2", title=title, benchmarks=[table]
            )
    except (jinja2.UndefinedError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"a record under {results} lacks what docs/results.md shows ({error}): make it again"
        ) from None
    return pages


def page_name(run: Table) -> str:
    """Return the file name of a run's page: that of its record, whose @ would end a link in some readers."""
    return f"{run['name'].replace('@', '-')}.md"


def _score(run: Table) -> str:
    """Return what a run pruned by; records of earlier versions do not say it."""
    return str(run.get("score", "activity"))


def scores(runs: list[Table]) -> list[Table]:
    """Group each run of relief with its baselines: the runs with its name, a dash and their score behind it.

    Returns:
        For each group its name, its runs with relief's first, and for each round the share that relief kept and the
        test accuracy of each run; None where a run has no such round.
    """
    groups = []
    for own in runs:
        named = {f"{own['name']}-{_score(run)}": run for run in runs}
        baselines = [run for name, run in sorted(named.items()) if run["name"] == name]
        if _score(own) != "activity" or not baselines:
            continue
        together = [own, *baselines]
        rounds = [
            {"kept": rows[0]["kept"] / rows[0]["dense"], "test": [row and row["test_accuracy"] for row in rows]}
            for rows in itertools.zip_longest(*(run["history"] for run in together))
            if rows[0] is not None
        ]
        groups.append(
            {"name": own["name"], "runs": [run | {"score": _score(run)} for run in together], "rounds": rounds}
        )
    return groups


def _alike(runs: list[Table]) -> list[list[Table]]:
    """Group the runs that differ in nothing but the seed and how far they went."""

    def settings(run: Table) -> tuple[str, ...]:
        words = [word for part in shlex.split(run["command"]) for word in shlex.split(part.removeprefix("SETTINGS="))]
        return tuple(word for word in words if word != "--set" and not _HOW_FAR.match(word))

    ordered = sorted(runs, key=lambda run: (settings(run), run["seed"]))
    return [list(group) for _, group in groupby(ordered, key=settings)]


def seed_group(runs: list[Table]) -> Table:
    """Summarise the runs of one recipe over their seeds: means and extremes, of the results and of each round."""
    columns = {
        "dense": [run["accuracy"]["dense"]["test"] for run in runs],
        "relieved": [run["accuracy"]["relieved"]["test"] for run in runs],
        "exported": [run["accuracy"][EXPORTED]["test"] for run in runs],
        "kept": [run["connections"]["kept"] / run["connections"]["dense"] for run in runs],
    }
    rounds = [
        {
            "kept": _spread([row["kept"] / row["dense"] for row in rows]),
            "test": _spread([row["test_accuracy"] for row in rows]),
            "peak": _spread([row["peak_test_accuracy"] for row in rows if row["peak_test_accuracy"] is not None]),
        }
        for rows in zip(*(run["history"] for run in runs), strict=False)  # as far as all of them went
    ]
    spread = {name: _spread(values) for name, values in columns.items()}
    about = {"recipe": runs[0]["recipe"], "numbers": [run["seed"] for run in runs], "rounds": rounds}
    return about | {"names": [run["name"] for run in runs]} | spread


def _spread(values: list[float]) -> tuple[float, float, float] | None:
    return (statistics.mean(values), min(values), max(values)) if values else None


def beside(runs: list[Table]) -> list[Table]:
    """Return the published figures of the networks that were run, each with the runs of that network."""
    recipes = [load_recipe(run["recipe"]) for run in runs]
    networks = [f"{recipe.data.source}/{recipe.model.name}" for recipe in recipes]
    return [
        {"network": name, "rows": rows, "runs": [run for run, own in zip(runs, networks, strict=True) if own == name]}
        for name, rows in read_json(PUBLISHED).items()
        if name in networks
    ]


def smallest(run: Table, *, exact: bool = False) -> Table:
    """Return the smallest file of a run that passed and that ONNX Runtime loads: of all, or of the exact ones."""
    files = [file for file in run["files"] if file["ok"] and file["loads"] and (file["exact"] or not exact)]
    return min(files, key=lambda file: file["bytes"], default={})


def machines(runs: list[Table], tables: list[Table]) -> list[str]:
    """Name each machine that something was measured on, once."""
    found = [machine for run in runs for machine in run["machines"].values()]
    found += [row["machine"] for table in tables for row in table["rows"]]
    return sorted({f"{m['cpu']}, {m['cores']} cores, {m['system']}" for m in found})


def cell(row: Table, column: Table) -> str:
    """Write one cell of a benchmark's table as its column says; a dash where the row has no such figure."""
    value = row.get(column["key"])
    if value is None:
        return "–"
    if isinstance(value, bool | str | list | dict):
        return escape_markdown(value if isinstance(value, str) else json.dumps(value))
    scaled = value if column["scale"] == 1 else value * column["scale"]  # a count stays an integer
    return f"{scaled:{column['format']}}" if column["format"] else f"{scaled:,}"


def main() -> None:
    """Write the pages, and remove those of runs that have no record any more."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description="Render docs/results.md.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the pages (default: %(default)s)")
    options = parser.parse_args()
    pages = render(options.results)
    for path in (options.out / "results").glob("*.md"):
        if f"results/{path.name}" not in pages:
            path.unlink()
    for name, text in pages.items():
        write_bytes(options.out / name, text.encode())
        print(options.out / name)


if __name__ == "__main__":
    main()
