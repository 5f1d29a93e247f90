"""Folding: masks, chains, shapes and batch norm, and what must not be folded."""

# ruff: noqa: E501 - small graphs stay on one line

from __future__ import annotations

import numpy as np
import pytest

from relief_export.graph.prepare import fold, simplify
from tests.graph.helpers import arrays_of, assert_same, build, interface, random_feeds, run

RELATIVE = 1e-5  # of the output's scale
BN = {
    "g": np.array([0.5, 0, -1, 2], np.float32),
    "b": np.array([0.1, 0.2, 0, -1], np.float32),
    "m": np.array([0, 0.3, -0.2, 0.1], np.float32),
    "v": np.array([1, 0.5, 0, 2], np.float32),  # a variance of 0 is legal
}
NORM = "y = BatchNormalization<epsilon=0.01>(c, g, b, m, v)"


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


LINEAR = {
    "Conv": ("c = Conv(x, w)", {"w": normal(4, 3, 2, 2)}, "float[n, 3, 5, 5] x", "float[n, 4, 4, 4] y"),
    "Conv-bias": (
        "c = Conv(x, w, o)",
        {"w": normal(4, 3, 2, 2), "o": normal(4)},
        "float[n, 3, 5, 5] x",
        "float[n, 4, 4, 4] y",
    ),
    "Conv-grouped": (
        "c = Conv<group=2>(x, w)",
        {"w": normal(4, 2, 2, 2)},
        "float[n, 4, 5, 5] x",
        "float[n, 4, 4, 4] y",
    ),
    "ConvTranspose": (
        "c = ConvTranspose(x, w)",
        {"w": normal(3, 4, 2, 2)},
        "float[n, 3, 5, 5] x",
        "float[n, 4, 6, 6] y",
    ),
    "Gemm": ("c = Gemm(x, w, o)", {"w": normal(3, 4), "o": normal(4)}, "float[n, 3] x", "float[n, 4] y"),
    "Gemm-transB": (
        "c = Gemm<transB=1>(x, w, o)",
        {"w": normal(4, 3), "o": normal(4)},
        "float[n, 3] x",
        "float[n, 4] y",
    ),
}


@pytest.mark.parametrize("kind", LINEAR)
def test_batch_norm_becomes_part_of_the_weights(kind):
    body, arrays, given, result = LINEAR[kind]
    model = build(f"g ({given}) => ({result}) {{ {body} {NORM} }}", arrays | BN)
    folded = fold(model)
    assert [node.op_type for node in folded.graph] == [kind.split("-")[0]]
    assert "w" in arrays_of(folded)
    assert_same(model, folded, random_feeds(model), relative=RELATIVE)
    assert interface(folded) == interface(model)


