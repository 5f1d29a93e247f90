"""How `make docs` builds the pages: Sphinx reads the Markdown as it stands, and a dead link is an error."""

import pathlib
import re

project = "relief-export"
author = "the relief-export developers"
copyright = "the relief-export developers"  # noqa: A001  Sphinx's name for it
_version = (pathlib.Path(__file__).parent.parent / "relief_export" / "version.py").read_text(encoding="utf-8")
release = re.search(r'VERSION = "([^"]+)"', _version)[1]

extensions = ["myst_parser"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

# They would make one dash of the two in front of an option.
smartquotes = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_title = f"relief-export {release}"
