"""The relief loop: what it chooses, what it leaves, and that being killed changes nothing."""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from relief_export.errors import InputError, IntegrityError
from relief_export.recipe import ReliefConfig
from relief_export.relief.iterations import Loop, best_of
from relief_export.relief.journal import Iteration
from relief_export.relief.masks import Masks

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def nothing(model, masks, iteration, checkpoint):
    """A retraining that leaves the network as it is."""


def scripted(accuracies):
    """Measure: the dense network, then before and after retraining of each iteration."""
    values = iter(accuracies)
    return lambda _model: next(values)


def config(**changes):
    return ReliefConfig(**({"iterations": 3, "alpha_fc": 0.8, "tolerance": 0.02} | changes))


def test_the_smallest_network_within_the_tolerance_is_the_result():
    model = net()
    loop = Loop([X], nothing, scripted([0.90, 0.5, 0.89, 0.5, 0.88, 0.5, 0.87]))
    found = loop.run(model, config())
    assert [row.within_tolerance for row in found.history] == [True, True, True, False]
    assert [row.accuracy_before for row in found.history] == [None, 0.5, 0.5, 0.5]
    kept = [row.kept for row in found.history]
    assert kept[0] == found.history[0].dense == 6 * 8 + 8 + 8 * 3 + 3
    assert kept == sorted(kept, reverse=True)
    assert kept[3] < kept[2] < kept[1]
    assert found.iteration == 2
    assert found.chosen is found.history[2]
    assert found.masks.count(model).kept == kept[2]
    assert found.masks.apply_(model) == {}  # the network holds the chosen weights
    assert json.loads(json.dumps(found.to_dict()))["iteration"] == 2


def test_the_dense_network_is_the_result_where_nothing_else_is_good_enough():
    model, dense = net(), net()
    found = Loop([X], nothing, scripted([0.9] + [0.1] * 6)).run(model, config())
    assert (found.iteration, len(found.masks)) == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_patience_counts_iterations_in_a_row():
    script = [0.9, *(0, 0.5), *(0, 0.9), *(0, 0.5), *(0, 0.5), *(0, 0.9)]
    found = Loop([X], nothing, scripted(script)).run(net(), config(iterations=9, patience=2))
    assert [row.accuracy for row in found.history] == [0.9, 0.5, 0.9, 0.5, 0.5]


def test_masks_only_grow_and_given_ones_stay():
    seen = []
    start = Masks({"0.weight": torch.rand(8, 6, generator=torch.Generator().manual_seed(1)) > 0.3})
    Loop([X], lambda _m, masks, _i, _c: seen.append(masks), lambda _: 0.9).run(net(), config(), masks=start)
    for before, after in itertools.pairwise([start, *seen]):
        assert (before & after).same(after)


def test_rewinding_retrains_the_initial_weights_under_the_masks():
    model, given = net(), []
    init = {name: torch.full_like(tensor, 0.25) for name, tensor in model.state_dict().items()}

    def retrain(network, *_):
        given.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        with torch.no_grad():
            network[0].weight.mul_(2)

    Loop([X], retrain, lambda _: 0.9).run(model, config(iterations=2, rewind=True), init=init)
    for state in given:
        assert set(state["0.weight"].unique().tolist()) == {0.0, 0.25}
    with pytest.raises(InputError, match=r"relief.rewind needs the network's initial weights"):
        Loop([X], retrain, lambda _: 0.9).run(model, config(rewind=True))


def test_a_retraining_that_revives_connections_is_refused():
    def retrain(network, *_):
        with torch.no_grad():
            network[0].weight.add_(1)

    with pytest.raises(InputError, match=r"the retraining let masked entries of 0.weight grow"):
        Loop([X], retrain, lambda _: 0.9).run(net(), config())


def test_an_empty_calibration_set_is_refused():
    with pytest.raises(InputError, match="calibration set is empty"):
        Loop([], nothing, lambda _: 0.9).run(net(), config())


def row(iteration, kept, accuracy, within):
    return Iteration(iteration, None, accuracy, None, 100, kept, within, {}, {}, {})


def test_among_equally_small_networks_the_more_accurate_is_chosen():
    rows = [row(0, 100, 0.9, True), row(1, 50, 0.89, True), row(2, 50, 0.895, True), row(3, 10, 0.1, False)]
    assert best_of(rows) == 2


def test_the_folder_holds_what_resuming_needs_and_no_more(tmp_path):
    script = [0.9, *(0, 0.9), *(0, 0.9), *(0, 0.5)]
    found = Loop([X], nothing, scripted(script)).run(net(), config(), folder=tmp_path)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert names == [
        "history.jsonl",
        "iterations/01/masks.safetensors",
        "iterations/01/weights.safetensors",
        "iterations/02/masks.safetensors",
        "iterations/02/weights.safetensors",
        "iterations/03/masks.safetensors",
        "iterations/03/weights.safetensors",
        "relief.json",
    ]
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["kept"] for line in lines] == [row.kept for row in found.history]
    assert set(lines[1]["seconds"]) == {"scoring", "disconnection", "retraining", "all"}
    assert lines[1]["layers"]["0"]["neurons"] == 8
    # A finished loop is only read; more iterations go on from the latest.
    again = Loop([X], None, scripted([])).run(net(), config(), folder=tmp_path)
    assert again.history == found.history
    assert again.masks.same(found.masks)
    more = Loop([X], nothing, scripted([0, 0.5])).run(net(), config(iterations=4), folder=tmp_path)
    assert more.history[:4] == found.history
    assert more.history[4].kept < found.history[3].kept


