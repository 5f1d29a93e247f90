"""What the C generators compile: a network at batch 1 as a list of steps over maps, without any layout.

A *map* is an array ``(channels, height, width)`` of float32 that one step writes and later steps read; a vector has
height and width 1. Every element of every map has a number of its own: map ``m`` owns ``m.size`` of them from
``m.start``, in the order channel, row, column. A *view* is an int64 array of such numbers, in any shape, with ``ZERO``
where the element is the number 0. So whatever only moves elements (Reshape, Transpose, Slice, Concat, Gather, Pad,
channel shuffle) is an operation of NumPy on the view and never becomes code; a step states what it reads as a view, and
a back end that has placed the maps finds the address of each element.

Steps run in the order of ``Plan.steps``. A step computes its numbers and then applies its ``chain`` of elementwise
operations to each of them before it writes the map: activations, per-channel factors, residual additions.

How a back end uses it: ``lower`` (lower.py) makes the plan; for each step dispatch on its class; ``Plan.planes`` says
which channels of which maps a view of shape (C, H, W) consists of, ``Plan.locate`` where single elements lie, and
``Plan.lifetimes`` from which step to which a map is needed. Everything is deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterator

View: TypeAlias = NDArray[np.int64]
"""Numbers of elements, in any shape; ``ZERO`` stands for the number 0."""
Floats: TypeAlias = NDArray[np.float32]

ZERO = -1


@dataclass(frozen=True, eq=False)
class Map:
    """An array ``(channels, height, width)`` of float32 between two steps.

    Attributes:
        name: Of the ONNX value that it holds when its step is done; for comments.
        start: Number of its first element.
    """

    name: str
    channels: int
    height: int
    width: int
    start: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (channels, height, width)."""
        return self.channels, self.height, self.width

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return self.channels * self.height * self.width

    @property
    def view(self) -> View:
        """Return the numbers of all its elements, shape (channels, height, width)."""
        return np.arange(self.start, self.start + self.size, dtype=np.int64).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Op:
    """One elementwise operation of a chain: ``v`` becomes ``kind(v)``.

    Attributes:
        kind: ``Affine`` (v·scale + shift, one number a channel each); ``Add``, ``Sub``, ``Mul``, ``Div``, ``Max``,
            ``Min`` with ``operand``; ``Gate`` (v times the chain ``inner`` of v; the square where that is empty);
            ``PRelu`` (``scale`` is the slope of negative numbers); or an activation of ONNX by its name.
        constants: The activation's numbers in the order of ``lower.ACTIVATIONS``; ``Clip`` has (low, high).
        scale: (C,) float32. shift: (C,) float32.
        operand: View that Add and the like combine with: (C, 1, 1) for one element a channel, or (C, H, W), which
            ``Plan.planes`` takes with ``dx`` 1.
        swapped: ``operand - v`` and ``operand / v`` instead of ``v - operand`` and ``v / operand``.
        inner: Of a ``Gate``; only activations and Affine.
    """

    kind: str
    constants: tuple[float, ...] = ()
    scale: Floats | None = None
    shift: Floats | None = None
    operand: View | None = None
    swapped: bool = False
    inner: tuple[Op, ...] = ()


@dataclass(eq=False)
class Step:
    """What all steps have.

    Attributes:
        name: Of the ONNX node, for comments. out: The map that it writes. chain: Applied to each number, in order.
    """

    name: str
    out: Map
    chain: list[Op] = field(default_factory=list, kw_only=True)

    def views(self) -> Iterator[View]:
        """Yield every view that the step reads."""
        source: View | None = getattr(self, "source", None)
        if source is not None:
            yield source
        yield from (op.operand for op in self.chain if op.operand is not None)


@dataclass(eq=False)
class Pool(Step):
    """Greatest or mean element of windows; ``source`` is made of whole planes.

    Attributes:
        kind: ``max``, ``mean`` (of the elements inside the map) or ``mean-padded`` (padding counts as zeros).
        source: (C, H, W). kernel, strides, dilations: (y, x). pads: (top, left, bottom, right).
    """

    kind: str
    source: View
    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]


@dataclass(eq=False)
class Convolution(Step):
    """Cross-correlation with zero padding; ``source`` is made of whole planes.

    Attributes:
        source: (I, H, W). weight: (O, I / groups, kh, kw). bias: (O,).
        strides, dilations: (y, x). pads: (top, left, bottom, right).
        pool: A 2 x 2 max-pool of stride 2 that follows at once, after ``chain``; ``out`` is then the pool's.
    """

    source: View
    weight: Floats
    bias: Floats
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    groups: int
    pool: bool = False

    @property
    def extent(self) -> tuple[int, int]:
        """Return height and width of what the convolution computes, before any pooling."""
        sizes, kernel = self.source.shape[1:], self.weight.shape[2:]
        before, after = self.pads[:2], self.pads[2:]
        y, x = (
            (size + a + b - dilation * (k - 1) - 1) // stride + 1
            for size, k, a, b, stride, dilation in zip(
                sizes, kernel, before, after, self.strides, self.dilations, strict=True
            )
        )
        return y, x

    def kernels(self) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
        """Return the n kernels that are not all zero, by output channel and then by input channel.

        Returns:
            Output channels (n,), input channels (n,) and weights (n, kh, kw); none on channels of zeros.
        """
        # A channel that is padding or a gap of zeros adds nothing, whatever its kernel holds.
        alive = (self.source >= 0).any(axis=(1, 2))
        inputs, outputs = self.weight.shape[1], self.weight.shape[0] // self.groups
        first = np.arange(len(self.weight)) // outputs * inputs
        reads = first[:, None] + np.arange(inputs)
        o, i = np.nonzero(self.weight.any(axis=(2, 3)) & np.asarray(alive)[reads])
        return o, reads[o, i], self.weight[o, i]


