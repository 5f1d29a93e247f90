"""Channels behind operators that move, join or mix axes other than the channels' own: they go, and nothing else does."""

# ruff: noqa: E501 - small graphs stay on one line

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from relief_export.graph.analysis import parameter_use
from relief_export.graph.cost import cost
from relief_export.graph.prepare import simplify
from relief_export.graph.shrink import shrink
from tests.graph.helpers import LEVELS, arrays_of, assert_same, assert_sound, build, parameters, random_feeds, run

if TYPE_CHECKING:
    import onnx_ir as ir

RELATIVE = 1e-5  # of the output's scale
LAST = 2**62  # as exporters write "to the end"


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng([len(shape), *shape]).normal(size=shape).astype(np.float32)


def dead(array: np.ndarray, *places: int, axis: int = 0, value: float = 0) -> np.ndarray:
    """Return a copy whose entries at ``places`` along ``axis`` are ``value``."""
    array = array.copy()
    np.moveaxis(array, axis, 0)[list(places)] = value
    return array


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def sound(model: ir.Model, **lengths: int) -> ir.Model:
    """Shrink, and require an equal, smaller or unchanged model from which nothing more can go."""
    result = shrink(model, strict=True)
    assert_sound(model, result.model, random_feeds(model, **lengths), relative=RELATIVE)
    assert not shrink(result.model).modified
    assert cost(result.model).macs.structural <= cost(model).macs.structural
    return result.model


# Padding and joining along other axes ----------------------------------------------------------------------------------


def test_pad_amounts_as_torchscript_computes_them():
    text = """g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) { a = Conv(x, w, b) r = Relu(a) zeros = ConstantOfShape<value = int64[1] {0}>(two)
        p = Concat<axis=0>(amounts, zeros) q = Reshape(p, pairs) s = Slice(q, last, first, axis, back) t = Transpose<perm=[1, 0]>(s)
        u = Reshape(t, flat) v = Cast<to=7>(u) d = Pad(r, v) y = Conv(d, k) }"""
    arrays = {
        "two": i64(2),
        "amounts": i64(0, 0, 0, 0, 4, 4),
        "pairs": i64(-1, 2),
        "last": i64(-1),
        "first": i64(1 - LAST),
        "axis": i64(0),
        "back": i64(-1),
        "flat": i64(-1),
    }
    weights = {
        "w": dead(normal(8, 3, 1, 1), 0, 2, 4, 6),
        "b": dead(normal(1, 8)[0], 0, 2, 4, 6),
        "k": normal(4, 16, 1, 1),
    }
    found = arrays_of(sound(build(text, arrays | weights)))
    assert found["w"].shape == (4, 3, 1, 1)
    assert found["k"].shape == (4, 4, 1, 1)  # the padding is always zero, too


@pytest.mark.parametrize("batch", ["1", "n"])
@pytest.mark.parametrize(("bias", "left"), [(0.0, 88), (0.5, 92)])
@pytest.mark.parametrize("parts", ["l, r", "l, r, t"])
def test_circular_padding(batch, bias, left, parts):
    text = f"""g (float[{batch}, 3, 20] x) => (float[{batch}, 4, m] y) {{ c = Conv<pads=[1, 1]>(x, w, b) r = Relu(c) l = Slice(r, last, end, two)
        t = Slice(r, zero, two, two) p = Concat<axis=2>({parts}) y = Conv(p, v) }}"""
    arrays = {"last": i64(-2), "end": i64(LAST), "two": i64(2), "zero": i64(0), "v": normal(4, 8, 3)}
    weights = {"w": dead(normal(8, 3, 3), 0, 1, 2, 3), "b": dead(normal(1, 8)[0], 0, 1, 2, 3, value=bias)}
    assert parameters(sound(build(text, arrays | weights))) == left


def test_class_token_loses_the_channels_that_the_patches_lose():
    text = """g (float[1, 3, 4, 4] x) => (float[1, 17, 5] y) { c = Conv(x, w, b) f = Reshape(c, flat) t = Transpose<perm=[0, 2, 1]>(f)
        p = Concat<axis=1>(token, t) z = Add(p, place) r = Relu(z) y = MatMul(r, v) }"""
    arrays = {
        "flat": i64(1, 8, 16),
        "token": dead(normal(1, 1, 8), 0, 1, axis=2),
        "place": dead(normal(1, 17, 8), 0, 1, 2, axis=2),
        "v": dead(normal(8, 5), 7),
    }
    weights = {"w": dead(normal(8, 3, 1, 1), 0, 1, 2), "b": dead(normal(1, 8)[0], 0, 1, 2)}
    found = arrays_of(sound(build(text, arrays | weights)))
    assert found["w"].shape[0] == 5  # 0 and 1 are zero in both, 2 only in the patches, 7 is not read
    assert found["token"].shape == (1, 1, 5)
    assert found["place"].shape == (1, 17, 5)


