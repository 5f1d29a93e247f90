"""ONNX files in and out, the same for every format: bounded reading, one canonical form, deterministic bytes.

The canonical form is what every writer starts from, so that all formats of one model hold the same network: Constant
nodes are initializers, ``-0.0`` in weights is ``0.0`` (folding a mask into a negative weight leaves ``-0.0``), external
data is resolved, and nothing is left that does not compute: no doc strings, metadata or producer.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from onnx_ir.serde import TensorProtoTensor

from relief_export.errors import InputError, IntegrityError, UnsupportedModelError
from relief_export.formats.artifact import inside
from relief_export.formats.runtime import load

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

Array: TypeAlias = np.ndarray[Any, Any]

_OLDEST_IR = 4
"""Before it every initializer had to be an input as well."""
MAX_ELEMENTS = 2**31
"""No tensor may have more."""
_FREE_BYTES, _BYTES_PER_BYTE = 1 << 28, 1024
_SMALL = 1024
"""Bytes of a tensor that is checked whole where the model has to be changed for the checker."""
_STREAMED = 1 << 16
"""Bytes of a tensor that is written without a copy."""
_TYPE = "relief_export.type"
"""Key in ``ir.Value.meta`` of a type that onnx_ir has no word for, as a serialised ``TypeProto``."""
_SIGN_BITS = {np.dtype(np.float16): np.uint16, np.dtype(np.float32): np.uint32, np.dtype(np.float64): np.uint64}


def check_claim(elements: int, itemsize: int, stored: int, what: str) -> None:
    """Refuse a header that claims a tensor out of proportion to the bytes that are really there.

    Raises:
        IntegrityError: More than 2^31 elements, or more than 256 MiB and more than 1,024 bytes a stored byte.
    """
    # Small claims are harmless, and a sparse network may honestly unpack to many times its file.
    if not 0 <= elements <= MAX_ELEMENTS or elements * itemsize > max(_FREE_BYTES, _BYTES_PER_BYTE * stored):
        raise IntegrityError(f"{what} claims {elements} elements from {stored} stored bytes: do not use this file")


def check_total(size: int, stored: int, what: str) -> None:
    """Refuse tensors that together take ``size`` bytes, out of proportion to the bytes that are really there.

    Raises:
        IntegrityError: More than 2 GiB and more than 1,024 bytes a stored byte.
    """
    if size > max(8 * _FREE_BYTES, _BYTES_PER_BYTE * stored):
        raise IntegrityError(
            f"{what} brings the memory to {size} bytes from {stored} stored bytes: do not use this file"
        )


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield ``graph`` and every graph inside its nodes' attributes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.g.ByteSize() or attribute.graphs else ():
                yield from graphs(inner)


def load_proto(path: Path) -> onnx.ModelProto:
    """Parse an ONNX file and check that it is one; no external data is read.

    Raises:
        InputError: There is no such file.
        IntegrityError: It is truncated, damaged, foreign, or names external data outside its folder.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file: give an ONNX model")
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
        # First what the later checks rely on: names that are text, then files that are where they should be.
        _check_text(proto, path)
        _check_external(proto, path)
        complete = all(_has_shape(value.type) for value in (*proto.graph.input, *proto.graph.output))
        complete = complete and not _uses_long_name(proto)
        if not complete:
            _check_completed(proto)
        # The checker holds the file twice. A model is read again rather than held beside it.
        del proto
        if complete:
            # By its path, so that the checker finds external data and a file above 2 GiB is no obstacle.
            onnx.checker.check_model(str(path))
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, onnx.checker.ValidationError, ValueError, RuntimeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise IntegrityError(f"{path} is not a sound ONNX model ({reason}): write it again") from None
    return proto


def _check_completed(proto: onnx.ModelProto) -> None:
    """Run onnx's checker, which wants a shape for inputs and outputs though the standard lets it be absent.

    The model is spoilt: it gets shapes, the short name of the standard domain, which is the only one that onnx before
    1.17 knows, and loses its weights, of which the checker would make two more copies.

    Raises:
        onnx.checker.ValidationError: The model is not sound.
    """
    for tensor in _tensors(proto):
        if uses_external_data(tensor) or tensor.ByteSize() > _SMALL:
            tensor.CopyFrom(onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0], raw_data=b""))
    for value in (*proto.graph.input, *proto.graph.output):
        if not _has_shape(value.type):
            value.type.tensor_type.shape.SetInParent()
    for part in (proto, *proto.functions):
        for imported in part.opset_import:
            imported.domain = "" if imported.domain == "ai.onnx" else imported.domain
    onnx.checker.check_model(proto)


