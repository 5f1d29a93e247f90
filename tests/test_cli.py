"""The command line: exit codes, one sentence for a mistake, one JSON object on stdout."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from docs.reference import generate
from relief_export import cli, stages
from relief_export.cli import run
from relief_export.cli.common import table
from relief_export.errors import MissingExtraError
from relief_export.progress import bars
from relief_export.recipe import recipe_names
from tests.answers import TABLES, check_answer

MODEL = """
<ir_version: 9, opset_import: ["" : 18]>
net (float[batch, 3] x) => (float[batch, 2] y)
<float[2, 3] w = {1, 0, 0, 0, 2, 0}, float[2] b = {0.5, -1}>
{ y = Gemm <transB = 1> (x, w, b) }
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run every test in a folder with a good model and several bad ones."""
    monkeypatch.chdir(tmp_path)
    onnx.save(onnx.parser.parse_model(MODEL), "good.onnx")
    Path("truncated.onnx").write_bytes(Path("good.onnx").read_bytes()[:60])
    Path("text.onnx").write_text("this is no model")
    np.savez("data.npz", x=np.eye(3, dtype=np.float32), y=np.array([0, 1, 0]))
    np.savez("wide.npz", x=np.ones((4, 5), dtype=np.float32))
    np.savez("labels.npz", x=np.eye(3, dtype=np.float32), y=np.array([0, 1, 7]))
    np.savez("pickled.npz", x=np.array([{}], dtype=object))
    Path("broken.toml").write_text("[data\n")
    return tmp_path


RECIPE = str(Path(__file__).parent.parent / "pipelines" / "digits-lenet5.toml")

BAD = {
    "unknown command": (["pack", "good.onnx"], "pack"),
    "unknown option": (["cost", "good.onnx", "--fast"], "--fast"),
    "missing argument": (["shrink", "good.onnx"], "OUT.onnx"),
    "run: unknown recipe": (["run", "digits-lenet6"], "digits-lenet6"),
    "run: missing file": (["run", "missing.toml"], "missing.toml"),
    "run: not TOML": (["run", "broken.toml"], "broken.toml"),
    "run: unknown key": (["run", RECIPE, "--set", "train.epoch=2"], "train.epoch is not a key; did you mean"),
    "run: wrong type": (["run", RECIPE, "--set", "train.epochs=many"], "train.epochs"),
    "run: impossible value": (["run", RECIPE, "--set", "relief.alpha_fc=1.5"], "relief.alpha_fc"),
    "train: no value": (["train", RECIPE, "--set", "train.epochs"], "train.epochs"),
    "train: negative seed": (["train", RECIPE, "--seed=-1"], "seed"),
    "train: seed of more than 64 bits": (["train", RECIPE, "--seed", "9" * 20], "seed must be 0 or more and below"),
    "train: unknown variant": (["train", RECIPE.removesuffix(".toml") + "@nope"], "digits-lenet5"),
    "relieve: no folder": (["relieve", "nowhere"], "nowhere is no build folder"),
    "export: no folder": (["export", "nowhere"], "nowhere is no build folder"),
    "validate: no folder": (["validate", "nowhere"], "nowhere"),
    "report: no folder": (["report", "nowhere"], "nowhere"),
    "audit: missing": (["audit", "missing.onnx", "--flash", "1MiB"], "missing.onnx"),
    "audit: no size": (["audit", "good.onnx", "--flash", "12 parsecs"], "12 parsecs"),
    "audit: unknown target": (["audit", "good.onnx", "--target", "toaster"], "toaster"),
    "cost: missing": (["cost", "missing.onnx"], "missing.onnx"),
    "cost: not ONNX": (["cost", "text.onnx"], "text.onnx"),
    "cost: truncated": (["cost", "truncated.onnx"], "truncated.onnx"),
    "shrink: missing": (["shrink", "missing.onnx", "out.onnx"], "missing.onnx"),
    "shrink: not ONNX": (["shrink", "text.onnx", "out.onnx"], "text.onnx"),
    "shrink: truncated": (["shrink", "truncated.onnx", "out.onnx"], "truncated.onnx"),
    "shrink: onto itself": (["shrink", "good.onnx", "good.onnx"], "good.onnx"),
    "convert: missing": (["convert", "missing.onnx", "out.onnx", "--to", "sparse"], "missing.onnx"),
    "convert: truncated": (["convert", "truncated.onnx", "out.onnx", "--to", "csr"], "truncated.onnx"),
    "convert: unknown format": (["convert", "good.onnx", "out.onnx", "--to", "zip"], "zip"),
    "convert: uncalibrated": (["convert", "good.onnx", "out.onnx", "--to", "int8"], "--calibration"),
    "convert: missing samples": (
        ["convert", "good.onnx", "out.onnx", "--to", "int8", "--calibration", "missing.npz"],
        "missing.npz",
    ),
    "compare: missing": (["compare", "good.onnx", "missing.onnx", "--data", "data.npz"], "missing.onnx"),
    "compare: missing data": (["compare", "good.onnx", "good.onnx", "--data", "missing.npz"], "missing.npz"),
    "compare: wrong shape": (["compare", "good.onnx", "good.onnx", "--data", "wide.npz"], "4x5"),
    "compare: wrong labels": (["compare", "good.onnx", "good.onnx", "--data", "labels.npz"], "7"),
    "compare: pickled": (["compare", "good.onnx", "good.onnx", "--data", "pickled.npz"], "pickled"),
}


@pytest.mark.parametrize(("arguments", "named"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_exit_2(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]):
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("Error: ")
    assert named in printed.err
    assert len(printed.err.splitlines()) == 1
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["shrink", "good.onnx", "folder.onnx"], "folder.onnx"),
        (["shrink", "good.onnx", "good.onnx/small.onnx"], "good.onnx"),
        (["convert", "good.onnx", "folder.onnx", "--to", "sparse"], "folder.onnx"),
        (["validate", "good.onnx"], "good.onnx"),
        (["compare", "good.onnx", "good.onnx", "--data", "number.npz"], "number.npz: array 'x' is a single number"),
        (["convert", "good.onnx", "i.onnx", "--to", "int8", "--calibration", "number.npz"], "calibration samples"),
        (["compare", "good.onnx", "good.onnx", "--data", "none.npz"], "none.npz: array 'x' holds no samples"),
        (["convert", "good.onnx", "i.onnx", "--to", "int8", "--calibration", "none.npz"], "of input 'x' are none"),
        (
            ["convert", "good.onnx", "i.onnx", "--to", "int8", "--calibration", "wide.npz"],
            "cannot quantise this model (Got invalid dimensions for input: x",
        ),
        (["compare", "good.onnx", "good.onnx", "--data", "data.npz", "--relative-error", "nan"], "relative-error"),
        (["compare", "good.onnx", "good.onnx", "--data", "data.npz", "--relative-error", "-1"], "relative-error"),
    ],
)
def test_what_cannot_be_opened_written_or_compared_is_one_sentence(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
):
    Path("folder.onnx").mkdir()
    np.savez("number.npz", x=np.float32(3))
    np.savez("none.npz", x=np.zeros((0, 3), np.float32))
    assert run([*arguments, "--json"]) == 2
    printed = capsys.readouterr()
    assert named in json.loads(printed.out)["error"]
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize("name", ["cost: truncated", "run: unknown recipe", "convert: unknown format"])
def test_bad_input_with_json_is_still_one_object(name: str, capsys: pytest.CaptureFixture[str]):
    arguments, named = BAD[name]
    assert run([*arguments, "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ok"], named in answer["error"]) == (False, True)


@pytest.mark.parametrize("command", sorted(cli.cli.commands))
def test_every_command_has_json_and_an_example(command: str, capsys: pytest.CaptureFixture[str]):
    assert run([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--json" in text
    if cli.cli.commands[command].params[0].param_type_name == "argument":
        assert f"relief-export {command} " in text
    named = re.findall(r"[\w-]*(?:digits|mnist|cifar)[\w-]*", text)
    assert set(named) <= set(recipe_names())


def test_the_help_lists_every_command_with_an_uncut_line(capsys: pytest.CaptureFixture[str]):
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in cli.cli.commands.items():
        assert command.short_help, name
        assert re.search(rf"^  {name} +{re.escape(command.short_help)}$", text, re.MULTILINE)


def test_prune_is_relieve(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("prune", "relieve"):
        assert run([name, str(tmp_path)]) == 2
        assert f"{tmp_path} is no build folder" in capsys.readouterr().err


def test_an_installation_has_the_recipes_and_an_empty_list_is_an_error(tmp_path: Path):
    """Build the package as a wheel has it, and list the recipes from there."""
    root = Path(RECIPE).parent.parent
    build = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib"]
    made = subprocess.run([*build, str(tmp_path / "lib")], cwd=root, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    command = [sys.executable, "-m", "relief_export", "recipes", "--json"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "lib")}

    def listed() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    names = [recipe["name"] for recipe in json.loads(listed().stdout)["result"]["recipes"]]
    assert names == sorted(path.stem for path in Path(RECIPE).parent.glob("*.toml"))
    shutil.rmtree(tmp_path / "lib" / "relief_export" / "pipelines")
    empty = listed()
    assert empty.returncode == 2
    assert "there are no recipes in" in json.loads(empty.stdout)["error"]


def test_no_arguments_shows_the_help(capsys: pytest.CaptureFixture[str]):
    assert run([]) == 2
    assert "From a recipe to files:" in capsys.readouterr().err


def test_cost_counts_by_hand(capsys: pytest.CaptureFixture[str]):
    assert run(["cost", "good.onnx", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)["result"]["cost"]
    assert cost["parameters"] == {"dense": None, "structural": 8, "nonzero": 4}
    assert cost["macs"] == {"dense": None, "structural": 6, "nonzero": 2}
    assert run(["cost", "good.onnx"]) == 0
    assert "parameters" in capsys.readouterr().out


def test_compare_says_no_with_exit_1(capsys: pytest.CaptureFixture[str]):
    model = onnx.parser.parse_model(MODEL)
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[1, 1] = 2.5
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, "other.onnx")
    assert run(["compare", "good.onnx", "good.onnx", "--data", "data.npz", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert run(["compare", "good.onnx", "other.onnx", "--data", "data.npz", "--json"]) == 1
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert answer["ok"] is False
    assert {failure["file"] for failure in answer["failures"]} == {"other.onnx"}


def test_compare_closes_with_its_verdict(capsys: pytest.CaptureFixture[str]):
    assert run(["compare", "good.onnx", "good.onnx", "--data", "data.npz"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "compare: good.onnx against good.onnx, 3 samples: within the tolerance"
    )


def test_samples_may_be_called_like_the_input(capsys: pytest.CaptureFixture[str]):
    named = onnx.parser.parse_model(MODEL.replace("batch, 3] x)", "batch, 3] img)").replace("(x, w", "(img, w"))
    onnx.save(named, "named.onnx")
    x = np.eye(3, dtype=np.float32)
    np.savez("img.npz", img=x)
    assert run(["compare", "named.onnx", "named.onnx", "--data", "img.npz"]) == 0
    # The other model may call it otherwise: one input is one input.
    assert run(["compare", "named.onnx", "good.onnx", "--data", "img.npz"]) == 0
    np.savez("more.npz", img=x, other=np.float32(1))
    assert run(["compare", "named.onnx", "named.onnx", "--data", "more.npz"]) == 0
    for name, key in (("plain", "x"), ("dotted", "x.img")):
        np.savez(f"{name}.npz", **{key: x})
        assert run(["compare", "named.onnx", "named.onnx", "--data", f"{name}.npz"]) == 0
        assert run(["convert", "named.onnx", f"{name}.int8.onnx", "--to", "int8", "--calibration", f"{name}.npz"]) == 0
    written = {Path(f"{name}.int8.onnx").read_bytes() for name in ("plain", "dotted")}
    assert len(written) == 1
    capsys.readouterr()
    np.savez("foreign.npz", images=x)
    assert run(["compare", "named.onnx", "named.onnx", "--data", "foreign.npz"]) == 2
    expected = "foreign.npz has no array 'x': save the samples under that name, or that of the model's input: img"
    assert expected in capsys.readouterr().err


def test_a_packed_input_of_shrink_is_said_to_be_packed_no_more(capsys: pytest.CaptureFixture[str]):
    model = onnx.parser.parse_model(MODEL.replace("3]", "300]").replace("2]", "200]").replace("{0.5, -1}", "{0}"))
    rng = np.random.default_rng(0)
    weight = np.where(rng.random((200, 300)) < 0.02, rng.random((200, 300)), 0).astype(np.float32)
    for tensor, array in zip(model.graph.initializer, (weight, np.ones(200, np.float32)), strict=True):
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, "large.onnx")
    for kind, source in (("packed", "large.packed.onnx"), ("sparse", "large.sparse.onnx"), ("csr", "large-csr")):
        assert run(["convert", "large.onnx", source, "--to", kind]) == 0
        capsys.readouterr()
        assert run(["shrink", source, "small.onnx"]) == 0
        note = capsys.readouterr().out.splitlines()[-1]
        assert note.startswith(f"the input was {kind} (")
        assert note.endswith(f"convert --to {kind} makes small.onnx {kind} again")
        assert run(["shrink", source, "small.onnx", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["result"]["notes"] == [note]
        # What was written is plain, and is not taken for anything else.
        assert run(["shrink", "small.onnx", "again.onnx"]) == 0
        assert "the input was" not in capsys.readouterr().out


def test_every_command_answers_in_one_envelope(capsys: pytest.CaptureFixture[str]):
    assert run(["audit", "good.onnx", "--flash", "1MiB", "--ram", "1KiB"]) == 0
    assert run(["audit", "good.onnx", "--flash", "16B"]) == 1
    capsys.readouterr()
    assert run(["audit", "good.onnx", "--ram", "8B", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert {key: answer[key] for key in ("schema", "command", "ok", "error")} == {
        "schema": 1, "command": "audit", "ok": False, "error": None,
    }  # fmt: skip
    (failure,) = answer["failures"]
    message = failure.pop("message")
    # 3 and 2 floats, each in its own 16 bytes
    assert failure == {"code": "ram", "file": "good.onnx", "actual": 32, "limit": 8, "unit": "bytes"}
    assert message.startswith("RAM: good.onnx needs 32 bytes")
    assert answer["result"]["budget"]["ram_bytes"] == 8
    assert run(["audit", "missing.onnx", "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ok"], answer["result"], answer["failures"], answer["command"]) == (False, None, [], "audit")
    assert "missing.onnx" in answer["error"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["cost", "good.onnx"],
        ["shrink", "good.onnx", "small.onnx"],
        ["convert", "good.onnx", "packed.onnx", "--to", "packed"],
        ["compare", "good.onnx", "good.onnx", "--data", "data.npz"],
        ["audit", "good.onnx", "--flash", "1KiB", "--baseline", "good.onnx"],
        ["ops", "good.onnx"],
        ["recipes"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_answers_are_what_the_reference_says_and_sizes_say_their_unit(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    assert run([*arguments, "--json"]) == 0
    check_answer(json.loads(capsys.readouterr().out))


def test_the_reference_knows_every_command():
    assert {name.split(" ")[0] for name in TABLES} == set(cli.cli.commands)


def test_the_generated_reference_is_up_to_date():
    for name in ("json.md", "ops.md"):
        assert (generate.HERE / name).read_text() == generate.PAGES[name](), "run python -m docs.reference.generate"


def test_ops_tells_what_blocks_a_model(capsys: pytest.CaptureFixture[str]):
    onnx.save(onnx.parser.parse_model(OPEN), "open.onnx")
    assert run(["ops", "open.onnx", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["result"]["operators"]
    assert [(row["operator"], row["outcome"], row["nodes"]) for row in rows] == [
        ("MatMul", "rule", 2), ("Relu", "rule", 1), ("my.domain::Mystery", "unknown", 2),
    ]  # fmt: skip
    assert run(["ops"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^Conv +rule +\w", text, re.MULTILINE)
    assert re.search(r"^NonMaxSuppression +opaque$", text, re.MULTILINE)


def test_audit_prints_what_every_file_takes(capsys: pytest.CaptureFixture[str]):
    size = Path("good.onnx").stat().st_size
    assert run(["audit", "good.onnx", "--flash", f"{2 * size}B", "--ram", "16B"]) == 1
    printed = capsys.readouterr().out
    assert re.search(rf"^good\.onnx +onnx +- +{size} +32 +50\.00 % +200\.00 %$", printed, re.MULTILINE)
    assert f"of {2 * size} flash" in printed
    assert "RAM of good.onnx: activations 32 bytes at Gemm y (lower bound 32)" in printed
    assert re.search(r"^audit: good\.onnx: over budget\nFAILED: RAM: good\.onnx needs 32", printed, re.MULTILINE)


def test_audit_without_a_budget_says_that_nothing_was_checked(capsys: pytest.CaptureFixture[str]):
    assert run(["audit", "good.onnx"]) == 0
    printed = capsys.readouterr().out
    assert "audit: good.onnx: no budget was given, nothing was checked" in printed
    assert "within" not in printed


def test_a_pull_request_is_held_to_its_baseline(capsys: pytest.CaptureFixture[str]):
    wide = onnx.parser.parse_model(MODEL)
    wide.doc_string = "x" * (Path("good.onnx").stat().st_size // 2)
    onnx.save(wide, "wide.onnx")
    grown = Path("wide.onnx").stat().st_size / Path("good.onnx").stat().st_size - 1
    against = ["audit", "wide.onnx", "--baseline", "good.onnx", "--max-growth"]
    assert run([*against, "60%"]) == 0
    printed = capsys.readouterr().out
    # The baseline is the file itself, and is named once.
    assert f"\nagainst good.onnx: flash {100 * grown:+.2f} %, RAM +0.00 %\n" in printed
    # Of growth alone, for no budget was given.
    assert printed.endswith("audit: wide.onnx: grown by no more than is allowed\n")
    assert run([*against, "2%"]) == 1
    failed = capsys.readouterr().out
    assert "audit: wide.onnx: grown by more than is allowed\nFAILED: flash: wide.onnx needs" in failed
    assert "of good.onnx; 2.00 % more is allowed" in failed
    assert "budget" not in printed + failed
    assert run([*against, "0.02", "--annotate", "github", "--json"]) == 1
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert answer["result"]["growth"]["flash_change"] == pytest.approx(grown)
    (failure,) = answer["failures"]
    assert (failure["code"], failure["limit"], failure["unit"]) == ("flash_growth", 0.02, "fraction")
    annotation = printed.err.splitlines()[0]
    assert annotation.startswith("::error file=wide.onnx,title=relief-export flash_growth::flash: wide.onnx needs")
    assert "2.00 %25 more is allowed" in annotation  # a bare % would start an escape there
    assert run(["audit", "good.onnx", "--max-growth", "2%"]) == 2
    capsys.readouterr()
    # A bare 2 would be 200 %, which nobody means and every file passes.
    for text in ("two", "2", "1", "2.5", "-2%"):
        assert run(["audit", "good.onnx", "--baseline", "good.onnx", "--max-growth", text]) == 2
        assert 'write a percentage such as "2%", or a fraction such as 0.02' in capsys.readouterr().err


def test_a_gain_of_accuracy_is_no_failure(capsys: pytest.CaptureFixture[str]):
    model = onnx.parser.parse_model(MODEL)
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    for name, factor in (("better", 3), ("worse", -3)):
        weight[0, 2], weight[1, 2] = factor, -factor
        model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
        onnx.save(model, f"{name}.onnx")
    x = np.eye(3, dtype=np.float32) * np.array([1, 1, -1], np.float32)
    np.savez("signed.npz", x=np.r_[x, -x], y=np.array([0, 1, 1, 0, 0, 0]))
    # The good model is right on five of six: the third column tells the classes of the last two samples apart.
    data = ["--data", "signed.npz", "--json"]
    assert run(["compare", "good.onnx", "better.onnx", "--accuracy-drop", "0", *data]) == 0
    (found,) = json.loads(capsys.readouterr().out)["result"]["outputs"].values()
    assert found["accuracy_change"] > 0
    assert run(["compare", "good.onnx", "better.onnx", *data]) == 1  # without it B must predict what A does
    capsys.readouterr()
    assert run(["compare", "better.onnx", "good.onnx", "--accuracy-drop", "0.01", *data]) == 1
    (failure,) = json.loads(capsys.readouterr().out)["failures"]
    assert (failure["code"], failure["limit"], failure["unit"]) == ("accuracy", -0.01, "fraction")
    assert failure["actual"] < -0.01
    assert run(["compare", "better.onnx", "good.onnx", "--accuracy-drop", "0.5", *data]) == 0


def test_symbolic_lengths_are_given_on_the_command_line(capsys: pytest.CaptureFixture[str]):
    text = '<ir_version: 9, opset_import: ["" : 18]> g (float[n, h] x) => (float[n, h] y) { y = Relu (x) }'
    onnx.save(onnx.parser.parse_model(text), "open.onnx")
    assert run(["audit", "open.onnx", "--ram", "1KiB"]) == 2
    assert "tensor 'x' has no known size" in capsys.readouterr().err
    assert run(["audit", "open.onnx", "--ram", "1KiB", "--dim", "h=64", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["result"]["files"]
    assert row["ram_bytes"] == 2 * 64 * 4
    assert run(["cost", "open.onnx", "--dim", "h=32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"]["arena"]["arena_bytes"] == 2 * 32 * 4
    assert run(["shrink", "open.onnx", "fixed.onnx", "--dim", "h=8"]) == 0
    stated = onnx.load("fixed.onnx").graph.input[0].type.tensor_type.shape.dim[1]
    assert stated.dim_value == 8
    for wrong in ("h", "h=", "h=x", "z=3"):
        assert run(["cost", "open.onnx", "--dim", wrong]) == 2


@pytest.mark.parametrize("signal", [KeyboardInterrupt, click.Abort])
def test_interruption_says_how_to_go_on(
    signal: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(*_: object, **__: object) -> None:
        raise signal

    monkeypatch.setattr(stages, "run", interrupted)
    assert run(["run", RECIPE]) == 130
    assert "run the same command again to go on" in capsys.readouterr().err


def test_recipes_are_listed_with_what_they_reproduce(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(Path(RECIPE).parent.parent)
    assert run(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["result"]["recipes"]
    assert [row["name"] for row in listed] == sorted(path.stem for path in Path("pipelines").glob("*.toml"))
    assert all(row["description"] for row in listed)


def test_progress_is_silent_off_a_terminal_and_drawn_when_asked(capsys: pytest.CaptureFixture[str]):
    for wanted, drawn in ((None, False), (False, False), (True, True)):
        with bars(wanted=wanted) as callback:
            if callback is not None:
                callback("train", 3, 10, "epoch 1")
        printed = capsys.readouterr()
        assert (printed.out, "3/10" in printed.err) == ("", drawn)


def test_table_aligns_numbers_to_the_right():
    lines = table(("", "dense"), [("[bold]", 1), ("b", "1,000")])
    assert lines[-2].startswith("[bold]")  # not taken for markup
    assert lines[-2].endswith("    1")
    assert lines[-1].endswith("1,000")


OPEN = """
<ir_version: 9, opset_import: ["" : 18, "my.domain" : 1]>
net (float[batch, 3] x) => (float[batch, m] y)
<float[3, 2] w = {1, 0, 0, 0, 2, 0}>
{ h = my.domain.Mystery (x)  z = my.domain.Mystery (h)  p = MatMul (x, w)  q = MatMul (z, p)  y = Relu (q) }
"""


def test_what_is_not_known_is_no_bare_number(capsys: pytest.CaptureFixture[str]):
    onnx.save(onnx.parser.parse_model(OPEN), "open.onnx")
    assert run(["cost", "open.onnx"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"MACs +at least 6 \(3 operators unknown\) +at least 2 \(3 operators unknown\)", printed)
    assert "activation arena: unknown: tensor 'h' has no known size" in printed
    assert "not counted: my.domain::Mystery h" in printed
    assert run(["cost", "open.onnx", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["result"]["arena"] is None
    assert [row["op"] for row in answer["result"]["cost"]["unknown"]] == ["my.domain::Mystery"] * 2 + ["MatMul"]
    assert run(["audit", "open.onnx", "--flash", "1MiB"]) == 0
    assert run(["audit", "open.onnx", "--flash", "1MiB", "--ram", "1KiB"]) == 2
    assert "cannot be checked against a budget of RAM" in capsys.readouterr().err


RECURRENT = """
<ir_version: 9, opset_import: ["" : 18]>
net (float[5, 1, 2] x) => (float[5, 1, 1] y)
<float[1, 3, 2] w = {1, 2, 3, 4, 5, 6}, float[1, 3, 1] r = {1, 2, 3}, float[1, 1] v = {2}, int64[1] axis = {1}>
{ h = GRU <hidden_size = 1> (x, w, r)  s = Squeeze (h, axis)  y = MatMul (s, v) }
"""


def test_shrink_counts_a_recurrent_network_from_below(capsys: pytest.CaptureFixture[str]):
    onnx.save(onnx.parser.parse_model(RECURRENT), "recurrent.onnx")
    assert run(["shrink", "recurrent.onnx", "small.onnx"]) == 0
    assert capsys.readouterr().out.count("at least 5 (1 operator unknown)") == 3


def test_shrink_counts_the_bytes_of_external_data(capsys: pytest.CaptureFixture[str]):
    ir.save(ir.load("good.onnx"), "apart.onnx", external_data="weights.bin")
    assert run(["shrink", "apart.onnx", "small.onnx", "--json"]) == 0
    stated = json.loads(capsys.readouterr().out)["result"]["file_bytes"]["before"]
    assert stated == Path("apart.onnx").stat().st_size + Path("weights.bin").stat().st_size


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("target", ["linked.onnx", "small.onnx.data", "small.onnx"])
def test_no_file_of_the_input_is_overwritten_or_removed(target: str, kind: str, capsys: pytest.CaptureFixture[str]):
    ir.save(ir.load("good.onnx"), "apart.onnx", external_data="small.onnx.data", size_threshold_bytes=0)
    Path("linked.onnx").symlink_to("apart.onnx")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    assert run(["convert", "apart.onnx", target, "--to", kind]) == 2
    what = "linked.onnx is the input itself" if target == "linked.onnx" else "small.onnx.data is the external data"
    assert what in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


@pytest.mark.parametrize("kind", ["dense", "sparse", "packed", "ort"])
def test_a_pipe_or_device_is_never_replaced(kind: str, capsys: pytest.CaptureFixture[str]):
    os.mkfifo("pipe.ort")
    assert run(["convert", "good.onnx", "pipe.ort", "--to", kind]) == 2
    assert "pipe.ort is there and is no file" in capsys.readouterr().err
    assert Path("pipe.ort").is_fifo()


@pytest.mark.parametrize("kind", ["dense", "csr"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), OSError("9 requested and 3 written")], ids=str
)
def test_a_full_disk_is_named_with_the_target(
    kind: str, error: OSError, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    opened = Path.open

    def write(*_: object, **__: object) -> None:
        raise error

    def to_open(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        return opened(path, mode, *rest, **more) if "w" not in mode else write()

    monkeypatch.setattr(Path, "open", to_open)
    monkeypatch.setattr(np, "save", write)
    before = sorted(Path().rglob("*"))
    assert run(["convert", "good.onnx", "out", "--to", kind]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Error: out: ")
    assert (error.strerror or str(error)) in printed
    assert sorted(Path().rglob("*")) == before


def test_what_nobody_foresaw_has_its_own_code_and_says_how_to_report_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("one over none")

    monkeypatch.setattr("relief_export.graph.cost.cost", broken)
    assert run(["cost", "good.onnx", "--json"]) == 3
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert answer["ok"] is False
    assert "ZeroDivisionError: one over none" in answer["error"]
    assert printed.err.splitlines() == [f"Error: {answer['error']}"]
    report = Path(re.search(r"file (\S+\.txt),", answer["error"])[1])
    assert 'raise ZeroDivisionError("one over none")' in report.read_text()
    assert "relief-export cost good.onnx --json" in report.read_text()
    report.unlink()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--to", "sparse", "--calibration", "data.npz"], "--calibration is for --to packed-int8 and int8"),
        (["--to", "packed", "--calibration", "data.npz"], "--calibration is for --to packed-int8 and int8"),
    ],
)
def test_an_option_without_effect_is_refused(options: list[str], named: str, capsys: pytest.CaptureFixture[str]):
    assert run(["convert", "good.onnx", "out.onnx", *options]) == 2
    assert named in capsys.readouterr().err
    assert not Path("out.onnx").exists()


def test_a_missing_extra_travels_between_processes():
    error = MissingExtraError("this command", "torch")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301 - our own bytes
