"""Mask everything that cannot influence an output any more, in both directions, to a fixed point.

The analysis is the one that export uses, on the captured graph of whatever network it is; nothing here knows an
architecture. Each round masks

- the entries of every parameter that no output depends on: incoming connections, bias, batch-norm scale and shift of a
  neuron that nobody reads, and connections that come from a neuron that is always zero;
- scale and shift of a batch norm behind a neuron without incoming connections, so that it becomes exactly zero.

What the analysis does not know it keeps, and names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch

from relief_export.capture import capture
from relief_export.graph.analysis import analyse, parameter_use
from relief_export.graph.prepare import simplify
from relief_export.layers import JOIN_BUFFERS, NORMS, joins, tensor_name
from relief_export.relief.masks import Masks
from relief_export.state import bare, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from relief_export.calling import Forward, Inputs, Output


@dataclass(frozen=True)
class Disconnected:
    """Masks without anything disconnected.

    Attributes:
        masks: What is kept.
        rounds: How often the graph was analysed until nothing changed.
        unknown: Operators the analysis has no rule for -> how often; what they read or make was kept.
    """

    masks: Masks
    rounds: int
    unknown: dict[str, int]


class Disconnector:
    """Finds disconnected parameters of one network; captures its graph once and then only swaps the numbers.

    Args:
        model: The network; only its structure matters here.
        example_input: What the network is called with, batch first, as `capture` takes it.
        forward, output: How the network is called, and what of its outputs counts; see `calling`.
        whole: Names of parameters that stay as they are, whatever is disconnected.

    Raises:
        InputError: The network cannot be captured.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Inputs,
        *,
        forward: Forward | None = None,
        output: Output | None = None,
        whole: Collection[str] = (),
    ) -> None:
        model = bare(model)
        self._graph = capture(model, example_input, forward=forward, output=output)
        self._whole = frozenset(whole)
        # Of the graph before it is simplified: a folded constant then bears the name of the node output it was.
        self._values = {str(v.name): v for v in self._graph.graph.initializers.values()}
        self._values |= {str(v.name): v for node in self._graph.graph for v in node.outputs}
        self._unknown = dict(analyse(simplify(self._graph)).unknown)
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        # A shared parameter has one mask, under its first name, whichever name the graph knows it by.
        self._names = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        self._names |= {n: n for name, _ in joins(model) for n in (tensor_name(name, b) for b in JOIN_BUFFERS)}
        norms = (name for name, module in model.named_modules() if isinstance(module, NORMS))
        self._norms = {tensor_name(name, tensor) for name in norms for tensor in ("weight", "bias")}

    def __call__(self, model: nn.Module, masks: Masks) -> Disconnected:
        """Return ``masks`` and all that is disconnected under them. The network is not changed."""
        state = {name: tensor.detach().cpu() for name, tensor in tensors_of(model).items()}
        rounds = 0
        while True:
            rounds += 1
            self._swap(state, masks)
            # What is disconnected may disconnect more, but masks only shrink, so this comes to an end.
            more = masks & self._disconnected()
            if more.same(masks):
                return Disconnected(masks, rounds, self._unknown)
            masks = more

    def _swap(self, state: dict[str, Tensor], masks: Masks) -> None:
        for name, value in self._graph.graph.initializers.items():
            if name in state:
                mask = masks.get(self._names.get(name, ""))
                tensor = state[name] if mask is None else state[name].masked_fill(~mask, 0)
                tensor = tensor.float() if tensor.is_floating_point() else tensor  # as the graph was captured
                value.const_value = ir.Tensor(tensor.numpy(), name=name)

    def _disconnected(self) -> Masks:
        """Analyse the graph as it is now. A parameter that the graph knows by two names goes where both say so."""
        gone: dict[str, NDArray[np.bool_]] = {}
        for known_as, use in parameter_use(simplify(self._graph)).items():
            name, steps = self._source(known_as)
            if name in self._names:
                # A norm behind a neuron without connections gives a constant, which masking makes zero.
                flags = use.dead | use.constant if name in self._norms else use.dead
                for step in steps:
                    flags = step(flags)
                # A shared parameter is gone only where every name of it says so.
                own = self._names[name]
                gone[own] = gone[own] & flags if own in gone else flags
        return Masks({n: torch.from_numpy(~flags) for n, flags in gone.items() if n not in self._whole and flags.any()})

    def _source(self, name: str) -> tuple[str, list[Callable[[NDArray[np.bool_]], NDArray[np.bool_]]]]:
        """Follow a folded constant back to the parameter that it only shows in another shape, and how to come back."""
        value, steps = self._values.get(name), []
        # A value that is used elsewhere too may be alive there: then nothing is followed back.
        while value is not None and len(value.uses()) == 1 and (node := value.producer()) is not None:
            source = node.inputs[0]
            if node.op_type not in _VIEWS or source is None or source.shape is None or len(source.uses()) != 1:
                return name, []
            steps.append(_VIEWS[node.op_type](node, source.shape.numpy()))
            value = source
        return (name, []) if value is None else (str(value.name), steps)


def _untranspose(node: ir.Node, shape: tuple[int, ...]) -> Callable[[NDArray[np.bool_]], NDArray[np.bool_]]:
    order = node.attributes.get_ints("perm", tuple(reversed(range(len(shape)))))
    return lambda flags: np.transpose(flags, np.argsort(order))


def _reshape(_node: ir.Node, shape: tuple[int, ...]) -> Callable[[NDArray[np.bool_]], NDArray[np.bool_]]:
    return lambda flags: np.reshape(flags, shape)


_VIEWS = {
    "Transpose": _untranspose,
    **dict.fromkeys(("Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity"), _reshape),
}
"""Operators that only show a parameter in another shape -> how to bring an array of the new shape back."""
