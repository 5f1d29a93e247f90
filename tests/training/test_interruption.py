"""A training killed at any moment goes on where it was and ends with the same bits."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import convolutional, data, states_equal

from relief_export.recipe import TrainConfig
from relief_export.training.fit import fit

CONFIG = TrainConfig(5, lr=0.01, milestones=(3,), weight_decay=0.01, batch=16)
CYCLE = TrainConfig(
    5, "sgd", lr=0.05, schedule="one-cycle", nesterov=True, decay="weights", weight_decay=0.01, batch=16
)
COSINE = TrainConfig(5, "adamw", lr=0.01, schedule="cosine", warmup=0.7, label_smoothing=0.1, batch=16)
MASKS = {"0.0.weight": torch.arange(54).view(6, 1, 3, 3) % 4 > 0, "2.weight": torch.arange(162).view(3, 54) % 5 > 0}
BATCHES = 6

CHILD = """
import os, signal, sys
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from helpers import convolutional, data
from test_interruption import CONFIG, MASKS
from relief_export.training import checkpoints
from relief_export.training.fit import fit

moment, folder = sys.argv[1], Path(sys.argv[2])
told = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def progress(*_):
    global told
    told += 1
    if moment == f"batch {{told}}":
        die()

save = torch.save
saved = 0
def torn(state, file):
    global saved
    saved += 1
    save(state, file)
    if moment == f"write {{saved}}":
        file.truncate(1000)
        file.flush()
        die()
checkpoints.torch.save = torn

model = convolutional()
fit(model, data(augment=True), CONFIG, masks=MASKS, seed=3, checkpoint=folder / "checkpoint", progress=progress)
die()
"""


def run(folder, moment):
    code = CHILD.format(here=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", code, moment, str(folder)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


def uninterrupted(config):
    torch.set_num_threads(1)
    model = convolutional()
    fit(model, data(augment=True), config, masks=MASKS, seed=3)
    return model.state_dict()


def test_a_training_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    # In the first epoch, in the third, while the second checkpoint from there is written, at an epoch's end, after all.
    moments = {"batch 2": None, f"batch {2 * BATCHES + 3}": 2, "write 2": 3, f"batch {BATCHES}": 3, "end": 5}
    for moment, epoch in moments.items():
        code, errors = run(tmp_path, moment)
        assert code == -signal.SIGKILL, errors
        done = torch.load(checkpoint, weights_only=True)["epoch"] if checkpoint.exists() else None
        assert done == epoch  # no more than the current epoch is lost
    model = convolutional()
    result = fit(model, data(augment=True), CONFIG, masks=MASKS, seed=3, checkpoint=checkpoint)
    assert result.resumed_at == 5
    assert states_equal(model.state_dict(), uninterrupted(CONFIG))


@pytest.mark.parametrize("config", [CYCLE, COSINE])
def test_an_interrupt_in_the_middle_of_an_epoch_is_resumed_too(tmp_path, config):
    checkpoint, told = tmp_path / "checkpoint", []

    def interrupt(*line):
        told.append(line)
        if len(told) == 3 * BATCHES + 1:
            raise KeyboardInterrupt

    torch.set_num_threads(1)
    with pytest.raises(KeyboardInterrupt):
        fit(convolutional(), data(augment=True), config, masks=MASKS, seed=3, checkpoint=checkpoint, progress=interrupt)
    model = convolutional()
    result = fit(model, data(augment=True), config, masks=MASKS, seed=3, checkpoint=checkpoint)
    assert result.resumed_at == 3
    assert [line.epoch for line in result.history] == [1, 2, 3, 4, 5]
    assert states_equal(model.state_dict(), uninterrupted(config))
