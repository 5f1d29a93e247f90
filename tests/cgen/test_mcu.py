"""Programs for microcontrollers on this machine: floats against ONNX Runtime and NumPy, integers to the last bit.

RELIEF_C_FUZZ=500 takes more random networks for each code of values.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import subprocess
from dataclasses import replace
from functools import partial

import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from relief_export.cgen import mcu
from relief_export.cgen.c_source import render
from relief_export.cgen.compiler import Library
from relief_export.cgen.connections import CODES, coded
from relief_export.cgen.lower import lower
from relief_export.cgen.mcu import generate
from relief_export.cgen.plan import Convolution, Linear
from relief_export.cgen.quantised import addition, fixed_point, quantised
from relief_export.errors import UnsupportedModelError
from relief_export.formats import Options
from relief_export.formats.int8 import quantise
from relief_export.graph.prepare import fold
from relief_export.graph.shrink import shrink
from tests.cgen import programs
from tests.cgen.interpret import Interpreter
from tests.cgen.programs import COMPILER
from tests.graph.helpers import build, random_feeds, run

NETWORKS = int(os.environ.get("RELIEF_C_FUZZ", "6"))
STRICT = ("-O1", "-Wall", "-Wextra", "-Werror")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")


def sources(model, name, *, code="f32", dense=False):
    return generate(coded(lower(model), code), code, name=name, dense=dense).files


def test_dense_programs_compute_what_onnx_runtime_does(tmp_path):
    cases = programs.networks(tmp_path, range(30_000, 40_000), NETWORKS, partial(sources, dense=True))
    assert len(cases) == NETWORKS
    assert programs.failures(tmp_path, cases, STRICT) == []
    # As for cores without an FPU, where rows of kernels are not written out.
    assert programs.failures(tmp_path, cases, (*STRICT, "-DNET_PLAIN_C")) == []


@pytest.mark.parametrize("code", [code for code in CODES if code != "q8"])
def test_sanitizers_find_nothing_and_the_codes_store_what_they_say(code, tmp_path):
    """The expected outputs are those of a plan with the coded weights, step by step in float64."""
    cases = []
    for case in programs.networks(tmp_path, range(50_000, 60_000), NETWORKS, partial(sources, code=code)):
        plan = coded(lower(programs.network(int(case.name[1:]))), code)
        cases.append(replace(case, coded=Interpreter(plan).run(case.x)))
    for flags in ("-O0",), ("-O1", "-DNET_PLAIN_C"):
        assert programs.sanitized(tmp_path, cases, flags) == []


def kept(weight):
    return weight.reshape(len(weight), -1)


@pytest.mark.parametrize("code", ["int8", "codebook16"])
def test_codes_keep_the_connections_and_few_values(code):
    plan = lower(programs.network(7))
    for before, after in zip(plan.steps, coded(plan, code).steps, strict=True):
        if not isinstance(before, Convolution | Linear):
            assert after is before
            continue
        assert np.array_equal(before.weight != 0, after.weight != 0)
        if code == "codebook16":
            assert len(np.unique(after.weight[after.weight != 0])) <= 15
        else:
            scale = np.abs(kept(before.weight)).max(axis=1, keepdims=True) / 127
            assert np.abs(kept(after.weight) - kept(before.weight)).max() <= scale.max() * 1.001
            assert (np.abs(kept(after.weight) - kept(before.weight)) <= scale * 1.001).all()


def test_rounding_is_that_of_float_arithmetic(tmp_path):
    """Sums of all sizes times scales of all sizes, many of them next to a half."""
    text = render("mcu/shorten.c") + render("mcu/requantise.c", type="int8_t")
    (tmp_path / "r.c").write_text(
        "#include <stdint.h>\n" + text + "void many_run(const int32_t *sums, int8_t *out, const void *more)\n"
        "{\n    const uint32_t *m = (const uint32_t *)more;\n    const uint8_t *s = (const uint8_t *)(m + 100000);\n"
        "    for (int i = 0; i < 100000; i++)\n"
        "        out[i] = requantise(sums[i], m[i] | (uint32_t)s[i] << 24, 3, -128, 127);\n}\n"
    )
    target = tmp_path / "r.so"
    COMPILER.build([tmp_path / "r.c"], target, (*STRICT, "-fsanitize=undefined", "-fno-sanitize-recover=all"))
    function = Library(target, "many", (1, 1), 0)._function
    rng = np.random.default_rng(1)
    size = 100_000
    sums = (rng.integers(-(2**31), 2**31 - 1, size) >> rng.integers(0, 32, size)).astype(np.int32)
    halves = (rng.integers(0, 300, size) + 0.5) / np.maximum(np.abs(sums.astype(np.float64)), 1)
    for scale in (
        np.exp2(rng.uniform(-34, 10, size)),
        np.clip(halves, 2.0**-36, 1000),
        2.0 ** rng.integers(-30, 9, size),
    ):
        numbers = scale.astype(np.float32)
        multiplier, shift = fixed_point(numbers)
        assert np.array_equal(np.ldexp(multiplier.astype(np.float64), -shift.astype(int)), numbers)
        more = np.concatenate([multiplier.view(np.uint8), shift])
        found = np.zeros(size, np.int8)
        function(sums.ctypes.data, found.ctypes.data, more.ctypes.data)
        product = np.clip(sums.astype(np.float32) * numbers, -1e6, 1e6)
        assert np.array_equal(found, np.clip(np.rint(product).astype(np.int64) + 3, -128, 127))
    with pytest.raises(UnsupportedModelError, match="a scale of 4096"):
        fixed_point(np.array([4096], np.float32))


@pytest.mark.parametrize("flags", [(), ("-DWITHOUT_FPU",)], ids=["floats", "integers"])
@pytest.mark.parametrize("kind", ["int8_t", "uint8_t"])
def test_floats_become_integers_and_back_as_in_float_arithmetic(kind, flags, tmp_path):
    """Floats of all sizes, and all around each half, for scales of all sizes and those next to powers of two."""
    low, high = (-128, 127) if kind == "int8_t" else (0, 255)
    rng = np.random.default_rng(2)
    scales = np.exp2(rng.uniform(-90, 80, 40)).astype(np.float32).tolist() + rng.uniform(0.001, 1, 40).tolist()
    scales += [1.0, 2.0**-7, float(np.nextafter(np.float32(1), np.float32(2))), float(np.float32(1) - 2.0**-24)]
    numbers = np.arange(256) + low
    names, text = [], "#include <stddef.h>\n#include <stdint.h>\n#include <string.h>\n"
    text += render("mcu/shorten.c")
    values = {"type": kind, "low": low, "high": high}
    for k, scale in enumerate(scales):
        zero = int(rng.integers(low, high + 1))
        both = mcu._Numbers(scale, zero)
        made = render("mcu/quantise.c", input=both, output=both, **values)
        names.append((f"f{k}_run", np.float32(scale), zero))
        for function in ("quantised", "expanded", "quantise", "expand"):
            made = re.sub(rf"\b{function}\(", f"{function}_{k}(", made)
        text += f"{made}void f{k}_run(const float *in, {kind} *out, void *back)\n{{\n"
        text += f"    {kind} all[256];\n    for (int i = 0; i < 256; i++)\n        all[i] = ({kind})(i + {low});\n"
        text += f"    quantise_{k}(in, out, 1, 1, 40000, 0, 0);\n    expand_{k}(all, (float *)back, 256);\n}}\n"
    (tmp_path / "f.c").write_text(text)
    sanitizer = ("-fsanitize=undefined", "-fno-sanitize-recover=all")
    COMPILER.build([tmp_path / "f.c"], tmp_path / "f.so", (*STRICT, *sanitizer, *flags))
    library = ctypes.CDLL(str(tmp_path / "f.so"))
    for name, scale, zero in names:
        halves = (rng.integers(-520, 521, 20_000) / 2).astype(np.float32) * scale
        near = (halves.view(np.int32) + rng.integers(-3, 4, halves.size, np.int32)).view(np.float32)
        wide = rng.normal(size=20_000) * np.exp2(rng.uniform(-20, 12, 20_000)) * float(scale)
        x = np.concatenate([near, wide.astype(np.float32)])
        x[:8] = [0, -0.0, 1e-45, -1e-45, np.inf, -np.inf, 3e38, -3e38]
        found, back = np.zeros(x.size, kind.removesuffix("_t")), np.zeros(256, np.float32)
        getattr(library, name)(*(ctypes.c_void_p(a.ctypes.data) for a in (x, found, back)))
        with np.errstate(over="ignore"):
            quotient = np.nan_to_num(np.clip(x / scale, -1000, 1000))
        expected = np.clip(np.rint(quotient).astype(np.int64) + zero, low, high)
        assert np.array_equal(found[~np.isnan(x)], expected[~np.isnan(x)]), name
        assert np.array_equal(back, (numbers - zero).astype(np.float32) * scale)
    with pytest.raises(UnsupportedModelError, match="an input or output of the scale"):
        mcu._Numbers(1e-40, 0)


def test_floats_compared_by_their_bits_are_as_the_processor_compares_them(tmp_path):
    """All pairs of numbers that are special, next to those, or drawn; zeros of both signs, and what is no number."""
    (tmp_path / "c.c").write_text(
        "#include <stdint.h>\n#include <string.h>\n"
        + mcu.render("mcu/compare.c", above=True)
        + "void many_run(const float *x, uint8_t *out, void *more)\n{\n    const int n = *(int *)more;\n"
        "    for (int i = 0; i < n; i++)\n        for (int j = 0; j < n; j++)\n"
        "            *out++ = (uint8_t)(ABOVE(x[i], x[j]) | BELOW_ZERO(x[i]) << 1);\n}\n"
    )
    flags = (*STRICT, "-fsanitize=undefined", "-fno-sanitize-recover=all")
    COMPILER.build([tmp_path / "c.c"], tmp_path / "c.so", flags)
    rng = np.random.default_rng(4)
    special = np.array([0, 1e-45, 1.1754944e-38, 1, 3.4028235e38, np.inf, np.nan], np.float32).view(np.uint32)
    bits = np.concatenate([special + np.uint32(1), special, special - np.uint32(1), rng.integers(0, 2**31, 200)])
    x = np.concatenate([bits, bits | 2**31]).astype(np.uint32).view(np.float32)
    found = np.zeros((len(x), len(x)), np.uint8)
    function = Library(tmp_path / "c.so", "many", (1, 1), 0)._function
    count = np.array([len(x)], np.int32)
    function(x.ctypes.data, found.ctypes.data, count.ctypes.data)
    assert np.array_equal(found & 1, x[:, None] > x)
    assert np.array_equal(found >> 1, np.broadcast_to((x < 0)[:, None], found.shape))


def random_chain(seed):
    """Return a chain of layers as people quantise them, with masks, in one or two dimensions."""
    choice, rng = random.Random(seed).choice, np.random.default_rng(seed)  # noqa: S311  # no secret
    flat = choice([False, False, True])
    c, h, w = choice([1, 2, 3]), 1 if flat else choice([8, 11, 12]), choice([9, 12, 16])
    head = f"g (float[n, {c}, {w if flat else f'{h}, {w}'}] x) => (float[n, 5] y) {{ "
    arrays, body, last = {}, [], "x"

    def add(text):
        nonlocal last
        name = f"t{len(body)}"
        body.append(f"{name} = {text}")
        last = name

    def weight(stem, shape, share):
        mask = rng.random(shape[:2] if choice([True, False]) else shape) < share
        arrays[stem] = (rng.normal(size=shape) * mask.reshape(*mask.shape, *[1] * (len(shape) - mask.ndim))).astype(
            np.float32
        )
        arrays[f"{stem}b"] = rng.normal(size=shape[0]).astype(np.float32)

    for k in range(choice([1, 2, 3])):
        kernel = choice([1, 2, 3, 5])
        rows = 1 if flat else min(kernel, h)
        columns = min(kernel, w)
        group = choice([1, 1, c])
        out = choice([4, 6, 9]) if group == 1 else c * choice([1, 2])
        stride = choice([1, 1, 2])
        pad = choice([0, kernel // 2])
        weight(
            f"w{k}", (out, c // group, columns) if flat else (out, c // group, rows, columns), choice([0.3, 0.7, 1.0])
        )
        pads = [pad] * (2 if flat else 4)
        strides = [stride] * (1 if flat else 2)
        add(f"Conv<pads={pads}, strides={strides}, group={group}>({last}, w{k}, w{k}b)")
        c, w = out, (w + 2 * pad - columns) // stride + 1
        h = h if flat else (h + 2 * pad - rows) // stride + 1
        if choice([True, True, False]):
            add(f"Relu({last})")
        if min(h if not flat else 2, w) >= 2 and choice([True, False]):
            size = [2] * (1 if flat else 2)
            add(f"MaxPool<kernel_shape={size}, strides={size}>({last})")
            h, w = h if flat else h // 2, w // 2
    if choice([False, True]):
        add(f"GlobalAveragePool({last})")
        h = w = 1
    add(f"Flatten({last})")
    weight("v", (5, c * h * w), 0.6)
    body.append(f"y = Gemm<transB=1>({last}, v, vb)")
    return build(head + " ".join(body) + " }", arrays)


def in_onnx_runtime(model, x):
    """Run a quantised model in integers, without the sums of 16 bits that saturate on processors without VNNI."""
    model = unsigned(model)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3  # zero points that are no longer read
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def unsigned(model):
    """Return a quantised model whose activations are unsigned, 128 more each: ONNX Runtime's integers on x86.

    It makes single ones unsigned itself, but not those that two nodes read, and computes between the two in floats.
    """
    model = model.clone()
    for node in model.graph:
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            source, zero = node.inputs[0], node.inputs[2]
            if node.op_type == "QuantizeLinear" or source.producer() is not None:
                number = zero.const_value.numpy()
                if number.dtype == np.int8:
                    moved = (number.astype(np.int64) + 128).astype(np.uint8)
                    zero = ir.Value(name=f"{zero.name}_{node.name or id(node)}", const_value=ir.tensor(moved))
                    zero.const_value.name = zero.name
                    model.graph.register_initializer(zero)
                    node.replace_input_with(2, zero)
                    (node.outputs if node.op_type == "QuantizeLinear" else node.inputs)[0].dtype = ir.DataType.UINT8
    return model


def check_integers(folder, name, model, x, flags=()):
    """Compare every bit, with floats and with integers in and out; return what was generated."""
    plan, integers = quantised(model)
    program = generate(plan, "q8", name=name, quantisation=integers)
    folder.mkdir(exist_ok=True)
    for file, content in program.files.items():
        (folder / file).write_bytes(content)
    expected = in_onnx_runtime(model, x)
    sizes = x[0].size, expected[0].size
    upper = name.upper()
    quantized_io = f"-D{upper}_QUANTIZED_IO", "-DNET_PLAIN_C"
    # Floats with the instructions for them, floats without, integers.
    arenas = {(): program.arena, ("-DNET_PLAIN_C",): program.arena, quantized_io: program.arena_quantised}
    for define, arena in arenas.items():
        target = folder / f"{name}{len(define)}.so"
        COMPILER.build([folder / f"{name}.c"], target, (*STRICT, *flags, *define))
        library = Library(target, name, sizes, arena)
        library._memory[:] = 0x55
        if define != quantized_io:
            assert np.array_equal(library.run(x), expected.reshape(len(x), -1)), name
            continue
        scale, zero = integers.maps[plan.maps[0].start]
        low, high = integers.bounds
        given = (np.clip(np.rint(x / np.float32(scale)), low - zero, high - zero) + zero).astype(np.int8)
        found = np.zeros((len(x), sizes[1]), np.int8)
        for sample, out in zip(np.ascontiguousarray(given), found, strict=True):
            library._function(sample.ctypes.data, out.ctypes.data, library._arena)
        which = int(plan.locate(plan.output)[0][0])
        scale, zero = integers.maps[plan.maps[which].start]
        assert np.array_equal(
            (found.astype(np.int64) - zero).astype(np.float32) * np.float32(scale), expected.reshape(len(x), -1)
        )
    return program


def test_every_bit_is_that_of_onnx_runtimes_integers(tmp_path):
    """In this process, and each in a block of exactly its size under the sanitizers."""
    cases = []
    for seed in range(NETWORKS):
        model = random_chain(seed)
        x = random_feeds(model, seed, n=40)["x"]
        sanitizer = ("-fsanitize=undefined", "-fno-sanitize-recover=all") if seed % 3 == 0 or NETWORKS > 100 else ()
        quantised_model, _ = quantise(model, Options(calibration=x))
        program = check_integers(tmp_path, f"q{seed}", quantised_model, x, sanitizer)
        expected = in_onnx_runtime(quantised_model, x[:1])
        cases.append(programs.Case(f"q{seed}", x[:1], expected, program.arena, quantised_model))
    for flags in ("-O0",), ("-O1", "-DNET_PLAIN_C"):
        assert programs.sanitized(tmp_path, cases, flags) == []


RESIDUAL = """g (float[n, 3, 9, 10] x) => (float[n, 5] y)
{ a = Conv<pads=[1,1,1,1]>(x, w0, b0) r = Relu(a) c = Conv<pads=[1,1,1,1]>(r, w1, b1) d = Add(%s) e = Relu(d)
  f = Conv<pads=[1,1,1,1]>(e, w2, b2) g0 = Relu(f) h = Conv<pads=[1,1,1,1]>(g0, w3, b3) i = Add(%s)
  s = MaxPool<kernel_shape=[2,2], strides=[2,2]>(i) t = Conv<kernel_shape=[2,2], strides=[2,2]>(i, w4, b4)
  p = Add(s, t) k = GlobalAveragePool(p) l = Flatten(k) y = Gemm<transB=1>(l, u, v) }"""


@pytest.mark.parametrize("operands", [("c, r", "h, e"), ("r, c", "e, h")])
@pytest.mark.parametrize("seed", range(3))
def test_additions_are_those_of_onnx_runtimes_integers(operands, seed, tmp_path):
    """Of a convolution's result, of maps that others read too, in both orders, with and without Relu."""
    rng = np.random.default_rng(seed)
    shapes = ((4, 3, 3, 3), (4, 4, 3, 3), (4, 4, 3, 3), (4, 4, 3, 3), (4, 4, 2, 2))
    arrays = {f"w{k}": rng.normal(size=shape) / np.sqrt(np.prod(shape[1:])) for k, shape in enumerate(shapes)}
    arrays |= {f"b{k}": rng.normal(size=4) / 4 for k in range(5)} | {"u": rng.normal(size=(5, 4)), "v": np.zeros(5)}
    model = build(RESIDUAL % operands, {name: array.astype(np.float32) for name, array in arrays.items()})
    x = random_feeds(model, seed, n=60)["x"]
    integers = quantise(model, Options(calibration=x))[0]
    check_integers(tmp_path, "add", integers, x)
    # The reference computes in integers throughout: floats would be others next to a half.
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(ir.to_proto(unsigned(integers)).SerializeToString(), options)
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert kinds.count("QLinearAdd") == 3
    assert not {"Add", "Conv", "Gemm", "GlobalAveragePool"} & set(kinds)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_residual_networks_are_those_of_onnx_runtimes_integers(shortcut, tmp_path):
    torch = pytest.importorskip("torch")
    from relief_export.capture import capture  # noqa: PLC0415  # needs torch
    from tests.cgen.test_networks import SHAPE, network  # noqa: PLC0415  # needs torch

    with torch.random.fork_rng():
        model = shrink(fold(capture(network("resnet20", shortcut), torch.zeros(2, *SHAPE)))).model
    x = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
    check_integers(tmp_path, "resnet", quantise(model, Options(calibration=x))[0], x)


