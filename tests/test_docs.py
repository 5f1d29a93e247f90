"""The code on the pages runs as it stands, and the pages' links lead somewhere.

Python blocks of a page run in order, in one namespace and one folder; `sh` blocks that call relief-export run there.
A comment `<!-- setup ... -->` holds Python that prepares the folder, unseen by readers; `<!-- not run: reason -->`
before a block leaves it out.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from docs.reference import generate

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")] if "_build" not in path.parts)
PIECES = re.compile(
    r"<!-- setup\n(?P<setup>.*?)-->|(?P<skip><!-- not run: [^>]+ -->\n)?^```(?P<kind>python|sh)\n(?P<code>.*?)^```",
    re.DOTALL | re.MULTILINE,
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)#\s]*)(?:#([^)]*))?\)")


def pieces(page: Path) -> list[tuple[str, str]]:
    """Return the setup and the blocks to run: ("python" or "sh", code)."""
    found = []
    for match in PIECES.finditer(page.read_text(encoding="utf-8")):
        if match["setup"] is not None:
            found.append(("python", match["setup"]))
        elif match["skip"] is None:
            found.append((match["kind"], match["code"]))
    return found


def runnable(page: Path) -> bool:
    return any(kind == "python" or "relief-export " in code for kind, code in pieces(page))


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("made", ["cli.md", "api.md"])
def test_pages_about_commands_and_names_are_up_to_date(made):
    assert (generate.HERE / made).read_text() == generate.PAGES[made](), "run python -m docs.reference.generate"


def test_the_map_of_the_design_names_every_module():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    modules = [path for path in (ROOT / "relief_export").rglob("*.py") if not path.name.startswith("__")]
    assert [str(path.relative_to(ROOT)) for path in modules if not re.search(rf"\b{path.name}\b", text)] == []


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=name)
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_code_runs_as_it_stands(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    namespace: dict[str, object] = {"__name__": "page"}
    for kind, code in pieces(page):
        if kind == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(code, str(page), "exec"), namespace)  # noqa: S102  the page's own code
            continue
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["relief-export"]:
                command = [sys.executable, "-m", "relief_export", *words[1:]]
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
                assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_pages_and_headings(page):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{target} does not exist"
        if anchor and path.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{target}#{anchor} is no heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_row_of_a_table_has_the_cells_of_its_head(page):
    """A pipe that is not escaped ends a cell, and what follows is lost on the page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()]
        assert set(cells) == {cells[0]}, block.splitlines()[next(k for k, n in enumerate(cells) if n != cells[0])]


def test_the_examples_of_a_page_are_found():
    """The pattern above is what keeps this file honest: it must see setups, skips and both kinds of blocks."""
    page = "<!-- setup\na = 1\n-->\n```python\nb\n```\n<!-- not run: slow -->\n```sh\nc\n```\n```sh\nd\n```\n"
    found = [(m["setup"], m["skip"] is not None, m["kind"], m["code"]) for m in PIECES.finditer(page)]
    assert found == [
        ("a = 1\n", False, None, None),
        (None, False, "python", "b\n"),
        (None, True, "sh", "c\n"),
        (None, False, "sh", "d\n"),
    ]


def test_the_extras_that_pages_and_messages_name_exist():
    sources = [*PAGES, *(ROOT / "relief_export").rglob("*.py")]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    named = {extra for group in re.findall(r"relief-export\[([\w,]+)\]", text) for extra in group.split(",")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "c" in named
    assert named <= set(project["optional-dependencies"])


def test_the_tests_that_show_what_can_be_brought_exist():
    page = (ROOT / "docs" / "guide" / "networks.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)?test_\w+\.py)::(test_\w+)`", page)
    assert len(named) == page.count("::") > 20
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test


def test_the_oldest_versions_are_the_same_wherever_they_stand():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = dict(re.split(">=", need) for need in project["dependencies"] + project["optional-dependencies"]["torch"])
    floors = (ROOT / "pipelines" / "floors.txt").read_text(encoding="utf-8")
    pinned = dict(line.split("==") for line in floors.splitlines() if line and not line.startswith("#"))
    assert set(pinned) == {re.split(">=", need)[0] for need in project["dependencies"]}
    for name, version in pinned.items():
        assert version == needs[name] or version.startswith(f"{needs[name]}."), name
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    stated = re.findall(r"(Python|onnx|onnxruntime|numpy|torch) (\d+(?:\.\d+)+)(?= or later|,| and| are)", page)
    oldest = {"Python": project["requires-python"].removeprefix(">="), **needs}
    assert {name for name, _ in stated} == {"Python", "onnx", "onnxruntime", "numpy", "torch"}
    assert [(name, version) for name, version in stated if oldest[name] != version] == []


def test_the_example_of_the_size_gate_is_the_file_to_copy():
    page = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
    shown = re.search(r"```yaml\n# \.github/workflows/size-gate\.yml\n(.*?)```", page, re.DOTALL)[1]
    head, body = (ROOT / ".github/workflows/size-gate.yml").read_text(encoding="utf-8").split("\n", 1)
    assert head.startswith("# ")
    assert body == shown


def test_the_tests_that_prove_the_oldest_runtime_exist():
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) == 5
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / "formats" / file).read_text(encoding="utf-8"), test
