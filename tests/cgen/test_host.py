"""Generated programs against ONNX Runtime, with vectors and without.

RELIEF_C_FUZZ=5000 takes more random networks, RELIEF_C_SANITIZE=500 more of them under the sanitizers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from relief_export.cgen import emit, host
from relief_export.cgen.compiler import FAST, PLAIN, load
from relief_export.cgen.emit import sources
from relief_export.cgen.lower import lower
from relief_export.errors import InputError
from tests.cgen import programs
from tests.cgen.programs import COMPILER, RELATIVE
from tests.graph.helpers import build, random_feeds, run

NETWORKS = int(os.environ.get("RELIEF_C_FUZZ", "200"))
SANITIZED = int(os.environ.get("RELIEF_C_SANITIZE", "6"))
BATCH = 40  # programs in one library
ARM = "aarch64-linux-gnu-gcc"
STRICT = ("-Wall", "-Wextra", "-Werror")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")

RNG = np.random.default_rng(1)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def masked(*shape: int, share: float, kernels: bool = True) -> np.ndarray:
    weight = normal(*shape)
    weight[RNG.random(shape[:2] if kernels else shape) >= share] = 0
    return weight


@pytest.mark.parametrize("first", range(0, NETWORKS, BATCH))
def test_random_networks(first, tmp_path):
    cases = programs.networks(tmp_path, range(10 * first, 10 * (first + BATCH)), min(BATCH, NETWORKS - first))
    assert len(cases) == min(BATCH, NETWORKS - first)
    assert programs.failures(tmp_path, cases, ("-O1", "-march=native", *STRICT)) == []
    plain = cases if NETWORKS > 200 else cases[::4]  # compilers take long, and only the length of vectors differs
    assert programs.failures(tmp_path, plain, ("-O1", "-DNET_PLAIN_C", *STRICT)) == []


@pytest.mark.parametrize("flags", [("-O1", "-march=native"), FAST])
def test_constants_are_copied_whole(flags, tmp_path):
    """GCC 12 fills a whole vector of AVX-512 with the number that only its first half holds (network 2446)."""
    cases = programs.networks(tmp_path, range(2446, 2447), 1)
    assert "memcpy(arena" in (tmp_path / "n2446.c").read_text()
    assert programs.failures(tmp_path, cases, flags) == []


CONV = "g (float[n, {c}, {h}, {w}] x) => (float[n, o, p, q] y) {{ a = Conv<{attributes}>(x, w, b) y = {end} }}"
SHAPES = [  # weight, height, width, attributes, what follows
    ((9, 8, 3, 3), 16, 16, "pads=[1,1,1,1]", "Relu(a)"),
    ((9, 8, 3, 3), 32, 33, "pads=[1,1,1,1]", "MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)"),
    ((9, 8, 5, 5), 12, 12, "pads=[0,0,0,0]", "MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)"),
    ((9, 8, 3, 3), 7, 7, "pads=[1,1,1,1]", "HardSwish(a)"),
    ((9, 8, 3, 3), 2, 2, "pads=[1,1,1,1]", "Relu(a)"),
    ((9, 8, 3, 3), 17, 15, "pads=[1,0,0,1], strides=[2,2]", "Clip(a, lo, hi)"),
    ((9, 8, 3, 5), 20, 23, "pads=[2,1,0,3], strides=[2,3], dilations=[1,2]", "Relu(a)"),
    ((9, 8, 3, 3), 20, 20, "pads=[2,2,2,2], dilations=[2,2]", "Relu(a)"),
    ((8, 1, 3, 3), 14, 14, "pads=[1,1,1,1], group=8", "Relu(a)"),
    ((8, 4, 1, 1), 28, 28, "group=2", "Sigmoid(a)"),
    ((9, 8, 1, 1), 28, 28, "strides=[2,2]", "Relu(a)"),
    ((9, 8, 7, 7), 40, 40, "pads=[3,3,3,3], strides=[2,2]", "Relu(a)"),
    ((9, 8, 1, 1), 5, 5, "group=1", "Relu(a)"),
    ((9, 8, 3, 3), 8, 8, "pads=[1,1,1,1]", "MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)"),
    ((9, 8, 3, 3), 4, 4, "pads=[1,1,1,1]", "Relu(a)"),
    ((9, 8, 5, 5), 4, 4, "pads=[2,2,2,2]", "Relu(a)"),
    ((9, 8, 3, 2), 4, 4, "pads=[2,0,0,1]", "Relu(a)"),
    ((9, 8, 2, 3), 5, 4, "pads=[0,1,1,0]", "Relu(a)"),
    ((9, 8, 1, 3), 4, 4, "pads=[0,1,0,1]", "Relu(a)"),
    ((9, 8, 3, 3), 8, 11, "pads=[1,1,1,1]", "Relu(a)"),
    ((9, 8, 3, 3), 11, 40, "pads=[1,1,1,1], strides=[1,2]", "Relu(a)"),
    ((9, 8, 3, 3), 16, 16, "pads=[1,1,1,1], strides=[2,2]", "Relu(a)"),
    ((9, 8, 3, 3), 11, 14, "pads=[1,1,1,1], strides=[2,3]", "Relu(a)"),
]
KERNELS = {  # whole kernels are left, or single weights -> what they must show between them
    True: {"kernels, rows", "kernels, flat", "kernels, sums", "kernels, rows, packed"},
    False: {"elements, rows", "elements, flat", "elements, rows, packed", "elements, flat, packed"},
}


def convolutions(*, kernels):
    """Yield a network for each of SHAPES, with random kernels or single weights left."""
    for shape, height, width, attributes, end in SHAPES:
        arrays = {"w": masked(*shape, share=0.4, kernels=kernels), "b": normal(shape[0])}
        if "lo" in end:
            arrays |= {"lo": np.float32(-0.5), "hi": np.float32(0.7)}
        yield build(CONV.format(c=8, h=height, w=width, attributes=attributes, end=end), arrays)


@pytest.mark.parametrize("kernels", [True, False])
def test_convolutions_of_all_shapes(kernels, tmp_path):
    cases, seen, pairs = [], set(), False
    for k, model in enumerate(convolutions(kernels=kernels)):
        cases.append(programs.write(tmp_path, f"c{k}", model))
        seen |= {row["kernel"] for row in host.generate(lower(model)).choices}
        pairs |= "pair_of" in (tmp_path / f"c{k}.c").read_text()
    assert seen >= KERNELS[kernels]
    assert pairs == kernels  # two short rows in one vector of sixteen
    # Sixteen lanes are AVX-512's; compilers make them of shorter vectors, which shows that the loops are right.
    for flags in (FAST, PLAIN, ("-O1", "-DNET_LANES=4"), ("-O1", "-DNET_LANES=16", "-Wno-psabi")):
        assert programs.failures(tmp_path, cases, (*flags, *STRICT)) == []
    if os.uname().machine == "x86_64":  # nothing here need run it
        folder = [tmp_path / f"{case.name}.c" for case in cases]
        COMPILER.build(folder, tmp_path / "v4.so", ("-O1", "-march=x86-64-v4", *STRICT))
    assert programs.sanitized(tmp_path, cases, ("-O0", "-march=native")) == []


@pytest.mark.skipif(not shutil.which(ARM) or not shutil.which("qemu-aarch64"), reason="no compiler or emulator of ARM")
def test_vectors_of_arm(tmp_path):
    cases = [programs.write(tmp_path, f"c{k}", model) for k, model in enumerate(convolutions(kernels=True))]
    flags = ("-O1", "-static", "-std=c99", *STRICT)
    assert programs.executed(tmp_path, cases, (ARM,), flags, ("qemu-aarch64",)) == []


def test_sanitizers_find_nothing(tmp_path):
    cases = programs.networks(tmp_path, range(10**6), SANITIZED)
    for first in range(0, SANITIZED, BATCH):
        for flags in (("-O1", "-march=native"), ("-O1", "-DNET_PLAIN_C")):
            assert programs.sanitized(tmp_path, cases[first : first + BATCH], flags) == []


@pytest.mark.parametrize(
    ("size", "share", "kernel"),
    [(256, 0.05, "sparse rows"), (256, 0.12, "dense"), (1024, 0.12, "sparse rows"), (1024, 0.17, "dense")],
)
def test_dense_weights_that_no_cache_holds_give_way_earlier(size, share, kernel):
    weight = masked(size, size, share=share, kernels=False)
    text = f"g (float[n, {size}] x) => (float[n, {size}] y) {{ y = Gemm<transB=1>(x, w) }}"
    (row,) = host.generate(lower(build(text, {"w": weight}))).choices
    assert row["kernel"] == kernel


@pytest.fixture(scope="module")
def small():
    arrays = {
        "w": masked(6, 2, 3, 3, share=0.6), "b": normal(6),
        "v": masked(5, 96, share=0.1, kernels=False), "c": normal(5),
    }  # fmt: skip
    text = """g (float[n, 2, 8, 8] x) => (float[n, 5] y)
    { a = Conv<pads=[1,1,1,1]>(x, w, b) d = Relu(a) e = MaxPool<kernel_shape=[2,2], strides=[2,2]>(d)
      f = Flatten(e) y = Gemm<transB=1>(f, v, c) }"""
    return build(text, arrays)


def written(folder, model, name="net"):
    for file, content in sources(lower(model), name).items():
        (folder / file).write_bytes(content)
    return folder


def check(folder, model, flags=FAST):
    feeds = random_feeds(model, n=1)
    (expected,) = run(model, feeds)
    found = load(folder, "net", COMPILER, (*flags, *STRICT)).run(feeds["x"])
    assert np.abs(found - expected).max() <= RELATIVE * np.abs(expected).max()


def test_the_same_model_gives_the_same_bytes(small):
    assert sources(lower(small)) == sources(lower(small.clone()))


def test_it_is_cplusplus_as_well(small, tmp_path):
    written(tmp_path, small)
    for flags in ("-O1 -march=native", "-O1 -DNET_PLAIN_C"):
        command = [*COMPILER.command, *STRICT, *flags.split(), "-x", "c++", "-c", "net.c", "-o", "net.o"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_large_tables_are_a_binary_file(small, tmp_path, monkeypatch):
    monkeypatch.setattr(emit, "MAX_TEXT", 0)
    written(tmp_path, small)
    assert (tmp_path / "net_weights.bin").stat().st_size % 64 == 0
    check(tmp_path, small)


def test_the_judge_is_float64_where_the_runtime_itself_is_off(small, tmp_path):
    case = programs.write(tmp_path, "net", small)
    scale = np.abs(case.expected).max()
    off = replace(case, expected=case.expected + np.float32(1e-4 * scale))
    assert programs.failures(tmp_path, [off], FAST) == []
    assert off.error(case.expected + np.float32(3e-4 * scale)) > RELATIVE  # further off than the runtime


def test_an_input_that_is_added_to_what_a_matrix_makes_of_it_is_read_where_it_lies(tmp_path):
    model = build(
        "g (float[n, 6] x) => (float[n, 6] y) { h = Gemm<transB=1>(x, w, b) y = Add(h, x) }",
        {"w": normal(6, 6), "b": normal(6)},
    )
    assert programs.failures(tmp_path, [programs.write(tmp_path, "net", model)], FAST) == []


def test_nothing_is_kept_between_calls(small, tmp_path):
    program = load(written(tmp_path, small), "net", COMPILER)
    x = np.concatenate([random_feeds(small, seed, n=1)["x"] for seed in range(3)])
    together = program.run(x)
    program._memory[:] = 0xFF
    assert np.array_equal(program.run(x[::-1])[::-1], together)


def test_the_example_runs(small, tmp_path):
    written(tmp_path, small)
    command = [*COMPILER.command, "-O2", "-std=c99", *STRICT, "example.c", "net.c", "-o", "example"]
    subprocess.run(command, cwd=tmp_path, check=True)
    feeds = random_feeds(small, n=1)
    text = " ".join(f"{v:.9g}" for v in feeds["x"].ravel().tolist())
    done = subprocess.run(["./example"], cwd=tmp_path, input=text, capture_output=True, text=True, check=True)
    (expected,) = run(small, feeds)
    assert np.abs(np.array(done.stdout.split(), np.float32) - expected[0]).max() <= RELATIVE * np.abs(expected).max()
    assert subprocess.run(["./example"], cwd=tmp_path, input="1 2", text=True, check=False).returncode == 1


@pytest.mark.parametrize("name", ["2net", "a-b", "", "int", "net.c"])
def test_names_are_identifiers(small, name):
    with pytest.raises(InputError, match="identifier"):
        sources(lower(small), name)


def test_names_in_comments_cannot_end_them(small, tmp_path):
    model = small.clone()
    for k, node in enumerate(model.graph):
        node.name = f"{k} */ #error ☃ /*"
    check(written(tmp_path, model), model)


def test_every_activation_is_close_over_its_range(tmp_path):
    """Elementwise over a wide range: what a random network's few numbers would not show."""
    x = np.concatenate([np.linspace(-100, 100, 1999), np.linspace(-2, 2, 999), [0.0, -0.0]]).astype(np.float32)[None]
    cases = []
    from tests.graph.builder import ACTIVATIONS  # noqa: PLC0415

    for op, attributes in ACTIVATIONS.items():
        given = ", ".join(f"{key}={value}" for key, value in attributes.items())
        node = f"{op}<{given}>(x)" if given else f"{op}(x)"
        model = build(f"g (float[n, 3000] x) => (float[n, 3000] y) {{ y = {node} }}")
        case = programs.write(tmp_path, f"a{op}", model)
        cases.append(replace(case, x=x, expected=run(model, {"x": x})[0]))
    for flags in (FAST, PLAIN):
        assert programs.failures(tmp_path, cases, (*flags, *STRICT)) == []
