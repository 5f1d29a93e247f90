"""One or more tiny graphs for every operator of the table: convolution -> operator -> convolution.

The first convolution has six output channels: 0 is always 0, 1 is always 0.7, 2 is always -0.6, 3 and 4 carry data, and
nothing reads 5. It is called ``a``; the operator's output is ``d``; the consumer reads ``d`` without padding.
"""

# ruff: noqa: E501 - a table: most cases are one line

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tests.graph.helpers import build

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

CHANNELS, SIDE = 6, 4
UNREAD = 5


def f32(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def i64(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def scalar(value: float, dtype: type = np.float32) -> NDArray:
    return np.array(value, dtype)


@dataclass(frozen=True)
class Case:
    """One graph and what is expected of it.

    Attributes:
        op: The operator under test.
        body: Nodes from ``a`` to ``d``.
        left: Channels that the first convolution keeps: 2 where all goes that can.
        known: Channels of ``d`` that the analysis knows to be constant.
        arrays: Further constants.
        wide: Channels of ``d``; ``unread`` those that the consumer does not read.
        flat: ``d`` is (N, wide) and the consumer a Gemm.
        reason: Part of the explanation that must be given.
        name: Tells several cases of one operator apart.
    """

    op: str
    body: str
    left: int = 2
    known: int = 3
    arrays: dict[str, NDArray] = field(default_factory=dict)
    wide: int = CHANNELS
    unread: tuple[int, ...] = (UNREAD,)
    flat: bool = False
    reason: str = ""
    opset: int = 20
    name: str = ""
    side: int = SIDE
    tail: str = ""

    @property
    def label(self) -> str:
        return f"{self.op}-{self.name}" if self.name else self.op


def model_of(case: Case) -> ir.Model:
    """Build a case's graph."""
    rng = np.random.default_rng(7)
    w1 = rng.normal(size=(CHANNELS, 3, 1, 1)).astype(np.float32)
    w1[:3] = 0
    b1 = f32(0, 0.7, -0.6, 0.3, -0.2, 0.5)
    w2 = rng.normal(size=(4, case.wide)).astype(np.float32)
    w2[:, case.unread] = 0
    b2 = rng.normal(size=4).astype(np.float32)
    arrays = {"w1": w1, "b1": b1, "w2": w2 if case.flat else w2[:, :, None, None], "b2": b2} | case.arrays
    consumer = "y = Gemm<transB=1>(d, w2, b2)" if case.flat else "y = Conv(d, w2, b2)"
    outputs = "float[n, 4] y" if case.flat else "float[n, 4, h, w] y"
    text = (
        f"g (float[n, 3, {case.side}, {case.side}] x) => ({outputs}) {{ a = Conv(x, w1, b1) {case.body} {consumer} }}"
    )
    return build(text, arrays, opset=case.opset)


def pointwise(op: str, call: str = "", before: str = "", **options: object) -> Case:
    """Make the case of an activation; ``before`` maps ``a`` into its domain, as ``p``."""
    argument = "p" if before else "a"
    return Case(op, f"{before} d = {call or f'{op}({argument})'}", **options)


def opaque(op: str, body: str, **options: object) -> Case:
    """Make the case of an operator that keeps whole what it reads."""
    return Case(op, body, **{"left": CHANNELS, "known": 0, "reason": f"pinned by {op}"} | options)


UNIT = "p = Sigmoid(a)"  # (0, 1)
NORMS = {"scale": f32(0.5, 1, 0, 2, 1, 1), "shift": f32(0.1, 0, 0.4, -1, 0, 2)}
STATS = {"mean": f32(0, 0.1, 0, 0.2, 0, 0), "var": f32(0, 1, 1, 0.5, 2, 1)}
SLOPE = {"slope": f32(0.1, 0.2, 0.3, 0.4, 0.5, 0.6).reshape(6, 1, 1)}
TWO = {"two": scalar(2)}
BOOL = "g = Cast<to=9>(a)"
COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
SWITCH = np.array([True, False, True, True, False, True]).reshape(6, 1, 1)
SHUFFLE = {"split": i64(0, 2, 3, 4, 4), "join": i64(0, 6, 4, 4)}
SMOOTH = {"scales": f32(1, 1, 2, 2), "sizes": i64(1, 6, 8, 8), "space": i64(8, 8)}

ACTIVATIONS = [
    *(
        pointwise(op)
        for op in (
            "Abs",
            "Asinh",
            "Atan",
            "Ceil",
            "Celu",
            "Cos",
            "Elu",
            "Erf",
            "Exp",
            "Floor",
            "Gelu",
            "HardSigmoid",
            "HardSwish",
            "Identity",
            "LeakyRelu",
            "Mish",
            "Neg",
            "Relu",
            "Selu",
            "Shrink",
            "Sigmoid",
            "Sign",
            "Sin",
            "Softplus",
            "Softsign",
            "Tan",
            "Tanh",
            "ThresholdedRelu",
            "Cosh",
            "Sinh",
            "Round",
            "Dropout",
        )
    ),
    *(pointwise(op, before=UNIT) for op in ("Acos", "Asin", "Atanh", "Log", "Reciprocal", "Sqrt")),
    pointwise("Acosh", before="q = Exp(a) p = Add(q, two)", arrays=TWO),
    pointwise("Swish", opset=24),
    pointwise("Swish", "Swish<alpha=0.3>(a)", opset=24, name="alpha"),
    pointwise("Gelu", 'Gelu<approximate="tanh">(a)', name="tanh"),
    pointwise("LeakyRelu", "LeakyRelu<alpha=0.3>(a)", name="alpha"),
    pointwise("Elu", "Elu<alpha=0.3>(a)", name="alpha"),
    pointwise("Celu", "Celu<alpha=0.3>(a)", name="alpha"),
    pointwise("Selu", "Selu<alpha=0.3, gamma=2.0>(a)", name="alpha"),
    pointwise("HardSigmoid", "HardSigmoid<alpha=0.9, beta=0.1>(a)", name="alpha"),
    pointwise("Shrink", "Shrink<lambd=0.1, bias=0.05>(a)", name="bias"),
    pointwise("ThresholdedRelu", "ThresholdedRelu<alpha=0.65>(a)", name="alpha"),
    pointwise("Clip", "Clip(a, low, high)", arrays={"low": scalar(-0.5), "high": scalar(0.6)}),
    pointwise("Clip", "Clip(a, , high)", arrays={"high": scalar(0.6)}, name="upper"),
    pointwise("Clip", "Clip(a, low)", arrays={"low": scalar(-0.5)}, name="lower"),
    pointwise("Clip", "Clip(a)", name="unbounded"),
    *(
        pointwise(
            op,
            f"{op}(q)",
            before="m = Mul(a, ten) q = Identity(m)",
            arrays={"ten": scalar(10)},
            known=1,
            left=4,
            name="at-the-jump",
        )
        for op in ("Ceil", "Floor")
    ),
    pointwise("Cast", "Cast<to=1>(p)", before="p = Cast<to=11>(a)", name="wider"),
    pointwise("Cast", "Cast<to=1>(p)", before="p = Cast<to=7>(a)", name="integer"),
    pointwise("Cast", "Cast<to=1>(p)", before="p = Cast<to=10>(a)", name="half"),
    pointwise("Cast", "Cast<to=1>(g)", before=BOOL, name="bool"),
    pointwise("CastLike", "CastLike(p, two)", before="p = Cast<to=11>(a)", arrays=TWO),
    *(pointwise(op, "Cast<to=1>(m)", before=f"m = {op}(a, low)", arrays={"low": scalar(-0.5)}) for op in COMPARISONS),
    *(
        pointwise(op, "Cast<to=1>(m)", before=f"{BOOL} m = {op}(g, on)", arrays={"on": SWITCH})
        for op in ("And", "Or", "Xor")
    ),
    pointwise("Not", "Cast<to=1>(m)", before=f"{BOOL} m = Not(g)"),
    pointwise("Dropout", "Dropout(a, r, t)", arrays={"r": scalar(0.5), "t": scalar(False, np.bool_)}, name="inference"),
    pointwise("PRelu", "PRelu(a, slope)", arrays=SLOPE),
    pointwise("PRelu", "PRelu(a, slope)", arrays={"slope": f32(0.3)}, name="one-slope"),
]

ARITHMETIC = [
    *(pointwise(op, f"{op}(a, slope)", arrays=SLOPE, name="vector") for op in ("Add", "Sub", "Mul", "Div", "Min", "Max")),
    *(pointwise(op, f"{op}(slope, a)", arrays=SLOPE, name="swapped") for op in ("Sub", "Mul")),
    pointwise("Div", "Div(slope, p)", before=UNIT, arrays=SLOPE, left=6, name="divisor"),  # must stay clear of zero
    pointwise("Pow", "Pow(a, two)", arrays=TWO),
    pointwise("Pow", "Pow(p, slope)", before=UNIT, arrays=SLOPE, name="vector"),
    pointwise("Sum", "Sum(a, slope, slope)", arrays=SLOPE),
    pointwise("Mean", "Mean(a, slope)", arrays=SLOPE),
    pointwise("Max", "Max(a, slope, two)", arrays=SLOPE | TWO, name="three"),
    pointwise("Div", "Cast<to=1>(q)", before="m = Mul(a, slope) i = Cast<to=7>(m) q = Div(i, two)", known=2, left=3, name="integers",
              arrays={"slope": f32(1, 11, 11, 9, 9, 9).reshape(6, 1, 1), "two": i64(2)}),
    pointwise("Mul", "Cast<to=1>(q)", before="m = Mul(a, slope) i = Cast<to=6>(m) k = Mul(i, big) q = Mul(k, big)", known=1, left=4,
              arrays={"slope": f32(1, 11, 11, 9, 9, 9).reshape(6, 1, 1), "big": np.array(100000, np.int32)}, name="wraps"),
    pointwise("Add", "Add(a, r)", before="r = Tanh(a) p = Identity(a)", name="residual"),
    pointwise("Mul", "Mul(a, s)", before="q = GlobalAveragePool(a) s = Sigmoid(q) p = Identity(a)", name="gate"),
    pointwise("Mul", "Mul(a, m)", arrays={"m": f32(1, 0, 1, 1, 1, 1).reshape(6, 1, 1)}, known=3, name="mask"),
    pointwise("Mul", "Mul(a, m)", arrays={"m": f32(1, 1, 1, 0, 1, 1).reshape(6, 1, 1)}, left=1, known=4, name="dead"),
    Case(
        "Where",
        "d = Where(c, a, slope)",
        arrays={"c": np.array([1, 0, 1, 1, 1, 1], bool).reshape(6, 1, 1)} | SLOPE,
    ),
    Case("Where", "t = Tanh(a) m = Sub(a, t) b = Less(m, low) d = Where(b, a, slope)", arrays={"low": scalar(-1e-3)} | SLOPE, name="computed"),
    Case("Where", "b = Less(x, low) n = ReduceMax<keepdims=1>(x, one) g = Greater(n, low) d = Where(g, a, half)", known=1, left=4,
         arrays={"low": scalar(0.1), "half": scalar(0.7), "one": i64(1)}, name="either-side"),
    pointwise("IsNaN", "Where(m, two, a)", before="m = IsNaN(a)", arrays=TWO),
    pointwise("IsInf", "Where(m, two, a)", before="m = IsInf(a)", arrays=TWO),
    pointwise("QuantizeLinear", "DequantizeLinear(q, s, z)", before="q = QuantizeLinear(a, s, z) p = Identity(a)",
              arrays={"s": scalar(0.013), "z": scalar(3, np.int8)}),
    pointwise("QuantizeLinear", "DequantizeLinear(q, s)", before="q = QuantizeLinear(a, s) p = Identity(a)",
              arrays={"s": scalar(0.013)}, name="unsigned"),
    pointwise("QuantizeLinear", "DequantizeLinear(q, s)",
              before="q = QuantizeLinear<output_dtype=17>(a, s) p = Identity(a)",
              arrays={"s": scalar(0.013)}, opset=21, known=0, left=5, name="float8"),
    pointwise("DequantizeLinear", "DequantizeLinear(q, s, z)", before="q = QuantizeLinear(a, s, z) p = Identity(a)",
              arrays={"s": scalar(0.02), "z": scalar(128, np.uint8)}),
    Case("DequantizeLinear", "q = QuantizeLinear<axis=1>(a, s, z) d = DequantizeLinear<axis=1>(q, s, z)",
         arrays={"s": f32(0.1, 0.2, 0.1, 0.2, 0.1, 0.2), "z": np.zeros(6, np.int8)}, left=6, known=0,
         reason="pinned by QuantizeLinear", name="per-axis"),
]  # fmt: skip

LINEAR = [
    Case("Conv", "d = Conv<strides=[2, 2], dilations=[2, 2]>(a, k)", wide=2, unread=(), known=0,
         arrays={"k": np.pad(np.ones((2, 5, 2, 2), np.float32), ((0, 0), (0, 1), (0, 0), (0, 0)))}),
    Case("Conv", "d = Conv<pads=[1, 0, 0, 1]>(a, k)", wide=2, unread=(), known=0, left=3,
         reason="non-zero constant under zero padding", name="asymmetric",
         arrays={"k": np.pad(np.ones((2, 5, 2, 2), np.float32), ((0, 0), (0, 1), (0, 0), (0, 0)))}),
    Case("Conv", 'd = Conv<auto_pad="SAME_UPPER">(a, k)', wide=2, unread=(), known=0, left=3, name="auto_pad",
         arrays={"k": np.pad(np.ones((2, 5, 2, 2), np.float32), ((0, 0), (0, 1), (0, 0), (0, 0)))}),
    Case("Conv", 'd = Conv<auto_pad="VALID">(a, k)', wide=2, unread=(), known=0, name="auto_valid",
         arrays={"k": np.pad(np.ones((2, 5, 2, 2), np.float32), ((0, 0), (0, 1), (0, 0), (0, 0)))}),
    Case("Conv", "d = Conv<group=6>(a, k)", known=3, name="depthwise",
         arrays={"k": np.arange(1, 25, dtype=np.float32).reshape(6, 1, 2, 2)}),
    Case("Conv", "d = Conv<group=6, pads=[1, 1, 1, 1]>(a, k)", known=1, left=4, name="depthwise-padded",
         arrays={"k": np.arange(1, 55, dtype=np.float32).reshape(6, 1, 3, 3)}),
    Case("Conv", "d = Conv<group=2>(a, k)", wide=4, unread=(), known=2, left=3, name="dead-group",
         arrays={"k": np.array([1, 1, 1, 1, 1, 0] * 2, np.float32).reshape(4, 3, 1, 1)}),
    Case("Conv", "d = Conv<group=3>(a, k)", wide=3, unread=(), known=1, left=4, name="equal-groups",
         reason="equal groups at Conv", arrays={"k": np.ones((3, 2, 1, 1), np.float32)}),
    Case("Conv", "f = Reshape(a, t) g = Conv(f, k) d = Reshape(g, u)", wide=2, unread=(), known=0, name="1-D",
         arrays={"t": i64(0, 6, 16), "u": i64(0, 2, 4, 3), "k": np.pad(np.ones((2, 5, 5), np.float32), ((0, 0), (0, 1), (0, 0)))}),
    Case("Conv", "f = Reshape(a, t) g = Conv(f, k) d = Reshape(g, u)", wide=2, unread=(), known=0, name="3-D",
         arrays={"t": i64(0, 6, 4, 2, 2), "u": i64(0, 2, 4, 2), "k": np.pad(np.ones((2, 5, 1, 1, 2), np.float32), ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0)))}),
    Case("ConvTranspose", "d = ConvTranspose<strides=[2, 2], output_padding=[1, 1]>(a, k)", wide=2, unread=(), known=0,
         left=3, arrays={"k": np.concatenate([np.ones((5, 2, 2, 2), np.float32), np.zeros((1, 2, 2, 2), np.float32)])}),
    Case("ConvTranspose", "d = ConvTranspose<group=6>(a, k)", known=1, left=4, name="depthwise",
         arrays={"k": np.arange(1, 25, dtype=np.float32).reshape(6, 1, 2, 2)}),
    Case("ConvTranspose", "f = Reshape(a, t) g = ConvTranspose(f, k) d = Reshape(g, u)", wide=2, unread=(), known=0,
         left=3, name="1-D", arrays={"t": i64(0, 6, 16), "u": i64(0, 2, 6, 3),
                                     "k": np.concatenate([np.ones((5, 2, 3), np.float32), np.zeros((1, 2, 3), np.float32)])}),
    *(
        Case("Gemm", f"f = Flatten(q) d = Gemm<transB={t}>(f, k, c)".replace("f = Flatten(q)", "q = GlobalMaxPool(a) f = Flatten(q)"),
             flat=True, known=0, name=f"transB={t}",
             arrays={"k": np.ones((6, 6), np.float32) + np.eye(6, dtype=np.float32), "c": f32(1, 2, 3, 4, 5, 6)}, left=3)
        for t in (0, 1)
    ),
    Case("Gemm", "q = GlobalMaxPool(a) f = Flatten(q) d = Gemm<alpha=0.5, beta=2.0>(f, k, c)", flat=True, known=0,
         left=6, reason="pinned by Gemm", name="alpha", arrays={"k": np.eye(6, dtype=np.float32), "c": f32(*range(6))}),
    Case("Gemm", "q = GlobalMaxPool(a) f = Flatten(q) h = Transpose(f) d = Gemm<transA=1>(h, k, c)", flat=True, known=0,
         left=6, reason="pinned by Gemm", name="transA", arrays={"k": np.eye(6, dtype=np.float32), "c": f32(*range(6))}),
    Case("Gemm", "q = GlobalMaxPool(a) f = Flatten(q) d = Gemm(f, k, c)", flat=True, known=3, name="scalar-bias",
         arrays={"k": np.eye(6, dtype=np.float32), "c": scalar(2)}),
    Case("MatMul", "q = GlobalMaxPool(a) f = Flatten(q) d = MatMul(f, k)", flat=True, known=3,
         arrays={"k": np.eye(6, dtype=np.float32)}),
    Case("MatMul", "t = Transpose<perm=[0, 2, 3, 1]>(a) m = MatMul(t, k) d = Transpose<perm=[0, 3, 1, 2]>(m)", known=3,
         arrays={"k": np.eye(6, dtype=np.float32)}, name="N-D"),
    Case("MatMul", "d = MatMul(a, k)", known=0, left=6, name="in-space", reason="pinned by MatMul",
         arrays={"k": np.ones((4, 4), np.float32)}),
]  # fmt: skip

