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

from relief_export.graph.channels import fit, undo_broadcast, varying
from relief_export.graph.initializers import is_read
from relief_export.graph.rules.base import ChannelFacts, NodeContext, ParameterUse, Rule

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from relief_export.graph.rewrite import RemovalPlan

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
        self,
        function: Callable[[NodeContext, Sequence[Array]], Array],
        *,
        partial: bool = False,
        annihilates: bool = False,
    ) -> None:
        self.function = function
        self.partial = partial
        self.annihilates = annihilates

    def forward(self, ctx: NodeContext) -> list[ChannelFacts]:
        """Broadcast units, constants and ties over the operands."""
        facts_of = ctx.activations()
        if not facts_of:  # of constants that are too large to fold
            return super().forward(ctx)
        arrays = [a for i in range(len(ctx.node.inputs)) if (a := ctx.array(i)) is not None]
        rank = max(n for group in ([f.rank for f in facts_of], [a.ndim for a in arrays]) for n in group)
        unranked = {v for v in ctx.node.inputs if v in ctx.walk.facts_of and v.shape is None}
        if len(facts_of) > 1 and any(ctx.walk.facts_of[v].rank == 0 for v in unranked):
            return ctx.give_up(f"the rank of an operand is not known at {ctx.label}")
        lifted = [f.ids.reshape((1,) * (rank - f.rank) + f.ids.shape) for f in facts_of]
        main = max(lifted, key=lambda ids: ids.size)
        # Operands along different axes would give each element two units, and it can have only one.
        if any(other.size != 1 and other.shape != main.shape for other in lifted):
            return ctx.give_up(f"operands vary along different axes at {ctx.label}")
        for facts, other in zip(facts_of, lifted, strict=True):
            # An operand whose length really is 1 serves all channels alike and does not mind losing some.
            if other.size == main.size or not _broadcasts(facts, main):
                ctx.tie(other, main)
        for index in range(len(ctx.node.inputs)):
            self._constant_axes(ctx, index, main)
        return [ChannelFacts(ctx.out_shape(), main, fit(self._const(ctx, rank), main.shape)) for _ in ctx.node.outputs]

    def _const(self, ctx: NodeContext, rank: int) -> NDArray[np.float64]:
        operands = [_data(ctx, i) for i in range(len(ctx.node.inputs))]
        arrays = [np.full((), np.nan) if o is None else o for o in operands]
        # Where nothing is known of one operand, nothing is known of the result unless a zero decides it.
        if self.annihilates or not any(np.isnan(f.const).all() for f in ctx.activations()):
            result = self._value(ctx, arrays)
            if not self.annihilates:  # a comparison with an unknown operand would pass for a known False
                unknown = [np.isnan(f.const) for f in ctx.activations()]
                result = np.where(np.logical_or.reduce(np.broadcast_arrays(*unknown)), np.nan, result)
            return result.reshape((1,) * (rank - result.ndim) + result.shape)
        return np.full((1,) * rank, np.nan)

    def _value(self, ctx: NodeContext, arrays: Sequence[Array]) -> NDArray[np.float64]:
        """Return the function's value, NaN where a type or another rounding of the operands gives another number."""
        with np.errstate(all="ignore"):
            result = finite(np.asarray(self.function(ctx, arrays), np.float64))
            result = np.where(_is_stored(result, ctx.result.dtype), result, np.nan)
            # Neighbours move in opposite directions: moved alike, two equal operands would still compare equal.
            steps = [_rounding(ctx, k) * (-1) ** k for k in range(len(arrays))]
            # A smooth function moves about as much as its operands do. More than this means a jump in between.
            smooth = 16 * np.max(np.abs(steps)) * reduce(np.fmax, [np.abs(a) for a in (result, *arrays)])
            for up in (1, -1):
                moved = self.function(ctx, [a * (1 + up * step) for a, step in zip(arrays, steps, strict=True)])
                result = np.where(np.abs(moved - result) > smooth, np.nan, result)
        return result

    def _constant_axes(self, ctx: NodeContext, index: int, main: NDArray[np.int64]) -> None:
        array = ctx.array(index)
        if array is None:
            return
        for axis in range(array.ndim):
            place = main.ndim - array.ndim + axis
            if array.shape[axis] > 1 and main.shape[place] > 1:
                ctx.use_axis(index, axis, _line(main, place))
            elif array.shape[axis] > 1:
                ctx.use_axis(index, axis, np.zeros(array.shape[axis], np.int64))

    def backward(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """A live output element needs each operand at its position."""
        needs: list[NDArray[np.bool_] | None] = []
        for index in range(len(ctx.node.inputs)):
            facts = ctx.facts(index)
            if facts is None:
                needs.append(None)
            elif self.partial and not self._alone(ctx):
                needs.append(np.ones(facts.ids.shape, np.bool_))
            else:
                needs.append(undo_broadcast(self._needed(ctx, index, live[0]), facts.ids.shape))
        return needs

    def _needed(self, ctx: NodeContext, index: int, live: NDArray[np.bool_]) -> NDArray[np.bool_]:
        del ctx, index
        return live

    @staticmethod
    def _alone(ctx: NodeContext) -> bool:
        """Tell whether the first operand is the only activation."""
        return ctx.facts(0) is not None and len(ctx.activations()) == 1

    def must_stay_live(self, ctx: NodeContext, plan: RemovalPlan) -> dict[int, tuple[NDArray[np.bool_], str]]:
        """A channel that stays behind a partial function must keep its value."""
        if not self.partial or not self._alone(ctx) or plan.gone(ctx.result):
            return {}
        spoiled = plan.stays(ctx.source) & ~plan.live(ctx.source)
        return {0: (spoiled, f"{ctx.label} is not finite everywhere")} if spoiled.any() else {}

    def rewrite(self, ctx: NodeContext, plan: RemovalPlan) -> None:
        """Cut constant operands along the axes that count units."""
        kept = plan.kept(ctx.result)
        rank = ctx.walk.facts_of[ctx.result].rank
        for index in range(len(ctx.node.inputs)):
            array = ctx.array(index)
            if array is None:
                continue
            lines = {axis - (rank - array.ndim): keep for axis, keep in kept.items()}
            plan.constant(ctx.node, index, {a: k for a, k in lines.items() if a >= 0 and array.shape[a] > 1})

    def use(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> dict[int, ParameterUse]:
        """A constant operand is dead where its output channel is."""
        uses = {}
        for index in range(len(ctx.node.inputs)):
            array = ctx.array(index)
            if array is not None and array.ndim:
                dead = ~undo_broadcast(live[0], tuple(max(1, n) for n in array.shape)[-live[0].ndim :])
                uses[index] = ParameterUse(np.broadcast_to(dead, array.shape), np.zeros(array.shape, np.bool_))
        return uses


class Product(Elementwise):
    """Mul: an operand is not needed where the other one is always zero."""

    def __init__(self) -> None:
        # An unknown operand is NaN, and zero times it must be zero all the same.
        super().__init__(lambda _, x: np.where((x[0] == 0) | (x[1] == 0), 0.0, x[0] * x[1]), annihilates=True)

    def forward(self, ctx: NodeContext) -> list[ChannelFacts]:
        """Treat as elementwise, unless zero times a constant is NaN."""
        arrays = [a for i in (0, 1) if (a := ctx.array(i)) is not None]
        if not all(np.isfinite(a).all() for a in arrays):
            return Rule.forward(self, ctx)
        return super().forward(ctx)

    def _needed(self, ctx: NodeContext, index: int, live: NDArray[np.bool_]) -> NDArray[np.bool_]:
        data = [_data(ctx, i) for i in (0, 1)]
        this, other = data[index], data[1 - index]
        if other is None or this is None:
            return live
        # Where both are zero the second is needed, or neither would be and the product might become anything.
        zero = (other == 0) if index == 0 else (other == 0) & (this != 0)
        rank = live.ndim
        zero = zero.reshape((1,) * (rank - zero.ndim) + zero.shape)
        # Only a zero at every position that this channel covers makes the other operand irrelevant.
        return np.asarray(live & (fit(zero.astype(np.float64), live.shape) != 1))


class Quotient(Elementwise):
    """Div: partial unless the divisor is a constant without zeros."""

    def __init__(self) -> None:
        super().__init__(lambda _, x: x[0] / x[1])

    def backward(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """A divisor that is an activation must keep its value wherever it stays."""
        divisor = ctx.array(1)
        if divisor is not None and (divisor != 0).all():
            return super().backward(ctx, live)
        return Rule.backward(self, ctx, live)


def unary(function: Function, *, partial: bool = False) -> Elementwise:
    """Make the rule of an operator of one activation without attributes that matter."""
    return Elementwise(lambda _, x: function(x[0]), partial=partial)


def with_attributes(function: Function, **defaults: float) -> Elementwise:
    """Make the rule of an activation with float attributes, given with the defaults that ONNX states."""

    def value(ctx: NodeContext, x: Sequence[Array]) -> Array:
        return function(x[0], *(ctx.node.attributes.get_float(k, d) for k, d in defaults.items()))

    return Elementwise(value)


def nary(function: Function) -> Elementwise:
    """Make the rule of an operator with broadcasting operands."""
    return Elementwise(lambda _, x: function(*x))


class PerChannel(Rule):
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
        keeps_constant: Callable[[NodeContext], bool] = lambda _: True,
        mixes: Callable[[NodeContext], Sequence[int]] | None = None,
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

    def forward(self, ctx: NodeContext) -> list[ChannelFacts]:
        """Pass units on; pin those along the axes that are mixed."""
        facts = ctx.facts(0)
        if facts is None:
            return super().forward(ctx)
        axes = range(2, facts.rank) if self.mixes is None else [a % max(facts.rank, 1) for a in self.mixes(ctx)]
        if set(varying(facts.ids)) & set(axes):
            return super().forward(ctx)
        # Other outputs, such as a pooling's indices, need not follow the channels as the first one does.
        if not self.twins and any(is_read(v) for v in ctx.node.outputs[1:]):
            return super().forward(ctx)
        if self.aligned and any(_counts(ctx.array(k), facts) for k in range(1, len(ctx.node.inputs))):
            return super().forward(ctx)
        ctx.pin_parameters()
        const = facts.const if self.keeps_constant(ctx) else np.where(facts.const == 0, 0.0, np.nan)
        const = const if self.keeps_zero else np.full(const.shape, np.nan)
        first = ChannelFacts(ctx.out_shape(), facts.ids, const)
        if self.twins:
            unknown = np.full(const.shape, np.nan)
            return [
                first,
                *(ChannelFacts(ctx.out_shape(k), facts.ids, unknown) for k in range(1, len(ctx.node.outputs))),
            ]
        return [first, *(ctx.walk.unknown_facts(v) for v in ctx.node.outputs[1:])]

    def backward(self, ctx: NodeContext, live: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_] | None]:
        """A channel is needed where an output of it is."""
        flags = np.logical_or.reduce(live) if self.twins else live[0]
        return [flags, *super().backward(ctx, live)[1:]]


def _broadcasts(facts: ChannelFacts, main: NDArray[np.int64]) -> bool:
    """Tell whether an operand of one unit has length 1, and not one unit for many elements, where units vary."""
    if not facts.rank:  # a number: tensors of unknown rank have been refused
        return True
    if len(facts.shape) != facts.rank:
        return False
    offset = main.ndim - facts.rank
    return all(axis < offset or facts.shape[axis - offset] == 1 for axis in varying(main))


def _rounding(ctx: NodeContext, index: int) -> float:
    """Return by how much of itself an activation may differ from its float64 value: some 30 roundings of its type."""
    value = ctx.node.inputs[index]
    if ctx.facts(index) is None or value is None or value.dtype is None or not value.dtype.is_floating_point():
        return 0.0
    return 2.0**-18 if value.dtype.itemsize > 2 else 2.0**-7


def _is_stored(values: NDArray[np.float64], dtype: ir.DataType | None) -> NDArray[np.bool_]:
    """Tell which numbers a type holds: integers exactly (quotients are cut, products wrap), floats as finite."""
    if dtype is None:
        return np.isfinite(values)
    with np.errstate(all="ignore"):
        stored = values.astype(dtype.numpy()).astype(np.float64)
    return np.asarray(stored == values if dtype.is_integer() else np.isfinite(stored))


def _counts(array: Array | None, facts: ChannelFacts) -> bool:
    """Tell whether a constant operand, aligned at the last axis, has an entry of its own for each unit."""
    return array is not None and any(
        k >= facts.rank - array.ndim and array.shape[k - facts.rank] > 1 for k in varying(facts.ids)
    )


def _data(ctx: NodeContext, index: int) -> NDArray[np.float64] | None:
    """Return an operand's known values: a constant's numbers or an activation's constants."""
    facts = ctx.facts(index)
    if facts is not None:
        return facts.const
    array = ctx.array(index)
    return None if array is None or array.dtype.kind in "cOSU" else array.astype(np.float64)


def _line(main: NDArray[np.int64], axis: int) -> NDArray[np.int64]:
    """Return the units along one axis, PINNED where they vary along others too."""
    # A place on this axis holds many units then, and a constant can be cut only for one.
    others = [k for k in varying(main) if k != axis]
    return np.zeros(main.shape[axis], np.int64) if others else main.reshape(-1)
