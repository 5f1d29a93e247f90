"""Run generated C inside ONNX Runtime, as one operator.

from relief_export import runtime

session = runtime.session("program")      # a folder that convert --to c --onnxruntime wrote
(y,) = session.run(None, {"x": x})        # an onnxruntime.InferenceSession like any other
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import onnxruntime as ort

from relief_export.cgen.compiler import FAST, Compiler, find_compiler
from relief_export.errors import InputError, MissingCompilerError, UnsupportedModelError
from relief_export.formats import c


def session(
    folder: str | Path, *, options: ort.SessionOptions | None = None, cache: str | Path | None = None
) -> ort.InferenceSession:
    """Build the operator of a folder of generated C, once, and open its model in ONNX Runtime.

    Args:
        folder: Written by ``convert --to c --onnxruntime``.
        options: Of the session; the operator is registered with them.
        cache: Where built libraries are kept; by default ``relief-export`` in $XDG_CACHE_HOME or ~/.cache. A library is
            named by what it is made of: sources, compiler, flags and processor.

    Raises:
        InputError: ``folder`` was written without ``--onnxruntime``.
        MissingCompilerError: There is no C compiler, and the library is not in the cache.
        IntegrityError: The program does not compile.
        UnsupportedModelError: ONNX Runtime refuses it.
    """
    folder = Path(folder)
    if not c.is_program(folder):
        raise InputError(f"{folder} is no folder of generated C: write one with convert --to c --onnxruntime")
    name = c.about(folder).name
    model = folder / f"{name}.onnx"
    if not model.is_file() or not (folder / f"{name}_ort.c").is_file():
        raise InputError(f"{folder} has no operator for ONNX Runtime: write it again with --onnxruntime")
    options = options or ort.SessionOptions()
    library = build(folder, Path(cache) if cache is not None else _cache())
    try:
        options.register_custom_ops_library(str(library))
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  # the runtime's exceptions share no other base
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(f"ONNX Runtime {ort.__version__} cannot load {model} ({reason})") from None


def build(folder: Path, cache: Path) -> Path:
    """Return the shared library of a folder's operator, from the cache if it is there.

    Raises:
        MissingCompilerError: There is no C compiler.
        IntegrityError: The program does not compile.
    """
    name = c.about(folder).name
    compiler = find_compiler()
    if compiler is None:
        raise MissingCompilerError(folder)
    stems = (f"{name}_ort", name, f"{name}_weights")
    files = [path for stem in stems if (path := folder / f"{stem}.c").is_file()]
    library = cache / f"{name}-{_key(folder, name, compiler)}.so"
    if not library.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        # In the cache itself, because a rename does not cross file systems.
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / library.name
            compiler.build(files, made, FAST)
            made.replace(library)  # whole or not at all, whoever else builds it
    return library


def _key(folder: Path, name: str, compiler: Compiler) -> str:
    """Return what tells a library apart: ``-march=native`` makes it the processor's own."""
    digest = hashlib.sha256(repr((compiler, FAST, _processor())).encode())
    for suffix in (".h", ".c", "_ort.c", "_weights.c", "_weights.bin"):
        path = folder / f"{name}{suffix}"
        digest.update(suffix.encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()[:20]


def _processor() -> str:
    """Return the processor's model and its instruction set, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return " ".join(os.uname()) if hasattr(os, "uname") else ""
    told = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relief-export"
