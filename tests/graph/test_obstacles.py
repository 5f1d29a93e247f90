"""Channels behind operators that move, join or mix axes other than the channels' own: they go, and nothing else does."""

# ruff: noqa: E501 - small graphs stay on one line

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from relief_export.graph.cost import cost
from relief_export.graph.shrink import shrink
from tests.graph.helpers import arrays_of, assert_sound, build, parameters, random_feeds

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
    assert {row.reason for row in result.kept} <= {"its length is read by Shape s"}
