import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from relief_export.cli import run
from relief_export.errors import InputError, IntegrityError
from relief_export.recipe import ModelConfig
from relief_export.relief.masks import FORMS, Masks, read_masks, zeros
from relief_export.training.checkpoints import save_weights
from relief_export.training.models import build_model
from tests.answers import check_answer


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def half(*shape):
    mask = torch.ones(shape)
    mask.view(-1)[::2] = 0
    return mask


def test_modules_pruned_by_torch():
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[3], "bias", 1)
    found = read_masks(model, model)
    assert set(found.masks) == {"0.weight", "3.bias"}
    assert torch.equal(found.masks["0.weight"], model[0].weight_mask.bool())
    assert found.disagreements == {}  # the weight in use is the masked one
    assert sum(read_masks(model, net()).disagreements.values()) == 9 + 1


def test_a_dict_of_layers():
    found = read_masks({"0": {"weight": half(2, 1, 3, 3), "bias": None}, "3": {"weight": half(3, 8).int()}}, net())
    assert set(found.masks) == {"0.weight", "3.weight"}
    assert found.masks["3.weight"].sum() == 12


def test_the_authors_list_goes_by_position():
    model = net()
    listed = [half(2, 1, 3, 3), torch.tensor([1.0, 0.0]), half(3, 8), torch.ones(3)]
    with torch.no_grad():
        model[0].weight.view(-1)[::2] = 0
        model[3].weight.zero_()
    found = read_masks(listed, model)
    assert list(found.masks) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert found.disagreements == {"0.bias": 1}  # masked, but not zero: reported, and the mask wins
    found.masks.apply_(model)
    assert model[0].bias[1] == 0
    with pytest.raises(InputError, match="list has 3 masks, the network 4 weights and biases"):
        read_masks(listed[:3], model)


def authors_resnet(blocks=3, widths=(16, 32, 64)):
    content, channels = {"conv1.mask": half(16, 3, 3, 3)}, 16
    for stage, width in enumerate(widths, 1):
        for block in range(blocks):
            content[f"layer{stage}.{block}.conv1.mask"] = torch.ones(width, channels, 3, 3)
            content[f"layer{stage}.{block}.conv2.mask"] = torch.ones(width, width, 3, 3)
            content[f"layer{stage}.{block}.shortcut.mask"] = half(width)
            channels = width
    return content | {"linear.weight.mask": half(10, 64), "linear.bias.mask": torch.ones(10)}


def test_the_authors_resnet_file_is_read_as_their_own_code_applies_it(tmp_path):
    model, path = build_model(ModelConfig("resnet20"), (3, 32, 32), 10, 0), tmp_path / "net_masks.pt"
    torch.save(authors_resnet(), path)
    found = read_masks(str(path), model)
    assert found.form == "authors"
    assert "conv1.weight" not in found.masks
    assert len(found.masks) == 9 * 3 + 2
    assert torch.equal(found.masks["layer2.1.join.shortcut_mask"], half(32).bool())
    # A shortcut's mask is no weight that could disagree.
    assert found.disagreements == {"linear.weight": 320}
    (note,) = found.notes
    assert note.startswith("conv1.mask, which masks 216 entries, is left out: the authors' own code never applies it")
    found.masks.apply_(model)
    assert model.layer2[1].join.shortcut_mask.tolist() == half(32).tolist()
    stated = read_masks(path, model, authors_conv1=True)
    assert stated.masks["conv1.weight"].sum() == 216
    assert stated.notes == ()


class AuthorsBlock(nn.Module):
    """The authors' way to hold masks: as attributes, outside of the state."""

    def __init__(self, masks):
        super().__init__()
        self.conv1_masks = masks["conv1.mask"]
        names = ("conv1.mask", "conv2.mask", "shortcut.mask")
        self.layers_masks = [
            [[masks[f"layer{layer}.{block}.{name}"] for name in names] for block in range(3)] for layer in (1, 2, 3)
        ]
        self.linear_masks = [masks["linear.weight.mask"], masks["linear.bias.mask"]]


def test_the_authors_masks_as_they_have_them_in_memory():
    model, lists = net(), [[half(2, 1, 3, 3), torch.tensor([1.0, 0.0])], [half(3, 8), torch.ones(3)]]
    expected = read_masks([mask for part in lists for mask in part], model).masks
    theirs = net()
    theirs.feature_extractor_masks, theirs.classifier_masks = lists  # their LeNets
    like_vgg = net()
    like_vgg.features_masks, like_vgg.classifier_masks = lists
    for source in (lists, theirs, like_vgg):
        found = read_masks(source, model)
        assert found.form == "authors"
        assert found.masks.same(expected)
        assert len(found.masks) == 4
    resnet = build_model(ModelConfig("resnet20"), (3, 32, 32), 10, 0)
    found = read_masks(AuthorsBlock(authors_resnet()), resnet)
    assert found.masks.same(read_masks(authors_resnet(), resnet).masks)
    assert len(found.notes) == 1


def test_the_state_of_a_pruned_network_and_names_of_a_wrapped_one():
    pruned = net()
    prune.l1_unstructured(pruned[3], "weight", 0.5)
    for source in (pruned.state_dict(), nn.DataParallel(pruned).state_dict(), nn.DataParallel(pruned)):
        found = read_masks(source, net())
        assert list(found.masks) == ["3.weight"]
        assert torch.equal(found.masks["3.weight"], pruned[3].weight_mask.bool())
    named = read_masks({"_orig_mod.module.3.bias": [1, 0, 1]}, net())
    assert named.masks["3.bias"].tolist() == [True, False, True]
    layers = {"3": {"weight": half(3, 8), "bias": None, "_output_": torch.ones(1, 3)}}
    assert list(read_masks(layers, net()).masks) == ["3.weight"]


