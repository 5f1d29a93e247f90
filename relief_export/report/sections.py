"""The sections of one run, in the order of the page: each turns what was recorded into tables, charts and words.

A section that has nothing to say of a run returns None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relief_export.format_names import FORMAT_NAMES
from relief_export.report import charts
from relief_export.report.numbers import (
    NONE,
    format_bytes,
    format_milliseconds,
    format_percent,
    format_points,
    format_ratio,
    format_seconds,
    percent,
)

if TYPE_CHECKING:
    from markupsafe import Markup

    from relief_export.report.run import File, Run


@dataclass(frozen=True)
class TableView:
    """Rows of cells under heads; the first column, and those in ``words``, hold words, the others numbers."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    words: tuple[int, ...] = ()
    folded: bool = False

    @property
    def wide(self) -> bool:
        """Whether a phone shows only a part of it at once: many columns, or many letters that cannot wrap."""
        if len(self.heads) > _PHONE:
            return True
        letters = 2 * (len(self.heads) - 1)  # the gaps
        for place, column in enumerate(zip(self.heads, *self.rows, strict=True)):
            # Names and words wrap, and so do heads; figures do not.
            wraps = place == 0 or place in self.words
            pieces = [word for cell in (column if wraps else column[:1]) for word in cell.split()]
            letters += max(map(len, (*pieces, *(() if wraps else column[1:]))), default=0)
        return letters > _PHONE_LETTERS


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


_PHONE = 5
"""Columns that a phone shows side by side."""
_PHONE_LETTERS = 44
"""Letters of a row, two for each gap between columns, that fit the narrower phones, of 360 px."""
_FOLD = 12
"""Rows beyond which a table starts folded on the page."""
_SIDES = ("outputs", "inputs", "weights")
NETWORKS = {"relieved": "pruned", "exported, in ONNX Runtime": "exported file, in ONNX Runtime"}
"""What the page calls a network, where its records call it otherwise."""

_CONVENTIONS = (
    "Dense: the trained network, batch norm folded. Structural: what is stored and computed once dead channels are "
    "removed, zeros included. Non-zero: the same, exact zeros skipped. One MAC is one product added to a sum in a "
    "convolution or matrix product; FLOPs are 2·MACs and bias additions; the paper's formula (arXiv 2109.10795) is "
    "kept apart. Density is the share of weights and biases that pruning left, batch norm left out. The arena is a "
    "static plan of the activations."
)
_SIZES = (
    "Smaller: against the dense network as an ONNX file. Largest error: of an output against the pruned network, "
    "relative to the largest output, with ONNX Runtime's optimisations off and on. The entropy bounds are "
    "what positions and values of the non-zero weights need at least."
)
_BREAKDOWN = (
    "Weights: the data of constants, positions and values together. Headers: their names, types and shapes. Decoding: "
    "nodes that make weights of constants, once, when the file is loaded. Network: the other nodes. Container: inputs, "
    "outputs and versions. The bound is the least for positions and values of that precision. Weight by weight, packed "
    "is with a stream and nodes of its own; in a file they share them."
)
_ROUNDS = (
    "Each pruning round scores the weights by neural activity, drops the weakest of each neuron, and retrains. Of the "
    "rounds whose validation accuracy is close enough to the dense network's, the one with the fewest weights is "
    "chosen."
)
_DEVICE = (
    "Flash: code, tables and library routines, as the linker says. RAM: variables, arena, input, output and the "
    "deepest stack along the calls of the linked program; interrupts come on top. Instructions: of one sample, the "
    "mean of an emulated run (AVR: clock cycles). Milliseconds: instructions at one per cycle of the target's clock, "
    "not measured time; caches, wait states of the flash and instructions of several cycles are not in them. Largest "
    "error: of an output against the reference that the run was given, relative to its largest output."
)
_SNIPPET = """\
import numpy as np, onnxruntime as ort
{session}
x = np.load("{samples}")["x"]  # {shape}
outputs = session.run(None, {{session.get_inputs()[0].name: x}})[0]
print(outputs.argmax(axis=1))"""
_SNIPPET_OF_SEVERAL = """\
import numpy as np, onnxruntime as ort
{session}
samples = np.load("{samples}")
outputs = session.run(None, {{each.name: samples["x." + each.name] for each in session.get_inputs()}})
print([output.shape for output in outputs])"""
_SESSION = 'session = ort.InferenceSession("{path}")'
_SESSION_OF_INTEGERS = """\
options = ort.SessionOptions()
options.add_session_config_entry("session.x64quantprecision", "1")  # exact sums on every x86 processor
session = ort.InferenceSession("{path}", options)"""
_LOADING = {
    "csr": "SciPy, scipy.sparse.load_npz for each weight; relief-export convert csr model.onnx --to dense",
    "ort": "ONNX Runtime, a reduced build too: the list of operators lies beside it",
} | {
    name: "any C99 compiler: compile the sources, include the header"
    for name in FORMAT_NAMES
    if name == "c" or name.startswith("c-mcu")
}
"""Format -> what takes its files, where it is not the five lines above."""


