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
    from relief_export.graph.flow import Flow, Tie
    from relief_export.graph.liveness import Liveness
    from relief_export.graph.matrix import Matrix
    from relief_export.graph.recurrent import Cell


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
    name = None if value is None else site.trace.stored(value).name
    return str(name or site.label).removesuffix(".weight")


def measure(liveness: Liveness) -> dict[str, LayerSize]:
    """Return the size of every linear or recurrent layer by its name."""
    sizes = {}
    for site, _ in liveness.sites:
        if "matrix" in site.cache:
            matrix: Matrix = site.cache["matrix"]
            groups, outs, ins = site.cache["nonzero"].shape
            sizes[layer_name(site)] = LayerSize(site.node.op_type, groups * outs, groups * ins, groups, matrix.size)
        elif "cell" in site.cache:
            cell: Cell = site.cache["cell"]
            stored = cell.weight.size + cell.recurrent.size
            sizes[layer_name(site)] = LayerSize(site.node.op_type, len(cell.zero), len(cell.zero_in), 1, stored)
    return sizes


def explain(liveness: Liveness, cut: Cut) -> tuple[Kept, ...]:
    """Return the zero rows and columns of a graph from which nothing more can be removed, with the reason of each."""
    reasons = _Reasons(liveness, cut)
    rows: list[Kept] = []
    for site, _ in liveness.sites:
        if "const_out" not in site.cache:
            rows += _refused(site)
            continue
        needed = site.cache.get("needed", liveness.live[site.result].reshape(-1))
        dead_out = ~needed | ~np.isnan(site.cache["const_out"])
        unread = ~site.cache["nonzero"].any(axis=1).reshape(-1)
        for side, value, zero in (("output", site.result, dead_out), ("input", site.source, unread)):
            found = reasons.of(site, value, zero)
            rows += [Kept(layer_name(site), side, n, why) for why, n in sorted(found.items())]
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


def _why_constant(site: Site) -> str:
    """Say why a linear layer cannot move a constant input into its bias."""
    border = site.cache["matrix"].border
    if not border:
        return f"a constant that the quantised bias of {site.label} cannot hold"
    return f"non-zero constant {border} at {site.label}"


class _Reasons:
    """Why units stay, looked up by unit."""

    def __init__(self, liveness: Liveness, cut: Cut) -> None:
        self._liveness = liveness
        self._cut = cut
        self._own: dict[int, str] = {}
        """Unit -> why it must stay whatever else does."""
        for ids, reason in reversed([*liveness.trace.pins, *liveness.regrets]):  # the first reason is the one to give
            self._own.update(dict.fromkeys(ids[ids != PINNED].tolist(), reason))
        self._tied: dict[int, Tie] = {}
        for tie in liveness.trace.ties:
            for label in np.unique(liveness.labels[tie.left]):
                self._tied.setdefault(int(label), tie)
        live = np.zeros(liveness.trace.count, np.bool_)
        for value, flow in liveness.trace.flows.items():
            live[flow.ids[liveness.live[value]]] = True
        self._live = live
        self._live_in = np.bincount(liveness.labels[live], minlength=int(liveness.labels.max()) + 1)
        self._readers = np.full(liveness.trace.count, -1)
        self._kept_constants = np.full(liveness.trace.count, -1)
        self._lost = np.full(liveness.trace.count, -1)
        self._find_readers()

    def _find_readers(self) -> None:
        """Note the last node in the graph's order that needs each unit: what is before it only hands the unit on."""
        flows, live = self._liveness.trace.flows, self._liveness.live
        for number, (site, rule) in enumerate(self._liveness.sites):
            needed = [live[v] for v in site.node.outputs]
            if not any(n.any() for n in needed):
                continue
            for operand, need in zip(site.node.inputs, rule.backward(site, needed), strict=False):
                if need is not None and operand is not None and operand in flows:
                    self._readers[flows[operand].ids[need]] = number
                    known = flows[operand].ids[~np.isnan(flows[operand].const)]
                    for flow in (flows[v] for v in site.node.outputs):
                        lost = np.intersect1d(known, flow.ids[np.isnan(flow.const)])
                        self._lost[lost[self._lost[lost] < 0]] = number
            if "matrix" in site.cache:
                flow, needed_here = flows[site.source], rule.backward(site, needed)[0]
                asked = [m for m in (needed_here, site.deferred) if m is not None]
                held = np.logical_or.reduce(asked) & live[site.source] & ~np.isnan(flow.const)
                self._kept_constants[flow.ids[held]] = number

    def of(self, site: Site, value: ir.Value, zero: NDArray[np.bool_]) -> Counter[str]:
        """Count the reasons for which the channels ``zero`` of an input or output of a layer stay."""
        units = np.broadcast_to(self._liveness.trace.flows[value].ids.reshape(-1), len(zero))
        # A flattened map has a column for every position of a channel: they stay or go together.
        partly = set(np.unique(units[~zero]).tolist())
        reasons: Counter[str] = Counter()
        for index in np.flatnonzero(zero):
            unit = int(units[index])
            partial = unit in partly and unit not in self._own and unit != PINNED
            reasons["other positions of the channel are read" if partial else self._why(site, value, unit)] += 1
        return reasons

    def _why(self, site: Site, value: ir.Value, unit: int) -> str:  # noqa: PLR0911 - one return a reason
        if unit == PINNED:
            return "graph input" if value.is_graph_input() else "it is read or made by an operator without a rule"
        if unit in self._own:
            return self._own[unit]
        if self._kept_constants[unit] >= 0:
            return _why_constant(self._liveness.sites[self._kept_constants[unit]][0])
        label = int(self._liveness.labels[unit])
        tie, lost = self._tied.get(label), self._label(self._lost[unit]) if self._lost[unit] >= 0 else ""
        if self._live[unit] and self._readers[unit] >= 0 and (tie is None or tie.at != lost):
            gone = f"no longer constant behind {lost} and " if lost else ""
            return f"{gone}read by {self._label(self._readers[unit])}"
        required = self._cut.reasons.get(label, "read by another layer")
        if tie is None:
            return required
        if label == self._liveness.labels[PINNED]:
            return f"{tie.reason(site.label)} with channels that must stay"
        count = int(self._live_in[label]) - bool(self._live[unit])  # the others
        partners = f" with {count} live channel{'s' * (count > 1)}" if count else f": {required}"
        return tie.reason(site.label) + partners

    def _label(self, number: int) -> str:
        return self._liveness.sites[number][0].label
