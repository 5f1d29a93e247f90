import itertools
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from relief_export import formats
from relief_export.errors import IntegrityError, UnsupportedModelError
from relief_export.formats import EXACT, FORMATS, Options, dense, packed
from relief_export.formats.packed import encode
from tests.formats.conftest import LENET, SHAPES, draw

LENET5 = """<ir_version: 8, opset_import: ["": 18]>
lenet5 (float[N,1,28,28] x) => (float[N,10] y) {
  a = Conv <kernel_shape = [5,5], strides = [1,1], pads = [0,0,0,0]> (x, "conv1.weight", "conv1.bias")
  b = Relu (a)
  c = MaxPool <kernel_shape = [2,2], strides = [2,2], dilations = [1,1]> (b)
  d = Conv <kernel_shape = [5,5], strides = [1,1], pads = [0,0,0,0]> (c, "conv2.weight", "conv2.bias")
  e = Relu (d)
  f = MaxPool <kernel_shape = [2,2], strides = [2,2], dilations = [1,1]> (e)
  g = Flatten (f)
  h = Gemm <transB = 1> (g, "fc1.weight", "fc1.bias")
  i = Relu (h)
  y = Gemm <transB = 1> (i, "fc2.weight", "fc2.bias")
}"""


def spaced(gaps, universe):
    """Return a weight matrix (universe / 64, 64) whose non-zeros stand at the running sums of ``gaps``."""
    places = np.cumsum(gaps)
    weight = np.zeros(universe, np.float32)
    weight[places[places < universe]] = np.random.default_rng(0).normal(size=(places < universe).sum())
    return weight.reshape(-1, 64)


def geometric(density, universe=64 * 512):
    return spaced(np.random.default_rng(1).geometric(density, universe), universe)


VALUES = ("f32", "f16", "codebook16", "codebook256")
SPREADS = {
    "short gaps": spaced(np.random.default_rng(2).integers(8, 15, 9000), 64 * 1000),
    "long gaps": spaced(np.random.default_rng(2).integers(1500, 9000, 100), 64 * 2000),
    "even": spaced(np.random.default_rng(2).integers(60, 250, 500), 64 * 1000),
    "random": geometric(0.05, 64 * 2000),
    "dense": geometric(0.4),
}


def pack(model, tmp_path, values="f32"):
    dense.write(model, tmp_path / "dense.onnx", Options())
    artifact = packed.write(model, tmp_path / "packed.onnx", Options(), values=values)
    return tmp_path / "dense.onnx", tmp_path / "packed.onnx", artifact


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize("spread", SPREADS)
def test_positions_of_every_spread_are_folded_and_exact(tmp_path, make_linear, run, optimised_ops, spread, opset):  # noqa: PLR0917  # fixtures
    plain, small, _ = pack(make_linear(SPREADS[spread], opset=opset), tmp_path)
    assert optimised_ops(small) == optimised_ops(plain)
    assert np.array_equal(run(small), run(plain))
    assert np.array_equal(run(small, optimise=False), run(plain, optimise=False))
    assert small.stat().st_size < plain.stat().st_size


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("kernels", [True, False])
def test_every_value_code_is_folded(tmp_path, make_lenet, run, optimised_ops, *, values, zeros, kernels):
    plain, small, _ = pack(make_lenet(zeros, kernels=kernels), tmp_path, values)
    assert optimised_ops(small) == optimised_ops(plain)
    expected, got = run(plain), run(small)
    if values == "f32":
        assert np.array_equal(got, expected)
    unoptimised = run(small, optimise=False)
    assert np.abs(unoptimised - got).max() <= 1e-5 * max(np.abs(got).max(), 1.0)
    dense.write(packed.read(small), tmp_path / "read.onnx", Options())
    assert np.array_equal(run(tmp_path / "read.onnx"), got)
    assert optimised_ops(tmp_path / "read.onnx") == optimised_ops(plain)


@pytest.mark.parametrize(("values", "bound"), [("f16", 2.0**-11), ("codebook256", 0.1), ("codebook16", 0.5)])
def test_the_stated_weight_error_is_the_real_one(tmp_path, make_linear, values, bound):
    weight = geometric(0.1)
    _, small, artifact = pack(make_linear(weight), tmp_path, values)
    (read,) = packed.read(small).graph.initializers.values()
    error = np.abs(read.const_value.numpy() - weight).max() / np.abs(weight).max()
    assert artifact.notes == (f"largest error of a weight: {error:.3g} of the largest in w",)
    assert error <= bound
    assert np.array_equal(read.const_value.numpy() != 0, weight != 0)


