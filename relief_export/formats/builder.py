"""A small writer of ONNX nodes and constants that spends as few bytes as protobuf allows."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

Array: TypeAlias = np.ndarray[Any, Any]

_DIGITS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_SHARED = 64
_VARINTS = {np.dtype(np.int64): "int64_data", np.dtype(np.int32): "int32_data"}


def short_names(taken: Collection[str]) -> Iterator[str]:
    """Yield a, b, …, aa, ab, … without the names in ``taken``."""
    for length in itertools.count(1):
        for letters in itertools.product(_DIGITS, repeat=length):
            name = "".join(letters)
            if name not in taken and not name[0].isdigit():
                yield name


def compact_tensor(array: Array, name: str) -> onnx.TensorProto:
    """Return ``array`` as a tensor, small integers as varints where that is shorter than raw little-endian bytes."""
    raw = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
    field = _VARINTS.get(array.dtype)
    if field is None or array.size == 0 or array.size > _SHARED or array.min() < 0:
        return raw
    packed = onnx.TensorProto(dims=array.shape, data_type=raw.data_type, name=name)
    getattr(packed, field).extend(array.ravel().tolist())
    return min(raw, packed, key=lambda tensor: tensor.ByteSize())


class Builder:
    """Collects nodes and constants; equal small constants are stored once."""

    def __init__(self, names: Iterator[str]) -> None:
        self.names = names
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.shapes: list[onnx.ValueInfoProto] = []
        self._shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._nibbles: list[tuple[str, Array]] = []
        self._tables: list[tuple[str, Array]] = []
        self._mark = 0

    def constant(self, value: Array | list[int] | int, dtype: type = np.int64) -> str:
        """Add an initializer and return its name; lists and integers become ``dtype``."""
        array = value if isinstance(value, np.ndarray) else np.array(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes()) if array.size <= _SHARED else None
        if key is not None and key in self._shared:
            return self._shared[key]
        name = next(self.names)
        self.tensors.append(compact_tensor(array, name))
        if key is not None:
            self._shared[key] = name
        return name

    def node(self, op: str, *inputs: str, out: str | None = None, **attributes: object) -> str:
        """Add a node with one output and return the output's name."""
        name = out or next(self.names)
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))  # type: ignore[arg-type]
        return name

    def rename(self, value: str, out: str) -> None:
        """Give ``value`` the name ``out``; it is used nowhere yet."""
        if self.nodes and self.nodes[-1].output[:] == [value]:
            self.nodes[-1].output[0] = out
            for shape in self.shapes:
                shape.name = out if shape.name == value else shape.name
        else:  # a constant, which others may share
            self.node("Identity", value, out=out)

    def split(self, value: str, sizes: list[int], outs: list[str] | None = None) -> list[str]:
        """Split along the first axis and return the outputs' names."""
        names = outs or [next(self.names) for _ in sizes]
        self.nodes.append(helper.make_node("Split", [value, self.constant(sizes)], names))
        return names

    def nibbles(self, words: Array) -> str:
        """Promise the int32 values of 4-bit ``words``; ``flush`` stores all that were promised in one constant."""
        if not self._mark_set():
            self._mark = len(self.nodes)
        name = next(self.names)
        self._nibbles.append((name, words))
        return name

    def _mark_set(self) -> bool:
        return bool(self._nibbles or self._tables)

    def flush(self) -> None:
        """Store everything that was promised, ahead of the nodes that use it."""
        if not self._mark_set():
            return
        users = self.nodes[self._mark :]
        del self.nodes[self._mark :]
        self._flush_nibbles()
        self._flush_tables()
        self.nodes.extend(users)

    def _flush_nibbles(self) -> None:
        # The first half of the words lies in the high, the second half in the low nibbles.
        if not self._nibbles:
            return
        names, sizes = [name for name, _ in self._nibbles], [words.size for _, words in self._nibbles]
        words = np.zeros(sum(sizes) + sum(sizes) % 2, np.uint8)
        np.concatenate([words for _, words in self._nibbles], out=words[: sum(sizes)], casting="unsafe")
        if words.size > sum(sizes):
            names, sizes = [*names, next(self.names)], [*sizes, 1]
        half = words.size // 2
        packed = self.constant((words[:half] << 4) | words[half:])
        high = self.node("BitShift", packed, self.constant(4, np.uint8), direction="RIGHT")
        low = self.node("Mod", packed, self.constant(16, np.uint8))
        both = self.node("Concat", high, low, axis=0)
        wide = self.node("Cast", both, out=names[0] if len(names) == 1 else None, to=onnx.TensorProto.INT32)
        if len(names) > 1:
            self.split(wide, sizes, names)
        self._nibbles.clear()

    def table(self, centres: Array) -> str:
        """Promise float32 ``centres``, which are halves; ``flush`` stores all that were promised in one constant."""
        if not self._mark_set():
            self._mark = len(self.nodes)
        name = next(self.names)
        self._tables.append((name, centres))
        return name

    def _flush_tables(self) -> None:
        if not self._tables:
            return
        names, sizes = [name for name, _ in self._tables], [centres.size for _, centres in self._tables]
        stored = self.constant(np.concatenate([centres for _, centres in self._tables]).astype(np.float16))
        wide = self.node("Cast", stored, out=names[0] if len(names) == 1 else None, to=onnx.TensorProto.FLOAT)
        if len(names) > 1:
            self.split(wide, sizes, names)
        self._tables.clear()

    def declare(self, name: str, kind: int, shape: list[int]) -> str:
        """State the shape of a value that shape inference cannot see; the runtime folds no value of unknown size."""
        self.shapes.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    @property
    def bytes(self) -> int:
        """Bytes that all of it takes in a graph, each part with its tag and length."""
        sizes = [
            *(node.ByteSize() for node in self.nodes),
            *(tensor.ByteSize() for tensor in self.tensors),
            *(value.ByteSize() for value in self.shapes),
        ]
        return sum(size + 1 + _varint(size) for size in sizes)


def _varint(value: int) -> int:
    return max(1, -(-value.bit_length() // 7))
