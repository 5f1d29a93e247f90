from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relief_export.formats.kmeans import codebook, nearest
from relief_export.formats.values import encode, share

LOSSY = ("f16", "int8", "codebook16", "codebook256")


def weights(shape=(40, 60), seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * (rng.random(shape) < 0.3)).astype(np.float32)


def squares(values, centres):
    return float(((values[:, None] - np.asarray(centres, np.float64)) ** 2).min(axis=1).sum())


def optimum(values, size):
    """Return the least sum of squares by trying every division of the sorted values into runs."""
    ordered, best = np.sort(values), np.inf
    for cuts in combinations(range(1, len(ordered)), size - 1):
        runs = np.split(ordered, cuts)
        best = min(best, sum(((run - run.mean()) ** 2).sum() for run in runs))
    return best


@given(st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=12))
@example([0.0, 0.0, 0.0, 7.0, -2.0, -5.0, -10.0, -5.5])
@settings(max_examples=60, deadline=None)
def test_k_means_is_no_worse_than_a_uniform_grid_and_never_better_than_the_optimum(values):
    values = np.array(values, np.float32).astype(np.float64)
    found = squares(values, codebook(values.astype(np.float32), 3))
    grid = values.min() + (np.arange(3) + 0.5) * np.ptp(values) / 3
    assert found <= squares(values, grid) + 1e-4
    assert found >= optimum(values, 3) - 1e-4


def test_k_means_finds_separate_clusters():
    rng = np.random.default_rng(0)
    values = np.concatenate([centre + 0.01 * rng.normal(size=50) for centre in (-3, 0.5, 7)]).astype(np.float32)
    assert codebook(values, 3) == pytest.approx([-3, 0.5, 7], abs=0.01)


def test_few_different_values_are_kept_exactly():
    values = np.array([0.25, -1.5, 0.25, 3.0], np.float32)
    assert codebook(values, 16).tolist() == [-1.5, 0.25, 3.0]


def test_k_means_is_deterministic():
    values = weights().ravel()
    assert codebook(values, 16).tobytes() == codebook(values[::-1].copy(), 16).tobytes()


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_nearest_is_the_nearest(values):
    centres = np.array([-2.0, -0.5, 0.25, 3.0], np.float32)
    values = np.array(values, np.float32)
    found = np.abs(values - centres[nearest(values, centres)])
    assert np.array_equal(found, np.abs(values[:, None] - centres).min(axis=1))


@pytest.mark.parametrize("code", LOSSY)
@pytest.mark.parametrize("shape", [(40, 60), (8, 6, 3, 3)])
def test_no_code_changes_which_weights_are_zero(code, shape):
    array = weights(shape)
    coded = encode(array, code, 0)
    assert coded.code == code or array.size < 1000
    assert np.array_equal(coded.decoded()[array != 0] != 0, np.ones(np.count_nonzero(array), bool))
    if len(shape) == 4:
        assert not coded.decoded()[array == 0].any()


@pytest.mark.parametrize("axis", [0, 1])
def test_int8_is_within_a_step_of_its_channel(axis):
    array = weights()
    coded = encode(array, "int8", axis)
    step = np.abs(array).max(axis=1 - axis, keepdims=True) / 127
    assert coded.scale.shape == step.shape
    error = np.abs(coded.decoded() - array)
    large = np.abs(array) >= step / 2
    assert (error[large] <= (np.broadcast_to(step, array.shape) * 0.5001)[large]).all()
    assert (error <= step * 1.0001).all()


def test_half_precision_is_within_its_unit_roundoff():
    array = weights()
    error = np.abs(encode(array, "f16", 0).decoded() - array)
    assert (error <= np.abs(array) * 2.0**-11 + 2.0**-25).all()


@pytest.mark.parametrize("code", LOSSY)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_a_code_cannot_hold_stays_as_it_is(code, bad):
    array = weights()
    array[0, 0] = bad
    assert encode(array, code, 0).code == "raw"


def test_values_beyond_half_precision_stay_as_they_are():
    array = weights()
    array[0, 0] = 1e6
    assert encode(array, "f16", 0).code == "raw"
    assert encode(array, "codebook16", 0).code == "raw"
    array[:2, 0] = 3e38, -3e38
    assert encode(array, "codebook16", 0).code == "raw"


@pytest.mark.parametrize("code", LOSSY)
def test_vectors_lose_no_more_than_half_precision(code):
    assert encode(weights((500,)), code, 0).code == "f16"


@pytest.mark.parametrize("code", LOSSY)
@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int64])
def test_other_types_stay_as_they_are(code, dtype):
    assert encode(np.ones((20, 20), dtype), code, 0).code == "raw"


def relative_error(array, coded):
    return ((coded.decoded() - array)[array != 0] ** 2).sum() / (array**2).sum()


def test_small_tensors_share_a_codebook_where_it_costs_little():
    arrays = [weights((40, 60), 0), weights((30, 50), 1) * np.float32(0.1), np.float32(0.5) * (weights((9, 9), 2) > 0)]
    own = [encode(array, "codebook16", 0) for array in arrays]
    first, second, third = share(arrays, own)
    assert first.table is second.table
    assert third is own[2]  # which is exact
    for array, coded in ((arrays[0], first), (arrays[1], second)):
        assert relative_error(array, coded) < 1 / 40
        assert np.array_equal(coded.decoded()[array != 0] != 0, np.ones(np.count_nonzero(array), bool))


def test_a_tensor_alone_keeps_its_codebook():
    own = [encode(weights(), "codebook16", 0)]
    assert share([weights()], own) == own


@pytest.mark.parametrize("code", ["f32", *LOSSY])
def test_a_single_number_stays_as_it_is(code):
    for number in (np.float32(0.1), np.float32(np.nan)):
        found = encode(np.array(number), code, 0)
        assert (found.code, found.symbols.shape) == ("raw", ())
