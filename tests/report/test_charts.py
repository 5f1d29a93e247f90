import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relief_export.report import charts

CHARTS = {
    "rounds": lambda: charts.rounds_chart(
        density=[1.0, 0.3, 0.04, 0.01], accuracy=[0.95, 0.96, 0.95, 0.4], dense=0.95, floor=0.94, chosen=2
    ),
    "bytes": lambda: charts.bytes_chart([("a.onnx", 1_700_000), ("b.onnx", 1_200)], [("gzip", 90_000), ("bound", 900)]),
    "layers": lambda: charts.layers_chart([("fc1", 400, 80, 20), ("gone", 90, 0, 0)]),
    "latency": lambda: charts.latency_chart([("a", 0.1, 0.2, 0.4), ("b", 0.01, 0.02, 0.03)]),
    "pareto": lambda: charts.pareto_chart(
        [("run", [("dense", 900, 0.9), ("packed", 90, 0.89)]), ("other", [("x", 50, 0.5)])]
    ),
    "pixels": lambda: charts.pixels_chart([[0, 4], [1, 2]]),
}


@pytest.mark.parametrize("make", CHARTS.values(), ids=CHARTS.keys())
def test_a_chart_is_deterministic_says_itself_in_words_and_takes_the_colours_of_the_page(make):
    svg = str(make())
    assert svg == str(make())
    label = re.match(r'<svg [^>]*role="img" aria-label="([^"]+)"', svg)[1]
    assert f"<title>{label}</title>" in svg
    assert len(label) > 20
    assert re.findall(r"#[0-9a-fA-F]{6}\b", svg) == []
    assert "var(--" in svg
    assert "<metadata" not in svg
    assert "DejaVu" not in svg
    assert svg.rstrip().endswith("</svg>")


def test_what_is_said_in_words_has_the_numbers():
    assert "95.00 % at a density of 100.00 % to 95.00 % at 4.00 %" in CHARTS["rounds"]()
    assert "a.onnx 1.70 MB; b.onnx 1.20 kB; gzip 90.0 kB; bound 900 B" in CHARTS["bytes"]()
    assert "fc1 400 to 80 to 20; gone 90 to 0 to 0" in CHARTS["layers"]()
    assert "a 0.2 ms (0.1 to 0.4)" in CHARTS["latency"]()


def test_every_pixel_is_one_square_as_full_as_it_is_used():
    svg = charts.pixels_chart([[0, 4], [1, 2]])
    paths = dict(re.findall(r'<path d="([^"]+)" fill="var\(--accent\)" opacity="([^"]+)"', svg))
    assert paths == {"M1 0h1v1h-1z": "1", "M0 1h1v1h-1z": "0.25", "M1 1h1v1h-1z": "0.5"}
    assert "3 of 4 input pixels" in svg


@pytest.mark.parametrize("name", ["<b>bold</b>", "$x^2$ & more", 'quote"s', "a" * 80, "名前"])
def test_names_are_escaped_and_never_read_as_markup_or_formulas(name):
    with pytest.warns(UserWarning, match="Glyph") if name == "名前" else no_warning():
        for svg in (charts.bytes_chart([(name, 10)], []), charts.layers_chart([(name, 9, 3, 1)])):
            assert "<b>" not in svg
            assert "$x^2$" in svg or name != "$x^2$ & more"
            assert svg.count("<svg") == 1


class no_warning:  # noqa: N801  a context manager
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def test_a_thousand_layers_make_no_chart_taller_than_a_screen():
    svg = charts.layers_chart([(f"layer{i}", 10 + i, 5, 2) for i in range(1000)])
    height = float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)[1])
    assert height < 600
    assert "layer999" in svg
    assert "layer3<" not in svg


POINTS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 20).map(lambda a: a / 20)), min_size=1, max_size=25)


@given(POINTS)
def test_the_frontier_is_what_no_other_point_beats(points):
    expected = {
        (size, best)
        for size, best in points
        if not any((s <= size and a > best) or (s < size and a >= best) for s, a in points)
    }
    found = charts.frontier(points)
    assert set(found) == expected
    assert found == sorted(found)


def test_drawing_leaves_no_global_state_behind():
    program = (
        "import sys, matplotlib as mpl; before = dict(mpl.rcParams)\n"
        "from relief_export.report import charts; charts.latency_chart([('a', 1, 2, 3)])\n"
        "assert dict(mpl.rcParams) == before; print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
