"""Trained rounding: how many values are left, that nothing masked comes back, gradients against a brute-force sum."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from helpers import convolutional, data
from torch import nn

import relief_export as rx
from relief_export.capture import capture
from relief_export.errors import InputError
from relief_export.formats import FORMATS, Options
from relief_export.graph.prepare import fold
from relief_export.recipe import ModelConfig, QuantiseConfig, TrainConfig
from relief_export.relief.masks import Masks
from relief_export.training import rounding
from relief_export.training.fit import evaluate, fit
from relief_export.training.models import build_model
from relief_export.training.rounding import fold_norms, round_weights

torch.set_num_threads(1)
TRAIN = TrainConfig(4, lr=0.01, batch=16)


@pytest.fixture(scope="module")
def trained():
    """A network with batch norm that was trained under masks, its masks and its data."""
    samples, model = data(noise=0.6), convolutional()
    masks = Masks(
        {
            "0.0.weight": torch.arange(54).view(6, 1, 3, 3) >= 9,  # the first filter is gone, its norm's scale too
            "0.1.weight": torch.arange(6) > 0,
            "2.weight": torch.arange(162).view(3, 54) % 3 > 0,
        }
    )
    fit(model, samples, TRAIN, masks=masks, seed=0)
    return model, masks, samples


def rounded(trained, values, **settings):
    model, masks, samples = copy.deepcopy(trained[0]), *trained[1:]
    config = QuantiseConfig(values, **{"epochs": 3, "lr": 0.01} | settings)
    return model, round_weights(model, samples, masks, config, TRAIN, seed=1)


def different(tensor):
    return len(set(tensor.detach().flatten().tolist()) - {0.0})


@pytest.mark.parametrize("values", [2, 5, 16])
def test_each_weight_holds_few_values_and_what_is_masked_stays_zero(trained, values):
    model, done = rounded(trained, values)
    assert different(model[2].weight) <= values
    assert different(model[0][0].weight) <= max(values - 1, 1)
    assert done.values == {"0.0.weight": different(model[0][0].weight), "2.weight": different(model[2].weight)}
    state = model.state_dict()
    for name, mask in trained[1].items():
        assert state[name][~mask].count_nonzero() == 0
    assert torch.equal(model[2].bias, model[2].bias.half().float())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert evaluate(model, trained[2].validation).accuracy == done.fit.validation_accuracy


def test_training_recovers_what_rounding_to_two_values_lost(trained):
    before = evaluate(trained[0], trained[2].validation)
    model, done = rounded(trained, 2, epochs=6, lr=0.05)
    after = evaluate(model, trained[2].validation)
    assert done.untrained < before.accuracy
    assert after.accuracy > done.untrained
    zero = rounded(trained, 2, epochs=0)[1]
    assert zero.untrained == zero.fit.validation_accuracy == done.untrained


def test_the_gradient_of_an_entry_is_the_sum_over_its_weights(trained):
    model = copy.deepcopy(trained[0])
    x, y = trained[2].train.tensors()
    wrapped = rounding._Codebooks(model, trained[1], fold_norms(model, x[:2]), 4)
    wrapped.eval()
    nn.functional.cross_entropy(wrapped(x), y).backward()
    plain = copy.deepcopy(trained[0])
    fold_norms(plain, x[:2])
    with torch.no_grad():
        for name, tensor in wrapped.tensors().items():
            dict(plain.named_parameters())[name].copy_(tensor)
    plain.eval()
    nn.functional.cross_entropy(plain(x), y).backward()
    for layer, table in ((plain[0][0], wrapped.tables[0]), (plain[2], wrapped.tables[1])):
        entries = table.detach().half().float()
        sums = [layer.weight.grad[layer.weight == entry].sum().item() for entry in entries]
        assert len(entries) > 1
        np.testing.assert_allclose(table.grad.numpy(), sums, rtol=1e-3, atol=1e-6)


def test_a_rounded_network_is_what_its_packed_codebook_file_computes(trained, tmp_path):
    model, _ = rounded(trained, 16)
    x = trained[2].test.tensors()[0]
    model.eval()
    graph = fold(capture(model, x[:2]))
    FORMATS["packed-codebook16"].write(graph, tmp_path / "model.onnx", Options())
    session = ort.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        wanted = model(x).numpy()
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


def test_int8_weights_are_steps_of_their_channel_and_the_int8_file_finds_the_same_steps(trained, tmp_path):
    model, done = rounded(trained, "int8")
    for weight, mask in ((model[0][0].weight, trained[1]["0.0.weight"]), (model[2].weight, trained[1]["2.weight"])):
        flat, kept = weight.detach().flatten(1).double().numpy(), mask.flatten(1).numpy()
        scale = np.abs(flat).max(axis=1, keepdims=True) / 127
        steps = np.divide(flat, scale, out=np.zeros_like(flat), where=scale > 0)
        assert np.abs(steps - steps.round()).max() < 1e-4
        assert (np.abs(steps.round())[kept] >= 1).all()
        assert not steps[~kept].any()
    assert done.fit.validation_accuracy >= evaluate(trained[0], trained[2].validation).accuracy - 0.05
    # ONNX Runtime's quantiser, which derives scales of its own, arrives at the same integers.
    x = trained[2].test.tensors()[0]
    graph = fold(capture(model.eval(), x[:2]))
    FORMATS["int8"].write(graph, tmp_path / "model.onnx", Options(calibration=x.numpy()))
    proto = onnx.load(tmp_path / "model.onnx")
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    for name, weight in (("0.0.weight", model[0][0].weight), ("2.weight", model[2].weight)):
        found, flat = stored[f"{name}_quantized"], weight.detach().double().numpy()
        found = found.T if found.shape != flat.shape else found
        scale = np.abs(flat).max(axis=tuple(range(1, flat.ndim)), keepdims=True) / 127
        steps = np.divide(flat, scale, out=np.zeros_like(flat), where=scale > 0)
        assert np.array_equal(found, np.rint(steps))


def test_moving_batch_norm_into_the_weights_leaves_a_residual_network_what_it_was():
    model = build_model(ModelConfig("resnet20"), (1, 8, 8), 3, 0)
    fit(model, data(48), TrainConfig(1, batch=16), seed=0)
    x = data().test.tensors()[0]
    model.eval()
    wanted = model(x).detach()
    pairs = fold_norms(model, x[:2])
    assert len(pairs) == 19
    torch.testing.assert_close(model(x).detach(), wanted, rtol=1e-4, atol=1e-4)
    # The exporter's own folding then changes no bit of a weight.
    graph, state = fold(capture(model, x[:2])), model.state_dict()
    folded = {str(value.name): value.const_value.numpy() for value in graph.graph.initializers.values()}
    weights = [name for name in folded if name.endswith("conv1.weight")]
    assert len(weights) == 10
    assert all(np.array_equal(folded[name], state[name].numpy()) for name in weights)


class Twice(nn.Module):
    """A layer whose output is read beside its batch norm."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(64, 3), nn.BatchNorm1d(3)
        nn.init.constant_(self.norm.weight, 3.0)

    def forward(self, x):
        y = self.layer(x.flatten(1))
        return self.norm(y) + y


