import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from relief_export import formats
from relief_export.errors import IntegrityError, UnsupportedModelError
from relief_export.formats import VALUES, Options, blocks, dense, packed, positions

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


BY_CODE = {
    "u4": spaced(np.random.default_rng(2).integers(8, 15, 9000), 64 * 1000),
    "u8": spaced(np.random.default_rng(2).integers(60, 250, 500), 64 * 1000),
    "u16": spaced(np.random.default_rng(2).integers(1500, 9000, 100), 64 * 2000),
    "rice": geometric(0.05, 64 * 2000),
    "bitmap": geometric(0.4),
}


def pack(model, tmp_path, values="f32"):
    dense.write(model, tmp_path / "dense.onnx", Options())
    artifact = packed.write(model, tmp_path / "packed.onnx", Options(), values=values)
    return tmp_path / "dense.onnx", tmp_path / "packed.onnx", artifact


def ops(path):
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("code", BY_CODE)
def test_every_position_code_is_folded_and_exact(tmp_path, make_linear, run, optimised_ops, code):
    weight = BY_CODE[code]
    assert positions.choose(np.flatnonzero(weight), weight.size).name == code
    plain, small, _ = pack(make_linear(weight), tmp_path)
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


@pytest.mark.parametrize(
    ("values", "bound"), [("f16", 2.0**-11), ("int8", 1 / 127), ("codebook256", 0.1), ("codebook16", 0.5)]
)
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
    assert "MaxUnpool" in ops(small)
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


@pytest.mark.parametrize(("density", "op"), [(0.2, "Gather"), (0.02, "ScatterND")])
def test_whole_kernels_share_a_position(tmp_path, make_conv, run, density, op):
    weight = by_kernel(density)
    plain, small, artifact = pack(make_conv(weight), tmp_path)
    kernels = np.count_nonzero(weight.any(axis=(2, 3)))
    assert artifact.bytes < kernels * 37 + 600
    assert {"Gather", "ScatterND"} & ops(small) == {op}
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


def test_int8_weights_that_need_no_scale_are_float32_again(tmp_path, make_linear, run, optimised_ops):
    weight = np.rint(geometric(0.2, 64 * 2048) * 30).clip(-127, 127)
    weight[:, 0] = 127  # of each output channel, so that every scale is 1
    plain, small, _ = pack(make_linear(weight.astype(np.float32)), tmp_path, "int8")
    assert "Mul" not in ops(small)
    assert optimised_ops(small) == optimised_ops(plain)
    assert np.array_equal(run(small), run(plain))


@pytest.mark.parametrize("opset", range(13, 22))
@pytest.mark.parametrize("code", ["rice", "bitmap", "u4"])
def test_every_opset_is_decoded(tmp_path, make_linear, run, optimised_ops, code, opset):  # noqa: PLR0917  # fixtures
    plain, small, _ = pack(make_linear(BY_CODE[code], opset=opset), tmp_path)
    assert ("BitwiseAnd" in ops(small)) == (opset >= 18 and code != "u4")
    assert optimised_ops(small) == optimised_ops(plain)
    assert np.array_equal(run(small), run(plain))


@pytest.mark.parametrize("values", VALUES)
def test_weights_of_several_blocks_are_those_of_one(tmp_path, monkeypatch, make_linear, values):
    model = make_linear(geometric(0.2, 64 * 9000))
    packed.write(model, tmp_path / "one.onnx", Options(), values=values)
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    packed.write(model, tmp_path / "many.onnx", Options(), values=values)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "many.onnx").read_bytes()


def test_a_codebook_that_holds_every_value_stays_exact(tmp_path, make_linear):
    levels = np.arange(1, 17, dtype=np.float32) / 16
    weight = np.where(geometric(0.3, 64 * 9000) != 0, np.resize(levels, 64 * 9000).reshape(-1, 64), np.float32(0))
    _, small, _ = pack(make_linear(weight.astype(np.float32)), tmp_path, "codebook16")
    (read,) = packed.read(small).graph.initializers.values()
    assert np.array_equal(read.const_value.numpy(), weight)


@pytest.mark.parametrize("values", ["f16", "int8", "codebook16"])
def test_fillers_spare_large_weights_the_escapes(tmp_path, make_linear, run, values):
    weight = geometric(0.2, 64 * 9000)
    _, small, _ = pack(make_linear(weight), tmp_path, values)
    (read,) = packed.read(small).graph.initializers.values()
    decoded = read.const_value.numpy()
    assert np.array_equal(decoded != 0, weight != 0)
    assert np.square(decoded - weight).sum() < 0.02 * np.square(weight).sum()
    assert "Compress" not in ops(small)
    assert ("ScatterElements" if values == "int8" else "MaxUnpool") in ops(small)
    assert run(small) == pytest.approx(run(small, optimise=False), abs=1e-4)
    _, sparse, _ = pack(make_linear(geometric(0.12, 64 * 9000)), tmp_path, values)
    assert "Compress" in ops(sparse)
    assert run(sparse) == pytest.approx(run(sparse, optimise=False), abs=1e-4)


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


