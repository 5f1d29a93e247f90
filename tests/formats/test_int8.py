import numpy as np
import onnx
import onnx_ir
import pytest

from relief_export.errors import InputError, IntegrityError, UnsupportedModelError
from relief_export.formats import Options, dense, int8, packed, runtime


@pytest.fixture
def samples():
    return np.random.default_rng(5).normal(size=(40, 1, 14, 14)).astype(np.float32)


@pytest.fixture
def written(tmp_path, make_lenet, samples):
    model = make_lenet(0.9)
    options = Options(calibration=samples)
    dense.write(model, tmp_path / "dense.onnx", options)
    plain = int8.write(model, tmp_path / "int8.onnx", options)
    small = int8.write_packed(model, tmp_path / "packed.onnx", options)
    return model, plain, small, tmp_path


def quantised(path):
    return {
        tensor.name.removesuffix("_quantized"): onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(path).graph.initializer
        if tensor.name.endswith("_quantized") and tensor.data_type == onnx.TensorProto.INT8
    }


def test_every_weight_keeps_exactly_its_zeros(written):
    model, plain, _, folder = written
    found = quantised(folder / "int8.onnx")
    names = {name for name, value in model.graph.initializers.items() if len(value.shape) > 1}
    assert set(found) >= names
    for name in names:
        weight = model.graph.initializers[name].const_value.numpy()
        assert np.array_equal(found[name] == 0, weight == 0)
    zeros = np.concatenate([found[name].ravel() == 0 for name in names])
    assert plain.notes == (f"share of zeros in quantised weights: {zeros.mean():.6f} before and after",)


def test_weights_have_a_scale_a_channel_and_no_zero_point(written):
    _, _, _, folder = written
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(folder / "int8.onnx").graph.initializer}
    assert tensors["conv2.weight_scale"].shape == (16,)
    assert not tensors["conv2.weight_zero_point"].any()


def test_outputs_are_near_the_dense_ones(written, run):
    _, _, _, folder = written
    expected, got = run(folder / "dense.onnx"), run(folder / "int8.onnx")
    assert np.abs(got - expected).max() < 0.1 * np.abs(expected).max()


def test_packed_int8_is_the_same_network_and_smaller(written, run):
    _, plain, small, folder = written
    assert np.array_equal(run(folder / "packed.onnx"), run(folder / "int8.onnx"))
    assert small.bytes < plain.bytes
    assert small.format == "packed-int8"


def test_packed_int8_runs_integer_kernels_with_nothing_left_to_decode(written, optimised_ops):
    _, _, _, folder = written
    left = optimised_ops(folder / "packed.onnx")
    assert left == optimised_ops(folder / "int8.onnx")
    assert left.count("QLinearConv") == 2
    assert not {"ScatterElements", "ScatterND", "CumSum"} & set(left)


def test_a_packed_int8_file_is_read_back(written, run, tmp_path):
    _, _, _, folder = written
    dense.write(packed.read(folder / "packed.onnx"), tmp_path / "read.onnx", Options())
    assert np.array_equal(run(tmp_path / "read.onnx"), run(folder / "int8.onnx"))


def test_same_input_same_bytes(written, make_lenet, samples):
    _, _, _, folder = written
    int8.write(make_lenet(0.9), folder / "again.onnx", Options(calibration=samples))
    assert (folder / "again.onnx").read_bytes() == (folder / "int8.onnx").read_bytes()


def test_calibration_comes_from_a_file_as_well(written, make_lenet, samples):
    _, _, _, folder = written
    np.savez(folder / "x.npz", x=samples)
    int8.write(make_lenet(0.9), folder / "again.onnx", Options(calibration=folder / "x.npz"))
    assert (folder / "again.onnx").read_bytes() == (folder / "int8.onnx").read_bytes()


