"""The one bridge from PyTorch to the graph: ``nn.Module`` + masks -> ``onnx_ir.Model`` with ``state_dict`` names."""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
import re
import warnings
from collections.abc import Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING

import onnx_ir as ir

from relief_export.errors import InputError, MissingExtraError

try:
    import torch
    from torch.nn.parameter import is_lazy
    from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm
except ModuleNotFoundError:
    raise MissingExtraError("capturing a network", "torch") from None

from relief_export.calling import Flat, input_leaves, map_tensors
from relief_export.state import apply_masks, bare, first_line, network_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from relief_export.calling import Forward, Inputs, Output

OPSET = 18
"""ONNX operator set of a captured model: PyTorch's translations are written in it, so nothing is converted."""

BATCH = "batch"
"""Name of the dynamic axis 0 of every input."""

_INSIDE = "network."
"""How the names of the network's tensors begin in the module that is exported."""
_QUANTISED = ("torch.ao.nn.quantized", "torch.nn.quantized", "torchao.quantization")
_HEADING = re.compile(
    r"Failed to (export|convert|decompose)|Explanation:|Hint:|Developer debug context|"
    r"The following call raised|Constraints violated|Suggested fixes|=+$|$"
)
"""Lines of torch.export's messages that name no cause."""
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
    module: nn.Module,
    example_input: Inputs,
    *,
    masks: Mapping[str, Tensor] | None = None,
    forward: Forward | None = None,
    output: Output | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> ir.Model:
    """Capture a network in evaluation mode as an unoptimised float32 ONNX graph with a dynamic batch.

    The module is not changed: masks are applied to a copy, pruning or other reparametrisations
    (``weight_orig * weight_mask``) become the plain ``weight`` there, and numbers of half precision become float32.

    Args:
        module: Any network that ``torch.export`` can trace, or a wrapper of it.
        example_input: A tensor, a sequence of positional or a mapping of keyword arguments of ``forward``, the batch
            in front of every tensor; only shapes and types matter.
        masks: Parameter or buffer name -> boolean array of its shape, True = kept.
        forward: Calls the network on the example, where that is no plain call.
        output: What is taken of what the network gives; by default every tensor of it.
        input_names: Names for the graph's inputs, in their order; by default those of the arguments of ``forward``.
        output_names: Names for the outputs; by default ``output`` (``output_0``, ``output_1``, ... where there are
            several) or the keys of a mapping.

    Returns:
        A model whose initializers carry their ``state_dict`` names, without traces of the machine it was made on.

    Raises:
        InputError: An input is not a batch, a mask has no tensor, or the network fails or cannot be exported.
        MissingExtraError: The exporter's own package is not installed.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise MissingExtraError("capturing a network", "onnxscript")
    # On the CPU, to which the example is moved too.
    plain = plain_copy(module).cpu()
    if masks:
        apply_masks(plain, masks)
    # ONNX Runtime rounds half precision differently from PyTorch, and NumPy has no bfloat16: float32 can be proven.
    plain = plain.float()
    inputs = _example(example_input)
    flat = Flat(plain, inputs, forward=forward, output=output).eval()
    batch = [tensor[None] for tensor in flat.example]
    with torch.no_grad(), network_errors(plain, inputs, as_batch=lambda: flat.outputs(*batch)):
        given = flat.outputs(*flat.example)
    _check_batch(flat, given)
    model = _export(flat)
    _own_tensors(model)
    _rename_initializers(model)
    _name(model.graph.inputs, _chosen(input_names, flat.inputs, "input"))
    _name_outputs(model, _chosen(output_names, tuple(given), "output"), forced=output_names is not None)
    _drop_zero_bias(model)
    _strip(model)
    return model


def plain_copy(module: nn.Module) -> nn.Module:
    """Return a deep copy in evaluation mode in which every pruned or parametrised tensor is a plain parameter.

    Of a wrapped network, as by ``torch.compile``, the network inside is copied.

    Raises:
        InputError: The network is scripted, lazy, without numbers, or keeps something that cannot be copied.
    """
    module = bare(module)
    check_ready(module)
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
        raise InputError(f"{type(module).__name__} cannot be copied ({kept}): {first_line(error)}") from None
    make_plain(plain)
    return plain


def make_plain(module: nn.Module) -> tuple[str, ...]:
    """Turn every pruned, normalised or parametrised tensor into a plain parameter of the same value, in place.

    Returns:
        The names of the modules that were changed.
    """
    changed = []
    # A list, because removing a parametrisation changes the modules that are gone through.
    for name, part in list(module.named_modules()):
        hooks = list(part._forward_pre_hooks.values())  # noqa: SLF001  where the older ones keep their tensor's name
        for hook in hooks:
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(part, hook._tensor_name)  # type: ignore[no-untyped-call]  # noqa: SLF001
            elif isinstance(hook, WeightNorm):
                remove_weight_norm(part, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(part, hook.name)
            else:
                continue
            changed.append(name)
        if parametrize.is_parametrized(part):
            _remove_parametrizations(part)
            changed.append(name)
    return tuple(dict.fromkeys(changed))


def _remove_parametrizations(part: nn.Module) -> None:
    # Not torch's own function: it takes the property from the class, which a copy shares with its original.
    held = {name: getattr(part, name).detach().clone() for name in part.parametrizations}  # type: ignore[union-attr]
    trained = {
        name: any(parameter.requires_grad for parameter in parametrization.parameters())
        for name, parametrization in part.parametrizations.items()  # type: ignore[union-attr,operator]
    }
    # torch made a class of its own for this module, whose one base is the real class.
    part.__class__ = type(part).__bases__[0]
    del part.parametrizations
    for name, value in held.items():
        part.register_parameter(name, torch.nn.Parameter(value, requires_grad=trained[name]))


def check_ready(module: nn.Module) -> None:
    """Refuse a network that has no numbers, or none that could be changed.

    Raises:
        InputError: It is scripted, lazy, on the meta device, or quantised.
    """
    module = bare(module)
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError(f"{kind} is scripted or traced: give the module that it was made from")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise InputError(f"{kind} has no shape for {name!r} yet: run it once on a batch before")
        if tensor.is_meta:
            raise InputError(f"{kind} has no numbers for {name!r}, which is on the meta device: load its weights first")
    for name, part in module.named_modules():
        if type(part).__module__.startswith(_QUANTISED):
            raise InputError(
                f"{name!r} is a quantised {type(part).__name__}: give the floating-point network, int8 is a format"
            )


def _example(example: Inputs) -> Inputs:
    """Return the inputs on the CPU in float32, each with at least two samples."""
    for position, (name, x) in enumerate(input_leaves(example)):
        if x.ndim == 0 or x.shape[0] == 0:
            shown = position if not name or name.isdigit() else repr(name)
            raise InputError(f"example input {shown} must be a tensor with a batch axis of at least one sample")

    def ready(x: Tensor) -> Tensor:
        x = x.detach().cpu()
        x = x.float() if x.is_floating_point() else x
        # torch.export takes an axis of length 1 for a constant, so a batch of one sample is shown twice.
        return torch.cat([x, x]) if x.shape[0] == 1 else x

    if not isinstance(example, (torch.Tensor, Mapping, tuple, list)) or not any(True for _ in input_leaves(example)):
        raise InputError(
            f"example input 0 must be a tensor with a batch axis, not a {type(example).__name__}: give one tensor, or "
            "a tuple or dictionary of the arguments of forward"
        )
    found: Inputs = map_tensors(example, ready)
    return found


def _check_batch(flat: Flat, outputs: Mapping[str, Tensor]) -> None:
    """Refuse outputs that are no batch: nothing could be compared sample by sample."""
    sizes = {len(x) for x in flat.example}
    if len(sizes) > 1:
        raise InputError(f"the inputs hold {', '.join(map(str, sorted(sizes)))} samples: give batches of one size")
    for name, tensor in outputs.items():
        if tensor.ndim == 0:
            raise InputError(
                f"{type(flat.network).__name__} gives a single number as {name!r}, without a batch axis: choose "
                "another output with output="
            )


def _chosen(wanted: Sequence[str] | None, own: tuple[str, ...], what: str) -> tuple[str, ...]:
    names = own if wanted is None else tuple(wanted)
    if len(names) != len(own) or len(set(names)) != len(names):
        raise InputError(
            f"{what}_names must name each of the {len(own)} {what}s once ({', '.join(own)}), not {', '.join(names)}"
        )
    return names


def _export(flat: Flat) -> ir.Model:
    kind = type(flat.network).__name__
    try:
        with _silence():
            program = torch.onnx.export(
                flat,
                flat.example,
                dynamo=True,
                # Folded constants would lose the names of the state_dict, by which layers are told and weights swapped.
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                # All tensors are one argument: *tensors.
                dynamic_shapes=(tuple({0: BATCH} for _ in flat.example),),
            )
    except Exception as error:  # noqa: BLE001  tracing runs the user's code: anything can come out of it
        raise InputError(f"{kind} cannot be exported to ONNX: {_reason(error)}") from None
    if program is None:
        raise InputError(f"{kind} cannot be exported to ONNX: the exporter returned nothing")
    model: ir.Model = program.model
    for value, name in zip(model.graph.inputs, flat.inputs, strict=True):
        # The exporter may settle on the example's batch without an error: a file would take that size alone.
        if value.shape is None or not isinstance(value.shape[0], ir.SymbolicDim):
            raise InputError(f"{kind} fixes the batch axis of input {name!r} inside its forward")
    return model


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's warnings, log lines and prints from the user: a failure is reported by its reason."""
    loggers = [logging.getLogger(name) for name in _EXPORTER_LOGGERS]
    # The loggers are the whole process's, so the user's own settings are put back.
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
    """Return the line that names the cause, of the error at the root of the exporter's chain.

    torch.export puts a heading first and its advice last; what a user can act on stands between.
    """
    # The outer errors only say that an export failed.
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip(" -*#\t") for line in str(error).splitlines()]
    lines = [line for line in lines if line and not _HEADING.match(line)]
    return (lines[0].rstrip(".:") if lines else type(error).__name__)[:400]


