"""Commands about microcontrollers: what a network takes there, and whether it computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from relief_export.cli.common import PATH, echo, json_option, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relief_export.device.verdicts import DeviceRun, Fit

OPTIMISE = click.Choice(("s", "1", "2", "3"))


def fit_lines(done: Fit) -> Iterator[str]:
    """Lay out measured sizes and the verdict."""
    parts = ("flash", "RAM", "text", "data", "bss", "arena", "input", "output", "stack")
    for name, found in done.measured.items():
        yield f"{name} on {found.processor}: {found.command}"
        if found.estimated:
            yield f"ESTIMATED, not measured: {found.estimated}"
        taken = found.to_dict()
        sizes = ["?" if (size := taken[f"{part.lower()}_bytes"]) is None else f"{size:,}" for part in parts]
        yield from table(("bytes", *parts), [("", *sizes)])
        # The stack is the one part of the RAM that is worked out and not read off: who reaches it lets it be checked.
        if found.stack_path:
            yield f"deepest stack: {' > '.join(found.stack_path)}"
        yield from (f"the stack may be deeper: {doubt}" for doubt in found.stack_doubts)
    limits = {"flash": done.budget.flash, "RAM": done.budget.ram}
    given = ", ".join(f"{limit:,} bytes of {memory}" for memory, limit in limits.items() if limit is not None)
    yield from (f"FAILED: {failure.message}" for failure in done.failures)
    yield f"{'within' if done.ok else 'over'} budget: {given}" if given else "no budget was given, nothing was checked"


@click.command("run-on", short_help="Run a C artifact in an emulator of a board.")
@click.argument("target")
@click.argument("folder", type=PATH)
@click.option("--data", type=PATH, required=True, help="An .npz with x and, for the comparison, logits or labels y.")
@click.option("--reference", type=PATH, help="ONNX model whose outputs are the reference, in place of the logits.")
@click.option("--samples", type=click.IntRange(1), help="Only that many, from the first.")
@click.option(
    "--relative-error", type=float, default=1e-4, show_default=True, help="Largest relative error of an output."
)
@click.option("-O", "optimise", type=OPTIMISE, default="s", show_default=True, help="Level of optimisation.")
@click.option("--quantized-io", is_flag=True, help="Compile with NET_QUANTIZED_IO: inputs and outputs are integers.")
@json_option
def run_on(
    target: str,
    folder: Path,
    data: Path,
    reference: Path | None,
    samples: int | None,
    relative_error: float,
    optimise: str,
    quantized_io: bool,
    as_json: bool,
) -> int:
    """Run the C artifact in FOLDER in an emulator of TARGET, a board or a core; exit 1 when its outputs differ.

    Counts instructions. Milliseconds are instructions at one a cycle of the board's clock, not measured time. What is
    found of a program of a build folder, or of a folder that an export wrote, is kept there and shown by `report`.

    \b
    relief-export run-on rp2040 build/digits-lenet5/artifacts/c-mcu --data test.npz --reference model.onnx
    relief-export run-on rp2040 net-c --data test.npz --reference model.onnx
    relief-export run-on arduino-uno net-c --data test.npz --samples 20
    """
    from relief_export import evaluation
    from relief_export.device import verdicts
    from relief_export.formats import Tolerance
    from relief_export.formats.artifact import check_listed
    from relief_export.formats.c import is_program

    # A folder of several projects' files has no program of its own, and then only the reference tells the names.
    named = reference or (folder if is_program(folder) else None)
    arrays = evaluation.load_arrays(data, named)
    x = arrays.one_input[:samples]
    y = None if arrays.y is None else arrays.y[:samples]
    logits = None if arrays.logits is None else evaluation.part(arrays.logits, 0, len(x))
    if reference is not None:
        check_listed(reference)
        (logits,) = evaluation.open_session(reference, threads=1).run(x)
    done = verdicts.run_on(
        target,
        folder,
        evaluation.Arrays(x, y, logits),
        tolerance=Tolerance(relative_error, 1.0),  # accuracies are reported, and decide nothing
        optimise=optimise,
        defines=("NET_QUANTIZED_IO",) if quantized_io else (),
    )
    echo(done.to_dict(), as_json=as_json, lines=_run_lines(done))
    return 0 if done.ok else 1


def _run_lines(done: DeviceRun) -> Iterator[str]:
    found = done.table()
    yield from table((found.title, ""), found.rows)
    yield from (f"FAILED: {check.message}" for check in done.checks if not check.ok)
    if done.agreement is None:
        yield "no reference was given (--reference, or logits in the data): nothing was compared"
    if done.record is not None:
        yield f"kept for the report in {done.record}"


COMMANDS = (run_on,)