def accuracy(run: Run) -> Section | None:
    """Accuracy of each network, on validation and test data."""
    # Maps, sequences and single numbers have no accuracy, and a table of dashes says less than none.
    if not any(value is not None for pair in run.accuracy.values() for value in pair):
        return None
    dense = run.accuracy.get("dense", (None, None))[1]
    rows = tuple(
        (NETWORKS.get(label, label), percent(validation), percent(test), format_points(test, dense))
        for label, (validation, test) in run.accuracy.items()
    )
    note = ""
    if run.samples:
        note = "Every choice was made on the validation split; the test set decided nothing. "
        note += f"Samples: {', '.join(f'{count:,} {name}' for name, count in run.samples.items())}."
    return Section(
        "Accuracy", tables=(TableView(("network", "validation", "test", "points against dense"), rows),), note=note
    )


def costs(run: Run) -> Section:
    """Weights, parameters and operations in their named columns."""
    rows = []
    if run.connections is not None:
        dense, kept = run.connections
        rows.append(("weights and biases (density)", f"{dense:,}", NONE, f"{kept:,}", format_ratio(dense, kept)))
    titles = {"parameters": "parameters stored", "macs": "MACs", "flops": "FLOPs"}
    for key, title in titles.items():
        whole, structural, live = run.costs[key]
        rows.append((title, f"{whole:,}", f"{structural:,}", f"{live:,}", format_ratio(whole, structural)))
    before, after = run.paper_flops
    rows.append(("FLOPs, formula of the paper", f"{before:,}", f"{after:,}", NONE, format_ratio(before, after)))
    first, last = run.arena["original"], run.arena["shrunk"]
    if first is not None and last is not None:
        whole, structural = first["arena_bytes"], last["arena_bytes"]
        rows.append(("RAM arena, bytes", f"{whole:,}", f"{structural:,}", NONE, format_ratio(whole, structural)))
    heads = ("at batch 1", "dense", "structural", "non-zero", "fewer")
    return Section("Weights, parameters and operations", tables=(TableView(heads, tuple(rows)),), note=_CONVENTIONS)


