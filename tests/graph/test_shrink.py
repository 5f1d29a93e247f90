"""Removal on whole graphs: what is shared, constant, dead, foreign or huge, what is said, and what is refused."""

# ruff: noqa: E501 - small graphs stay on one line

from __future__ import annotations

import re
import subprocess
import sys
import tracemalloc

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from relief_export.errors import UnsupportedModelError
from relief_export.graph.cost import cost
from relief_export.graph.prepare import fold
from relief_export.graph.shrink import shrink
from tests.graph.helpers import arrays_of, assert_same, assert_sound, build, interface, parameters, random_feeds, run

RELATIVE = 1e-5  # of the output's scale
HALF = 5e-3  # the same in float16, whose step is 1e-3


def normal(*shape: int, dead: tuple[int, ...] = (), unread: tuple[int, ...] = ()) -> np.ndarray:
    weight = np.random.default_rng([len(shape), *shape]).normal(size=shape).astype(np.float32)
    weight[list(dead)] = 0
    if unread:
        weight[:, list(unread)] = 0
    return weight


def shapes(model: ir.Model) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays_of(model).items()}


def sound(model: ir.Model, **lengths: int) -> ir.Model:
    result = shrink(model, strict=True)
    assert_sound(model, result.model, random_feeds(model, **lengths), relative=RELATIVE)
    assert not shrink(result.model).modified
    before, after = cost(model), cost(result.model)
    assert after.macs.structural <= before.macs.structural
    return result.model


MLP = "g (float[n, 7] x) => (float[n, 3] y) { h = Gemm<transB=1>(x, w1, b1) r = Relu(h) y = Gemm<transB=1>(r, w2, b2) }"


def mlp(**changes: np.ndarray) -> ir.Model:
    arrays = {"w1": normal(6, 7, dead=(0, 3)), "b1": np.array([1, 1, 1, -1, 1, 1], np.float32)}
    return build(MLP, arrays | {"w2": normal(3, 6, unread=(5,)), "b2": normal(1, 3)[0]} | changes)


# What is shared --------------------------------------------------------------------------------------------------------


def test_weight_used_by_two_layers_is_cut_once_and_for_both():
    w = normal(6, 6, 1, 1, dead=(1, 2), unread=(1, 4))
    arrays = {"w0": normal(6, 3, 1, 1, dead=(1,)), "w": w, "w3": normal(2, 6, 1, 1, unread=(1,))}
    text = """g (float[n, 3, 4, 4] x) => (float[n, 2, 4, 4] y) { a = Conv(x, w0) b = Relu(a) c = Conv(b, w) d = Relu(c)
        e = Conv(d, w) f = Relu(e) y = Conv(f, w3) }"""
    model = build(text, arrays)
    found = shapes(sound(model))
    assert found["w"][0] < 6
    assert sum(len(shape) == 4 for shape in found.values()) == 3  # still one tensor for the two


def test_tied_embedding_keeps_its_table():
    table = normal(9, 4, unread=(2,))
    text = """g (int64[n, 5] i) => (float[n, 5, 9] y) { e = Gather(table, i) r = Relu(e) t = Transpose(table) y = MatMul(r, t) }"""
    model = build(text, {"table": table})
    feeds = {"i": np.random.default_rng(0).integers(0, 9, (2, 5))}
    result = shrink(model).model
    assert_same(model, result, feeds, relative=RELATIVE)
    assert parameters(result) <= parameters(model)


def test_bias_shared_by_two_layers_stays_right():
    text = """g (float[n, 7] x) => (float[n, 3] y) { h = Gemm<transB=1>(x, w1, b) k = Gemm<transB=1>(x, w3, b) r = Relu(h)
        s = Relu(k) t = Gemm<transB=1>(r, w2) u = Gemm<transB=1>(s, w4) y = Add(t, u) }"""
    arrays = {"w1": normal(6, 7, dead=(0,)), "w3": normal(6, 7, dead=(0, 1)), "b": normal(1, 6)[0]}
    sound(build(text, arrays | {"w2": normal(3, 6, unread=(4,)), "w4": normal(3, 6, unread=(5,))}))


