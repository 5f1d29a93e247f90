"""The relief loop: what it chooses, what it leaves, and that being killed changes nothing."""

import copy
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.utils import prune

from relief_export.errors import InputError, IntegrityError
from relief_export.recipe import ReliefConfig
from relief_export.relief.history import History, Round
from relief_export.relief.loop import Loop, Relieved, _Run, best_of
from relief_export.relief.masks import Masks

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def nothing(model, masks, number, checkpoint):
    """A retraining that leaves the network as it is."""


def scripted(accuracies):
    """Measure: the dense network, then before and after retraining of each round."""
    values = iter(accuracies)
    return lambda _model: next(values)


def config(**changes):
    return ReliefConfig(**({"rounds": 3, "alpha_fc": 0.8, "accuracy_drop": 0.02} | changes))


def test_the_smallest_network_within_the_tolerance_is_the_result():
    model = net()
    loop = Loop([X], nothing, scripted([0.90, 0.5, 0.89, 0.5, 0.88, 0.5, 0.87]))
    found = loop.run(model, config())
    assert [row.eligible for row in found.history] == [True, True, True, False]
    assert [row.accuracy_before for row in found.history] == [None, 0.5, 0.5, 0.5]
    kept = [row.kept for row in found.history]
    assert kept[0] == found.history[0].dense == 6 * 8 + 8 + 8 * 3 + 3
    assert kept == sorted(kept, reverse=True)
    assert kept[3] < kept[2] < kept[1]
    assert found.round == 2
    assert found.chosen is found.history[2]
    assert found.masks.count(model).kept == kept[2]
    assert found.masks.apply_(model) == {}  # the network holds the chosen weights
    assert json.loads(json.dumps(found.to_dict()))["chosen"] == 2


def test_the_dense_network_is_the_result_where_nothing_else_is_good_enough():
    model, dense = net(), net()
    found = Loop([X], nothing, scripted([0.9] + [0.1] * 6)).run(model, config())
    assert (found.round, len(found.masks)) == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


SHARES = (0.6, 0.35, 0.15)


@pytest.mark.parametrize("score", ["activity", "magnitude", "magnitude-global", "random"])
def test_given_shares_are_kept_whatever_the_score(score):
    runs = []
    for _ in range(2):
        rows = Loop([X], nothing, lambda _: 0.9).run(net(), config(score=score, keep=SHARES)).history
        runs.append([row.kept for row in rows])
        for share, row in zip(SHARES, rows[1:], strict=True):
            # No more than the share, rounded to a whole connection: 0.6 of 83 is 49.8, which is 50.
            assert 0.6 * share * row.dense < row.kept <= round(share * row.dense)
    assert runs[0] == runs[1]


def test_global_magnitude_keeps_the_largest_weights_of_the_whole_network():
    model, masks = net(), []
    sizes = torch.cat([model[i].weight.detach().abs().flatten() for i in (0, 2)])
    Loop([X], lambda _m, found, _i, _c: masks.append(found), lambda _: 0.9).run(
        model, config(rounds=1, score="magnitude-global", keep=(0.6,))
    )
    kept = torch.cat([masks[0][f"{i}.weight"].flatten() for i in (0, 2)])
    selected = sizes >= sizes[kept].min()
    # What is above the smallest kept weight is kept, but for what was disconnected with a whole neuron.
    gone = selected & ~kept
    alive = masks[0]["0.weight"].any(1) & masks[0]["2.weight"].any(0)
    dead = torch.cat([(~alive)[:, None].expand(8, 6).flatten(), (~alive)[None].expand(3, 8).flatten()])
    assert not (gone & ~dead).any()
    assert kept.sum() < len(kept)


def test_random_scores_differ_from_round_to_round_and_seed_to_seed():
    found = []
    for seed in (0, 1):
        masks = []
        loop = Loop([X], lambda _m, m, _i, _c, masks=masks: masks.append(m), lambda _: 0.9, key={"seed": seed})
        loop.run(net(), config(rounds=2, score="random", keep=(0.7, 0.5)))
        found.append(masks)
    assert not found[0][0].same(found[1][0])


