import html
import html.parser
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest

from relief_export import evaluation, formats
from relief_export.cli import run
from relief_export.errors import InputError, IntegrityError
from relief_export.records import RECORDS
from relief_export.report import build_report
from relief_export.report.run import OPTIONAL, read_run
from relief_export.stages import export_stages
from tests.conftest import assert_tables_are_whole
from tests.report.folders import ALIVE, HIDDEN, READ, SIDE, make_folder, network, write_run_on

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(html.parser.HTMLParser):
    """Every tag with its attributes, the ids, and the cells' text; complains of a tag that closes nothing."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.cells = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in {"td", "th"}:
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in {"td", "th"}:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def pages(build, tmp_path_factory):
    """Return the texts (HTML, Markdown) of: one run that passed, one with a hostile name that failed, both compared."""
    out = tmp_path_factory.mktemp("pages")
    hostile = '<script>alert(1)</script>|`x`"'
    bad = make_folder(out / "bad", hostile, description="<img src=x onerror=alert(2)>", moved=0.01)
    made = {
        "good": build_report([build], out / "one"),
        "bad": build_report([bad], out / "two"),
        "both": build_report([build, bad], out / "three"),
    }
    return {name: (paths.html.read_text(), paths.markdown.read_text()) for name, paths in made.items()}


@pytest.mark.parametrize("name", ["good", "bad", "both"])
def test_the_page_asks_for_nothing_from_outside_and_runs_nothing(pages, name):
    text, _ = pages[name]
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in {"script", "iframe", "object", "embed", "img", "base", "form"}
        assert not any(key.startswith("on") for key in attributes)
        for key in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
            assert attributes.get(key, "#").startswith(("#", "data:"))
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", text))


@pytest.mark.parametrize("name", ["good", "bad", "both"])
def test_identifiers_are_unique_and_references_lead_somewhere(pages, name):
    text, _ = pages[name]
    ids = [attributes["id"] for _, attributes in Page(text).tags if "id" in attributes]
    assert ids
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', text)) <= set(ids)
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for chart in charts:
        own = re.findall(r' id="([^"]+)"', chart)
        assert len(own) == len(set(own))
        assert 'role="img"' in chart
    assert len(charts) >= 4
    # Two charts share an identifier only where they are the same chart.
    assert len(set(ids)) == len({i for chart in set(charts) for i in re.findall(r' id="([^"]+)"', chart)})


def test_the_verdict_comes_first_and_is_said_in_words(pages):
    good, bad = pages["good"], pages["bad"]
    for text in good:
        assert text.index(
            "2.02× smaller, same outputs as the pruned network; −0.25 points against the original."
        ) < text.index("Accuracy")
        assert "Other outputs" not in text
        assert "Test accuracy 93.75 %, of the original 94.00 %." in text
    for text in bad:
        assert text.index("Other outputs than the pruned network.") < text.index("Accuracy")
        assert "same outputs" not in text
        assert "relative error" in text
    assert '<section class="verdict yes"' in good[0]
    assert '<section class="verdict no"' in bad[0]
    assert Page(bad[0]).cells.count("FAILED") == 2


def test_hostile_names_stay_text(pages):
    for text in pages["bad"] + pages["both"]:
        assert "<script" not in text
        assert "<img" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;|`x`" in pages["bad"][0]
    rows = [line for line in pages["both"][1].splitlines() if line.startswith("|")]
    assert any(r"&lt;script>alert(1)&lt;/script>\|\`x\`" in row for row in rows)
    assert_tables_are_whole(pages["both"][1])


def test_the_markdown_twin_has_every_cell_of_the_page(pages):
    text, twin = pages["good"]
    written = {cell.strip() for cell in re.split(r"(?<!\\)\||\n", twin.replace("\\", ""))}
    for cell in Page(text).cells:
        assert html.unescape(cell).replace("<", "&lt;").replace("& ", "&amp; ") in written


def test_the_figures_are_those_of_the_records(build, pages):
    cost = json.loads((build / "artifacts" / "record.json").read_text())["outcome"]["cost"]["shrunk"]
    size = (build / "artifacts" / "model.onnx").stat().st_size
    cells = Page(pages["good"][0]).cells
    for column in (cost["parameters"], cost["macs"], cost["flops"]):
        assert {f"{value:,}" for value in column.values()} <= set(cells)
    assert f"{size:,}" in cells
    assert "24 of 36 pixels are still read" in pages["good"][0]
    assert {"best test of any epoch (no choice)", "95.10 %", "95.90 %"} <= set(cells)  # watched, the dense row too


def test_the_snippet_runs_as_it_is_printed(build, pages):
    code = re.search(r"```python\n(.*?)```", pages["good"][1], re.DOTALL)[1]
    assert code.strip() in html.unescape(pages["good"][0])
    assert len(code.strip().splitlines()) == 5
    done = subprocess.run([sys.executable, "-c", code], cwd=build, capture_output=True, text=True, check=True)
    expected = np.load(build / "artifacts" / "reference.npz")["logits"].argmax(axis=1)
    assert done.stdout == f"{expected}\n"


def test_the_same_records_give_the_same_bytes(build, tmp_path):
    first, second = (build_report([build], tmp_path / name) for name in "ab")
    assert first.html.read_bytes() == second.html.read_bytes()
    assert first.markdown.read_bytes() == second.markdown.read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["report.html", "report.md"]


def test_several_runs_share_one_page_with_a_pareto_chart(pages):
    text, twin = pages["both"]
    assert "Comparison of 2 runs" in text
    assert text.count("<article>") == 2
    assert "Test accuracy against bytes. tiny: original" in text
    assert twin.index("Comparison of 2 runs") < twin.index("# tiny")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder that ``ship`` wrote outside any build folder, as ``relief_export.export`` does."""
    folder = tmp_path_factory.mktemp("alone") / "mine"
    rng = np.random.default_rng(5)
    whole = [rng.normal(size=shape) for shape in ((HIDDEN, SIDE * SIDE), (HIDDEN,), (10, HIDDEN), (10,))]
    alive = np.arange(HIDDEN) < ALIVE
    masked = (whole[0] * alive[:, None], whole[1] * alive, whole[2] * alive, whole[3])
    graphs = {"original": network(*whole), "masked": network(*masked)}
    x = rng.random((32, 1, SIDE, SIDE)).astype(np.float32)
    logits = evaluation.open_session(graphs["masked"], optimised=False).run(x)[0]
    reference = export_stages.Samples(x, logits.argmax(axis=1), logits, "reference")
    export_stages.write_artifacts(graphs, reference, folder, ("packed", "csr"), formats.Options())
    return folder


