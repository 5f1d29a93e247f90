"""The one bridge from PyTorch to the graph: ``nn.Module`` + masks -> ``onnx_ir.Model`` with ``state_dict`` names."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import io
import logging
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING

import onnx_ir as ir

from relief_export.errors import InputError, MissingExtraError

try:
    import torch
    from torch.nn.utils import parametrize, prune
except ModuleNotFoundError:
    raise MissingExtraError("capturing a network", "torch") from None

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

OPSET = 18
"""ONNX operator set of a captured model: PyTorch's translations are written in it, so nothing is converted."""

BATCH = "batch"
"""Name of the dynamic axis 0 of every input."""

_EXPORTER_LOGGERS = (
    "torch.onnx",
    "torch.export",
    "torch._export",
    "torch.fx",
    "torch._dynamo",
    "onnxscript",
    "onnx_ir",
)


def capture(
    module: nn.Module, example_input: Tensor | Sequence[Tensor], *, masks: Mapping[str, Tensor] | None = None
) -> ir.Model:
    """Capture a network in evaluation mode as an unoptimised ONNX graph with a dynamic batch.

    The module is not changed: masks are multiplied into a copy, and pruning or other reparametrisations
    (``weight_orig * weight_mask``) become the plain ``weight`` there.

    Args:
        module: Any network that ``torch.export`` can trace.
        example_input: One tensor per argument of ``forward``, batch first; only shapes and types matter.
        masks: Parameter or buffer name -> boolean array of its shape, True = kept.

    Returns:
        A model whose initializers carry their ``state_dict`` names, its outputs named ``output``
        (``output_0``, ``output_1``, ... where there are several), without traces of the machine it was made on.

    Raises:
        InputError: An input is not a batch, a mask has no tensor, or the network cannot be exported.
        MissingExtraError: The exporter's own package is not installed.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise MissingExtraError("capturing a network", "onnxscript")
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError(f"{type(module).__name__} is scripted or traced: give the module that it was made from")
    plain, inputs = plain_copy(module).cpu(), _example(example_input)
    if any(tensor.dtype == torch.bfloat16 for tensor in (*plain.state_dict().values(), *inputs)):
        raise InputError(f"{type(module).__name__} is in bfloat16, which NumPy does not know: convert it with float()")
    if masks:
        _multiply(plain, masks)
    model = _export(plain, inputs)
    _own_tensors(model)
    _name_outputs(model)
    _strip(model)
    return model


def plain_copy(module: nn.Module) -> nn.Module:
    """Return a deep copy in evaluation mode in which every pruned or parametrised tensor is a plain parameter.

    Raises:
        InputError: The network keeps something that cannot be copied.
    """
    # A reparametrised weight is the result of an operation, which deepcopy refuses: hand it a detached twin.
    memo: dict[int, object] = {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, torch.Tensor) and value.grad_fn is not None
    }
    try:
        plain = copy.deepcopy(module, memo).eval()
    except Exception as error:  # noqa: BLE001  a module may keep anything
        kept = "activations that it keeps in a list or dictionary must be removed first"
        raise InputError(f"{type(module).__name__} cannot be copied ({kept}): {_reason(error)}") from None
    for part in list(plain.modules()):
        for hook in list(part._forward_pre_hooks.values()):  # noqa: SLF001  prune keeps its tensor's name only there
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(part, hook._tensor_name)  # type: ignore[no-untyped-call]  # noqa: SLF001
        if parametrize.is_parametrized(part):
            _make_plain(part)
    return plain


def _make_plain(part: nn.Module) -> None:
    # Not remove_parametrizations: that takes the property from the class, which the copy shares with the original.
    values = {name: getattr(part, name).detach() for name in part.parametrizations}  # type: ignore[union-attr]
    part.__class__ = type(part).__bases__[0]
    del part.parametrizations
    for name, value in values.items():
        part.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))


def _multiply(plain: nn.Module, masks: Mapping[str, Tensor]) -> None:
    tensors = plain.state_dict(keep_vars=True)
    for name, mask in masks.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise InputError(f"the network has no tensor {name!r} for the mask of that name")
        if tensor.shape != mask.shape:
            raise InputError(f"the mask of {name!r} has shape {tuple(mask.shape)}, its tensor {tuple(tensor.shape)}")
        tensor.detach().masked_fill_(~mask.to(tensor.device, torch.bool), 0)


def _example(example: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    inputs = (example,) if isinstance(example, torch.Tensor) else tuple(example)
    for position, x in enumerate(inputs):
        if not isinstance(x, torch.Tensor) or x.ndim == 0 or x.shape[0] == 0:
            raise InputError(f"example input {position} must be a tensor with a batch axis of at least one sample")
    # torch.export takes an axis of length 1 for a constant, so a batch of one sample is shown twice.
    return tuple(torch.cat([x, x]) if x.shape[0] == 1 else x for x in (x.detach().cpu() for x in inputs))


def _export(plain: nn.Module, inputs: tuple[Tensor, ...]) -> ir.Model:
    try:
        with _silence():
            program = torch.onnx.export(
                plain,
                inputs,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                dynamic_shapes=_dynamic(plain, inputs),
            )
    except Exception as error:  # noqa: BLE001  tracing runs the user's code: anything can come out of it
        raise InputError(f"{type(plain).__name__} cannot be exported to ONNX: {_reason(error)}") from None
    if program is None:
        raise InputError(f"{type(plain).__name__} cannot be exported to ONNX: the exporter returned nothing")
    model: ir.Model = program.model
    for value in model.graph.inputs:
        if value.shape is None or not isinstance(value.shape[0], ir.SymbolicDim):
            raise InputError(f"{type(plain).__name__} fixes the batch axis of input {value.name!r} inside its forward")
    return model


def _dynamic(plain: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[object, ...]:
    """Return the dynamic axis of each argument of ``forward``; those that a ``*args`` takes are one argument."""
    given = inspect.signature(plain.forward).bind(*inputs).arguments.values()
    return tuple(tuple({0: BATCH} for _ in one) if isinstance(one, tuple) else {0: BATCH} for one in given)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's warnings, log lines and prints from the user: a failure is reported by its reason."""
    loggers = [logging.getLogger(name) for name in _EXPORTER_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        printed = io.StringIO()
        with warnings.catch_warnings(), redirect_stdout(printed), redirect_stderr(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """Return the first line of the error at the root of the exporter's chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _own_tensors(model: ir.Model) -> None:
    """Replace views of torch storage by arrays of the model's own, so that it outlives the module unchanged."""
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), dtype=value.const_value.dtype, name=name)


def _name_outputs(model: ir.Model) -> None:
    outputs = model.graph.outputs
    for position, value in enumerate(outputs):
        if value.producer() is None:
            continue  # an input or a constant handed through keeps its own name
        value.name = "output" if len(outputs) == 1 else f"output_{position}"


def _strip(model: ir.Model) -> None:
    """Remove what the exporter notes about source lines, modules and paths."""
    model.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    for graph in model.graphs():
        graph.metadata_props.clear()
        graph.meta.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            _forget(value)
        for node in graph:
            _forget(node)
            for value in node.outputs:
                _forget(value)
    model.meta.clear()


def _forget(item: ir.Node | ir.Value) -> None:
    item.metadata_props.clear()
    item.meta.clear()
    item.doc_string = None