def test_patience_counts_rounds_in_a_row():
    script = [0.9, *(0, 0.5), *(0, 0.9), *(0, 0.5), *(0, 0.5), *(0, 0.9)]
    found = Loop([X], nothing, scripted(script)).run(net(), config(rounds=9, patience=2))
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

    Loop([X], retrain, lambda _: 0.9).run(model, config(rounds=2, rewind=True), init=init)
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


def row(number, kept, accuracy, within):
    return Round(number, None, accuracy, None, 100, kept, within, {}, {}, {})


def test_among_equally_small_networks_the_more_accurate_is_chosen():
    rows = [row(0, 100, 0.9, True), row(1, 50, 0.89, True), row(2, 50, 0.895, True), row(3, 10, 0.1, False)]
    assert best_of(rows) == 2


def test_the_folder_holds_what_resuming_needs_and_no_more(tmp_path):
    script = [0.9, *(0, 0.9), *(0, 0.9), *(0, 0.5)]
    found = Loop([X], nothing, scripted(script)).run(net(), config(), folder=tmp_path)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert names == [
        "history.jsonl",
        "relief.json",
        "rounds/01/masks.safetensors",
        "rounds/01/weights.safetensors",
        "rounds/02/masks.safetensors",
        "rounds/02/weights.safetensors",
        "rounds/03/masks.safetensors",
        "rounds/03/weights.safetensors",
    ]
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["kept"] for line in lines] == [row.kept for row in found.history]
    assert set(lines[1]["seconds"]) == {"scoring", "disconnection", "retraining", "all"}
    assert lines[1]["layers"]["0"]["neurons"] == 8
    # A finished loop is only read; more rounds go on from the latest.
    again = Loop([X], None, scripted([])).run(net(), config(), folder=tmp_path)
    assert again.history == found.history
    assert again.masks.same(found.masks)
    more = Loop([X], nothing, scripted([0, 0.5])).run(net(), config(rounds=4), folder=tmp_path)
    assert more.history[:4] == found.history
    assert more.history[4].kept < found.history[3].kept


@pytest.mark.parametrize(("drop", "chosen"), [(0.0, 0), (0.01, 1), (0.02, 2), (0.5, 3)])
def test_another_accuracy_drop_only_chooses_again(tmp_path, drop, chosen):
    def drift(network, masks, number, _checkpoint):
        with torch.no_grad():
            network[0].bias.add_(number)  # every round has its own weights
        masks.apply_(network)

    loop = Loop([X], drift, scripted([0.90, *(0, 0.89), *(0, 0.88), *(0, 0.5)]))
    first = loop.run(net(), config(), folder=tmp_path)
    model = net()
    again = Loop([X], None, scripted([])).run(model, config(accuracy_drop=drop), folder=tmp_path)
    assert again.round == chosen
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["eligible"] for line in lines] == [True] * (chosen + 1) + [False] * (3 - chosen)
    fresh = net()
    for number in range(1, chosen + 1):
        fresh[0].bias.data.add_(number).mul_(Masks.load(tmp_path / f"rounds/0{number}/masks.safetensors")["0.bias"])
    assert torch.equal(model[0].bias, fresh[0].bias)
    assert [row.kept for row in again.history] == [row.kept for row in first.history]


def test_other_settings_are_refused_and_lose_what_is_there_only_by_force(tmp_path):
    Loop([X], nothing, lambda _: 0.9).run(net(), config(rounds=1), folder=tmp_path)
    (tmp_path / "rounds/thesis.txt").write_text("mine")
    loop = Loop([X], nothing, lambda _: 0.8)
    with pytest.raises(InputError, match=r"holds 1 finished round of other settings \(alpha_fc was 0.8 and is 0.7"):
        loop.run(net(), config(alpha_fc=0.7, rounds=0), folder=tmp_path)
    other = net()
    with torch.no_grad():
        other[0].bias.zero_()
    with pytest.raises(InputError, match=r"other settings \(the network's weights changed\): .* force=True"):
        loop.run(other, config(rounds=1), folder=tmp_path)
    found = loop.run(net(), config(alpha_fc=0.7, rounds=0), folder=tmp_path, force=True)
    assert [row.accuracy for row in found.history] == [0.8]
    assert not (tmp_path / "rounds/01").exists()
    assert (tmp_path / "rounds/thesis.txt").read_text() == "mine"


