"""The back end for hosts: a plan becomes one C file for every length of vector, or for none.

Maps that convolutions of stride 1 read with padding have borders of zeros (memory.py), as wide as the widest of them
needs. The step that writes a map writes this layout, so that nothing is copied between two convolutions of stride 1;
strided ones read a copy. Kernels are the templates in kernels/: each call is an instance for its sizes, and equal
instances are shared. Which of them serves a convolution is decided in convolutions.py. The same plan gives the same
bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from relief_export.cgen.c_source import Call, Functions, Tables, comment, literal, render, times
from relief_export.cgen.chain import Chain
from relief_export.cgen.convolutions import CAPS, Choice, computed, longest, options, wants_no_sides
from relief_export.cgen.memory import Layout, Memory
from relief_export.cgen.plan import (
    Constant,
    Convolution,
    Linear,
    Move,
    Op,
    Plan,
    Planes,
    Pool,
    Reduce,
    Softmax,
    Step,
    View,
)
from relief_export.graph.arena import ArenaTensor, arena_bytes, place_best

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

_SLACK = 256
"""Floats at both ends of the arena: the last vector of a row may be read beyond its map, and is thrown away."""
_POOLING = (8, 4, 1)
"""Lengths of vectors in a pooled row: there is one for every length of row."""


class _Layout(Layout):
    @property
    def plane(self) -> int:
        # Planes a page apart would share the lines of a cache.
        size = super().plane
        return size + 16 if size % 256 == 0 else size


@dataclass(frozen=True)
class Program:
    """A generated program: the text of ``net.c`` without its tables, the tables, and what net.h says.

    Attributes:
        kernels: C functions in order of use. calls: Lines of ``net_run``. tables: name -> (C type, values).
        arena_bytes: Memory that the caller lends. functions: Activations used. caps: Lengths of vectors used.
        choices: One row a linear step: its name, the kernel that serves it, connections, multiply-adds.
    """

    kernels: tuple[str, ...]
    calls: tuple[str, ...]
    tables: dict[str, tuple[str, NDArray[Any]]]
    arena_bytes: int
    functions: frozenset[str]
    caps: tuple[int, ...]
    choices: tuple[dict[str, Any], ...]


class _Generator:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.memory = Memory(plan, [_Layout(m.height, m.width) for m in plan.maps])
        self.tables = Tables()
        self.functions = Functions()
        self.calls: list[str] = []
        self.activations: set[str] = set()
        self.caps: set[int] = set()
        self.choices: list[dict[str, Any]] = []
        self.external = False
        self.arena = 0
        self.index = 0
        self.temporary: dict[int, int] = {}
        self.chosen: dict[int, Choice] = {}

    # Layout and arena -------------------------------------------------------------------------------------------------

    def run(self) -> Program:
        # Fully connected layers find each element by a table, so they can read the caller's memory as it lies. All
        # others need the layout of the arena, and so do operands of chains: the input is copied for them.
        elsewhere = [self.plan.output]
        for step in self.plan.steps:
            elsewhere += [v for v in step.views() if not (isinstance(step, Linear) and v is step.source)]
        self.external = all(0 not in self.plan.sources(view) for view in elsewhere)
        self._lay_out()
        if self.external:  # the caller's memory is as ONNX has it
            lay = self.memory.layouts[0]
            self.memory.layouts[0] = Layout(lay.height, lay.width, pointer="input")
        self._place()
        if not self.external:
            self._emit_input()
        for index, step in enumerate(self.plan.steps):
            self.index = index
            _EMITTERS[type(step)](self, step)
        self._emit_output()
        return Program(
            tuple(self.functions.texts()), tuple(self.calls), self.tables.arrays, 4 * self.arena,
            frozenset(self.activations), tuple(cap for cap in (*CAPS, 1) if cap in self.caps), tuple(self.choices),
        )  # fmt: skip

    def _lay_out(self) -> None:
        """Give maps that are read together one shape of planes, and each the border that its convolutions need."""
        layouts = self.memory.layouts
        # A union of sets: A may be read with B here and B with C there, and then all three need one pitch.
        parent = list(range(len(layouts)))

        def root(k: int) -> int:
            while parent[k] != k:
                k = parent[k]
            return k

        borders: list[tuple[int, tuple[int, int, int, int]]] = []
        for step in self.plan.steps:
            elements = isinstance(step, Linear | Softmax)  # these read single elements, wherever they lie
            operands = [op.operand for op in step.chain if op.operand is not None]
            for view in operands if elements else step.views():
                planes = self.plan.planes(view)
                used = [] if planes is None else sorted({int(k) for k in planes.maps if k >= 0})
                for k in used[1:]:
                    parent[root(k)] = root(used[0])
                if used and isinstance(step, Convolution) and view is step.source and step.strides == (1, 1):
                    top, left, bottom, right = step.pads
                    if wants_no_sides(step):
                        left = right = 0
                    borders.append((used[0], (top, left, bottom, right)))
        # Only now are the sets final, so that a border reaches everything that is read together.
        for k, pads in borders:
            layouts[root(k)].widen(pads)
        for k, m in enumerate(self.plan.maps):
            shared = layouts[root(k)]
            layouts[k] = _Layout(m.height, m.width, shared.top, shared.left, shared.bottom, shared.right)

    def _place(self) -> None:
        """Give each map, and what single steps need for themselves, its place in the arena."""
        spans = self.plan.lifetimes()
        sizes = [m.channels * lay.plane for m, lay in zip(self.plan.maps, self.memory.layouts, strict=True)]
        # Times are shifted by one, for the input is written before the first step, at -1.
        tensors = [
            ArenaTensor(str(k), _bytes(sizes[k]), first + 1, last + 1)
            for k, (first, last) in spans.items()
            if k or not self.external
        ]
        for index, step in enumerate(self.plan.steps):
            size = self._choose(step).scratch(step, self._pitch(step)) if isinstance(step, Convolution) else 0
            if size:
                tensors.append(ArenaTensor(f"scratch {index}", _bytes(size), index + 1, index + 1))
        best = place_best(tensors)
        for tensor in best:
            at = _SLACK + tensor.offset // 4
            if tensor.name.startswith("scratch"):
                self.temporary[int(tensor.name.split()[1])] = at
            else:
                self.memory.layouts[int(tensor.name)].base = at
        self.arena = 2 * _SLACK + arena_bytes(best) // 4

    def _choose(self, step: Convolution) -> Choice:
        """Return the cheapest kernel for a convolution."""
        # Asked for the scratch memory first and for the code later: both must hear the same. Steps compare by identity.
        if id(step) not in self.chosen:
            pitch, sides = 0, True
            if step.strides == (1, 1):
                planes, _, pitch = self.planes(step.source)
                used = [self.memory.layouts[int(k)] for k in planes.maps if k >= 0]
                sides = all(lay.left >= step.pads[1] and lay.right >= step.pads[3] for lay in used)
            self.chosen[id(step)] = min(options(step, pitch, sides=sides), key=lambda option: option[0])[1]
        return self.chosen[id(step)]

    def _pitch(self, step: Convolution) -> int:
        """Return how far apart the rows are that a convolution reads."""
        packed = self._choose(step).packed
        return packed.pitch if packed else self.planes(step.source)[2]

    def planes(self, view: View) -> tuple[Planes, NDArray[np.int64], int]:
        """Return a view as planes, where each channel begins (-1: zeros), and the pitch of the rows."""
        planes = self.plan.planes(view)
        assert planes is not None  # noqa: S101  # the lowering has seen to it
        used = [int(k) for k in planes.maps if k >= 0]
        pitch = self.memory.layouts[used[0]].pitch if used else view.shape[2]
        return planes, self.memory.address(view[:, 0, 0]), pitch

    # Text -------------------------------------------------------------------------------------------------------------

    def _chain(self, step: Step, cap: int = 1) -> Call:
        """Return the call that a step begins with: what its chain needs, for vectors of so many lanes."""
        call = Call()
        _VectorChain(call, self, cap).write(step.chain)
        self.caps.add(cap)
        return call

    def _emit(  # noqa: PLR0917  # what all kernels have
        self, step: Step, note: str, template: str, stem: str, call: Call, source: str, tables: Sequence[str], /,
        **values: Any,  # noqa: ANN401
    ) -> None:  # fmt: skip
        """Append a step's call: of an instance of a template, which reads ``source`` and is given ``tables``."""
        lay = self.memory.of(step.out)
        text = render(
            template, name="NAME", channel=call.channel, lines=call.lines, out_plane=lay.plane, out_pitch=lay.pitch,
            parameters="".join(f", {p}" for p in call.parameters), **values,
        )  # fmt: skip
        function = self.functions.share(text, stem)
        self.calls.append(f"    /* {comment(step.name)}: {note} */")
        # At every run and just before the step, because maps share the arena and another may have used the border.
        if (lay.top, lay.left, lay.bottom, lay.right) != (0, 0, 0, 0):
            self.calls.append(
                f"    {self.functions.share(render('borders.c'), 'clear_borders')}(arena + {lay.base}, "
                f"{step.out.channels}, {lay.plane}, {lay.origin}, {lay.height}, {lay.width}, {lay.pitch});"
            )
        arguments = ", ".join([source, lay.at(lay.origin), *tables, *call.arguments])
        self.calls.append(f"    {function}({arguments});")

    # Steps ------------------------------------------------------------------------------------------------------------

    def _emit_input(self) -> None:
        m, lay = self.plan.maps[0], self.memory.layouts[0]
        step = Move(self.plan.input_name, m, m.view)
        cap = longest(lay.width)
        call = self._chain(step, cap)
        places = np.arange(m.channels, dtype=np.int32) * (m.height * m.width)
        self._emit(
            step, f"the input, {times(m.shape)}", "move.c", f"copy_{lay.height}x{lay.width}", call, "input",
            [self.tables.add("place_input", places)], title=f"Copy planes of {lay.height} x {lay.width}.",
            kind="planes", outputs=m.channels, height=lay.height, width=lay.width, cap=cap, pitch=lay.width, step=1,
        )  # fmt: skip

    def _emit_output(self) -> None:
        places = self.memory.address(self.plan.output)
        if (places >= 0).all() and np.array_equal(places, places[0] + np.arange(len(places))):
            self.calls.append(f"    memcpy(output, arena + {places[0]}, {len(places)} * sizeof *output);")
            return
        table = self.tables.add("place_output", places.astype(np.int32))
        self.calls += [
            f"    for (int i = 0; i < {len(places)}; i++)",
            f"        output[i] = {table}[i] < 0 ? 0.0f : arena[{table}[i]];",
        ]

    def emit_convolution(self, step: Convolution) -> None:
        choice = self._choose(step)
        kh, kw = step.weight.shape[2:]
        kept = step.kernels()
        connections = int(np.count_nonzero(kept[2]))
        first, places, weights = choice.entries(len(step.weight), kept, self._packed_reads(step, choice))
        base = int(places.min()) if places.size else 0
        places = places - base
        # Single weights need a place each, and short ones halve what is read beside the weights.
        short = choice.elements and (not places.size or places.max() < 1 << 16)
        height, width = computed(step)
        if step.pool:
            self.functions.share(render("pool_rows.c", caps=_POOLING), "pool_rows")
            self.caps |= {*_POOLING}
        call = self._chain(step, choice.cap)
        tables = [
            self.tables.add(f"first_{self.index}", first.astype(np.uint32)),
            self.tables.add(f"place_{self.index}", places.astype(np.uint16 if short else np.uint32)),
            self.tables.add(f"weight_{self.index}", weights.astype(np.float32)),
            self.tables.add(f"bias_{self.index}", step.bias.astype(np.float32)),
        ]
        if not choice.rows:
            self.caps.add(16)
            tables.insert(0, f"arena + {self.temporary[self.index] + choice.packed_size}")
        pitch = self._pitch(step)
        template, values = choice.template(step, pitch)
        what = "single weights" if choice.elements else f"{kh} x {kw}"
        window = f"{kh} x {kw}" + (f" by {times(step.strides)}" if step.strides != (1, 1) else "")
        note = (
            f"{times(step.source.shape)} -> {times((len(step.weight), *step.extent))}, {window}, {len(kept[0])} of "
            f"{len(step.weight) * step.weight.shape[1]} kernels, {connections} connections{_kinds(step)}"
        )
        self._emit(
            step, note + (", 2 x 2 max-pool" if step.pool else ""), template,
            f"conv_{'1x1' if choice.elements else f'{kh}x{kw}'}_{height}x{width}", call, f"arena + {base}", tables,
            title=f"Convolution of stride {times(step.strides)} to planes of {height} x {width}, {what}.",
            outputs=len(step.weight), height=height, width=width, pitch=pitch, cap=choice.cap,
            index="uint16_t" if short else "uint32_t", pool=step.pool, **values,
        )  # fmt: skip
        self.choices.append({
            "step": step.name, "kernel": choice.name, "connections": connections,
            "macs": connections * math.prod(step.extent),
        })  # fmt: skip

    def _packed_reads(self, step: Convolution, choice: Choice) -> NDArray[np.int64]:
        """Emit the packing, if any; return where each weight (channels, kh, kw) begins to read."""
        _, first, pitch = self.planes(step.source)
        used = np.unique(step.kernels()[1])
        packed = choice.packed
        if packed is None:
            return choice.reads(first, used, 0)
        at = self.temporary[self.index]
        if used.size:
            relative, base, _ = _places(first[used])
            self.caps |= {phase["cap"] for phase in packed.phases}
            text = render(
                "pack.c", name="NAME", title=f"Planes of {times(step.source.shape[1:])} for a stride of "
                f"{times(step.strides)}.", phases=packed.phases, plane=packed.plane, pitch=packed.pitch,
                from_pitch=pitch, sy=step.strides[0], sx=step.strides[1],
            )  # fmt: skip
            stem = f"pack_{times(step.strides, 'x')}_{times(step.source.shape[1:], 'x')}"
            function = self.functions.share(text, stem)
            table = self.tables.add(f"packed_{self.index}", relative)
            self.calls.append(f"    {function}(arena + {base}, arena + {at}, {table}, {len(used)});")
        return choice.reads(first, used, at)

    def emit_linear(self, step: Linear) -> None:
        address = self.memory.address(step.source)
        # A weight on a constant zero is no connection.
        weight = np.where(address >= 0, step.weight, np.float32(0))
        outputs, inputs = weight.shape
        connections = int(np.count_nonzero(weight))
        # A sparse row pays for its start, and each of its weights for a place. Dense ones pay for what they read.
        lines = -(-outputs // 16) * inputs
        sparse = not connections or connections + 8 * outputs <= _reading_weights(64 * lines) * lines
        read = np.flatnonzero(weight.any(axis=0))
        base = int(address[read].min()) if read.size else 0
        source = f"{'input' if self.external and 0 in self.plan.sources(step.source) else 'arena'} + {base}"
        call = self._chain(step)
        bias = self.tables.add(f"bias_{self.index}", step.bias)
        if sparse:
            rows = [np.flatnonzero(row) for row in weight]
            places = address[np.concatenate(rows)] - base if connections else np.zeros(0, np.int64)
            small = not places.size or places.max() < 1 << 16
            first = np.cumsum([0, *(len(row) for row in rows)])
            template, stem, title = "linear_sparse.c", f"linear_{outputs}", f"{outputs} sums."
            values: dict[str, Any] = {"index": "uint16_t" if small else "uint32_t"}
            tables = [
                self.tables.add(f"first_{self.index}", first.astype(np.uint32)),
                self.tables.add(f"place_{self.index}", places.astype(np.uint16 if small else np.uint32)),
                self.tables.add(f"weight_{self.index}", weight[weight != 0]),
            ]
        else:
            self.caps.add(16)
            places = address[read] - base
            gather = not np.array_equal(places, np.arange(len(read)))
            # Rows of zeros fill the last block, so that the loop needs no second version for what is left.
            blocks = np.zeros((-(-outputs // 16) * 16, len(read)), np.float32)
            blocks[:outputs] = weight[:, read]
            template, stem = "linear_dense.c", f"linear_{outputs}x{len(read)}"
            title = f"{outputs} sums of {len(read)} products."
            values = {"inputs": len(read), "gather": gather}
            tables = [self.tables.add(f"place_{self.index}", places.astype(np.uint32))] if gather else []
            tables.append(self.tables.add(f"weight_{self.index}", blocks.reshape(-1, 16, len(read)).transpose(0, 2, 1)))
        note = f"{inputs} -> {outputs}, {connections} connections{_kinds(step)}"
        self._emit(
            step, note, template, stem, call, source, [*tables, bias], title=title, outputs=outputs, **values
        )  # fmt: skip
        self.choices.append({
            "step": step.name, "kernel": "sparse rows" if sparse else "dense", "connections": connections,
            "macs": connections,
        })  # fmt: skip

    def emit_move(self, step: Move) -> None:
        planes = self.plan.planes(step.source)
        height, width = step.out.height, step.out.width
        kind = "elements" if planes is None else "planes"
        cap = longest(width) if planes is not None and planes.dx <= 2 else 1
        call = self._chain(step, cap)
        if planes is not None:
            found, first, pitch = self.planes(step.source)
            pitch, stride = pitch * found.dy, found.dx
        else:
            first, pitch, stride = self.memory.address(step.source).ravel(), 0, 1
        self._emit_from(
            step, times(step.out.shape) + _kinds(step), "move.c", f"move_{height}x{width}", call, first,
            title=f"Move {kind} to {height} x {width}.", kind=kind, outputs=step.out.channels, height=height,
            width=width, cap=cap, pitch=pitch, step=stride,
        )  # fmt: skip

    def emit_pool(self, step: Pool) -> None:
        _, first, pitch = self.planes(step.source)
        height, width = step.out.height, step.out.width
        self._emit_from(
            step, f"{times(step.source.shape)} -> {times(step.out.shape)}", "pool.c",
            f"pool_{times(step.kernel, 'x')}_{height}x{width}", self._chain(step), first,
            title=f"Pooling ({step.kind}) of {times(step.kernel)} to planes of {height} x {width}.", kind=step.kind,
            outputs=step.out.channels, height=height, width=width, pitch=pitch, in_height=step.source.shape[1],
            in_width=step.source.shape[2], kh=step.kernel[0], kw=step.kernel[1], sy=step.strides[0], sx=step.strides[1],
            top=step.pads[0], left=step.pads[1], dy=step.dilations[0], dx=step.dilations[1],
        )  # fmt: skip

    def emit_reduce(self, step: Reduce) -> None:
        _, first, pitch = self.planes(step.source)
        _, height, width = step.source.shape
        self._emit_from(
            step, f"{step.kind} of {times(step.source.shape)}", "reduce.c", f"{step.kind}_{height}x{width}",
            self._chain(step), first, title=f"The {step.kind} of planes of {height} x {width}.", kind=step.kind,
            outputs=step.out.channels, height=height, width=width, pitch=pitch,
        )  # fmt: skip

    def emit_softmax(self, step: Softmax) -> None:
        self.activations |= {"exp", "log"} if step.logarithm else {"exp"}
        rows, _, width = step.source.shape
        self._emit_from(
            step, times(step.out.shape), "softmax.c", f"softmax_{rows}x{width}", self._chain(step),
            self.memory.address(step.source).ravel(), title=f"Softmax of {rows} rows of {width}.", outputs=rows,
            width=width, logarithm=step.logarithm,
        )  # fmt: skip

    def _emit_from(  # noqa: PLR0917  # what all kernels have
        self, step: Step, note: str, template: str, stem: str, call: Call, first: NDArray[np.int64], /,
        **values: Any,  # noqa: ANN401
    ) -> None:  # fmt: skip
        """Append the call of a step that finds what it reads, a channel or an element each, by one table of places."""
        places, base, _ = _places(first)
        table = self.tables.add(f"place_{self.index}", places)
        self._emit(step, note, template, stem, call, f"arena + {base}", [table], **values)

    def emit_constant(self, step: Constant) -> None:
        lay = self.memory.of(step.out)
        values = np.zeros((step.out.channels, lay.plane), np.float32)
        inside = lay.origin + np.add.outer(np.arange(lay.height) * lay.pitch, np.arange(lay.width))
        values[:, inside] = step.values
        table = self.tables.add(f"constant_{self.index}", values)
        self.calls.append(f"    /* {comment(step.name)}: constants, {times(step.out.shape)} */")
        self.calls.append(f"    {{ const float *from = {table}; HIDE(from);")
        self.calls.append(f"      memcpy(arena + {lay.base}, from, sizeof {table}); }}")


_EMITTERS: dict[type[Step], Callable[[Any, Any], None]] = {
    Convolution: _Generator.emit_convolution,
    Linear: _Generator.emit_linear,
    Move: _Generator.emit_move,
    Pool: _Generator.emit_pool,
    Reduce: _Generator.emit_reduce,
    Softmax: _Generator.emit_softmax,
    Constant: _Generator.emit_constant,
}


class _VectorChain(Chain):
    """A chain as C on vectors of ``cap`` lanes."""

    def __init__(self, call: Call, generator: _Generator, cap: int) -> None:
        super().__init__(call)
        self.generator, self.cap = generator, cap

    def number(self, value: float) -> str:
        return f"splat_{self.cap}({literal(value)})"

    def of_channel(self, name: str, array: NDArray[Any]) -> str:
        table = self.generator.tables.add(f"{name}_{self.generator.index}", array)
        self.call.take(f"const float *RESTRICT {name}", table)
        return f"splat_{self.cap}({name}[o])"

    def operand(self, view: View, k: str) -> str:
        generator, cap = self.generator, self.cap
        if view.shape[1:] == (1, 1):
            first = generator.memory.address(view[:, 0, 0])
            loaded = f"splat_{cap}(*r{k})"
        else:
            planes, first, pitch = generator.planes(view)
            loaded = f"load_{cap}(r{k} + ROW * {pitch * planes.dy} + COLUMN)"
        place, base, zeros = _places(first)
        self.call.take(f"const float *RESTRICT operand{k}", f"arena + {base}")
        self.call.take(
            f"const int32_t *RESTRICT place{k}", generator.tables.add(f"operand_{generator.index}_{k}", place)
        )
        # Channels of zeros have no place in memory: only where there are some does the loop test for them.
        where = f"operand{k} + place{k}[o]"
        self.call.channel.append(
            f"const float *const r{k} = " + (f"place{k}[o] < 0 ? 0 : {where};" if zeros else f"{where};")
        )
        return f"(r{k} ? {loaded} : splat_{cap}(0.0f))" if zeros else loaded

    def if_negative(self, v: str, other: str) -> str:
        return f"choose_{self.cap}(less_{self.cap}({v}, splat_{self.cap}(0.0f)), {other}, {v})"

    def gate(self, op: Op, k: str, v: str) -> None:
        self.call.lines.append(f"{{ vec_{self.cap} g = {v};")
        self.write(op.inner, "g", f"{k}_")
        self.call.lines.append(f"{v} = {v} * g; }}")

    def extremum(self, op: Op, v: str, other: str) -> str:
        left, right = (other, v) if op.swapped else (v, other)
        return f"{v} = {op.kind.lower()}_{self.cap}({left}, {right});"

    def activation(self, kind: str, constants: tuple[float, ...], v: str) -> list[str]:
        # An infinite bound has no literal in C, and one comparison is enough for the other.
        if kind == "Clip" and math.isinf(constants[0]):
            return [f"{v} = min_{self.cap}({v}, {self.number(constants[1])});"]
        if kind == "Clip" and math.isinf(constants[1]):
            return [f"{v} = max_{self.cap}({v}, {self.number(constants[0])});"]
        self.generator.activations.add(kind)
        return [f"{v} = {kind}_{self.cap}({v}{''.join(f', {literal(c)}' for c in constants)});"]


def _kinds(step: Step) -> str:
    """Return a step's chain as its comment has it."""
    return "".join(f", {op.kind}" for op in step.chain)


def _places(first: NDArray[np.int64]) -> tuple[NDArray[np.int32], int, bool]:
    """Return places relative to the smallest, that one, and whether there are zeros, which stay -1."""
    used = first[first >= 0]
    base = int(used.min()) if used.size else 0
    return np.where(first >= 0, first - base, -1).astype(np.int32), base, bool((first < 0).any())


def _reading_weights(size: int) -> float:
    """Return the weights of a sparse row that take as long as a line of dense ones, of tables of so many bytes.

    Measured (benchmarks/c_layers.py): what is larger than the second or the third cache comes from beyond it.
    """
    return next((cost for limit, cost in ((1 << 20, 1.6), (32 << 20, 2.2)) if size <= limit), 4.8)


def _bytes(floats: int) -> int:
    """Return the bytes of so many floats, in whole lines of a cache."""
    return -(-floats // 16) * 64


def generate(plan: Plan) -> Program:
    """Return the host program of a plan."""
    return _Generator(plan).run()
