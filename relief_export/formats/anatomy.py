"""Where the bytes of a written artifact are: parts that add up to all its files.

Of an ONNX file every field of the graph is one part or another, at its size in protobuf with tag and length. What is
left is the container: inputs, outputs, versions, and the graph's own tag.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import onnx
from onnx.external_data_helper import uses_external_data

from relief_export.formats.builder import field_bytes
from relief_export.formats.container import external_files

if TYPE_CHECKING:
    from pathlib import Path

    from onnx import SparseTensorProto, TensorProto


@dataclass(frozen=True)
class Anatomy:
    """Bytes of each part.

    Attributes:
        weights: The data of the constants: values, and the positions of those that are not zero where they are stored.
        headers: Names, types and shapes of the constants.
        decoding: Nodes that make weights of other constants, and the shapes stated for them.
        network: Nodes that depend on an input.
        container: All else.
    """

    weights: int
    headers: int
    decoding: int
    network: int
    container: int

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        """Return plain data."""
        return asdict(self)


def anatomy(path: Path) -> Anatomy | None:
    """Take apart an ONNX file with its external data, or a csr folder; None for what is neither.

    Raises:
        OSError: There is no such file.
    """
    if path.is_dir():
        sizes = {file: file.stat().st_size for file in path.iterdir()}
        weights = sum(size for file, size in sizes.items() if file.suffix in {".npy", ".npz"})
        network = sum(size for file, size in sizes.items() if file.suffix == ".onnx")
        return Anatomy(weights, 0, 0, network, sum(sizes.values()) - weights - network)
    if path.suffix != ".onnx":
        return None
    proto = onnx.load(path, load_external_data=False)
    graph = proto.graph
    known = {tensor.name for tensor in graph.initializer} | {tensor.values.name for tensor in graph.sparse_initializer}
    known -= {value.name for value in graph.input}
    decoding = network = 0
    for node in graph.node:
        if all(not name or name in known for name in node.input):
            known.update(node.output)
            decoding += field_bytes(node)
        else:
            network += field_bytes(node)
    decoding += sum(field_bytes(value) for value in graph.value_info if value.name in known)
    data = sum(_data(tensor) for tensor in graph.initializer) + sum(_sparse_data(t) for t in graph.sparse_initializer)
    headers = sum(field_bytes(tensor) for tensor in (*graph.initializer, *graph.sparse_initializer)) - data
    rest = path.stat().st_size - data - headers - decoding - network
    beside = sum(file.stat().st_size for file in external_files(proto, path))
    return Anatomy(data + beside, headers, decoding, network, rest)


def _sparse_data(tensor: SparseTensorProto) -> int:
    return _data(tensor.values) + _data(tensor.indices)


def _data(tensor: TensorProto) -> int:
    """Return the bytes of a tensor's elements in the file, without the tag and length of their field."""
    if uses_external_data(tensor):
        return 0
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data)
    bare = type(tensor)()
    bare.CopyFrom(tensor)
    for field in ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data"):
        bare.ClearField(field)
    return int(tensor.ByteSize() - bare.ByteSize())
