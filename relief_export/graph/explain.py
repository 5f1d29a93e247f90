"""What was removed, layer by layer, and why every zero row and column that stays had to stay."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from relief_export.graph.flow import PINNED

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from relief_export.graph.cutting import Cut
    from relief_export.graph.flow import Site
    from relief_export.graph.liveness import Liveness
    from relief_export.graph.matrix import Matrix


@dataclass(frozen=True)
class LayerSize:
    """Size of one linear layer: channels out, channels in (of all groups), groups, stored weights."""

    op: str
    outputs: int
    inputs: int
    groups: int
    weights: int


@dataclass(frozen=True)
class LayerCut:
    """One linear layer before and after; ``*_after`` is 0 where the layer is gone."""

    layer: str
    op: str
    outputs_before: int
    outputs_after: int
    inputs_before: int
    inputs_after: int
    weights_before: int
    weights_after: int

    @classmethod
    def between(cls, layer: str, before: LayerSize, after: LayerSize | None) -> LayerCut:
        """Compare one layer's sizes."""
        left = after or LayerSize(before.op, 0, 0, 0, 0)
        sizes = (before.outputs, left.outputs, before.inputs, left.inputs, before.weights, left.weights)
        return cls(layer, before.op, *sizes)

    @property
    def changed(self) -> bool:
        """Whether the layer lost anything."""
        return self.weights_before != self.weights_after


@dataclass(frozen=True)
class Kept:
    """Zero rows (``side`` "output") or columns ("input") of one layer that stay, for one reason."""

    layer: str
    side: str
    count: int
    reason: str


@dataclass(frozen=True)
class _Marks:
    """What stands in the way of units.

    Attributes:
        tied: Component of units -> the node that ties them.
        pinned: Unit -> why it must stay.
        carried: Unit -> it carries a non-zero constant that must not go.
    """

    tied: dict[int, ir.Node]
    pinned: dict[int, str]
    carried: NDArray[np.bool_]


def layer_name(site: Site) -> str:
    """Name a layer by its weight, as the framework named it, or by its node."""
    value = site.node.inputs[1]
    return str((value.name if value is not None else None) or site.label).removesuffix(".weight")


def measure(liveness: Liveness) -> dict[str, LayerSize]:
    """Return the size of every linear layer by its first output's name."""
    sizes = {}
    for site, _ in liveness.sites:
        if "matrix" in site.cache:
            matrix: Matrix = site.cache["matrix"]
            groups, outs, ins = site.cache["nonzero"].shape
            sizes[layer_name(site)] = LayerSize(
                site.node.op_type, groups * outs, groups * ins, groups, matrix.weight.size
            )
    return sizes


def explain(liveness: Liveness, cut: Cut) -> tuple[Kept, ...]:
    """Return the zero rows and columns of a graph from which nothing more can be removed, with the reason of each."""
    marks = _marks(liveness)
    rows: list[Kept] = []
    for site, _ in liveness.sites:
        if "matrix" not in site.cache:
            continue
        source, value = site.source, site.result
        dead_out = ~liveness.live[value].reshape(-1) | ~np.isnan(site.cache["const_out"])
        unread = ~site.cache["nonzero"].any(axis=1).reshape(-1)
        for side, at, zero in (("output", value, dead_out), ("input", source, unread)):
            reasons = _reasons(liveness, cut, at, zero, marks)
            rows += [Kept(layer_name(site), side, n, why) for why, n in sorted(reasons.items())]
    return tuple(rows)


def _marks(liveness: Liveness) -> _Marks:
    tied: dict[int, ir.Node] = {}
    pinned: dict[int, str] = {}
    for left, right, node in liveness.trace.ties:
        for label in np.unique(liveness.labels[left]):
            tied.setdefault(int(label), node)
        for unit in (*left[left != PINNED], *right[right != PINNED]):
            pinned.setdefault(int(unit), f"tied at {node.op_type} {node.name} with channels that must stay")
    for ids, reason in liveness.trace.pins:
        pinned.update(dict.fromkeys(ids[ids != PINNED].tolist(), reason))
    carried = np.zeros(liveness.trace.count, np.bool_)
    for value, flow in liveness.trace.flows.items():
        carried[flow.ids[liveness.live[value] & ~np.isnan(flow.const) & (flow.const != 0)]] = True
    return _Marks(tied, pinned, carried)


def _reasons(
    liveness: Liveness,
    cut: Cut,
    value: ir.Value | None,
    zero: NDArray[np.bool_],
    marks: _Marks,
) -> Counter[str]:
    assert value is not None  # noqa: S101 - a linear layer has an input
    flow = liveness.trace.flows[value]
    units = np.broadcast_to(flow.ids.reshape(-1), len(zero))
    labels = liveness.labels[units]
    # A flattened map has a column for every position of a channel: they stay or go together.
    partly = set(np.unique(units[~zero]).tolist())
    reasons: Counter[str] = Counter()
    for index in np.flatnonzero(zero):
        label = int(labels[index])
        if label == liveness.labels[0]:
            default = "graph input" if value.is_graph_input() else "pinned"
            reasons[marks.pinned.get(int(units[index]), default)] += 1
        elif int(units[index]) in partly:
            reasons["other positions of the channel are read"] += 1
        elif label in cut.reasons:
            reasons[cut.reasons[label]] += 1
        elif label in marks.tied:
            node = marks.tied[label]
            out = node.outputs[0]
            count = len(np.unique(liveness.trace.flows[out].ids[liveness.live[out]]))
            reasons[f"tied at {node.op_type} {node.name} with {count} live channels"] += 1
        elif marks.carried[units[index]]:
            reasons["non-zero constant under zero padding"] += 1
        else:
            reasons["read by another layer"] += 1
    return reasons
