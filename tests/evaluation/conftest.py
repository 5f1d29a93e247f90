"""A small network as artifacts, with a manifest and reference logits from outside ONNX Runtime."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from relief_export import formats
from relief_export.formats import FORMATS, File, Options

SAMPLES, CLASSES = 64, 4
TEXT = """
<ir_version: 9, opset_import: ["" : 20]>
net (float[batch, 2, 6, 6] x, float[5, 2, 3, 3] conv_w, float[5] conv_b, float[4, 80] fc_w, float[4] fc_b)
    => (float[batch, 4] logits) {
  c = Conv <kernel_shape = [3, 3]> (x, conv_w, conv_b)
  r = Relu (c)
  f = Flatten (r)
  logits = Gemm <transB = 1> (f, fc_w, fc_b)
}
"""


def parse(text, weights):
    parsed = ir.from_onnx_text(text)
    for value in list(parsed.graph.inputs):
        if value.name in weights:
            parsed.graph.inputs.remove(value)
            value.const_value = ir.tensor(weights[value.name], name=value.name)
            parsed.graph.register_initializer(value)
    return parsed


def reference_logits(x, weights):
    """Compute the network in NumPy, in float64: windows, a sum of products, ReLU, a matrix product."""
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (3, 3), axis=(2, 3))
    maps = np.einsum("nchwij,ocij->nohw", windows, weights["conv_w"]) + weights["conv_b"][:, None, None]
    return (np.maximum(maps, 0).reshape(len(x), -1) @ weights["fc_w"].T + weights["fc_b"]).astype(np.float32)


@pytest.fixture
def weights():
    rng = np.random.default_rng(5)
    shapes = {"conv_w": (5, 2, 3, 3), "conv_b": (5,), "fc_w": (4, 80), "fc_b": (4,)}
    drawn = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    drawn["fc_w"][rng.random((4, 80)) < 0.9] = 0
    return drawn


@pytest.fixture
def network(weights):
    return parse(TEXT, weights)


@pytest.fixture
def samples(weights):
    """Samples that the network tells apart clearly, so that int8 does not decide ties anew."""
    x = np.random.default_rng(6).standard_normal((4 * SAMPLES, 2, 6, 6)).astype(np.float32)
    logits = reference_logits(x, weights)
    top = np.sort(logits, axis=1)
    clear = np.argsort(top[:, -2] - top[:, -1], kind="stable")[:SAMPLES]
    x, logits = x[clear], logits[clear]
    y = logits.argmax(axis=1)
    y[:6] = (y[:6] + 1) % CLASSES  # the network is wrong on these, so accuracy is not 1
    return x, y, logits


@pytest.fixture
def export(tmp_path, network, samples):
    """Write the network in the named formats with a manifest, and return the folder."""

    def write(*names):
        folder = tmp_path / "artifacts"
        folder.mkdir(exist_ok=True)
        options = Options(calibration=samples[0])
        artifacts = [FORMATS[name].write(network, folder / FORMATS[name].suffix, options) for name in names]
        formats.write_manifest(folder, artifacts, {})
        return folder

    return write


@pytest.fixture
def tamper(tmp_path, network, samples):
    """Put the network with other weights into an artifact's files; the manifest stays, or gets the new hashes."""

    def rewrite(kind, *, hashes, **changed):
        folder = tmp_path / "artifacts"
        manifest = formats.read_manifest(folder)
        (folder / "manifest.json").unlink()  # a writer need not trust a folder whose manifest is about to be wrong
        other = network.clone()
        for name, array in changed.items():
            other.graph.initializers[name].const_value = ir.tensor(array, name=name)
        FORMATS[kind].write(other, folder / FORMATS[kind].suffix, Options(calibration=samples[0]))
        formats.write_manifest(folder, manifest.artifacts, manifest.extra)
        if hashes:
            refresh(folder)

    return rewrite


def refresh(folder):
    """Bring the hashes of a manifest up to date with the files, as one who tampers with a network would."""
    manifest = formats.read_manifest(folder)
    artifacts = [
        replace(artifact, files=tuple(File.of(folder, folder / file.path) for file in artifact.files))
        for artifact in manifest.artifacts
    ]
    formats.write_manifest(folder, artifacts, manifest.extra)


@pytest.fixture(name="refresh")
def refresh_fixture():
    return refresh