def files(run: Run) -> Section:
    """Bytes of each file beside the references, size against accuracy, and what validation measured."""
    original = run.sizes["original"]
    rows = [_reference("original.onnx", "the original network", original, original)]
    rows.append(_reference("masked.onnx", "zeros in place", run.sizes["masked"], original))
    for file in sorted(run.files, key=lambda file: -file.bytes):
        size = (f"{file.bytes:,}", format_ratio(original, file.bytes))
        rows.append((file.name, *size, *_measured(file), file.format))
    marks = [("masked.onnx, gzipped", run.sizes["masked gzip"]), ("entropy bound, float32", run.sizes["bound f32"])]
    # A bound of int8 values says nothing about files of float32 alone.
    if not all(file.exact for file in run.files):
        marks.append(("entropy bound, int8", run.sizes["bound int8"]))
    # What a general compressor reaches, and what none can go below, stand apart from what was written.
    rows.append(_reference("original.onnx, gzipped", "for comparison", run.sizes["gzip"], original))
    rows += [_reference(label, "for comparison", size, original) for label, size in marks]
    shown = [("original network", original), *((file.format, file.bytes) for file in run.files)]
    drawn = [(charts.bytes_chart(sorted(shown, key=lambda pair: -pair[1]), marks), f"Bytes of each file. {_SIZES}")]
    if (scatter := _size_against_accuracy(run)) is not None:
        drawn.append(scatter)
    heads = ("file", "bytes", "smaller", "accuracy", "equal predictions", "largest error", "validation", "format")
    return Section("Files", charts=tuple(drawn), tables=(TableView(heads, tuple(rows), words=(7,)),))


def _reference(name: str, what: str, size: int, original: int) -> tuple[str, ...]:
    return (name, f"{size:,}", format_ratio(original, size), NONE, NONE, NONE, NONE, what)


def _measured(file: File) -> tuple[str, ...]:
    error = NONE if file.error is None else f"{file.error:.1e}"
    word = file.not_proven or {True: "passed", False: "FAILED", None: "not run"}[file.ok]
    return (percent(file.accuracy), percent(file.agreement), error, word)


def _size_against_accuracy(run: Run) -> tuple[Markup, str] | None:
    """Return the scatter of the files that passed, with the dense network, where accuracies are known."""
    points = [(file.format, file.bytes, file.accuracy) for file in run.files if file.ok and file.accuracy is not None]
    dense = run.accuracy.get("dense", (None, None))[1]
    if dense is not None:
        # In front, so that what everything is compared with has the first colour.
        points.insert(0, ("original network", run.sizes["original"], dense))
    # One point is no comparison.
    if len(points) < 2:
        return None
    named = [(f"{name}, {format_bytes(size)}", [(name, size, found)]) for name, size, found in points]
    caption = "Size against accuracy on the test set: left is smaller, up is better. "
    caption += "Along the grey line, no smaller file is as accurate."
    return charts.pareto_chart(named), caption


def breakdown(run: Run) -> Section:
    """Every byte of each file by its part, beside the bound; and each weight by itself."""
    codes = {f"{name}.onnx": "f32" for name in ("original", "masked")} | {file.name: file.values for file in run.files}
    rows = tuple(
        (name, *(f"{size:,}" for size in parts.values()), f"{sum(parts.values()):,}", _bound(run, name, codes[name]))
        for name, parts in sorted(run.breakdowns.items(), key=lambda item: -sum(item[1].values()))
    )
    best = run.smallest(exact=False)
    # A dictionary for its order: the two codes may be one and the same.
    used = dict.fromkeys(("f32", best.values if best else "f32"))
    weights = tuple(
        (
            row["name"],
            " x ".join(map(str, row["shape"])),
            f"{row['nonzeros']:,}",
            f"{row['dense_bytes']:,}",
            *(f"{figure:,.0f}" for code in used for figure in (row["packed_bytes"][code], row["bound_bytes"][code])),
        )
        for row in sorted(run.tensors, key=lambda row: -row["dense_bytes"])
    )
    heads = ("bytes of", "weights", "their headers", "decoding", "network", "container", "all", "bound")
    by_weight: tuple[str, ...] = ("weight", "shape", "non-zero", "plain")
    by_weight += tuple(f"{what}, {code}" for code in used for what in ("packed", "bound"))
    return Section(
        "Size breakdown",
        tables=(
            TableView(heads, rows),
            TableView(by_weight, weights, title="Weight by weight, bytes", words=(1,), folded=len(weights) > _FOLD),
        ),
        note=_BREAKDOWN,
    )