def test_a_folder_of_files_alone_has_a_report_and_says_how_to_run_them(alone, tmp_path):
    folder = shutil.copytree(alone, tmp_path / "mine")
    before = build_report([folder], tmp_path / "before").markdown.read_text()
    assert "**Not validated yet.**" in before
    assert "run relief-export validate on this folder" in before
    assert run(["validate", str(folder)]) == 0
    assert run(["report", str(folder), "--json"]) == 0
    text = (folder / "report.md").read_text()
    assert_tables_are_whole(text)
    assert re.search(r"\*\*\d\.\d\d× smaller, same outputs as the pruned network\.\*\*", text)
    assert "32 samples of reference.npz" in text
    assert "## Pruning rounds" not in text  # no training was recorded
    for name in ("model.onnx", "model.packed.onnx", "csr"):
        assert f"| {name} |" in text.partition("## Run it")[2]
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) >= 32
    # What was validated is no longer what lies there: the figures are refused.
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text() + "\n")
    with pytest.raises(IntegrityError, match=r"manifest\.json is not the file that stage 'validate' read"):
        build_report([folder], tmp_path)


def test_a_model_of_several_inputs_is_run_by_their_names(tmp_path):
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[n, 2] a, float[n, 2] b) => (float[n, 3] y) '
        "<float[2, 3] w = {1, 0, 2, 0, 3, 0}> { s = Sub (a, b) y = MatMul (s, w) }"
    )
    rng = np.random.default_rng(2)
    x = {name: rng.normal(size=(5, 2)).astype(np.float32) for name in "ab"}
    logits = (x["a"] - x["b"]) @ np.array([[1, 0, 2], [0, 3, 0]], np.float32)
    reference = export_stages.Samples(x, None, logits, "reference")
    export_stages.write_artifacts(
        {"original": model, "masked": model}, reference, tmp_path / "two", ("packed",), formats.Options()
    )
    assert run(["validate", str(tmp_path / "two")]) == 0
    text = build_report([tmp_path / "two"], tmp_path).markdown.read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path / "two", capture_output=True, text=True, check=True)
    assert done.stdout == "[(5, 3)]\n"


