import numpy as np
import onnx
import pytest

from relief_export.formats import FORMATS, Options, size_breakdown

CALIBRATION = np.random.default_rng(0).normal(size=(8, 1, 14, 14)).astype(np.float32)


def parts_of(path):
    """Take a model apart the other way round: by what the file loses with each of its fields."""
    proto = onnx.load(path, load_external_data=False)

    def lost(clear):
        left = onnx.ModelProto()
        left.CopyFrom(proto)
        clear(left.graph)
        return len(proto.SerializeToString()) - len(left.SerializeToString())

    return {
        "constants": lost(lambda graph: (graph.ClearField("initializer"), graph.ClearField("sparse_initializer"))),
        "nodes": lost(lambda graph: graph.ClearField("node")),
        "shapes": lost(lambda graph: graph.ClearField("value_info")),
    }


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.read is not None and name != "csr"])
def test_the_parts_of_an_onnx_file_add_up_to_it(tmp_path, make_lenet, name):
    written = FORMATS[name].write(make_lenet(), tmp_path / "m.onnx", Options(calibration=CALIBRATION))
    found = size_breakdown(tmp_path / "m.onnx")
    assert found.total == written.bytes
    assert min(found.to_dict().values()) >= 0
    expected = parts_of(tmp_path / "m.onnx")
    slack = 4  # the graph's own length is a varint of up to so many bytes
    assert found.weights + found.headers == pytest.approx(expected["constants"], abs=slack)
    assert found.decoding + found.network >= expected["nodes"] - slack
    assert found.decoding + found.network <= expected["nodes"] + expected["shapes"] + slack


def test_weights_are_the_data_and_decoding_is_what_no_input_reaches(tmp_path, make_lenet):
    sizes = {}
    for name in ("dense", "sparse", "packed"):
        FORMATS[name].write(make_lenet(), tmp_path / f"{name}.onnx", Options())
        sizes[name] = size_breakdown(tmp_path / f"{name}.onnx")
    weights = [value.const_value.numpy() for value in make_lenet().graph.initializers.values()]
    assert sizes["dense"].weights == sum(array.nbytes for array in weights)
    assert sizes["sparse"].weights == sum(min(array.nbytes, 12 * np.count_nonzero(array)) for array in weights)
    assert sizes["dense"].decoding == sizes["sparse"].decoding == 0
    assert sizes["packed"].decoding > 0
    assert 4 * sum(map(np.count_nonzero, weights)) < sizes["packed"].weights < sizes["sparse"].weights


def test_external_data_are_weights(tmp_path, make_lenet):
    written = FORMATS["dense"].write(make_lenet(), tmp_path / "m.onnx", Options(external_bytes=0))
    assert len(written.files) == 2
    assert size_breakdown(tmp_path / "m.onnx").total == written.bytes
    assert size_breakdown(tmp_path / "m.onnx").weights >= written.files[1].file_bytes


def test_a_csr_folder_is_taken_apart_by_its_files(tmp_path, make_lenet):
    written = FORMATS["csr"].write(make_lenet(), tmp_path / "csr", Options())
    found = size_breakdown(tmp_path / "csr")
    assert found.total == written.bytes
    assert found.network == (tmp_path / "csr" / "graph.onnx").stat().st_size
    assert found.weights == sum(file.file_bytes for file in written.files if file.path.endswith((".npy", ".npz")))


def test_what_is_no_onnx_is_not_taken_apart(tmp_path, make_lenet):
    FORMATS["ort"].write(make_lenet(), tmp_path / "m.ort", Options())
    assert size_breakdown(tmp_path / "m.ort") is None
    FORMATS["c"].write(make_lenet(), tmp_path / "c", Options())
    assert size_breakdown(tmp_path / "c") is None