def test_several_outputs_and_consumers_keep_what_any_of_them_reads():
    text = """g (float[n, 7] x) => (float[n, 3] y, float[n, 2] z, float[n, 6] r) { h = Gemm<transB=1>(x, w1, b1) r = Relu(h)
        k = Tanh(h) y = Gemm<transB=1>(k, w2) z = Gemm<transB=1>(k, w3) }"""
    arrays = {
        "w1": normal(6, 7),
        "b1": normal(1, 6)[0],
        "w2": normal(3, 6, unread=(0, 1)),
        "w3": normal(2, 6, unread=(0, 2)),
    }
    assert shapes(sound(build(text, arrays)))["w1"] == (6, 7)  # r is an output
    hidden = text.replace(", float[n, 6] r", "")
    assert shapes(sound(build(hidden, arrays)))["w1"] == (5, 7)  # only 0 is read by nobody


@pytest.mark.parametrize(
    ("call", "second"),
    [
        ("MaxPool<kernel_shape=[2, 2]>(a)", "int64[n, 6, 3, 3] s"),
        ("LayerNormalization(a, g)", "float[n, 6, 4, 1] s"),
        ("Dropout(a)", "bool[n, 6, 4, 4] s"),
        ("BatchNormalization<training_mode=1>(a, one, one, one, one)", "float[6] s, float[6] t"),
    ],
)
def test_second_output_of_a_node_keeps_its_shape(call, second):
    names = ", ".join(word for word in second.replace(",", "").split() if word in "st")
    text = f"g (float[n, 3, 4, 4] x) => (float[n, 2, h, w] y, {second}) {{ a = Conv(x, w1) d, {names} = {call} y = Conv(d, w2) }}"
    arrays = {"w1": normal(6, 3, 1, 1, dead=(0, 1)), "w2": normal(2, 6, 1, 1, unread=(5,))}
    model = build(text, arrays | {"one": np.ones(6, np.float32), "g": np.ones(4, np.float32)})
    assert_sound(model, shrink(fold(model)).model, random_feeds(model), relative=RELATIVE)


# Where constants come from ---------------------------------------------------------------------------------------------


def test_initializer_that_is_an_input_is_kept():
    arrays = {"w1": normal(6, 7, dead=(0,)), "b1": normal(1, 6)[0], "w2": normal(3, 6), "b2": normal(1, 3)[0]}
    text = MLP.replace("(float[n, 7] x)", "(float[n, 7] x, float[6, 7] w1)")
    model = build(text, arrays)
    result = shrink(model)
    assert arrays_of(result.model)["w1"].shape == (6, 7)
    feeds = random_feeds(model) | {"w1": normal(7, 6).T.copy()}
    assert_same(model, result.model, feeds, relative=RELATIVE)


def test_new_bias_is_not_joined_with_one_that_is_an_input():
    text = """g (float[n, 70] x, float[2] c) => (float[n, 2] y) { h = Gemm<transB=1>(x, w1, b1) r = Relu(h) m = MatMul(r, w2)
        y = Add(m, c) }"""
    # Wide enough that a row is more bytes than the node and the bias that its constant needs.
    arrays = {"w1": normal(6, 70, dead=(1,)), "b1": np.ones(6, np.float32), "w2": normal(6, 2), "c": normal(1, 2)[0]}
    model = build(text, arrays)
    result = shrink(model).model
    assert shapes(result)["w1"] == (5, 70)
    assert_same(model, result, random_feeds(model) | {"c": np.ones(2, np.float32)}, relative=RELATIVE)


def test_weights_behind_constant_nodes_and_chains_are_weights():
    w = np.ascontiguousarray(normal(6, 7, dead=(0, 3)).T.reshape(7, 3, 2))
    text = """g (float[n, 7] x) => (float[n, 3] y) { flat = Constant<value_ints=[7, 6]>() i = Identity(w) m = Reshape(i, flat)
        t = Transpose(m) h = Gemm<transB=1>(x, t) r = Relu(h)
        c = Constant<value = float[3, 6] {1, 2, 3, 4, 5, 0, 1, 0, 1, 0, 1, 0, 2, 2, 2, 2, 2, 0}>() y = Gemm<transB=1>(r, c) }"""
    result = sound(build(text, {"w": w}))
    assert sorted(shape for shape in shapes(result).values()) == [(3, 3), (3, 7)]


