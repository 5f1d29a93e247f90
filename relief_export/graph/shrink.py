"""Exact removal of disconnected neurons: analyse, decide, rewrite, until nothing changes.

What was removed, layer by layer, and why every zero row and column that stays had to stay.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from relief_export.errors import UnsupportedModelError
from relief_export.graph.analysis import Liveness, analyse
from relief_export.graph.initializers import drop_unused
from relief_export.graph.prepare import file_size, restore_interface, simplify
from relief_export.graph.rewrite import mark_shuffles, narrow_layers, replace_shuffle, substitute_constants
from relief_export.graph.rules.base import PINNED, LayerFacts, NodeContext
from relief_export.graph.rules.linear import Linear, LinearFacts
from relief_export.graph.rules.recurrent import Cell
from relief_export.printing import Prints, TextTable, counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from relief_export.graph.analysis import Liveness
    from relief_export.graph.rewrite import RemovalPlan
    from relief_export.graph.rules.base import ChannelFacts, Tie


@dataclass(frozen=True)
class ShrinkResult(Prints):
    """What was removed and why the rest had to stay.

    Attributes:
        model: The smaller model, or an unchanged copy where ``modified`` is False.
        modified: Whether anything was removed.
        removed: One row a linear layer that lost channels.
        stayed: Zero rows and columns that had to stay, by layer and reason.
        unknown: Operators without a rule, and how often they occur; what they touch stays.
        opaque: Operators declared to read or mix all channels, and how often they occur.
    """

    model: ir.Model = field(repr=False)
    modified: bool
    removed: tuple[LayerCut, ...]
    stayed: tuple[StayingChannels, ...]
    unknown: dict[str, int]
    opaque: dict[str, int]

    def table(self) -> TextTable:
        """Return what each layer lost; the title counts what had to stay, and ``stayed`` says why."""
        sides = ("outputs", "inputs", "weights")
        rows = [
            (row.layer, *(f"{getattr(row, f'{side}_before'):,} -> {getattr(row, f'{side}_after'):,}" for side in sides))
            for row in self.removed
        ]
        lost = sum(row.weights_before - row.weights_after for row in self.removed)
        stay = sum(row.count for row in self.stayed)
        title = f"{counted(lost, 'weight')} removed from {counted(len(rows), 'layer')}, "
        title += f"{stay:,} dead inputs and outputs stay"
        return TextTable(title, ("layer", *sides), rows)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model as plain data."""
        return {
            "modified": self.modified,
            "removed": [asdict(row) for row in self.removed],
            "stayed": [asdict(row) for row in self.stayed],
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
        plan = liveness.decide_until_stable()
        if not (_carry_out(work, liveness, plan) or replaced):
            break
        modified = True
    stayed = explain(liveness, plan)
    narrowed = narrow_layers(work.graph, liveness)
    modified = modified or narrowed > 0
    after = measure(analyse(work) if narrowed else liveness) if modified else {}
    restore_interface(work, model)
    # A converted model cannot be held against the original: an older opset says some things in fewer bytes.
    source = model if model.opset_imports.get("") == work.opset_imports.get("") else base
    # Bytes never grow, and in a tiny model the index lists of gathers can outweigh what the layers lose.
    if not modified or file_size(work) > min(file_size(source), file_size(base)):
        return ShrinkResult(model.clone(), False, (), stayed, dict(liveness.unknown), dict(liveness.opaque))
    removed = tuple(LayerCut.between(name, size, after.get(name)) for name, size in before.items())
    removed = tuple(row for row in removed if row.changed)
    return ShrinkResult(work, True, removed, stayed, dict(liveness.unknown), dict(liveness.opaque))


def _refuse(liveness: Liveness, *, strict: bool) -> None:
    if strict and liveness.unknown:
        names = ", ".join(f"{name} ({count})" for name, count in sorted(liveness.unknown.items()))
        raise UnsupportedModelError(f"no rule for {names}: leave out --strict to keep whole what they touch")
    for ctx, rule in liveness.contexts:
        if rule.finite_operands:
            for index, value in enumerate(ctx.node.inputs):
                array = ctx.array(index)
                if array is not None and value is not None and not np.isfinite(array).all():
                    raise UnsupportedModelError(f"tensor {value.name} of {ctx.label} holds NaN or Inf: repair it first")


def _carry_out(model: ir.Model, liveness: Liveness, plan: RemovalPlan) -> bool:
    """Apply the decision to the graph; return whether anything changed."""
    facts_of = liveness.walk.facts_of
    if all(plan.stays(v).all() for v in facts_of):
        return False
    plan.edit(model.graph)
    for value in facts_of:
        lists = plan.kept(value) if not plan.gone(value) else {}
        if lists and value.shape is not None:
            value.shape = ir.Shape([len(lists[k]) if k in lists else d for k, d in enumerate(value.shape)])
    gone = [ctx.node for ctx, _ in liveness.contexts if all(plan.gone(v) for v in ctx.node.outputs)]
    for ctx, rule in liveness.contexts:
        if ctx.node not in gone and not plan.shuffles(ctx) and not replace_shuffle(ctx, plan):
            rule.rewrite(ctx, plan)
    plan.finish()
    for node in reversed(gone):
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
    common.RemoveUnusedNodesPass()(model)
    _restore_names(model.graph, plan)
    return True


def _restore_names(graph: ir.Graph, plan: RemovalPlan) -> None:
    """Drop initializers that nothing reads and give the cut ones their names back."""
    drop_unused(graph)
    taken = Counter(v.name for v in graph.inputs) + Counter(o.name for node in graph for o in node.outputs)
    for value, name in plan.created:
        if value.name != name and value.uses() and name not in graph.initializers and name not in taken:
            value.name = name


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
class StayingChannels:
    """Zero rows (``side`` "output") or columns ("input") of one layer that stay, for one reason."""

    layer: str
    side: str
    count: int
    reason: str


class _Opened(NodeContext):
    """A node whose constants are seen though a caller may replace them."""

    def array(self, index: int) -> NDArray[np.generic] | None:
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return None if value is None or value.const_value is None else value.const_value.numpy()

    def facts(self, index: int) -> ChannelFacts | None:
        return super().facts(index) if self.array(index) is None else None


def layer_name(ctx: NodeContext) -> str:
    """Name a layer by its weight, as the framework named it, or by its node."""
    value = ctx.node.inputs[1]
    name = None if value is None else ctx.walk.stored(value).name
    return str(name or ctx.label).removesuffix(".weight")


def measure(liveness: Liveness) -> dict[str, LayerSize]:
    """Return the size of every linear or recurrent layer by its name."""
    sizes = {}
    for ctx, _ in liveness.contexts:
        linear, cell = ctx.find(LinearFacts), ctx.find(Cell)
        if linear is not None:
            matrix = linear.matrix
            groups, outs, ins = ctx.recall(LayerFacts).nonzero.shape
            sizes[layer_name(ctx)] = LayerSize(ctx.node.op_type, groups * outs, groups * ins, groups, matrix.size)
        elif cell is not None:
            stored = cell.weight.size + cell.recurrent.size
            sizes[layer_name(ctx)] = LayerSize(ctx.node.op_type, len(cell.zero), len(cell.zero_in), 1, stored)
    return sizes


def explain(liveness: Liveness, plan: RemovalPlan) -> tuple[StayingChannels, ...]:
    """Return the zero rows and columns of a graph from which nothing more can be removed, with the reason of each."""
    reasons = _Reasons(liveness, plan)
    rows: list[StayingChannels] = []
    for ctx, _ in liveness.contexts:
        layer = ctx.find(LayerFacts)
        if layer is None:
            rows += _refused(ctx)
            continue
        needed = liveness.live[ctx.result].reshape(-1) if layer.needed is None else layer.needed
        dead_out = ~needed | ~np.isnan(layer.const_out)
        unread = ~layer.nonzero.any(axis=1).reshape(-1)
        for side, value, zero in (("output", ctx.result, dead_out), ("input", ctx.source, unread)):
            found = reasons.of(ctx, value, zero)
            rows += [StayingChannels(layer_name(ctx), side, n, why) for why, n in sorted(found.items())]
    return tuple(rows)


def _refused(ctx: NodeContext) -> list[StayingChannels]:
    """Return the zero rows and columns of a linear layer whose rule gave up."""
    matrix = ctx.refused.see(_Opened(ctx.node, ctx.walk)) if isinstance(ctx.refused, Linear) else None
    if matrix is None:
        return []
    weight = ctx.node.inputs[1]
    replaceable = weight is not None and weight.is_graph_input()
    why = (
        f"{weight.name} is an input of the graph, which a caller may replace" if replaceable and weight else ctx.reason
    )
    counts = {side: int((~matrix.nonzero().any(axis=axis)).sum()) for side, axis in (("output", 2), ("input", 1))}
    return [StayingChannels(layer_name(ctx), side, count, why) for side, count in counts.items() if count]


def _why_constant(ctx: NodeContext) -> str:
    """Say why a linear layer cannot move a constant input into its bias."""
    border = ctx.recall(LinearFacts).matrix.border
    if not border:
        return f"a constant that the quantised bias of {ctx.label} cannot hold"
    return f"non-zero constant {border} at {ctx.label}"


class _Reasons:
    """Why units stay, looked up by unit."""

    def __init__(self, liveness: Liveness, plan: RemovalPlan) -> None:
        self._liveness = liveness
        self._cut = plan
        self._own: dict[int, str] = {}
        """Unit -> why it must stay whatever else does."""
        for ids, reason in reversed([*liveness.walk.pins, *liveness.must_stay]):  # the first reason is the one to give
            self._own.update(dict.fromkeys(ids[ids != PINNED].tolist(), reason))
        self._tied: dict[int, Tie] = {}
        for tie in liveness.walk.ties:
            for label in np.unique(liveness.labels[tie.left]):
                self._tied.setdefault(int(label), tie)
        live = np.zeros(liveness.walk.count, np.bool_)
        for value, facts in liveness.walk.facts_of.items():
            live[facts.ids[liveness.live[value]]] = True
        self._live = live
        self._live_in = np.bincount(liveness.labels[live], minlength=int(liveness.labels.max()) + 1)
        self._readers = np.full(liveness.walk.count, -1)
        self._kept_constants = np.full(liveness.walk.count, -1)
        self._lost = np.full(liveness.walk.count, -1)
        self._find_readers()

    def _find_readers(self) -> None:
        """Note the last node in the graph's order that needs each unit: what is before it only hands the unit on."""
        facts_of, live = self._liveness.walk.facts_of, self._liveness.live
        for number, (ctx, rule) in enumerate(self._liveness.contexts):
            needed = [live[v] for v in ctx.node.outputs]
            if not any(n.any() for n in needed):
                continue
            for operand, need in zip(ctx.node.inputs, rule.backward(ctx, needed), strict=False):
                if need is not None and operand is not None and operand in facts_of:
                    self._readers[facts_of[operand].ids[need]] = number
                    known = facts_of[operand].ids[~np.isnan(facts_of[operand].const)]
                    for facts in (facts_of[v] for v in ctx.node.outputs):
                        lost = np.intersect1d(known, facts.ids[np.isnan(facts.const)])
                        self._lost[lost[self._lost[lost] < 0]] = number
            if ctx.find(LinearFacts) is not None:
                facts, needed_here = facts_of[ctx.source], rule.backward(ctx, needed)[0]
                asked = [m for m in (needed_here, ctx.deferred) if m is not None]
                held = np.logical_or.reduce(asked) & live[ctx.source] & ~np.isnan(facts.const)
                self._kept_constants[facts.ids[held]] = number

    def of(self, ctx: NodeContext, value: ir.Value, zero: NDArray[np.bool_]) -> Counter[str]:
        """Count the reasons for which the channels ``zero`` of an input or output of a layer stay."""
        units = np.broadcast_to(self._liveness.walk.facts_of[value].ids.reshape(-1), len(zero))
        # A flattened map has a column for every position of a channel: they stay or go together.
        partly = set(np.unique(units[~zero]).tolist())
        reasons: Counter[str] = Counter()
        for index in np.flatnonzero(zero):
            unit = int(units[index])
            partial = unit in partly and unit not in self._own and unit != PINNED
            reasons["other positions of the channel are read" if partial else self._why(ctx, value, unit)] += 1
        return reasons

    def _why(self, ctx: NodeContext, value: ir.Value, unit: int) -> str:  # noqa: PLR0911 - one return a reason
        if unit == PINNED:
            return self._origin(value)
        if unit in self._own:
            return self._own[unit]
        if self._kept_constants[unit] >= 0:
            return _why_constant(self._liveness.contexts[self._kept_constants[unit]][0])
        label = int(self._liveness.labels[unit])
        tie, lost = self._tied.get(label), self._label(self._lost[unit]) if self._lost[unit] >= 0 else ""
        if self._live[unit] and self._readers[unit] >= 0 and (tie is None or tie.at != lost):
            gone = f"no longer constant behind {lost} and " if lost else ""
            return f"{gone}read by {self._label(self._readers[unit])}"
        required = self._cut.reasons.get(label, "read by another layer")
        if tie is None:
            return required
        if label == self._liveness.labels[PINNED]:
            return f"{tie.reason(ctx.label)} with channels that must stay"
        count = int(self._live_in[label]) - bool(self._live[unit])  # the others
        partners = f" with {count} live channel{'s' * (count > 1)}" if count else f": {required}"
        return tie.reason(ctx.label) + partners

    def _origin(self, value: ir.Value) -> str:
        """Say where the pinned unit in a value comes from: an input before it, or an operator that gave up."""
        facts_of = self._liveness.walk.facts_of
        made_by = {out: ctx for ctx, _ in self._liveness.contexts for out in ctx.node.outputs}
        pending = [value]
        for source in pending:  # it grows while it is read: the nearest origin is the one to name
            if source.is_graph_input():
                return "graph input" if source is value else f"channels of graph input {source.name}"
            if made_by[source].given_up:
                return made_by[source].reason
            before = [v for v in made_by[source].node.inputs if v in facts_of and (facts_of[v].ids == PINNED).any()]
            pending += [v for v in before if v not in pending]
        return f"channels that {made_by[value].label} holds together"  # constants stay whole among other channels

    def _label(self, number: int) -> str:
        return self._liveness.contexts[number][0].label
