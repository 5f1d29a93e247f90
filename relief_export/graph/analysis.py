"""The two analyses and their joint fixed point. This engine knows graphs and rules, and no operator by name.

Forward, once, in topological order: units, ties and constants. Backward: liveness, from the outputs to the inputs.
Constants do not depend on liveness, so one forward walk and one backward sweep are the joint fixed point, but for two
decisions that can only make more elements live, after which the sweep is repeated:

- constants that zero padding forbids to absorb need one representative a tensor;
- absorbing a constant must not cost more parameters (a new bias) than it saves.

Where operators tie units together (a residual addition), a unit stays where any unit tied to it is live.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from relief_export.graph.ops import OPAQUE, UNKNOWN, operator
from relief_export.graph.rewrite import RemovalPlan
from relief_export.graph.rules.base import NodeContext, ParameterUse, Rule, Walk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_DOMAINS = ("", "ai.onnx")
_IRREGULAR = "no regular shape would be left at "


@dataclass
class Liveness:
    """Result of the analyses of one graph.

    Attributes:
        sites: Every node with its rule, in topological order.
        trace: Units, ties, pins and constants.
        live: Activation -> which of its elements some graph output depends on (compact).
        unknown: Operators without a rule -> how often.
        opaque: Operators declared opaque -> how often.
        labels: Unit -> component of units that are tied together.
        outputs: Activations that the graph returns.
        regrets: Units that stay although nothing needs them, and why.
    """

    contexts: list[tuple[NodeContext, Rule]]
    walk: Walk
    unknown: Counter[str]
    opaque: Counter[str]
    live: dict[ir.Value, NDArray[np.bool_]] = field(default_factory=dict)
    labels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    outputs: list[ir.Value] = field(default_factory=list)
    must_stay: list[tuple[NDArray[np.int64], str]] = field(default_factory=list)

    def propagate(self, seeds: dict[ir.Value, NDArray[np.bool_]]) -> None:
        """Work out liveness from the outputs and from the elements in ``seeds``."""
        self.live = {value: np.zeros(facts.ids.shape, np.bool_) for value, facts in self.walk.facts_of.items()}
        for value, flags in seeds.items():
            self.live[value] = flags.copy()
        for value in self.outputs:
            self.live[value] = np.ones_like(self.live[value])
        # Every node comes after all its readers, so that one sweep is enough.
        for ctx, rule in reversed(self.contexts):
            needed = [self.live[v] for v in ctx.node.outputs]
            # A node that nobody needs asks for nothing, and has no constants that wait for a representative either.
            if not any(n.any() for n in needed):
                ctx.deferred = None
                continue
            for operand, need in zip(ctx.node.inputs, rule.backward(ctx, needed), strict=False):
                if need is not None and operand is not None and operand in self.live:
                    self.live[operand] = self.live[operand] | need
            for value in ctx.captured:
                self.live[value] = np.ones_like(self.live[value])

    def decide(self) -> RemovalPlan:
        """Decide which units stay: live or pinned ones, what is tied to them, and what operators cannot do without."""
        # The decision starts afresh after every sweep, as it follows from what is live by then.
        plan = RemovalPlan(self.walk, self.labels, self.live)
        for value, flags in self.live.items():
            plan.keep(self.walk.facts_of[value].ids[flags])
        for ids, reason in self.walk.pins:
            plan.keep(ids, reason)
        news = True
        # What one node keeps may oblige another to keep more. Units are only ever added, so this ends.
        while news:
            news = False
            for ctx, rule in self.contexts:
                for ids, why in self._required(ctx, rule, plan):
                    news = plan.keep(ids, why) or news
        return plan

    def _required(self, ctx: NodeContext, rule: Rule, plan: RemovalPlan) -> Iterator[tuple[NDArray[np.int64], str]]:
        yield from rule.require(ctx, plan)
        stays = any(not plan.gone(v) for v in ctx.node.outputs)
        for value in ctx.node.inputs:
            if value in self.walk.facts_of and stays and plan.gone(value) and not rule.drops_operands:
                yield self.walk.facts_of[value].ids.reshape(-1)[:1], f"the last input of {ctx.label}"
        for value in ctx.node.outputs:
            if not plan.gone(value) and plan.product(value) is None and value not in plan.shuffles(ctx):
                yield _enclosing_block(self.walk.facts_of[value].ids, plan.stays(value)), _IRREGULAR + ctx.label

    def decide_until_stable(self) -> RemovalPlan:
        """Repeat sweep and decision until no representative and no regret is added.

        Returns:
            What stays.
        """
        seeds: dict[ir.Value, NDArray[np.bool_]] = {}
        reasons: dict[int, str] = {}
        while True:
            self.propagate(seeds)
            added = self._representatives(seeds)
            # A representative changes what is live, so the decision waits until there are enough of them.
            if added:
                continue
            plan = self.decide()
            # What made a unit stay at first, before it was seeded for it.
            plan.reasons = reasons = plan.reasons | reasons
            must_stay = [
                (s.node.inputs[k], *why) for s, rule in self.contexts for k, why in rule.must_stay_live(s, plan).items()
            ]
            for value, mask, reason in must_stay:
                if value is not None:
                    _add_seed(seeds, value, mask)
                    self.must_stay.append((self.walk.facts_of[value].ids[mask], reason))
            if not must_stay:
                return plan

    def _representatives(self, seeds: dict[ir.Value, NDArray[np.bool_]]) -> bool:
        wanted: defaultdict[ir.Value, list[NDArray[np.bool_]]] = defaultdict(list)
        for ctx, _ in self.contexts:
            source = ctx.node.inputs[0] if ctx.node.inputs else None
            if ctx.deferred is not None and source is not None:
                wanted[source].append(ctx.deferred)
        added = False
        for value, masks in wanted.items():
            facts, live = self.walk.facts_of[value], self.live[value]
            lost = np.logical_or.reduce(masks) & ~live
            size = np.where(np.isnan(facts.const), 0, np.abs(facts.const))
            largest = np.max(size, where=lost, initial=0)
            # A small representative would need weights that overflow.
            if lost.any() and not (live & (size > 0) & (size >= largest / 16)).any():
                first = np.zeros(lost.size, np.bool_)
                # The others are divided by it, so that with the largest no kernel grows.
                first[int(np.argmax(np.where(lost, size, -1)))] = True
                _add_seed(seeds, value, first.reshape(lost.shape))
                added = True
        return added


def analyse(model: ir.Model, *, only_zero: bool = False) -> Liveness:
    """Walk forward over a simplified model: units, ties, pins and constants of every activation.

    Args:
        model: It is not changed.
        only_zero: Forget every constant but zero.
    """
    walk, contexts = Walk(), []
    unknown: Counter[str] = Counter()
    opaque: Counter[str] = Counter()
    for value in model.graph.inputs:
        walk.facts_of[value] = walk.unknown_facts(value)
    for node in model.graph:
        row = operator(node)
        if row.constant is not None and walk.computes_constant(node, row.constant):
            continue
        rule = row.rule
        if row is UNKNOWN:
            unknown[node.op_type if node.domain in _DOMAINS else f"{node.domain}.{node.op_type}"] += 1
        elif rule is OPAQUE:
            opaque[node.op_type] += 1
        ctx = NodeContext(node, walk)
        _pin_captured(ctx)
        rule = rule.choose(ctx)
        found = rule.forward(ctx)
        if only_zero:
            found = [replace(facts, const=np.where(facts.const == 0, 0.0, np.nan)) for facts in found]
        walk.facts_of.update(zip(node.outputs, found, strict=True))
        ctx.pin_shared()
        ctx.refused = rule if ctx.given_up else None
        # A rule that has given up has not noted what its other methods recall.
        contexts.append((ctx, UNKNOWN.rule if ctx.given_up else rule))
    outputs = [v for v in model.graph.outputs if v in walk.facts_of]
    for value in outputs:
        walk.pin(walk.facts_of[value].ids, "graph output")
    liveness = Liveness(contexts, walk, unknown, opaque, outputs=outputs)
    liveness.labels = _components(walk)
    return liveness


def parameter_use(model: ir.Model) -> dict[str, ParameterUse]:
    """Tell which entries of each initializer can be set to zero without changing any output.

    Removal absorbs constant channels into biases. Zeroing a connection absorbs nothing, so here a channel counts as
    constant only where it is zero: what reads the constant of a lonely bias matters.

    Args:
        model: A simplified model whose masked entries are zero; it is not changed.

    Returns:
        Initializer name -> use, for parameters of operators that have a rule. A parameter that is used twice is dead
        only where every use is. Parameters left out are used whole.
    """
    liveness = analyse(model, only_zero=True)
    liveness.propagate({})
    found: dict[str, ParameterUse] = {}
    uses: Counter[str] = Counter()
    for ctx, rule in liveness.contexts:
        for index, use in rule.use(ctx, [liveness.live[v] for v in ctx.node.outputs]).items():
            operand = ctx.node.inputs[index]
            name = str(operand.name) if operand is not None else ""
            uses[name] += 1
            old = found.get(name)
            found[name] = use if old is None else ParameterUse(old.dead & use.dead, old.constant & use.constant)
    known = model.graph.initializers
    # Where a use has no rule, nothing is known of the parameter.
    return {name: use for name, use in found.items() if name in known and uses[name] == len(known[name].uses())}


def _pin_captured(ctx: NodeContext) -> None:
    """Keep whole what a subgraph reads from outside."""
    for attribute in ctx.node.attributes.values():
        if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        graphs = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs()
        for graph in graphs:
            for value in {v for node in graph.all_nodes() for v in node.inputs if v is not None}:
                if value in ctx.walk.facts_of:
                    ctx.captured.append(value)
                    ctx.pin(ctx.walk.facts_of[value].ids, f"read inside {ctx.label}")
                array = ctx.walk.constant(value)
                if array is None:
                    continue
                for axis in range(array.ndim):
                    whole = np.zeros(array.shape[axis], np.int64)
                    for tie in ctx.walk.use_axis(value, axis, whole, ctx.label):
                        ctx.pin(tie.left, f"{tie.shared} is read inside {ctx.label}")


def _components(walk: Walk) -> NDArray[np.int64]:
    if not walk.ties:
        return np.arange(walk.count)
    # In the integers that SciPy takes, or it makes copies: an unrolled recurrent layer has more ties than weights.
    left, right = (
        np.concatenate([side.reshape(-1) for side in sides], dtype=np.int32, casting="same_kind")
        for sides in ([tie.left for tie in walk.ties], [tie.right for tie in walk.ties])
    )
    # There are few ties for each unit, and SciPy joins them without a loop over units in Python.
    graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(walk.count, walk.count))
    labels: NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(np.int64)
    return labels


def _enclosing_block(ids: NDArray[np.int64], stays: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the units of the smallest block of positions that holds all that stays, as a tensor must be one."""
    for axis in range(ids.ndim):
        ids = np.compress(stays.any(axis=tuple(k for k in range(ids.ndim) if k != axis)), ids, axis)
    return ids.reshape(-1)


def _add_seed(seeds: dict[ir.Value, NDArray[np.bool_]], value: ir.Value | None, mask: NDArray[np.bool_]) -> None:
    if value is not None:
        seeds[value] = seeds[value] | mask if value in seeds else mask