def test_float16_and_double():
    for dtype, relative in ((np.float16, HALF), (np.float64, RELATIVE)):
        kind = {np.float16: "float16", np.float64: "double"}[dtype]
        arrays = {k: v.astype(dtype) for k, v in arrays_of(mlp()).items()}
        model = build(MLP.replace("float[", f"{kind}["), arrays)
        result = shrink(model).model
        assert_sound(model, result, random_feeds(model), relative=relative)
        assert shapes(result)["w1"] == (3, 7)
        assert {a.dtype for a in arrays_of(result).values()} == {np.dtype(dtype)}


def test_constant_that_overflows_its_type_is_not_known():
    """1e20 squared is infinite in float32, so channel 0 adds 0 to the output, where float64 would add 1."""
    text = (
        "g (float[n, 7] x) => (float[n, 3] y) { h = Gemm<transB=1>(x, w1, b1) t = Mul(h, large) "
        "r = Reciprocal(t) s = Mul(r, huge) y = Gemm<transB=1>(s, w2, b2) }"
    )
    arrays = {
        "w1": 0.1 * normal(6, 7, dead=(0,)),
        "b1": np.array([1e20, 9, 9, 9, 9, 9], np.float32),
        "large": np.array([1e20, 1, 1, 1, 1, 1], np.float32),
        "huge": np.array([1e38, 1, 1, 1, 1, 1], np.float32),
        "w2": np.array([[100, 1, 1, 1, 1, 1]] * 3, np.float32),
        "b2": np.zeros(3, np.float32),
    }
    model = build(text, arrays)
    assert_same(model, shrink(model).model, random_feeds(model), relative=RELATIVE)


def test_bfloat16_constants_are_numbers():
    text = """g (bfloat16[n, 7] x) => (bfloat16[n, 3] y) { h = Gemm<transB=1>(x, w1, b1) g = Greater(h, t) c = Cast<to=16>(g)
        y = Gemm<transB=1>(c, w2) }"""
    arrays = {
        "w1": normal(6, 7, dead=(0, 1)),
        "b1": np.ones(6, np.float32),
        "w2": normal(3, 6),
        "t": np.array([0.5], np.float32),
    }
    kind = ir.DataType.BFLOAT16.numpy()
    model = build(text, {k: v.astype(kind) for k, v in arrays.items()})
    result = shrink(model).model
    x = {"x": normal(4, 7).astype(kind)}  # ONNX Runtime has no such Gemm
    before, after = (ReferenceEvaluator(ir.to_proto(m)).run(None, x)[0].astype(np.float32) for m in (model, result))
    assert shapes(result)["w1"] == (4, 7)
    assert np.abs(before - after).max() <= 2e-2 * np.abs(before).max()


def test_constants_of_very_different_size_merge_in_float16():
    """One carries the other: were the small one chosen, its weights would overflow."""
    arrays = {
        "w1": normal(4, 3, 1, 1, dead=(0, 1)),
        "b1": np.array([1e-4, 50, 0, 0], np.float32),
        "w2": normal(2, 4, 3, 3),
    }
    text = "g (float16[n, 3, 5, 5] x) => (float16[n, 2, 5, 5] y) { a = Conv(x, w1, b1) r = Relu(a) y = Conv<pads=[1, 1, 1, 1]>(r, w2) }"
    model = build(text, {k: v.astype(np.float16) for k, v in arrays.items()})
    result = shrink(model).model
    assert shapes(result)["w1"][0] == 3
    assert_same(model, result, random_feeds(model), relative=HALF)


@pytest.mark.parametrize("axis", [1, -1])
def test_weight_quantised_by_channel_is_cut_with_its_scales(axis):
    w = (40 * normal(6, 7, dead=(1, 2)).T).astype(np.int8)
    text = f"""g (float[n, 7] x) => (float[n, 2] y) {{ d = DequantizeLinear<axis={axis}>(w, scale, zero) h = MatMul(x, d) r = Relu(h)
        y = MatMul(r, v) }}"""
    arrays = {"w": w, "scale": np.arange(1, 7, dtype=np.float32) / 100, "zero": np.zeros(6, np.int8), "v": normal(6, 2)}
    found = shapes(sound(build(text, arrays)))
    assert (found["w"], found["scale"], found["zero"]) == ((7, 4), (4,), (4,))


