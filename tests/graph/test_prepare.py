"""What a model states that is not so, what it leaves out, and what libraries say about it on the way."""

# ruff: noqa: E501 - small graphs stay on one line

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from relief_export.errors import InputError, UnsupportedModelError
from relief_export.graph.arena import plan_arena
from relief_export.graph.cost import cost
from relief_export.graph.prepare import fold, simplify, with_dimensions
from relief_export.graph.shrink import shrink
from tests.graph.helpers import arrays_of, assert_same, build, interface, random_feeds, run

RELATIVE = 1e-5  # of the output's scale


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def half_dead(*shape: int) -> np.ndarray:
    weight = normal(*shape)
    weight[::2] = 0
    return weight


# Stated shapes that are wrong ------------------------------------------------------------------------------------------

VIEW = """g (float[n, 3, 4, w] x) => (float[k, l, m] y) { c = Conv(x, w1) r = Relu(c) s = Shape(r) b = Gather(s, i0)
    q = Gather(s, i3) b1 = Unsqueeze(b, ax) q1 = Unsqueeze(q, ax) t = Concat<axis=0>(b1, q1, m1) y = Reshape(r, t) }"""
STATED = {
    "output of another rank": ("y", [1, "L"]),
    "output of batch 1": ("y", [1, 6, 32]),
    "batch 1 inside": ("r", [1, 8, 4, 6]),
    "batch 1 further inside": ("c", [1, 8, 4, 6]),
}


@pytest.mark.parametrize("kind", STATED)
def test_only_what_follows_from_the_inputs_is_believed(kind):
    arrays = {
        "w1": half_dead(8, 3, 1, 1),
        "i0": np.array(0),
        "i3": np.array(3),
        "ax": np.array([0]),
        "m1": np.array([-1]),
    }
    model = build(VIEW, arrays)
    name, shape = STATED[kind]
    value = next(v for node in model.graph for v in node.outputs if v.name == name)
    value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
    x = normal(4, 3, 4, 6)
    (right,) = run(model, {"x": x})  # without optimisations: the runtime's own believe what is stated
    for found in (shrink(model).model, fold(model), shrink(fold(model)).model):
        assert np.array_equal(run(found, {"x": x})[0], right)
        assert interface(found) == interface(model)


def test_a_length_inside_a_loop_is_not_believed():
    """The body states one row, and gets one more with every turn."""
    text = """g (float[1, 3] x, int64 turns) => (float[k, 2] y) { z = Loop(turns, , x) <body = b (int64 i, bool on, float[1, 3] s) =>
        (bool go, float[1, 3] t) { go = Identity(on) l = Shape<end=1>(s) m = Expand(one, l) f = Unsqueeze(m, ax) h = Expand(f, three)
        t = Concat<axis=0>(s, h) }> y = MatMul(z, w) }"""
    arrays = {"one": np.ones(1, np.float32), "ax": np.array([1]), "three": np.array([1, 3]), "w": half_dead(3, 2)}
    model = build(text, arrays)
    feeds = {"x": normal(1, 3), "turns": np.array(3)}
    (right,) = run(model, feeds)
    assert len(right) == 8
    for found in (shrink(model).model, fold(model)):
        assert np.allclose(run(found, feeds)[0], right, rtol=RELATIVE)


@pytest.mark.parametrize("where", ["output", "input"])
def test_inputs_and_outputs_without_a_shape(where):
    text = "g (float[n, 7] x) => (float[n, 3] y) { h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2) }"
    text = text.replace(
        "float[n, 3] y" if where == "output" else "float[n, 7] x",
        "float[n, 3] y" if where == "output" else "float[n, 7] x",
    )
    model = build(text, {"w1": np.ascontiguousarray(half_dead(6, 7).T), "w2": normal(6, 3)}, domain="unchecked")
    value = (model.graph.outputs if where == "output" else model.graph.inputs)[0]
    value.shape = None
    result = shrink(model).model
    assert_same(model, result, {"x": normal(2, 7)}, relative=RELATIVE)
    assert arrays_of(result)["w1"].shape == ((7, 3) if where == "output" else (7, 6))
    found = (result.graph.outputs if where == "output" else result.graph.inputs)[0]
    assert found.shape is None
    assert bool(cost(model).unknown) == (where == "input")


# What is written of it -------------------------------------------------------------------------------------------------


