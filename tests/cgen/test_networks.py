"""Networks as PyTorch exports them: generated, compiled, and compared with ONNX Runtime."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from relief_export.capture import capture
from relief_export.cgen.lower import lower
from relief_export.recipe import ModelConfig
from relief_export.training.models import build_model
from tests import relieved
from tests.cgen import programs
from tests.cgen.interpret import Interpreter
from tests.graph.helpers import run

RELATIVE = 1e-5  # of the logits' scale
SHAPE = (3, 32, 32)
NETWORKS = {  # name, options -> whether it is compiled as well; the large ones only show that the plan is right
    ("resnet20", "A"): True,
    ("resnet20", "B"): True,
    ("torchvision:shufflenet_v2_x0_5", None): False,
    ("torchvision:mobilenet_v3_small", None): True,
    ("torchvision:squeezenet1_1", None): True,
}
FLAGS = ("-O1", "-march=native", "-Wall", "-Wextra", "-Werror")


def network(name: str, shortcut: str | None) -> torch.nn.Module:
    options = {"shortcut": shortcut} if shortcut else {}
    model = build_model(ModelConfig(name, options=options), SHAPE, 10, seed=0).eval()
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, torch.nn.Conv2d):  # three kernels of four are gone
            module.weight.data *= (torch.rand(module.weight.shape[:2]) < 0.25)[:, :, None, None]
    return model


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize(("name", "shortcut"), NETWORKS)
def test_networks(name, shortcut, tmp_path):
    with torch.random.fork_rng():
        model = capture(network(name, shortcut), torch.zeros(2, *SHAPE))
    if NETWORKS[name, shortcut] and programs.COMPILER is not None:
        case = programs.write(tmp_path, "net", model)
        assert programs.failures(tmp_path, [case], FLAGS) == []
        return
    x = np.random.default_rng(0).normal(size=(1, *SHAPE)).astype(np.float32)
    (expected,) = run(model, {model.graph.inputs[0].name: x})
    found = Interpreter(lower(model)).run(x)
    assert np.abs(found - expected).max() <= RELATIVE * np.abs(expected).max()


@pytest.mark.skipif(programs.COMPILER is None, reason="there is no C compiler")
@pytest.mark.parametrize("path", relieved.FILES, ids=lambda path: path.stem)
def test_relieved_networks(path, tmp_path):
    kept = relieved.load(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = capture(kept.model, kept.x[:2])
    case = programs.write(tmp_path, "net", model)
    for flags in (FLAGS, ("-O2", "-DNET_PLAIN_C", *FLAGS[2:])):
        assert programs.failures(tmp_path, [case], flags) == []
