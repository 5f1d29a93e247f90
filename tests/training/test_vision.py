"""torchvision imports beside a torch that its compiled operators do not fit, and a fitting pair notices nothing."""

from __future__ import annotations

import subprocess
import sys
import textwrap

# A stand-in for torchvision: its import does what the real one's does, with and without its compiled library.
PACKAGE = """
import torch
{library}
@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, threshold): ...
@torch.library.register_fake("torchvision::qnms")
def qnms(dets, scores, threshold): ...
"""
LIBRARY = """
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def run(tmp_path, library, code):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(PACKAGE.format(library=library))
    setup = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", setup + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_absent_operators_are_declared_once(tmp_path):
    code = """
        from relief_export.training import vision
        assert vision.import_torchvision() is vision.import_torchvision()
        print(*vision._SCHEMAS, len(vision._DECLARED), vision.declare_missing())
    """
    assert run(tmp_path, "", code) == ["nms", "qnms", "1", "()"]


def test_a_matching_pair_notices_nothing(tmp_path):
    code = """
        from relief_export.training import vision
        vision.import_torchvision()
        print(len(vision._DECLARED))
    """
    assert run(tmp_path, LIBRARY, code) == ["0"]


def test_another_failure_of_the_import_is_not_hidden(tmp_path):
    code = """
        from relief_export.training import vision
        try:
            vision.import_torchvision()
        except RuntimeError as error:
            print(error)
    """
    assert run(tmp_path, 'raise RuntimeError("broken")', code) == ["broken"]


def test_the_installed_torchvision_imports():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from relief_export.training.vision import import_torchvision as t; print(t().models.resnet18.__name__)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "resnet18"
