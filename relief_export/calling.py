"""How a network is called on a batch, and which tensors are taken of what it gives.

A batch is what a ``DataLoader`` yields; the *inputs* are the part of it that ``forward`` is called with::

    x                        forward(x)
    (x, y), (x, y, ...)      forward(x)             where forward needs one argument
    (a, b), (a, b, y)        forward(a, b)          where it needs two, and so on
    ((a, b), y)              forward(a, b)
    ({"a": a, "b": b}, y)    forward(a=a, b=b)
    {"a": a, "labels": y}    forward(a=a)           the entries that forward takes, without the labels

Anything else, and any other call, is a function ``forward(model, batch)`` of the user's.

What a network gives may be a tensor, a tuple, a mapping or a dataclass, such as the ``ModelOutput`` of the Hugging Face
libraries, nested as deep as one likes; its tensors are named by the way to them: ``output``, ``output_0``, ``logits``.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from relief_export.errors import InputError
from relief_export.schema import did_you_mean
from relief_export.state import bare, network_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

Inputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
"""One tensor, a sequence of positional arguments, or a mapping of keyword arguments."""
Forward: TypeAlias = Callable[[nn.Module, Any], Any]
"""A user's own call: ``forward(model, batch)`` returns what the network gives."""
Output: TypeAlias = str | int | Callable[[Any], Any]
"""What is taken of what a network gives: a key, a position, or a function of it."""

_LABELS = ("labels", "label")
"""Entries of a batch that some networks take too, to compute a loss that nobody wants here."""


def inputs_of(model: nn.Module, batch: Any) -> Inputs:  # noqa: ANN401  a DataLoader yields anything
    """Return the part of a batch that the network is called with; see the module's table.

    Raises:
        InputError: The batch is of none of the known forms, or lacks an input.
    """
    if isinstance(batch, Tensor):
        return batch
    needed = _required(model)
    if isinstance(batch, Mapping):
        return _keywords(model, batch)
    if isinstance(batch, (tuple, list)) and batch:
        first = batch[0]
        if isinstance(first, Mapping):
            return _keywords(model, first)
        if isinstance(first, (tuple, list)) and any(True for _ in input_leaves(first)):
            return tuple(first)
        # A forward that takes *args needs no argument by name, and is still given one.
        count = max(1, len(needed))
        if all(isinstance(item, Tensor) for item in batch[:count]):
            if len(batch) < count:
                raise InputError(
                    f"{_name(model)} takes {count} inputs ({', '.join(needed)}) and a batch holds {len(batch)}: give "
                    f"batches of {count} tensors, with the labels after them, or a function forward(model, batch)"
                )
            return first if count == 1 else tuple(batch[:count])
    raise InputError(
        f"a batch is a tensor, a tuple of inputs and labels, or a dictionary of inputs, not a {type(batch).__name__}: "
        "give such batches, or a function forward(model, batch)"
    )


def _keywords(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any] | tuple[Any, ...]:
    parameters = inspect.signature(bare(model).forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = {name: value for name, value in batch.items() if takes_any or name in parameters}
    # After the names are matched: a forward with **kwargs would take the labels too.
    taken = {name: value for name, value in known.items() if name not in _LABELS}
    if taken:
        return taken
    if len(_required(model)) == 1:
        return (dict(batch),)  # a network that takes the whole dictionary as its one argument
    raise InputError(
        f"a batch has the keys {', '.join(map(str, batch))}, and {_name(model)} takes {', '.join(parameters)}: "
        "rename them, or give a function forward(model, batch)"
    )


def _required(model: nn.Module) -> list[str]:
    """Return the names of the arguments that ``forward`` cannot do without."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(bare(model).forward).parameters.values()
    return [item.name for item in parameters if item.kind in kinds and item.default is item.empty]


def call(model: nn.Module, inputs: Inputs) -> Any:  # noqa: ANN401  whatever the network gives
    """Call the network on its inputs.

    Raises:
        InputError: The network raised something.
    """
    # Not in training, in which a call leaves its traces in the statistics of norms.
    as_batch = None if model.training else lambda: _called(model, map_tensors(inputs, lambda tensor: tensor[None]))
    with network_errors(model, inputs, as_batch=as_batch):
        return _called(model, inputs)


def _called(model: nn.Module, inputs: Inputs) -> Any:  # noqa: ANN401  whatever the network gives
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def run_batch(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:  # noqa: ANN401
    """Call the network on a batch, on the network's own device and in its floating-point type.

    Raises:
        InputError: The batch is of no known form, or the network raised something.
    """
    if forward is None:
        return call(model, like(model, inputs_of(model, batch)))
    with network_errors(model):
        return forward(model, like(model, batch))


def like(model: nn.Module, batch: Any) -> Any:  # noqa: ANN401  any nesting of tensors
    """Return a batch with its tensors on the network's device, floating-point ones in the network's type.

    NumPy's float64, scikit-learn's default, is no other number than the float32 that the network wants.
    """
    reference = next((p for p in bare(model).parameters() if p.is_floating_point()), None)
    # A network without parameters may still have buffers, which tell its device.
    anything = reference if reference is not None else next(iter(bare(model).buffers()), None)
    device = torch.device("cpu") if anything is None else anything.device
    dtype = torch.float32 if reference is None else reference.dtype

    def moved(tensor: Tensor) -> Tensor:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device, kind, non_blocking=True)

    return map_tensors(batch, moved)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:  # noqa: ANN401  any nesting of tensors
    """Return a nesting of tuples, lists and mappings with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: map_tensors(item, change) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(map_tensors(item, change) for item in value)
    return value


def first_samples(batch: Any, count: int) -> Any:  # noqa: ANN401  any nesting of tensors
    """Return a batch cut to its first samples along axis 0."""
    return map_tensors(batch, lambda tensor: tensor[:count] if tensor.ndim else tensor)


def batch_size(batch: Any) -> int:  # noqa: ANN401  any nesting of tensors
    """Return the length of the first tensor of a batch; 0 where there is none."""
    return next((len(tensor) if tensor.ndim else 1 for _, tensor in tensors_in(batch)), 0)


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401, C901  a form a branch
    """Yield the tensors in tuples, lists, mappings and dataclasses, each with the way to it, joined by ``_``.

    None is nothing: optional outputs that were not asked for are None.

    Raises:
        InputError: Something else is in there.
    """
    prefix = f"{name}_" if name else ""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, f"{prefix}{key}")
    # Before plain tuples, because a named tuple is one and its fields are better names than numbers.
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key, item in zip(value._fields, value, strict=True):
            yield from tensors_in(item, f"{prefix}{key}")
    elif isinstance(value, (tuple, list)):
        for position, item in enumerate(value):
            yield from tensors_in(item, f"{prefix}{position}")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name), f"{prefix}{field.name}")
    elif value is not None:
        raise InputError(f"{name or 'it'} is a {type(value).__name__}, not a tensor")


