import pytest
import torch
from torch import nn

from relief_export.errors import InputError
from relief_export.relief.activity import measure_activity
from relief_export.relief.scores import score
from relief_export.relief.selection import Alpha, select
from relief_export.training.resnet import MaskedJoin


class Net(nn.Module):
    """A convolution used twice, batch norm, dropout, a join and a linear layer over tokens."""

    def __init__(self):
        super().__init__()
        self.twice, self.norm = nn.Conv1d(2, 2, 3, padding=1), nn.BatchNorm1d(2)
        self.drop, self.join, self.head = nn.Dropout(0.5), Join(), nn.Linear(4, 3)

    def forward(self, x):
        y = self.drop(self.norm(self.twice(input=self.twice(x))))
        return self.head(self.join(y, shortcut=x))


class Join(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("residual_mask", torch.tensor([1.0, 0.0]))
        self.register_buffer("shortcut_mask", torch.ones(2))

    def forward(self, residual, shortcut):
        return residual * self.residual_mask[:, None] + shortcut * self.shortcut_mask[:, None]


def test_means_over_batches_calls_and_positions():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(7, 2, 4)
    activity = measure_activity(model, [(x[:2], "label"), (x[2:7], "label")])

    model.eval()
    with torch.no_grad():
        between = model.twice(x)
        after = model.norm(model.twice(between))
        joined = model.join(after, x)
    assert activity.samples == 7
    assert list(activity.layers) == ["twice", "head"]
    expected = (x.double().abs().mean(0) + between.double().abs().mean(0)) / 2
    torch.testing.assert_close(activity.layers["twice"][0].mean, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(activity.layers["head"][0].mean, joined.double().abs().mean((0, 1)), rtol=1e-6, atol=0)
    residual, shortcut = activity.joins["join"]
    torch.testing.assert_close(residual, after.double().abs().mean(0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(shortcut, x.double().abs().mean(0), rtol=1e-6, atol=0)
    pair = score(model, activity).joins["join"]
    assert pair[1, 0] == 0  # masked already: its activity no longer counts
    assert float(pair[1, 1]) == pytest.approx(float(shortcut[1].norm()))


def test_nothing_of_the_network_changes():
    torch.manual_seed(0)
    model = Net().train()
    model.norm.eval()
    model(torch.randn(3, 2, 4)).sum().backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    measure_activity(model, [torch.randn(5, 2, 4)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert [m.training for m in model.modules()] == [True, True, False, True, True, True]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_hooks_and_modes_are_restored_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2)).train()
    with pytest.raises(InputError, match=r"Sequential fails on inputs \(3, 5\) float32: mat1 and mat2") as caught:
        measure_activity(model, [torch.randn(3, 5)])
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert model.training
    assert not model[0]._forward_pre_hooks


def test_the_batch_size_does_not_matter_and_samples_limit_a_generator():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(10, 3)
    whole = measure_activity(model, [x[:8]]).layers["0"][0].mean
    drawn = iter(x.split(3))
    parts = measure_activity(model, drawn, samples=8)
    assert parts.samples == 8
    torch.testing.assert_close(parts.layers["0"][0].mean, whole, rtol=1e-12, atol=0)
    assert len(next(drawn)) == 1  # nothing was drawn beyond what was needed


def test_means_of_many_samples_keep_float64_precision():
    model = nn.Sequential(nn.Linear(1, 1))
    x = torch.full((50_000, 1), 0.1)
    mean = measure_activity(model, x.split(500)).layers["0"][0].mean
    assert float(mean) == pytest.approx(float(x[0, 0]), rel=1e-12)


def test_an_unbatched_map_is_one_sample():
    model, x = nn.Sequential(nn.Conv2d(2, 1, 1)), torch.randn(2, 3, 3)
    found = measure_activity(model, [x]).layers["0"][0].mean
    torch.testing.assert_close(found, x.double().abs(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 3)]])
def test_an_empty_calibration_set_is_refused(batches):
    with pytest.raises(InputError, match="calibration set is empty"):
        measure_activity(nn.Sequential(nn.Linear(3, 1)), batches)


def test_a_compiled_network_is_measured_as_the_network_inside():
    inner, x = nn.Sequential(nn.Linear(3, 2)).eval(), torch.ones(4, 3)
    model = torch.compile(inner, backend="eager")
    with torch.no_grad():
        model(x)  # from now on it calls no hooks
    assert measure_activity(model, [x]).layers["0"][0].mean.tolist() == [1.0] * 3
    assert list(measure_activity(nn.DataParallel(inner), [x]).layers) == ["0"]
    inner.forward = lambda x: x
    with pytest.raises(InputError, match="no layer was called in calibration"):
        measure_activity(inner, [x])


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, left, right, labels=None):
        return {"sum": self.a(left) + self.b(right), "loss": None if labels is None else 1 / 0}


@pytest.mark.parametrize(
    ("batch", "forward"),
    [
        ((torch.ones(4, 3), torch.full((4, 3), 2.0)), None),
        ((torch.ones(4, 3), torch.full((4, 3), 2.0), torch.zeros(4)), None),
        (((torch.ones(4, 3), torch.full((4, 3), 2.0)), torch.zeros(4)), None),
        ({"right": torch.full((4, 3), 2.0), "left": torch.ones(4, 3), "labels": torch.ones(4), "id": [1] * 4}, None),
        (({"right": torch.full((4, 3), 2.0), "left": torch.ones(4, 3)}, torch.zeros(4)), None),
        ({"pixels": torch.ones(4, 3, dtype=torch.float64)}, lambda m, b: m(b["pixels"], right=2 * b["pixels"])),
    ],
)
def test_batches_of_every_form(batch, forward):
    activity = measure_activity(Two(), [batch, batch], samples=6, forward=forward)
    assert activity.samples == 6
    assert [activity.layers[name][0].mean.tolist() for name in "ab"] == [[1.0] * 3, [2.0] * 3]


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (nn.Linear(3, 1), [[1.0, 2.0, 3.0]], "a batch is a tensor, .*, not a list"),
        (nn.Linear(3, 1), {"x": torch.ones(2, 3)}, r"Linear fails on inputs \(\{x: \(2, 3\) float32\}\): "),
        (nn.Linear(3, 1), "text", "a batch is a tensor, .*, not a str"),
        (nn.Linear(3, 1), (1, 2), "a batch is a tensor, .*, not a tuple"),
        (Two(), (torch.ones(2, 3),), r"Two takes 2 inputs \(left, right\) and a batch holds 1"),
        (Two(), {"x": torch.ones(2, 3)}, "a batch has the keys x, and Two takes left, right, labels: rename them"),
    ],
)
def test_batches_of_no_known_form_are_refused(model, batch, message):
    with pytest.raises(InputError, match=message):
        measure_activity(nn.ModuleDict({"m": model})["m"], [batch], samples=4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_activity_that_is_not_finite_is_refused_by_its_first_layer(value):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].bias[1] = value
    with pytest.raises(InputError, match="input of layer '1' is NaN or infinite"):
        measure_activity(model, [torch.ones(2, 2)])


