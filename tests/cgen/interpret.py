"""A plan step by step in NumPy, float64: what the lowering means, independent of any generated code."""

from __future__ import annotations

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from relief_export.cgen import plan as p

_ERF = np.vectorize(math.erf)


def _sigmoid(v):
    return 1 / (1 + np.exp(-v))


def _softplus(v):
    return np.logaddexp(v, 0)


ACTIVATIONS = {
    "Relu": lambda v: np.maximum(v, 0),
    "LeakyRelu": lambda v, a: np.where(v < 0, a * v, v),
    "ThresholdedRelu": lambda v, a: np.where(v > a, v, 0),
    "Sigmoid": _sigmoid,
    "HardSigmoid": lambda v, a, b: np.clip(a * v + b, 0, 1),
    "HardSwish": lambda v: v * np.clip(v / 6 + 0.5, 0, 1),
    "Tanh": np.tanh,
    "Elu": lambda v, a: np.where(v < 0, a * np.expm1(np.minimum(v, 0)), v),
    "Celu": lambda v, a: np.maximum(v, 0) + np.minimum(a * np.expm1(np.minimum(v, 0) / a), 0),
    "Selu": lambda v, a, g: g * np.where(v < 0, a * np.expm1(np.minimum(v, 0)), v),
    "Softplus": _softplus,
    "Softsign": lambda v: v / (1 + np.abs(v)),
    "Mish": lambda v: v * np.tanh(_softplus(v)),
    "Erf": _ERF,
    "Exp": np.exp,
    "Abs": np.abs,
    "Neg": np.negative,
    "Reciprocal": lambda v: 1 / v,
    "GeluErf": lambda v: v * 0.5 * (1 + _ERF(v / math.sqrt(2))),
    "GeluTanh": lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "Clip": np.clip,
}
BINARY = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Max": np.maximum, "Min": np.minimum}


class Interpreter:
    def __init__(self, plan: p.Plan) -> None:
        self.plan = plan
        end = max(m.start + m.size for m in plan.maps)
        self.memory = np.full(end + 1, np.nan)  # what no step has written shows
        self.memory[p.ZERO] = 0

    def run(self, x: np.ndarray) -> np.ndarray:
        m = self.plan.maps[0]
        self.memory[m.start : m.start + m.size] = x.ravel()
        for step in self.plan.steps:
            v = self.compute(step)
            first = v.shape[0] == step.out.channels
            assert first, (step, v.shape)
            for op in step.chain:
                v = self.apply(op, v)
            if isinstance(step, p.Convolution) and step.pool:
                c, h, w = v.shape
                v = v[:, : h // 2 * 2, : w // 2 * 2].reshape(c, h // 2, 2, w // 2, 2).max(axis=(2, 4))
            assert v.shape == step.out.shape
            self.memory[step.out.start : step.out.start + step.out.size] = v.ravel()
        return self.memory[self.plan.output].reshape(self.plan.output_shape)

    def read(self, view: np.ndarray) -> np.ndarray:
        return self.memory[view]

    def apply(self, op: p.Op, v: np.ndarray) -> np.ndarray:
        if op.kind == "Affine":
            return v * op.scale[:, None, None].astype(np.float64) + op.shift[:, None, None]
        if op.kind == "PRelu":
            return np.where(v < 0, op.scale[:, None, None] * v, v)
        if op.kind == "Gate":
            inner = v
            for other in op.inner:
                inner = self.apply(other, inner)
            return v * inner
        if op.operand is not None:
            operand = self.read(op.operand)
            return BINARY[op.kind](operand, v) if op.swapped else BINARY[op.kind](v, operand)
        return ACTIVATIONS[op.kind](v, *op.constants)

    def compute(self, s: p.Step) -> np.ndarray:  # noqa: PLR0911
        if isinstance(s, p.Constant):
            return s.values.astype(np.float64)
        x = self.read(s.source)
        if isinstance(s, p.Move):
            return x
        if isinstance(s, p.Linear):
            return (s.weight.astype(np.float64) @ x + s.bias)[:, None, None]
        if isinstance(s, p.Reduce):
            return {"mean": np.mean, "sum": np.sum, "max": np.max}[s.kind](x, axis=(1, 2), keepdims=True)
        if isinstance(s, p.Softmax):
            e = np.exp(x - x.max(-1, keepdims=True))
            found = e / e.sum(-1, keepdims=True)
            return np.log(found) if s.logarithm else found
        if isinstance(s, p.Convolution):
            return self.convolution(s, x)
        assert isinstance(s, p.Pool)
        return self.pool(s, x)

    @staticmethod
    def windows(  # noqa: PLR0917
        x, kernel, strides, pads, dilations, extent, *, fill
    ):
        t, left, b, r = pads
        more = [k * s for k, s in zip(kernel, strides, strict=True)]  # for windows that ceil_mode lets stick out
        x = np.pad(x, ((0, 0), (t, b + more[0]), (left, r + more[1])), constant_values=fill)
        size = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        found = sliding_window_view(x, size, axis=(1, 2))[:, :: strides[0], :: strides[1]]
        found = found[..., :: dilations[0], :: dilations[1]]
        return found[:, : extent[0], : extent[1]]

    def convolution(self, s, x):
        kernel = s.weight.shape[2:]
        w = self.windows(x, kernel, s.strides, s.pads, s.dilations, s.extent, fill=0)
        per_in, per_out = s.weight.shape[1], len(s.weight) // s.groups
        parts = [
            np.einsum(
                "ihwyx,oiyx->ohw",
                w[g * per_in : (g + 1) * per_in],
                s.weight[g * per_out : (g + 1) * per_out].astype(np.float64),
            )
            for g in range(s.groups)
        ]
        return np.concatenate(parts) + s.bias[:, None, None]

    def pool(self, s, x):
        extent = (s.out.height, s.out.width)
        args = (s.kernel, s.strides, s.pads, s.dilations, extent)
        if s.kind == "max":
            return self.windows(x, *args, fill=-np.inf).max(axis=(3, 4))
        total = self.windows(x, *args, fill=0).sum(axis=(3, 4))
        if s.kind == "mean-padded":
            return total / math.prod(s.kernel)
        return total / self.windows(np.ones_like(x), *args, fill=0).sum(axis=(3, 4))