def _bound(run: Run, name: str, code: str) -> str:
    return NONE if name in {"original.onnx", "masked.onnx"} else f"{run.bounds[code]:,.0f}"


def rounds(run: Run) -> Section | None:
    """The pruning rounds."""
    history = run.rounds
    if not history:
        return None
    densities = [row["kept"] / row["dense"] for row in history]
    watched = any(row.get("peak_test_accuracy") is not None for row in history)
    chart = charts.rounds_chart(
        density=densities,
        accuracy=[row["accuracy"] for row in history],
        dense=history[0]["accuracy"],
        floor=run.floor,
        chosen=run.chosen,
    )
    rows = tuple(
        (
            f"{row['round']}{' (chosen)' if index == run.chosen else ''}",
            f"{row['kept']:,}",
            format_percent(density),
            percent(row["accuracy_before"]),
            percent(row["accuracy"]),
            percent(row["test_accuracy"]),
            *([percent(row.get("peak_test_accuracy"))] if watched else []),
            format_seconds(row["seconds"].get("all", 0.0)),
        )
        for index, (row, density) in enumerate(zip(history, densities, strict=True))
    )
    peak = ("best test of any epoch (no choice)",) if watched else ()
    heads = ("round", "weights", "density", "before retraining", "after", "test", *peak, "time")
    return Section(
        "Pruning rounds",
        charts=((chart, _ROUNDS),),
        tables=(TableView(heads, rows, title="Every round", folded=len(rows) > _FOLD),),
    )


def layers(run: Run) -> Section | None:
    """Parameters and MACs of each layer, before and after."""
    if not run.layers:
        return None
    last = run.rounds[run.chosen]["layers"] if run.rounds else {}
    rows = []
    for layer in run.layers:
        # A layer of the graph may be none of the pruned layers, such as one that pruning left whole.
        own = last.get(layer.name, {})
        density = format_percent(own["kept"] / own["dense"]) if own.get("dense") else NONE
        figures = (f"{value:,}" for value in (*layer.parameters, *layer.macs))
        rows.append((layer.name, layer.op, *figures, density))
    kinds = ("dense", "structural", "non-zero")
    heads = ("layer", "operator", *(f"parameters, {k}" for k in kinds), *(f"MACs, {k}" for k in kinds), "density")
    chart = charts.layers_chart([(layer.name, *layer.parameters) for layer in run.layers])
    caption = "Parameters that each layer stores, on a logarithmic axis; what is gone altogether stands at 1."
    return Section(
        "Layer by layer",
        charts=((chart, caption),),
        tables=(TableView(heads, tuple(rows), title="Every layer", words=(1,), folded=len(rows) > _FOLD),),
    )


def inputs(run: Run) -> Section | None:
    """Which inputs the first layer still reads."""
    if run.inputs is None:
        return None
    title = "Inputs that are still read"
    if run.inputs.pixels:
        used = sum(count > 0 for row in run.inputs.pixels for count in row)
        total = sum(len(row) for row in run.inputs.pixels)
        caption = f"{used} of {total} pixels are still read; the fuller a square, the more weights read it."
        return Section(title, charts=((charts.pixels_chart(run.inputs.pixels), caption),))
    rows = tuple(
        (f"channel {index}", f"{kept:,}", f"{whole:,}", format_percent(kept / whole))
        for index, (kept, whole) in enumerate(run.inputs.channels)
    )
    heads = ("input", "weights left", "of", "density")
    return Section(title, tables=(TableView(heads, rows, folded=len(rows) > _FOLD, title="Input channels"),))


