"""Draw the pictures of the pages: `python -m docs.pictures.draw`, or make pictures.

Two are schemes; the other two are drawn from what was measured: the arena of the LeNet-5 in tests/data, and the sizes
and accuracies in benchmarks/results/runs.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
INK, MUTED, ACCENT, SECOND, PALE = "#1b2733", "#5d6b7a", "#0b6e99", "#b5562a", "#e8eff3"
RUN = "mnist-lenet5"
"""The run whose files are shown: the published settings on MNIST."""


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def _box(axes: Any, x: float, y: float, width: float, *, title: str, text: str, colour: str = INK) -> None:  # noqa: ANN401
    axes.add_patch(FancyBboxPatch((x, y), width, 0.9, boxstyle="round,pad=0.02,rounding_size=0.08", fc=PALE, ec=colour))
    axes.text(x + width / 2, y + 0.6, title, ha="center", va="center", weight="bold", color=colour)
    axes.text(x + width / 2, y + 0.28, text, ha="center", va="center", color=MUTED, size=7.5)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:  # noqa: ANN401
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=MUTED, shrinkA=3, shrinkB=3))


def pipeline() -> Any:  # noqa: ANN401
    """From the trained network to the files that are checked."""
    figure, axes = _canvas(8.6, 2.7)
    steps = (
        ("train", "any nn.Module"),
        ("prune", "score, mask, retrain"),
        ("shrink", "dead channels go"),
        ("write", "dense packed csr\nint8 ort c"),
        ("validate", "ONNX Runtime, cc"),
    )
    for i, (title, text) in enumerate(steps):
        _box(axes, 0.1 + 1.72 * i, 1.5, 1.4, title=title, text=text, colour=ACCENT if title == "shrink" else INK)
        if i:
            _arrow(axes, (1.72 * i - 0.2, 1.95), (0.1 + 1.72 * i, 1.95))
    # The pruned network itself is the reference: what is validated is never compared with a file that we wrote.
    axes.add_patch(
        FancyArrowPatch(
            (2.5, 1.45), (7.6, 1.45), connectionstyle="arc3,rad=0.22", arrowstyle="-|>", mutation_scale=11, color=SECOND
        )
    )
    axes.text(5.05, 0.62, "the pruned network's outputs on the test set", ha="center", color=SECOND, size=8.5)
    axes.text(
        5.05, 0.2, "audit: flash, RAM and cost of every file  ·  report: one page", ha="center", color=MUTED, size=8.5
    )
    return figure


def packed() -> Any:  # noqa: ANN401
    """What a packed file stores, and what the runtime makes of it when the session is created."""
    figure, axes = _canvas(8.6, 2.5)
    row, stored = [0, 0, 3, 0, 0, 0, 7, 0, 1, 0, 0, 0, 0, 5], "in the file"
    gaps, values = [2, 3, 1, 4], [3, 7, 1, 5]
    for y, name, cells, colour in ((1.75, "gaps", gaps, ACCENT), (1.15, "values", values, SECOND)):
        axes.text(0.75, y + 0.2, name, ha="right", va="center", color=MUTED)
        for i, cell in enumerate(cells):
            axes.add_patch(Rectangle((0.9 + 0.42 * i, y), 0.4, 0.4, fc=PALE, ec=colour))
            axes.text(1.1 + 0.42 * i, y + 0.2, str(cell), ha="center", va="center", color=colour)
    axes.text(1.7, 2.3, stored, ha="center", color=INK, weight="bold")
    _arrow(axes, (2.65, 1.65), (4.0, 1.65))
    axes.text(3.32, 1.85, "CumSum, Scatter,\nReshape", ha="center", va="bottom", color=MUTED, size=7.5)
    axes.text(3.32, 1.45, "once, when the\nsession is created", ha="center", va="top", color=MUTED, size=7.5)
    axes.text(6.2, 2.3, "in memory: the dense tensor", ha="center", color=INK, weight="bold")
    for i, cell in enumerate(row):
        axes.add_patch(
            Rectangle((4.1 + 0.31 * i, 1.45), 0.3, 0.4, fc=PALE if cell else "white", ec=SECOND if cell else MUTED)
        )
        axes.text(4.25 + 0.31 * i, 1.65, str(cell), ha="center", va="center", color=SECOND if cell else MUTED, size=8)
    axes.text(
        4.3,
        0.5,
        "from then on it runs as the dense file does: same kernels, same time, same RAM",
        ha="center",
        color=MUTED,
    )
    return figure


def arena() -> Any:  # noqa: ANN401
    """Where each activation of the pruned LeNet-5 lies while the network runs, batch 1."""
    import torch  # noqa: PLC0415  only here

    from relief_export.capture import capture  # noqa: PLC0415
    from relief_export.graph.arena import plan_arena  # noqa: PLC0415
    from relief_export.graph.prepare import fold  # noqa: PLC0415
    from relief_export.graph.shrink import shrink  # noqa: PLC0415
    from tests.relieved import load  # noqa: PLC0415

    fixture = load(ROOT / "tests" / "data" / "mnist-lenet5.safetensors")
    with torch.no_grad():
        model = shrink(fold(capture(fixture.model, fixture.x[:2], masks=fixture.masks))).model
    plan = plan_arena(model)
    figure, axes = plt.subplots(figsize=(8.6, 3.2))
    for tensor in plan.tensors:
        width = tensor.last - tensor.first + 1
        axes.add_patch(Rectangle((tensor.first, tensor.offset), width, tensor.bytes, fc=PALE, ec=ACCENT))
        if tensor.bytes > plan.bytes / 12:
            axes.text(
                tensor.first + width / 2,
                tensor.offset + tensor.bytes / 2,
                tensor.name,
                ha="center",
                va="center",
                size=7,
            )
    nodes = [node.op_type for node in model.graph]
    axes.set_xlim(0, len(nodes))
    axes.set_ylim(0, plan.bytes * 1.05)
    axes.set_xticks([i + 0.5 for i in range(len(nodes))], nodes, rotation=40, ha="right", size=7)
    axes.axhline(plan.bytes, color=SECOND, lw=1)
    axes.text(len(nodes), plan.bytes, f"arena {plan.bytes:,} bytes", ha="right", va="bottom", color=SECOND, size=8)
    axes.set_ylabel("bytes")
    axes.set_title("LeNet-5 (tests/data), pruned and shrunk: activations in memory while it runs", size=9, color=INK)
    return figure


def sizes() -> Any:  # noqa: ANN401
    """Size against accuracy of every file of one run."""
    run = json.loads((ROOT / "benchmarks" / "results" / "runs" / f"{RUN}.json").read_text(encoding="utf-8"))
    figure, axes = plt.subplots(figsize=(8.6, 3.6))
    dense, exact = (100 * run["accuracy"][name]["test"] for name in ("dense", "relieved"))
    files = sorted(_files(run), key=lambda file: -file[1])
    lowest = min(accuracy for _, _, accuracy in files)
    # Two fifths of the height are for the names: a stair, the largest file's lowest, so that no name meets another's
    # line, however close the points lie.
    step = (dense - lowest) / (1.4 * len(files))
    for place, (name, size, accuracy) in enumerate(files):
        colour, top = ACCENT if accuracy >= exact - 1e-9 else SECOND, dense + step * (place + 0.8)
        axes.plot([size, size], [accuracy, top + 0.6 * step], color=colour, lw=0.6, alpha=0.6)
        axes.plot(size, accuracy, "o", color=colour)
        axes.text(size * 1.03, top, f"{name}, {size:,} bytes, {accuracy:.2f} %", size=7.5, color=INK)
    axes.axhline(dense, color=MUTED, lw=0.8, ls="--")
    # At the right, where there are no lines of files.
    axes.text(2.9e5, dense - 0.3 * step, f"before pruning, {dense:.2f} %", va="top", ha="right", color=MUTED, size=8)
    axes.set_xlim(2e3, 3e5)
    axes.set_xscale("log")
    axes.set_xticks(
        [2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5], ["2 kB", "5 kB", "10 kB", "20 kB", "50 kB", "100 kB", "200 kB"]
    )
    axes.minorticks_off()
    axes.set_ylim(lowest - 2 * step, dense + step * (len(files) + 1.5))
    # No file is above the network that it comes from, so the axis ends there.
    axes.set_yticks([tick for tick in axes.get_yticks() if lowest - 2 * step <= tick <= dense])
    axes.set_xlabel("bytes of the file")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{run['description']}: one pruned network, its files", size=9, color=INK)
    return figure


def _files(run: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Return (name, bytes, accuracy in per cent) of each file that was validated."""
    return [
        (each["name"], each["bytes"], 100 * each["accuracy"])
        for each in run["files"]
        if each.get("accuracy") is not None and each.get("bytes")
    ]


def main() -> None:
    """Draw all of them, with the same bytes for the same input."""
    mpl.use("svg")
    style = {"svg.hashsalt": "relief-export", "svg.fonttype": "none", "font.size": 9, "axes.edgecolor": MUTED}
    with mpl.rc_context(style):
        for draw in (pipeline, packed, arena, sizes):
            figure = draw()
            figure.savefig(
                HERE / f"{draw.__name__}.svg", metadata={"Date": None}, bbox_inches="tight", facecolor="white"
            )
            plt.close(figure)


if __name__ == "__main__":
    main()
