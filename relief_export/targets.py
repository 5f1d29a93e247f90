"""Processor cores and the boards that carry them: memories, clocks, compilers, emulators, each board with its source.

RAM is the largest block of contiguous on-chip memory that an arena can lie in, so it can be less than the total on the
data sheet's first page. None of it is reserved for a stack, a radio or an operating system.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from relief_export.errors import InputError

KIB, MIB = 1024, 1024 * 1024
Family: TypeAlias = Literal["arm", "riscv", "avr", "xtensa"]


@dataclass(frozen=True)
class Core:
    """One kind of processor, and the tools that build and run programs for it.

    Attributes:
        family: Which start code and linker script serve it.
        compiler: Name of its C compiler.
        install: How to get the compiler.
        flags: What tells the compiler which core it is.
        emulator: Command that runs a program for it, without the program's name; empty where there is none.
        emulator_install: How to get the emulator.
        stand_in: Core whose compiler gives an estimate where this one's is not installed, because no common
            distribution packages it.
        ticks_per_count: Instructions (AVR: clock cycles) between two counts of the timer that the program reads; the
            figures of an emulated run are multiples of it.
    """

    name: str
    title: str
    family: Family
    compiler: str
    install: str
    flags: tuple[str, ...]
    emulator: tuple[str, ...] = ()
    emulator_install: str = ""
    stand_in: str | None = None
    ticks_per_count: int = 1

    @property
    def unit(self) -> str:
        """What an emulated run counts."""
        return "clock cycles" if self.family == "avr" else "instructions"


@dataclass(frozen=True)
class Target:
    """One board or chip.

    Attributes:
        flash: Bytes for program and model; None where it is removable storage.
        ram: Bytes of the largest contiguous block.
        source: Document that states the memories and the clock.
        note: How the figures were read.
        core: Key of ``CORES``; None for a computer with an operating system.
        clock: Highest frequency of the core, in hertz.
        flags: Compiler flags in place of the core's, where the chip has a name of its own.
    """

    name: str
    title: str
    flash: int | None
    ram: int
    source: str
    note: str = ""
    core: str | None = None
    clock: int | None = None
    flags: tuple[str, ...] = ()


_ARM: tuple[Family, str, str] = ("arm", "arm-none-eabi-gcc", "apt install gcc-arm-none-eabi libnewlib-arm-none-eabi")
_RISCV: tuple[Family, str, str] = (
    "riscv", "riscv64-unknown-elf-gcc", "apt install gcc-riscv64-unknown-elf picolibc-riscv64-unknown-elf"
)  # fmt: skip
_XTENSA = "no distribution packages it, get the toolchain xtensa-esp-elf from github.com/espressif/crosstool-NG"


def _arm(name: str, title: str, machine: str, *flags: str, ticks: int = 40) -> Core:
    """Return a Cortex-M; ``ticks`` is 1 GHz, what ``-icount shift=0`` makes of an instruction, by the timer's clock."""
    emulator = ("qemu-system-arm", "-machine", machine, *_QEMU)
    return Core(name, title, *_ARM, (*flags, "-mthumb"), emulator, "apt install qemu-system-arm", ticks_per_count=ticks)


def _riscv(name: str, title: str, *flags: str) -> Core:
    emulator = ("qemu-system-riscv32", "-machine", "virt", "-bios", "none", *_QEMU)
    return Core(name, title, *_RISCV, flags, emulator, "apt install qemu-system-misc")


# The option -kernel comes last, because the program's name is put behind it.
_QEMU = ("-nographic", "-monitor", "none", "-serial", "none", "-semihosting-config", "enable=on,target=native",
         "-icount", "shift=0", "-kernel")  # fmt: skip