def test_frames_joined_along_time():
    text = """g (float[n, 3, 1, 6] x, float[n, 3, 1, 6] z) => (float[n, 2, 4] y) { a = Conv(x, w, b) c = Conv(z, w, b) e = Conv(z, u, b)
        j = Concat<axis=2>(a, c, e) r = Relu(j) k = Conv(r, v) y = Squeeze(k, two) }"""
    weights = {
        "w": dead(normal(6, 3, 1, 3), 0, 1),
        "u": dead(normal(6, 3, 1, 3), 1, 2),
        "b": normal(1, 6)[0],
        "v": dead(normal(2, 6, 3, 1), 5, axis=1),
    }
    found = arrays_of(sound(build(text, weights | {"two": i64(2)})))
    assert found["w"].shape == found["u"].shape == (4, 3, 1, 3)  # 1 is the same constant in all three, 5 is not read


def test_copied_length_of_a_cut_axis():
    text = """g (float[n, 3, 4, 4] x) => (float[n, 2, 8, 8] y) { a = Conv(x, w) r = Relu(a) s = Shape(r) t = Slice(s, zero, two) u = Concat<axis=0>(t, sizes)
        d = Resize(r, , , u) y = Conv(d, v) }"""
    arrays = {
        "zero": i64(0),
        "two": i64(2),
        "sizes": i64(8, 8),
        "w": dead(normal(6, 3, 1, 1), 0, 1),
        "v": normal(2, 6, 1, 1),
    }
    model = build(text, arrays)
    result = shrink(model, strict=True)
    assert_sound(model, result.model, random_feeds(model), relative=RELATIVE)
    assert {row.reason for row in result.stayed} <= {"its length is read by Shape s"}