@pytest.mark.parametrize(("tolerance", "iteration"), [(0.0, 0), (0.01, 1), (0.02, 2), (0.5, 3)])
def test_another_tolerance_only_chooses_again(tmp_path, tolerance, iteration):
    def drift(network, masks, number, _checkpoint):
        with torch.no_grad():
            network[0].bias.add_(number)  # every iteration has its own weights
        masks.apply_(network)

    loop = Loop([X], drift, scripted([0.90, *(0, 0.89), *(0, 0.88), *(0, 0.5)]))
    first = loop.run(net(), config(), folder=tmp_path)
    model = net()
    again = Loop([X], None, scripted([])).run(model, config(tolerance=tolerance), folder=tmp_path)
    assert again.iteration == iteration
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["within_tolerance"] for line in lines] == [True] * (iteration + 1) + [False] * (3 - iteration)
    fresh = net()
    for number in range(1, iteration + 1):
        fresh[0].bias.data.add_(number).mul_(Masks.load(tmp_path / f"iterations/0{number}/masks.safetensors")["0.bias"])
    assert torch.equal(model[0].bias, fresh[0].bias)
    assert [row.kept for row in again.history] == [row.kept for row in first.history]


def test_other_settings_start_afresh(tmp_path):
    Loop([X], nothing, lambda _: 0.9).run(net(), config(), folder=tmp_path)
    found = Loop([X], nothing, lambda _: 0.8).run(net(), config(alpha_fc=0.7), folder=tmp_path)
    assert [row.accuracy for row in found.history] == [0.8] * 4


def test_damaged_files_are_named(tmp_path):
    Loop([X], nothing, lambda _: 0.9).run(net(), config(), folder=tmp_path)
    weights = tmp_path / "iterations/03/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(IntegrityError, match=r"03/weights.safetensors is not a whole safetensors file"):
        Loop([X], nothing, lambda _: 0.9).run(net(), config(), folder=tmp_path)
    (tmp_path / "history.jsonl").write_text('{"iteration": 0}\n')
    with pytest.raises(IntegrityError, match=r"history.jsonl is damaged"):
        Loop([X], nothing, lambda _: 0.9).run(net(), config(), folder=tmp_path)


# Real training, in processes of its own.

SCRIPT = textwrap.dedent(
    """
    import sys, torch
    from pathlib import Path
    from torch import nn
    from relief_export.recipe import ReliefConfig, TrainConfig
    from relief_export.relief.loop import relieve
    from relief_export.training import distributed
    from relief_export.training.data import DataSet, Split

    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.rand(96, 1, 8, 8, dtype=torch.float32)
    split = Split.of(x, (x.mean((1, 2, 3)) * 60).long() % 3)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3),
    )
    folder = Path(sys.argv[1])
    with distributed.setup():
        found = relieve(
            model, DataSet(split, split, split, 3, (1, 8, 8)),
            ReliefConfig(iterations=4, alpha_conv=0.8, alpha_fc=0.8, tolerance=1.0, samples=64),
            TrainConfig(epochs=6, batch=32), init=None, seed=0, folder=folder,
            progress=lambda *what: print(*what[:3], flush=True),
        )
        (folder / f"rank{distributed.rank()}").mkdir()
        found.masks.save(folder / f"rank{distributed.rank()}" / "masks.safetensors")
        torch.save(model.state_dict(), folder / f"rank{distributed.rank()}" / "model.pt")
    """
)


def start(folder, *launcher):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    script = folder.with_suffix(".py")
    script.write_text(SCRIPT)
    command = [sys.executable, *launcher, str(script), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def result(folder, rank=0):
    return (folder / f"rank{rank}" / "masks.safetensors").read_bytes(), torch.load(folder / f"rank{rank}" / "model.pt")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop") / "whole"
    finish(start(folder))
    return folder


def test_a_killed_loop_ends_with_the_same_bits(uninterrupted, tmp_path):
    folder, started = tmp_path / "killed", []
    # In the first retraining, between two iterations, and in a later retraining.
    for moment in ("retrain 1/4 288 576", "relief 1 4", "retrain 3/4 384 576"):
        process = start(folder)
        for line in process.stdout:
            if line.strip() == moment:
                process.send_signal(signal.SIGKILL)
                break
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        process.stdout.close()
        process.stderr.close()
        started.append(moment)
    out = finish(start(folder))
    assert "retrain 1/4 96 576" not in out  # what was finished is not done again
    assert "retrain 3/4 96 576" not in out
    masks, state = result(folder)
    expected_masks, expected_state = result(uninterrupted)
    assert masks == expected_masks
    assert all(torch.equal(tensor, expected_state[name]) for name, tensor in state.items())
    for k in range(1, 5):
        name = f"iterations/{k:02d}/masks.safetensors"
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_two_processes_find_the_same_masks_and_one_writes(uninterrupted, tmp_path):
    folder = tmp_path / "two"
    finish(start(folder, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"))
    (masks, state), (other_masks, other_state) = result(folder, 0), result(folder, 1)
    assert masks == other_masks
    assert all(torch.equal(tensor, other_state[name]) for name, tensor in state.items())
    # The first selection sees the same network and samples as one process does; retraining sums in another order.
    name = "iterations/01/masks.safetensors"
    assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes()
    assert len((folder / "history.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_a_pruned_layer_is_refused_by_name(tensor):
    model = net()
    prune.identity(model[2], tensor)
    with pytest.raises(InputError, match=f"the {tensor} of layer '2' is computed from other tensors: .*prune.remove"):
        Loop([X], nothing, lambda _model: 0.5).run(model, config())