def test_sums_are_rounded_as_fused_multiply_adds_of_floats_are(tmp_path):
    """All pairs of integers against ONNX Runtime's QLinearAdd, for scales near and far from each other."""
    (tmp_path / "r.c").write_text(
        "#include <stdint.h>\n" + render("mcu/added.c") + "void many_run(const int64_t *k, uint8_t *out, void *more)\n"
        "{\n    (void)more;\n    for (int i = 0; i < 65536; i++)\n"
        "        out[i] = (uint8_t)added(i & 255, k[1], k[2], i >> 8, k[0], (int)k[3], 0, 255);\n}\n"
    )
    COMPILER.build(
        [tmp_path / "r.c"], tmp_path / "r.so", (*STRICT, "-fsanitize=undefined", "-fno-sanitize-recover=all")
    )
    function = Library(tmp_path / "r.so", "many", (1, 1), 0)._function
    rng = np.random.default_rng(5)
    a, b = (side.ravel().astype(np.uint8) for side in np.meshgrid(*2 * (np.arange(256),), indexing="ij"))
    for round_ in range(24):
        scales = np.exp(rng.uniform(-5, 0, 2)).astype(np.float32)
        scale = np.float32(scales.max() * rng.uniform(0.3, 2.2))
        zeros = [int(n) for n in rng.integers(0, 256, 3)]
        if round_ < 4:  # every second sum is a half
            scales[:], scale = 0.5, np.float32(1)
        factors = addition([(float(s), z) for s, z in zip(scales, zeros[:2], strict=True)], (float(scale), zeros[2]))
        given, found = np.array(factors, np.int64), np.zeros(65536, np.uint8)
        function(given.ctypes.data, found.ctypes.data, None)
        text = """<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>
        g (uint8[n] a, uint8[n] b) => (uint8[n] y) { y = com.microsoft.QLinearAdd (a, sa, za, b, sb, zb, sc, zc) }"""
        model = onnx.parser.parse_model(text)
        numbers = {"sa": scales[0], "sb": scales[1], "sc": scale}
        numbers |= {name: np.uint8(z) for name, z in zip(("za", "zb", "zc"), zeros, strict=True)}
        model.graph.initializer.extend(onnx.numpy_helper.from_array(np.array(n), name) for name, n in numbers.items())
        (expected,) = ort.InferenceSession(model.SerializeToString()).run(None, {"a": a, "b": b})
        assert np.array_equal(found, expected)