@pytest.mark.parametrize("values", VALUES)
def test_large_weights_are_folded_and_exact(tmp_path, make_linear, run, optimised_ops, values):
    weight = geometric(0.05, 64 * 8192)
    plain, small, _ = pack(make_linear(weight), tmp_path, values)
    assert optimised_ops(small) == optimised_ops(plain)
    if values == "f32":
        assert np.array_equal(run(small), run(plain))
        assert np.array_equal(run(small, optimise=False), run(plain, optimise=False))
    dense.write(packed.read(small), tmp_path / "read.onnx", Options())
    assert np.array_equal(run(tmp_path / "read.onnx"), run(small))


def by_kernel(density, side=64):
    rng = np.random.default_rng(0)
    kept = rng.random((side, side, 1, 1)) < density
    return (rng.normal(size=(side, side, 3, 3)) * kept).astype(np.float32)


@pytest.mark.parametrize("density", [0.2, 0.02])
def test_whole_kernels_share_a_position(tmp_path, make_conv, run, density):
    weight = by_kernel(density)
    plain, small, artifact = pack(make_conv(weight), tmp_path)
    kernels = np.count_nonzero(weight.any(axis=(2, 3)))
    assert artifact.bytes < kernels * 37 + 600
    assert np.array_equal(run(small), run(plain))


@pytest.mark.parametrize("density", [0.2, 0.02])
@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize("values", VALUES)
def test_whole_kernels_are_folded_in_every_value_code(tmp_path, make_conv, run, optimised_ops, values, side, density):  # noqa: PLR0917  # fixtures
    weight = by_kernel(density, side)
    plain, small, _ = pack(make_conv(weight), tmp_path, values)
    assert optimised_ops(small) == optimised_ops(plain)
    read = packed.read(small)
    (decoded,) = [value.const_value.numpy() for value in read.graph.initializers.values()]
    assert decoded.shape == weight.shape
    assert np.array_equal(decoded != 0, weight != 0)
    assert np.square(decoded - weight).sum() < 0.02 * np.square(weight).sum()
    dense.write(read, tmp_path / "read.onnx", Options())
    assert np.array_equal(run(tmp_path / "read.onnx"), run(small))


@pytest.mark.parametrize("values", VALUES)
def test_weights_of_several_blocks_are_those_of_one(tmp_path, monkeypatch, make_linear, values):
    model = make_linear(geometric(0.2, 64 * 9000))
    packed.write(model, tmp_path / "one.onnx", Options(), values=values)
    monkeypatch.setattr(encode, "_BLOCK", 1000)
    packed.write(model, tmp_path / "many.onnx", Options(), values=values)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "many.onnx").read_bytes()


def few_values(count, *, halves, kernels=True, seed=0):
    """Return a LeNet with at most ``count`` different non-zero numbers in each weight, as training them leaves it."""
    rng = np.random.default_rng(seed)
    proto = onnx.parser.parse_model(LENET)
    for name, shape in SHAPES.items():
        array = draw(rng, shape, 0.8 if len(shape) > 1 else 0.3, kernels=kernels and len(shape) == 4)
        if len(shape) > 1:
            levels = rng.normal(size=count).astype(np.float32)
            array = np.where(array != 0, levels[rng.integers(0, count, shape)], np.float32(0))
        array = array.astype(np.float16).astype(np.float32) if halves else array
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return ir.from_proto(proto)


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 15, 16, 31, 32, 200, 255, 256])
def test_a_network_of_few_values_is_kept_exactly(tmp_path, run, optimised_ops, count, halves):  # fixtures
    model, name = few_values(count, halves=halves), "packed-codebook16" if count <= 16 else "packed-codebook256"
    dense.write(model, tmp_path / "dense.onnx", Options())
    artifact = FORMATS[name].write(model, tmp_path / "small.onnx", Options())
    assert artifact.tolerance == EXACT
    assert not [note for note in artifact.notes if "error" in note]
    for optimise in (True, False):
        expected = run(tmp_path / "dense.onnx", optimise=optimise)
        assert np.array_equal(run(tmp_path / "small.onnx", optimise=optimise), expected)
    assert optimised_ops(tmp_path / "small.onnx") == optimised_ops(tmp_path / "dense.onnx")
    dense.write(packed.read(tmp_path / "small.onnx"), tmp_path / "read.onnx", Options())
    assert np.array_equal(run(tmp_path / "read.onnx"), run(tmp_path / "dense.onnx"))


