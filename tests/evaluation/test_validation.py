"""The gate: it opens for the network that was exported, and for nothing else."""

import io
import json
import pickle
import re
import zipfile

import numpy as np
import onnx_ir as ir
import pytest

from relief_export import formats
from relief_export.errors import InputError, IntegrityError, UnsupportedModelError
from relief_export.evaluation import compare, load_arrays, open_session, validate
from relief_export.formats import Options, Tolerance
from tests.evaluation.conftest import parse, reference_logits

FLOAT64_LIMIT = 1e-5  # of ONNX Runtime's float32 against the float64 reference of these tests

KINDS = tuple(formats.FORMATS)


def test_every_format_passes_on_the_network_it_holds(export, samples):
    x, y, logits = samples
    found = validate(export(*KINDS), x, y, logits)
    assert found.failures == ()
    assert found.ok
    assert [(m.format, m.optimised) for m in found.measurements] == [(k, on) for k in KINDS for on in (False, True)]
    assert found.reference_accuracy == 1 - 6 / 64
    for each in found.measurements:
        if each.format == "dense":
            assert each.agreement.relative_error < FLOAT64_LIMIT
            assert (each.agreement.same_predictions, each.agreement.accuracy) == (1.0, 1 - 6 / 64)
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_fails_by_its_hash(kind, export, samples):
    folder = export(*dict.fromkeys(("dense", kind)))
    artifact = formats.read_manifest(folder).artifacts[-1]
    path = folder / max(artifact.files, key=lambda file: file.file_bytes).path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    found = validate(folder, *samples)
    assert [(failure.file, failure.code) for failure in found.failures] == [(artifact.name, "sha256")]
    assert path.name in found.failures[0].message


