"""Cases that tools for removing channels are known to get wrong, one test each."""

# ruff: noqa: E501 - small graphs stay on one line

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from relief_export.graph.shrink import shrink
from tests.graph.helpers import arrays_of, assert_sound, build, parameters, random_feeds, run, stored_bytes

if TYPE_CHECKING:
    import onnx_ir as ir

RELATIVE = 1e-5  # of the output's scale
VISIBLE = 1e-2  # what a careless removal moves the outputs by, at least


def normal(*shape: int, seed: int = 0, dead: tuple[int, ...] = (), unread: tuple[int, ...] = ()) -> np.ndarray:
    """Return a random weight with zero rows and zero columns."""
    weight = np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)
    weight[list(dead)] = 0
    weight[:, list(unread)] = 0
    return weight


def shrunk(model: ir.Model) -> ir.Model:
    """Shrink, check that the result is sound, return it."""
    result = shrink(model).model
    assert_sound(model, result, random_feeds(model), relative=RELATIVE)
    return result


def shapes(model: ir.Model) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays_of(model).items()}


CHAIN = "g (float[n, 3, 6, 6] x) => (float[n, 4, h, w] y) { a = Conv(x, w1, b1) r = Relu(a) y = Conv<pads=[PADS]>(r, w2, b2) }"


def test_dead_filter_with_a_bias_still_emits_a_constant():
    """A filter of zeros with a bias is not silent: dropping it and its constant moves the outputs."""
    b1 = normal(1, 8)[0] + 2
    arrays = {"w1": normal(8, 3, 1, 1, dead=(0, 5)), "b1": b1, "w2": normal(4, 8, 3, 3), "b2": normal(1, 4)[0]}
    model = build(CHAIN.replace("PADS", "0, 0, 0, 0"), arrays)
    result = shrunk(model)
    assert shapes(result)["w1"] == (6, 3, 1, 1)
    live = [1, 2, 3, 4, 6, 7]
    careless = build(
        CHAIN.replace("PADS", "0, 0, 0, 0"),
        arrays | {"w1": arrays["w1"][live], "b1": b1[live], "w2": arrays["w2"][:, live]},
    )
    feeds = random_feeds(model)
    moved = np.abs(run(careless, feeds)[0] - run(model, feeds)[0]).max() / np.abs(run(model, feeds)[0]).max()
    assert moved > VISIBLE


def test_dead_filter_with_a_batch_norm_shift_still_emits_a_constant():
    """The same where the constant is the shift of a batch norm, which no look at the convolution's bias finds."""
    arrays = {
        "w1": normal(6, 3, 1, 1, dead=(2,)),
        "g": np.ones(6, np.float32),
        "b": np.full(6, 1.5, np.float32),
        "m": normal(1, 6)[0],
        "v": np.full(6, 0.5, np.float32),
        "w2": normal(4, 6, 1, 1),
    }
    text = "g (float[n, 3, 6, 6] x) => (float[n, 4, 6, 6] y) { a = Conv(x, w1) c = BatchNormalization(a, g, b, m, v) y = Conv(c, w2) }"
    assert shapes(shrunk(build(text, arrays)))["w1"] == (5, 3, 1, 1)


def test_filter_becomes_constant_because_its_inputs_are_removed():
    """No weight of the second layer's filter is all zero: it dies only because what it reads is constant."""
    w2 = normal(4, 6, 1, 1)
    w2[1, 2:] = 0  # reads only 0 and 1, both constant
    arrays = {
        "w1": normal(6, 3, 1, 1, dead=(0, 1)),
        "b1": np.array([0.7, -0.4, 0.1, 0.2, 0.3, 0.4], np.float32),
        "w2": w2,
        "b2": normal(1, 4)[0],
        "w3": normal(2, 4, 1, 1),
    }
    text = """g (float[n, 3, 6, 6] x) => (float[n, 2, 6, 6] y) {
        a = Conv(x, w1, b1) r = Sigmoid(a) c = Conv(r, w2, b2) s = Tanh(c) y = Conv(s, w3) }"""
    found = shapes(shrunk(build(text, arrays)))
    assert found["w1"] == (4, 3, 1, 1)
    assert found["w2"] == (3, 4, 1, 1)
    assert found["w3"] == (2, 3, 1, 1)


@pytest.mark.parametrize("stride", [1, 2])
def test_constant_under_zero_padding_differs_at_the_border(stride):
    """A bias cannot stand for it, and a map of biases makes the model larger than it was: one channel carries them all."""
    text = CHAIN.replace("PADS", "1, 1, 1, 1").replace("pads=", f"strides=[{stride}, {stride}], pads=")
    b1 = np.array([0.5, 2, 1.5, 0.1, 0.2, 0.3], np.float32)
    arrays = {"w1": normal(6, 3, 1, 1, dead=(0, 1, 2)), "b1": b1, "w2": normal(4, 6, 3, 3), "b2": normal(1, 4)[0]}
    model = build(text, arrays)
    result = shrunk(model)
    assert shapes(result)["w1"] == (4, 3, 1, 1)  # three live ones and one for the three constants
    assert parameters(result) < parameters(model)
    assert stored_bytes(result) < stored_bytes(model)
    assert max(np.ndim(a) for a in arrays_of(result).values()) == 4
    assert any(row.reason.startswith("non-zero constant under zero padding at Conv") for row in shrink(model).stayed)


