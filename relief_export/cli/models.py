"""Commands that take ONNX models of any origin; none of them needs torch."""

from __future__ import annotations

from pathlib import Path

import click

from relief_export.cli.common import PATH, echo, json_option
from relief_export.cli.devices import OPTIMISE, fit_lines
from relief_export.format_names import FORMAT_NAMES

verify_option = click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Open the result in ONNX Runtime before it is kept."
)


@click.command()
@click.argument("source", metavar="IN.onnx", type=PATH)
@click.argument("target", metavar="OUT.onnx", type=PATH)
@click.option("--strict", is_flag=True, help="Refuse a model with operators that have no rule.")
@verify_option
@json_option
def shrink(source: Path, target: Path, strict: bool, verify: bool, as_json: bool) -> int:
    """Remove every disconnected neuron from IN.onnx, exactly, and write OUT.onnx.

    Inputs and outputs keep their names, types and shapes. What had to stay is listed with its reason.

    \b
    relief-export shrink pruned.onnx small.onnx
    relief-export shrink pruned.onnx small.onnx --strict --json
    """
    from relief_export import convert
    from relief_export.cli import results

    done = convert.shrink_file(source, target, strict=strict, verify=verify)
    echo(done.to_dict(), as_json=as_json, lines=results.shrunk_lines(done))
    return 0


@click.command()
@click.argument("source", metavar="IN.onnx", type=PATH)
@click.argument("target", metavar="OUT", type=PATH)
@click.option("--to", "kind", type=click.Choice(FORMAT_NAMES), required=True, help="Format to write.")
@click.option("--calibration", type=PATH, help="An .npz with samples x of the model's input, for int8 and packed-int8.")
@verify_option
@json_option
def convert(source: Path, target: Path, kind: str, calibration: Path | None, verify: bool, as_json: bool) -> int:
    """Write IN.onnx (or a csr folder) in another format.

    \b
    relief-export convert model.onnx model.packed.onnx --to packed
    relief-export convert model.onnx model.small.onnx --to packed-codebook16
    relief-export convert model.onnx model.int8.onnx --to int8 --calibration train.npz
    relief-export convert build/digits-lenet5/artifacts/csr model.onnx --to dense
    """
    from relief_export import convert as conversion

    done = conversion.convert_file(source, target, kind, calibration=calibration, verify=verify)
    lines = (f"{target}: {done.format}, {done.bytes:,} bytes", *done.notes)
    echo({"ok": True, "bytes": done.bytes} | done.to_dict(), as_json=as_json, lines=lines)
    return 0


@click.command()
@click.argument("first", metavar="A", type=PATH)
@click.argument("second", metavar="B", type=PATH)
@click.option("--data", type=PATH, required=True, help="An .npz with array x and, for accuracies, y.")
@click.option("--tolerance", type=float, default=1e-4, show_default=True, help="Largest relative error of an output.")
@json_option
def compare(first: Path, second: Path, data: Path, tolerance: float, as_json: bool) -> int:
    """Compare two ONNX models on the same inputs in ONNX Runtime; exit 1 when they differ.

    \b
    relief-export compare model.onnx model.packed.onnx --data test.npz
    """
    from relief_export import evaluation
    from relief_export.cli import results

    if not 0 <= tolerance < float("inf"):
        raise click.BadParameter(f"the tolerance must be a finite number, 0 or more, not {tolerance}")
    samples = evaluation.load_arrays(data)
    done = evaluation.compare(first, second, samples.x, y=samples.y, tolerance=tolerance)
    echo(done.to_dict(), as_json=as_json, lines=results.comparison_lines(done))
    return 0 if done.ok else 1


@click.command()
@click.argument("model", type=PATH)
@json_option
def cost(model: Path, as_json: bool) -> int:
    """Count the parameters, MACs and FLOPs of MODEL, and the RAM of its activations, at batch 1.

    \b
    relief-export cost model.onnx
    relief-export cost model.onnx --json
    """
    from relief_export import formats
    from relief_export.cli import results
    from relief_export.errors import UnsupportedModelError
    from relief_export.graph.arena import plan_arena
    from relief_export.graph.cost import cost as count

    loaded = formats.read(model)
    bill = count(loaded)
    try:
        arena, planned = plan_arena(loaded).to_dict(), None
    except UnsupportedModelError as error:
        arena, planned = None, str(error)
    found = {"ok": True, "cost": bill.to_dict(), "arena": arena, "arena_unknown": planned}
    echo(found, as_json=as_json, lines=results.cost_lines(bill, arena, planned))
    return 0


@click.command()
@click.argument("subject", metavar="MODEL_OR_FOLDER", type=PATH)
@click.option("--flash", metavar="SIZE", help="Budget of the file, as in 256KiB.")
@click.option("--ram", metavar="SIZE", help="Budget of the activations at batch 1, as in 64KiB.")
@click.option("--target", metavar="NAME", help="A well-known board whose sizes are the budget.")
@click.option("--measure", is_flag=True, help="Compile the C artifacts for the target and read what they really take.")
@click.option("--cc", metavar="COMMAND", help="With --measure: a compiler with its flags in place of the target's.")
@click.option("-O", "optimise", type=OPTIMISE, default="s", show_default=True, help="With --measure: optimisation.")
@json_option
def audit(
    subject: Path,
    flash: str | None,
    ram: str | None,
    target: str | None,
    measure: bool,
    cc: str | None,
    optimise: str,
    as_json: bool,
) -> int:
    """Hold a model, or every artifact of a build folder, against a budget; exit 1 when over it.

    A build folder's recipe gives the budget that the options leave open, and audit.json is left there. With --measure
    the C artifacts are cross-compiled, for a board or a core: flash and RAM are those of the linked network.

    \b
    relief-export audit model.onnx --flash 256KiB --ram 64KiB
    relief-export audit build/digits-lenet5 --target stm32f4
    relief-export audit net-c --measure --target arduino-uno
    relief-export audit net-c --measure --cc 'arm-none-eabi-gcc -mcpu=cortex-m4 -mthumb' --flash 64KiB
    """
    from relief_export import stages
    from relief_export.cli import results

    if measure:
        from relief_export.device import verdicts

        fitted = verdicts.fit(subject, flash=flash, ram=ram, target=target, cc=cc, optimise=optimise)
        echo(fitted.to_dict(), as_json=as_json, lines=fit_lines(fitted))
        return 0 if fitted.ok else 1
    if cc is not None:
        raise click.UsageError("--cc needs --measure: an audit of files compiles nothing")
    done = stages.audit(subject, flash=flash, ram=ram, target=target)
    echo(done.to_dict(), as_json=as_json, lines=results.audit_lines(done))
    return 0 if done.ok else 1


COMMANDS = (shrink, convert, compare, cost, audit)
