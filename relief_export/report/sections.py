"""The sections of one run, in the order of the page: each turns facts into tables of cells, charts and words.

What follows them is in ``closing``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from relief_export.report import charts
from relief_export.report.layout import Section, TableView
from relief_export.report.text import NONE, format_percent, format_points, format_ratio, format_seconds, percent

if TYPE_CHECKING:
    from relief_export.report.facts import File, Run

_FOLD = 12
"""Rows beyond which a table starts folded on the page."""
_SIDES = ("outputs", "inputs", "weights")

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

_ANATOMY = (
    "Weights: the data of constants, positions and values together. Headers: their names, types and shapes. Decoding: "
    "nodes that make weights of constants, once, when the file is loaded. Network: the other nodes. Container: inputs, "
    "outputs and versions. The bound is the least for positions and values of that precision. Weight by weight, packed "
    "is with a stream and nodes of its own; in a file they share them."
)
_ITERATIONS = (
    "Each round scores the connections by neural activity, drops the weakest of each neuron, and retrains. Of the "
    "rounds within the tolerance of the dense network's validation accuracy, the smallest network is exported."
)


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


def anatomy(run: Run) -> Section:
    """Every byte of each file by its part, beside the bound; and each weight by itself."""
    codes = {f"{name}.onnx": "f32" for name in ("original", "masked")} | {file.name: file.values for file in run.files}
    rows = tuple(
        (name, *(f"{size:,}" for size in parts.values()), f"{sum(parts.values()):,}", _bound(run, name, codes[name]))
        for name, parts in sorted(run.anatomy.items(), key=lambda item: -sum(item[1].values()))
    )
    best = run.smallest(exact=False)
    used = dict.fromkeys(("f32", best.values if best else "f32"))
    weights = tuple(
        (
            row["name"],
            " x ".join(map(str, row["shape"])),
            f"{row['nonzeros']:,}",
            f"{row['dense']:,}",
            *(f"{figure:,.0f}" for code in used for figure in (row["packed"][code], row["bound"][code])),
        )
        for row in sorted(run.tensors, key=lambda row: -row["dense"])
    )
    heads = (
        "weight",
        "shape",
        "non-zero",
        "plain",
        *(f"{what}, {code}" for code in used for what in ("packed", "bound")),
    )
    return Section(
        "Where the bytes are",
        tables=(
            TableView(
                ("bytes of", "weights", "their headers", "decoding", "network", "container", "all", "bound"), rows
            ),
            TableView(heads, weights, title="Weight by weight, bytes", words=(1,), folded=len(weights) > _FOLD),
        ),
        note=_ANATOMY,
    )


def _bound(run: Run, name: str, code: str) -> str:
    return NONE if name in {"original.onnx", "masked.onnx"} else f"{run.bounds[code]:,.0f}"


def iterations(run: Run) -> Section:
    """The relief loop's history."""
    history = run.iterations
    shares = [row["kept"] / row["dense"] for row in history]
    watched = any(row.get("peak_test_accuracy") is not None for row in history)
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
            *([percent(row.get("peak_test_accuracy"))] if watched else []),
            format_seconds(sum(value for key, value in row["seconds"].items() if key == "all")),
        )
        for index, (row, share) in enumerate(zip(history, shares, strict=True))
    )
    peak = ("best test of any epoch (no choice)",) if watched else ()
    heads = ("iteration", "connections", "kept", "before retraining", "after", "test", *peak, "time")
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