# Weights of other forms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [0.0, 0.7])
@pytest.mark.parametrize("act", ["Relu", "Erf"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("second", ["w1", "i"])
def test_block_applied_twice_with_the_same_weights(bias, act, residual, second):
    joins = ("p = Add(o, x)", "y = Add(q, p)") if residual else ("p = Identity(o)", "y = Identity(q)")
    text = f"""g (float[1, 5, 8] x) => (float[1, 5, 8] y) {{ i = Identity(w1) a = MatMul(x, w1) s = Add(a, b1) r = {act}(s) o = MatMul(r, w2) {joins[0]}
        c = MatMul(p, {second}) t = Add(c, b1) u = {act}(t) q = MatMul(u, w2) {joins[1]} }}"""
    odd = range(0, 16, 2)
    arrays = {
        "w1": dead(normal(8, 16), *odd, axis=1),
        "b1": dead(normal(1, 16)[0], *odd, value=bias),
        "w2": normal(16, 8),
    }
    found = sound(build(text, arrays))
    assert parameters(found) == (136 if bias == 0 else 144)  # a new bias, one for both: the constants are the same
    assert [a.shape for a in arrays_of(found).values()].count((8, 8)) == 2


def test_shared_weight_that_absorbs_for_one_use_and_not_for_the_other():
    """Column 0 is 0.7 in the first use and data in the second: it stays, and is not zeroed in a copy."""
    text = """g (float[n, 5] x) => (float[n, 3] y) { a = Gemm<transB=1>(x, w, b) r = Relu(a) c = Gemm<transB=1>(x, v, b) s = Tanh(c)
        p = Gemm<transB=1>(r, k, e) q = Gemm<transB=1>(s, k, e) y = Sub(p, q) }"""
    arrays = {
        "w": dead(normal(6, 5), 0, 1),
        "v": dead(normal(6, 5), 1),
        "b": dead(normal(1, 6)[0], 0, 1, value=0.7),
        "k": normal(3, 6),
        "e": normal(1, 3)[0],
    }
    found = arrays_of(sound(build(text, arrays)))
    assert found["k"].shape == (3, 5)  # 1 is constant in both uses


def test_initializers_listed_as_inputs_are_constants_before_version_4():
    text = "g (float[1, 16] x, float[16, 8] w, float[8, 3] v) => (float[1, 3] y) { z = MatMul(x, w) q = Relu(z) y = MatMul(q, v) }"
    model = build(text, {"w": dead(normal(16, 8), 0, 2, 4, axis=1), "v": normal(8, 3)})
    kept = shrink(model)
    assert not kept.modified
    assert any("w is an input of the graph" in row.reason and row.count == 3 for row in kept.stayed)
    model.ir_version = 3
    found = shrink(model)
    assert [v.name for v in found.model.graph.inputs] == ["x"]
    assert arrays_of(found.model)["w"].shape == (16, 5)
    x = {"x": normal(1, 16)}
    for level in LEVELS:
        assert run(found.model, x, level)[0] == pytest.approx(run(model, x, level)[0], rel=RELATIVE)


def test_columns_of_an_embedding():
    text = "g (int64[n, 5] i) => (float[n, 5, 3] y) { q = Gather(e, i) p = Add(q, place) r = Relu(p) y = MatMul(r, v) }"
    table = dead(dead(normal(50, 8), 0, 1, axis=1), 2, axis=1, value=0.5)
    arrays = {"e": table, "place": dead(normal(5, 8), 0, 1, 2, axis=1), "v": dead(normal(8, 3), 7)}
    model = build(text, arrays)
    result = shrink(model, strict=True)
    found = arrays_of(result.model)
    assert found["e"].shape == (50, 4)
    assert found["place"].shape == (5, 4)
    feeds = {"i": np.random.default_rng(0).integers(0, 50, (2, 5))}
    assert_same(model, result.model, feeds, relative=RELATIVE)
    assert not shrink(result.model).modified
    use = parameter_use(simplify(build(text, arrays)))["e"]
    assert use.dead[:, [0, 1, 7]].all()
    assert not use.dead[:, 2:7].any()


def test_positions_picked_by_an_input():
    text = """g (float[n, 9, 4] x, int64[3] i) => (float[n, 3, 2] y) { a = MatMul(x, w) r = Relu(a) d = Gather<axis=1>(r, i) y = MatMul(d, v) }"""
    model = build(text, {"w": dead(normal(4, 6), 0, 1, axis=1), "v": normal(6, 2)})
    result = shrink(model, strict=True).model
    assert arrays_of(result)["w"].shape == (4, 4)
    assert_same(model, result, random_feeds(model) | {"i": i64(8, 0, -3)}, relative=RELATIVE)


def test_stacked_weights_of_experts():
    text = "g (float[2, 4, 6] x) => (float[2, 4, 3] y) { z = MatMul(x, w) s = Add(z, b) q = Relu(s) y = MatMul(q, v) }"
    w = dead(normal(2, 6, 8), 0, 1, 2, axis=2)
    w[1, :, 3] = 0  # dead in one expert only
    arrays = {"w": w, "b": dead(normal(1, 8)[0], 0, value=0.0), "v": dead(normal(2, 8, 3), 7, axis=1)}
    arrays["b"][1:3] = 0.5, 0.3
    found = arrays_of(sound(build(text, arrays)))
    assert found["w"].shape == (2, 6, 5)  # 0 and 7 go, one of the constants 1 and 2 stands for both
    assert found["v"].shape == (2, 5, 3)


@pytest.mark.parametrize(
    ("equation", "weight", "axis"),
    [("bi,io->bo", (6, 8), 1), ("bi,oi->bo", (8, 6), 0), ("b i , i o -> o b", (6, 8), 1), ("ib,io->bo", (6, 8), 1)],
)
def test_einsum_of_a_linear_layer(equation, weight, axis):
    given, turn = ("[6, 5]", False) if equation.startswith("ib") else ("[5, 6]", "-> o b" in equation)
    text = f"""g (float{given} x) => (float[5, 3] y) {{ z = Einsum<equation = "{equation}">(x, w) {"t = Transpose(z)" if turn else "t = Identity(z)"}
        s = Add(t, b) q = Relu(s) y = Einsum<equation = "bi,oi->bo">(q, v) }}"""
    arrays = {
        "w": dead(normal(*weight), 0, 2, 4, axis=axis),
        "b": dead(normal(1, 8)[0], 0, 2, value=0.0),
        "v": dead(normal(3, 8), 7, axis=1),
    }
    found = arrays_of(sound(build(text, arrays)))
    assert found["v"].shape == (3, 4)
    assert found["w"].shape[axis] == 4


def test_quantised_weight_of_a_grouped_layer_stays_quantised():
    text = """g (float[n, 3, 4, 4] x) => (float[n, 2, 4, 4] y) { w = DequantizeLinear(q, s) a = Conv<group=3>(x, w) r = Relu(a) y = Conv(r, v) }"""
    q = dead(np.arange(1, 7, dtype=np.int8).reshape(6, 1, 1, 1), 1, 2, 5)
    model = build(text, {"q": q, "s": np.float32(0.1), "v": normal(2, 6, 1, 1)})
    found = arrays_of(sound(model))
    assert found["q"].dtype == np.int8
    assert found["q"].shape == (3, 1, 1, 1)  # one filter a group is left
    assert found["v"].shape == (2, 3, 1, 1)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_group_norm_as_torch_exports_it(shift):
    """Groups are rows of an InstanceNormalization whose scale is one number for all of them."""
    text = """g (float[n, 3, 6, 6] x) => (float[n, 4, 6, 6] y) { a = Conv(x, w) r = Reshape(a, grouped) one = Expand(eins, groups) nought = Expand(null, groups)
        i = InstanceNormalization(r, one, nought) s = Shape(a) b = Reshape(i, s) m = Mul(b, scale) c = Add(m, shift) e = Relu(c) y = Conv(e, v, q) }"""
    arrays = {"grouped": i64(0, 4, -1), "groups": i64(4), "eins": np.float32(1), "null": np.float32(0)}
    weights = {
        "w": dead(normal(8, 3, 1, 1), 2, 3, 5),
        "scale": normal(8, 1, 1),
        "shift": dead(normal(8, 1, 1) * 2, 2, 3, value=shift),
        "v": normal(4, 8, 1, 1),
        "q": normal(1, 4)[0],
    }
    found = arrays_of(sound(build(text, arrays | weights)))
    assert found["w"].shape[0] == 6  # the second group is zero as a whole, the third is not
    assert found["v"].shape[1] == 6


def test_channels_of_an_input_are_named_as_such_behind_other_operators():
    """Not "an operator without a rule": there is none."""
    text = "g (float[n, 6] x) => (float[n, 6] y) { s = Mul(x, g) h = MatMul(s, w2) a = Relu(h) y = MatMul(a, w3) }"
    arrays = {"g": normal(6), "w2": dead(normal(6, 8), 1, 4), "w3": normal(8, 6)}
    result = shrink(build(text, arrays), strict=True)
    assert {(row.layer, row.side, row.count, row.reason) for row in result.stayed} == {
        ("w2", "input", 2, "channels of graph input x"),
    }


@pytest.mark.parametrize(
    ("op", "reason"), [("Warp", "pinned by unknown operator Warp d"), ("Hardmax", "pinned by Hardmax d")]
)
def test_zeros_of_a_layer_behind_an_operator_that_gives_up_have_its_reason(op, reason):
    """One whose rank nobody knows, and one that mixes all that it reads."""
    text = f"g (float[n, 6] x) => (float[n, 6] y) {{ h = MatMul(x, w1) d = {op}(h) r = Relu(d) y = Gemm(r, w2) }}"
    model = build(text, {"w1": normal(6, 6), "w2": dead(normal(6, 6), 1, 4)}, domain="unchecked")
    assert {(row.layer, row.side, row.count, row.reason) for row in shrink(model).stayed} == {
        ("w2", "input", 2, reason)
    }


def test_a_constant_that_a_norm_loses_is_said_to_be_lost_there():
    """No padding is anywhere, so that none is to blame."""
    text = """g (float[n, 3, 6, 6] x) => (float[n, 2, 6, 6] y) { c = Conv(x, w, b) d = InstanceNormalization(c, s, t)
        y = Conv(d, v) }"""
    arrays = {"w": dead(normal(8, 3, 1, 1), 0, 2, 4, 6), "b": np.full(8, 0.5, np.float32)}
    arrays |= {"s": np.abs(normal(8)), "t": normal(8), "v": normal(2, 8, 1, 1)}
    stayed = shrink(build(text, arrays)).stayed
    assert [(row.layer, row.side, row.count, row.reason) for row in stayed] == [
        ("w", "output", 4, "no longer constant behind InstanceNormalization d and read by Conv y")
    ]
