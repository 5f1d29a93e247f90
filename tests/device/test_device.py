"""A network on other processors: as their compilers measure it, and as emulators run it."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from relief_export.cli import run
from relief_export.device import callgraph
from relief_export.device.emulator import emulate
from relief_export.device.measure import measure
from relief_export.device.toolchain import Program
from relief_export.errors import InputError, MissingToolError, UnsupportedModelError
from relief_export.records import locked, read_record
from relief_export.report import build_report
from relief_export.targets import CORES, TARGETS, core_of
from tests.answers import check_answer
from tests.device.conftest import needs
from tests.report.folders import make_folder

EMULATED = [name for name, core in CORES.items() if core.emulator]


@pytest.mark.parametrize("core", EMULATED)
def test_every_emulated_core_computes_what_numpy_does_within_the_stack_that_is_measured(core, toy):
    needs(core)
    folder, x, expected = toy
    ran = emulate(folder, core, x)
    np.testing.assert_allclose(ran.outputs, expected, atol=3e-6)  # float32 sums of six products
    assert ran.counts.shape == (len(x),)
    assert ran.counts.min() > 7 * 4  # more than one instruction for each connection
    bound = measure(folder, target=core).stack_bytes
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
    assert (found.data_bytes, found.bss_bytes) == (144, 0)
    assert (found.arena_bytes, found.input_bytes, found.output_bytes) == (16, 24, 12)
    assert found.ram_bytes == 144 + 16 + 24 + 12 + found.stack_bytes
    assert found.flash_bytes == found.text_bytes + 144
    assert found.text_bytes > found.objects_bytes - 144 + 300  # floating-point routines
    assert "dense" in found.stack_path


def test_a_core_with_an_fpu_needs_no_library_for_floats(toy):
    needs("cortex-m4f", emulator=False)
    found = measure(toy[0], target="stm32f4")
    assert found.objects_bytes <= found.flash_bytes <= found.objects_bytes + 8  # the function that calls it
    assert found.data_bytes == found.bss_bytes == 0
    same = measure(toy[0], cc="arm-none-eabi-gcc -mcpu=cortex-m4 -mfpu=fpv4-sp-d16 -mfloat-abi=hard -mthumb")
    assert (same.flash_bytes, same.ram_bytes) == (found.flash_bytes, found.ram_bytes)


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
    assert found.flash_bytes == measure(toy[0], target="cortex-m4f").flash_bytes
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


@pytest.fixture
def built(tmp_path):
    """Return a build folder with one program in C."""
    folder = make_folder(tmp_path / "tiny", written_as=("dense", "c-mcu"))
    (folder / "recipe.toml").touch()
    return folder


# The compilers of the two are of different ages.
@pytest.mark.parametrize("target", ["stm32f4", "arduino-uno"])
def test_a_run_of_a_build_folders_program_leaves_a_record_that_the_report_shows(built, target, tmp_path, capsys):
    needs(target)
    command = ["run-on", target, str(built), "--samples", "5", "--data", str(built / "artifacts" / "reference.npz")]
    with locked(built):
        assert run(command) == 2
    assert "works in" in capsys.readouterr().err
    assert run([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    check_answer(answer)
    done = answer["result"]
    path = built / "device" / target / "c-mcu.json"
    assert done["record"] == str(path)
    record = read_record(path, "run-on")
    program = built / "artifacts" / "c-mcu"
    assert set(record.inputs) == {f"artifacts/c-mcu/{file.name}" for file in program.iterdir()}
    found = record.outcome
    assert (found["program"], found["format"], found["title"]) == ("c-mcu", "c-mcu", TARGETS[target].title)
    sizes = measure(program, target=target)
    assert found["sizes"] == json.loads(json.dumps(sizes.to_dict()))
    assert found["sizes"]["command"].startswith(f"{core_of(target).compiler} -m")
    banner = subprocess.run([core_of(target).compiler, "--version"], capture_output=True, text=True, check=True).stdout
    assert found["compiler_version"] in banner
    assert {key: done[key] for key in found["run"] if key in done} | {"ok": True, "failures": []} == found["run"]
    text = build_report([built], tmp_path).markdown.read_text().partition("## On the device")[2]
    row = f"| {sizes.flash_bytes:,} | {sizes.ram_bytes:,} | {done['mean_count']:,.0f}"
    assert row in text
    # The folder of the program is as good as the build folder; a change of the program makes the record an old one.
    assert run([*command[:2], str(program), *command[3:]]) == 0
    assert f"kept for the report in {path}" in capsys.readouterr().out
    (program / "net.c").write_text((program / "net.c").read_text() + "\n")
    assert row not in build_report([built], tmp_path).markdown.read_text()
    assert run(command) == 2
    assert "net.c" in capsys.readouterr().err


def test_a_folder_that_an_export_alone_wrote_keeps_the_record_itself(built, capsys):
    needs("cortex-m4f")
    (built / "recipe.toml").unlink()
    alone = built / "artifacts"
    data = str(alone / "reference.npz")
    assert run(["run-on", "cortex-m4f", str(alone), "--samples", "2", "--data", data]) == 0
    assert f"kept for the report in {alone / 'device' / 'cortex-m4f' / 'c-mcu.json'}" in capsys.readouterr().out
    assert all(
        name.startswith("c-mcu/") for name in read_record(alone / "device/cortex-m4f/c-mcu.json", "run-on").inputs
    )


def test_a_program_of_no_export_leaves_no_record_and_one_of_several_is_asked_for(toy, tmp_path, capsys):
    folder, x, _ = toy
    for name in "ab":
        shutil.copytree(folder, tmp_path / "both" / name)
    np.savez(tmp_path / "x.npz", x=x)
    assert run(["run-on", "cortex-m4f", str(tmp_path / "both"), "--data", str(tmp_path / "x.npz")]) == 2
    assert "has 2 programs in C (a, b): give the folder of one of them" in capsys.readouterr().err
    needs("cortex-m4f")
    command = ["run-on", "cortex-m4f", str(tmp_path / "both" / "a"), "--data", str(tmp_path / "x.npz"), "--json"]
    assert run(command) == 0
    assert json.loads(capsys.readouterr().out)["result"]["record"] is None
    assert not list(tmp_path.rglob("device"))
