"""Rules of operators that only move elements: reshape, transpose, concat, split, slice, pad, gather, resize.

A view acts on the compact arrays of its input as it acts on the tensor, so units and constants travel with the
elements; going back, an input element is needed where any output element of the same unit is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from relief_export.graph.flow import Flow, Rule, Site
from relief_export.graph.fold import constant_array
from relief_export.graph.layout import LayoutError, constant_axes, drop_axes, reshape, varying

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir
    from numpy.typing import NDArray

    from relief_export.graph.cutting import Cut

Array = np.ndarray[Any, np.dtype[Any]]


def by_units(site: Site, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
    """Carry liveness back to all operands by unit, since every output element keeps the unit of its source."""
    wanted = np.zeros(site.trace.count, np.bool_)
    for value, flags in zip(site.node.outputs, live, strict=True):
        ids = site.trace.flows[value].ids
        wanted[ids[np.broadcast_to(flags, ids.shape)]] = True
    needs: list[NDArray[np.bool_] | None] = []
    for index in range(len(site.node.inputs)):
        flow = site.flow(index)
        needs.append(None if flow is None else wanted[flow.ids])
    return needs


def _moved_elsewhere(site: Site, flow: Flow, array: Array) -> list[Array]:
    """Stand for the move of a view that describes its outputs itself."""
    raise LayoutError(f"{site.label} has no move for rank {flow.rank} of {array.dtype}")


class View(Rule):
    """A view of its first input, given as a function of a compact array.

    Args:
        move: Maps a compact array of the input to one of each output.
        permutes: The output holds every element of the input once, and ``move`` moves any array as it moves the tensor.
    """

    def __init__(
        self, move: Callable[[Site, Flow, Array], list[Array]] = _moved_elsewhere, *, permutes: bool = False
    ) -> None:
        self.move = move
        self.permutes = permutes

    def forward(self, site: Site) -> list[Flow]:
        """Move units and constants; refuse what a compact array cannot express."""
        flow = site.flow(0)
        if flow is None or flow.rank == 0:
            return super().forward(site)
        try:
            moved = list(zip(self.move(site, flow, flow.ids), self.move(site, flow, flow.const), strict=True))
        except LayoutError as error:
            return site.give_up(f"{error} at {site.label}")
        site.pin_parameters()
        flows = []
        for index, (ids, const) in enumerate(moved):
            axes = sorted(set(constant_axes(ids)) & set(constant_axes(const)))
            flows.append(Flow(site.out_shape(index), drop_axes(ids, axes), drop_axes(const, axes)))
        return flows

    def backward(self, site: Site, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """An element is needed where any output element of its unit is, and every parameter."""
        return [by_units(site, live)[0], *super().backward(site, live)[1:]]


class Reshape(View):
    """Reshape with a constant target; the target follows what is cut."""

    def __init__(self) -> None:
        super().__init__(lambda site, flow, array: [_reshape(site, flow, array)], permutes=True)

    def rewrite(self, site: Site, cut: Cut) -> None:
        """Replace the lengths of cut axes in the target."""
        value = site.result
        if not cut.kept(value):
            return
        target = np.array(site.array(1), np.int64)
        before = site.trace.flows[value].shape
        for axis in cut.kept(site.source):  # a length that is copied from a cut axis, but not for it
            if axis < len(target) and target[axis] == 0:
                target[axis] = before[axis] or 0
        for axis, keep in cut.kept(value).items():
            if target[axis] > 0 or target[axis] == 0 or before[axis] is None:
                target[axis] = len(keep)
        cut.replace(site.node, 1, target)


class Flatten(View):
    """Flatten: a reshape to two axes that needs no target."""

    def __init__(self) -> None:
        super().__init__(lambda site, flow, array: [_reshape(site, flow, array)], permutes=True)


class Expand(View):
    """Expand to a constant shape, whose lengths follow what is cut."""

    def __init__(self) -> None:
        super().__init__(lambda site, flow, array: [_expand(site, flow, array)])

    def rewrite(self, site: Site, cut: Cut) -> None:
        """Replace the lengths of cut axes."""
        value = site.result
        if not cut.kept(value):
            return
        target = np.array(site.array(1), np.int64)
        offset = site.trace.flows[value].rank - len(target)
        for axis, keep in cut.kept(value).items():
            if axis >= offset and target[axis - offset] != 1:
                target[axis - offset] = len(keep)
        cut.replace(site.node, 1, target)


class Resize(View):
    """Resize in space: the unit axes must keep their length."""

    def __init__(self) -> None:
        super().__init__(lambda site, flow, array: [_resize(site, flow, array)])

    def rewrite(self, site: Site, cut: Cut) -> None:
        """Replace the lengths of cut axes where the target is given as sizes."""
        sizes = site.array(3)
        kept = cut.kept(site.result)
        if sizes is None or not kept or not sizes.size:
            return
        target = np.array(sizes)
        axes = site.node.attributes.get_ints("axes", range(len(target)))
        for place, axis in enumerate(axes):
            if axis in kept:
                target[place] = len(kept[axis])
        cut.replace(site.node, 3, target)


class DepthToSpace(View):
    """DepthToSpace-13: a block of channels becomes one channel of a larger picture; the block lives and dies whole."""

    def forward(self, site: Site) -> list[Flow]:
        """Tie the channels of each block."""
        flow, block = site.flow(0), site.integer("blocksize", 1) ** 2
        if flow is None or set(varying(flow.ids)) - {1} or (flow.ids.size > 1 and flow.ids.size % block):
            return super(View, self).forward(site)
        if flow.ids.size == 1:
            return [Flow(site.out_shape(), flow.ids, flow.const)]
        ids, const = self._blocks(site, flow.ids), self._blocks(site, flow.const)
        site.tie(ids, np.broadcast_to(ids[:1], ids.shape))
        shape = (1, ids.shape[1], *(1 for _ in range(flow.rank - 2)))
        same = np.where((const == const[:1]).all(axis=0), const[0], np.nan)
        return [Flow(site.out_shape(), ids[0].reshape(shape), same.reshape(shape))]

    def backward(self, site: Site, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """A block is needed where its channel is."""
        flow = site.trace.flows[site.source]
        if flow.ids.size == 1:
            return [live[0]]
        need = np.empty(flow.ids.size, np.bool_)
        self._blocks(site, need)[:] = live[0].reshape(1, -1)
        return [need.reshape(flow.ids.shape)]

    @staticmethod
    def _blocks(site: Site, array: Array) -> Array:
        """View an array of the input's channels as (place in the block, channel)."""
        block = site.integer("blocksize", 1) ** 2
        if site.node.attributes.get_string("mode", "DCR") == "CRD":
            return array.reshape(-1, block).T
        return array.reshape(block, -1)


