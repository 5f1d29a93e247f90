import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from relief_export.errors import IntegrityError
from relief_export.recipe import load_recipe
from tests.conftest import DEMO, assert_tables_are_whole

ROOT = Path(__file__).parent.parent


@pytest.fixture
def module(monkeypatch):
    """Return an importer of the modules in benchmarks/, which is no installed package."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def kept(module, demo, tmp_path):
    """Return a folder of results with the demonstration's run in it, and its summary."""
    runs, facts = module("runs"), importlib.import_module("relief_export.report.run")
    found = json.loads(json.dumps(runs.summary(facts.read_run(demo.folder))))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo.json").write_text(json.dumps(found))
    return tmp_path, found


def test_the_committed_pages_are_what_the_records_say(module):
    pages = module("results").render()
    docs = ROOT / "docs"
    there = {path.relative_to(docs).as_posix(): path.read_text() for path in (docs / "results").glob("*.md")}
    assert there | {"results.md": (docs / "results.md").read_text()} == pages
    for name, page in pages.items():
        assert_tables_are_whole(page)
        for link in re.findall(r"\]\((?!http)([^)#]+)", page):
            assert (docs / name).parent.joinpath(link).is_file(), (name, link)


def test_without_records_no_section_is_left(module, tmp_path):
    pages = module("results").render(tmp_path)
    assert list(pages) == ["results.md"]
    page = pages["results.md"]
    assert page.startswith("# Results\n")
    assert "## " not in page
    assert not re.search(r"\d+\.\d+ %|×", page)


def test_a_run_is_shown_with_the_figures_of_its_records(module, kept, demo):
    folder, found = kept
    pages = module("results").render(folder)
    assert f"[{demo.folder.name}](results/{demo.folder.name}.md)" in pages["results.md"]
    page = pages[f"results/{demo.folder.name}.md"]
    relieved = json.loads((demo.folder / "relieved" / "record.json").read_text())["outcome"]
    dense, left = relieved["connections"]["dense"], relieved["connections"]["kept"]
    share, fewer = f"{100 * left / dense:.2f} %", f"{dense / left:.3g}×"
    assert f"| {100 * relieved['test']:.2f} % |" in pages["results.md"]
    assert f"| {share} | {fewer} |" in pages["results.md"]
    layers = [row.split(" | ") for row in page.partition("| layer |")[2].splitlines()[2:]]
    assert (
        sum(int(row[1].replace(",", "")) for row in layers),
        sum(int(row[2].replace(",", "")) for row in layers),
    ) == (
        left,
        dense,
    )
    for entry in json.loads((demo.folder / "artifacts" / "manifest.json").read_text())["artifacts"]:
        size = sum(file["file_bytes"] for file in entry["files"])
        assert f"| {entry['name']} | {size:,} | " in page
    settings = " ".join(f"--set {setting}" for setting in sorted(DEMO[2::2]))
    assert found["command"] == f"make digits-lenet5 SETTINGS='{settings}'"
    assert f"`{found['command']}`, seed 0" in page
    assert "Over seeds" not in page
    assert_tables_are_whole(page)


def test_several_seeds_of_a_recipe_are_summarised(module, kept):
    folder, found = kept
    command = found["command"].removesuffix("'")
    for seed, accuracy, settings in (
        (1, 0.5, ""),
        (2, 0.75, " --set relief.rounds=9"),
        (3, 0.1, " --set train.lr=1"),
    ):
        other = json.loads(json.dumps(found)) | {"name": f"demo-{seed}", "seed": seed}
        other["command"] = f"{command}{settings} --set seed={seed}'"
        other["accuracy"]["dense"]["test"] = accuracy
        other["history"][0]["test_accuracy"] = accuracy
        (folder / "runs" / f"demo-{seed}.json").write_text(json.dumps(other))
    first = found["accuracy"]["dense"]["test"]
    pages = module("results").render(folder)
    page = pages["results.md"]
    mean = f"{100 * (first + 0.5 + 0.75) / 3:.2f} % (50.00 % to {100 * max(first, 0.75):.2f} %)"
    assert f"| digits-lenet5 | 0, 1, 2 | {mean} |" in page  # the run with another learning rate stands alone
    started = found["history"][0]["test_accuracy"]
    mean = f"{100 * (started + 0.5 + 0.75) / 3:.2f} % (50.00 % to {100 * max(started, 0.75):.2f} %)"
    for name in ("demo", "demo-1", "demo-2"):
        assert f"| 0 | 100.00 % (100.00 % to 100.00 %) | {mean} | – |" in pages[f"results/{name}.md"]
    assert "Over seeds" not in pages["results/demo-3.md"]


