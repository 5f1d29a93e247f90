"""The connections of a layer as a microcontroller's flash holds them: which, where, and in which code their values.

::

    counts   connections (whole kernels for most convolutions) of each output, one byte where that is enough
    gaps     from each connection to the next, one byte; 255 skips on and another byte follows
    values   of the connections in order, in one of four codes

Single connections of a codebook take one byte for both: the gap in its lower half, the value's number in its upper.
Which form a layer has is what takes the fewest bytes. Nothing here knows any C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from relief_export.cgen.plan import Convolution, Linear
from relief_export.codebooks import codebook, nearest

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from relief_export.cgen.plan import Plan

Code: TypeAlias = Literal["f32", "int8", "codebook16", "q8"]
CODES: dict[Code, str] = {
    "f32": "float weights and arithmetic",
    "int8": "weights of 8 bits with a scale an output channel, float arithmetic",
    "codebook16": "weights of 4 bits that choose among sixteen values a layer, float arithmetic",
    "q8": "integers of 8 bits throughout",
}
"""Value codes, and what generated files say of them."""
Form: TypeAlias = Literal["dense", "kernels", "elements", "pairs"]
"""Every weight; whole kernels; single weights; single weights of a codebook with gap and value in one byte."""

_VALUE_BYTES = {"f32": 4.0, "int8": 1.0, "codebook16": 0.5, "q8": 1.0}
_FUNCTION = 250
"""About how many bytes a function for one more form of a convolution takes."""


@dataclass(frozen=True)
class Connections:
    """The connections of a layer.

    Attributes:
        form: Of the tables.
        rows: For each output the places (n,), ascending from 0, and the values (n, values a place).
        code: Of the values.
    """

    form: Form
    rows: list[tuple[NDArray[np.int64], NDArray[Any]]]
    code: Code

    @property
    def counts(self) -> NDArray[Any]:
        """Return how many each output has, (O,) uint8, or uint16 where one has more than 255."""
        counts = np.array([len(at) for at, _ in self.rows])
        return counts.astype(np.uint8 if counts.max(initial=0) < 256 else np.uint16)

    @property
    def gaps(self) -> NDArray[np.uint8]:
        """Return the gaps of all outputs."""
        return np.array([gap for at, _ in self.rows for gap in _gaps(at)], np.uint8)

    @property
    def connections(self) -> int:
        """Return how many weights are not zero."""
        return sum(int(np.count_nonzero(values)) for _, values in self.rows)

    @property
    def stored(self) -> int:
        """Return how many weights are stored, zeros within kernels too: the multiply-adds of one position."""
        return sum(values.size for _, values in self.rows)

    @property
    def position_bytes(self) -> int:
        """Return the bytes of counts and gaps."""
        if self.form == "dense":
            return 0
        # In pairs the gaps lie beside the values.
        gaps = 0 if self.form == "pairs" else sum(_gap_bytes(at) for at, _ in self.rows)
        return self.counts.nbytes + gaps

    def values(self, weight: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """Return the values as bytes, and the numbers that decode them, if any: int8's scales, a codebook's centres.

        ``weight`` is the layer's, of the plan that ``coded`` returned.
        """
        flat = np.concatenate([values.ravel() for _, values in self.rows]) if self.rows else np.zeros(0)
        if self.code == "f32":
            return flat.astype(np.float32), None
        if self.code == "q8":
            return flat.astype(np.int8), None
        if self.code == "int8":
            scales = int8_scales(weight)
            # coded() made these whole multiples of the scale: rounding only undoes the error of the division.
            steps = np.rint(flat / np.repeat(scales, [values.size for _, values in self.rows]))
            return steps.astype(np.int8), scales
        # The centres need not be passed on: after coded() they are the values that occur.
        centres = np.unique(flat)
        assert len(centres) <= 16  # noqa: S101  # coded() has seen to it
        numbers = nearest(flat, centres)
        packed = self._paired(numbers) if self.form == "pairs" else _nibbles(numbers)
        return packed, centres.astype(np.float32)

    def _paired(self, numbers: NDArray[Any]) -> NDArray[np.uint8]:
        """Return gaps and numbers of values in one byte each."""
        pairs = np.array([step for at, _ in self.rows for step in _steps(at)], np.uint8)
        pairs[pairs & 15 != 15] |= (numbers << 4).astype(np.uint8)
        return pairs


def of_linear(weight: NDArray[Any], places: NDArray[np.int64], code: Code, *, dense: bool) -> Connections:
    """Return the connections of a matrix.

    Args:
        weight: (O, N).
        places: (N,) where each input lies, from the first; -1 for a zero.
        code: Of the values.
        dense: Store every weight where that can be.
    """
    kept = places >= 0
    rows = []
    for row in weight:
        chosen = np.flatnonzero(kept & (row != 0))
        # Gaps are unsigned, so the places of a row must ascend; what the layer reads may be in any order.
        order = chosen[np.argsort(places[chosen], kind="stable")]
        rows.append((places[order], row[order][:, None]))
    forms = _element_bytes(rows, code)
    contiguous = np.array_equal(places, np.arange(len(places)))
    if contiguous:
        forms["dense"] = weight.size * _VALUE_BYTES[code]
    form = "dense" if dense and contiguous else min(forms, key=lambda name: (forms[name], name != "dense"))
    if form == "dense":
        rows = [(np.arange(len(row)), row[:, None]) for row in weight]
    return Connections(form, rows, code)


def of_convolution(  # noqa: PLR0917  # what both kinds of tables are made of
    step: Convolution, weight: NDArray[Any], channels: NDArray[np.int64], pitch: int, plane: int, code: Code, *,
    dense: bool, shared: bool,
) -> Connections:  # fmt: skip
    """Return the connections of a convolution.

    Args:
        step: The convolution.
        weight: (O, I / groups, kh, kw), as it is computed with.
        channels: (I,) which planes it reads.
        pitch: From one row of them to the next.
        plane: From one of them to the next.
        code: Of the values.
        dense: Store every weight where that can be.
        shared: Another convolution has a function that takes whole kernels, and it would do for this one.
    """
    groups, (per_group, *kernel) = step.groups, weight.shape[1:]
    members = len(weight) // groups
    area = math.prod(kernel)
    value = _VALUE_BYTES[code]
    # Both forms are built in full, for their bytes depend on the gaps and not only on how many there are.
    kernels, elements = [], []
    window = np.add.outer(
        np.arange(kernel[0]) * step.dilations[0] * pitch, np.arange(kernel[1]) * step.dilations[1]
    )  # fmt: skip
    for o, row in enumerate(weight):
        group = o // members
        places = channels[group * per_group : (group + 1) * per_group]
        start = int(channels[group * per_group]) if groups > 1 else 0
        # Channels may come in any order, but gaps cannot go back: kernels are sorted by where they read.
        kept = np.flatnonzero(row.any(axis=(1, 2)) | dense)
        order = kept[np.argsort(places[kept], kind="stable")]
        kernels.append((places[order] - start, row[order].reshape(len(order), area)))
        at = (places[:, None, None] * plane + window).ravel()
        chosen = np.flatnonzero(row.ravel())
        chosen = chosen[np.argsort(at[chosen], kind="stable")]
        elements.append((at[chosen], row.ravel()[chosen][:, None]))
    # A group's start is computed from its number, which takes channels in their own order.
    regular = groups == 1 or all(
        np.array_equal(channels[g * per_group : (g + 1) * per_group], g * per_group + np.arange(per_group))
        for g in range(groups)
    )
    forms = _element_bytes(elements, code)
    if regular:
        forms["kernels"] = sum(_gap_bytes(at) + len(at) * area * value for at, _ in kernels)
        if np.array_equal(channels, np.arange(len(channels))):
            forms["dense"] = weight.size * value
    # Single elements would leave zeros out, which a program without masks does not do.
    if dense and "kernels" in forms:
        forms = {name: size for name, size in forms.items() if name in {"kernels", "dense"}}
    # Gaps of single elements cost time too: they must save a third.
    dear: dict[Form, float] = {"elements": 1.5, "pairs": 1.5}
    form = min(forms, key=lambda name: (forms[name] * dear.get(name, 1), name != "dense"))
    # To share a function of kernels takes less than a dense one of its own, where the gaps are few.
    if form == "dense" and shared and sum(_gap_bytes(at) + 1 for at, _ in kernels) < _FUNCTION:
        form = "kernels"
    if form == "dense":
        return Connections(form, [(np.arange(per_group), row.reshape(per_group, area)) for row in weight], code)
    return Connections(form, kernels if form == "kernels" else elements, code)


def _element_bytes(rows: list[tuple[NDArray[np.int64], NDArray[Any]]], code: Code) -> dict[Form, float]:
    """Return what single connections take, by the forms of their tables."""
    forms: dict[Form, float] = {"elements": sum(_gap_bytes(at) + len(at) * _VALUE_BYTES[code] for at, _ in rows)}
    if code == "codebook16":
        forms["pairs"] = sum(len(_steps(at)) for at, _ in rows)
    return forms


def _gaps(places: NDArray[np.int64]) -> list[int]:
    """Return the gaps between ascending places, the first from 0; 255 skips on and another byte follows."""
    found: list[int] = []
    for gap in np.diff(places, prepend=0).tolist():
        # A gap of exactly 255 becomes 255 and 0: a byte of 255 always announces another.
        skips, rest = divmod(gap, 255)
        found += [255] * skips + [rest]
    return found


def _gap_bytes(places: NDArray[np.int64]) -> int:
    return int((np.diff(places, prepend=0) // 255 + 1).sum())


def _steps(places: NDArray[np.int64]) -> list[int]:
    """Return the gaps between ascending places in 4 bits each, as bytes with room for a value in the upper half.

    15 in the lower half skips 15 times one more than the upper half says, and another byte follows.
    """
    found: list[int] = []
    for gap in np.diff(places, prepend=0).tolist():
        skips, rest = divmod(gap, 15)
        while skips:
            found.append(15 | min(skips - 1, 15) << 4)
            skips -= min(skips, 16)
        found.append(rest)
    return found


def _nibbles(numbers: NDArray[Any]) -> NDArray[np.uint8]:
    """Return numbers two to a byte, the first in the low half; an odd last one gets a partner that nothing reads."""
    pairs = np.pad(numbers, (0, len(numbers) % 2)).reshape(-1, 2)
    packed: NDArray[np.uint8] = (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8)
    return packed


# Codes of weights -----------------------------------------------------------------------------------------------------


def int8_scales(weight: NDArray[Any]) -> NDArray[np.float32]:
    """Return one scale an output channel: the largest weight becomes 127."""
    largest = np.abs(weight.reshape(len(weight), -1)).max(axis=1, initial=0).astype(np.float32)
    # A row of zeros takes any scale; 1 avoids a division by zero.
    return np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)


def coded(plan: Plan, code: Code) -> Plan:
    """Return a plan whose weights are the numbers that a code stores; zeros stay zeros, nothing else becomes one."""
    if code in {"f32", "q8"}:
        return plan
    steps = [
        replace(step, weight=_CODERS[code](step.weight)) if isinstance(step, Convolution | Linear) else step
        for step in plan.steps
    ]
    return replace(plan, steps=steps)


def _int8(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    scale = int8_scales(weight).reshape(-1, *[1] * (weight.ndim - 1))
    steps = np.rint(weight / scale)
    # A connection that was kept stays one, however small its weight is.
    steps = np.where((steps == 0) & (weight != 0), np.sign(weight), steps)
    return (steps * scale).astype(np.float32)


def _codebook16(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    kept = weight[weight != 0]
    if not kept.size:
        return weight
    # One of the sixteen is zero, for the zeros within kernels that are kept.
    centres = codebook(kept, 15)
    found = np.zeros_like(weight)
    found[weight != 0] = centres[nearest(kept, centres)]
    return found


_CODERS: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {"int8": _int8, "codebook16": _codebook16}