LENET = """g (float[n, 1, 20, 20] x) => (float[n, 4] y)
{ a = Conv(x, w, b) c = Relu(a) d = MaxPool<kernel_shape=[2,2], strides=[2,2]>(c)
  e = Conv(d, v, e0) f = Relu(e) h = MaxPool<kernel_shape=[2,2], strides=[2,2]>(f)
  i = Flatten(h) y = Gemm<transB=1>(i, u, k) }"""


@pytest.fixture(scope="module")
def lenet():
    rng = np.random.default_rng(3)
    kernels = (np.add.outer(np.arange(9), np.arange(6)) % 3 == 0)[:, :, None, None]
    connections = np.add.outer(np.arange(4), np.arange(81)) % 5 == 0
    arrays = {
        "w": rng.normal(size=(6, 1, 5, 5)), "b": rng.normal(size=6), "v": rng.normal(size=(9, 6, 3, 3)) * kernels,
        "e0": rng.normal(size=9), "u": rng.normal(size=(4, 81)) * connections, "k": rng.normal(size=4),
    }  # fmt: skip
    return build(LENET, {name: array.astype(np.float32) for name, array in arrays.items()})


def test_two_convolutions_run_in_stripes_where_that_saves_memory(lenet, tmp_path):
    program = generate(lower(lenet))
    # Rows of 8 floats: 4 of 6 channels for a row of 3 outputs of 9 channels, where the whole map has 8 rows.
    assert program.arena == 4 * (6 * 4 * 8 + 9 * 3 * 3)
    assert "memmove" in program.files["net.c"].decode()
    feeds = random_feeds(lenet, n=1)
    case = programs.write(tmp_path, "stripes", lenet, sources)
    assert np.array_equal(case.expected, run(lenet, feeds)[0])
    assert programs.failures(tmp_path, [case], STRICT) == []
    assert programs.sanitized(tmp_path, [case], ("-O0",)) == []
    x = random_feeds(lenet, n=30)["x"]
    program = check_integers(tmp_path, "small", quantise(lenet, Options(calibration=x))[0], x)
    assert program.arena_quantised == 6 * 4 * 8 + 84  # the nine maps of 3 x 3, rounded up to words
    assert program.arena == program.arena_quantised + 400  # and the integers of the input


