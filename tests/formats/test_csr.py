import io
import json
import zipfile

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import scipy.sparse as sp

from relief_export.errors import InputError, IntegrityError
from relief_export.formats import Options, csr, dense
from relief_export.records import sha256


@pytest.fixture
def folder(tmp_path, make_lenet):
    csr.write(make_lenet(), tmp_path / "csr", Options())
    return tmp_path / "csr"


def replace(folder, name, content):
    """Put ``content`` into ``name`` and make the index agree, so that only the content itself can be refused."""
    (folder / name).write_bytes(content)
    index = json.loads((folder / "index.json").read_text())
    for entry in index["tensors"]:
        if entry["file"] == name:
            entry.update(bytes=len(content), sha256=sha256(folder / name))
    (folder / "index.json").write_text(json.dumps(index))


def members(folder, name):
    with zipfile.ZipFile(folder / name) as archive:
        return {info.filename: np.load(io.BytesIO(archive.read(info))) for info in archive.infolist()}


def npz(arrays, **kwargs):
    file = io.BytesIO()
    np.savez_compressed(file, **{name.removesuffix(".npy"): array for name, array in arrays.items()}, **kwargs)
    return file.getvalue()


def test_the_folder_alone_rebuilds_the_model_bit_for_bit(tmp_path, folder, make_lenet):
    dense.write(make_lenet(), tmp_path / "a.onnx", Options())
    dense.write(csr.read(folder), tmp_path / "b.onnx", Options())
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_same_input_same_bytes(tmp_path, folder, make_lenet):
    csr.write(make_lenet(), tmp_path / "again", Options())
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_scipy_reads_the_weights(folder, make_lenet):
    for name, value in make_lenet().graph.initializers.items():
        weight = value.const_value.numpy()
        npz_file, npy_file = folder / f"{name}.npz", folder / f"{name}.npy"
        read = sp.load_npz(npz_file).toarray() if npz_file.exists() else np.load(npy_file)
        assert np.array_equal(read.reshape(weight.shape), weight)


def test_whole_kernels_are_stored_in_blocks(folder):
    assert sp.load_npz(folder / "conv2.weight.npz").format == "bsr"
    assert sp.load_npz(folder / "conv2.weight.npz").blocksize == (1, 9)
    assert sp.load_npz(folder / "fc1.weight.npz").format == "csr"


def test_dense_weights_stay_dense_and_say_so(tmp_path, make_lenet):
    artifact = csr.write(make_lenet(zeros=0.1), tmp_path / "csr", Options())
    assert "fc1.weight stays dense: its CSR would be larger" in artifact.notes
    assert (tmp_path / "csr" / "fc1.weight.npy").exists()


def test_special_values_survive(tmp_path, make_linear):
    weight = np.zeros((4, 64), np.float32)
    weight[0, 3], weight[1, 5], weight[2, 63] = np.nan, np.inf, np.float32(1e-45)
    model = make_linear(weight)
    csr.write(model, tmp_path / "csr", Options())
    read = csr.read(tmp_path / "csr").graph.initializers["w"].const_value.numpy()
    assert read.tobytes() == weight.tobytes()


def test_a_weight_of_many_axes_is_read_back(tmp_path):
    weight = np.zeros((2,) * 12, np.float32)
    weight[(1,) * 12] = 2
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g (float x) => (float[M] y) { y = Mul (x, w) }'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    csr.write(ir.from_proto(proto), tmp_path / "csr", Options())
    assert np.array_equal(csr.read(tmp_path / "csr").graph.initializers["w"].const_value.numpy(), weight)


def test_odd_names_get_files_of_their_own(tmp_path, make_lenet):
    model = make_lenet()
    for index, value in enumerate(list(model.graph.initializers.values())):
        value.name = f"{'../' * 3}etc/w{'A' if index % 2 else 'a'}"[: 12 + index % 2] + "·" * index
    csr.write(model, tmp_path / "csr", Options())
    dense.write(model, tmp_path / "a.onnx", Options())
    dense.write(csr.read(tmp_path / "csr"), tmp_path / "b.onnx", Options())
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_stranger_s_folder_is_not_replaced(tmp_path, make_lenet):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not a csr folder"):
        csr.write(make_lenet(), tmp_path, Options())
    assert (tmp_path / "thesis.tex").exists()


