"""The memory of a program for microcontrollers: which maps there are, where they lie, and what runs in stripes.

``regular`` lets each step read from one map, by copies where it must; ``McuMemory`` then places the maps in the
arena.

A convolution that comes first and whose output the next one reads is run in stripes of rows, where that makes the
arena smaller: what is needed of its output for one row of the next, sliding down.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from relief_export.cgen.memory import Layout, Memory
from relief_export.cgen.plan import Convolution, Linear, Map, Move, Plan, Pool, Reduce, Softmax, Step, View
from relief_export.errors import UnsupportedModelError
from relief_export.graph.arena import ArenaTensor, arena_bytes, place_best

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from relief_export.cgen.quantised import Quantisation


def regular(plan: Plan, integers: Quantisation | None, *, dense: bool) -> Plan:
    """Return a plan that copies, by steps of their own, what a step reads that does not lie in one map as it needs it.

    Args:
        plan: It is not changed.
        integers: Of a ``q8`` plan; those of the copies are added.
        dense: The program stores every weight.

    Raises:
        UnsupportedModelError: A copy would put together integers that mean different numbers.
    """
    # Copies of the lists: steps and maps are added below, and the caller's plan stays as it is.
    plan = replace(plan, maps=list(plan.maps), steps=list(plan.steps))
    made: list[Step] = []

    def copied(view: View, name: str) -> View:
        last = plan.maps[-1]
        channels, height, width = view.shape
        target = Map(f"operand of {name}", channels, height, width, last.start + last.size)
        plan.maps.append(target)
        made.append(Move(target.name, target, view))
        if integers:
            # A copy moves integers as they are, so all its sources must mean the same by them.
            scales = {integers.maps[plan.maps[k].start] for k in plan.sources(view)}
            if len(scales) != 1:
                raise UnsupportedModelError(f"{name}: it reads several maps that have different scales")
            integers.maps[target.start] = scales.pop()
        return target.view

    # A view's elements are found by bisection over the starts, and a new map begins where the last one ends.
    plan.maps.sort(key=lambda m: m.start)
    for step in plan.steps:
        changes: dict[str, Any] = {}
        if isinstance(step, Convolution | Pool | Reduce) and not _whole_planes(plan, step.source):
            changes["source"] = copied(step.source, step.name)
        elif isinstance(step, Linear) and (
            len(plan.sources(step.source)) > 1
            # Without masks in mind a generator would gather first and then multiply by a full matrix.
            or (dense and not is_run(step.source))
        ):
            changes["source"] = copied(step.source.reshape(-1, 1, 1), step.name).ravel()
        elif isinstance(step, Softmax) and not is_run(step.source):
            changes["source"] = copied(step.source, step.name)
        made.append(replace(step, **changes) if changes else step)
        # Integers are filed by the identity of the step, and replace() made another one.
        if integers and changes and isinstance(step, Convolution | Linear):
            integers.rename(step, made[-1])
    plan.steps[:] = made
    return plan


def is_run(places: NDArray[Any]) -> bool:
    """Return True if numbers follow each other."""
    flat = places.ravel()
    return np.array_equal(flat, flat[0] + np.arange(flat.size))


def _whole_planes(plan: Plan, view: View) -> bool:
    planes = plan.planes(view)
    return planes is not None and planes.whole and len(plan.sources(view)) <= 1 and not (planes.maps < 0).any()


class McuMemory(Memory):
    """Where the maps of a regular plan lie, in elements: floats, or bytes of a quantised network.

    Attributes:
        staged: The input is copied to the arena, because it needs borders or steps address it there.
        stripes: How many rows of a step's output there are at a time, by its index; the next step runs with it.
        arena: Bytes that the caller lends. arena_quantised: The same with integers in and out.
        input_base: Where the integers of an input that is not staged lie.
    """

    def __init__(self, plan: Plan, *, quantised: bool) -> None:
        super().__init__(plan, [Layout(m.height, m.width) for m in plan.maps])
        self.quantised = quantised
        self.stripes: dict[int, int] = {}
        self.input_base = 0
        self.staged = self._widen()
        self._place()

    def source(self, view: View) -> Layout:
        """Return the layout of the one map that a view reads."""
        return self.layouts[self.plan.sources(view)[0]]

    @property
    def output_map(self) -> Map | None:
        """Return the map that the output is read from, None where there are several."""
        used = self.plan.sources(self.plan.output)
        return self.plan.maps[used[0]] if len(used) == 1 else None

    def _widen(self) -> bool:
        """Give each map the border that its padded convolutions read; return whether the input must be staged."""
        plan = self.plan
        staged = 0 in plan.sources(plan.output)
        for step in plan.steps:
            if isinstance(step, Convolution) and any(step.pads):
                self.source(step.source).widen(step.pads)
            # Chains and moves address one pointer, the arena, so an input that they read must lie there.
            readers = [op.operand for op in step.chain if op.operand is not None]
            if isinstance(step, Move):
                readers.append(step.source)
            staged = staged or any(0 in plan.sources(view) for view in readers)
        return staged or self.layouts[0].bordered

    def _place(self) -> None:
        """Give each map its place in the arena."""
        spans = self.plan.lifetimes()
        best = self._arena(spans)
        for index in range(len(self.plan.steps) - 1):
            rows = self._stripe_rows(index, spans)
            if rows is None:
                continue
            found = self._arena(spans, {index: rows})
            # A sixteenth of the memory is worth the rows that are moved down.
            if arena_bytes(found) * 16 <= arena_bytes(best) * 15:
                best, self.stripes = found, {index: rows}
                break
        for tensor in best:
            self.layouts[int(tensor.name)].base = tensor.offset // (1 if self.quantised else 4)
        for step, rows in self.stripes.items():
            # From here on this map is only as high as its stripe, and its planes are that much closer together.
            self.of(self.plan.steps[step].out).height = rows
        self.arena = self.arena_quantised = arena_bytes(best)
        if not self.staged:
            self.layouts[0].pointer = "input"
            if self.quantised:
                # The integers of the input come last, so that a caller who gives integers lends less.
                self.layouts[0].pointer = "in"
                self.input_base = self.arena
                self.arena += self.plan.maps[0].size
        output = self.output_map
        # The last layer writes to the caller's memory itself, where nothing reads what it wrote.
        if output is not None and not self.quantised and output is not self.plan.maps[0]:
            lay, number = self.of(output), self.plan.index(output)
            whole = not lay.bordered and np.array_equal(self.plan.output.ravel(), output.view.ravel())
            read = any(number in self.plan.sources(view) for step in self.plan.steps for view in step.views())
            if whole and not read:
                lay.pointer, lay.base = "output", 0

    def _arena(
        self, spans: dict[int, tuple[int, int]], stripes: dict[int, int] | None = None
    ) -> tuple[ArenaTensor, ...]:
        """Return the maps in the arena, with some of them no higher than a stripe."""
        tensors = []
        for k, (first, last) in spans.items():
            if k == 0 and not self.staged:
                continue
            lay, m = self.layouts[k], self.plan.maps[k]
            plane, begins = lay.plane, first
            for index, rows in (stripes or {}).items():
                if m is self.plan.steps[index].out:
                    plane = replace(lay, height=rows).plane
                if m is self.plan.steps[index + 1].out:
                    begins = index  # the two run together
            size = m.channels * plane
            # Maps of bytes begin at multiples of four too.
            size = -(-size // 4) * 4 if self.quantised else 4 * size
            # Names with zeros in front, for in the order of names ties are broken.
            tensors.append(ArenaTensor(f"{k:06}", size, begins + 1, last + 1))
        return place_best(tensors)

    def _stripe_rows(self, index: int, spans: dict[int, tuple[int, int]]) -> int | None:
        """Return how many rows of a convolution's output the next one needs at a time; None where it cannot be."""
        first, second = self.plan.steps[index], self.plan.steps[index + 1]
        if not (isinstance(first, Convolution) and isinstance(second, Convolution)):
            return None
        number = self.plan.index(first.out)
        if spans[number][1] != index + 1 or self.plan.sources(second.source) != [number]:
            return None
        operands = any(op.operand is not None for step in (first, second) for op in step.chain)
        # Borders and operands are addressed by the row in the whole map, which a stripe does not have.
        plain = not (any(first.pads) or any(second.pads) or operands)
        span = second.dilations[0] * (second.weight.shape[2] - 1) + 1
        step = second.strides[0] * (2 if second.pool else 1)
        rows = span + step - second.strides[0]
        # A step larger than the stripe would have to skip rows, which sliding down cannot do.
        if not plain or second.out.height < 2 or rows >= first.out.height or step > rows:
            return None
        return int(rows)
