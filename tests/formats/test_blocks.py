import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relief_export.formats import blocks


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 16)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 160, 161])
def test_locate_finds_what_flatnonzero_finds(length):
    flags = np.random.default_rng(0).random(length) < 0.4
    found = blocks.locate(flags)
    assert found.dtype == np.int32
    assert np.array_equal(found, np.flatnonzero(flags))


@given(positions=st.lists(st.integers(0, 500), min_size=1, unique=True))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_gaps_of_all_runs_are_those_of_the_whole(positions):
    positions = np.sort(np.array(positions, np.int32))
    parts = list(blocks.runs(positions))
    assert np.array_equal(np.concatenate([gaps for _, gaps in parts]), np.diff(positions, prepend=0))
    assert np.array_equal(np.concatenate([positions[span] for span, _ in parts]), positions)


@pytest.mark.parametrize("shape", [(100,), (7, 5), (3, 100), (40, 2, 2), (0, 4)])
def test_rows_cover_the_first_axis_once(shape):
    array = np.arange(np.prod(shape)).reshape(shape)
    parts = [array[rows] for rows in blocks.rows(array)]
    assert np.array_equal(np.concatenate(parts) if parts else array, array)
    assert all(part.size <= 16 or len(part) == 1 for part in parts)