CORES: dict[str, Core] = {
    core.name: core
    for core in (
        # The Cortex-M3 of the emulated board runs ARMv6-M programs as they are, and as many instructions.
        _arm("cortex-m0plus", "Arm Cortex-M0+", "mps2-an385", "-mcpu=cortex-m0plus"),
        _arm("cortex-m3", "Arm Cortex-M3", "mps2-an385", "-mcpu=cortex-m3"),
        _arm("cortex-m4f", "Arm Cortex-M4 with FPU", "mps2-an386",
             "-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard"),
        _arm("cortex-m7", "Arm Cortex-M7 with FPU", "mps2-an500",
             "-mcpu=cortex-m7", "-mfpu=fpv5-sp-d16", "-mfloat-abi=hard"),
        _arm("cortex-m33", "Arm Cortex-M33 with FPU", "mps2-an505",
             "-mcpu=cortex-m33", "-mfpu=fpv5-sp-d16", "-mfloat-abi=hard", ticks=50),
        _riscv("rv32imc", "RISC-V RV32IMC", "-march=rv32imc", "-mabi=ilp32"),
        _riscv("rv32ec", "RISC-V RV32EC", "-march=rv32ec", "-mabi=ilp32e"),
        Core("esp32", "Tensilica Xtensa LX6", "xtensa", "xtensa-esp32-elf-gcc", _XTENSA, ("-mlongcalls",),
             stand_in="cortex-m4f"),
        Core("esp32s3", "Tensilica Xtensa LX7", "xtensa", "xtensa-esp32s3-elf-gcc", _XTENSA, ("-mlongcalls",),
             stand_in="cortex-m4f"),
        # The largest 8-bit AVR whose tables all lie within the reach of 16-bit pointers.
        Core("avr", "AVR, 8 bits (ATmega1284P)", "avr", "avr-gcc", "apt install gcc-avr avr-libc",
             ("-mmcu=atmega1284p",), ("simavr", "-m", "atmega1284p", "-f", "16000000"), "apt install simavr"),
    )
}  # fmt: skip

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "arduino-nano-33-ble", "Arduino Nano 33 BLE (nRF52840)", MIB, 256 * KIB,
            "Nordic Semiconductor, nRF52840 Product Specification, chapter Memory",
            core="cortex-m4f", clock=64_000_000,
        ),
        Target(
            "arduino-uno", "Arduino Uno R3 (ATmega328P)", 32 * KIB, 2 * KIB,
            "Microchip, DS40002061, ATmega48A/PA/88A/PA/168A/PA/328/P datasheet",
            "the boot loader takes 512 bytes of the flash",
            core="avr", clock=16_000_000, flags=("-mmcu=atmega328p",),
        ),
        Target(
            "arduino-mega", "Arduino Mega 2560 (ATmega2560)", 256 * KIB, 8 * KIB,
            "Microchip, DS40002211, ATmega640/V-1280/V-1281/V-2560/V-2561/V datasheet",
            "the boot loader takes 8 KiB of the flash",
            core="avr", clock=16_000_000, flags=("-mmcu=atmega2560",),
        ),
        Target(
            "stm32f1", "Blue Pill (STM32F103C8)", 64 * KIB, 20 * KIB,
            "STMicroelectronics, DS5319, STM32F103x8 STM32F103xB datasheet",
            core="cortex-m3", clock=72_000_000,
        ),
        Target(
            "stm32f4", "STM32F4DISCOVERY (STM32F407VG)", MIB, 128 * KIB,
            "STMicroelectronics, DS8626, STM32F405xx STM32F407xx datasheet",
            "112 + 16 KiB of SRAM in one block; 64 KiB of core-coupled memory lie apart",
            core="cortex-m4f", clock=168_000_000,
        ),
        Target(
            "stm32f7", "32F746GDISCOVERY (STM32F746NG)", MIB, 320 * KIB,
            "STMicroelectronics, DS10916, STM32F745xx STM32F746xx datasheet",
            "64 KiB of data TCM, 240 KiB and 16 KiB of SRAM follow each other",
            core="cortex-m7", clock=216_000_000,
        ),
        Target(
            "stm32g0", "NUCLEO-G071RB (STM32G071RB)", 128 * KIB, 36 * KIB,
            "STMicroelectronics, DS12232, STM32G071x8/xB datasheet",
            "32 KiB where the parity check is on",
            core="cortex-m0plus", clock=64_000_000,
        ),
        Target(
            "stm32h7", "NUCLEO-H743ZI (STM32H743ZI)", 2 * MIB, 512 * KIB,
            "STMicroelectronics, DS12110, STM32H742xI/G STM32H743xI/G datasheet",
            "the AXI SRAM; 1 MiB in all, in several blocks",
            core="cortex-m7", clock=480_000_000,
        ),
        Target(
            "stm32l4", "NUCLEO-L476RG (STM32L476RG)", MIB, 96 * KIB,
            "STMicroelectronics, DS10198, STM32L476xx datasheet",
            "SRAM1; 32 KiB of SRAM2 lie apart",
            core="cortex-m4f", clock=80_000_000,
        ),
        Target(
            "nrf5340", "nRF5340 DK (nRF5340, application core)", MIB, 512 * KIB,
            "Nordic Semiconductor, nRF5340 Product Specification, chapter Application core",
            core="cortex-m33", clock=128_000_000,
        ),
        Target(
            "esp32", "ESP32-DevKitC (ESP32-WROOM-32E)", 4 * MIB, 328 * KIB,
            "Espressif, ESP32 Technical Reference Manual, chapter System and Memory, and ESP32-WROOM-32E Datasheet",
            "SRAM 1 and 2 on the data bus; 520 KiB in all, no PSRAM; the boot ROM and the radio take a share",
            core="esp32", clock=240_000_000,
        ),
        Target(
            "esp32-c3", "ESP32-C3-DevKitM-1 (ESP32-C3-MINI-1)", 4 * MIB, 384 * KIB,
            "Espressif, ESP32-C3 Technical Reference Manual, chapter System and Memory, and ESP32-C3-MINI-1 Datasheet",
            "SRAM 1; 16 KiB more are the cache",
            core="rv32imc", clock=160_000_000,
        ),
        Target(
            "esp32-s3", "ESP32-S3-DevKitC-1 (ESP32-S3-WROOM-1-N8)", 8 * MIB, 480 * KIB,
            "Espressif, ESP32-S3 Technical Reference Manual, chapter System and Memory, and ESP32-S3-WROOM-1 Datasheet",
            "SRAM 1 and 2 on the data bus; 512 KiB in all, no PSRAM; caches can take a share; flash is in the module",
            core="esp32s3", clock=240_000_000,
        ),
        Target(
            "ch32v003", "CH32V003 (QingKe V2A)", 16 * KIB, 2 * KIB,
            "WCH, CH32V003 Datasheet",
            core="rv32ec", clock=48_000_000,
        ),
        Target(
            "rp2040", "Raspberry Pi Pico (RP2040)", 2 * MIB, 264 * KIB,
            "Raspberry Pi, RP2040 Datasheet, and Raspberry Pi Pico Datasheet",
            "four striped banks of 64 KiB and two of 4 KiB follow each other",
            core="cortex-m0plus", clock=133_000_000,
        ),
        Target(
            "rp2350", "Raspberry Pi Pico 2 (RP2350)", 4 * MIB, 520 * KIB,
            "Raspberry Pi, RP2350 Datasheet, and Raspberry Pi Pico 2 Datasheet",
            "eight striped banks of 64 KiB and two of 4 KiB follow each other; its Arm cores, not its RISC-V ones",
            core="cortex-m33", clock=150_000_000,
        ),
        Target(
            "raspberry-pi-zero-2", "Raspberry Pi Zero 2 W", None, 512 * MIB,
            "Raspberry Pi, Raspberry Pi Zero 2 W Product Brief",
            "storage is a memory card; Linux takes its share of the RAM",
        ),
    )
}  # fmt: skip


def core_of(name: str) -> Core:
    """Return the core of a board, or the core of that name.

    Raises:
        InputError: There is neither, or the board runs an operating system.
    """
    if name in CORES:
        return CORES[name]
    if name not in TARGETS:
        raise InputError(f"there is no target {name!r}; there are {', '.join(CORES)} and {', '.join(TARGETS)}")
    core = TARGETS[name].core
    if core is None:
        raise InputError(f"{name} is no microcontroller: run the network there in ONNX Runtime or as the format c")
    return CORES[core]