# What vanishes ---------------------------------------------------------------------------------------------------------


def test_dead_residual_branch_vanishes():
    text = """g (float[n, 3, 4, 4] x) => (float[n, 2, 4, 4] y) { a = Conv(x, w1) r = Relu(a) b = Conv<pads=[1, 1, 1, 1]>(r, w2, b2)
        c = Relu(b) d = Conv<pads=[1, 1, 1, 1]>(c, w3) s = Add(r, d) y = Conv(s, w4) }"""
    arrays = {"w1": normal(4, 3, 1, 1), "w2": normal(4, 4, 3, 3), "b2": normal(1, 4)[0], "w4": normal(2, 4, 1, 1)}
    result = sound(build(text, arrays | {"w3": np.zeros((4, 4, 3, 3), np.float32)}))
    assert [node.op_type for node in result.graph] == ["Conv", "Relu", "Conv"]
    assert set(arrays_of(result)) == {"w1", "w4"}


def test_narrower_branch_between_wide_additions():
    """The shared tensor stays wide; the convolution in the branch computes only the rows that are not zero."""
    text = """g (float[n, 3, 4, 4] x) => (float[n, 2, 4, 4] y) { a = Conv(x, w1) r = Relu(a) b = Conv<pads=[1, 1, 1, 1]>(r, w2)
        s = Add(r, b) t = Relu(s) y = Conv(t, w4) }"""
    w2 = normal(32, 32, 3, 3, dead=tuple(range(0, 32, 2)), unread=tuple(range(16)))
    model = build(text, {"w1": normal(32, 3, 1, 1), "w2": w2, "w4": normal(2, 32, 1, 1)})
    result = sound(model)
    assert shapes(result)["w2"] == (16, 16, 3, 3)
    assert shapes(result)["w1"] == (32, 3, 1, 1)


def test_constant_output_is_computed_from_the_batch_alone():
    model = mlp(w2=np.zeros((3, 6), np.float32))
    result = sound(model)
    assert parameters(result) == 3
    assert run(result, {"x": np.zeros((5, 7), np.float32)})[0].shape == (5, 3)


@pytest.mark.parametrize("values", [(2, 2, 2), (1, 2, 3)])
def test_constant_output_of_a_fixed_batch_is_not_stored_for_each_sample(values):
    text = MLP.replace("[n,", "[4,")
    model = build(text, arrays_of(mlp(w2=np.zeros((3, 6), np.float32), b2=np.array(values, np.float32))))
    result = sound(model)
    assert parameters(result) == len(set(values))
    again = shrink(fold(result))
    assert not again.modified
    assert parameters(again.model) == len(set(values))


def test_dead_border_pixels_of_a_picture_are_gathered_away():
    w1 = normal(30, 784)
    inside = np.zeros((28, 28), bool)
    inside[6:22, 6:22] = True
    w1[:, ~inside.reshape(-1)] = 0
    text = """g (float[n, 1, 28, 28] x) => (float[n, 10] y) { f = Flatten(x) h = Gemm<transB=1>(f, w1, b1) r = Relu(h)
        y = Gemm<transB=1>(r, w2) }"""
    model = build(text, {"w1": w1, "b1": normal(1, 30)[0], "w2": normal(10, 30)})
    result = sound(model)
    assert shapes(result)["w1"] == (30, 256)
    assert interface(result) == interface(model)


def test_new_values_take_no_name_that_is_taken():
    text = """g (float[n, 7] x) => (float[n, 3] y, float[n, 7] z) { y_shape = Relu(x) y_batch = Tanh(y_shape) y_from = Neg(y_batch)
        y_value = Tanh(y_from) z = Neg(y_value) h = Gemm<transB=1>(x, w1, b1) y = Gemm<transB=1>(h, w2, b2) }"""
    arrays = {"w1": normal(6, 7), "b1": normal(1, 6)[0], "w2": np.zeros((3, 6), np.float32), "b2": normal(1, 3)[0]}
    assert parameters(sound(build(text, arrays))) == 3