def test_a_changed_file_of_an_export_is_not_compared_either(export, samples, weights, tamper):
    folder = export("dense", "sparse")
    tamper("sparse", hashes=False, fc_w=weights["fc_w"] * 2)
    with pytest.raises(IntegrityError, match=r"model\.sparse\.onnx (has \d+ bytes|differs from its SHA-256)"):
        compare(folder / "model.onnx", folder / "model.sparse.onnx", samples[0], tolerance=Tolerance(None, 1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_weight_fails_by_its_numbers(kind, export, samples, weights, tamper):
    folder = export(kind)
    weights["fc_w"][0, np.flatnonzero(weights["fc_w"][0])[0]] = 1000
    tamper(kind, hashes=False, fc_w=weights["fc_w"])
    assert {failure.code for failure in validate(folder, *samples).failures} == {"sha256"}
    tamper(kind, hashes=True, fc_w=weights["fc_w"])
    found = validate(folder, *samples)
    name = formats.FORMATS[kind].suffix
    assert not found.ok
    assert {failure.file for failure in found.failures} == {name}
    assert "accuracy" in {failure.code for failure in found.failures}
    title, _, row = str(found).splitlines()
    assert title.startswith("FAILED: 1 file, 64 samples, accuracy of the pruned network 90.62 %")
    assert (row.split()[0], row.split()[-1]) == (name, "FAILED")
    for check in (check for check in found.checks if not check.ok):
        assert check.actual < check.limit if check.code == "accuracy" else check.actual > check.limit
        assert f"sample {check.worst_sample}" in check.message


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_weight_fails_without_labels_too(kind, export, samples, weights, tamper):
    folder = export(kind)
    weights["fc_w"][0, np.flatnonzero(weights["fc_w"][0])[0]] = 1000
    tamper(kind, hashes=True, fc_w=weights["fc_w"])
    found = validate(folder, samples[0], None, samples[2])
    assert "predictions" in {failure.code for failure in found.failures}


def test_one_slightly_changed_weight_is_enough(export, samples, weights, tamper):
    folder = export("dense")
    weights["conv_w"][2, 1, 0, 0] += np.float32(0.02)
    tamper("dense", hashes=True, conv_w=weights["conv_w"])
    found = validate(folder, *samples)
    assert "relative_error" in {failure.code for failure in found.failures}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_predictions_with_moved_logits_fail(kind, export, samples, weights, tamper):
    folder = export(kind)
    if formats.read_manifest(folder).artifacts[0].tolerance.relative_error is None:
        pytest.skip(f"{kind} promises an accuracy and nothing about single outputs")
    moved = weights | {"fc_b": weights["fc_b"] + np.float32(1)}
    tamper(kind, hashes=True, fc_b=moved["fc_b"])
    found = validate(folder, *samples)
    assert {failure.code for failure in found.failures} == {"relative_error"}
    x, _, logits = samples
    if kind == "packed-f16":  # what the halves are off by adds to the shift
        moved = {name: array.astype(np.float16).astype(np.float32) for name, array in moved.items()}
    shift = float(np.abs(reference_logits(x, moved) - logits).max())
    for each in found.measurements:
        assert each.agreement.max_error == pytest.approx(shift, abs=1e-4)
    if kind == "dense":
        assert all(m.agreement.same_predictions == 1 for m in found.measurements)


def test_the_worst_sample_is_the_one_that_is_wrong(export, samples):
    x, y, logits = samples
    logits[37, 2] += 0.5
    found = validate(export("dense"), x, y, logits)
    assert {check.worst_sample for check in found.checks if check.code == "relative_error"} == {37}
    assert "worst at sample 37" in found.failures[0].message


def test_a_network_that_gives_nan_fails_and_can_be_stored(export, samples, weights, tamper):
    folder = export("dense")
    weights["fc_b"][1] = 3e38
    weights["fc_w"][1] = 3e38
    tamper("dense", hashes=True, fc_b=weights["fc_b"], fc_w=weights["fc_w"])
    found = validate(folder, *samples)
    assert {failure.code for failure in found.failures} == {"finite"}
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_file_that_is_no_model_fails_the_gate(export, samples, refresh):
    folder = export("dense")
    (folder / "model.onnx").write_bytes(b"not a model")
    refresh(folder)
    found = validate(folder, *samples)
    assert [(failure.file, failure.code) for failure in found.failures] == [("model.onnx", "loads")]


def test_the_masked_network_stands_in_for_missing_logits(export, network, samples):
    folder = export("dense")
    with pytest.raises(InputError, match=r"masked\.onnx does not exist"):
        validate(folder, samples[0], samples[1], None)
    ir.save(network, folder / "masked.onnx")
    formats.write_manifest(folder, formats.read_manifest(folder).artifacts, {}, references=[folder / "masked.onnx"])
    found = validate(folder, samples[0], None, None)
    assert (found.ok, found.reference, found.reference_accuracy) == (True, "masked.onnx", None)


def test_a_build_folder_is_found_and_progress_is_told(export, samples, tmp_path):
    calls = []
    export("dense")
    found = validate(tmp_path, *samples, progress=lambda *call: calls.append(call))
    assert found.ok
    assert calls == [("model.onnx (plain)", 64, 64, ""), ("model.onnx (optimised)", 64, 64, "")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, logits: (x[:, :1], y, logits), "input 'x' has shape batchx2x6x6, the samples 64x1x6x6"),
        (lambda x, y, logits: (x.astype(int), y, logits), "give floating-point samples"),
        (lambda x, y, logits: (x, y[:5], logits), "one label a sample"),
        (lambda x, y, logits: (x, y + 1, logits), "label 4 of sample .* is outside 0 to 3"),
        (lambda x, y, logits: (x, y - 1, logits), "label -1 of sample"),
        (lambda x, y, logits: (x, y.astype(float), logits), "give whole numbers"),
        (lambda x, y, logits: (x, y, logits[:5]), "logits have shape"),
        (lambda x, y, logits: (x, y, np.pad(logits, ((0, 0), (0, 3)))), "model.onnx gives outputs"),
        (lambda x, y, logits: (x[:0], y[:0], logits[:0]), "no samples"),
    ],
)
def test_a_test_set_that_does_not_fit_is_refused(export, samples, change, message):
    with pytest.raises(InputError, match=message):
        validate(export("dense"), *change(*samples))