def test_the_container_of_a_small_network_is_about_a_kilobyte(tmp_path, make_lenet):
    for values in VALUES:
        _, small, artifact = pack(make_lenet(0.95), tmp_path, values)
        streams = sum(
            len(tensor.raw_data) for tensor in onnx.load(small).graph.initializer if len(tensor.raw_data) > 60
        )
        assert artifact.bytes - streams < 1700


RELIEVED = {
    "narrow": ((6, 16, 60), (0.6, 0.4, 0.12, 0.5), False, 1560),
    "narrower": ((6, 16, 40), (0.8, 0.5, 0.2, 0.6), False, 1500),
    "wide": ((8, 20, 100), (0.5, 0.2, 0.06, 0.35), False, 1500),
    "sparse": ((10, 30, 150), (0.3, 0.08, 0.02, 0.2), False, 1500),
    "kernels": ((4, 8, 60), (0.9, 0.5, 0.15, 0.4), True, 1500),
    "more kernels": ((5, 12, 80), (0.9, 0.5, 0.08, 0.3), True, 1550),
}
"""LeNet-5 (20-50-500) after it has lost most of its units: widths, density by layer, whether by kernel, most
bytes above the bound."""


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
    widths, densities, kernels, above = RELIEVED[case]
    model = relieved_lenet(widths, densities, kernels=kernels)
    plain, small, artifact = pack(model, tmp_path, "codebook16")
    total = formats.ledger(model).total
    assert 1500 < total.nonzeros < 5000
    assert artifact.bytes <= total.bound["codebook16"] + above
    assert optimised_ops(small) == optimised_ops(plain)
    assert run(small) == pytest.approx(run(small, optimise=False), abs=1e-5)
    dense.write(packed.read(small), tmp_path / "read.onnx", Options())
    assert np.array_equal(run(tmp_path / "read.onnx"), run(small))


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
        ("MatMulInteger (a, b)", (np.ones((20000, 1), np.uint8), np.ones((1, 20000), np.uint8))),
        ("MatMul (a, b)", (np.ones((20000, 1), np.int64), np.ones((1, 20000), np.int64))),
    ],
)
def test_products_that_the_writer_does_not_use_are_not_evaluated(tmp_path, make_linear, node, arrays):
    _, small, _ = pack(make_linear(BY_CODE["u8"]), tmp_path)
    proto = onnx.load(small)
    proto.graph.node.append(onnx.parser.parse_node(f"q = {node}"))
    for name, array in zip("ab", arrays, strict=True):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    packed.unpack(proto, small)
    assert "q" in {name for kept in proto.graph.node for name in kept.output}


def test_many_large_claims_are_refused_together(tmp_path, make_linear):
    _, small, _ = pack(make_linear(BY_CODE["u8"]), tmp_path)
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


def test_a_newer_version_is_refused(tmp_path, make_lenet):
    _, small, _ = pack(make_lenet(), tmp_path)
    proto = onnx.load(small)
    proto.graph.name = "packed2"
    onnx.save(proto, small)
    with pytest.raises(IntegrityError, match="packed in version 'packed2'"):
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
        (lambda n, t: replaced(t, n["ConstantOfShape"].input[0], np.array([10])), "not ascending within"),
        (lambda n, t: replaced(t, n["ScatterElements"].input[2], np.zeros(3, np.float32)), "differ in number"),
        (lambda n, t: replaced(t, n["Cast"].input[0], np.zeros(0, np.uint8)), "damaged"),
        (lambda n, t: replaced(t, n["Reshape"].input[1], np.array([7, 9])), "damaged"),
        (lambda n, t: t[n["ScatterElements"].input[2]].dims.__setitem__(0, 3), "tensor .*damaged data"),
        (lambda n, t: setattr(t[n["ScatterElements"].input[2]], "data_type", 66), "tensor .*damaged data"),
    ],
)
def test_damaged_streams_are_refused(tmp_path, make_linear, change, message):
    _, small, _ = pack(make_linear(BY_CODE["u8"]), tmp_path)
    damaged(small, change)
    with pytest.raises(IntegrityError, match=message):
        packed.read(small)


def test_a_chain_of_doublings_is_refused_before_memory_is_taken(tmp_path, make_linear):
    _, small, _ = pack(make_linear(BY_CODE["u8"]), tmp_path)
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