def test_two_nodes_without_a_name_get_biases():
    text = """g (float[n, 70] x) => (float[n, 2] y, float[n, 3] z) { h = Gemm<transB=1>(x, w1, b1) r = Relu(h) y = MatMul(r, w2)
        z = MatMul(r, w3) }"""
    # Wide enough that two rows are more bytes than the nodes and the biases that their constants need.
    arrays = {"w1": normal(6, 70, dead=(0, 1)), "b1": np.arange(6, dtype=np.float32)}
    arrays |= {"w2": normal(6, 2), "w3": normal(6, 3)}
    assert shapes(sound(build(text, arrays)))["w1"] == (4, 70)


# Shapes ----------------------------------------------------------------------------------------------------------------


def test_bias_by_sample_is_none_by_channel():
    text = "g (float[3, 7] x) => (float[3, 2] y) { h = Gemm(x, w1, b1) s = Sigmoid(h) y = MatMul(s, w2) }"
    w1 = np.ascontiguousarray(normal(3, 7, dead=(0, 1)).T)
    sound(build(text, {"w1": w1, "b1": np.array([[1], [2], [3]], np.float32), "w2": normal(3, 2)}))


def test_layers_without_inputs_or_outputs_are_left_alone():
    text = "g (float[n, K] x) => (float[n, 2] y) { h = Gemm(x, w1, b1) s = Sigmoid(h) y = Gemm(s, w2, b2) }"
    for inputs, hidden in ((0, 3), (7, 0)):
        arrays = {"w1": normal(inputs, hidden), "b1": normal(hidden), "w2": normal(hidden, 2), "b2": normal(2)}
        sound(build(text.replace("K", str(inputs)), arrays))


def test_without_a_batch_axis():
    text = "g (float[7] x) => (float[3] y) { h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2) }"
    sound(build(text, {"w1": normal(7, 6), "w2": normal(6, 3)}))
    fixed = "g (float[1, 7] x) => (float[1, 3] y) { h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2) }"
    w1 = np.ascontiguousarray(normal(6, 7, dead=(2,)).T)
    assert shapes(sound(build(fixed, {"w1": w1, "w2": normal(6, 3)})))["w1"] == (7, 5)


def test_reshape_that_copies_the_length_of_a_cut_axis_to_another():
    text = """g (float[1, 3, 6] x) => (float[2, 6, 1] y) { t = Transpose<perm=[0, 2, 1]>(x) a = MatMul(t, w1)
        b = Transpose<perm=[0, 2, 1]>(a) r = Relu(b) d = Reshape(r, s) e = Transpose<perm=[1, 2, 0]>(d) f = MatMul(e, w2)
        y = Transpose<perm=[2, 0, 1]>(f) }"""
    w1 = np.ascontiguousarray(normal(6, 3, dead=(0, 1)).T)
    model = build(text, {"w1": w1, "s": np.array([6, 0, -1]), "w2": normal(6, 2)})
    assert shapes(sound(model))["w1"] == (3, 4)


def test_dynamic_height_and_width():
    text = """g (float[n, 3, h, w] x) => (float[n, 2, a, b] y) { c = Conv(x, w1, b1) r = Relu(c) p = GlobalAveragePool(r)
        s = Sigmoid(p) m = Mul(r, s) y = Conv<pads=[1, 1, 1, 1], strides=[2, 2]>(m, w2) }"""
    arrays = {"w1": normal(6, 3, 1, 1, dead=(0, 1)), "b1": np.array([-1, 0, 0, 1, 1, 1], np.float32)}
    model = build(text, arrays | {"w2": normal(2, 6, 3, 3, unread=(5,))})
    assert shapes(sound(model, h=5, w=8))["w1"] == (3, 3, 1, 1)


def test_fixed_batch_of_an_output_is_not_taken_for_the_inputs():
    text = "g (float[4, 3] x) => (float[1, 2] y) { a = ReduceMean(x, e) y = Gemm<transB=1>(a, w, b) }"
    arrays = {"w": np.zeros((2, 3), np.float32), "b": normal(1, 2)[0], "e": np.array([0])}
    sound(build(text, arrays))


def test_constant_branch_that_gives_another_one_its_batch():
    text = """g (float[n, 7] x, float[m, 7] z) => (float[k, 2] y) { a = Gemm<transB=1>(x, w1, b1) c = Gemm<transB=1>(z, w2)
        s = Add(a, c) r = Relu(s) y = MatMul(r, w3) }"""
    arrays = {"w1": np.zeros((6, 7), np.float32), "b1": normal(1, 6)[0], "w2": normal(6, 7), "w3": normal(6, 2)}
    sound(build(text, arrays), n=3, m=1)