def test_missing_samples_say_what_to_give(tmp_path, make_lenet):
    with pytest.raises(InputError, match="int8 needs calibration samples"):
        int8.write(make_lenet(), tmp_path / "m.onnx", Options())
    with pytest.raises(InputError, match=r"gone\.npz does not exist"):
        int8.write(make_lenet(), tmp_path / "m.onnx", Options(calibration=tmp_path / "gone.npz"))


def test_a_pickled_calibration_file_is_refused(tmp_path, make_lenet):
    np.savez(tmp_path / "x.npz", x=np.array([{}], dtype=object))
    with pytest.raises(InputError, match=r"x\.npz: array 'x' holds pickled objects"):
        int8.write(make_lenet(), tmp_path / "m.onnx", Options(calibration=tmp_path / "x.npz"))


def test_a_damaged_calibration_file_is_refused(tmp_path, make_lenet, samples):
    np.savez_compressed(tmp_path / "x.npz", x=samples)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[200:400] = b"\xff" * 200
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"x\.npz is no readable \.npz file"):
        int8.write(make_lenet(), tmp_path / "m.onnx", Options(calibration=tmp_path / "x.npz"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused(tmp_path, make_lenet, samples, bad):
    samples = samples.copy()
    samples[1, 0, 2, 3] = bad
    with pytest.raises(InputError, match="hold NaN or infinity"):
        int8.write(make_lenet(), tmp_path / "m.onnx", Options(calibration=samples))


def test_what_the_quantiser_logs_stays_off_stderr(tmp_path, caplog, recwarn):
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 18]> g (float[N,4,3] x) => (float[N,4,3] y)
        <float[4] s = {1, 2, 3, 4}, float[4] b = {0, 0, 0, 0}> { y = InstanceNormalization (x, s, b) }"""
    )
    samples = np.random.default_rng(0).normal(size=(8, 4, 3)).astype(np.float32)
    int8.write(onnx_ir.from_proto(proto), tmp_path / "m.onnx", Options(calibration=samples))
    assert not caplog.records
    assert not recwarn.list


def test_samples_of_a_wrong_shape_are_refused(tmp_path, make_lenet, samples):
    with pytest.raises(UnsupportedModelError, match="cannot quantise"):
        int8.write(make_lenet(), tmp_path / "m.onnx", Options(calibration=samples[:, :, :5]))


def test_the_mask_of_a_join_keeps_its_zeros(tmp_path, run):
    text = """<ir_version: 8, opset_import: ["": 18]> join (float[N,4,6,6] x) => (float[N,4,6,6] y) {
      a = Conv <pads = [1,1,1,1]> (x, w) b = Mul (a, mask) y = Add (b, x) }"""
    proto, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    arrays = {
        "w": rng.normal(size=(4, 4, 3, 3)).astype(np.float32),
        "mask": np.array([0, 1, 1, 0], np.float32).reshape(1, 4, 1, 1),
    }
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    samples = (
        np.random.default_rng(1).normal(size=(5, 4, 6, 6)).astype(np.float32)
    )  # what `run` feeds: nothing is clipped
    model = onnx_ir.from_proto(proto)
    dense.write(model, tmp_path / "dense.onnx", Options())
    int8.write(model, tmp_path / "int8.onnx", Options(calibration=samples))
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    exact = stored["mask_quantized"].astype(int) - stored["mask_zero_point"]
    assert stored["mask_zero_point"] != 0  # as activations are, and still with an exact zero
    assert np.array_equal(exact != 0, arrays["mask"] != 0)
    expected, got = run(tmp_path / "dense.onnx"), run(tmp_path / "int8.onnx")
    assert np.abs(got - expected).max() < 0.1 * np.abs(expected).max()


def test_sessions_take_kernels_that_do_not_overflow(written):
    """On x86 without VNNI the default int8 kernels give other sums than everywhere else."""
    _, _, _, folder = written
    options = runtime.load(folder / "int8.onnx", name="int8.onnx").get_session_options()
    assert options.get_session_config_entry("session.x64quantprecision") == "1"
