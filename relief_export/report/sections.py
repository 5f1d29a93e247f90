"""The sections of one run, in the order of the page: each turns facts into tables of cells, charts and words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relief_export.report import charts
from relief_export.report.text import (
    format_milliseconds,
    format_percent,
    format_points,
    format_ratio,
    format_seconds,
)

if TYPE_CHECKING:
    from markupsafe import Markup

    from relief_export.report.facts import File, Run

NONE = "–"
_FOLD = 12
"""Rows beyond which a table starts folded on the page."""
_SIDES = ("outputs", "inputs", "weights")
SNIPPET = """\
import numpy as np, onnxruntime as ort
session = ort.InferenceSession("{path}")
x = np.load("artifacts/reference.npz")["x"]  # {shape}
logits = session.run(None, {{session.get_inputs()[0].name: x}})[0]
print(logits.argmax(axis=1))"""

_CONVENTIONS = (
    "Dense: the trained network, batch norm folded. Structural: what is stored and computed once disconnected neurons "
    "are removed, zeros included. Non-zero: the same, exact zeros skipped. One MAC is one product added to a sum in a "
    "convolution or matrix product; FLOPs are 2·MACs and bias additions; the paper's formula (arXiv 2109.10795) is "
    "kept apart. Connections are entries of the masks over weights and biases, batch norm left out. The arena is a "
    "static plan of the activations."
)
_SIZES = (
    "Smaller: against the dense network as an ONNX file. Largest error: of a logit against the relieved network, "
    "relative to the largest logit, with ONNX Runtime's optimisations off and on. The entropy bounds are "
    "what positions and values of the non-zero weights need at least."
)

_ITERATIONS = (
    "Each round scores the connections by neural activity, drops the weakest of each neuron, and retrains. Of the "
    "rounds within the tolerance of the dense network's validation accuracy, the smallest network is exported."
)


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


def accuracy(run: Run) -> Section:
    """Accuracy of each network, on validation and test data."""
    dense = run.accuracy["dense"][1]
    rows = tuple(
        (label, percent(validation), percent(test), format_points(test, dense))
        for label, (validation, test) in run.accuracy.items()
    )
    return Section(
        "Accuracy",
        tables=(TableView(("network", "validation", "test", "test, points against dense"), rows),),
        note="Every choice was made on the validation split; the test set decided nothing. "
        f"Samples: {', '.join(f'{count:,} {name}' for name, count in run.samples.items())}.",
    )


def costs(run: Run) -> Section:
    """Connections, parameters and operations in their named columns."""
    dense, kept = run.connections
    rows = [("connections (masks)", f"{dense:,}", NONE, f"{kept:,}", format_ratio(dense, kept))]
    titles = {"parameters": "parameters stored", "macs": "MACs", "flops": "FLOPs"}
    for key, title in titles.items():
        whole, structural, live = run.costs[key]
        rows.append((title, f"{whole:,}", f"{structural:,}", f"{live:,}", format_ratio(whole, structural)))
    before, after = run.paper_flops
    rows.append(("FLOPs, formula of the paper", f"{before:,}", f"{after:,}", NONE, format_ratio(before, after)))
    for key, title in {"bytes": "RAM arena, bytes"}.items():
        whole, structural = (run.arena[name][key] for name in ("original", "shrunk"))
        rows.append((title, f"{whole:,}", f"{structural:,}", NONE, format_ratio(whole, structural)))
    heads = ("at batch 1", "dense", "structural", "non-zero", "fewer")
    return Section(
        "Connections, parameters and operations",
        tables=(TableView(heads, tuple(rows)),),
        note=_CONVENTIONS,
    )


def files(run: Run) -> Section:
    """Bytes of each file beside the references, and what validation measured."""
    original = run.sizes["original"]
    rows = [_reference("original.onnx", "the dense network", original, original)]
    rows.append(_reference("masked.onnx", "zeros in place", run.sizes["masked"], original))
    for file in sorted(run.files, key=lambda file: -file.bytes):
        size = (f"{file.bytes:,}", format_ratio(original, file.bytes))
        rows.append((file.name, *size, *_measured(file), file.format))
    marks = [("masked.onnx, gzipped", run.sizes["masked gzip"]), ("entropy bound, float32", run.sizes["bound f32"])]
    if not all(file.exact for file in run.files):
        marks.append(("entropy bound, int8", run.sizes["bound int8"]))
    rows.append(_reference("original.onnx, gzipped", "for comparison", run.sizes["gzip"], original))
    rows += [_reference(label, "for comparison", size, original) for label, size in marks]
    shown = [("original.onnx", original), *((file.name, file.bytes) for file in run.files)]
    chart = charts.bytes_chart(sorted(shown, key=lambda pair: -pair[1]), marks)
    heads = ("file", "bytes", "smaller", "accuracy", "equal predictions", "largest error", "validation", "format")
    return Section(
        "Files",
        charts=((chart, f"Bytes of each file, on a logarithmic axis. {_SIZES}"),),
        tables=(TableView(heads, tuple(rows), words=(7,)),),
    )


def _reference(name: str, what: str, size: int, original: int) -> tuple[str, ...]:
    return (name, f"{size:,}", format_ratio(original, size), NONE, NONE, NONE, NONE, what)


def _measured(file: File) -> tuple[str, ...]:
    error = NONE if file.error is None else f"{file.error:.1e}"
    word = {True: "passed", False: "FAILED", None: "not run"}[file.ok]
    return (percent(file.accuracy), percent(file.agreement), error, word)


def iterations(run: Run) -> Section:
    """The relief loop's history."""
    history = run.iterations
    shares = [row["kept"] / row["dense"] for row in history]
    chart = charts.iterations_chart(
        kept=shares,
        accuracy=[row["accuracy"] for row in history],
        dense=history[0]["accuracy"],
        floor=run.floor,
        chosen=run.chosen,
    )
    rows = tuple(
        (
            f"{row['iteration']}{' (exported)' if index == run.chosen else ''}",
            f"{row['kept']:,}",
            format_percent(share),
            percent(row["accuracy_before"]),
            percent(row["accuracy"]),
            percent(row["test_accuracy"]),
            format_seconds(sum(value for key, value in row["seconds"].items() if key == "all")),
        )
        for index, (row, share) in enumerate(zip(history, shares, strict=True))
    )
    heads = ("iteration", "connections", "kept", "before retraining", "after", "test", "time")
    return Section(
        "Through the iterations",
        charts=((chart, _ITERATIONS),),
        tables=(TableView(heads, rows, title="Every iteration", folded=len(rows) > _FOLD),),
    )


