"""The files of a generated host program: NAME.h, NAME.c, example.c and, for large networks, NAME_weights.*."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from onnx import TensorProto, helper

from relief_export.cgen import host
from relief_export.cgen.c_source import KERNELS, described, render, table, times, totals
from relief_export.cgen.lower import lower
from relief_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir
    from numpy.typing import NDArray

    from relief_export.cgen.plan import Plan

MAX_TEXT = 2_000_000
"""Bytes of C: where the tables would make more, they become a binary file that the assembler includes."""
_BLOCK = re.compile(r"^/\* @(\w+)(?:: needs ([\w ]+))? \*/\n", re.MULTILINE)
# Those of C++ too, for the files compile as both.
_KEYWORDS = frozenset({
    "auto", "break", "case", "char", "class", "const", "continue", "default", "do", "double", "else", "enum", "extern",
    "float", "for", "goto", "if", "inline", "int", "long", "main", "new", "register", "return", "short", "signed",
    "sizeof", "static", "struct", "switch", "this", "typedef", "union", "unsigned", "void", "volatile", "while",
})  # fmt: skip


def generate(
    model: ir.Model, name: str = "net", *, dims: Mapping[str, int] | None = None, onnxruntime: bool = False
) -> tuple[dict[str, bytes], Plan, host.Program]:
    """Return the files of a model's program, its plan, and the program taken apart.

    ``onnxruntime`` adds NAME_ort.c and NAME.onnx, the network as one operator.

    Raises:
        InputError: ``name`` is no identifier of C, or the sizes of axes are not known.
        UnsupportedModelError: The generator has no code for a node of the model.
    """
    plan = lower(model, dims=dims)
    program = host.generate(plan)
    return _files(plan, program, name, onnxruntime=onnxruntime), plan, program


def sources(plan: Plan, name: str = "net") -> dict[str, bytes]:
    """Return the files of a plan's program by name; the same plan gives the same bytes.

    Raises:
        InputError: ``name`` is no identifier of C.
    """
    return _files(plan, host.generate(plan), name)


def check_name(name: str) -> None:
    """Check that a program can be called so.

    Raises:
        InputError: ``name`` is no identifier of C.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name in _KEYWORDS:
        raise InputError(f"--name {name} is no identifier of C: use letters, digits and underscores")


def _files(plan: Plan, program: host.Program, name: str, *, onnxruntime: bool = False) -> dict[str, bytes]:
    check_name(name)
    tables, blob = _tables(program.tables, name)
    said = described(plan, name) | {"arena": program.arena_bytes, "weights": f" {name}_weights.c" if blob else ""}
    # Comments may mention a name that the code does not use, and the compiler warns about unused parameters.
    code = re.sub(r"/\*.*?\*/", "", "\n".join(program.calls))
    unused = [word for word in ("input", "arena") if not re.search(rf"\b{word}\b", code)]
    text = render(
        "net.c", prelude=_prelude(program), tables=tables, calls="\n".join(program.calls), kernels=program.kernels,
        unused=unused, **totals(program.choices), **said,
    )  # fmt: skip
    files = {
        f"{name}.h": render("net.h", **said), f"{name}.c": text, "example.c": render("example.c", **said),
    }  # fmt: skip
    found = {file: content.encode("ascii") for file, content in files.items()}
    if blob:
        found[f"{name}_weights.bin"] = blob
        found[f"{name}_weights.c"] = render("weights.c", **said).encode("ascii")
    if onnxruntime:
        said["output_dims"] = times(plan.output_shape, ", ")
        found[f"{name}_ort.c"] = render("net_ort.c", **said).encode("ascii")
        found[f"{name}.onnx"] = _operator(plan)
    return found


def _operator(plan: Plan) -> bytes:
    """Return a model of one node, relief::Network, with inputs and outputs as in the source and any batch."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape[1:]])
        for name, shape in ((plan.input_name, plan.input_shape), (plan.output_name, plan.output_shape))
    ]
    node = helper.make_node("Network", [plan.input_name], [plan.output_name], name="network", domain="relief")
    graph = helper.make_graph([node], "network", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("relief", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    # The same model must give the same bytes.
    return bytes(model.SerializeToString(deterministic=True))


def _prelude(program: host.Program) -> str:
    """Return the vectors and the activations that a program uses."""
    caps = program.caps or (1,)
    kernels = "".join(program.kernels)
    vectors = render("vector.c", caps=caps, evens="evens_" in kernels, pairs="PAIRS" in kernels)
    text = (KERNELS / "activations.c").read_text(encoding="ascii")
    parts = _BLOCK.split(text)
    blocks = {parts[k]: (parts[k + 1] or "", parts[k + 2]) for k in range(1, len(parts), 3)}
    wanted = set(program.functions)
    # Until nothing is added: what an activation needs may need others itself.
    while True:
        needed = {n for f in wanted for n in blocks[f][0].split()} - wanted
        if not needed:
            break
        wanted |= needed
    # In the order of the file what is needed comes first, whoever needs it.
    ordered = [body.strip() for name, (_, body) in blocks.items() if name in wanted]
    return "\n".join([vectors, *(body.replace("CAP", str(cap)) + "\n" for cap in caps for body in ordered)])


def _tables(arrays: dict[str, tuple[str, NDArray[Any]]], name: str) -> tuple[str, bytes]:
    """Return the declarations of all tables, and the bytes of a binary file for them where text would be too long."""
    # About as many characters as a number takes in the text: an exact count would mean writing it first.
    if sum(array.size * (13 if kind == "float" else 7) for kind, array in arrays.values()) <= MAX_TEXT:
        return "\n".join(table(key, kind, array, "ALIGNED") for key, (kind, array) in arrays.items()), b""
    lines = [
        f"/* The tables are in {name}_weights.bin, little-endian, which {name}_weights.c includes. */",
        f"extern const unsigned char {name}_weights[];",
    ]
    parts: list[bytes] = []
    at = 0
    for key, (kind, array) in arrays.items():
        data = array.astype(array.dtype.newbyteorder("<")).tobytes()
        # Each table begins at a multiple of 64 bytes in the file, as those in C are aligned.
        data += bytes(-len(data) % 64)
        lines.append(f"#define {key} ((const {kind} *)({name}_weights + {at})) /* {array.size} */")
        parts.append(data)
        at += len(data)
    return "\n".join(lines) + "\n", b"".join(parts)
