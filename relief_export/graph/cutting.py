"""What stays and what goes, and the edits that rules make to carry it out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from relief_export.graph.flow import PINNED, Site, Trace
from relief_export.graph.fold import constant_array
from relief_export.graph.initializers import add_initializer, free_name
from relief_export.graph.layout import axis_indices

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

Lists = dict[int, "NDArray[np.int64]"]


class Cut:
    """The decision by unit, asked by value; then the editor of the graph.

    Args:
        trace: Units of every activation.
        labels: Unit -> component of units that are tied together.
        live: Liveness of every activation.
    """

    def __init__(self, trace: Trace, labels: NDArray[np.int64], live: Mapping[ir.Value, NDArray[np.bool_]]) -> None:
        self._trace = trace
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
            self._masks[value] = self.kept_ids(self._trace.flows[value].ids)
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
        shape = self._trace.flows[value].ids.shape
        return {axis: keep for axis, keep in lists.items() if len(keep) < shape[axis]}

    def places(self, value: ir.Value, axis: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the given positions along a cut axis are found afterwards, those that went left out."""
        stays = self.stays(value)
        line = np.asarray(stays.any(axis=tuple(k for k in range(stays.ndim) if k != axis)))
        return (np.cumsum(line) - 1)[positions[line[positions]]]

    def shuffles(self, site: Site) -> Sequence[ir.Value]:
        """Return the outputs of a node that lie inside a channel shuffle, which is replaced as a whole."""
        shuffled: tuple[ir.Value, ...] = site.cache.get("shuffled", ())
        return shuffled

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
        if old in self._trace.computed and source is not None:
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
        if node.outputs[0] in self._trace.computed:
            self._operands.append((node, index, self._new[key]))
        else:
            node.replace_input_with(index, self._new[key])

    def _computed(self, node: ir.Node, keep: Mapping[int, NDArray[np.int64]]) -> None:
        """Cut a constant that nodes compute where it is stored; every use of it cuts it in the same way."""
        value = node.outputs[0]
        if value in self._cut:
            return
        self._cut.add(value)
        present = [index for index, operand in enumerate(node.inputs) if operand is not None]
        for index, axes in zip(present, self._trace.computed[value], strict=True):
            self.constant(node, index, {axes[axis]: positions for axis, positions in keep.items() if axis in axes})
        shape = value.shape or ()
        self._shapes[value] = ir.Shape([len(keep[k]) if k in keep else n for k, n in enumerate(shape)])
        if node.op_type == "Reshape":
            target = np.array([len(keep[k]) if k in keep else n for k, n in enumerate(shape)], np.int64)
            self._operands.append((node, 1, self.constant_value(f"{value.name}_shape", target)))

    def bias(self, site: Site, bias: NDArray[np.generic], has_bias: bool) -> None:
        """Give a linear node another bias: as its third operand, or added behind it where it has none."""
        node = site.node
        weight = node.inputs[1]
        stored = node.name if weight is None else self._trace.stored(weight).name
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
                value.name = free_name(self._graph, f"{value.name}_before")
                for index, operand in enumerate(new.inputs):
                    if operand is fresh:  # a node added behind ``old`` reads what it replaces
                        new.replace_input_with(index, value)
            self._graph.insert_after(old, new)
            if new.op_type == "Add":
                self._merge_addition(new)

    def _merge_addition(self, node: ir.Node) -> None:
        """Join a new bias with the constant that the following node adds, so that no node is added."""
        assert self._graph is not None  # noqa: S101
        uses = list(node.outputs[0].uses())
        following = uses[0].node if len(uses) == 1 else node
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