def test_lengths_without_a_name_are_not_taken_for_the_same():
    text = """g (float[?, 7] x, float[?, 7] z) => (float[k, 2] y) { a = Gemm<transB=1>(x, w1, b1) c = Gemm<transB=1>(z, w2)
        s = Add(a, c) r = Relu(s) y = MatMul(r, w3) }"""
    arrays = {"w1": np.zeros((6, 7), np.float32), "b1": normal(1, 6)[0], "w2": normal(6, 7), "w3": normal(6, 2)}
    model = build(text, arrays)
    feeds = {name: normal(size, 7) for name, size in (("x", 3), ("z", 1))}
    assert_same(model, shrink(model).model, feeds, relative=RELATIVE)


@pytest.mark.parametrize("call", ["Slice(a, from, to, axis)", "Pad(a, amounts, , axis)"])
def test_axes_that_are_given_at_run_time(call):
    text = f"g (float[n, 3, 4, 4] x, int64[1] axis) => (float[n, 2, h, w] y) {{ a = Conv(x, w1) d = {call} y = Conv(d, w2) }}"
    arrays = {"w1": normal(6, 3, 1, 1, dead=(0, 1)), "w2": normal(2, 6, 1, 1)}
    arrays |= {"from": np.array([0]), "to": np.array([2]), "amounts": np.array([1, 1])}
    model = build(text, arrays)
    result = shrink(model).model
    assert_same(model, result, {"x": normal(2, 3, 4, 4), "axis": np.array([2])}, relative=RELATIVE)


def test_operand_of_unknown_rank():
    text = """g (float[n, 7] x) => (float[a, b, c] y) { a = MatMul(x, w1) u = acme.Warp(a) r = Add(a, u)
        t = Transpose<perm=[0, 2, 1]>(r) y = MatMul(t, w2) }"""
    model = build(text, {"w1": normal(7, 6), "w2": normal(6, 2)}, domain="acme")
    result = shrink(model)
    assert not result.modified
    assert result.unknown == {"acme.Warp": 1}


def test_very_deep_network():
    depth = 1200
    chain = " ".join(f"r{k + 1} = Tanh(r{k})" for k in range(depth))
    text = f"""g (float[n, 7] x) => (float[n, m] y) {{ r0 = Gemm<transB=1>(x, w1) {chain} t = Transpose(x)
        u = MatMul(r{depth}, w2) y = MatMul(u, t) }}"""
    sound(build(text, {"w1": normal(6, 7, dead=(0, 3)), "w2": normal(6, 7)}))


# What is refused or left alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weight_that_is_not_finite_is_refused_by_name(value):
    w1 = normal(6, 7)
    w1[3, 2] = value
    with pytest.raises(UnsupportedModelError, match=r"tensor w1 of Gemm .* holds NaN or Inf"):
        shrink(mlp(w1=w1))


def test_zero_times_infinity_stays_what_it_is():
    text = """g (float[n, 7] x) => (float[n, 3] y) { h = Gemm<transB=1>(x, w1) m = Mul(h, big) y = Gemm<transB=1>(m, w2) }"""
    arrays = {"w1": normal(6, 7, dead=(0, 1)), "big": np.array([np.inf, 1, 1, 1, 1, 1], np.float32), "w2": normal(3, 6)}
    model = build(text, arrays)
    assert_same(model, shrink(model).model, random_feeds(model), relative=RELATIVE)


def test_subgraph_that_reads_an_outer_value_and_an_outer_weight():
    text = """g (float[n, 7] x, bool c) => (float[n, 3] y) { h = Gemm<transB=1>(x, w1, b1) r = Relu(h)
        d = If(c) <then_branch = t () => (float[n, 6] u) { u = Neg(r) }, else_branch = e () => (float[n, 6] v) { v = Add(r, b1) }>
        s = Mul(d, d) k = Gemm<transB=1>(s, w2) l = Relu(k) y = Gemm<transB=1>(l, w3) }"""
    arrays = {"w1": normal(6, 7, dead=(0,)), "b1": normal(1, 6)[0], "w2": normal(5, 6, dead=(1,)), "w3": normal(3, 5)}
    model = build(text, arrays)
    result = shrink(model)
    assert shapes(result.model)["w1"] == (6, 7)
    assert shapes(result.model)["w2"] == (4, 6)
    for condition in (True, False):
        feeds = {"x": normal(2, 7), "c": np.array(condition)}
        assert_same(model, result.model, feeds, relative=RELATIVE)


