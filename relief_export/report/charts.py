"""Charts as inline SVG: deterministic, self-contained, following the page's light or dark colours.

Every chart is drawn at the width of a phone (``_WIDTH`` px) so that its letters stay readable there; wider screens set
charts side by side. Colours are drawn as the light theme's values and then replaced by the page's CSS variables, text
stays text, and identifiers are made unique, so that any number of charts can stand on one page.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from relief_export.printing import counted, percent
from relief_export.report.numbers import format_bytes, format_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from matplotlib.axes import Axes

GROUND = "#fbfbfa"
INK, MUTED, GRID = "#1c2126", "#5d6772", "#d9dee3"
ACCENT, SECOND, GOOD = "#2264a8", "#a85c0d", "#1d7a46"
_VARIABLES = {
    GROUND: "var(--ground)",
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--rule)",
    ACCENT: "var(--accent)",
    SECOND: "var(--second)",
    GOOD: "var(--good)",
}
_WIDTH = 380
_STYLE: dict[Any, Any] = {
    # Text stays text, and identifiers come from a fixed salt: the same run gives the same bytes.
    "svg.fonttype": "none",
    "svg.hashsalt": "relief-export",
    "text.parse_math": False,
    "font.size": 9.5,
    "font.sans-serif": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
_MOST_ROWS = 24
"""Rows of a chart beyond which it would be taller than a screen; the table beside it has them all."""


def _draw(alternative: str, height: float, plot: Callable[[Axes], None]) -> Markup:
    """Draw one chart, ``height`` px tall; ``alternative`` is what it says in words."""
    with mpl.rc_context(_STYLE):
        # Not pyplot, which keeps every figure in a list of its own and may look for a display.
        figure = Figure(figsize=(_WIDTH / 72, height / 72), layout="constrained")
        plot(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), alternative)


def _inline(svg: str, alternative: str) -> Markup:
    """Turn a stand-alone SVG file into an element of the page, its identifiers its own."""
    # From the content, so that a chart's identifiers do not depend on where it stands.
    key = f"c{hashlib.sha256(svg.encode()).hexdigest()[:8]}"
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{key}-", svg).replace("xlink:href", "href")
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    viewbox = re.search(r'viewBox="[^"]+"', svg)
    assert viewbox is not None  # noqa: S101 - Matplotlib always writes one
    body = re.sub(r"\n\s*", "\n", svg[svg.index(">") + 1 :])
    return _element(viewbox[0], alternative, body)


def _element(viewbox: str, alternative: str, body: str, kind: str = "chart") -> Markup:
    label = escape(alternative)
    opening = f'<svg class="{kind}" {viewbox} role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg">'
    return Markup(f"{opening}<title>{label}</title>{body}")  # noqa: S704 - every text in it is escaped


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a horizontal chart, the first on top."""
    axes.set_yticks(range(len(names)), [name if len(name) <= 24 else f"…{name[-23:]}" for name in names])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def _log_axis(axes: Axes, values: Sequence[float], show: Callable[[float], str], headroom: float = 0.0) -> None:
    """Make x logarithmic with at least two labelled ticks; ``headroom`` is free space at the right, in decades."""
    low, high = math.log10(min(values)) - 0.12, math.log10(max(values)) + 0.12
    high = max(high, low + 0.8) + headroom
    step = max(1, math.ceil((high - low) / 5))
    ticks = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1, step)]
    # Fewer than three powers of ten say little about a scale.
    if len(ticks) < 3:
        ticks = [m * 10.0**p for p in range(math.floor(low), math.ceil(high)) for m in (1, 2, 5)]
    axes.set_xscale("log")
    axes.set_xlim(10**low, 10**high)
    axes.set_xticks([tick for tick in ticks if low <= math.log10(tick) <= high])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: re.sub(r"\.0+(?!\d)", "", show(value))))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_tick_params(which="minor", bottom=False)


