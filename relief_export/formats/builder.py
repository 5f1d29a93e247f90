"""A small writer of ONNX nodes and constants that spends as few bytes as protobuf allows."""

from __future__ import annotations

import itertools
import string
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from google.protobuf.message import Message

Array: TypeAlias = np.ndarray[Any, Any]

_DIGITS = string.ascii_letters + string.digits + "_.:;,+-*/=<>()[]{}|~^!?@#$%&"
_AND_OPSET = 18
"""Opset from which on bits are cut by BitwiseAnd, which takes a third of the time of BitShift and Mod."""
_SHARED = 64
_VARINTS_UP_TO = 1 << 12
_FEW_LISTS, _FEW_SYMBOLS = 7, 1 << 13
_SMALL_FILE = 1 << 13
"""Lists are joined in files with fewer bytes: where shapes are computed too, the runtime needs a second pass."""
_VARINTS = {np.dtype(np.int64): "int64_data", np.dtype(np.int32): "int32_data"}


def short_names(taken: Collection[str]) -> Iterator[str]:
    """Yield a, b, …, aa, ab, … without the names in ``taken``."""
    for length in itertools.count(1):
        for letters in itertools.product(_DIGITS, repeat=length):
            name = "".join(letters)
            if name not in taken:
                yield name


def compact_tensor(array: Array, name: str) -> onnx.TensorProto:
    """Return ``array`` as a tensor, small integers as varints where that is shorter than raw little-endian bytes."""
    raw = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
    field = _VARINTS.get(array.dtype)
    if field is None or array.size == 0 or array.size > _VARINTS_UP_TO or array.min() < 0:
        return raw
    packed = onnx.TensorProto(dims=array.shape, data_type=raw.data_type, name=name)
    getattr(packed, field).extend(array.ravel().tolist())
    return min(raw, packed, key=lambda tensor: tensor.ByteSize())


