"""Random networks with random masks, for the fuzz tests of graph/.

The structure is drawn through ``choose`` (hypothesis, so that failures shrink), the numbers come from a seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

OPSET = 20
ACTIVATIONS: dict[str, dict[str, float | str]] = {
    "Relu": {},
    "LeakyRelu": {"alpha": 0.1},
    "Sigmoid": {},
    "HardSigmoid": {},
    "HardSwish": {},
    "Gelu": {},
    "Elu": {},
    "Selu": {},
    "Softplus": {},
    "Tanh": {},
    "Mish": {},
    "Erf": {},
    "Softsign": {},
    "Celu": {"alpha": 0.7},
    "Abs": {},
    "Neg": {},
    "Identity": {},
    "ThresholdedRelu": {"alpha": 0.2},
}
FORMS = ("float16", "bfloat16", "scaled", "tensor", "channel")
OLD_ACTIVATIONS = ("Relu", "LeakyRelu", "Sigmoid", "HardSigmoid", "Elu", "Selu", "Softplus", "Tanh", "Neg")
SMOOTH = ("LeakyRelu", "Sigmoid", "Tanh", "Elu", "Softplus", "Softsign")


def _model(graph: onnx.GraphProto, opset: int) -> onnx.ModelProto:
    """Make a model of the oldest IR version that the opset needs; every supported runtime takes 9."""
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=max(9, helper.find_min_ir_version_for(opsets)))


@cache
def newest_opset() -> int:
    """Return the highest opset that the installed onnx and ONNX Runtime both take: ONNX Runtime has no list, so try."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [result])
    options = ort.SessionOptions()
    options.log_severity_level = 4  # some tests watch stderr
    for opset in range(onnx.defs.onnx_opset_version(), OPSET, -1):
        try:
            ort.InferenceSession(_model(graph, opset).SerializeToString(), options, ["CPUExecutionProvider"])
        except (Fail, InvalidArgument):
            continue
        return opset
    return OPSET


@dataclass(frozen=True)
class Map:
    """A feature map of the network under construction."""

    name: str
    channels: int
    side: int


