"""Exact removal of disconnected neurons: analyse, decide, rewrite, until nothing changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from relief_export.errors import UnsupportedModelError
from relief_export.graph.constants import substitute_constants
from relief_export.graph.explain import Kept, LayerCut, explain, measure
from relief_export.graph.fold import file_size, restore_interface, simplify
from relief_export.graph.initializers import drop_unused
from relief_export.graph.liveness import Liveness, analyse
from relief_export.graph.narrow import narrow
from relief_export.graph.shuffle import mark_shuffles, replace_shuffle

if TYPE_CHECKING:
    from relief_export.graph.cutting import Cut


@dataclass(frozen=True)
class ShrinkResult:
    """What was removed and why the rest had to stay.

    Attributes:
        model: The smaller model, or an unchanged copy where ``modified`` is False.
        modified: Whether anything was removed.
        removed: One row a linear layer that lost channels.
        kept: Zero rows and columns that stay, by layer and reason.
        unknown: Operators without a rule, and how often they occur; what they touch stays.
        opaque: Operators declared to read or mix all channels, and how often they occur.
    """

    model: ir.Model = field(repr=False)
    modified: bool
    removed: tuple[LayerCut, ...]
    kept: tuple[Kept, ...]
    unknown: dict[str, int]
    opaque: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model as plain data."""
        return {
            "modified": self.modified,
            "removed": [asdict(row) for row in self.removed],
            "kept": [asdict(row) for row in self.kept],
            "unknown": self.unknown,
            "opaque": self.opaque,
        }


def shrink(model: ir.Model, *, strict: bool = False) -> ShrinkResult:
    """Remove every channel that no output depends on and move constant channels into biases.

    Inputs and outputs keep their names, types and shapes. Parameters, MACs and bytes never grow.

    Args:
        model: Any ONNX model of opset 13 or later; it is not changed.
        strict: Refuse operators without a rule instead of keeping all that they touch.

    Raises:
        UnsupportedModelError: An operator is unknown under ``strict``, or a weight holds NaN or Inf.
    """
    base = simplify(model)
    work, before, modified = base.clone(), None, False
    while True:
        liveness = analyse(work)
        if before is None:
            _refuse(liveness, strict=strict)
            before = measure(liveness)
        if replaced := substitute_constants(work, liveness):
            liveness = analyse(work)
        mark_shuffles(liveness)
        cut = liveness.settle()
        if not (_carry_out(work, liveness, cut) or replaced):
            break
        modified = True
    kept = explain(liveness, cut)
    narrowed = narrow(work.graph, liveness)
    modified = modified or narrowed > 0
    after = measure(analyse(work) if narrowed else liveness) if modified else {}
    restore_interface(work, model)
    # A converted model cannot be held against the original: an older opset says some things in fewer bytes.
    source = model if model.opset_imports.get("") == work.opset_imports.get("") else base
    if not modified or file_size(work) > min(file_size(source), file_size(base)):
        return ShrinkResult(model.clone(), False, (), kept, dict(liveness.unknown), dict(liveness.opaque))
    removed = tuple(LayerCut.between(name, size, after.get(name)) for name, size in before.items())
    removed = tuple(row for row in removed if row.changed)
    return ShrinkResult(work, True, removed, kept, dict(liveness.unknown), dict(liveness.opaque))


def _refuse(liveness: Liveness, *, strict: bool) -> None:
    if strict and liveness.unknown:
        names = ", ".join(f"{name} ({count})" for name, count in sorted(liveness.unknown.items()))
        raise UnsupportedModelError(f"no rule for {names}: leave out --strict to keep whole what they touch")
    for site, rule in liveness.sites:
        if rule.finite_operands:
            for index, value in enumerate(site.node.inputs):
                array = site.array(index)
                if array is not None and value is not None and not np.isfinite(array).all():
                    raise UnsupportedModelError(
                        f"tensor {value.name} of {site.label} holds NaN or Inf: repair it first"
                    )


def _carry_out(model: ir.Model, liveness: Liveness, cut: Cut) -> bool:
    """Apply the decision to the graph; return whether anything changed."""
    flows = liveness.trace.flows
    if all(cut.stays(v).all() for v in flows):
        return False
    cut.edit(model.graph)
    for value in flows:
        lists = cut.kept(value) if not cut.gone(value) else {}
        if lists and value.shape is not None:
            value.shape = ir.Shape([len(lists[k]) if k in lists else d for k, d in enumerate(value.shape)])
    gone = [site.node for site, _ in liveness.sites if all(cut.gone(v) for v in site.node.outputs)]
    for site, rule in liveness.sites:
        if site.node not in gone and not cut.shuffles(site) and not replace_shuffle(site, cut):
            rule.rewrite(site, cut)
    cut.finish()
    for node in reversed(gone):
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
    common.RemoveUnusedNodesPass()(model)
    _restore_names(model.graph, cut)
    return True


def _restore_names(graph: ir.Graph, cut: Cut) -> None:
    """Drop initializers that nothing reads and give the cut ones their names back."""
    drop_unused(graph)
    taken = Counter(v.name for v in graph.inputs) + Counter(o.name for node in graph for o in node.outputs)
    for value, name in cut.created:
        if value.name != name and value.uses() and name not in graph.initializers and name not in taken:
            value.name = name
