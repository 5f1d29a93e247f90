import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from relief_export.formats.builder import Builder, short_names
from relief_export.formats.positions import (
    CODES,
    SLOW_ABOVE,
    _emit_rice,
    _rice_bits,
    choose,
    emit_filled,
    estimate_bits,
    fillers,
    gap_words,
    low_bits,
)

BY_NAME = {code.name: code for code in CODES}


def emitted(emit, positions, opset=18):
    builder = Builder(short_names(set()), opset)
    out = emit(builder, positions)
    builder.finish()
    return builder, out


def decoded(emit, positions, *, wide=False, opset=18, size=None):
    """Decode in ONNX's own reference implementation."""
    builder, out = emitted(emit, positions, opset)
    kind = TensorProto.INT64 if wide else TensorProto.INT32
    outputs = [helper.make_tensor_value_info(out, kind, [size or positions.size])]
    graph = helper.make_graph(builder.nodes, "g", [], outputs, builder.tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return onnx.reference.ReferenceEvaluator(model).run(None, {})[0]


supports = st.integers(1, 400).flatmap(
    lambda n: st.lists(st.integers(0, n - 1), min_size=1, unique=True).map(lambda found: (sorted(found), n))
)


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("name", BY_NAME)
@given(support=supports)
@settings(max_examples=40, deadline=None)
def test_the_reference_runtime_decodes_every_code(name, opset, support):
    positions, code = np.array(support[0]), BY_NAME[name]
    assert np.array_equal(decoded(code.emit, positions, wide=code.wide, opset=opset), positions)


@given(support=supports)
@settings(max_examples=40, deadline=None)
def test_filled_positions_hold_the_real_ones_and_need_no_escape(support):
    positions = np.array(support[0])
    values = {}

    def emit(builder, positions):
        name, values["stored"] = emit_filled(
            builder, positions, np.arange(1, positions.size + 1, dtype=np.uint16), fillers(positions)
        )
        return name

    every = decoded(emit, positions, size=positions.size + fillers(positions))
    assert np.array_equal(every[values["stored"] > 0], positions)
    assert np.array_equal(values["stored"][values["stored"] > 0], np.arange(1, positions.size + 1))
    gaps = np.diff(every, prepend=0)
    assert gaps.max() <= 15
    assert (gaps[1:] > 0).all()
    assert every.size == positions.size + sum((max(gap, 1) - 1) // 15 for gap in np.diff(positions, prepend=0))


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("positions", [[0], [99_999], [0, 99_999], [254, 255, 510, 90_000], [14, 15, 30, 45]])
def test_long_gaps_and_edges(name, positions):
    code = BY_NAME[name]
    assert np.array_equal(decoded(code.emit, np.array(positions), wide=code.wide), positions)


@pytest.mark.parametrize(
    ("escape", "positions", "words"),
    [
        (255, [3, 4, 258, 513], [3, 1, 254, 255, 0]),
        (15, [0, 14, 45], [0, 14, 15, 15, 1]),
        (65535, [70000], [65535, 4465]),
    ],
)
def test_gap_words_are_those_of_the_specification(escape, positions, words):
    assert gap_words(np.diff(positions, prepend=0), escape).tolist() == words


def raw(builder):
    """Return the bytes of the stream: the first constant with raw data; shifts and sizes follow it."""
    return [next(tensor.raw_data for tensor in builder.tensors if tensor.raw_data)]


def test_golden_u8():
    builder, _ = emitted(BY_NAME["u8"].emit, np.array([1, 4, 300]))
    assert raw(builder) == [bytes([1, 3, 255, 41])]


def test_golden_u4():
    # words 1 3 15 9: high nibbles hold the first half, low nibbles the second
    builder, _ = emitted(BY_NAME["u4"].emit, np.array([1, 4, 28]))
    assert raw(builder) == [bytes([0x1F, 0x39])]


def test_golden_u16():
    builder, _ = emitted(BY_NAME["u16"].emit, np.array([1, 4, 300]))
    assert raw(builder) == [bytes([1, 0, 3, 0, 0x28, 1])]


def test_golden_bitmap():
    builder, _ = emitted(BY_NAME["bitmap"].emit, np.array([1, 4, 9]))
    assert raw(builder) == [bytes([0b00100000, 0b10001000])]


def test_golden_rice():
    # l = 2; gaps 1 3 15 are 4·1 − 3, 4·1 − 1, 4·4 − 1: words 3 1 1 are the planes 100 and 111; then ones at 1, 2 and 6
    positions = np.array([1, 4, 19])
    builder, _ = emitted(lambda builder, found: _emit_rice(builder, found, 2), positions)
    # 100111 0110001 and three zeros, in eight planes of two bits: 10 01 11 01 10 00 10 00
    assert bytes([0b10101010, 0b01110000]) in [tensor.raw_data for tensor in builder.tensors]


def test_golden_rice_with_words_of_one_bit():
    # gaps 1 3 15 are 2·1 − 1, 2·2 − 1, 2·8 − 1: words 1 1 1, then ones at 1, 3 and 11; nodes for wider words cost more
    positions = np.array([1, 4, 19])
    assert low_bits(positions) == 1
    builder, _ = emitted(BY_NAME["rice"].emit, positions)
    # 111 010100000001 and a zero, in eight planes of two bits: 11 10 10 10 00 00 00 10
    assert raw(builder) == [bytes([0b11110001, 0b10000000])]


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
    real = {code.name: emitted(code.emit, positions)[0].bytes for code in CODES}
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
