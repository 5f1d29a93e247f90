import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from relief_export.errors import InputError, IntegrityError, UnsupportedModelError
from relief_export.formats import FORMATS, Options, dense, onnx_file, read, runtime, write_manifest


def test_same_input_same_bytes_and_reading_changes_nothing(tmp_path, make_lenet):
    dense.write(make_lenet(), tmp_path / "a.onnx", Options())
    dense.write(dense.read(tmp_path / "a.onnx"), tmp_path / "b.onnx", Options())
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_the_writer_leaves_its_input_alone(tmp_path, make_lenet):
    model = make_lenet()
    model.doc_string = "mine"
    before = ir.to_proto(model).SerializeToString()
    for form in FORMATS.values():
        if not form.calibrated:
            form.write(model, tmp_path / form.suffix, Options())
    assert ir.to_proto(model).SerializeToString() == before


def test_nothing_but_the_network_is_written(tmp_path, make_lenet):
    model = make_lenet()
    model.doc_string, model.producer_name = "doc", "me"
    model.metadata_props["note"] = "x"
    for node in model.graph:
        node.doc_string, node.metadata_props["trace"] = "doc", "/home/me/secret.py"
    dense.write(model, tmp_path / "m.onnx", Options())
    assert b"secret" not in (tmp_path / "m.onnx").read_bytes()
    proto = onnx.load(tmp_path / "m.onnx")
    assert not proto.doc_string
    assert not proto.producer_name
    assert not proto.metadata_props


def test_negative_zeros_become_zeros(tmp_path, make_linear):
    weight = np.array([[-0.0, 1.0], [0.0, -2.0]], np.float32)
    dense.write(make_linear(weight), tmp_path / "m.onnx", Options())
    read = dense.read(tmp_path / "m.onnx").graph.initializers["w"].const_value.numpy()
    assert np.array_equal(read, weight)
    assert not np.signbit(read[read == 0]).any()


def test_constant_nodes_become_initializers(tmp_path, run):
    weight = np.arange(32, dtype=np.float32).reshape(4, 8)
    proto = onnx.parser.parse_model(
        '<ir_version: 3, opset_import: ["": 13]> g (float[N,8] x) => (float[N,4] y) { y = Gemm <transB = 1> (x, w) }'
    )
    constant = onnx.helper.make_node("Constant", [], ["w"], value=onnx.numpy_helper.from_array(weight))
    proto.graph.node.insert(0, constant)
    dense.write(ir.from_proto(proto), tmp_path / "m.onnx", Options())
    assert np.array_equal(dense.read(tmp_path / "m.onnx").graph.initializers["w"].const_value.numpy(), weight)
    assert run(tmp_path / "m.onnx").shape == (5, 4)


def test_large_models_keep_weights_beside_them(tmp_path, make_lenet, run):
    model = make_lenet()
    dense.write(model, tmp_path / "one.onnx", Options())
    artifact = dense.write(model, tmp_path / "two.onnx", Options(external_bytes=1000))
    assert [file.path for file in artifact.files] == ["two.onnx", "two.onnx.data"]
    assert np.array_equal(run(tmp_path / "one.onnx"), run(tmp_path / "two.onnx"))
    again = dense.write(dense.read(tmp_path / "two.onnx"), tmp_path / "two.onnx", Options())
    assert [file.path for file in again.files] == ["two.onnx"]
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


