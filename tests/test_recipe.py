"""Recipes: every file parses, every value is checked, and the documentation lists every key with its default."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from relief_export import recipe as recipes
from relief_export.errors import InputError
from relief_export.recipe import Recipe, TrainConfig, load_recipe, parse_overrides, recipe_names, recipe_variants
from relief_export.schema import fields_of

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "pipelines").glob("*.toml"))
PAPER = {
    *(f"mnist-{model}" for model in ("lenet300-100", "lenet5")),
    *(
        f"{data}-{model}"
        for data in ("cifar10", "cifar100")
        for model in ("vgg-like", "vgg13", "vgg16", "resnet20", "resnet32", "resnet56")
    ),
    *(f"tinyimagenet-{model}" for model in ("vgg13", "resnet18")),
}
SMALL = """
[data]
source = "digits"
[model]
name = "lenet5"
[train]
epochs = 4
lr = 0.5
milestones = [2]
[relief]
rounds = 2
[relief.retrain]
epochs = 1
[variants.sgd.train]
optimizer = "sgd"
lr = 0.1
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_and_variant_parses_and_round_trips(path, tmp_path):
    for name in (str(path), *(f"{path}@{variant}" for variant in recipe_variants(path))):
        recipe = load_recipe(name)
        assert recipe.description
        assert recipe.reproduces
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())), "memory") == recipe
        resolved = tmp_path / "recipe.toml"
        resolved.write_text(recipe.to_toml())
        assert load_recipe(resolved) == recipe


def test_every_system_of_the_paper_has_a_recipe_with_both_optimizers():
    assert set(recipe_names()) >= PAPER
    for name in PAPER:
        variants = [load_recipe(name), *(load_recipe(f"{name}@{variant}") for variant in recipe_variants(name))]
        assert {variant.train.optimizer for variant in variants} == {"adam", "sgd"}


def test_a_variant_is_an_override_with_a_name_of_its_own(small):
    base, variant = load_recipe(small), load_recipe(f"{small}@sgd")
    assert (base.name, variant.name) == ("small", "small@sgd")
    assert variant.train == dataclasses.replace(base.train, optimizer="sgd", lr=0.1)
    assert variant.data == base.data


def test_retraining_inherits_what_it_does_not_say(small):
    assert load_recipe(f"{small}@sgd").relief.retrain == TrainConfig(1, "sgd", 0.1, (2,))
    assert load_recipe(small, {"train.weight_decay": "0.25"}).relief.retrain == TrainConfig(
        1, lr=0.5, milestones=(2,), weight_decay=0.25
    )


def test_overrides_are_toml_values_and_bare_words_are_strings(small):
    settings = ["train.optimizer=sgd", "train.milestones=[1, 3]", "data.limit = 7", 'relief.alpha."layer1.*"=0.5']
    recipe = load_recipe(small, parse_overrides(settings))
    assert recipe.train.optimizer == "sgd"
    assert recipe.train.milestones == (1, 3)
    assert recipe.data.limit == 7
    assert recipe.relief.alpha == {"layer1.*": 0.5}