NORMALISATION = [
    # Channel 2 has scale 0; channel 0 has variance 0; channels 0 and 1 are constant before.
    pointwise("BatchNormalization", "BatchNormalization<epsilon=0.01>(a, scale, shift, mean, var)", arrays=NORMS | STATS),
    pointwise("BatchNormalization", "BatchNormalization(a, scale, shift, mean, var)", opset=14, name="opset-14",
              arrays=NORMS | STATS | {"scale": f32(1, 1, 1, 0, 1, 1)}, left=1, known=4),
    pointwise("InstanceNormalization", "InstanceNormalization<epsilon=0.01>(a, scale, shift)", arrays=NORMS, known=2, left=3),
    pointwise("GroupNormalization", "GroupNormalization<num_groups=3>(a, scale, shift)", arrays=NORMS, opset=21, left=6, known=1),
    Case("GroupNormalization", "d = GroupNormalization<num_groups=3>(a, scale, shift)", opset=21, left=2,
         unread=(0, 1, 4, 5), known=1, arrays=NORMS, name="whole-groups"),
    Case("GroupNormalization", "e = Conv(a, k) d = GroupNormalization<num_groups=2, epsilon=0.01>(e, scale, shift)", opset=21, left=2, wide=8, known=4, unread=(),
         arrays={"scale": f32(*range(1, 9)), "shift": f32(*range(8)),
                 "k": np.repeat(f32(1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0).reshape(2, 6), 4, 0)[:, :, None, None]}, name="zero-group"),
    Case("LayerNormalization", "d = LayerNormalization(a, g)", arrays={"g": f32(1, 2, 3, 4)}, known=0, left=5),
    *(
        Case(op, f"d = {op}(a, g)", arrays={"g": np.arange(1, 25, dtype=np.float32).reshape(6, 1, 4)}, known=0, left=6,
             reason=f"pinned by {op}", opset=opset, name="scale-by-channel")
        for op, opset in (("LayerNormalization", 20), ("RMSNormalization", 23))
    ),
    Case("LayerNormalization", "d = LayerNormalization<axis=1>(a, g)", arrays={"g": np.ones((6, 4, 4), np.float32)},
         known=0, left=6, reason="pinned by LayerNormalization", name="channels"),
    Case("RMSNormalization", "d = RMSNormalization(a, g)", arrays={"g": f32(1, 2, 3, 4)}, known=0, left=5, opset=23),
    Case("LpNormalization", "d = LpNormalization<axis=2, p=2>(p)".replace("(p)", "(q)").replace("d =", "q = Exp(a) d ="),
         known=0, left=5),
    opaque("LRN", "d = LRN<size=3>(a)"),
    Case("LRN", "c = Conv(a, k) d = LRN<size=1, alpha=2.0>(c)", known=0, left=1, wide=1, unread=(), name="one-channel",
         arrays={"k": f32(0, 1, 0, 0, 0, 0).reshape(1, 6, 1, 1)}),
    Case("Softmax", "d = Softmax(a)", known=0, left=5),
    opaque("Softmax", "d = Softmax<axis=1>(a)", name="channels"),
    opaque("Softmax", "d = Softmax<axis=-3>(a)", name="negative"),
    Case("LogSoftmax", "d = LogSoftmax<axis=2>(a)", known=0, left=5),
    Case("Hardmax", "d = Hardmax<axis=3>(a)", known=0, left=5),
    *(
        Case(op, f"g = {op}<axis=2, keepdims=1>(a) d = Cast<to=1>(g)", known=0, left=5) for op in ("ArgMax", "ArgMin")
    ),
    *(
        Case(op, f"f = Reshape(a, t) g = {op}<axis=-1, keepdims=0>(f) d = Cast<to=1>(g)", known=0, left=5, flat=True,
             arrays={"t": i64(0, 6, 16)}, name="keepdims=0")
        for op in ("ArgMax", "ArgMin")
    ),
    *(
        Case(op, f"f = Reshape(a, t) h = Transpose<perm=[0, 2, 1]>(f) g = {op}<axis=1, keepdims=0>(h) c = Cast<to=1>(g)"
             " r = Transpose<perm=[1, 0]>(c) d = Transpose<perm=[1, 0]>(r)", known=0, left=5, flat=True, arrays={"t": i64(0, 6, 16)},
             name="moved")
        for op in ("ArgMax", "ArgMin")
    ),
    Case("CumSum", "d = CumSum(a, i)", arrays={"i": np.array(2)}, known=1, left=4),
    Case("CumSum", "d = CumSum<exclusive=1, reverse=1>(a, i)", arrays={"i": np.array(-1, np.int32)}, known=1, left=4, name="exclusive"),
    opaque("CumSum", "d = CumSum(a, i)", arrays={"i": np.array(1)}, name="channels"),
    Case("GridSample", "g = Conv(x, gw) h = Transpose<perm=[0, 2, 3, 1]>(g) d = GridSample(a, h)", known=1, left=4,
         arrays={"gw": np.ones((2, 3, 1, 1), np.float32)}),
    Case("RoiAlign", "d = RoiAlign<output_height=2, output_width=2>(a, roi, i)", known=1, left=4,
         arrays={"roi": f32(0, 0, 2, 2).reshape(1, 4), "i": i64(0)}),
    opaque("TopK", "d, i = TopK<axis=1>(a, k)", arrays={"k": i64(6)}, name="channels"),
    Case("TopK", "d, i = TopK<axis=2>(a, k)", arrays={"k": i64(3)}),
    Case("TopK", "v, i = TopK(a, k) d = Cast<to=1>(i)", arrays={"k": i64(3)}, known=0, left=5, name="places"),
    Case("Trilu", "d = Trilu(a, k)", arrays={"k": np.array(-1)}, known=1, left=4),
    opaque("Trilu", "t = Transpose<perm=[0, 2, 3, 1]>(a) u = Trilu<upper=0>(t) d = Transpose<perm=[0, 3, 1, 2]>(u)", name="channels"),
    opaque("ArgMax", "g = ArgMax<axis=1>(a) c = Cast<to=1>(g) d = Add(a, c)", reason="channels are compared", name="channels"),
]  # fmt: skip

