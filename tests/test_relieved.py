"""Shrink, formats and validation on networks that relief really made: tests/data/*.safetensors."""

import numpy as np
import onnxruntime as ort
import pytest
import torch

from relief_export import evaluation, formats
from relief_export.capture import capture
from relief_export.formats import FORMATS, Options
from relief_export.graph.cost import cost
from relief_export.graph.prepare import fold
from relief_export.graph.shrink import shrink
from tests.relieved import FILES, load

RELATIVE = 1e-5
"""Of the largest logit: float32 sums in another order."""
ROOM = 300_000
SMALLER = 80


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def network(request):
    return load(request.param)


@pytest.fixture
def shrunk(network):
    return shrink(fold(capture(network.model, network.x[:2], masks=network.masks)))


def run(path, x):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def logits(network):
    with torch.no_grad():
        return network.model(network.x).numpy()


def test_a_fixture_is_the_network_of_its_record(network):
    count = network.masks.count(network.model)
    assert count.to_dict() == network.about["connections"]
    assert network.masks.apply_(network.model) == {}  # every masked entry is zero already
    assert network.about["command"].startswith("make ")
    assert sum(file.stat().st_size for file in FILES) <= ROOM


def test_the_cut_network_is_the_masked_one(tmp_path, network, shrunk):
    FORMATS["dense"].write(shrunk.model, tmp_path / "model.onnx", Options())
    expected = logits(network)
    assert np.abs(run(tmp_path / "model.onnx", network.x) - expected).max() <= RELATIVE * np.abs(expected).max()
    small, whole = cost(shrunk.model).parameters, cost(fold(capture(network.model, network.x[:2]))).parameters
    assert small.structural < whole.structural / 3
    # The connections that are kept are there, but for biases of neurons that became constants, and nothing else is.
    assert small.nonzero <= network.about["connections"]["kept"]
    assert not shrunk.unknown
    assert not shrink(shrunk.model).modified


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_its_promise(tmp_path, network, shrunk, name):
    calibration = network.x.numpy()
    FORMATS["dense"].write(shrunk.model, tmp_path / "model.onnx", Options())
    artifact = FORMATS[name].write(shrunk.model, tmp_path / FORMATS[name].suffix, Options(calibration=calibration))
    formats.write_manifest(tmp_path, [artifact], {})
    found = evaluation.validate(tmp_path, calibration, logits(network).argmax(1), logits(network))
    assert found.ok, found.failures
    if name in {"sparse", "packed"}:  # csr is rebuilt below
        assert np.array_equal(run(tmp_path / FORMATS[name].suffix, network.x), run(tmp_path / "model.onnx", network.x))
    if name == "csr":
        FORMATS["dense"].write(formats.read(tmp_path / "csr"), tmp_path / "again.onnx", Options())
        assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()


def test_sixteen_values_make_it_eighty_times_smaller(tmp_path, network, shrunk):
    original = FORMATS["dense"].write(fold(capture(network.model, network.x[:2])), tmp_path / "dense.onnx", Options())
    packed = FORMATS["packed-codebook16"].write(shrunk.model, tmp_path / "model.onnx", Options())
    assert packed.bytes * SMALLER <= original.bytes
