"""Budgets: sizes as people write them, targets with sources, and what is said when something does not fit."""

import gzip
import json
import math
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from relief_export import formats
from relief_export.device.targets import CORES
from relief_export.errors import InputError, UnsupportedModelError
from relief_export.evaluation import TARGETS, Budget, audit, parse_size
from relief_export.formats import FORMATS
from relief_export.graph.cost import cost


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
        ("100", 100),
        ("100B", 100),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "many", "9" * 400, "-1k", "1KiBs", "1e3", "0x10", "5 Mbit"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="is no size: write a number with"):
        parse_size(text)


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
    with pytest.raises(InputError, match="there is no target 'zx81'; there are arduino-nano-33-ble"):
        Budget.of(target="zx81")


def test_real_bytes_and_the_arena_decide(export):
    folder = export("dense", "csr")
    size = (folder / "model.onnx").stat().st_size
    arena = 2 * 80 * 4  # the convolution's 5 x 4 x 4 floats and their ReLU live together
    exact = audit(folder, Budget(size, arena))
    assert exact.arena.bytes == exact.arena.lower_bound == arena
    assert (exact.ok, exact.chosen) == (True, "model.onnx")
    assert [(row.name, row.fits) for row in exact.flash] == [("model.onnx", True), ("csr", None)]
    assert exact.flash[1].bytes == sum(f.stat().st_size for f in (folder / "csr").iterdir())
    over = audit(folder, Budget(size - 1, arena - 1))
    assert not over.ok
    flash, ram = over.failures
    assert flash == f"flash: model.onnx, the smallest file, has {size:,} bytes; the budget is {size - 1:,}"
    assert "it peaks at Relu " in ram
    assert "with c 320, r 320 bytes" in ram


def test_the_json_has_what_a_gate_needs(export, tmp_path):
    folder = export("dense")
    found = json.loads(json.dumps(audit(tmp_path, Budget.of(target="rp2040")).to_dict(), allow_nan=False))
    assert found["ok"] is True
    assert found["failures"] == []
    assert found["budget"]["target"]["source"]
    assert found["arena"]["peak_op"] == "Relu"
    assert 0 < found["gzip_bytes"] < len(gzip.compress((folder / "model.onnx").read_bytes()))
    assert "tensors" not in found["arena"]


def test_the_bound_counts_the_ways_to_place_the_weights_that_are_left(export, weights):
    folder = export("dense")
    kept = {name: int(np.count_nonzero(array)) for name, array in weights.items()}
    placed = sum(math.log2(math.comb(array.size, kept[name])) for name, array in weights.items())
    assert audit(folder, Budget()).bound_bytes == math.ceil((placed + 32 * sum(kept.values())) / 8)


def test_a_single_file_and_its_external_data_are_weighed(network, tmp_path):
    path = tmp_path / "net.onnx"
    ir.save(network, path)
    alone = audit(path, Budget())
    assert (alone.ok, alone.flash[0].bytes) == (True, path.stat().st_size)
    for data in ("weights.bin", "big.onnx.data"):
        ir.save(network, tmp_path / "big.onnx", external_data=data, size_threshold_bytes=0)
        split = audit(tmp_path / "big.onnx", Budget())
        assert split.flash[0].bytes == sum((tmp_path / name).stat().st_size for name in ("big.onnx", data))


def test_what_cannot_be_audited_is_refused(export, tmp_path):
    with pytest.raises(InputError, match=r"absent\.onnx does not exist"):
        audit(tmp_path / "absent.onnx", Budget())
    with pytest.raises(InputError, match=r"manifest\.json does not exist"):
        audit(tmp_path, Budget())
    with pytest.raises(InputError, match="no artifact that a runtime loads"):
        audit(export("csr"), Budget())
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[n, h] x) => (float[n, h] y) { y = Relu (x) }'
    ir.save(ir.from_onnx_text(text), tmp_path / "open.onnx")
    with pytest.raises(
        UnsupportedModelError, match=r"open\.onnx cannot be held against .* RAM: tensor 'x' has no known"
    ):
        audit(tmp_path / "open.onnx", Budget(ram=64))
    flash_only = audit(tmp_path / "open.onnx", Budget(flash=1))
    assert (flash_only.ok, flash_only.arena, len(flash_only.failures)) == (False, None, 1)
    found = json.loads(json.dumps(flash_only.to_dict()))
    assert found["arena"] is None
    assert "tensor 'x' has no known size" in found["arena_unknown"]


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "ort"])  # which only ONNX Runtime reads
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
