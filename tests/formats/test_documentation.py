"""The normative page says what the code does."""

import re
from pathlib import Path

import numpy as np

from relief_export.formats import FORMATS, VALUES, Options, csr
from relief_export.formats.packed import encode
from relief_export.formats.packed.decode import OPERATORS

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
    for name in (*VALUES, "u8", "rice"):
        assert f"`{name}`" in PAGE
    (listed,) = re.findall(r"these operators only: (.*?)\. \(", PAGE, re.DOTALL)
    assert {name.strip() for name in listed.replace("\n", " ").split(",")} == set(OPERATORS)


def test_the_examples_of_positions_are_what_is_written():
    assert encode.gap_bytes(np.array([1, 4, 28, 600])).tobytes() == bytes.fromhex("010318FFFF3E")
    assert "`01 03 18 FF FF 3E`" in PAGE
    for positions, low, expected in (([1, 4, 9], 0, "20 88"), ([1, 4, 19], 2, "AA 70"), ([1, 4, 19], 1, "F1 80")):
        unary, words = encode.rice_parts(np.array(positions), low)
        planes = (words >> np.arange(low - 1, -1, -1)[:, None]) & 1
        bits = np.concatenate([planes.ravel(), unary])
        octets = np.append(bits, np.zeros(-bits.size % 8, int)).reshape(8, -1)
        assert np.packbits(octets.astype(np.uint8), axis=0).tobytes() == bytes.fromhex(expected)
        assert f"`{expected}`" in PAGE
