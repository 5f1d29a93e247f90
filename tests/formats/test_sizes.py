import gzip
import json
import math

import numpy as np
import onnx_ir as ir
import pytest

from relief_export.formats import FORMATS, VALUES, Options, gzip_bytes, ledger
from relief_export.formats.sizes import entropy_bound


def test_the_bound_of_a_matrix_is_the_formula():
    weight = np.zeros((20, 30), np.float32)
    weight.ravel()[::7] = np.arange(1, 87)
    bits = math.log2(math.comb(600, 86)) + 86 * 32
    assert entropy_bound(weight) == pytest.approx(bits / 8, rel=1e-9)


def test_whole_kernels_are_counted_as_one_choice():
    weight = np.zeros((10, 8, 3, 3), np.float32)
    weight[::3, ::2] = 1.25
    bits = math.log2(math.comb(80, 16)) + 144 * 32
    assert entropy_bound(weight) == pytest.approx(bits / 8, rel=1e-9)


def test_codebooks_are_counted_by_the_entropy_of_their_symbols():
    weight = np.zeros((10, 40), np.float32)
    weight.ravel()[:30] = np.repeat([1.0, 2.0, 4.0], [15, 10, 5])
    entropy = -sum(share * math.log2(share) for share in (1 / 2, 1 / 3, 1 / 6))
    bits = math.log2(math.comb(400, 30)) + 30 * entropy
    assert entropy_bound(weight, "codebook16") == pytest.approx(bits / 8, rel=1e-9)


def test_the_total_is_the_sum_and_is_plain_data(make_lenet):
    found = ledger(make_lenet())
    content = json.loads(json.dumps(found.to_dict()))
    for key in ("dense_bytes", "gzip_bytes", "sparse_bytes", "csr_bytes", "nonzeros"):
        assert content["total"][key] == sum(row[key] for row in content["tensors"])
    assert content["total"]["dense_bytes"] == sum(4 * math.prod(row["shape"]) for row in content["tensors"])


@pytest.mark.parametrize("zeros", [0.0, 0.8, 0.95, 1.0])
def test_no_format_beats_the_bound_or_loses_to_dense(make_lenet, zeros):
    for row in ledger(make_lenet(zeros)).rows:
        assert row.sparse <= row.dense
        assert row.csr <= row.dense
        for code in VALUES:
            assert row.packed[code] <= row.dense
            assert row.packed[code] >= row.bound[code] - 1


def test_the_ledger_agrees_with_the_file(tmp_path, make_lenet):
    for name in ("packed", "packed-f16", "packed-codebook16", "packed-codebook256"):
        written = FORMATS[name].write(make_lenet(), tmp_path / "m.onnx", Options())
        assert written.bytes == pytest.approx(ledger(make_lenet()).total.packed[FORMATS[name].values], abs=900)


def test_int8_is_counted_by_the_entropy_of_its_steps():
    weight = np.zeros((2, 40), np.float32)
    weight[0, :4], weight[1, :4] = [1, 1, -1, 0.5], [4, 4, -4, 2]  # the same steps under each channel's scale
    entropy = -sum(share * math.log2(share) for share in (1 / 2, 1 / 4, 1 / 4))
    bits = math.log2(math.comb(80, 8)) + 8 * entropy
    assert entropy_bound(weight, "int8") == pytest.approx(bits / 8, rel=1e-9)


def test_gzip_is_counted_as_gzip_writes_it():
    content = np.random.default_rng(0).integers(0, 9, 100_000).astype(np.uint8).tobytes()
    packed = gzip.compress(content, 6)
    assert gzip_bytes([content[:7], content[7:]]) == len(packed)


def test_a_weight_that_is_a_single_number_has_its_sizes():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[n, 3] x, float s) => (float[n, 3] y) { y = Mul (x, s) }
    """)
    scale = model.graph.inputs.pop()
    scale.const_value = ir.tensor(np.array(2.5, np.float32), name="s")
    model.graph.register_initializer(scale)
    (row,) = ledger(model).rows
    assert (row.shape, row.nonzeros, row.dense) == ((), 1, 4)