def rounds_chart(
    *,
    density: Sequence[float],
    accuracy: Sequence[float],
    dense: float | None,
    floor: float | None,
    chosen: int | None,
) -> Markup:
    """Accuracy against density, both fractions, one point a pruning round.

    ``floor`` is the lowest accuracy that the recipe accepts, ``chosen`` the index of the round that was chosen.
    """

    def plot(axes: Axes) -> None:
        if dense is not None:
            axes.axhline(dense, color=MUTED, linewidth=1, linestyle="--", label="original")
        if floor is not None:
            axes.axhline(floor, color=SECOND, linewidth=1, linestyle=":", label="lowest accepted")
        axes.plot(density, accuracy, color=ACCENT, marker="o", markersize=4, linewidth=1.5, label="after retraining")
        if chosen is not None:
            at = density[chosen], accuracy[chosen]
            axes.plot(*at, "o", markersize=10, mfc="none", mec=GOOD, mew=2, label="chosen")
        _log_axis(axes, [*density, 1.0], lambda value: f"{100 * value:g} %")
        axes.invert_xaxis()
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        axes.set_xlabel("density: weights that are left (log scale)")
        axes.set_ylabel("validation accuracy")
        axes.figure.legend(loc="outside lower center", ncols=2)  # outside, where it covers no point

    last = len(density) - 1 if chosen is None else chosen
    words = (
        f"Accuracy through {counted(len(density), 'pruning round')}: from {percent(accuracy[0])} at a density of "
        f"{percent(density[0])} to"
    )
    return _draw(f"{words} {percent(accuracy[last])} at {percent(density[last])}.", 300, plot)


def bytes_chart(sizes: Sequence[tuple[str, int]], marks: Sequence[tuple[str, int]]) -> Markup:
    """Bytes of each file as points on a logarithmic axis; ``marks`` are reference sizes drawn as vertical lines."""

    def plot(axes: Axes) -> None:
        values = [size for _, size in sizes]
        for (label, size), style in zip(marks, ("--", "-", ":"), strict=False):
            axes.axvline(size, color=SECOND, linewidth=1.2, linestyle=style, label=f"{label}, {format_bytes(size)}")
        axes.hlines(range(len(values)), 1, values, color=GRID, linewidth=2)  # from 1 byte: the left edge
        axes.plot(values, range(len(values)), "o", color=ACCENT, markersize=7)
        for row, size in enumerate(values):
            label = format_bytes(size)
            # On a ground of its own: the reference lines stop at a label instead of striking it through.
            behind = {"boxstyle": "square,pad=0.2", "facecolor": GROUND, "edgecolor": "none"}
            axes.annotate(
                label, (size, row), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9, bbox=behind
            )
        _rows(axes, [name for name, _ in sizes])
        _log_axis(axes, [*values, *(size for _, size in marks)], format_bytes, headroom=0.45)
        if marks:
            axes.figure.legend(loc="outside upper right", ncols=1)

    words = "; ".join(f"{name} {format_bytes(size)}" for name, size in [*sizes, *marks])
    return _draw(f"Bytes by file: {words}.", 70 + 24 * len(sizes) + 14 * len(marks), plot)


def layers_chart(layers: Sequence[tuple[str, int, int, int]]) -> Markup:
    """Parameters of each layer: dense, structural and non-zero, on a logarithmic axis; the largest layers only."""
    largest = sorted(layers, key=lambda layer: -layer[1])[:_MOST_ROWS]
    shown = [layer for layer in layers if layer in largest][:_MOST_ROWS]

    def plot(axes: Axes) -> None:
        rows = range(len(shown))
        kinds = (("dense", MUTED, "o"), ("structural", ACCENT, "D"), ("non-zero", GOOD, "o"))
        # A logarithmic axis has no place for 0.
        columns = [[max(counts[kind], 1) for _, *counts in shown] for kind in range(3)]
        axes.hlines(rows, columns[2], columns[0], color=GRID, linewidth=2)
        for values, (label, colour, marker) in zip(columns, kinds, strict=True):
            axes.plot(values, rows, marker, color=colour, markersize=6, label=label)
        _rows(axes, [name for name, *_ in shown])
        _log_axis(axes, [value for column in columns for value in column], format_count)
        axes.set_xlabel("parameters (log scale)")
        axes.figure.legend(loc="outside upper right", ncols=3)

    words = "; ".join(f"{name} {dense:,} to {left:,} to {nonzero:,}" for name, dense, left, nonzero in shown)
    return _draw(f"Parameters by layer, dense to structural to non-zero: {words}.", 84 + 20 * len(shown), plot)


