"""The zoo: published parameter counts, exportability, seeding, and the masks at residual joins."""

from __future__ import annotations

import pytest
import torch

from relief_export.errors import InputError
from relief_export.recipe import ModelConfig
from relief_export.training.models import ZOO, build_model
from relief_export.training.resnet import MaskedJoin

MNIST, CIFAR, TINY = (1, 28, 28), (3, 32, 32), (3, 64, 64)

# Counted by hand. VGG: 9 C_in C_out + C_out a convolution, 2 C_out its batch norm. ResNet: 9 C_in C_out, 2 C_out.
VGG11 = 1_792 + 73_856 + 295_168 + 590_080 + 1_180_160 + 3 * 2_359_808 + 2 * (64 + 128 + 2 * 256 + 4 * 512)
VGG13 = VGG11 + 36_928 + 147_584 + 2 * (64 + 128)
VGG16 = VGG13 + 590_080 + 2 * 2_359_808 + 2 * (256 + 2 * 512)
VGG19 = VGG16 + 590_080 + 2 * 2_359_808 + 2 * (256 + 2 * 512)
COUNTS = [
    ("lenet300-100", {}, MNIST, 10, 266_610),  # published
    ("lenet5", {}, MNIST, 10, 431_080),  # published
    ("vgg11", {}, CIFAR, 10, VGG11 + 5_130),
    ("vgg13", {}, CIFAR, 10, VGG13 + 5_130),
    ("vgg13", {}, TINY, 200, VGG13 + 102_600),
    ("vgg16", {}, CIFAR, 100, VGG16 + 51_300),
    ("vgg19", {}, CIFAR, 10, VGG19 + 5_130),
    ("vgg-like", {}, CIFAR, 10, 14_723_136 + 262_656 + 5_130),
    ("resnet20", {}, CIFAR, 10, 269_722),  # published, as are the next four (He et al. 2015, table 6, in millions)
    ("resnet32", {}, CIFAR, 10, 464_154),
    ("resnet44", {}, CIFAR, 10, 658_586),
    ("resnet56", {}, CIFAR, 10, 853_018),
    ("resnet110", {}, CIFAR, 10, 1_727_962),
    ("resnet20", {"shortcut": "B"}, CIFAR, 10, 269_722 + 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64),
    ("resnet18", {}, TINY, 200, 11_173_962 + 190 * 513),
    ("torchvision:squeezenet1_1", {}, CIFAR, 10, 722_496 + 5_130),
]


def build(name, shape, classes=10, seed=0, **options):
    return build_model(ModelConfig(name, options), shape, classes, seed)


@pytest.mark.parametrize(("name", "options", "shape", "classes", "count"), COUNTS, ids=str)
def test_parameters_are_those_of_the_published_architecture(name, options, shape, classes, count):
    model = build(name, shape, classes, **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_vgg_counts_agree_with_each_other():
    assert VGG16 == 14_723_136


def test_the_whole_zoo_is_counted():
    assert {name for name, *_ in COUNTS if ":" not in name} == set(ZOO)


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("lenet300-100", {}, MNIST),
        ("lenet5", {}, MNIST),
        ("vgg11", {}, TINY),
        ("vgg-like", {}, CIFAR),
        ("resnet20", {}, CIFAR),
        ("resnet20", {"shortcut": "B"}, CIFAR),
        ("resnet18", {}, TINY),
    ],
    ids=str,
)
def test_the_zoo_exports_with_a_dynamic_batch(name, options, shape):
    model = build(name, shape, **options).eval()
    program = torch.export.export(model, (torch.rand(3, *shape),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    x = torch.rand(5, *shape)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)
    assert model(x).shape == (5, 10)


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = build("resnet20", CIFAR, seed=3).state_dict()
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second, other = build("resnet20", CIFAR, seed=3).state_dict(), build("resnet20", CIFAR, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_join_masks_multiply_each_addend_and_are_saved():
    model = build("resnet20", CIFAR).eval()
    masks = [name for name in model.state_dict() if name.endswith(("shortcut_mask", "residual_mask"))]
    assert len(masks) == 2 * 9
    assert "layer1.0.join.shortcut_mask" in masks
    join = MaskedJoin(2)
    join.shortcut_mask.copy_(torch.tensor([0.0, 1.0]))
    join.residual_mask.copy_(torch.tensor([1.0, 0.0]))
    residual, shortcut = torch.rand(3, 2, 4, 4), torch.rand(3, 2, 4, 4)
    assert torch.equal(join(residual, shortcut), torch.stack([residual[:, 0], shortcut[:, 1]], dim=1))


def test_option_a_subsamples_and_pads_channels_on_both_sides():
    shortcut = build("resnet20", CIFAR).layer2[0].shortcut
    x = torch.rand(2, 16, 6, 6)
    out = shortcut(x)
    assert out.shape == (2, 32, 3, 3)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].count_nonzero() == out[:, 24:].count_nonzero() == 0


@pytest.mark.parametrize(
    ("name", "options", "shape", "message"),
    [
        ("lenet6", {}, MNIST, r'model\.name cannot be "lenet6"; did you mean "lenet5"'),
        ("lenet5", {"width": 2}, MNIST, r'lenet5 has no option "width"; it takes none'),
        ("resnet20", {"shortct": "B"}, CIFAR, r'resnet20 has no option "shortct"; did you mean "shortcut"'),
        ("resnet20", {"shortcut": "C"}, CIFAR, r'shortcut must be "A" or "B", not "C"'),
        ("resnet20", {"blocks": 4}, CIFAR, r'resnet20 has no option "blocks"'),
        ("lenet5", {}, (1, 8, 8), r"lenet5 needs pictures of at least 16 x 16, not 8 x 8: set data\.size"),
        ("vgg16", {}, MNIST, r"at least 32 x 32, not 28 x 28"),
        ("torchvision:resnet19", {}, CIFAR, r'torchvision has no classifier "resnet19"; did you mean "resnet18"'),
        ("torchvision:resnet18", {}, MNIST, r"torchvision:resnet18 takes colour pictures, three channels, not 1"),
        ("torchvision:resnet18", {"colour": 1}, CIFAR, r"torchvision:resnet18 does not take these options"),
    ],
)
def test_what_cannot_be_built_is_refused(name, options, shape, message):
    with pytest.raises(InputError, match=message):
        build(name, shape, **options)
