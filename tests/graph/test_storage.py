"""Weights stored in a narrower type than the network computes with: the file keeps the type, and loses what is dead."""

# ruff: noqa: E501 - small graphs stay on one line

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from relief_export.graph.prepare import fold
from relief_export.graph.shrink import shrink
from tests.graph.helpers import arrays_of, assert_same, build, interface, random_feeds, stored_bytes

RELATIVE = 1e-5  # of the output's scale
CONVOLUTION = "g (float[n, 3, 5, 5] x) => (float[n, 2, h, k] y) { BODY r = Relu(c) y = Conv(r, w2) }"
DENSE = "g (float[n, 9] x) => (float[n, 2] y) { BODY r = Relu(c) y = MatMul(r, w2) }"
ROWS = [0, 3, 4]  # dead ones, of eight


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).integers(-100, 100, shape)


def model_of(body: str, arrays: dict[str, np.ndarray], *, bfloat16: tuple[str, ...] = (), opset: int = 20) -> ir.Model:
    """Build a network of one stored weight ``w`` and a consumer; ``w`` counts its output channels along its first axis."""
    convolution = "Conv(" in body
    arrays = dict(arrays)
    shape = (2, 8, 1, 1) if convolution else (8, 2)
    arrays["w2"] = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    model = build((CONVOLUTION if convolution else DENSE).replace("BODY", body), {}, domain="unchecked", opset=opset)
    proto = ir.to_proto(model)
    for name, array in arrays.items():
        dtype = onnx.TensorProto.BFLOAT16
        stored = helper.make_tensor(name, dtype, array.shape, array.ravel().tolist()) if name in bfloat16 else None
        proto.graph.initializer.append(stored or numpy_helper.from_array(np.ascontiguousarray(array), name))
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def dead(array: np.ndarray, axis: int = 0, zero: int = 0) -> np.ndarray:
    array = array.copy()
    np.moveaxis(array, axis, 0)[ROWS] = zero
    return array


SCALES = np.linspace(0.01, 0.02, 8).astype(np.float32)
ZEROS = np.arange(-4, 4).astype(np.int8)
BY_CHANNEL = {"s": SCALES, "z": ZEROS}
CONV = dead(numbers(8, 3, 3, 3)).astype(np.float32)
MATRIX = dead(numbers(9, 8), 1)
QUANTISED = (np.moveaxis(dead(np.moveaxis(numbers(8, 3, 3, 3), 0, 0)), 0, -1) * 1).astype(np.int8)

