"""Well-known targets and their memories, each with the document that states them.

RAM is the largest block of contiguous on-chip memory that an arena can lie in, so it can be less than the total on the
data sheet's first page. None of it is reserved for a stack, a radio or an operating system.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB, MIB = 1024, 1024 * 1024


@dataclass(frozen=True)
class Target:
    """One board or chip.

    Attributes:
        flash: Bytes for program and model; None where it is removable storage.
        ram: Bytes of the largest contiguous block. source: Document that states both. note: How the figures were read.
    """

    name: str
    title: str
    flash: int | None
    ram: int
    source: str
    note: str = ""


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "arduino-nano-33-ble", "Arduino Nano 33 BLE (nRF52840)", MIB, 256 * KIB,
            "Nordic Semiconductor, nRF52840 Product Specification, chapter Memory",
        ),
        Target(
            "stm32f4", "STM32F4DISCOVERY (STM32F407VG)", MIB, 128 * KIB,
            "STMicroelectronics, DS8626, STM32F405xx STM32F407xx datasheet",
            "112 + 16 KiB of SRAM in one block; 64 KiB of core-coupled memory lie apart",
        ),
        Target(
            "stm32f7", "32F746GDISCOVERY (STM32F746NG)", MIB, 320 * KIB,
            "STMicroelectronics, DS10916, STM32F745xx STM32F746xx datasheet",
            "64 KiB of data TCM, 240 KiB and 16 KiB of SRAM follow each other",
        ),
        Target(
            "stm32h7", "NUCLEO-H743ZI (STM32H743ZI)", 2 * MIB, 512 * KIB,
            "STMicroelectronics, DS12110, STM32H742xI/G STM32H743xI/G datasheet",
            "the AXI SRAM; 1 MiB in all, in several blocks",
        ),
        Target(
            "esp32-s3", "ESP32-S3-DevKitC-1 (ESP32-S3-WROOM-1-N8)", 8 * MIB, 480 * KIB,
            "Espressif, ESP32-S3 Technical Reference Manual, chapter System and Memory, and ESP32-S3-WROOM-1 Datasheet",
            "SRAM 1 and 2 on the data bus; 512 KiB in all, no PSRAM; caches can take a share; flash is in the module",
        ),
        Target(
            "rp2040", "Raspberry Pi Pico (RP2040)", 2 * MIB, 264 * KIB,
            "Raspberry Pi, RP2040 Datasheet, and Raspberry Pi Pico Datasheet",
            "four striped banks of 64 KiB and two of 4 KiB follow each other",
        ),
        Target(
            "raspberry-pi-zero-2", "Raspberry Pi Zero 2 W", None, 512 * MIB,
            "Raspberry Pi, Raspberry Pi Zero 2 W Product Brief",
            "storage is a memory card; Linux takes its share of the RAM",
        ),
    )
}  # fmt: skip
