"""The deepest stack of a linked program, from the frames of its functions and who calls whom.

    depth(f) = frame(f) + max(depth(g) for g that f calls)

The compiler states the frame of every function that it compiles (-fstack-usage). For what comes from its libraries,
such as floating-point arithmetic on a core without an FPU, the frame is read from the instructions: all that a function
pushes anywhere, which is an upper bound.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_HEADING = re.compile(r"^[0-9a-f]+ <(.+)>:$")
_INSTRUCTION = re.compile(r"^\s*[0-9a-f]+:\s+([a-z][\w.]*)\s*(.*)$")
_SYMBOL = re.compile(r"<([^>+]+)(?:\+0x[0-9a-f]+)?>")


@dataclass(frozen=True)
class _Dialect:
    """How one processor calls, jumps, returns and pushes; patterns of a mnemonic, or of a whole instruction."""

    call: re.Pattern[str]
    indirect: re.Pattern[str]
    jump: re.Pattern[str]
    end: re.Pattern[str]
    word: int


_DIALECTS = {
    "arm": _Dialect(
        call=re.compile(r"blx? [^r]"),
        indirect=re.compile(r"blx (r\d+|ip|lr)\b"),
        jump=re.compile(r"(b(eq|ne|cs|cc|mi|pl|vs|vc|hi|ls|ge|lt|gt|le)?(\.[nw])?|cbn?z) "),
        end=re.compile(r"b(\.[nw])? |bx |(pop|ldm\S*) .*pc|ldr\S* pc|mov pc|udf"),
        word=4,
    ),
    "riscv": _Dialect(
        call=re.compile(r"(jal|call|jalr) .*<"),
        indirect=re.compile(r"jalr [^<]*$"),
        jump=re.compile(r"(j|tail|b\w+) "),
        end=re.compile(r"(j|jr|ret|tail|ebreak)\b"),
        word=4,
    ),
    "avr": _Dialect(
        call=re.compile(r"r?call "),
        indirect=re.compile(r"e?icall"),
        jump=re.compile(r"(r?jmp|br\w\w) "),
        end=re.compile(r"(r?jmp|e?ijmp|reti?)\b"),
        word=1,
    ),
}
FAMILIES = frozenset(_DIALECTS)
"""Processors whose programs can be read."""


@dataclass
class _Function:
    """What a function does to the stack: its own bytes, and those pushed as arguments for each function it calls."""

    frame: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    jumps: set[str] = field(default_factory=set)
    indirect: bool = False
    ends: bool = False


@dataclass(frozen=True)
class Depth:
    """The deepest stack below a function.

    Attributes:
        bytes: Of stack; a lower bound where there are ``doubts``.
        path: The functions that reach it, outermost first.
        doubts: Why it may be deeper: recursion, calls through pointers, frames of variable size.
    """

    bytes: int
    path: tuple[str, ...]
    doubts: tuple[str, ...]


def stated_frames(texts: Iterable[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Read what ``-fstack-usage`` left: bytes by function, and the functions whose frame varies."""
    frames: dict[str, int] = {}
    varying = []
    for line in (line for text in texts for line in text.splitlines()):
        place, size, kind = line.split("\t")
        name = place.rpartition(":")[2].partition(".")[0]  # clones are called NAME.constprop and the like
        # Static functions of several files may share a name: the largest frame is the safe one.
        frames[name] = max(frames.get(name, 0), int(size))
        if kind == "dynamic":
            varying.append(f"{name} has a frame of variable size")
    return frames, tuple(varying)


def deepest(disassembly: str, family: str, root: str, stated: Mapping[str, int], *, address: int = 2) -> Depth:
    """Return the deepest stack that a call of ``root`` takes.

    Args:
        disassembly: What ``objdump -d --no-show-raw-insn`` prints of the linked program.
        family: One of ``FAMILIES``.
        root: Function to start from.
        stated: Frames that the compiler stated, by function.
        address: Bytes of a return address where a call pushes it (AVR).
    """
    functions = _functions(disassembly, _DIALECTS[family], address if family == "avr" else 0)
    walk = _Walk(functions, stated)
    bytes_, path = walk.depth(root, ())
    return Depth(bytes_, path, tuple(dict.fromkeys(walk.doubts)))


