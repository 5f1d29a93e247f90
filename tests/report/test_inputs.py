import numpy as np
import pytest

from relief_export.errors import IntegrityError
from relief_export.report.run import input_use
from tests.report.folders import write_masks

RNG = np.random.default_rng(11)


def test_a_linear_layer_on_pictures_counts_each_pixel_over_neurons_and_channels(tmp_path):
    mask = RNG.random((5, 2 * 3 * 4)) < 0.4
    write_masks(tmp_path / "m", {"b": np.ones(5, bool), "fc.weight": mask})
    use = input_use(tmp_path / "m", "fc", (2, 3, 4))
    for y in range(3):
        for x in range(4):
            expected = sum(bool(mask[n, c * 12 + y * 4 + x]) for n in range(5) for c in range(2))
            assert use.pixels[y][x] == expected
    assert use.channels == tuple((int(mask[:, c * 12 : c * 12 + 12].sum()), 60) for c in range(2))


def test_a_convolution_counts_whole_kernels_of_each_channel(tmp_path):
    mask = np.zeros((4, 3, 2, 2), bool)
    mask[0, 0, 0, 0] = mask[1, 0] = mask[3, 2, 1, 1] = True
    write_masks(tmp_path / "m", {"conv.weight": mask})
    use = input_use(tmp_path / "m", "conv", (3, 8, 8))
    assert use.pixels == ()
    assert use.channels == ((2, 4), (0, 4), (1, 4))


def test_features_without_a_picture_are_counted_one_by_one(tmp_path):
    mask = np.array([[1, 0, 1], [1, 0, 0]], bool)
    write_masks(tmp_path / "m", {"fc.weight": mask})
    assert input_use(tmp_path / "m", "fc", (3,)).channels == ((2, 2), (0, 2), (1, 2))


@pytest.mark.parametrize("shape", [(4,), (1, 2, 2)])
def test_a_first_layer_that_does_not_read_the_input_as_it_is_has_no_picture(tmp_path, shape):
    write_masks(tmp_path / "m", {"fc.weight": np.ones((2, 3), bool)})
    assert input_use(tmp_path / "m", "fc", shape) is None


def test_no_mask_of_the_layer_or_no_file_has_no_picture(tmp_path):
    write_masks(tmp_path / "m", {"fc.weight": np.ones((2, 3), bool)})
    assert input_use(tmp_path / "m", "other", (3,)) is None
    assert input_use(tmp_path / "absent", "fc", (3,)) is None


@pytest.mark.parametrize("size", [0, 4, 20, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path, size):
    path = tmp_path / "masks.safetensors"
    write_masks(path, {"fc.weight": np.ones((2, 3), bool)})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(IntegrityError, match=r"masks\.safetensors is not a whole safetensors file"):
        input_use(path, "fc", (3,))


def test_the_safetensors_library_reads_the_masks_the_same_way(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    mask = RNG.random((6, 10)) < 0.5
    numpy.save_file({"fc.weight": mask, "fc.bias": np.ones(6, bool)}, tmp_path / "m", metadata={"version": "1"})
    use = input_use(tmp_path / "m", "fc", (10,))
    assert [count for count, _ in use.channels] == mask.sum(axis=0).tolist()
