"""Static shapes of every value of a model at one batch size, for what counts bytes and operations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.passes import common

from relief_export.errors import InputError, UnsupportedModelError
from relief_export.graph.fold import forget_shapes, infer_shapes, simplify

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def with_static_shapes(model: ir.Model, batch: int = 1) -> ir.Model:
    """Copy a model, inline its functions, set its batch axis and infer all shapes that follow.

    The batch axis is the first axis of each graph input where it is symbolic; a first axis that is a number stays. The
    tensors are shared with the original, which is not changed. Where plain inference stops, as at a ``Slice`` whose
    bounds are computed, the shapes of the folded model fill in. Shapes that cannot be inferred stay unknown.
    """
    copy = model.clone()
    if copy.functions:
        common.InlinePass()(copy)
    bindings = _bind_batch(copy, batch)
    forget_shapes(copy, foreign=True)
    for value in _outputs(copy):
        value.shape = _bound(value.shape, bindings)
    infer_shapes(copy)
    if any(static_shape(value) is None for value in _outputs(copy)):
        _fill_in(copy)
    return copy


def _outputs(model: ir.Model) -> Iterator[ir.Value]:
    """Yield every named output of every node, those inside control flow included."""
    return (value for graph in model.graphs() for node in graph for value in node.outputs if value.name)


def _fill_in(model: ir.Model) -> None:
    """Take over the shapes that the folded model knows, by name, in place.

    Only the shapes: the model itself stays unfolded, for what is counted is what its file stores.
    """
    try:
        folded = simplify(model)
    except UnsupportedModelError:  # an old opset: what plain inference found is all there is
        return
    known = {value.name: value for value in _outputs(folded) if static_shape(value) is not None}
    for value in _outputs(model):
        found = known.get(value.name)
        if found is not None and found.shape is not None and static_shape(value) is None:
            value.shape = found.shape.copy()
            if found.dtype is not None:
                value.dtype = found.dtype
    infer_shapes(model)


def with_dimensions(model: ir.Model, sizes: Mapping[str, int]) -> ir.Model:
    """Return a copy of a model in which symbolic lengths of the inputs are numbers.

    ``{"H": 224}`` sets every axis that the inputs name ``H``, and lengths computed from it (``2*H``); ``{"x[2]": 224}``
    the third axis of input ``x``, named or not. What the outputs state of these lengths becomes a number too.

    Raises:
        InputError: No input has such an axis, or the size is not positive or not what the model states.
    """
    copy = model.clone()
    inputs = data_inputs(copy)
    symbols = {str(d.value) for v in inputs for d in v.shape or () if not isinstance(d, int) and d.value is not None}
    axes = {f"{v.name}[{k}]": (v, k) for v in inputs for k in range(len(v.shape or ()))}
    bindings: dict[str, int] = {}
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"dimension {name} = {size} is no length: give a positive number")
        if name in symbols:
            bindings[name] = size
            continue
        if name not in axes:
            known = ", ".join([*sorted(symbols), *axes]) or "none: the model states no input shapes"
            raise InputError(f"no input has a dimension {name}: there are {known}")
        value, axis = axes[name]
        stated = value.shape[axis] if value.shape is not None else None
        if isinstance(stated, int) and stated != size:
            raise InputError(f"dimension {name} is {stated} in the model, not {size}: only symbolic ones can be set")
        if stated is not None and not isinstance(stated, int) and stated.value is not None:
            bindings[str(stated.value)] = size
        value.shape = ir.Shape([size if k == axis else d for k, d in enumerate(value.shape or ())])
    for value in (*inputs, *copy.graph.outputs, *_outputs(copy)):
        value.shape = _bound(value.shape, bindings, keep=True)
    return copy


def data_inputs(model: ir.Model) -> list[ir.Value]:
    """Return the graph inputs that a caller must feed: those without an initializer."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the shape of a value as numbers, or None where any part of it is unknown."""
    if value is None:
        return None
    shape = value.shape
    if shape is None and value.const_value is not None:
        return tuple(value.const_value.shape.numpy())
    if shape is None or not shape.is_static():
        return None
    return tuple(dim for dim in shape if isinstance(dim, int))


def elements(value: ir.Value | None) -> int | None:
    """Return the number of elements of a value, or None where its shape is unknown."""
    shape = static_shape(value)
    return None if shape is None else math.prod(shape)


def _bind_batch(model: ir.Model, batch: int) -> dict[str, int]:
    """Set the symbolic first axes of the inputs to ``batch``; return the names they had."""
    bindings: dict[str, int] = {}
    for value in data_inputs(model):
        if value.shape is None or not len(value.shape) or isinstance(value.shape[0], int):
            continue
        if value.shape[0].value is not None:
            bindings[str(value.shape[0].value)] = batch
        value.shape = ir.Shape([batch, *value.shape[1:]])
    for value in data_inputs(model):
        value.shape = _bound(value.shape, bindings)
    return bindings


def _bound(shape: ir.Shape | None, bindings: Mapping[str, int], *, keep: bool = False) -> ir.Shape | None:
    """Evaluate the symbolic axes whose symbols are all bound; forget the others unless told to keep them."""
    if shape is None:
        return None
    found = (_dimension(dim, bindings) for dim in shape)
    return ir.Shape([dim if size is None and keep else size for dim, size in zip(shape, found, strict=True)])


def _dimension(dim: int | ir.SymbolicDim, bindings: Mapping[str, int]) -> int | None:
    if isinstance(dim, int):
        return dim
    if dim.value is None or dim.value in bindings:
        return None if dim.value is None else bindings[dim.value]
    try:
        size = dim.evaluate(bindings)
    except ValueError:  # a name such as "batch size" is no expression: inference may still find the number
        return None
    return size if isinstance(size, int) else None
