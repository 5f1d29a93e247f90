import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from relief_export.formats.builder import Builder, short_names
from relief_export.formats.positions import CODES, SLOW_ABOVE, _rice_bits, choose, estimate_bits, gap_words, low_bits

BY_NAME = {code.name: code for code in CODES}


def emitted(code, positions):
    builder = Builder(short_names(set()))
    out = code.emit(builder, positions)
    builder.finish()
    return builder, out


def decoded(code, positions):
    """Decode in ONNX's own reference implementation."""
    builder, out = emitted(code, positions)
    kind = TensorProto.INT64 if code.wide else TensorProto.INT32
    outputs = [helper.make_tensor_value_info(out, kind, [positions.size])]
    graph = helper.make_graph(builder.nodes, "g", [], outputs, builder.tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return onnx.reference.ReferenceEvaluator(model).run(None, {})[0]


supports = st.integers(1, 400).flatmap(
    lambda n: st.lists(st.integers(0, n - 1), min_size=1, unique=True).map(lambda found: (sorted(found), n))
)


@pytest.mark.parametrize("name", BY_NAME)
@given(support=supports)
@settings(max_examples=40, deadline=None)
def test_the_reference_runtime_decodes_every_code(name, support):
    positions = np.array(support[0])
    assert np.array_equal(decoded(BY_NAME[name], positions), positions)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("positions", [[0], [99_999], [0, 99_999], [254, 255, 510, 90_000], [14, 15, 30, 45]])
def test_long_gaps_and_edges(name, positions):
    assert np.array_equal(decoded(BY_NAME[name], np.array(positions)), positions)


@pytest.mark.parametrize(
    ("escape", "positions", "words"),
    [
        (255, [3, 4, 258, 513], [3, 1, 254, 255, 0]),
        (15, [0, 14, 45], [0, 14, 15, 15, 1]),
        (65535, [70000], [65535, 4465]),
    ],
)
def test_gap_words_are_those_of_the_specification(escape, positions, words):
    assert gap_words(np.array(positions), escape).tolist() == words


def raw(builder):
    """Return the bytes of the stream: the first constant with raw data; shifts and sizes follow it."""
    return [next(tensor.raw_data for tensor in builder.tensors if tensor.raw_data)]


def test_golden_u8():
    builder, _ = emitted(BY_NAME["u8"], np.array([1, 4, 300]))
    assert raw(builder) == [bytes([1, 3, 255, 41])]


def test_golden_u4():
    # words 1 3 15 9: high nibbles hold the first half, low nibbles the second
    builder, _ = emitted(BY_NAME["u4"], np.array([1, 4, 28]))
    assert raw(builder) == [bytes([0x1F, 0x39])]


def test_golden_u16():
    builder, _ = emitted(BY_NAME["u16"], np.array([1, 4, 300]))
    assert raw(builder) == [bytes([1, 0, 3, 0, 0x28, 1])]


def test_golden_bitmap():
    builder, _ = emitted(BY_NAME["bitmap"], np.array([1, 4, 9]))
    assert raw(builder) == [bytes([0b01001000, 0b01000000])]


def test_golden_rice():
    # l = 2; gaps 1 3 15 are 4·1 − 3, 4·1 − 1, 4·4 − 1: words 11 01 01, then ones at 1, 2 and 6
    positions = np.array([1, 4, 19])
    assert low_bits(positions) == 2
    builder, _ = emitted(BY_NAME["rice"], positions)
    assert raw(builder) == [bytes([0b11010101, 0b10001000])]


@given(support=supports)
@settings(max_examples=40, deadline=None)
def test_rice_is_never_longer_than_elias_fano(support):
    positions = np.array(support[0])
    for low in range(1, 8):
        elias_fano = low * positions.size + positions.size + (int(positions[-1]) >> low)
        assert _rice_bits(positions, low) <= elias_fano + 1


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2, 0.5])
def test_the_smallest_code_is_chosen(density):
    positions = np.flatnonzero(np.random.default_rng(0).random(60_000) < density)
    real = {code.name: emitted(code, positions)[0].bytes for code in CODES}
    assert real[choose(positions, 60_000).name] <= min(real.values()) + 100
    assert estimate_bits(positions.size, 60_000) / 8 == pytest.approx(min(real.values()), rel=0.25, abs=300)


def test_bit_codes_are_left_to_small_universes():
    assert not choose(np.arange(0, 2_000_000, 20), 2_000_000).slow


def test_large_universes_take_the_quicker_code_where_it_costs_little():
    found = np.flatnonzero(np.random.default_rng(0).random(2 * SLOW_ABOVE) < 0.2)
    universe = 2 * SLOW_ABOVE
    assert choose(found, universe, others=found.size).name == "u4"  # values of one byte
    assert choose(found, universe, others=4 * found.size).name == "u8"  # of four
    few = found[found < SLOW_ABOVE // 4]
    assert choose(few, SLOW_ABOVE // 4, others=4 * few.size).name != "u8"