FORMS = {
    "float16": ("f = Cast<to=1>(w) c = Conv(x, f)", {"w": CONV.astype(np.float16)}, np.float16, (5, 3, 3, 3)),
    "float16 with bias": ("f = Cast<to=1>(w) g = Cast<to=1>(b) c = Conv(x, f, g)",
                          {"w": CONV.astype(np.float16), "b": np.where(np.isin(np.arange(8), ROWS), -1, 1).astype(np.float16)}, np.float16, (5, 3, 3, 3)),
    "float16 transposed": ("f = Cast<to=1>(w) t = Transpose(f) c = MatMul(x, t)", {"w": MATRIX.T.astype(np.float16)}, np.float16, (5, 9)),
    "float16 with an axis more": ("f = Cast<to=1>(w) t = Squeeze(f, one) c = MatMul(x, t)",
                                  {"w": MATRIX[:, None].astype(np.float16), "one": np.array([1])}, np.float16, (9, 1, 5)),
    "float16 reshaped": ("f = Cast<to=1>(w) t = Reshape(f, to) c = MatMul(x, t)",
                         {"w": MATRIX[:, None].astype(np.float16), "to": np.array([9, 8])}, np.float16, (9, 1, 5)),
    "int8 times a scale": ("f = Cast<to=1>(w) m = Mul(f, s) c = MatMul(x, m)", {"w": MATRIX.astype(np.int8), "s": np.float32(0.01)}, np.int8, (9, 5)),
    "int8 times scales": ("f = Cast<to=1>(w) m = Mul(f, s) c = MatMul(x, m)", {"w": MATRIX.astype(np.int8), "s": SCALES}, np.int8, (9, 5)),
    "int8 less a zero point": ("f = Cast<to=1>(w) g = Cast<to=1>(z) d = Sub(f, g) m = Mul(d, s) c = MatMul(x, m)",
                               {"w": (MATRIX // 2 + ZEROS).astype(np.int8), "s": SCALES, "z": ZEROS}, np.int8, (9, 5)),
    "DequantizeLinear": ("d = DequantizeLinear(w, s) c = MatMul(x, d)", {"w": MATRIX.astype(np.int8), "s": np.float32(0.01)}, np.int8, (9, 5)),
    "DequantizeLinear by channel": ("d = DequantizeLinear<axis=1>(w, s, z) c = MatMul(x, d)",
                                    {"w": (MATRIX // 2 + ZEROS).astype(np.int8), **BY_CHANNEL}, np.int8, (9, 5)),
    "DequantizeLinear of a convolution": ("d = DequantizeLinear<axis=0>(w, s) c = Conv(x, d)", {"w": CONV.astype(np.int8), "s": SCALES}, np.int8, (5, 3, 3, 3)),
    "DequantizeLinear, transposed": ("d = DequantizeLinear<axis=0>(w, s) t = Transpose(d) c = MatMul(x, t)", {"w": MATRIX.T.astype(np.int8), "s": SCALES}, np.int8, (5, 9)),
    "DequantizeLinear, perm and zero points": ("d = DequantizeLinear<axis=0>(w, s, z) t = Transpose<perm=[1, 0]>(d) c = MatMul(x, t)",
                                               {"w": (MATRIX.T // 2 + ZEROS[:, None]).astype(np.int8), **BY_CHANNEL}, np.int8, (5, 9)),
    "bfloat16": ("f = Cast<to=1>(w) c = Conv(x, f)", {"w": CONV}, "bfloat16", (5, 3, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMS)
def test_stored_type_is_kept_and_dead_channels_go(kind):
    body, arrays, dtype, shape = FORMS[kind]
    model = model_of(body, arrays, bfloat16=("w",) if dtype == "bfloat16" else ())
    result = shrink(model, strict=True)
    found = arrays_of(result.model)
    assert (str(found["w"].dtype), found["w"].shape) == (str(np.dtype(dtype) if dtype != "bfloat16" else dtype), shape)
    assert {row.layer for row in result.removed} == {"w", "w2"}
    assert_same(model, result.model, random_feeds(model), relative=RELATIVE)
    assert interface(result.model) == interface(model)
    assert stored_bytes(result.model) < stored_bytes(model)
    assert not shrink(result.model).modified
    folded = fold(model)
    assert found["w"].dtype == arrays_of(folded)["w"].dtype
    assert stored_bytes(folded) <= stored_bytes(model) + 64 * (dtype == "bfloat16")


def test_a_table_stored_as_float16_and_read_twice_is_cut_once():
    text = """g (int64[n, 5] i, float[n, 6] x) => (float[n, 5, 4] y, float[n, 4] z) { f = Cast<to=1>(w) e = Gather(f, i) y = MatMul(e, v)
        t = Transpose(f) h = MatMul(t, u) c = MatMul(x, h) z = MatMul(c, v) }"""
    w = numbers(9, 8).astype(np.float16)
    model = build(
        text, {"w": w, "u": numbers(9, 8).astype(np.float32), "v": numbers(8, 4).astype(np.float32)}, domain="unchecked"
    )
    model.graph.inputs[1].shape = ir.Shape(["n", 8])
    result = shrink(model).model
    feeds = {"i": np.arange(10).reshape(2, 5) % 9, "x": np.ones((2, 8), np.float32)}
    assert_same(model, result, feeds, relative=RELATIVE)
    assert arrays_of(result)["w"].dtype == np.float16


def quantised(rows: list[int], *, relu: bool) -> ir.Model:
    """Build two convolutions as ONNX Runtime's static quantisation writes them: per channel, biases as int32."""
    w1, w2 = numbers(8, 3, 3, 3).astype(np.int8), numbers(4, 8, 1, 1).astype(np.int8)
    b1 = numbers(8).astype(np.int32) * 20
    w1[rows], b1[rows] = 0, 0 if relu else 1000
    arrays = {
        "w1": w1,
        "b1": b1,
        "s1": SCALES,
        "z1": np.zeros(8, np.int8),
        "sb1": SCALES * 0.02,
        "zb1": np.zeros(8, np.int32),
    }
    arrays |= {
        "w2": w2,
        "b2": numbers(4).astype(np.int32),
        "s2": SCALES[:4],
        "z2": np.zeros(4, np.int8),
        "sb2": SCALES[:4] * 0.1,
    }
    arrays |= {
        "sx": np.float32(0.02),
        "zx": np.int8(3),
        "sa": np.float32(0.1),
        "za": np.int8(-128 if relu else 0),
        "zb2": np.zeros(4, np.int32),
    }
    activation = "r = Relu(c)" if relu else "r = Identity(c)"
    text = f"""g (float[n, 3, 6, 6] x) => (float[n, 4, h, k] y) {{ q = QuantizeLinear(x, sx, zx) d = DequantizeLinear(q, sx, zx)
        f1 = DequantizeLinear<axis=0>(w1, s1, z1) g1 = DequantizeLinear<axis=0>(b1, sb1, zb1) c = Conv<pads=[1, 1, 1, 1]>(d, f1, g1) {activation}
        q2 = QuantizeLinear(r, sa, za) d2 = DequantizeLinear(q2, sa, za) f2 = DequantizeLinear<axis=0>(w2, s2, z2)
        g2 = DequantizeLinear<axis=0>(b2, sb2, zb2) y = Conv(d2, f2, g2) }}"""
    return build(text, {k: np.asarray(v) for k, v in arrays.items()})


def test_dead_filters_of_a_quantised_network_go():
    model = quantised(ROWS, relu=True)
    result = shrink(model, strict=True)
    found = {name: array.shape for name, array in arrays_of(result.model).items()}
    assert (found["w1"], found["b1"], found["s1"], found["z1"]) == ((5, 3, 3, 3), (5,), (5,), (5,))
    assert found["w2"] == (4, 5, 1, 1)
    assert_same(model, result.model, random_feeds(model), relative=RELATIVE)
    assert stored_bytes(result.model) < stored_bytes(model)
    assert not shrink(result.model).modified


def test_filters_whose_constant_no_quantised_bias_holds_stay_and_it_is_said():
    model = quantised(ROWS, relu=False)
    result = shrink(model)
    assert_same(model, result.model, random_feeds(model), relative=RELATIVE)
    assert arrays_of(result.model)["w1"].shape == (8, 3, 3, 3)
    (row,) = [row for row in result.stayed if row.side == "output" and row.layer == "w1"]
    assert (row.count, row.reason) == (3, "a constant that the quantised bias of Conv y cannot hold")


def test_nothing_removed_leaves_a_quantised_network_as_it_is():
    model = quantised([], relu=True)
    assert stored_bytes(fold(model)) <= stored_bytes(model)
    assert not shrink(fold(model)).modified