def test_a_setting_younger_than_the_folder_is_what_is_now_its_default(tmp_path):
    Loop([X], nothing, lambda _: 0.9).run(net(), config(rounds=0), folder=tmp_path)
    key = json.loads((tmp_path / "relief.json").read_text())
    del key["config"]["measure"]
    (tmp_path / "relief.json").write_text(json.dumps(key))
    found = Loop([X], None, scripted([])).run(net(), config(rounds=0), folder=tmp_path)
    assert found.history[0].accuracy == 0.9


@pytest.mark.parametrize("name", ["rounds/thesis.txt", "history.jsonl", "relief.json"])
def test_a_folder_of_somebody_else_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"mine": 1}')
    for force in (False, True):
        with pytest.raises(InputError, match=r"not of a relief.* name another folder"):
            Loop([X], nothing, lambda _: 0.9).run(net(), config(), folder=tmp_path, force=force)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == [name]
    assert (tmp_path / name).read_text() == '{"mine": 1}'


def test_a_shorter_loop_chooses_among_its_own_rounds(tmp_path):
    script = [0.9, *(0, 0.9), *(0, 0.5), *(0, 0.9)]
    whole = Loop([X], nothing, scripted(script)).run(net(), config(), folder=tmp_path)
    assert whole.round == 3
    for changes, chosen, rows in (({"rounds": 1}, 1, 2), ({"rounds": 0}, 0, 1), ({"patience": 1}, 1, 3)):
        model = net()
        found = Loop([X], None, scripted([])).run(model, config(**changes), folder=tmp_path)
        assert (found.round, found.history) == (chosen, whole.history[:rows])
        assert found.masks.count(model).kept == found.chosen.kept
        assert found.masks.apply_(model) == {}
    # What the longer loop did is still there.
    assert Loop([X], None, scripted([])).run(net(), config(), folder=tmp_path).history == whole.history


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "evaluate returned a NoneType: it must return the accuracy"),
        ("high", "evaluate returned a str"),
        (float("nan"), "evaluate returned NaN"),
        (94.2, "evaluate returned 94.2: it must return a fraction, at most 1, not a percentage"),
    ],
)
def test_what_is_no_accuracy_is_refused(value, message):
    with pytest.raises(InputError, match=message):
        Loop([X], nothing, lambda _: value).run(net(), config(rounds=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip": ("hed",)}, "relief.skip: no layer matches 'hed'; known: 0, 2"),
        ({"alpha": {"9": 0.5}}, "relief.alpha: no layer matches '9'"),
        ({"skip": ("*",)}, r"every layer of Sequential is left whole \('0' is Linear, which relief.skip names\)"),
    ],
)
def test_settings_that_fit_no_layer_are_refused_before_anything_is_done(changes, message):
    with pytest.raises(InputError, match=message):
        Loop([X], nothing, scripted([])).run(net(), config(**changes))


def test_a_network_that_cannot_be_captured_is_refused_before_it_is_measured():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else self.layer(-x)

    with pytest.raises(InputError, match="Branch cannot be exported to ONNX: Could not guard on data-dependent"):
        Loop([X], nothing, scripted([])).run(Branch(), config())


class Odd(nn.Linear):
    """Keeps a dictionary in its state, and asks for its version when it is loaded, as torchvision's MNASNet does."""

    _version = 2

    def get_extra_state(self):
        return {"calls": 1}

    def set_extra_state(self, state):
        assert state == {"calls": 1}

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        assert local_metadata["version"] == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_networks_with_versions_and_extra_state_are_put_back(tmp_path):
    def odd():
        torch.manual_seed(0)
        return nn.Sequential(Odd(6, 8), nn.ReLU(), nn.Linear(8, 3))

    model, init = odd(), odd().state_dict()
    found = Loop([X], nothing, lambda _: 0.9).run(model, config(rounds=1, rewind=True), init=init, folder=tmp_path)
    again = odd()
    Loop([X], None, scripted([])).run(again, config(rounds=1, rewind=True), init=init, folder=tmp_path)
    assert found.round == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert found.masks.apply_(again) == {}


