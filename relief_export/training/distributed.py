"""One process or several, behind the same few verbs; with one process each of them costs nothing.

``torchrun --nproc-per-node N`` starts the processes and sets their environment; ``setup`` joins them.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Iterator


def active() -> bool:
    """Return whether a process group is initialised."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's number, 0 when alone."""
    return dist.get_rank() if active() else 0


def world() -> int:
    """Return the number of processes, 1 when alone."""
    return dist.get_world_size() if active() else 1


def is_main() -> bool:
    """Return whether this process is the one that writes files and draws progress."""
    return rank() == 0


def device() -> torch.device:
    """Return the accelerator of this process if there is one, else the CPU."""
    if torch.cuda.is_available():
        # The local rank counts the processes of one machine, as its accelerators are counted.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def setup() -> Iterator[None]:
    """Join the process group that torchrun's environment describes, and leave it at the end; alone, do nothing."""
    # Whoever initialised the group closes it: one that is there already is left alone.
    if active() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    # gloo carries tensors on the CPU (data indices, counts), NCCL those on the accelerator.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum ``tensor`` over all processes, in place, and return it."""
    if active():
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Replace ``tensor`` by the main process's, in place, and return it."""
    if active():
        dist.broadcast(tensor, src=0)
    return tensor


def barrier() -> None:
    """Wait until every process is here."""
    if active():
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Let the main process run the block alone first (a download, a cache), then the others."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        # Also after an error, or the others would wait for a main process that is gone.
        if is_main():
            barrier()