@pytest.mark.parametrize("location", ["../secret.data", "/etc/hostname"])
def test_external_data_outside_the_folder_is_refused(tmp_path, make_lenet, location):
    folder = tmp_path / "inner"
    dense.write(make_lenet(), folder / "m.onnx", Options(external_bytes=1000))
    (tmp_path / "secret.data").write_bytes((folder / "m.onnx.data").read_bytes())
    proto = onnx.load(folder / "m.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(IntegrityError, match="points outside its folder"):
        dense.read(folder / "m.onnx")


def test_short_external_data_is_refused(tmp_path, make_lenet):
    dense.write(make_lenet(), tmp_path / "m.onnx", Options(external_bytes=1000))
    data = tmp_path / "m.onnx.data"
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(IntegrityError, match="missing or too short"):
        dense.read(tmp_path / "m.onnx")


@pytest.mark.parametrize("content", [b"", b"not a model", b"PK\x03\x04" + bytes(100), b"\x80\x04cposix\nsystem\n."])
def test_foreign_files_are_refused(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(IntegrityError, match="is not a sound ONNX model"):
        dense.read(tmp_path / "m.onnx")


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.onnx does not exist"):
        dense.read(tmp_path / "gone.onnx")


def test_the_manifest_beside_a_file_is_obeyed(tmp_path, make_lenet):
    artifact = dense.write(make_lenet(), tmp_path / "m.onnx", Options())
    write_manifest(tmp_path, [artifact])
    dense.read(tmp_path / "m.onnx")
    dense.write(make_lenet(seed=1), tmp_path / "m.onnx", Options())
    with pytest.raises(IntegrityError, match=r"m\.onnx (differs from its SHA-256|has \d+ bytes)"):
        dense.read(tmp_path / "m.onnx")


def test_an_input_of_an_unknown_type_is_refused(tmp_path, make_lenet):
    dense.write(make_lenet(), tmp_path / "m.onnx", Options())
    proto = onnx.load(tmp_path / "m.onnx")
    proto.graph.input[0].type.tensor_type.elem_type = 65
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(IntegrityError, match="damaged graph"):
        read(tmp_path / "m.onnx")


@pytest.mark.parametrize("name", [b"lenet", b"MatMul", b"conv1.bias"])
def test_a_name_that_is_no_text_is_refused(tmp_path, make_lenet, name):
    dense.write(make_lenet(), tmp_path / "m.onnx", Options())
    data = (tmp_path / "m.onnx").read_bytes()
    (tmp_path / "m.onnx").write_bytes(data.replace(name, b"\xff" + name[1:]))
    with pytest.raises(IntegrityError, match="a name is no UTF-8"):
        read(tmp_path / "m.onnx")


def test_another_program_s_manifest_lists_no_model(tmp_path, make_lenet):
    dense.write(make_lenet(), tmp_path / "m.onnx", Options())
    (tmp_path / "manifest.json").write_text(
        '{"manifest_version": 3, "version": "1.0", "name": "digits in the browser"}'
    )
    assert dense.read(tmp_path / "m.onnx").graph.name == "lenet"


def test_the_long_name_of_the_standard_domain_is_its_short_one(tmp_path):
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["ai.onnx": 12]> g (float[N] x) => (float[N] y) { y = Abs (x) }'
    )
    onnx.save(proto, tmp_path / "long.onnx")
    model = dense.read(tmp_path / "long.onnx")
    assert model.opset_imports == {"": 12}
    with pytest.raises(UnsupportedModelError, match="the model has 12"):
        FORMATS["packed"].write(model, tmp_path / "packed.onnx", Options())
    FORMATS["ort"].write(model, tmp_path / "model.ort", Options())
    assert (tmp_path / "model.required_operators.config").read_text() == "ai.onnx;6;Abs\n"


UNKNOWN = """<ir_version: 8, opset_import: ["": 18, "own": 1]> g (float[N,64] x) => (float[N,64] y) {
  a = MatMul (x, w) y = own.Unknown (a) }"""


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ["dense", "sparse", "packed", "ort", "int8"])
def test_what_the_runtime_refuses_leaves_every_old_file_alone(tmp_path, make_linear, name):
    path, rng = tmp_path / FORMATS[name].suffix, np.random.default_rng(0)
    if name == "ort":
        FORMATS["ort"].write(make_linear(np.eye(64, dtype=np.float32)), path, Options())
    else:
        weight = rng.normal(size=(64, 64)).astype(np.float32)
        dense.write(make_linear(weight), path, Options(external_bytes=1000))  # with external data beside it
    before = contents(tmp_path)
    assert len(before) == 2
    proto = onnx.parser.parse_model(UNKNOWN)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=(64, 64)).astype(np.float32), "w"))
    options = Options(external_bytes=1000, calibration=rng.normal(size=(4, 64)).astype(np.float32))
    with pytest.raises(UnsupportedModelError, match=f"({path.name} has operator own:Unknown|cannot quantise)"):
        FORMATS[name].write(ir.from_proto(proto), path, options)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("failing", [1, 2])