class Levels(nn.Module):
    """A head on two levels of a pyramid, a skipped stem, a frozen layer, a recurrent one, and one never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 4, 3, padding=1)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.rnn = nn.LSTM(4, 5, batch_first=True)
        self.last, self.never = nn.Linear(5, 3), nn.Linear(2, 2)

    def forward(self, x):
        low = torch.relu(self.stem(x))
        high = nn.functional.max_pool2d(low, 2)
        tokens = torch.stack([self.head(low).mean((2, 3)), self.head(high).mean((2, 3))], 1)
        return self.last(self.rnn(self.frozen(tokens))[0][:, -1])


def test_shared_heads_are_relieved_and_what_is_left_whole_is_named_and_whole():
    model, x = Levels(), torch.rand(16, 1, 8, 8)
    stem = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith(("stem", "frozen"))}
    found = Loop([x], nothing, lambda _: 0.9).run(model, config(rounds=1, alpha_conv=0.4, alpha_fc=0.4, skip=("stem",)))
    assert found.chosen.layers["head"]["kept"] < found.chosen.layers["head"]["dense"]
    assert found.left_whole == {
        "stem": "Conv2d, which relief.skip names",
        "frozen": "Linear that is frozen",
        "rnn": "LSTM, whose connections are not scored",
        "never": "Linear that calibration never called",
    }
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in stem.items())
    assert not {"stem.weight", "stem.bias", "frozen.weight", "frozen.bias"} & set(found.masks)


def test_what_the_network_itself_holds_is_named_by_its_parameters():
    class Placed(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
            self.places = nn.Parameter(torch.randn(1, 6))

        def forward(self, x):
            return super().forward(x + self.places)

    found = Loop([X], nothing, lambda _: 0.9).run(Placed(), config(rounds=1))
    assert found.left_whole == {"places": "a parameter of Placed itself, whose connections are not scored"}
    assert str(found).splitlines()[0].endswith("left whole: places")


def test_frozen_layers_are_relieved_where_it_is_asked_for():
    model = net()
    model[0].requires_grad_(False)
    assert Loop([X], nothing, lambda _: 0.9).run(copy.deepcopy(model), config()).masks.keys() == {"2.weight", "2.bias"}
    found = Loop([X], nothing, lambda _: 0.9, frozen=True).run(model, config())
    assert found.left_whole == {}
    assert not found.masks["0.weight"].all()
    assert (model[0].weight[~found.masks["0.weight"]] == 0).all()


@pytest.mark.parametrize("left", ["skipped", "frozen", None])
def test_neurons_that_nobody_reads_stay_only_in_a_layer_that_is_left_whole(left):
    model = net()
    with torch.no_grad():
        model[2].weight[:, [1, 4, 5]] = 0  # no activity goes through them, so relief masks them
    model[0].requires_grad_(left != "frozen")
    before = model[0].weight.detach().clone()
    skip = {"skip": ("0",)} if left == "skipped" else {}
    found = Loop([X], nothing, lambda _: 0.9).run(model, config(rounds=1, **skip))
    assert not found.masks["2.weight"][:, [1, 4, 5]].any()
    if left is None:
        assert not found.masks["0.weight"][[1, 4, 5]].any()
    else:
        assert found.masks.keys() == {"2.weight", "2.bias"}
        assert torch.equal(model[0].weight, before)


class Conv1D(nn.Module):
    """The linear layer of GPT-2, of the name, the place and the arithmetic that it has in transformers."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().T.clone())  # (in, out)
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def test_the_linear_layer_of_gpt2_is_relieved_as_the_plain_one():
    plain = net()
    twin = nn.Sequential(Conv1D(plain[0]), nn.ReLU(), Conv1D(plain[2]))
    settings = config(rounds=2, alpha={"2": 0.6})
    first, second = (Loop([X], nothing, lambda _: 0.9).run(model, settings) for model in (plain, twin))
    assert first.chosen.kept == second.chosen.kept < first.chosen.dense
    assert second.left_whole == {}
    for name, mask in first.masks.items():
        assert torch.equal(second.masks[name], mask.T if name.endswith("weight") else mask), name
    assert [second.chosen.layers[name]["neurons"] for name in ("0", "2")] == [8, 3]