@pytest.mark.parametrize("between", ["Abs(a)", "Neg(a)", "Max(a, d)", "Add(a, d)", "Relu(a)"])
def test_what_stands_between_a_convolution_and_a_pool_is_done_before_the_pool(between, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(3, 2, 3, 3)).astype(np.float32) for name in "wv"}
    arrays |= {name: rng.normal(size=3).astype(np.float32) for name in "bc"}
    text = f"""g (float[n, 2, 8, 8] x) => (float[n, 3, 3, 3] y)
    {{ d = Conv(x, v, c) a = Conv(x, w, b) e = {between} y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(e) }}"""
    model = build(text, arrays)
    assert programs.failures(tmp_path, [programs.write(tmp_path, "pooled", model, sources)], STRICT) == []
    pooled = "2 x 2 max-pool" in (tmp_path / "pooled.c").read_text()
    assert pooled == (between == "Relu(a)")


def test_the_forms_of_tables_are_those_that_take_fewest_bytes(lenet):
    forms = [row["form"] for row in generate(lower(lenet)).layers]
    assert forms == ["dense", "kernels", "elements"]
    rows = generate(lower(lenet), dense=True).layers
    assert [row["form"] for row in rows] == ["dense", "dense", "dense"]
    assert rows[1]["macs"] == 6 * 6 * 9 * 6 * 9


