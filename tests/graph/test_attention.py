"""Dead heads, features and hidden units of transformers, in the form in which torch exports attention."""

# ruff: noqa: E501 - small graphs stay on one line

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from relief_export.graph.prepare import simplify
from relief_export.graph.shrink import shrink
from tests.graph.helpers import arrays_of, assert_same, assert_sound, build, parameters, random_feeds

if TYPE_CHECKING:
    import onnx_ir as ir

RELATIVE = 1e-5  # of the output's scale
HEADS, WIDE = 4, 16

# What torch.onnx.export writes for scaled_dot_product_attention, masked or not: lengths are read from Shape at run time.
SPLIT = """s{0} = Shape<start=0, end=1>(x) n{0} = Squeeze(s{0}) z{0} = Shape<start=1, end=2>(x) t{0} = Concat<axis=0>(s{0}, z{0}, heads, rest)
    {0}m = MatMul(x, w{0}) {0}a = Add({0}m, b{0}) {0}r = Reshape<allowzero=1>({0}a, t{0}) {0} = Transpose<perm=[0, 2, 1, 3]>({0}r)"""
SCALE = """qs = Shape(q) d = Gather(qs, minus) df = Cast<to=1>(d) dr = Sqrt(df) di = Div(one, dr) f = Sqrt(di) qf = Mul(q, f)"""
TURN = """ks = Shape(k) kt = Slice(ks, l2, l1) kd = Slice(ks, l1, end) kb = Slice(ks, start, l2) k3 = Concat<axis=0>(rest, kt, kd) kx = Reshape(k, k3)
    ky = Transpose<perm=[0, 2, 1]>(kx) k4 = Concat<axis=0>(kb, kd, kt) kz = Reshape(ky, k4) kf = Mul(kz, f)"""
CAUSAL = """qt = Slice(qs, l2, l1) mt = Concat<axis=0>(qt, kt) ones = Expand(one, mt) low = Trilu<upper=0>(ones) up = Equal(low, nought) mask = Where(up, far, nought)
    masked = Add(scores, mask) p = Softmax(masked)"""
GUARD = """ps = Softmax(scores) bad = IsNaN(ps) p = Where(bad, nought, ps)"""
JOIN = """o = MatMul(p, v) ot = Transpose<perm=[0, 2, 1, 3]>(o) tj = Concat<axis=0>(sq, zq, wide) oj = Reshape<allowzero=1>(ot, tj) om = MatMul(oj, wo) y = Add(om, bo)"""
CONSTANTS = {
    "heads": np.array([HEADS]), "rest": np.array([-1]), "wide": np.array([WIDE]), "minus": np.array([-1]), "l1": np.array([-1]), "l2": np.array([-2]),
    "end": np.array([2**63 - 1]), "start": np.array([-(2**63)]), "one": np.float32(1), "nought": np.float32(0), "far": np.float32(-3e38),
}  # fmt: skip


def attention(shape: str = "n, t, 16", soft: str = "p = Softmax(scores)", **changes: slice | list[int]) -> ir.Model:
    rng = np.random.default_rng(3)
    arrays = {f"w{k}": rng.normal(size=(WIDE, WIDE)).astype(np.float32) / 2 for k in "qkvo"}
    arrays |= {f"b{k}": rng.normal(size=WIDE).astype(np.float32) for k in "qkvo"}
    for key, places in changes.items():
        name, _, rows = key.partition("_")
        arrays[name] = arrays[name].copy()
        arrays[name][(places,) if rows else (..., places)] = 0
    body = " ".join((*(SPLIT.format(k) for k in "qkv"), SCALE, TURN, "scores = MatMul(qf, kf)", soft, JOIN))
    return build(f"g (float[{shape}] x) => (float[{shape}] y) {{ {body} }}", arrays | CONSTANTS)


def sound(model: ir.Model) -> dict[str, np.ndarray]:
    result = shrink(model, strict=True)
    for lengths in ({"n": 2, "t": 5}, {"n": 3, "t": 1}):
        assert_sound(model, result.model, random_feeds(model, **lengths), relative=RELATIVE)
    assert not shrink(result.model).modified
    return arrays_of(result.model)


HEAD = slice(4, 8)


