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

import onnx_ir as ir
import torch

from relief_export.capture import capture
from relief_export.relief.layers import JOIN_BUFFERS, NORMS, joins, tensor_name
from relief_export.relief.masks import Masks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from relief_export.graph.flow import Use


@dataclass(frozen=True)
class Disconnected:
    """Masks without anything disconnected; ``rounds`` until nothing changed."""

    masks: Masks
    rounds: int


def use_of_parameters(model: ir.Model) -> dict[str, Use]:
    """Ask the graph's liveness analysis how each initializer is used."""
    from relief_export.graph.liveness import parameter_use

    return parameter_use(model)


class Disconnector:
    """Finds disconnected parameters of one network; captures its graph once and then only swaps the numbers.

    Args:
        model: The network; only its structure matters here.
        example_input: One tensor per argument of ``forward``, batch first.

    Raises:
        InputError: The network cannot be captured.
    """

    def __init__(self, model: nn.Module, example_input: Tensor | Sequence[Tensor]) -> None:
        self._graph = capture(model, example_input)
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        # A shared parameter has one mask, under its first name, whichever name the graph knows it by.
        self._names = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        self._names |= {n: n for name, _ in joins(model) for n in (tensor_name(name, b) for b in JOIN_BUFFERS)}
        norms = (name for name, module in model.named_modules() if isinstance(module, NORMS))
        self._norms = {tensor_name(name, tensor) for name in norms for tensor in ("weight", "bias")}

    def __call__(self, model: nn.Module, masks: Masks) -> Disconnected:
        """Return ``masks`` and all that is disconnected under them. The network is not changed."""
        state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        rounds = 0
        while True:
            rounds += 1
            self._swap(state, masks)
            more = masks & self._disconnected()
            if more.same(masks):
                return Disconnected(masks, rounds)
            masks = more

    def _swap(self, state: dict[str, Tensor], masks: Masks) -> None:
        for name, value in self._graph.graph.initializers.items():
            if name in state:
                mask = masks.get(self._names.get(name, ""))
                tensor = state[name] if mask is None else state[name].masked_fill(~mask, 0)
                value.const_value = ir.Tensor(tensor.numpy(), name=name)

    def _disconnected(self) -> Masks:
        found = Masks()
        for name, use in use_of_parameters(self._graph).items():
            if name in self._names:
                gone = use.dead | use.constant if name in self._norms else use.dead
                if gone.any():
                    # Through Masks, not a dict: two graph names of one parameter are both heard.
                    found = found & {self._names[name]: ~torch.from_numpy(gone)}
        return found
