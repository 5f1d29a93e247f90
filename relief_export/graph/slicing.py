"""Rules of views that join, divide or pick along an axis: concat, split, slice, gather, pad."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from relief_export.graph.flow import PINNED, Flow, Rule, Site, Use
from relief_export.graph.layout import LayoutError, fit, spread, varying
from relief_export.graph.views import View, by_units

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from relief_export.graph.cutting import Cut

Array = np.ndarray[Any, np.dtype[Any]]


class Concat(View):
    """Concat along the channels, whose units are laid one behind the other, or along another axis, which ties them.

    Joined in space, a channel is a piece of each operand: it is constant where all pieces are the same number, and its
    pieces go together. So are circular padding (two slices and the map itself) and a class token (a constant operand).
    """

    drops_operands = True

    def forward(self, site: Site) -> list[Flow]:
        """Describe the joined tensor; refuse operands of unknown rank, or of unknown length along the channels."""
        shape = site.out_shape()
        rank = len(shape)
        if rank == 0 or not site.flows() or any(f.rank != rank for f in site.flows()):
            return Rule.forward(self, site)
        axis = site.integer("axis", 1) % rank
        along = any(f.ids.shape[axis] > 1 for f in site.flows())
        others = tuple(max(f.ids.shape[k] for f in site.flows()) if k != axis else 1 for k in range(rank))
        if along and any(n > 1 for n in others):
            return Rule.forward(self, site)
        site.cache["channels"] = along or len(varying(np.empty(others))) == 0
        parts = []
        for index in range(len(site.node.inputs)):
            part = self._part(site, index, axis, others)
            if part is None:
                return Rule.forward(self, site)
            parts.append(part)
        ids, const = zip(*parts, strict=True)
        if site.cache["channels"]:
            return [Flow(shape, np.concatenate(ids, axis), np.concatenate(const, axis))]
        main = max((f.ids for f in site.flows()), key=lambda array: array.size)
        if main.shape != others:
            return site.give_up(f"operands vary along different axes at {site.label}")
        for other in ids:
            site.tie(other, main)
        same = np.logical_and.reduce([c == const[0] for c in const])
        return [Flow(shape, main, np.where(same, const[0], np.nan))]

    def _part(
        self, site: Site, index: int, axis: int, others: tuple[int, ...]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
        """Return units and constants of one operand, of a length along ``axis`` only where that counts channels."""
        flow, array = site.flow(index), site.array(index)
        if not site.cache["channels"]:
            if flow is not None:
                return flow.ids, np.broadcast_to(flow.const, np.broadcast_shapes(flow.const.shape, others))
            if array is None or array.ndim != len(others):
                return None
            return self._constant(site, index, array, others)
        full = list(others)
        if flow is not None and (length := flow.shape[axis]) is not None:
            full[axis] = length
            return np.broadcast_to(flow.ids, full), np.broadcast_to(flow.const, full)
        if array is None or array.ndim != len(others):
            return None
        full[axis] = array.shape[axis]
        return np.full(full, PINNED), np.full(full, np.nan)

    @staticmethod
    def _constant(
        site: Site, index: int, array: Array, others: tuple[int, ...]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Give each channel of a constant operand, as a class token, a unit of its own."""
        ids = site.trace.fresh(others)
        for k, length in enumerate(others):
            if length > 1:
                varied = len(varying(ids)) > 1
                site.use_axis(index, k, np.zeros(length, np.int64) if varied else ids)
        numbers = array.astype(np.float64) if array.dtype.kind not in "cOSU" else np.full(array.shape, np.nan)
        return ids, fit(numbers, others)

    def backward(self, site: Site, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """An element of any operand is needed where any output element of its unit is, a piece where its channel is."""
        if site.cache["channels"]:
            return by_units(site, live)
        flows = [site.flow(index) for index in range(len(site.node.inputs))]
        return [None if f is None else spread(live[0], f.ids.shape) for f in flows]

    def use(self, site: Site, live: list[NDArray[np.bool_]]) -> dict[int, Use]:
        """A constant operand's channel is dead where the joined one is."""
        if site.cache["channels"]:
            return {}
        arrays = {k: a for k in range(len(site.node.inputs)) if (a := site.array(k)) is not None}
        return {k: Use(np.broadcast_to(~live[0], a.shape), np.zeros(a.shape, np.bool_)) for k, a in arrays.items()}

    def rewrite(self, site: Site, cut: Cut) -> None:
        """Cut constant operands and leave out those of which nothing is left."""
        if not site.cache["channels"]:
            for index in range(len(site.node.inputs)):
                if site.array(index) is not None:
                    cut.constant(site.node, index, cut.kept(site.result))
            return
        kept = [v for v in site.node.inputs if v is None or v not in site.trace.flows or not cut.gone(v)]
        if len(kept) < len(site.node.inputs):
            node = ir.node("Concat", kept, attributes=dict(site.node.attributes), name=site.node.name)
            cut.substitute(site.node, node)


class Split(View):
    """Split along one axis with the sizes that are left."""

    def __init__(self) -> None:
        super().__init__(_split)

    def rewrite(self, site: Site, cut: Cut) -> None:
        """State the new sizes; an output of which nothing is left is dropped."""
        axis = _axis(site)
        values = site.node.outputs
        if not any(axis in cut.kept(v) or cut.gone(v) for v in values):
            return
        sizes = []
        for value in values:
            kept = cut.kept(value)
            length = site.trace.flows[value].shape[axis]
            sizes.append(0 if cut.gone(value) else len(kept[axis]) if axis in kept else length)
        left = [v for v in values if not cut.gone(v)]
        target = cut.constant_value(f"{left[0].name}_split", np.array([s for s in sizes if s], np.int64))
        attributes = {k: a for k, a in site.node.attributes.items() if k != "num_outputs"}
        node = ir.node(
            "Split", [site.source, target], attributes=attributes, num_outputs=len(left), name=site.node.name
        )
        cut.substitute(site.node, node, left)


class Slice(View):
    """Slice with constant bounds; along a cut axis it becomes a Gather where the rest is not a plain range."""

    def __init__(self) -> None:
        super().__init__(lambda site, flow, array: [_slice(site, flow, array)])

    def rewrite(self, site: Site, cut: Cut) -> None:
        """Cut the range along the axes that count units."""
        source = site.source
        kept_in = cut.kept(source)
        if not kept_in:
            return
        bounds = _bounds(site)
        for axis, (start, end, step) in bounds.items():
            if axis in kept_in:
                positions = np.arange(site.trace.flows[source].ids.shape[axis])[start:end:step]
                bounds[axis] = _as_range(cut.places(source, axis, positions)) or (start, end, step)
        starts, ends, steps = zip(*bounds.values(), strict=True)
        for index, numbers in enumerate((starts, ends, tuple(bounds), steps), start=1):
            if index < len(site.node.inputs) and site.node.inputs[index] is not None:
                cut.replace(site.node, index, np.array(numbers, np.int64))

    def require(self, site: Site, cut: Cut) -> list[tuple[NDArray[np.int64], str]]:
        """Keep all of a range that would otherwise no longer be one."""
        source = site.source
        if cut.gone(source):
            return []
        kept = cut.kept(source)
        for axis, (start, end, step) in _bounds(site).items():
            if axis in kept:
                ids = site.trace.flows[source].ids
                positions = np.arange(ids.shape[axis])[start:end:step]
                if _as_range(cut.places(source, axis, positions)) is None:
                    return [(ids.take(positions, axis), f"not a plain range at {site.label}")]
        return []


class Gather(View):
    """Gather along one axis: by constant indices, which follow what is left, or by computed ones along another axis.

    A constant table of which rows are picked by an input is an embedding: its columns are channels, constant where all
    rows agree.
    """

    def __init__(self) -> None:
        super().__init__(lambda site, flow, array: [_gather(site, flow, array)])

    def forward(self, site: Site) -> list[Flow]:
        """Move units and constants; give the columns of a table units of their own."""
        table, places = site.array(0), site.flow(1)
        if table is None or places is None or table.ndim < 2 or not table.size:
            return super().forward(site)
        axis, rank = site.integer("axis", 0) % table.ndim, len(site.out_shape())
        if axis == table.ndim - 1 or rank != table.ndim - 1 + places.rank or len(places.shape) != places.rank:
            return super().forward(site)
        site.pin(places.ids, f"read as a parameter by {site.label}")
        columns = table.reshape(-1, table.shape[-1])
        numbers = (
            columns[0].astype(np.float64) if table.dtype.kind not in "cOSU" else np.full(columns.shape[1:], np.nan)
        )
        const = np.where((columns == columns[:1]).all(axis=0) & np.isfinite(numbers), numbers, np.nan)
        ids = site.trace.fresh((*(1 for _ in range(rank - 1)), len(const)))
        site.use_axis(0, table.ndim - 1, ids)
        site.cache["table"] = table.ndim - 1
        return [Flow(site.out_shape(), ids, const.reshape(ids.shape))]

    def backward(self, site: Site, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """An element is needed where any output element of its unit is, and every index."""
        return Rule.backward(self, site, live) if "table" in site.cache else super().backward(site, live)

    def rewrite(self, site: Site, cut: Cut) -> None:
        """Renumber the indices of the elements that are left, or cut the columns of a table."""
        if "table" in site.cache:
            kept = cut.kept(site.result)
            for keep in kept.values():
                cut.constant(site.node, 0, {site.cache["table"]: keep})
            return
        source = site.source
        axis = site.integer("axis", 0) % site.trace.flows[source].rank
        indices = site.array(1)
        if axis not in cut.kept(source) or indices is None:
            return
        length = site.trace.flows[source].shape[axis]
        kept = cut.kept(site.result).get(axis, np.arange(indices.size)) if indices.ndim else np.zeros(1, np.int64)
        places = cut.places(source, axis, indices.reshape(-1)[kept] % length).astype(indices.dtype)
        cut.replace(site.node, 1, places.reshape(places.shape if indices.ndim else ()))

    def require(self, site: Site, cut: Cut) -> list[tuple[NDArray[np.int64], str]]:
        """Keep a place on the axis from which a single element is picked."""
        indices, flow = site.array(1), site.flow(0)
        if indices is None or indices.ndim or flow is None or cut.gone(site.source):
            return []
        axis = site.integer("axis", 0) % flow.rank
        if axis not in cut.kept(site.source):
            return []
        picked = flow.ids.take([int(indices) % flow.ids.shape[axis]], axis)
        return [] if cut.kept_ids(picked).any() else [(picked.reshape(-1)[:1], f"picked by {site.label}")]

    def use(self, site: Site, live: list[NDArray[np.bool_]]) -> dict[int, Use]:
        """A column of a table is dead where its channel is."""
        table = site.array(0)
        if table is None or "table" not in site.cache:
            return {}
        return {0: Use(np.broadcast_to(~live[0].reshape(-1), table.shape), np.zeros(table.shape, np.bool_))}


class Pad(View):
    """Pad with constant amounts; padding along a unit axis adds constant units."""

    def forward(self, site: Site) -> list[Flow]:
        """Surround the units with new ones of known value; a spatial border breaks other constants."""
        flow, pads = site.flow(0), site.array(1)
        if flow is None or pads is None or flow.rank == 0 or site.flow(3) is not None:
            return Rule.forward(self, site)
        site.pin_parameters()
        amounts = _pad_amounts(site, flow.rank)
        fill = _fill(site)
        ids, const = flow.ids, flow.const
        for axis, (before, after) in amounts.items():
            if (before or after) and ids.shape[axis] > 1 and (fill is None or before < 0 or after < 0):
                return Rule.forward(self, site)
            if not (before or after):
                continue
            if ids.shape[axis] == 1:
                if fill is not None and (before > 0 or after > 0):
                    const = np.where(const == fill, const, np.nan)
                continue
            width = [(before, after) if k == axis else (0, 0) for k in range(flow.rank)]
            edge = site.cache.setdefault("edge", site.trace.fresh((before + after,)))
            grown = np.pad(ids, width, constant_values=PINNED)
            line = np.concatenate([edge[:before], np.full(ids.shape[axis], -1), edge[before:]])
            shape = [-1 if k == axis else 1 for k in range(flow.rank)]
            line = np.broadcast_to(line.reshape(shape), grown.shape)
            ids = np.where(line >= 0, line, grown)
            const = np.pad(const, width, constant_values=float("nan" if fill is None else fill))
        return [Flow(site.out_shape(), ids, const)]

    def rewrite(self, site: Site, cut: Cut) -> None:
        """Pad by what is left of the added units."""
        source, value = site.source, site.result
        rank = site.trace.flows[source].rank
        amounts = _pad_amounts(site, rank)
        kept = cut.kept(value)
        for axis, keep in kept.items():
            before, after = amounts[axis]
            if before or after:
                end = site.trace.flows[value].ids.shape[axis] - after
                amounts[axis] = (int((keep < before).sum()), int((keep >= end).sum()))
        if kept:
            array = np.asarray(site.array(1))
            axes = site.array(3)
            order = range(rank) if axes is None else [int(a) % rank for a in axes]
            numbers = [amounts[a][0] for a in order] + [amounts[a][1] for a in order]
            cut.replace(site.node, 1, np.array(numbers, array.dtype))


def _axis(site: Site) -> int:
    return site.integer("axis", 0) % site.trace.flows[site.source].rank


def _split(site: Site, flow: Flow, array: Array) -> list[Array]:
    axis = _axis(site)
    if array.shape[axis] == 1:
        return [array for _ in site.node.outputs]
    lengths = [site.out_shape(k)[axis] for k in range(len(site.node.outputs))]
    ends = np.cumsum([n for n in lengths if n is not None])
    if len(ends) != len(lengths) or ends[-1] != flow.shape[axis]:
        raise LayoutError("the sizes are not constant")
    return np.split(array, ends[:-1], axis)


def _bounds(site: Site) -> dict[int, tuple[int, int, int]]:
    """Return axis -> (start, end, step) of a Slice."""
    arrays = (site.array(k) for k in (1, 2, 3, 4))
    starts, ends, axes, steps = (None if a is None else a.reshape(-1) for a in arrays)  # runtimes take single numbers
    rank = site.trace.flows[site.source].rank
    if starts is None or ends is None or len(site.flows()) > 1:
        raise LayoutError("the bounds are not constant")
    order = np.arange(len(starts)) if axes is None else axes % rank
    step = np.ones(len(starts), np.int64) if steps is None else steps
    return {int(a): (int(s), int(e), int(t)) for a, s, e, t in zip(order, starts, ends, step, strict=True)}


def _slice(site: Site, flow: Flow, array: Array) -> Array:
    for axis, (start, end, step) in _bounds(site).items():
        if array.shape[axis] > 1:
            if step < 0 or flow.shape[axis] != array.shape[axis]:
                raise LayoutError("the slice runs backwards")
            positions = np.arange(array.shape[axis])[start:end:step]
            array = np.asarray(array.take(positions, axis))
    return array


def _as_range(places: NDArray[np.int64]) -> tuple[int, int, int] | None:
    """Write ascending positions as (start, end, step), or None where they are no plain range."""
    if len(places) == 0:
        return (0, 0, 1)
    step = int(places[1] - places[0]) if len(places) > 1 else 1
    same = bool((np.diff(places) == step).all())
    return (int(places[0]), int(places[-1]) + 1, step) if same else None


def _gather(site: Site, flow: Flow, array: Array) -> Array:
    indices, axis = site.array(1), site.integer("axis", 0) % flow.rank
    places = site.flow(1)
    rank = indices.ndim if indices is not None else len(site.out_shape()) - flow.rank + 1
    if indices is None and (places is None or rank != places.rank or array.shape[axis] > 1):
        raise LayoutError("the indices are not a constant list")
    if array.shape[axis] == 1:
        shape = (*array.shape[:axis], *([1] * rank), *array.shape[axis + 1 :])
        return array.reshape(shape)
    if indices is None or indices.ndim > 1:
        raise LayoutError("the indices are not a constant list")
    return np.asarray(array.take(indices % array.shape[axis], axis))


def _pad_amounts(site: Site, rank: int) -> dict[int, tuple[int, int]]:
    pads, axes = site.array(1), site.array(3)
    order = range(rank) if axes is None else [int(a) % rank for a in axes]
    half = len(order)
    numbers = [int(n) for n in np.asarray(pads)]
    return dict.fromkeys(range(rank), (0, 0)) | {a: (numbers[k], numbers[half + k]) for k, a in enumerate(order)}


def _fill(site: Site) -> float | None:
    """Return the number that fills the border, None where it is taken from the map (a constant map stays constant)."""
    if site.node.attributes.get_string("mode", "constant") != "constant":
        return None
    value = site.array(2)
    if value is None:
        absent = len(site.node.inputs) < 3 or site.node.inputs[2] is None
        return 0.0 if absent else float("nan")
    return float(value.reshape(-1)[0])
