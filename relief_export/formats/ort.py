"""ONNX Runtime's own format for mobile and reduced builds, with the list of operators that such a build needs.

It is written from the sparse form, whose indices the format keeps compactly. Optimisations that depend on the writing
machine's processor are left out.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import onnx

from relief_export.errors import InputError, UnsupportedModelError
from relief_export.formats import sparse
from relief_export.formats.artifact import EXACT, Artifact, File, Options
from relief_export.formats.onnx_file import atomic_files, graphs
from relief_export.formats.runtime import load

if TYPE_CHECKING:
    import onnx_ir as ir

_PROCESSOR_SPECIFIC: tuple[str, ...] = ("NchwcTransformer",)
_GROWN = 1.1
"""A file larger than its source by this has weights that are stored narrow and were made wide: they are left narrow."""


def operators_path(path: Path) -> Path:
    """Return where the required-operators list of the model at ``path`` is kept."""
    return path.with_suffix(".required_operators.config")


def write(model: ir.Model, path: Path, options: Options) -> Artifact:
    """Write ``model`` in the runtime's own format, and beside it the operators it needs.

    Raises:
        InputError: ``path`` does not end in .ort, by which the runtime knows the format.
        UnsupportedModelError: ONNX Runtime refuses the model.
    """
    if path.suffix != ".ort":
        raise InputError(f"{path} must end in .ort: ONNX Runtime knows its own format by that")
    with tempfile.TemporaryDirectory() as folder:
        source, plain = Path(folder) / "model.onnx", Path(folder) / "optimised.onnx"
        sparse.write(model, source, Options(verify=False))
        with atomic_files(path, operators_path(path).name) as (temporary, operators):
            convert = partial(
                load, source, name=str(path), save=temporary, settings={"session.save_model_format": "ORT"}
            )
            without = _PROCESSOR_SPECIFIC
            convert(without=without)
            if temporary.stat().st_size > _GROWN * source.stat().st_size:
                without = (*_PROCESSOR_SPECIFIC, "ConstantFolding")
                convert(without=without)
            # Once more as ONNX, with the same optimisers: no library takes the runtime's own format apart, and the
            # operators that a reduced build needs are those that are left after optimising.
            load(source, name=str(path), save=plain, without=without)
            operators.write_text(required_operators(onnx.load(plain)), encoding="utf-8")
            if options.verify:
                load(temporary, name=str(path))
    files = tuple(File.of(path.parent, file) for file in (path, operators_path(path)))
    return Artifact(path.name, "ort", files, EXACT, options.to_dict())


def required_operators(proto: onnx.ModelProto) -> str:
    """Return the configuration of a reduced build: a line ``domain;version;operators`` for each domain and version.

    The version is the one in which an operator took the form that the model uses. ONNX Runtime's own tool writes the
    same lines, but its package imports PyTorch where that is installed.
    """
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    found: dict[tuple[str, int], set[str]] = {}
    for graph in graphs(proto.graph):
        for node in graph.node:
            known = onnx.defs.has(node.op_type, node.domain)
            since = onnx.defs.get_schema(node.op_type, versions[node.domain], node.domain).since_version if known else 1
            found.setdefault((node.domain or "ai.onnx", since), set()).add(node.op_type)
    return "".join(f"{domain};{since};{','.join(sorted(ops))}\n" for (domain, since), ops in sorted(found.items()))


def refuse(path: Path) -> NoReturn:
    """Refuse to read: the format is the runtime's own and goes one way.

    Raises:
        UnsupportedModelError: Always.
    """
    raise UnsupportedModelError(
        f"{path} is in ONNX Runtime's own format, which goes one way: use the .onnx it came from"
    )