def test_a_missing_manifest_or_artifact_is_refused(export, samples, tmp_path):
    with pytest.raises(InputError, match=r"has no manifest\.json: give an artifacts folder"):
        validate(tmp_path, *samples)
    folder = export("dense")
    (folder / "model.onnx").unlink()
    with pytest.raises(InputError, match=r"model\.onnx is missing though the manifest lists it"):
        validate(folder, *samples)
    formats.write_manifest(folder, [], {})
    with pytest.raises(InputError, match="lists no artifact"):
        validate(folder, *samples)


def test_arrays_are_read(tmp_path, samples):
    x, y, _ = samples
    np.savez(tmp_path / "test.npz", x=x, y=y)
    found = load_arrays(str(tmp_path / "test.npz"))
    np.testing.assert_array_equal(found.x, x)
    np.testing.assert_array_equal(found.y, y)
    assert found.logits is None


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def npz(path, **members):
    """Write raw members, so that nothing of NumPy's own checks is in the way."""
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def deflated(array, *, damage):
    file = io.BytesIO()
    np.savez_compressed(file, x=array)
    data = bytearray(file.getvalue())
    start = data.index(b"x.npy") + len(b"x.npy") + 20  # past the sizes of more than 4 GiB
    data[start : start + len(damage)] = damage
    return bytes(data)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, InputError, "does not exist"),
        (b"garbage", IntegrityError, "is no readable .npz file"),
        (npy(np.zeros(3)), InputError, "is a single array"),
        (pickle.dumps(Bomb()), IntegrityError, "is no readable .npz file"),
        ({"y": npy(np.zeros(3))}, InputError, "has no array 'x'"),
        ({"x": npy(np.array([Bomb()], dtype=object))}, InputError, "'x' holds pickled objects"),
        ({"x": npy(np.zeros(300))[:500]}, IntegrityError, "is no readable .npz file"),
        ({"x": npy(np.zeros(300)).replace(b"}", b" ")}, IntegrityError, "is no readable .npz file"),
        ({"x": npy(np.zeros(300)).replace(b"(300,), }", b"(9" + b"0" * 13 + b",)}")}, IntegrityError, "is no readable"),
        (deflated(np.zeros(300), damage=b"\xff" * 8), IntegrityError, "is no readable .npz file .*decompressing"),
    ],
)
def test_hostile_arrays_are_refused(tmp_path, content, kind, message):
    path = tmp_path / "test.npz"
    if isinstance(content, dict):
        npz(path, **content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(kind, match=message):
        load_arrays(path)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ("g (float[n, 3] x) => (string[n, 3] y) { y = Cast <to = 8> (x) }", r"'y' is tensor.string.: give one of num"),
        ("g (float[n, 3] x) => (bfloat16[n, 3] y) { y = Cast <to = 16> (x) }", r"'y' is tensor.bfloat16.: give one"),
        ("g (float x) => (float y) { y = Relu (x) }", "input 'x' has no batch axis"),
        ("g (float[n, 3] x) => (float[1] y) { y = ReduceMax <keepdims = 0> (x, a) }", "has no batch axis in front"),
        (
            "g (float[n, 3] x) => (float[n, 3] y) { y = my.domain.Mystery (x) }",
            "operator my.domain:Mystery, which this",
        ),
    ],
)
def test_a_model_that_cannot_be_compared_is_refused(tmp_path, graph, message):
    header = '<ir_version: 9, opset_import: ["" : 20, "my.domain" : 1]>\n'
    parsed = ir.from_onnx_text(header + graph.replace("Max <keepdims = 0> (x, a)", "Max <keepdims = 1> (x)"))
    ir.save(parsed, tmp_path / "odd.onnx")
    with pytest.raises(UnsupportedModelError, match=message):
        open_session(tmp_path / "odd.onnx").run(np.zeros((2, 3), np.float32))


