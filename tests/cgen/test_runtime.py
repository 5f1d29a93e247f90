"""Generated C as one operator of ONNX Runtime."""

from __future__ import annotations

import threading

import numpy as np
import onnx_ir as ir
import pytest

from relief_export import runtime
from relief_export.cgen.compiler import find_compiler
from relief_export.conversion import convert_file
from relief_export.errors import InputError, MissingCompilerError
from tests.cgen.programs import RELATIVE
from tests.graph.helpers import build, run

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="there is no C compiler")
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, and the folder of its program with the operator."""
    arrays = {"w": RNG.normal(size=(4, 2, 3, 3)), "b": RNG.normal(size=4), "v": RNG.normal(size=(64, 3))}
    arrays["w"][RNG.random((4, 2)) < 0.5] = 0
    text = """g (float[n, 2, 4, 4] x) => (float[n, 3] y)
    { a = Conv<pads=[1,1,1,1]>(x, w, b) d = Tanh(a) f = Flatten(d) y = MatMul(f, v) }"""
    model = build(text, {key: array.astype(np.float32) for key, array in arrays.items()})
    folder = tmp_path_factory.mktemp("runtime")
    ir.save(model, folder / "model.onnx")
    convert_file(folder / "model.onnx", folder / "program", "c", program="tiny", onnxruntime=True)
    return model, folder / "program"


def test_a_session_takes_any_batch(made, tmp_path):
    model, folder = made
    session = runtime.session(folder, cache=tmp_path)
    assert [(v.name, v.shape) for v in session.get_inputs()] == [("x", ["batch", 2, 4, 4])]
    for batch in (1, 5, 0):
        x = RNG.normal(size=(batch, 2, 4, 4)).astype(np.float32)
        (found,) = session.run(None, {"x": x})
        assert found.shape == (batch, 3)
        if batch:
            (expected,) = run(model, {"x": x})
            assert np.abs(found - expected).max() <= RELATIVE * np.abs(expected).max()


def test_it_is_built_once(made, tmp_path, monkeypatch):
    _, folder = made
    runtime.session(folder, cache=tmp_path)
    (library,) = tmp_path.iterdir()
    before = library.stat().st_mtime_ns
    monkeypatch.setattr("relief_export.cgen.compiler.Compiler.build", lambda *_: pytest.fail("built again"))
    runtime.session(folder, cache=tmp_path)
    assert [file.stat().st_mtime_ns for file in tmp_path.iterdir()] == [before]


def test_threads_share_a_session(made, tmp_path):
    model, folder = made
    session = runtime.session(folder, cache=tmp_path)
    x = RNG.normal(size=(8, 1, 2, 4, 4)).astype(np.float32)
    expected = [run(model, {"x": sample})[0] for sample in x]
    wrong = []

    def work(k):
        for _ in range(200):
            (found,) = session.run(None, {"x": x[k]})
            if np.abs(found - expected[k]).max() > RELATIVE * np.abs(expected[k]).max():
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(x))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_is_missing_is_said(made, tmp_path, monkeypatch):
    _, folder = made
    with pytest.raises(InputError, match="no folder of generated C"):
        runtime.session(tmp_path)
    convert_file(folder.parent / "model.onnx", tmp_path / "bare", "c")
    with pytest.raises(InputError, match="again with --onnxruntime"):
        runtime.session(tmp_path / "bare")
    monkeypatch.setattr(runtime, "find_compiler", lambda: None)
    with pytest.raises(MissingCompilerError, match="no C compiler"):
        runtime.session(folder, cache=tmp_path)