class Builder:
    """Collects nodes and constants.

    Equal small constants are stored once. What is alike (bits, words of 4 bits, halves, small lists of integers) is
    promised under a name at once and stored later, all of a kind in one constant.
    """

    def __init__(self, names: Iterator[str], opset: int = _AND_OPSET) -> None:
        self.names, self.opset = names, opset
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.shapes: list[onnx.ValueInfoProto] = []
        self._shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._bits: list[tuple[str, Array]] = []
        self._runs: list[tuple[str, Array]] = []
        self._nibbles: list[tuple[str, Array]] = []
        self._symbols: list[tuple[str, Array]] = []
        self._halves: list[tuple[str, Array]] = []
        self._lists: list[tuple[str, Array]] = []
        self._mark = 0

    def constant(self, value: Array | list[int] | int, dtype: type = np.int64) -> str:
        """Add an initializer and return its name; an integer becomes ``dtype``, a list of integers int64."""
        array = value if isinstance(value, np.ndarray) else np.array(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes()) if array.size <= _SHARED else None
        if key is not None and key in self._shared:
            return self._shared[key]
        name = next(self.names)
        if isinstance(value, list):
            self._lists.append((name, array))
        else:
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
        else:  # a constant or a promise, which others may share
            self.node("Identity", value, out=out)

    def split(self, value: str, sizes: list[int], outs: list[str] | None = None) -> list[str]:
        """Split along the first axis and return the outputs' names."""
        names = outs or [next(self.names) for _ in sizes]
        self.nodes.append(helper.make_node("Split", [value, self.constant(sizes)], names))
        return names

    def _promise(self, kind: list[tuple[str, Array]], values: Array, out: str | None = None) -> str:
        kind.append((out or next(self.names), values))
        return kind[-1][0]

    def nibbles(self, words: Array) -> str:
        """Promise the int32 values of 4-bit ``words``."""
        return self._promise(self._nibbles, words)

    def symbols(self, words: Array) -> str:
        """Promise the values of 4-bit ``words`` as int32, stored with the bits where there are any and few words."""
        return self._promise(self._symbols, words)

    def bits(self, bits: Array) -> str:
        """Promise ``bits`` as uint8 0 or 1, exactly these."""
        return self._promise(self._bits, bits)

    def run(self, bits: Array) -> str:
        """Promise ``bits`` as uint8 0 or 1; zeros may follow them."""
        return self._promise(self._runs, bits)

    def words(self, words: Array, width: int) -> str:
        """Store ``words`` of ``width`` bits, 1 to 8, and return them as int32."""
        if width == 1:
            return self.node("Cast", self.bits(words), to=onnx.TensorProto.INT32)
        places = np.arange(width - 1, -1, -1, dtype=np.uint8)
        bits = (words >> places[:, None]) & 1
        rows = self.node("Reshape", self._promise(self._bits, bits.ravel()), self.constant([width, words.size]))
        return self.node("MatMulInteger", self.constant(1 << places), rows)

    def halves(self, values: Array, out: str | None = None) -> str:
        """Promise the float32 of ``values``, a vector of halves; the same array twice is stored once."""
        for name, known in self._halves:
            if known is values and out is None:
                return name
        return self._promise(self._halves, values, out)

    def flush(self) -> None:
        """Store what was promised since the last flush, lists apart, ahead of the nodes that use it."""
        users = self.nodes[self._mark :]
        del self.nodes[self._mark :]
        later = self._flush_symbols()
        self._flush_bits()
        self.nodes.extend(later)
        self._flush_nibbles()
        if self._halves:
            stored = self.constant(np.concatenate([values for _, values in self._halves]).astype(np.float16))
            self._hand_out(self._halves, lambda out: self.node("Cast", stored, out=out, to=onnx.TensorProto.FLOAT))
        self.nodes.extend(users)
        self._mark = len(self.nodes)

    def finish(self) -> None:
        """Flush, and store the lists; nothing may be added after it."""
        self.flush()
        rest, self.nodes = self.nodes, []
        lists, self._lists = self._lists, []
        joined = compact_tensor(np.concatenate([values for _, values in lists]), "") if lists else None
        large = sum(tensor.ByteSize() for tensor in self.tensors) > _SMALL_FILE
        if joined is None or large or len(lists) < _FEW_LISTS or joined.raw_data:
            self.tensors.extend(compact_tensor(values, name) for name, values in lists)
        else:
            joined.name, sizes = next(self.names), np.array([values.size for _, values in lists])
            self.tensors.append(joined)
            names = [name for name, _ in lists]
            self.nodes.append(helper.make_node("Split", [joined.name, self.constant(sizes)], names))
        self.nodes.extend(rest)

    def _hand_out(self, promised: list[tuple[str, Array]], whole: Callable[[str | None], str], pad: int = 0) -> None:
        """Cut the node that ``whole`` makes into what was promised and ``pad`` elements more."""
        names, sizes = [name for name, _ in promised], [values.size for _, values in promised]
        if pad:
            names, sizes = [*names, next(self.names)], [*sizes, pad]
        if len(names) == 1:
            whole(names[0])
        else:
            self.split(whole(None), sizes, names)
        promised.clear()

    def _flush_symbols(self) -> list[onnx.NodeProto]:
        """Move the symbols to the bits, or to the nibbles where there are no bits; return what follows the bits."""
        total = sum(words.size for _, words in self._symbols)
        if not (self._bits or self._runs) or total > _FEW_SYMBOLS:
            self._nibbles.extend(self._symbols)
            self._symbols.clear()
        if not self._symbols:
            return []
        words = np.concatenate([words for _, words in self._symbols])
        self._hand_out(self._symbols, lambda out: self._named(self.words(words, 4), out))
        later = self.nodes[self._mark :]
        del self.nodes[self._mark :]
        return later

    def _named(self, value: str, out: str | None) -> str:
        if out is not None:
            self.rename(value, out)
        return out or value

    def _flush_bits(self) -> None:
        """Store the bits, then the runs: the last of these takes what fills the last byte."""
        promised = [*self._bits, *self._runs]
        if not promised:
            return
        bits = np.concatenate([values for _, values in promised]).astype(np.uint8)
        pad = -bits.size % 8
        if self._runs:
            name, last = promised[-1]
            promised[-1], pad = (name, np.concatenate([last, np.zeros(pad, last.dtype)])), 0
        planes = np.append(bits, np.zeros(-bits.size % 8, np.uint8)).reshape(8, -1)
        octets, places = self.constant(np.packbits(planes, axis=0)[0]), np.arange(7, -1, -1, dtype=np.uint8)[:, None]
        # all in bytes, and planes along the last axis: a tenth of the time of int64 with octets there
        if self.opset < _AND_OPSET:
            shifted = self.node("BitShift", octets, self.constant(places), direction="RIGHT")
            table = self.node("Mod", shifted, self.constant(2, np.uint8))
        else:
            table = self.node("Sign", self.node("BitwiseAnd", octets, self.constant(1 << places)))
        flat = self.constant([planes.size])
        self._hand_out(promised, lambda out: self.node("Reshape", table, flat, out=out), pad)
        self._bits.clear()
        self._runs.clear()

    def _flush_nibbles(self) -> None:
        """Store the first half of the words in the high, the second half in the low nibbles."""
        if not self._nibbles:
            return
        size = sum(words.size for _, words in self._nibbles)
        words = np.zeros(size + size % 2, np.uint8)
        np.concatenate([words for _, words in self._nibbles], out=words[:size], casting="unsafe")
        half = words.size // 2
        packed = self.constant((words[:half] << 4) | words[half:])
        high = self.node("BitShift", packed, self.constant(4, np.uint8), direction="RIGHT")
        low = self.node("Mod", packed, self.constant(16, np.uint8))
        both = self.node("Concat", high, low, axis=0)
        self._hand_out(self._nibbles, lambda out: self.node("Cast", both, out=out, to=onnx.TensorProto.INT32), size % 2)

    def declare(self, name: str, kind: int, shape: list[int]) -> str:
        """State the shape of a value that shape inference cannot see; the runtime folds no value of unknown size."""
        self.shapes.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    @property
    def bytes(self) -> int:
        """Bytes that all of it takes in a graph."""
        return sum(field_bytes(part) for part in (*self.nodes, *self.tensors, *self.shapes))


def field_bytes(message: Message) -> int:
    """Return the bytes of ``message`` as a field of another one, with a tag of one byte and its length."""
    size: int = message.ByteSize()
    return size + 1 + max(1, -(-size.bit_length() // 7))