def test_what_a_subgraph_reads_keeps_all_that_it_is_computed_from():
    text = """g (float[n, 7] x, bool c) => (float[n, 3] y) { k = Gemm<transB=1>(x, w0) s = Relu(k) h = Gemm<transB=1>(s, w1) r = Relu(h)
        d = If(c) <then_branch = t () => (float[n, 6] u) { u = Neg(r) }, else_branch = e () => (float[n, 6] v) { v = Add(r, r) }>
        y = Gemm<transB=1>(d, w2) }"""
    model = build(text, {"w0": normal(8, 7, dead=(2,)), "w1": normal(6, 8), "w2": normal(3, 6)})
    result = shrink(model).model
    assert shapes(result)["w0"] == (7, 7)
    for condition in (True, False):
        assert_same(model, result, {"x": normal(2, 7), "c": np.array(condition)}, relative=RELATIVE)


def test_functions_of_the_model_are_seen_through():
    text = """g (float[n, 7] x) => (float[n, 3] y) { h = Gemm<transB=1>(x, w1) r = local.act(h) y = local.last(r, w2) }
        <domain: "local", opset_import: ["" : 20]> act (x) => (y) { t = Relu(x) y = Tanh(t) }
        <domain: "local", opset_import: ["" : 20]> last (x, w) => (y) { t = Transpose(w) y = MatMul(x, t) }"""
    model = build(text, {"w1": normal(6, 7, dead=(0, 1)), "w2": normal(3, 6)}, domain="local")
    assert shapes(sound(model))["w1"] == (4, 7)


def test_nothing_to_remove_leaves_the_model_as_it_is():
    model = mlp(w1=normal(6, 7), w2=normal(3, 6))
    result = shrink(model)
    assert not result.modified
    assert ir.to_proto(result.model).SerializeToString() == ir.to_proto(model).SerializeToString()


def test_the_given_model_is_not_changed():
    model = mlp()
    before = ir.to_proto(model).SerializeToString()
    assert shrink(model).modified
    assert ir.to_proto(model).SerializeToString() == before


# What is said ------------------------------------------------------------------------------------------------------------


def test_rows_say_what_was_removed_and_to_dict_is_plain():
    result = shrink(mlp())
    row = next(r for r in result.removed if r.layer == "w1")
    assert (row.op, row.outputs_before, row.outputs_after, row.inputs_before, row.inputs_after) == ("Gemm", 6, 3, 7, 7)
    assert (row.weights_before, row.weights_after) == (42, 21)
    assert re.search(r"^w1 +6 -> 3 +7 -> 7 +42 -> 21$", str(result), re.MULTILINE)
    assert f"{sum(row.count for row in result.stayed)} dead inputs and outputs stay" in str(result)
    plain = result.to_dict()
    assert plain["removed"][0]["layer"] == "w1"
    assert set(plain) == {"modified", "removed", "stayed", "unknown", "opaque"}


def test_reason_names_the_operator_that_pins():
    text = "g (float[n, 7] x) => (float[n, 3] y) { h = Gemm<transB=1>(x, w1) [norm] m = LayerNormalization(h, g) y = Gemm<transB=1>(m, w2) }"
    model = build(text, {"w1": normal(6, 7, dead=(1, 2)), "g": np.ones(6, np.float32), "w2": normal(3, 6, unread=(4,))})
    kept = {(row.layer, row.side): (row.count, row.reason) for row in shrink(model).stayed}
    assert kept["w1", "output"] == (2, "pinned by LayerNormalization norm")
    assert kept["w2", "input"][0] == 1
    assert shrink(model).opaque == {}


# Bytes and size ----------------------------------------------------------------------------------------------------------