def test_a_file_that_cannot_take_its_place_takes_back_the_other(tmp_path, make_linear, monkeypatch, failing):
    path, eye = tmp_path / "m.onnx", np.eye(64, dtype=np.float32)
    dense.write(make_linear(eye), path, Options(external_bytes=1000))
    before, replace, calls = contents(tmp_path), Path.replace, []

    def refuse(self, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError(28, "No space left on device", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        dense.write(make_linear(2 * eye), path, Options(external_bytes=1000))
    monkeypatch.undo()
    assert contents(tmp_path) == before
    dense.write(make_linear(2 * eye), path, Options())
    assert set(contents(tmp_path)) == {path}  # the data that the old file had is gone with it


def test_data_of_another_model_is_not_removed(tmp_path, make_linear):
    foreign = tmp_path / "m.onnx.data"
    foreign.write_bytes(b"somebody's notes")
    for _ in range(2):
        dense.write(make_linear(np.eye(4, dtype=np.float32)), tmp_path / "m.onnx", Options())
    assert foreign.read_bytes() == b"somebody's notes"


@pytest.mark.parametrize(("opset", "expected"), [(18, 8), (20, 9), (21, 10)])
def test_the_ir_version_is_the_oldest_that_the_model_needs(tmp_path, run, opset, expected):
    text = f'<ir_version: 11, opset_import: ["": {opset}]> g (float[N,4] x) => (float[N,4] y) {{ y = Relu (x) }}'
    dense.write(ir.from_proto(onnx.parser.parse_model(text)), tmp_path / "m.onnx", Options())
    assert onnx.load(tmp_path / "m.onnx").ir_version == expected  # ONNX Runtime 1.17 loads no IR version above 9
    onnx.checker.check_model(tmp_path / "m.onnx")
    assert run(tmp_path / "m.onnx").shape == (5, 4)


def test_an_ir_version_that_types_need_is_kept(tmp_path):
    text = """<ir_version: 10, opset_import: ["": 18]> g (float[N,4] x) => (float[N,4] y)
    { c = Constant <value_float = 1.0> () y = Add (x, c) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.helper.make_tensor("w", onnx.TensorProto.INT4, [2], [1, -1]))
    dense.write(ir.from_proto(proto), tmp_path / "m.onnx", Options(verify=False))
    assert onnx.load(tmp_path / "m.onnx").ir_version == 10


def test_weights_that_are_written_without_a_copy_give_the_bytes_of_the_whole_proto(tmp_path):
    """Of every type of weights, small ones between, and with fields of the graph and model before and behind them."""
    text = """<ir_version: 10, opset_import: ["": 19]> g (float[N, 256] x) => (float[N, 256] y, float[N, 256] z)
    { y = MatMul(x, w) z = Add(y, b) }"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    arrays = {"w": rng.random((256, 256), np.float32), "b": rng.random(256, np.float32)}
    arrays["turned"] = np.asfortranarray(rng.random((300, 200), np.float32))
    arrays["half"] = rng.random((256, 256)).astype(np.float16)
    model = ir.from_proto(proto)
    for name, array in arrays.items():
        read = {value.name: value for node in model.graph for value in node.inputs if value is not None}
        value = read.get(name) or ir.Value(name=name)
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    wide = np.arange(300_000, dtype=np.int8) % 8
    for name, kind in (("four", ir.DataType.INT4), ("bf", ir.DataType.BFLOAT16)):
        array = wide.astype(kind.numpy())
        model.graph.register_initializer(ir.Value(name=name, const_value=ir.Tensor(array, dtype=kind, name=name)))
    whole = onnx_file.to_proto(onnx_file.canonical(model))
    onnx_file.save_proto(whole, tmp_path / "whole.onnx")
    onnx_file.save_model(onnx_file.canonical(model), tmp_path / "streamed.onnx", verify=False, external_bytes=1 << 40)
    assert sum(len(tensor.raw_data) > 1 << 16 for tensor in whole.graph.initializer) == 5
    assert (tmp_path / "streamed.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper, save
from relief_export import conversion, formats
from relief_export.formats import dense

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

path = Path(sys.argv[1])
if not path.exists():
    nodes = [helper.make_node("MatMul", [f"h{k}", "w"], [f"h{k + 1}"]) for k in range(40)]
    given = [helper.make_tensor_value_info("h0", TensorProto.FLOAT, ["n", 2500])]
    results = [helper.make_tensor_value_info("h40", TensorProto.FLOAT, ["n", 2500])]
    weight = numpy_helper.from_array(np.random.default_rng(0).random((2500, 2500), np.float32), "w")
    graph = helper.make_graph(nodes, "unrolled", given, results, [weight])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    sys.exit()
size, before = path.stat().st_size, peak()
if sys.argv[2] == "read":
    formats.read(path)
else:
    act, verify = sys.argv[2].split(), "verified" in sys.argv[2]
    written = path.with_name("written.onnx")
    if "shrink" in act:
        conversion.shrink_file(path, written, verify=verify)
    else:
        conversion.convert_file(path, written, "dense", verify=verify)
print((peak() - before) / size)
"""


# Reading holds the file's bytes beside the model. ONNX Runtime alone takes two more copies for what it opens, and some
# ten megabytes that do not depend on the model.
@pytest.mark.parametrize(
    ("what", "times"), [("read", 2.4), ("write", 2.4), ("write verified", 3.6), ("shrink", 2.6), ("shrink verified", 4)]
)
def test_memory_is_a_few_times_the_model_however_often_a_weight_is_used(what, times, tmp_path):
    """ONNX Runtime would pack the weight for every use, and onnx's checker hold the file twice beside the model."""
    call = [sys.executable, "-c", MEMORY, str(tmp_path / "model.onnx"), what]
    subprocess.run(call, check=True, cwd=".")  # makes the file
    done = subprocess.run(call, capture_output=True, check=True, text=True, cwd=".")
    assert float(done.stdout) <= times


def dequantised(transpose, scales):
    """Return a network whose int8 weight is dequantised and transposed."""
    proto = onnx.parser.parse_model(f"""<ir_version: 9, opset_import: ["": 18]> g (float[n, 3] x) => (float[n, 4] y)
        {{ d = DequantizeLinear<axis = 0>(w, s, z) t = {transpose}(d) y = MatMul(x, t) }}""")
    arrays = {"w": np.arange(12, dtype=np.int8).reshape(4, 3), "s": scales, "z": np.zeros(scales.shape, np.int8)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return proto


BY_CHANNEL, BY_TENSOR = np.array([1, 2, 3, 4], np.float32), np.array(0.5, np.float32)


def test_written_transposes_of_dequantised_weights_state_their_axes(tmp_path):
    """ONNX Runtime up to 1.30 ends the process where they do not."""
    dense.write(ir.from_proto(dequantised("Transpose", BY_CHANNEL)), tmp_path / "m.onnx", Options())
    (transpose,) = (node for node in onnx.load(tmp_path / "m.onnx").graph.node if node.op_type == "Transpose")
    assert [list(attribute.ints) for attribute in transpose.attribute] == [[1, 0]]
    weight = np.arange(12).reshape(4, 3) * BY_CHANNEL[:, None]
    session = runtime.load(tmp_path / "m.onnx", name="m")
    assert np.array_equal(session.run(None, {"x": np.eye(3, dtype=np.float32)})[0], weight.T)


@pytest.mark.parametrize("as_file", [True, False])
def test_what_would_end_the_process_is_not_loaded(as_file, tmp_path, monkeypatch):
    def source(*arguments):
        data = dequantised(*arguments).SerializeToString()
        (tmp_path / "m.onnx").write_bytes(data)
        return tmp_path / "m.onnx" if as_file else data

    fatal = source("Transpose", BY_CHANNEL)
    runtime.load(fatal, name="m", optimised=False)
    monkeypatch.setattr(runtime, "_VERSION", (1, 30))  # on any version, since the refusal is what is tested
    with pytest.raises(UnsupportedModelError, match=r"ends the process on Transpose 't', which states no perm behind"):
        runtime.load(fatal, name="m")
    runtime.load(fatal, name="m", optimised=False)
    for harmless in (("Transpose<perm = [1, 0]>", BY_CHANNEL), ("Transpose", BY_TENSOR)):
        runtime.load(source(*harmless), name="m")