def test_layerwise_is_the_order_of_the_authors_code():
    """Their rule, written down again: convolutions on the whole network, then linear layers on the pruned ones.

    For a neuron with importances s, sorted, they look for the first place where the sum reaches α of the total, step
    one further, and mask all that is no larger than what stands there: the smallest connection always goes, even where
    all are needed.
    """
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 5, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 8, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 4),
    )  # fmt: skip
    x, alphas = torch.rand(24, 1, 20, 20), (0.9, 0.95)
    settings = config(measure="layerwise", position_norm="l1", alpha_conv=alphas[0], alpha_fc=alphas[1], samples=24)

    off_by_one = []

    def theirs(importance, alpha):
        kept = torch.ones_like(importance).bool()
        for row, flags in zip(importance, kept, strict=True):
            ordered = row.sort(descending=True).values
            first = int((ordered.cumsum(0) < alpha * row.sum()).sum())
            if first == len(row) - 1:
                off_by_one.append(len(row))  # all are needed, and they mask the smallest all the same
            else:
                flags[row <= ordered[first + 1]] = False
        return kept

    expected, pruned = {}, copy.deepcopy(model)
    with torch.no_grad():
        for name in ("0", "3", "7", "9"):
            index, layer = int(name), model[int(name)]
            source = model if name in ("0", "3") else pruned
            # Within one stage every layer is measured on the stage's own network, unpruned layers before it.
            given = source[:index](x).double().abs()
            if layer.weight.ndim == 4:
                windows = nn.functional.unfold(given.mean(0, keepdim=True), 5)[0]  # (in * 25, positions)
                each = windows.sum(1).view(1, -1, 25)
                weights = (layer.weight.double().abs().flatten(2) * each).sum(2)
                biases = layer.bias.double().abs() * windows.shape[1]
            else:
                weights, biases = layer.weight.double().abs() * given.mean(0), layer.bias.double().abs()
            importance = torch.cat([weights, biases[:, None]], 1)
            kept = theirs(importance, alphas[layer.weight.ndim == 2])
            expected[name] = kept
            if layer.weight.ndim == 4:
                flags = kept[:, :-1].view(*layer.weight.shape[:2], 1, 1)
                pruned[index].weight.mul_(flags)
                pruned[index].bias.mul_(kept[:, -1])
    run = _Run(Loop([x], nothing, lambda _: 0.9), copy.deepcopy(model), settings, None, History(None), progress=None)
    found = run._select()
    for name, kept in expected.items():
        ours = torch.cat(
            [
                found[f"{name}.weight"].flatten(2).any(2) if name in "03" else found[f"{name}.weight"],
                found[f"{name}.bias"][:, None],
            ],
            1,
        )
        assert torch.equal(ours, kept)
    assert 0 < len(off_by_one) < 20
    assert sum(int((~kept).sum()) for kept in expected.values()) > 100
    at_once = _Run(
        run.loop, copy.deepcopy(model), replace(settings, measure="at once"), None, History(None), progress=None
    )
    assert not at_once._select().same(found)


def test_damaged_files_are_named(tmp_path):
    Loop([X], nothing, lambda _: 0.9).run(net(), config(), folder=tmp_path)
    weights = tmp_path / "rounds/03/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(IntegrityError, match=r"03/weights.safetensors is not a whole safetensors file"):
        Loop([X], nothing, lambda _: 0.9).run(net(), config(), folder=tmp_path)
    (tmp_path / "history.jsonl").write_text('{"round": 0}\n')
    with pytest.raises(IntegrityError, match=r"history.jsonl is damaged"):
        Loop([X], nothing, lambda _: 0.9).run(net(), config(), folder=tmp_path)


