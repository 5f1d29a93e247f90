"""Two real processes: the same network on both, near the one-process network, and one writer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import convolutional, data, mlp, states_equal

from relief_export.recipe import TrainConfig
from relief_export.training import distributed
from relief_export.training.checkpoints import load_weights
from relief_export.training.fit import evaluate, fit

CONFIG = TrainConfig(4, "sgd", lr=0.1, weight_decay=0.01, batch=18)  # 96 samples: a last batch of 6
MASKS = {"1.weight": torch.arange(16 * 64).view(16, 64) % 3 > 0}
# The gradient of a batch is summed in another order: rounding errors of float32, which 24 steps of SGD carry on.
TOLERANCE = 1e-5

WORKER = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from pathlib import Path
from helpers import convolutional, data, mlp
from test_distributed import CONFIG, MASKS
from relief_export.training import distributed
from relief_export.training.checkpoints import save_weights
from relief_export.training.fit import evaluate, fit

with distributed.setup():
    folder, rank = Path(sys.argv[1]), distributed.rank()
    assert distributed.world() == 2 and distributed.is_main() == (rank == 0)
    for name, model, masks in (("mlp", mlp(rank), MASKS), ("convolutional", convolutional(rank), {})):
        told = []
        samples, path = data(augment=name == "mlp"), folder / f"{name}-{rank}"
        listen = lambda *line: told.append(line)
        result = fit(model, samples, CONFIG, masks=masks, seed=3, checkpoint=path, progress=listen)
        save_weights(model, folder / f"{name}-{rank}.safetensors")
        assert evaluate(model, data().test).samples == 48
        assert evaluate(model, data().test, logits=True).logits.shape == (48, 3)
        assert bool(told) == (rank == 0)
        (folder / f"{name}-{rank}.txt").write_text(repr((result.best, result.validation_accuracy)))
    with distributed.main_first():
        order = folder / "order"
        order.write_text((order.read_text() if order.exists() else "") + str(rank))
assert not distributed.active()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder), str(Path(__file__).parent)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def loaded(folder, name, rank):
    model = {"mlp": mlp, "convolutional": convolutional}[name](7)
    load_weights(model, folder / f"{name}-{rank}.safetensors")
    return model


@pytest.mark.parametrize("name", ["mlp", "convolutional"])
def test_all_processes_end_with_the_same_network_and_one_writes(folder, name):
    assert states_equal(loaded(folder, name, 0).state_dict(), loaded(folder, name, 1).state_dict())
    assert (folder / f"{name}-0.txt").read_text() == (folder / f"{name}-1.txt").read_text()
    assert (folder / f"{name}-0").exists()
    assert not (folder / f"{name}-1").exists()
    assert (folder / "order").read_text() == "01"


def test_two_processes_take_the_steps_of_one(folder):
    torch.set_num_threads(1)
    model = mlp(0)
    fit(model, data(augment=True), CONFIG, masks=MASKS, seed=3)
    both = loaded(folder, "mlp", 0)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(both.state_dict()[name], tensor, rtol=0, atol=TOLERANCE)
    assert both[1].weight[~MASKS["1.weight"]].count_nonzero() == 0


def test_batch_norm_over_parts_of_a_batch_learns_as_well(folder):
    # Each process normalises its own part of a batch, so weights differ from one process's; accuracy must not suffer.
    assert evaluate(loaded(folder, "convolutional", 0), data().test).accuracy > 0.9


def test_alone_the_verbs_do_nothing():
    with distributed.setup(), distributed.main_first():
        assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
        distributed.barrier()
        assert distributed.all_reduce(torch.ones(2)).tolist() == [1, 1]
        assert distributed.broadcast(torch.ones(2)).tolist() == [1, 1]