def test_zero_constant_under_padding_goes_whole():
    """What an activation maps to zero is zero at the border too, whatever the bias was."""
    b1 = np.array([-0.5, -2, 0, 0.1, 0.2, 0.3], np.float32)
    arrays = {"w1": normal(6, 3, 1, 1, dead=(0, 1, 2)), "b1": b1, "w2": normal(4, 6, 3, 3), "b2": normal(1, 4)[0]}
    assert shapes(shrunk(build(CHAIN.replace("PADS", "1, 1, 1, 1"), arrays)))["w1"] == (3, 3, 1, 1)


def test_units_whose_outgoing_weights_are_all_zero_go():
    """Nothing is wrong with their own weights, so a look at rows alone never finds them."""
    arrays = {
        "w1": normal(5, 7),
        "b1": normal(1, 5)[0],
        "w2": normal(3, 5, unread=(0, 1, 2)),
    }
    text = (
        "g (float[n, 7] x) => (float[n, 3] y) { h = Gemm<transB=1>(x, w1, b1) r = Relu(h) y = Gemm<transB=1>(r, w2) }"
    )
    assert shapes(shrunk(build(text, arrays))) == {"w1": (2, 7), "b1": (2,), "w2": (3, 2)}


def test_live_row_whose_weights_sum_to_zero_stays():
    """Exactly zero is no sum: positive and negative weights of a live filter may cancel."""
    w1 = normal(4, 2, 3, 3)
    w1[1] = 0
    w1[1, 0, 0, 0], w1[1, 1, 2, 2] = 1, -1
    w2 = normal(3, 4, 1, 1)
    w2[0, 2], w2[1, 2], w2[2, 2] = 1, -1, 0
    text = "g (float[n, 2, 6, 6] x) => (float[n, 3, 4, 4] y) { a = Conv(x, w1) r = Tanh(a) y = Conv(r, w2) }"
    model = build(text, {"w1": w1, "w2": w2})
    assert not shrink(model).modified
    assert shapes(shrunk(model))["w1"] == (4, 2, 3, 3)


def test_zero_row_in_the_output_layer_stays():
    """A class that nothing can vote for is still a class: the shape of the output is the user's."""
    arrays = {
        "w1": normal(5, 7, dead=(1,)),
        "b1": normal(1, 5)[0],
        "w2": normal(3, 5, dead=(0, 2)),
        "b2": normal(1, 3)[0],
    }
    text = "g (float[n, 7] x) => (float[n, 3] y) { h = Gemm<transB=1>(x, w1, b1) r = Relu(h) y = Gemm<transB=1>(r, w2, b2) }"
    model = build(text, arrays)
    result = shrink(model)
    assert shapes(shrunk(model))["w2"] == (3, 4)
    assert any(
        (row.layer, row.side, row.count, row.reason) == ("w2", "output", 2, "graph output") for row in result.stayed
    )


@pytest.mark.parametrize("bias", [0.0, 0.8])
def test_all_filters_of_a_layer_dead(bias):
    """The network computes a constant from there on; that is legal, and no reason to crash."""
    arrays = {
        "w1": normal(5, 7),
        "b1": normal(1, 5)[0],
        "w2": np.zeros((4, 5), np.float32),
        "b2": np.full(4, bias, np.float32),
        "w3": normal(3, 4),
        "b3": normal(1, 3)[0],
    }
    text = """g (float[n, 7] x) => (float[n, 3] y) { h = Gemm<transB=1>(x, w1, b1) r = Relu(h)
        i = Gemm<transB=1>(r, w2, b2) s = Relu(i) y = Gemm<transB=1>(s, w3, b3) }"""
    result = shrunk(build(text, arrays))
    assert parameters(result) <= 3
    for batch in (1, 5):
        assert run(result, {"x": np.zeros((batch, 7), np.float32)})[0].shape == (batch, 3)


RESIDUAL = """g (float[n, 3, 6, 6] x) => (float[n, 2, 6, 6] y) {
    a = Conv(x, w1, b1) r = Relu(a) c = Conv<pads=[1, 1, 1, 1]>(r, w2, b2) d = Relu(c) e = Conv<pads=[1, 1, 1, 1]>(d, w3)
    s = Add(r, e) t = Relu(s) y = Conv(t, w4) }"""


def residual(**changes: np.ndarray) -> ir.Model:
    arrays = {
        "w1": normal(8, 3, 1, 1, dead=(0, 1, 2)),
        "b1": np.array([0, 0, 0, 1, 1, 1, 1, 1], np.float32),
        "w2": normal(8, 8, 3, 3),
        "b2": normal(1, 8)[0],
        "w3": normal(8, 8, 3, 3, dead=(0, 3)),
        "w4": normal(2, 8, 1, 1, unread=(7,)),
    }
    return build(RESIDUAL, arrays | changes)