def test_fewer_values_make_a_smaller_file(tmp_path):
    sizes = [
        FORMATS["packed-codebook16"].write(few_values(count, halves=True), tmp_path / "m.onnx", Options()).bytes
        for count in (2, 4, 8, 16)
    ]
    weights = [value.const_value.numpy() for value in few_values(2, halves=True).graph.initializers.values()]
    nonzeros = sum(np.count_nonzero(weight) for weight in weights)
    for fewer, more in itertools.pairwise(sizes):
        assert more - fewer > 0.8 * nonzeros / 8  # a bit a weight, but for tables and rounding to whole bits


def test_one_value_too_many_is_rounded_and_says_so(tmp_path):
    artifact = FORMATS["packed-codebook16"].write(few_values(17, halves=True), tmp_path / "m.onnx", Options())
    assert artifact.tolerance == packed.TOLERANCES["codebook16"]
    assert any(note.startswith("largest error of a weight") for note in artifact.notes)


def test_zeros_inside_a_stored_kernel_stay_zero(tmp_path, make_conv):
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(32, 32, 3, 3)) * (rng.random((32, 32, 1, 1)) < 0.2)).astype(np.float32)
    weight[..., 1, 1] = 0
    for values in VALUES:
        _, small, _ = pack(make_conv(weight), tmp_path, values)
        (read,) = packed.read(small).graph.initializers.values()
        assert np.array_equal(read.const_value.numpy() != 0, weight != 0)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(
    "support",
    [[], [0], [4095], [0, 4095], list(range(4096)), list(range(0, 4096, 2))],
    ids=["empty", "first", "last", "ends", "full", "half"],
)
def test_extreme_supports(tmp_path, make_linear, run, values, support):
    weight = np.zeros(4096, np.float32)
    weight[support] = np.random.default_rng(0).normal(size=len(support)) + 3
    plain, small, _ = pack(make_linear(weight.reshape(64, 64)), tmp_path, values)
    assert np.array_equal(run(small) != 0, run(plain) != 0)
    assert small.stat().st_size <= plain.stat().st_size + 50
    (read,) = packed.read(small).graph.initializers.values()
    assert np.array_equal(read.const_value.numpy() != 0, weight.reshape(64, 64) != 0)


