"""The normative page says what the code does."""

import re
from pathlib import Path

import numpy as np

from relief_export.formats import FORMATS, VALUES, Options, csr
from relief_export.formats.decode import OPERATORS
from relief_export.formats.positions import CODES

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()


def test_the_scipy_example_runs_a_linear_layer(tmp_path, make_lenet, monkeypatch):
    model = make_lenet()
    csr.write(model, tmp_path / "csr", Options())
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(example.strip().splitlines()) == 10
    names = {}
    exec(example, names)  # noqa: S102 - the page's own example
    weight = model.graph.initializers["fc1.weight"].const_value.numpy()
    bias = model.graph.initializers["fc1.bias"].const_value.numpy()
    assert np.allclose(names["y"], weight.sum(axis=1) + bias, rtol=1e-5, atol=1e-5)


def test_every_format_code_and_operator_is_described():
    for name in FORMATS:
        assert f"`{name}`" in PAGE
    for name in (*VALUES, *(code.name for code in CODES)):
        assert f"`{name}`" in PAGE
    (listed,) = re.findall(r"these operators only: (.*?)\. \(", PAGE, re.DOTALL)
    assert {name.strip() for name in listed.replace("\n", " ").split(",")} == set(OPERATORS)