KEPT = {
    "two readers": ("c = Conv(x, w) r = Relu(c) d = BatchNormalization(c, g, b, m, v) y = Add(r, d)", {}),
    "shared weight": ("c = Conv(x, w) d = BatchNormalization(c, g, b, m, v) e = Conv(x, w) y = Add(d, e)", {}),
    "training": ("c = Conv(x, w) y, r, s = BatchNormalization<training_mode=1>(c, g, b, m, v)", {}),
    "weight is an output": ("c = Conv(x, w) y = BatchNormalization(c, g, b, m, v)", {}),
    "Gemm alpha": ("f = GlobalMaxPool(x) h = Flatten(f) k = Gemm<alpha=0.5>(h, w2) d = BatchNormalization(k, g, b, m, v) y = Unsqueeze(d, ax)",
                   {"w2": normal(3, 4), "ax": np.array([2, 3])}),
    "grouped ConvTranspose": ("k = Concat<axis=1>(x, one) d = ConvTranspose<group=2>(k, w3) y = BatchNormalization(d, g, b, m, v)",
                              {"w3": normal(4, 2, 1, 1), "one": np.ones((1, 1, 4, 4), np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KEPT)
def test_batch_norm_stays_where_folding_would_be_wrong(kind):
    body, arrays = KEPT[kind]
    outputs = "float[1, 4, h, k] y" + (", float[4, 3, 1, 1] w" if kind == "weight is an output" else "")
    model = build(f"g (float[1, 3, 4, 4] x) => ({outputs}) {{ {body} }}", {"w": normal(4, 3, 1, 1)} | BN | arrays)
    folded = fold(model)
    assert "BatchNormalization" in [node.op_type for node in folded.graph]
    assert_same(model, folded, random_feeds(model), relative=RELATIVE)


def test_mask_nodes_are_multiplied_in():
    mask = (np.arange(12).reshape(4, 3) % 2).astype(np.float32)
    model = build(
        "g (float[n, 3] x) => (float[n, 4] y) { m = Mul(w, k) y = Gemm<transB=1>(x, m) }",
        {"w": normal(4, 3), "k": mask},
    )
    folded = fold(model)
    assert [node.op_type for node in folded.graph] == ["Gemm"]
    (weight,) = arrays_of(folded).values()
    assert np.array_equal(weight, normal(4, 3) * mask)


def test_folding_never_grows_the_model():
    """A large tensor made from a small one, and floats made from quantised weights, stay computed."""
    q = np.ones((64, 96), np.int8)
    text = """g (float[n, 96] x) => (float[n, 64] y) { w = DequantizeLinear(q, s) h = Gemm<transB=1>(x, w)
        e = Expand(one, shape) z = Slice(e, zero, row) f = Squeeze(z, zero) y = Add(h, f) }"""
    arrays = {"q": q, "s": np.array(0.1, np.float32), "one": np.ones((1, 1), np.float32), "shape": np.array([100, 64])}
    model = build(text, arrays | {"zero": np.array([0]), "row": np.array([1])})
    folded = fold(model)
    assert {"DequantizeLinear", "Expand"} <= {node.op_type for node in folded.graph}
    assert sum(a.nbytes for a in arrays_of(folded).values()) <= sum(a.nbytes for a in arrays_of(model).values())
    assert_same(model, folded, random_feeds(model), relative=RELATIVE)


COMPUTED = {
    "size(0), -1": ("s = Shape(x) b = Gather(s, i) u = Unsqueeze(b, z) t = Concat<axis=0>(u, m) y = Reshape(x, t)",
                    {"i": np.array(0), "z": np.array([0]), "m": np.array([-1])}),
    "sliced": ("s = Shape(x) b = Slice(s, z, o) t = Concat<axis=0>(b, m) y = Reshape(x, t)",
               {"z": np.array([0]), "o": np.array([1]), "m": np.array([-1])}),
    "start, end": ("s = Shape<start=0, end=1>(x) c = Cast<to=7>(s) t = Concat<axis=0>(c, m) y = Reshape(x, t)", {"m": np.array([48])}),
}  # fmt: skip


@pytest.mark.parametrize("kind", COMPUTED)
def test_reshape_targets_computed_from_the_batch_become_constants(kind):
    body, arrays = COMPUTED[kind]
    model = build(f"g (float[n, 3, 4, 4] x) => (float[n, 48] y) {{ {body} }}", arrays)
    plain = simplify(model)
    assert [node.op_type for node in plain.graph] == ["Reshape"]
    for batch in (1, 5):
        feeds = {"x": normal(batch, 3, 4, 4)}
        assert np.array_equal(run(model, feeds)[0], run(plain, feeds)[0])


def test_reshape_by_another_inputs_length_stays_computed():
    text = "g (float[n, 12] x, float[k, 2] z) => (float[k, a, b] y) { s = Shape<end=1>(z) t = Concat<axis=0>(s, m) y = Reshape(x, t) }"
    model = build(text, {"m": np.array([-1, 2])})
    feeds = {"x": normal(4, 12), "z": normal(3, 2)}
    assert run(simplify(model), feeds)[0].shape == (3, 8, 2)


def test_names_of_initializers_inputs_and_outputs_stay():
    arrays = {"layer.weight": normal(4, 3), "layer.bias": normal(4)}
    text = "g (float[n, 3] x) => (float[n, 4] y) { h = Gemm<transB=1>(x, W, B) y = Relu(h) }"
    model = build(text, {"W": arrays["layer.weight"], "B": arrays["layer.bias"]})
    assert set(arrays_of(fold(model))) == {"W", "B"}
    assert interface(fold(model)) == interface(model)


def test_a_constant_that_is_an_output_stays():
    text = "g (float[n, 3] x) => (float[n, 4] y, float[4] B) { y = Gemm<transB=1>(x, W) }"
    model = build(text, {"W": normal(4, 3), "B": normal(4)})
    feeds = {"x": normal(2, 3)}
    assert_same(model, fold(model), feeds, relative=0.0)
    assert interface(fold(model)) == interface(model)


@pytest.mark.parametrize("body", ["t = Transpose(w)", "i = Identity(w) t = Transpose(i)"])
def test_weight_that_others_read_is_not_stored_once_more(body):
    """A tied embedding: the table is looked up and multiplied by."""
    text = f"g (int64[n, 5] i) => (float[n, 5, 90] y) {{ e = Gather(w, i) r = Relu(e) {body} y = MatMul(r, t) }}"
    model = build(text.replace("i = Id", "j = Id").replace("(i)", "(j)"), {"w": normal(90, 6)})
    folded = fold(model)
    assert {name: array.shape for name, array in arrays_of(folded).items()} == {"w": (90, 6)}
    assert_same(model, folded, {"i": np.arange(10).reshape(2, 5)}, relative=RELATIVE)


def test_weight_behind_two_identities_stays_one():
    text = (
        "g (float[n, 16] x) => (float[n, 16] y) { a = Identity(w) b = Identity(w) h = MatMul(x, a) y = MatMul(h, b) }"
    )
    folded = fold(build(text, {"w": normal(16, 16)}))
    assert list(arrays_of(folded)) == ["w"]
