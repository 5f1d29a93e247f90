import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from relief_export.errors import InputError, IntegrityError
from relief_export.recipe import ModelConfig, TrainConfig
from relief_export.relief.masks import Count, Masks
from relief_export.training.data import DataSet, Split
from relief_export.training.fit import fit
from relief_export.training.models import build_model


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def masks():
    kernel = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    kernel[1] = False
    return Masks(
        {"0.weight": kernel, "1.bias": torch.tensor([True, False]), "3.bias": torch.zeros(3, dtype=torch.bool)}
    )


def test_counts_are_the_papers_without_batch_norm():
    count = masks().count(net())
    # dense: 2*9 kernels, 3*8 weights, 3 biases; masked: one kernel, three biases
    assert count == Count(dense=18 + 24 + 3, kept=9 + 24)
    assert count.compression == pytest.approx(45 / 33)
    assert masks().count_layers(net()) == {"0": Count(18, 9), "3": Count(27, 24)}
    assert Masks().count(build_model(ModelConfig("lenet5"), (1, 28, 28), 10, 0)).dense == 431_080


def test_a_shared_weight_is_counted_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    found = Masks({"0.weight": torch.tensor([[True, False], [True, True]])})
    assert found.count_layers(model) == {"0": Count(6, 5), "1": Count(2, 2)}


def test_intersection_never_brings_a_connection_back():
    left = Masks({"a": torch.tensor([True, False, True]), "b": torch.tensor([True])})
    right = {"a": torch.tensor([True, True, False]), "c": torch.tensor([False])}
    both = left & right
    assert {name: mask.tolist() for name, mask in both.items()} == {
        "a": [True, False, False],
        "b": [True],
        "c": [False],
    }
    assert both.same(both & left & Masks(right))
    assert Masks({"a": torch.tensor([True])}).same(Masks())
    assert not left.same(both)


def test_apply_zeroes_exactly_even_what_is_not_a_number_and_reports_what_it_changed():
    model = net()
    with torch.no_grad():
        model[0].weight[1] = float("nan")
    untouched = model[0].weight[0].clone()
    assert masks().apply_(model) == {"0.weight": 9, "3.bias": 3}  # the batch norm's shift was zero
    assert masks().apply_(model) == {}
    assert (model[0].weight[1] == 0).all()
    assert torch.equal(model[0].weight[0], untouched)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"9.weight": torch.ones(1)}, "masks name '9.weight', which the network does not have"),
        ({"3.bias": torch.ones(4)}, r"mask of '3.bias' has shape \(4,\), the network's tensor \(3,\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused_before_anything_changes(wrong, message):
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        (masks() & Masks(wrong)).apply_(model) if "9.weight" in wrong else Masks(wrong).apply_(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def weights_file(path, content=b"weights"):
    path.write_bytes(content)
    return path


def test_save_and_load_keep_every_bit_and_the_tie_to_the_weights(tmp_path):
    weights, path = weights_file(tmp_path / "w.safetensors"), tmp_path / "masks.safetensors"
    masks().save(path, weights)
    loaded = Masks.load(path, weights)
    assert set(loaded) == set(masks())
    assert all(torch.equal(loaded[name], mask) for name, mask in masks().items())
    first = path.read_bytes()
    masks().save(path, weights)
    assert path.read_bytes() == first
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["relief_export"])
    digest = hashlib.sha256(b"weights").hexdigest()
    own = about.pop("masks_sha256")
    assert len(own) == 64
    assert about == {"format": "relief-export masks", "version": 1, "weights_sha256": digest}
    assert {p.name for p in tmp_path.iterdir()} == {"w.safetensors", "masks.safetensors"}


def test_masks_of_other_weights_are_refused(tmp_path):
    weights, path = weights_file(tmp_path / "w.safetensors"), tmp_path / "masks.safetensors"
    masks().save(path, weights)
    weights_file(weights, b"other weights")
    with pytest.raises(IntegrityError, match=r"masks.safetensors belongs to other weights than .*w.safetensors"):
        Masks.load(path, weights)
    assert Masks.load(path).same(masks())


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "masks.safetensors"
    with pytest.raises(InputError, match=r"masks.safetensors does not exist"):
        Masks.load(path)
    masks().save(path)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:20], b"", b"\xff" * 64, whole + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match=r"masks.safetensors is not a whole safetensors file"):
            Masks.load(path)
    path.write_bytes(safetensors.torch.save({"a": torch.ones(2)}))
    with pytest.raises(IntegrityError, match="not a file of masks of version 1"):
        Masks.load(path)
    path.write_bytes(whole.replace(b'\\"version\\": 1', b'\\"version\\": 2'))
    with pytest.raises(IntegrityError, match="not a file of masks of version 1"):
        Masks.load(path)
    about = '{"format": "relief-export masks", "version": 1, "weights_sha256": null}'
    path.write_bytes(safetensors.torch.save({"a": torch.ones(2)}, {"relief_export": about}))
    with pytest.raises(IntegrityError, match=r"mask of 'a' is torch.float32, not bool"):
        Masks.load(path)


def test_dead_filters_stay_zero_in_retraining_with_momentum_and_decay():
    model = net()
    model[1].running_var[1] = 0  # a dead filter's, as some pruned networks have it
    split = Split.of(torch.rand(32, 1, 4, 4), torch.arange(32) % 3)
    data = DataSet(split, split, split, 3, (1, 4, 4))
    found = masks() & {"1.weight": torch.tensor([True, False])}
    config = TrainConfig(epochs=3, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.1, batch=8)
    start = model[3].weight.clone()
    fit(model, data, config, masks=found, seed=0)
    assert found.apply_(model) == {}
    assert not torch.equal(model[3].weight, start)
    model.eval()
    with torch.no_grad():
        assert (model[:2](torch.rand(5, 1, 4, 4))[:, 1] == 0).all()


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    masks().save(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"masks\.safetensors is damaged"):
        Masks.load(path)
