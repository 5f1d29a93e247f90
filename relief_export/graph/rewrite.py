"""The removal plan and its execution: what stays and goes, and the edits of the graph that carry it out.

What stays and what goes, and the edits that rules make to carry it out.

Whole tensors that are constant: the branch that computes one is replaced by its value.

Narrower layers between tensors that must stay wide: gather inputs that are read, place outputs that are not zero.

On the shared tensor of residual additions the union of all live channels stays, and a network's input stays whole. A
layer that reads only some of these channels gets a Gather in front; one whose output is partly zero gets its live rows
placed by a Pad with one zero channel and a Gather behind. Both are exact. They are applied where they save more bytes
than their indices and nodes cost, and at least ``_COPY`` multiply-accumulates for each element that is copied.

Channel shuffles: reshape, transpose, reshape that together only permute channels.

Inside, a unit varies along two axes, and what is left of it is in general no block. So the chain is seen as one
permutation; where something is cut it becomes a Gather with the permutation of what is left, else it stays as it is.
Which permutation it is, and that nothing else moves, is seen by sending the positions along each axis through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from relief_export.graph.channels import LayoutError, axis_indices, constant_axes, drop_axes, varying
from relief_export.graph.initializers import add_initializer, constant_array, drop_unused, free_name
from relief_export.graph.ops import operator
from relief_export.graph.rules.base import PINNED, LayerFacts, NodeContext, Walk, static_shape
from relief_export.graph.rules.elementwise import Elementwise
from relief_export.graph.rules.linear import Linear, LinearFacts
from relief_export.graph.rules.moves import MovesElements
from relief_export.graph.rules.norms import BatchNorm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from relief_export.graph.analysis import Liveness
    from relief_export.graph.rules.base import NodeContext, Rule


Lists = dict[int, "NDArray[np.int64]"]


@dataclass(frozen=True)
class InsideShuffle:
    """Outputs of a node that lie inside a channel shuffle."""

    values: tuple[ir.Value, ...]


@dataclass(frozen=True)
class Shuffle:
    """A channel shuffle that ends at a node: channel ``k`` of its result is channel ``order[k]`` of ``source``."""

    source: ir.Value
    axis: int
    order: NDArray[np.int64]


class RemovalPlan:
    """The decision by unit, asked by value; then the editor of the graph.

    Args:
        trace: Units of every activation.
        labels: Unit -> component of units that are tied together.
        live: Liveness of every activation.
    """

    def __init__(self, walk: Walk, labels: NDArray[np.int64], live: Mapping[ir.Value, NDArray[np.bool_]]) -> None:
        self._walk = walk
        self._labels = labels
        self._live = live
        self._kept = np.zeros(int(labels.max()) + 1, np.bool_)
        self._kept[labels[PINNED]] = True
        self._products: dict[ir.Value, Lists | None] = {}
        self._masks: dict[ir.Value, NDArray[np.bool_]] = {}
        self._new: dict[tuple[str, tuple[tuple[int, bytes], ...]], ir.Value] = {}
        self._cut: set[ir.Value] = set()
        self._operands: list[tuple[ir.Node, int, ir.Value]] = []
        """New operands of nodes that compute constants; until the end these show the numbers that were analysed."""
        self._shapes: dict[ir.Value, ir.Shape] = {}
        self._graph: ir.Graph | None = None
        self._pending: list[tuple[ir.Node, ir.Node, list[ir.Value]]] = []
        self.created: list[tuple[ir.Value, str]] = []
        self.reasons: dict[int, str] = {PINNED: "pinned"}

    def keep(self, ids: NDArray[np.int64], reason: str = "") -> bool:
        """Keep units and all that is tied to them; return whether that is news."""
        labels = np.unique(self._labels[ids])
        if reason:
            for label in labels:
                self.reasons.setdefault(int(label), reason)
        news = not self._kept[labels].all()
        if news:
            self._kept[labels] = True
            # Both follow from what is kept, so they are stale as soon as more is.
            self._products.clear()
            self._masks.clear()
        return news

    def reason(self, ids: NDArray[np.int64]) -> str:
        """Return why an operator could not do without the first of some units for which that is known, or nothing."""
        return next((self.reasons[k] for k in self._labels[ids].tolist() if k in self.reasons), "")

    def live(self, value: ir.Value | None) -> NDArray[np.bool_]:
        """Return which elements of a value must keep their numbers (compact)."""
        assert value is not None  # noqa: S101 - rules ask for operands that they checked
        return self._live[value]

    def kept_ids(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which units stay."""
        return np.asarray(self._kept[self._labels[ids]])

    def stays(self, value: ir.Value) -> NDArray[np.bool_]:
        """Return which elements of a value stay (compact)."""
        if value not in self._masks:
            self._masks[value] = self.kept_ids(self._walk.facts_of[value].ids)
        return self._masks[value]

    def mask(self, value: ir.Value | None, channels: int) -> NDArray[np.bool_]:
        """Return which of the channels of a value with one unit axis stay."""
        assert value is not None  # noqa: S101
        return np.broadcast_to(self.stays(value).reshape(-1), channels)

    def gone(self, value: ir.Value) -> bool:
        """Tell whether nothing is left of a value."""
        return not self.stays(value).any()

    def product(self, value: ir.Value) -> Lists | None:
        """Return axis -> positions that stay, or None where what stays is no block."""
        if value not in self._products:
            self._products[value] = axis_indices(self.stays(value))
        return self._products[value]

    def kept(self, value: ir.Value) -> Lists:
        """Return axis -> positions that stay, for the axes of a value along which something goes."""
        lists = self.product(value) or {}
        shape = self._walk.facts_of[value].ids.shape
        return {axis: keep for axis, keep in lists.items() if len(keep) < shape[axis]}

    def places(self, value: ir.Value, axis: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the given positions along a cut axis are found afterwards, those that went left out."""
        stays = self.stays(value)
        line = np.asarray(stays.any(axis=tuple(k for k in range(stays.ndim) if k != axis)))
        return (np.cumsum(line) - 1)[positions[line[positions]]]

    def shuffles(self, ctx: NodeContext) -> Sequence[ir.Value]:
        """Return the outputs of a node that lie inside a channel shuffle, which is replaced as a whole."""
        inside = ctx.find(InsideShuffle)
        return inside.values if inside is not None else ()

    # Edits ------------------------------------------------------------------------------------------------------------

    def edit(self, graph: ir.Graph) -> None:
        """Name the graph that the edits below change."""
        self._graph = graph

    def constant_value(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        """Store a new constant."""
        assert self._graph is not None  # noqa: S101
        value = add_initializer(self._graph, name, array)
        self.created.append((value, name))
        return value

    def replace(self, node: ir.Node, index: int, array: NDArray[np.generic]) -> None:
        """Give a node another constant operand, unless it already has that one."""
        old = node.inputs[index]
        assert old is not None  # noqa: S101
        before = ir.convenience.get_const_tensor(old)
        if before is not None and np.array_equal(before.numpy(), array) and before.numpy().dtype == array.dtype:
            return
        # Small arrays are shared by their content. A large one is not copied into a key: its node stands for it.
        key = (str(old.name), ((-1, array.tobytes() if array.nbytes < 65536 else f"{id(node)}.{index}".encode()),))
        if key not in self._new:
            self._new[key] = self.constant_value(str(old.name), array)
        node.replace_input_with(index, self._new[key])

    def constant(self, node: ir.Node, index: int, keep: Mapping[int, NDArray[np.int64]]) -> None:
        """Cut a constant operand along axes; operands that are shared are cut once."""
        old = node.inputs[index]
        if old is None or not keep:
            return
        source = old.producer()
        if old in self._walk.computed and source is not None:
            self._computed(source, keep)
            return
        tensor = ir.convenience.get_const_tensor(old)
        assert tensor is not None  # noqa: S101
        array = tensor.numpy()
        lists = {axis: list_ for axis, list_ in keep.items() if len(list_) < array.shape[axis]}
        key = (str(old.name), tuple((a, k.tobytes()) for a, k in sorted(lists.items())))
        if not lists:
            return
        if key not in self._new:
            for axis, positions in lists.items():
                array = array.take(positions, axis)
            self._new[key] = self.constant_value(str(old.name), array)
        # A computed constant may still be evaluated by rules that come later, so its operands wait until the end.
        if node.outputs[0] in self._walk.computed:
            self._operands.append((node, index, self._new[key]))
        else:
            node.replace_input_with(index, self._new[key])

    def _computed(self, node: ir.Node, keep: Mapping[int, NDArray[np.int64]]) -> None:
        """Cut a constant that nodes compute where it is stored; every use of it cuts it in the same way."""
        value = node.outputs[0]
        # Several readers lead to the same stored constant; a second cut would use positions that no longer hold.
        if value in self._cut:
            return
        self._cut.add(value)
        present = [index for index, operand in enumerate(node.inputs) if operand is not None]
        for index, axes in zip(present, self._walk.computed[value][1], strict=True):
            self.constant(node, index, {axes[axis]: positions for axis, positions in keep.items() if axis in axes})
        shape = value.shape or ()
        self._shapes[value] = ir.Shape([len(keep[k]) if k in keep else n for k, n in enumerate(shape)])
        # The lengths that a Reshape states are those before the cut.
        if node.op_type == "Reshape":
            target = np.array([len(keep[k]) if k in keep else n for k, n in enumerate(shape)], np.int64)
            self._operands.append((node, 1, self.constant_value(f"{value.name}_shape", target)))

    def bias(self, ctx: NodeContext, bias: NDArray[np.generic], has_bias: bool) -> None:
        """Give a linear node another bias: as its third operand, or added behind it where it has none."""
        node = ctx.node
        weight = node.inputs[1]
        stored = node.name if weight is None else self._walk.stored(weight).name
        name = f"{str(stored).removesuffix('.weight')}.bias"
        key = (f"{name} =", ((-1, bias.tobytes()),))  # nodes that share their weight mostly have the same
        value = self._new[key] = self._new.get(key) or self.constant_value(name, bias)
        if has_bias:
            node.resize_inputs(3)
            node.replace_input_with(2, value)
            return
        out = node.outputs[0]
        self._pending.append((node, ir.node("Add", [out, value], name=""), [out]))

    def attribute(self, node: ir.Node, name: str, number: int) -> None:
        """Set an integer attribute."""
        node.attributes[name] = ir.AttrInt64(name, number)

    def substitute(self, old: ir.Node, new: ir.Node, values: Sequence[ir.Value] | None = None) -> None:
        """Put ``new`` in the place of ``old`` when the edits are finished; its outputs take over from ``values``."""
        self._pending.append((old, new, list(old.outputs if values is None else values)))

    def finish(self) -> None:
        """Carry out the substitutions, last, so that every rule sees the graph that was analysed."""
        assert self._graph is not None  # noqa: S101
        for node, index, operand in self._operands:
            node.replace_input_with(index, operand)
        for value, shape in self._shapes.items():
            value.shape = shape
        for old, new, values in self._pending:
            for value, fresh in zip(values, new.outputs, strict=True):
                fresh.name, fresh.type, fresh.shape = value.name, value.type, value.shape
                value.replace_all_uses_with(fresh, replace_graph_outputs=True)
                # The new value takes over the name, which callers know, so the old one needs another.
                value.name = free_name(self._graph, f"{value.name}_before")
                fresh.meta.update(value.meta)
                for index, read in enumerate(new.inputs):
                    if read is fresh:  # a node added behind ``old`` reads what it replaces
                        new.replace_input_with(index, value)
            self._graph.insert_after(old, new)
            if new.op_type == "Add":
                self._merge_addition(new)

    def _merge_addition(self, node: ir.Node) -> None:
        """Join a new bias with the constant that the following node adds, so that no node is added."""
        assert self._graph is not None  # noqa: S101
        uses = list(node.outputs[0].uses())
        following = uses[0].node if len(uses) == 1 else node
        # Another reader of this value, or the caller, would miss the bias if it moved behind.
        if following is node or following.op_type != "Add" or node.outputs[0].is_graph_output():
            return
        other = following.inputs[1 - uses[0].idx]
        second, first = constant_array(other), constant_array(node.inputs[1])
        if other is None or first is None or second is None or second.shape != first.shape:
            return
        total = self.constant_value(str(other.name), np.add(first, second))
        following.replace_input_with(1 - uses[0].idx, total)
        following.replace_input_with(uses[0].idx, node.inputs[0])
        node.replace_input_with(0, None)
        self._graph.remove(node)


def substitute_constants(model: ir.Model, liveness: Liveness) -> bool:
    """Give elementwise nodes the value of an always-constant operand, and constant outputs their value, in place.

    Only where the branch behind it holds at least as many parameters as the value that replaces it.
    """
    rules = {ctx.node: rule for ctx, rule in liveness.contexts}
    facts_of = liveness.walk.facts_of
    changed = False
    for ctx, rule in liveness.contexts:
        if not isinstance(rule, Elementwise) or len(ctx.activations()) < 2:
            continue
        for index, value in enumerate(ctx.node.inputs):
            known = value is not None and value in facts_of and not np.isnan(facts_of[value].const).any()
            if known and value is not None and _pays(value, rules) and _others_cover(ctx, index):
                _replace_operand(model.graph, ctx, index, facts_of[value].const)
                changed = True
                break
    for index, value in enumerate(model.graph.outputs):
        if value in facts_of and not np.isnan(facts_of[value].const).any() and _pays(value, rules, output=True):
            changed = _replace_output(model.graph, index, facts_of[value].const) or changed
    if changed:
        common.RemoveUnusedNodesPass()(model)
        drop_unused(model.graph)
    return changed


def _pays(value: ir.Value, rules: dict[ir.Node, Rule], *, output: bool = False) -> bool:
    """Tell whether parameters that only this value needs go with it."""
    if value.is_graph_output() and not output:
        return False
    while True:
        node = value.producer()
        # What another node reads as well does not go. Being a graph output is no use by a node.
        if node is None or len(value.uses()) > (0 if output else 1) or node not in rules:
            return False
        if isinstance(rules[node], Linear | BatchNorm):
            return True
        source = node.inputs[0]
        if source is None or sum(v is not None and v.producer() is not None for v in node.inputs) != 1:
            return False
        value, output = source, False


def _others_cover(ctx: NodeContext, index: int) -> bool:
    """Tell whether the other activations alone give the output its shape."""
    shape = ctx.result.shape  # symbols included: one batch may be broadcast over another
    others = [v for k, v in enumerate(ctx.node.inputs) if k != index and v is not None and ctx.facts(k) is not None]
    return shape is not None and len(shape) > 0 and any(v.shape == shape for v in others)


def _array(value: ir.Value, const: NDArray[np.float64]) -> NDArray[np.generic]:
    """Return a constant in the value's type, without leading axes of length 1 and as one number where it is one."""
    # Broadcasting restores what is left out here, and the fewer numbers are stored the better.
    if (const == const.reshape(-1)[0]).all():
        const = const.reshape(-1)[:1].reshape(())
    while const.ndim and const.shape[0] == 1:
        const = const[0]
    dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    return const.astype(dtype)


def _replace_operand(graph: ir.Graph, ctx: NodeContext, index: int, const: NDArray[np.float64]) -> None:
    node, value = ctx.node, ctx.node.inputs[index]
    assert value is not None  # noqa: S101 - checked by the caller
    # An operand that changes nothing, as a zero in a sum, makes the whole node superfluous.
    if len(node.inputs) == 2 and (const == operator(node).neutral.get(index, np.nan)).all():
        other = node.inputs[1 - index]
        if not node.outputs[0].is_graph_output() and other is not None:
            node.outputs[0].replace_all_uses_with(other)
            return
    node.replace_input_with(index, add_initializer(graph, f"{value.name}_value", _array(value, const)))


def _replace_output(graph: ir.Graph, index: int, const: NDArray[np.float64]) -> bool:
    """Expand a constant output to its shape, which may need the batch size; refuse shapes that depend on more."""
    value = graph.outputs[index]
    shape = static_shape(value)
    if not shape:
        return False
    target = add_initializer(graph, f"{value.name}_shape", np.array(shape, np.int64)) if None not in shape else None
    if target is None and (target := _target(graph, value)) is None:
        return False
    full = add_initializer(graph, f"{value.name}_value", _array(value, const))
    result = ir.node("Expand", [full, target], name="")
    name = value.name
    value.name = free_name(graph, f"{name}_computed")
    out = result.outputs[0]
    out.name, out.shape, out.type = name, value.shape, value.type
    graph.append(result)
    graph.outputs[index] = out
    return True


def _target(graph: ir.Graph, value: ir.Value) -> ir.Value | None:
    """Compute a shape of which only the first length is unknown and the same as that of an input."""
    shape, batch = static_shape(value), next((v for v in graph.inputs if len(static_shape(v)) > 0), None)
    if None in shape[1:] or batch is None or value.shape is None or batch.shape is None:
        return None
    # Two lengths without a name compare equal, though nothing says that they are.
    if value.shape[0] != batch.shape[0] or value.shape[0] == ir.SymbolicDim(None):
        return None
    tail = add_initializer(graph, f"{value.name}_tail", np.array(shape[1:], np.int64))
    bounds = [add_initializer(graph, f"{value.name}_{k}", np.array([n], np.int64)) for k, n in (("from", 0), ("to", 1))]
    whole = ir.node("Shape", [batch], name="")
    first = ir.node("Slice", [whole.outputs[0], *bounds], name="")
    target = ir.node("Concat", [first.outputs[0], tail], attributes={"axis": 0}, name="")
    for part, suffix in ((whole, "shape"), (first, "batch"), (target, "target")):
        part.outputs[0].name = free_name(graph, f"{value.name}_{suffix}")
    graph.extend([whole, first, target])
    return target.outputs[0]


_NODE = 100  # bytes of a node with its names in the file
_COPY = 4


def narrow_layers(graph: ir.Graph, liveness: Liveness) -> int:
    """Narrow every layer of an analysed graph where it pays, in place; return how many."""
    gathers: dict[tuple[ir.Value, bytes], ir.Value] = {}
    count = 0
    for ctx, _ in liveness.contexts:
        linear = ctx.find(LinearFacts)
        # A shared weight or bias cannot be narrowed for one of its readers alone.
        if linear is not None and linear.matrix.groups == 1 and ctx.exclusive(1) and ctx.exclusive(2):
            count += _narrow_input(graph, ctx, gathers)
            count += _narrow_output(graph, ctx)
    return count


def _narrow_input(graph: ir.Graph, ctx: NodeContext, gathers: dict[tuple[ir.Value, bytes], ir.Value]) -> bool:
    matrix = ctx.recall(LinearFacts).matrix
    used = np.flatnonzero(ctx.recall(LayerFacts).nonzero[0].any(axis=0) & (ctx.recall(LinearFacts).const_in != 0))
    outs, ins = ctx.recall(LayerFacts).nonzero.shape[1:]
    taps = matrix.size // (outs * ins)
    lost, source = ins - len(used), ctx.source
    key = (source, used.tobytes())
    # Layers that read the same channels share one Gather, which only the first of them pays for.
    price = 0 if key in gathers else 8 * len(used) + _NODE
    if not len(used) or source is None or lost * outs * taps * matrix.weight.itemsize <= price:
        return False
    if lost * outs * taps < _COPY * len(used):
        return False
    if key not in gathers:
        indices = add_initializer(graph, f"{source.name}_used", used)
        node = ir.node(
            "Gather", [source, indices], attributes={"axis": matrix.data_axis}, name=f"{indices.name}_gather"
        )
        graph.insert_before(ctx.node, node)
        gathers[key] = _describe(node, free_name(graph, f"{indices.name}_values"), source, matrix.data_axis, len(used))
    ctx.node.replace_input_with(0, gathers[key])
    _replace(graph, ctx.node, 1, matrix.weight.take(used, matrix.in_axis))
    return True


def _narrow_output(graph: ir.Graph, ctx: NodeContext) -> bool:
    weight = ctx.array(1)
    matrix = ctx.recall(LinearFacts).matrix
    out, outs = ctx.result, ctx.recall(LayerFacts).nonzero.shape[1]
    bias = ctx.array(2)
    if weight is None or out.is_graph_output() or out.shape is None or (bias is not None and bias.size != outs):
        return False
    zero = ~(weight != 0).any(axis=tuple(k for k in range(weight.ndim) if k != matrix.out_axis))
    # A row of zeros with a bias is constant but not zero, and the Pad gives only zeros.
    zero &= True if bias is None else bias.reshape(-1) == 0
    row = weight.size // outs
    lost, rank = int(zero.sum()), len(out.shape)
    price = 8 * (outs + 2 * rank) + 2 * _NODE
    if lost == outs or lost * row * weight.itemsize <= price or lost * row < 2 * _COPY * outs:
        return False
    kept = np.flatnonzero(~zero)
    # All rows that went are read from the one zero channel that the Pad appends.
    order = np.full(outs, len(kept), np.int64)
    order[kept] = np.arange(len(kept))
    pads = np.zeros(2 * rank, np.int64)
    pads[rank + matrix.output_axis] = 1
    # Listed before the Pad becomes a user too, which must go on reading the narrow output.
    users = list(out.uses())
    pad = ir.node("Pad", [out, add_initializer(graph, f"{out.name}_pads", pads)], name=f"{out.name}_pad")
    padded = _describe(pad, free_name(graph, f"{out.name}_padded"), out, matrix.output_axis, len(kept) + 1)
    indices = add_initializer(graph, f"{out.name}_order", order)
    gather = ir.node("Gather", [padded, indices], attributes={"axis": matrix.output_axis}, name=f"{out.name}_place")
    placed = _describe(gather, free_name(graph, f"{out.name}_placed"), out, matrix.output_axis, outs)
    for use in users:
        use.node.replace_input_with(use.idx, placed)
    graph.insert_after(ctx.node, [pad, gather])
    out.shape = ir.Shape([len(kept) if k == matrix.output_axis else d for k, d in enumerate(out.shape)])
    _replace(graph, ctx.node, 1, weight.take(kept, matrix.out_axis))
    if bias is not None:
        _replace(graph, ctx.node, 2, bias.take(kept, bias.ndim - 1))
    return True


def _describe(node: ir.Node, name: str, like: ir.Value, axis: int, length: int) -> ir.Value:
    value = node.outputs[0]
    value.name, value.type = name, like.type
    if like.shape is not None:
        value.shape = ir.Shape([length if k == axis else d for k, d in enumerate(like.shape)])
    return value


def _replace(graph: ir.Graph, node: ir.Node, index: int, array: NDArray[np.generic]) -> None:
    """Put ``array`` in the place of an initializer that only this node uses, under its name."""
    old = node.inputs[index]
    assert old is not None  # noqa: S101 - checked by the caller
    assert old.name is not None  # noqa: S101
    # The old value must be gone before the new one can take its name.
    node.replace_input_with(index, None)
    del graph.initializers[old.name]
    node.replace_input_with(index, add_initializer(graph, old.name, array))


def mark_shuffles(liveness: Liveness) -> None:
    """Mark the nodes of every chain of views between two tensors of the same shape with one unit axis."""
    contexts = {ctx.node: (ctx, rule) for ctx, rule in liveness.contexts}
    facts_of = liveness.walk.facts_of
    for ctx, rule in liveness.contexts:
        source = ctx.node.inputs[0] if ctx.node.inputs else None
        if source not in facts_of or not _splits(ctx, rule):
            continue
        chain = _chain(ctx, contexts)
        end = chain[-1].node.outputs[0] if chain else None
        if end is None or source is None or end.shape is None or source.shape is None:
            continue
        axes = varying(facts_of[source].ids)
        if axes != varying(facts_of[end].ids) or len(axes) != 1 or list(source.shape)[1:] != list(end.shape)[1:]:
            continue
        order = _order(chain, contexts, axes[0])
        if order is None:
            continue
        for inner in chain[:-1]:
            inner.note(InsideShuffle(tuple(inner.node.outputs)))
        chain[-1].note(Shuffle(source, axes[0], order))


def replace_shuffle(ctx: NodeContext, plan: RemovalPlan) -> bool:
    """Replace the shuffle that ends at this node by a Gather where channels are cut; return whether it was."""
    shuffle = ctx.find(Shuffle)
    if shuffle is None:
        return False
    source, axis, order = shuffle.source, shuffle.axis, shuffle.order
    end = ctx.result
    kept = plan.kept(end)
    if not kept:
        return True  # the chain stays as it is
    indices = plan.constant_value(f"{end.name}_order", plan.places(source, axis, order[kept[axis]]))
    node = ir.node("Gather", [source, indices], attributes={"axis": axis}, name=ctx.node.name)
    plan.substitute(ctx.node, node)
    return True


def _splits(ctx: NodeContext, rule: Rule) -> bool:
    facts_of = ctx.walk.facts_of
    return (
        isinstance(rule, MovesElements)
        and rule.permutes
        and len(varying(facts_of[ctx.result].ids)) > 1
        and len(varying(facts_of[ctx.source].ids)) == 1
    )


def _chain(ctx: NodeContext, contexts: dict[ir.Node, tuple[NodeContext, Rule]]) -> list[NodeContext]:
    """Follow single uses from a splitting view to the one that merges again; empty where there is none."""
    chain = [ctx]
    while len(varying(ctx.walk.facts_of[chain[-1].node.outputs[0]].ids)) > 1:
        value = chain[-1].node.outputs[0]
        users = list(value.uses())
        if len(users) != 1 or value.is_graph_output() or users[0].node not in contexts:
            return []
        following, rule = contexts[users[0].node]
        if not isinstance(rule, MovesElements) or not rule.permutes or users[0].idx != 0:
            return []
        chain.append(following)
    return chain


def _order(
    chain: list[NodeContext], contexts: dict[ir.Node, tuple[NodeContext, Rule]], channel: int
) -> NDArray[np.int64] | None:
    """Return where each channel behind a chain comes from, None where positions along another axis move too."""
    shape = chain[0].walk.facts_of[chain[0].source].shape
    order = None
    for axis, length in enumerate(shape):
        # An axis of unknown length has a single place, as in the compact arrays.
        line = np.arange(length or 1).reshape([-1 if k == axis else 1 for k in range(len(shape))])
        moved = line
        try:
            for ctx in chain:
                rule, facts = contexts[ctx.node][1], ctx.facts(0)
                assert isinstance(rule, MovesElements)  # noqa: S101 - as _chain has it
                assert facts is not None  # noqa: S101
                moved = rule.move(ctx, facts, moved)[0]
        except LayoutError:
            return None
        moved = drop_axes(moved, constant_axes(moved))
        if axis == channel and varying(moved) == (axis,):
            order = moved.reshape(-1)
        elif not np.array_equal(moved, line):
            return None
    return order