class SpaceToDepth(View):
    """SpaceToDepth-13: each place of a block of pixels becomes a run of channels."""

    def __init__(self) -> None:
        super().__init__(lambda site, flow, array: [_space_to_depth(site, flow, array)])


class Lengths(Rule):
    """Shape and Size: the numbers of the input are not read, only how many there are.

    Channels can go along an axis whose length nobody asks for, though the length itself is computed.
    """

    def forward(self, site: Site) -> list[Flow]:
        """Keep whole the axes whose length is read."""
        flow = site.flow(0)
        if flow is None or flow.rank == 0:
            return super().forward(site)
        if set(varying(flow.ids)) & _lengths_read(site, flow.rank):
            site.pin(flow.ids, f"its length is read by {site.label}")
        return [site.trace.unknown_flow(value) for value in site.node.outputs]

    def backward(self, site: Site, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """No number is needed."""
        del live
        return [np.zeros(site.trace.flows[site.source].ids.shape, np.bool_)]


def _lengths_read(site: Site, rank: int) -> set[int]:
    """Return the axes whose length some node behind a Shape or Size reads."""
    axes = list(range(rank))
    if site.node.op_type == "Size" or site.result.is_graph_output():
        return set(axes)
    axes = axes[slice(site.integer("start", 0), site.node.attributes.get_int("end", rank))]
    read: set[int] = set()
    for use in site.result.uses():
        operands = [constant_array(v) for v in use.node.inputs[1:]]
        if use.node.op_type == "Gather" and use.idx == 0 and operands[0] is not None:
            read |= {axes[int(k)] for k in operands[0].reshape(-1)}
        elif use.node.op_type == "Slice" and use.idx == 0 and all(a is not None for a in operands[:2]):
            start, end = (int(a.reshape(-1)[0]) for a in operands[:2] if a is not None)
            step = operands[3] if len(operands) > 3 else np.ones(1)
            read |= set(axes if step is None or step.reshape(-1)[0] != 1 else axes[start:end])
        else:
            read |= set(axes)
    return read


def tile(site: Site, _: Flow, array: Array) -> list[Array]:
    """Tile-13: copies of a channel are the same unit."""
    repeats = site.array(1)
    if repeats is None or (repeats == 0).any():
        raise LayoutError("the repeats are not constant")
    along = [int(n) if array.shape[k] > 1 else 1 for k, n in enumerate(repeats)]
    return [np.tile(array, along)]


def transpose(site: Site, flow: Flow, array: Array) -> list[Array]:
    """Transpose-13."""
    return [array.transpose(list(site.node.attributes.get_ints("perm", range(flow.rank)[::-1])))]


def squeeze(site: Site, flow: Flow, array: Array) -> list[Array]:
    """Squeeze-13."""
    axes = site.array(1)
    found = [k for k, d in enumerate(flow.shape) if d == 1] if axes is None else [int(a) % flow.rank for a in axes]
    return [array.squeeze(tuple(found))]


def unsqueeze(site: Site, flow: Flow, array: Array) -> list[Array]:
    """Unsqueeze-13."""
    axes = site.array(1)
    if axes is None:
        raise LayoutError("the axes are not constant")
    rank = flow.rank + axes.size
    return [np.expand_dims(array, tuple(int(a) % rank for a in axes.reshape(-1)))]


def _space_to_depth(site: Site, flow: Flow, array: Array) -> Array:
    if set(varying(flow.ids)) - {1}:
        raise LayoutError("channels vary in space")
    if array.shape[1] == 1:
        return array
    return np.tile(array, [site.integer("blocksize", 1) ** 2 if k == 1 else 1 for k in range(array.ndim)])


def _reshape(site: Site, flow: Flow, array: Array) -> Array:
    if site.node.op_type == "Reshape" and site.array(1) is None and varying(flow.ids):
        raise LayoutError("the target shape is not constant")
    same = next((k for k, n in enumerate(array.shape) if n > 1), array.ndim)
    same = min(same, _same_front(site.source, site.result))
    rest = reshape(array.reshape(array.shape[same:]), flow.shape[same:], site.out_shape()[same:])
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


def _expand(site: Site, flow: Flow, array: Array) -> Array:
    if site.array(1) is None and varying(flow.ids):
        raise LayoutError("the target shape is not constant")
    rank = max(len(site.out_shape()), flow.rank)
    return array.reshape((1,) * (rank - flow.rank) + array.shape)


def _resize(site: Site, flow: Flow, array: Array) -> Array:
    after = site.out_shape()
    if any(flow.shape[k] != after[k] for k in varying(flow.ids)):
        raise LayoutError("channels are interpolated")
    mode = site.node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if array.dtype.kind == "f" and mode == "tf_crop_and_resize":  # outside there is a number of its own
        return np.full_like(array, np.nan)
    return array