def test_a_changed_reference_is_not_trusted(export, network, samples):
    folder = export("dense")
    path = folder / "masked.onnx"
    ir.save(network, path)
    artifacts = formats.read_manifest(folder).artifacts
    found = validate(folder, samples[0], None, None)
    assert (found.ok, found.measurements) == (False, ())
    assert "manifest.json does not list masked.onnx" in found.failures[0].message
    formats.write_manifest(folder, artifacts, {}, references=[path])
    found = validate(folder, samples[0], None, None)
    assert (found.ok, found.checks[0].file, found.checks[0].code) == (True, "masked.onnx", "sha256")
    network.graph.initializers["fc_b"].const_value = ir.tensor(np.zeros(4, dtype=np.float32), name="fc_b")
    ir.save(network, path)
    found = validate(folder, samples[0], None, None)
    assert (found.ok, found.measurements, found.reference_accuracy) == (False, (), None)
    assert re.search(r"the reference cannot be trusted: .*masked\.onnx (has|differs)", found.failures[0].message)
    assert validate(folder, *samples).ok  # with logits it is no reference


def test_changed_samples_are_not_trusted(export, samples):
    folder, (x, y, logits) = export("dense"), samples
    np.savez(folder / "reference.npz", x=x, y=y, logits=logits)
    formats.write_manifest(folder, formats.read_manifest(folder).artifacts, {}, references=[folder / "reference.npz"])
    assert load_arrays(folder / "reference.npz").logits is not None
    np.savez(folder / "reference.npz", x=x, y=y, logits=logits + 1)
    with pytest.raises(IntegrityError, match=r"reference\.npz differs from its SHA-256"):
        load_arrays(folder / "reference.npz")


MAPS = """
<ir_version: 9, opset_import: ["" : 20]>
net (float[batch, 2, 6, 6] x, float[5, 2, 3, 3] conv_w) => (float[batch, 5, 4, 4] maps) {
  maps = Conv <kernel_shape = [3, 3]> (x, conv_w)
}
"""
NUMBERS = """
<ir_version: 9, opset_import: ["" : 20]>
net (float[batch, 2, 6, 6] x, float[5, 2, 3, 3] conv_w) => (float[batch] number) {
  c = Conv <kernel_shape = [3, 3]> (x, conv_w)
  axes = Constant <value_ints = [1, 2, 3]> ()
  number = ReduceMean <keepdims = 0> (c, axes)
}
"""


@pytest.mark.parametrize("text", [MAPS, NUMBERS])
def test_outputs_that_are_no_scores_are_held_to_their_errors(text, samples, weights, tmp_path):
    x, y, _ = samples
    network = parse(text, {"conv_w": weights["conv_w"]})
    exact = ("dense", "sparse", "packed", "csr", "ort")
    folder = tmp_path / "artifacts"
    folder.mkdir()

    def write(names, **changed):
        for name, array in changed.items():
            network.graph.initializers[name].const_value = ir.tensor(array, name=name)
        made = [
            formats.FORMATS[k].write(network, folder / formats.FORMATS[k].suffix, Options(calibration=x)) for k in names
        ]
        formats.write_manifest(folder, made, {})

    write(exact)
    reference = open_session(folder / "model.onnx", optimised=False).run(x)[0]
    found = validate(folder, x, None, reference)
    assert found.ok
    assert {check.code for check in found.checks} == {"sha256", "relative_error"}
    assert all(m.agreement.same_predictions is None for m in found.measurements)
    with pytest.raises(InputError, match="labels y need outputs"):
        validate(folder, x, y, reference)
    write(exact, conv_w=weights["conv_w"] * np.float32(1.001))
    found = validate(folder, x, None, reference)
    assert {(failure.file, failure.code) for failure in found.failures} == {
        (formats.FORMATS[name].suffix, "relative_error") for name in exact
    }


def test_accuracy_cannot_be_promised_of_maps(samples, weights, tmp_path):
    network = parse(MAPS, {"conv_w": weights["conv_w"]})
    artifact = formats.FORMATS["int8"].write(network, tmp_path / "model.int8.onnx", Options(calibration=samples[0]))
    formats.write_manifest(tmp_path, [artifact], {})
    reference = open_session(network, optimised=False).run(samples[0])[0]
    found = validate(tmp_path, samples[0], None, reference)
    assert {failure.code for failure in found.failures} == {"predictions"}
    assert "outputs are no scores of classes" in found.failures[0].message


def test_without_a_compiler_c_is_not_proven(export, samples, monkeypatch):
    folder = export("dense", "c")
    monkeypatch.setattr("relief_export.evaluation.programs.find_compiler", lambda: None)
    found = validate(folder, *samples)
    assert found.ok
    assert [m.format for m in found.measurements] == ["dense", "dense"]
    assert [check.message for check in found.checks if check.code == "compiled"] == ["c: not proven: no C compiler"]
    strict = validate(folder, *samples, strict=True)
    assert [(failure.file, failure.code) for failure in strict.failures] == [("c", "compiled")]


def test_a_changed_number_in_the_c_source_is_found(export, samples, refresh):
    folder = export("c")
    path = folder / "c" / "net.c"
    text = path.read_text()
    table = text.index("static const float weight_")
    place = text.index("{", table) + 1
    path.write_text(text[:place] + " 1000.0f, " + text[text.index(",", place) + 1 :])
    assert {failure.code for failure in validate(folder, *samples).failures} == {"sha256"}
    refresh(folder)
    assert "relative_error" in {failure.code for failure in validate(folder, *samples).failures}
    path.write_text(text.replace("void net_run", "void net_ran"))
    refresh(folder)
    assert {failure.code for failure in validate(folder, *samples).failures} == {"loads"}


TWO = """
<ir_version: 9, opset_import: ["" : 20]>
g (float[n, 3] a, int64[n, 2] b) => (float[n, 3] sums, float[n] means) {
  c = Cast <to = 1> (b)
  t = ReduceSum <keepdims = 1> (c, axis)
  sums = Add (a, t)
  means = ReduceMean <keepdims = 0> (sums, axis)
}
"""


def test_samples_of_several_inputs_go_by_name(tmp_path):
    graph = ir.from_onnx_text(TWO)
    axis = ir.Value(name="axis", const_value=ir.tensor(np.array([1]), name="axis"))
    graph.graph.register_initializer(axis)
    for node in graph.graph:
        for place, value in enumerate(node.inputs):
            if value is not None and value.name == "axis":
                node.replace_input_with(place, axis)
    path = tmp_path / "two.onnx"
    ir.save(graph, path)
    a, b = np.random.default_rng(0).random((7, 3), dtype=np.float32), np.arange(14).reshape(7, 2)
    np.savez(tmp_path / "two.npz", **{"x.a": a, "x.b": b, "y": np.zeros(7, dtype=int), "logits.sums": a})
    arrays = load_arrays(tmp_path / "two.npz")
    assert set(arrays.x) == {"a", "b"}
    assert list(arrays.logits) == ["sums"]
    session = open_session(path)
    sums, means = session.run(arrays.x, batch=3)
    np.testing.assert_allclose(sums, a + b.sum(1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(means, sums.mean(1), rtol=1e-6)
    assert compare(path, path, arrays.x, tolerance=0.0).ok
    with pytest.raises(InputError, match=r"has 2 inputs \(a, b\): give samples of each by its name"):
        session.run(a)
    with pytest.raises(InputError, match=r"has the inputs a, b, the samples are of a$"):
        session.run({"a": a})
    with pytest.raises(InputError, match=r"the samples are of 2 inputs \(a, b\): give a model of one"):
        _ = arrays.one_input
    # Under the inputs' own names, and among other arrays.
    np.savez(tmp_path / "own.npz", a=a, b=b, y=np.zeros(7, dtype=int), more=np.float32(1))
    assert compare(path, path, load_arrays(tmp_path / "own.npz", path).x, tolerance=0.0).ok
    np.savez(tmp_path / "odd.npz", **{"x.a": a, "x.b": b[:3]})
    with pytest.raises(InputError, match=r"odd.npz: array 'x.b' holds 3 samples, another one 7"):
        load_arrays(tmp_path / "odd.npz")