SPACE = [
    pointwise("MaxPool", "MaxPool<kernel_shape=[2, 2], pads=[1, 1, 0, 0], ceil_mode=1, strides=[2, 2]>(a)"),
    pointwise("AveragePool", "AveragePool<kernel_shape=[2, 2]>(a)"),
    pointwise("AveragePool", "AveragePool<kernel_shape=[2, 2], pads=[1, 1, 0, 0]>(a)", name="padded"),
    pointwise("AveragePool", "AveragePool<kernel_shape=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1>(a)",
              known=1, left=4, name="counted"),
    pointwise("AveragePool", "AveragePool<kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, count_include_pad=1>(a)",
              known=1, left=4, name="ceil"),
    pointwise("AveragePool", 'AveragePool<kernel_shape=[2, 2], auto_pad="SAME_LOWER">(a)', name="auto_pad"),
    pointwise("LpPool", "LpPool<kernel_shape=[2, 2], p=2>(a)", known=1, left=4),
    *(pointwise(op) for op in ("GlobalAveragePool", "GlobalMaxPool")),
    pointwise("GlobalLpPool", known=1, left=4),
    *(pointwise(op, f"{op}(a, s)", arrays={"s": i64(2, -1)}) for op in ("ReduceMean", "ReduceMax", "ReduceMin")),
    *(
        pointwise(op, f"{op}(a, s)", arrays={"s": i64(2, 3)}, known=1, left=4)
        for op in ("ReduceL1", "ReduceL2", "ReduceSum", "ReduceSumSquare")
    ),
    *(
        Case(op, f"d = {op}<axes=[2, 3], keepdims=0>(a)", flat=True, opset=13, known=known, left=left, name="attribute")
        for op, known, left in (
            ("ReduceMean", 3, 2), ("ReduceMax", 3, 2), ("ReduceMin", 3, 2), ("ReduceL1", 1, 4), ("ReduceL2", 1, 4),
            ("ReduceSumSquare", 1, 4),
        )
    ),
    Case("ReduceSum", "d = ReduceSum<keepdims=0>(a, s)", flat=True, known=1, left=4, arrays={"s": i64(-2, -1)}, name="squeezed"),
    Case("ReduceMean", "m = ReduceMean(a, s) d = Add(a, m)", left=6, known=0, arrays={"s": i64(1)},
         reason="all channels are reduced to one number at ReduceMean", name="channels"),
    Case("ReduceMax", "m = ReduceMax(a, s) d = Add(a, m)", left=6, known=0, arrays={"s": i64()},
         name="empty"),
    pointwise("ReduceMean", "ReduceMean<noop_with_empty_axes=1>(a)", opset=18, name="no-op"),
    pointwise("Resize", "Resize(a, , scales)", arrays=SMOOTH),
    pointwise("Resize", 'Resize<mode="cubic", antialias=1, axes=[2, 3]>(a, , , space)', arrays=SMOOTH, name="sizes"),
    pointwise("Resize", 'Resize<mode="linear">(a, , , full)', arrays={"full": i64(3, 6, 8, 8)}, name="full-sizes"),
    pointwise("Resize", 'Resize<mode="linear", coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=9.0>(a, roi, scales)',
              arrays={"roi": f32(0, 0, -1, -1, 1, 1, 2, 2), "scales": f32(1, 1, 2, 2)}, known=0, left=5, name="crop"),
    opaque("Resize", "d = Resize(a, , t)", arrays={"t": f32(1, 2, 1, 1)}, wide=12, unread=(10, 11), reason="channels are interpolated", name="channels"),
]  # fmt: skip

