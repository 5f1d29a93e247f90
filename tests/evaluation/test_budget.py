"""Budgets: sizes as people write them, targets with sources, and what is said when something does not fit."""

import gzip
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from relief_export import formats
from relief_export.errors import InputError, IntegrityError, UnsupportedModelError
from relief_export.evaluation import TARGETS, Budget, audit
from relief_export.formats import FORMATS, Options
from relief_export.graph.cost import cost
from relief_export.schema import parse_share, parse_size
from relief_export.targets import CORES


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256KiB", 262_144),
        ("256 kib", 262_144),
        ("64k", 65_536),
        ("64kB", 64_000),
        ("1MB", 1_000_000),
        ("1.5MiB", 1_572_864),
        ("2M", 2_097_152),
        ("1GiB", 2**30),
        ("100B", 100),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "many", "256", "9" * 400, "-1k", "1KiBs", "1e3", "0x10", "5 Mbit", 45, 4.5, b"45k"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="is no size: write a number with"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("2%", 0.02),
        ("0.02", 0.02),
        (0.02, 0.02),
        ("150 %", 1.5),
        ("0", 0),
        (0, 0),
        (1.0, 1),
        (1e-7, 1e-7),
        (0.1 + 0.2, 0.3),
    ],
)
def test_shares(text, share):
    assert parse_share(text) == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize("text", ["2", 2, "1", 1, 1.5, "1.5", "two", "", -0.1, float("nan"), float("inf"), True, None])
def test_what_is_no_share_or_may_be_a_percentage_is_refused(text):
    with pytest.raises(InputError, match=r'write a percentage such as "2%", or a fraction such as 0\.02'):
        parse_share(text)


def test_targets_have_sizes_and_sources():
    required = {"arduino-nano-33-ble", "stm32f4", "stm32f7", "stm32h7", "esp32-s3", "rp2040", "raspberry-pi-zero-2"}
    assert required <= TARGETS.keys()
    for name, target in TARGETS.items():
        assert target.name == name
        assert target.source
        assert target.ram % 1024 == 0
        assert target.flash is None or target.flash % 1024 == 0
        assert (target.core is None) == (target.clock is None)
        assert target.core is None or target.core in CORES


def test_given_sizes_replace_the_targets():
    assert Budget.of(target="stm32f4") == Budget(1024**2, 128 * 1024, TARGETS["stm32f4"])
    assert Budget.of(target="stm32f4", ram="64k").ram == 65_536
    assert Budget.of() == Budget(None, None, None)
    with pytest.raises(InputError, match=r"there is no target 'zx81'; known: .*stm32f4"):
        Budget.of(target="zx81")


ARENA = 2 * 80 * 4
"""The convolution's 5 x 4 x 4 floats and their ReLU live together."""


def test_real_bytes_and_the_arena_decide(export):
    folder = export("dense", "csr")
    size = (folder / "model.onnx").stat().st_size
    exact = audit(folder, Budget(size, ARENA))
    assert exact.arena.bytes == exact.arena.lower_bound == exact.size.ram_bytes == ARENA
    assert (exact.ok, exact.checked) == (True, "model.onnx")
    assert [(row.file, row.loads) for row in exact.files] == [("model.onnx", True), ("csr", False)]
    assert exact.files[1].flash_bytes == sum(f.stat().st_size for f in (folder / "csr").iterdir())
    title, _, *rows = str(exact).splitlines()
    assert title == "model.onnx: within budget"
    assert [row.split() for row in rows] == [
        ["model.onnx", "<-", "checked", "dense", f"{size:,}", f"{ARENA}"],
        ["csr", "csr", f"{exact.files[1].flash_bytes:,}", f"{exact.files[1].ram_bytes:,}"],
    ]
    over = audit(folder, Budget(size - 1, ARENA - 1))
    assert not over.ok
    flash, ram = over.failures
    # With what it has and what it may have: the answer alone helps nobody.
    assert str(over).splitlines()[0] == f"model.onnx: over budget; {flash.message}; {ram.message}"
    bare = audit(folder, Budget())
    assert str(bare).startswith("model.onnx: no budget was given, nothing was checked\n")
    assert "<- checked" not in str(bare)
    assert (flash.code, flash.file, flash.actual, flash.limit) == ("flash", "model.onnx", size, size - 1)
    assert flash.message == f"flash: model.onnx has {size:,} bytes; the budget is {size - 1:,}"
    assert (ram.code, ram.actual, ram.limit, ram.unit) == ("ram", ARENA, ARENA - 1, "bytes")
    assert "the arena peaks at Relu " in ram.message
    assert "with c 320, r 320 bytes" in ram.message