def test_a_layer_on_maps_of_several_sizes_has_a_mean_of_each():
    model = nn.Sequential(nn.Conv2d(1, 1, 3))
    found = measure_activity(model, [torch.ones(2, 1, 5, 5), 3 * torch.ones(1, 1, 6, 5), 2 * torch.ones(2, 1, 5, 5)])
    assert [(each.rows, tuple(each.mean.shape), float(each.mean.max())) for each in found.layers["0"]] == [
        (4, (1, 5, 5), 1.5),
        (1, (1, 6, 5), 3.0),
    ]
    with pytest.raises(InputError, match="layer '0' has more than 32 sizes, the last"):
        measure_activity(model, [torch.ones(1, 1, 3, 3 + width) for width in range(40)])
    tokens = nn.Sequential(nn.Linear(3, 1))
    means = measure_activity(tokens, [torch.ones(1, 4, 3), torch.ones(1, 7, 3)]).layers["0"]
    assert [each.mean.tolist() for each in means] == [[1.0] * 3]


def test_the_zoos_join_is_found():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.join = nn.Conv2d(2, 2, 1), MaskedJoin(2)

        def forward(self, x):
            return self.join(self.conv(x), x)

    model = Block()
    scores = score(model, measure_activity(model, [torch.randn(2, 2, 3, 3)]))
    assert set(select(scores, Alpha())) == {"conv.weight", "conv.bias", "join.residual_mask", "join.shortcut_mask"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_gpu_selects_the_same_connections(norm):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(288, 9)
    )
    x = torch.randn(64, 3, 8, 8)
    masks = [
        select(score(model, measure_activity(model, x.split(16)), position_norm=norm), Alpha())
        for model in (model, model.cuda())
    ]
    assert masks[0].same(masks[1])
