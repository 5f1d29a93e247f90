"""A network on other processors: as their compilers measure it, and as emulators run it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from relief_export.cli import run
from relief_export.device import callgraph
from relief_export.device.emulator import emulate
from relief_export.device.measure import measure
from relief_export.device.targets import CORES, core_of
from relief_export.device.toolchain import Program
from relief_export.errors import InputError, MissingToolError, UnsupportedModelError
from tests.answers import check_answer
from tests.device.conftest import needs

EMULATED = [name for name, core in CORES.items() if core.emulator]


@pytest.mark.parametrize("core", EMULATED)
def test_every_emulated_core_computes_what_numpy_does_within_the_stack_that_is_measured(core, toy):
    needs(core)
    folder, x, expected = toy
    ran = emulate(folder, core, x)
    np.testing.assert_allclose(ran.outputs, expected, atol=3e-6)  # float32 sums of six products
    assert ran.counts.shape == (len(x),)
    assert ran.counts.min() > 7 * 4  # more than one instruction for each connection
    bound = measure(folder, target=core).stack
    # What assembler routines push is added up, whichever way is taken through them.
    assert ran.stack_bytes <= bound <= ran.stack_bytes + 8
    if CORES[core].family == "arm":
        assert bound == ran.stack_bytes


def test_counts_are_those_of_the_instructions_in_the_loop(tmp_path):
    needs("rv32imc")
    (tmp_path / "net.h").write_text(
        "#define NET_INPUT_SIZE 1\n#define NET_OUTPUT_SIZE 1\n#define NET_ARENA_BYTES 0\n"
        "#define NET_INPUT_TYPE uint8_t\n#define NET_OUTPUT_TYPE uint8_t\n"
        "#include <stdint.h>\nvoid net_run(const uint8_t *input, uint8_t *output, void *arena);\n"
    )
    (tmp_path / "net.c").write_text(
        '#include "net.h"\nvoid net_run(const uint8_t *input, uint8_t *output, void *arena)\n{\n    (void)arena;\n'
        "    unsigned turns = *input;\n    *output = *input;\n"
        '    __asm__ volatile("1: nop\\n nop\\n nop\\n addi %0, %0, -1\\n bnez %0, 1b" : "+r"(turns));\n}\n'
    )
    x = np.array([[10], [60], [200]], np.uint8)
    ran = emulate(tmp_path, "rv32imc", x)
    assert ran.outputs.tolist() == x.tolist()
    # Three nops, a decrement and a branch a turn.
    assert np.diff(ran.counts).tolist() == [5 * 50, 5 * 140]


def test_more_samples_than_a_small_flash_holds_run_in_turns(toy):
    needs("arduino-uno")
    folder, x, expected = toy
    ran = emulate(folder, "arduino-uno", np.tile(x, (40, 1)))
    np.testing.assert_allclose(ran.outputs, np.tile(expected, (40, 1)), atol=3e-6)
    # The interrupt of the timer that counts falls into some samples: 40 cycles.
    assert set(np.abs(ran.counts[:40] - ran.counts[-40:])) <= {0, 40}


def test_what_the_linker_made_is_added_up(toy):
    needs("arduino-uno", emulator=False)
    folder, *_ = toy
    found = measure(folder, target="arduino-uno")
    # On this processor constants lie in RAM unless they are marked: 24 and 12 weights of 4 bytes.
    assert (found.data, found.bss, found.arena, found.input, found.output) == (144, 0, 16, 24, 12)
    assert found.ram == 144 + 16 + 24 + 12 + found.stack
    assert found.flash == found.text + 144
    assert found.text > found.objects - 144 + 300  # floating-point routines
    assert "dense" in found.stack_path


def test_a_core_with_an_fpu_needs_no_library_for_floats(toy):
    needs("cortex-m4f", emulator=False)
    found = measure(toy[0], target="stm32f4")
    assert found.objects <= found.flash <= found.objects + 8  # the function that calls it
    assert found.data == found.bss == 0
    same = measure(toy[0], cc="arm-none-eabi-gcc -mcpu=cortex-m4 -mfpu=fpv4-sp-d16 -mfloat-abi=hard -mthumb")
    assert (same.flash, same.ram) == (found.flash, found.ram)


LISTING = """
00008000 <net_run>:
    8000:\tpush\t{r4, lr}
    8002:\tbl\t8010 <layer.constprop.0>
    8006:\tb.n\t8020 <tail>

00008010 <layer.constprop.0>:
    8010:\tpush\t{r4, r5, r6, r7, lr}
    8012:\tsub\tsp, #20
    8014:\tbl\t8030 <__aeabi_fmul>
    8018:\tpop\t{r4, r5, r6, r7, pc}

00008020 <tail>:
    8020:\tvpush\t{d8-d11}
    8024:\tbx\tlr

00008030 <__aeabi_fmul>:
    8030:\tstmdb\tsp!, {r4, r5, r6}
    8034:\tsub.w\tsp, sp, #100
    8038:\tbne.n\t8034 <__aeabi_fmul+0x4>

0000803a <__normalise>:
    803a:\tpush\t{r0}
    803c:\tbx\tlr
