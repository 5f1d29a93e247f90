"""A small network written by hand in C, and what the tests of devices need of the machine."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from relief_export.targets import core_of

TOY = Path(__file__).parent / "toy"
WEIGHTS = np.array([[0.5, -1, 0, 0, 2, 0], [0, 0, 0.25, 0, 0, -3], [1] * 6, [0, 0, 0, 4, 0, 0]], np.float32)
READOUT = np.array([[1, 0, 0, -1], [0, 2, 0, 0.5], [0, 0, 1, 0]], np.float32)


def needs(target, *, emulator=True):
    """Skip a test where the compiler or the emulator of a target is missing."""
    core = core_of(target)
    tools = [core.compiler, *((core.emulator[0],) if emulator else ())]
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed: {core.install}; {core.emulator_install}")


@pytest.fixture
def toy():
    """Return the folder of the network, samples, and its outputs in float64."""
    x = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    hidden = np.maximum(x.astype(np.float64) @ WEIGHTS.T, 0)
    return TOY, x, np.maximum(hidden @ READOUT.T, 0)