def test_baselines_stand_beside_the_run_whose_shares_they_kept(module, kept):
    folder, found = kept
    for score, accuracy in (("random", 0.25), ("magnitude-global", 0.75)):
        other = json.loads(json.dumps(found)) | {"name": f"{found['name']}-{score}", "score": score}
        other["history"][1]["test_accuracy"] = accuracy
        (folder / "runs" / f"{score}.json").write_text(json.dumps(other))
    pages = module("results").render(folder)
    name, row = found["name"], found["history"][1]
    assert f"| {name}: connections kept | activity | magnitude-global | random |" in pages["results.md"]
    share, own = (f"{100 * value:.2f} %" for value in (row["kept"] / row["dense"], row["test_accuracy"]))
    assert f"| {share} | {own} | 75.00 % | 25.00 % |" in pages["results.md"]
    assert f"[{name}-random]" not in pages["results.md"]  # it is no result of its own, but it has a page
    assert f"results/{name}-random.md" in pages


def test_runs_are_alike_but_for_the_seed_and_how_far_they_went(module):
    commands = {
        "make r": 0,
        "make r SETTINGS='--set seed=1'": 1,
        "make r SETTINGS='--set relief.rounds=3 --set seed=2'": 2,
        "make r SETTINGS='--set data.validation=9 --set seed=1 --set train.lr=1'": 1,
        "make r SETTINGS='--set data.validation=9 --set train.lr=1'": 0,
        "make r SETTINGS='--set train.lr=2'": 0,
    }
    runs = [{"recipe": "r", "command": command, "seed": seed} for command, seed in commands.items()]
    groups = module("results")._alike(runs)
    assert sorted(sorted(run["seed"] for run in group) for group in groups) == [[0], [0, 1], [0, 1, 2]]


def test_published_figures_stand_beside_the_runs_of_their_network(module, kept):
    folder, found = kept
    assert (
        "Beside other methods" not in module("results").render(folder)["results.md"]
    )  # nobody's figures for the digits
    name = "mine-mnist-lenet5@tuned"
    other = json.loads(json.dumps(found)) | {"name": name, "recipe": "mnist-lenet5@tuned"}
    (folder / "runs" / "other.json").write_text(json.dumps(other))
    section = module("results").render(folder)["results.md"].partition("## Beside other methods")[2]
    relieved, count = found["accuracy"]["relieved"]["test"], found["connections"]
    assert re.search(
        r"^\| mnist/lenet5 \| sparse variational.* \| 99.25 % \| 0.36 % \| 280× \| – \|$", section, re.MULTILINE
    )
    (own,) = [line for line in section.splitlines() if "relief" in line]
    assert f"| relief, {name} |" in own
    assert f"| {100 * relieved:.2f} % | {100 * count['kept'] / count['dense']:.2f} % |" in own
    assert "lenet300-100" not in section


def test_the_command_names_what_differs_from_the_recipe_and_nothing_else(module):
    command = module("runs").command
    assert command(load_recipe("digits-lenet5").to_dict()) == "make digits-lenet5"
    changed = load_recipe("digits-lenet5@sgd", {"seed": "3", "train.milestones": "[2, 4]"}).to_dict()
    assert (
        command(changed) == "make digits-lenet5@sgd SETTINGS='--set seed=3 --set '\"'\"'train.milestones=[2, 4]'\"'\"''"
    )


