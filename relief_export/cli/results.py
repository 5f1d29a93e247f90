"""What came of a run or a stage: read from the records, laid out for people."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from relief_export.cli.common import table
from relief_export.records import RECORDS, read_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from relief_export.convert import Shrunk
    from relief_export.evaluation import Comparison
    from relief_export.graph.cost import Cost
    from relief_export.stages import Done

Table = dict[str, Any]


def summarize(folder: Path) -> Table:
    """Collect the closing figures of a run from its records; accuracies are fractions of the test set."""
    records = {stage: read_record(folder / path, stage) for stage, path in RECORDS.items()}
    train, relieve, quantise, export, validate, audit = (record.outcome for record in records.values())
    rounded = {} if quantise["values"] is None else {"quantised": quantise["test"]}
    dense, kept = relieve["connections"]["dense"], relieve["connections"]["kept"]
    files = [
        {"name": entry["name"], "format": entry["format"], "bytes": sum(file["bytes"] for file in entry["files"])}
        | {"accuracy": _accuracy(validate, entry["name"])}
        for entry in export["artifacts"]
    ]
    return {
        "ok": validate["ok"] and audit["ok"],
        "name": records["export"].recipe["name"],
        "accuracy": {
            "dense": train["test"],
            "relieved": relieve["test"],
            **rounded,
            "onnxruntime": _accuracy(validate, "model.onnx"),
        },
        "connections": {"dense": dense, "kept": kept, "share": kept / dense},
        "parameters": export["cost"]["shrunk"]["parameters"],
        "macs": export["cost"]["shrunk"]["macs"],
        "original_bytes": export["baselines"]["original"]["bytes"],
        "files": files,
        "failures": [*validate["failures"], *audit.get("failures", ())],
        "seconds": {stage: record.seconds for stage, record in records.items()},
        "report": str(folder / "report.html"),
        "model": str(folder / "artifacts" / "model.onnx"),
    }


def _accuracy(validate: Table, artifact: str) -> float | None:
    """Return the lowest accuracy that was measured of an artifact, optimisations off and on."""
    found = [m["agreement"]["accuracy"] for m in validate["measurements"] if m["artifact"] == artifact]
    return min((value for value in found if value is not None), default=None)


_COLUMNS = {"onnxruntime": "ONNX Runtime"}


def summary_lines(result: Table) -> list[str]:
    """Lay out the closing table of a run."""
    accuracy, connections = result["accuracy"], result["connections"]
    original = result["original_bytes"]
    columns = (_COLUMNS.get(name, name) for name in accuracy)
    lines = table(("", *columns), [("test accuracy", *map(_percent, accuracy.values()))])
    rows: list[tuple[str, ...]] = [
        ("connections", f"{connections['dense']:,}", "", f"{connections['kept']:,} ({_percent(connections['share'])})")
    ]
    for title, key in (("parameters", "parameters"), ("MACs", "macs")):
        column = result[key]
        rows.append((title, *(f"{column[name]:,}" for name in ("dense", "structural", "nonzero"))))
    lines += ["", *table(("", "dense", "structural", "non-zero"), rows)]
    sizes = [("dense network, ONNX", f"{original:,}", "1.0", _percent(accuracy["dense"]))]
    for file in result["files"]:
        smaller = f"{original / file['bytes']:.1f}"
        sizes.append((file["name"], f"{file['bytes']:,}", smaller, _percent(file["accuracy"])))
    lines += ["", *table(("file", "bytes", "times smaller", "test accuracy"), sizes), ""]
    lines += [f"FAILED: {failure['message']}" for failure in result["failures"]]
    return [*lines, f"report  {result['report']}", f"model   {result['model']}"]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def stage_lines(done: Done) -> list[str]:
    """Say in a line or two what came of a stage."""
    state = "up to date" if done.skipped else f"{done.seconds:.1f} s"
    return [
        f"{done.stage}: {_STAGE_LINES[done.stage](done.outcome)} ({state})",
        *(f"FAILED: {failure['message']}" for failure in done.outcome.get("failures", ())),
    ]


def _relieved(outcome: Table) -> str:
    kept, dense = outcome["connections"]["kept"], outcome["connections"]["dense"]
    return f"{kept:,} of {dense:,} connections kept, test accuracy {_percent(outcome['test'])}"


def _validated(outcome: Table) -> str:
    artifacts = {entry["artifact"] for entry in outcome["checks"]}
    verdict = "passed" if outcome["ok"] else "FAILED"
    return f"{verdict}: {len(artifacts)} artifacts, {outcome['samples']:,} samples of {outcome['source']}"


def _audited(outcome: Table) -> str:
    if all(outcome["budget"][key] is None for key in ("flash", "ram")):
        return "no budget was given, nothing was gated"
    return "within budget" if outcome["ok"] else "over budget"


def _quantised(outcome: Table) -> str:
    if outcome["values"] is None:
        return "the recipe has no [quantise], nothing to do"
    kind = "int8 steps" if outcome["values"] == "int8" else f"{outcome['values']} values a tensor"
    return f"{kind}, test accuracy {_percent(outcome['test'])}"


_STAGE_LINES: dict[str, Callable[[Table], str]] = {
    "train": lambda outcome: f"test accuracy {_percent(outcome['test'])}",
    "relieve": _relieved,
    "quantise": _quantised,
    "export": lambda outcome: ", ".join(entry["name"] for entry in outcome["artifacts"]),
    "validate": _validated,
    "audit": _audited,
}


def audit_lines(done: Done) -> list[str]:
    """Lay out what every file and the arena take of the budget, and close with the verdict."""
    found, budget, arena = done.outcome, done.outcome["budget"], done.outcome["arena"]
    limit = budget["flash"]
    files = [
        (row["name"], row["format"], f"{row['bytes']:,}", _share(row["bytes"], limit), _VERDICTS[row["fits"]])
        for row in found["flash"]
    ]
    lines = table(("file", "format", "flash, bytes", _budget(limit), ""), files)
    limit = budget["ram"]
    if arena is None:
        return [*lines, "", f"RAM: unknown: {found['arena_unknown']}", *stage_lines(done)]
    need, fits = arena["bytes"], None if limit is None else arena["bytes"] <= limit
    peak = f"{arena['peak_op']} {arena['peak']}"
    plan = ("arena", f"{need:,}", f"{arena['lower_bound']:,}", peak, _share(need, limit), _VERDICTS[fits])
    lines += ["", *table(("RAM", "bytes", "lower bound", "peak layer", _budget(limit), ""), [plan]), ""]
    return [*lines, *stage_lines(done)]


_VERDICTS = {True: "within", False: "OVER", None: "not gated"}


def _budget(limit: int | None) -> str:
    return "no budget" if limit is None else f"of {limit:,}"


def _share(need: int, limit: int | None) -> str:
    return _percent(need / limit if limit else None)


def at_least(count: int, unknown: int) -> str:
    """Write a total, as the lower bound that it is where the operations of some operators are in none."""
    if not unknown:
        return f"{count:,}"
    return f"at least {count:,} ({unknown} operator{'s' * (unknown > 1)} unknown)"


def cost_lines(bill: Cost, arena: Table | None, unplanned: str | None) -> list[str]:
    """Lay out the bill of a model; without an arena ``unplanned`` says why there is none."""
    total = partial(at_least, unknown=len(bill.unknown))
    rows = [("parameters", f"{bill.parameters.structural:,}", f"{bill.parameters.nonzero:,}")]
    rows += [
        (title, total(column.structural), total(column.nonzero))
        for title, column in (("MACs", bill.macs), ("FLOPs", bill.flops))
    ]
    lines = table(("", "structural", "non-zero"), rows)
    lines.append(f"FLOPs by the paper's formula: {total(bill.paper_flops)}")
    lines.append(
        f"activation arena: unknown: {unplanned}"
        if arena is None
        else f"activation arena: {arena['bytes']:,} bytes (lower bound {arena['lower_bound']:,})"
    )
    return [*lines, *(f"not counted: {item.op} {item.name}: {item.reason}" for item in bill.unknown)]


def shrunk_lines(done: Shrunk) -> list[str]:
    """Say what a shrink removed, and why the rest had to stay."""
    before, after = done.before, done.after
    was, now = before.parameters, after.parameters
    rows = [("parameters", f"{was.structural:,}", f"{now.structural:,}", f"{now.nonzero:,}")]
    was, now = before.macs, after.macs
    old, new = (partial(at_least, unknown=len(bill.unknown)) for bill in (before, after))
    rows.append(("MACs", old(was.structural), new(now.structural), new(now.nonzero)))
    rows.append(("bytes", f"{done.bytes_before:,}", f"{done.artifact.bytes:,}", ""))
    lines = table(("", "before", "after", "non-zero"), rows)
    lines += [f"{row.layer}: {row.count} zero {row.side} channels stay: {row.reason}" for row in done.result.kept]
    unknown = done.result.unknown.items()
    lines += [f"no rule for {op} ({count}): what it touches stays" for op, count in unknown]
    return [*lines, *done.artifact.notes]


def comparison_lines(done: Comparison) -> list[str]:
    """Lay out how far two models are from each other, output by output."""
    rows = [
        (
            name,
            "not finite" if found.relative_error is None else f"{found.relative_error:.3g}",
            _percent(found.agreement),
            _percent(found.accuracy),
        )
        for name, found in done.outputs.items()
    ]
    lines = table(("output", "relative error", "same prediction", "accuracy of B"), rows)
    return [*lines, *(f"FAILED: {failure.message}" for failure in done.failures)]
