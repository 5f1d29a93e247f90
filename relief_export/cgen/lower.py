"""From an ONNX model to a plan: the one place of the C generators that knows ONNX operators.

    plan = lower(model)                      # onnx_ir.Model of one input and one output, any opset from 13
    plan = lower(model, dims={"height": 32}) # symbolic axes other than the batch

The model is folded and shrunk first (graph/). Then its nodes are taken in order; ``_RULES`` has one entry for each
operator. What a node gives is one of three things: constants; a view of maps that exist (whatever only moves elements);
or a new step with its map. An elementwise node is put on the chain of the step that wrote its operand where nothing
else reads the number in between; where something does, it is kept in mind as a *lazy* chain, so that ``x · f(x)``
(SiLU, hard swish, Mish) is found when the product comes.

Source: ONNX operators, opsets 13 to 24; what ONNX Runtime computes where they leave a choice.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import onnx_ir as ir

from relief_export.cgen.plan import (
    ZERO,
    Constant,
    Convolution,
    Floats,
    Linear,
    Map,
    Move,
    Op,
    Plan,
    Pool,
    Reduce,
    Softmax,
    Step,
    View,
)
from relief_export.errors import InputError, UnsupportedModelError
from relief_export.graph.initializers import constant_array
from relief_export.graph.prepare import (
    data_inputs,
    fold,
    static_shape,
    with_dimensions,
    with_static_shapes,
)
from relief_export.graph.shrink import shrink
from relief_export.printing import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

ACTIVATIONS: dict[str, dict[str, float]] = {
    "Relu": {},
    "LeakyRelu": {"alpha": 0.01},
    "ThresholdedRelu": {"alpha": 1.0},
    "Sigmoid": {},
    "HardSigmoid": {"alpha": 0.2, "beta": 0.5},
    "HardSwish": {},
    "Tanh": {},
    "Elu": {"alpha": 1.0},
    "Celu": {"alpha": 1.0},
    "Selu": {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875},
    "Softplus": {},
    "Softsign": {},
    "Mish": {},
    "Erf": {},
    "Exp": {},
    "Abs": {},
    "Neg": {},
    "Reciprocal": {},
}
"""Activations with one operand -> their attributes, in the order of ``Op.constants``, and the defaults. ``Gelu`` and
``Clip`` have rules of their own: they become ``GeluErf``, ``GeluTanh`` and ``Clip``."""

_MONOTONE = frozenset({"Relu", "LeakyRelu", "Sigmoid", "Tanh", "Clip", "Elu", "Selu", "Softplus", "HardSigmoid"})
"""These commute with taking the greatest of several numbers (LeakyRelu for alpha >= 0)."""


def lower(model: ir.Model, *, dims: Mapping[str, int] | None = None, remove: bool = True) -> Plan:
    """Return the plan of a model at batch 1.

    Args:
        model: Any ONNX model of one input and one output; it is not changed.
        dims: Sizes of symbolic axes by name.
        remove: Remove disconnected neurons first; without it every layer keeps the weights that the model gives it.

    Raises:
        InputError: A symbolic axis has no size, or ``dims`` names one that is not there.
        UnsupportedModelError: The model has several inputs or outputs, a batch that is not 1, or a node that the
            generator has no code for; the message names it.
    """
    return _Lowering(_prepared(model, dims or {}, remove=remove)).run()


def _prepared(model: ir.Model, dims: Mapping[str, int], *, remove: bool) -> ir.Model:
    """Return a copy with static shapes at batch 1, folded and, if wanted, shrunk."""
    inputs = data_inputs(model)
    if len(inputs) != 1 or len(model.graph.outputs) != 1:
        raise UnsupportedModelError(
            f"the model has {counted(len(inputs), 'input')} and {counted(len(model.graph.outputs), 'output')}: "
            "the c format takes models of one input and one output"
        )
    bound = with_dimensions(model, dims) if dims else model
    static = with_static_shapes(bound)
    (value,) = data_inputs(static)
    if value.shape is None or not value.shape.is_static():
        raise InputError(f"input {value.name!r} has shape {value.shape}: give its sizes with --dim NAME=SIZE")
    if len(value.shape) and value.shape[0] != 1:
        raise UnsupportedModelError(
            f"input {value.name!r} has shape {value.shape}: the c format runs one sample at a time, "
            "so export the model with a batch of 1 or a symbolic one"
        )
    if value.dtype not in {ir.DataType.FLOAT, ir.DataType.FLOAT16}:
        raise UnsupportedModelError(f"input {value.name!r} is {value.dtype}: the c format takes floats")
    # Sizes come first: what a model computes from its shapes can be folded only then.
    folded = fold(static)
    return shrink(folded).model if remove else folded


@dataclass(eq=False)
class _Value:
    """What stands for an ONNX value that is not constant.

    Attributes:
        view: Its elements, or None while ``lazy`` has not become a step.
        owner: The step that wrote exactly this, whole and in order, if its chain may still grow.
        lazy: (the value that the chain begins at, its first node, the chain), of an elementwise node that could not
            join the step before it.
    """

    view: View | None
    owner: Step | None = None
    lazy: tuple[ir.Value, ir.Node, tuple[Op, ...]] | None = None

    @property
    def elements(self) -> View:
        """Return the elements of a value that is not lazy."""
        assert self.view is not None  # noqa: S101  # the caller knows
        return self.view


class _Lowering:
    """Walks a graph once and collects maps and steps."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.opset = model.opset_imports.get("", 13)
        self.values: dict[ir.Value, _Value] = {}
        self.constants: dict[ir.Value, NDArray[Any]] = {}
        self.maps: list[Map] = []
        self.steps: list[Step] = []
        self.elements = 0

    def run(self) -> Plan:
        (given,) = data_inputs(self.model)
        (result,) = self.model.graph.outputs
        shape = static_shape(given) or ()
        self.values[given] = _Value(self.map(str(given.name), shape).view.reshape(shape))
        for node in self.model.graph:
            self._take(node)
        view = self._output(result)
        if view.shape[:1] != (1,):
            raise UnsupportedModelError(
                f"output {result.name!r} has shape {view.shape} for one sample, with no batch axis in front: "
                "export the model with one"
            )
        plan = Plan(str(given.name), str(result.name), shape, view.shape, self.maps, self.steps, view.ravel())
        # Only now are the chains complete, so that factors are folded last: a later node, or a pool that is fused, may
        # have added to an earlier step's.
        self._fuse_pools(plan)
        self._drop_unread(plan)
        for step in self.steps:
            _fold_affine(step)
        return plan

    def _output(self, result: ir.Value) -> View:
        constant = self.constant(result)
        if constant is None:
            return self.view(result)
        return self.table(str(result.name), constant)

    def _take(self, node: ir.Node) -> None:
        rule = _RULES.get(node.op_type) if node.domain in {"", "ai.onnx"} else None
        inputs = [v for v in node.inputs if v is not None]
        # This comes before the check of the operator: on constants any operator will do. A node without inputs counts
        # too.
        if all(self.constant(v) is not None for v in inputs):
            self._evaluate(node)
            return
        if node.op_type == "Shape" and node.domain == "" and inputs[0] in self.values:
            sizes = np.array(self.shape(inputs[0]), np.int64)  # all shapes are static here
            self.constants[node.outputs[0]] = sizes[
                node.attributes.get_int("start", 0) : node.attributes.get_int("end")
            ]
            return
        if rule is None:
            self.refuse(node, "the c format has no code for this operator")
        results = rule(self, node)
        for output, found in zip(node.outputs, results if isinstance(results, tuple) else (results,), strict=False):
            self.values[output] = found if isinstance(found, _Value) else _Value(found)

    def refuse(self, node: ir.Node, reason: str) -> NoReturn:
        name = node.name or next((v.name for v in node.outputs), "")
        operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        raise UnsupportedModelError(f"node {name!r} ({operator}): {reason}")

    # What nodes read --------------------------------------------------------------------------------------------------

    def constant(self, value: ir.Value | None) -> NDArray[Any] | None:
        """Return the array of a value that is known, or None."""
        if value is None:
            return None
        return self.constants[value] if value in self.constants else constant_array(value)

    def array(self, node: ir.Node, index: int, what: str) -> NDArray[Any] | None:
        """Return a constant operand, None where the node has none; refuse a computed one."""
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return None
        found = self.constant(value)
        if found is None:
            self.refuse(node, f"{what} {value.name!r} is computed by the network; the c format takes constants")
        return found

    def required(self, node: ir.Node, index: int, what: str) -> NDArray[Any]:
        """Return a constant operand that the operator cannot be without."""
        found = self.array(node, index, what)
        if found is None:
            self.refuse(node, f"it has no {what}")
        return found

    def operand(self, node: ir.Node, index: int = 0) -> ir.Value:
        """Return an operand that the operator cannot be without."""
        value = node.inputs[index]
        if value is None:
            self.refuse(node, f"it has no operand {index}")
        return value

    def view(self, value: ir.Value) -> View:
        """Return the elements of a computed value; what was kept in mind becomes a step now."""
        found = self.values[value]
        if found.view is None:
            assert found.lazy is not None  # noqa: S101  # one of the two is there
            base, node, chain = found.lazy
            view = self.view(base)
            step = self.step(Move, node.name or str(value.name), view.shape, source=_shaped(view), chain=list(chain))
            found.view, found.owner, found.lazy = step.out.view.reshape(view.shape), step, None
        return found.view

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        """Return the shape of a computed value; nothing becomes a step."""
        found = self.values[value]
        while found.view is None:
            assert found.lazy is not None  # noqa: S101  # one of the two is there
            found = self.values[found.lazy[0]]
        return found.view.shape

    def renamed(self, value: ir.Value, view: View) -> _Value:
        """Return a view of ``value`` that its step may go on growing under, if nothing else reads it."""
        owner = self.values[value].owner
        sole = len(value.uses()) == 1 and not value.is_graph_output()
        # A transposed or cut view would put the next chain's channels on the wrong elements of the owner's map.
        same = owner is not None and sole and _is_whole(view) and _geometry(view.shape) == owner.out.shape
        return _Value(view, owner if same else None)

    def place(self, step: Step) -> int:
        """Return when a step runs."""
        # Searched for each time, because steps are inserted in front and an index that was remembered would be wrong.
        return next(k for k, other in enumerate(self.steps) if other is step)

    def so_far(self, view: View) -> Plan:
        """Return the plan as it stands, to ask it about views."""
        return Plan("", "", (), (), self.maps, self.steps, view)

    def written(self, view: View) -> int:
        """Return when the last of the maps that a view consists of is written; -1 is the input."""
        used = {self.maps[k].start for k in np.unique(self.so_far(view).locate(view)[0]) if k >= 0}
        return max((k for k, step in enumerate(self.steps) if step.out.start in used), default=-1)

    def table(self, name: str, array: NDArray[Any]) -> View:
        """Return a view of constants."""
        made = Constant(name, self.map(name, array.shape), array.astype(np.float32))
        made.values = made.values.reshape(made.out.shape)
        self.steps.insert(0, made)  # known before anything runs
        return made.out.view.reshape(array.shape)

    def _evaluate(self, node: ir.Node) -> None:
        """Compute a node of constants, as folding leaves them where they are large."""
        from onnx.reference import ReferenceEvaluator  # noqa: PLC0415  # slow to import and rarely needed

        proto = ir.to_proto(node)
        feeds = {str(v.name): self.constant(v) for v in node.inputs if v is not None}
        outputs: Any = ReferenceEvaluator(proto).run(None, feeds)
        self.constants |= dict(zip(node.outputs, outputs, strict=False))

    # What nodes write -------------------------------------------------------------------------------------------------

    def map(self, name: str, shape: Sequence[int]) -> Map:
        made = Map(name, *_geometry(shape), self.elements)
        self.elements += made.size
        self.maps.append(made)
        return made

    def step(self, kind: type[Step], name: str, shape: Sequence[int], /, **fields: Any) -> Any:  # noqa: ANN401
        made = kind(name, self.map(name, shape), **fields)
        self.steps.append(made)
        return made

    def new(self, node: ir.Node, kind: type[Step], shape: Sequence[int], /, **fields: Any) -> _Value:  # noqa: ANN401
        """Add a step for a node and return its value, of the given shape."""
        step = self.step(kind, node.name or str(node.outputs[0].name), shape, **fields)
        return _Value(step.out.view.reshape(shape), step)

    def planes(self, view: View, name: str) -> View:
        """Return a view (C, H, W) of whole planes: the one given, or a copy."""
        # A slice from the upper left corner counts as whole planes too, so the sizes are compared as well.
        found = self.so_far(view).planes(view)
        if found is not None and found.whole:
            sizes = {self.maps[k].shape[1:] for k in found.maps if k >= 0}
            if sizes <= {view.shape[1:]}:
                return view
        step: Step = self.step(Move, name, (1, *view.shape), source=view)
        return step.out.view

    def _fuse_pools(self, plan: Plan) -> None:
        """Let a convolution do the 2 x 2 max-pooling that alone reads its map."""
        # Counts and numbers are those of the maps before the loop, which removes some of them.
        readers: dict[int, int] = {}
        for view in itertools.chain(*(s.views() for s in self.steps), (plan.output,)):
            for k in np.unique(plan.locate(view)[0]):
                readers[int(k)] = readers.get(int(k), 0) + 1
        writers = {step.out.start: step for step in self.steps}
        numbers = {m.start: k for k, m in enumerate(self.maps)}
        for pool in [s for s in self.steps if isinstance(s, Pool)]:
            before = writers.get(int(pool.source[0, 0, 0]))
            plain = (pool.kind, pool.kernel, pool.strides) == ("max", (2, 2), (2, 2)) and not any(pool.pads)
            if not plain or not isinstance(before, Convolution) or readers[numbers[before.out.start]] != 1:
                continue
            # A negative slope would turn the greatest into the smallest. A Clip with a negative lower bound is left out
            # with it, which costs only speed. What stands before the pool counts as well: a back end may take the
            # greatest first and work on that one alone, as the one for microcontrollers does.
            chain = [*before.chain, *pool.chain]
            monotone = all(op.kind in _MONOTONE and not any(c < 0 for c in op.constants[:1]) for op in chain)
            whole = np.array_equal(pool.source, before.out.view)
            if (
                whole
                and monotone
                and not before.pool
                and pool.out.shape[1:] == tuple(n // 2 for n in pool.source.shape[1:])
            ):
                before.chain += pool.chain
                self.maps[:] = [m for m in self.maps if m is not before.out]
                before.out, before.pool = pool.out, True
                self.steps[:] = [other for other in self.steps if other is not pool]

    def _drop_unread(self, plan: Plan) -> None:
        """Remove the steps whose maps nothing reads, last first."""
        # The input's map stays even where nothing reads it: the back ends take the first map for it.
        live = {0} | {int(k) for k in np.unique(plan.locate(plan.output)[0])}
        for step in reversed(list(self.steps)):
            number = next(k for k, m in enumerate(self.maps) if m is step.out)
            if number in live:
                live.update(int(k) for view in step.views() for k in np.unique(plan.locate(view)[0]))
            else:
                self.steps[:] = [other for other in self.steps if other is not step]
        kept = [m for k, m in enumerate(self.maps) if k in live]
        self.maps[:] = kept


# Shapes and views -----------------------------------------------------------------------------------------------------


def _geometry(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return channels, height and width of a map for values of a shape: a batch of 1 is left out."""
    sizes = tuple(shape[1:]) if len(shape) > 1 and shape[0] == 1 else tuple(shape)
    if len(sizes) == 2:
        return sizes[0], 1, sizes[1]
    if len(sizes) < 2:
        return math.prod(sizes), 1, 1
    return sizes[0], math.prod(sizes[1:-1]), sizes[-1]


def _shaped(view: View) -> View:
    return view.reshape(_geometry(view.shape))


def _is_whole(view: View) -> bool:
    flat = view.ravel()
    return bool(flat.size) and flat[0] >= 0 and np.array_equal(flat, np.arange(flat[0], flat[0] + flat.size))


def _spatial(low: _Lowering, node: ir.Node, view: View) -> View:
    """Return a view (C, H, W) of an operand (1, C, W) or (1, C, H, W)."""
    if view.ndim not in {3, 4} or view.shape[0] != 1:
        low.refuse(node, f"its operand has shape {view.shape}; the c format takes one- and two-dimensional maps")
    return _geometry_view(view)


def _geometry_view(view: View) -> View:
    return view.reshape(view.shape[1], *((1,) if view.ndim == 3 else ()), *view.shape[2:])


def _unspatial(rank: int, value: _Value) -> _Value:
    """Drop the height of a value (1, C, 1, W) that stands for a one-dimensional map (1, C, W)."""
    return replace(value, view=value.elements[:, :, 0]) if rank == 3 else value


def _ints(node: ir.Node, name: str, default: Sequence[int]) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints(name, tuple(default)) or default)


def _windows(
    low: _Lowering, node: ir.Node, kernel: Sequence[int], size: Sequence[int]
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int], tuple[int, int]]:
    """Return kernel, strides, pads and dilations of a windowed node in two dimensions."""
    rank = len(kernel)
    strides, dilations = _ints(node, "strides", [1] * rank), _ints(node, "dilations", [1] * rank)
    pads = _ints(node, "pads", [0] * 2 * rank)
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    if auto in {"SAME_UPPER", "SAME_LOWER"}:
        total = [
            max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            for n, s, k, d in zip(size[-rank:], strides, kernel, dilations, strict=True)
        ]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = (*small, *large) if auto == "SAME_UPPER" else (*large, *small)
    elif auto == "VALID":
        pads = (0,) * (2 * rank)
    if rank == 1:
        return (1, kernel[0]), (1, strides[0]), (0, pads[0], 0, pads[1]), (1, dilations[0])
    if rank != 2:
        low.refuse(node, f"its window has {rank} dimensions; the c format takes one or two")
    if min(pads) < 0:
        low.refuse(node, f"its padding {pads} is negative")
    return (
        (kernel[0], kernel[1]),
        (strides[0], strides[1]),
        (pads[0], pads[1], pads[2], pads[3]),
        (dilations[0], dilations[1]),
    )


# Rules: linear operators ----------------------------------------------------------------------------------------------


def _conv(low: _Lowering, node: ir.Node) -> _Value:
    source = low.view(low.operand(node))
    weight = low.required(node, 1, "weight")
    rank = source.ndim
    image = _spatial(low, node, source)
    kernel, strides, pads, dilations = _windows(low, node, weight.shape[2:], image.shape)
    weight = weight.astype(np.float32).reshape(*weight.shape[:2], *kernel)
    found = low.array(node, 2, "bias")
    bias = np.zeros(len(weight), np.float32) if found is None else found.astype(np.float32)
    groups = node.attributes.get_int("group", 1)
    # A step that joins no plan: it is made to ask for its extent before it is known what the node becomes.
    step = Convolution(node.name or "", Map("", 1, 1, 1, 0), image, weight, bias, strides, pads, dilations, groups)
    height, width = step.extent
    if min(height, width) < 1:
        low.refuse(node, f"its window is larger than its operand, {source.shape}")
    shape = (1, len(weight), height, width)
    # With one position each weight is used once, so that there is no sliding window to gain from.
    if (height, width) == (1, 1) and groups == 1:
        rows = np.arange(kernel[0]) * dilations[0] - pads[0]
        columns = np.arange(kernel[1]) * dilations[1] - pads[1]
        inside = np.ix_(
            np.arange(len(image)), np.clip(rows, 0, image.shape[1] - 1), np.clip(columns, 0, image.shape[2] - 1)
        )
        # Clipping only keeps the index legal: what lies in the padding is replaced by zeros.
        valid = np.outer((rows >= 0) & (rows < image.shape[1]), (columns >= 0) & (columns < image.shape[2]))
        window = np.where(valid, image[inside], ZERO)
        made = low.new(node, Linear, shape, source=window.ravel(), weight=weight.reshape(len(weight), -1), bias=bias)
        return _unspatial(rank, made)
    image = low.planes(image, f"operand of {node.name}")
    made = low.new(
        node, Convolution, shape, source=image, weight=weight, bias=bias, strides=strides, pads=pads,
        dilations=dilations, groups=groups,
    )  # fmt: skip
    return _unspatial(rank, made)


def _gemm(low: _Lowering, node: ir.Node) -> _Value:
    weight = low.required(node, 1, "weight")
    view = low.view(low.operand(node))
    view = view.T if node.attributes.get_int("transA", 0) else view
    rows = weight if node.attributes.get_int("transB", 0) else weight.T
    # In double precision, so that each weight is rounded once.
    rows = (rows.astype(np.float64) * node.attributes.get_float("alpha", 1.0)).astype(np.float32)
    third = low.array(node, 2, "bias")
    bias = np.zeros(1) if third is None else np.asarray(third, np.float64) * node.attributes.get_float("beta", 1.0)
    if bias.ndim > 1 and math.prod(bias.shape[:-1]) > 1:
        low.refuse(node, f"its bias has shape {bias.shape}; the c format takes one row")
    return _product(low, node, view, rows, np.broadcast_to(bias.ravel(), len(rows)))


def _product(low: _Lowering, node: ir.Node, view: View, rows: Floats, bias: NDArray[Any] | None = None) -> _Value:
    """Return ``view @ rows.T + bias`` for a view (..., N), rows (O, N) and a bias (O,)."""
    shape = (*view.shape[:-1], len(rows))
    count = math.prod(view.shape[:-1])
    rows = np.ascontiguousarray(rows, np.float32)
    bias = np.zeros(len(rows), np.float32) if bias is None else np.array(bias, np.float32)
    if count == 1:
        made = low.new(node, Linear, (1, len(rows)), source=view.ravel(), weight=rows, bias=bias)
        return replace(made, view=made.elements.reshape(shape))
    # Several rows share the weights: a 1 x 1 convolution over them.
    image = low.planes(view.reshape(count, -1).T[:, None], f"operand of {node.name}")
    made = low.new(
        node, Convolution, (1, len(rows), 1, count), source=image, weight=rows[:, :, None, None], bias=bias,
        strides=(1, 1), pads=(0, 0, 0, 0), dilations=(1, 1), groups=1,
    )  # fmt: skip
    return _Value(made.elements.reshape(len(rows), count).T.reshape(shape))


def _matmul(low: _Lowering, node: ir.Node) -> _Value:
    left, right = (low.constant(v) for v in node.inputs[:2])
    if right is not None and right.ndim == 2:
        return _product(low, node, low.view(low.operand(node)), right.T)
    if left is None or left.ndim != 2:
        low.refuse(node, "the c format multiplies by one constant matrix")
    view = low.view(low.operand(node, 1))
    if view.ndim < 2 or math.prod(view.shape[:-2]) != 1:
        low.refuse(node, f"its second operand has shape {view.shape}; the c format takes one matrix")
    made = _product(low, node, view.reshape(view.shape[-2:]).T, left)
    return _Value(made.elements.T.reshape(*view.shape[:-2], len(left), view.shape[-1]))


def _batch_norm(low: _Lowering, node: ir.Node) -> _Value:
    if node.attributes.get_int("training_mode", 0):
        low.refuse(node, "it is in training mode")
    parameters = [low.array(node, k, "parameter") for k in range(1, 5)]
    # In double precision, so that scale and shift are rounded once, at the end.
    gamma, beta, mean, variance = (np.asarray(p, np.float64) for p in parameters)
    scale = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    shift = beta - scale * mean
    return _elementwise(low, node, _affine(scale, shift))


# Rules: pooling -------------------------------------------------------------------------------------------------------


def _pool(low: _Lowering, node: ir.Node) -> _Value:
    view = low.view(low.operand(node))
    image = _spatial(low, node, view)
    kernel, strides, pads, dilations = _windows(low, node, _ints(node, "kernel_shape", ()), image.shape)
    if len(node.outputs) > 1 and node.outputs[1].uses():
        low.refuse(node, "its second output, the positions, is used")
    kind = "max"
    if node.op_type == "AveragePool":
        # Without padding both ways of counting are the same, and the plain one is simpler.
        kind = "mean-padded" if node.attributes.get_int("count_include_pad", 0) and any(pads) else "mean"
    ceil = node.attributes.get_int("ceil_mode", 0)
    extent = []
    for axis in range(2):
        span = image.shape[1 + axis] + pads[axis] + pads[2 + axis] - dilations[axis] * (kernel[axis] - 1) - 1
        size = span // strides[axis] + 1
        # A last window that would begin in the padding behind the map does not count.
        if ceil and span % strides[axis] and size * strides[axis] < image.shape[1 + axis] + pads[axis]:
            if kind == "mean-padded":
                low.refuse(node, "ceil_mode with count_include_pad is counted differently by different runtimes")
            size += 1
        extent.append(size)
    if min(extent) < 1:
        low.refuse(node, f"its window is larger than its operand, {view.shape}")
    image = low.planes(image, f"operand of {node.name}")
    made = low.new(
        node, Pool, (1, len(image), *extent), kind=kind, source=image, kernel=kernel, strides=strides, pads=pads,
        dilations=dilations,
    )  # fmt: skip
    return _unspatial(view.ndim, made)


_REDUCTIONS = {
    "ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "max", "GlobalAveragePool": "mean", "GlobalMaxPool": "max",
}  # fmt: skip


def _reduce(low: _Lowering, node: ir.Node) -> _Value:
    view = low.view(low.operand(node))
    keep = node.attributes.get_int("keepdims", 1) != 0
    if node.op_type.startswith("Global"):
        axes, keep = tuple(range(2, view.ndim)), True
    else:
        given = low.array(node, 1, "list of axes")
        axes = _ints(node, "axes", ()) if given is None else tuple(given.ravel().tolist())
        if not axes and node.attributes.get_int("noop_with_empty_axes", 0) == 1:
            return low.values[low.operand(node)]
        axes = tuple(a % view.ndim for a in axes) or tuple(range(view.ndim))
    rest = tuple(a for a in range(view.ndim) if a not in axes)
    moved = view.transpose(*rest, *axes)
    outside = math.prod(view.shape[a] for a in rest)
    plane = tuple(view.shape[a] for a in axes)
    image = moved.reshape(outside, *(plane if len(plane) == 2 else (1, math.prod(plane))))
    image = low.planes(image, f"operand of {node.name}")
    made = low.new(node, Reduce, (1, outside), kind=_REDUCTIONS[node.op_type], source=image)
    shape = tuple(1 if a in axes else n for a, n in enumerate(view.shape) if keep or a not in axes)
    return replace(made, view=made.elements.reshape(shape))


def _softmax(low: _Lowering, node: ir.Node) -> _Value:
    view = low.view(low.operand(node))
    axis = node.attributes.get_int("axis", -1) % view.ndim
    moved = np.moveaxis(view, axis, -1)
    source = moved.reshape(-1, 1, moved.shape[-1])
    made = low.new(node, Softmax, (1, *source.shape), source=source, logarithm=node.op_type == "LogSoftmax")
    shaped = np.moveaxis(made.elements.reshape(moved.shape), -1, axis)
    return _Value(shaped, made.owner if _is_whole(shaped) else None)


# Rules: elementwise ---------------------------------------------------------------------------------------------------


def _activation(low: _Lowering, node: ir.Node) -> _Value:
    defaults = ACTIVATIONS[node.op_type]
    constants = tuple(node.attributes.get_float(name, value) for name, value in defaults.items())
    return _elementwise(low, node, Op(node.op_type, constants))


def _gelu(low: _Lowering, node: ir.Node) -> _Value:
    tanh = node.attributes.get_string("approximate", "none") == "tanh"
    return _elementwise(low, node, Op("GeluTanh" if tanh else "GeluErf"))


def _clip(low: _Lowering, node: ir.Node) -> _Value:
    bounds = [low.array(node, k, "bound") for k in (1, 2)]
    limits = (-math.inf, math.inf)
    low_high = tuple(
        limit if b is None else float(np.asarray(b).ravel()[0]) for b, limit in zip(bounds, limits, strict=True)
    )
    return _elementwise(low, node, Op("Clip", low_high))


def _swish(low: _Lowering, node: ir.Node) -> _Value:
    alpha = node.attributes.get_float("alpha", 1.0)
    inner = [Op("Sigmoid")]
    if alpha != 1:
        width = _geometry(low.view(low.operand(node)).shape)[0]
        inner.insert(0, _affine(np.full(width, alpha), np.zeros(width)))
    return _elementwise(low, node, Op("Gate", inner=tuple(inner)))


def _prelu(low: _Lowering, node: ir.Node) -> _Value:
    slope = low.required(node, 1, "slope")
    shape = low.view(low.operand(node)).shape
    channels = _per_channel(np.broadcast_to(slope, shape).astype(np.float32))
    if channels is None:
        low.refuse(node, "its slope differs within a channel")
    return _elementwise(low, node, Op("PRelu", (), channels))


def _pow(low: _Lowering, node: ir.Node) -> _Value:
    exponent = low.array(node, 1, "exponent")
    if exponent is None or exponent.size != 1 or float(exponent.ravel()[0]) != 2:
        low.refuse(node, "the c format takes the exponent 2")
    # A gate without a chain multiplies a number by itself.
    return _elementwise(low, node, Op("Gate"))


def _elementwise(low: _Lowering, node: ir.Node, *ops: Op) -> _Value:
    """Apply operations without a computed operand to the first input."""
    value = low.operand(node)
    return _applied(low, node, value, ops)


def _applied(
    low: _Lowering, node: ir.Node, value: ir.Value, ops: tuple[Op, ...], *, sole: bool | None = None
) -> _Value:
    """Put operations on the step that wrote ``value``, or keep them in mind where more than this node reads it.

    ``sole`` says whether only ``node`` needs the value as it is; where None the readers are counted.
    """
    if sole is None:
        sole = len(value.uses()) == 1 and not value.is_graph_output()
    found = low.values[value]
    if found.lazy is not None and sole:
        base, first, chain = found.lazy
        return _Value(None, lazy=(base, first, (*chain, *ops)))
    if found.owner is not None and sole and _takes(found, ops):
        found.owner.chain += ops
        return found
    if len(ops) == 1 and (masked := _masked(low, value, ops[0])) is not None:
        return _Value(masked)
    return _Value(None, lazy=(value, node, ops))


def _takes(value: _Value, ops: Iterable[Op]) -> bool:
    """Return whether the step that wrote ``value`` has its channels, where an operation has a number for each.

    A softmax or a reduction lays its result out by what it computes along, so that six channels may be one row of six.
    """
    owner = value.owner
    assert owner is not None  # noqa: S101  asked of values that a step wrote
    each = any(one.scale is not None for op in ops for one in (op, *op.inner))
    return not each or (value.view is not None and owner.out.channels == _geometry(value.view.shape)[0])


def _masked(low: _Lowering, value: ir.Value, op: Op) -> View | None:
    """Return a view with channels of zeros where a factor of 0 makes them, if the other factors are 1."""
    if op.kind != "Affine" or op.scale is None or op.shift is None or op.shift.any():
        return None
    # A view can leave numbers out but not change them.
    if not np.isin(op.scale, (0, 1)).all():
        return None
    view = low.view(value)
    return np.where(op.scale[:, None, None] != 0, _shaped(view), ZERO).reshape(view.shape)


def _per_channel(array: Floats) -> Floats | None:
    """Return one number a channel of constants in the shape of a value, or None where they differ within one."""
    image = array.reshape(_geometry(array.shape))
    first = image[:, :1, :1]
    return np.ascontiguousarray(first[:, 0, 0]) if np.array_equal(image, np.broadcast_to(first, image.shape)) else None


def _constant_ops(kind: str, array: Floats, *, swapped: bool) -> tuple[Op, ...] | None:
    """Return ``v kind array`` as operations, or None where that takes a map of constants."""
    numbers = _per_channel(array)
    if numbers is None:
        return None
    one, zero = np.ones_like(numbers), np.zeros_like(numbers)
    found: tuple[Op, ...] | None = None
    if kind == "Add":
        found = (_affine(one, numbers),)
    elif kind == "Sub":
        found = (_affine(-one, numbers) if swapped else _affine(one, -numbers),)
    elif kind == "Mul":
        found = (_affine(numbers, zero),)
    elif kind == "Div" and swapped:
        found = (Op("Reciprocal"), _affine(numbers, zero))
    # Zero has no reciprocal: a constant with zeros stays a divisor.
    elif kind == "Div" and numbers.all():
        found = (_affine((1 / numbers.astype(np.float64)).astype(np.float32), zero),)
    # Clip has one bound for all channels; different ones become a map of constants.
    elif kind in {"Max", "Min"} and (numbers == numbers[0]).all():
        bound = float(numbers[0])
        found = (Op("Clip", (bound, math.inf) if kind == "Max" else (-math.inf, bound)),)
    return found


def _affine(scale: NDArray[Any], shift: NDArray[Any]) -> Op:
    return Op("Affine", scale=scale.astype(np.float32), shift=shift.astype(np.float32))


def _binary(low: _Lowering, node: ir.Node) -> _Value:
    """Add, Sub, Mul, Div, Max or Min of two operands, one of which may be constant."""
    if len(node.inputs) != 2:
        low.refuse(node, f"it has {len(node.inputs)} operands; the c format takes two")
    a, b = low.operand(node), low.operand(node, 1)
    for value, other, swapped in ((a, b, False), (b, a, True)):
        constant = low.constant(other)
        if constant is not None:
            return _with_constant(low, node, value, constant.astype(np.float32), swapped=swapped)
    if node.op_type == "Mul":
        for value, other in ((a, b), (b, a)):
            inner = _gate(low, node, value, other)
            if inner is not None:
                return _applied(low, node, value, (Op("Gate", inner=inner),), sole=True)
    return _combined(low, node, a, b)


def _with_constant(low: _Lowering, node: ir.Node, value: ir.Value, constant: Floats, *, swapped: bool) -> _Value:
    kind = node.op_type
    own = low.shape(value)
    shape = np.broadcast_shapes(own, constant.shape)
    spread = np.broadcast_to(constant, shape)
    ops = _constant_ops(kind, spread, swapped=swapped)
    if ops is None:
        table = Constant(f"constant of {node.name}", low.map(f"constant of {node.name}", shape), np.array(spread))
        table.values = table.values.reshape(table.out.shape)
        low.steps.insert(0, table)  # known before anything runs
        ops = (Op(kind, operand=table.out.view, swapped=swapped),)
    if shape == own:
        return _applied(low, node, value, ops)
    view = np.broadcast_to(low.view(value), shape)
    return low.new(node, Move, shape, source=_shaped(view), chain=list(ops))


def _gate(low: _Lowering, node: ir.Node, value: ir.Value, other: ir.Value) -> tuple[Op, ...] | None:
    """Return the chain ``f`` where the node computes ``value · f(value)`` and nothing else reads ``value``."""
    readers = {user for user, _ in value.uses()}
    if value.is_graph_output():
        return None
    if value is other:
        return () if readers == {node} else None
    lazy = low.values[other].lazy
    sole = len(other.uses()) == 1 and not other.is_graph_output()
    # The only readers may be the product and the chain that leads to it: any other would need the value as it was.
    if lazy is None or not sole or lazy[0] is not value or readers != {node, lazy[1]}:
        return None
    return lazy[2] if all(op.operand is None for op in lazy[2]) else None


def _combined(low: _Lowering, node: ir.Node, a: ir.Value, b: ir.Value) -> _Value:
    """Combine two computed operands: on the step of the later one, if nothing else needs it as it was."""
    kind = node.op_type
    # Both are made steps before owners are compared, for a lazy value has neither owner nor place.
    views = {id(value): low.view(value) for value in (a, b)}
    shape = np.broadcast_shapes(views[id(a)].shape, views[id(b)].shape)
    best: tuple[int, _Value, Step, ir.Value, bool] | None = None
    for value, other, swapped in ((a, b, False), (b, a, True)):
        owner = low.values[value].owner
        sole = len(value.uses()) == 1 and not value.is_graph_output() and views[id(value)].shape == shape
        if owner is None or not sole or value is other:
            continue
        place = low.place(owner)
        # The other operand must be complete when the step runs.
        if low.written(views[id(other)]) < place and (best is None or place > best[0]):
            best = (place, low.values[value], owner, other, swapped)
    if best is None:
        first = np.broadcast_to(views[id(a)], shape)
        step: Step = low.step(Move, node.name or "", shape, source=_shaped(first))
        found = _Value(step.out.view.reshape(shape), step)
        other, swapped = b, False
    else:
        _, found, step, other, swapped = best
    operand = _operand(low, step, np.broadcast_to(views[id(other)], shape))
    step.chain.append(Op(kind, operand=operand, swapped=swapped))
    return found


def _operand(low: _Lowering, owner: Step, view: View) -> View:
    """Return a view in the shape of the owner's map: (C, 1, 1) where it is one element a channel, else planes.

    A view that is no regular part of planes, or takes not every column, is copied by a step before the owner.
    """
    image = _shaped(view)
    first = image[:, :1, :1]
    if np.array_equal(image, np.broadcast_to(first, image.shape)):
        return np.ascontiguousarray(first)
    planes = low.so_far(image).planes(image)
    if planes is not None and planes.dx == 1:
        return np.ascontiguousarray(image)
    copy = Move(f"operand of {owner.name}", low.map(f"operand of {owner.name}", view.shape), image)
    # The owner is in the list already, and must find the copy made.
    low.steps.insert(low.place(owner), copy)
    return copy.out.view


# Rules: what only moves elements --------------------------------------------------------------------------------------


def _same(low: _Lowering, node: ir.Node) -> _Value:
    """Identity and what is one here: the step may go on growing."""
    value = low.operand(node)
    return low.renamed(value, low.view(value))


def _cast(low: _Lowering, node: ir.Node) -> _Value:
    target = ir.DataType(node.attributes.get_int("to", 1))
    if not target.is_floating_point():
        low.refuse(node, f"it makes {target} of floats")
    return _same(low, node)


def _reshape(low: _Lowering, node: ir.Node) -> _Value:
    value = low.operand(node)
    target = low.required(node, 1, "shape")
    view = low.view(value)
    keep = not node.attributes.get_int("allowzero", 0)
    sizes = [view.shape[k] if n == 0 and keep else int(n) for k, n in enumerate(target.ravel())]
    return low.renamed(value, view.reshape(sizes))


def _flatten(low: _Lowering, node: ir.Node) -> _Value:
    value = low.operand(node)
    view = low.view(value)
    axis = node.attributes.get_int("axis", 1)
    axis += view.ndim if axis < 0 else 0
    return low.renamed(value, view.reshape(math.prod(view.shape[:axis]), -1))


def _squeeze(low: _Lowering, node: ir.Node) -> _Value:
    value = low.operand(node)
    view, axes = low.view(value), low.array(node, 1, "list of axes")
    return low.renamed(value, view.squeeze(None if axes is None else tuple(int(a) for a in axes.ravel())))


def _unsqueeze(low: _Lowering, node: ir.Node) -> _Value:
    value, axes = low.operand(node), low.required(node, 1, "list of axes")
    return low.renamed(value, np.expand_dims(low.view(value), tuple(int(a) for a in axes.ravel())))


def _transpose(low: _Lowering, node: ir.Node) -> _Value:
    value = low.operand(node)
    view = low.view(value)
    return low.renamed(value, view.transpose(_ints(node, "perm", range(view.ndim)[::-1])))


def _concat(low: _Lowering, node: ir.Node) -> View:
    parts = []
    for value in node.inputs:
        assert value is not None  # noqa: S101  # no operand of Concat is optional
        constant = low.constant(value)
        if constant is None:
            parts.append(low.view(value))
        # Zeros need no table: every view can name them.
        elif not constant.any():
            parts.append(np.full(constant.shape, ZERO, np.int64))
        else:
            parts.append(low.table(str(value.name), constant))
    return np.concatenate(parts, axis=node.attributes.get_int("axis", 0))


def _split(low: _Lowering, node: ir.Node) -> tuple[View, ...]:
    value = low.operand(node)
    view, axis, given = low.view(value), node.attributes.get_int("axis", 0), low.array(node, 1, "list of sizes")
    if given is None:
        # Where the size does not divide, ONNX makes the last part the smaller one.
        part = -(-view.shape[axis] // len(node.outputs))
        ends = [part * (k + 1) for k in range(len(node.outputs) - 1)]
    else:
        ends = np.cumsum(given)[:-1].tolist()
    return tuple(np.split(view, ends, axis))


def _slice(low: _Lowering, node: ir.Node) -> View:
    value = low.operand(node)
    view = low.view(value)
    starts, ends = low.required(node, 1, "bound"), low.required(node, 2, "bound")
    axes, steps = low.array(node, 3, "list of axes"), low.array(node, 4, "step")
    chosen = range(len(starts)) if axes is None else [int(a) for a in axes]
    index = [slice(None)] * view.ndim
    for axis, start, end, step in zip(
        chosen, starts, ends, np.ones_like(starts) if steps is None else steps, strict=True
    ):
        size = view.shape[axis]
        # A backward slice that ends before the first element: in Python that end is None, -1 would be the last.
        before = step < 0 and end < -size
        index[axis] = slice(int(start), None if before else int(end), int(step))
    return view[tuple(index)]


def _gather(low: _Lowering, node: ir.Node) -> View:
    value, indices = node.inputs[0], low.array(node, 1, "list of indices")
    if value is None or low.constant(value) is not None or indices is None:
        low.refuse(node, "the c format gathers from what the network computes, at constant places")
    return np.take(low.view(value), indices.astype(np.int64), axis=node.attributes.get_int("axis", 0))


def _pad(low: _Lowering, node: ir.Node) -> View:
    value = low.operand(node)
    view, pads = low.view(value), low.required(node, 1, "list of sizes")
    fill, axes = low.array(node, 2, "number"), low.array(node, 3, "list of axes")
    chosen = range(view.ndim) if axes is None else [int(a) % view.ndim for a in axes]
    amounts = [(0, 0)] * view.ndim
    for k, axis in enumerate(chosen):
        amounts[axis] = (int(pads[k]), int(pads[len(chosen) + k]))
    # Negative amounts cut, which np.pad does not do.
    cut = tuple(slice(max(-a, 0), n - max(-b, 0)) for n, (a, b) in zip(view.shape, amounts, strict=True))
    grown = [(max(a, 0), max(b, 0)) for a, b in amounts]
    mode = node.attributes.get_string("mode", "constant")
    if mode != "constant":
        padded: View = np.pad(view[cut], grown, mode=mode)  # type: ignore[call-overload]  # names as in ONNX
        return padded
    number = 0.0 if fill is None else float(fill.ravel()[0])
    # One stored number is enough: a view may name it any number of times.
    element = ZERO if number == 0 else int(low.table(f"padding of {node.name}", np.array([number])).item())
    return np.pad(view[cut], grown, constant_values=element)


def _expand(low: _Lowering, node: ir.Node) -> View:
    value, target = low.operand(node), low.required(node, 1, "shape")
    view = low.view(value)
    return np.broadcast_to(view, np.broadcast_shapes(view.shape, tuple(int(n) for n in target)))


def _depth_to_space(low: _Lowering, node: ir.Node) -> View:
    value = low.operand(node)
    view, size = low.view(value), node.attributes.get_int("blocksize", 1)
    n, c, h, w = view.shape
    if node.op_type == "SpaceToDepth":
        blocks = view.reshape(n, c, h // size, size, w // size, size)
        return blocks.transpose(0, 3, 5, 1, 2, 4).reshape(n, c * size**2, h // size, w // size)
    if node.attributes.get_string("mode", "DCR") == "DCR":
        blocks = view.reshape(n, size, size, c // size**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        blocks = view.reshape(n, c // size**2, size, size, h, w).transpose(0, 1, 4, 2, 5, 3)
    return blocks.reshape(n, c // size**2, h * size, w * size)


def _resize(low: _Lowering, node: ir.Node) -> View:
    """Nearest neighbours: row ``y`` of the result is a row of the operand, so that this is a view.

    The places are computed in float32, as ONNX Runtime does.
    """
    value = low.operand(node)
    view = low.view(value)
    if node.attributes.get_string("mode", "nearest") != "nearest":
        low.refuse(node, "the c format resizes to the nearest neighbour only")
    if node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        low.refuse(node, "the c format stretches only (keep_aspect_ratio_policy)")
    scales, sizes = low.array(node, 2, "scale"), low.array(node, 3, "size")
    axes = _ints(node, "axes", range(view.ndim))
    given = sizes if scales is None or not scales.size else scales
    if given is None:
        low.refuse(node, "it has neither scales nor sizes")
    for axis, number in zip(axes, given.ravel(), strict=True):
        before = view.shape[axis]
        by_size = given is sizes
        after = int(number) if by_size else math.floor(before * float(number))
        scale = np.float32(after / before) if by_size else np.float32(number)
        # A scale close to 1 can keep the size and still move the places.
        if after != before or scale != 1:
            view = np.take(view, _nearest(low, node, before, after, scale), axis=axis)
    return view


def _nearest(low: _Lowering, node: ir.Node, before: int, after: int, scale: np.float32) -> NDArray[np.int64]:
    """Return for each of ``after`` places the nearest of ``before``."""
    x = np.arange(after, dtype=np.float32)
    half = np.float32(0.5)
    transformation = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if transformation in {"half_pixel", "pytorch_half_pixel"}:
        place = (x + half) / scale - half
        if transformation == "pytorch_half_pixel" and after == 1:
            place = np.zeros_like(x)
    elif transformation == "asymmetric":
        place = x / scale
    elif transformation == "align_corners":
        place = x * np.float32(before - 1) / np.float32(max(after - 1, 1))
    else:
        low.refuse(node, f"the c format has no {transformation} coordinates")
    # np.rint is no help here: it takes halves to the even number, not always down or up.
    rounded = {
        "round_prefer_floor": np.ceil(place - half),
        "round_prefer_ceil": np.floor(place + half),
        "floor": np.floor(place),
        "ceil": np.ceil(place),
    }[str(node.attributes.get_string("nearest_mode", "round_prefer_floor"))]
    return np.asarray(np.clip(rounded, 0, before - 1), np.int64)


_RULES: dict[str, Callable[[_Lowering, ir.Node], _Value | View | tuple[View, ...]]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "Gelu": _gelu,
    "Clip": _clip,
    "Swish": _swish,
    "PRelu": _prelu,
    "Pow": _pow,
    "Identity": _same,
    "Dropout": _same,
    "Cast": _cast,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Pad": _pad,
    "Expand": _expand,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _depth_to_space,
    "Resize": _resize,
    **dict.fromkeys(ACTIVATIONS, _activation),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Max", "Min"), _binary),
}
"""Operator -> what it becomes."""

OPERATORS = frozenset(_RULES)
"""What the c format takes."""


# After all nodes ------------------------------------------------------------------------------------------------------


def _fold_affine(step: Step) -> None:
    """Join neighbouring factors of a chain and take the first into the weights of a linear step, in place."""
    chain: list[Op] = []
    for op in step.chain:
        # Joined in double precision; each joint rounds to float32 once.
        if chain and _is_affine(chain[-1]) and _is_affine(op):
            (before_scale, before_shift), (scale, shift) = _numbers(chain.pop()), _numbers(op)
            chain.append(_affine(before_scale * scale, before_shift * scale + shift))
        else:
            chain.append(op)
    # Only a factor directly behind the sums: it does not commute with an activation.
    if isinstance(step, Convolution | Linear) and chain and _is_affine(chain[0]):
        scale, shift = _numbers(chain.pop(0))
        along = (-1,) + (1,) * (step.weight.ndim - 1)
        step.weight = (step.weight * scale.reshape(along)).astype(np.float32)
        step.bias = (step.bias * scale + shift).astype(np.float32)
    step.chain = chain


def _is_affine(op: Op) -> bool:
    return op.kind == "Affine"


def _numbers(op: Op) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return scale and shift of an affine operation in double precision."""
    return np.asarray(op.scale, np.float64), np.asarray(op.shift, np.float64)
