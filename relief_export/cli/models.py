"""Commands that take ONNX models of any origin; none of them needs torch. Each prints what it found below it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from relief_export.cli.common import PATH, dimension_option, echo, json_option, share, table
from relief_export.cli.devices import OPTIMISE, fit_lines
from relief_export.format_names import FORMAT_NAMES, LAYOUTS
from relief_export.printing import counted, percent

if TYPE_CHECKING:
    from relief_export.conversion import Shrunk
    from relief_export.evaluation import Comparison
    from relief_export.graph.cost import Cost


verify_option = click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Open the result in ONNX Runtime before it is kept."
)


@click.command(short_help="Remove dead channels from an ONNX model, exactly.")
@click.argument("source", metavar="IN.onnx", type=PATH)
@click.argument("target", metavar="OUT.onnx", type=PATH)
@click.option("--strict", is_flag=True, help="Refuse a model with operators that have no rule.")
@dimension_option
@verify_option
@json_option
def shrink(source: Path, target: Path, strict: bool, dimensions: dict[str, int], verify: bool, as_json: bool) -> int:
    """Remove every dead channel from IN.onnx, exactly, and write OUT.onnx.

    Inputs and outputs keep their names, types and shapes. What had to stay is listed with its reason. IN is a model
    file, or a csr, artifacts or build folder.

    \b
    relief-export shrink pruned.onnx small.onnx
    relief-export shrink pruned.onnx small.onnx --strict --json
    """
    from relief_export import conversion
    from relief_export.subjects import model_path

    done = conversion.shrink_file(model_path(source), target, strict=strict, dimensions=dimensions, verify=verify)
    echo(done.to_dict(), as_json=as_json, lines=_shrunk_lines(done))
    return 0


def at_least(count: int, unknown: int) -> str:
    """Write a total, as the lower bound that it is where the operations of some operators are in none."""
    if not unknown:
        return f"{count:,}"
    return f"at least {count:,} ({counted(unknown, 'operator')} unknown)"


def _shrunk_lines(done: Shrunk) -> list[str]:
    """Say what a shrink removed, and why the rest had to stay."""
    before, after = done.before, done.after
    was, now = before.parameters, after.parameters
    rows = [("parameters", f"{was.structural:,}", f"{now.structural:,}", f"{now.nonzero:,}")]
    was, now = before.macs, after.macs
    old, new = (partial(at_least, unknown=len(each.unknown)) for each in (before, after))
    rows.append(("MACs", old(was.structural), new(now.structural), new(now.nonzero)))
    rows.append(("bytes", f"{done.bytes_before:,}", f"{done.artifact.bytes:,}", ""))
    lines = table(("", "before", "after", "non-zero"), rows)
    lines += [
        f"{row.layer}: {counted(row.count, f'dead {row.side} channel')} stay{'s' * (row.count == 1)}: {row.reason}"
        for row in done.result.stayed
    ]
    unknown = done.result.unknown.items()
    lines += [f"no rule for {op} ({count}): what it touches stays" for op, count in unknown]
    return [*lines, *done.artifact.notes]


@click.command(short_help="Write a model in another format.")
@click.argument("source", metavar="IN.onnx", type=PATH)
@click.argument("target", metavar="OUT", type=PATH)
@click.option("--to", "kind", type=click.Choice(FORMAT_NAMES), required=True, help="Format to write.")
@click.option("--calibration", type=PATH, help="An .npz with samples x of the input, for int8 and packed-int8.")
@click.option("--name", default="net", show_default=True, help="What generated C is called: NAME.c, NAME_run.")
@click.option("--onnxruntime", is_flag=True, help="Add to generated C what makes it one operator of ONNX Runtime.")
@click.option("--layout", type=click.Choice(LAYOUTS), help="Arrange C for microcontrollers as a project expects it.")
@click.option("--quantized-io", is_flag=True, help="Integers in and out of a c-mcu-q8 program.")
@dimension_option
@verify_option
@json_option
def convert(
    source: Path,
    target: Path,
    kind: str,
    calibration: Path | None,
    name: str,
    onnxruntime: bool,
    layout: str | None,
    quantized_io: bool,
    dimensions: dict[str, int],
    verify: bool,
    as_json: bool,
) -> int:
    """Write IN.onnx in another format.

    IN is a model file, or a csr, artifacts or build folder.

    \b
    relief-export convert model.onnx model.packed.onnx --to packed
    relief-export convert model.onnx model.small.onnx --to packed-codebook16
    relief-export convert model.onnx model.int8.onnx --to int8 --calibration train.npz
    relief-export convert build/digits-lenet5/artifacts/csr model.onnx --to dense
    relief-export convert model.onnx program --to c --name lenet --onnxruntime
    relief-export convert model.onnx Digits --to c-mcu-q8 --calibration train.npz --layout arduino
    """
    from relief_export import conversion
    from relief_export.subjects import model_path

    done = conversion.convert_file(
        model_path(source),
        target,
        kind,
        calibration=calibration,
        verify=verify,
        program=name,
        onnxruntime=onnxruntime,
        dimensions=dimensions,
        quantized_io=quantized_io,
        layout=layout,
    )
    entry: dict[str, Any] = done.to_dict()
    found = {"file": str(target), "file_bytes": done.bytes} | {key: entry[key] for key in ("format", "tolerance")}
    found["files"] = [
        {"path": file["path"], "file_bytes": file["file_bytes"], "sha256": file["sha256"]} for file in entry["files"]
    ]
    found["notes"] = entry["notes"]
    echo(found, as_json=as_json, lines=(f"{target}: {done.format}, {done.bytes:,} bytes", *done.notes))
    return 0


@click.command(short_help="Compare two models on the same inputs.")
@click.argument("first", metavar="A", type=PATH)
@click.argument("second", metavar="B", type=PATH)
@click.option(
    "--data",
    type=PATH,
    required=True,
    help="An .npz with x, or samples named as the inputs, and y.",
)
@click.option(
    "--relative-error",
    type=float,
    help="Largest relative error of an output.  [default: 0.0001, or none with --accuracy-drop]",
)
@click.option(
    "--accuracy-drop",
    metavar="SHARE",
    callback=share,
    help="Accuracy, as in 1% or 0.01, that B may lose against A; without it B must predict what A does.",
)
@json_option
def compare(
    first: Path, second: Path, data: Path, relative_error: float | None, accuracy_drop: float | None, as_json: bool
) -> int:
    """Compare model B with model A on the same inputs in ONNX Runtime; exit 1 when B is worse.

    A and B are model files, or csr, artifacts or build folders. A gain of accuracy is never a failure.

    \b
    relief-export compare model.onnx model.packed.onnx --data test.npz
    relief-export compare model.onnx model.int8.onnx --data test.npz --accuracy-drop 0.01
    """
    from relief_export import evaluation
    from relief_export.formats import Tolerance
    from relief_export.subjects import model_path

    if relative_error is not None and not 0 <= relative_error < float("inf"):
        raise click.BadParameter(f"--relative-error must be a finite number, 0 or more, not {relative_error}")
    # Whoever allows accuracy to fall expects other outputs: no bound on them is meant then.
    default = 1e-4 if accuracy_drop is None else None
    limits = Tolerance(default if relative_error is None else relative_error, accuracy_drop or 0.0)
    a, b = model_path(first), model_path(second)
    samples = evaluation.load_arrays(data, a)
    done = evaluation.compare(a, b, samples.x, y=samples.y, tolerance=limits)
    echo(done.to_dict(), as_json=as_json, lines=_comparison_lines(done))
    return 0 if done.ok else 1


def _comparison_lines(done: Comparison) -> list[str]:
    """Lay out how far two models are from each other, output by output."""
    found = done.table()
    verdict = [f"compare: {found.title}"] if done.ok else [f"FAILED: {failure.message}" for failure in done.failures]
    return [*table(found.columns, found.rows), "", *verdict]


@click.command(short_help="Count parameters, MACs, FLOPs and RAM.")
@click.argument("model", type=PATH)
@dimension_option
@json_option
def cost(model: Path, dimensions: dict[str, int], as_json: bool) -> int:
    """Count the parameters, MACs and FLOPs of MODEL, and the RAM of its activations, at batch 1.

    MODEL is a model file, or a csr, artifacts or build folder.

    \b
    relief-export cost model.onnx
    relief-export cost segmentation.onnx --dim H=224 --dim W=224
    """
    from relief_export import formats
    from relief_export.errors import UnsupportedModelError
    from relief_export.graph.arena import plan_arena
    from relief_export.graph.cost import cost as count
    from relief_export.graph.prepare import with_dimensions
    from relief_export.subjects import model_path

    loaded = formats.read(model_path(model))
    if dimensions:
        loaded = with_dimensions(loaded, dimensions)
    found = count(loaded)
    # Without lengths there is no arena, but everything else can be counted, at least as "at least".
    try:
        arena, unplanned = plan_arena(loaded).to_dict(), None
    except UnsupportedModelError as error:
        arena, unplanned = None, str(error)
    answer = {"file": str(model), "cost": found.to_dict(), "arena": arena, "arena_unknown": unplanned}
    echo(answer, as_json=as_json, lines=_cost_lines(found, arena, unplanned))
    return 0


def _cost_lines(found: Cost, arena: dict[str, Any] | None, unplanned: str | None) -> list[str]:
    """Lay out the cost report of a model; without an arena ``unplanned`` says why there is none."""
    total = partial(at_least, unknown=len(found.unknown))
    rows = [("parameters", f"{found.parameters.structural:,}", f"{found.parameters.nonzero:,}")]
    rows += [
        (title, total(column.structural), total(column.nonzero))
        for title, column in (("MACs", found.macs), ("FLOPs", found.flops))
    ]
    lines = table(("", "structural", "non-zero"), rows)
    lines.append(f"FLOPs by the paper's formula: {total(found.paper_flops)}")
    lines.append(
        f"activation arena: unknown: {unplanned}"
        if arena is None
        else f"activation arena: {arena['arena_bytes']:,} bytes (lower bound {arena['lower_bound_bytes']:,})"
    )
    return [*lines, *(f"not counted: {item.op} {item.name}: {item.reason}" for item in found.unknown)]


@click.command(short_help="Check a file's flash and RAM against a budget.")
@click.argument("subject", metavar="MODEL_OR_FOLDER", type=PATH)
@click.option("--flash", metavar="SIZE", help="Bytes that the file may have, as in 256KiB.")
@click.option("--ram", metavar="SIZE", help="Bytes that running it may take at batch 1, as in 64KiB.")
@click.option("--target", metavar="NAME", help="A well-known board whose memories are the budget.")
@click.option("--file", metavar="NAME", help="Check this file of a folder.  [default: the smallest that fits]")
@click.option("--exact", is_flag=True, help="Choose among the exact files, whatever the recipe allows.")
@click.option("--accuracy-drop", metavar="SHARE", callback=share, help="Choose lossy files within this too, as in 1%.")
@click.option("--baseline", type=PATH, help="An older model or folder to compare sizes with.")
@click.option("--max-growth", metavar="SHARE", callback=share, help="Largest growth over the baseline, as in 2%.")
@click.option("--annotate", type=click.Choice(["github"]), help="Print the failures as annotations of GitHub's CI.")
@click.option("--measure", is_flag=True, help="Compile the C artifacts for the target and read what they really take.")
@click.option("--cc", metavar="COMMAND", help="With --measure: a compiler with its flags in place of the target's.")
@click.option("-O", "optimise", type=OPTIMISE, default="s", show_default=True, help="With --measure: optimisation.")
@dimension_option
@json_option
def audit(
    subject: Path,
    exact: bool,
    max_growth: float | None,
    annotate: str | None,
    measure: bool,
    cc: str | None,
    optimise: str,
    as_json: bool,
    **options: Any,  # noqa: ANN401 - the budget's keys and the baseline, handed on by name
) -> int:
    """Check what a file takes of the flash, and what running it takes of the RAM; exit 1 when it is over budget.

    MODEL_OR_FOLDER is a model file, or a csr, artifacts or build folder. Of a folder one file is checked: the smallest
    that fits, among those that compute exactly what the pruned network does. RAM is activations at batch 1 and the
    weights that a runtime unpacks at load. A build folder's recipe gives the budget that the options leave open. With
    --measure the C artifacts are cross-compiled, for a board or a core: flash and RAM are those of the linked network.

    \b
    relief-export audit model.onnx --flash 256KiB --ram 64KiB
    relief-export audit build/digits-lenet5 --target stm32f4 --file model.int8.onnx
    relief-export audit model.onnx --baseline main.onnx --max-growth 2%
    relief-export audit net-c --measure --target arduino-uno
    relief-export audit net-c --measure --cc 'arm-none-eabi-gcc -mcpu=cortex-m4 -mthumb' --flash 64KiB
    """
    from relief_export import stages

    if measure:
        from relief_export.device import verdicts

        limits = {name: options[name] for name in ("flash", "ram", "target")}
        fitted = verdicts.fit(subject, **limits, cc=cc, optimise=optimise)
        echo(fitted.to_dict(), as_json=as_json, lines=fit_lines(fitted))
        return 0 if fitted.ok else 1
    if cc is not None:
        # An option without effect is refused, since its user believes that it had one.
        raise click.UsageError("--cc needs --measure: an audit of files compiles nothing")
    if exact and options["accuracy_drop"]:
        raise click.UsageError("--exact and --accuracy-drop say different things: give one of them")
    if max_growth is not None and options["baseline"] is None:
        raise click.UsageError("--max-growth needs something to compare with: give --baseline OLD")
    found = stages.audit(subject, max_growth=max_growth, **options | ({"accuracy_drop": 0.0} if exact else {}))
    if annotate == "github":
        for failure in found["failures"]:
            # On stderr where stdout belongs to the JSON object; the runner reads both.
            click.echo(_annotation(subject, failure), err=as_json)
    echo(found, as_json=as_json, lines=_audit_lines(found))
    return 0 if found["ok"] else 1


def _annotation(subject: Path, failure: dict[str, Any]) -> str:
    """Write a failure as a workflow command; %, line ends, and in properties : and , are escaped as GitHub asks."""

    def escaped(text: str, marks: str) -> str:
        return "".join(f"%{ord(letter):02X}" if letter in marks else letter for letter in text)

    # An annotation names a path, and a failure of a folder names only the file in it.
    file = subject if subject.is_file() else subject / failure["file"]
    where, title = escaped(str(file), "%\r\n:,"), escaped(failure["code"], "%\r\n:,")
    message = escaped(failure["message"], "%\r\n")
    return f"::error file={where},title=relief-export {title}::{message}"


def _audit_lines(found: dict[str, Any]) -> list[str]:
    """Lay out what every file takes, and close with the verdict about the one that was checked."""
    from relief_export.evaluation import Growth

    budget, checked = found["budget"], found["checked"]
    limits = {"flash": budget["flash_bytes"], "ram": budget["ram_bytes"]}
    limited = [name for name, limit in limits.items() if limit is not None]
    asked = bool(limited) or (found["growth"] or {}).get("limit") is not None
    heads = ["file", "format", "accuracy", "flash, bytes", "RAM, bytes"]
    heads += [f"of {limits[name]:,} {'RAM' if name == 'ram' else name}" for name in limited]
    rows = []
    for row in found["files"]:
        # None is of a lone file, of which no manifest says what it may lose.
        lossy = "-" if row["accuracy_drop"] is None else "exact"
        if row["accuracy_drop"]:
            lossy = f"-{100 * row['accuracy_drop']:g} points"
        sizes = ("unknown" if row[key] is None else f"{row[key]:,}" for key in ("flash_bytes", "ram_bytes"))
        mark = " <- checked" if asked and row["file"] == checked and len(found["files"]) > 1 else ""
        shares = (percent(None if (need := row[f"{name}_bytes"]) is None else need / limits[name]) for name in limited)
        rows.append((row["file"] + mark, row["format"], lossy, *sizes, *shares))
    lines = [*table(heads, rows), ""]
    size = next(row for row in found["files"] if row["file"] == checked)
    lines.append(_ram_line(size, found["arena"]))
    if (growth := found["growth"]) is not None:
        changes = (("flash", growth["flash_change"]), ("RAM", growth["ram_change"]))
        stated = ", ".join(
            f"{name} {'unknown' if change is None else percent(change, sign=True)}" for name, change in changes
        )
        lines.append(f"against {Growth(**growth).where}: {stated}")
    lines += found["notes"]
    return [*lines, f"audit: {found['verdict']}", *(f"FAILED: {failure['message']}" for failure in found["failures"])]


def _ram_line(size: dict[str, Any], arena: dict[str, Any] | None) -> str:
    if arena is None:
        return f"RAM of {size['file']}: unknown: {size['ram_unknown']}"
    return (
        f"RAM of {size['file']}: activations {arena['arena_bytes']:,} bytes at {arena['peak_op']} {arena['peak']} "
        f"(lower bound {arena['lower_bound_bytes']:,}), weights unpacked at load {size['unpacked_bytes']:,} bytes"
    )


@click.command(short_help="List the ONNX operators and how each is handled.")
@click.argument("model", required=False, type=PATH)
@json_option
def ops(model: Path | None, as_json: bool) -> int:
    """List the ONNX operators that shrink knows, or those of MODEL, with how each is handled.

    rule: dead channels are followed through it. opaque: it reads or mixes all channels, so they stay. unknown: there is
    no rule, so what it touches stays, and --strict refuses it. MODEL is a model file, or a csr, artifacts or build
    folder.

    \b
    relief-export ops
    relief-export ops model.onnx
    """
    from relief_export.graph.ops import OPAQUE, RULES

    names: dict[str, int] = dict.fromkeys(RULES, 0)
    if model is not None:
        from relief_export import formats
        from relief_export.subjects import model_path

        names = {}
        # With those of subgraphs, for what an If or a Loop does needs a rule as well.
        for node in formats.read(model_path(model)).graph.all_nodes():
            name = node.op_type if node.domain in {"", "ai.onnx"} else f"{node.domain}::{node.op_type}"
            names[name] = names.get(name, 0) + 1
    rows = []
    for name in sorted(names):
        rule = RULES.get(name)
        outcome = "unknown" if rule is None else "opaque" if rule is OPAQUE else "rule"
        # Not typed again here: the class of a rule says in its first line what is true of all its operators.
        handled = "" if rule is None or rule is OPAQUE else (type(rule).__doc__ or "").split("\n")[0].rstrip(".")
        rows.append({"operator": name, "outcome": outcome, "handled": handled, "nodes": names[name]})
    width = max(map(len, names), default=0)
    lines = []
    for row in rows:
        count = f"{row['nodes']:>4}  " if model else ""
        lines.append(f"{row['operator']:<{width}}  {row['outcome']:<7}  {count}{row['handled']}".rstrip())
    echo({"operators": rows}, as_json=as_json, lines=lines)
    return 0


COMMANDS = (shrink, convert, compare, cost, audit, ops)
