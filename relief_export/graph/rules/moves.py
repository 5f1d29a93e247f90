"""Operators that only move elements: views, and what joins, divides or picks along an axis.

Rules of operators that only move elements: reshape, transpose, concat, split, slice, pad, gather, resize.

A view acts on the compact arrays of its input as it acts on the tensor, so units and constants travel with the
elements; going back, an input element is needed where any output element of the same unit is.

Rules of views that join, divide or pick along an axis: concat, split, slice, gather, pad.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from relief_export.graph.channels import LayoutError, constant_axes, drop_axes, fit, reshape, undo_broadcast, varying
from relief_export.graph.initializers import constant_array
from relief_export.graph.rules.base import PINNED, ChannelFacts, NodeContext, ParameterUse, Rule

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from relief_export.graph.rewrite import RemovalPlan

Array = np.ndarray[Any, np.dtype[Any]]


def by_units(ctx: NodeContext, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
    """Carry liveness back to all operands by unit, since every output element keeps the unit of its source."""
    # A table by unit serves every view, wherever it puts the elements.
    wanted = np.zeros(ctx.walk.count, np.bool_)
    for value, flags in zip(ctx.node.outputs, live, strict=True):
        ids = ctx.walk.facts_of[value].ids
        wanted[ids[np.broadcast_to(flags, ids.shape)]] = True
    needs: list[NDArray[np.bool_] | None] = []
    for index in range(len(ctx.node.inputs)):
        facts = ctx.facts(index)
        needs.append(None if facts is None else wanted[facts.ids])
    return needs


def _moved_elsewhere(ctx: NodeContext, facts: ChannelFacts, array: Array) -> list[Array]:
    """Stand for the move of a view that describes its outputs itself."""
    raise LayoutError(f"{ctx.label} has no move for rank {facts.rank} of {array.dtype}")


class MovesElements(Rule):
    """A view of its first input, given as a function of a compact array.

    Args:
        move: Maps a compact array of the input to one of each output.
        permutes: The output holds every element of the input once, and ``move`` moves any array as it moves the tensor.
    """

    def __init__(
        self,
        move: Callable[[NodeContext, ChannelFacts, Array], list[Array]] = _moved_elsewhere,
        *,
        permutes: bool = False,
    ) -> None:
        self.move = move
        self.permutes = permutes

    def forward(self, ctx: NodeContext) -> list[ChannelFacts]:
        """Move units and constants; refuse what a compact array cannot express."""
        facts = ctx.facts(0)
        if facts is None or facts.rank == 0:
            return super().forward(ctx)
        try:
            moved = list(zip(self.move(ctx, facts, facts.ids), self.move(ctx, facts, facts.const), strict=True))
        except LayoutError as error:
            return ctx.give_up(f"{error} at {ctx.label}")
        ctx.pin_parameters()
        facts_of = []
        for index, (ids, const) in enumerate(moved):
            # Both arrays must keep one shape, so that an axis goes only where both are flat along it.
            axes = sorted(set(constant_axes(ids)) & set(constant_axes(const)))
            facts_of.append(ChannelFacts(ctx.out_shape(index), drop_axes(ids, axes), drop_axes(const, axes)))
        return facts_of

    def backward(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """An element is needed where any output element of its unit is, and every parameter."""
        return [by_units(ctx, live)[0], *super().backward(ctx, live)[1:]]


class Reshape(MovesElements):
    """Reshape with a constant target; the target follows what is cut."""

    def __init__(self) -> None:
        super().__init__(lambda ctx, facts, array: [_reshape(ctx, facts, array)], permutes=True)

    def rewrite(self, ctx: NodeContext, plan: RemovalPlan) -> None:
        """Replace the lengths of cut axes in the target."""
        value = ctx.result
        if not plan.kept(value):
            return
        target = np.array(ctx.array(1), np.int64)
        before = ctx.walk.facts_of[value].shape
        for axis in plan.kept(ctx.source):  # a length that is copied from a cut axis, but not for it
            if axis < len(target) and target[axis] == 0:
                target[axis] = before[axis] or 0
        for axis, keep in plan.kept(value).items():
            # A -1 follows by itself.
            if target[axis] > 0 or target[axis] == 0 or before[axis] is None:
                target[axis] = len(keep)
        plan.replace(ctx.node, 1, target)


class Flatten(MovesElements):
    """Flatten: a reshape to two axes that needs no target."""

    def __init__(self) -> None:
        super().__init__(lambda ctx, facts, array: [_reshape(ctx, facts, array)], permutes=True)


class Expand(MovesElements):
    """Expand to a constant shape, whose lengths follow what is cut."""

    def __init__(self) -> None:
        super().__init__(lambda ctx, facts, array: [_expand(ctx, facts, array)])

    def rewrite(self, ctx: NodeContext, plan: RemovalPlan) -> None:
        """Replace the lengths of cut axes."""
        value = ctx.result
        if not plan.kept(value):
            return
        target = np.array(ctx.array(1), np.int64)
        offset = ctx.walk.facts_of[value].rank - len(target)
        for axis, keep in plan.kept(value).items():
            # A 1 in the target leaves the length to the input, which is cut already.
            if axis >= offset and target[axis - offset] != 1:
                target[axis - offset] = len(keep)
        plan.replace(ctx.node, 1, target)


class Resize(MovesElements):
    """Resize in space: the unit axes must keep their length."""

    def __init__(self) -> None:
        super().__init__(lambda ctx, facts, array: [_resize(ctx, facts, array)])

    def rewrite(self, ctx: NodeContext, plan: RemovalPlan) -> None:
        """Replace the lengths of cut axes where the target is given as sizes."""
        sizes = ctx.array(3)
        kept = plan.kept(ctx.result)
        if sizes is None or not kept or not sizes.size:
            return
        target = np.array(sizes)
        axes = ctx.node.attributes.get_ints("axes", range(len(target)))
        for place, axis in enumerate(axes):
            if axis in kept:
                target[place] = len(kept[axis])
        plan.replace(ctx.node, 3, target)


class DepthToSpace(MovesElements):
    """DepthToSpace-13: a block of channels becomes one channel of a larger picture; the block lives and dies whole."""

    def forward(self, ctx: NodeContext) -> list[ChannelFacts]:
        """Tie the channels of each block."""
        facts, block = ctx.facts(0), ctx.integer("blocksize", 1) ** 2
        if facts is None or set(varying(facts.ids)) - {1} or (facts.ids.size > 1 and facts.ids.size % block):
            return super(MovesElements, self).forward(ctx)
        if facts.ids.size == 1:
            return [ChannelFacts(ctx.out_shape(), facts.ids, facts.const)]
        ids, const = self._blocks(ctx, facts.ids), self._blocks(ctx, facts.const)
        # The pixels of one output channel come from all channels of a block, so none can go alone.
        ctx.tie(ids, np.broadcast_to(ids[:1], ids.shape))
        shape = (1, ids.shape[1], *(1 for _ in range(facts.rank - 2)))
        # The block's channels alternate within the picture, so that only equal numbers make it flat.
        same = np.where((const == const[:1]).all(axis=0), const[0], np.nan)
        return [ChannelFacts(ctx.out_shape(), ids[0].reshape(shape), same.reshape(shape))]

    def backward(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """A block is needed where its channel is."""
        facts = ctx.walk.facts_of[ctx.source]
        if facts.ids.size == 1:
            return [live[0]]
        need = np.empty(facts.ids.size, np.bool_)
        # The blocks are a view, so this writes into the channels themselves.
        self._blocks(ctx, need)[:] = live[0].reshape(1, -1)
        return [need.reshape(facts.ids.shape)]

    @staticmethod
    def _blocks(ctx: NodeContext, array: Array) -> Array:
        """View an array of the input's channels as (place in the block, channel)."""
        block = ctx.integer("blocksize", 1) ** 2
        if ctx.node.attributes.get_string("mode", "DCR") == "CRD":
            return array.reshape(-1, block).T
        return array.reshape(block, -1)