@pytest.mark.parametrize("text", ["\N{HIGH BRIGHTNESS SYMBOL} été", "a \x7f b", 'quo"te \\ \t'])
def test_any_text_is_read_back_from_the_resolved_recipe(small, tmp_path, text):
    recipe = load_recipe(small, {"description": text, "data.root": text})
    assert recipe.description == recipe.data.root == text
    (tmp_path / "resolved.toml").write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(tmp_path / "resolved.toml", {"name": recipe.name}) == recipe


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.optimizer", "sdg", r'train\.optimizer cannot be "sdg"; did you mean "sgd"\?'),
        ("relief.iterations", "2", r"relief\.iterations is now relief\.rounds$"),
        ("train.epohcs", "2", r'train\.epohcs is not a key; did you mean "epochs"\?'),
        ("zzz", "2", r"zzz is not a key; known: audit, data"),
        ("train.epochs", "-1", r"train\.epochs must be 0 or more, not -1"),
        ("train.epochs", "2.5", r"train\.epochs must be a whole number, not 2\.5"),
        ("train.epochs", "true", r"train\.epochs must be a whole number, not True"),
        ("train.epochs", "many", r'train\.epochs must be a whole number, not "many"'),
        ("train.lr", "nan", r"train\.lr must be a finite number, not nan"),
        ("train.lr", "0", r"train\.lr must be above 0"),
        ("train.momentum", "1", r"train\.momentum must be in \[0, 1\)"),
        ("train.schedule", "cosin", r'train\.schedule cannot be "cosin"; did you mean "cosine"\?'),
        (
            "train.schedule",
            "cosine",
            r'train: milestones belong to schedule = "steps": "cosine" needs milestones = \[\]',
        ),
        ("relief.retrain.schedule", "one-cycle", r'relief\.retrain: milestones belong to schedule = "steps"'),
        ("train.warmup", "4", r"train: warmup = 4 epochs leave none of 4 for the rest of the schedule"),
        ("train.nesterov", "true", r'train: nesterov needs optimizer = "sgd" with a momentum above 0, not "adam"'),
        ("train.label_smoothing", "1", r"train\.label_smoothing must be in \[0, 1\)"),
        ("train.shift", "-1", r"train\.shift must be 0 or more, not -1"),
        ("train.milestones", "[3, 2]", r"train\.milestones must be ascending epochs"),
        ("train.milestones", "3", r"train\.milestones must be a list, not 3"),
        ("train.channels_last", "1", r"train\.channels_last must be true or false, not 1"),
        ("train", "3", r"train must be a table, not 3"),
        ("data.source", "mnits", r'data\.source cannot be "mnits"; did you mean "mnist"\?'),
        ("data.validation", "1.0", r"data\.validation must be a share in \(0, 1\) or a number of samples"),
        ("data.validation", "0", r"data\.validation must be a share in \(0, 1\) or a number of samples"),
        ("data.size", "0", r"data\.size must be at least 1"),
        ("relief.alpha_conv", "0", r"relief\.alpha_conv must be in \(0, 1\], not 0\.0"),
        ("relief.alpha_fc", "1.5", r"relief\.alpha_fc must be in \(0, 1\], not 1\.5"),
        ("relief.alpha.fc1", "2", r"relief\.alpha\.fc1 must be in \(0, 1\], not 2\.0"),
        ("relief.keep", "[0.5, 0.5]", r"relief\.keep must be falling shares, not \(0\.5, 0\.5\)"),
        ("relief.keep", "[0.5]", r"relief: keep gives shares for 1 round, but there are 2"),
        ("relief.score", "random", r'relief: score = "random" has no α: say with keep what share each round keeps'),
        ("relief.skip", "[1]", r"relief\.skip\[0\] must be a string, not 1"),
        ("export.formats", '["dnese"]', r'export\.formats\[0\] cannot be "dnese"; did you mean "dense"\?'),
        ("quantise.values", "1", r'quantise\.values must be a number from 2 to 256, or "int8", not 1'),
        ("quantise.values", "int4", r'quantise\.values must be a number from 2 to 256, or "int8", not "int4"'),
        ("quantise.epochs", "1", r"quantise\.values is missing"),
        ("audit.flash", "big", r'audit\.flash must be a size like "256KiB", not "big"'),
        ("name", "a/b", r"name must be letters, digits"),
    ],
)
def test_a_wrong_key_or_value_is_refused_in_one_sentence_with_key_and_file(small, key, value, message):
    with pytest.raises(InputError, match=rf"small\.toml: {message}") as refusal:
        load_recipe(small, {key: value})
    assert "\n" not in str(refusal.value)


def test_two_augmentations_are_one_too_many(small):
    with pytest.raises(
        InputError, match=r"small\.toml: relief\.retrain\.shift: data\.augment shifts by up to 4 pixels"
    ):
        load_recipe(small, {"data.augment": "true", "relief.retrain.shift": "1"})