def test_empty_scalar_and_one_element_tensors(tmp_path, run):
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 18]> g (float[N,4] x) => (float[M,4] y)
        <float[0,4] empty = {}, float scalar = {2.0}, float[1] one = {0.0}, float[1,4] row = {0.0, 1.0, 0.0, 0.0}> {
          a = Concat <axis = 0> (x, empty)
          b = Mul (a, scalar)
          c = Add (b, one)
          y = Mul (c, row)
        }"""
    )
    plain, small, _ = pack(ir.from_proto(proto), tmp_path, "codebook16")
    assert np.array_equal(run(small), run(plain))


def test_types_other_than_float_are_packed_as_they_are(tmp_path, run, optimised_ops):
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g (float[N,8] x) => (double[N,300] y) '
        "{ a = Cast <to = 11> (x) b = MatMul (a, w) c = Cast <to = 11> (k) y = Add (b, c) }"
    )
    tensors = {"w": rng.normal(size=(8, 300)), "k": rng.integers(-9, 9, 300)}
    for name, array in tensors.items():
        kept = array * (rng.random(array.shape) < 0.05)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(kept.astype(array.dtype), name))
    plain, small, _ = pack(ir.from_proto(proto), tmp_path)
    assert optimised_ops(small) == optimised_ops(plain)
    assert np.array_equal(run(small), run(plain))
    assert small.stat().st_size < plain.stat().st_size / 2


def test_a_shared_weight_is_stored_once(tmp_path, run):
    weight = geometric(0.1, 64 * 64)
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g (float[N,64] x) => (float[N,64] y) '
        "{ a = MatMul (x, w) y = MatMul (a, w) }"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    plain, small, _ = pack(ir.from_proto(proto), tmp_path)
    assert np.array_equal(run(small), run(plain))
    assert len(packed.read(small).graph.initializers) == 1


def test_subgraphs_see_the_renamed_weights(tmp_path):
    weight = geometric(0.1, 64 * 64)
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 18]> g (float[N,64] x, bool flag) => (float[N,64] y) {
          y = If (flag) <then_branch = t () => (float[N,64] p) { p = MatMul (x, w) },
                         else_branch = e () => (float[N,64] q) { q = Identity (x) }>
        }"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    packed.write(ir.from_proto(proto), tmp_path / "p.onnx", Options())
    import onnxruntime as ort  # noqa: PLC0415 - only this test feeds two inputs

    opened = ort.InferenceSession(tmp_path / "p.onnx", providers=["CPUExecutionProvider"])
    x = np.ones((2, 64), np.float32)
    assert opened.run(None, {"x": x, "flag": np.array(True)})[0] == pytest.approx(x @ weight, abs=1e-5)
    (read,) = packed.read(tmp_path / "p.onnx").graph.initializers.values()  # which only the subgraph uses
    assert np.array_equal(read.const_value.numpy(), weight)


def test_an_initializer_that_callers_may_replace_stays(tmp_path, make_linear):
    model = make_linear(geometric(0.1, 64 * 64))
    model.graph.inputs.append(model.graph.initializers["w"])
    artifact = packed.write(model, tmp_path / "p.onnx", Options())
    assert "w stays dense: it is an input as well, so that a caller may replace it" in artifact.notes
    assert "w" in packed.read(tmp_path / "p.onnx").graph.initializers


def test_biases_of_zeros_are_left_out(tmp_path, make_lenet, run):
    model = make_lenet()
    for name in ("conv2.bias", "fc1.bias"):
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(np.zeros(value.shape.numpy(), np.float32), name=name)
    plain, small, _ = pack(model, tmp_path)
    assert np.array_equal(run(small), run(plain))
    counts = {node.op_type: [] for node in onnx.load(plain).graph.node}
    for node in packed.read(small).graph:
        counts[node.op_type].append(sum(value is not None for value in node.inputs))
    assert counts["Conv"] == [3, 2]
    assert counts["Gemm"] == [2]
    assert set(model.graph.initializers) >= {"conv2.bias", "fc1.bias"}  # the caller's model is as it was


def test_what_nothing_uses_is_left_out(tmp_path, make_linear):
    model = make_linear(SPREADS["random"])
    unused = ir.Value(name="unused", const_value=ir.tensor(np.zeros(0, np.float32), name="unused"))
    model.graph.register_initializer(unused)
    _, small, artifact = pack(model, tmp_path)
    assert len(packed.read(small).graph.initializers) == 1
    assert artifact.bytes == pack(make_linear(SPREADS["random"]), tmp_path)[2].bytes


def test_functions_named_like_operators_keep_their_inputs(tmp_path, run):
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 18, "own": 1]> g (float[N,4] x) => (float[N,4] y)
        <float[4,4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}, float[4] b = {0,0,0,0}> { y = own.Gemm (x, w, b) }
        <domain: "own", opset_import: ["": 18]> Gemm (x, w, b) => (y) { a = MatMul (x, w) y = Add (a, b) }"""
    )
    plain, small, _ = pack(ir.from_proto(proto), tmp_path)
    assert np.array_equal(run(small), run(plain))


def test_models_of_foreign_operators_alone_are_packed(tmp_path, run):
    weight = geometric(0.1, 64 * 64)
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["com.microsoft": 1]> g (float[N,64] x) => (float[N,64] y) '
        "{ y = com.microsoft.FusedMatMul (x, w) }"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    plain, small, _ = pack(ir.from_proto(proto), tmp_path)
    assert np.array_equal(run(small), run(plain))
    (read,) = packed.read(small).graph.initializers.values()
    assert np.array_equal(read.const_value.numpy(), weight)


def test_old_opsets_are_refused(tmp_path, make_linear):
    with pytest.raises(UnsupportedModelError, match="packed needs opset 13, the model has 11"):
        packed.write(make_linear(geometric(0.1), opset=11), tmp_path / "p.onnx", Options())


def test_same_input_same_bytes(tmp_path, make_lenet):
    for values in VALUES:
        packed.write(make_lenet(), tmp_path / "a.onnx", Options(), values=values)
        packed.write(make_lenet(), tmp_path / "b.onnx", Options(), values=values)
        assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


