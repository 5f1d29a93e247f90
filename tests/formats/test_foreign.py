"""Models of other programs: types, shapes and operators that ours never write."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from relief_export import conversion, formats
from relief_export.errors import InputError, UnsupportedModelError
from relief_export.formats import FORMATS, Options
from relief_export.graph.cost import cost

X = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
WEIGHT = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
WRITTEN = {"dense": "m.onnx", "sparse": "s.onnx", "packed": "p.onnx", "csr": "csr"}
"""Formats that need nothing of the runtime but its answer."""


def run(path, feeds):
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"]).run(None, feeds)


def build(nodes, inputs, outputs, tensors, domains=(), **graph):
    made = helper.make_graph(
        nodes, "g", inputs, outputs, [numpy_helper.from_array(a, n) for n, a in tensors.items()], **graph
    )
    imports = [helper.make_opsetid("", 17), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(made, opset_imports=imports, ir_version=8)


def everywhere(source, folder):
    """Convert ``source`` to every format and shrink it; return the files that a runtime loads."""
    for kind, name in WRITTEN.items():
        conversion.convert_file(source, folder / name, kind)
    conversion.shrink_file(source, folder / "shrunk.onnx")
    conversion.convert_file(folder / "csr", folder / "rebuilt.onnx", "dense")
    return [folder / name for name in ("m.onnx", "s.onnx", "p.onnx", "shrunk.onnx", "rebuilt.onnx")]


def classifier(kind):
    """Return what converters of scikit-learn write: a linear model whose probabilities are a list of dictionaries."""
    out = helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", 3])
    if kind == "sequence of maps":
        out.ClearField("type")
        found = out.type.sequence_type.elem_type.map_type
        found.key_type, found.value_type.tensor_type.elem_type = TensorProto.INT64, TensorProto.FLOAT
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["z"]),
        helper.make_node("Softmax", ["z"], ["s"]),
        helper.make_node("ZipMap", ["s"], ["p"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2])
        if kind == "sequence of maps"
        else helper.make_node("SequenceConstruct", ["s", "z"], ["p"]),
    ]
    if kind == "sequence":
        out = helper.make_tensor_sequence_value_info("p", TensorProto.FLOAT, None)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
    return build(nodes, [x], [out], {"w": WEIGHT}, ["ai.onnx.ml"])


@pytest.mark.parametrize("kind", ["sequence of maps", "sequence"])
def test_outputs_that_are_no_tensors_keep_their_type_and_value(tmp_path, kind):
    proto = classifier(kind)
    onnx.save(proto, tmp_path / "source.onnx")
    expected = run(tmp_path / "source.onnx", {"x": X})[0]
    for path in everywhere(tmp_path / "source.onnx", tmp_path):
        assert onnx.load(path).graph.output[0].type == proto.graph.output[0].type
        got = run(path, {"x": X})[0]
        if kind == "sequence":
            assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
        else:
            assert got == expected
    loaded = formats.read(tmp_path / "source.onnx")
    assert cost(loaded).macs.structural == WEIGHT.size


@pytest.mark.parametrize("missing", ["input", "output", "both", "value_info"])
def test_values_without_a_shape_are_legal(tmp_path, missing):
    value = helper.make_tensor_value_info
    x = value("x", TensorProto.FLOAT, None if missing in {"input", "both"} else ["N", 4])
    y = value("y", TensorProto.FLOAT, None if missing in {"output", "both"} else ["N", 3])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("Relu", ["z"], ["y"])]
    inner = [value("z", TensorProto.FLOAT, None)] if missing == "value_info" else []
    proto = build(nodes, [x], [y], {"w": WEIGHT}, value_info=inner)
    onnx.save(proto, tmp_path / "source.onnx")
    for path in everywhere(tmp_path / "source.onnx", tmp_path):
        assert np.array_equal(run(path, {"x": X})[0], run(tmp_path / "source.onnx", {"x": X})[0])
    onnx.save(proto, tmp_path / "beside.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert np.array_equal(formats.read(tmp_path / "beside.onnx").graph.initializers["w"].const_value.numpy(), WEIGHT)


def test_operators_of_ones_own_are_converted_without_the_runtime(tmp_path):
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("Magic", ["z"], ["y"], domain="mine")]
    shapes = [value("x", TensorProto.FLOAT, ["N", 4])], [value("y", TensorProto.FLOAT, None)]
    source = tmp_path / "source.onnx"
    onnx.save(build(nodes, *shapes, {"w": WEIGHT}, ["mine"]), source)
    for path in everywhere(source, tmp_path):
        assert [node.op_type for node in formats.read(path).graph] == ["MatMul", "Magic"]
    np.savez(tmp_path / "x.npz", x=X)
    for kind, name in (("int8", "i.onnx"), ("packed-int8", "j.onnx"), ("ort", "m.ort")):
        samples = None if kind == "ort" else tmp_path / "x.npz"
        with pytest.raises(UnsupportedModelError, match=r"load the source: .*source\.onnx has operator mine:Magic"):
            conversion.convert_file(source, tmp_path / name, kind, calibration=samples)
    written = conversion.convert_file(source, tmp_path / "again.onnx", "dense")
    assert "source.onnx has operator mine:Magic" in written.notes[-1]
    assert not conversion.convert_file(source, tmp_path / "again.onnx", "dense", verify=False).notes


def test_what_only_the_result_does_not_load_is_still_refused(tmp_path, monkeypatch):
    value = helper.make_tensor_value_info
    shapes = [value("x", TensorProto.FLOAT, ["N", 4])], [value("y", TensorProto.FLOAT, ["N", 3])]
    onnx.save(build([helper.make_node("MatMul", ["x", "w"], ["y"])], *shapes, {"w": WEIGHT}), tmp_path / "source.onnx")

    def refuse(*_, **__):
        raise UnsupportedModelError("ONNX Runtime cannot load it")

    monkeypatch.setitem(FORMATS, "dense", replace(FORMATS["dense"], write=refuse))
    with pytest.raises(UnsupportedModelError, match="cannot load it"):
        conversion.convert_file(tmp_path / "source.onnx", tmp_path / "m.onnx", "dense")
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("kind", ["dense", "sparse", "packed", "csr", "ort"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "uint8"])
@pytest.mark.parametrize("zeros", [0, 0.9])
def test_weights_that_are_stored_narrow_stay_narrow(tmp_path, dtype, kind, zeros):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(96, 96)) * (rng.random((96, 96)) >= zeros)
    code = getattr(TensorProto, dtype.upper())
    stored = np.abs(np.rint(20 * weight)).astype(int) if "int" in dtype else weight
    tensor = helper.make_tensor("w", code, weight.shape, stored.ravel().tolist())
    nodes = [
        helper.make_node("Cast", ["w"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["c", "scale"], ["v"]),
        helper.make_node("MatMul", ["x", "v"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    shapes = [value("x", TensorProto.FLOAT, ["N", 96])], [value("y", TensorProto.FLOAT, ["N", 96])]
    proto = build(nodes, *shapes, {"scale": np.float32(0.05)})
    proto.graph.initializer.append(tensor)
    raw = numpy_helper.from_array(numpy_helper.to_array(tensor), "w")
    proto.graph.initializer[1].CopyFrom(raw)
    onnx.save(proto, tmp_path / "source.onnx")
    source, path = tmp_path / "source.onnx", tmp_path / FORMATS[kind].suffix
    artifact = FORMATS[kind].write(formats.read(source), path, Options())
    if not (kind == "ort" and "float" in dtype):  # which ONNX Runtime widens as it saves
        container = 3000 if kind in {"csr", "ort"} else 60
        assert artifact.bytes <= source.stat().st_size + container
    if kind == "csr":
        FORMATS["dense"].write(formats.read(path), tmp_path / "rebuilt.onnx", Options())
        path = tmp_path / "rebuilt.onnx"
    x = rng.normal(size=(5, 96)).astype(np.float32)
    got, expected = run(path, {"x": x})[0], run(source, {"x": x})[0]
    if kind == "ort":  # the runtime multiplies by constants that it folded in another order
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    else:
        assert np.array_equal(got, expected)


SCALED = """<ir_version: 8, opset_import: ["": 17]> g (float t, float[%s,4] x) => (float[M,3] y)
<float[4,3] w = {1,-2,3,4,-5,6,7,-8,9,10,-11,12}> { a = Mul (x, t) y = MatMul (a, w) }"""


@pytest.mark.parametrize("batch", ["N", "2"])
@pytest.mark.parametrize("t", [np.float32(2), np.linspace(1, 2, 6, dtype=np.float32)], ids=["one", "one a sample"])
@pytest.mark.parametrize("kind", ["int8", "packed-int8"])
def test_an_input_that_is_a_single_number_is_calibrated(tmp_path, batch, t, kind):
    onnx.save(onnx.parser.parse_model(SCALED % batch), tmp_path / "source.onnx")
    np.savez(tmp_path / "x.npz", x=X.astype(np.float64), t=t)
    conversion.convert_file(tmp_path / "source.onnx", tmp_path / "m.onnx", kind, calibration=tmp_path / "x.npz")
    feeds = {"x": X[:2], "t": np.asarray(t.ravel()[0])}
    got, expected = (run(tmp_path / name, feeds)[0] for name in ("m.onnx", "source.onnx"))
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, r"lack an array for input \['t'\]"),
        ({"x": np.float32(1), "t": np.float32(1)}, "'x' are a single number"),
        ({"x": X[:1], "t": np.float32(1)}, "'x' takes 2 calibration samples at a time, there are 1"),
    ],
)
def test_samples_that_cannot_be_fed_are_refused(tmp_path, arrays, message):
    onnx.save(onnx.parser.parse_model(SCALED % "2"), tmp_path / "source.onnx")
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=message):
        conversion.convert_file(tmp_path / "source.onnx", tmp_path / "m.onnx", "int8", calibration=tmp_path / "x.npz")


def test_a_model_of_text_is_converted_and_says_what_it_is_not(tmp_path, recwarn):
    value = helper.make_tensor_value_info
    text = [value("x", TensorProto.STRING, [5])], [value("y", TensorProto.STRING, [5])]
    # The default of old runtimes is a locale that not every system has.
    node = helper.make_node("StringNormalizer", ["x"], ["y"], locale="C")
    onnx.save(build([node], *text, {}), tmp_path / "source.onnx")
    words = np.array(list("abcde"))
    for path in everywhere(tmp_path / "source.onnx", tmp_path):
        assert run(path, {"x": words})[0].tolist() == list("abcde")
    np.savez(tmp_path / "x.npz", x=words)
    done = conversion.convert_file(
        tmp_path / "source.onnx", tmp_path / "i.onnx", "int8", calibration=tmp_path / "x.npz"
    )
    assert done.notes == ("no weight was quantised: no operator that ONNX Runtime quantises has one",)
    assert not recwarn.list
