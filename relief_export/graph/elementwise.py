"""Rules of operators that treat every channel by itself: activations, arithmetic with broadcasting, pooling, mixing.

A constant channel ``c`` stays constant behind ``f`` with value ``f(c)``, computed in float64. Under broadcasting an
output element is known where all its operands are; ``0 * x`` is known whatever finite ``x`` is. Where a function jumps,
as a floor or a comparison does, a constant is known only if it is clear of the jump by more than rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from relief_export.graph.flow import Flow, Rule, Site, Use
from relief_export.graph.fold import is_read
from relief_export.graph.layout import fit, spread, varying

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from relief_export.graph.cutting import Cut

Array = np.ndarray[Any, np.dtype[Any]]
Function = Callable[..., Array]


def finite(values: Array) -> NDArray[np.float64]:
    """Treat an infinite constant as not known: it may not be moved into a bias."""
    return np.where(np.isfinite(values), values, np.nan)


class Elementwise(Rule):
    """An operator that computes each element from the elements at the same (broadcast) position.

    Args:
        function: Value at constants, called with the node's site and one float64 array an input.
        partial: The function is not finite everywhere (logarithm, quotient): a channel that stays must keep its value,
            because a kept channel with garbage in it could spread NaN through a zero weight.
        annihilates: The result may be known although an operand is not; the function then deals with NaN for such.
    """

    def __init__(
        self, function: Callable[[Site, Sequence[Array]], Array], *, partial: bool = False, annihilates: bool = False
    ) -> None:
        self.function = function
        self.partial = partial
        self.annihilates = annihilates

    def forward(self, site: Site) -> list[Flow]:
        """Broadcast units, constants and ties over the operands."""
        flows = site.flows()
        if not flows:  # of constants that are too large to fold
            return super().forward(site)
        arrays = [a for i in range(len(site.node.inputs)) if (a := site.array(i)) is not None]
        rank = max(n for group in ([f.rank for f in flows], [a.ndim for a in arrays]) for n in group)
        unranked = {v for v in site.node.inputs if v in site.trace.flows and v.shape is None}
        if len(flows) > 1 and any(site.trace.flows[v].rank == 0 for v in unranked):
            return site.give_up(f"the rank of an operand is not known at {site.label}")
        lifted = [f.ids.reshape((1,) * (rank - f.rank) + f.ids.shape) for f in flows]
        main = max(lifted, key=lambda ids: ids.size)
        if any(other.size != 1 and other.shape != main.shape for other in lifted):
            return site.give_up(f"operands vary along different axes at {site.label}")
        for flow, other in zip(flows, lifted, strict=True):
            if other.size == main.size or not _broadcasts(flow, main):
                site.tie(other, main)
        for index in range(len(site.node.inputs)):
            self._constant_axes(site, index, main)
        return [Flow(site.out_shape(), main, fit(self._const(site, rank), main.shape)) for _ in site.node.outputs]

    def _const(self, site: Site, rank: int) -> NDArray[np.float64]:
        operands = [_data(site, i) for i in range(len(site.node.inputs))]
        arrays = [np.full((), np.nan) if o is None else o for o in operands]
        if self.annihilates or not any(np.isnan(f.const).all() for f in site.flows()):
            result = self._value(site, arrays)
            if not self.annihilates:  # a comparison with an unknown operand would pass for a known False
                unknown = [np.isnan(f.const) for f in site.flows()]
                result = np.where(np.logical_or.reduce(np.broadcast_arrays(*unknown)), np.nan, result)
            return result.reshape((1,) * (rank - result.ndim) + result.shape)
        return np.full((1,) * rank, np.nan)

    def _value(self, site: Site, arrays: Sequence[Array]) -> NDArray[np.float64]:
        """Return the function's value, NaN where a type or another rounding of the operands gives another number."""
        with np.errstate(all="ignore"):
            result = finite(np.asarray(self.function(site, arrays), np.float64))
            result = np.where(_is_stored(result, site.result.dtype), result, np.nan)
            steps = [_rounding(site, k) * (-1) ** k for k in range(len(arrays))]
            smooth = 16 * np.max(np.abs(steps)) * reduce(np.fmax, [np.abs(a) for a in (result, *arrays)])
            for up in (1, -1):
                moved = self.function(site, [a * (1 + up * step) for a, step in zip(arrays, steps, strict=True)])
                result = np.where(np.abs(moved - result) > smooth, np.nan, result)
        return result

    def _constant_axes(self, site: Site, index: int, main: NDArray[np.int64]) -> None:
        array = site.array(index)
        if array is None:
            return
        for axis in range(array.ndim):
            place = main.ndim - array.ndim + axis
            if array.shape[axis] > 1 and main.shape[place] > 1:
                site.use_axis(index, axis, _line(main, place))
            elif array.shape[axis] > 1:
                site.use_axis(index, axis, np.zeros(array.shape[axis], np.int64))

    def backward(self, site: Site, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """A live output element needs each operand at its position."""
        needs: list[NDArray[np.bool_] | None] = []
        for index in range(len(site.node.inputs)):
            flow = site.flow(index)
            if flow is None:
                needs.append(None)
            elif self.partial and not self._alone(site):
                needs.append(np.ones(flow.ids.shape, np.bool_))
            else:
                needs.append(spread(self._needed(site, index, live[0]), flow.ids.shape))
        return needs

    def _needed(self, site: Site, index: int, live: NDArray[np.bool_]) -> NDArray[np.bool_]:
        del site, index
        return live

    @staticmethod
    def _alone(site: Site) -> bool:
        """Tell whether the first operand is the only activation."""
        return site.flow(0) is not None and len(site.flows()) == 1

    def regret(self, site: Site, cut: Cut) -> dict[int, tuple[NDArray[np.bool_], str]]:
        """A channel that stays behind a partial function must keep its value."""
        if not self.partial or not self._alone(site) or cut.gone(site.result):
            return {}
        spoiled = cut.stays(site.source) & ~cut.live(site.source)
        return {0: (spoiled, f"{site.label} is not finite everywhere")} if spoiled.any() else {}

    def rewrite(self, site: Site, cut: Cut) -> None:
        """Cut constant operands along the axes that count units."""
        kept = cut.kept(site.result)
        rank = site.trace.flows[site.result].rank
        for index in range(len(site.node.inputs)):
            array = site.array(index)
            if array is None:
                continue
            lines = {axis - (rank - array.ndim): keep for axis, keep in kept.items()}
            cut.constant(site.node, index, {a: k for a, k in lines.items() if a >= 0 and array.shape[a] > 1})

    def use(self, site: Site, live: list[NDArray[np.bool_]]) -> dict[int, Use]:
        """A constant operand is dead where its output channel is."""
        uses = {}
        for index in range(len(site.node.inputs)):
            array = site.array(index)
            if array is not None and array.ndim:
                dead = ~spread(live[0], tuple(max(1, n) for n in array.shape)[-live[0].ndim :])
                uses[index] = Use(np.broadcast_to(dead, array.shape), np.zeros(array.shape, np.bool_))
        return uses


class Product(Elementwise):
    """Mul: an operand is not needed where the other one is always zero."""

    def __init__(self) -> None:
        super().__init__(lambda _, x: np.where((x[0] == 0) | (x[1] == 0), 0.0, x[0] * x[1]), annihilates=True)

    def forward(self, site: Site) -> list[Flow]:
        """Treat as elementwise, unless zero times a constant is NaN."""
        arrays = [a for i in (0, 1) if (a := site.array(i)) is not None]
        if not all(np.isfinite(a).all() for a in arrays):
            return Rule.forward(self, site)
        return super().forward(site)

    def _needed(self, site: Site, index: int, live: NDArray[np.bool_]) -> NDArray[np.bool_]:
        data = [_data(site, i) for i in (0, 1)]
        this, other = data[index], data[1 - index]
        if other is None or this is None:
            return live
        zero = (other == 0) if index == 0 else (other == 0) & (this != 0)
        rank = live.ndim
        zero = zero.reshape((1,) * (rank - zero.ndim) + zero.shape)
        # Only a zero at every position that this channel covers makes the other operand irrelevant.
        return np.asarray(live & (fit(zero.astype(np.float64), live.shape) != 1))


class Quotient(Elementwise):
    """Div: partial unless the divisor is a constant without zeros."""

    def __init__(self) -> None:
        super().__init__(lambda _, x: x[0] / x[1])

    def backward(self, site: Site, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """A divisor that is an activation must keep its value wherever it stays."""
        divisor = site.array(1)
        if divisor is not None and (divisor != 0).all():
            return super().backward(site, live)
        return Rule.backward(self, site, live)


def unary(function: Function, *, partial: bool = False) -> Elementwise:
    """Make the rule of an operator of one activation without attributes that matter."""
    return Elementwise(lambda _, x: function(x[0]), partial=partial)


def with_attributes(function: Function, **defaults: float) -> Elementwise:
    """Make the rule of an activation with float attributes, given with the defaults that ONNX states."""

    def value(site: Site, x: Sequence[Array]) -> Array:
        return function(x[0], *(site.node.attributes.get_float(k, d) for k, d in defaults.items()))

    return Elementwise(value)


def nary(function: Function) -> Elementwise:
    """Make the rule of an operator with broadcasting operands."""
    return Elementwise(lambda _, x: function(*x))


class Pool(Rule):
    """An operator that works on each channel by itself over the remaining axes.

    Args:
        keeps_constant: Given the site, whether a non-zero constant map stays that constant; zero always stays zero.
        mixes: Given the site, the axes it works over, all but the first two where None.
        keeps_zero: A map of zeros stays one.
        aligned: Constant operands broadcast with the first, as a scale does; a grid or a list of regions does not.
        twins: Further outputs hold the same channels as the first, their numbers not being known.
    """

    def __init__(
        self,
        keeps_constant: Callable[[Site], bool] = lambda _: True,
        mixes: Callable[[Site], Sequence[int]] | None = None,
        *,
        keeps_zero: bool = True,
        aligned: bool = True,
        twins: bool = False,
    ) -> None:
        self.keeps_constant = keeps_constant
        self.keeps_zero = keeps_zero
        self.mixes = mixes
        self.aligned = aligned
        self.twins = twins

    def forward(self, site: Site) -> list[Flow]:
        """Pass units on; pin those along the axes that are mixed."""
        flow = site.flow(0)
        if flow is None:
            return super().forward(site)
        axes = range(2, flow.rank) if self.mixes is None else [a % max(flow.rank, 1) for a in self.mixes(site)]
        if set(varying(flow.ids)) & set(axes):
            return super().forward(site)
        if not self.twins and any(is_read(v) for v in site.node.outputs[1:]):
            return super().forward(site)
        if self.aligned and any(_counts(site.array(k), flow) for k in range(1, len(site.node.inputs))):
            return super().forward(site)
        site.pin_parameters()
        const = flow.const if self.keeps_constant(site) else np.where(flow.const == 0, 0.0, np.nan)
        const = const if self.keeps_zero else np.full(const.shape, np.nan)
        first = Flow(site.out_shape(), flow.ids, const)
        if self.twins:
            unknown = np.full(const.shape, np.nan)
            return [first, *(Flow(site.out_shape(k), flow.ids, unknown) for k in range(1, len(site.node.outputs)))]
        return [first, *(site.trace.unknown_flow(v) for v in site.node.outputs[1:])]

    def backward(self, site: Site, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """A channel is needed where an output of it is."""
        flags = np.logical_or.reduce(live) if self.twins else live[0]
        return [flags, *super().backward(site, live)[1:]]


def _broadcasts(flow: Flow, main: NDArray[np.int64]) -> bool:
    """Tell whether an operand of one unit has length 1, and not one unit for many elements, where units vary."""
    if not flow.rank:  # a number: tensors of unknown rank have been refused
        return True
    if len(flow.shape) != flow.rank:
        return False
    offset = main.ndim - flow.rank
    return all(axis < offset or flow.shape[axis - offset] == 1 for axis in varying(main))


def _rounding(site: Site, index: int) -> float:
    """Return by how much of itself an activation may differ from its float64 value: some 30 roundings of its type."""
    value = site.node.inputs[index]
    if site.flow(index) is None or value is None or value.dtype is None or not value.dtype.is_floating_point():
        return 0.0
    return 2.0**-18 if value.dtype.itemsize > 2 else 2.0**-7


def _is_stored(values: NDArray[np.float64], dtype: ir.DataType | None) -> NDArray[np.bool_]:
    """Tell which numbers a type holds: integers exactly (quotients are cut, products wrap), floats as finite."""
    if dtype is None:
        return np.isfinite(values)
    with np.errstate(all="ignore"):
        stored = values.astype(dtype.numpy()).astype(np.float64)
    return np.asarray(stored == values if dtype.is_integer() else np.isfinite(stored))


def _counts(array: Array | None, flow: Flow) -> bool:
    """Tell whether a constant operand, aligned at the last axis, has an entry of its own for each unit."""
    return array is not None and any(
        k >= flow.rank - array.ndim and array.shape[k - flow.rank] > 1 for k in varying(flow.ids)
    )


def _data(site: Site, index: int) -> NDArray[np.float64] | None:
    """Return an operand's known values: a constant's numbers or an activation's constants."""
    flow = site.flow(index)
    if flow is not None:
        return flow.const
    array = site.array(index)
    return None if array is None or array.dtype.kind in "cOSU" else array.astype(np.float64)


def _line(main: NDArray[np.int64], axis: int) -> NDArray[np.int64]:
    """Return the units along one axis, PINNED where they vary along others too."""
    others = [k for k in varying(main) if k != axis]
    return np.zeros(main.shape[axis], np.int64) if others else main.reshape(-1)
