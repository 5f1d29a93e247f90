import pytest

from relief_export.report import numbers


@pytest.mark.parametrize(
    ("function", "value", "written"),
    [
        (numbers.format_bytes, 0, "0 B"),
        (numbers.format_bytes, 999, "999 B"),
        (numbers.format_bytes, 1000, "1.00 kB"),
        (numbers.format_bytes, 999_499, "999 kB"),
        (numbers.format_bytes, 999_600, "1.00 MB"),
        (numbers.format_bytes, 1_726_099, "1.73 MB"),
        (numbers.format_count, 431_080, "431k"),
        (numbers.format_count, 7, "7"),
        (numbers.format_percent, 0.98765, "98.77 %"),
        (numbers.format_percent, 0.00041, "0.041 %"),
        (numbers.format_percent, 0, "0.00 %"),
        (numbers.format_percent, 1, "100.00 %"),
        (numbers.format_seconds, 0.0912, "91 ms"),
        (numbers.format_seconds, 12.34, "12.3 s"),
        (numbers.format_seconds, 245, "4 min 05 s"),
        (numbers.format_seconds, 59.99, "60.0 s"),
        (numbers.format_seconds, 7800, "2 h 10 min"),
        (numbers.format_milliseconds, 0.00004641, "0.0464 ms"),
    ],
)
def test_numbers_are_written_for_people(function, value, written):
    assert function(value) == written


@pytest.mark.parametrize(
    ("whole", "part", "written"), [(10, 0, "–"), (43, 1, "43.0×"), (1000, 8, "125×"), (1, 2, "0.500×")]
)
def test_a_ratio_says_how_many_times(whole, part, written):
    assert numbers.format_ratio(whole, part) == written


@pytest.mark.parametrize(
    ("after", "before", "written"),
    [(0.9375, 0.94, "−0.25"), (0.94, 0.94, "+0.00"), (0.95, 0.94, "+1.00"), (None, 0.9, "–"), (0.9, None, "–")],
)
def test_a_change_of_accuracy_has_its_sign(after, before, written):
    assert numbers.format_points(after, before) == written
