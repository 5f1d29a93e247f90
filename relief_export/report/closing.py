"""The closing sections of one run: latency, the audit, how to run the artifact, how it was made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from relief_export.report import charts
from relief_export.report.layout import Section, TableView
from relief_export.report.text import NONE, format_milliseconds, format_ratio, format_seconds

if TYPE_CHECKING:
    from relief_export.report.facts import Run

SNIPPET = """\
import numpy as np, onnxruntime as ort
session = ort.InferenceSession("{path}")
x = np.load("artifacts/reference.npz")["x"]  # {shape}
logits = session.run(None, {{session.get_inputs()[0].name: x}})[0]
print(logits.argmax(axis=1))"""


def latency(run: Run) -> Section | None:
    """Time of one inference, where validation measured it; speed-ups are against the dense network."""
    found = run.validation.get("latency") or []
    if not found:
        return None
    chart = charts.latency_chart(
        [(row["name"], *(1000 * row[key] for key in ("lower", "median", "upper"))) for row in found]
    )
    rows = tuple(
        (
            row["name"],
            *(format_milliseconds(row[key]) for key in ("median", "lower", "upper")),
            format_ratio(found[0]["median"], row["median"]),
            format_milliseconds(row["load"]),
        )
        for row in found
    )
    heads = ("file", "median", "lower quartile", "upper quartile", f"speed-up over {found[0]['name']}", "loading, once")
    first = found[0]
    threads = f"{first['threads']} thread{'s' * (first['threads'] > 1)}"
    how = f"Batch {first['batch']}, {threads}, {first['repeats']} interleaved repetitions"
    return Section(
        "Latency, measured",
        charts=((chart, f"{how}, ONNX Runtime on {first['machine']['cpu']}."),),
        tables=(TableView(heads, rows),),
    )


def audit(run: Run) -> Section | None:
    """Budgets, and whether they are met."""
    if run.audit is None:
        return None
    budget, arena = run.audit["budget"], run.audit["arena"]
    size = next(row for row in run.audit["files"] if row["file"] == run.audit["checked"])
    rows = tuple(
        (what, NONE if need is None else f"{need:,}", NONE, "no budget given")
        if limit is None or need is None  # an unknown arena is only let pass without a budget
        else (what, f"{need:,}", f"{limit:,}", "within budget" if need <= limit else "OVER BUDGET")
        for what, need, limit in (
            (f"flash of {size['file']}", size["flash_bytes"], budget["flash_bytes"]),
            (f"RAM of {size['file']} at batch 1", size["ram_bytes"], budget["ram_bytes"]),
        )
    )
    files = tuple(
        (row["file"], *(NONE if row[key] is None else f"{row[key]:,}" for key in _AUDITED))
        for row in run.audit["files"]
    )
    target = f"Target: {budget['target']['title']}. " if budget["target"] else ""
    notes = "".join(f"{note}. " for note in run.audit["notes"])
    unknown = f"The RAM is unknown: {size['ram_unknown']}."
    heads = ("bytes of", "flash", "RAM", "activations", "weights unpacked at load")
    return Section(
        "Flash and RAM",
        tables=(
            TableView(("bytes", "needed", "budget", "audit"), rows),
            TableView(heads, files, title="Every file", folded=True),
        ),
        note=target + notes + (unknown if arena is None else _peak(arena)),
    )


_AUDITED = ("flash_bytes", "ram_bytes", "arena_bytes", "unpacked_bytes")


def _peak(arena: dict[str, Any]) -> str:
    tensors = ", ".join(f"{tensor['name']} {tensor['tensor_bytes']:,}" for tensor in arena["peak_tensors"][:3])
    return (
        f"The arena peaks at {arena['peak_op']} {arena['peak']}, with {tensors} bytes; no plan can be below "
        f"{arena['lower_bound_bytes']:,}. Not in it: {arena['excluded']}."
    )


def usage(run: Run) -> Section | None:
    """The five lines that run the smallest artifact."""
    best = run.smallest(exact=False)
    if best is None:
        return None
    shape = ", ".join(("samples", *map(str, run.input_shape)))
    code = SNIPPET.format(path=f"artifacts/{best.name}", shape=f"float32, ({shape})")
    return Section(
        "Run it", text="In the build folder, with onnxruntime and numpy installed:", code=code, language="python"
    )


def provenance(run: Run) -> Section:
    """Versions, machine, wall times and the recipe."""
    stages = tuple(
        (stage, format_seconds(r.seconds), f"{r.machine['cpu']}, {r.machine['cores']} cores, {r.machine['system']}")
        for stage, r in run.records.items()
    )
    versions = tuple(run.records["export"].versions.items())
    recipe = tuple((key, str(value)) for key, value in _flat(run.recipe))
    return Section(
        "How it was made",
        tables=(
            TableView(("stage", "wall time", "machine"), stages, words=(2,)),
            TableView(("package", "version"), versions, title="Versions", folded=True),
            TableView(("key", "value"), recipe, title="Recipe, resolved", words=(1,), folded=True),
        ),
    )


def _flat(recipe: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Flatten nested tables to dotted keys; keys that hold nothing are left out."""
    rows: list[tuple[str, Any]] = []
    for key, value in recipe.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif value not in (None, "", []):
            rows.append((prefix + key, value))
    return rows