def layers(run: Run) -> Section | None:
    """Parameters and MACs of each layer, before and after."""
    if not run.layers:
        return None
    last = run.iterations[run.chosen]["layers"]
    rows = []
    for layer in run.layers:
        own = last.get(layer.name, {})
        kept = format_percent(own["kept"] / own["dense"]) if own.get("dense") else NONE
        figures = (f"{value:,}" for value in (*layer.parameters, *layer.macs))
        rows.append((layer.name, layer.op, *figures, kept))
    kinds = ("dense", "structural", "non-zero")
    heads = (
        "layer",
        "operator",
        *(f"parameters, {k}" for k in kinds),
        *(f"MACs, {k}" for k in kinds),
        "connections kept",
    )
    chart = charts.layers_chart([(layer.name, *layer.parameters) for layer in run.layers])
    return Section(
        "Layer by layer",
        charts=(
            (
                chart,
                "Parameters that each layer stores, on a logarithmic axis; what is gone altogether stands at 1.",
            ),
        ),
        tables=(TableView(heads, tuple(rows), title="Every layer", words=(1,), folded=len(rows) > _FOLD),),
    )


def inputs(run: Run) -> Section | None:
    """Which inputs the first layer still reads."""
    if run.inputs is None:
        return None
    if run.inputs.pixels:
        used = sum(count > 0 for row in run.inputs.pixels for count in row)
        total = sum(len(row) for row in run.inputs.pixels)
        caption = f"{used} of {total} pixels are still read; the fuller a square, the more connections read it."
        return Section("What the network still looks at", charts=((charts.pixels_chart(run.inputs.pixels), caption),))
    rows = tuple(
        (f"channel {index}", f"{kept:,}", f"{whole:,}", format_percent(kept / whole))
        for index, (kept, whole) in enumerate(run.inputs.channels)
    )
    table = TableView(
        ("input", "connections kept", "of", "share"), rows, folded=len(rows) > _FOLD, title="Input channels"
    )
    return Section("What the network still looks at", tables=(table,))


def kept(run: Run) -> Section | None:
    """What the removal took, and why the rest stayed."""
    removed = tuple(
        (row["layer"], *(f"{row[f'{side}_before']:,} → {row[f'{side}_after']:,}" for side in _SIDES))
        for row in run.removed
    )
    stayed = tuple(
        (row["layer"], f"{row['count']:,} zero {row['side']}s", str(row["reason"]))
        for row in sorted(run.kept, key=lambda row: -row["count"])
    )
    tables = (
        TableView(("layer", *_SIDES), removed, title="Removed", folded=len(removed) > _FOLD),
        TableView(("layer", "stayed", "because"), stayed, "Kept, and why", (2,), folded=len(stayed) > _FOLD),
    )
    found = tuple(table for table in tables if table.rows)
    note = "Outputs are neurons, or filters of a convolution; inputs are what each of them reads."
    return Section("What was removed, and what stayed", tables=found, note=note) if found else None


def percent(fraction: float | None) -> str:
    """Write a fraction that may be unknown."""
    return NONE if fraction is None else format_percent(fraction)


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
    flash = next(row for row in run.audit["flash"] if row["name"] == run.audit["chosen"])
    rows = tuple(
        (what, f"{need:,}", NONE, "no budget given")
        if limit is None
        else (what, f"{need:,}", f"{limit:,}", "within budget" if need <= limit else "OVER BUDGET")
        for what, need, limit in (
            (f"flash: {flash['name']}", flash["bytes"], budget["flash"]),
            ("RAM: activations at batch 1", arena["bytes"], budget["ram"]),
        )
    )
    peak = ", ".join(f"{tensor['name']} {tensor['bytes']:,}" for tensor in arena["peak_tensors"][:3])
    target = f"Target: {budget['target']['title']}. " if budget["target"] else ""
    return Section(
        "Flash and RAM",
        tables=(TableView(("bytes", "needed", "budget", "audit"), rows),),
        note=f"{target}The arena peaks at {arena['peak_op']} {arena['peak']}, with {peak} bytes; no plan can be below "
        f"{arena['lower_bound']:,}. Not in it: {arena['excluded']}.",
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
