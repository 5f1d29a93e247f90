"""The folders of examples/ for boards, and a relieved LeNet-5 on the smallest of them."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from relief_export.cgen.connections import coded
from relief_export.cgen.lower import lower
from relief_export.cgen.mcu import generate
from relief_export.cgen.quantised import quantised
from relief_export.device.emulator import emulate
from relief_export.device.measure import measure
from relief_export.format_names import LAYOUTS
from relief_export.formats import Options
from relief_export.formats.int8 import quantise
from relief_export.graph.shrink import shrink
from relief_export.targets import TARGETS
from tests.cgen.interpret import Interpreter
from tests.cgen.test_mcu import in_onnx_runtime
from tests.device import boards
from tests.device.conftest import needs

RELATIVE = 1e-5  # of the scores' scale


@pytest.fixture(scope="module")
def lenet5():
    """Return the shrunk network and its pictures, which the whole one classifies as trained."""
    model, x = boards.lenet5()
    (scores,) = ort.InferenceSession(model.SerializeToString()).run(None, {"pixels": x})
    assert len(set(scores.argmax(1))) > 4
    return shrink(ir.from_proto(model)).model, x


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_folders_are_what_the_command_writes(layout, tmp_path, capsys):
    boards.write(layout, tmp_path / layout, tmp_path)
    capsys.readouterr()
    found = {
        root: {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / layout, boards.EXAMPLES / layout)
    }
    made, kept = found.values()
    assert made.keys() == kept.keys()
    assert [name for name in made if made[name] != kept[name]] == []  # python -m tests.device.boards writes them again


@pytest.mark.parametrize(("layout", "target"), [("arduino", "arduino-nano-33-ble"), ("zephyr", "stm32l4")])
def test_the_programs_in_them_compute_the_network_on_their_boards(layout, target, lenet5):
    needs(target)
    model, x = lenet5
    ran = emulate(boards.EXAMPLES / layout, target, x[:3])
    expected = np.concatenate([Interpreter(coded(lower(model), "codebook16")).run(each[None]) for each in x[:3]])
    assert np.abs(ran.outputs - expected.reshape(3, -1)).max() <= RELATIVE * np.abs(expected).max()
    assert measure(boards.EXAMPLES / layout, target=target).flash_bytes <= 8000


def test_lenet5_runs_in_two_kilobytes_of_ram(lenet5, tmp_path):
    """On the chip of the Arduino Uno, every bit that of ONNX Runtime's integers."""
    needs("arduino-uno")
    model, x = lenet5
    int8 = quantise(model, Options(calibration=x))[0]
    plan, integers = quantised(int8)
    for name, content in generate(plan, "q8", quantisation=integers).files.items():
        (tmp_path / name).write_bytes(content)
    defines = ("NET_QUANTIZED_IO",)
    found = measure(tmp_path, target="arduino-uno", defines=defines)
    assert found.data_bytes == found.bss_bytes == 0
    assert found.ram_bytes <= TARGETS["arduino-uno"].ram == 2048  # with arena, input, output and the deepest stack
    which = plan.maps[int(plan.locate(plan.output)[0][0])]
    (scale, zero), (out_scale, out_zero) = integers.maps[plan.maps[0].start], integers.maps[which.start]
    given = (np.clip(np.rint(x[:3] / np.float32(scale)), -128 - zero, 127 - zero) + zero).astype(np.int8)
    ran = emulate(tmp_path, "arduino-uno", given, defines=defines)
    expected = np.rint(in_onnx_runtime(int8, x[:3]) / np.float32(out_scale) + out_zero).astype(np.int8)
    assert np.array_equal(ran.outputs, expected.reshape(3, -1))
    assert ran.stack_bytes <= found.stack_bytes