def test_residual_join_keeps_the_union_and_says_so():
    """Channel 0 is dead on both sides and goes; 1, 2 and 3 are dead on one side only and stay, named by the addition."""
    model = residual()
    result = shrink(model)
    found = shapes(shrunk(model))
    assert found["w4"] == (2, 7, 1, 1)  # 0 is gone; 7 is read by the branch
    assert found["w2"][1] == 5  # the branch itself reads only what is not zero
    reasons = [row.reason for row in result.stayed if row.layer == "w1" and row.side == "output"]
    assert any(reason.startswith("tied at Add") and reason.endswith("with 1 live channel") for reason in reasons)


def test_residual_join_reads_no_mask_back():
    """A channel of the shortcut that nothing behind the join reads goes on both sides."""
    silent = normal(8, 8, 3, 3, unread=(7,))
    found = shapes(shrunk(residual(w2=silent)))
    assert found["w4"] == (2, 6, 1, 1)
    assert found["w1"][0] == 6


@pytest.mark.parametrize(("channels", "groups"), [(6, 2), (6, 3), (6, 6), (4, 4), (1, 1)])
def test_grouped_depthwise_and_one_channel_convolutions_stay_legal(channels, groups):
    """Cutting a channel of one group leaves unequal groups, and a single channel cannot be cut at all."""
    outs = 2 * channels
    arrays = {
        "w1": normal(channels, 3, 1, 1, dead=(0,)),
        "b1": np.full(channels, -1, np.float32),
        "k": normal(outs, channels // groups, 3, 3),
        "w2": normal(2, outs, 1, 1, unread=(0, outs - 1)),
        "b2": normal(1, 2)[0],
    }
    text = f"""g (float[n, 3, 6, 6] x) => (float[n, 2, 6, 6] y) {{ a = Conv(x, w1, b1) r = Relu(a)
        d = Conv<group={groups}, pads=[1, 1, 1, 1]>(r, k) y = Conv(d, w2, b2) }}"""
    model = build(text, arrays)
    found = shapes(shrunk(model))
    if groups == channels > 1:  # depthwise: channel 0 goes with its two filters
        assert found["w1"][0] == channels - 1
        assert found["k"][0] == 2 * (channels - 1)
    if channels == 1:
        assert "k" not in found or found["k"][1] == 1


def test_exported_masks_become_part_of_the_weights():
    """An exporter writes ``weight * mask`` as a node and stores both; the mask is multiplied in, and then used."""
    mask = np.ones((6, 5), np.float32)
    mask[[1, 4]] = 0
    arrays = {"w1": normal(6, 5), "mask": mask, "b1": np.zeros(6, np.float32), "w2": normal(3, 6)}
    text = """g (float[n, 5] x) => (float[n, 3] y) { w = Mul(w1, mask) h = Gemm<transB=1>(x, w, b1) r = Relu(h)
        y = Gemm<transB=1>(r, w2) }"""
    model = build(text, arrays)
    result = shrunk(model)
    assert [node.op_type for node in result.graph] == ["Gemm", "Relu", "Gemm"]
    assert parameters(result) == 4 * 5 + 4 + 3 * 4
    assert 2 * parameters(result) < parameters(model)


def test_zeros_survive_symmetric_quantisation_and_go():
    """Zeros that are stored as the zero point are zeros: a quantised layer is cut like any other."""
    q = np.clip(np.rint(normal(6, 5, dead=(1, 4)) * 40), -127, 127).astype(np.int8)
    arrays = {"q": q, "s": np.full(6, 0.02, np.float32), "z": np.zeros(6, np.int8), "w2": normal(3, 6)}
    text = """g (float[n, 5] x) => (float[n, 3] y) { w = DequantizeLinear<axis=0>(q, s, z) h = Gemm<transB=1>(x, w)
        r = Relu(h) y = Gemm<transB=1>(r, w2) }"""
    found = arrays_of(shrunk(build(text, arrays)))
    assert found["q"].shape == (4, 5)
    assert found["q"].dtype == np.int8
    assert found["s"].shape == found["z"].shape == (4,)


def test_equality_is_judged_by_numbers_and_not_by_the_winning_class():
    """A removal that moves the logits but not the arg-max passes the usual check; ours compares the logits themselves."""
    w1, b1 = normal(6, 5, dead=(0,)), np.full(6, 3, np.float32)
    w2 = normal(3, 6)
    w2[:, 0] = 4  # the constant lifts all classes alike
    text = (
        "g (float[n, 5] x) => (float[n, 3] y) { h = Gemm<transB=1>(x, w1, b1) r = Relu(h) y = Gemm<transB=1>(r, w2) }"
    )
    model = build(text, {"w1": w1, "b1": b1, "w2": w2})
    careless = build(text, {"w1": w1[1:], "b1": b1[1:], "w2": w2[:, 1:]})
    feeds = random_feeds(model)
    reference, moved = run(model, feeds)[0], run(careless, feeds)[0]
    assert np.array_equal(reference.argmax(1), moved.argmax(1))
    assert np.abs(reference - moved).max() > 1
    shrunk(model)
