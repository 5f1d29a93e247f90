"""Scores against plain loops over neurons, samples, positions and kernel entries."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from relief_export.errors import InputError
from relief_export.relief.activity import measure_activity
from relief_export.relief.scores import score
from relief_export.relief.selection import Alpha, select

TOLERANCE = 1e-6
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def source_index(position, size, mode):
    """Index in the unpadded axis that a padded position reads, None for a zero."""
    if 0 <= position < size:
        return position
    if mode == "zeros":
        return None
    if mode == "replicate":
        return min(max(position, 0), size - 1)
    if mode == "circular":
        return position % size
    return -position if position < 0 else 2 * (size - 1) - position  # reflect


def paddings(layer):
    """(before, after) of each axis."""
    for size, dilation, *given_padding in zip(
        layer.kernel_size,
        layer.dilation,
        *([] if isinstance(layer.padding, str) else [layer.padding]),
        strict=True,
    ):
        total = dilation * (size - 1)
        if layer.padding == "same":
            yield total // 2, total - total // 2
        elif layer.padding == "valid":
            yield 0, 0
        else:
            yield given_padding[0], given_padding[0]


def brute_force_conv(layer, x, norm):
    """Kernel scores ``(out, in/groups)`` and bias scores of a convolution, by the definition."""
    weight, x = layer.weight.detach().double().numpy(), x.double().numpy()
    (out, within), kernel, spatial = weight.shape[:2], weight.shape[2:], x.shape[2:]
    pads = list(paddings(layer))
    counts = [
        (n + a + b - d * (k - 1) - 1) // s + 1
        for n, (a, b), d, k, s in zip(spatial, pads, layer.dilation, kernel, layer.stride, strict=True)
    ]
    scores = np.zeros((out, within))
    for i, j in itertools.product(range(out), range(within)):
        channel = (i // (out // layer.groups)) * within + j
        flow = []
        for place in itertools.product(*map(range, counts)):
            total = 0.0
            for n in range(len(x)):
                for tap in itertools.product(*map(range, kernel)):
                    index = tuple(
                        source_index(p * s + t * d - a, size, layer.padding_mode)
                        for p, s, t, d, (a, _), size in zip(
                            place, layer.stride, tap, layer.dilation, pads, spatial, strict=True
                        )
                    )
                    if None not in index:
                        total += abs(weight[(i, j, *tap)] * x[(n, channel, *index)])
            flow.append(total / len(x))
        scores[i, j] = sum(flow) if norm == "l1" else math.sqrt(sum(f * f for f in flow))
    places = math.prod(counts)
    bias = None if layer.bias is None else np.abs(layer.bias.detach().double().numpy())
    return scores, None if bias is None else bias * (places if norm == "l1" else math.sqrt(places))


@st.composite
def convolutions(draw):
    rank = draw(st.sampled_from([1, 2, 3]))
    groups = draw(st.sampled_from([1, 2, 4]))
    within = draw(st.integers(1, 2)) if rank < 3 else 1
    axis = {1: 5, 2: 3, 3: 2}[rank]
    kernel = tuple(draw(st.integers(1, axis)) for _ in range(rank))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    same = draw(st.booleans())
    layer = CONV[rank](
        groups * within,
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=1 if same else tuple(draw(st.integers(1, 3)) for _ in range(rank)),
        padding=draw(st.sampled_from(["same", "valid"]))
        if same
        else tuple(draw(st.integers(0, 2)) for _ in range(rank)),
        dilation=tuple(draw(st.integers(1, 2)) for _ in range(rank)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    low = {1: 9, 2: 5, 3: 3}[rank]
    return layer, tuple(draw(st.integers(low, low + 1)) for _ in range(rank))


# torch's own remark about its speed, on layers that the strategy makes on purpose
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@settings(max_examples=60, deadline=None)
@given(made=convolutions(), norm=st.sampled_from(["l1", "l2"]), seed=st.integers(0, 2**16))
def test_convolutions_agree_with_plain_loops(made, norm, seed):
    layer, spatial = made
    torch.manual_seed(seed)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(3, layer.in_channels, *spatial)
    model = nn.Sequential(layer)

    found = score(model, measure_activity(model, [x[:2], x[2:]]), position_norm=norm).layers["0"]

    weight, bias = brute_force_conv(layer, x, norm)
    np.testing.assert_allclose(found.weight.numpy(), weight, rtol=TOLERANCE, atol=0)
    if bias is not None:
        np.testing.assert_allclose(found.bias.numpy(), bias, rtol=TOLERANCE, atol=0)
    else:
        assert found.bias is None
    masks = select(score(model, measure_activity(model, [x]), position_norm=norm), Alpha(conv=0.8))
    expected, expected_bias = brute_force_selection(weight, bias, 0.8)
    kernels = masks["0.weight"].flatten(2)
    assert torch.equal(kernels.any(dim=2), kernels.all(dim=2))
    np.testing.assert_array_equal(kernels[:, :, 0].numpy(), expected)
    if bias is not None:
        np.testing.assert_array_equal(masks["0.bias"].numpy(), expected_bias)


def brute_force_selection(weight, bias, alpha):
    """Kept connections of every neuron, one at a time from the largest down."""
    kept = np.zeros(weight.shape, bool)
    kept_bias = np.zeros(len(weight), bool)
    for i, row in enumerate(weight):
        incoming = [(-s, j) for j, s in enumerate(row)]
        if bias is not None:
            incoming.append((-bias[i], len(row)))
        total, reached = -math.fsum(s for s, _ in incoming), 0.0
        for s, j in sorted(incoming):
            if total == 0 or reached >= alpha * total:
                break
            reached -= s
            if j == len(row):
                kept_bias[i] = True
            else:
                kept[i, j] = True
    return kept, kept_bias


@settings(max_examples=20, deadline=None)
@given(inputs=st.integers(1, 6), neurons=st.integers(1, 5), bias=st.booleans(), seed=st.integers(0, 2**16))
def test_linear_layers_agree_with_plain_loops(inputs, neurons, bias, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, neurons, bias=bias)
    x = torch.randn(5, inputs)
    model = nn.Sequential(layer)
    found = score(model, measure_activity(model, [x[:3], x[3:]])).layers["0"]
    weight = layer.weight.tolist()
    for i, j in itertools.product(range(neurons), range(inputs)):
        expected = sum(abs(weight[i][j] * row[j]) for row in x.tolist()) / len(x)
        assert float(found.weight[i, j]) == pytest.approx(expected, rel=TOLERANCE)
    if bias:
        assert found.bias.tolist() == pytest.approx(layer.bias.abs().tolist())


def test_asymmetric_padding_by_a_module_is_part_of_the_activity():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ZeroPad2d((2, 0, 1, 0)), nn.Conv2d(2, 3, 3))
    x = torch.randn(4, 2, 5, 6)
    found = score(model, measure_activity(model, [x])).layers["1"]
    padded = torch.zeros(4, 2, 6, 8)
    padded[:, :, 1:, 2:] = x
    weight, _ = brute_force_conv(model[1], padded, "l2")
    np.testing.assert_allclose(found.weight.numpy(), weight, rtol=TOLERANCE, atol=0)


def test_large_maps_are_unfolded_in_parts(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1, groups=2))
    activity = measure_activity(model, [torch.randn(2, 6, 7, 7)])
    whole = score(model, activity).layers["0"].weight
    monkeypatch.setattr("relief_export.relief.scores._WINDOW_ENTRIES", 2 * 7 * 7 * 9)
    np.testing.assert_allclose(score(model, activity).layers["0"].weight.numpy(), whole.numpy(), rtol=1e-12, atol=0)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def test_a_shared_weight_gets_the_sum_of_its_layers_scores():
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(4, 3)
    scores = score(model, measure_activity(model, [x]))
    middle = model.first(x).detach()
    expected = model.first.weight.detach().abs() * (x.abs().mean(0) + middle.abs().mean(0))
    assert set(scores.layers) == {"first"}
    np.testing.assert_allclose(scores.layers["first"].weight.numpy(), expected.numpy(), rtol=TOLERANCE)
    assert {"first.weight", "first.bias"} <= set(select(scores, Alpha()))


def test_weights_that_are_not_finite_are_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2))
    activity = measure_activity(model, [torch.ones(1, 2)])
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="layer '0' has weights that are NaN or infinite"):
        score(model, activity)


def test_a_weight_computed_from_others_is_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2))
    prune.identity(model[0], "weight")
    activity = measure_activity(model, [torch.ones(1, 2)])
    with pytest.raises(InputError, match="weight of layer '0' is computed"):
        score(model, activity)