RELIEVED = {
    "narrow": ((6, 16, 60), (0.6, 0.4, 0.12, 0.5), False),
    "wide": ((8, 20, 100), (0.5, 0.2, 0.06, 0.35), False),
    "sparse": ((10, 30, 150), (0.3, 0.08, 0.02, 0.2), False),
    "kernels": ((4, 8, 60), (0.9, 0.5, 0.15, 0.4), True),
}
"""LeNet-5 (20-50-500) after it has lost most of its units: widths, density by layer, whether by kernel."""
OVERHEAD = 1700
"""Bytes above the entropy bound that a LeNet-5 may take: nodes, names, tables, and what codes lose on small numbers."""


def relieved_lenet(widths, densities, *, kernels):
    first, second, third = widths
    shapes = {
        "conv1": (first, 1, 5, 5),
        "conv2": (second, first, 5, 5),
        "fc1": (third, 16 * second),
        "fc2": (10, third),
    }
    proto = onnx.parser.parse_model(LENET5)
    rng = np.random.default_rng(0)
    for (layer, shape), density in zip(shapes.items(), densities, strict=True):
        units = shape[:2] if kernels and len(shape) == 4 else shape
        kept = (rng.random(units) < density).reshape(units + (1,) * (len(shape) - len(units)))
        weight = (rng.normal(size=shape) * kept / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        bias = rng.normal(size=shape[0]).astype(np.float32) / 10
        for name, array in (("weight", weight), ("bias", bias)):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, f"{layer}.{name}"))
    return ir.from_proto(proto)


@pytest.mark.parametrize("case", RELIEVED)
def test_a_relieved_lenet5_is_near_its_bound(tmp_path, run, optimised_ops, case):
    widths, densities, kernels = RELIEVED[case]
    model = relieved_lenet(widths, densities, kernels=kernels)
    plain, small, artifact = pack(model, tmp_path, "codebook16")
    total = formats.ledger(model).total
    assert 1500 < total.nonzeros < 5000
    assert artifact.bytes <= total.bound["codebook16"] + OVERHEAD
    assert optimised_ops(small) == optimised_ops(plain)
    assert run(small) == pytest.approx(run(small, optimise=False), abs=1e-5)
    dense.write(packed.read(small), tmp_path / "read.onnx", Options())
    assert np.array_equal(run(tmp_path / "read.onnx"), run(small))


@pytest.mark.parametrize("zeros", [0.8, 0.9, 0.95, 0.98])
def test_bytes_are_near_the_entropy_bound(tmp_path, make_linear, make_conv, zeros):
    unstructured = make_linear(geometric(1 - zeros, 64 * 4096))
    by_kernels = make_conv(by_kernel(1 - zeros, 128))
    for model, most in ((unstructured, 1.20), (by_kernels, 1.15)):
        artifact = packed.write(model, tmp_path / "m.onnx", Options())
        assert artifact.bytes <= most * formats.ledger(model).total.bound["f32"]


CONSTANTS = """<ir_version: 8, opset_import: ["": 18]> g (float[N,4] x) => (float[N,3] y) {
  %s y = MatMul (x, a) }"""


@pytest.mark.parametrize(
    "node",
    [
        "a = Gather <axis = 1> (w, i)",
        "a = Gather <axis = 1> (w, j)",
        "t = Transpose (w) c = Gather (t, j) a = Transpose (c)",
        "b = Div (w, w) a = Gather <axis = 1> (b, i)",
        "b = CumSum <reverse = 1> (w, zero) a = Gather <axis = 1> (b, i)",
        "b = MatMul (square, w) a = Gather <axis = 1> (b, i)",
        "b = Reshape (w, keep) a = Gather <axis = 1> (b, i)",
        "b, c = Split <axis = 1> (w, sizes) d = Concat <axis = -1> (c, b) a = Gather <axis = 1> (d, i)",
    ],
)
def test_constants_that_the_model_computes_itself_are_left_or_right(tmp_path, run, node):
    proto = onnx.parser.parse_model(CONSTANTS % node)
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.normal(size=(4, 5)).astype(np.float32),
        "square": rng.normal(size=(4, 4)).astype(np.float32),
        "i": np.array([4, 0, 2]),
        "j": np.array([-1, 0, -3]),
        "zero": np.array(1),
        "keep": np.array([0, -1]),
        "sizes": np.array([2, 3]),
    }
    for name, array in arrays.items():
        if name in node:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    plain, small, _ = pack(ir.from_proto(proto), tmp_path)
    dense.write(packed.read(small), tmp_path / "read.onnx", Options())
    assert np.array_equal(run(tmp_path / "read.onnx"), run(plain))


