import html
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from relief_export.report import build_report
from tests.report.folders import write_run_on

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed to look at the page with")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
MEASURE = """
<script>addEventListener("load", () => {
  const root = document.querySelector("iframe").contentDocument.documentElement;
  const wide = [...root.querySelectorAll("body *")].filter(
    (e) => e.getBoundingClientRect().right > WIDTH + 1 && !e.closest(".scroll, pre"));
  const silent = [...root.querySelectorAll(".scroll:not(.wide)")].filter((e) => e.scrollWidth > e.clientWidth + 1);
  const named = (found) => found.map((e) => e.outerHTML.slice(0, 60)).join();
  document.body.dataset.measured = [root.scrollWidth, named(wide), named(silent)].join(";");
});</script>
"""


def chromium(tmp_path, page, *options):
    command = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture(scope="module")
def page(build, tmp_path_factory):
    out = tmp_path_factory.mktemp("browser")
    folder = shutil.copytree(build, out / "tiny")
    write_run_on(folder, "with-a-long-name-of-its-own", "csr")
    return build_report([folder], out).html


@pytest.mark.parametrize(("scheme", "dark"), [(1, False), (0, True)], ids=["light", "dark"])
def test_the_page_is_drawn_in_the_colours_of_the_reader(page, tmp_path, scheme, dark):
    picture = tmp_path / "page.png"
    chromium(
        tmp_path,
        page,
        f"--screenshot={picture}",
        "--window-size=1200,2600",
        f"--blink-settings=preferredColorScheme={scheme}",
    )
    pixels = np.rint(255 * matplotlib.image.imread(picture)[..., :3]).astype(int)
    ground = (0x14, 0x18, 0x1C) if dark else (0xFB, 0xFB, 0xFA)
    share = (pixels == ground).all(axis=-1).mean()
    assert 0.4 < share < 0.95  # the ground of this scheme, and something on it
    accent = (0x6F, 0xB0, 0xEE) if dark else (0x22, 0x64, 0xA8)
    assert (pixels == accent).all(axis=-1).sum() > 500  # the charts follow the scheme


@pytest.mark.parametrize("width", [360, 390])
def test_only_boxes_that_say_so_are_wider_than_a_phone(page, tmp_path, width):
    frame = f'<iframe srcdoc="{html.escape(page.read_text())}" style="width:{width}px;height:800px;border:0"></iframe>'
    wrapper = tmp_path / "frame.html"
    wrapper.write_text(
        f"<!DOCTYPE html><body style='margin:0'>{frame}{MEASURE.replace('WIDTH', str(width))}", encoding="utf-8"
    )
    found = re.search(r'data-measured="(\d+);([^;"]*);([^"]*)"', chromium(tmp_path, wrapper, "--dump-dom"))
    assert (found[1], found[2], html.unescape(found[3])) == (str(width), "", "")


def test_the_page_prints(page, tmp_path):
    printed = Path(tmp_path / "page.pdf")
    chromium(tmp_path, page, f"--print-to-pdf={printed}", "--no-pdf-header-footer")
    data = printed.read_bytes()
    assert data.startswith(b"%PDF")
    assert len(data) > 20_000