VIEWS = [
    Case("Concat", "r = Relu(a) d = Concat<axis=1>(a, r)", wide=12, unread=(5, 11), known=6),
    Case("Concat", "r = Relu(a) d = Concat<axis=-3>(a, r)", wide=12, unread=(5, 3, 9, 11), known=6, left=1, name="negative"),
    Case("Concat", "r = Relu(a) d = Concat<axis=2>(a, r)", known=2, left=3, name="space"),
    Case("Concat", "l = Slice(a, last, end, two) r = Slice(a, zero, one, two) d = Concat<axis=2>(l, a, r)", name="circular",
         arrays={"last": i64(-1), "end": i64(2**62), "zero": i64(0), "one": i64(1), "two": i64(2)}),
    Case("Concat", "e = Concat<axis=1>(x, x) d = Concat<axis=2>(a, e)", known=0, left=6, reason="tied at Concat", name="input"),
    Case("DepthToSpace", "c = Concat<axis=1>(a, a) d = DepthToSpace<blocksize=2>(c)", wide=3, unread=(1,), known=0, left=4, name="columns"),
    *(
        Case("DepthToSpace", f'e = Conv(a, k, q) d = DepthToSpace<blocksize=2, mode="{mode}">(e)', wide=4, unread=(3,), known=2, left=1, name=mode,
             arrays={"q": q, "k": (np.kron(f32(0, 0, 1, 1).reshape(4, 1), np.ones((4, 1), np.float32))[order] * f32(0, 1, 1, 1, 0, 0).reshape(1, 6))[:, :, None, None]})
        for mode, order, q in (
            ("CRD", np.arange(16), np.repeat(f32(0, 0.5, 1, 1), 4)), ("DCR", np.arange(16).reshape(4, 4).T.reshape(-1), np.tile(f32(0, 0.5, 1, 1), 4))
        )
    ),
    Case("SpaceToDepth", "d = SpaceToDepth<blocksize=2>(a)", wide=24, unread=(5, 11, 17, 23), known=12),
    Case("SpaceToDepth", "d = SpaceToDepth<blocksize=2>(a)", wide=24, unread=(20, 21, 22, 23), known=12, left=3, name="one-place-read"),
    Case("Tile", "d = Tile(a, t)", arrays={"t": i64(1, 2, 1, 1)}, wide=12, unread=(5, 11), known=6),
    Case("Tile", "d = Tile(a, t)", arrays={"t": i64(1, 1, 3, 2)}, name="space"),
    Case("Tile", "s = Shape(a) m = Mul(s, zero) t = Max(m, t0) d = Tile(a, t)", arrays={"zero": i64(0), "t0": i64(1, 1, 3, 2)}, known=0, left=6,
         reason="its length is read by Shape", name="computed"),
    Case("Shape", "s = Shape(a) f = Cast<to=1>(s) m = ReduceMean<keepdims=0>(f) d = Add(a, m)", known=0, left=6, reason="its length is read by Shape"),
    Case("Shape", "s = Shape(a) b = Gather(s, zero) f = Cast<to=1>(b) d = Add(a, f)", known=0, left=5, arrays={"zero": np.array(0)}, name="batch"),
    Case("Shape", "s = Shape(a) b = Slice(s, one, two) f = Cast<to=1>(b) d = Mul(a, f)", known=3, left=2,
         arrays={"one": i64(1), "two": i64(2)}, name="channels"),
    Case("Shape", "s = Shape<start=0, end=1>(a) f = Cast<to=1>(s) d = Mul(a, f)", known=1, left=4, name="part"),
    Case("Size", "s = Size(a) f = Cast<to=1>(s) d = Div(a, f)", known=0, left=6, reason="its length is read by Size"),
    pointwise("Expand", "Expand(p, t)", before="p = GlobalMaxPool(a)", arrays={"t": i64(1, 6, 4, 4)}),
    pointwise("Expand", "Expand(p, t)", before="p = GlobalMaxPool(a)", arrays={"t": i64(1, 1, 4, 4)}, name="ones"),
    Case("Flatten", "d = Flatten(a)", flat=True, wide=96, known=48, unread=tuple(range(80, 96))),
    Case("Flatten", "f = Flatten<axis=-3>(a) d = Reshape(f, t)", flat=True, wide=96, known=48,
         unread=tuple(range(80, 96)), arrays={"t": i64(-1, 96)}, name="negative"),
    Case("Reshape", "d = Reshape(a, t)", flat=True, wide=96, known=48, unread=tuple(range(80, 96)), arrays={"t": i64(0, -1)}),
    Case("Reshape", "d = Reshape(a, t)", flat=True, wide=96, known=48, unread=(), left=3, arrays={"t": i64(-1, 96)}, name="minus-one"),
    Case("Reshape", "s = Reshape(a, split) t = Transpose<perm=[0, 2, 1, 3, 4]>(s) d = Reshape(t, join)",
         arrays=SHUFFLE, name="shuffle"),
    Case("Reshape", "r = Tanh(a) c = Concat<axis=1>(a, r) s = Reshape(c, split) t = Transpose<perm=[0, 2, 1, 3, 4]>(s) d = Reshape(t, join)",
         arrays={"split": i64(0, 2, 6, 4, 4), "join": i64(0, 12, 4, 4)}, wide=12, unread=(10, 11), known=6, name="shuffle-of-twins"),
    Case("Reshape", "s = Reshape(a, split) t = Transpose<perm=[0, 2, 1, 4, 3]>(s) d = Reshape(t, join)", arrays=SHUFFLE,
         name="shuffle-and-transpose"),
    Case("Reshape", "s = Reshape(a, split) t = Transpose<perm=[0, 2, 1, 3, 4]>(s) f = Gather<axis=3>(t, back) d = Reshape(f, join)",
         arrays=SHUFFLE | {"back": i64(3, 1, 2, 0)}, name="shuffle-and-flip"),
    Case("Reshape", "s = Shape(a) b = Gather(s, zero) u = Unsqueeze(b, one) t = Concat<axis=0>(u, rest) d = Reshape(a, t)",
         flat=True, wide=96, known=48, unread=tuple(range(80, 96)),
         arrays={"zero": np.array(0), "one": i64(0), "rest": i64(-1)}, name="computed"),
    Case("Squeeze", "q = GlobalMaxPool(a) d = Squeeze(q, s)", flat=True, arrays={"s": i64(-1, 2)}),
    Case("Unsqueeze", "q = GlobalMaxPool(a) f = Flatten(q) d = Unsqueeze(f, s)", arrays={"s": i64(-1, 2)}),
    Case("Transpose", "t = Transpose<perm=[0, 2, 3, 1]>(a) r = Relu(t) d = Transpose<perm=[0, 3, 1, 2]>(r)"),
    Case("Transpose", "t = Transpose(a) d = Transpose(t)", name="reversed"),
    Case("Split", "l, r = Split<axis=1>(a, s) d = Concat<axis=1>(r, l)", arrays={"s": i64(2, 4)}, unread=(3,)),
    Case("Split", "l, r = Split<axis=1, num_outputs=2>(a) d = Concat<axis=1>(r, l)", unread=(2,), name="num_outputs"),
    Case("Split", "l, r = Split<axis=-3>(a) d = Concat<axis=1>(r, l)", unread=(2,), opset=13, name="equal"),
    Case("Split", "l, r = Split<axis=1>(a, s) d = Relu(r)", arrays={"s": i64(2, 4)}, wide=4, unread=(3,), known=1, name="half-unused"),
    opaque("Split", "l, r = Split<axis=2>(a, s) d = Add(l, r)", arrays={"s": i64(2, 2)}, name="split-space", left=2, known=3, reason=""),
    Case("Slice", "d = Slice(a, s, e, x1)", arrays={"s": i64(1), "e": i64(2**62), "x1": i64(1)}, wide=5, unread=(4,), known=2),
    Case("Slice", "d = Slice(a, s, e, x1, t)", arrays={"s": i64(0), "e": i64(6), "x1": i64(-3), "t": i64(2)}, wide=3,
         unread=(), known=2, left=1, name="step"),
    Case("Slice", "d = Slice(a, s, e, x1)", arrays={"s": i64(-5, 1), "e": i64(-1, 3), "x1": i64(1, 2)}, wide=4, unread=(),
         known=2, name="negative"),
    opaque("Slice", "d = Slice(a, s, e, x1, t)", arrays={"s": i64(5), "e": i64(-7), "x1": i64(1), "t": i64(-1)},
           reason="the slice runs backwards", unread=(0,), name="backwards"),
    Case("Pad", "d = Pad(a, p)", arrays={"p": i64(0, 0, 1, 1, 0, 0, 0, 2)}, known=1, left=4),
    Case("Pad", "d = Pad(a, p, v)", arrays={"p": i64(0, 0, 1, 1, 0, 0, 0, 2), "v": scalar(0.7)}, known=1, left=4, name="value"),
    Case("Pad", "m = Conv(a, k) v = ReduceMax<keepdims=0>(m) d = Pad(a, p, v)", known=0, left=6, name="computed-value",
         arrays={"p": i64(0, 0, 1, 1, 0, 0, 0, 2), "k": f32(0, 0, 0, 0, 0, 1).reshape(1, 6, 1, 1)}),
    *(
        Case("Pad", f'd = Pad<mode="{mode}">(a, p)', arrays={"p": i64(0, 0, 1, 1, 0, 0, 0, 2)}, name=mode)
        for mode in ("edge", "reflect", "wrap")
    ),
    Case("Pad", "d = Pad(a, p, v, x1)", arrays={"p": i64(1, 2), "v": scalar(0.3), "x1": i64(1)}, wide=9,
         unread=(6,), known=6, name="channels"),
    Case("Pad", "d = Pad(a, p)", arrays={"p": i64(0, 0, -1, 0, 0, 0, 0, -1)}, name="crop"),
    opaque("Pad", 'd = Pad<mode="edge">(a, p)', arrays={"p": i64(0, 1, 0, 0, 0, 0, 0, 0)}, wide=7, unread=(6,), name="edge-channels"),
    Case("Gather", "d = Gather<axis=1>(a, i)", arrays={"i": i64(3, 3, -1, 1, 0, 4)}, unread=(2,), known=2),
    Case("Gather", "d = Gather<axis=-3>(a, i)", arrays={"i": i64(-3, -2)}, wide=2, unread=(), known=0, name="negative"),
    Case("Gather", "d = Gather<axis=2>(a, i)", arrays={"i": i64(1, 0, 0)}, name="space"),
]  # fmt: skip