class Builder:
    """Adds random layers to an ONNX graph of 2-D feature maps with a symbolic batch.

    Args:
        choose: Picks one of a sequence.
        seed: Seed of all numbers.
        padding: Zero padding may occur (an obstacle to the removal of non-zero constants).
        storage: Weights may be stored in narrower types.
        opset: In whose words the layers are.
    """

    def __init__(
        self,
        choose: Callable[[Sequence], object],
        seed: int,
        *,
        padding: bool = True,
        storage: bool = False,
        opset: int = OPSET,
    ) -> None:
        self.opset = opset
        self.storage = storage
        self.choose = choose
        self.rng = np.random.default_rng(seed)
        self.padding = padding
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.activations: Sequence[str] = (*ACTIVATIONS, "PRelu", "Clip")
        self.count = 0
        self.quantises = False
        """Activations are rounded somewhere: the last bit may decide a step."""

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def add(self, op: str, inputs: list[str], outputs: int = 1, **attributes: object) -> str:
        names = [self.name(op.lower()) for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name=f"node_{names[0]}", **attributes))
        return names[0]

    def constant(self, array: np.ndarray, stem: str = "c") -> str:
        name = self.name(stem)
        # By onnx_ir, as onnx before 1.19 refuses arrays of bfloat16.
        self.initializers.append(ir.to_proto(ir.tensor(np.asarray(array, order="C"), name=name)))
        return name

    def chance(self, percent: int) -> bool:
        return self.choose(range(0, 100, 5)) < percent

    # Parameters with masks ------------------------------------------------------------------------------------------

    def weight(self, shape: tuple[int, ...], out_axis: int = 0, in_axis: int = 1) -> np.ndarray:
        array = self.rng.normal(size=shape).astype(np.float32)
        array /= np.sqrt(array.size / shape[out_axis])
        kind = self.choose(("none", "rows", "columns", "kernels", "unstructured", "sparse", "all"))
        share = {"sparse": 0.95, "all": 1.0}.get(kind, 0.5)
        if kind in ("rows", "all"):
            dead = self.rng.random(shape[out_axis]) < share
            array[tuple(dead if k == out_axis else slice(None) for k in range(len(shape)))] = 0
        if kind == "columns":
            dead = self.rng.random(shape[in_axis]) < share
            array[tuple(dead if k == in_axis else slice(None) for k in range(len(shape)))] = 0
        if kind in ("kernels", "sparse"):
            drop = self.rng.random(shape[:2]) < share
            array[drop] = 0
        if kind == "unstructured":
            array[self.rng.random(shape) < 0.7] = 0
        return array

    def kernel(self, array: np.ndarray, out_axis: int = 0) -> str:
        """Store a weight: as it is, or in a narrower type that nodes turn into floats."""
        form = self.choose(("plain",) * 6 + FORMS) if self.storage else "plain"
        if form == "plain":
            return self.constant(array, "w")
        if form in ("float16", "bfloat16"):
            stored = array.astype(np.float16 if form == "float16" else ml_dtypes.bfloat16)
            return self.add("Cast", [self.constant(stored, "w")], to=TensorProto.FLOAT)
        line = [-1 if k == out_axis else 1 for k in range(array.ndim)]
        others = tuple(k for k in range(array.ndim) if k != out_axis)
        scale = np.maximum(np.abs(array).max(axis=others), 1e-3).astype(np.float32) / 127
        scale = scale.max() if form == "tensor" else scale
        stored = self.constant(
            np.rint(array / np.reshape(scale, () if form == "tensor" else line)).astype(np.int8), "w"
        )
        if form == "scaled":
            floats = self.add("Cast", [stored], to=TensorProto.FLOAT)
            return self.add("Mul", [floats, self.constant(scale.reshape(line), "s")])
        axis = {"axis": out_axis} if form == "channel" else {}
        return self.add("DequantizeLinear", [stored, self.constant(np.asarray(scale), "s")], **axis)

    def vector(self, n: int) -> np.ndarray:
        array = self.rng.normal(scale=0.5, size=n).astype(np.float32)
        kind = self.choose(("random", "zero", "half"))
        if kind == "zero":
            array[:] = 0
        if kind == "half":
            array[self.rng.random(n) < 0.5] = 0
        return array

    # Layers on feature maps -----------------------------------------------------------------------------------------

    def conv(self, x: Map, out: int | None = None, *, same: bool = False, groups: bool = True) -> Map:
        kernel = self.choose((1, 3)) if self.padding or not same else 1
        pads = [kernel // 2] * 4 if same else self.choose(([0] * 4, [0] * 4, [1, 1, 1, 1], [0, 1, 1, 0]))
        pads = pads if self.padding else [0] * 4
        stride = 1 if same else self.choose((1, 1, 2))
        out = out or self.choose((2, 4, 6))
        options = [g for g in (2, x.channels) if x.channels % g == 0 and out % g == 0 and g > 1]
        group = self.choose((1, 1, *options)) if groups else 1
        side = (x.side + pads[0] + pads[2] - kernel) // stride + 1
        width = (x.side + pads[1] + pads[3] - kernel) // stride + 1
        if min(side, width) < 1 or side != width:
            kernel, pads, stride, side = 1, [0] * 4, 1, x.side
        inputs = [x.name, self.kernel(self.weight((out, x.channels // group, kernel, kernel)))]
        if self.chance(60):
            inputs.append(self.constant(self.vector(out), "b"))
        y = self.add("Conv", inputs, kernel_shape=[kernel] * 2, pads=pads, strides=[stride] * 2, group=group)
        return Map(y, out, side)

    def conv_transpose(self, x: Map) -> Map:
        out, kernel, stride = self.choose((2, 4)), self.choose((1, 2, 3)), self.choose((1, 2))
        weight = self.weight((x.channels, out, kernel, kernel), 1, 0)
        inputs = [x.name, self.kernel(weight, 1), self.constant(self.vector(out), "b")]
        y = self.add("ConvTranspose", inputs, kernel_shape=[kernel] * 2, strides=[stride] * 2)
        return Map(y, out, (x.side - 1) * stride + kernel)

    def batch_norm(self, x: Map) -> Map:
        n = x.channels
        variance = np.where(self.rng.random(n) < 0.2, 0, self.rng.random(n) + 0.1).astype(np.float32)
        scale = self.vector(n) * np.where(variance == 0, 1e-2, 1).astype(np.float32)
        arrays = (scale, self.vector(n), self.vector(n), variance)
        y = self.add("BatchNormalization", [x.name, *(self.constant(a, "bn") for a in arrays)], epsilon=1e-2)
        return Map(y, n, x.side)

    def activation(self, x: Map, names: Sequence[str] = ()) -> Map:
        op = self.choose(names or self.activations)
        if op == "PRelu":
            slope = self.rng.random((x.channels, 1, 1)).astype(np.float32)
            return Map(self.add(op, [x.name, self.constant(slope)]), x.channels, x.side)
        if op == "Clip":
            bounds = [self.constant(np.array(v, np.float32)) for v in (-0.4, 0.9)]
            return Map(self.add(op, [x.name, *bounds]), x.channels, x.side)
        return Map(self.add(op, [x.name], **ACTIVATIONS[op]), x.channels, x.side)

    def pool(self, x: Map) -> Map:
        if x.side < 2:
            return x
        op = self.choose(("MaxPool", "AveragePool", "AveragePool"))
        pad = self.choose((0, 1)) if self.padding else 0
        attributes = {"count_include_pad": self.choose((0, 1))} if op == "AveragePool" else {}
        y = self.add(op, [x.name], kernel_shape=[2, 2], strides=[2, 2], pads=[pad] * 4, **attributes)
        return Map(y, x.channels, (x.side + 2 * pad - 2) // 2 + 1)

    def scale(self, x: Map) -> Map:
        op = self.choose(("Mul", "Add", "Sub"))
        array = self.vector(x.channels).reshape(-1, 1, 1)
        return Map(self.add(op, [x.name, self.constant(array)]), x.channels, x.side)

    def residual(self, x: Map) -> Map:
        y = self.conv(x, same=True)
        y = self.activation(y) if self.chance(50) else y
        y = self.conv(y, x.channels, same=True)
        y = self.batch_norm(y) if self.chance(40) else y
        op = self.choose(("Add", "Add", "Add", "Sub", "Mul", "Max", "Min"))
        return Map(self.add(op, self.choose(([x.name, y.name], [y.name, x.name]))), x.channels, x.side)

    def gate(self, x: Map) -> Map:
        pooled = Map(self.add(self.choose(("GlobalAveragePool", "GlobalMaxPool")), [x.name]), x.channels, 1)
        hidden = self.activation(self.conv(pooled, same=True, groups=False), ("Relu", "Tanh"))
        y = self.conv(hidden, x.channels, same=True, groups=False)
        y = Map(self.add("Sigmoid", [y.name]), y.channels, 1)
        return Map(self.add("Mul", [x.name, y.name]), x.channels, x.side)

    def concat(self, x: Map) -> Map:
        parts = [self.conv(x, same=True), x if self.chance(40) else self.conv(x, same=True)]
        parts = [self.activation(p) if self.chance(50) else p for p in parts]
        y = self.add("Concat", [p.name for p in parts], axis=1)
        return Map(y, sum(p.channels for p in parts), x.side)

    def split(self, x: Map) -> Map:
        if x.channels < 2:
            return x
        left = int(self.choose(range(1, x.channels)))
        sizes = self.constant(np.array([left, x.channels - left], np.int64))
        first = self.add("Split", [x.name, sizes], 2, axis=1)
        second = f"split{int(first.removeprefix('split')) + 1}"
        a = self.activation(Map(first, left, x.side))
        b = self.conv(Map(second, x.channels - left, x.side), same=True)
        names = self.choose(([a.name, b.name], [b.name, a.name]))
        return Map(self.add("Concat", names, axis=1), a.channels + b.channels, x.side)

    def slice(self, x: Map) -> Map:
        start = int(self.choose(range(x.channels)))
        stop = int(self.choose(range(start + 1, x.channels + 1)))
        bounds = [self.constant(np.array([v], np.int64)) for v in (start, stop, 1)]
        return Map(self.add("Slice", [x.name, *bounds]), stop - start, x.side)

    def gather(self, x: Map) -> Map:
        indices = self.rng.integers(-x.channels, x.channels, size=int(self.choose((2, 4, 6))))
        return Map(self.add("Gather", [x.name, self.constant(indices)], axis=1), len(indices), x.side)

    def shuffle(self, x: Map) -> Map:
        if x.channels % 2:
            return x
        shapes = ([0, 2, x.channels // 2, x.side, x.side], [0, x.channels, x.side, x.side])
        y = self.add("Reshape", [x.name, self.constant(np.array(shapes[0]))])
        y = self.add("Transpose", [y], perm=[0, 2, 1, 3, 4])
        return Map(self.add("Reshape", [y, self.constant(np.array(shapes[1]))]), x.channels, x.side)

    def pad(self, x: Map) -> Map:
        channel = self.choose((0, 0, 1))
        amounts = [0, channel, 1, 1, 0, self.choose((0, channel)), 1, 1]
        mode = "constant" if channel else self.choose(("constant", "edge"))
        inputs = [x.name, self.constant(np.array(amounts))]
        y = self.add("Pad", inputs, mode=mode)
        return Map(y, x.channels + amounts[1] + amounts[5], x.side + 2)

    def instance_norm(self, x: Map) -> Map:
        if x.side < 2:
            return x
        arrays = (self.constant(self.vector(x.channels)), self.constant(self.vector(x.channels)))
        return Map(self.add("InstanceNormalization", [x.name, *arrays], epsilon=0.1), x.channels, x.side)

    def resize(self, x: Map) -> Map:
        scales = self.constant(np.array([1, 1, 2, 2], np.float32))
        y = self.add("Resize", [x.name, "", scales], mode=self.choose(("nearest", "linear")))
        return Map(y, x.channels, 2 * x.side)

    def opaque(self, x: Map) -> Map:
        return Map(self.add("Softmax", [x.name], axis=1), x.channels, x.side)

    def shared(self, x: Map) -> Map:
        """Apply one convolution twice."""
        weight, bias = (
            self.kernel(self.weight((x.channels, x.channels, 1, 1))),
            self.constant(self.vector(x.channels), "b"),
        )
        inputs = [weight, bias] if self.chance(50) else [weight]
        y = self.activation(Map(self.add("Conv", [x.name, *inputs]), x.channels, x.side))
        y = self.activation(y) if self.chance(30) else y
        return Map(self.add("Conv", [y.name, *inputs]), x.channels, x.side)

    def circular(self, x: Map) -> Map:
        """Join a map with its own last and first rows, as circular padding does, or with a constant frame."""
        bounds = [self.constant(np.array([v], np.int64)) for v in (0, 1, -1, 2**62, 2)]
        first = self.add("Slice", [x.name, bounds[0], bounds[1], bounds[4]])
        last = self.add("Slice", [x.name, bounds[2], bounds[3], bounds[4]])
        if self.chance(30):
            first = self.constant(np.full((3, x.channels, 1, x.side), 0.5 * self.choose((0, 1)), np.float32))
        y = self.add("Concat", [last, x.name, first], axis=2)
        sizes = self.constant(np.array([x.side + 2, x.side + 2]))
        return Map(self.add("Resize", [y, "", "", sizes], mode="nearest", axes=[2, 3]), x.channels, x.side + 2)

    def depth(self, x: Map) -> Map:
        if x.side % 2 == 0 and x.channels <= 4 and self.chance(50):
            return Map(self.add("SpaceToDepth", [x.name], blocksize=2), 4 * x.channels, x.side // 2)
        y = self.conv(x, 4 * int(self.choose((1, 2))), same=True)
        return Map(
            self.add("DepthToSpace", [y.name], blocksize=2, mode=self.choose(("DCR", "CRD"))),
            y.channels // 4,
            2 * y.side,
        )

    def group_norm(self, x: Map) -> Map:
        if x.side < 2 or x.channels % 2:
            return x
        vectors = self.vector(x.channels), self.vector(x.channels)
        groups = self.choose((2, x.channels, 1))
        # One number a group before opset 21, a channel since.
        arrays = [self.constant(v if self.opset >= 21 else v[:groups]) for v in vectors]
        return Map(
            self.add("GroupNormalization", [x.name, *arrays], num_groups=groups, epsilon=0.1), x.channels, x.side
        )

    def rounded(self, x: Map) -> Map:
        """Quantise activations as a static quantisation writes them."""
        self.quantises = True
        scale, zero = self.constant(np.float32(0.05)), self.constant(np.array(self.choose((0, 128, 7)), np.uint8))
        y = self.add("QuantizeLinear", [x.name, scale, zero])
        return Map(self.add("DequantizeLinear", [y, scale, zero]), x.channels, x.side)

    def recurrent(self, x: Map) -> tuple[str, int]:
        """Read a map as a sequence of its positions; return the last hidden state and its length."""
        op, hidden = self.choose(("LSTM", "GRU")), int(self.choose((2, 4)))
        gates = 4 if op == "LSTM" else 3
        flat = self.add("Reshape", [x.name, self.constant(np.array([0, x.channels, x.side**2]))])
        steps = self.add("Transpose", [flat], perm=[2, 0, 1])
        w = self.weight((gates, hidden, x.channels), 1, 2).reshape(1, gates * hidden, x.channels)
        r = 0.5 * self.rng.normal(size=(1, gates, hidden, hidden)).astype(np.float32)
        b = 0.5 * self.rng.normal(size=(1, 2 * gates, hidden)).astype(np.float32)
        dead = self.rng.random(hidden) < self.choose((0, 0.5))
        r[:, :, :, dead] = 0
        if self.chance(50):
            w.reshape(gates, hidden, -1)[:, dead], r[:, :, dead], b[:, :, dead] = 0, 0, 0
        stored = [self.constant(a) for a in (w, r.reshape(1, gates * hidden, hidden), b.reshape(1, -1))]
        self.add(op, [steps, *stored], 2, hidden_size=hidden)
        last = self.nodes[-1].output[1]
        return self.add("Squeeze", [last, self.constant(np.array([0]))]), hidden

    # Sequences: the positions of a map are read as (batch, time, channels) and written back --------------------------

    def tokens(self, x: Map) -> str:
        flat = self.add("Reshape", [x.name, self.constant(np.array([0, x.channels, x.side**2]))])
        return self.add("Transpose", [flat], perm=[0, 2, 1])

    def untokens(self, y: str, channels: int, side: int) -> Map:
        turned = self.add("Transpose", [y], perm=[0, 2, 1])
        return Map(self.add("Reshape", [turned, self.constant(np.array([0, channels, side, side]))]), channels, side)

    def sequence(self, x: Map) -> Map:
        """A recurrent layer in any form, all of whose hidden states go on."""
        op, hidden, directions = (
            self.choose(("LSTM", "GRU", "RNN")),
            int(self.choose((2, 3, 5))),
            self.choose((1, 1, 2)),
        )
        gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
        steps = self.add("Transpose", [self.tokens(x)], perm=[1, 0, 2])
        w = np.stack([self.weight((gates * hidden, x.channels)) for _ in range(directions)])
        r = np.stack([self.weight((gates * hidden, hidden)) for _ in range(directions)]) * np.float32(0.5)
        b = np.stack([self.vector(2 * gates * hidden) for _ in range(directions)])
        still = np.flatnonzero(self.rng.random(hidden) < self.choose((0, 0.5)))
        for array in (w, r, b):  # nothing feeds their candidate, which is the last gate
            by_gate = array.reshape(directions, -1, gates, hidden, *array.shape[2:])
            by_gate[:, :, -1, still] *= 0 if array is not r else self.choose((0, 1))
        extra = {"linear_before_reset": 1} if op == "GRU" and self.chance(50) else {}
        extra |= {"direction": "bidirectional"} if directions == 2 else {}
        out = self.add(op, [steps, *(self.constant(a) for a in (w, r, b))], 2, hidden_size=hidden, **extra)
        turned = self.add("Transpose", [out], perm=[2, 0, 1, 3])  # (batch, time, directions, hidden)
        width = directions * hidden
        joined = self.add("Reshape", [turned, self.constant(np.array([0, x.side**2, width]))])
        return self.untokens(joined, width, x.side)

    def attention(self, x: Map) -> Map:
        """Self-attention as exporters write it, with dead heads and features."""
        heads, size, time = int(self.choose((1, 2, 3))), int(self.choose((1, 2, 3))), x.side**2
        width, given = heads * size, self.tokens(x)
        dead = np.repeat(self.rng.random(heads) < self.choose((0, 0.5)), size)
        dead |= np.tile(self.rng.random(size) < self.choose((0, 0.4)), heads)
        parts = {}
        target = self.constant(np.array([0, self.choose((0, time)), heads, size]))
        for name in "qkv":
            weight, bias = self.weight((x.channels, width), 1, 0), self.vector(width)
            if self.chance(40):
                weight[:, dead] = 0
                bias[dead] *= self.choose((0, 1))
            y = self.add("MatMul", [given, self.constant(weight, "w")])
            y = self.add("Add", [y, self.constant(bias, "b")])
            parts[name] = self.add("Transpose", [self.add("Reshape", [y, target])], perm=[0, 2, 1, 3])
        if self.chance(50):
            keys = self.add("Transpose", [parts["k"]], perm=[0, 1, 3, 2])
        else:  # heads are merged with the batch for a transpose of three axes
            merged = self.add("Reshape", [parts["k"], self.constant(np.array([-1, time, size]))])
            merged = self.add("Transpose", [merged], perm=[0, 2, 1])
            keys = self.add("Reshape", [merged, self.constant(np.array([-1, heads, size, time]))])
        scores = self.add("MatMul", [self.add("Mul", [parts["q"], self.constant(np.float32(0.5))]), keys])
        if self.chance(30):
            scores = self.add("Add", [scores, self.constant(np.triu(np.full((time, time), -1e9, np.float32), 1))])
        weights = self.add("Softmax", [scores], axis=self.choose((-1, 3)))
        if self.chance(30):
            bad = self.add("IsNaN", [weights])
            weights = self.add("Where", [bad, self.constant(np.float32(0)), weights])
        y = self.add("Transpose", [self.add("MatMul", [weights, parts["v"]])], perm=[0, 2, 1, 3])
        y = self.add("Reshape", [y, self.constant(np.array([0, time, width]))])
        out = self.weight((width, x.channels), 1, 0)
        out[dead] *= self.choose((0, 1))
        y = self.add("MatMul", [y, self.constant(out, "w")])
        y = self.add("Add", [y, given]) if self.chance(50) else y
        return self.untokens(y, x.channels, x.side)

    def twice(self, x: Map) -> Map:
        """A feed-forward block whose weights are used two times."""
        hidden, y = int(self.choose((3, 5))), self.tokens(x)
        first, second = self.weight((x.channels, hidden), 1, 0), self.weight((hidden, x.channels), 1, 0)
        names = [self.constant(a, "w") for a in (first, second)]
        biases = [self.constant(self.vector(n), "b") for n in (hidden, x.channels)]
        residual, act, biased = self.chance(50), self.choose(("Relu", "Erf", "Sigmoid")), self.chance(50)
        for _ in range(2):
            h = self.add(act, [self.add("Add", [self.add("MatMul", [y, names[0]]), biases[0]])])
            o = self.add("MatMul", [h, names[1]])
            o = self.add("Add", [o, biases[1]]) if biased else o
            y = self.add("Add", [o, y]) if residual else o
        return self.untokens(y, x.channels, x.side)

    def stacked(self, x: Map) -> Map:
        """Two layers of stacked weights, as experts have them, summed up."""
        hidden, y = int(self.choose((3, 5))), self.tokens(x)
        y = self.add("Unsqueeze", [y, self.constant(np.array([1]))])
        dead = self.rng.random(hidden) < self.choose((0, 0.5))
        first = np.stack([self.weight((x.channels, hidden), 1, 0) for _ in range(2)])
        first[:, :, dead] = 0
        second = np.stack([self.weight((hidden, x.channels), 1, 0) for _ in range(2)])
        y = self.add(
            "Add", [self.add("MatMul", [y, self.constant(first, "w")]), self.constant(self.vector(hidden), "b")]
        )
        y = self.add("MatMul", [self.add("Relu", [y]), self.constant(second, "w")])
        y = self.add("ReduceSum", [y, self.constant(np.array([1]))], keepdims=0)
        return self.untokens(y, x.channels, x.side)

    def einsum(self, x: Map) -> Map:
        hidden = int(self.choose((3, 5)))
        equation, shape, out = self.choose(
            (("btc,cd->btd", (x.channels, hidden), 1), ("btc,dc->btd", (hidden, x.channels), 0))
        )
        weight = self.constant(self.weight(shape, out, 1 - out), "w")
        y = self.add("Einsum", [self.tokens(x), weight], equation=equation)
        y = self.add("Relu", [self.add("Add", [y, self.constant(self.vector(hidden), "b")])])
        weight = self.constant(self.weight((hidden, x.channels), 1, 0), "w")
        y = self.add("Einsum", [y, weight], equation="btd,dc->bct")  # turned on the way
        return Map(
            self.add("Reshape", [y, self.constant(np.array([0, x.channels, x.side, x.side]))]), x.channels, x.side
        )

    # Further operators ----------------------------------------------------------------------------------------------

    def tile(self, x: Map) -> Map:
        channels, space = self.choose(((2, 1), (1, 2), (2, 2)))
        y = self.add("Tile", [x.name, self.constant(np.array([1, channels, space, space]))])
        return Map(y, channels * x.channels, space * x.side)

    def running(self, x: Map) -> Map:
        op = self.choose(("CumSum", "CumSum", "TopK", "Trilu"))
        if op == "TopK":
            y = self.add("TopK", [x.name, self.constant(np.array([x.side]))], 2, axis=self.choose((2, -1)))
            return Map(y, x.channels, x.side)
        axis = self.constant(np.array(self.choose((2, 3, -1)) if op == "CumSum" else 0))
        extra = {"exclusive": self.choose((0, 1))} if op == "CumSum" else {"upper": self.choose((0, 1))}
        return Map(self.add(op, [x.name, axis], **extra), x.channels, x.side)

    def where(self, x: Map) -> Map:
        if self.chance(50):
            condition = self.constant(self.rng.random((x.channels, 1, 1)) < 0.5)
        else:
            condition = self.add("Less", [x.name, self.constant(np.float32(0.1))])
        other = self.constant(self.vector(x.channels).reshape(-1, 1, 1)) if self.chance(50) else self.activation(x).name
        return Map(self.add("Where", [condition, *self.choose(([x.name, other], [other, x.name]))]), x.channels, x.side)

    # Whole networks -------------------------------------------------------------------------------------------------

    def head(self, x: Map, classes: int) -> str:
        """Flatten or pool, one hidden linear layer, logits."""
        if self.storage and self.chance(15):
            y, features = self.recurrent(x)
        elif self.chance(50):
            y, features = self.add("Flatten", [x.name]), x.channels * x.side**2
        else:
            pooled = self.add("ReduceMean", [x.name, self.constant(np.array([2, 3]))], keepdims=0)
            y, features = pooled, x.channels
        for out in (5, classes):
            if self.chance(50):
                weight = self.kernel(self.weight((out, features)))
                y = self.add("Gemm", [y, weight, self.constant(self.vector(out), "b")], transB=1)
            else:
                y = self.add("MatMul", [y, self.kernel(self.weight((features, out), 1, 0), 1)])
                y = self.add("Add", [y, self.constant(self.vector(out), "b")])
            y, features = (self.add("Relu", [y]) if out != classes and self.padding else y), out
        return y

    def model(
        self,
        outputs: Mapping[str, list[int]],
        side: int,
        channels: int = 3,
        *,
        batch: int | str = "batch",
        stale: bool = False,
    ) -> ir.Model:
        given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, channels, side, side])]
        results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [batch, *d]) for n, d in outputs.items()]
        graph = helper.make_graph(self.nodes, "random", given, results, self.initializers)
        proto = onnx.shape_inference.infer_shapes(_model(graph, self.opset), data_prop=True)
        for value in proto.graph.value_info if stale else ():
            dims = value.type.tensor_type.shape.dim
            if dims and dims[0].dim_param and self.chance(40):  # as left behind by an export at batch 1
                value.type.tensor_type.shape.dim[0].dim_value = 1
        onnx.checker.check_model(proto)
        return ir.from_proto(proto)


REACH_BLOCKS = ("attention", "einsum", "running", "sequence", "stacked", "tile", "twice", "where")
LATER_BLOCKS = ("shared", "circular", "depth", "group_norm", "rounded", *REACH_BLOCKS)
BLOCKS = (
    "conv", "conv", "residual", "residual", "concat", "batch_norm", "activation", "pool", "gate", "scale", "split",
    "slice", "gather", "shuffle", "pad", "instance_norm", "resize", "conv_transpose", "opaque",
)  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """A random network.

    Attributes:
        stale: It states shapes that are not so, which the runtime's own optimisations believe.
        rounds: It rounds activations.
    """

    model: ir.Model
    stale: bool = False
    rounds: bool = False


def random_network(choose: Callable[[Sequence], object], seed: int) -> ir.Model:
    """Build a network of up to six random blocks with one or two outputs, its weights stored as float32."""
    builder = Builder(choose, seed)
    return builder.model(_blocks(builder, BLOCKS), 6)


def any_network(choose: Callable[[Sequence], object], seed: int) -> Drawn:
    """Build a network of every kind of block, storage, opset and batch that the engine knows."""
    if choose(range(12)) == 0:
        return Drawn(old_network(choose, seed))
    builder = Builder(choose, seed, storage=True, opset=min(21, newest_opset()))
    batch = choose(("batch", "batch", 3))
    stale = batch == "batch" and choose(range(6)) == 0
    # A runtime refuses what contradicts a stated batch of 1: frames of three samples, tokens of a number of times.
    later = () if stale else LATER_BLOCKS
    outputs = _blocks(builder, (*BLOCKS, *later, *later))
    if choose(range(10)) == 0:  # nothing is left of it
        for tensor in builder.initializers:
            if tensor.name.startswith("w") and tensor.data_type == TensorProto.FLOAT:
                tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(tensor)), tensor.name))
    return Drawn(builder.model(outputs, 6, batch=batch, stale=stale), stale, builder.quantises)


def _blocks(builder: Builder, kinds: Sequence[str]) -> dict[str, list[int]]:
    """Add a stem, some blocks and a head; return the outputs with their lengths behind the batch."""
    choose = builder.choose
    x = builder.conv(Map("x", 3, 6))
    maps = [x]
    for _ in range(choose(range(1, 7))):
        block = choose(kinds)
        if x.side > 12 or x.channels > 16:
            block = "conv"
        x = getattr(builder, block)(x)
        maps.append(x)
    outputs = {builder.head(x, 3): [3]}
    if choose(range(4)) == 0:
        second = choose(maps)
        outputs[builder.add("Identity", [second.name])] = [second.channels, second.side, second.side]
    return outputs


def old_network(choose: Callable[[Sequence], object], seed: int) -> ir.Model:  # noqa: C901, PLR0912 - one branch a block
    """Build a network in the words of opset 7 to 12: what later became an input is an attribute."""
    opset = int(choose(range(7, 13)))
    builder = Builder(choose, seed, opset=opset)
    builder.activations = OLD_ACTIVATIONS
    x = builder.conv(Map("x", 3, 6), groups=False)
    for _ in range(choose(range(1, 6))):
        block = choose(("conv", "batch_norm", "activation", "pool", "clip", "slice", "split", "pad", "squeeze"))
        if block == "activation":
            x = builder.activation(x)
        elif block == "pool":
            x = Map(builder.add("GlobalAveragePool", [x.name]), x.channels, 1)
        elif block == "clip":
            bounds = {"min": -0.4, "max": 0.9}
            if opset >= 11:
                names = [builder.constant(np.float32(bound)) for bound in bounds.values()]
                x = Map(builder.add("Clip", [x.name, *names]), x.channels, x.side)
            else:
                x = Map(builder.add("Clip", [x.name], **bounds), x.channels, x.side)
        elif block == "slice":
            start = int(choose(range(x.channels)))
            if opset >= 10:
                names = [builder.constant(np.array([v])) for v in (start, x.channels, 1)]
                x = Map(builder.add("Slice", [x.name, *names]), x.channels - start, x.side)
            else:
                x = Map(
                    builder.add("Slice", [x.name], starts=[start], ends=[x.channels], axes=[1]),
                    x.channels - start,
                    x.side,
                )
        elif block == "split" and x.channels > 1:
            first = builder.add("Split", [x.name], 2, axis=1, split=[1, x.channels - 1])
            names = builder.nodes[-1].output
            x = Map(builder.add("Concat", [names[1], names[0]], axis=1), x.channels, x.side)
            assert first in names
        elif block == "pad":
            amounts = [0, 0, 1, 1, 0, 1, 1, 1]
            inputs = [x.name, builder.constant(np.array(amounts))] if opset >= 11 else [x.name]
            x = Map(
                builder.add("Pad", inputs, **({} if opset >= 11 else {"pads": amounts})), x.channels + 1, x.side + 2
            )
        elif block == "squeeze":
            y = builder.add("Squeeze", [builder.add("Unsqueeze", [x.name], axes=[2])], axes=[2])
            x = Map(y, x.channels, x.side)
        elif block in ("conv", "batch_norm"):
            x = getattr(builder, block)(x)
    if choose((0, 1)):
        y, features = builder.add("Flatten", [x.name]), x.channels * x.side**2
    else:
        y, features = builder.add("ReduceMean", [x.name], axes=[2, 3], keepdims=0), x.channels
    weight, bias = builder.constant(builder.weight((4, features)), "w"), builder.constant(builder.vector(4), "b")
    y = builder.add("Gemm", [y, weight, bias], transB=1)
    y = builder.add("Softmax", [y]) if choose((0, 1)) else y
    return builder.model({y: [4]}, 6)


def plain_network(choose: Callable[[Sequence], object], seed: int) -> ir.Model:
    """Build chains, branches and concats without padding, groups, additions or units that die by chance."""
    builder = Builder(choose, seed, padding=False)
    x = builder.conv(Map("x", 3, 6), groups=False)
    for _ in range(choose(range(1, 5))):
        block = choose(("conv", "branch", "activation", "norm"))
        if block == "conv":
            x = builder.activation(builder.conv(x, groups=False), SMOOTH)
        elif block == "branch":
            parts = [builder.activation(builder.conv(x, same=True, groups=False), SMOOTH) for _ in range(2)]
            x = Map(builder.add("Concat", [p.name for p in parts], axis=1), sum(p.channels for p in parts), x.side)
        elif block == "norm":
            x = builder.batch_norm(x)
        else:
            x = builder.activation(x, SMOOTH)
    return builder.model({builder.head(x, 3): [3]}, 6)