def test_values_are_described_where_they_were():
    """Two hundred layers whose values nobody described stay as many bytes as they were."""
    chain = " ".join(f"block_{k + 1}_output = {'Relu' if k % 2 else 'Neg'}(block_{k}_output)" for k in range(200))
    text = (
        f"g (float[1, 8] block_0_output) => (float[1, 8] block_200_output) <float[1, 8] block_7_output> {{ {chain} }}"
    )
    model = build(text)
    for found in (shrink(model).model, fold(model)):
        proto = ir.to_proto(found)
        assert [value.name for value in proto.graph.value_info] == ["block_7_output"]
        assert proto.ByteSize() <= ir.to_proto(model).ByteSize()


def test_a_description_follows_what_is_cut():
    text = """g (float[n, 7] x) => (float[n, 3] y) <float[n, 6] h, float[4, 6] r> { h = Gemm<transB=1>(x, w1) r = Relu(h)
        y = Gemm<transB=1>(r, w2) }"""
    model = build(text, {"w1": half_dead(6, 7), "w2": normal(3, 6)})
    found = {v.name: v for v in ir.to_proto(shrink(model).model).graph.value_info}
    found = {n: v for n, v in found.items() if n in "hr"}  # the constants have types of their own
    lengths = {n: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for n, v in found.items()}
    assert lengths == {"h": ["n", 3], "r": ["n", 3]}


def test_libraries_say_nothing(caplog, capfd):
    """A shape that disagrees, a node that cannot be folded, a value of unknown type."""
    text = "g (float[n, 4] x) => (float[n, 4] y) { r = Relu(x) a, b = Split<axis=0, num_outputs=2>(k) s = Add(r, a) y = Reshape(s, t) }"
    model = build(text, {"t": np.array([0, 2, 2]), "k": normal(2, 4)}, domain="unchecked")
    shrink(model)
    fold(model)
    cost(model)
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_slice_with_a_bound_that_is_a_single_number():
    """A number where the standard wants a list: ONNX Runtime loads it, and only running it fails."""
    text = "g (float[n, 7] x) => (float[n, 3] y) { h = Gemm<transB=1>(x, w1) s = Slice(h, from, to, axis) y = Gemm<transB=1>(s, w2) }"
    arrays = {
        "w1": half_dead(6, 7),
        "w2": normal(3, 3),
        "from": np.array([2]),
        "to": np.array(5),
        "axis": np.array([1]),
    }
    found = arrays_of(shrink(build(text, arrays, domain="unchecked")).model)
    assert (found["w1"].shape, found["w2"].shape) == ((1, 7), (3, 1))  # of channels 2, 3, 4 only 3 is alive


# Old opsets ------------------------------------------------------------------------------------------------------------


def old(nodes: list[onnx.NodeProto], arrays: dict[str, np.ndarray], opset: int, outputs: list) -> ir.Model:
    given = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 6, 6])]
    results = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, outputs)]
    constants = [numpy_helper.from_array(a, n) for n, a in arrays.items()]
    graph = helper.make_graph(nodes, "old", given, results, constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=4)
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


