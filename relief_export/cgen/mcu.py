"""The back end for microcontrollers: a plan becomes one small C file whose tables stay in the flash.

What is small here is memory, so each layer is a loop over tables, and layers share a loop wherever its text is equal:

    counts   connections (whole kernels for most convolutions) of each output, one byte where that is enough
    gaps     from each connection to the next, one byte; 255 skips on and another byte follows
    values   of the connections in order, in one of four codes

Single connections of a codebook take one byte for both: the gap in its lower half, the value's number in its upper.

A convolution sums a tile of outputs at once, so that what is decoded of the tables serves several multiply-adds, and
each number of the input is loaded once for all of a row that it is multiplied with. Bias, activations, residual
additions and a 2 x 2 max-pool are done to the sums before anything is written. Maps lie in the arena, which the caller
lends, plane by plane, with borders of zeros where a padded convolution reads them::

    element (c, y, x)  at  base + c·plane + origin + y·pitch + x          pitch = width + max(left, right)

The codes: ``f32`` as they are; ``int8`` with one float scale an output channel and ``codebook16`` with sixteen centres
a layer, both expanded to floats where they are used; ``q8`` computes with integers throughout (quantised.py).

A convolution that comes first and whose output the next one reads is run in stripes of rows, where that makes the arena
smaller: what is needed of its output for one row of the next, sliding down.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias

import numpy as np

from relief_export.cgen.host import comment, literal, render, times
from relief_export.cgen.plan import (
    Constant,
    Convolution,
    Linear,
    Map,
    Move,
    Op,
    Plan,
    Pool,
    Reduce,
    Softmax,
    Step,
    View,
)
from relief_export.errors import UnsupportedModelError
from relief_export.formats.packed.encode import codebook, nearest
from relief_export.graph.arena import ArenaTensor, arena_bytes, place
from relief_export.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from relief_export.cgen.quantised import Addition, Quantisation

Code: TypeAlias = Literal["f32", "int8", "codebook16", "q8"]
CODES: dict[Code, str] = {
    "f32": "float weights and arithmetic",
    "int8": "weights of 8 bits with a scale an output channel, float arithmetic",
    "codebook16": "weights of 4 bits that choose among sixteen values a layer, float arithmetic",
    "q8": "integers of 8 bits throughout",
}
"""Value codes, and what generated files say of them."""

_FETCH: dict[str, str] = {
    "f32": "ROM_FLOAT(value++)",
    "int8": "(float)ROM_INT8(value++)",
    "codebook16": "ROM_FLOAT(centres + ROM_NIBBLE(values, n)); n++",
    "q8": "ROM_INT8(value++)",
    "pairs": "ROM_FLOAT(centres + (pair >> 4))",
}
"""C for the next value; pairs have a gap and the number of a value in one byte."""
_STORED = {"f32": "float", "int8": "int8_t", "codebook16": "uint8_t", "q8": "int8_t"}
_VALUE_BYTES = {"f32": 4.0, "int8": 1.0, "codebook16": 0.5, "q8": 1.0}
_C_TYPES = {"f4": "float", "u1": "uint8_t", "i1": "int8_t", "u2": "uint16_t", "u4": "uint32_t", "i4": "int32_t"}
_READ = {"float": "ROM_FLOAT", "uint8_t": "ROM_UINT8", "int8_t": "ROM_INT8", "uint16_t": "ROM_UINT16",
         "uint32_t": "ROM_UINT32", "int32_t": "ROM_INT32"}  # fmt: skip
_WIDTH = 110
_FUNCTION = 250
"""About how many bytes a function for one more form of a convolution takes."""

_EXPRESSIONS = {
    "Relu": "v > 0 ? v : 0",
    "LeakyRelu": "v < 0 ? v * {0} : v",
    "ThresholdedRelu": "v > {0} ? v : 0",
    "Sigmoid": "1 / (1 + expf(-v))",
    # The bounds follow in a line of their own, for they would repeat the product.
    "HardSigmoid": "v * {0} + {1}",
    "HardSwish": "v * (v < -3 ? 0 : v > 3 ? 1 : v / 6 + 0.5f)",
    "Tanh": "tanhf(v)",
    "Elu": "v < 0 ? {0} * (expf(v) - 1) : v",
    "Celu": "v < 0 ? {0} * (expf(v / {0}) - 1) : v",
    "Selu": "{1} * (v < 0 ? {0} * (expf(v) - 1) : v)",
    # The exponent is never positive, so that it cannot overflow.
    "Softplus": "(v > 0 ? v : 0) + log1pf(expf(v > 0 ? -v : v))",
    "Softsign": "v / (1 + fabsf(v))",
    "Mish": "v * tanhf((v > 0 ? v : 0) + log1pf(expf(v > 0 ? -v : v)))",
    "Erf": "erff(v)",
    "Exp": "expf(v)",
    "Abs": "v < 0 ? -v : v",
    "Neg": "-v",
    "Reciprocal": "1 / v",
    "GeluErf": "0.5f * v * (1 + erff(v * 0.707106781f))",
    "GeluTanh": "0.5f * v * (1 + tanhf(0.797884561f * (v + 0.044715f * v * v * v)))",
    "Clip": "v < {0} ? {0} : v > {1} ? {1} : v",
}
_LIBM = re.compile(r"\b(expf|tanhf|log1pf|logf|erff|fabsf)\(")
_SYMBOLS = {"Add": "+", "Sub": "-", "Mul": "*", "Div": "/"}


def _render(template: str, **values: object) -> str:
    return render(f"mcu/{template}", **values)


def _literal(number: float) -> str:
    """Return a float32 as C, the infinite as the largest that there is."""
    return literal(math.copysign(np.finfo(np.float32).max, number) if math.isinf(number) else number)


@dataclass
class _Layout:
    """Where a map lies: ``pointer + base`` is its first element, borders included."""

    height: int
    width: int
    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0
    pointer: str = "arena"
    base: int = 0

    @property
    def pitch(self) -> int:
        return self.width + max(self.left, self.right)

    @property
    def origin(self) -> int:
        return self.top * self.pitch + self.left

    @property
    def plane(self) -> int:
        rows = self.top + self.height + self.bottom
        # The gap between two rows is the right border of the one and the left border of the other.
        return rows * self.pitch + (self.left if self.pitch > self.width else 0)

    @property
    def bordered(self) -> bool:
        return self.plane != self.height * self.width


@dataclass
class _Tables:
    """Constants of the program, in order of use, without repetitions."""

    names: dict[tuple[str, bytes], str] = field(default_factory=dict)
    arrays: dict[str, tuple[str, NDArray[Any]]] = field(default_factory=dict)

    def add(self, stem: str, array: NDArray[Any]) -> str:
        """Return the name of a table; its C type follows from its dtype."""
        array = np.ascontiguousarray(array).ravel()
        kind = _C_TYPES[f"{array.dtype.kind}{array.dtype.itemsize}"]
        key = (kind, array.tobytes())
        if key not in self.names:
            self.names[key] = stem
            self.arrays[stem] = (kind, array)
        return self.names[key]


@dataclass
class _Function:
    """A call under construction: parameters with their arguments, and the lines that a template puts in."""

    parameters: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    channel: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def take(self, parameter: str, argument: object) -> None:
        self.parameters.append(parameter)
        self.arguments.append(str(argument))


@dataclass(frozen=True)
class Program:
    """A generated program.

    Attributes:
        files: Content by file name.
        arena: Bytes that the caller lends. arena_quantised: The same with integers in and out (q8).
        layers: One row a layer with weights: its name, the table form chosen, connections, multiply-adds, bytes.
    """

    files: dict[str, bytes]
    arena: int
    arena_quantised: int
    layers: tuple[dict[str, Any], ...]


def generate(
    plan: Plan,
    code: Code = "f32",
    *,
    name: str = "net",
    dense: bool = False,
    quantisation: Quantisation | None = None,
    quantized_io: bool = False,
) -> Program:
    """Return the program of a plan; the same plan gives the same bytes.

    Args:
        plan: What ``lower`` made; it is not changed.
        code: How the weights are stored.
        name: Of the C function's prefix and the files.
        dense: Store every weight and compute with it, zeros too: what a generator that knows no masks would do.
        quantisation: The integers of a ``q8`` plan.
        quantized_io: Let the header of a ``q8`` network choose integers for input and output.

    Raises:
        UnsupportedModelError: A step has no code for microcontrollers; the message names it.
    """
    return _Generator(plan, code, name, dense=dense, quantisation=quantisation, quantized_io=quantized_io).run()


class _Generator:
    def __init__(
        self, plan: Plan, code: Code, name: str, *, dense: bool, quantisation: Quantisation | None, quantized_io: bool
    ) -> None:
        self.code, self.name, self.dense, self.quantisation = code, name, dense, quantisation and quantisation.copy()
        self.quantized_io = quantized_io
        # Copies of the lists: steps and maps are added below, and the caller's plan stays as it is.
        self.plan = Plan(
            plan.input_name, plan.output_name, plan.input_shape, plan.output_shape, list(plan.maps), list(plan.steps),
            plan.output,
        )  # fmt: skip
        self.element = quantisation.type if quantisation else "float"
        self.bytes = 1 if quantisation else 4
        self.sum = "int32_t" if quantisation else "float"
        self.tables = _Tables()
        self.instances: dict[str, str] = {}
        self.names: set[str] = set()
        self.calls: list[str] = []
        self.layers: list[dict[str, Any]] = []
        self.layouts: list[_Layout] = []
        self.index = 0
        self.input_base = 0
        self.with_gaps: set[tuple[Any, ...]] = set()

    # The whole --------------------------------------------------------------------------------------------------------

    def run(self) -> Program:
        self._regularise()
        self.numbers = {m.start: k for k, m in enumerate(self.plan.maps)}
        self._lay_out()
        self._place()
        self._find_shared()
        self._emit_input()
        for index, step in enumerate(self.plan.steps):
            if index - 1 in self.stripes:
                continue  # it ran with the one before it
            self.index = index
            self.calls.append(f"\n    /* {comment(step.name)}: {_describe(step)} */")
            following = self.plan.steps[index + 1] if index in self.stripes else None
            if isinstance(step, Convolution) and isinstance(following, Convolution):
                self._clear(following.out)
                self._emit_stripes(step, following)
            else:
                self._clear(step.out)
                _EMITTERS[type(step)](self, step)
        self._emit_output()
        return self._assemble()

    def _assemble(self) -> Program:
        plan = self.plan
        kernels = [text.replace("NAME", name) for text, name in self.instances.items()]
        title = f"{plan.input_name} ({times(plan.input_shape)}) -> {plan.output_name} ({times(plan.output_shape)})"
        facts: dict[str, Any] = {
            "name": self.name, "upper": self.name.upper(), "title": comment(title), "version": VERSION,
            "values": CODES[self.code], "quantised": self.quantisation is not None, "type": self.element,
            "input_size": math.prod(plan.input_shape), "output_size": math.prod(plan.output_shape),
            "input_name": comment(plan.input_name), "output_name": comment(plan.output_name),
            "input_shape": times(plan.input_shape), "output_shape": times(plan.output_shape),
            "arena": self.arena, "arena_quantised": self.arena_quantised, "quantized_io": self.quantized_io,
        }  # fmt: skip
        if self.quantisation:
            for side, m in (("input", plan.maps[0]), ("output", self._output_map() or plan.maps[-1])):
                scale, zero = self.quantisation.maps[m.start]
                facts |= {f"{side}_scale": _literal(scale), f"{side}_zero": zero}
        text = _render(
            "net.c",
            kernels=kernels,
            tables="\n".join(_table(key, kind, array) for key, (kind, array) in self.tables.arrays.items()),
            calls="\n".join(self.calls),
            libm=any(_LIBM.search(kernel) for kernel in kernels),
            nibbles=any("ROM_NIBBLE" in kernel for kernel in kernels),
            above=any("ABOVE(" in kernel for kernel in kernels),
            below=any("BELOW_ZERO(" in kernel for kernel in kernels),
            unrolled=any("UNROLL(" in kernel for kernel in kernels),
            connections=f"{sum(row['connections'] for row in self.layers):,}",
            macs=f"{sum(row['macs'] for row in self.layers):,}",
            **facts,
        )
        files = {
            f"{self.name}.h": _render("net.h", **facts),
            f"{self.name}.c": text,
            "example.c": _render("example.c", **facts),
        }
        encoded = {file: content.encode("ascii") for file, content in files.items()}
        return Program(encoded, self.arena, self.arena_quantised, tuple(self.layers))

    def _refuse(self, step: Step, why: str) -> NoReturn:
        raise UnsupportedModelError(f"{step.name}: {why}: write this network as the format c, or change the layer")

    # Regular operands -------------------------------------------------------------------------------------------------

    def _regularise(self) -> None:
        """Copy, by steps of their own, what a step reads that does not lie in one map as the step needs it."""
        made: list[Step] = []

        def copied(view: View, name: str) -> View:
            last = self.plan.maps[-1]
            channels, height, width = view.shape
            target = Map(f"operand of {name}", channels, height, width, last.start + last.size)
            self.plan.maps.append(target)
            made.append(Move(target.name, target, view))
            if self.quantisation:
                # A copy moves integers as they are, so all its sources must mean the same by them.
                scales = {self.quantisation.maps[self.plan.maps[k].start] for k in self._sources(view)}
                if len(scales) != 1:
                    raise UnsupportedModelError(f"{name}: it reads several maps that have different scales")
                self.quantisation.maps[target.start] = scales.pop()
            return target.view

        # A view's elements are found by bisection over the starts, and a new map begins where the last one ends.
        self.plan.maps.sort(key=lambda m: m.start)
        for step in self.plan.steps:
            changes: dict[str, Any] = {}
            if isinstance(step, Convolution | Pool | Reduce) and not self._whole_planes(step.source):
                changes["source"] = copied(step.source, step.name)
            elif isinstance(step, Linear) and (
                len(self._sources(step.source)) > 1
                # Without masks in mind a generator would gather first and then multiply by a full matrix.
                or (self.dense and not np.array_equal(step.source, _run(step.source)))
            ):
                changes["source"] = copied(step.source.reshape(-1, 1, 1), step.name).ravel()
            elif isinstance(step, Softmax) and not np.array_equal(step.source.ravel(), _run(step.source)):
                changes["source"] = copied(step.source, step.name)
            made.append(replace(step, **changes) if changes else step)
            # Integers are filed by the identity of the step, and replace() made another one.
            if self.quantisation and changes and isinstance(step, Convolution | Linear):
                self.quantisation.rename(step, made[-1])
        self.plan.steps[:] = made

    def _sources(self, view: View) -> list[int]:
        """Return the maps that a view reads, by index."""
        return [int(k) for k in np.unique(self.plan.locate(view)[0]) if k >= 0]

    def _whole_planes(self, view: View) -> bool:
        planes = self.plan.planes(view)
        return planes is not None and planes.whole and len(self._sources(view)) <= 1 and not (planes.maps < 0).any()

    # Layout and arena -------------------------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        """Give each map the border that its padded convolutions read, and find whether the input is read in place."""
        self.layouts = [_Layout(m.height, m.width) for m in self.plan.maps]
        staged = bool((self.plan.locate(self.plan.output)[0] == 0).any())
        for step in self.plan.steps:
            if isinstance(step, Convolution) and any(step.pads):
                lay = self.layouts[self._sources(step.source)[0]]
                lay.top, lay.left = max(lay.top, step.pads[0]), max(lay.left, step.pads[1])
                lay.bottom, lay.right = max(lay.bottom, step.pads[2]), max(lay.right, step.pads[3])
            # Chains and moves address one pointer, the arena, so an input that they read must lie there.
            readers = [op.operand for op in step.chain if op.operand is not None]
            if isinstance(step, Move):
                readers.append(step.source)
            staged = staged or any(0 in self._sources(view) for view in readers)
        self.staged = staged or self.layouts[0].bordered

    def _place(self) -> None:
        """Give each map its place in the arena."""
        spans = self.plan.lifetimes()
        self.stripes: dict[int, int] = {}
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
            self.layouts[int(tensor.name)].base = tensor.offset // self.bytes
        for step in self.stripes:
            # From here on this map is only as high as its stripe, and its planes are that much closer together.
            lay = self.layout(self.plan.steps[step].out)
            lay.height = self.stripes[step]
        self.arena = self.arena_quantised = arena_bytes(best)
        if not self.staged:
            self.layouts[0].pointer = "input"
            if self.quantisation:
                # The integers of the input come last, so that a caller who gives integers lends less.
                self.layouts[0].pointer = "in"
                self.input_base = self.arena
                self.arena += self.plan.maps[0].size
        output = self._output_map()
        # The last layer writes to the caller's memory itself, where nothing reads what it wrote.
        if output is not None and not self.quantisation and self.numbers[output.start]:
            lay = self.layout(output)
            whole = not lay.bordered and np.array_equal(self.plan.output.ravel(), output.view.ravel())
            if whole and not self._read_again(output):
                lay.pointer, lay.base = "output", 0

    def _arena(
        self, spans: dict[int, tuple[int, int]], stripes: dict[int, int] | None = None
    ) -> tuple[ArenaTensor, ...]:
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
            size = m.channels * plane * self.bytes
            # Maps of bytes begin at multiples of four too.
            tensors.append(ArenaTensor(str(k), -(-size // 4) * 4 if self.bytes == 1 else size, begins + 1, last + 1))
        # Placing is greedy, and which order packs best depends on the network.
        orders: tuple[Callable[[ArenaTensor], tuple[int, ...]], ...] = (
            lambda t: (-t.bytes, t.first, int(t.name)),
            lambda t: (-t.bytes * (t.last - t.first + 1), t.first, int(t.name)),
            lambda t: (t.first, -t.bytes, int(t.name)),
        )
        return min((place(sorted(tensors, key=order)) for order in orders), key=arena_bytes) if tensors else ()

    def _output_map(self) -> Map | None:
        used = self._sources(self.plan.output)
        return self.plan.maps[used[0]] if len(used) == 1 else None

    def _read_again(self, target: Map) -> bool:
        number = self.numbers[target.start]
        return any(number in self._sources(view) for step in self.plan.steps for view in step.views())

    def layout(self, target: Map) -> _Layout:
        return self.layouts[self.numbers[target.start]]

    def address(self, view: View) -> NDArray[np.int64]:
        """Return for each element its place after the pointer of its map; -1 for zeros."""
        which, inside = self.plan.locate(view)
        table = np.array([(m.height * m.width, m.width) for m in self.plan.maps])
        ours = np.array([(lay.base + lay.origin, lay.plane, lay.pitch) for lay in self.layouts])
        channel, rest = np.divmod(inside, table[which, 0])
        y, x = np.divmod(rest, table[which, 1])
        found = ours[which, 0] + channel * ours[which, 1] + y * ours[which, 2] + x
        return np.where(which >= 0, found, -1)

    def _find_shared(self) -> None:
        """Note which convolutions have tables of gaps, so that dense ones of their shape can share the function."""
        for step in self.plan.steps:
            # Integers are for the least RAM, and what a shared function takes as parameters lies on the stack.
            if isinstance(step, Convolution) and not self.dense and not self.quantisation:
                planes = self.plan.planes(step.source)
                assert planes is not None  # noqa: S101  # _regularise has seen to it
                form, _ = self._form(step, self._weights(step)[0], planes.channels, self._source_layout(step))
                if form == "kernels":
                    self.with_gaps.add(_shape(step))

    # Text -------------------------------------------------------------------------------------------------------------

    def _instance(self, template: str, stem: str, function: _Function, **values: Any) -> str:  # noqa: ANN401
        """Return the name of a template's instance, which is shared with equal ones."""
        text = _render(
            template, element=self.element, sum=self.sum, code=self.code, channel=function.channel,
            lines=function.lines, parameters=", ".join(function.parameters), **values,
        )  # fmt: skip
        if text not in self.instances:
            name, k = stem, 2
            while name in self.names:
                name, k = f"{stem}_{k}", k + 1
            self.names.add(name)
            self.instances[text] = name
        return self.instances[text]

    def _call(self, name: str, function: _Function, indent: str = "    ") -> None:
        self.calls.append(f"{indent}{name}({', '.join(function.arguments)});")

    def _pointer(self, lay: _Layout, extra: int = 0) -> str:
        offset = lay.base + extra
        return lay.pointer if not offset else f"{lay.pointer} {'+' if offset > 0 else '-'} {abs(offset)}"

    def _zero(self, target: Map) -> int:
        return self.quantisation.maps[target.start][1] if self.quantisation else 0

    def _clear(self, target: Map) -> None:
        lay = self.layout(target)
        if lay.bordered:
            # memset writes bytes, which is enough: a float 0 is four zero bytes, and elements of q8 are single bytes.
            size = f"{target.channels * lay.plane} * sizeof *arena"
            self.calls.append(f"    memset({self._pointer(lay)}, {self._zero(target)}, {size});")

    def _out(self, function: _Function, target: Map, *, vector: bool = False) -> None:
        """Add where a step writes, and the C for one element of it; ``vector``: one element a channel."""
        lay = self.layout(target)
        function.take(f"{self.element} *out", self._pointer(lay, lay.origin))
        if vector and lay.plane == 1:
            self.place = "out[o]"
            return
        function.take("int out_plane", lay.plane)
        self.place = "out[(ptrdiff_t)o * out_plane]"
        if not vector:
            function.take("int out_pitch", lay.pitch)
            self.place = "out[(ptrdiff_t)o * out_plane + (ptrdiff_t)row * out_pitch + column]"

    def _finish(self, function: _Function, step: Step) -> None:
        """Add what is done to a sum before it is written."""
        if self.quantisation:
            low, high = self.quantisation.range(step)
            addition = self.quantisation.additions.get(id(step))
            target = self.place
            if addition:
                target = f"const {self.element} own"
            if isinstance(step, Convolution | Linear | Reduce):
                function.take("int zero", self.quantisation.own(step)[1])
                function.take("int low", low)
                function.take("int high", high)
                function.lines.append(f"{target} = requantise(v + bias_o, scale_o, zero, low, high);")
                self._support("requantise", _render("requantise.c", type=self.element))
            # Pools and moves keep the scale of what they read, so there is nothing to requantise.
            elif (low, high) == self.quantisation.bounds:
                function.lines.append(f"{target} = ({self.element})v;")
            else:
                function.take("int low", low)
                function.take("int high", high)
                function.lines.append(f"{target} = ({self.element})(v < low ? low : v > high ? high : v);")
            if addition:
                self._add(function, step, addition)
            return
        if isinstance(step, Convolution | Linear) and [op.kind for op in step.chain] in ([], ["Relu"]):
            # A parameter, so that layers with it and without share a function.
            function.take("int relu", len(step.chain))
            function.lines += ["if (relu && BELOW_ZERO(v))", "    v = 0;"]
        else:
            for k, op in enumerate(step.chain):
                self._link(function, op, str(k), "v")
        function.lines.append(f"{self.place} = v;")

    def _add(self, function: _Function, step: Step, addition: Addition) -> None:
        """Add another map to the integer ``own``."""
        assert self.quantisation is not None  # noqa: S101  # the caller asked for it
        operand = next(op.operand for op in step.chain if op.operand is not None)
        other = self._operand(function, operand, "0", zero=addition.zero)
        unsigned = f" + {addition.unsigned}" if addition.unsigned else ""
        values = [(f"own{unsigned}", "factor"), (f"{other}{unsigned}", "factor0")]
        first, second = values if addition.first else values[::-1]
        low, high = self.quantisation.range(step, added=True)
        for name, number in (("factor", addition.factor), ("factor0", addition.other), ("offset", addition.offset)):
            function.take(f"int64_t {name}", f"INT64_C({number})")
        for name, number in (("places", addition.shift), ("lowest", low), ("highest", high)):
            function.take(f"int {name}", number + (addition.unsigned if name != "places" else 0))
        function.lines.append(
            f"{self.place} = ({self.element})(added({second[0]}, {second[1]}, offset, {first[0]}, {first[1]}, places, "
            f"lowest, highest){f' - {addition.unsigned}' if addition.unsigned else ''});"
        )
        self._support("added", _render("added.c"))

    def _support(self, name: str, text: str) -> None:
        if name not in self.names:
            self.names.add(name)
            # In front of all others, for the kernels call it and C wants it defined before.
            self.instances = {text: name} | self.instances

    def _link(self, function: _Function, op: Op, k: str, v: str) -> None:
        """Append one operation on the variable ``v``."""
        if op.kind == "Affine":
            factor = self._per_channel(function, f"scale{k}", op.scale, neutral=1)
            shift = self._per_channel(function, f"shift{k}", op.shift, neutral=0)
            right = f"{v} * {factor}" if factor else v
            function.lines.append(f"{v} = {right} + {shift};" if shift else f"{v} = {right};")
        elif op.kind == "PRelu":
            slope = self._per_channel(function, f"slope{k}", op.scale, neutral=None)
            function.lines.append(f"{v} = {v} < 0 ? {v} * {slope} : {v};")
        elif op.kind == "Gate":
            function.lines.append("{")
            function.lines.append(f"    float g{k} = {v};")
            for n, inner in enumerate(op.inner):
                self._link(function, inner, f"{k}_{n}", f"g{k}")
            function.lines += [f"    {v} *= g{k};", "}"]
        elif op.operand is not None:
            other = self._operand(function, op.operand, k)
            left, right = (other, v) if op.swapped else (v, other)
            if op.kind in _SYMBOLS:
                function.lines.append(f"{v} = {left} {_SYMBOLS[op.kind]} {right};")
            else:
                # The operand goes into a variable, for the comparison would read it twice.
                sign = ">" if op.kind == "Max" else "<"
                function.lines.append(f"{{ const float u = {other}; {v} = u {sign} {v} ? u : {v}; }}")
        else:
            expression = _EXPRESSIONS[op.kind].format(*map(_literal, op.constants))
            applied = re.sub(r"\bv\b", v, expression)
            function.lines.append(f"{v} = {applied};")
            if op.kind == "HardSigmoid":
                function.lines.append(f"{v} = {v} < 0 ? 0 : {v} > 1 ? 1 : {v};")

    def _per_channel(self, function: _Function, name: str, array: NDArray[Any] | None, *, neutral: float | None) -> str:
        """Return the C for one number a channel: a literal where all are equal, empty where they are neutral."""
        assert array is not None  # noqa: S101  # these operations have it
        first = float(array[0])
        if (array == first).all():
            return "" if first == neutral else _literal(first)
        function.take(f"const float *{name}", self.tables.add(f"{name}_{self.index}", array.astype(np.float32)))
        function.channel.append(f"const float {name}_o = ROM_FLOAT({name} + o);")
        return f"{name}_o"

    def _operand(self, function: _Function, view: View, k: str, zero: int = 0) -> str:
        """Return the C for what a chain combines with; ``zero`` is what stands for elements that are zeros."""
        first = self.address(view[:, 0, 0])
        one = view.shape[1:] == (1, 1)
        planes = None if one else self.plan.planes(view)
        used = self._sources(view)
        pitches = {self.layouts[n].pitch for n in used}
        assert one or (planes is not None and len(pitches) == 1)  # noqa: S101  # the lowering copies others
        places, kind, zeros = _places(first)
        function.take(f"const {kind} *places{k}", self.tables.add(f"places{k}_{self.index}", places))
        function.channel.append(f"const {kind} place{k} = {_READ[kind]}(places{k} + o);")
        at = f"arena[place{k}]"
        if planes is not None:
            function.take(f"int pitch{k}", next(iter(pitches)) * planes.dy)
            at = f"arena[place{k} + (size_t)row * pitch{k} + (size_t)column * {planes.dx}]"
        # A chain may have several operands, and the function takes the arena once.
        if f"const {self.element} *arena" not in function.parameters:
            function.take(f"const {self.element} *arena", "arena")
        if zeros and zero:
            function.take(f"int zero{k}", zero)
        return f"(place{k} == ({kind})-1 ? {f'zero{k}' if zero else 0} : {at})" if zeros else at

    # Steps ------------------------------------------------------------------------------------------------------------

    def _emit_input(self) -> None:
        """Bring the input to where the layers read it: as it is, into the arena, or as integers."""
        m, lay = self.plan.maps[0], self.layouts[0]
        upper = self.name.upper()
        target = self._pointer(lay, lay.origin) if self.staged else f"arena + {self.input_base}"
        arguments = f"input, {target}, {m.channels}, {m.height}, {m.width}, {lay.plane}, {lay.pitch}"
        staged = _render("stage.c", type=self.element)
        if self.staged:
            self._clear(m)
        if self.quantisation is None:
            if self.staged:
                self._support("stage", staged)
                self.calls.append(f"    stage({arguments});")
            return
        given, last = self.quantisation.maps[m.start], self._output_map()
        left = self.quantisation.maps[last.start] if last else given  # one of several maps is refused below
        low, high = self.quantisation.bounds
        rounded = _render(
            "quantise.c", type=self.element, low=low, high=high, input=_Numbers(*given), output=_Numbers(*left)
        )
        self._support("quantise", f"#ifndef {upper}_QUANTIZED_IO\n{rounded}#endif\n")
        integers = [f"    stage({arguments});"] if self.staged else [f"    const {self.element} *const in = input;"]
        if self.staged:
            self._support("stage", f"#ifdef {upper}_QUANTIZED_IO\n{staged}#endif\n")
        floats = [] if self.staged else [f"    const {self.element} *const in = {target};"]
        floats.append(f"    quantise({arguments});")
        self.calls += [f"#ifdef {upper}_QUANTIZED_IO", *integers, "#else", *floats, "#endif"]

    def _emit_output(self) -> None:
        target = self._output_map()
        size = self.plan.output.size
        if self.quantisation:
            assert target is not None  # noqa: S101  # quantised.py has seen to it
            places = self.address(self.plan.output.ravel())
            if not np.array_equal(places, _run(places)):
                raise UnsupportedModelError("the output is no run of one map: q8 takes networks that end in a layer")
            self.calls += [
                f"\n#ifdef {self.name.upper()}_QUANTIZED_IO",
                f"    memcpy(output, arena + {places[0]}, {size});",
                "#else",
                f"    expand(arena + {places[0]}, output, {size});",
                "#endif",
            ]
            return
        if target is not None and self.layout(target).pointer == "output":
            return
        places = self.address(self.plan.output.ravel())
        if np.array_equal(places, _run(places)):
            self.calls.append(f"    memcpy(output, arena + {places[0]}, {size} * sizeof *output);")
            return
        self.index = len(self.plan.steps)
        function = _Function()
        function.take(f"const {self.element} *in", "arena")
        # The output is no map of the plan, but move.c wants the shape of one.
        fake = Map("output", 1, 1, size, 0)
        self._move(function, fake, places, pitch=0, step=0, planes=False)
        function.take("float *out", "output")
        function.lines.append("out[column] = v;")
        self._call(self._moved(function, places, planes=False), function)

    def _move(
        self, function: _Function, target: Map, places: NDArray[np.int64], *, pitch: int, step: int, planes: bool
    ) -> None:
        """Add the parameters of move.c."""
        table, kind, _ = _places(places)
        function.take(
            f"const {kind} *places", self.tables.add(f"places_{self.index if self.index >= 0 else 'input'}", table)
        )
        function.take("int outputs", target.channels)
        function.take("int height", target.height)
        function.take("int width", target.width)
        if planes:
            function.take("int pitch", pitch)
            function.take("int step", step)

    def _moved(self, function: _Function, places: NDArray[np.int64], *, planes: bool, zero: int = 0) -> str:
        _, kind, zeros = _places(places)
        return self._instance(
            "move.c", "move", function, planes=planes, zeros=zeros, place=kind, read=_READ[kind], zero=zero
        )

    def emit_move(self, step: Move) -> None:
        function = _Function()
        function.take(f"const {self.element} *in", "arena")
        planes = self.plan.planes(step.source)
        pitches = {self.layouts[k].pitch for k in self._sources(step.source)}
        regular = planes is not None and len(pitches) == 1
        places = self.address(step.source[:, 0, 0] if regular else step.source.ravel())
        pitch = next(iter(pitches)) * planes.dy if planes is not None and regular else 0
        dx = planes.dx if planes is not None else 1
        self._move(function, step.out, places, pitch=pitch, step=dx, planes=regular)
        self._out(function, step.out)
        self._finish(function, step)
        zero = self.quantisation.own(step)[1] if self.quantisation else 0
        self._call(self._moved(function, places, planes=regular, zero=zero), function)

    def emit_constant(self, step: Constant) -> None:
        lay = self.layout(step.out)
        if self.quantisation:
            self._refuse(step, "q8 has no tables of constants between layers")
        table = self.tables.add(f"constant_{self.index}", step.values.astype(np.float32))
        text = _render("constant.c", stored="float", element="float", read="ROM_FLOAT")
        if text not in self.instances:
            self.names.add("constant")
            self.instances[text] = "constant"
        m = step.out
        target = self._pointer(lay, lay.origin)
        sizes = f"{m.channels}, {m.height}, {m.width}, {lay.plane}, {lay.pitch}"
        self.calls.append(f"    constant({table}, {target}, {sizes});")

    def emit_pool(self, step: Pool) -> None:
        if self.quantisation and step.kind != "max":
            self._refuse(step, "q8 has no average of windows, only of whole planes")
        lay = self._source_layout(step)
        function = _Function()
        self._in_planes(function, step, lay)
        function.take("int outputs", step.out.channels)
        function.take("int height", step.out.height)
        function.take("int width", step.out.width)
        self._out(function, step.out)
        self._finish(function, step)
        # A window may lie partly in the padding, which does not count: the start must not be greater than any number.
        lowest = (
            "-128"
            if self.quantisation and self.quantisation.bounds[0] < 0
            else "0"
            if self.quantisation
            else "-3.402823466e+38f"
        )
        name = self._instance(
            "pool.c", f"pool_{step.kind.partition('-')[0]}", function, kind=step.kind,
            title="Greatest" if step.kind == "max" else "Mean", kernel=step.kernel, strides=step.strides,
            pads=step.pads, dilations=step.dilations, size=step.source.shape[1:],
            start=lowest if step.kind == "max" else "0", share=_literal(1 / math.prod(step.kernel)),
        )  # fmt: skip
        self._call(name, function)

    def emit_reduce(self, step: Reduce) -> None:
        lay = self._source_layout(step)
        function = _Function()
        self._in_planes(function, step, lay)
        function.take("int outputs", step.out.channels)
        function.take("int height", step.source.shape[1])
        function.take("int width", step.source.shape[2])
        self._out(function, step.out, vector=True)
        if self.quantisation:
            if step.kind == "sum":
                self._refuse(step, "q8 has no sums of planes, only means")
            multiplier, shift, bias = self.quantisation.mean(step, self.plan.maps[self._sources(step.source)[0]])
            function.take("uint32_t scale_o", multiplier | shift << 24)
            function.take("int32_t bias_o", bias)
        self._finish(function, step)
        name = self._instance(
            "reduce.c", f"reduce_{step.kind}", function, kind=step.kind, title=step.kind.capitalize(),
            start="in[0]" if step.kind == "max" else "0",
        )  # fmt: skip
        self._call(name, function)

    def emit_softmax(self, step: Softmax) -> None:
        function = _Function()
        first = self.address(step.source.ravel()[:1])[0]
        which = self._sources(step.source)[0]
        function.take("const float *in", self._pointer(replace(self.layouts[which], base=0), int(first)))
        function.take("int outputs", step.source.shape[0])
        function.take("int width", step.source.shape[2])
        self._out(function, step.out)
        self._finish(function, step)
        self._call(self._instance("softmax.c", "softmax", function, logarithm=step.logarithm), function)

    def _source_layout(self, step: Convolution | Pool | Reduce) -> _Layout:
        return self.layouts[self._sources(step.source)[0]]

    def _in_planes(self, function: _Function, step: Pool | Reduce, lay: _Layout) -> None:
        """Add where a step reads planes, which must follow each other."""
        planes = self.plan.planes(step.source)
        assert planes is not None  # noqa: S101  # _regularise has seen to it
        channels = planes.channels
        if not np.array_equal(channels, channels[0] + np.arange(len(channels))):
            self._refuse(step, "it pools channels that do not follow each other")
        function.take(f"const {self.element} *in", self._pointer(lay, lay.origin + int(channels[0]) * lay.plane))
        function.take("int plane", lay.plane)
        function.take("int pitch", lay.pitch)

    # Layers with weights ----------------------------------------------------------------------------------------------

    def emit_linear(self, step: Linear) -> None:
        used = self._sources(step.source)
        places = self.address(step.source)
        lay = self.layouts[used[0]] if used else _Layout(1, 1)
        weight, bias = self._weights(step)
        kept = places >= 0
        first = int(places[kept].min()) if kept.any() else 0
        rows = []
        for row in weight:
            chosen = np.flatnonzero(kept & (row != 0))
            # Gaps are unsigned, so the places of a row must ascend; what the layer reads may be in any order.
            order = chosen[np.argsort(places[chosen], kind="stable")]
            rows.append((places[order] - first, row[order][:, None]))
        contiguous = kept.all() and np.array_equal(places, _run(places))
        forms = self._element_bytes(rows)
        if contiguous:
            forms["dense"] = weight.size * _VALUE_BYTES[self.code]
        form = "dense" if self.dense and contiguous else min(forms, key=lambda name: (forms[name], name != "dense"))
        if form == "dense":
            rows = [(np.arange(len(row)), row[:, None]) for row in weight]
        function = _Function()
        pointer = self._pointer(replace(lay, base=0), first)
        function.take(f"const {self.element} *in", pointer)
        count_type = self._row_tables(function, rows, form)
        if form == "dense":
            function.take("int inputs", weight.shape[1])
        function.take("int outputs", len(weight))
        values = self._value_tables(function, step, rows, weight, bias, form=form)
        self._out(function, step.out, vector=True)
        self._finish(function, step)
        name = self._instance(
            "linear.c", f"linear_{form}", function, form=form, count=count_type, factor=self._factor,
            fetch=_FETCH["pairs" if form == "pairs" else self.code].replace("value++", "values++"),
        )  # fmt: skip
        self._note(step, form, rows, 1, values)
        self._call(name, function)

    def emit_convolution(self, step: Convolution) -> None:
        self._convolve(step, self._source_layout(step))

    def _convolve(self, step: Convolution, source: _Layout, *, part: _Part | None = None, indent: str = "    ") -> None:
        # In one piece, because the order in which ``function`` takes parameters is the order of the C function's
        # arguments, which the template repeats.
        weight, bias = self._weights(step)
        planes = self.plan.planes(step.source)
        assert planes is not None  # noqa: S101  # _regularise has seen to it
        channels = planes.channels
        groups, (per_group, *kernel) = step.groups, weight.shape[1:]
        members = len(weight) // groups
        form, rows = self._form(step, weight, channels, source)
        height, width = step.extent
        if step.pool:
            height, width = step.out.height * 2, step.out.width * 2
        tall, wide = _tile(part.fewest if part else height, width, pool=step.pool, integers=bool(self.quantisation))
        function = _Function()
        origin = source.origin - step.pads[0] * source.pitch - step.pads[1]
        read = self._pointer(source, origin)
        function.take(f"const {self.element} *in", f"{read}{part.read if part else ''}")
        single = form in {"elements", "pairs"}
        if not single:
            function.take("int plane", source.plane)
        function.take("int pitch", source.pitch)
        function.take("int height", part.height if part else height)
        function.take("int width", width)
        count_type = self._row_tables(function, rows, form)
        if form == "dense":
            function.take("int inputs", per_group)
        function.take("int outputs", len(weight))
        grouped = groups > 1 and not single
        if grouped:
            function.take("int members", members)
            function.take("ptrdiff_t group", per_group * source.plane)
        values = self._value_tables(function, step, rows, weight, bias, form=form)
        self._out(function, step.out)
        if part is not None:
            for k, parameter in enumerate(function.parameters):
                if parameter.endswith("*out"):
                    function.arguments[k] += part.write
        self._finish(function, step)
        dy, dx = step.dilations
        sy, sx = step.strides
        inner = (1, 1) if single else (kernel[0], kernel[1])
        names = "abcdefgh"[: tall * wide]
        below = f"{sy} * pitch" if sy > 1 else "pitch"
        places = []
        for t in range(tall * wide):
            y, x = divmod(t, wide)
            terms = [*([f"{y * sy} * pitch" if y * sy > 1 else "pitch"] if y else []), *([str(x * sx)] if x else [])]
            places.append((names[t], f"q[{' + '.join(terms) or '0'}]"))
        name = self._instance(
            "conv.c", f"conv_{kernel[0]}x{kernel[1]}_{form}", function, kernel=inner, strides=step.strides,
            dilations=step.dilations, form=form, pool=step.pool, rows=tall, columns=wide, names=names,
            count=count_type, stored="uint8_t" if form == "pairs" else _STORED[self.code], groups=grouped,
            nibbles=self.code == "codebook16" and form != "pairs", factor=self._factor,
            fetch=_FETCH["pairs" if form == "pairs" else self.code], places=places, below=below,
            # Neighbouring outputs read the same numbers, one column on: each is loaded once a row.
            sliding=inner[1] > 1 and sx == dx == 1 and tall <= 2,
            next_row=f"{dy} * pitch" if dy > 1 else "pitch", times_plane="" if single else " * plane",
            note=f", stride {sy} x {sx}" if (sy, sx) != (1, 1) else "",
        )  # fmt: skip
        self._note(step, form, rows, height * width, values)
        self._call(name, function, indent)

    def _form(
        self, step: Convolution, weight: NDArray[Any], channels: NDArray[np.int64], source: _Layout
    ) -> tuple[str, list[tuple[NDArray[np.int64], NDArray[Any]]]]:
        """Choose the form of a convolution's tables by their bytes; return it with the connections of each output."""
        groups, (per_group, *kernel) = step.groups, weight.shape[1:]
        members = len(weight) // groups
        area = math.prod(kernel)
        value = _VALUE_BYTES[self.code]
        # Both forms are built in full, for their bytes depend on the gaps and not only on how many there are.
        kernels, elements = [], []
        window = (np.arange(kernel[0]) * step.dilations[0] * source.pitch)[:, None] + np.arange(
            kernel[1]
        ) * step.dilations[1]
        for o, row in enumerate(weight):
            group = o // members
            places = channels[group * per_group : (group + 1) * per_group]
            start = int(channels[group * per_group]) if groups > 1 else 0
            # Channels may come in any order, but gaps cannot go back: kernels are sorted by where they read.
            kept = np.flatnonzero(row.any(axis=(1, 2)) | self.dense)
            order = kept[np.argsort(places[kept], kind="stable")]
            kernels.append((places[order] - start, row[order].reshape(len(order), area)))
            at = places[:, None, None] * source.plane + window
            chosen = np.flatnonzero(row.ravel())
            chosen = chosen[np.argsort(at.ravel()[chosen], kind="stable")]
            elements.append((at.ravel()[chosen], row.ravel()[chosen][:, None]))
        # A group's start is computed from its number, which takes channels in their own order.
        regular = groups == 1 or all(
            np.array_equal(channels[g * per_group : (g + 1) * per_group], g * per_group + np.arange(per_group))
            for g in range(groups)
        )
        forms = self._element_bytes(elements)
        if regular:
            forms["kernels"] = sum(_gap_bytes(at) + len(at) * area * value for at, _ in kernels)
            if np.array_equal(channels, np.arange(len(channels))):
                forms["dense"] = weight.size * value
        # Single elements would leave zeros out, which a program without masks does not do.
        if self.dense and "kernels" in forms:
            forms = {name: size for name, size in forms.items() if name in {"kernels", "dense"}}
        # Gaps of single elements cost time too: they must save a third.
        dear = {"elements": 1.5, "pairs": 1.5}
        form = min(forms, key=lambda name: (forms[name] * dear.get(name, 1), name != "dense"))
        if form == "dense" and _shape(step) in self.with_gaps:
            # Another layer of this shape has gaps: to share its function takes less than one of its own.
            gaps = sum(_gap_bytes(at) + 1 for at, _ in kernels)
            form = "kernels" if gaps < _FUNCTION else form
        if form == "dense":
            return form, [(np.arange(per_group), row.reshape(per_group, area)) for row in weight]
        return form, kernels if form == "kernels" else elements

    def _element_bytes(self, rows: list[tuple[NDArray[np.int64], NDArray[Any]]]) -> dict[str, float]:
        """Return what single connections take, by the forms of their tables."""
        forms = {"elements": sum(_gap_bytes(at) + len(at) * _VALUE_BYTES[self.code] for at, _ in rows)}
        if self.code == "codebook16":
            forms["pairs"] = sum(len(_steps(at)) for at, _ in rows)
        return forms

    @property
    def _factor(self) -> str:
        return "int" if self.quantisation else "float"

    def _weights(self, step: Convolution | Linear) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return weights and biases as they are computed with: integers for q8, floats as decoded for the others."""
        if self.quantisation:
            return self.quantisation.weights[id(step)][:2]
        return step.weight, step.bias

    def _row_tables(self, function: _Function, rows: list[tuple[NDArray[np.int64], NDArray[Any]]], form: str) -> str:
        """Add the tables of counts and gaps; return the macro that reads a count."""
        if form == "dense":
            return ""
        counts = np.array([len(at) for at, _ in rows])
        small = counts.max(initial=0) < 256
        kind = np.dtype(np.uint8 if small else np.uint16)
        gaps = [gap for at, _ in rows for gap in _gaps(at)]
        c_type = _C_TYPES[f"u{kind.itemsize}"]
        function.take(f"const {c_type} *counts", self.tables.add(f"counts_{self.index}", counts.astype(kind)))
        if form != "pairs":
            function.take("const uint8_t *gaps", self.tables.add(f"gaps_{self.index}", np.array(gaps, np.uint8)))
        return _READ[c_type]

    def _value_tables(
        self, function: _Function, step: Convolution | Linear, rows: list[tuple[NDArray[np.int64], NDArray[Any]]],
        weight: NDArray[Any], bias: NDArray[Any], *, form: str,
    ) -> int:  # fmt: skip
        """Add the tables of values and biases; return how many bytes of flash the layer's tables take."""
        flat = np.concatenate([values.ravel() for _, values in rows]) if rows else np.zeros(0)
        stem = str(self.index)
        stored = self._coded(function, step, flat, [values.size for _, values in rows])
        if self.code == "codebook16":
            stored = _paired(rows, stored) if form == "pairs" else _nibbles(stored)
        function.take(f"const {_STORED[self.code]} *values", self.tables.add(f"values_{stem}", stored))
        if self.quantisation:
            multiplier, shift = self.quantisation.requantisation(step)
            # A multiplier has 24 bits, so its shift fits on top of it.
            scales = multiplier | shift.astype(np.uint32) << 24
            function.take("const int32_t *biases", self.tables.add(f"biases_{stem}", bias.astype(np.int32)))
            function.take("const uint32_t *scales", self.tables.add(f"scales_{stem}", scales))
            function.channel += [
                "const int32_t bias_o = ROM_INT32(biases + o);",
                "const uint32_t scale_o = ROM_UINT32(scales + o);",
            ]
            return stored.nbytes + 8 * len(weight)
        function.take("const float *biases", self.tables.add(f"biases_{stem}", bias.astype(np.float32)))
        function.channel.append("const float bias_o = ROM_FLOAT(biases + o);")
        function.lines.append("v = v * scale_o + bias_o;" if self.code == "int8" else "v += bias_o;")
        return stored.nbytes + 4 * len(weight)

    def _coded(
        self, function: _Function, step: Convolution | Linear, flat: NDArray[Any], sizes: list[int]
    ) -> NDArray[Any]:
        """Return the values as they are stored, for a codebook their numbers there; add what decodes them."""
        if self.code == "f32":
            return flat.astype(np.float32)
        if self.code == "q8":
            return flat.astype(np.int8)
        if self.code == "int8":
            scale = int8_scales(step.weight)
            # coded() made these whole multiples of the scale: rounding only undoes the error of the division.
            stored = np.rint(flat / np.repeat(scale, sizes)).astype(np.int8)
            function.take("const float *scales", self.tables.add(f"scales_{self.index}", scale))
            function.channel.append("const float scale_o = ROM_FLOAT(scales + o);")
            return stored
        # The centres need not be passed on: after coded() they are the values that occur.
        centres = np.unique(flat)
        assert len(centres) <= 16  # noqa: S101  # coded() has seen to it
        function.take("const float *centres", self.tables.add(f"centres_{self.index}", centres.astype(np.float32)))
        return nearest(flat, centres)

    def _note(
        self,
        step: Step,
        form: str,
        rows: list[tuple[NDArray[np.int64], NDArray[Any]]],
        positions: int,
        value_bytes: int,
    ) -> None:
        connections = sum(int(np.count_nonzero(values)) for _, values in rows)
        gaps = 0 if form == "dense" else len(rows)
        if form in {"kernels", "elements"}:  # in pairs they lie beside the values
            gaps += sum(_gap_bytes(at) for at, _ in rows)
        self.layers.append(
            {"name": step.name, "form": form, "connections": connections,
             "macs": sum(values.size for _, values in rows) * positions, "bytes": value_bytes + gaps}
        )  # fmt: skip

    # Stripes ----------------------------------------------------------------------------------------------------------

    def _stripe_rows(self, index: int, spans: dict[int, tuple[int, int]]) -> int | None:
        """Return how many rows of a convolution's output the next one needs at a time; None where it cannot be."""
        first, second = self.plan.steps[index], self.plan.steps[index + 1]
        if not (isinstance(first, Convolution) and isinstance(second, Convolution)):
            return None
        number = self.numbers[first.out.start]
        if spans[number][1] != index + 1 or self._sources(second.source) != [number]:
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

    def _emit_stripes(self, first: Convolution, second: Convolution) -> None:
        """Write the loop that runs two convolutions a row of the second at a time."""
        rows = self.stripes[self.index]
        stripe, source, target = self.layout(first.out), self._source_layout(first), self.layout(second.out)
        step = second.strides[0] * (2 if second.pool else 1)
        height = 2 if first.pool else 1
        down = height * first.strides[0] * source.pitch
        at = f"{self._pointer(stripe)} + c * {stripe.plane}"
        moved = f"{(rows - step) * stripe.pitch} * sizeof *arena"
        self.calls += [
            f"    /* {rows} rows of this layer at a time make one of the next */",
            f"    for (int r = 0; r < {second.out.height}; r++) {{",
            f"        const int fresh = r ? {step} : {rows};",
            # memmove and not memcpy, because the rows that stay may overlap with where they go.
            "        if (r)",
            f"            for (int c = 0; c < {first.out.channels}; c++)",
            f"                memmove({at}, {at} + {step * stripe.pitch}, {moved});",
        ]
        read = f" + (ptrdiff_t)(r * {step} + {rows} - fresh) * {down}"
        part = _Part(height * step, f"fresh * {height}", read, f" + ({rows} - fresh) * {stripe.pitch}")
        self._convolve(first, source, part=part, indent="        ")
        # Tables are named by the step, and these are the second one's.
        self.index += 1
        self.calls.append(f"        /* {comment(second.name)}: {_describe(second)} */")
        tall = 2 if second.pool else 1
        part = _Part(tall, str(tall), "", f" + r * {target.pitch}")
        self._convolve(second, stripe, part=part, indent="        ")
        self.calls.append("    }")