def test_missing_keys_files_variants_and_broken_toml_are_refused(small, tmp_path):
    with pytest.raises(InputError, match=r'has no variant "sdg"; did you mean "sgd"'):
        load_recipe(f"{small}@sdg")
    with pytest.raises(InputError, match=r"cannot be read: No such file"):
        load_recipe(tmp_path / "absent.toml")
    with pytest.raises(InputError, match=r'no recipe "digits-lenet6".*did you mean "digits-lenet5"'):
        load_recipe("digits-lenet6")
    with pytest.raises(InputError, match=r"has no \"=\""):
        parse_overrides(["train.epochs"])
    with pytest.raises(InputError, match=r"has no valid key"):
        load_recipe(small, {"train epochs": "1"})
    broken = tmp_path / "broken.toml"
    broken.write_text("[data\n")
    with pytest.raises(InputError, match=r"broken\.toml is not valid TOML"):
        load_recipe(broken)
    broken.write_text(SMALL.replace('name = "lenet5"', ""))
    with pytest.raises(InputError, match=r"broken\.toml: model\.name is missing"):
        load_recipe(broken)


@pytest.mark.parametrize("variants", ["variants = 3", "[variants]\nsgd = 3"])
def test_variants_that_are_no_tables_are_refused(tmp_path, variants):
    path = tmp_path / "odd.toml"
    path.write_text(f"{variants}\n{SMALL[: SMALL.index('[variants')]}")
    for read in (load_recipe, recipe_variants):
        with pytest.raises(InputError, match=r"odd\.toml: variants must be tables"):
            read(f"{path}@sgd")


def test_configurations_built_in_python_are_checked_too():
    with pytest.raises(InputError, match="alpha_conv must be in"):
        recipes.ReliefConfig(rounds=1, alpha_conv=1.5)
    assert TrainConfig(epochs=1, lr=1, milestones=[1, 2]) == TrainConfig(1, lr=1.0, milestones=(1, 2))


def test_names_are_found_beside_the_working_directory_first(tmp_path, monkeypatch, small):
    (tmp_path / "pipelines").mkdir()
    small.rename(tmp_path / "pipelines" / "mine.toml")
    monkeypatch.chdir(tmp_path)
    assert recipe_names() == ("mine",)
    assert load_recipe("mine@sgd").name == "mine@sgd"


def test_the_documentation_lists_every_key_with_its_default():
    text = (ROOT / "docs" / "recipes.md").read_text()
    documented = set(re.findall(r"^\| `([a-z_.]+)` \| (?:`([^`]*)`|required) \|", text, re.MULTILINE))
    assert documented == set(_keys(Recipe, ""))


def _keys(kind, prefix):
    for field, annotation in zip(dataclasses.fields(kind), fields_of(kind).values(), strict=True):
        found = (annotation, *get_args(annotation))
        if kinds := [kind for kind in found if isinstance(kind, type) and dataclasses.is_dataclass(kind)]:
            if kinds[0] is TrainConfig and field.name != "train":
                yield f"{prefix}{field.name}", "absent"  # its keys are those of [train]
            else:
                yield from _keys(kinds[0], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", _default(field)


def _default(field):
    if field.default_factory is not dataclasses.MISSING:
        return json.dumps(field.default_factory())
    if field.default is dataclasses.MISSING:
        return ""
    if field.default is None:
        return "absent"
    text = json.dumps(field.default)
    assert tomllib.loads(f"value = {text}")
    return text


def test_the_documentation_counts_the_epochs_of_every_recipe():
    text = (ROOT / "docs" / "recipes.md").read_text()
    counted = {name: int(total) for name, total in re.findall(r"^\| `([\w.@-]+)` \| .* = (\d+) \|", text, re.MULTILINE)}
    expected = {}
    for name in (v for path in FILES for v in (path.stem, *(f"{path.stem}@{w}" for w in recipe_variants(path)))):
        if name.endswith("@fast") or "@" not in name:
            recipe = load_recipe(name)
            again = recipe.relief.retrain or recipe.train
            expected[name] = recipe.train.epochs + recipe.relief.rounds * again.epochs
    assert counted == expected
