"""Generated C: a folder with a program that computes the network from its connections.

``program.json`` says what the program is called and which tensors it takes and gives; everything else is for a C
compiler (docs/c_format.md). The format goes one way.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from relief_export.errors import InputError, IntegrityError, UnsupportedModelError
from relief_export.formats.artifact import Artifact, File, Options, Tolerance
from relief_export.records import atomic_folder, read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx_ir as ir

    from relief_export.cgen.connections import Code
    from relief_export.cgen.plan import Plan
    from relief_export.cgen.quantised import Quantisation

PROGRAM, VERSION = "program.json", 1
TOLERANCE = Tolerance(relative_error=1e-5, accuracy_drop=0.0)
"""Sums in another order than the reference's, and nothing else."""


@dataclass(frozen=True)
class Program:
    """What program.json says.

    Attributes:
        name: Of the program: its files are NAME.h and NAME.c. version: Of this file.
        input, output: Names of the ONNX values. input_shape, output_shape: For one sample, with a first axis of 1.
        arena_bytes: Memory that the caller lends.
        steps: One row a linear step: name, kernel that serves it, connections, multiply-adds.
    """

    version: int
    name: str
    input: str
    input_shape: list[int]
    output: str
    output_shape: list[int]
    arena_bytes: int
    steps: list[dict[str, Any]]


def write(model: ir.Model, path: Path, options: Options) -> Artifact:
    """Write the folder ``path``; a folder there is replaced only if it is one of ours.

    Raises:
        InputError: ``path`` is something else that this writer must not replace, or the program's name is none.
        UnsupportedModelError: The generator has no code for a node of the model, or for its inputs and outputs.
    """
    from relief_export.cgen.emit import generate  # noqa: PLC0415  # only this format needs the generator

    _check_free(path)
    files, plan, program = generate(model, options.program, dims=options.dimensions, onnxruntime=options.onnxruntime)
    facts = Program(
        VERSION, options.program, plan.input_name, list(plan.input_shape), plan.output_name, list(plan.output_shape),
        program.arena_bytes, list(program.choices),
    )  # fmt: skip
    return _save(path, files, facts, "c", TOLERANCE, options)


def write_mcu(
    model: ir.Model, path: Path, options: Options, *, code: Code, name: str, tolerance: Tolerance
) -> Artifact:
    """Write the folder ``path`` with a program for microcontrollers; a folder there is replaced if it is one of ours.

    Args:
        model: For ``q8``, in floats, to be quantised on ``options.calibration``, or already with QuantizeLinear nodes.
        path: The folder.
        options: How.
        code: Of the values of weights.
        name: Of the format.
        tolerance: That the format promises.

    Raises:
        InputError: ``path`` is something else, the program's name is none, or samples for the calibration are missing.
        UnsupportedModelError: The generator has no code for a node of the model, or for its inputs and outputs.
    """
    from relief_export.cgen import connections, layouts, mcu  # noqa: PLC0415  # only these formats need the generator
    from relief_export.cgen.emit import check_name  # noqa: PLC0415
    from relief_export.cgen.lower import lower  # noqa: PLC0415

    check_name(options.program)
    # A program of ours may be replaced; a project's folder, in which a user works, never is.
    if options.layout is None:
        _check_free(path)
    elif path.exists() and any(path.iterdir()):
        raise InputError(f"{path} is not empty: give a new folder for the {options.layout} files")
    notes: tuple[str, ...] = ()
    if code == "q8":
        plan, integers, notes = _integers(model, options)
    else:
        plan, integers = connections.coded(lower(model, dims=options.dimensions), code), None
    made = mcu.generate(plan, code, name=options.program, quantisation=integers, quantized_io=options.quantized_io)
    facts = Program(
        VERSION, options.program, plan.input_name, list(plan.input_shape), plan.output_name, list(plan.output_shape),
        made.arena, list(made.layers),
    )  # fmt: skip
    if options.layout is not None:
        files = layouts.arrange(made.files, options.program, options.layout)
        with atomic_folder(path) as folder:
            for file, content in files.items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(content)
        listed = tuple(File.of(path.parent, path / file) for file in files)
        return Artifact(path.name, name, listed, tolerance, options.to_dict() | {"layout": options.layout}, notes)
    return _save(path, made.files, facts, name, tolerance, options, notes)


def _integers(model: ir.Model, options: Options) -> tuple[Plan, Quantisation, tuple[str, ...]]:
    """Return the plan of a quantised model, or of one that is quantised first, with its integers."""
    from relief_export.cgen.quantised import quantised  # noqa: PLC0415
    from relief_export.formats.int8 import quantise  # noqa: PLC0415
    from relief_export.graph.prepare import fold, with_dimensions  # noqa: PLC0415
    from relief_export.graph.shrink import shrink  # noqa: PLC0415

    notes: tuple[str, ...] = ()
    if not any(node.op_type == "QuantizeLinear" for node in model.graph):
        sized = with_dimensions(model, options.dimensions) if options.dimensions else model
        model, notes = quantise(shrink(fold(sized)).model, options)
    return *quantised(model), notes


def _check_free(path: Path) -> None:
    if path.exists() and not is_program(path) and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} exists and is no folder of generated C: give a new folder, this one is left alone")


def _save(  # noqa: PLR0917  # what both writers have in hand
    path: Path,
    files: Mapping[str, bytes],
    facts: Program,
    name: str,
    tolerance: Tolerance,
    options: Options,
    notes: tuple[str, ...] = (),
) -> Artifact:
    """Write the files of a program and what they are."""
    with atomic_folder(path) as folder:
        for file, content in files.items():
            (folder / file).write_bytes(content)
        write_json(folder / PROGRAM, asdict(facts))
    names = (PROGRAM, *files)
    described = options.to_dict() | {"program": options.program}
    if name == "c":
        described["onnxruntime"] = options.onnxruntime
    return Artifact(
        path.name, name, tuple(File.of(path.parent, path / each) for each in names), tolerance, described, notes
    )


def is_program(path: Path) -> bool:
    """Return True if ``path`` is a folder of generated C."""
    return path.is_dir() and (path / PROGRAM).is_file()


def about(path: Path) -> Program:
    """Read what a folder of generated C says of itself.

    Raises:
        IntegrityError: program.json is damaged.
    """
    data = read_json(path / PROGRAM)
    kinds = {
        "version": int, "name": str, "input": str, "input_shape": list, "output": str, "output_shape": list,
        "arena_bytes": int, "steps": list,
    }  # fmt: skip
    sound = set(data) == set(kinds) and all(type(data[key]) is kind for key, kind in kinds.items())
    sizes = [*data["input_shape"], *data["output_shape"]] if sound else []
    if not sound or not data["name"].isidentifier() or not all(type(n) is int and n > 0 for n in sizes):
        raise IntegrityError(f"{path / PROGRAM} is malformed: export again")
    if data["version"] != VERSION:
        raise IntegrityError(f"{path / PROGRAM} has version {data['version']}, this program reads {VERSION}")
    return Program(**data)


def refuse(path: Path) -> NoReturn:
    """Refuse to read a network back from its program.

    Raises:
        UnsupportedModelError: Always.
    """
    raise UnsupportedModelError(f"{path} is generated C, which goes one way: use the .onnx it came from")
