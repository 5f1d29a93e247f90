"""Commands of the pipeline: from a recipe to a report, all at once or one stage each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from relief_export.cli.common import PATH, echo, json_option, progress_option, recipe_options, table
from relief_export.printing import counted, percent

if TYPE_CHECKING:
    from collections.abc import Callable

    from relief_export.recipe import Recipe
    from relief_export.stages import Done


def _resolve(recipe: str, settings: tuple[str, ...], seed: int | None, out: Path | None) -> tuple[Recipe, Path]:
    from relief_export.recipe import load_recipe, parse_overrides

    chosen = parse_overrides(settings) | ({} if seed is None else {"seed": str(seed)})
    resolved = load_recipe(recipe, chosen)
    return resolved, out or Path("build") / resolved.name


@click.command(short_help="Take a recipe through all stages.")
@recipe_options
@progress_option
@json_option
def run(
    recipe: str,
    out: Path | None,
    settings: tuple[str, ...],
    seed: int | None,
    force: bool,
    progress: bool | None,
    as_json: bool,
) -> int:
    """Take RECIPE (a name or a .toml file) through all stages, and print what came of it.

    What is up to date is skipped; an interrupted run goes on where it stopped.

    \b
    relief-export run digits-lenet5
    relief-export run my.toml --out build/tryout --set train.epochs=2 --seed 3
    torchrun --nproc-per-node 4 -m relief_export run cifar10-vgg-like
    """
    from relief_export import stages
    from relief_export.progress import bars

    resolved, folder = _resolve(recipe, settings, seed, out)
    with bars(wanted=progress) as callback:
        ok = stages.run(resolved, folder, force=force, progress=callback)
    if stages.is_main_process():
        result = _summary(folder)
        echo(result, as_json=as_json, lines=_summary_lines(result))
    return 0 if ok else 1


@click.command(short_help="Train a recipe's dense network.")
@recipe_options
@progress_option
@json_option
def train(
    recipe: str,
    out: Path | None,
    settings: tuple[str, ...],
    seed: int | None,
    force: bool,
    progress: bool | None,
    as_json: bool,
) -> int:
    """Train the dense network of RECIPE (a name or a .toml file) into build/NAME/dense.

    \b
    relief-export train digits-lenet5 --set train.epochs=3
    """
    resolved, folder = _resolve(recipe, settings, seed, out)
    return _stage("train", folder, recipe=resolved, force=force, progress=progress, as_json=as_json)


def _stage(
    name: str, folder: Path, *, force: bool, progress: bool | None, as_json: bool, recipe: Recipe | None = None
) -> int:
    from relief_export import stages
    from relief_export.progress import bars

    with bars(wanted=progress) as callback:
        done = stages.run_stage(name, folder, recipe=recipe, force=force, progress=callback)
    # Under torchrun every process gets here, and the answer is wanted once.
    if stages.is_main_process():
        echo(done.to_dict(), as_json=as_json, lines=_stage_lines(done))
    return 0 if done.ok else 1


@click.command(short_help="Prune: find the weights that matter (= prune).")
@click.argument("folder", type=PATH)
@click.option("--force", is_flag=True, help="Start afresh even where everything is up to date.")
@progress_option
@json_option
def relieve(folder: Path, force: bool, progress: bool | None, as_json: bool) -> int:
    """Prune the network that was trained into FOLDER, a build folder, by the method of NNrelief.

    Each pruning round scores the weights by neural activity, drops the weakest of each neuron, and retrains. `prune` is
    another name of this command.

    \b
    relief-export relieve build/digits-lenet5
    relief-export prune build/digits-lenet5
    """
    return _stage("relieve", folder, force=force, progress=progress, as_json=as_json)


# A command of its own, so that the list of commands shows both names.
prune = click.Command(
    "prune",
    callback=relieve.callback,
    params=relieve.params,
    help=relieve.help,
    short_help="Prune a trained network (= relieve).",
)


@click.command(short_help="Round a pruned network to few values by training.")
@click.argument("folder", type=PATH)
@click.option("--force", is_flag=True, help="Start afresh even where everything is up to date.")
@progress_option
@json_option
def quantise(folder: Path, force: bool, progress: bool | None, as_json: bool) -> int:
    """Round the pruned network of FOLDER, a build folder, to few values by training, if its recipe has [quantise].

    \b
    relief-export quantise build/digits-lenet5
    """
    return _stage("quantise", folder, force=force, progress=progress, as_json=as_json)


@click.command(short_help="Write a pruned network in every format.")
@click.argument("folder", type=PATH)
@click.option("--force", is_flag=True, help="Write everything again even where it is up to date.")
@progress_option
@json_option
def export(folder: Path, force: bool, progress: bool | None, as_json: bool) -> int:
    """Write the pruned network of FOLDER, a build folder, in every format of its recipe.

    \b
    relief-export export build/digits-lenet5
    """
    return _stage("export", folder, force=force, progress=progress, as_json=as_json)


@click.command(short_help="Check every file against the network on test data.")
@click.argument("folder", type=PATH)
@click.option("--data", type=PATH, help="An .npz with arrays x and y to validate on; torch is then not needed.")
@click.option("--strict", is_flag=True, help="Fail where generated C cannot be compiled, for want of a C compiler.")
@progress_option
@json_option
def validate(folder: Path, data: Path | None, strict: bool, progress: bool | None, as_json: bool) -> int:
    """Check every file in FOLDER against the pruned network on test data, in ONNX Runtime; exit 1 if one differs.

    FOLDER is a build folder (build/NAME), a folder that an export wrote (it has a manifest.json), or one file of it.

    \b
    relief-export validate build/digits-lenet5
    relief-export validate build/digits-lenet5/artifacts --data test.npz
    relief-export validate mine/model.packed.onnx
    """
    from relief_export import stages
    from relief_export.progress import bars

    with bars(wanted=progress) as callback:
        done = stages.validate(folder, data=data, strict=strict, progress=callback)
    echo(done.to_dict(), as_json=as_json, lines=_stage_lines(done))
    return 0 if done.ok else 1


@click.command(short_help="Write the page about one run or several.")
@click.argument("folders", nargs=-1, required=True, type=PATH)
@click.option("--out", type=PATH, help="Folder of the pages; the build folder, or the present one for several.")
@json_option
def report(folders: tuple[Path, ...], out: Path | None, as_json: bool) -> int:
    """Write report.html and report.md of one run, or one page that compares several.

    FOLDERS are build folders, or folders that an export wrote.

    \b
    relief-export report build/digits-lenet5
    relief-export report build/digits-lenet5 build/digits-lenet300-100 --out build/comparison
    """
    from relief_export.report import build_report

    # A page about several runs belongs to none of their folders.
    paths = build_report(folders, out or (folders[0] if len(folders) == 1 else Path()))
    files = {"html": str(paths.html), "markdown": str(paths.markdown)}
    echo({"ok": True, **files}, as_json=as_json, lines=files.values())
    return 0


@click.command(short_help="List the recipes.")
@json_option
def recipes(as_json: bool) -> int:
    """List the recipes, with what each trains; `--json` adds what it reproduces."""
    from relief_export.recipe import load_recipe, recipe_names, recipe_variants

    rows = []
    for name in recipe_names():
        recipe = load_recipe(name)
        entry = {"name": name, "variants": list(recipe_variants(name)), "description": recipe.description}
        rows.append(entry | {"reproduces": recipe.reproduces})
    width = max(len(row["name"]) for row in rows)
    lines = []
    for row in rows:
        variants = f" ({' '.join(f'@{variant}' for variant in row['variants'])})" if row["variants"] else ""
        lines.append(f"{row['name']:<{width}}  {row['description']}{variants}".rstrip())
    echo({"recipes": rows}, as_json=as_json, lines=lines)
    return 0


def _summary(folder: Path) -> dict[str, Any]:
    """Collect the closing figures of a run from its records; accuracies are fractions of the test set."""
    from relief_export.records import RECORDS, read_record

    records = {stage: read_record(folder / path, stage) for stage, path in RECORDS.items()}
    # In the order of RECORDS, from which the mapping above was made.
    train, relieve, quantise, export, validate, audit = (record.outcome for record in records.values())
    # Without [quantise] there is no such network: a missing column says so better than an empty one.
    rounded = {} if quantise["values"] is None else {"quantised": quantise["test"]}
    dense, kept = relieve["connections"]["dense"], relieve["connections"]["kept"]
    # Nothing is timed after a failed validation, so a file may be missing here.
    seconds = {row["name"]: row["median"] for row in validate["latency"]}
    files = [
        {
            "file": entry["name"],
            "format": entry["format"],
            "file_bytes": sum(file["file_bytes"] for file in entry["files"]),
            "accuracy": _accuracy(validate, entry["name"]),
            "seconds_per_sample": seconds.get(entry["name"]),
        }
        for entry in export["artifacts"]
    ]
    return {
        "ok": validate["ok"] and audit["ok"],
        "failures": [*validate["failures"], *audit["failures"]],
        "name": records["export"].recipe["name"],
        "accuracy": {
            "dense": train["test"],
            "pruned": relieve["test"],
            **rounded,
            "onnx_runtime": _accuracy(validate, "model.onnx"),
        },
        "weights": {"dense": dense, "kept": kept, "density": kept / dense},
        "parameters": export["cost"]["shrunk"]["parameters"],
        "macs": export["cost"]["shrunk"]["macs"],
        "original_bytes": export["baselines"]["original"]["file_bytes"],
        "original_seconds_per_sample": seconds.get("original"),
        "files": files,
        "seconds": {stage: record.seconds for stage, record in records.items()},
        "report": str(folder / "report.html"),
        "model": str(folder / "artifacts" / "model.onnx"),
    }


def _accuracy(validate: dict[str, Any], file: str) -> float | None:
    """Return the lowest accuracy that was measured of a file, optimisations off and on."""
    found = [m["agreement"]["accuracy"] for m in validate["measurements"] if m["file"] == file]
    # The lowest, so that no figure is better than what a user may meet.
    return min((value for value in found if value is not None), default=None)


def _summary_lines(result: dict[str, Any]) -> list[str]:
    """Lay out the closing table of a run."""
    accuracy, weights = result["accuracy"], result["weights"]
    original = result["original_bytes"]
    columns = (name.replace("onnx_runtime", "ONNX Runtime") for name in accuracy)
    lines = table(("", *columns), [("test accuracy", *map(percent, accuracy.values()))])
    rows: list[tuple[str, ...]] = [
        ("weights and biases", f"{weights['dense']:,}", "", f"{weights['kept']:,} ({percent(weights['density'])})")
    ]
    for title, key in (("parameters", "parameters"), ("MACs", "macs")):
        column = result[key]
        rows.append((title, *(f"{column[name]:,}" for name in ("dense", "structural", "nonzero"))))
    lines += ["", *table(("", "dense", "structural", "non-zero"), rows)]
    slow = result["original_seconds_per_sample"]
    sizes = [("original network, ONNX", f"{original:,}", "1.0", percent(accuracy["dense"]), *_speed(slow, slow))]
    for file in result["files"]:
        smaller = f"{original / file['file_bytes']:.1f}"
        speed = _speed(file["seconds_per_sample"], slow)
        sizes.append((file["file"], f"{file['file_bytes']:,}", smaller, percent(file["accuracy"]), *speed))
    heads = ("file", "bytes", "times smaller", "test accuracy", "ms a sample, one core", "times faster")
    lines += ["", *table(heads, sizes), ""]
    lines += [f"FAILED: {failure['message']}" for failure in result["failures"]]
    return [*lines, f"report  {result['report']}", f"model   {result['model']}"]


def _speed(seconds: float | None, original: float | None) -> tuple[str, str]:
    """Return milliseconds a sample and how many times faster than the dense network that is."""
    if seconds is None or original is None:
        return "", ""
    return f"{1000 * seconds:.4f}", f"{original / seconds:.1f}"


def _stage_lines(done: Done) -> list[str]:
    """Say in a line or two what came of a stage."""
    state = "up to date" if done.skipped else f"{done.seconds:.1f} s"
    return [
        f"{done.stage}: {_STAGE_LINES[done.stage](done.outcome)} ({state})",
        *(
            check["message"]
            for check in done.outcome.get("checks", ())
            # A program that could not be compiled is no failure, but must not pass in silence.
            if check["code"] == "compiled" and check["ok"]
        ),
        *(f"FAILED: {failure['message']}" for failure in done.outcome.get("failures", ())),
    ]


def _pruned(outcome: dict[str, Any]) -> str:
    kept, dense = outcome["connections"]["kept"], outcome["connections"]["dense"]
    # Records of earlier versions have none.
    note = f"; {said}" if (said := outcome["relief"].get("note")) else ""
    return f"density {percent(kept / dense)} ({kept:,} of {dense:,}), test accuracy {percent(outcome['test'])}{note}"


def _quantised(outcome: dict[str, Any]) -> str:
    if outcome["values"] is None:
        return "the recipe has no [quantise], nothing to do"
    kind = "int8 steps" if outcome["values"] == "int8" else f"{outcome['values']} values a tensor"
    return f"{kind}, test accuracy {percent(outcome['test'])}"


def _validated(outcome: dict[str, Any]) -> str:
    files = {entry["file"] for entry in outcome["checks"]}
    verdict = "passed" if outcome["ok"] else "FAILED"
    return f"{verdict}: {counted(len(files), 'file')}, {counted(outcome['samples'], 'sample')} of {outcome['source']}"


_STAGE_LINES: dict[str, Callable[[dict[str, Any]], str]] = {
    "train": lambda outcome: f"test accuracy {percent(outcome['test'])}",
    "relieve": _pruned,
    "quantise": _quantised,
    "export": lambda outcome: ", ".join(entry["name"] for entry in outcome["artifacts"]),
    "validate": _validated,
}


COMMANDS = (run, train, relieve, prune, quantise, export, validate, report, recipes)