def test_a_folder_that_is_neither_is_told_so(tmp_path):
    with pytest.raises(InputError, match="is no build folder, and has no manifest"):
        build_report([tmp_path], tmp_path)


@pytest.mark.parametrize("stage", [stage for stage in RECORDS if stage not in OPTIONAL])
def test_a_missing_record_is_named_with_its_stage(build, tmp_path, stage):
    folder = shutil.copytree(build, tmp_path / "tiny")
    (folder / RECORDS[stage]).unlink()
    with pytest.raises(InputError, match=rf"{RECORDS[stage]} does not exist: run stage '{stage}' first"):
        build_report([folder], tmp_path)


@pytest.mark.parametrize("stage", RECORDS)
@pytest.mark.parametrize("damage", ["", '{"stage"', "[]", '{"stage": "other"}'])
def test_a_damaged_record_is_named(build, tmp_path, stage, damage):
    folder = shutil.copytree(build, tmp_path / "tiny")
    (folder / RECORDS[stage]).write_text(damage)
    with pytest.raises(IntegrityError, match=RECORDS[stage]):
        build_report([folder], tmp_path)


WRONG = {
    "train: no test": ("train", ("test",), None),
    "train: shape is a word": ("train", ("input_shape",), "28x28"),
    "relieve: no connections": ("relieve", ("connections",), None),
    "relieve: a list for a table": ("relieve", ("relief", "history", 1, "layers"), []),
    "relieve: a word for a count": ("relieve", ("relief", "history", 2, "kept"), "many"),
    "relieve: rounds that are null": ("relieve", ("relief", "history"), {}),
    "export: no ledger": ("export", ("ledger",), None),
    "export: a count is a fraction": ("export", ("cost", "shrunk", "macs", "structural"), 1.5),
    "validate: no checks": ("validate", ("checks",), None),
    "validate: a check is a number": ("validate", ("checks", 0), 3),
    "audit: no arena": ("audit", ("arena",), None),
    "audit: a size is a word": ("audit", ("budget", "flash_bytes"), "1k"),
}


@pytest.mark.parametrize(("stage", "path", "value"), WRONG.values(), ids=WRONG)
def test_a_record_of_wrong_content_is_named_with_stage_and_key(build, tmp_path, stage, path, value):
    """Valid JSON, wrong content: the sentence names the file that is wrong and the key, not what stumbled over it."""
    folder = shutil.copytree(build, tmp_path / "tiny")
    content = json.loads((folder / RECORDS[stage]).read_text())
    place = content["outcome"]
    for step in path[:-1]:
        place = place[step]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    (folder / RECORDS[stage]).write_text(json.dumps(content))
    key = "outcome" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    with pytest.raises(IntegrityError) as caught:
        build_report([folder], tmp_path)
    assert str(caught.value).startswith(f"{folder / RECORDS[stage]} is not a record of stage '{stage}' ({key} ")
    assert str(caught.value).endswith(f"remove it and run '{stage}' again")


def test_every_byte_of_a_file_has_its_part(build, pages):
    table = pages["good"][1].partition("## Size breakdown")[2].partition("##")[0]
    rows = {cells[1]: cells[2:-1] for line in table.splitlines() if len(cells := re.split(r" *\| *", line)) == 10}
    for name in ("original.onnx", "masked.onnx", "model.onnx"):
        *parts, total, _ = (int(cell.replace(",", "")) if cell != "–" else None for cell in rows[name])
        assert sum(parts) == total == (build / "artifacts" / name).stat().st_size
    assert sum(file.stat().st_size for file in (build / "artifacts" / "csr").iterdir()) == int(
        rows["csr"][5].replace(",", "")
    )
    assert float(rows["model.onnx"][6].replace(",", "")) < float(rows["model.onnx"][0].replace(",", ""))


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage, names in READ.items() for name in names])
def test_figures_of_other_files_than_are_there_are_refused(build, tmp_path, stage, name):
    folder = shutil.copytree(build, tmp_path / "tiny")
    record = json.loads((folder / RECORDS[stage]).read_text())
    record["inputs"] = {name: "0" * 64}
    (folder / RECORDS[stage]).write_text(json.dumps(record))
    with pytest.raises(IntegrityError, match=rf"{name} is not the file that stage '{stage}' read: run '{stage}' again"):
        build_report([folder], tmp_path)