def test_a_packed_file_beside_its_dense_one_is_spoken_of_by_the_names_of_the_network(export):
    folder = export("dense", "packed")
    found = audit(folder, Budget(ram=1, file="model.packed.onnx"))
    assert "with c 320, r 320 bytes" in found.failures[0].message
    alone = audit(folder / "model.packed.onnx", Budget(ram=1))
    assert alone.arena.bytes == found.arena.bytes
    assert "with c 320" not in alone.failures[0].message


@pytest.mark.parametrize("form", ["c", "c-mcu"])
def test_the_source_of_generated_c_is_no_flash(export, form):
    folder = export("dense", form)
    found = audit(folder, Budget(flash=10**9, ram=10**9))
    row = next(row for row in found.files if row.file == form)
    assert (row.flash_bytes, row.fits(found.budget), found.checked) == (None, False, "model.onnx")
    assert re.search(rf"^{form} +{form} +unknown +[\d,]+$", str(found), re.MULTILINE)
    with pytest.raises(InputError, match="generated C, whose flash is known once it is compiled"):
        audit(folder, Budget(flash=10**9, file=form))


def runtime_constants(path):
    """Bytes of the constants that ONNX Runtime holds after loading a file and that are not in the file itself."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path.with_suffix(".seen"))
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    stored = {tensor.name for tensor in onnx.load(path).graph.initializer}
    seen = onnx.load(options.optimized_model_filepath).graph
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in seen.initializer if tensor.name not in stored]
    arrays += [onnx.numpy_helper.to_array(tensor) for tensor in map(dense_tensor, seen.sparse_initializer)]
    return sum(array.nbytes for array in arrays if array.ndim > 1)


def dense_tensor(tensor):
    # The runtime writes sparse weights out sparse again; in memory they are dense.
    return onnx.numpy_helper.from_array(np.zeros(list(tensor.dims), onnx.numpy_helper.to_array(tensor.values).dtype))


@pytest.mark.parametrize("kind", ["dense", "int8", "sparse", "packed", "packed-int8", "packed-codebook16"])
def test_weights_that_the_runtime_unpacks_count_as_ram(kind, export):
    folder = export(*dict.fromkeys(("dense", kind)))
    file = FORMATS[kind].suffix
    row = next(each for each in audit(folder, Budget()).files if each.file == file)
    matrices = runtime_constants(folder / file)
    # Biases and scales are unpacked too, and are the difference: a few numbers a layer.
    assert matrices <= row.unpacked_bytes <= matrices + 4 * (5 + 4) * 4
    assert (row.unpacked_bytes > 0) == (kind not in {"dense", "int8"})
    assert row.ram_bytes == row.arena_bytes + row.unpacked_bytes
    if kind != "dense":
        limit = row.ram_bytes - 1
        found = audit(folder, Budget.of(ram=f"{limit}B", file=file))
        assert [failure.code for failure in found.failures] == ["ram"]
        assert ("unpacked at load" in found.failures[0].message) == (row.unpacked_bytes > 0)


def test_csr_and_ort_are_unpacked_like_what_they_come_from(export):
    found = {row.file: row for row in audit(export("dense", "sparse", "csr", "ort"), Budget()).files}
    assert found["model.ort"].unpacked_bytes == found["model.sparse.onnx"].unpacked_bytes > 0
    assert found["csr"].unpacked_bytes >= found["model.sparse.onnx"].unpacked_bytes


def test_a_lossy_file_is_checked_only_when_it_is_asked_for(tmp_path):
    rng = np.random.default_rng(3)
    wide = ir.from_onnx_text(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[n, 64] x) => (float[n, 256] y) '
        "<float[1, 1] w = {0}> { y = MatMul (x, w) }"
    )
    weight = wide.graph.initializers["w"]
    weight.const_value = ir.tensor(rng.standard_normal((64, 256)).astype(np.float32), name="w")
    weight.shape = ir.Shape([64, 256])
    options = Options(calibration=rng.standard_normal((32, 64)).astype(np.float32))
    exact, lossy = (FORMATS[name].write(wide, tmp_path / FORMATS[name].suffix, options) for name in ("dense", "int8"))
    formats.write_manifest(tmp_path, [exact, lossy])
    assert lossy.bytes < exact.bytes / 2
    assert audit(tmp_path, Budget()).checked == exact.name
    assert audit(tmp_path, Budget(flash=lossy.bytes)).failures[0].file == exact.name
    allowed = audit(tmp_path, Budget(flash=lossy.bytes, accuracy_drop=0.01))
    assert (allowed.ok, allowed.checked) == (True, lossy.name)
    assert audit(tmp_path, Budget(accuracy_drop=0.009)).checked == exact.name  # int8 may lose one point
    assert audit(tmp_path, Budget(file=lossy.name)).checked == lossy.name
    with pytest.raises(InputError, match=r"no file 'model\.int9\.onnx'; did you mean"):
        audit(tmp_path, Budget(file="model.int9.onnx"))


def test_the_file_that_fits_both_is_checked_before_the_smallest(export):
    folder = export("dense", "packed")
    rows = {row.file: row for row in audit(folder, Budget()).files}
    packed, dense = rows["model.packed.onnx"], rows["model.onnx"]
    assert packed.flash_bytes < dense.flash_bytes
    assert packed.ram_bytes > dense.ram_bytes
    found = audit(folder, Budget(flash=dense.flash_bytes, ram=dense.ram_bytes))
    assert (found.ok, found.checked) == (True, "model.onnx")
    assert audit(folder, Budget(flash=packed.flash_bytes, ram=dense.ram_bytes)).checked == "model.packed.onnx"


def test_a_file_that_differs_from_its_manifest_is_refused(export, tamper, weights):
    folder = export("dense")
    tamper("dense", hashes=False, fc_w=weights["fc_w"] * 2)
    with pytest.raises(IntegrityError, match=r"model\.onnx differs from its SHA-256"):
        audit(folder, Budget())


def test_sizes_are_compared_with_the_same_file_of_the_baseline(export, tmp_path):
    folder = export("dense", "packed")
    old = shutil.copytree(folder, tmp_path / "old")
    same = audit(folder, Budget(), baseline=old, max_growth=0.0)
    assert same.verdict == f"{same.checked}: grown by no more than is allowed"
    both = audit(folder, Budget(flash=1), baseline=old, max_growth="2%")
    assert (both.verdict, both.growth.limit) == (f"{both.checked}: over budget, grown by no more than is allowed", 0.02)
    assert both.growth.where == f"{both.checked} of {old}"
    with pytest.raises(InputError, match="needs something to compare with: give a baseline"):
        audit(folder, Budget(), max_growth=0.02)
    assert (same.ok, same.growth.file, same.growth.flash_change, same.growth.ram_change) == (True, same.checked, 0, 0)
    smaller = audit(folder, Budget(file="model.packed.onnx"), baseline=old / "model.onnx", max_growth=0.0)
    packed, dense = ((old / name).stat().st_size for name in ("model.packed.onnx", "model.onnx"))
    assert smaller.growth.flash_change == packed / dense - 1 < 0
    assert smaller.growth.ram_change > 0
    assert [failure.code for failure in smaller.failures] == ["ram_growth"]
    assert audit(folder, Budget(file="model.packed.onnx"), baseline=old / "model.onnx").ok  # no limit, no failure


def test_a_board_without_a_runtime_for_onnx_says_so(export):
    folder = export("dense")
    (note,) = audit(folder, Budget.of(target="stm32f4")).notes
    assert note.startswith("ONNX Runtime does not run on STM32F4DISCOVERY (STM32F407VG)")
    assert "format c" in note
    assert audit(folder, Budget.of(target="raspberry-pi-zero-2")).notes == ()


def test_generated_c_is_not_weighed_by_its_sources(export):
    folder = export("dense", "c")
    assert audit(folder, Budget()).checked == "model.onnx"
    for subject, budget in ((folder / "c", Budget()), (folder, Budget(file="c"))):
        with pytest.raises(InputError, match="is generated C, whose flash is known once it is compiled: add --measure"):
            audit(subject, budget)


def test_the_json_has_what_a_gate_needs(export, tmp_path):
    folder = export("dense")
    found = json.loads(json.dumps(audit(tmp_path, Budget.of(target="rp2040")).to_dict(), allow_nan=False))
    assert found["ok"] is True
    assert found["failures"] == []
    assert found["budget"]["target"]["name"] == "rp2040"
    assert found["arena"]["peak_op"] == "Relu"
    assert 0 < found["weights_gzip_bytes"] < len(gzip.compress((folder / "model.onnx").read_bytes()))
    assert "tensors" not in found["arena"]


def test_the_bound_counts_the_ways_to_place_the_weights_that_are_left(export, weights):
    folder = export("dense")
    kept = {name: int(np.count_nonzero(array)) for name, array in weights.items()}
    placed = sum(math.log2(math.comb(array.size, kept[name])) for name, array in weights.items())
    assert audit(folder, Budget()).weights_bound_bytes == math.ceil((placed + 32 * sum(kept.values())) / 8)


def test_a_single_file_and_its_external_data_are_weighed(network, tmp_path):
    path = tmp_path / "net.onnx"
    ir.save(network, path)
    alone = audit(path, Budget())
    assert (alone.ok, alone.size.flash_bytes) == (True, path.stat().st_size)
    for data in ("weights.bin", "big.onnx.data"):
        ir.save(network, tmp_path / "big.onnx", external_data=data, size_threshold_bytes=0)
        split = audit(tmp_path / "big.onnx", Budget())
        assert split.size.flash_bytes == sum((tmp_path / name).stat().st_size for name in ("big.onnx", data))


def test_every_kind_of_subject_is_audited(export, tmp_path):
    folder = export("dense", "csr")
    rows = {row.file: row for row in audit(folder, Budget()).files}
    assert {row.file for row in audit(tmp_path, Budget()).files} == set(rows)  # the build folder around it
    for name, row in rows.items():
        (alone,) = audit(folder / name, Budget()).files
        assert (alone.flash_bytes, alone.ram_bytes) == (row.flash_bytes, row.ram_bytes)


def test_what_cannot_be_audited_is_refused(export, tmp_path):
    with pytest.raises(InputError, match=r"absent\.onnx does not exist: give a model file"):
        audit(tmp_path / "absent.onnx", Budget())
    with pytest.raises(InputError, match=r"has no manifest\.json: give an artifacts folder"):
        audit(tmp_path, Budget())
    with pytest.raises(InputError, match="no file that a runtime loads"):
        audit(export("csr"), Budget())
    text = '<ir_version: 9, opset_import: ["" : 20]> g (float[n, h] x) => (float[n, h] y) { y = Relu (x) }'
    ir.save(ir.from_onnx_text(text), tmp_path / "open.onnx")
    with pytest.raises(
        UnsupportedModelError, match=r"open\.onnx cannot be checked against .* RAM: tensor 'x' has no known"
    ):
        audit(tmp_path / "open.onnx", Budget(ram=64))
    flash_only = audit(tmp_path / "open.onnx", Budget(flash=1))
    assert (flash_only.ok, flash_only.arena, len(flash_only.failures)) == (False, None, 1)
    found = json.loads(json.dumps(flash_only.to_dict()))
    assert found["arena"] is None
    assert "tensor 'x' has no known size" in found["files"][0]["ram_unknown"]


@pytest.mark.parametrize("kind", [kind for kind, form in FORMATS.items() if form.read is not None])
def test_every_format_costs_what_the_network_costs(kind, export, network):
    folder = export(kind)
    plain = cost(network)
    bill = cost(formats.read(folder / FORMATS[kind].suffix))
    assert bill.unknown == ()
    assert bill.macs == plain.macs
    assert bill.prunable == plain.prunable


def test_the_documented_targets_are_the_built_in_ones():
    page = (Path(__file__).parents[2] / "docs" / "audit.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| (.+?) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|", page, re.MULTILINE)
    documented = {name: tuple(cells) for name, *cells in rows}

    def text(size):
        return "card" if size is None else f"{size // 1024} KiB" if size % 1024**2 else f"{size // 1024**2} MiB"

    def core(target):
        chip = target.core and CORES[target.core].title.removeprefix("Arm ")
        return (chip or "-", f"{target.clock // 10**6} MHz" if target.clock else "-")

    assert documented == {name: (t.title, text(t.flash), text(t.ram), *core(t)) for name, t in TARGETS.items()}