def test_the_authors_resnet_without_its_shortcuts_is_refused():
    model, content = build_model(ModelConfig("resnet20"), (3, 32, 32), 10, 0), authors_resnet()
    del content["layer3.2.shortcut.mask"]
    with pytest.raises(InputError, match=r"lack 'layer3.2.shortcut.mask': without its shortcut masks"):
        read_masks(content, model)
    with pytest.raises(InputError, match=r"no residual join in 'layer1.0' for the mask 'layer1.0.shortcut.mask'"):
        read_masks(authors_resnet(), net())


def test_zeros_in_the_weights():
    model = net()
    with torch.no_grad():
        model[3].weight[1] = 0
    found = zeros(model)
    assert set(found) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert found["3.weight"].sum() == 16


def test_our_own_file_and_plain_tensor_names(tmp_path):
    path = tmp_path / "masks.safetensors"
    Masks({"3.bias": torch.tensor([True, False, True])}).save(path)
    assert read_masks(path, net()).masks["3.bias"].tolist() == [True, False, True]
    assert read_masks({"3.bias": [1, 0, 1]}, net()).masks["3.bias"].tolist() == [True, False, True]


def test_zeros_of_a_pruned_network_are_its_masks():
    pruned = net()
    prune.random_unstructured(pruned[3], "weight", 0.5)
    assert torch.equal(zeros(pruned)["3.weight"], pruned[3].weight_mask.bool())


class Payload:
    def __reduce__(self):
        return print, ("executed",)


def test_files_that_would_run_code_or_are_damaged_are_refused(tmp_path, capsys):
    path = tmp_path / "masks.pt"
    for write in (
        lambda: path.write_bytes(pickle.dumps(Payload())),
        lambda: torch.save({"a": Payload()}, path),
        lambda: path.write_bytes(b""),
        lambda: (torch.save(authors_resnet(), path), path.write_bytes(path.read_bytes()[:2000])),
    ):
        write()
        with pytest.raises(IntegrityError, match=r"masks.pt is damaged or holds more than tensors"):
            read_masks(path, net())
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match=r"gone.pt does not exist"):
        read_masks(tmp_path / "gone.pt", net())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"3": {"bias": torch.tensor([0.5, 1, 1])}}, "mask of '3.bias' holds something else than zeros and ones"),
        ({"3.bias": "1"}, "mask of '3.bias' holds something else"),
        ({"4": {"bias": half(3)}}, "masks name '4.bias', which the network does not have"),
        ({"3": {"bias": half(4)}}, r"mask of '3.bias' has shape \(4,\)"),
        ({}, "a dict is no known form of masks, or it is empty"),
        (nn.Linear(2, 2), "Linear has nothing pruned"),
    ],
)
def test_what_fits_nothing_is_refused(source, message):
    with pytest.raises(InputError, match=message):
        read_masks(source, net())


def written(tmp_path, form):
    """A file of one form; how many entries of the last linear layer, 24 of them, it keeps."""
    model, path = net(), tmp_path / ("weights.safetensors" if form in ("relief", "zeros") else "masks.pth")
    prune.random_unstructured(model[3], "weight", 10)
    mask = model[3].weight_mask
    if form == "relief":
        Masks({"3.weight": mask}).save(path)
    elif form == "prune":
        with torch.no_grad():
            model[3].weight_orig[mask == 0] = torch.tensor([1.0] * 3 + [0.0] * 7)
        torch.save(model.state_dict(), path)
    elif form == "zeros":
        prune.remove(model[3], "weight")
        save_weights(model, path)
    else:
        content = {"nni": {"3": {"weight": mask, "_output_": mask}}, "names": {"3.weight": mask}}
        content["authors"] = [[torch.ones(2, 1, 3, 3), torch.ones(2)], [mask, torch.ones(3)]]
        torch.save(content[form], path)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_masks_in_a_file_are_shown_without_the_network(tmp_path, form, capsys):
    path = written(tmp_path, form)
    assert run(["masks", str(path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    check_answer(answer)
    result = answer["result"]
    assert result["form"] == form
    (row,) = (row for row in result["tensors"] if row["shape"] == [3, 8])
    assert (row["entries"], row["kept"], row["not_zero"]) == (24, 14, 3 if form == "prune" else 0)
    assert run(["masks", str(path), "--from", form]) == 0
    assert "58.33 %" in capsys.readouterr().out
    other = "nni" if form != "nni" else "prune"
    assert run(["masks", str(path), "--from", other]) == 2
    assert f"holds masks of the form '{form}', not '{other}'" in capsys.readouterr().err


def test_masks_print_as_a_table():
    masks = Masks({"fc.weight": torch.tensor([[True, False, True, True]]), "a": torch.ones(2, dtype=torch.bool)})
    assert repr(masks) == "Masks(2 tensors, 5 of 6 entries kept)"
    assert str(masks).splitlines() == [
        "Masks(2 tensors, 5 of 6 entries kept)",
        "tensor     shape  kept   density",
        "fc.weight    1x4     3   75.00 %",
        "a              2     2  100.00 %",
    ]
    assert "<td>fc.weight</td><td>1x4</td><td>3</td><td>75.00 %</td>" in masks._repr_html_()