def _own_tensors(model: ir.Model) -> None:
    """Replace views of torch storage by arrays of the model's own, so that it outlives the module unchanged."""
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), dtype=value.const_value.dtype, name=name)


def _rename_initializers(model: ir.Model) -> None:
    """Give the weights the names of the network itself, which is a part of the module that was exported."""
    initializers = model.graph.initializers
    for name in list(initializers):
        if name.startswith(_INSIDE):
            value = initializers.pop(name)
            value.name = name.removeprefix(_INSIDE)
            initializers.add(value)


def _name(values: Sequence[ir.Value], names: Sequence[str]) -> None:
    for value, name in zip(values, names, strict=True):
        value.name = name


def _name_outputs(model: ir.Model, names: Sequence[str], *, forced: bool) -> None:
    graph = model.graph
    for position, (value, name) in enumerate(zip(tuple(graph.outputs), names, strict=True)):
        if value.producer() is not None and not value.is_graph_input() and value not in tuple(graph.outputs)[:position]:
            value.name = name
        elif forced:  # an input or a constant handed through has a name already
            node = ir.node("Identity", [value])
            graph.append(node)
            node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, value.type, value.shape
            graph.outputs[position] = node.outputs[0]


def _drop_zero_bias(model: ir.Model) -> None:
    """Remove the bias that the exporter invents for a 3-D convolution without one: zeros of another shape than ONNX's.

    It writes Expand(0, [channels, 2]), of which ONNX Runtime reads the first numbers and everybody else refuses.
    """
    for node in model.graph:
        bias = node.inputs[2] if node.op_type in {"Conv", "ConvTranspose"} and len(node.inputs) > 2 else None
        expand = bias.producer() if bias is not None else None
        if expand is None or expand.op_type != "Expand" or (source := expand.inputs[0]) is None:
            continue
        cast = source.producer()
        constant = cast.inputs[0] if cast is not None and cast.op_type == "CastLike" else source
        value = ir.convenience.get_const_tensor(constant) if constant is not None else None
        # Nothing but a single zero is removed: a bias with a number in it is the network's own.
        if value is not None and value.size == 1 and float(value.numpy().reshape(-1)[0]) == 0:
            node.replace_input_with(2, None)


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
