"""The one family of errors, and what an answer of no says.

The library raises these and never prints or exits; the command line turns them into one sentence and an exit code.
Each message says what is wrong, names the object (file, tensor with its shape, key), and says what to do.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """One reason for an answer of no: what a gate found, beside what it was told to allow.

    Attributes:
        code: Which check: "sha256", "loads", "finite", "relative_error", "predictions", "accuracy", "flash", "ram",
            "flash_growth" or "ram_growth".
        file: The file that failed it.
        actual: What was measured, None where the answer is not a number. limit: What was allowed.
        unit: Of both: "bytes", "fraction", "ratio", or "" where there is none.
        message: The same in one sentence.
    """

    code: str
    file: str
    actual: float | None
    limit: float | None
    unit: str
    message: str


class ReliefError(Exception):
    """Base of every error this package raises on purpose; ``exit_code`` is what the command line leaves with."""

    exit_code = 2


class InputError(ReliefError):
    """The user's input is wrong: a file, a value, a shape, a name."""


class IntegrityError(InputError):
    """A file is truncated, corrupted, foreign or not what its manifest promises."""


class UnsupportedModelError(InputError):
    """A model has something the requested operation must not guess about."""


class MissingExtraError(InputError):
    """A command needs packages that are not installed."""

    def __init__(self, what: str, package: str) -> None:
        super().__init__(f"{what} needs {package}, which is not installed: pip install 'relief-export[torch]'")
        self._arguments = (what, package)

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        """Let it travel between processes, as pools and test runners send errors."""
        return type(self), self._arguments


class MissingToolError(InputError):
    """A command needs a program of the system, such as a compiler, that is not installed."""

    def __init__(self, what: str, program: str, remedy: str) -> None:
        super().__init__(f"{what} needs {program}, which is not installed: {remedy}")
        self._arguments = (what, program, remedy)

    def __reduce__(self) -> tuple[type[MissingToolError], tuple[str, str, str]]:
        """Let it travel between processes, as ``MissingExtraError`` does."""
        return type(self), self._arguments


class MissingCompilerError(InputError):
    """Generated C cannot be compiled: there is no compiler."""

    def __init__(self, what: object) -> None:
        super().__init__(
            f"{what} is C, and there is no C compiler: install gcc or clang, set CC, or pip install 'relief-export[c]'"
        )
