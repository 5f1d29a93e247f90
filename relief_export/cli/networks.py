"""Commands about files of PyTorch networks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from relief_export.cli.common import PATH, echo, json_option, table
from relief_export.printing import percent

if TYPE_CHECKING:
    from relief_export.cli.answers import MaskedTensor


@click.command(short_help="Show the masks in a file, layer by layer.")
@click.argument("path", metavar="WEIGHTS", type=PATH)
@click.option(
    "--from",
    "form",
    type=click.Choice(("relief", "prune", "nni", "authors", "names", "zeros")),
    help="The form that the file must have; by default it is found out.",
)
@json_option
def masks(path: Path, form: str | None, as_json: bool) -> int:
    """Show the masks that WEIGHTS holds, layer by layer, before anything is done with them.

    WEIGHTS is a file of masks in any of the known forms (this package's, a state_dict of torch.nn.utils.prune, NNI's,
    the NNrelief authors', names and masks), or of weights, whose exact zeros count. Nothing in it is executed.

    \b
    relief-export masks build/mnist-lenet5/relieved/masks.safetensors
    relief-export masks pruned.pth --from prune
    relief-export masks weights.safetensors --from zeros --json
    """
    from relief_export.relief.masks import masks_in

    found = masks_in(path, form)
    rows: list[MaskedTensor] = [
        {
            "tensor": name,
            "shape": list(mask.shape),
            "entries": mask.numel(),
            "kept": int(mask.sum()),
            "not_zero": found.disagreements.get(name, 0),
        }
        for name, mask in found.masks.items()
    ]
    # A tensor may be without entries, and then has no share: hence the max() below.
    entries, kept = sum(row["entries"] for row in rows), sum(row["kept"] for row in rows)
    result = {"file": str(path), "form": found.form, "entries": entries, "kept": kept, "tensors": rows}
    cells = (
        (
            row["tensor"],
            "x".join(map(str, row["shape"])),
            f"{row['kept']:,}",
            f"{row['entries']:,}",
            percent(row["kept"] / max(1, row["entries"])),
        )
        for row in rows
    )
    lines = [
        f"{path}: masks of the form {found.form}",
        *table(("tensor", "shape", "kept", "of", "density"), cells),
        f"kept: {kept:,} of {entries:,} entries ({percent(kept / max(1, entries))})",
        *(f"{name}: {count:,} masked entries are not zero" for name, count in found.disagreements.items()),
    ]
    echo(result, as_json=as_json, lines=lines)
    return 0


COMMANDS = (masks,)
