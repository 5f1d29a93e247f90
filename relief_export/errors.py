"""The one family of errors.

The library raises these and never prints or exits; the command line turns them into one sentence and an exit code.
Each message says what is wrong, names the object (file, tensor with its shape, key), and says what to do.
"""


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


class MissingToolError(InputError):
    """A command needs a program of the system, such as a compiler, that is not installed."""

    def __init__(self, what: str, program: str, remedy: str) -> None:
        super().__init__(f"{what} needs {program}, which is not installed: {remedy}")
