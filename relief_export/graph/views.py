"""Rules of operators that only move elements: reshape, transpose, concat, split, slice, pad, gather, resize.

A view acts on the compact arrays of its input as it acts on the tensor, so units and constants travel with the
elements; going back, an input element is needed where any output element of the same unit is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from relief_export.graph.flow import Flow, Rule, Site
from relief_export.graph.layout import LayoutError, constant_axes, drop_axes, reshape, varying

if TYPE_CHECKING:
    from collections.abc import Callable

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


def _reshape(site: Site, flow: Flow, array: Array) -> Array:
    if site.node.op_type == "Reshape" and site.array(1) is None and varying(flow.ids):
        raise LayoutError("the target shape is not constant")
    return reshape(array, flow.shape, site.out_shape())


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
