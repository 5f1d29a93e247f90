"""Generated programs on the processors they are for: to the last bit, in the layouts of their projects."""

import json

import numpy as np
import onnx_ir as ir
import pytest

from relief_export.cgen.mcu import generate
from relief_export.cgen.quantised import quantised
from relief_export.cli import run
from relief_export.device.emulator import emulate
from relief_export.device.measure import measure
from relief_export.format_names import LAYOUTS
from relief_export.formats import Options
from relief_export.formats.int8 import quantise
from tests.cgen.test_mcu import in_onnx_runtime, lenet, random_chain  # noqa: F401  # lenet is a fixture
from tests.device.conftest import needs
from tests.graph.helpers import random_feeds

CORES = ["cortex-m0plus", "cortex-m4f", "rv32imc", "avr"]


@pytest.fixture(scope="module", params=["lenet", 0, 4], ids=["lenet", "chain 0", "chain 4"])
def integers(request, tmp_path_factory):
    """Return a folder with a q8 program, integer samples, and ONNX Runtime's integers."""
    model = request.getfixturevalue("lenet") if request.param == "lenet" else random_chain(request.param)
    x = random_feeds(model, 3, n=24)["x"]
    int8 = quantise(model, Options(calibration=x))[0]
    plan, found = quantised(int8)
    folder = tmp_path_factory.mktemp("q8")
    for name, content in generate(plan, "q8", quantisation=found).files.items():
        (folder / name).write_bytes(content)
    which = plan.maps[int(plan.locate(plan.output)[0][0])]
    (scale, zero), (out_scale, out_zero) = found.maps[plan.maps[0].start], found.maps[which.start]
    given = (np.clip(np.rint(x / np.float32(scale)), -128 - zero, 127 - zero) + zero).astype(np.int8)
    expected = np.rint(in_onnx_runtime(int8, x) / np.float32(out_scale) + out_zero).astype(np.int8)
    return folder, given, expected.reshape(len(x), -1)


@pytest.mark.parametrize("core", CORES)
def test_every_bit_is_the_same_on_every_processor(core, integers):
    needs(core)
    folder, x, expected = integers
    ran = emulate(folder, core, x, defines=("NET_QUANTIZED_IO",))
    assert np.array_equal(ran.outputs, expected)
    found = measure(folder, target=core, defines=("NET_QUANTIZED_IO",))
    assert found.data_bytes == found.bss_bytes == 0  # nothing is kept between calls, and tables are in the flash
    assert not found.stack_doubts
    # The lowest words of the deepest frame may be padding, which nothing writes: RISC-V's frames are multiples of 16.
    assert ran.stack_bytes <= found.stack_bytes <= ran.stack_bytes + (12 if core == "rv32imc" else 8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_build_for_their_boards(layout, lenet, tmp_path, capsys):  # noqa: F811
    ir.save(lenet, tmp_path / "model.onnx")
    np.savez(tmp_path / "x.npz", x=random_feeds(lenet, n=20)["x"])
    command = [
        "convert",
        str(tmp_path / "model.onnx"),
        str(tmp_path / "Digits"),
        "--to",
        "c-mcu-q8",
        "--name",
        "digits",
    ]
    command += ["--calibration", str(tmp_path / "x.npz"), "--quantized-io", "--layout", layout]
    assert run(command) == 0
    files = {str(p.relative_to(tmp_path / "Digits")) for p in (tmp_path / "Digits").rglob("*") if p.is_file()}
    assert {"arduino": "library.properties", "zephyr": "prj.conf", "esp-idf": "main/CMakeLists.txt"}[layout] in files
    text = "".join((tmp_path / "Digits" / file).read_text() for file in files if not file.endswith("digits.c"))
    assert "digits_run(input, output, arena)" in text
    capsys.readouterr()
    needs("arduino-uno", emulator=False)
    audit = ["audit", str(tmp_path / "Digits"), "--measure", "--target", "arduino-uno", "--json"]
    assert run(audit) == 0
    (found,) = json.loads(capsys.readouterr().out)["result"]["measured"].values()
    assert (found["input_bytes"], found["output_bytes"], found["data_bytes"]) == (400, 4, 0)
    assert run(command) == 2  # the folder is not empty


def test_layouts_and_integers_are_for_programs_for_microcontrollers(lenet, tmp_path, capsys):  # noqa: F811
    ir.save(lenet, tmp_path / "model.onnx")
    for options, message in (
        (["--to", "c", "--layout", "arduino"], "--layout arranges programs for microcontrollers"),
        (["--to", "c-mcu", "--quantized-io"], "--quantized-io is for --to c-mcu-q8"),
        (["--to", "c-mcu-q8"], "c-mcu-q8 is calibrated on samples"),
    ):
        assert run(["convert", str(tmp_path / "model.onnx"), str(tmp_path / "out"), *options]) == 2
        assert message in capsys.readouterr().err