@dataclass(eq=False)
class Linear(Step):
    """``weight @ source + bias``; a convolution with one output position is one too.

    Attributes:
        source: (N,) any elements. weight: (O, N). bias: (O,). ``out`` has shape (O, 1, 1).
    """

    source: View
    weight: Floats
    bias: Floats


@dataclass(eq=False)
class Reduce(Step):
    """``mean``, ``sum`` or ``max`` over each plane of ``source`` (C, H, W); ``out`` has shape (C, 1, 1)."""

    kind: str
    source: View


@dataclass(eq=False)
class Softmax(Step):
    """Softmax (or its logarithm) over the last axis of ``source`` (rows, 1, n); ``out`` has the same shape."""

    source: View
    logarithm: bool


@dataclass(eq=False)
class Move(Step):
    """Copies the elements ``source``, in the shape of ``out``, and applies the chain: what nothing else took over."""

    source: View


@dataclass(eq=False)
class Constant(Step):
    """A map that is known beforehand; ``values`` has its shape."""

    values: Floats


@dataclass(frozen=True)
class Planes:
    """A view (C, H, W) as channels of maps: element (c, y, x) is ``map[c][channel[c], top + dy·y, left + dx·x]``.

    Attributes:
        maps: Index into ``Plan.maps`` for each channel, -1 for a channel of zeros.
        channels: (C,) int64, the channel in that map.
    """

    maps: NDArray[np.int64]
    channels: NDArray[np.int64]
    top: int = 0
    left: int = 0
    dy: int = 1
    dx: int = 1

    @property
    def whole(self) -> bool:
        """Whether each channel is a plane as it stands."""
        return (self.top, self.left, self.dy, self.dx) == (0, 0, 1, 1)


@dataclass
class Plan:
    """A network at batch 1.

    Attributes:
        input_name, output_name: Of the ONNX values. input_shape, output_shape: With the batch axis, 1, in front.
        maps: The input's first, then in the order of the steps. output: Elements of the output, flat.
    """

    input_name: str
    output_name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    maps: list[Map]
    steps: list[Step]
    output: View

    def locate(self, view: View) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return for each element of a view the index of its map, -1 for a zero, and its place in that map."""
        # Maps are numbered in the order in which they were made, so their starts ascend, as searchsorted needs.
        starts = np.array([m.start for m in self.maps])
        which = np.searchsorted(starts, view, side="right") - 1
        return which, np.where(which >= 0, view - starts[which], 0)

    def index(self, target: Map) -> int:
        """Return the index of a map."""
        return next(k for k, m in enumerate(self.maps) if m is target)

    def sources(self, view: View) -> list[int]:
        """Return the maps that a view reads, by index, ascending."""
        return [int(k) for k in np.unique(self.locate(view)[0]) if k >= 0]

    def planes(self, view: View) -> Planes | None:
        """Return a view (C, H, W) as channels of maps; None where it is no regular part of planes."""
        height, width = view.shape[1:]
        which, inside = self.locate(view[:, 0, 0])
        zero = (view == ZERO).all(axis=(1, 2))
        # Below, the first element stands for its channel: one that is zero there alone would pass for one of zeros.
        if not np.array_equal(zero, which < 0):
            return None
        used = sorted({int(k) for k in which if k >= 0})
        sizes = {(self.maps[k].height, self.maps[k].width) for k in used}
        if not used:
            return Planes(which, inside)
        if len(sizes) != 1:
            return None
        ((map_height, map_width),) = sizes
        channel, place = np.divmod(inside, map_height * map_width)
        first = int(np.flatnonzero(~zero)[0])
        # Read off the first channel that is there; all others are then held against the same grid.
        top, left = divmod(int(place[first]), map_width)
        below = int(view[first, 1, 0] - view[first, 0, 0]) if height > 1 else map_width
        dx = int(view[first, 0, 1] - view[first, 0, 0]) if width > 1 else 1
        dy, rest = divmod(below, map_width)
        if rest or dy < 1 or dx < 1 or left + dx * (width - 1) >= map_width or top + dy * (height - 1) >= map_height:
            return None
        grid = dy * map_width * np.arange(height)[:, None] + dx * np.arange(width)
        expected = view[:, :1, :1] + grid
        regular = (place[~zero] == place[first]).all() and np.array_equal(view[~zero], expected[~zero])
        if not regular:
            return None
        return Planes(which, channel, top, left, dy, dx)

    def lifetimes(self) -> dict[int, tuple[int, int]]:
        """Return for each map, by index, the step that writes it (-1: the input) and the last step that reads it.

        What the output consists of is needed after the last step: ``len(steps)``.
        """
        spans: dict[int, list[int]] = {0: [-1, -1]}
        numbers = {id(m): k for k, m in enumerate(self.maps)}
        for index, step in enumerate(self.steps):
            for view in step.views():
                for k in self.sources(view):
                    spans[k][1] = index
            spans[numbers[id(step.out)]] = [index, index]
        for k in self.sources(self.output):
            spans[k][1] = len(self.steps)
        return {k: (first, last) for k, (first, last) in spans.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return a summary as plain data: one row a step."""
        return {
            "input": list(self.input_shape),
            "output": list(self.output_shape),
            "steps": [{"kind": type(s).__name__, "name": s.name, "out": list(s.out.shape)} for s in self.steps],
        }
