"""The back end for hosts: a plan becomes one C file for every length of vector, or for none.

Layout. A map lies in the arena plane by plane. Where convolutions of stride 1 read it with padding, each plane has a
border of zeros as wide as the widest of them needs: rows are ``pitch`` apart, and the gap between two rows is the right
border of the one and the left border of the other::

    element (c, y, x)  at  base + c·plane + origin + y·pitch + x          pitch = width + max(left, right)

The step that writes a map writes this layout, so that nothing is copied between two convolutions of stride 1. Strided
ones read a copy in which each plane is split by row and column modulo the stride (``pack.c``).

Kernels are the Jinja templates in kernels/: each call is an instance for its sizes, and equal instances are shared.
Which of them serves a layer is decided by ``_choose``, from costs in cycles of a core with two multiply-adds and two
loads a cycle, at 8 lanes and at 16, because one file serves both. The same plan gives the same bytes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from relief_export.cgen.plan import (
    Constant,
    Convolution,
    Linear,
    Map,
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
from relief_export.graph.arena import ArenaTensor, arena_bytes, place

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

KERNELS = Path(__file__).parent / "kernels"
_SLACK = 256
"""Floats at both ends of the arena: the last vector of a row may be read beyond its map, and is thrown away."""
_TILE = 8
"""Vectors of sums that stay in registers."""
_LANES = (8, 16)
"""Lanes for which kernels are chosen: their costs are added."""
_SUMS = 12
"""Vectors of sums of ``conv_sums.c``, which needs a register for each column of the kernel besides."""
_CAPS = (16, 8, 4)
_POOLING = (8, 4, 1)
"""Lengths of vectors in a pooled row: there is one for every length of row."""
_MARGIN = 16
"""Floats before the first sum of conv_sums.c: columns to the left of the plane are read, and thrown away."""

_SYMBOLS = {"Add": "+", "Sub": "-", "Mul": "*", "Div": "/"}


@dataclass
class _Layout:
    """Where the elements of a map lie, in floats; ``base`` is the start of the map in the arena."""

    height: int
    width: int
    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0
    base: int = 0

    @property
    def pitch(self) -> int:
        return self.width + max(self.left, self.right)

    @property
    def origin(self) -> int:
        return self.top * self.pitch + self.left

    @property
    def plane(self) -> int:
        # The right border of the last row reaches beyond the last pitch by as much as the left border takes.
        size = (self.top + self.height + self.bottom) * self.pitch + self.left
        return size + 16 if size % 256 == 0 else size  # planes a page apart would share the lines of a cache

    @property
    def bordered(self) -> bool:
        return self.plane != self.height * self.width

    def widen(self, top: int, left: int, bottom: int, right: int) -> None:
        self.top, self.left = max(self.top, top), max(self.left, left)
        self.bottom, self.right = max(self.bottom, bottom), max(self.right, right)


@dataclass
class _Tables:
    """Constants of the program: C declarations, in order of use, without repetitions."""

    names: dict[tuple[str, bytes], str] = field(default_factory=dict)
    arrays: dict[str, tuple[str, NDArray[Any]]] = field(default_factory=dict)

    def add(self, stem: str, array: NDArray[Any]) -> str:
        """Return the name of a constant array; its C type follows from its dtype."""
        array = np.ascontiguousarray(array)
        kind = {"f": "float", "u2": "uint16_t", "u4": "uint32_t", "i4": "int32_t"}[
            "f" if array.dtype.kind == "f" else f"{array.dtype.kind}{array.dtype.itemsize}"
        ]
        # By content: equal layers, and layers with equal masks, share a table.
        key = (kind, array.tobytes())
        if key not in self.names:
            self.names[key] = stem
            self.arrays[stem] = (kind, array)
        return self.names[key]


@dataclass
class _Chain:
    """A chain of elementwise operations as C: parameters and arguments, lines once a channel, lines for each vector."""

    parameters: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    channel_lines: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Program:
    """A generated program: the text of ``net.c`` without its tables, the tables, and what net.h says.

    Attributes:
        kernels: C functions in order of use, called NAME. names: What each is called.
        calls: Lines of ``net_run``. tables: name -> (C type, values).
        arena_bytes: Memory that the caller lends. functions: Activations used. caps: Lengths of vectors used.
        choices: One row a linear step: its name, the kernel that serves it, connections, multiply-adds.
    """

    kernels: tuple[str, ...]
    names: dict[str, str]
    calls: tuple[str, ...]
    tables: dict[str, tuple[str, NDArray[Any]]]
    arena_bytes: int
    functions: frozenset[str]
    caps: tuple[int, ...]
    choices: tuple[dict[str, Any], ...]


@cache
def _environment() -> jinja2.Environment:
    # Strict, because a misspelt name would otherwise vanish from the C without a word.
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(KERNELS), trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True, autoescape=False,  # noqa: S701  # C is no HTML
    )  # fmt: skip


def render(template: str, **values: object) -> str:
    """Fill in one of the files of kernels/."""
    return _environment().get_template(template).render(values)


class _Generator:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.layouts = [_Layout(m.height, m.width) for m in plan.maps]
        self.numbers = {m.start: k for k, m in enumerate(plan.maps)}
        self.tables = _Tables()
        self.instances: dict[str, str] = {}
        self.names: set[str] = set()
        self.calls: list[str] = []
        self.functions: set[str] = set()
        self.caps: set[int] = set()
        self.choices: list[dict[str, Any]] = []
        self.external = False
        self.arena = 0
        self.index = 0
        self.temporary: dict[int, int] = {}
        self.chosen: dict[int, _Choice] = {}

    # Layout and arena -------------------------------------------------------------------------------------------------

    def run(self) -> Program:
        # Fully connected layers find each element by a table, so they can read the caller's memory as it lies. All
        # others need the layout of the arena, and the input is copied for them.
        self.external = all(
            isinstance(step, Linear) or not self._reads_input(view)
            for step in self.plan.steps
            for view in step.views()
        ) and not self._reads_input(self.plan.output)  # fmt: skip
        self._lay_out()
        self._place()
        if not self.external:
            self._emit_input()
        for index, step in enumerate(self.plan.steps):
            self.index = index
            _EMITTERS[type(step)](self, step)
        self._emit_output()
        return Program(
            tuple(self.instances), self.instances, tuple(self.calls), self.tables.arrays, 4 * self.arena,
            frozenset(self.functions), tuple(cap for cap in (*_CAPS, 1) if cap in self.caps), tuple(self.choices),
        )  # fmt: skip

    def _reads_input(self, view: View) -> bool:
        return bool((self.plan.locate(view)[0] == 0).any())

    def _lay_out(self) -> None:
        """Give maps that are read together one shape of planes, and each the border that its convolutions need."""
        # A union of sets: A may be read with B here and B with C there, and then all three need one pitch.
        parent = list(range(len(self.layouts)))

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
                    if _wants_no_sides(step):
                        left = right = 0
                    borders.append((used[0], (top, left, bottom, right)))
        # Only now are the sets final, so that a border reaches everything that is read together.
        for k, pads in borders:
            self.layouts[root(k)].widen(*pads)
        for k, m in enumerate(self.plan.maps):
            shared = self.layouts[root(k)]
            self.layouts[k] = _Layout(m.height, m.width, shared.top, shared.left, shared.bottom, shared.right)

    def _place(self) -> None:
        """Give each map, and what single steps need for themselves, its place in the arena."""
        spans = self.plan.lifetimes()
        sizes = [m.channels * lay.plane for m, lay in zip(self.plan.maps, self.layouts, strict=True)]
        # Times are shifted by one, for the input is written before the first step, at -1.
        tensors = [
            ArenaTensor(str(k), _bytes(sizes[k]), first + 1, last + 1)
            for k, (first, last) in spans.items()
            if k or not self.external
        ]
        for index, step in enumerate(self.plan.steps):
            size = _scratch(self, step)
            if size:
                tensors.append(ArenaTensor(f"scratch {index}", _bytes(size), index + 1, index + 1))
        # Placing is greedy, and which order packs best depends on the network.
        best = min(
            (place(sorted(tensors, key=key)) for key in (
                lambda t: (-t.bytes, t.first, t.name),
                lambda t: (-t.bytes * (t.last - t.first + 1), t.first, t.name),
                lambda t: (t.first, -t.bytes, t.name),
            )),
            key=arena_bytes,
        )  # fmt: skip
        for tensor in best:
            at = _SLACK + tensor.offset // 4
            if tensor.name.startswith("scratch"):
                self.temporary[int(tensor.name.split()[1])] = at
            else:
                self.layouts[int(tensor.name)].base = at
        self.arena = 2 * _SLACK + arena_bytes(best) // 4

    def layout(self, target: Map) -> _Layout:
        return self.layouts[self.numbers[target.start]]

    def address(self, view: View) -> NDArray[np.int64]:
        """Return for each element its place in the arena, in floats; -1 for zeros."""
        which, inside = self.plan.locate(view)
        maps = self.plan.maps
        table = np.array([(m.height * m.width, m.width) for m in maps])
        ours = np.array([(lay.base + lay.origin, lay.plane, lay.pitch) for lay in self.layouts])
        if self.external:
            ours[0] = 0, self.layouts[0].height * self.layouts[0].width, self.layouts[0].width
        # An index of -1 reads the last map's row here; the last line of this method replaces what comes of it.
        size, width = table[which, 0], table[which, 1]
        channel, rest = np.divmod(inside, size)
        y, x = np.divmod(rest, width)
        found = ours[which, 0] + channel * ours[which, 1] + y * ours[which, 2] + x
        return np.where(which >= 0, found, -1)

    def planes(self, view: View) -> tuple[Planes, NDArray[np.int64], int]:
        """Return a view as planes, where each channel begins (-1: zeros), and the pitch of the rows."""
        planes = self.plan.planes(view)
        assert planes is not None  # noqa: S101  # the lowering has seen to it
        used = [int(k) for k in planes.maps if k >= 0]
        pitch = self.layouts[used[0]].pitch if used else view.shape[2]
        return planes, self.address(view[:, 0, 0]), pitch

    # Text -------------------------------------------------------------------------------------------------------------

    def instance(self, template: str, stem: str, **values: Any) -> str:  # noqa: ANN401
        """Return the name of a template's instance, which is shared with equal ones."""
        # Rendered under a placeholder: with names in them equal functions would look different.
        text = render(template, name="NAME", **values)
        if text not in self.instances:
            name = stem
            k = 2
            while name in self.names:
                name, k = f"{stem}_{k}", k + 1
            self.names.add(name)
            self.instances[text] = name
        return self.instances[text]

    def call(self, step: Step, note: str, function: str, *arguments: str) -> None:
        self.calls.append(f"    /* {comment(step.name)}: {note} */")
        layout = self.layout(step.out)
        # At every run and just before the step, because maps share the arena and another may have used the border.
        if layout.bordered and not isinstance(step, Constant):
            self._clear(step.out)
        self.calls.append(f"    {function}({', '.join(arguments)});")

    def _clear(self, target: Map) -> None:
        lay = self.layout(target)
        # Planes may be longer than their rows only to keep them off one line of the cache; nothing reads that rest.
        if (lay.top, lay.left, lay.bottom, lay.right) == (0, 0, 0, 0):
            return
        text = render("borders.c")
        self.instances.setdefault(text, "clear_borders")
        self.calls.append(
            f"    clear_borders(arena + {lay.base}, {target.channels}, {lay.plane}, {lay.origin}, {lay.height}, "
            f"{lay.width}, {lay.pitch});"
        )

    def out(self, step: Step) -> tuple[str, dict[str, int]]:
        """Return the argument for a step's map and what templates say of it."""
        lay = self.layout(step.out)
        return f"arena + {lay.base + lay.origin}", {"out_plane": lay.plane, "out_pitch": lay.pitch}

    def chain(self, step: Step, cap: int) -> _Chain:
        chain = _Chain()
        for k, op in enumerate(step.chain):
            self._link(chain, op, cap, k, "v")
        self.caps.add(cap)
        return chain

    def _link(self, chain: _Chain, op: Op, cap: int, k: int, v: str) -> None:
        """Append one operation on the variable ``v``."""
        if op.kind == "Affine":
            factor = self._numbers(chain, f"scale{k}", op.scale, cap, neutral=1)
            shift = self._numbers(chain, f"shift{k}", op.shift, cap, neutral=0)
            right = f"{v} * {factor}" if factor else v
            chain.lines.append(f"{v} = {right} + {shift};" if shift else f"{v} = {right};")
        elif op.kind == "PRelu":
            slope = self._numbers(chain, f"slope{k}", op.scale, cap, neutral=None)
            chain.lines.append(f"{v} = choose_{cap}(less_{cap}({v}, splat_{cap}(0.0f)), {v} * {slope}, {v});")
        elif op.kind == "Gate":
            chain.lines.append(f"{{ vec_{cap} g = {v};")
            for n, inner in enumerate(op.inner):
                # Numbers far from the chain's own, so that parameters of inner operations never share a name with them.
                self._link(chain, inner, cap, 100 * (k + 1) + n, "g")
            chain.lines.append(f"{v} = {v} * g; }}")
        elif op.operand is not None:
            other = self._operand(chain, op.operand, cap, k)
            left, right = (other, v) if op.swapped else (v, other)
            symbol = _SYMBOLS.get(op.kind)
            function = f"{op.kind.lower()}_{cap}({left}, {right})"
            chain.lines.append(f"{v} = {left} {symbol} {right};" if symbol else f"{v} = {function};")
        # An infinite bound has no literal in C, and one comparison is enough for the other.
        elif op.kind == "Clip" and math.isinf(op.constants[0]):
            chain.lines.append(f"{v} = min_{cap}({v}, splat_{cap}({literal(op.constants[1])}));")
        elif op.kind == "Clip" and math.isinf(op.constants[1]):
            chain.lines.append(f"{v} = max_{cap}({v}, splat_{cap}({literal(op.constants[0])}));")
        else:
            self.functions.add(op.kind)
            arguments = "".join(f", {literal(c)}" for c in op.constants)
            chain.lines.append(f"{v} = {op.kind}_{cap}({v}{arguments});")

    def _numbers(self, chain: _Chain, name: str, array: NDArray[Any] | None, cap: int, *, neutral: float | None) -> str:
        """Return the C for one number a channel: a literal where all are equal, empty where they are neutral."""
        assert array is not None  # noqa: S101  # these operations have it
        first = float(array[0])
        if (array == first).all():
            return "" if first == neutral else f"splat_{cap}({literal(first)})"
        chain.parameters.append(f"const float *RESTRICT {name}")
        chain.arguments.append(self.tables.add(f"{name}_{self.index}", array))
        return f"splat_{cap}({name}[o])"

    def _operand(self, chain: _Chain, view: View, cap: int, k: int) -> str:
        """Return the C for what a chain combines with."""
        if view.shape[1:] == (1, 1):
            first = self.address(view[:, 0, 0])
            load = "splat_%d(*r%d)"
        else:
            planes, first, pitch = self.planes(view)
            pitch *= planes.dy
            load = f"load_%d(r%d + ROW * {pitch} + COLUMN)"
        place, base, _ = self._places(first)
        chain.parameters += [f"const float *RESTRICT operand{k}", f"const int32_t *RESTRICT place{k}"]
        chain.arguments += [f"arena + {base}", self.tables.add(f"operand_{self.index}_{k}", place)]
        # Channels of zeros have no place in memory: only where there are some does the loop test for them.
        zeros = bool((first < 0).any())
        where = f"operand{k} + place{k}[o]"
        chain.channel_lines.append(
            f"const float *const r{k} = " + (f"place{k}[o] < 0 ? 0 : {where};" if zeros else f"{where};")
        )
        loaded = load % (cap, k)
        return f"(r{k} ? {loaded} : splat_{cap}(0.0f))" if zeros else loaded

    @staticmethod
    def _places(first: NDArray[np.int64]) -> tuple[NDArray[np.int32], int, bool]:
        """Return places relative to the smallest, which is returned too; -1 stays."""
        used = first[first >= 0]
        base = int(used.min()) if used.size else 0
        return np.where(first >= 0, first - base, -1).astype(np.int32), base, bool((first < 0).any())

    # Steps ------------------------------------------------------------------------------------------------------------

    def _emit_input(self) -> None:
        m, lay = self.plan.maps[0], self.layouts[0]
        step = Move(self.plan.input_name, m, m.view)
        cap = _cap(lay.width)
        chain = self.chain(step, cap)
        self.index = -1
        places = np.arange(m.channels, dtype=np.int32) * (m.height * m.width)
        function = self.instance(
            "move.c", f"copy_{lay.height}x{lay.width}", title=f"Copy planes of {lay.height} x {lay.width}.",
            kind="planes", outputs=m.channels, height=lay.height, width=lay.width, cap=cap, pitch=lay.width, step=1,
            out_plane=lay.plane, out_pitch=lay.pitch, parameters="", channel_lines=[], lines=chain.lines,
        )  # fmt: skip
        self.call(
            step, f"the input, {times(m.shape)}", function, "input", f"arena + {lay.base + lay.origin}",
            self.tables.add("place_input", places),
        )  # fmt: skip

    def _emit_output(self) -> None:
        places = self.address(self.plan.output)
        if (places >= 0).all() and np.array_equal(places, places[0] + np.arange(len(places))):
            self.calls.append(f"    memcpy(output, arena + {places[0]}, {len(places)} * sizeof *output);")
            return
        table = self.tables.add("place_output", places.astype(np.int32))
        self.calls += [
            f"    for (int i = 0; i < {len(places)}; i++)",
            f"        output[i] = {table}[i] < 0 ? 0.0f : arena[{table}[i]];",
        ]

    def emit_convolution(self, step: Convolution) -> None:
        choice = _choose(self, step)
        text = f"{times(step.source.shape)} -> {times((len(step.weight), *step.extent))}"
        kh, kw = step.weight.shape[2:]
        kept = step.kernels()
        connections = int(np.count_nonzero(kept[2]))
        window = f"{kh} x {kw}" + (f" by {times(step.strides)}" if step.strides != (1, 1) else "")
        total = len(step.weight) * step.weight.shape[1]
        note = f"{text}, {window}, {len(kept[0])} of {total} kernels, {connections} connections"
        note += "".join(f", {op.kind}" for op in step.chain) + (", 2 x 2 max-pool" if step.pool else "")
        place_of, pitch = choice.source(self, step)
        first, places, weights = _entries(len(step.weight), kept, place_of, choice)
        base = int(places.min()) if places.size else 0
        places = places - base
        # Single weights need a place each, and short ones halve what is read beside the weights.
        index = "uint16_t" if choice.elements and (not places.size or places.max() < 1 << 16) else "uint32_t"
        height, width = step.extent
        if step.pool:
            # An odd last row or column is in no window of the pool, so it is not computed.
            height, width = height // 2 * 2, width // 2 * 2
            self.instances.setdefault(render("pool_rows.c", caps=_POOLING), "pool_rows")
            self.caps |= {*_POOLING}
        chain = self.chain(step, choice.cap)
        out, facts = self.out(step)
        tables = [
            self.tables.add(f"first_{self.index}", first.astype(np.uint32)),
            self.tables.add(f"place_{self.index}", places.astype(np.uint16 if index == "uint16_t" else np.uint32)),
            self.tables.add(f"weight_{self.index}", weights.astype(np.float32)),
            self.tables.add(f"bias_{self.index}", step.bias.astype(np.float32)),
        ]
        common = {
            "outputs": len(step.weight), "height": height, "width": width, "pitch": pitch, "cap": choice.cap,
            "index": index, "pool": step.pool, "channel_lines": chain.channel_lines, "lines": chain.lines,
            "parameters": "".join(f", {p}" for p in chain.parameters), **facts,
        }  # fmt: skip
        what = "single weights" if choice.elements else f"{kh} x {kw}"
        title = f"Convolution of stride {times(step.strides)} to planes of {height} x {width}, {what}."
        stem = f"conv_{'1x1' if choice.elements else f'{kh}x{kw}'}_{height}x{width}"
        source = f"arena + {base}"
        if choice.rows:
            size, columns = (kh, kw), _columns(step, choice.offsets)
            if choice.elements:
                size, columns = (1, 1), [[_Part(0, ((0, 0),))]]
            function = self.instance(
                "conv_rows.c", stem, title=title, rows=choice.rows, kh=size[0], kw=size[1], columns=columns,
                half=choice.rows // 2, pairs=_pairs(choice.cap, choice.rows, size[0]), **common,
            )  # fmt: skip
            self.call(step, note, function, source, out, *tables, *chain.arguments)
        elif choice.sums:
            self.caps.add(16)
            in_width, before = step.source.shape[2], step.pads[1]
            count = (height - 1) * pitch + in_width
            edges = before > 0 or kw - 1 - before > in_width - width
            function = self.instance(
                "conv_sums.c", stem, title=title, count=count, part=_padded(count), margin=_MARGIN, in_width=in_width,
                tile=_sums_tile(kw), kh=kh, kw=kw, before=before, edges=edges, **common,
            )  # fmt: skip
            scratch = f"arena + {self.temporary[self.index]}"
            self.call(step, note, function, source, out, scratch, *tables, *chain.arguments)
        else:
            self.caps.add(16)
            count = (height - 1) * pitch + width
            vectors = -(-count // _LANES[0])
            # Small planes leave registers free: several partial sums, so that an addition need not wait for the last
            # one.
            chains = max(1, min(4, _TILE // vectors, len(choice.taps)))
            function = self.instance(
                "conv_flat.c", stem, title=title, count=count, count_padded=_padded(count),
                tile=min(_TILE, 2 * vectors), taps=[int(t) for t in choice.taps], chains=chains, **common,
            )  # fmt: skip
            scratch = f"arena + {self.temporary[self.index] + choice.packed_size}"
            self.call(step, note, function, source, out, scratch, *tables, *chain.arguments)
        self.choices.append({
            "step": step.name, "kernel": choice.name, "connections": connections,
            "macs": connections * math.prod(step.extent),
        })  # fmt: skip

    def emit_linear(self, step: Linear) -> None:
        address = self.address(step.source)
        # A weight on a constant zero is no connection.
        weight = np.where(address >= 0, step.weight, np.float32(0))
        outputs, inputs = weight.shape
        connections = int(np.count_nonzero(weight))
        # A sparse row pays for its start, and each of its weights for a place. Dense ones pay for what they read.
        lines = -(-outputs // 16) * inputs
        sparse = not connections or connections + 8 * outputs <= _reading_weights(64 * lines) * lines
        read = np.flatnonzero(weight.any(axis=0))
        base = int(address[read].min()) if read.size else 0
        source = f"{'input' if self.external and self._reads_input(step.source) else 'arena'} + {base}"
        chain = self.chain(step, 1)
        out, facts = self.out(step)
        common = {
            "outputs": outputs, "channel_lines": chain.channel_lines, "lines": chain.lines,
            "parameters": "".join(f", {p}" for p in chain.parameters), **facts,
        }  # fmt: skip
        note = f"{inputs} -> {outputs}, {connections} connections" + "".join(f", {op.kind}" for op in step.chain)
        bias = self.tables.add(f"bias_{self.index}", step.bias)
        if sparse:
            rows = [np.flatnonzero(row) for row in weight]
            places = address[np.concatenate(rows)] - base if connections else np.zeros(0, np.int64)
            small = not places.size or places.max() < 1 << 16
            first = np.cumsum([0, *(len(row) for row in rows)])
            function = self.instance(
                "linear_sparse.c", f"linear_{outputs}", title=f"{outputs} sums.",
                index="uint16_t" if small else "uint32_t", **common,
            )  # fmt: skip
            tables = [
                self.tables.add(f"first_{self.index}", first.astype(np.uint32)),
                self.tables.add(f"place_{self.index}", places.astype(np.uint16 if small else np.uint32)),
                self.tables.add(f"weight_{self.index}", weight[weight != 0]),
            ]
        else:
            self.caps.add(16)
            used = weight[:, read]
            places = address[read] - base
            gather = not np.array_equal(places, np.arange(len(read)))
            # Rows of zeros fill the last block, so that the loop needs no second version for what is left.
            blocks = np.zeros((-(-outputs // 16) * 16, len(read)), np.float32)
            blocks[:outputs] = used
            function = self.instance(
                "linear_dense.c", f"linear_{outputs}x{len(read)}", title=f"{outputs} sums of {len(read)} products.",
                inputs=len(read), gather=gather, **common,
            )  # fmt: skip
            tables = [self.tables.add(f"place_{self.index}", places.astype(np.uint32))] if gather else []
            tables.append(self.tables.add(f"weight_{self.index}", blocks.reshape(-1, 16, len(read)).transpose(0, 2, 1)))
        self.call(step, note, function, source, out, *tables, bias, *chain.arguments)
        self.choices.append({
            "step": step.name, "kernel": "sparse rows" if sparse else "dense", "connections": connections,
            "macs": connections,
        })  # fmt: skip

    def emit_move(self, step: Move) -> None:
        out, facts = self.out(step)
        planes = self.plan.planes(step.source)
        height, width = step.out.height, step.out.width
        kind = "elements" if planes is None else "planes"
        cap = _cap(width) if planes is not None and planes.dx <= 2 else 1
        chain = self.chain(step, cap)
        if planes is not None:
            found, first, pitch = self.planes(step.source)
            pitch, stride = pitch * found.dy, found.dx
        else:
            first, pitch, stride = self.address(step.source).ravel(), 0, 1
        places, base, _ = self._places(first)
        function = self.instance(
            "move.c", f"move_{height}x{width}", title=f"Move {kind} to {height} x {width}.", kind=kind,
            outputs=step.out.channels, height=height, width=width, cap=cap,
            pitch=pitch, step=stride, channel_lines=chain.channel_lines, lines=chain.lines,
            parameters="".join(f", {p}" for p in chain.parameters), **facts,
        )  # fmt: skip
        note = times(step.out.shape) + "".join(f", {op.kind}" for op in step.chain)
        self.call(
            step,
            note,
            function,
            f"arena + {base}",
            out,
            self.tables.add(f"place_{self.index}", places),
            *chain.arguments,
        )

    def emit_pool(self, step: Pool) -> None:
        out, facts = self.out(step)
        chain = self.chain(step, 1)
        _, first, pitch = self.planes(step.source)
        places, base, _ = self._places(first)
        height, width = step.out.height, step.out.width
        function = self.instance(
            "pool.c", f"pool_{times(step.kernel, 'x')}_{height}x{width}",
            title=f"Pooling ({step.kind}) of {times(step.kernel)} to planes of {height} x {width}.", kind=step.kind,
            outputs=step.out.channels, height=height, width=width, pitch=pitch, in_height=step.source.shape[1],
            in_width=step.source.shape[2], kh=step.kernel[0], kw=step.kernel[1], sy=step.strides[0], sx=step.strides[1],
            top=step.pads[0], left=step.pads[1], dy=step.dilations[0], dx=step.dilations[1],
            channel_lines=chain.channel_lines, lines=chain.lines,
            parameters="".join(f", {p}" for p in chain.parameters), **facts,
        )  # fmt: skip
        note = f"{times(step.source.shape)} -> {times(step.out.shape)}"
        self.call(
            step,
            note,
            function,
            f"arena + {base}",
            out,
            self.tables.add(f"place_{self.index}", places),
            *chain.arguments,
        )

    def emit_reduce(self, step: Reduce) -> None:
        out, facts = self.out(step)
        chain = self.chain(step, 1)
        _, first, pitch = self.planes(step.source)
        places, base, _ = self._places(first)
        _, height, width = step.source.shape
        function = self.instance(
            "reduce.c", f"{step.kind}_{height}x{width}", title=f"The {step.kind} of planes of {height} x {width}.",
            kind=step.kind, outputs=step.out.channels, height=height, width=width, pitch=pitch,
            channel_lines=chain.channel_lines, lines=chain.lines,
            parameters="".join(f", {p}" for p in chain.parameters), **facts,
        )  # fmt: skip
        self.call(
            step, f"{step.kind} of {times(step.source.shape)}", function, f"arena + {base}", out,
            self.tables.add(f"place_{self.index}", places), *chain.arguments,
        )  # fmt: skip

    def emit_softmax(self, step: Softmax) -> None:
        out, facts = self.out(step)
        chain = self.chain(step, 1)
        self.functions |= {"exp", "log"} if step.logarithm else {"exp"}
        places, base, _ = self._places(self.address(step.source).ravel())
        rows, _, width = step.source.shape
        function = self.instance(
            "softmax.c", f"softmax_{rows}x{width}", title=f"Softmax of {rows} rows of {width}.", outputs=rows,
            width=width, logarithm=step.logarithm, channel_lines=chain.channel_lines, lines=chain.lines,
            parameters="".join(f", {p}" for p in chain.parameters), **facts,
        )  # fmt: skip
        self.call(
            step, times(step.out.shape), function, f"arena + {base}", out,
            self.tables.add(f"place_{self.index}", places), *chain.arguments,
        )  # fmt: skip

    def emit_constant(self, step: Constant) -> None:
        lay = self.layout(step.out)
        values = np.zeros((step.out.channels, lay.plane), np.float32)
        inside = lay.origin + np.add.outer(np.arange(lay.height) * lay.pitch, np.arange(lay.width))
        values[:, inside] = step.values
        table = self.tables.add(f"constant_{self.index}", values)
        self.calls.append(f"    /* {comment(step.name)}: constants, {times(step.out.shape)} */")
        self.calls.append(f"    memcpy(arena + {lay.base}, {table}, sizeof {table});")


_EMITTERS: dict[type[Step], Callable[[Any, Any], None]] = {
    Convolution: _Generator.emit_convolution,
    Linear: _Generator.emit_linear,
    Move: _Generator.emit_move,
    Pool: _Generator.emit_pool,
    Reduce: _Generator.emit_reduce,
    Softmax: _Generator.emit_softmax,
    Constant: _Generator.emit_constant,
}


# Convolutions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    """The kernel that serves a convolution.

    Attributes:
        rows: Rows of a tile of conv_rows.c; 0 takes conv_flat.c, or conv_sums.c with ``sums``.
        cap: Longest vector that fits a row of the result.
        elements: Single weights instead of whole kernels.
        taps: (kh·kw) offsets of a kernel's weights from the place of its plane; a single 0 for elements.
        offsets: (kh, kw) the same, for elements too.
        packed: The parts of a plane of a strided convolution, None where the map is read as it lies.
        packed_size: Floats of all of them.
    """

    rows: int
    cap: int
    elements: bool
    taps: tuple[int, ...]
    offsets: NDArray[np.int64]
    packed: _Packed | None
    packed_size: int
    sums: bool = False

    @property
    def name(self) -> str:
        """What the list of choices calls it."""
        unit = "elements" if self.elements else "kernels"
        return f"{unit}, {'rows' if self.rows else 'sums' if self.sums else 'flat'}{', packed' if self.packed else ''}"

    def source(self, gen: _Generator, step: Convolution) -> tuple[NDArray[np.int64], int]:
        """Emit the packing, if any; return where each weight (channels, kh, kw) begins to read, and the pitch.

        Those of channels that no kernel reads have no meaning.
        """
        _, first, pitch = gen.planes(step.source)
        if self.packed is None:
            return first[:, None, None] + self.offsets, pitch
        used = np.unique(step.kernels()[1])
        at = gen.temporary[gen.index]
        # Only channels that a kept kernel reads are packed.
        places = np.zeros((len(first), *self.offsets.shape), np.int64)
        places[used] = at + self.packed.plane * np.arange(len(used))[:, None, None] + self.offsets
        if used.size:
            relative, base, _ = gen._places(first[used])  # noqa: SLF001  # the same module
            gen.caps |= {phase["cap"] for phase in self.packed.phases}
            function = gen.instance(
                "pack.c", f"pack_{times(step.strides, 'x')}_{times(step.source.shape[1:], 'x')}",
                title=f"Planes of {times(step.source.shape[1:])} for a stride of {times(step.strides)}.",
                phases=self.packed.phases, plane=self.packed.plane, pitch=self.packed.pitch, from_pitch=pitch,
                sy=step.strides[0], sx=step.strides[1],
            )  # fmt: skip
            table = gen.tables.add(f"packed_{gen.index}", relative)
            gen.calls.append(f"    {function}(arena + {base}, arena + {at}, {table}, {len(used)});")
        return places, self.packed.pitch


@dataclass(frozen=True)
class _Packed:
    """A plane split by row and column modulo the strides."""

    phases: tuple[dict[str, int], ...]
    plane: int
    pitch: int
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, step: Convolution) -> _Packed:
        (sy, sx), (dy, dx), (top, left, _, _) = step.strides, step.dilations, step.pads
        kh, kw = step.weight.shape[2:]
        _, height, width = step.source.shape
        out_height, out_width = step.extent
        rows = out_height + (kh - 1) * dy // sy + 1
        pitch = out_width + (kw - 1) * dx // sx
        bases: dict[tuple[int, int], int] = {}
        offsets = np.zeros((kh, kw), np.int64)
        phases = []
        # Several taps can fall into one phase, and some phases may never be read: only those that are get a part.
        for i, j in np.ndindex(kh, kw):
            phase = (i * dy % sy, j * dx % sx)
            if phase not in bases:
                bases[phase] = len(bases) * rows * pitch
                # Row y of a part is row y * sy + phase - top of the plane.
                first = [max(0, -(-(pad - p) // s)) for p, pad, s in zip(phase, (top, left), (sy, sx), strict=True)]
                last = [
                    min(n, (size - 1 + pad - p) // s + 1)
                    for n, size, p, pad, s in zip(
                        (rows, pitch), (height, width), phase, (top, left), (sy, sx), strict=True
                    )
                ]
                phases.append({
                    "base": bases[phase], "y0": first[0], "y1": last[0], "x0": first[1], "x1": last[1],
                    "dy": phase[0] - top, "dx": phase[1] - left,
                    # There are vectors of neighbours and of every second element.
                    "cap": _cap(last[1] - first[1]) if sx <= 2 else 1,
                })  # fmt: skip
            offsets[i, j] = bases[phase] + i * dy // sy * pitch + j * dx // sx
        return cls(tuple(phases), len(bases) * rows * pitch, pitch, offsets)


@dataclass(frozen=True)
class _Part:
    """Weights of one column of a kernel that read the same rows of the same part of a plane, some rows further down.

    Attributes:
        base: Where the first of them begins, from the place of the kernel.
        taps: (row of the kernel, rows of the part further down) of each.
    """

    base: int
    taps: tuple[tuple[int, int], ...]

    @property
    def reach(self) -> int:
        """Return the rows that are read beyond those of the result."""
        return max(down for _, down in self.taps)


def _columns(step: Convolution, offsets: NDArray[np.int64]) -> list[list[_Part]]:
    """Return for each column of a kernel its weights by the part that they read: there are several with strides."""
    (kh, kw), stride, dilation = offsets.shape, step.strides[0], step.dilations[0]
    phases = [[i for i in range(kh) if i * dilation % stride == phase] for phase in range(stride)]
    return [
        [
            _Part(
                int(offsets[rows[0], j] - offsets[0, 0]),
                tuple((i, (i - rows[0]) * dilation // stride) for i in rows),
            )
            for rows in phases if rows
        ]
        for j in range(kw)
    ]  # fmt: skip


def _choose(gen: _Generator, step: Convolution) -> _Choice:
    """Return the cheapest kernel for a convolution."""
    # Asked for the scratch memory first and for the code later: both must hear the same. Steps compare by identity.
    if id(step) in gen.chosen:
        return gen.chosen[id(step)]
    if step.strides != (1, 1):
        options = _options(step, 0, sides=True)
    else:
        planes, _, pitch = gen.planes(step.source)
        used = [gen.layouts[int(k)] for k in planes.maps if k >= 0]
        sides = all(lay.left >= step.pads[1] and lay.right >= step.pads[3] for lay in used)
        options = _options(step, pitch, sides=sides)
    gen.chosen[id(step)] = min(options, key=lambda option: option[0])[1]
    return gen.chosen[id(step)]


def _wants_no_sides(step: Convolution) -> bool:
    """Return True if a convolution of stride 1 is faster on planes that have no border at their sides."""
    width, sides = step.source.shape[2], max(step.pads[1], step.pads[3])
    if not sides:
        return False
    without, with_ = _options(step, width, sides=False), _options(step, width + sides, sides=True)
    return bool(without) and without[0][0] < min(cost for cost, _ in with_)


def _options(step: Convolution, pitch: int, *, sides: bool) -> list[tuple[float, _Choice]]:
    """Return what can serve a convolution, each with its cost in cycles.

    Args:
        step: The convolution.
        pitch: Of the rows of its source, for stride 1.
        sides: There are zeros at the left and the right of each row, as many as it reads.
    """
    kh, kw = step.weight.shape[2:]
    height, width = (n // 2 * 2 if step.pool else n for n in step.extent)
    _, read, weights = step.kernels()
    kernels, elements = len(weights), int(np.count_nonzero(weights))
    (dy, dx), (top, left, _, right) = step.dilations, step.pads
    if step.strides != (1, 1):
        packed = _Packed.of(step)
        used = len(np.unique(read))
        offsets, size, pitch = packed.offsets, used * packed.plane, packed.pitch
    else:
        packed, size = None, 0
        offsets = np.add.outer((np.arange(kh) * dy - top) * pitch, np.arange(kw) * dx - left)
    plain = step.strides == (1, 1) and step.dilations == (1, 1)
    cap = _cap(width)
    found: list[tuple[float, _Choice]] = []
    # Wider padding than that of a result as wide as its source would want two tests for an edge.
    if plain and 1 < kw <= _SUMS // 2 and left + right < kw:
        cost = _cost_of_sums(step, (height, width), pitch)
        found.append((cost, _Choice(0, cap, False, (-left,), offsets, None, 0, sums=True)))
    if not sides:
        return found
    flat = [0.8 * _reading(n) * -(-((height - 1) * pitch + width) // n) + 1.5 for n in _LANES]
    taps = tuple(offsets.ravel().tolist())
    found.append((
        sum(kernels * (each * kh * kw + 2) for each in flat), _Choice(0, cap, False, taps, offsets, packed, size)
    ))  # fmt: skip
    found.append((sum(elements * (each + 2) for each in flat), _Choice(0, cap, True, (0,), offsets, packed, size)))
    if cap > 1:
        reach = [part.reach for part in _columns(step, offsets)[0]]
        # A tile holds both rows of a pooling window, so its height must be even there.
        for rows in range(2 if step.pool else 1, min(_TILE, height) + 1, 2 if step.pool else 1):
            whole = single = 0.0
            for lanes in _LANES:
                tiles = -(-width // min(cap, lanes)) * -(-height // rows)
                if lanes == 16 and _pairs(cap, rows, kh):
                    loads = (2.5 * sum(rows // 2 + more for more in reach) + kh) / 2
                    sums = rows * kh / 4 * max(1.0, _TILE / rows)
                else:
                    loads = (sum(rows + more for more in reach) * _reading(min(cap, lanes)) + kh) / 2
                    sums = rows * kh / 2 * max(1.0, _TILE / rows)
                whole += tiles * kernels * (kw * max(loads, sums) + 4)
                single += tiles * elements * (rows * 0.6 * _reading(min(cap, lanes)) + 3)
            found.append((whole, _Choice(rows, cap, False, (int(offsets[0, 0]),), offsets, packed, size)))
            found.append((single, _Choice(rows, cap, True, (0,), offsets, packed, size)))
    return found


def _cost_of_sums(step: Convolution, extent: tuple[int, int], pitch: int) -> float:
    """Return the cycles of conv_sums.c."""
    kh, kw = step.weight.shape[2:]
    (height, width), tile, kernels = extent, _sums_tile(kw), len(step.kernels()[2])
    count = (height - 1) * pitch + step.source.shape[2]
    cost = 0.0
    for lanes in _LANES:
        full, rest = divmod(-(-count // lanes), tile)
        for vectors in (tile,) * full + (rest,) * bool(rest):
            loads = kh * (vectors * _reading(lanes) + kw) / 2
            # Below so many sums each multiply-add waits for the one before it.
            chains = vectors * kw * (kh if count <= lanes else 1)
            cost += kernels * (max(loads, kh * kw * vectors / 2 * max(1.0, _TILE / chains)) + 4)
        # Putting them together; the next channel's sums begin meanwhile.
        cost += len(step.weight) * (height * -(-width // min(_cap(width), lanes)) * kw * 0.4 + 4)
    return cost


def _reading_weights(size: int) -> float:
    """Return the weights of a sparse row that take as long as a line of dense ones, of tables of so many bytes.

    Measured (benchmarks/c_layers.py): what is larger than the second or the third cache comes from beyond it.
    """
    return next((cost for limit, cost in ((1 << 20, 1.6), (32 << 20, 2.2)) if size <= limit), 4.8)


def _reading(lanes: int) -> float:
    """Return the loads that one of a vector counts for: where it begins anywhere, it lies in two lines of a cache."""
    return 1.5 if lanes == 16 else 1.0


def _pairs(cap: int, rows: int, kh: int) -> bool:
    """Return True if conv_rows.c takes two rows at once where vectors are twice as long as a row."""
    # With fewer rows in a kernel, reading two halves costs what the longer vectors save.
    return cap == 8 and kh >= 3 and rows >= 4 and rows % 2 == 0


def _sums_tile(kw: int) -> int:
    """Return the vectors of a tile of conv_sums.c."""
    return max(1, _SUMS // int(kw))


def _entries(
    outputs: int,
    kept: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]],
    places: NDArray[np.int64],
    choice: _Choice,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Return where the entries of each output channel begin, and for all entries where they read, and the weights.

    ``places`` (input channels, kh, kw) says where each weight of a kernel on a channel begins to read.
    """
    o, i, weights = kept
    if choice.elements:
        chosen = weights != 0
        counts, where, values = chosen.sum(axis=(1, 2)), places[i][chosen], weights[chosen]
    else:
        # conv_rows.c begins at the first weight, conv_flat.c adds the offset of each to the plane's place.
        # conv_sums.c begins at the first column of the plane.
        where = places[i, 0, 0] - (0 if choice.rows else choice.taps[0])
        counts, values = np.ones(len(o), np.int64), weights.ravel()
    first = np.concatenate([[0], np.cumsum(np.bincount(o, counts, outputs).astype(np.int64))])
    return first, where, values


def _scratch(gen: _Generator, step: Step) -> int:
    """Return the floats that a step needs for itself."""
    if not isinstance(step, Convolution):
        return 0
    choice = _choose(gen, step)
    packed = -(-choice.packed_size // 16) * 16 if choice.packed else 0
    if choice.rows:
        return choice.packed_size
    height, width = step.extent
    pitch = choice.packed.pitch if choice.packed else gen.planes(step.source)[2]
    if choice.sums:
        part = _padded((height - 1) * pitch + step.source.shape[2])
        return _MARGIN + int(step.weight.shape[3]) * part + height * width + 16
    return packed + _padded((height - 1) * pitch + width) + height * width + 16


def _bytes(floats: int) -> int:
    """Return the bytes of so many floats, in whole lines of a cache."""
    return -(-floats // 16) * 64


def _padded(count: int) -> int:
    """Return the floats of a flat plane with what the last tile writes beyond it, at any length of vector."""
    return (-(-count // 16) + _TILE) * 16


def _cap(width: int) -> int:
    return next((cap for cap in _CAPS if cap <= width), 1)


def times(sizes: Sequence[int], sign: str = " x ") -> str:
    """Return sizes as text, ``3 x 32 x 32``."""
    return sign.join(str(n) for n in sizes)


def literal(number: float) -> str:
    """Return a float32 as C; nine digits tell all of them apart."""
    text = f"{np.float32(number):.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def comment(text: str) -> str:
    """Return a name that cannot end the comment it stands in."""
    return re.sub(r"[^\x20-\x7e]|\*/|/\*", "?", text)


def generate(plan: Plan) -> Program:
    """Return the host program of a plan."""
    return _Generator(plan).run()