SUBGRAPHS = {
    "If": "q = ReduceMax<keepdims=0>(x) c = Cast<to=9>(q) d = If(c) <then_branch = t () => (float[n, 6, 4, 4] u) { u = Relu(a) },"
    " else_branch = e () => (float[n, 6, 4, 4] v) { v = Neg(a) }>",
    "Loop": "d, z = Loop(two, c, a) <body = l (int64 i, bool k, float[n, 6, 4, 4] s) => (bool ko, float[n, 6, 4, 4] so,"
    " float[n, 6, 4, 4] scan) { ko = Identity(k) so = Add(s, a) scan = Relu(s) }>",
    "Scan": "d = Scan<num_scan_inputs=1, body = l (float[6, 4, 4] s) => (float[6, 4, 4] so) { so = Relu(s) }>(a)",
}
SEQUENCE = "f = Reshape(a, t) s = Transpose<perm=[2, 0, 1]>(f)"
CELL = {"t": i64(0, 6, 16)}
BYTES = {"s": scalar(0.02), "z": scalar(100, np.uint8)}
QUANTISE = "q = QuantizeLinear(a, s, z)"
EYE8 = np.eye(6, dtype=np.uint8) * 2


def _recurrent(op: str, gates: int) -> Case:
    rng = np.random.default_rng(1)
    arrays = CELL | {"w": rng.normal(size=(1, gates * 2, 6)).astype(np.float32)}
    arrays |= {"r": rng.normal(size=(1, gates * 2, 2)).astype(np.float32), "last": i64(0, 2)}
    call = f"{SEQUENCE} o, h = {op}<hidden_size=2>(s, w, r) d = Squeeze(h, ax)"
    return Case(op, call, arrays=arrays | {"ax": i64(0)}, flat=True, wide=2, unread=(), left=5, known=0)


