"""What was removed, layer by layer, and why every zero row and column that stays had to stay."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from relief_export.graph.flow import PINNED, Site
from relief_export.graph.linear import Linear

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from relief_export.graph.cutting import Cut
    from relief_export.graph.flow import Flow, Rule
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
        tied: Component of units -> what ties them.
        alive: Component of units -> how many of its units some output depends on.
        pinned: Unit -> why it must stay.
        sites: Node -> what the analysis knows of it.
    """

    tied: dict[int, str]
    alive: NDArray[np.int64]
    pinned: dict[int, str]
    sites: dict[ir.Node, tuple[Site, Rule]]


class _Opened(Site):
    """A node whose constants are seen though a caller may replace them."""

    def array(self, index: int) -> NDArray[np.generic] | None:
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return None if value is None or value.const_value is None else value.const_value.numpy()

    def flow(self, index: int) -> Flow | None:
        return super().flow(index) if self.array(index) is None else None


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
            rows += _refused(site)
            continue
        source, value = site.source, site.result
        dead_out = ~liveness.live[value].reshape(-1) | ~np.isnan(site.cache["const_out"])
        unread = ~site.cache["nonzero"].any(axis=1).reshape(-1)
        for side, at, zero in (("output", value, dead_out), ("input", source, unread)):
            reasons = _reasons(liveness, cut, at, zero, marks)
            rows += [Kept(layer_name(site), side, n, why) for why, n in sorted(reasons.items())]
    return tuple(rows)


def _refused(site: Site) -> list[Kept]:
    """Return the zero rows of a linear layer whose rule gave up."""
    matrix = site.refused.see(_Opened(site.node, site.trace)) if isinstance(site.refused, Linear) else None
    if matrix is None:
        return []
    weight = site.node.inputs[1]
    replaceable = weight is not None and weight.is_graph_input()
    why = (
        f"{weight.name} is an input of the graph, which a caller may replace" if replaceable and weight else site.reason
    )
    count = int((~matrix.nonzero().any(axis=2)).sum())
    return [Kept(layer_name(site), "output", count, why)] if count else []


def _marks(liveness: Liveness) -> _Marks:
    tied: dict[int, str] = {}
    pinned: dict[int, str] = {}
    for left, right, reason in liveness.trace.ties:
        for label in np.unique(liveness.labels[left]):
            tied.setdefault(int(label), reason)
        for unit in (*left[left != PINNED], *right[right != PINNED]):
            pinned.setdefault(int(unit), f"{reason} with channels that must stay")
    for ids, reason in liveness.trace.pins:
        pinned.update(dict.fromkeys(ids[ids != PINNED].tolist(), reason))
    live = np.zeros(liveness.trace.count, np.bool_)
    for value, flow in liveness.trace.flows.items():
        live[flow.ids[liveness.live[value]]] = True
    alive = np.bincount(liveness.labels[live], minlength=int(liveness.labels.max()) + 1)
    return _Marks(tied, alive, pinned, {site.node: (site, rule) for site, rule in liveness.sites})


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
            reasons[f"{marks.tied[label]} with {_channels(int(marks.alive[label]))}"] += 1
        else:
            reasons[_need(liveness, marks, value, label)] += 1
    return reasons


def _channels(count: int) -> str:
    return "1 live channel" if count == 1 else f"{count} live channels"


def _need(liveness: Liveness, marks: _Marks, value: ir.Value, label: int) -> str:
    """Say which node needs the numbers of a channel: the first that mixes it, or that makes something else of it."""
    pending, seen = [value], {value}
    while pending:
        value = pending.pop()
        flow = liveness.trace.flows[value]
        here = liveness.labels[flow.ids] == label
        known = ~np.isnan(flow.const[here])
        for use in value.uses():
            site, rule = marks.sites.get(use.node, (None, None))
            outputs = [liveness.live[v] for v in use.node.outputs] if site is not None else []
            if site is None or rule is None or not any(flags.any() for flags in outputs):
                continue
            need = rule.backward(site, outputs)[use.idx]
            waiting = site.deferred if site.deferred is not None and use.idx == 0 else np.zeros(here.shape, np.bool_)
            if need is None or not (here & (need | waiting)).any():
                continue
            if "matrix" in site.cache:
                border = site.cache["matrix"].border
                return f"non-zero constant {border}" if known.any() and border else f"read by {site.label}"
            behind = [v for v in use.node.outputs if (liveness.labels[liveness.trace.flows[v].ids] == label).any()]
            if not behind:
                return f"read by {site.label}"
            for out in behind:
                after = liveness.trace.flows[out]
                if known.any() and np.isnan(after.const[liveness.labels[after.ids] == label]).all():
                    return f"not known to be constant behind {site.label}"
            news = [v for v in behind if v not in seen]
            pending += news
            seen.update(news)
    return "read by another layer"