@pytest.mark.parametrize("opset", [7, 9, 11, 12])
def test_old_opsets_are_converted(opset):
    node = helper.make_node
    bounds = {"min": -0.5, "max": 0.9} if opset < 11 else {}
    clip = [node("Clip", ["c"], ["k"], **bounds)] if opset < 11 else [node("Clip", ["c", "low", "high"], ["k"])]
    nodes = [
        node("Conv", ["x", "conv.weight", "conv.bias"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        *clip,
        node("BatchNormalization", ["k", "g", "g", "g", "g"], ["b"]),
        node("ReduceMean", ["b"], ["p"], axes=[2, 3], keepdims=0),
        node("Unsqueeze", ["p"], ["u"], axes=[2]),
        node("Squeeze", ["u"], ["q"], axes=[2]),
        node("Gemm", ["q", "fc.weight", "fc.bias"], ["z"], transB=1),
        node("Softmax", ["z"], ["y"]),
    ]
    arrays = {"conv.weight": half_dead(8, 3, 3, 3), "conv.bias": normal(8), "g": np.abs(normal(8)) + 1}
    arrays |= {"fc.weight": normal(4, 8), "fc.bias": normal(4)}
    arrays |= {"low": np.float32(-0.5), "high": np.float32(0.9)} if opset >= 11 else {}
    model = old(nodes, {k: np.asarray(a) for k, a in arrays.items()}, opset, ["n", 4])
    result = shrink(model, strict=True)
    assert arrays_of(result.model)["conv.weight"].shape == (4, 3, 3, 3)
    assert (model.opset_imports[""], result.model.opset_imports[""]) == (opset, 13)
    assert_same(model, result.model, random_feeds(model), relative=RELATIVE)
    assert interface(result.model) == interface(model)
    assert cost(model).macs.structural == 8 * 3 * 9 * 36 + 8 * 4


# Operator, opset, further inputs, attributes. onnx's converter passes all of them on as they are.
MEANT_OTHERWISE = {
    "Upsample 7": ("Upsample", 7, {}, {"mode": "linear", "scales": [1.0, 1.0, 1.5, 2.0]}),
    "Upsample 9": ("Upsample", 9, {"s": np.float32([1, 1, 2, 3])}, {"mode": "linear"}),
    "Upsample 9, nearest": ("Upsample", 9, {"s": np.float32([1, 1, 1.5, 2.4])}, {"mode": "nearest"}),
    "Resize 10": ("Resize", 10, {"s": np.float32([1, 1, 2, 0.5])}, {"mode": "linear"}),
    "Resize 10, nearest, larger": ("Resize", 10, {"s": np.float32([1, 1, 1.5, 2.4])}, {"mode": "nearest"}),
    "Resize 10, nearest, smaller": ("Resize", 10, {"s": np.float32([1, 1, 0.6, 0.7])}, {"mode": "nearest"}),
    "Hardmax 9": ("Hardmax", 9, {}, {}),
    "Hardmax 12": ("Hardmax", 12, {}, {"axis": 2}),
}


@pytest.mark.parametrize("kind", MEANT_OTHERWISE)
def test_what_an_operator_meant_in_an_old_opset_is_kept(kind):
    op, opset, more, attributes = MEANT_OTHERWISE[kind]
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node(op, ["c", *more], ["y"], **attributes)]
    model = old(nodes, {"w": half_dead(8, 3, 1, 1), **more}, opset, ["n", "c", "h", "w"])
    feeds, converted = random_feeds(model), simplify(model)
    assert converted.opset_imports[""] == 13
    for found in (converted, shrink(model).model, fold(model)):
        assert_same(model, found, feeds, relative=RELATIVE)


@pytest.mark.parametrize("kind", ["sizes", "sizes that a caller gives", "scales"])
def test_resize_says_how_in_one_way(kind):
    """In opset 11 sizes came beside empty scales, and empty sizes beside scales; today a runtime refuses both."""
    empty, sizes = np.zeros(0, np.float32), np.array([3, 8, 9, 7])
    arrays = {"w": half_dead(8, 3, 1, 1), "r": empty, "s": empty}
    arrays |= {"sizes": {"z": sizes}, "scales": {"s": np.float32([1, 1, 2, 2])}}.get(kind, {})
    inputs = ["c", "r", "s"] if kind == "scales" else ["c", "r", "s", "z"]
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Resize", inputs, ["y"], mode="linear")]
    stored = {k: a for k, a in arrays.items() if k in inputs or k == "w"}
    given = {} if kind != "sizes that a caller gives" else {"s": empty, "z": sizes}
    model = old(nodes, stored | given, 11, ["n", "c", "h", "w"])
    for name in given:
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)
    feeds = random_feeds(model) | given
    for found in (simplify(model), shrink(model).model):
        assert {v.name for v in found.graph.inputs} == set(feeds)
        assert_same(model, found, feeds, relative=RELATIVE)


@pytest.mark.parametrize(
    ("op", "opset", "inputs", "sentence"),
    [
        ("Scan", 8, ["", "s", "x"], "Scan went over a batch"),
        ("Resize", 10, ["x", "s"], "nearest pixel of resized depends on the direction"),
    ],
)
def test_what_cannot_be_said_in_a_newer_opset_is_refused(op, opset, inputs, sentence):
    body = onnx.parser.parse_graph(
        "b (float[3] s, float[3] x) => (float[3] t, float[3] y) { t = Add(s, x) y = Neg(t) }"
    )
    scan = {"body": body, "num_scan_inputs": 1} if op == "Scan" else {}
    outputs = ["t", "y"] if op == "Scan" else ["y"]
    node = helper.make_node(op, inputs, outputs, name="resized", **scan)
    scales = np.zeros((2, 3), np.float32) if op == "Scan" else np.float32([1, 1, 2, 0.5])
    proto = helper.make_model(
        helper.make_graph(
            [node],
            "old",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 4, 3] if op == "Scan" else [1, 3, 6, 6])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
            [numpy_helper.from_array(scales, "s")],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=4,
    )
    with pytest.raises(UnsupportedModelError, match=sentence):
        shrink(ir.from_proto(proto))


