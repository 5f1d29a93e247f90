"""Models in ONNX Runtime, and generated C, fed with samples batch by batch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from relief_export import formats
from relief_export.errors import InputError, IntegrityError, UnsupportedModelError
from relief_export.evaluation import samples
from relief_export.evaluation.programs import ProgramSession
from relief_export.formats import c
from relief_export.formats.runtime import load, reason
from relief_export.printing import counted

if TYPE_CHECKING:
    import onnx_ir as ir

    from relief_export.progress import Progress

Array: TypeAlias = np.ndarray[Any, Any]

BATCH = 500
"""Samples in one call: enough to fill the machine, small enough for the activations of a large network."""

_RUNTIME_ERRORS = (
    runtime.Fail, runtime.InvalidArgument, runtime.InvalidGraph, runtime.InvalidProtobuf, runtime.NoSuchFile,
    runtime.NotImplemented, runtime.RuntimeException,
)  # fmt: skip
_NUMBERS = re.compile(r"tensor\((bool|float|float16|double|u?int(8|16|32|64))\)")
"""Types of outputs that can be compared: the runtime gives NumPy no others but strings."""
_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
_DTYPES = _FLOATS | {f"tensor({kind})": np.dtype(kind) for kind in ("int8", "int16", "int32", "int64", "uint8")}


@dataclass(frozen=True)
class Session:
    """A loaded model whose inputs' first axis is the batch.

    Attributes:
        name: What error messages call the model.
        threads: Intra-op threads; 0 is ONNX Runtime's own choice.
        optimised: Whether graph optimisations are on.
    """

    name: str
    inner: ort.InferenceSession | ProgramSession
    threads: int
    optimised: bool

    @property
    def input_shape(self) -> tuple[int | str | None, ...]:
        """Shape of the first input as the model states it; the first axis is the batch."""
        return tuple(self.inner.get_inputs()[0].shape)

    @property
    def runtime(self) -> str:
        """What runs it: ONNX Runtime with its version, or the compiler of generated C with its flags."""
        return self.inner.compiler if isinstance(self.inner, ProgramSession) else f"ONNX Runtime {ort.__version__}"

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return tuple(output.name for output in self.inner.get_outputs())

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return tuple(each.name for each in self.inner.get_inputs())

    def feed(self, x: samples.ByName) -> dict[str, Array]:
        """Check samples ``(N, ...)`` against the inputs and name them.

        Raises:
            InputError: An input has no samples, or rank, an axis or the element type does not fit.
        """
        given = {each.name: each for each in self.inner.get_inputs()}
        if not isinstance(x, Mapping):
            if len(given) != 1:
                names = ", ".join(given)
                raise InputError(f"{self.name} has {len(given)} inputs ({names}): give samples of each by its name")
            x = {next(iter(given)): x}
        if set(x) != set(given):
            raise InputError(f"{self.name} has the inputs {', '.join(given)}, the samples are of {', '.join(x)}")
        return {name: self._fitted(each, x[name]) for name, each in given.items()}

    def _fitted(self, given: Any, x: Array) -> Array:  # noqa: ANN401  the runtime's argument, or a program's
        wanted = _DTYPES.get(given.type)
        fits = len(x.shape) == len(given.shape) and all(
            not isinstance(axis, int) or axis == size for axis, size in zip(given.shape[1:], x.shape[1:], strict=True)
        )
        if not fits:
            wants = "x".join(str(axis or "?") for axis in given.shape)
            raise InputError(f"{self.name}: input {given.name!r} has shape {wants}, the samples {_times(x.shape)}")
        # Any floats will do, but no whole number may be cut.
        if wanted is None or not (x.dtype.kind == "f" if given.type in _FLOATS else np.can_cast(x.dtype, wanted)):
            raise InputError(
                f"{self.name}: input {given.name!r} is {given.type} and the samples are {x.dtype}: "
                "give floating-point samples to a floating-point model, whole numbers to one of whole numbers"
            )
        return np.ascontiguousarray(x, dtype=wanted)

    def run(self, x: samples.ByName, *, batch: int = BATCH, progress: Progress | None = None) -> tuple[Array, ...]:
        """Run samples ``(N, ...)`` batch by batch and return every output ``(N, ...)``.

        A model with a fixed batch is run with that many samples at a time.

        Raises:
            InputError: The samples do not fit, or their number is no multiple of a fixed batch.
            UnsupportedModelError: The first axis of an output is not the batch.
        """
        first = (each.shape[0] for each in self.inner.get_inputs() if each.shape)
        # A symbolic axis is a string or None, a fixed one a number.
        fixed = next((axis for axis in first if isinstance(axis, int)), None)
        size, count = batch if fixed is None else fixed, samples.size(x)
        if not count or not size or (fixed is not None and count % fixed):
            raise InputError(
                f"{self.name}: {counted(count, 'sample')} cannot be run in batches of {size}: give a multiple of it"
            )
        parts = []
        for start in range(0, count, size):
            parts.append(self._step(samples.part(x, start, start + size)))
            if progress is not None:
                progress(self.name, min(start + size, count), count, "")
        return tuple(np.concatenate(pieces) for pieces in zip(*parts, strict=True))

    def _step(self, x: samples.ByName) -> list[Array]:
        count = samples.size(x)
        try:
            results: list[Array] = self.inner.run(None, self.feed(x))
        except _RUNTIME_ERRORS as error:
            raise UnsupportedModelError(
                f"{self.name} does not run with {counted(count, 'sample')} ({reason(error)}): "
                "export it with a batch axis"
            ) from None
        for output, result in zip(self.outputs, results, strict=True):
            # Outputs of batches are joined along this axis: another one would be joined into nonsense without an error.
            if not isinstance(result, np.ndarray) or result.shape[:1] != (count,):
                raise UnsupportedModelError(
                    f"{self.name}: output {output!r} has no batch axis in front: export the model with one"
                )
        return results


def open_session(source: str | Path | ir.Model, *, name: str = "", optimised: bool = True, threads: int = 0) -> Session:
    """Load a model into ONNX Runtime on the CPU, deterministic and silent.

    Args:
        source: An ``.onnx`` or ``.ort`` file, which the runtime reads itself; a folder of SciPy matrices, which is
            rebuilt; a folder of generated C, which is compiled, with vectors where ``optimised``; or a model in memory.
        name: What messages call it; the path by default.
        optimised: All graph optimisations, or none.
        threads: Intra-op threads; 0 leaves the choice to ONNX Runtime.

    Raises:
        InputError: There is no such file.
        IntegrityError: The file is damaged.
        MissingCompilerError: It is C, and there is no compiler.
        UnsupportedModelError: It has an operator that the runtime does not know, an input without a batch axis, or an
            output that is not of numbers.
    """
    source = Path(source) if isinstance(source, str) else source
    name = name or str(source if isinstance(source, Path) else source.graph.name)
    if isinstance(source, Path) and c.is_program(source):
        return Session(name, ProgramSession(source, vectors=optimised), 1, optimised)
    inner = load(_loadable(source), name=name, optimised=optimised, threads=threads, fault=IntegrityError)
    inputs = inner.get_inputs()
    if scalar := next((each.name for each in inputs if not each.shape), None):
        raise UnsupportedModelError(f"{name}: input {scalar!r} has no batch axis: export the model with one")
    for output in inner.get_outputs():
        if not _NUMBERS.fullmatch(output.type):
            raise UnsupportedModelError(f"{name}: output {output.name!r} is {output.type}: give one of numbers")
    return Session(name, inner, threads, optimised)


def input_names(model: Path) -> tuple[str, ...]:
    """Return the names of a model's inputs; see ``open_session`` for what it may be and what is raised."""
    # Known without a compiler.
    return (c.about(model).input,) if c.is_program(model) else open_session(model, optimised=False).inputs


def _loadable(source: Path | ir.Model) -> Path | bytes:
    if isinstance(source, Path):
        if not source.exists():
            raise InputError(f"{source} does not exist: give an ONNX model")
        if source.is_file():
            return source
        source = formats.read(source)
    proto: bytes = formats.to_proto(source).SerializeToString()
    return proto


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