def removal(run: Run) -> Section | None:
    """What the removal of dead channels took, and why the rest stayed."""
    removed = tuple(
        (row["layer"], *(f"{row[f'{side}_before']:,} → {row[f'{side}_after']:,}" for side in _SIDES))
        for row in run.removed
    )
    stayed = tuple(
        (row["layer"], f"{row['count']:,} dead {row['side']}s", str(row["reason"]))
        for row in sorted(run.stayed, key=lambda row: -row["count"])
    )
    tables = (
        TableView(("layer", *_SIDES), removed, title="Removed", folded=len(removed) > _FOLD),
        TableView(("layer", "stayed", "because"), stayed, "What stayed, and why", (2,), folded=len(stayed) > _FOLD),
    )
    found = tuple(table for table in tables if table.rows)
    note = "Outputs are neurons, or filters of a convolution; inputs are what each of them reads."
    return Section("Dead channels", tables=found, note=note) if found else None


def latency(run: Run) -> Section | None:
    """Time of one inference, where validation measured it; speed-ups are against the dense network."""
    found = (run.validation or {}).get("latency") or []
    if not found:
        return None
    # The baselines were timed with the files and stand in front of them: the first is the dense network.
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
    samples = "One sample at a time" if first["batch"] == 1 else f"Batch {first['batch']}"
    how = f"{samples}, {threads}, {first['repeats']} interleaved repetitions"
    runtimes = {row["name"]: row.get("runtime", "ONNX Runtime") for row in found}  # which older records do not name
    compiled = [f" {name}: {made}." for name, made in runtimes.items() if not made.startswith("ONNX Runtime")]
    return Section(
        "Latency, measured",
        charts=((chart, f"{how}, {runtimes[first['name']]} on {first['machine']['cpu']}.{''.join(compiled)}"),),
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
            ("flash", size["flash_bytes"], budget["flash_bytes"]),
            ("RAM at batch 1", size["ram_bytes"], budget["ram_bytes"]),
        )
    )
    keys = ("flash_bytes", "ram_bytes", "arena_bytes", "unpacked_bytes")
    every = tuple(
        (row["file"], *("unknown" if row[key] is None else f"{row[key]:,}" for key in keys))
        for row in run.audit["files"]
    )
    target = f"Target: {budget['target']['title']}. " if budget["target"] else ""
    notes = "".join(f"{note}. " for note in run.audit["notes"])
    unknown = f"The RAM is unknown: {size['ram_unknown']}."
    heads = ("bytes of", "flash", "RAM", "activations", "weights unpacked at load")
    return Section(
        "Flash and RAM",
        text=f"Checked: {size['file']}.",
        tables=(
            TableView(("bytes", "needed", "budget", "audit"), rows),
            TableView(heads, every, title="Every file", folded=True),
        ),
        note=target + notes + (unknown if arena is None else _peak(arena)),
    )


def _peak(arena: dict[str, Any]) -> str:
    tensors = ", ".join(f"{tensor['name']} {tensor['tensor_bytes']:,}" for tensor in arena["peak_tensors"][:3])
    return (
        f"The arena of the activations peaks at {arena['peak_op']} {arena['peak']}, with {tensors} bytes; no plan can "
        f"be below {arena['lower_bound_bytes']:,}. Not in it: {arena['excluded']}."
    )