@pytest.mark.parametrize("shape", ["n, t, 16", "n, 5, 16", "2, 5, 16"])
@pytest.mark.parametrize("soft", ["p = Softmax(scores)", CAUSAL, GUARD], ids=["plain", "causal", "guarded"])
def test_dead_head_leaves_all_four_projections(shape, soft):
    for model in (attention(shape, soft, wv=HEAD, bv=HEAD), attention(shape, soft, wo_rows=HEAD)):
        result = shrink(model, strict=True)
        for lengths in ({"n": 2, "t": 5}, {"n": 3, "t": 1}):
            assert_sound(model, result.model, random_feeds(model, **lengths), relative=RELATIVE)
        assert not shrink(result.model).modified
        shapes = [a.shape for a in arrays_of(result.model).values()]
        assert shapes.count((16, 12)) == 3
        assert shapes.count((12, 16)) == 1
        assert set(result.opaque) <= {"Range"}


def test_head_whose_values_are_a_bias_is_that_bias():
    """Weights that add up to one leave a constant as it is; behind a guard against NaN they need not."""
    assert sound(attention(wv=HEAD))["wo"].shape == (12, 16)
    assert sound(attention(soft=GUARD, wv=HEAD))["wo"].shape == (16, 16)


def test_features_of_queries_and_keys_go_together():
    found = sound(attention(wq=slice(1, 16, 4), bq=slice(1, 16, 4)))  # the same feature of each head, always zero
    assert found["wq"].shape == found["wk"].shape == (16, 12)
    assert found["wv"].shape == (16, 16)
    uneven = attention(wq=[1, 6, 11, 12], bq=[1, 6, 11, 12])  # not the same: no regular shape would be left
    result = shrink(uneven, strict=True)
    assert not result.modified
    assert any(row.reason.startswith("no regular shape") and row.count == 4 for row in result.stayed)


def test_uneven_features_of_values_go_as_far_as_a_shape_allows():
    found = sound(attention(wv=[0, 4, 8, 12, 13, 2], bv=[0, 4, 8, 12, 13, 2]))  # feature 0 of every head, and others
    assert found["wv"].shape == (16, 12)
    assert found["wo"].shape == (12, 16)


def test_reshapes_and_transposes_become_one_transpose():
    ops = [node.op_type for node in simplify(attention()).graph]
    assert ops.count("Reshape") == 4  # three that split heads, one that joins them
    assert "Shape" not in ops
    assert ops.count("Transpose") == 5


def test_multihead_attention_with_one_projection():
    """nn.MultiheadAttention: q, k and v are thirds of one layer, heads are merged with the batch on the way."""
    text = """g (float[5, n, 16] x) => (float[5, n, 16] y) { s = Shape<start=1, end=2>(x) t = Concat<axis=0>(five, s, three, wide) m = MatMul(x, w) a = Add(m, b)
        r = Reshape(a, t) u = Unsqueeze(r, nil) tr = Transpose<perm=[3, 1, 2, 0, 4]>(u) sq = Squeeze(tr, l2) q0 = Gather(sq, i0) k0 = Gather(sq, i1) v0 = Gather(sq, i2)
        bh = Mul(s, heads) t3 = Concat<axis=0>(five, bh, four) t4 = Concat<axis=0>(s, heads, five, four)
        q1 = Reshape(q0, t3) q2 = Transpose<perm=[1, 0, 2]>(q1) q = Reshape(q2, t4) k1 = Reshape(k0, t3) k2 = Transpose<perm=[1, 0, 2]>(k1) k = Reshape(k2, t4)
        v1 = Reshape(v0, t3) v2 = Transpose<perm=[1, 0, 2]>(v1) v = Reshape(v2, t4) kt = Transpose<perm=[0, 1, 3, 2]>(k) scores = MatMul(q, kt) p = Softmax(scores)
        o = MatMul(p, v) op = Transpose<perm=[2, 0, 1, 3]>(o) f = Reshape(op, flat) g = Gemm<transB=1>(f, wo, bo) back = Concat<axis=0>(five, s, wide) y = Reshape(g, back) }"""
    rng = np.random.default_rng(5)
    w, b = rng.normal(size=(16, 48)).astype(np.float32) / 2, rng.normal(size=48).astype(np.float32)
    w[:, 36:40] = b[36:40] = 0
    arrays = {
        "five": np.array([5]),
        "three": np.array([3]),
        "wide": np.array([16]),
        "four": np.array([4]),
        "heads": np.array([4]),
        "nil": np.array([0]),
        "l2": np.array([-2]),
        "flat": np.array([-1, 16]),
    }
    arrays |= {f"i{k}": np.array(k) for k in range(3)} | {
        "w": w,
        "b": b,
        "wo": rng.normal(size=(16, 16)).astype(np.float32),
        "bo": np.zeros(16, np.float32),
    }
    found = sound(build(text, arrays))
    assert found["w"].shape == (16, 36)
    assert found["wo"].shape == (16, 12)


