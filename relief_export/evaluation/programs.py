"""A folder of generated C as a session: compiled, loaded, and run with the calls of ONNX Runtime's sessions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relief_export.cgen.compiler import FAST, PLAIN, find_compiler, load
from relief_export.errors import MissingCompilerError
from relief_export.formats import c

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Argument:
    """An input or an output; its first axis is the batch."""

    name: str
    shape: list[int | str]
    type: str = "tensor(float)"


class ProgramSession:
    """Runs samples one after the other, on one thread.

    Args:
        folder: Written by ``formats.c``.
        vectors: Compile for the machine's whole instruction set; otherwise for none, in plain C.

    Attributes:
        compiler: Its command, version and flags, in words.

    Raises:
        MissingCompilerError: There is no C compiler.
        IntegrityError: The program does not compile, or program.json is damaged.
    """

    def __init__(self, folder: Path, *, vectors: bool = True) -> None:
        self._about = c.about(folder)
        compiler = find_compiler()
        if compiler is None:
            raise MissingCompilerError(folder)
        flags = FAST if vectors else PLAIN
        self._program = load(folder, self._about.name, compiler, flags)
        self.compiler = f"{compiler.version}, {' '.join(flags)}"

    def get_inputs(self) -> list[Argument]:
        """Return the one input."""
        return [Argument(self._about.input, ["batch", *self._about.input_shape[1:]])]

    def get_outputs(self) -> list[Argument]:
        """Return the one output."""
        return [Argument(self._about.output, ["batch", *self._about.output_shape[1:]])]

    def run(self, _names: Sequence[str] | None, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        """Return the outputs of samples (N, ...)."""
        (x,) = feeds.values()
        return [self._program.run(x).reshape(len(x), *self._about.output_shape[1:])]