def test_an_audit_is_no_condition(build, tmp_path):
    folder = shutil.copytree(build, tmp_path / "tiny")
    (folder / "audit.json").unlink()
    assert read_run(folder).audit is None
    assert "Flash and RAM" not in build_report([folder], tmp_path).html.read_text()


def test_runs_in_emulators_are_a_table_that_says_what_its_milliseconds_are(build, tmp_path):
    folder = shutil.copytree(build, tmp_path / "tiny")
    assert "On the device" not in build_report([folder], tmp_path).html.read_text()
    write_run_on(folder, "fast", "csr")
    write_run_on(folder, "bare", "csr", nominal_seconds=None, agreement=None, unit="clock cycles")
    worse = {"relative_error": 0.5, "same_predictions": 0.5, "accuracy": None}
    write_run_on(folder, "wrong", "csr", ok=False, agreement=worse)
    paths = build_report([folder], tmp_path)
    section = paths.markdown.read_text().partition("## On the device")[2].partition("\n## ")[0]
    table = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    assert table[0][5] == "ms at one instruction per cycle, not measured"
    assert table[2:5] == [
        ["Board bare", "csr", "7,001", "1,310", "54,321 cycles", "–", "not compared"],
        ["Board fast", "csr", "7,001", "1,310", "54,321", "0.434 ms", "passed"],
        ["Board wrong", "csr", "7,001", "1,310", "54,321", "0.434 ms", "FAILED"],
    ]
    assert table[7:10] == [
        ["Board bare", "csr", "20", "–", "34", "816", "184", "276"],
        ["Board fast", "csr", "20", "2.5e-07", "34", "816", "184", "276"],
        ["Board wrong", "csr", "20", "5.0e-01", "34", "816", "184", "276"],
    ]
    assert 34 + 816 + 184 + 276 == 1310
    assert "Milliseconds: instructions at one per cycle of the target's clock, not measured time" in section
    assert ["Board fast", "csr", "cc -Os (version 12.2.1)"] in table
    page = Page(paths.html.read_text())
    assert {"Board fast", "54,321", "0.434 ms"} <= set(page.cells)


@pytest.mark.parametrize("change", ["another file", "no file", "no files named"])
def test_a_run_of_a_program_that_has_changed_is_not_shown_and_named(build, tmp_path, change):
    folder = shutil.copytree(build, tmp_path / "tiny")
    path = write_run_on(folder, "fast", "csr")
    first = next(file for file in sorted((folder / "artifacts" / "csr").iterdir()) if file.suffix == ".npz")
    if change == "another file":
        first.write_bytes(first.read_bytes() + b"\0")
    elif change == "no file":
        first.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"inputs": {}}))
    for written in (paths := build_report([folder], tmp_path)).html, paths.markdown:
        text = written.read_text()
        assert "Not shown, because the program is no longer the one that ran: csr on fast." in text
        assert "54,321" not in text
        assert "Board fast" not in text


def test_a_damaged_record_of_an_emulated_run_is_named(build, tmp_path):
    folder = shutil.copytree(build, tmp_path / "tiny")
    path = write_run_on(folder, "fast", "csr")
    content = json.loads(path.read_text())
    del content["outcome"]["sizes"]["flash_bytes"]
    path.write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match=r"fast/csr\.json is not a record of stage 'run-on' \(outcome\.sizes\.fl"):
        build_report([folder], tmp_path)


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="at least one folder"):
        build_report([], tmp_path)


def test_the_demonstration_is_reported_in_full_without_torch(demo, tmp_path, without_torch):
    program = (
        "import sys, pathlib\nfrom relief_export.report import build_report\n"
        "print(build_report([pathlib.Path(sys.argv[1])], pathlib.Path(sys.argv[2])).html)"
    )
    done = without_torch(program, str(demo.folder), str(tmp_path))
    assert done.stderr == ""
    assert done.stdout.strip() == str(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    for title in (
        "Accuracy",
        "Files",
        "Pruning rounds",
        "Layer by layer",
        "Latency, measured",
        "Flash and RAM",
        "Run it",
    ):
        assert f"<h2>{title}</h2>" in text
    cells = Page(text).cells
    manifest = json.loads((demo.folder / "artifacts" / "manifest.json").read_text())
    for artifact in manifest["artifacts"]:
        assert artifact["name"] in cells
        assert f"{sum(file['file_bytes'] for file in artifact['files']):,}" in cells