OPAQUE = [
    opaque("Attention", "f = Reshape(a, t) d3 = Attention<q_num_heads=1, kv_num_heads=1>(f, f, f) d = Reshape(d3, u)",
           opset=23, arrays={"t": i64(0, 6, 16), "u": i64(0, 6, 4, 4)}),
    opaque("ConvInteger", f"{QUANTISE} c = ConvInteger(q, k, z) d = Cast<to=1>(c)", arrays=BYTES | {"k": EYE8[:, :, None, None]}),
    opaque("ConstantOfShape", "s = Shape(a) z = ConstantOfShape(s) d = Add(a, z)", reason="its length is read by Shape"),
    opaque("OneHot", "m = ReduceMax<keepdims=0>(x, inner) i = Cast<to=7>(m) h = OneHot(i, six, range) e = Unsqueeze(h, ax) d = Mul(a, e)",
           arrays={"inner": i64(1, 2, 3), "six": np.array(6), "range": f32(0.5, 1), "ax": i64(2, 3)}, reason="", known=1),
    opaque("Range", "m = ReduceMax<keepdims=0>(a) e = Cast<to=7>(m) k = Clip(e, four, four) r = Range(zero, k, one) f = Cast<to=1>(r) d = Add(a, f)",
           arrays={"zero": np.array(0), "one": np.array(1), "four": np.array(4)}, reason=""),
    opaque("Einsum", 'd = Einsum<equation="nchw->nchw">(a)'),
    _recurrent("GRU", 3),
    opaque("GatherElements", "i = Cast<to=7>(z) d = GatherElements<axis=1>(a, i)".replace("i = Cast", "m = Mul(a, zero) z = Abs(m) i = Cast"),
           arrays={"zero": scalar(0)}),
    opaque("GatherND", "d = GatherND<batch_dims=0>(a, i)", arrays={"i": i64(0, 1).reshape(2, 1)}),
    opaque("If", SUBGRAPHS["If"], reason="read inside If"),
    _recurrent("LSTM", 4),
    opaque("Loop", SUBGRAPHS["Loop"], arrays={"c": scalar(True, np.bool_), "two": np.array(2)}, reason="read inside Loop"),
    opaque("MatMulInteger", f"{QUANTISE} t = Transpose<perm=[0, 2, 3, 1]>(q) c = MatMulInteger(t, k, z) f = Cast<to=1>(c)"
           " d = Transpose<perm=[0, 3, 1, 2]>(f)", arrays=BYTES | {"k": EYE8}),
    opaque("NonMaxSuppression", "b = ReduceMax<keepdims=0>(a, rows) p = ReduceMean(b, last) s = Transpose<perm=[0, 2, 1]>(p)"
           " i = NonMaxSuppression(b, s, k, th) f = Cast<to=1>(i) m = ReduceMean<keepdims=0>(f) d = Add(a, m)",
           arrays={"rows": i64(2), "last": i64(-1), "k": i64(1), "th": f32(0.5)}),
    opaque("QLinearConv", f"{QUANTISE} c = QLinearConv(q, s, z, k, s, z0, s, z) d = DequantizeLinear(c, s, z)",
           arrays=BYTES | {"k": EYE8[:, :, None, None], "z0": scalar(0, np.uint8)}),
    opaque("QLinearMatMul", f"{QUANTISE} t = Transpose<perm=[0, 2, 3, 1]>(q) c = QLinearMatMul(t, s, z, k, s, z0, s, z)"
           " f = DequantizeLinear(c, s, z) d = Transpose<perm=[0, 3, 1, 2]>(f)",
           arrays=BYTES | {"k": EYE8, "z0": scalar(0, np.uint8)}),
    _recurrent("RNN", 1),
    opaque("Scan", SUBGRAPHS["Scan"]),
    opaque("ScatterElements", "d = ScatterElements<axis=0>(a, i, v)",
           arrays={"i": np.zeros((1, 1, 1, 1), np.int64), "v": np.ones((1, 1, 1, 1), np.float32)}),
    opaque("ScatterND", "d = ScatterND(a, i, v)", arrays={"i": i64(0).reshape(1, 1), "v": np.ones((1, 6, 4, 4), np.float32)}),
]  # fmt: skip

CASES = [*ACTIVATIONS, *ARITHMETIC, *LINEAR, *NORMALISATION, *SPACE, *VIEWS, *OPAQUE]