def test_a_benchmark_is_run_recorded_and_shown(module, tmp_path):
    common = module("common")
    columns = (
        common.Column("what", "case"),
        common.Column("seconds", "time, ms", ".1f", 1000),
        common.Column("n", "size", ",d"),
    )
    rows = [{"what": "a|b", "seconds": 0.0125, "n": 12345}, {"what": "c", "seconds": None, "n": 1}]
    benchmark = common.Benchmark("toy", "How long is a piece?", lambda: rows, columns, seeds=(4, 5), note="Held fixed.")
    content = json.loads(benchmark.write(tmp_path).read_text())
    assert content["command"] == "python -m benchmarks toy"
    assert all(set(row["machine"]) == {"cpu", "cores", "system"} for row in content["rows"])
    page = module("results").render(tmp_path)["results/benchmarks.md"]
    assert "## Toy\n\nHow long is a piece? Held fixed.\n\n`python -m benchmarks toy`, seeds 4, 5" in page
    assert "| case | time, ms | size |\n| --- | --- | --- |\n| a\\|b | 12.5 | 12,345 |\n| c | – | 1 |\n" in page


def test_a_benchmark_may_have_a_page_of_its_own(module, tmp_path):
    common = module("common")
    kept = {"cpu": "another", "cores": 1, "system": "there"}
    for name, own in (("toy", False), ("doll", True)):
        rows = [{"what": name, "machine": kept}]
        common.Benchmark(name, "Why?", lambda rows=rows: rows, (common.Column("what", "case"),), own_page=own).write(
            tmp_path
        )
    pages = module("results").render(tmp_path)
    assert "doll" not in pages["results/benchmarks.md"]
    assert "| toy |" in pages["results/benchmarks.md"]
    assert "# Doll\n\nWhy?" in pages["results/doll.md"]
    assert "| doll |" in pages["results/doll.md"]
    assert "](results/doll.md)" in pages["results.md"]
    assert "another, 1 cores, there" in pages["results.md"]  # a row keeps the machine that it was measured on


def test_candidates_are_timed_in_turn_and_in_changing_order(module):
    calls = []
    found = module("common").interleave(
        {name: lambda name=name: calls.append(name) for name in "abc"}, repeats=30, warmup=1
    )
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds[0] == "abc"
    assert {"".join(sorted(order)) for order in rounds} == {"abc"}
    assert {order[0] for order in rounds} == {order[-1] for order in rounds} == set("abc")
    assert all(timing.repeats == 30 and 0 <= timing.lower <= timing.median <= timing.upper for timing in found.values())


def test_one_repetition_has_no_spread(module):
    with pytest.raises(ValueError, match="a spread needs at least 2"):
        module("common").interleave({"a": int}, repeats=1)


def test_a_record_without_a_figure_is_refused(module, kept):
    folder, found = kept
    del found["connections"]
    (folder / "runs" / "demo.json").write_text(json.dumps(found))
    with pytest.raises(IntegrityError, match=r"lacks what docs/results\.md shows"):
        module("results").render(folder)


def test_runs_are_extracted_from_the_command_line_and_bad_ones_refused_in_one_sentence(demo, tmp_path):
    command = [sys.executable, "-m", "benchmarks.runs"]
    made = tmp_path / "made" / f"{demo.folder.name}.json"
    done = subprocess.run(
        [*command, demo.folder, "--out", made.parent], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(made)
    assert made.stat().st_size < 20_000
    broken = shutil.copytree(demo.folder, tmp_path / "broken")
    (broken / "validation.json").unlink()
    failed = subprocess.run([*command, broken], cwd=ROOT, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr == f"{broken / 'validation.json'} does not exist: run stage 'validate' first\n"


def test_an_unknown_benchmark_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "none"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no benchmark is named 'none'" in done.stderr
