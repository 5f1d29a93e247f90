"""Small networks with zeros in every pattern, and ONNX Runtime as the judge of what a file means."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

LENET = """<ir_version: 8, opset_import: ["": 18]>
lenet (float[N,1,14,14] x) => (float[N,4] y) {
  a = Conv <kernel_shape = [5,5]> (x, "conv1.weight", "conv1.bias")
  b = MaxPool <kernel_shape = [2,2], strides = [2,2]> (a)
  c = Conv <kernel_shape = [3,3]> (b, "conv2.weight", "conv2.bias")
  d = Relu (c)
  e = Flatten (d)
  f = Gemm <transB = 1> (e, "fc1.weight", "fc1.bias")
  g = Relu (f)
  y = MatMul (g, "fc2.weight")
}"""
SHAPES = {
    "conv1.weight": (8, 1, 5, 5),
    "conv1.bias": (8,),
    "conv2.weight": (16, 8, 3, 3),
    "conv2.bias": (16,),
    "fc1.weight": (64, 144),
    "fc1.bias": (64,),
    "fc2.weight": (64, 4),
}


def draw(rng, shape, zeros, *, kernels=False):
    """Return normal weights with about the given share of zeros, single or by whole kernel."""
    kept = rng.random(shape[:2] if kernels else shape) >= zeros
    weights = rng.normal(size=shape) * kept.reshape(kept.shape + (1,) * (len(shape) - kept.ndim))
    return weights.astype(np.float32)


@pytest.fixture
def make_lenet():
    def make(zeros=0.9, *, kernels=True, seed=0):
        rng = np.random.default_rng(seed)
        proto = onnx.parser.parse_model(LENET)
        for name, shape in SHAPES.items():
            share = zeros if len(shape) > 1 else zeros / 3
            weights = draw(rng, shape, share, kernels=kernels and len(shape) == 4)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(weights, name))
        return ir.from_proto(proto)

    return make


@pytest.fixture
def make_linear():
    """Return a function from a weight (out, in) to the model y = x · weightᵀ."""

    def make(weight, *, opset=18):
        out, inner = weight.shape
        text = f'<ir_version: 8, opset_import: ["": {opset}]> g (float[N,{inner}] x) => (float[N,{out}] y)'
        proto = onnx.parser.parse_model(text + " { y = Gemm <transB = 1> (x, w) }")
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
        return ir.from_proto(proto)

    return make


@pytest.fixture
def make_conv():
    def make(weight):
        out, inner, height, width = weight.shape
        text = f'<ir_version: 8, opset_import: ["": 18]> g (float[N,{inner},9,9] x) => (float[N,{out},H,W] y)'
        proto = onnx.parser.parse_model(text + f" {{ y = Conv <kernel_shape = [{height},{width}]> (x, w) }}")
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
        return ir.from_proto(proto)

    return make


def session(path, *, optimise=True, saved=None):
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = 1
    if not optimise:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if saved is not None:
        settings.optimized_model_filepath = str(saved)
    return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


@pytest.fixture
def run():
    """Run a model file on seeded normal inputs and return its first output."""

    def go(path, *, optimise=True, batch=5):
        opened = session(path, optimise=optimise)
        rng = np.random.default_rng(1)
        feeds = {i.name: rng.normal(size=[batch, *i.shape[1:]]).astype(np.float32) for i in opened.get_inputs()}
        return opened.run(None, feeds)[0]

    return go


@pytest.fixture
def optimised_ops(tmp_path):
    """Return the operators left in the model after the runtime's default optimisations."""

    def ops(path):
        saved = tmp_path / "optimised.onnx"
        session(path, saved=saved)
        return sorted(node.op_type for node in onnx.load(saved).graph.node)

    return ops
