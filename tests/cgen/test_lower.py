"""The lowering: a plan, computed step by step in NumPy, is what ONNX Runtime computes of the model."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest

from relief_export.cgen.lower import lower
from relief_export.errors import InputError, UnsupportedModelError
from tests.cgen.interpret import Interpreter
from tests.graph.builder import random_network
from tests.graph.helpers import build, random_feeds, run

if TYPE_CHECKING:
    import onnx_ir as ir

    from relief_export.cgen import plan as p

RELATIVE = 1e-5  # of the output's scale
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def check(model: ir.Model, plan: p.Plan) -> None:
    (x,) = random_feeds(model, n=1, batch=1).values()
    (expected,) = run(model, {model.graph.inputs[0].name: x})
    found = Interpreter(plan).run(x)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= RELATIVE * max(np.abs(expected).max(), 1e-3)


def kinds(plan: p.Plan) -> list[str]:
    return [type(step).__name__ + "".join(f"+{op.kind}" for op in step.chain) for step in plan.steps]


CONV = {"w": normal(4, 4, 3, 3), "b": normal(4), "v": normal(4, 4, 1, 1), "s": normal(4, 1, 1)}
CASES = {  # graph, steps
    "an activation joins its convolution": (
        "g (float[n, 4, 6, 6] x) => (float[n, 4, 6, 6] y) { a = Conv<pads=[1,1,1,1]>(x, w, b) y = Relu(a) }",
        ["Convolution+Relu"],
    ),
    "factors of a channel go into the weights": (
        """g (float[n, 4, 6, 6] x) => (float[n, 4, 4, 4] y)
        { a = Conv(x, w, b) c = Mul(a, s) d = Add(c, s) y = Tanh(d) }""",
        ["Convolution+Tanh"],
    ),
    "a residual addition joins the later operand": (
        """g (float[n, 4, 6, 6] x) => (float[n, 4, 6, 6] y)
        { r = Conv(x, v) a = Conv<pads=[1,1,1,1]>(x, w, b) c = Add(r, a) y = Relu(c) }""",
        ["Convolution", "Convolution+Add+Relu"],
    ),
    "a slice of columns is copied before what reads it": (
        """g (float[n, 4, 6, 6] x) => (float[n, 4, 3, 3] y)
        { a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w, b) r = Slice(x, zero, six, axes, two) y = Sub(r, a) }""",
        ["Move", "Convolution+Sub"],
    ),
    "x * sigmoid(x) is one operation": (
        "g (float[n, 4, 6, 6] x) => (float[n, 4, 6, 6] y) { a = Conv(x, v, b) c = Sigmoid(a) y = Mul(a, c) }",
        ["Convolution+Gate"],
    ),
    "a value with two readers stays as it is": (
        """g (float[n, 4, 6, 6] x) => (float[n, 4, 6, 6] y)
        { a = Conv(x, v, b) c = Relu(a) d = Conv(c, v) e = Add(d, a) f = Conv(a, v) y = Add(e, f) }""",
        ["Convolution", "Move+Relu", "Convolution+Add", "Convolution+Add"],
    ),
    "a max-pool joins its convolution": (
        """g (float[n, 4, 7, 7] x) => (float[n, 4, 3, 3] y)
        { a = Conv(x, v, b) c = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a) y = Relu(c) }""",
        ["Convolution+Relu"],
    ),
    "gating by a vector": (
        """g (float[n, 4, 6, 6] x) => (float[n, 4, 6, 6] y)
        { a = Conv(x, v, b) q = GlobalAveragePool(a) t = Conv(q, v, b) u = HardSigmoid(t) y = Mul(u, a) }""",
        ["Convolution", "Reduce", "Linear+HardSigmoid", "Move+Mul"],
    ),
    "moving elements is no step": (
        """g (float[n, 4, 6, 6] x) => (float[n, 4, 6, 6] y)
        { q = Reshape(x, halves) t = Transpose<perm=[0,2,1,3,4]>(q) u = Reshape(t, whole) y = Conv(u, v, b) }""",
        ["Convolution"],
    ),
    "a matrix times several rows": (
        "g (float[n, 4, 6] x) => (float[n, 4, 4] y) { t = MatMul(x, m) y = Add(t, col) }",
        ["Move", "Convolution", "Move+Affine"],
    ),
    # Their results are laid out by what they compute along, not by channels.
    "a softmax is one row": (
        "g (float[n, 4] x) => (float[n, 4] y) { t = Softmax(x) y = Mul(t, classes) }",
        ["Softmax", "Move+Affine"],
    ),
    "a softmax along the channels of single pixels": (
        "g (float[n, 4, 1, 1] x) => (float[n, 4, 1, 1] y) { t = Softmax<axis=1>(x) y = PRelu(t, slopes) }",
        ["Softmax", "Move+PRelu"],
    ),
    "a reduction of rows": (
        "g (float[n, 4, 6, 6] x) => (float[n, 4, 6] y) { r = ReduceMean<keepdims=0>(x, rows) y = Mul(r, col) }",
        ["Move", "Reduce", "Move+Affine"],
    ),
}  # fmt: skip
ARRAYS = CONV | {
    "zero": np.array([0, 0]), "six": np.array([6, 6]), "axes": np.array([2, 3]), "two": np.array([2, 2]),
    "halves": np.array([0, 2, 2, 6, 6]), "whole": np.array([0, 4, 6, 6]), "m": normal(6, 4), "col": normal(4, 1),
    "classes": normal(4), "slopes": normal(4, 1, 1), "rows": np.array([3]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_steps(name):
    text, steps = CASES[name]
    used = {key: array for key, array in ARRAYS.items() if any(f"{q}{key}{r}" in text for q in " (" for r in ",)")}
    model = build(text, used)
    plan = lower(model)
    assert kinds(plan) == steps
    check(model, plan)


def test_random_networks():
    taken = 0
    for seed in range(60):
        choose = random.Random(seed).choice  # noqa: S311  # no secret
        model = random_network(lambda options: choose(list(options)), seed)  # noqa: B023
        try:
            plan = lower(model)
        except UnsupportedModelError:
            continue
        taken += 1
        check(model, plan)
    assert taken > 30


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("g (float[n, 4] x) => (float[n, 4] y) { y = Sin(x) }", UnsupportedModelError, r"node '.*' \(Sin\): the c f"),
        ("g (float[2, 4] x) => (float[2, 4] y) { y = Relu(x) }", UnsupportedModelError, "one sample at a time"),
        ("g (float[n, h] x) => (float[n, h] y) { y = Relu(x) }", InputError, "--dim NAME=SIZE"),
        ("g (float[n, 4] x) => (float[n, 4] y, float[n, 4] z) { y = Relu(x) z = Abs(x)}", UnsupportedModelError, "2 "),
    ],
)  # fmt: skip
def test_refusals_name_what_it_is(text, error, message):
    with pytest.raises(error, match=message):
        lower(build(text))


def test_sizes_of_symbolic_axes_are_given():
    model = build("g (float[n, 4, h] x) => (float[n, 4, h] y) { y = Relu(x) }")
    assert lower(model, dims={"h": 5}).output_shape == (1, 4, 5)
    with pytest.raises(InputError, match="no input has a dimension w"):
        lower(model, dims={"h": 5, "w": 3})