# Real training, in processes of its own.

SCRIPT = textwrap.dedent(
    """
    import sys, torch
    from pathlib import Path
    from torch import nn
    from relief_export.recipe import ReliefConfig, TrainConfig
    from relief_export.relief.loop import recipe_loop
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
        tell = lambda *what: print(*what[:3], flush=True)
        config = ReliefConfig(rounds=4, alpha_conv=0.8, alpha_fc=0.8, accuracy_drop=1.0, samples=64)
        data = DataSet(split, split, split, 3, (1, 8, 8))
        loop = recipe_loop(model, data, config, TrainConfig(epochs=6, batch=32), seed=0, progress=tell)
        found = loop.run(model, config, folder=folder, progress=tell)
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
    # In the first retraining, between two rounds, and in a later retraining.
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
        name = f"rounds/{k:02d}/masks.safetensors"
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_two_processes_find_the_same_masks_and_one_writes(uninterrupted, tmp_path):
    folder = tmp_path / "two"
    finish(start(folder, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"))
    (masks, state), (other_masks, other_state) = result(folder, 0), result(folder, 1)
    assert masks == other_masks
    assert all(torch.equal(tensor, other_state[name]) for name, tensor in state.items())
    # The first selection sees the same network and samples as one process does; retraining sums in another order.
    name = "rounds/01/masks.safetensors"
    assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes()
    assert len((folder / "history.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_a_pruned_layer_is_refused_by_name(tensor):
    model = net()
    prune.identity(model[2], tensor)
    with pytest.raises(InputError, match=f"the {tensor} of layer '2' is computed from other tensors: .*prune.remove"):
        Loop([X], nothing, lambda _model: 0.5).run(model, config())


def test_a_result_prints_its_rounds_and_draws_them():
    rows = [
        Round(0, None, 0.9, None, 1000, 1000, True, {}, {}, {}),
        Round(1, 0.5, 0.89, None, 1000, 250, True, {}, {}, {}),
        Round(2, 0.4, 0.6, None, 1000, 100, False, {}, {}, {}),
    ]
    found = Relieved(1, Masks(), tuple(rows), 0.01, {"rnn": "LSTM, whose connections are not scored"})
    assert str(found).splitlines() == [
        "density 25.00 % (250 of 1,000 weights), accuracy 89.00 %; left whole: rnn",
        "round        weights   density  before retraining  accuracy",
        "0              1,000  100.00 %                  -   90.00 %",
        "1 <- chosen      250   25.00 %            50.00 %   89.00 %",
        "2                100   10.00 %            40.00 %   60.00 %",
    ]
    # The dense network as the result of three rounds is no success: what to change is said.
    whole = Relieved(0, Masks(), (rows[0], rows[2]), 0.01)
    assert str(whole).splitlines()[0] == (
        "density 100.00 % (1,000 of 1,000 weights), accuracy 90.00 %; no round stayed within 1.00 points of the dense "
        "network: give more epochs, smaller steps (larger alpha_conv and alpha_fc, or larger shares in keep) or a "
        "larger accuracy_drop"
    )
    assert whole.to_dict()["note"].startswith("no round stayed within")
    # Nor was there a round to fail, or did one fail that removed nothing.
    assert "no round" not in str(Relieved(0, Masks(), (rows[0],), 0.01))
    assert "no round" not in str(Relieved(0, Masks(), (rows[0], rows[1]), 0.01))
    assert "<td>1 &lt;- chosen</td><td>250</td>" in found._repr_html_()
    axes = found.plot(Figure().subplots())
    line, limit, chosen = axes.get_lines()
    assert line.get_xydata().tolist() == [[1.0, 0.9], [0.25, 0.89], [0.1, 0.6]]
    assert limit.get_ydata()[0] == pytest.approx(0.89)
    assert chosen.get_xydata().tolist() == [[0.25, 0.89]]
