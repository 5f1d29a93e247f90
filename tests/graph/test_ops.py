"""Every operator of the table, against ONNX Runtime: exact, as complete as stated, and loud where it keeps channels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from relief_export.errors import UnsupportedModelError
from relief_export.graph.analysis import analyse
from relief_export.graph.ops import OPAQUE, RULES
from relief_export.graph.prepare import simplify
from relief_export.graph.shrink import shrink
from tests.graph.cases import CASES, CHANNELS, Case, model_of
from tests.graph.helpers import arrays_of, assert_sound, build, random_feeds, run

RELATIVE = 1e-5  # of the output's scale
CONSTANT = 1e-6  # of a constant channel's own value, or of 1
FOLDED = ("Dropout", "Identity")  # removed before the analysis


@pytest.fixture(params=CASES, ids=lambda case: case.label)
def case(request) -> Case:
    return request.param


def test_the_table_is_covered():
    assert set(RULES) - {case.op for case in CASES} == {"Upsample"}  # deprecated since opset 10: never legal here
    labels = [case.label for case in CASES]
    assert len(set(labels)) == len(labels)


def test_shrunk_is_original(case):
    model = model_of(case)
    result = shrink(model, strict=True)
    assert_sound(model, result.model, random_feeds(model), relative=RELATIVE)
    assert not shrink(result.model).modified


def test_channels_go_where_they_can_and_reasons_are_given(case):
    result = shrink(model_of(case))
    assert arrays_of(result.model)["w1"].shape[0] == case.left
    reasons = {row.reason for row in result.stayed}
    assert any(case.reason in reason for reason in reasons) if case.reason else True
    if RULES[case.op] is OPAQUE:
        assert result.opaque[case.op] >= 1
    assert result.unknown == {}


def test_constants_are_what_onnx_runtime_computes(case):
    model = simplify(model_of(case))
    facts_of = analyse(model).walk.facts_of
    known = {v: f.const for v, f in facts_of.items() if not np.isnan(f.const).all() and not v.is_graph_output()}
    found = [facts.const for value, facts in facts_of.items() if value.name == "d"]
    assert found or case.op in FOLDED
    assert all((~np.isnan(const)).sum() == case.known for const in found)
    outputs = list(known)
    model.graph.outputs.extend(outputs)
    for value, found in zip(outputs, run(model, random_feeds(model))[1:], strict=True):
        const = np.broadcast_to(known[value], found.shape)
        at = ~np.isnan(const)
        assert found.astype(np.float64)[at] == pytest.approx(const[at], rel=CONSTANT, abs=CONSTANT)


def test_unknown_operator_pins_is_counted_and_is_refused_when_strict():
    arrays = arrays_of(model_of(Case("Relu", "d = Relu(a)")))
    text = "g (float[n, 3, 4, 4] x) => (float[n, 4, 4, 4] y) { a = Conv(x, w1, b1) d = OP(a) y = Conv(d, w2, b2) }"
    custom = build(text.replace("OP", "acme.Warp"), arrays, domain="acme")
    standard = build(text.replace("OP", "MeanVarianceNormalization<axes=[1]>"), arrays)
    for model, name in ((custom, "acme.Warp"), (standard, "MeanVarianceNormalization")):
        result = shrink(model)
        assert result.unknown == {name: 1}
        assert arrays_of(result.model)["w1"].shape[0] == CHANNELS
        assert any("pinned by unknown operator" in row.reason for row in result.stayed)
        with pytest.raises(UnsupportedModelError, match=rf"no rule for {name} \(1\)"):
            shrink(model, strict=True)
    assert isinstance(ir.to_proto(custom).graph.node[1].domain, str)