def test_constants_that_overflow_are_read_without_a_warning(tmp_path, run):
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 18]> g (float[N,4] x) => (float[N,4] y)
        <float[4] w = {0, 1, 2, 3}, float low = {-3e38}> { mask = Mul (w, low) y = Add (x, mask) }"""
    )
    plain, small, _ = pack(ir.from_proto(proto), tmp_path)
    dense.write(packed.read(small), tmp_path / "read.onnx", Options())
    assert np.array_equal(run(tmp_path / "read.onnx"), run(plain))


@pytest.mark.parametrize(
    ("node", "arrays"),
    [
        ("MatMulInteger (left, right)", (np.ones((20000, 1), np.uint8), np.ones((1, 20000), np.uint8))),
        ("MatMul (left, right)", (np.ones((20000, 1), np.int64), np.ones((1, 20000), np.int64))),
    ],
)
def test_products_that_the_writer_does_not_use_are_not_evaluated(tmp_path, make_linear, node, arrays):
    _, small, _ = pack(make_linear(SPREADS["even"]), tmp_path)
    proto = onnx.load(small)
    proto.graph.node.append(onnx.parser.parse_node(f"q = {node}"))
    for name, array in zip(("left", "right"), arrays, strict=True):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    packed.unpack(proto, small)
    assert "q" in {name for kept in proto.graph.node for name in kept.output}


def test_a_value_spread_to_a_huge_shape_is_refused(tmp_path, make_linear):
    _, small, _ = pack(make_linear(SPREADS["even"]), tmp_path)
    proto = onnx.load(small)
    for name, array in (("one", np.float32(1)), ("huge", np.array([1 << 40]))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    proto.graph.node.extend(onnx.parser.parse_node(text) for text in ("q = Expand (one, huge)", "r = Relu (q)"))
    with pytest.raises(IntegrityError, match="Expand 'q' claims"):
        packed.unpack(proto, small)


def test_a_cast_to_text_is_not_evaluated(tmp_path, make_linear):
    _, small, _ = pack(make_linear(SPREADS["even"]), tmp_path)
    proto = onnx.load(small)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(9, np.float32), "nine"))
    proto.graph.node.append(onnx.parser.parse_node("q = Cast <to = 8> (nine)"))
    packed.unpack(proto, small)
    assert "q" in {name for kept in proto.graph.node for name in kept.output}


def test_many_large_claims_are_refused_together(tmp_path, make_linear):
    _, small, _ = pack(make_linear(SPREADS["even"]), tmp_path)
    proto = onnx.load(small)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1 << 24]), "size"))
    for i in range(40):
        proto.graph.node.append(onnx.parser.parse_node(f"q{i} = ConstantOfShape (size)"))
        proto.graph.node.append(onnx.parser.parse_node(f"r{i} = Relu (q{i})"))
    with pytest.raises(IntegrityError, match="brings the memory to"):
        packed.unpack(proto, small)


def test_index_lists_beyond_int32_stay_as_they_are(tmp_path):
    for last in (2**33, 2**31 - 2):
        proto = onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 18]> g (int64[N] x) => (int64[M] y) { y = Add (x, i) }'
        )
        indices = np.linspace(0, last, 40).astype(np.int64)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(indices, "i"))
        plain, small, _ = pack(ir.from_proto(proto), tmp_path)
        assert small.stat().st_size < plain.stat().st_size + 16  # its name
        (read,) = packed.read(small).graph.initializers.values()
        assert np.array_equal(read.const_value.numpy(), indices)


def test_external_data_is_read_from_the_model_s_folder(tmp_path, make_linear, monkeypatch):
    weight = geometric(0.1)
    _, small, _ = pack(make_linear(weight), tmp_path)
    apart = onnx.load(small)
    (tmp_path / "apart").mkdir()
    onnx.save(apart, tmp_path / "apart" / "p.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    monkeypatch.chdir(tmp_path)
    (read,) = packed.read(tmp_path / "apart" / "p.onnx").graph.initializers.values()
    assert np.array_equal(read.const_value.numpy(), weight)


@pytest.mark.parametrize("version", [1, 3])
def test_another_version_is_refused_in_one_sentence(tmp_path, make_lenet, version):
    _, small, _ = pack(make_lenet(), tmp_path)
    proto = onnx.load(small)
    proto.graph.name = f"packed{version}"
    onnx.save(proto, small)
    with pytest.raises(IntegrityError, match=f"packed in version {version}, this program reads 2: pack the network"):
        formats.read(small)


def damaged(path, change):
    proto = onnx.load(path)
    change({node.op_type: node for node in proto.graph.node}, {t.name: t for t in proto.graph.initializer})
    onnx.save(proto, path)


def replaced(tensors, name, array):
    tensors[name].CopyFrom(onnx.numpy_helper.from_array(np.asarray(array), name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, t: replaced(t, n["ConstantOfShape"].input[0], np.array([2**40])), "claims"),
        (lambda n, t: replaced(t, n["ConstantOfShape"].input[0], np.array([-5])), "claims|damaged"),
        (lambda n, t: replaced(t, n["ConstantOfShape"].input[0], np.array([10])), "damaged|out of"),
        (lambda n, t: replaced(t, n["ScatterElements"].input[2], np.zeros(3, np.float32)), "damaged"),
        (lambda n, t: replaced(t, n["Cast"].input[0], np.zeros(0, np.uint8)), "damaged"),
        (lambda n, t: replaced(t, n["Reshape"].input[1], np.array([7, 9])), "damaged"),
        (lambda n, t: t[n["ScatterElements"].input[2]].dims.__setitem__(0, 3), "tensor .*damaged data"),
        (lambda n, t: setattr(t[n["ScatterElements"].input[2]], "data_type", 66), "tensor .*damaged data"),
    ],
)
def test_damaged_streams_are_refused(tmp_path, make_linear, change, message):
    _, small, _ = pack(make_linear(SPREADS["even"]), tmp_path)
    damaged(small, change)
    with pytest.raises(IntegrityError, match=message):
        packed.read(small)


def test_a_chain_of_doublings_is_refused_before_memory_is_taken(tmp_path, make_linear):
    _, small, _ = pack(make_linear(SPREADS["even"]), tmp_path)
    proto = onnx.load(small)
    place = [node.op_type for node in proto.graph.node].index("Cast") + 1
    name = proto.graph.node[place - 1].output[0]
    doublings = []
    for step in range(40):
        doublings.append(onnx.helper.make_node("Concat", [name, name], [f"big{step}"], axis=0))
        name = f"big{step}"
    nodes = [*list(proto.graph.node)[:place], *doublings, *list(proto.graph.node)[place:]]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    onnx.save(proto, small)
    with pytest.raises(IntegrityError, match="claims"):
        packed.read(small)


@pytest.mark.parametrize("density", [0.02, 0.3, 0.9])
def test_index_lists_are_stored_as_positions(tmp_path, run, optimised_ops, density):
    kept = np.flatnonzero(np.random.default_rng(3).random(800) < density)
    kept = kept if kept.size >= 32 else np.arange(1, 800, 20)
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 18]> g (float[N,800] x) => (float[N,{kept.size}] y) '
        "{ a = Gather <axis = 1> (x, kept) y = Relu (a) }"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(kept, "kept"))
    plain, small, _ = pack(ir.from_proto(proto), tmp_path)
    assert optimised_ops(small) == optimised_ops(plain)
    assert np.array_equal(run(small), run(plain))
    assert small.stat().st_size < plain.stat().st_size / 1.3
    (read,) = packed.read(small).graph.initializers.values()
    assert np.array_equal(read.const_value.numpy(), kept)


def test_what_the_runtime_would_not_fold_stays_dense(tmp_path, make_linear, monkeypatch):
    monkeypatch.setattr(packed, "_LARGEST", 4 * 64 * 64 - 1)
    artifact = packed.write(make_linear(geometric(0.1, 64 * 64)), tmp_path / "p.onnx", Options())
    assert artifact.notes == ("w stays dense: ONNX Runtime folds no value above 1 GiB at its default settings",)


def test_no_format_imports_torch():
    script = "import sys, relief_export.formats; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