def _uses_long_name(proto: onnx.ModelProto) -> bool:
    return any(imported.domain == "ai.onnx" for part in (proto, *proto.functions) for imported in part.opset_import)


def _has_shape(kind: onnx.TypeProto) -> bool:
    return not kind.HasField("tensor_type") or kind.tensor_type.HasField("shape")


def _check_text(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse names that are no UTF-8, which protobuf hands out as bytes and the checker overlooks."""
    for graph in graphs(proto.graph):
        named = (graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer, *graph.node)
        texts = [text for node in graph.node for text in (node.op_type, node.domain, *node.input, *node.output)]
        if not all(isinstance(text, str) for text in (*texts, *(item.name for item in named))):
            raise IntegrityError(f"{path} is not a sound ONNX model (a name is no UTF-8): write it again")


def _check_external(proto: onnx.ModelProto, path: Path) -> None:
    for tensor in _tensors(proto):
        if not uses_external_data(tensor):
            continue
        where = f"{path}, tensor {tensor.name!r}"
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file = inside(path.parent, entries.get("location", ""), where)
        begin, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
        if not file.is_file() or begin < 0 or length < 0 or begin + length > file.stat().st_size:
            raise IntegrityError(f"{where}: external data {file.name} is missing or too short: fetch it again")


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    nodes = [node for function in proto.functions for node in function.node]
    for graph in graphs(proto.graph):
        yield from graph.initializer
        nodes.extend(graph.node)
    for node in nodes:
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t


def files(path: Path) -> list[Path]:
    """Return the files that the ONNX model at ``path`` consists of: itself and its external data; no ONNX is alone.

    Raises:
        OSError: There is no such file.
    """
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError:
        return [path]
    return [path, *external_files(proto, path)]


def external_files(proto: onnx.ModelProto, path: Path) -> list[Path]:
    """Return the files in which the model ``proto``, read from ``path``, keeps external data."""
    tensors = [tensor for tensor in _tensors(proto) if uses_external_data(tensor)]
    names = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    return [path.parent / name for name in sorted(names)]


def to_ir(proto: onnx.ModelProto, path: Path) -> ir.Model:
    """Turn a checked proto into onnx_ir; external initializers stay on disk and are mapped when used.

    The others become arrays, since a tensor inside a proto is copied whenever it is looked at, and one that is kept
    keeps the whole proto in memory.

    Raises:
        IntegrityError: A tensor's data does not fit its shape, or the graph refers to what is not there.
    """
    folder = path.parent.resolve()
    # Messages of protobuf cannot be hashed, so they are told apart by their identity.
    initializers = {id(tensor) for graph in graphs(proto.graph) for tensor in graph.initializer}
    for tensor in _tensors(proto):
        if id(tensor) not in initializers and uses_external_data(tensor):
            load_external_data_for_tensor(tensor, str(folder))
    try:
        model = from_proto(proto)
        ir.external_data.set_base_dir(model.graph, folder)
        _hold_tensors(model)
        for imports in (model.opset_imports, *(function.opset_imports for function in model.functions.values())):
            if "ai.onnx" in imports:  # the long name of the domain ""
                imports.setdefault("", imports.pop("ai.onnx"))
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RuntimeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise IntegrityError(f"{path} has a damaged graph or tensor ({reason}): write it again") from None
    return model


def _hold_tensors(model: ir.Model) -> None:
    """Hold the tensors of a model as arrays, in place; damaged data is noticed here, not in the middle of a writer."""
    for value in _initializers(model):
        if value.const_value is not None:
            value.const_value = _held(value.const_value)
    for graph in model.graphs():
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    node.attributes[name] = ir.AttrTensor(name, _held(attribute.as_tensor()))


def _held(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.dtype == ir.DataType.STRING:
        return tensor
    array = tensor.numpy()
    return ir.Tensor(array, dtype=tensor.dtype, name=tensor.name) if isinstance(tensor, TensorProtoTensor) else tensor


def from_proto(proto: onnx.ModelProto) -> ir.Model:
    """Turn ``proto`` into onnx_ir, with the types that onnx_ir cannot hold kept aside in their values."""
    aside: dict[str, bytes] = {}
    for graph in graphs(proto.graph):
        foreign = [value for value in (*graph.input, *graph.output, *graph.value_info) if _has_map(value.type)]
        aside |= {value.name: value.type.SerializeToString() for value in foreign}
        for value in foreign:
            # onnx_ir has no word for such a type.
            value.ClearField("type")
    model = ir.from_proto(proto)
    if aside:
        for values in map(_values, model.graphs()):
            for value in values:
                if value.name in aside:
                    value.meta[_TYPE] = aside[value.name]
    return model


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Turn ``model`` back into a proto, types that onnx_ir cannot hold included."""
    proto = ir.to_proto(model)
    aside = {v.name: v.meta[_TYPE] for graph in model.graphs() for v in _values(graph) if _TYPE in v.meta}
    for graph in graphs(proto.graph) if aside else ():
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.name in aside:
                value.type.ParseFromString(aside[value.name])
    return proto


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.outputs
    for node in graph:
        yield from node.outputs


def _has_map(kind: onnx.TypeProto) -> bool:
    """Return True if a map is ``kind`` or within it: scikit-learn's classifiers give out sequences of maps."""
    if kind.HasField("sequence_type"):
        return _has_map(kind.sequence_type.elem_type)
    return _has_map(kind.optional_type.elem_type) if kind.HasField("optional_type") else kind.HasField("map_type")


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()


def canonical(model: ir.Model) -> ir.Model:
    """Return a copy in the canonical form; tensors that need no change are shared with ``model``.

    Raises:
        UnsupportedModelError: An initializer has no value.
    """
    copy = lifted(model)
    clean_zeros(copy)
    return copy


def lifted(model: ir.Model) -> ir.Model:
    """Return a copy in the canonical form but for negative zeros; it shares all tensors with ``model``.

    Raises:
        UnsupportedModelError: An initializer has no value.
    """
    copy = model.clone()
    LiftConstantsToInitializersPass()(copy)
    copy.ir_version = max(copy.ir_version, 4)  # before 4 every initializer had to be an input as well
    for value in _initializers(copy):
        tensor = value.const_value
        if tensor is None:
            raise UnsupportedModelError(f"initializer {value.name!r} has no value: load the model with its weights")
        if tensor.dtype != ir.DataType.STRING:
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
    _state_permutations(copy)
    return copy


def _state_permutations(model: ir.Model) -> None:
    """Write the order of axes that a Transpose behind a DequantizeLinear leaves to the default, in place.

    ONNX Runtime up to 1.30 moves a DequantizeLinear by channel behind the Transpose, reads its ``perm`` without looking
    whether there is one, and ends the process.
    """
    for graph in model.graphs():
        for node in graph:
            source = node.inputs[0].producer() if node.op_type == "Transpose" and node.inputs[0] is not None else None
            if source is None or source.op_type != "DequantizeLinear" or "perm" in node.attributes:
                continue
            # Dequantised numbers have the shape of the stored ones.
            rank = next((len(v.shape) for v in (node.inputs[0], source.inputs[0]) if v and v.shape is not None), None)
            if rank is not None:
                node.attributes["perm"] = ir.AttrInt64s("perm", list(range(rank))[::-1])


def clean_zeros(model: ir.Model) -> None:
    """Replace, in place, the initializers of two axes and more that hold negative zeros by ones without."""
    for value in _initializers(model):
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING or len(tensor.shape) < 2:
            continue
        array = tensor.numpy()
        cleaned = positive_zeros(array)
        if cleaned is not array:
            value.const_value = ir.Tensor(cleaned, dtype=tensor.dtype, name=value.name)


def positive_zeros(array: Array) -> Array:
    """Return ``array`` with every ``-0.0`` replaced by ``0.0``; the array itself where it has none."""
    bits = _SIGN_BITS.get(array.dtype)
    if bits is None:
        return array
    # By their bits, since -0.0 and 0.0 compare equal.
    negative = np.ascontiguousarray(array).view(bits) == bits(1 << (8 * array.itemsize - 1))
    return np.where(negative, array.dtype.type(0), array) if negative.any() else array


def strip(proto: onnx.ModelProto) -> None:
    """Remove, in place, everything that does not compute: doc strings, metadata, producer, types of initializers."""
    for name in ("producer_name", "producer_version", "doc_string", "metadata_props", "domain", "model_version"):
        proto.ClearField(name)
    inner = [graph for function in proto.functions for node in function.node for graph in _node_graphs(node)]
    for graph in (*graphs(proto.graph), *inner):
        values = (*graph.input, *graph.output, *graph.value_info)
        # The type of an initializer is stated with its data already.
        known = {tensor.name for tensor in graph.initializer} | {s.values.name for s in graph.sparse_initializer}
        kept = [value for value in graph.value_info if value.name not in known]
        del graph.value_info[:]
        graph.value_info.extend(kept)
        for part in (graph, *graph.node, *graph.initializer, *values):
            part.ClearField("doc_string")
            part.ClearField("metadata_props")
    for function in proto.functions:
        for item in (function, *function.node):
            item.ClearField("doc_string")
            item.ClearField("metadata_props")


def _node_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield from graphs(attribute.g)


@contextmanager
def atomic_files(path: Path, *names: str) -> Iterator[tuple[Path, ...]]:
    """Yield temporary paths for ``path`` and the files ``names`` beside it; on success all take their places.

    The temporary files lie in one folder under their final names, so that they can refer to each other before anything
    that was there is touched. Where one cannot take its place, what was there is put back.

    Raises:
        InputError: ``path``, or one of the others, is a folder, a device or a pipe, which a rename would replace.
    """
    targets = (*(path.with_name(name) for name in names), path)  # the model last: it is never without what it refers to
    for target in targets:
        if target.exists() and not target.is_file():
            raise InputError(f"{target} is there and is no file: write to another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as name:
        folder = Path(name)
        try:
            yield folder / path.name, *(folder / other for other in names)
            for target in targets:
                # A rename may reach the disk before the data does, and a crash between them would leave an empty file.
                with (folder / target.name).open("rb") as file:
                    os.fsync(file.fileno())
                (folder / target.name).chmod(0o644)
            _replace(targets, folder)
        except OSError as error:
            if error.filename is None:  # a full disk does not say what could not be written
                raise OSError(error.errno, error.strerror or str(error), str(path)) from None
            raise


def _replace(targets: tuple[Path, ...], folder: Path) -> None:
    """Move the files of ``folder`` to ``targets``, all or none."""
    (folder / "old").mkdir()
    for target in filter(Path.exists, targets):
        try:
            # A link keeps the old file without a copy of its bytes.
            os.link(target, folder / "old" / target.name)
        except OSError:  # a file system without hard links
            shutil.copy2(target, folder / "old" / target.name)
    try:
        for target in targets:
            (folder / target.name).replace(target)
    except OSError:
        for target in targets:
            target.unlink(missing_ok=True)
            if (folder / "old" / target.name).exists():
                (folder / "old" / target.name).replace(target)
        raise


def save_model(model: ir.Model, path: Path, *, verify: bool, external_bytes: int) -> tuple[Path, ...]:
    """Write ``model`` deterministically, all its files or none, and return them; ``verify`` opens it first.

    Weights of more than ``external_bytes`` go to ``NAME.data``; ``model`` then refers to that file.

    Raises:
        UnsupportedModelError: It is too large for one file, or ONNX Runtime refuses it; what was there is left alone.
    """
    weights = sum(v.const_value.nbytes for v in _initializers(model) if v.const_value is not None)
    beside = () if weights <= external_bytes else (data_path(path),)
    with _model_files(path, *beside, verify=verify) as temporary:
        if beside:
            ir.external_data.unload_from_model(model, temporary.parent, beside[0].name, size_threshold_bytes=256)
            _write_proto(to_proto(model), temporary, path)
        else:
            _write_streamed(model, temporary, path)
    return path, *beside


def data_path(path: Path) -> Path:
    """Return where the external data of the model at ``path`` is kept."""
    return path.with_name(path.name + ".data")


def save_proto(proto: onnx.ModelProto, path: Path, *, verify: bool = False) -> None:
    """Write ``proto`` to ``path`` deterministically and atomically; ``verify`` opens it before it is renamed.

    Raises:
        UnsupportedModelError: It is too large for one file, or ONNX Runtime refuses it; what was there is left alone.
    """
    with _model_files(path, verify=verify) as temporary:
        _write_proto(proto, temporary, path)


@contextmanager
def _model_files(path: Path, *beside: Path, verify: bool) -> Iterator[Path]:
    """Yield a temporary path for a model, which files ``beside`` it may share the folder with; open it if it is to be.

    A model without external data leaves none behind of the model that was at ``path``.
    """
    # Only what the old model itself refers to is removed: a file of that name may be somebody else's.
    stale = not beside and path.is_file() and data_path(path).exists() and data_path(path) in files(path)
    with atomic_files(path, *(file.name for file in beside)) as (temporary, *_):
        yield temporary
        if verify:
            _verify(temporary, path)
    if stale:
        data_path(path).unlink(missing_ok=True)


def _needed_ir(proto: onnx.ModelProto) -> int:
    """Return the oldest IR version that ``proto`` needs: exporters state their newest, which old runtimes refuse."""
    types = {tensor.data_type for tensor in _tensors(proto)}
    types |= {v.type.tensor_type.elem_type for g in graphs(proto.graph) for v in (*g.input, *g.output, *g.value_info)}
    # Only newer versions of the format know these, and the operators do not tell which. (onnx before 1.18 has no
    # configuration, whose field it would keep as unknown bytes.)
    if proto.functions or getattr(proto, "configuration", ()) or max(types, default=0) > onnx.TensorProto.BFLOAT16:
        return int(proto.ir_version)
    needed = onnx.helper.find_min_ir_version_for(proto.opset_import, ignore_unknown=True)
    return int(min(proto.ir_version, max(needed, _OLDEST_IR)))


def _write_proto(proto: onnx.ModelProto, temporary: Path, path: Path) -> None:
    """Write ``proto`` without metadata to ``temporary``, which messages call ``path``."""
    _finish(proto)
    _check_size(proto.ByteSize(), path)
    # The same model must give the same bytes, since manifests hold their hash.
    temporary.write_bytes(proto.SerializeToString(deterministic=True))


def _finish(proto: onnx.ModelProto) -> None:
    """Leave in ``proto`` what a file holds, in place."""
    strip(proto)
    proto.ir_version = _needed_ir(proto)


def _check_size(size: int, path: Path) -> None:
    if size >= 1 << 31:
        raise UnsupportedModelError(f"{path} would exceed the 2 GiB of a protobuf file: use format dense or csr")


def _write_streamed(model: ir.Model, temporary: Path, path: Path) -> None:
    """Write ``model`` as ``_write_proto`` does, to the byte, but its large weights from where they are.

    A proto holds a copy of every weight, and its serialised form another.
    """
    frame = model.clone()
    streamed: dict[str, ir.Tensor[Any]] = {}
    for name, value in frame.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.Tensor) and tensor.nbytes > _STREAMED:
            streamed[name] = tensor
            value.const_value = ir.Tensor(np.empty(0, tensor.dtype.numpy()), dtype=tensor.dtype, name=name)
    proto = to_proto(frame)
    for stub in proto.graph.initializer:
        if stub.name in streamed:
            stub.ClearField("raw_data")
            stub.dims[:] = streamed[stub.name].numpy().shape
    _finish(proto)
    parts: list[bytes | ir.Tensor[Any]] = []
    for tensor in proto.graph.initializer:
        body: list[bytes | ir.Tensor[Any]] = [tensor.SerializeToString(deterministic=True)]
        if tensor.name in streamed:
            head, tail = _around(tensor, "raw_data")
            body = [head, *_field(tensor, "raw_data", [streamed[tensor.name]]), tail]
        parts += _field(proto.graph, "initializer", body)
    head, tail = _around(proto.graph, "initializer")
    parts = _field(proto, "graph", [head, *parts, tail])
    head, tail = _around(proto, "graph")
    parts = [head, *parts, tail]
    _check_size(sum(map(_size, parts)), path)
    with temporary.open("wb") as file:
        for part in parts:
            if isinstance(part, bytes):
                file.write(part)
            else:
                file.flush()  # onnx_ir writes behind the buffer
                part.tofile(file)


def _around(message: Message, name: str) -> tuple[bytes, bytes]:
    """Serialise what stands before and what behind a field of ``message``: fields are in the order of their numbers."""
    number = message.DESCRIPTOR.fields_by_name[name].number
    before, behind = type(message)(), type(message)()
    before.CopyFrom(message)
    behind.CopyFrom(message)
    for field, _ in message.ListFields():
        if field.number >= number:
            before.ClearField(field.name)
        if field.number <= number:
            behind.ClearField(field.name)
    return before.SerializeToString(deterministic=True), behind.SerializeToString(deterministic=True)


def _field(message: Message, name: str, body: list[bytes | ir.Tensor[Any]]) -> list[bytes | ir.Tensor[Any]]:
    """Return ``body`` as it is serialised in a field of ``message``: number and wire type 2, length, then the bytes."""
    number = message.DESCRIPTOR.fields_by_name[name].number
    return [_varint(number << 3 | 2) + _varint(sum(map(_size, body))), *body]


def _size(part: bytes | ir.Tensor[Any]) -> int:
    return len(part) if isinstance(part, bytes) else part.nbytes


def _varint(number: int) -> bytes:
    """Return ``number`` in base 128, least significant first, the high bit set where another byte follows."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _verify(temporary: Path, path: Path) -> None:
    """Open what was written in ONNX Runtime; nothing is run.

    Weights are not packed for its kernels, which it does again for every node that reads one: fifty times for a
    recurrent layer that was unrolled.
    """
    load(temporary, name=str(path), settings={"session.disable_prepacking": "1"})
