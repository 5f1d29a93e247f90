import numpy as np
import onnx
import onnx_ir as ir
import pytest

from relief_export import formats
from relief_export.errors import IntegrityError
from relief_export.formats import Options, dense, sparse


def written(tmp_path, model):
    dense.write(model, tmp_path / "dense.onnx", Options())
    artifact = sparse.write(model, tmp_path / "sparse.onnx", Options())
    return tmp_path / "dense.onnx", tmp_path / "sparse.onnx", artifact


def test_the_runtime_sees_the_same_network(tmp_path, make_lenet, run):
    plain, small, _ = written(tmp_path, make_lenet())
    assert np.array_equal(run(small), run(plain))
    assert small.stat().st_size < plain.stat().st_size / 2


def test_reading_gives_the_dense_model(tmp_path, make_lenet):
    plain, small, _ = written(tmp_path, make_lenet())
    weights = {name: value.const_value.numpy() for name, value in formats.read(small).graph.initializers.items()}
    for name, value in dense.read(plain).graph.initializers.items():
        assert np.array_equal(weights[name], value.const_value.numpy())


@pytest.mark.parametrize(("zeros", "kept"), [(60, False), (66, False), (67, True), (90, True)])
def test_a_tensor_is_sparse_exactly_where_that_is_smaller(tmp_path, make_linear, zeros, kept):
    weight = np.ones((10, 10), np.float32)
    weight.ravel()[:zeros] = 0
    _, small, artifact = written(tmp_path, make_linear(weight))
    assert bool(onnx.load(small).graph.sparse_initializer) is kept
    assert artifact.notes == (() if kept else ("w stays dense: it has too few zeros",))


def test_golden(tmp_path, make_linear):
    weight = np.zeros((2, 4), np.float32)
    weight[1, 2] = 1.5
    _, small, _ = written(tmp_path, make_linear(weight))
    (tensor,) = onnx.load(small).graph.sparse_initializer
    assert tensor.values.name == "w"
    assert tensor.values.raw_data == b"\x00\x00\xc0\x3f"
    assert tensor.indices.raw_data == b"\x06\x00\x00\x00\x00\x00\x00\x00"
    assert list(tensor.dims) == [2, 4]


@pytest.mark.parametrize(
    ("indices", "dims", "message"),
    [
        ([3, 2], [64, 64], "not a sound ONNX model|not ascending"),
        ([2, 2], [64, 64], "not a sound ONNX model|not ascending"),
        ([2, 4096], [64, 64], "not a sound ONNX model|out of range"),
        ([-1, 2], [64, 64], "not a sound ONNX model|out of range"),
        ([2, 3], [2**20, 2**20], "claims"),
    ],
)
def test_hostile_indices_and_shapes_are_refused(tmp_path, make_linear, indices, dims, message):
    weight = np.zeros((64, 64), np.float32)
    weight[0, :2] = 1
    _, small, _ = written(tmp_path, make_linear(weight))
    proto = onnx.load(small)
    tensor = proto.graph.sparse_initializer[0]
    tensor.indices.CopyFrom(onnx.numpy_helper.from_array(np.array(indices)))
    tensor.dims[:] = dims
    small.write_bytes(proto.SerializeToString())
    with pytest.raises(IntegrityError, match=message):
        sparse.read(small)


def test_sparse_tensors_of_subgraphs_and_constants_are_read(tmp_path, run):
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 18]> g (float[N,4] x) => (float[N,4] y)
        <bool flag = {1}> {
          k = Constant <value = float {0}> ()
          a = Add (x, k)
          y = If (flag) <then_branch = t () => (float[N,4] p) { p = MatMul (a, w) },
                         else_branch = e () => (float[N,4] q) { q = Identity (a) }>
        }"""
    )
    weight, bias = np.diag(np.arange(4, dtype=np.float32)), np.array([0, 2, 0, 0], np.float32)
    branch = next(a.g for a in proto.graph.node[2].attribute if a.name == "then_branch")
    branch.sparse_initializer.append(sparse._to_sparse(weight, "w"))
    proto.graph.node[0].attribute[0].CopyFrom(onnx.helper.make_attribute("sparse_value", sparse._to_sparse(bias, "")))
    onnx.save(proto, tmp_path / "strange.onnx")
    dense.write(formats.read(tmp_path / "strange.onnx"), tmp_path / "dense.onnx", Options())
    assert np.array_equal(run(tmp_path / "dense.onnx"), run(tmp_path / "strange.onnx"))
    assert run(tmp_path / "dense.onnx").any()


def test_a_weight_that_is_an_output_stays_dense(tmp_path, run):
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 18]> g (float[N,4] x) => (float[4,4] w, float[N,4] y)
        <float[4,4] w = {1,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}> { y = MatMul (x, w) }"""
    )
    plain, small, _ = written(tmp_path, ir.from_proto(proto))
    assert np.array_equal(run(small), run(plain))


def test_values_of_an_unknown_type_are_refused(tmp_path, make_linear):
    sparse.write(make_linear(np.diag(np.ones(8, np.float32))), tmp_path / "small.onnx", Options())
    proto = onnx.load(tmp_path / "small.onnx")
    proto.graph.sparse_initializer[0].values.data_type = 33
    onnx.save(proto, tmp_path / "small.onnx")
    with pytest.raises(IntegrityError, match="damaged data"):
        formats.read(tmp_path / "small.onnx")


def test_external_values_are_read_from_the_model_s_folder(tmp_path, make_linear, monkeypatch):
    weight = np.zeros((4, 6), np.float32)
    weight[1, 2], weight[3, 0] = 5, 7
    sparse.write(make_linear(weight), tmp_path / "small.onnx", Options())
    proto = onnx.load(tmp_path / "small.onnx")
    values = proto.graph.sparse_initializer[0].values
    (tmp_path / "values.bin").write_bytes(values.raw_data)
    onnx.external_data_helper.set_external_data(values, "values.bin")
    values.ClearField("raw_data")
    onnx.save(proto, tmp_path / "small.onnx")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "values.bin").write_bytes(np.ones(2, np.float32).tobytes())
    monkeypatch.chdir(elsewhere)
    assert np.array_equal(formats.read(tmp_path / "small.onnx").graph.initializers["w"].const_value.numpy(), weight)
