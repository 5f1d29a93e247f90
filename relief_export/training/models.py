"""The zoo: one table from a name to the function that builds the network.

A builder takes ``(input_shape, classes, **options)``; its keyword arguments are the options that a recipe may give.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from relief_export.errors import InputError
from relief_export.schema import OWN, did_you_mean
from relief_export.training.own import call, function_at
from relief_export.training.resnet import ResNet
from relief_export.training.vision import import_torchvision

if TYPE_CHECKING:
    from collections.abc import Callable

    from relief_export.recipe import ModelConfig

Shape = tuple[int, ...]
"""Channels, height, width."""

_VGG: dict[str, tuple[tuple[int, ...], ...]] = {
    # Widths of the 3x3 convolutions of each stage; a stage ends with 2x2 max pooling.
    "vgg11": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "vgg13": ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    "vgg16": ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    "vgg19": ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


def lenet300_100(shape: Shape, classes: int) -> nn.Module:
    """Build LeNet-300-100: two hidden layers of 300 and 100 units."""
    return _named(
        flatten=nn.Flatten(),
        fc1=nn.Linear(math.prod(shape), 300),
        relu1=nn.ReLU(),
        fc2=nn.Linear(300, 100),
        relu2=nn.ReLU(),
        fc3=nn.Linear(100, classes),
    )


def lenet5(shape: Shape, classes: int) -> nn.Module:
    """Build LeNet-5 as Caffe defines it: 20 and 50 filters of 5x5, then 500 units."""
    side = [((size - 4) // 2 - 4) // 2 for size in shape[1:]]
    if min(side) < 1:
        raise InputError(f"lenet5 needs pictures of at least 16 x 16, not {shape[1]} x {shape[2]}: set data.size")
    return _named(
        conv1=nn.Conv2d(shape[0], 20, 5),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(20, 50, 5),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(50 * math.prod(side), 500),
        relu3=nn.ReLU(),
        fc2=nn.Linear(500, classes),
    )


def _named(**layers: nn.Module) -> nn.Module:
    """Chain layers under the names that tables and files will show."""
    return nn.Sequential(OrderedDict(layers))


def vgg(shape: Shape, classes: int, *, stages: tuple[tuple[int, ...], ...], hidden: int = 0) -> nn.Module:
    """Build a VGG with batch norm for small pictures: ``stages``, ``hidden`` units if any, the output layer."""
    shrinkage = 2 ** len(stages)
    if min(shape[1:]) < shrinkage:
        raise InputError(f"this VGG needs pictures of at least {shrinkage} x {shrinkage}, not {shape[1]} x {shape[2]}")
    layers: list[nn.Module] = []
    channels = shape[0]
    for widths in stages:
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    # Pictures of exactly this size are one pixel by now, and averaging it would be an operator for nothing.
    if shape[1:] != (shrinkage, shrinkage):
        layers.append(nn.AdaptiveAvgPool2d(1))
    head: list[nn.Module] = [nn.Flatten()]
    if hidden:
        head += [nn.Linear(channels, hidden), nn.ReLU()]
    head.append(nn.Linear(hidden or channels, classes))
    model = nn.Sequential()
    model.features = nn.Sequential(*layers)
    model.classifier = nn.Sequential(*head)
    _kaiming(model)
    return model


def resnet_cifar(shape: Shape, classes: int, *, blocks: int, shortcut: str = "A") -> nn.Module:
    """Build the CIFAR ResNet of ``6 * blocks + 2`` layers (He et al. 2015, section 4.2)."""
    return _kaiming(ResNet(shape[0], classes, widths=(16, 32, 64), blocks=(blocks,) * 3, shortcut=shortcut))


def resnet18(shape: Shape, classes: int, *, shortcut: str = "B") -> nn.Module:
    """Build ResNet-18 with a 3x3 stem of stride 1, for pictures of about 64 x 64."""
    return _kaiming(ResNet(shape[0], classes, widths=(64, 128, 256, 512), blocks=(2,) * 4, shortcut=shortcut))


def _kaiming(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


ZOO: dict[str, Callable[..., nn.Module]] = {
    "lenet300-100": lenet300_100,
    "lenet5": lenet5,
    "vgg-like": partial(vgg, stages=_VGG["vgg16"], hidden=512),
    **{name: partial(vgg, stages=stages) for name, stages in _VGG.items()},
    **{f"resnet{6 * blocks + 2}": partial(resnet_cifar, blocks=blocks) for blocks in (3, 5, 7, 9, 18)},
    "resnet18": resnet18,
}


def build_model(config: ModelConfig, input_shape: Shape, classes: int, seed: int) -> nn.Module:
    """Build the network of a recipe, its initial weights drawn from ``seed`` alone.

    Raises:
        InputError: The name or an option is unknown, or the pictures are too small for the network.
    """
    builder = _builder(config.name)
    # The caller's generator is left as it was. Networks are built on the CPU, so no other one is drawn from.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _checked(builder, config)(tuple(input_shape), classes, **config.options)


def _builder(name: str) -> Callable[..., nn.Module]:
    prefix, _, rest = name.rpartition(":")
    if prefix == "torchvision":
        models = import_torchvision().models
        known: list[str] = models.list_models(module=models)
        if rest not in known:
            raise InputError(f'torchvision has no classifier "{rest}"{did_you_mean(rest, known)}')
        return partial(_torchvision, rest)
    if prefix and re.fullmatch(OWN, name):
        return partial(_own, name)
    if name not in ZOO:
        raise InputError(f'model.name cannot be "{name}"{did_you_mean(name, [*ZOO, "torchvision:resnet18"])}')
    return ZOO[name]


def _torchvision(name: str, shape: Shape, classes: int, **options: Any) -> nn.Module:  # noqa: ANN401
    if shape[0] != 3:  # any reasonable side will do
        raise InputError(f"torchvision:{name} takes colour pictures, three channels, not {shape[0]}")
    try:
        model: nn.Module = import_torchvision().models.get_model(name, weights=None, num_classes=classes, **options)
    except TypeError as error:
        raise InputError(f"torchvision:{name} does not take these options: {error}") from None
    return model


def _own(name: str, shape: Shape, classes: int, **options: Any) -> nn.Module:  # noqa: ANN401
    """Build a user's own network: whatever its function raises becomes one sentence."""
    model = call(function_at(name, "model.name"), name, "model.name", shape, classes, **options)
    if not isinstance(model, nn.Module):
        raise InputError(f'model.name = "{name}" must return an nn.Module, not a {type(model).__name__}')
    return model


