"""Records: atomic writes on a disk that is full, and the lock of a build folder."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from relief_export.errors import InputError
from relief_export.records import atomic_path, locked


def save_with_torch(path: Path) -> None:
    # A device that takes nothing; torch's writer reports it by an error of its own, not by OSError.
    with Path("/dev/full").open("wb") as file:
        torch.save({"w": torch.zeros(1 << 16)}, file)
    path.touch()


def save_with_safetensors(_path: Path) -> None:
    # safetensors writes to paths alone: the error that it raises on a full disk, word for word.
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def save_with_numpy(_path: Path) -> None:
    with Path("/dev/full").open("wb") as file:
        np.save(file, np.zeros(1 << 16))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
@pytest.mark.parametrize("write", [save_with_torch, save_with_safetensors, save_with_numpy])
def test_a_full_disk_names_the_file_whoever_wrote(write, tmp_path):
    with (
        pytest.raises(OSError, match="No space left on device") as caught,
        atomic_path(tmp_path / "weights") as temporary,
    ):
        write(temporary)
    assert caught.value.filename == str(tmp_path / "weights")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_failure_of_the_disk_stays_what_it_is(tmp_path):
    with pytest.raises(SafetensorError, match="shared"), atomic_path(tmp_path / "weights"):
        raise SafetensorError("tensors are shared")
    shared = torch.zeros(2)
    with pytest.raises(RuntimeError, match="share memory"), atomic_path(tmp_path / "weights") as temporary:
        save_file({"a": shared, "b": shared}, temporary)


def test_a_build_folder_belongs_to_one_process_at_a_time(tmp_path):
    code = (
        "import sys; from pathlib import Path; from relief_export.records import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {other.pid} works in {tmp_path}"), locked(tmp_path):
            pass
        other.kill()  # a lock dies with its process
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    with locked(tmp_path):
        pass


def test_who_only_reads_a_build_folder_lets_others_in_that_only_read(tmp_path):
    with locked(tmp_path):
        (tmp_path / ".lock").write_text("12345\n")  # as after a process that was killed
        with pytest.raises(InputError, match="process 12345 works in"), locked(tmp_path, shared=True):
            pass
    (tmp_path / ".lock").write_text("12345\n")
    with (
        locked(tmp_path, shared=True),
        locked(tmp_path, shared=True),
        pytest.raises(InputError, match=f"a validation or an audit works in {tmp_path}"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass
