import json

import pytest

from relief_export.errors import InputError, IntegrityError
from relief_export.formats import EXACT, FORMATS, Artifact, File, Options, read_manifest, write_manifest
from relief_export.formats.dense import write


@pytest.fixture
def folder(tmp_path, make_lenet):
    artifact = write(make_lenet(), tmp_path / "model.onnx", Options())
    write_manifest(tmp_path, [artifact], {"cost": {"macs": 3}})
    return tmp_path


def edit(folder, change):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_it_is_read_as_written(folder):
    manifest = read_manifest(folder)
    assert manifest.extra == {"cost": {"macs": 3}}
    artifact = manifest["model.onnx"]
    assert artifact.tolerance == EXACT
    assert artifact.bytes == (folder / "model.onnx").stat().st_size
    assert manifest.path(artifact) == folder / "model.onnx"
    manifest.check(artifact)
    title, _, row = str(manifest).splitlines()
    assert (title, row.split()) == (str(folder), ["model.onnx", "dense", f"{artifact.bytes:,}", "exact"])


def test_one_changed_byte_is_found(folder):
    path = folder / "model.onnx"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    manifest = read_manifest(folder)
    with pytest.raises(IntegrityError, match=r"model\.onnx differs from its SHA-256"):
        manifest.check(manifest["model.onnx"])


def test_a_missing_file_is_named(folder):
    (folder / "model.onnx").unlink()
    manifest = read_manifest(folder)
    with pytest.raises(IntegrityError, match=r"model\.onnx is missing"):
        manifest.check(manifest["model.onnx"])


@pytest.mark.parametrize("path", ["../model.onnx", "/etc/passwd", "a/../../b", "", "C:\\x", "..\\x"])
def test_paths_outside_the_folder_are_refused(folder, path):
    edit(folder, lambda content: content["artifacts"][0]["files"][0].update(path=path))
    with pytest.raises(IntegrityError, match="points outside its folder"):
        read_manifest(folder)


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "secret"
    other.write_bytes(b"secret")
    (folder / "link").symlink_to(other)
    edit(folder, lambda content: content["artifacts"][0]["files"][0].update(path="link"))
    with pytest.raises(IntegrityError, match="through a link"):
        read_manifest(folder)


def test_another_version_is_refused(folder):
    edit(folder, lambda content: content.update(version=1))
    with pytest.raises(IntegrityError, match="has version 1, this program reads 2"):
        read_manifest(folder)


def leaves(value, path=()):
    """Yield the path of ``value`` and of everything inside it."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from leaves(inner, (*path, key))


def changed(content, path, value):
    """Return a copy of plain data with ``value`` at ``path``."""
    content = json.loads(json.dumps(content))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return content


WRONG = [None, True, -1, 3, 1.5, "x", [], ["x"], [None], {}, {"x": 1}, [[]], [{}]]


@pytest.mark.parametrize("kind", ["manifest", "csr"])
def test_sound_json_with_wrong_content_gives_one_sentence(tmp_path, make_lenet, kind):
    artifact = FORMATS["csr"].write(make_lenet(), tmp_path / "csr", Options())
    write_manifest(tmp_path, [artifact], {"a": 1}, references=[tmp_path / "csr" / "graph.onnx"])
    path = tmp_path / ("manifest.json" if kind == "manifest" else "csr/index.json")
    read = {"manifest": read_manifest, "csr": lambda folder: FORMATS["csr"].read(folder / "csr")}[kind]
    content = json.loads(path.read_text())
    if kind == "csr":
        (tmp_path / "manifest.json").unlink()
        content["tensors"] = content["tensors"][:2]
    messages = []
    for place in list(leaves(content))[1:]:
        for value in WRONG:
            path.write_text(json.dumps(changed(content, place, value)))
            try:
                read(tmp_path)
            except IntegrityError as error:
                messages.append(str(error))
    assert len(messages) > 100
    assert all((path.name in message or str(path.parent) in message) and "\n" not in message for message in messages)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("artifacts"),
        lambda content: content["artifacts"][0].pop("files"),
        lambda content: content["artifacts"][0].update(surprise=1),
        lambda content: content["artifacts"][0]["files"][0].update(bytes="many"),
        lambda content: content["artifacts"][0].update(tolerance=[1]),
        lambda content: content.update(artifacts=["x"]),
        lambda d: d["artifacts"][0].update(files=[]),
        lambda d: d["artifacts"][0]["tolerance"].update(relative_error="x"),
        lambda d: d["artifacts"][0]["tolerance"].update(relative_error=float("nan")),
        lambda d: d["artifacts"][0]["tolerance"].update(accuracy_drop=None),
    ],
)
def test_malformed_entries_are_refused(folder, change):
    edit(folder, change)
    with pytest.raises(IntegrityError, match=r"malformed|lacks its list"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda d: d["artifacts"][0].update(format="zip"),
            r"'model\.onnx' the unknown format 'zip'; there are dense, ",
        ),
        (lambda d: d["artifacts"].append(d["artifacts"][0]), r"lists 'model\.onnx' twice"),
        (lambda d: d.update(extra=[1]), "'extra' that is no object"),
        (lambda d: d.pop("extra"), "'extra' that is no object"),
    ],
)
def test_what_no_export_writes_is_refused(folder, change, sentence):
    edit(folder, change)
    with pytest.raises(IntegrityError, match=sentence):
        read_manifest(folder)


def test_an_absent_manifest_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_manifest(tmp_path)


def test_an_unknown_artifact_is_refused(folder):
    with pytest.raises(IntegrityError, match=r"no artifact 'x\.onnx'"):
        read_manifest(folder)["x.onnx"]


def test_artifacts_survive_plain_data():
    artifact = Artifact("a", "csr", (File("a/b", 3, "00"),), EXACT, {"values": "f32"}, ("note",))
    assert Artifact.from_dict(json.loads(json.dumps(artifact.to_dict())), "here") == artifact