def _checked(builder: Callable[..., nn.Module], config: ModelConfig) -> Callable[..., nn.Module]:
    parameters = inspect.signature(builder).parameters.values()
    # A builder that takes any keyword, as torchvision's and a user's own, says itself which it does not know.
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        # What the zoo has fixed for a name, such as its stages, is no option of a recipe.
        fixed = builder.keywords if isinstance(builder, partial) else {}
        known = {item.name for item in parameters if item.kind is item.KEYWORD_ONLY} - set(fixed)
        for option in config.options:
            if option not in known:
                hint = did_you_mean(option, known) if known else "; it takes none"
                raise InputError(f'model.options: {config.name} has no option "{option}"{hint}')
    return builder


def logits_of(out: object, classes: int = 0) -> torch.Tensor:
    """Return what a network gave, which must be logits ``(n, at least classes)``.

    Raises:
        InputError: It is something else, such as a tuple or maps, or has too few columns.
    """
    if isinstance(out, torch.Tensor) and out.ndim == 2:
        if out.shape[1] < classes:
            raise InputError(f"there is a label {classes - 1}, but the network has {out.shape[1]} outputs")
        return out
    shape = f"a tensor {tuple(out.shape)}" if isinstance(out, torch.Tensor) else f"a {type(out).__name__}"
    raise InputError(f"the network gives {shape}, but only classifiers are trained here: (samples, classes)")