def test_a_missing_file_is_named(folder):
    (folder / "fc1.weight.npz").unlink()
    with pytest.raises(IntegrityError, match=r"fc1\.weight\.npz is missing"):
        csr.read(folder)


def test_a_renamed_file_is_named(folder):
    (folder / "fc1.weight.npz").rename(folder / "fc9.weight.npz")
    with pytest.raises(IntegrityError, match=r"fc1\.weight\.npz is missing"):
        csr.read(folder)


def test_an_absent_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        csr.read(tmp_path / "gone")


@pytest.mark.parametrize("file", ["../fc1.weight.npz", "/etc/hostname"])
def test_an_index_pointing_outside_is_refused(folder, file):
    index = json.loads((folder / "index.json").read_text())
    index["tensors"][0]["file"] = file
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match="points outside its folder"):
        csr.read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["indices.npy"].__setitem__(0, 10**6), "out of range"),
        (lambda a: a["indices.npy"].__setitem__(0, -1), "out of range"),
        (lambda a: a["indices.npy"].__setitem__(slice(0, 2), a["indices.npy"][1::-1].copy()), "not ascending"),
        (lambda a: a["indices.npy"].__setitem__(1, a["indices.npy"][0]), "not ascending"),
        (lambda a: a["indptr.npy"].__setitem__(1, 10**6), "indptr does not ascend"),
        (lambda a: a["indptr.npy"].__setitem__(0, 1), "indptr does not ascend"),
        (lambda a: a.update({"data.npy": a["data.npy"][:-1]}), "not float32"),
        (lambda a: a.update({"data.npy": a["data.npy"].astype("f8")}), "data would unpack to|not float32"),
        (lambda a: a.pop("indptr.npy"), "not a SciPy sparse array"),
        (lambda a: a.update({"shape.npy": np.array([1, 1])}), "not csr"),
    ],
)
def test_inconsistent_matrices_are_refused(folder, change, message):
    arrays = members(folder, "fc1.weight.npz")
    change(arrays)
    replace(folder, "fc1.weight.npz", npz(arrays))
    with pytest.raises(IntegrityError, match=message):
        csr.read(folder)


def test_a_pickle_is_never_loaded(folder):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("a pickle was executed",)

    file = io.BytesIO()
    np.save(file, np.array([Trap()], dtype=object), allow_pickle=True)
    replace(folder, "fc1.bias.npy", file.getvalue())
    with pytest.raises(IntegrityError, match="holds object"):
        csr.read(folder)


def test_a_damaged_header_is_refused(folder):
    replace(folder, "fc1.bias.npy", (folder / "fc1.bias.npy").read_bytes().replace(b"}", b" "))
    with pytest.raises(IntegrityError, match=r"is not an \.npy array"):
        csr.read(folder)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(folder):
    arrays = members(folder, "fc1.weight.npz")
    arrays["data.npy"] = np.zeros(10**7, np.float32)
    replace(folder, "fc1.weight.npz", npz(arrays))
    with pytest.raises(IntegrityError, match="data would unpack to 40000"):
        csr.read(folder)


def test_a_claim_out_of_proportion_is_refused(folder):
    index = json.loads((folder / "index.json").read_text())
    index["tensors"][0].update(shape=[2**20, 2**20])
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match="does not fit an input"):
        csr.read(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": "ab"},
        {"layout": "coo"},
        {"dtype": "object"},
        {"stored": -1},
        {"position": True},
        {"name": None},
        {"surprise": 1},
    ],
)
def test_malformed_index_entries_are_refused(folder, change):
    index = json.loads((folder / "index.json").read_text())
    index["tensors"][0].update(change)
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match="malformed"):
        csr.read(folder)
