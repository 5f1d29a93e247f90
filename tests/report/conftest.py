import pytest

from tests.report.folders import make_folder


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Return a build folder that passed; tests must not change it."""
    return make_folder(tmp_path_factory.mktemp("build") / "tiny")
