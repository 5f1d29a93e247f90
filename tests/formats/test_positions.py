import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from relief_export.formats.builder import Builder, short_names
from relief_export.formats.positions import CODES, choose, estimate_bits, gap_words, low_bits

BY_NAME = {code.name: code for code in CODES}


def emitted(code, positions, universe):
    builder = Builder(short_names(set()))
    out = code.emit(builder, positions, universe)
    builder.flush()
    return builder, out


def decoded(code, positions, universe):
    """Decode in ONNX's own reference implementation."""
    builder, out = emitted(code, positions, universe)
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
    positions, universe = np.array(support[0]), support[1]
    assert np.array_equal(decoded(BY_NAME[name], positions, universe), positions)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("positions", [[0], [99_999], [0, 99_999], [254, 255, 510, 90_000], [14, 15, 30, 45]])
def test_long_gaps_and_edges(name, positions):
    assert np.array_equal(decoded(BY_NAME[name], np.array(positions), 100_000), positions)


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
    builder, _ = emitted(BY_NAME["u8"], np.array([1, 4, 300]), 310)
    assert raw(builder) == [bytes([1, 3, 255, 41])]


def test_golden_u4():
    # words 1 3 15 9: high nibbles hold the first half, low nibbles the second
    builder, _ = emitted(BY_NAME["u4"], np.array([1, 4, 28]), 30)
    assert raw(builder) == [bytes([0x1F, 0x39])]


def test_golden_u16():
    builder, _ = emitted(BY_NAME["u16"], np.array([1, 4, 300]), 310)
    assert raw(builder) == [bytes([1, 0, 3, 0, 0x28, 1])]


def test_golden_bitmap():
    builder, _ = emitted(BY_NAME["bitmap"], np.array([1, 4, 9]), 10)
    assert raw(builder) == [bytes([0b01001000, 0b01000000])]


def test_golden_elias_fano():
    # l = 2; low parts 1 0 3 as planes of 2^0 then 2^1: 101 001; high parts 0 1 4 in unary: 1 01 0001
    positions = np.array([1, 4, 19])
    assert low_bits(positions, 20) == 2
    builder, _ = emitted(BY_NAME["elias-fano"], positions, 20)
    assert raw(builder) == [bytes([0b10100110, 0b10001000])]


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2, 0.5])
def test_the_smallest_code_is_chosen(density):
    positions = np.flatnonzero(np.random.default_rng(0).random(60_000) < density)
    real = {code.name: emitted(code, positions, 60_000)[0].bytes for code in CODES}
    assert real[choose(positions, 60_000).name] <= min(real.values()) + 100
    assert estimate_bits(positions.size, 60_000) / 8 == pytest.approx(min(real.values()), rel=0.25, abs=300)


def test_bit_codes_are_left_to_small_universes():
    assert not choose(np.arange(0, 2_000_000, 20), 2_000_000).slow
