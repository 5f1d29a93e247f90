"""Costs against figures derived by hand, and against two independent counters on torchvision networks."""

import tracemalloc

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from relief_export.graph.arena import plan_arena
from relief_export.graph.cost import COUNTED as RULES
from relief_export.graph.cost import UNCOUNTED, Columns, cost
from tests.graph.helpers import build

RNG = np.random.default_rng(0)


def model(text, **weights):
    """Parse a graph in ONNX text syntax and give its free names the weights."""
    header = '<ir_version: 9, opset_import: ["" : 20, "com.microsoft" : 1, "my.domain" : 1]>\n'
    parsed = ir.from_onnx_text(header + text)
    for value in list(parsed.graph.inputs):
        if value.name in weights:
            parsed.graph.inputs.remove(value)
            value.const_value = ir.tensor(weights[value.name], name=value.name)
            parsed.graph.register_initializer(value)
    return parsed


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


LENET5 = """
g (float[batch, 1, 28, 28] x, float[20, 1, 5, 5] w1, float[20] b1, float[50, 20, 5, 5] w2, float[50] b2,
   float[500, 800] w3, float[500] b3, float[10, 500] w4, float[10] b4) => (float[batch, 10] y) {
  c1 = Conv <kernel_shape = [5, 5]> (x, w1, b1)
  p1 = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c1)
  c2 = Conv <kernel_shape = [5, 5]> (p1, w2, b2)
  p2 = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c2)
  f = Flatten (p2)
  h = Gemm <transB = 1> (f, w3, b3)
  r = Relu (h)
  y = Gemm <transB = 1> (r, w4, b4)
}
"""


@pytest.fixture
def lenet5():
    shapes = {"w1": (20, 1, 5, 5), "b1": (20,), "w2": (50, 20, 5, 5), "b2": (50,)}
    shapes |= {"w3": (500, 800), "b3": (500,), "w4": (10, 500), "b4": (10,)}
    return {name: random(*shape) for name, shape in shapes.items()}


def test_lenet5_has_the_published_figures(lenet5):
    bill = cost(model(LENET5, **lenet5))
    assert bill.paper_flops == 4_614_930
    assert bill.macs == Columns(None, 2_293_000, 2_293_000)
    assert bill.parameters == Columns(None, 431_080, 431_080)
    assert bill.prunable.structural == 431_080 - 580
    biases = 20 * 24 * 24 + 50 * 8 * 8 + 500 + 10
    assert bill.flops.structural == 2 * 2_293_000 + biases
    assert (bill.sparsity.prunable, bill.sparsity.all, bill.unknown, bill.batch) == (0.0, 0.0, (), 1)
    assert [layer.weight for layer in bill.layers] == ["w1", "w2", "w3", "w4"]


def test_zeros_leave_the_structure_and_the_paper_counts_whole_channels(lenet5):
    whole = cost(model(LENET5, **lenet5))
    lenet5["w2"][:] = 0
    lenet5["w2"][7, 3, 0, 0] = 1e-30  # one kernel lives in one filter, and one element in it
    lenet5["b2"][:25] = 0
    bill = cost(model(LENET5, **lenet5), baseline=whole)
    assert bill.macs == Columns(2_293_000, 2_293_000, 2_293_000 - 1_600_000 + 64)
    assert bill.parameters == Columns(431_080, 431_080, 431_080 - 24_999 - 25)
    assert bill.flops.nonzero == whole.flops.structural - 2 * (1_600_000 - 64) - 25 * 64
    row = bill.layers[1]
    assert (row.macs, row.macs_nonzero, row.parameters_nonzero) == (1_600_000, 64, 26)
    assert row.paper_flops == 2 * 64 * (1 * 25 + 1) * 1
    assert bill.paper_flops_dense == 4_614_930
    assert bill.sparsity.prunable == pytest.approx(24_999 / 430_500, abs=1e-12)
    assert bill.compression == bill.sparsity