class SpaceToDepth(MovesElements):
    """SpaceToDepth-13: each place of a block of pixels becomes a run of channels."""

    def __init__(self) -> None:
        super().__init__(lambda ctx, facts, array: [_space_to_depth(ctx, facts, array)])


class Lengths(Rule):
    """Shape and Size: the numbers of the input are not read, only how many there are.

    Channels can go along an axis whose length nobody asks for, though the length itself is computed.
    """

    def forward(self, ctx: NodeContext) -> list[ChannelFacts]:
        """Keep whole the axes whose length is read."""
        facts = ctx.facts(0)
        if facts is None or facts.rank == 0:
            return super().forward(ctx)
        if set(varying(facts.ids)) & _lengths_read(ctx, facts.rank):
            ctx.pin(facts.ids, f"its length is read by {ctx.label}")
        return [ctx.walk.unknown_facts(value) for value in ctx.node.outputs]

    def backward(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """No number is needed."""
        del live
        return [np.zeros(ctx.walk.facts_of[ctx.source].ids.shape, np.bool_)]


def _lengths_read(ctx: NodeContext, rank: int) -> set[int]:
    """Return the axes whose length some node behind a Shape or Size reads."""
    axes = list(range(rank))
    if ctx.node.op_type == "Size" or ctx.result.is_graph_output():
        return set(axes)
    axes = axes[slice(ctx.integer("start", 0), ctx.node.attributes.get_int("end", rank))]
    read: set[int] = set()
    for use in ctx.result.uses():
        operands = [constant_array(v) for v in use.node.inputs[1:]]
        if use.node.op_type == "Gather" and use.idx == 0 and operands[0] is not None:
            read |= {axes[int(k)] for k in operands[0].reshape(-1)}
        elif use.node.op_type == "Slice" and use.idx == 0 and all(a is not None for a in operands[:2]):
            start, end = (int(a.reshape(-1)[0]) for a in operands[:2] if a is not None)
            step = operands[3] if len(operands) > 3 else np.ones(1)
            read |= set(axes if step is None or step.reshape(-1)[0] != 1 else axes[start:end])
        else:
            # Any other reader may look at every length.
            read |= set(axes)
    return read


def tile(ctx: NodeContext, _: ChannelFacts, array: Array) -> list[Array]:
    """Tile-13: copies of a channel are the same unit."""
    repeats = ctx.array(1)
    if repeats is None or (repeats == 0).any():
        raise LayoutError("the repeats are not constant")
    # An axis that is flat stays so, however often it is repeated.
    along = [int(n) if array.shape[k] > 1 else 1 for k, n in enumerate(repeats)]
    return [np.tile(array, along)]


def transpose(ctx: NodeContext, facts: ChannelFacts, array: Array) -> list[Array]:
    """Transpose-13."""
    return [array.transpose(list(ctx.node.attributes.get_ints("perm", range(facts.rank)[::-1])))]


def squeeze(ctx: NodeContext, facts: ChannelFacts, array: Array) -> list[Array]:
    """Squeeze-13."""
    axes = ctx.array(1)
    found = [k for k, d in enumerate(facts.shape) if d == 1] if axes is None else [int(a) % facts.rank for a in axes]
    return [array.squeeze(tuple(found))]


def unsqueeze(ctx: NodeContext, facts: ChannelFacts, array: Array) -> list[Array]:
    """Unsqueeze-13."""
    axes = ctx.array(1)
    if axes is None:
        raise LayoutError("the axes are not constant")
    rank = facts.rank + axes.size
    return [np.expand_dims(array, tuple(int(a) % rank for a in axes.reshape(-1)))]


def _space_to_depth(ctx: NodeContext, facts: ChannelFacts, array: Array) -> Array:
    if set(varying(facts.ids)) - {1}:
        raise LayoutError("channels vary in space")
    if array.shape[1] == 1:
        return array
    return np.tile(array, [ctx.integer("blocksize", 1) ** 2 if k == 1 else 1 for k in range(array.ndim)])


def _reshape(ctx: NodeContext, facts: ChannelFacts, array: Array) -> Array:
    if ctx.node.op_type == "Reshape" and ctx.array(1) is None and varying(facts.ids):
        raise LayoutError("the target shape is not constant")
    same = next((k for k, n in enumerate(array.shape) if n > 1), array.ndim)
    # Axes in front that stay as they are need no number: their length may be the unknown batch.
    same = min(same, _same_front(ctx.source, ctx.result))
    rest = reshape(array.reshape(array.shape[same:]), facts.shape[same:], ctx.out_shape()[same:])
    return rest.reshape((1,) * same + rest.shape)


def _same_front(before: ir.Value, after: ir.Value) -> int:
    """Return how many axes at the front a reshape leaves alone that are not described: a batch, a time."""
    count = 0
    for a, b in zip(before.shape or (), after.shape or (), strict=False):
        named = isinstance(a, int) or a.value is not None
        if a != b or not named or count == min(len(before.shape or ()), len(after.shape or ())) - 1:
            break
        count += 1
    return count


def _expand(ctx: NodeContext, facts: ChannelFacts, array: Array) -> Array:
    if ctx.array(1) is None and varying(facts.ids):
        raise LayoutError("the target shape is not constant")
    rank = max(len(ctx.out_shape()), facts.rank)
    return array.reshape((1,) * (rank - facts.rank) + array.shape)


def _resize(ctx: NodeContext, facts: ChannelFacts, array: Array) -> Array:
    after = ctx.out_shape()
    if any(facts.shape[k] != after[k] for k in varying(facts.ids)):
        raise LayoutError("channels are interpolated")
    mode = ctx.node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    # The array of units passes through here too, and only that of constants is spoiled.
    if array.dtype.kind == "f" and mode == "tf_crop_and_resize":  # outside there is a number of its own
        return np.full_like(array, np.nan)
    return array


@dataclass(frozen=True)
class Joined:
    """Whether a Concat joins along the axis of the channels."""

    channels: bool


@dataclass(frozen=True)
class Table:
    """The axis of an embedding's table that counts its columns."""

    axis: int


class Concat(MovesElements):
    """Concat along the channels, whose units are laid one behind the other, or along another axis, which ties them.

    Joined in space, a channel is a piece of each operand: it is constant where all pieces are the same number, and its
    pieces go together. So are circular padding (two slices and the map itself) and a class token (a constant operand).
    """

    drops_operands = True

    def forward(self, ctx: NodeContext) -> list[ChannelFacts]:
        """Describe the joined tensor; refuse operands of unknown rank, or of unknown length along the channels."""
        shape = ctx.out_shape()
        rank = len(shape)
        if rank == 0 or not ctx.activations() or any(f.rank != rank for f in ctx.activations()):
            return Rule.forward(self, ctx)
        axis = ctx.integer("axis", 1) % rank
        along = any(f.ids.shape[axis] > 1 for f in ctx.activations())
        others = tuple(max(f.ids.shape[k] for f in ctx.activations()) if k != axis else 1 for k in range(rank))
        if along and any(n > 1 for n in others):
            return Rule.forward(self, ctx)
        # Operands that are flat along every axis are joined as channels too, since nothing has to be tied.
        joins = along or len(varying(np.empty(others))) == 0
        ctx.note(Joined(joins))
        parts = []
        for index in range(len(ctx.node.inputs)):
            part = self._part(ctx, index, axis, others)
            if part is None:
                return Rule.forward(self, ctx)
            parts.append(part)
        ids, const = zip(*parts, strict=True)
        if joins:
            return [ChannelFacts(shape, np.concatenate(ids, axis), np.concatenate(const, axis))]
        # The widest operand has a unit for every channel, to which the others can be tied.
        main = max((f.ids for f in ctx.activations()), key=lambda array: array.size)
        if main.shape != others:
            return ctx.give_up(f"operands vary along different axes at {ctx.label}")
        for other in ids:
            ctx.tie(other, main)
        same = np.logical_and.reduce([c == const[0] for c in const])
        return [ChannelFacts(shape, main, np.where(same, const[0], np.nan))]

    def _part(
        self, ctx: NodeContext, index: int, axis: int, others: tuple[int, ...]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
        """Return units and constants of one operand, of a length along ``axis`` only where that counts channels."""
        facts, array = ctx.facts(index), ctx.array(index)
        if not ctx.recall(Joined).channels:
            if facts is not None:
                return facts.ids, np.broadcast_to(facts.const, np.broadcast_shapes(facts.const.shape, others))
            if array is None or array.ndim != len(others):
                return None
            return self._constant(ctx, index, array, others)
        full = list(others)
        if facts is not None and (length := facts.shape[axis]) is not None:
            full[axis] = length
            return np.broadcast_to(facts.ids, full), np.broadcast_to(facts.const, full)
        if array is None or array.ndim != len(others):
            return None
        full[axis] = array.shape[axis]
        # Among channels a constant operand is stored as it is, and stays whole.
        return np.full(full, PINNED), np.full(full, np.nan)

    @staticmethod
    def _constant(
        ctx: NodeContext, index: int, array: Array, others: tuple[int, ...]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Give each channel of a constant operand, as a class token, a unit of its own."""
        ids = ctx.walk.fresh(others)
        for k, length in enumerate(others):
            if length > 1:
                varied = len(varying(ids)) > 1
                ctx.use_axis(index, k, np.zeros(length, np.int64) if varied else ids)
        numbers = array.astype(np.float64) if array.dtype.kind not in "cOSU" else np.full(array.shape, np.nan)
        return ids, fit(numbers, others)

    def backward(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """An element of any operand is needed where any output element of its unit is, a piece where its channel is."""
        if ctx.recall(Joined).channels:
            return by_units(ctx, live)
        facts_of = [ctx.facts(index) for index in range(len(ctx.node.inputs))]
        return [None if f is None else undo_broadcast(live[0], f.ids.shape) for f in facts_of]

    def use(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> dict[int, ParameterUse]:
        """A constant operand's channel is dead where the joined one is."""
        if ctx.recall(Joined).channels:
            return {}
        arrays = {k: a for k in range(len(ctx.node.inputs)) if (a := ctx.array(k)) is not None}
        return {
            k: ParameterUse(np.broadcast_to(~live[0], a.shape), np.zeros(a.shape, np.bool_)) for k, a in arrays.items()
        }

    def rewrite(self, ctx: NodeContext, plan: RemovalPlan) -> None:
        """Cut constant operands and leave out those of which nothing is left."""
        if not ctx.recall(Joined).channels:
            for index in range(len(ctx.node.inputs)):
                if ctx.array(index) is not None:
                    plan.constant(ctx.node, index, plan.kept(ctx.result))
            return
        kept = [v for v in ctx.node.inputs if v is None or v not in ctx.walk.facts_of or not plan.gone(v)]
        if len(kept) < len(ctx.node.inputs):
            node = ir.node("Concat", kept, attributes=dict(ctx.node.attributes), name=ctx.node.name)
            plan.substitute(ctx.node, node)


class Split(MovesElements):
    """Split along one axis with the sizes that are left."""

    def __init__(self) -> None:
        super().__init__(_split)

    def rewrite(self, ctx: NodeContext, plan: RemovalPlan) -> None:
        """State the new sizes; an output of which nothing is left is dropped."""
        axis = _axis(ctx)
        values = ctx.node.outputs
        if not any(axis in plan.kept(v) or plan.gone(v) for v in values):
            return
        sizes = []
        for value in values:
            kept = plan.kept(value)
            length = ctx.walk.facts_of[value].shape[axis]
            sizes.append(0 if plan.gone(value) else len(kept[axis]) if axis in kept else length)
        left = [v for v in values if not plan.gone(v)]
        target = plan.constant_value(f"{left[0].name}_split", np.array([s for s in sizes if s], np.int64))
        # ONNX allows either the sizes or this attribute, not both.
        attributes = {k: a for k, a in ctx.node.attributes.items() if k != "num_outputs"}
        node = ir.node("Split", [ctx.source, target], attributes=attributes, num_outputs=len(left), name=ctx.node.name)
        plan.substitute(ctx.node, node, left)


class Slice(MovesElements):
    """Slice with constant bounds; along a cut axis it becomes a Gather where the rest is not a plain range."""

    def __init__(self) -> None:
        super().__init__(lambda ctx, facts, array: [_slice(ctx, facts, array)])

    def rewrite(self, ctx: NodeContext, plan: RemovalPlan) -> None:
        """Cut the range along the axes that count units."""
        source = ctx.source
        kept_in = plan.kept(source)
        if not kept_in:
            return
        bounds = _bounds(ctx)
        for axis, (start, end, step) in bounds.items():
            if axis in kept_in:
                positions = np.arange(ctx.walk.facts_of[source].ids.shape[axis])[start:end:step]
                bounds[axis] = _as_range(plan.places(source, axis, positions)) or (start, end, step)
        starts, ends, steps = zip(*bounds.values(), strict=True)
        for index, numbers in enumerate((starts, ends, tuple(bounds), steps), start=1):
            if index < len(ctx.node.inputs) and ctx.node.inputs[index] is not None:
                plan.replace(ctx.node, index, np.array(numbers, np.int64))

    def require(self, ctx: NodeContext, plan: RemovalPlan) -> list[tuple[NDArray[np.int64], str]]:
        """Keep all of a range that would otherwise no longer be one."""
        source = ctx.source
        if plan.gone(source):
            return []
        kept = plan.kept(source)
        for axis, (start, end, step) in _bounds(ctx).items():
            if axis in kept:
                ids = ctx.walk.facts_of[source].ids
                positions = np.arange(ids.shape[axis])[start:end:step]
                if _as_range(plan.places(source, axis, positions)) is None:
                    return [(ids.take(positions, axis), f"not a plain range at {ctx.label}")]
        return []


class Gather(MovesElements):
    """Gather along one axis: by constant indices, which follow what is left, or by computed ones along another axis.

    A constant table of which rows are picked by an input is an embedding: its columns are channels, constant where all
    rows agree.
    """

    def __init__(self) -> None:
        super().__init__(lambda ctx, facts, array: [_gather(ctx, facts, array)])

    def forward(self, ctx: NodeContext) -> list[ChannelFacts]:
        """Move units and constants; give the columns of a table units of their own."""
        table, places = ctx.array(0), ctx.facts(1)
        if table is None or places is None or table.ndim < 2 or not table.size:
            return super().forward(ctx)
        axis, rank = ctx.integer("axis", 0) % table.ndim, len(ctx.out_shape())
        if axis == table.ndim - 1 or rank != table.ndim - 1 + places.rank or len(places.shape) != places.rank:
            return super().forward(ctx)
        ctx.pin(places.ids, f"read as a parameter by {ctx.label}")
        columns = table.reshape(-1, table.shape[-1])
        numbers = (
            columns[0].astype(np.float64) if table.dtype.kind not in "cOSU" else np.full(columns.shape[1:], np.nan)
        )
        const = np.where((columns == columns[:1]).all(axis=0) & np.isfinite(numbers), numbers, np.nan)
        ids = ctx.walk.fresh((*(1 for _ in range(rank - 1)), len(const)))
        ctx.use_axis(0, table.ndim - 1, ids)
        ctx.note(Table(table.ndim - 1))
        return [ChannelFacts(ctx.out_shape(), ids, const.reshape(ids.shape))]

    def backward(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """An element is needed where any output element of its unit is, and every index."""
        return Rule.backward(self, ctx, live) if ctx.find(Table) else super().backward(ctx, live)

    def rewrite(self, ctx: NodeContext, plan: RemovalPlan) -> None:
        """Renumber the indices of the elements that are left, or cut the columns of a table."""
        if ctx.find(Table):
            for keep in plan.kept(ctx.result).values():
                plan.constant(ctx.node, 0, {ctx.recall(Table).axis: keep})
            return
        source = ctx.source
        axis = ctx.integer("axis", 0) % ctx.walk.facts_of[source].rank
        indices = ctx.array(1)
        if axis not in plan.kept(source) or indices is None:
            return
        length = ctx.walk.facts_of[source].shape[axis]
        kept = plan.kept(ctx.result).get(axis, np.arange(indices.size)) if indices.ndim else np.zeros(1, np.int64)
        # A negative index counts from an end that moves, so it is made positive first.
        places = plan.places(source, axis, indices.reshape(-1)[kept] % length).astype(indices.dtype)
        plan.replace(ctx.node, 1, places.reshape(places.shape if indices.ndim else ()))

    def require(self, ctx: NodeContext, plan: RemovalPlan) -> list[tuple[NDArray[np.int64], str]]:
        """Keep a place on the axis from which a single element is picked."""
        indices, facts = ctx.array(1), ctx.facts(0)
        if indices is None or indices.ndim or facts is None or plan.gone(ctx.source):
            return []
        axis = ctx.integer("axis", 0) % facts.rank
        if axis not in plan.kept(ctx.source):
            return []
        picked = facts.ids.take([int(indices) % facts.ids.shape[axis]], axis)
        return [] if plan.kept_ids(picked).any() else [(picked.reshape(-1)[:1], f"picked by {ctx.label}")]

    def use(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> dict[int, ParameterUse]:
        """A column of a table is dead where its channel is."""
        table = ctx.array(0)
        if table is None or not ctx.find(Table):
            return {}
        return {0: ParameterUse(np.broadcast_to(~live[0].reshape(-1), table.shape), np.zeros(table.shape, np.bool_))}


class Pad(MovesElements):
    """Pad with constant amounts; padding along a unit axis adds constant units."""

    def forward(self, ctx: NodeContext) -> list[ChannelFacts]:
        """Surround the units with new ones of known value; a spatial border breaks other constants."""
        facts, pads = ctx.facts(0), ctx.array(1)
        if facts is None or pads is None or facts.rank == 0 or ctx.facts(3) is not None:
            return Rule.forward(self, ctx)
        ctx.pin_parameters()
        amounts = _pad_amounts(ctx, facts.rank)
        fill = _fill(ctx)
        ids, const = facts.ids, facts.const
        for axis, (before, after) in amounts.items():
            if (before or after) and ids.shape[axis] > 1 and (fill is None or before < 0 or after < 0):
                return Rule.forward(self, ctx)
            if not (before or after):
                continue
            if ids.shape[axis] == 1:
                if fill is not None and (before > 0 or after > 0):
                    # A flat channel keeps its number only where the border has it too.
                    const = np.where(const == fill, const, np.nan)
                continue
            width = [(before, after) if k == axis else (0, 0) for k in range(facts.rank)]
            edge = ctx.walk.fresh((before + after,))
            grown = np.pad(ids, width, constant_values=PINNED)
            # Here -1 stands for what was there before, since 0 is the pinned unit.
            line = np.concatenate([edge[:before], np.full(ids.shape[axis], -1), edge[before:]])
            shape = [-1 if k == axis else 1 for k in range(facts.rank)]
            line = np.broadcast_to(line.reshape(shape), grown.shape)
            ids = np.where(line >= 0, line, grown)
            const = np.pad(const, width, constant_values=float("nan" if fill is None else fill))
        return [ChannelFacts(ctx.out_shape(), ids, const)]

    def rewrite(self, ctx: NodeContext, plan: RemovalPlan) -> None:
        """Pad by what is left of the added units."""
        source, value = ctx.source, ctx.result
        rank = ctx.walk.facts_of[source].rank
        amounts = _pad_amounts(ctx, rank)
        kept = plan.kept(value)
        for axis, keep in kept.items():
            before, after = amounts[axis]
            if before or after:
                end = ctx.walk.facts_of[value].ids.shape[axis] - after
                amounts[axis] = (int((keep < before).sum()), int((keep >= end).sum()))
        if kept:
            array = np.asarray(ctx.array(1))
            axes = ctx.array(3)
            order = range(rank) if axes is None else [int(a) % rank for a in axes]
            numbers = [amounts[a][0] for a in order] + [amounts[a][1] for a in order]
            plan.replace(ctx.node, 1, np.array(numbers, array.dtype))


def _axis(ctx: NodeContext) -> int:
    return ctx.integer("axis", 0) % ctx.walk.facts_of[ctx.source].rank


def _split(ctx: NodeContext, facts: ChannelFacts, array: Array) -> list[Array]:
    axis = _axis(ctx)
    if array.shape[axis] == 1:
        return [array for _ in ctx.node.outputs]
    lengths = [ctx.out_shape(k)[axis] for k in range(len(ctx.node.outputs))]
    ends = np.cumsum([n for n in lengths if n is not None])
    if len(ends) != len(lengths) or ends[-1] != facts.shape[axis]:
        raise LayoutError("the sizes are not constant")
    return np.split(array, ends[:-1], axis)


def _bounds(ctx: NodeContext) -> dict[int, tuple[int, int, int]]:
    """Return axis -> (start, end, step) of a Slice."""
    arrays = (ctx.array(k) for k in (1, 2, 3, 4))
    starts, ends, axes, steps = (None if a is None else a.reshape(-1) for a in arrays)  # runtimes take single numbers
    rank = ctx.walk.facts_of[ctx.source].rank
    if starts is None or ends is None or len(ctx.activations()) > 1:
        raise LayoutError("the bounds are not constant")
    order = np.arange(len(starts)) if axes is None else axes % rank
    step = np.ones(len(starts), np.int64) if steps is None else steps
    return {int(a): (int(s), int(e), int(t)) for a, s, e, t in zip(order, starts, ends, step, strict=True)}


def _slice(ctx: NodeContext, facts: ChannelFacts, array: Array) -> Array:
    for axis, (start, end, step) in _bounds(ctx).items():
        if array.shape[axis] > 1:
            # What is left of a cut range is looked for as an ascending one, which also needs a known length.
            if step < 0 or facts.shape[axis] != array.shape[axis]:
                raise LayoutError("the slice runs backwards")
            positions = np.arange(array.shape[axis])[start:end:step]
            array = np.asarray(array.take(positions, axis))
    return array


def _as_range(places: NDArray[np.int64]) -> tuple[int, int, int] | None:
    """Write ascending positions as (start, end, step), or None where they are no plain range."""
    if len(places) == 0:
        return (0, 0, 1)
    # Cut evenly, a range may still be one with another step, and then no unit has to stay for its sake.
    step = int(places[1] - places[0]) if len(places) > 1 else 1
    same = bool((np.diff(places) == step).all())
    return (int(places[0]), int(places[-1]) + 1, step) if same else None


def _gather(ctx: NodeContext, facts: ChannelFacts, array: Array) -> Array:
    indices, axis = ctx.array(1), ctx.integer("axis", 0) % facts.rank
    places = ctx.facts(1)
    rank = indices.ndim if indices is not None else len(ctx.out_shape()) - facts.rank + 1
    if indices is None and (places is None or rank != places.rank or array.shape[axis] > 1):
        raise LayoutError("the indices are not a constant list")
    if array.shape[axis] == 1:
        shape = (*array.shape[:axis], *([1] * rank), *array.shape[axis + 1 :])
        return array.reshape(shape)
    # Along the channels, a table of indices would spread the units over several axes.
    if indices is None or indices.ndim > 1:
        raise LayoutError("the indices are not a constant list")
    return np.asarray(array.take(indices % array.shape[axis], axis))


def _pad_amounts(ctx: NodeContext, rank: int) -> dict[int, tuple[int, int]]:
    pads, axes = ctx.array(1), ctx.array(3)
    order = range(rank) if axes is None else [int(a) % rank for a in axes]
    half = len(order)
    numbers = [int(n) for n in np.asarray(pads)]
    return dict.fromkeys(range(rank), (0, 0)) | {a: (numbers[k], numbers[half + k]) for k, a in enumerate(order)}


def _fill(ctx: NodeContext) -> float | None:
    """Return the number that fills the border, None where it is taken from the map (a constant map stays constant)."""
    if ctx.node.attributes.get_string("mode", "constant") != "constant":
        return None
    value = ctx.array(2)
    if value is None:
        absent = len(ctx.node.inputs) < 3 or ctx.node.inputs[2] is None
        return 0.0 if absent else float("nan")
    return float(value.reshape(-1)[0])
