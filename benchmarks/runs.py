"""Keep what a run measured: build/NAME's records -> benchmarks/results/runs/NAME.json, small enough to commit.

``python -m benchmarks.runs build/NAME ...`` does it; docs/results.md is rendered from these files.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import RESULTS
from relief_export.errors import ReliefError
from relief_export.recipe import load_recipe
from relief_export.records import write_json
from relief_export.report.page import verdict
from relief_export.report.run import read_run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relief_export.report.run import Run

RUNS = RESULTS / "runs"
_WORDS = ("name", "description", "reproduces")
"""Keys of a recipe on which no figure depends."""


def summary(run: Run) -> dict[str, Any]:
    """Return the figures of one run that docs/results.md shows, and what it takes to repeat them."""
    seconds = {stage: round(record.seconds, 1) for stage, record in run.records.items()}
    # A relief that was interrupted, or that chose again, has the time of its last call only.
    seconds["relieve"] = max(seconds["relieve"], round(sum(row["seconds"]["all"] for row in run.rounds), 1))
    history = ("kept", "dense", "accuracy_before", "accuracy", "test_accuracy", "eligible")
    assert run.connections is not None
    assert run.recipe is not None
    files = [asdict(file) for file in run.files]
    return {
        "name": run.folder.resolve().name,
        "recipe": run.recipe["name"],
        "seed": run.recipe["seed"],
        "score": run.recipe["relief"].get("score", "activity"),
        "description": run.recipe["description"],
        "command": command(run.recipe),
        "verdict": " ".join(verdict(run)),
        "ok": run.ok,
        "samples": run.samples,
        "accuracy": {label: {"validation": v, "test": t} for label, (v, t) in run.accuracy.items()},
        "connections": {"dense": run.connections[0], "kept": run.connections[1]},
        "chosen": run.chosen,
        "history": [
            {key: row[key] for key in history} | {"peak_test_accuracy": row.get("peak_test_accuracy")}
            for row in run.rounds
        ],
        "layers": run.rounds[run.chosen]["layers"],
        "costs": {key: dict(zip(("dense", "structural", "nonzero"), run.costs[key], strict=True)) for key in run.costs},
        "paper_flops": {"dense": run.paper_flops[0], "structural": run.paper_flops[1]},
        "arena": {key: plan["arena_bytes"] for key, plan in run.arena.items() if plan},
        "sizes": run.sizes,
        "files": files,
        "latency": (run.validation or {}).get("latency", []),
        "seconds": seconds | {"all": round(sum(seconds.values()), 1)},
        "machines": {stage: record.machine for stage, record in run.records.items()},
        "versions": run.records["export"].versions,
    }


def command(recipe: dict[str, Any]) -> str:
    """Return the make command that repeats a resolved recipe: its name, and the settings that differ from its file."""
    filed = dict(_flat(load_recipe(recipe["name"]).to_dict()))
    changed = {key: value for key, value in _flat(recipe) if key not in _WORDS and filed.get(key, _WORDS) != value}
    # A key of the retraining that follows [train] needs no setting of its own.
    own = {k: v for k, v in changed.items() if changed.get(re.sub(r"^relief\.retrain\.", "train.", k)) != v}
    own |= {k: v for k, v in changed.items() if not k.startswith("relief.retrain.")}
    settings = " ".join(f"--set {shlex.quote(f'{key}={json.dumps(own[key])}')}" for key in sorted(own))
    return f"make {recipe['name']}" + (f" SETTINGS={shlex.quote(settings)}" if settings else "")


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.loads(json.dumps(value))


def main() -> None:
    """Extract the named build folders; exit 2 with one sentence where a record is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runs", description="Keep what runs measured.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="build/NAME")
    parser.add_argument("--out", type=Path, default=RUNS, help="folder of the summaries (default: %(default)s)")
    options = parser.parse_args()
    for folder in options.folders:
        try:
            found = summary(read_run(folder))
        except ReliefError as error:
            print(error, file=sys.stderr)
            raise SystemExit(2) from None
        path = options.out / f"{found['name']}.json"
        write_json(path, found)
        print(path)


if __name__ == "__main__":
    main()
