"""The names of the file formats, the same in recipes, on the command line, in manifests and in Python.

They stand apart from ``formats`` because that package loads ONNX Runtime, and reading a recipe must not.
"""

from __future__ import annotations

from typing import Literal, get_args

FormatName = Literal[
    "dense",
    "sparse",
    "packed",
    "packed-f16",
    "packed-int8",
    "packed-codebook16",
    "packed-codebook256",
    "csr",
    "int8",
    "ort",
    "c",
    "c-mcu",
    "c-mcu-int8",
    "c-mcu-codebook16",
    "c-mcu-q8",
]
FORMAT_NAMES: tuple[FormatName, ...] = get_args(FormatName)

LAYOUTS = ("arduino", "zephyr", "esp-idf")
"""Projects in which a c-mcu program can be laid out."""