_EMITTERS: dict[type[Step], Callable[[_Generator, Any], None]] = {
    Convolution: _Generator.emit_convolution,
    Linear: _Generator.emit_linear,
    Pool: _Generator.emit_pool,
    Reduce: _Generator.emit_reduce,
    Softmax: _Generator.emit_softmax,
    Move: _Generator.emit_move,
    Constant: _Generator.emit_constant,
}


class _Numbers:
    """How floats and integers of one map belong together, as C: scale * (q - zero).

    Raises:
        UnsupportedModelError: The scale is far from that of any data.
    """

    def __init__(self, scale: float, zero: int) -> None:
        fraction, exponent = math.frexp(np.float32(scale))
        self.scale, self.zero, self.parenthesised = _literal(scale), zero, _parenthesised(zero)
        # scale = multiplier / 2^shift, exactly, for a float has 24 bits
        self.multiplier, self.shift = int(math.ldexp(fraction, 24)), 24 - exponent
        if not -90 < self.shift < 140:  # a float of one step has an exponent to spare
            raise UnsupportedModelError(f"the model has an input or output of the scale {scale:g}: quantise it again")


@dataclass(frozen=True)
class _Part:
    """Some rows of a convolution, in C: how many it sums, the fewest of them, and where it reads and writes."""

    fewest: int
    height: str
    read: str
    write: str


