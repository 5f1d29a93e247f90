"""Disconnection against hand-derived masks and against the network's own outputs."""

import pytest
import torch
from torch import nn

from relief_export.graph import ops
from relief_export.recipe import ModelConfig
from relief_export.relief.activity import measure_activity
from relief_export.relief.disconnection import Disconnector
from relief_export.relief.masks import Masks
from relief_export.relief.scores import score
from relief_export.relief.selection import Alpha, select
from relief_export.training.models import build_model


def disconnect(model, masks, x):
    return Disconnector(model, x[:1])(model, Masks(masks)).masks


def columns(mask, *masked, rows=slice(None)):
    mask = mask.clone()
    mask[rows, list(masked)] = False
    return mask


def full(model):
    return {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}


def filled(model):
    """Every parameter non-zero, batch norms with a shift."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1.5)
    return model.eval()


def test_a_chain_loses_what_nobody_reads_and_what_reads_nothing_to_a_fixed_point():
    model = filled(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    masks = full(model)
    masks["4.weight"][:, 1] = False  # neuron 1 of layer 2 is read by nobody ...
    masks["2.weight"][[0, 2, 3], 2] = False  # ... and was the only reader of neuron 2 of layer 0
    masks["0.weight"][0] = False  # neuron 0 of layer 0 has nothing left, bias included
    masks["0.bias"][0] = False
    found = disconnect(model, masks, torch.randn(4, 3))
    expected = full(model)
    expected["4.weight"][:, 1] = False
    expected["2.weight"][1] = False
    expected["2.bias"][1] = False
    expected["2.weight"][:, [0, 2]] = False
    expected["0.weight"][[0, 2]] = False
    expected["0.bias"][[0, 2]] = False
    assert found.same(expected)


def test_a_neuron_with_only_its_bias_left_stays():
    model = filled(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))
    masks = full(model)
    masks["0.weight"][0] = False
    assert disconnect(model, masks, torch.randn(1, 2)).same(masks)


def test_the_batch_norm_of_a_filter_without_inputs_is_masked_and_of_one_with_a_bias_is_not():
    for bias in (False, True):
        model = filled(
            nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=bias), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
        )
        masks = {"0.weight": torch.ones(3, 2, 3, 3, dtype=torch.bool)}
        masks["0.weight"][1] = False
        found = disconnect(model, masks, torch.randn(1, 2, 5, 5))
        expected = Masks(masks)
        if not bias:
            gone = torch.tensor([True, False, True])
            expected = expected & {"1.weight": gone, "1.bias": gone}
            expected = expected & {"3.weight": gone[None, :, None, None].expand(2, 3, 1, 1)}
        assert found.same(expected)


def test_the_batch_norm_of_an_unread_filter_is_masked():
    model = filled(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)))
    masks = {"4.weight": torch.ones(2, 12, dtype=torch.bool)}
    masks["4.weight"][:, 4:8] = False  # all four features of filter 1
    found = disconnect(model, masks, torch.randn(1, 2, 4, 4))
    gone = torch.tensor([True, False, True])
    kernel = gone[:, None, None, None].expand(3, 2, 3, 3)
    assert found.same(masks | {"0.weight": kernel, "0.bias": gone, "1.weight": gone, "1.bias": gone})


def test_outputs_are_never_removed():
    model = filled(nn.Sequential(nn.Linear(2, 2)))
    masks = {"0.weight": torch.zeros(2, 2, dtype=torch.bool)}
    assert disconnect(model, masks, torch.randn(1, 2)).same(masks)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))


def test_a_shared_weight_goes_only_where_all_its_uses_allow():
    model = filled(Tied())
    masks = {"head.weight": columns(torch.ones(2, 3, dtype=torch.bool), 0)}
    # Row 0 is dead in b, but a's neuron 0 is read by b's rows 1 and 2.
    assert disconnect(model, masks, torch.randn(1, 3)).same(masks)


def test_a_linear_layer_over_tokens_whose_weight_the_graph_transposes():
    model = filled(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    masks = {"2.weight": columns(torch.ones(2, 4, dtype=torch.bool), 3)}
    found = disconnect(model, masks, torch.randn(1, 5, 3))
    rows = torch.tensor([True, True, True, False])
    assert found.same(masks | {"0.weight": rows[:, None].expand(4, 3), "0.bias": rows})


def test_what_the_analysis_does_not_know_is_kept_and_named(monkeypatch):
    monkeypatch.delitem(ops.OPERATORS, "Relu")
    model = filled(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))
    masks = {"2.weight": columns(torch.ones(2, 3, dtype=torch.bool), 2)}
    found = Disconnector(model, torch.randn(1, 2))(model, Masks(masks))
    assert found.masks.same(masks)
    assert found.unknown == {"Relu": 1}


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("lenet5", {}, (1, 28, 28)),
        ("vgg11", {}, (3, 32, 32)),
        ("resnet20", {"shortcut": "A"}, (3, 32, 32)),
        ("resnet20", {"shortcut": "B"}, (3, 32, 32)),
    ],
)
def test_removing_what_is_disconnected_changes_no_output(name, options, shape):
    model = build_model(ModelConfig(name, options), shape, 10, 0).eval()
    torch.manual_seed(0)
    x = torch.randn(8, *shape)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.weight.uniform_(-1, 1)
    selected = select(score(model, measure_activity(model, [x])), Alpha(0.3, 0.3))
    disconnector = Disconnector(model, x[:1])
    found = disconnector(model, selected).masks
    assert found.count(model).kept < selected.count(model).kept
    assert disconnector(model, found).rounds == 1  # a fixed point
    assert (selected & found).same(found)  # monotone
    # Scale and shift of a neuron without inputs change the network by definition: compare from there on.
    norms = Masks({n: m for n, m in found.items() if n not in selected and "mask" not in n})
    selected.apply_(model)
    norms.apply_(model)
    with torch.no_grad():
        before = model(x)
        found.apply_(model)
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
