"""How numbers are written: in one place, so that a figure reads the same in a table, a chart and the verdict."""

from __future__ import annotations

NONE = "–"
"""Written for a missing value."""


def format_bytes(size: float) -> str:
    """Write a number of bytes with three significant digits: 1.72 MB, 8.5 kB, 312 B (decimal prefixes)."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        # From here on three digits would round up to 1000 of the smaller unit.
        if size >= 0.9995 * factor:
            return f"{_three(size / factor)} {unit}"
    return f"{size:.0f} B"


def format_count(count: float) -> str:
    """Write a count shortly, for axes: 431k, 2.29M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * factor:
            return f"{_three(count / factor)}{unit}"
    return f"{count:.0f}"


def format_percent(fraction: float) -> str:
    """Write a fraction as a percentage with two decimals, or with two significant digits where that says more."""
    percent = 100 * fraction
    return f"{percent:.2g} %" if 0 < percent < 0.1 else f"{percent:.2f} %"


def percent(fraction: float | None) -> str:
    """Write a fraction that may be unknown."""
    return NONE if fraction is None else format_percent(fraction)


def format_points(after: float | None, before: float | None) -> str:
    """Write the change of an accuracy in percentage points, with its sign; a dash where one of them is unknown."""
    return NONE if after is None or before is None else f"{100 * (after - before):+.2f}".replace("-", "−")


def format_ratio(whole: float, part: float) -> str:
    """Write how many times smaller ``part`` is than ``whole``: 43×, 4.3×; a dash where ``part`` is 0."""
    return f"{_three(whole / part)}×" if part else NONE


def format_seconds(seconds: float) -> str:
    """Write a wall time: 850 ms, 12.3 s, 4 min 05 s, 2 h 10 min."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{_three(seconds)} s"
    # Rounded first, so that no time reads "4 min 60 s".
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_milliseconds(seconds: float) -> str:
    """Write a latency in milliseconds with three significant digits."""
    return f"{_three(1000 * seconds)} ms"


def _three(value: float) -> str:
    """Write three significant digits without exponent: 0.123, 1.23, 12.3, 123, 1234."""
    # From here on the three digits stand before the point, where %g would leave one behind them.
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:#.3g}"