def test_grouped_queries_share_keys_and_values():
    """Keys and values of one head, expanded by broadcasting, stay while any query head reads them."""
    text = """g (float[2, 5, 16] x) => (float[2, 5, 8] y) { qm = MatMul(x, wq) qr = Reshape(qm, split) q = Transpose<perm=[0, 2, 1, 3]>(qr) km = MatMul(x, wk) k = Unsqueeze(km, one)
        kt = Transpose<perm=[0, 1, 3, 2]>(k) vm = MatMul(x, wv) v = Unsqueeze(vm, one) scores = MatMul(q, kt) p = Softmax(scores) o = MatMul(p, v)
        ot = Transpose<perm=[0, 2, 1, 3]>(o) oj = Reshape(ot, join) y = MatMul(oj, wo) }"""
    rng = np.random.default_rng(5)
    arrays = {
        k: rng.normal(size=s).astype(np.float32)
        for k, s in {"wq": (16, 16), "wk": (16, 4), "wv": (16, 4), "wo": (16, 8)}.items()
    }
    arrays["wo"][HEAD] = 0
    model = build(text, arrays | {"split": np.array([2, 5, 4, 4]), "join": np.array([2, 5, 16]), "one": np.array([1])})
    result = shrink(model, strict=True)
    assert_same(model, result.model, random_feeds(model), relative=RELATIVE)
    assert parameters(result.model) <= parameters(model)
    assert not shrink(result.model).modified


FUSED = """g (float[n, t, 16] x) => (float[n, t, 16] y) { qm = MatMul(x, wq) qa = Add(qm, bq) qr = Reshape(qa, split) q = Transpose<perm=[0, 2, 1, 3]>(qr)
    km = MatMul(x, wk) ka = Add(km, bk) kr = Reshape(ka, split) k = Transpose<perm=[0, 2, 1, 3]>(kr) vm = MatMul(x, wv) va = Add(vm, bv) vr = Reshape(va, split)
    v = Transpose<perm=[0, 2, 1, 3]>(vr) o = CALL ot = Transpose<perm=[0, 2, 1, 3]>(o) oj = Reshape(ot, join) om = MatMul(oj, wo) y = Add(om, bo) }"""


@pytest.mark.parametrize(
    "call", ["Attention(q, k, v)", "Attention<is_causal=1, scale=0.3>(q, k, v)", "Attention(q, k, v, mask)"]
)
def test_attention_as_one_operator(call):
    def model(**changes: slice | list[int]) -> ir.Model:
        arrays = {n: a.copy() for n, a in arrays_of(attention()).items() if n[0] in "wb"}
        for name, places in changes.items():
            arrays[name][..., places] = 0
        mask = {"mask": np.linspace(-1, 1, 25, dtype=np.float32).reshape(5, 5)} if "mask" in call else {}
        arrays |= {"split": np.array([0, 0, HEADS, 4]), "join": np.array([0, 0, WIDE])} | mask
        return build(FUSED.replace("CALL", call).replace("n, t", "n, 5" if mask else "n, t"), arrays, opset=23)

    fourths = slice(1, 16, 4)
    for changes, q, v in (
        ({"wv": HEAD, "bv": HEAD}, 12, 12),
        ({"wv": HEAD}, 12 if call == "Attention(q, k, v)" else 16, 12 if call == "Attention(q, k, v)" else 16),
        ({"wk": fourths, "bk": fourths}, 12, 16),  # the scale is that of four features still
        ({"wv": fourths, "bv": fourths}, 16, 12),
        ({"wq": [1, 6], "bq": [1, 6]}, 16, 16),
    ):
        found = sound(model(**changes)) if "mask" not in call else None
        if found is None:
            result = shrink(model(**changes), strict=True)
            assert_sound(model(**changes), result.model, random_feeds(model(), n=2), relative=RELATIVE)
            assert not shrink(result.model).modified
            found = arrays_of(result.model)
        assert (found["wq"].shape[1], found["wk"].shape[1], found["wv"].shape[1], found["wo"].shape[0]) == (q, q, v, v)