def device(run: Run) -> Section | None:
    """What each program takes of a target and does on it, as its compiler and an emulator say."""
    if not run.device and not run.outdated:
        return None
    rows, details, compilers, notes = [], [], [], [_DEVICE] if run.device else []
    # Three tables and not one, because fourteen columns fit no page: what most ask for is in the first.
    for row in run.device:
        sizes, ran, agreement = row["sizes"], row["run"], row["run"]["agreement"]
        name = (
            row["title"],
            row["program"] if row["program"] == row["format"] else f"{row['program']} ({row['format']})",
        )
        rows.append(
            (
                *name,
                *(f"{sizes[key]:,}" for key in ("flash_bytes", "ram_bytes")),
                f"{ran['mean_count']:,.0f}{'' if ran['unit'] == 'instructions' else ' cycles'}",
                # A core alone has no clock, only a board has.
                NONE if ran["nominal_seconds"] is None else format_milliseconds(ran["nominal_seconds"]),
                "not compared" if agreement is None else "passed" if ran["ok"] else "FAILED",
            )
        )
        ram = (
            sizes["data_bytes"] + sizes["bss_bytes"],
            sizes["arena_bytes"],
            sizes["input_bytes"] + sizes["output_bytes"],
            sizes["stack_bytes"],
        )
        error = NONE if agreement is None else _error(agreement["relative_error"])
        parts = (NONE if size is None else f"{size:,}" for size in ram)
        details.append((*name, f"{ran['samples']:,}", error, *parts))
        compilers.append((*name, f"{sizes['command']} (version {row['compiler_version']})"))
        notes += [f"{' with '.join(name)}: the stack may be deeper, {doubt}." for doubt in sizes["stack_doubts"]]
    again = ", ".join(f"{row['program']} on {row['run']['target']}" for row in run.outdated)
    which = ("target", "program")
    measured = (
        "flash, bytes",
        "RAM, bytes",
        "instructions",
        "ms at one instruction per cycle, not measured",
        "outputs",
    )
    detailed = ("samples", "largest error", "variables", "arena", "input and output", "stack")
    tables = (
        TableView((*which, *measured), tuple(rows), words=(1,)),
        TableView((*which, *detailed), tuple(details), "Errors, and the parts of the RAM", words=(1,), folded=True),
        TableView((*which, "compiler and flags"), tuple(compilers), "Compilers", words=(1, 2), folded=True),
    )
    return Section(
        "On the device",
        text=f"Not shown, because the program is no longer the one that ran: {again}." if again else "",
        tables=tuple(table for table in tables if table.rows),
        note=" ".join(notes),
    )


def _error(relative: float | None) -> str:
    return "not finite" if relative is None else f"{relative:.1e}"


def usage(run: Run) -> Section | None:
    """The five lines that run the smallest file, and what takes each of the others."""
    best = run.smallest(exact=False)
    if best is None:
        return None
    shape = ", ".join(("samples", *map(str, run.feeds.get("x", run.input_shape))))
    snippet = _SNIPPET_OF_SEVERAL if len(run.feeds) > 1 or (run.feeds and "x" not in run.feeds) else _SNIPPET
    # Without the option ONNX Runtime's int8 kernels overflow on some x86 processors; see formats/runtime.py.
    session = _SESSION_OF_INTEGERS if best.format in ("int8", "packed-int8") else _SESSION
    code = snippet.format(
        session=session.format(path=f"{run.artifacts}{best.name}"),
        samples=f"{run.artifacts}reference.npz",
        shape=f"({shape})",
    )
    rows = tuple(
        (f"{run.artifacts}{file.name}", f"{file.bytes:,}", _LOADING.get(file.format, "ONNX Runtime, as above"))
        for file in run.files
    )
    return Section(
        "Run it",
        text="In this folder, with onnxruntime and numpy installed:",
        tables=(TableView(("file", "bytes", "what takes it"), rows, words=(2,)),),
        code=code,
        language="python",
    )


def provenance(run: Run) -> Section:
    """Versions, machine, wall times and the recipe."""
    stages = tuple(
        (stage, format_seconds(r.seconds), f"{r.machine['cpu']}, {r.machine['cores']} cores, {r.machine['system']}")
        for stage, r in run.records.items()
    )
    versions = tuple(run.records["export"].versions.items())
    recipe = tuple((key, str(value)) for key, value in _flat(run.recipe))
    tables = (
        TableView(("stage", "wall time", "machine"), stages, words=(2,)),
        TableView(("package", "version"), versions, title="Versions", folded=True),
        TableView(("key", "value"), recipe, title="Recipe, resolved", words=(1,), folded=True),
    )
    return Section("How it was made", tables=tuple(table for table in tables if table.rows))


def _flat(recipe: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Flatten nested tables to dotted keys; keys that hold nothing are left out."""
    rows: list[tuple[str, Any]] = []
    for key, value in recipe.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        # 0 and False stay, because they are settings.
        elif value not in (None, "", []):
            rows.append((prefix + key, value))
    return rows
