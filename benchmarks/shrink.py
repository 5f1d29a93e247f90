"""Remove killed channels from every torchvision classification model; each model runs in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import ROOT, Benchmark, Column, Row

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from relief_export.graph.shrink import ShrinkResult

SEED = 0
SHARE = 0.3
SIDE = 224
PARAMETER_LIMIT = 350_000_000
TIMEOUT = 900  # seconds a model
SILENT = (
    "densenet121", "efficientnet_b0", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x1_0", "vgg11",
)  # fmt: skip
"""One model of a family is also measured with killed channels that emit zero."""
OBSTACLES = {  # first words of a reason -> column
    "tied at": "left_tied",
    "read by Add": "left_tied",
    "read by Mul": "left_tied",
    "no longer constant behind Add": "left_tied",
    "non-zero constant": "left_padding",
    "equal groups": "left_groups",
    "pinned by": "left_pinned",
}


def names() -> list[str]:
    """Return every classification model of torchvision."""
    from relief_export.training.vision import import_torchvision  # noqa: PLC0415 - torch starts slowly

    vision = import_torchvision()
    found: list[str] = vision.models.list_models(module=vision.models)
    return found


def measure(name: str, shifts: str) -> Row:
    """Build, kill, capture, shrink and compare one model."""
    import torch  # noqa: PLC0415

    from benchmarks.killing import build, kill  # noqa: PLC0415
    from relief_export.capture import capture  # noqa: PLC0415
    from relief_export.graph.cost import cost  # noqa: PLC0415
    from relief_export.graph.shrink import shrink  # noqa: PLC0415

    torch.set_num_threads(1)
    network = build(name, SEED, SIDE)
    parameters = sum(p.numel() for p in network.parameters())
    row: Row = {"model": name, "shifts": shifts, "parameters": parameters}
    if parameters > PARAMETER_LIMIT:
        return row | {"error": f"skipped: more than {PARAMETER_LIMIT:,} parameters"}
    killed = kill(network, SHARE, SEED)
    if shifts == "zero":
        _silence(network, killed)
    started = time.perf_counter()
    model = capture(network, torch.zeros(2, 3, SIDE, SIDE))
    row["export_s"] = round(time.perf_counter() - started, 2)
    started = time.perf_counter()
    result = shrink(model)
    row["shrink_s"] = round(time.perf_counter() - started, 2)
    before, after = cost(model), cost(result.model)
    row |= {
        "parameters_before": before.parameters.structural,
        "parameters_after": after.parameters.structural,
        "macs_before": before.macs.structural,
        "macs_after": after.macs.structural,
        "unknown": result.unknown,
    }
    row |= account({n: rows.numpy() for n, rows in killed.items()}, result)
    return row | {"max_relative_error": _error(model, result.model), "error": ""}


def account(killed: dict[str, NDArray[np.int64]], result: ShrinkResult) -> Row:
    """Say of every killed channel whether its row is gone, and by which obstacle it stays.

    A row is gone where the weight of that name holds fewer all-zero rows than were killed. ``removable`` is what was
    killed less what an operator of the graph forbids to remove: rows on a tensor that an addition shares with a
    live channel, that a zero-padded convolution reads as a non-zero constant, that must fill up a group, that an
    operator reads or mixes whole. ``unexplained`` rows stay for none of these.
    """
    left: Counter[str] = Counter()
    removed = 0
    reasons: dict[str, Counter[str]] = {}
    for kept in result.stayed:
        if kept.side == "output":
            kind = next((k for words, k in OBSTACLES.items() if kept.reason.startswith(words)), "left_other")
            reasons.setdefault(kept.layer, Counter())[kind] += kept.count
    for name, rows in killed.items():
        stay = min(_zero_rows(result.model, name), len(rows))
        removed += len(rows) - stay
        for kind, count in reasons.get(name.removesuffix(".weight"), Counter()).items():
            taken = min(stay, count)
            left[kind] += taken
            stay -= taken
        left["unexplained"] += stay
    total = sum(len(rows) for rows in killed.values())
    forbidden = sum(left[k] for k in set(OBSTACLES.values()))
    columns = (*dict.fromkeys(OBSTACLES.values()), "left_other", "unexplained")
    share = removed / (total - forbidden) if total > forbidden else 1.0
    return {
        "killed": total,
        "removed": removed,
        "removable": total - forbidden,
        "removed_of_removable": round(share, 4),
        **{k: left[k] for k in columns},
    }


def _zero_rows(model: ir.Model, name: str) -> int:
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        return 0
    array = value.const_value.numpy()
    # The exporter stores the weights of a linear layer on sequences transposed, under a name of its own.
    return int((~(array != 0).reshape(len(array), -1).any(axis=1)).sum())


def _silence(network: Any, killed: dict[str, Any]) -> None:  # noqa: ANN401 - torch is imported late
    """Take the shifts back: a killed channel then emits zero."""
    import torch  # noqa: PLC0415

    from benchmarks.killing import LINEAR, NORM, _shifts  # noqa: PLC0415

    layers = [(n, p) for n, p in network.named_modules() if isinstance(p, (*LINEAR, NORM))]
    with torch.no_grad():
        for (name, part), (_, after) in zip(layers, [*layers[1:], ("", None)], strict=True):
            rows = killed.get(f"{name}.weight")
            if rows is not None:
                for shift in _shifts(part, after, part.weight.shape[0]):
                    shift[rows] = 0


def _error(reference: ir.Model, found: ir.Model) -> float:
    """Return the largest difference of the logits relative to their scale, in ONNX Runtime, default optimisations."""
    import onnx_ir as ir  # noqa: PLC0415
    import onnxruntime as ort  # noqa: PLC0415

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    x = np.random.default_rng(SEED).normal(size=(2, 3, SIDE, SIDE)).astype(np.float32)
    logits = []
    for model in (reference, found):
        session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
        logits.append(session.run(None, {session.get_inputs()[0].name: x})[0].astype(np.float64))
    scale = np.abs(logits[0]).max()
    if not np.isfinite(logits[0]).all() or logits[0].std(axis=0).max() <= 1e-6 * scale:
        raise ValueError("degenerate logits: the comparison would show nothing")
    return float(np.abs(logits[0] - logits[1]).max() / scale)


def run() -> list[Row]:
    """Measure every model in a process of its own; a model that fails is a row with its error."""
    rows = []
    for name in names():
        for shifts in ("random", "zero") if name in SILENT else ("random",):
            command = [sys.executable, "-m", "benchmarks.shrink", name, shifts]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            try:
                done = subprocess.run(  # noqa: S603 - this module itself
                    command, capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT, env=environment, check=False
                )
                last = (done.stderr.strip().splitlines() or [""])[-1][:300]
                error = "" if done.returncode == 0 else f"exit {done.returncode}: {last}"
            except subprocess.TimeoutExpired:
                error = f"not done in {TIMEOUT} s"
            row = {"model": name, "shifts": shifts, "error": error} if error else json.loads(done.stdout)
            print(f"{name} {shifts}: {json.dumps(row)}", file=sys.stderr, flush=True)
            rows.append(row)
    return rows


BENCHMARK = Benchmark(
    name=Path(__file__).stem,
    question="How many of the channels that were killed at random does removal take out, and how long does it take?",
    run=run,
    columns=(
        Column("model", "model"),
        Column("shifts", "shifts"),
        Column("killed", "killed", ","),
        Column("removed", "removed", ","),
        Column("removed_of_removable", "of removable", ".1%"),
        Column("left_tied", "tied", ","),
        Column("left_padding", "padding", ","),
        Column("left_groups", "groups", ","),
        Column("left_pinned", "pinned", ","),
        Column("left_other", "other", ","),
        Column("unexplained", "unexplained", ","),
        Column("parameters_before", "parameters", ","),
        Column("parameters_after", "after", ","),
        Column("macs_before", "MACs", ","),
        Column("macs_after", "after", ","),
        Column("export_s", "export s", ".1f"),
        Column("shrink_s", "shrink s", ".1f"),
        Column("max_relative_error", "max rel. error", ".1e"),
        Column("error", "failed"),
    ),
    seeds=(SEED,),
    note=f"Random weights, {SHARE:.0%} of the output channels of every layer but the last killed at random, pictures "
    f"of {SIDE} x {SIDE}. Shifts: killed channels emit random constants, or zero. Removable is what was killed less "
    "what an operator of the graph forbids to remove (tied, padding, groups, pinned).",
)


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
