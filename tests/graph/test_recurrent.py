"""Hidden units of recurrent layers: what is always zero or read by nobody goes, in every form of the operators."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from relief_export.graph.analysis import parameter_use
from relief_export.graph.prepare import simplify
from relief_export.graph.shrink import shrink
from tests.graph.helpers import arrays_of, assert_same, parameters, run

RELATIVE = 1e-5  # of the output's scale
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
CANDIDATE = {"LSTM": 3, "GRU": 2, "RNN": 0}
TIME, BATCH, INPUTS, HIDDEN = 5, 3, 6, 7


def network(
    op: str, seed: int, directions: int = 1, *, outputs: str = "Y", states: str = "", **attributes: object
) -> ir.Model:
    """Build linear layer -> recurrent layer -> linear layers, with random zeros everywhere."""
    rng = np.random.default_rng(seed)

    def weight(*shape: int, share: float = 0.5) -> np.ndarray:
        return (rng.normal(size=shape) * (rng.random(shape) > share)).astype(np.float32)

    width = GATES[op] * HIDDEN
    first = weight(INPUTS, INPUTS)
    first[:, rng.random(INPUTS) < 0.4] = 0
    w, r = weight(directions, width, INPUTS), weight(directions, width, HIDDEN, share=0.8)
    b = weight(directions, 2 * width)
    still = np.flatnonzero(rng.random(HIDDEN) < 0.5)  # nothing feeds their candidate
    rows = CANDIDATE[op] * HIDDEN + still
    w[:, rows] = 0
    b[:, [*rows, *(width + rows)]] = 0
    r[:, rows] *= rng.random((directions, len(rows), HIDDEN)) < 0.3
    arrays = {"first": first, "shift": weight(INPUTS), "w": w, "r": r, "b": b}
    start = weight(directions, BATCH, HIDDEN)
    start[:, :, still] *= rng.random(len(still)) < 0.2
    operands = ["s", "w", "r", "b", "", *([""] if op != "LSTM" else ["", ""])]
    if "lengths" in states:
        arrays["lengths"] = np.array([TIME, 2, 1], np.int32)
        operands[4] = "lengths"
    if "initial" in states:
        arrays["start"] = start
        operands[5] = "start"
        if op == "LSTM":
            operands[6] = "start"
    if op == "LSTM" and "peepholes" in states:
        arrays["p"] = weight(directions, 3 * HIDDEN)
        operands.append("p")
    names = ["Y", "Y_h", "Y_c"][: 3 if op == "LSTM" else 2]
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["m"]),
        helper.make_node("Add", ["m", "shift"], ["s"]),
        helper.make_node(
            op, operands, [n if n in outputs.split() else "" for n in names], hidden_size=HIDDEN, **attributes
        ),
    ]
    results = []
    for name in outputs.split():
        read = weight(HIDDEN, 4)
        read[rng.random(HIDDEN) < 0.4] = 0
        arrays[f"read{name}"] = read
        nodes.append(helper.make_node("MatMul", [name, f"read{name}"], [f"out{name}"]))
        results.append(helper.make_tensor_value_info(f"out{name}", TensorProto.FLOAT, None))
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [TIME, BATCH, INPUTS])]
    graph = helper.make_graph(nodes, "g", given, results, [numpy_helper.from_array(a, n) for n, a in arrays.items()])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9))


def hidden(model: ir.Model) -> int:
    """Return how many hidden units are left, none where all outputs are constant."""
    arrays = arrays_of(model)
    return arrays["r"].shape[2] if "r" in arrays else 0


FORMS = [
    *((op, 1, "Y", "", {}) for op in GATES),
    *((op, 1, "Y_h", "lengths initial", {}) for op in GATES),
    *((op, 2, "Y Y_h", "initial", {"direction": "bidirectional"}) for op in GATES),
    ("LSTM", 1, "Y_h Y_c", "peepholes initial", {"direction": "reverse"}),
    ("LSTM", 1, "Y_c", "peepholes lengths", {"clip": 0.5}),
    ("LSTM", 1, "Y", "", {"activations": ["HardSigmoid", "Softsign", "Relu"]}),
    ("LSTM", 1, "Y", "initial", {"input_forget": 1}),
    ("GRU", 1, "Y Y_h", "initial", {"linear_before_reset": 1}),
    ("GRU", 2, "Y", "lengths", {"linear_before_reset": 1, "direction": "bidirectional"}),
    ("RNN", 1, "Y", "", {"activations": ["Relu"]}),
    ("RNN", 1, "Y", "", {"activations": ["Sigmoid"]}),
]


@pytest.mark.parametrize(("op", "directions", "outputs", "states", "attributes"), FORMS)
def test_any_pattern_of_zeros(op, directions, outputs, states, attributes):
    lost = 0
    for seed in range(5):
        model = network(op, seed, directions, outputs=outputs, states=states, **attributes)
        result = shrink(model, strict=True)
        feeds = {"x": np.random.default_rng(seed).normal(size=(TIME, BATCH, INPUTS)).astype(np.float32)}
        assert_same(model, result.model, feeds, relative=RELATIVE)
        assert parameters(result.model) <= parameters(model)
        if result.modified:
            assert not shrink(result.model).modified
        lost += HIDDEN - hidden(result.model)
    assert lost > 0


def always_zero(model: ir.Model) -> int:
    """Count hidden units that are zero for every input at every time, as ONNX Runtime computes them."""
    copy = model.clone()
    node = next(n for n in copy.graph if n.op_type in GATES)
    copy.graph.outputs.clear()
    copy.graph.outputs.append(node.outputs[0])
    x = np.random.default_rng(0).normal(size=(TIME, BATCH, INPUTS)).astype(np.float32)
    found = run(copy, {"x": x})[0]
    return int((found == 0).all(axis=(0, 1, 2)).sum())


@pytest.mark.parametrize("op", GATES)
def test_nothing_that_is_zero_or_unread_is_left(op):
    for seed in range(8):
        found = shrink(network(op, seed)).model
        if hidden(found) < 2:
            continue  # the last unit has to stay
        w, r, read = (arrays_of(found)[name] for name in ("w", "r", "readY"))
        assert always_zero(found) == 0
        needed = read.any(axis=1)
        for _ in range(HIDDEN):  # what a needed unit reads is needed
            reading = r.reshape(GATES[op], -1, r.shape[2])[:, needed]
            needed = needed | (reading != 0).any(axis=(0, 1))
        assert needed.all()
        assert w.any(axis=(0, 1)).all() or w.shape[2] == 1


@pytest.mark.parametrize("op", GATES)
def test_dead_entries_may_be_anything(op):
    """What is said to be dead is: other numbers in its place change no output."""
    for seed, states in itertools.product(range(3), ("", "initial")):
        model = network(op, seed, outputs="Y Y_h", states=states)
        use = parameter_use(simplify(model))
        changed = model.clone()
        for name in ("w", "r"):
            array = arrays_of(model)[name].copy()
            array[use[name].dead & (array != 0)] = 3
            changed.graph.initializers[name].const_value = ir.tensor(array, name=name)
        x = {"x": np.random.default_rng(seed).normal(size=(TIME, BATCH, INPUTS)).astype(np.float32)}
        for a, b in zip(run(model, x), run(changed, x), strict=True):
            assert b == pytest.approx(a, rel=RELATIVE, abs=RELATIVE)


def test_reasons_name_what_is_shared():
    model = network("GRU", 3)
    twin = next(n for n in model.graph if n.op_type == "GRU")
    again = ir.node("GRU", list(twin.inputs), attributes={"hidden_size": HIDDEN}, num_outputs=1, name="again")
    again.outputs[0].name = "Z"
    model.graph.append(again)
    model.graph.outputs.append(again.outputs[0])
    result = shrink(model)
    assert arrays_of(result.model)["r"].shape == arrays_of(model)["r"].shape
