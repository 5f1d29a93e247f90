"""The back end for microcontrollers: a plan becomes one small C file whose tables stay in the flash.

What is small here is memory, so each layer is a loop over tables (connections.py), and layers share a loop wherever
its text is equal. A convolution sums a tile of outputs at once, so that what is decoded of the tables serves several
multiply-adds, and each number of the input is loaded once for all of a row that it is multiplied with. Bias,
activations, residual additions and a 2 x 2 max-pool are done to the sums before anything is written. Maps lie in the
arena, which the caller lends, with borders of zeros where a padded convolution reads them (mcu_memory.py).

The codes: ``f32`` as they are; ``int8`` with one float scale an output channel and ``codebook16`` with sixteen
centres a layer, both expanded to floats where they are used; ``q8`` computes with integers throughout (quantised.py).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from relief_export.cgen.c_source import (
    C_TYPES,
    Call,
    Functions,
    Tables,
    comment,
    described,
    literal,
    render,
    table,
    times,
    totals,
)
from relief_export.cgen.chain import Chain
from relief_export.cgen.connections import CODES, Connections, of_convolution, of_linear
from relief_export.cgen.mcu_memory import McuMemory, is_run, regular
from relief_export.cgen.memory import Layout
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

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from relief_export.cgen.connections import Code
    from relief_export.cgen.quantised import Addition, Quantisation

_FETCH: dict[str, str] = {
    "f32": "ROM_FLOAT(value++)",
    "int8": "(float)ROM_INT8(value++)",
    "codebook16": "ROM_FLOAT(centres + ROM_NIBBLE(values, n)); n++",
    "q8": "ROM_INT8(value++)",
    "pairs": "ROM_FLOAT(centres + (pair >> 4))",
}
"""C for the next value; pairs have a gap and the number of a value in one byte."""
_STORED = {"f32": "float", "int8": "int8_t", "codebook16": "uint8_t", "q8": "int8_t"}
_READ = {"float": "ROM_FLOAT", "uint8_t": "ROM_UINT8", "int8_t": "ROM_INT8", "uint16_t": "ROM_UINT16",
         "uint32_t": "ROM_UINT32", "int32_t": "ROM_INT32"}  # fmt: skip

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


def _render(template: str, **values: object) -> str:
    return render(f"mcu/{template}", **values)


@dataclass(frozen=True)
class Program:
    """A generated program.

    Attributes:
        files: Content by file name.
        arena: Bytes that the caller lends. arena_quantised: The same with integers in and out (q8).
        layers: One row a layer with weights: its name, the table form chosen, connections, multiply-adds, and the bytes
            of its tables.
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
        self.plan = regular(plan, self.quantisation, dense=dense)
        self.memory = McuMemory(self.plan, quantised=quantisation is not None)
        self.element = quantisation.type if quantisation else "float"
        self.sum = "int32_t" if quantisation else "float"
        self.tables = Tables()
        self.functions = Functions()
        self.calls: list[str] = []
        self.layers: list[dict[str, Any]] = []
        self.index = 0
        self.with_gaps = self._shapes_with_gaps()

    # The whole --------------------------------------------------------------------------------------------------------

    def run(self) -> Program:
        stripes = self.memory.stripes
        self._emit_input()
        for index, step in enumerate(self.plan.steps):
            if index - 1 in stripes:
                continue  # it ran with the one before it
            self.index = index
            self.calls.append(f"\n    /* {comment(step.name)}: {_describe(step)} */")
            following = self.plan.steps[index + 1] if index in stripes else None
            if isinstance(step, Convolution) and isinstance(following, Convolution):
                self._clear(following.out)
                self._emit_stripes(step, following)
            else:
                self._clear(step.out)
                _EMITTERS[type(step)](self, step)
        self._emit_output()
        return self._assemble()

    def _assemble(self) -> Program:
        plan, memory, kernels = self.plan, self.memory, self.functions.texts()
        said = described(plan, self.name) | {
            "values": CODES[self.code], "quantised": self.quantisation is not None, "type": self.element,
            "arena": memory.arena, "arena_quantised": memory.arena_quantised, "quantized_io": self.quantized_io,
        }  # fmt: skip
        if self.quantisation:
            for side, m in (("input", plan.maps[0]), ("output", memory.output_map or plan.maps[-1])):
                scale, zero = self.quantisation.maps[m.start]
                said |= {f"{side}_scale": literal(scale), f"{side}_zero": zero}
        text = _render(
            "net.c",
            kernels=kernels,
            tables="\n".join(table(key, kind, array, "NET_ROM") for key, (kind, array) in self.tables.arrays.items()),
            calls="\n".join(self.calls),
            libm=any(_LIBM.search(kernel) for kernel in kernels),
            nibbles=any("ROM_NIBBLE" in kernel for kernel in kernels),
            above=any("ABOVE(" in kernel for kernel in kernels),
            below=any("BELOW_ZERO(" in kernel for kernel in kernels),
            unrolled=any("UNROLL(" in kernel for kernel in kernels),
            **totals(self.layers),
            **said,
        )
        files = {
            f"{self.name}.h": _render("net.h", **said),
            f"{self.name}.c": text,
            "example.c": _render("example.c", **said),
        }
        encoded = {file: content.encode("ascii") for file, content in files.items()}
        return Program(encoded, memory.arena, memory.arena_quantised, tuple(self.layers))

    def _refuse(self, step: Step, why: str) -> NoReturn:
        raise UnsupportedModelError(f"{step.name}: {why}: write this network as the format c, or change the layer")

    def _shapes_with_gaps(self) -> set[tuple[Any, ...]]:
        """Return the shapes of convolutions that have tables of gaps: dense ones of them can share their functions."""
        # Integers are for the least RAM, and what a shared function takes as parameters lies on the stack.
        if self.dense or self.quantisation:
            return set()
        layers = [step for step in self.plan.steps if isinstance(step, Convolution)]
        return {
            _shape(step)
            for step in layers
            if self._connections(step, self.memory.source(step.source), shared=False).form == "kernels"
        }

    def _connections(self, step: Convolution, source: Layout, *, shared: bool) -> Connections:
        planes = self.plan.planes(step.source)
        assert planes is not None  # noqa: S101  # regular() has seen to it
        weight, _ = self._weights(step)
        return of_convolution(
            step, weight, planes.channels, source.pitch, source.plane, self.code, dense=self.dense, shared=shared
        )

    # Text -------------------------------------------------------------------------------------------------------------

    def _instance(self, template: str, stem: str, call: Call, **values: Any) -> str:  # noqa: ANN401
        """Return the name of a template's instance, which is shared with equal ones."""
        text = _render(
            template, element=self.element, sum=self.sum, code=self.code, channel=call.channel,
            lines=call.lines, parameters=", ".join(call.parameters), **values,
        )  # fmt: skip
        return self.functions.share(text, stem)

    def _call(self, name: str, call: Call, indent: str = "    ") -> None:
        self.calls.append(f"{indent}{name}({', '.join(call.arguments)});")

    def _zero(self, target: Map) -> int:
        return self.quantisation.maps[target.start][1] if self.quantisation else 0

    def _clear(self, target: Map) -> None:
        lay = self.memory.of(target)
        if lay.bordered:
            # memset writes bytes, which is enough: a float 0 is four zero bytes, and elements of q8 are single bytes.
            size = f"{target.channels * lay.plane} * sizeof *arena"
            self.calls.append(f"    memset({lay.at()}, {self._zero(target)}, {size});")

    def _out(self, call: Call, target: Map, *, vector: bool = False, after: str = "") -> None:
        """Add where a step writes, and the C for one element of it.

        Args:
            call: The step's call.
            target: The step's map.
            vector: One element a channel.
            after: C that is added to the address.
        """
        lay = self.memory.of(target)
        call.take(f"{self.element} *out", lay.at(lay.origin) + after)
        if vector and lay.plane == 1:
            self.place = "out[o]"
            return
        call.take("int out_plane", lay.plane)
        self.place = "out[(ptrdiff_t)o * out_plane]"
        if not vector:
            call.take("int out_pitch", lay.pitch)
            self.place = "out[(ptrdiff_t)o * out_plane + (ptrdiff_t)row * out_pitch + column]"

    def _finish(self, call: Call, step: Step) -> None:
        """Add what is done to a sum before it is written."""
        if self.quantisation:
            low, high = self.quantisation.range(step)
            addition = self.quantisation.additions.get(id(step))
            target = self.place
            if addition:
                target = f"const {self.element} own"
            if isinstance(step, Convolution | Linear | Reduce):
                call.take("int zero", self.quantisation.own(step)[1])
                call.take("int low", low)
                call.take("int high", high)
                call.lines.append(f"{target} = requantise(v + bias_o, scale_o, zero, low, high);")
                self.functions.need("requantise", _render("requantise.c", type=self.element))
            # Pools and moves keep the scale of what they read, so there is nothing to requantise.
            elif (low, high) == self.quantisation.bounds:
                call.lines.append(f"{target} = ({self.element})v;")
            else:
                call.take("int low", low)
                call.take("int high", high)
                call.lines.append(f"{target} = ({self.element})(v < low ? low : v > high ? high : v);")
            if addition:
                self._add(call, step, addition)
            return
        if isinstance(step, Convolution | Linear) and [op.kind for op in step.chain] in ([], ["Relu"]):
            # A parameter, so that layers with it and without share a function.
            call.take("int relu", len(step.chain))
            call.lines += ["if (relu && BELOW_ZERO(v))", "    v = 0;"]
        else:
            _ScalarChain(call, self).write(step.chain)
        call.lines.append(f"{self.place} = v;")

    def _add(self, call: Call, step: Step, addition: Addition) -> None:
        """Add another map to the integer ``own``."""
        assert self.quantisation is not None  # noqa: S101  # the caller asked for it
        operand = next(op.operand for op in step.chain if op.operand is not None)
        other = _ScalarChain(call, self).operand(operand, "0", zero=addition.zero)
        unsigned = f" + {addition.unsigned}" if addition.unsigned else ""
        values = [(f"own{unsigned}", "factor"), (f"{other}{unsigned}", "factor0")]
        first, second = values if addition.first else values[::-1]
        low, high = self.quantisation.range(step, added=True)
        for name, number in (("factor", addition.factor), ("factor0", addition.other), ("offset", addition.offset)):
            call.take(f"int64_t {name}", f"INT64_C({number})")
        for name, number in (("places", addition.shift), ("lowest", low), ("highest", high)):
            call.take(f"int {name}", number + (addition.unsigned if name != "places" else 0))
        call.lines.append(
            f"{self.place} = ({self.element})(added({second[0]}, {second[1]}, offset, {first[0]}, {first[1]}, places, "
            f"lowest, highest){f' - {addition.unsigned}' if addition.unsigned else ''});"
        )
        self.functions.need("added", _render("added.c"))

    # Steps ------------------------------------------------------------------------------------------------------------

    def _emit_input(self) -> None:
        """Bring the input to where the layers read it: as it is, into the arena, or as integers."""
        m, lay = self.plan.maps[0], self.memory.layouts[0]
        upper = self.name.upper()
        target = lay.at(lay.origin) if self.memory.staged else f"arena + {self.memory.input_base}"
        arguments = f"input, {target}, {m.channels}, {m.height}, {m.width}, {lay.plane}, {lay.pitch}"
        staged = _render("stage.c", type=self.element)
        if self.memory.staged:
            self._clear(m)
        if self.quantisation is None:
            if self.memory.staged:
                self.functions.need("stage", staged)
                self.calls.append(f"    stage({arguments});")
            return
        given, last = self.quantisation.maps[m.start], self.memory.output_map
        left = self.quantisation.maps[last.start] if last else given  # one of several maps is refused below
        low, high = self.quantisation.bounds
        rounded = _render(
            "quantise.c", type=self.element, low=low, high=high, input=_Numbers(*given), output=_Numbers(*left)
        )
        self.functions.need("quantise", f"#ifndef {upper}_QUANTIZED_IO\n{rounded}#endif\n")
        integers, floats = [f"    stage({arguments});"], [f"    quantise({arguments});"]
        if self.memory.staged:
            self.functions.need("stage", f"#ifdef {upper}_QUANTIZED_IO\n{staged}#endif\n")
        else:
            integers = [f"    const {self.element} *const in = input;"]
            floats.insert(0, f"    const {self.element} *const in = {target};")
        self.calls += [f"#ifdef {upper}_QUANTIZED_IO", *integers, "#else", *floats, "#endif"]

    def _emit_output(self) -> None:
        target = self.memory.output_map
        size = self.plan.output.size
        if self.quantisation:
            assert target is not None  # noqa: S101  # quantised.py has seen to it
            places = self.memory.address(self.plan.output.ravel())
            if not is_run(places):
                raise UnsupportedModelError("the output is no run of one map: q8 takes networks that end in a layer")
            self.calls += [
                f"\n#ifdef {self.name.upper()}_QUANTIZED_IO",
                f"    memcpy(output, arena + {places[0]}, {size});",
                "#else",
                f"    expand(arena + {places[0]}, output, {size});",
                "#endif",
            ]
            return
        if target is not None and self.memory.of(target).pointer == "output":
            return
        places = self.memory.address(self.plan.output.ravel())
        if is_run(places):
            self.calls.append(f"    memcpy(output, arena + {places[0]}, {size} * sizeof *output);")
            return
        self.index = len(self.plan.steps)
        call = Call()
        call.take(f"const {self.element} *in", "arena")
        # The output is no map of the plan, but move.c wants the shape of one.
        fake = Map("output", 1, 1, size, 0)
        self._move(call, fake, places, pitch=0, step=0, planes=False)
        call.take("float *out", "output")
        call.lines.append("out[column] = v;")
        self._call(self._moved(call, places, planes=False), call)

    def _move(self, call: Call, target: Map, places: NDArray[np.int64], *, pitch: int, step: int, planes: bool) -> None:
        """Add the parameters of move.c."""
        found, kind, _ = _places(places)
        call.take(f"const {kind} *places", self.tables.add(f"places_{self.index}", found))
        call.take("int outputs", target.channels)
        call.take("int height", target.height)
        call.take("int width", target.width)
        if planes:
            call.take("int pitch", pitch)
            call.take("int step", step)

    def _moved(self, call: Call, places: NDArray[np.int64], *, planes: bool, zero: int = 0) -> str:
        _, kind, zeros = _places(places)
        return self._instance(
            "move.c", "move", call, planes=planes, zeros=zeros, place=kind, read=_READ[kind], zero=zero
        )

    def emit_move(self, step: Move) -> None:
        call = Call()
        call.take(f"const {self.element} *in", "arena")
        planes = self.plan.planes(step.source)
        pitches = {self.memory.layouts[k].pitch for k in self.plan.sources(step.source)}
        whole = planes is not None and len(pitches) == 1
        places = self.memory.address(step.source[:, 0, 0] if whole else step.source.ravel())
        pitch = next(iter(pitches)) * planes.dy if planes is not None and whole else 0
        dx = planes.dx if planes is not None else 1
        self._move(call, step.out, places, pitch=pitch, step=dx, planes=whole)
        self._out(call, step.out)
        self._finish(call, step)
        zero = self.quantisation.own(step)[1] if self.quantisation else 0
        self._call(self._moved(call, places, planes=whole, zero=zero), call)

    def emit_constant(self, step: Constant) -> None:
        lay = self.memory.of(step.out)
        if self.quantisation:
            self._refuse(step, "q8 has no tables of constants between layers")
        values = self.tables.add(f"constant_{self.index}", step.values.astype(np.float32))
        function = self.functions.share(
            _render("constant.c", stored="float", element="float", read="ROM_FLOAT"), "constant"
        )
        m = step.out
        sizes = f"{m.channels}, {m.height}, {m.width}, {lay.plane}, {lay.pitch}"
        self.calls.append(f"    {function}({values}, {lay.at(lay.origin)}, {sizes});")

    def emit_pool(self, step: Pool) -> None:
        if self.quantisation and step.kind != "max":
            self._refuse(step, "q8 has no average of windows, only of whole planes")
        lay = self.memory.source(step.source)
        call = Call()
        self._in_planes(call, step, lay)
        call.take("int outputs", step.out.channels)
        call.take("int height", step.out.height)
        call.take("int width", step.out.width)
        self._out(call, step.out)
        self._finish(call, step)
        # A window may lie partly in the padding, which does not count: the start must not be greater than any number.
        lowest = (
            "-128"
            if self.quantisation and self.quantisation.bounds[0] < 0
            else "0"
            if self.quantisation
            else "-3.402823466e+38f"
        )
        name = self._instance(
            "pool.c", f"pool_{step.kind.partition('-')[0]}", call, kind=step.kind,
            title="Greatest" if step.kind == "max" else "Mean", kernel=step.kernel, strides=step.strides,
            pads=step.pads, dilations=step.dilations, size=step.source.shape[1:],
            start=lowest if step.kind == "max" else "0", share=literal(1 / math.prod(step.kernel)),
        )  # fmt: skip
        self._call(name, call)

    def emit_reduce(self, step: Reduce) -> None:
        lay = self.memory.source(step.source)
        call = Call()
        self._in_planes(call, step, lay)
        call.take("int outputs", step.out.channels)
        call.take("int height", step.source.shape[1])
        call.take("int width", step.source.shape[2])
        self._out(call, step.out, vector=True)
        if self.quantisation:
            if step.kind == "sum":
                self._refuse(step, "q8 has no sums of planes, only means")
            multiplier, shift, bias = self.quantisation.mean(step, self.plan.maps[self.plan.sources(step.source)[0]])
            call.take("uint32_t scale_o", multiplier | shift << 24)
            call.take("int32_t bias_o", bias)
        self._finish(call, step)
        name = self._instance(
            "reduce.c", f"reduce_{step.kind}", call, kind=step.kind, title=step.kind.capitalize(),
            start="in[0]" if step.kind == "max" else "0",
        )  # fmt: skip
        self._call(name, call)

    def emit_softmax(self, step: Softmax) -> None:
        call = Call()
        first = self.memory.address(step.source.ravel()[:1])[0]
        which = self.plan.sources(step.source)[0]
        call.take("const float *in", replace(self.memory.layouts[which], base=0).at(int(first)))
        call.take("int outputs", step.source.shape[0])
        call.take("int width", step.source.shape[2])
        self._out(call, step.out)
        self._finish(call, step)
        self._call(self._instance("softmax.c", "softmax", call, logarithm=step.logarithm), call)

    def _in_planes(self, call: Call, step: Pool | Reduce, lay: Layout) -> None:
        """Add where a step reads planes, which must follow each other."""
        planes = self.plan.planes(step.source)
        assert planes is not None  # noqa: S101  # regular() has seen to it
        channels = planes.channels
        if not np.array_equal(channels, channels[0] + np.arange(len(channels))):
            self._refuse(step, "it pools channels that do not follow each other")
        call.take(f"const {self.element} *in", lay.at(lay.origin + int(channels[0]) * lay.plane))
        call.take("int plane", lay.plane)
        call.take("int pitch", lay.pitch)

    # Layers with weights ----------------------------------------------------------------------------------------------

    def emit_linear(self, step: Linear) -> None:
        used = self.plan.sources(step.source)
        places = self.memory.address(step.source)
        lay = self.memory.layouts[used[0]] if used else Layout(1, 1)
        weight, bias = self._weights(step)
        kept = places >= 0
        first = int(places[kept].min()) if kept.any() else 0
        found = of_linear(weight, np.where(kept, places - first, -1), self.code, dense=self.dense)
        call = Call()
        call.take(f"const {self.element} *in", replace(lay, base=0).at(first))
        count_type = self._position_tables(call, found)
        if found.form == "dense":
            call.take("int inputs", weight.shape[1])
        call.take("int outputs", len(weight))
        self._value_tables(call, step, found, bias, positions=1)
        self._out(call, step.out, vector=True)
        self._finish(call, step)
        name = self._instance(
            "linear.c", f"linear_{found.form}", call, form=found.form, count=count_type, factor=self._factor,
            fetch=_FETCH["pairs" if found.form == "pairs" else self.code].replace("value++", "values++"),
        )  # fmt: skip
        self._call(name, call)

    def emit_convolution(self, step: Convolution) -> None:
        self._convolve(step, self.memory.source(step.source))

    def _convolve(self, step: Convolution, source: Layout, *, part: _Part | None = None, indent: str = "    ") -> None:
        # In one piece, because the order in which ``call`` takes parameters is the order of the C function's arguments,
        # which the template repeats.
        weight, bias = self._weights(step)
        groups, (per_group, *kernel) = step.groups, weight.shape[1:]
        found = self._connections(step, source, shared=_shape(step) in self.with_gaps)
        height, width = step.extent
        if step.pool:
            height, width = step.out.height * 2, step.out.width * 2
        tall, wide = _tile(part.fewest if part else height, width, pool=step.pool, integers=bool(self.quantisation))
        call = Call()
        origin = source.origin - step.pads[0] * source.pitch - step.pads[1]
        call.take(f"const {self.element} *in", f"{source.at(origin)}{part.read if part else ''}")
        single, pairs = found.form in {"elements", "pairs"}, found.form == "pairs"
        if not single:
            call.take("int plane", source.plane)
        call.take("int pitch", source.pitch)
        call.take("int height", part.height if part else height)
        call.take("int width", width)
        count_type = self._position_tables(call, found)
        if found.form == "dense":
            call.take("int inputs", per_group)
        call.take("int outputs", len(weight))
        grouped = groups > 1 and not single
        if grouped:
            call.take("int members", len(weight) // groups)
            call.take("ptrdiff_t group", per_group * source.plane)
        self._value_tables(call, step, found, bias, positions=height * width)
        self._out(call, step.out, after=part.write if part else "")
        self._finish(call, step)
        name = self._instance(
            "conv.c", f"conv_{kernel[0]}x{kernel[1]}_{found.form}", call, form=found.form, pool=step.pool,
            count=count_type, stored="uint8_t" if pairs else _STORED[self.code], groups=grouped,
            nibbles=self.code == "codebook16" and not pairs, factor=self._factor,
            fetch=_FETCH["pairs" if pairs else self.code], times_plane="" if single else " * plane",
            **_window(step, (1, 1) if single else (kernel[0], kernel[1]), tall, wide),
        )  # fmt: skip
        self._call(name, call, indent)

    @property
    def _factor(self) -> str:
        return "int" if self.quantisation else "float"

    def _weights(self, step: Convolution | Linear) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return weights and biases as they are computed with: integers for q8, floats as decoded for the others."""
        if self.quantisation:
            return self.quantisation.weights[id(step)][:2]
        return step.weight, step.bias

    def _position_tables(self, call: Call, found: Connections) -> str:
        """Add the tables of counts and gaps; return the macro that reads a count."""
        if found.form == "dense":
            return ""
        c_type = C_TYPES[f"u{found.counts.itemsize}"]
        call.take(f"const {c_type} *counts", self.tables.add(f"counts_{self.index}", found.counts))
        if found.form != "pairs":
            call.take("const uint8_t *gaps", self.tables.add(f"gaps_{self.index}", found.gaps))
        return _READ[c_type]

    def _value_tables(
        self, call: Call, step: Convolution | Linear, found: Connections, bias: NDArray[Any], *, positions: int
    ) -> None:
        """Add the tables of values and biases, and the layer's row; ``positions`` is how often it is computed."""
        stored, decoding = found.values(step.weight)
        for name, code in (("scales", "int8"), ("centres", "codebook16")):
            if self.code == code:
                assert decoding is not None  # noqa: S101  # these two have one
                call.take(f"const float *{name}", self.tables.add(f"{name}_{self.index}", decoding))
        if self.code == "int8":
            call.channel.append("const float scale_o = ROM_FLOAT(scales + o);")
        call.take(f"const {_STORED[self.code]} *values", self.tables.add(f"values_{self.index}", stored))
        taken = 4 * len(bias) + (0 if decoding is None else decoding.nbytes)
        if self.quantisation:
            multiplier, shift = self.quantisation.requantisation(step)
            # A multiplier has 24 bits, so its shift fits on top of it.
            scales = multiplier | shift.astype(np.uint32) << 24
            call.take("const int32_t *biases", self.tables.add(f"biases_{self.index}", bias.astype(np.int32)))
            call.take("const uint32_t *scales", self.tables.add(f"scales_{self.index}", scales))
            call.channel += [
                "const int32_t bias_o = ROM_INT32(biases + o);",
                "const uint32_t scale_o = ROM_UINT32(scales + o);",
            ]
            taken += scales.nbytes
        else:
            call.take("const float *biases", self.tables.add(f"biases_{self.index}", bias.astype(np.float32)))
            call.channel.append("const float bias_o = ROM_FLOAT(biases + o);")
            call.lines.append("v = v * scale_o + bias_o;" if self.code == "int8" else "v += bias_o;")
        self.layers.append({
            "name": step.name, "form": found.form, "connections": found.connections,
            "macs": found.stored * positions, "bytes": stored.nbytes + taken + found.position_bytes,
        })  # fmt: skip

    def _emit_stripes(self, first: Convolution, second: Convolution) -> None:
        """Write the loop that runs two convolutions a row of the second at a time."""
        rows = self.memory.stripes[self.index]
        stripe, source, target = self.memory.of(first.out), self.memory.source(first.source), self.memory.of(second.out)
        step = second.strides[0] * (2 if second.pool else 1)
        height = 2 if first.pool else 1
        down = height * first.strides[0] * source.pitch
        at = f"{stripe.at()} + c * {stripe.plane}"
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
        self.scale, self.zero, self.parenthesised = literal(scale), zero, _parenthesised(zero)
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


def _window(step: Convolution, kernel: tuple[int, int], tall: int, wide: int) -> dict[str, Any]:
    """Return what conv.c is told of a tile of outputs and of the places that it reads, in C."""
    (dy, dx), (sy, sx) = step.dilations, step.strides
    names = "abcdefgh"[: tall * wide]
    places = []
    for name, (y, x) in zip(names, np.ndindex(tall, wide), strict=True):
        terms = [_rows(y * sy)] * (y > 0) + [str(x * sx)] * (x > 0)
        places.append((name, f"q[{' + '.join(terms) or '0'}]"))
    return {
        "kernel": kernel, "strides": step.strides, "dilations": step.dilations, "rows": tall, "columns": wide,
        "names": names, "places": places, "below": _rows(sy), "next_row": _rows(dy),
        # Neighbouring outputs read the same numbers, one column on: each is loaded once a row.
        "sliding": kernel[1] > 1 and sx == dx == 1 and tall <= 2,
        "note": f", stride {sy} x {sx}" if (sy, sx) != (1, 1) else "",
    }  # fmt: skip


def _rows(count: int) -> str:
    return f"{count} * pitch" if count > 1 else "pitch"


def _shape(step: Convolution) -> tuple[Any, ...]:
    """Return what two convolutions must have alike to share a function, whatever their sizes."""
    return step.weight.shape[2:], step.strides, step.dilations, step.groups > 1, step.pool


class _ScalarChain(Chain):
    """A chain as C on single floats."""

    def __init__(self, call: Call, generator: _Generator) -> None:
        super().__init__(call)
        self.generator = generator

    def number(self, value: float) -> str:
        return literal(value)

    def of_channel(self, name: str, array: NDArray[Any]) -> str:
        table = self.generator.tables.add(f"{name}_{self.generator.index}", array.astype(np.float32))
        self.call.take(f"const float *{name}", table)
        self.call.channel.append(f"const float {name}_o = ROM_FLOAT({name} + o);")
        return f"{name}_o"

    def operand(self, view: View, k: str, zero: int = 0) -> str:
        """Return the element of another map; ``zero`` is what stands for elements that are zeros."""
        generator, call = self.generator, self.call
        first = generator.memory.address(view[:, 0, 0])
        one = view.shape[1:] == (1, 1)
        planes = None if one else generator.plan.planes(view)
        pitches = {generator.memory.layouts[n].pitch for n in generator.plan.sources(view)}
        assert one or (planes is not None and len(pitches) == 1)  # noqa: S101  # the lowering copies others
        places, kind, zeros = _places(first)
        call.take(f"const {kind} *places{k}", generator.tables.add(f"places{k}_{generator.index}", places))
        call.channel.append(f"const {kind} place{k} = {_READ[kind]}(places{k} + o);")
        at = f"arena[place{k}]"
        if planes is not None:
            call.take(f"int pitch{k}", next(iter(pitches)) * planes.dy)
            at = f"arena[place{k} + (size_t)row * pitch{k} + (size_t)column * {planes.dx}]"
        # A chain may have several operands, and the function takes the arena once.
        if f"const {generator.element} *arena" not in call.parameters:
            call.take(f"const {generator.element} *arena", "arena")
        if zeros and zero:
            call.take(f"int zero{k}", zero)
        return f"(place{k} == ({kind})-1 ? {f'zero{k}' if zero else 0} : {at})" if zeros else at

    def if_negative(self, v: str, other: str) -> str:
        return f"{v} < 0 ? {other} : {v}"

    def gate(self, op: Op, k: str, v: str) -> None:
        self.call.lines += ["{", f"    float g{k} = {v};"]
        self.write(op.inner, f"g{k}", f"{k}_")
        self.call.lines += [f"    {v} *= g{k};", "}"]

    def extremum(self, op: Op, v: str, other: str) -> str:
        # The operand goes into a variable, for the comparison would read it twice.
        return f"{{ const float u = {other}; {v} = u {'>' if op.kind == 'Max' else '<'} {v} ? u : {v}; }}"

    def activation(self, kind: str, constants: tuple[float, ...], v: str) -> list[str]:
        expression = _EXPRESSIONS[kind].format(*map(literal, constants))
        applied = re.sub(r"\bv\b", v, expression)
        lines = [f"{v} = {applied};"]
        if kind == "HardSigmoid":
            lines.append(f"{v} = {v} < 0 ? 0 : {v} > 1 ? 1 : {v};")
        return lines


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


def _places(first: NDArray[np.int64]) -> tuple[NDArray[Any], str, bool]:
    """Return places in the smallest unsigned type, whose largest number stands for zeros, and whether there are any."""
    zeros = bool((first < 0).any())
    # Below and not at the largest number, which is kept free to mean a zero.
    kind = next(k for k in (np.uint8, np.uint16, np.uint32) if int(first.max(initial=0)) < np.iinfo(k).max)
    table = np.where(first < 0, np.iinfo(kind).max, first).astype(kind)
    return table, C_TYPES[f"u{table.dtype.itemsize}"], zeros


def _parenthesised(number: int) -> str:
    return f"({number})" if number < 0 else str(number)


def _describe(step: Step) -> str:
    kind = type(step).__name__.lower()
    chain = "".join(f", {op.kind}" for op in step.chain)
    pool = ", 2 x 2 max-pool" if isinstance(step, Convolution) and step.pool else ""
    return f"{kind}{chain}{pool}, to {times(step.out.shape)}"
