"""The arena: hand-made plans, the bound, and that tensors which live together never share a byte."""

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relief_export.errors import UnsupportedModelError
from relief_export.graph.arena import ALIGNMENT, ArenaTensor, UnknownSizeError, arena_bytes, place, plan_arena
from relief_export.stages import export_stages

HEADER = '<ir_version: 9, opset_import: ["" : 20, "my.domain" : 1]>\n'


def plan(text, batch=1):
    return plan_arena(ir.from_onnx_text(HEADER + text), batch)


def overlapping(tensors):
    """Return the pairs that live at the same time and share a byte."""
    return [
        (a.name, b.name)
        for a, b in itertools.combinations(tensors, 2)
        if a.first <= b.last and b.first <= a.last and a.offset < b.offset + b.bytes and b.offset < a.offset + a.bytes
    ]


def peak_by_definition(tensors):
    """Sum the live bytes at every moment, the plain way."""
    moments = range(max(t.last for t in tensors) + 1)
    return max(sum(t.bytes for t in tensors if t.first <= moment <= t.last) for moment in moments)


def test_a_chain_needs_its_two_largest_neighbours():
    # 64, 128, 256, 32 bytes: the second and the third live together.
    found = plan(
        "g (float[n, 16] x) => (float[n, 8] y) { p = Concat <axis = 1> (x, x) q = Concat <axis = 1> (p, p)"
        " s = Constant <value_ints = [0]> () e = Constant <value_ints = [8]> () a = Constant <value_ints = [1]> ()"
        " y = Slice (q, s, e, a) }"
    )
    assert (found.bytes, found.lower_bound) == (128 + 256, 128 + 256)
    assert (found.peak, found.peak_op) == ("q", "Concat")
    assert [t.name for t in found.peak_tensors] == ["q", "p"]
    assert {t.name: t.bytes for t in found.tensors} == {"q": 256, "p": 128, "x": 64, "y": 32}


def test_a_shortcut_stays_until_it_is_added():
    found = plan("g (float[n, 16] x) => (float[n, 16] y) { a = Relu (x) b = Relu (a) c = Relu (b) y = Add (c, a) }")
    span = {t.name: (t.first, t.last) for t in found.tensors}
    assert span == {"x": (0, 0), "a": (0, 3), "b": (1, 2), "c": (2, 3), "y": (3, 3)}
    assert found.lower_bound == 3 * 64
    assert found.bytes == 3 * 64


def test_reshapes_take_no_bytes_of_their_own_and_outputs_live_to_the_end():
    found = plan(
        "g (float[n, 4, 4] x) => (float[n, 16] y, float[n, 4, 4] z)"
        "{ z = Relu (x) f = Flatten (z) i = Identity (f) u = Relu (i) y = Relu (u) }"
    )
    assert {t.name: (t.first, t.last) for t in found.tensors} == {"x": (0, 0), "z": (0, 4), "u": (3, 4), "y": (4, 4)}


def test_the_batch_multiplies_and_bytes_are_aligned():
    text = "g (float[n, 3] x) => (float[n, 3] y) { y = Relu (x) }"
    assert plan(text).bytes == 2 * ALIGNMENT
    assert plan(text, batch=10).bytes == 2 * 128


def test_what_is_computed_from_constants_belongs_to_the_weights():
    found = plan(
        "g (float[n, 16] x) => (float[n, 16] y) { s = Shape (x) k = Constant <value_floats = [1.0, 2.0]> ()"
        " t = Relu (k) y = Reshape (x, s) }"
    )
    assert [t.name for t in found.tensors] == ["x"]


def test_a_branch_reads_outer_values_when_its_node_runs():
    found = plan(
        "g (float[n, 16] x, bool c) => (float[n, 16] y) { a = Relu (x) b = Relu (x)"
        " t = If (c) <then_branch = p () => (float[n, 16] u) { u = Neg (a) },"
        " else_branch = q () => (float[n, 16] v) { v = Neg (b) }> y = Relu (t) }"
    )
    span = {t.name: (t.first, t.last) for t in found.tensors}
    assert (span["a"], span["b"]) == ((0, 2), (1, 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g (float[n, 3] x) => (float[n, m] y) { y = my.domain.Mystery (x) }", "tensor 'y' has no known size"),
        ("g (float[n, h] x) => (float[n, h] y) { y = Relu (x) }", "tensor 'x' has no known size"),
        ("g (float[n, 3] x) => (float[2] y) { y = Constant <value_floats = [1.0, 2.0]> () }", "computes nothing"),
    ],
)
def test_what_cannot_be_planned_is_refused(text, message):
    with pytest.raises(UnsupportedModelError, match=message):
        plan(text)


tensors = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6), st.integers(0, 40)), min_size=1, max_size=30).map(
    lambda rows: [
        ArenaTensor(f"t{i}", size * ALIGNMENT, first, first + length) for i, (first, length, size) in enumerate(rows)
    ]
)


@settings(max_examples=300, deadline=None)
@given(tensors, st.randoms(use_true_random=False))
def test_no_two_live_tensors_overlap_in_any_order(rows, random):
    random.shuffle(rows)
    placed = place(rows)
    assert overlapping(placed) == []
    assert arena_bytes(placed) >= peak_by_definition(placed)


@st.composite
def graphs(draw):
    """Random graphs of elementwise joins and concats: every node reads one or two earlier values."""
    widths, lines = {"x": 4}, []
    for index in range(draw(st.integers(1, 14))):
        a, b = draw(st.sampled_from(sorted(widths))), draw(st.sampled_from(sorted(widths)))
        if widths[a] == widths[b] and draw(st.booleans()):
            lines.append(f"v{index} = Add ({a}, {b})")
            widths[f"v{index}"] = widths[a]
        else:
            lines.append(f"v{index} = Concat <axis = 1> ({a}, {b})")
            widths[f"v{index}"] = widths[a] + widths[b]
    last = f"v{len(lines) - 1}"
    return f"g (float[n, 4] x) => (float[n, {widths[last]}] {last}) {{ {' '.join(lines)} }}"


@settings(max_examples=100, deadline=None)
@given(graphs())
def test_plans_of_random_graphs_are_sound_and_never_below_the_bound(text):
    found = plan(text)
    assert overlapping(found.tensors) == []
    assert found.lower_bound == peak_by_definition(found.tensors)
    assert found.lower_bound <= found.bytes == arena_bytes(found.tensors)
    assert sum(t.bytes for t in found.peak_tensors) == found.lower_bound
    assert np.all([t.offset % ALIGNMENT == 0 for t in found.tensors])


def test_sizes_that_are_known_only_at_run_time_leave_no_plan_and_do_not_stop_an_export():
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[n, 3] x) => (float[n, 3] y) {
          i = NonZero (x)
          c = Cast <to = 1> (i)
          s = ReduceSum <keepdims = 0> (c)
          y = Add (x, s)
        }
        """
    )
    with pytest.raises(UnknownSizeError, match="has no known size"):
        plan_arena(model)
    plan, reason = export_stages._arena(model)
    assert plan is None
    assert "has no known size" in reason
