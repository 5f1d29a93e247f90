"""Where the files of a program lie in the projects that microcontrollers are programmed in.

arduino   a library folder: Sketch > Include Library > Add .ZIP Library, or a folder of libraries/
zephyr    an application: west build -b BOARD
esp-idf   a project with the network as a component: idf.py build
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from relief_export.cgen.c_source import render
from relief_export.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping

_FILES: dict[str, dict[str, str]] = {
    "arduino": {
        "library.properties": "library.properties",
        "examples/{name}_once/{name}_once.ino": "sketch.ino",
    },
    "zephyr": {"CMakeLists.txt": "zephyr.cmake", "prj.conf": "prj.conf", "src/main.c": "zephyr_main.c"},
    "esp-idf": {
        "CMakeLists.txt": "esp_idf.cmake",
        "main/CMakeLists.txt": "esp_idf_main.cmake",
        "main/main.c": "esp_idf_main.c",
        "components/{name}/CMakeLists.txt": "esp_idf_component.cmake",
    },
}
"""Layout -> file -> the template that makes it."""
_PLACES = {
    "arduino": ("src/{name}.h", "src/{name}.c"),
    "zephyr": ("src/{name}.h", "src/{name}.c"),
    "esp-idf": ("components/{name}/{name}.h", "components/{name}/{name}.c"),
}
"""Layout -> where the header and the source lie."""


def arrange(files: Mapping[str, bytes], name: str, layout: str) -> dict[str, bytes]:
    """Return the files of a program by their paths in a layout, with what the layout adds.

    Args:
        files: What ``mcu.generate`` made.
        name: Of the program.
        layout: A name of ``format_names.LAYOUTS``.
    """
    title = files[f"{name}.c"].decode("ascii").splitlines()[0].removeprefix("/* ")
    facts = {"name": name, "upper": name.upper(), "title": title, "version": VERSION}
    header, source = (place.format(name=name) for place in _PLACES[layout])
    found = {header: files[f"{name}.h"], source: files[f"{name}.c"]}
    for file, template in _FILES[layout].items():
        found[file.format(name=name)] = render(f"layouts/{template}", **facts).encode("ascii")
    return found