def test_what_cannot_be_rounded_is_refused_in_one_sentence(trained):
    with pytest.raises(InputError, match=r"quantise\.values = 60, but 0\.0\.weight has 54 weights"):
        rounded(trained, 60)
    with pytest.raises(InputError, match="whose output is read elsewhere too"):
        fold_norms(Twice(), torch.rand(4, 1, 8, 8))


def test_an_interrupted_rounding_ends_with_the_same_bits(trained, tmp_path):
    whole, _ = rounded(trained, 5)
    told = []

    def interrupt(*line):
        told.append(line)
        if len(told) == 8:
            raise KeyboardInterrupt

    config = QuantiseConfig(5, epochs=3, lr=0.01)
    places = {"seed": 1, "checkpoint": tmp_path / "checkpoint.pt"}
    model = copy.deepcopy(trained[0])
    with pytest.raises(KeyboardInterrupt):
        round_weights(model, trained[2], trained[1], config, TRAIN, progress=interrupt, **places)
    assert told[0][0] == "quantise"
    model = copy.deepcopy(trained[0])
    done = round_weights(model, trained[2], trained[1], config, TRAIN, **places)
    assert done.fit.resumed_at == 1
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True))


def test_a_network_of_ones_own_is_rounded_from_python(trained):
    model, samples = copy.deepcopy(trained[0]), trained[2]
    pairs = {name: getattr(samples, name).tensors() for name in ("train", "validation")}
    done = rx.quantise(model, pairs, trained[1], values=4, epochs=2, lr=0.01)
    assert done.values["2.weight"] == different(model[2].weight) <= 4
    assert evaluate(model, samples.validation).accuracy == done.fit.validation_accuracy
    with pytest.raises(InputError, match=r'values must be a number from 2 to 256, or "int8", not 1'):
        rx.quantise(model, pairs, values=1)
