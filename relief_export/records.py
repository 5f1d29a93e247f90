"""Atomic writes, hashes, the lock of a build folder, and the record that a stage leaves.

A file is either absent or whole: it is written under a temporary name in the same folder, flushed to the disk and
renamed. Make's targets are the records, so a record is always the last thing a stage writes.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relief_export.errors import InputError, IntegrityError, ReliefError
from relief_export.outcomes import OUTCOMES
from relief_export.schema import build, check
from relief_export.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator

RECORDS = {
    "train": "dense/record.json",
    "relieve": "relieved/record.json",
    "quantise": "quantised/record.json",
    "export": "artifacts/record.json",
    "validate": "validation.json",
    "audit": "audit.json",
}
"""Stage -> the record that it leaves in the build folder, in the order in which the stages run."""

DEVICE_RECORDS = "device/*/*.json"
"""Where an emulated run leaves its record: a folder for each target, in it a file for each program."""

_LOCK = ".lock"
_FOREIGN_WRITER = re.compile(r"\(os error (\d+)\)|PytorchStreamWriter|inline_container")
"""How safetensors and torch, which raise errors of their own, say that the disk took no more."""

_PACKAGES = ("torch", "torchvision", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "numpy", "scipy")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it to the disk and rename it to ``path``.

    Raises:
        InputError: ``path`` is a folder, a device or a pipe, which a rename would replace.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is there and is no file: write to another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept because some writers (np.savez, SciPy) append their own where it is missing.
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            # Before the rename, or a power failure could leave the new name with nothing behind it.
            os.fsync(file.fileno())
        # mkstemp lets the owner alone read a file.
        temporary.chmod(0o644)
        temporary.replace(path)
    except ReliefError:
        raise
    except Exception as error:
        # Not OSError alone: safetensors and torch report a full disk by errors of their own.
        if (failure := _disk_failure(error, path)) is None:
            raise
        raise failure from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success it replaces ``path`` as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        # A folder cannot be renamed onto one that is not empty, so the old one steps aside and comes back on failure.
        old = temporary.with_name(f"{temporary.name}-old")
        if path.exists():
            path.replace(old)
        try:
            temporary.replace(path)
        except OSError:
            if old.exists():
                old.replace(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise _disk_failure(error, path) or error from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _disk_failure(error: Exception, path: Path) -> OSError | None:
    """Return the failure to write ``path`` that ``error`` speaks of, named; None where it speaks of something else.

    A full disk does not say what could not be written, NumPy tells the bytes alone, and safetensors and torch wrap it.
    """
    if isinstance(error, OSError):
        if error.filename is not None:
            return error
        return OSError(error.errno, error.strerror or f"the disk took no more ({error})", str(path))
    found = _FOREIGN_WRITER.search(str(error))
    if found is None:
        return None
    # torch does not pass the system's reason on; in practice a stream that cannot be written meets a full disk.
    number = int(found[1]) if found[1] else errno.ENOSPC
    return OSError(number, os.strerror(number), str(path))


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a build folder, which dies with the process that holds it.

    Args:
        folder: The build folder.
        shared: Let others in that only read what is there and add a record of their own; whoever changes the folder
            waits for all of them.

    Raises:
        InputError: Another process works in ``folder``.
    """
    try:
        import fcntl  # noqa: PLC0415 - absent on Windows, where two runs in one folder are the user's to avoid
    except ModuleNotFoundError:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK
    with path.open("a+", encoding="ascii") as file:
        try:
            # The kernel's lock and not the file's presence: a killed process leaves the file and loses the lock.
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"{_holder(file.read())} works in {folder}: wait for it, or give this run another folder with --out"
            ) from None
        file.truncate(0)
        if shared:
            # No name is left: several may hold it, and the file has room for one.
            yield
            return
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)  # the file stays: removing it would let two processes hold two locks of one name


def _holder(written: str) -> str:
    """Say who holds a lock, from what its file says."""
    return f"process {written.strip()}" if written.strip() else "a validation or an audit"


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, content: object) -> None:
    """Write ``content`` as readable JSON, keys in the order given, atomically."""
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def as_read(content: Any) -> Any:  # noqa: ANN401  # whatever JSON holds
    """Return plain data as it will be read from a file: tuples as lists, keys as text."""
    return json.loads(json.dumps(content, allow_nan=False))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: The file is absent.
        IntegrityError: The file is not a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: run the stage that writes it first") from None
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not valid JSON ({error}): remove it and run its stage again") from None
    if not isinstance(content, dict):
        raise IntegrityError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and the libraries that can change a result."""
    found = {"python": platform.python_version(), "relief-export": VERSION}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | int]:
    """Return what a timing depends on: processor, cores, operating system."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.split(":", 1) for line in info.read_text().splitlines() if line.startswith("model name"))
        cpu = next((value.strip() for _, value in lines), cpu)
    return {"cpu": cpu, "cores": os.cpu_count() or 1, "system": f"{platform.system()} {platform.machine()}"}


@dataclass(frozen=True)
class Record:
    """What a stage leaves behind, and all that later stages and the report know of it.

    Attributes:
        stage: train, relieve, quantise, export, validate or audit; run-on for a run in an emulator.
        recipe: The resolved recipe as plain data.
        inputs: Relative path of each file read -> its SHA-256.
        seconds: Wall time of the stage.
        outcome: The stage's own figures.
    """

    stage: str
    recipe: dict[str, Any]
    inputs: dict[str, str]
    seconds: float
    outcome: dict[str, Any]
    versions: dict[str, str] = field(default_factory=versions)
    machine: dict[str, str | int] = field(default_factory=machine)

    def write(self, path: Path) -> None:
        """Write the record to ``path``, atomically."""
        write_json(path, asdict(self))


def read_record(path: Path, stage: str) -> Record:
    """Read the record of ``stage`` from ``path``, and check every field that anything later reads of it.

    Raises:
        InputError: There is no record.
        IntegrityError: It is damaged, of another stage, or lacks a field of ``outcomes``.
    """
    content = read_json(path)
    try:
        record = build(Record, content, "")
        if record.stage != stage:
            raise IntegrityError(f"it is the record of stage {record.stage!r}")
        check(record.outcome, OUTCOMES[stage], "outcome")
    except InputError as error:
        raise IntegrityError(
            f"{path} is not a record of stage {stage!r} ({error}): remove it and run {stage!r} again"
        ) from None
    return record
