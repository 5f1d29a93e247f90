"""Every reader on mutations of valid files: a model or one sentence, and no more memory than the file earns."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relief_export import formats
from relief_export.errors import InputError
from relief_export.formats import FORMATS, Options

CALIBRATION = np.random.default_rng(0).normal(size=(8, 1, 14, 14)).astype(np.float32)

mutations = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "zero", "repeat"]), st.floats(0, 1, exclude_max=True), st.integers(1, 255)
    ),
    min_size=1,
    max_size=4,
)


READERS = list({form.read: name for name, form in reversed(FORMATS.items())}.values())
"""One format for each reader: the packed ones share theirs, int8 is read as dense, and what goes one way is refused."""


def mutate(data, steps):
    data = bytearray(data)
    for kind, place, value in steps:
        at = int(place * len(data))
        if kind == "flip" and data:
            data[at] ^= value
        elif kind == "cut":
            data = data[:at]
        elif kind == "zero":
            data[at : at + value] = bytes(len(data[at : at + value]))
        else:
            data[at:at] = data[at : at + value]
    return bytes(data)


@pytest.fixture
def written(tmp_path, make_lenet, name):
    """The files of one format, as name -> bytes: written once, mutated again and again."""
    path = tmp_path / "written" / FORMATS[name].suffix
    path.parent.mkdir()
    FORMATS[name].write(make_lenet(0.9), path, Options(verify=False, calibration=CALIBRATION))
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.relative_to(path.parent): file.read_bytes() for file in files}


@pytest.mark.parametrize("name", READERS)
@given(steps=mutations, which=st.integers(0, 100))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mutated_file_is_a_model_or_one_sentence(tmp_path, written, name, steps, which):
    victim = sorted(written)[which % len(written)]
    for file, data in written.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(mutate(data, steps) if file == victim else data)
    message = "it was read"
    tracemalloc.start()
    try:
        model = formats.read(tmp_path / FORMATS[name].suffix)
        for value in model.graph.initializers.values():
            np.asarray(value.const_value.numpy())
    except InputError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert message
    assert "\n" not in message
    assert peak < 1 << 28