def _shape(step: Convolution) -> tuple[Any, ...]:
    """Return what two convolutions must have alike to share a function, whatever their sizes."""
    return step.weight.shape[2:], step.strides, step.dilations, step.groups > 1, step.pool


_TILES = ((2, 4), (2, 2), (1, 8), (1, 4), (4, 1), (1, 1))


def _tile(height: int, width: int, *, pool: bool, integers: bool) -> tuple[int, int]:
    """Return rows and columns of the outputs that are summed at once: those that take the fewest instructions."""
    tiles = [
        (rows, columns)
        for rows, columns in _TILES
        if rows <= height and columns <= width and (rows == 2 or not pool)
        # An FPU has registers for eight sums; integers share theirs with the addresses.
        and (rows * columns <= 4 or not integers)
    ]  # fmt: skip
    # A weight and what finds it, then a load and a multiply-add for each sum; those past the edge are done twice.
    return min(tiles, key=lambda t: -(-height // t[0]) * -(-width // t[1]) * (6 + 2 * t[0] * t[1]))


def _run(places: NDArray[Any]) -> NDArray[Any]:
    """Return the run of numbers that begins where ``places`` does."""
    flat = places.ravel()
    return np.asarray(flat[0] + np.arange(flat.size))


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


def _paired(rows: list[tuple[NDArray[np.int64], NDArray[Any]]], numbers: NDArray[Any]) -> NDArray[np.uint8]:
    """Return gaps and numbers of values in one byte each."""
    pairs = np.array([step for at, _ in rows for step in _steps(at)], np.uint8)
    pairs[pairs & 15 != 15] |= (numbers << 4).astype(np.uint8)
    return pairs


def _nibbles(numbers: NDArray[Any]) -> NDArray[np.uint8]:
    """Return numbers two to a byte, the first in the low half; an odd last one gets a partner that nothing reads."""
    pairs = np.pad(numbers, (0, len(numbers) % 2)).reshape(-1, 2)
    packed: NDArray[np.uint8] = (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8)
    return packed


def _places(first: NDArray[np.int64]) -> tuple[NDArray[Any], str, bool]:
    """Return places in the smallest unsigned type, whose largest number stands for zeros, and whether there are any."""
    zeros = bool((first < 0).any())
    # Below and not at the largest number, which is kept free to mean a zero.
    kind = next(k for k in (np.uint8, np.uint16, np.uint32) if int(first.max(initial=0)) < np.iinfo(k).max)
    table = np.where(first < 0, np.iinfo(kind).max, first).astype(kind)
    return table, _C_TYPES[f"u{table.dtype.itemsize}"], zeros


def _parenthesised(number: int) -> str:
    return f"({number})" if number < 0 else str(number)


def _describe(step: Step) -> str:
    kind = type(step).__name__.lower()
    chain = "".join(f", {op.kind}" for op in step.chain)
    pool = ", 2 x 2 max-pool" if isinstance(step, Convolution) and step.pool else ""
    return f"{kind}{chain}{pool}, to {times(step.out.shape)}"


def _table(key: str, kind: str, array: NDArray[Any]) -> str:
    words = [_literal(n) for n in array.tolist()] if kind == "float" else [str(n) for n in array.tolist()]
    lines, line = [], "   "
    # C has no arrays without elements.
    for word in words or ["0"]:
        if len(line) + len(word) + 2 > _WIDTH:
            lines.append(line)
            line = "   "
        line += f" {word},"
    body = "\n".join([*lines, line])
    return f"static const {kind} {key}[{max(1, array.size)}] NET_ROM = {{\n{body}\n}};\n"


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