@pytest.mark.parametrize("code", ["f32", "int8", "codebook16"])
def test_a_layers_bytes_are_those_of_its_tables(code):
    weight = np.zeros((2, 700), np.float32)
    weight[0, :600:2], weight[1, 5] = 0.5, -0.25  # more connections than a byte counts
    text = "g (float[n, 700] x) => (float[n, 2] y) { y = Gemm<transB=1>(x, w, b) }"
    plan = coded(lower(build(text, {"w": weight, "b": np.ones(2, np.float32)})), code)
    program = generate(plan, code)
    declared = re.findall(rb"static const (\w+) \w+\[(\d+)\] NET_ROM", program.files["net.c"])
    sizes = {b"float": 4, b"uint16_t": 2, b"uint8_t": 1, b"int8_t": 1}
    assert program.layers[0]["form"] != "dense"
    assert program.layers[0]["bytes"] == sum(sizes[kind] * int(count) for kind, count in declared)


def test_single_connections_of_a_codebook_have_gap_and_value_in_one_byte(tmp_path):
    """Gaps around what 4 bits hold and what a skip reaches, and beyond."""
    gaps = [0, 1, 14, 15, 16, 29, 30, 254, 255, 256, 270, 600]
    weight = np.zeros((2, 2000), np.float32)
    weight[0, np.cumsum(gaps)] = np.arange(1, 13)
    weight[1, 3:60] = -1
    weight[1, 1999] = 2
    arrays = {"w": weight, "b": np.array([0.5, 0], np.float32)}
    model = build("g (float[n, 2000] x) => (float[n, 2] y) { y = Gemm<transB=1>(x, w, b) }", arrays)
    program = generate(coded(lower(model), "codebook16"), "codebook16")
    # One byte each, and another for each 240 that are skipped: 15 to 254 once, 255 to 494 twice, 600 three times.
    skips = 5 + 3 * 2 + 3 + -(-1940 // 240)
    (row,) = program.layers
    assert row["form"] == "pairs"
    assert row["bytes"] == 12 + 58 + skips + 13 * 4 + 2 * 4 + 2  # and the values, two biases and two counts
    case = programs.write(tmp_path, "pairs", model, partial(sources, code="codebook16"))
    # Thirteen values are few enough to be kept as they are.
    assert programs.failures(tmp_path, [case], STRICT) == []


def test_a_dense_layer_shares_the_function_of_one_with_gaps():
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.normal(size=(4, 1, 3, 3)),
        "v": rng.normal(size=(6, 4, 3, 3)),
        "b": np.zeros(4),
        "c": np.zeros(6),
    }
    arrays["c"] = np.zeros(6)
    arrays["v"] *= (np.add.outer(np.arange(6), np.arange(4)) % 2)[:, :, None, None]
    text = """g (float[n, 1, 16, 16] x) => (float[n, 6, 16, 16] y)
    { a = Conv<pads=[1,1,1,1]>(x, w, b) d = Relu(a) y = Conv<pads=[1,1,1,1]>(d, v, c) }"""
    model = build(text, {name: array.astype(np.float32) for name, array in arrays.items()})
    program = generate(lower(model))
    assert [row["form"] for row in program.layers] == ["kernels", "kernels"]
    assert program.files["net.c"].count(b"LAYER conv_") == 1
    assert [row["form"] for row in generate(lower(model), dense=True).layers] == ["dense", "dense"]


def test_it_says_what_it_is_and_is_always_the_same(lenet, tmp_path):
    files = generate(lower(lenet)).files
    assert files == generate(lower(lenet.clone())).files
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for language in (("c", "-std=c99"), ("c++", "-std=c++11")):
        command = [*COMPILER.command, *STRICT, "-x", language[0], language[1], "-c", "net.c", "-o", "net.o"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert b"math.h" not in files["net.c"]
    assert b"float weights and arithmetic" in files["net.h"]


def test_what_has_no_integers_is_refused_in_a_sentence(lenet):
    with pytest.raises(UnsupportedModelError, match="not quantised"):
        quantised(lenet)
    text = """g (float[n, 3, 6, 6] x) => (float[n, 3, 6, 6] y)
    { a = Conv<pads=[1,1,1,1]>(x, w, b) c = Sigmoid(a) y = Mul(c, a) }"""
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(3, 3, 3, 3)).astype(np.float32), "b": np.zeros(3, np.float32)}
    model = build(text, arrays)
    x = random_feeds(model, n=8)["x"]
    with pytest.raises(UnsupportedModelError, match="q8"):
        quantised(quantise(model, Options(calibration=x))[0])