def test_external_data(tmp_path):
    model = mlp()
    ir.save(model, tmp_path / "in.onnx", external_data="in.data", size_threshold_bytes=0)
    loaded = ir.load(tmp_path / "in.onnx")
    result = shrink(loaded)
    ir.save(result.model, tmp_path / "out.onnx", external_data="out.data", size_threshold_bytes=0)
    again = ir.external_data.load_to_model(ir.load(tmp_path / "out.onnx"))
    assert_same(model, again, random_feeds(model), relative=RELATIVE)
    assert (tmp_path / "out.data").stat().st_size < (tmp_path / "in.data").stat().st_size


TWICE = """
import sys, onnx_ir as ir
from relief_export.graph.shrink import shrink
sys.stdout.buffer.write(ir.to_proto(shrink(ir.load(sys.argv[1])).model).SerializeToString(deterministic=True))
"""


def test_two_processes_write_the_same_bytes(tmp_path):
    text = """g (float[n, 3, 4, 4] x) => (float[n, 2, 4, 4] y) { a = Conv(x, w1, b1) r = Relu(a) l, q = Split<axis=1, num_outputs=2>(r)
        c = Concat<axis=1>(q, l) b = Conv<pads=[1, 1, 1, 1]>(c, w2, b2) s = Add(r, b) y = Conv(s, w4) }"""
    arrays = {"w1": normal(8, 3, 1, 1, dead=(0, 1, 2)), "b1": normal(1, 8)[0], "w2": normal(8, 8, 3, 3, dead=(0, 4, 5))}
    arrays |= {"b2": np.zeros(8, np.float32), "w4": normal(2, 8, 1, 1, unread=(0, 7))}
    ir.save(build(text, arrays), tmp_path / "in.onnx")
    found = [
        subprocess.run([sys.executable, "-c", TWICE, str(tmp_path / "in.onnx")], capture_output=True, check=True).stdout
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert len(found[0]) > 0


LARGE = """
import resource, time
import numpy as np, onnx, onnx_ir as ir
from tests.graph.helpers import build
from relief_export.graph.shrink import shrink
rng = np.random.default_rng(0)
w = [rng.random((7000, 7000), dtype=np.float32) for _ in range(2)]
w[0][::3] = 0
w[1][:, 1::3] = 0
text = "g (float[n, 7000] x) => (float[n, 7000] y) { h = Gemm<transB=1>(x, w1) r = Relu(h) y = Gemm<transB=1>(r, w2) }"
model = build(text, domain="unchecked")  # its weights come below
for name, array in zip(("w1", "w2"), w):
    value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
    value.const_value = ir.tensor(array, name=name)
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
    model.graph.register_initializer(value)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
result = shrink(model)
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sizes = [v.const_value.shape[0] for v in result.model.graph.initializers.values()]
print((peak - before) * 1024 / sum(a.nbytes for a in w), seconds, *sizes)
"""


def test_a_hundred_million_parameters_in_seconds_and_bounded_memory():
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, check=True, text=True, cwd=".")
    memory, seconds, *rows = (float(word) for word in done.stdout.split())
    assert memory <= 2  # times the model, beside the model
    assert seconds <= 30  # on a busy machine
    assert sorted(rows) == [2333, 7000]


def test_a_weight_that_many_nodes_share_is_analysed_once():
    """As of a recurrent layer that was unrolled: forty analyses of it at once would be many times the model."""
    uses, size = 40, 1536
    text = " ".join(f"a{k} = MatMul(h{k}, w) h{k + 1} = Tanh(a{k})" for k in range(uses))
    weight = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    weight[:, ::3] = 0
    weight[::3] = 0
    text = f"g (float[n, 8] x) => (float[n, 2] y) {{ h0 = MatMul(x, first) {text} y = MatMul(h{uses}, last) }}"
    arrays = {"w": weight, "first": np.ones((8, size), np.float32), "last": np.ones((size, 2), np.float32)}
    model = build(text, arrays)
    tracemalloc.start()
    try:
        result = shrink(model)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert arrays_of(result.model)["w"].shape == (1024, 1024)
    assert peak <= 4 * weight.nbytes


def test_external_data_outside_the_folder_is_refused(tmp_path):
    (tmp_path / "secret.bin").write_bytes(b"\0" * 168)
    folder = tmp_path / "model"
    folder.mkdir()
    proto = ir.to_proto(mlp())
    tensor = next(t for t in proto.graph.initializer if t.name == "w1")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret.bin")
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match=r"outside|secret"):
        shrink(ir.load(folder / "m.onnx"))