def test_an_opset_that_cannot_be_converted_is_refused():
    model = build("g (float[n, 7] x) => (float[n, 7] y) { h = Warp(x) y = Relu(h) }", opset=12, domain="unchecked")
    with pytest.raises(UnsupportedModelError, match="opset 12, and onnx's version converter cannot bring it to 13"):
        shrink(model)
    model.opset_imports["ai.onnx"] = model.opset_imports.pop("")  # the same domain
    with pytest.raises(UnsupportedModelError, match="opset 12"):
        shrink(model)


# Folding ---------------------------------------------------------------------------------------------------------------


def test_batch_norm_that_would_overflow_its_type_stays():
    arrays = {"w": 300 * normal(4, 3, 1, 1), "g": np.full(4, 900), "b": np.zeros(4), "m": np.zeros(4), "v": np.ones(4)}
    text = (
        "g (float16[n, 3, 4, 4] x) => (float16[n, 4, 4, 4] y) { c = Conv(x, w) y = BatchNormalization(c, g, b, m, v) }"
    )
    model = build(text, {name: array.astype(np.float16) for name, array in arrays.items()})
    assert [node.op_type for node in fold(model).graph] == ["Conv", "BatchNormalization"]
    assert not shrink(fold(model)).modified


def test_a_mask_of_truth_values_is_multiplied_in():
    mask = np.arange(12).reshape(4, 3) % 2 == 0
    text = "g (float[n, 3] x) => (float[n, 4] y) { f = Cast<to=1>(k) m = Mul(w, f) y = Gemm<transB=1>(x, m) }"
    folded = fold(build(text, {"w": normal(4, 3), "k": mask}))
    assert [node.op_type for node in folded.graph] == ["Gemm"]
    assert np.array_equal(*arrays_of(folded).values(), normal(4, 3) * mask)


def test_an_operator_that_the_folder_stumbles_over_stays():
    """A number of parts that is given at run time."""
    text = """g (float[2, 6] x, int64 n) => (float[a, b] y) { s = SplitToSequence<axis=1>(x, n) r = SequenceAt(s, zero)
        c = Concat<axis=0>(r, one) y = Relu(c) }"""
    model = build(text, {"zero": np.array(0), "one": np.ones((1, 2), np.float32)})
    feeds = {"x": normal(2, 6), "n": np.array(2)}
    assert_same(model, fold(model), feeds, relative=0.0)
    assert_same(model, shrink(model).model, feeds, relative=0.0)


# Sizes that are given --------------------------------------------------------------------------------------------------

SIZED = "g (float[n, 3, H, W] x) => (float[n, 4, H, a] y) { y = Conv<pads=[1, 1, 1, 1]>(x, w) }"


def test_dimensions_are_set_by_name_or_by_axis():
    model = build(SIZED, {"w": normal(4, 3, 3, 3)})
    assert cost(model).unknown
    with pytest.raises(UnsupportedModelError, match="no known size"):
        plan_arena(model)
    for sizes in ({"H": 5, "W": 6}, {"x[2]": 5, "x[3]": 6}):
        static = with_dimensions(model, sizes)
        assert cost(static).macs.structural == 4 * 3 * 9 * 5 * 6
        assert plan_arena(static).lower_bound >= 4 * (3 + 4) * 30
        assert [str(v.shape) for v in (*static.graph.inputs, *static.graph.outputs)] == ["[n,3,5,6]", "[n,4,5,a]"]
        assert run(static, {"x": normal(2, 3, 5, 6)})[0].shape == (2, 4, 5, 6)
    assert interface(model)[0][2] == "[n,3,H,W]"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"D": 4}, r"no input has a dimension D: there are H, W, n, x\[0\]"),
        ({"H": 0}, "H = 0 is no length"),
        ({"x[1]": 4}, r"x\[1\] is 3 in the model"),
    ],
)
def test_dimensions_that_cannot_be_set(sizes, message):
    with pytest.raises(InputError, match=message):
        with_dimensions(build(SIZED, {"w": normal(4, 3, 3, 3)}), sizes)


def test_group_normalisation_keeps_its_shape():
    text = """g (float[1, 3, 8, 8] x) => (float[1, 4, h, k] y) { c = Conv(x, w) d = GroupNormalization<num_groups=2>(c, s, s)
        e = Relu(d) y = Conv(e, v) }"""
    model = build(text, {"w": normal(8, 3, 1, 1), "s": normal(8), "v": normal(4, 8, 1, 1)}, opset=21)
    assert cost(model).macs.structural == 64 * (3 * 8 + 8 * 4)
    assert not cost(model).unknown
    assert plan_arena(model).bytes == 2 * 4 * 8 * 64
    assert [node.op_type for node in simplify(model).graph] == ["Conv", "GroupNormalization", "Relu", "Conv"]
