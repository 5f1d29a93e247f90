import copy

import pytest
import torch
from torch import nn

from relief_export.training import skipping

ROUNDING = 1e-9
"""In float64: only the order of the sums differs."""


def layers():
    yield "linear", nn.Linear(12, 10), (5, 12)
    yield "linear without bias, three axes", nn.Linear(12, 10, bias=False), (5, 3, 12)
    yield "conv1d, dilated", nn.Conv1d(6, 8, 3, dilation=2), (4, 6, 11)
    yield "conv2d, strided", nn.Conv2d(6, 8, 3, stride=2, padding=1), (4, 6, 9, 9)
    yield "conv2d, one sample without a batch", nn.Conv2d(6, 8, 3), (6, 9, 9)
    yield "conv2d, reflected border", nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (4, 6, 9, 9)
    yield "conv2d, 'same'", nn.Conv2d(6, 8, 3, padding="same", bias=False), (4, 6, 9, 9)
    yield "conv3d", nn.Conv3d(6, 8, 2), (2, 6, 4, 4, 4)


def masked(layer, *, rows, columns):
    """Masks that leave some rows and columns without a connection; one row keeps nothing but its bias."""
    mask = torch.ones(layer.weight.shape, dtype=torch.bool)
    mask[rows], mask[:, columns] = False, False
    masks = {"0.weight": mask}
    if layer.bias is not None:
        masks["0.bias"] = torch.ones(len(mask), dtype=torch.bool)
        masks["0.bias"][rows[1:]] = False
    with torch.no_grad():
        layer.weight.mul_(mask)
        if layer.bias is not None:
            layer.bias.mul_(masks["0.bias"])
    return masks


def gradients(model, x):
    """The output, and the gradients of a sum in which every output has another weight."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), x.grad, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("layer", "shape"), [pytest.param(*case[1:], id=case[0]) for case in layers()])
@pytest.mark.parametrize("rows", [[0, 2, 5], list(range(8))], ids=["some rows", "all of the first eight rows"])
def test_a_skipping_layer_computes_what_the_whole_layer_computes(layer, shape, rows, monkeypatch):
    monkeypatch.setattr(skipping, "_WORTH", 0)
    monkeypatch.setattr(skipping, "_SHARE", 1)
    model = nn.Sequential(copy.deepcopy(layer)).double()
    masks = masked(model[0], rows=rows, columns=[1, 3])
    x = torch.randn(shape, dtype=torch.float64)
    y, dx, whole = gradients(model, x)
    model.zero_grad()
    with skipping.skipping(model, masks):
        assert "forward" in vars(model[0])
        thin_y, thin_dx, thin = gradients(model, x)
    assert "forward" not in vars(model[0])
    torch.testing.assert_close(thin_y, y, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(thin_dx, dx, rtol=ROUNDING, atol=ROUNDING)
    for name, gradient in whole.items():
        kept = masks[name]
        torch.testing.assert_close(thin[name] * kept, gradient * kept, rtol=ROUNDING, atol=ROUNDING)
        assert not thin[name][rows[1:]].any()  # not computed at all, whatever the whole layer's gradient is


def test_what_cannot_or_need_not_be_skipped_is_left_alone():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    grouped, small = nn.Conv2d(512, 512, 3, groups=2), nn.Linear(512, 512)
    model = nn.Sequential(grouped, Own(512, 512), small, nn.Linear(512, 512))
    half = torch.zeros(512, 512, dtype=torch.bool)
    half[:256] = True
    masks = {"0.weight": torch.zeros_like(grouped.weight, dtype=torch.bool), "1.weight": half, "2.weight": ~half | half}
    with skipping.skipping(model, masks):
        assert not any("forward" in vars(layer) for layer in model)
    with skipping.skipping(model, {"3.weight": half, "3.bias": half[:, 0]}):
        assert ["forward" in vars(layer) for layer in model] == [False, False, False, True]


def test_the_forward_comes_back_after_an_error():
    model = nn.Sequential(nn.Linear(512, 512))
    with pytest.raises(RuntimeError, match="stop"), skipping.skipping(model, {"0.weight": torch.zeros(512, 512) > 0}):
        raise RuntimeError("stop")
    assert "forward" not in vars(model[0])


def test_pictures_keep_their_layout():
    model = nn.Sequential(nn.Conv2d(64, 64, 3)).to(memory_format=torch.channels_last)
    half = torch.zeros_like(model[0].weight, dtype=torch.bool)
    half[:32] = True
    x = torch.randn(2, 64, 9, 9).contiguous(memory_format=torch.channels_last)
    with skipping.skipping(model, {"0.weight": half, "0.bias": half[:, 0, 0, 0]}):
        assert "forward" in vars(model[0])
        assert model(x).is_contiguous(memory_format=torch.channels_last)