def latency_chart(rows: Sequence[tuple[str, float, float, float]]) -> Markup:
    """Median time of one inference with its quartiles (name, lower, median, upper), in milliseconds."""

    def plot(axes: Axes) -> None:
        at = range(len(rows))
        axes.hlines(at, [row[1] for row in rows], [row[3] for row in rows], color=ACCENT, linewidth=4, alpha=0.4)
        axes.plot([row[2] for row in rows], at, "o", color=ACCENT, markersize=6)
        _rows(axes, [row[0] for row in rows])
        axes.set_xlim(0, 1.08 * max(row[3] for row in rows))
        axes.set_xlabel("milliseconds: median and quartiles")

    words = "; ".join(f"{name} {median:.3g} ms ({lower:.3g} to {upper:.3g})" for name, lower, median, upper in rows)
    return _draw(f"Latency, median and quartiles: {words}.", 60 + 24 * len(rows), plot)


def pareto_chart(runs: Sequence[tuple[str, Sequence[tuple[str, int, float]]]]) -> Markup:
    """Test accuracy against bytes: one colour and marker a run, (format, bytes, accuracy) each, and the frontier."""
    points = [(size, accuracy) for _, files in runs for _, size, accuracy in files]
    best = frontier(points)

    def plot(axes: Axes) -> None:
        reach = [*best, (max(size for size, _ in points), best[-1][1])]
        axes.step([size for size, _ in reach], [top for _, top in reach], where="post", color=GRID, linewidth=2.5)
        for row, (name, files) in enumerate(runs):
            style: dict[str, Any] = {
                "color": (ACCENT, SECOND, GOOD, MUTED)[row % 4],
                "marker": "osD^vP*X"[row // 4 % 8],
            }
            axes.plot([f[1] for f in files], [f[2] for f in files], linestyle="", markersize=7, label=name, **style)
        _log_axis(axes, [size for size, _ in points], format_bytes)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        axes.set_xlabel("bytes of the file (log scale)")
        axes.set_ylabel("test accuracy")
        axes.figure.legend(loc="outside lower center", ncols=2)

    words = "; ".join(
        f"{name}: {', '.join(f'{f} {format_bytes(b)} {percent(a)}' for f, b, a in fs)}" for name, fs in runs
    )
    return _draw(f"Test accuracy against bytes. {words}.", 260 + 16 * math.ceil(len(runs) / 2), plot)


def frontier(points: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the (bytes, accuracy) points that no other one beats in one without losing in the other, by bytes."""
    best: list[tuple[int, float]] = []
    # The most accurate of one size comes first, so that the others of that size are not on the frontier.
    for size, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((size, accuracy))
    return best


def pixels_chart(uses: Sequence[Sequence[int]]) -> Markup:
    """Draw how many weights still read each input pixel: the fuller a square, the more; an empty one is unused."""
    height, width, most = len(uses), len(uses[0]), max(1, *(max(row) for row in uses))
    levels: dict[int, list[str]] = {}
    for y, row in enumerate(uses):
        for x, count in enumerate(row):
            if count:
                levels.setdefault(math.ceil(4 * count / most), []).append(f"M{x} {y}h1v1h-1z")
    used = sum(count > 0 for row in uses for count in row)
    paths = "".join(
        f'<path d="{"".join(squares)}" fill="var(--accent)" opacity="{level / 4:g}"/>'
        for level, squares in sorted(levels.items())
    )
    frame = f'<rect width="{width}" height="{height}" fill="var(--panel)"/>'
    words = f"{used} of {height * width} input pixels are still used; the fuller a square, the more weights read it."
    return _element(f'viewBox="0 0 {width} {height}"', words, f"{frame}{paths}</svg>", "pixels")