def outputs_of(model: nn.Module, result: Any, output: Output | None = None) -> dict[str, Tensor]:  # noqa: ANN401
    """Return the tensors of what the network gave, or of the part that ``output`` picks, by name.

    Raises:
        InputError: There is no such part, no tensor, or something that is no tensor.
    """
    picked = result if output is None else _picked(model, result, output)
    try:
        found = list(tensors_in(picked))
    except InputError as error:
        keys = f": choose one of {', '.join(keys)} with output=" if (keys := _keys(result)) else ""
        raise InputError(f"{_name(model)} gives more than tensors ({error}){keys or ': choose with output='}") from None
    if not found:
        raise InputError(f"{_name(model)} gives no tensor")
    named = isinstance(output, str)

    def full(name: str) -> str:
        if not name:
            return str(output) if named else "output"
        # A name that begins with a digit says nothing alone, and "output" comes first as in the module's table.
        return f"output_{name}" if name[0].isdigit() else name

    return {full(name): tensor for name, tensor in found}


def _picked(model: nn.Module, result: Any, output: Output) -> Any:  # noqa: ANN401
    if callable(output):
        with network_errors(model):
            return output(result)
    if isinstance(output, str):
        if isinstance(result, Mapping) and output in result:
            return result[output]
        if hasattr(result, output):
            return getattr(result, output)
        hint = did_you_mean(output, keys) if (keys := _keys(result)) else f"; it gives a {type(result).__name__}"
        raise InputError(f"{_name(model)} gives no {output!r}{hint}")
    if not isinstance(result, (tuple, list)) or not -len(result) <= output < len(result):
        raise InputError(f"{_name(model)} gives a {type(result).__name__}, which has no output {output}")
    return result[output]


def _keys(result: Any) -> list[str]:  # noqa: ANN401
    if isinstance(result, Mapping):
        return [str(key) for key in result]
    return list(getattr(result, "_fields", ()))


def _name(model: nn.Module) -> str:
    return type(bare(model)).__name__


class Flat(nn.Module):
    """A network as ``forward(*tensors) -> tuple of tensors``, which every exporter understands.

    Attributes:
        network: The network itself; its tensors are called ``network.NAME`` here.
        inputs: Names of the tensors that ``forward`` takes.
        example: These tensors.
    """

    def __init__(
        self, network: nn.Module, inputs: Inputs, *, forward: Forward | None = None, output: Output | None = None
    ) -> None:
        super().__init__()
        self.network, self._call, self._output, self._nesting = network, forward, output, inputs
        self.example = tuple(tensor for _, tensor in input_leaves(inputs))
        self.inputs = _input_names(network, inputs, own_call=forward is not None)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the network, or what was chosen of them."""
        return tuple(self.outputs(*tensors).values())

    def outputs(self, *tensors: Tensor) -> dict[str, Tensor]:
        """Return the outputs by name."""
        # In the order of input_leaves, from which the example was made.
        given = iter(tensors)
        inputs = map_tensors(self._nesting, lambda _: next(given))
        if self._call is not None:
            result = self._call(self.network, inputs)
        elif isinstance(inputs, Tensor):
            result = self.network(inputs)
        else:
            result = self.network(**inputs) if isinstance(inputs, Mapping) else self.network(*inputs)
        return outputs_of(self.network, result, self._output)


def input_leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401  any nesting of tensors
    """Yield the tensors among the inputs in the order of `map_tensors`; what is no tensor is a constant of the call."""
    prefix = f"{name}_" if name else ""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from input_leaves(item, f"{prefix}{key}")
    elif isinstance(value, (tuple, list)):
        for position, item in enumerate(value):
            yield from input_leaves(item, f"{prefix}{position}")


def _input_names(network: nn.Module, inputs: Inputs, *, own_call: bool) -> tuple[str, ...]:
    """Return the names of the input tensors: those of the arguments of ``forward`` that they are given for."""
    named: list[tuple[str, Any]]
    if isinstance(inputs, Mapping):
        named = [(str(key), value) for key, value in inputs.items()]
    else:
        values = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(network.forward).parameters.values()
        names = [] if own_call else [item.name for item in parameters if item.kind in kinds]
        several = len(values) > 1
        names += [f"input_{i}" if several else "input" for i in range(len(names), len(values))]
        named = list(zip(names, values, strict=False))
    return tuple(name for key, value in named for name, _ in input_leaves(value, key))