def test_removed_neurons_count_in_the_compression_and_not_in_the_sparsity():
    small, large = (
        model(
            f"g (float[n, 6] x, float[{out}, 6] w) => (float[n, {out}] y) {{ y = Gemm <transB = 1> (x, w) }}",
            w=random(out, 6),
        )
        for out in (2, 8)
    )
    bill = cost(small, baseline=large)
    assert bill.sparsity.all == 0
    assert bill.compression.all == 0.75
    assert bill.macs == Columns(48, 12, 12)


# Each case: graph, weights, MACs, MACs with zeros skipped; the counts are written out from the operator's definition.
ONES = np.ones
CASES = {
    "Conv grouped, strided, padded": (
        (
            "g (float[n, 4, 9, 9] x, float[6, 2, 3, 3] w) => (float[n, 6, 5, 5] y)"
            "{ y = Conv <group = 2, strides = [2, 2], pads = [1, 1, 1, 1]> (x, w) }"
        ),
        {"w": ONES((6, 2, 3, 3), np.float32)},
        25 * 6 * 2 * 9,
        25 * 6 * 2 * 9,
    ),
    "Conv 1-D": (
        "g (float[n, 3, 10] x, float[2, 3, 4] w) => (float[n, 2, 7] y) { y = Conv (x, w) }",
        {"w": np.eye(6, 4, dtype=np.float32).reshape(2, 3, 4)},
        7 * 24,
        7 * 4,
    ),
    "ConvTranspose": (
        (
            "g (float[n, 4, 5, 5] x, float[4, 3, 2, 2] w) => (float[n, 6, 10, 10] y)"
            "{ y = ConvTranspose <group = 2, strides = [2, 2]> (x, w) }"
        ),
        {"w": ONES((4, 3, 2, 2), np.float32)},
        25 * 4 * 3 * 4,
        25 * 4 * 3 * 4,
    ),
    "Gemm with both factors transposed": (
        (
            "g (float[3, 5] x, float[4, 3] w, float[4] c) => (float[5, 4] y)"
            "{ y = Gemm <transA = 1, transB = 1> (x, w, c) }"
        ),
        {"w": np.array([[0, 1, 2]] * 4, np.float32), "c": ONES(4, np.float32)},
        5 * 4 * 3,
        5 * 4 * 2,
    ),
    "MatMul on an N-D input": (
        "g (float[n, 7, 3] x, float[3, 4] w) => (float[n, 7, 4] y) { y = MatMul (x, w) }",
        {"w": np.eye(3, 4, dtype=np.float32)},
        7 * 12,
        7 * 3,
    ),
    "MatMul with the weight on the left": (
        "g (float[n, 3, 7] x, float[4, 3] w) => (float[n, 4, 7] y) { y = MatMul (w, x) }",
        {"w": np.eye(4, 3, dtype=np.float32)},
        7 * 12,
        7 * 3,
    ),
    "MatMul of activations": (
        "g (float[n, 2, 5, 3] x) => (float[n, 2, 5, 5] y) {t = Transpose <perm = [0, 1, 3, 2]> (x) y = MatMul (x, t)}",
        {},
        2 * 5 * 5 * 3,
        2 * 5 * 5 * 3,
    ),
    "MatMul with a batch of weights": (
        "g (float[2, 5, 3] x, float[2, 3, 4] w) => (float[2, 5, 4] y) { y = MatMul (x, w) }",
        {"w": ONES((2, 3, 4), np.float32)},
        2 * 5 * 4 * 3,
        2 * 5 * 4 * 3,
    ),
    "weight behind Transpose and Mul with a mask": (
        (
            "g (float[n, 3] x, float[4, 3] w, float[4, 3] m) => (float[n, 4] y)"
            "{ v = Mul (w, m) t = Transpose (v) y = MatMul (x, t) }"
        ),
        {"w": ONES((4, 3), np.float32), "m": np.eye(4, 3, dtype=np.float32)},
        12,
        3,
    ),
    "weight behind DequantizeLinear with a zero point each channel": (
        (
            "g (float[n, 3] x, int8[3, 4] w, float[4] s, int8[4] z) => (float[n, 4] y)"
            "{ v = DequantizeLinear <axis = 1> (w, s, z) y = MatMul (x, v) }"
        ),
        {"w": np.array([[1, 2, 3, 4]] * 3, np.int8), "s": ONES(4, np.float32), "z": np.array([1, 0, 3, 0], np.int8)},
        12,
        6,
    ),
    "QLinearConv": (
        (
            "g (uint8[n, 2, 4, 4] x, float xs, uint8 xz, int8[3, 2, 1, 1] w, float[3] ws, int8[3] wz,"
            " float ys, uint8 yz)"
            "=> (uint8[n, 3, 4, 4] y) { y = QLinearConv (x, xs, xz, w, ws, wz, ys, yz) }"
        ),
        {
            "xs": np.float32(1),
            "xz": np.uint8(0),
            "w": np.array([0, 1, 5, 5, 0, 0], np.int8).reshape(3, 2, 1, 1),
            "ws": ONES(3, np.float32),
            "wz": np.array([0, 5, 0], np.int8),
            "ys": np.float32(1),
            "yz": np.uint8(0),
        },
        16 * 6,
        16 * 1,
    ),
    "MatMulInteger": (
        "g (uint8[n, 3] x, uint8[3, 2] w, uint8 xz, uint8 wz) => (int32[n, 2] y) { y = MatMulInteger (x, w, xz, wz) }",
        {"w": np.array([[9, 1], [9, 2], [9, 9]], np.uint8), "xz": np.uint8(0), "wz": np.uint8(9)},
        6,
        2,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_macs_of_an_operator(case):
    text, weights, macs, nonzero = case
    bill = cost(model(text, **weights))
    assert (bill.macs.structural, bill.macs.nonzero, bill.unknown) == (macs, nonzero, ())


@pytest.mark.parametrize("name", [name for name in CASES if "zero point" in name or name.startswith(("QL", "MatMulI"))])
def test_a_quantised_weight_is_zero_at_its_zero_point(name):
    text, weights, macs, nonzero = CASES[name]
    bill = cost(model(text, **weights))
    repeats = macs // weights["w"].size
    assert (bill.prunable.structural, bill.prunable.nonzero) == (weights["w"].size, nonzero // repeats)
    assert bill.parameters.structural == weights["w"].size  # and neither scales nor zero points


def test_every_rule_is_an_operator_that_exists():
    names = {name for domain, name in [*RULES, *UNCOUNTED] if not domain}
    assert [name for name in names if not onnx.defs.has(name)] == []


def test_a_bias_that_an_add_brings_is_a_bias():
    text = "g (float[n, 3] x, float[3, 4] w, float[4] b) => (float[n, 4] y) { h = MatMul (x, w) y = Add (h, b) }"
    weights = {"w": ONES((3, 4), np.float32), "b": np.array([1, 0, 0, 2], np.float32)}
    bill = cost(model(text, **weights))
    assert (bill.flops.structural, bill.flops.nonzero) == (2 * 12 + 4, 2 * 12 + 2)
    assert bill.layers[0].parameters == 16


def test_a_shared_weight_is_stored_once_and_used_twice():
    text = "g (float[n, 3] x, float[3, 3] w) => (float[n, 3] y) { h = MatMul (x, w) y = MatMul (h, w) }"
    bill = cost(model(text, w=np.eye(3, dtype=np.float32)))
    assert bill.parameters == Columns(None, 9, 3)
    assert bill.parameters_used == Columns(None, 18, 6)
    assert bill.macs == Columns(None, 18, 6)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{ y = my.domain.Mystery (x) }", "the operator is unknown"),
        ("{ t = my.domain.Mystery (x) y = MatMul (x, t) }", "the shape of a factor or of the output is unknown"),
        ('{ y = Einsum <equation = "ij,kj->ik"> (x, x) }', "the operator has no rule"),
    ],
)
def test_what_cannot_be_counted_is_a_row_and_not_a_zero(text, reason):
    bill = cost(model("g (float[n, 3] x) => (float[n, m] y)" + text))
    assert reason in [item.reason for item in bill.unknown]


def test_a_weight_that_is_rebuilt_at_load_is_not_guessed():
    text = "g (float[n, 4] x, float[4, 4] w) => (float[n, 4] y) { c = CumSum (w, a) y = MatMul (x, c) }"
    parsed = model(text.replace("[4, 4] w", "[4, 4] w, int64 a"), w=ONES((4, 4), np.float32), a=np.int64(0))
    assert [item.name for item in cost(parsed).unknown] == ["y"]


def test_counting_changes_nothing_in_the_model(lenet5):
    parsed = model(LENET5, **lenet5)
    before = ir.to_proto(parsed).SerializeToString()
    cost(parsed)
    plan_arena(parsed)
    assert ir.to_proto(parsed).SerializeToString() == before


HALVES = """
  c = Conv <kernel_shape = [1, 1]> (x, w1)
  {split}
  d = Conv <kernel_shape = [1, 1]> (left, w2)
  y = Concat <axis = 1> (d, right)
}}
"""
COMPUTED = """
  shape = Shape (c)
  channels = Gather <axis = 0> (shape, one)
  up = Add (channels, one)
  half = Div (up, two)
  end = Mul (half, two)
  left = Slice (c, zero, half, one)
  right = Slice (c, half, end, one)
"""
STATED = "left, right = Split <axis = 1, num_outputs = 2> (c)"


def test_computed_bounds_cost_what_stated_ones_cost():
    interface = "g (float[n, 4, 5, 5] x, float[8, 4, 1, 1] w1, float[6, 4, 1, 1] w2"
    weights = {"w1": random(8, 4, 1, 1), "w2": random(6, 4, 1, 1)}
    indices = {name: np.array([k], dtype=np.int64) for k, name in enumerate(("zero", "one", "two"))}
    head = ", int64[1] zero, int64[1] one, int64[1] two) => (float[n, 10, 5, 5] y) {"
    computed = model(interface + head + HALVES.format(split=COMPUTED), **weights, **indices)
    stated = model(interface + ") => (float[n, 10, 5, 5] y) {" + HALVES.format(split=STATED), **weights)
    bill = cost(computed)
    assert bill == cost(stated)
    assert (bill.unknown, bill.macs.structural) == ((), (8 * 4 + 6 * 4) * 25)
    # The computed shape stays out: what depends on no value of the input is no activation.
    assert plan_arena(computed).bytes == plan_arena(stated).bytes


def test_folding_for_the_shapes_leaves_the_parameters_as_stored():
    text = """g (float[n, 4] x, float[4, 4] w, float[4, 4] mask, int64[1] k) => (float[n, m] y) {
      v = Mul (w, mask)
      h = MatMul (x, v)
      end = Div (k, k)
      start = Sub (end, end)
      s = Slice (h, start, end, end)
      y = Relu (s)
    }"""
    bill = cost(model(text, w=random(4, 4), mask=np.eye(4, dtype=np.float32), k=np.array([2])))
    assert bill.parameters.structural == 32
    assert plan_arena(model(text, w=random(4, 4), mask=random(4, 4), k=np.array([2]))).bytes > 0


def test_a_weight_that_many_nodes_share_is_counted_use_by_use():
    """Forty masks of it at once would be ten times the model."""
    uses, size = 40, 512
    text = " ".join(f"h{k + 1} = MatMul(h{k}, w)" for k in range(uses))
    weight = np.ones((size, size), np.float32)
    weight[::2] = 0
    model = build(f"g (float[1, {size}] h0) => (float[1, {size}] h{uses}) {{ {text} }}", {"w": weight})
    tracemalloc.start()
    try:
        found = cost(model)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 2 * weight.nbytes
    assert (found.macs.structural, found.macs.nonzero) == (uses * size**2, uses * size**2 // 2)
    assert (found.parameters.structural, found.parameters_used.structural) == (size**2, uses * size**2)