@dataclass
class _Walk:
    """One walk through the call graph, each function once."""

    functions: Mapping[str, _Function]
    stated: Mapping[str, int]
    doubts: list[str] = field(default_factory=list)
    known: dict[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)

    def depth(self, name: str, active: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
        """Return the stack that a function takes and the functions that reach it; ``active`` are its callers."""
        if name in self.known or name not in self.functions:
            return self.known.get(name, (0, ()))
        function = self.functions[name]
        stated = self.stated.get(name.partition(".")[0])
        frame = function.frame if stated is None else stated
        if function.indirect:
            self.doubts.append(f"{name} calls through a pointer")
        best: int = frame
        path: tuple[str, ...] = (name,)
        # A compiler's tail call is made when the frame is gone; an assembler routine may jump with its frame in place.
        edges = [(target, frame + pushed, True) for target, pushed in function.calls.items()]
        edges += [(target, frame if stated is None else 0, False) for target in function.jumps]
        # Sorted, so that of equally deep paths always the same is reported.
        for target, base, call in sorted(edges):
            # Recursion has no bound that could be read here: it is doubted, not followed.
            if target in (*active, name):
                if call:  # a jump back is a loop
                    self.doubts.append(f"{target} calls itself")
                continue
            below, way = self.depth(target, (*active, name))
            if base + below > best:
                best, path = base + below, (name, *way)
        self.known[name] = best, path
        return best, path


def _functions(disassembly: str, dialect: _Dialect, address: int) -> dict[str, _Function]:
    """Read the functions of a program, with an edge from each that runs on into the next."""
    functions: dict[str, _Function] = {}
    current: _Function | None = None
    # Bytes pushed since the last call are arguments (AVR), which the compiler does not count as the frame's; those that
    # a function begins with are saved registers.
    pushed, prologue = 0, True
    for line in disassembly.splitlines():
        if heading := _HEADING.match(line):
            name, previous = heading[1], current
            current = functions.setdefault(name, _Function(frame=address))
            pushed, prologue = 0, True
            if previous is not None and not previous.ends:
                previous.jumps.add(name)
            continue
        found = _INSTRUCTION.match(line)
        # Padding behind the last instruction would look as if the function ran on into the next.
        if found is None or current is None or found[1] == "nop":
            continue
        text = f"{found[1]} {found[2]}"
        target = _SYMBOL.search(text)
        current.ends = bool(dialect.end.match(text))
        # Tested first: the pattern of a direct call on Arm also takes some registers.
        if dialect.indirect.match(text):
            current.indirect = True
        elif dialect.call.match(text) and target:
            if functions.get(target[1]) is current:
                current.frame += address  # "rcall .+0" makes room for two bytes
            else:
                current.calls[target[1]] = max(current.calls.get(target[1], 0), pushed)
            pushed = 0
        elif dialect.jump.match(text) and target and functions.get(target[1]) is not current:
            current.jumps.add(target[1])
        lowered = _pushed(text, dialect.word)
        current.frame += lowered
        prologue = prologue and bool(lowered)
        pushed += 0 if prologue or address == 0 else lowered
    return functions


def _pushed(text: str, word: int) -> int:
    """Return the bytes by which an instruction lowers the stack pointer."""
    if match := re.match(r"(?:v?push|v?stmdb\S* sp!,) *\{(.*)\}", text):
        registers = match[1].split(", ")
        return sum((2 if r.startswith("d") else 1) * _span(r) for r in registers) * word
    if text.startswith("push "):
        return word
    if match := re.match(r"(?:sub\S* sp,(?: sp,)? #|str\S* \w+, \[sp, #-|addi? sp,sp,-)(\d+)", text):
        return int(match[1])
    return 0


def _span(registers: str) -> int:
    """Return how many registers ``d8`` or ``d8-d11`` are."""
    ends = [int(number) for number in re.findall(r"\d+", registers)]
    return ends[-1] - ends[0] + 1 if len(ends) == 2 else 1