"""


def test_the_deepest_stack_is_the_longest_way_through_the_calls():
    stated, varying = callgraph.stated_frames(["net.c:1:1:layer\t40\tstatic\nnet.c:2:2:net_run\t8\tstatic\n"])
    found = callgraph.deepest(LISTING, "arm", "net_run", stated)
    # 8 and 40 as stated; 3 registers, 100 bytes and the 4 of the routine it runs on into.
    assert found.bytes == 8 + 40 + 12 + 100 + 4
    assert found.path == ("net_run", "layer.constprop.0", "__aeabi_fmul", "__normalise")
    assert (found.doubts, varying) == ((), ())
    # The tail call is made with the caller's frame gone: 32 bytes alone are less than 8 and what the call takes.
    assert callgraph.deepest(LISTING, "arm", "tail", stated).bytes == 4 * 8


def test_what_makes_a_stack_unknown_is_said():
    text = LISTING.replace("bl\t8030 <__aeabi_fmul>", "bl\t8000 <net_run>").replace("bx\tlr", "blx\tr3", 1)
    found = callgraph.deepest(text, "arm", "net_run", {})
    assert found.doubts == ("net_run calls itself", "tail calls through a pointer")
    _, varying = callgraph.stated_frames(["net.c:1:1:f\t40\tdynamic\n"])
    assert varying == ("f has a frame of variable size",)


@pytest.mark.parametrize("core", [core for core in CORES.values() if core.stand_in is None], ids=lambda core: core.name)
def test_a_missing_compiler_is_named_with_what_brings_it(core, toy, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _program: None)
    with pytest.raises(MissingToolError, match=f"{core.compiler}, which is not installed: apt install .*gcc"):
        measure(toy[0], target=core.name)


def test_without_a_compiler_for_xtensa_the_sizes_are_another_cores_and_say_so(toy):
    needs("cortex-m4f", emulator=False)
    if shutil.which(CORES["esp32"].compiler):
        pytest.skip("there is a compiler for Xtensa")
    found = measure(toy[0], target="esp32")
    assert found.flash == measure(toy[0], target="cortex-m4f").flash
    assert "xtensa-esp32-elf-gcc, which is not installed" in found.estimated
    assert found.estimated.endswith("these are the sizes for Arm Cortex-M4 with FPU")
    with pytest.raises(UnsupportedModelError, match="no emulator for Tensilica Xtensa LX6"):
        emulate(toy[0], "esp32", toy[1])


def test_what_cannot_run_is_refused_in_a_sentence(toy, tmp_path):
    folder, x, _ = toy
    with pytest.raises(InputError, match="there is no target 'zx81'; there are cortex-m0plus"):
        core_of("zx81")
    with pytest.raises(InputError, match="no microcontroller"):
        core_of("raspberry-pi-zero-2")
    with pytest.raises(InputError, match="has no header of a network"):
        Program.find(tmp_path)
    needs("arduino-uno")
    with pytest.raises(InputError, match="takes 6 float32 a sample: the data have 5 float32"):
        emulate(folder, "arduino-uno", x[:, :5])
    large = Path(shutil.copytree(folder, tmp_path / "large"))
    header = (large / "net.h").read_text().replace("ARENA_BYTES 16", "ARENA_BYTES 1990")
    (large / "net.h").write_text(header)
    with pytest.raises(InputError, match=r"avr-gcc failed .* section `\.bss' is not within region `data'"):
        emulate(large, "arduino-uno", x)
    (large / "net.c").write_text("int broken")
    with pytest.raises(InputError, match="avr-gcc failed"):
        emulate(large, "arduino-uno", x)


def test_a_network_of_another_name_is_found(toy, tmp_path):
    needs("cortex-m0plus")
    folder, x, expected = toy
    for name in ("net.c", "net.h"):
        text = (folder / name).read_text().replace("NET_", "DIGITS_").replace("net_run", "digits_run")
        (tmp_path / name.replace("net", "digits")).write_text(text.replace("net.h", "digits.h"))
    (tmp_path / "example.c").write_text("int main(void) { return 0; }")  # no part of the program
    np.testing.assert_allclose(emulate(tmp_path, "rp2040", x).outputs, expected, atol=3e-6)


def test_the_commands_leave_with_the_answer(toy, tmp_path, capsys):
    needs("arduino-uno")
    folder, x, expected = toy
    assert run(["audit", str(folder), "--measure", "--target", "arduino-uno", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    check_answer(answer, "audit --measure")
    (found,) = answer["result"]["measured"].values()
    over = ["audit", str(folder), "--measure", "--target", "arduino-uno", "--ram", f"{found['ram_bytes'] - 1}B"]
    assert run(over) == 1
    assert f"FAILED: RAM: toy takes {found['ram_bytes']} bytes (arena 16, input 24" in capsys.readouterr().out
    np.savez(tmp_path / "right.npz", x=x, logits=expected.astype(np.float32), y=expected.argmax(1))
    np.savez(tmp_path / "wrong.npz", x=x, logits=expected.astype(np.float32) + 1)
    command = ["run-on", "arduino-uno", str(folder), "--samples", "3", "--json", "--data"]
    assert run([*command, str(tmp_path / "right.npz")]) == 0
    answer = json.loads(capsys.readouterr().out)
    check_answer(answer)
    done = answer["result"]
    assert (answer["ok"], done["samples"], done["unit"], done["accuracy"]) == (True, 3, "clock cycles", 1.0)
    assert done["nominal_seconds"] == pytest.approx(done["mean_count"] / 16e6)
    assert run([*command, str(tmp_path / "wrong.npz")]) == 1
    assert json.loads(capsys.readouterr().out)["failures"][0]["code"] == "relative_error"
    assert run(["audit", str(folder), "--cc", "gcc"]) == 2
