"""Captured torchvision networks with killed channels: folded, shrunk, and equal in ONNX Runtime."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from relief_export.capture import capture
from relief_export.graph.cost import cost
from relief_export.graph.prepare import fold
from relief_export.graph.shrink import shrink
from tests.graph.helpers import assert_sound, random_feeds

RELATIVE = 1e-5  # of the logits' scale
SIDE = 64
SHARE = 0.3
REMOVED = 0.95  # of what no operator of the graph forbids to remove
NETWORKS = ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_0", "efficientnet_b0")
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")


@pytest.mark.parametrize("name", NETWORKS)
def test_killed_channels_are_removed_exactly(name, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # benchmarks/ is no installed package
    killing, account = (
        importlib.import_module("benchmarks.killing"),
        importlib.import_module("benchmarks.shrink").account,
    )
    with torch.random.fork_rng():
        network = killing.build(name, 0, SIDE)
    killed = killing.kill(network, SHARE, 0)
    folded = fold(capture(network, torch.zeros(2, 3, SIDE, SIDE)))
    result = shrink(folded, strict=True)
    assert_sound(folded, result.model, random_feeds(folded, batch=2), relative=RELATIVE)
    before, after = cost(folded), cost(result.model)
    assert after.macs.structural < before.macs.structural
    bill = account({layer: rows.numpy() for layer, rows in killed.items()}, result)
    assert bill["killed"] > 0
    assert bill["unexplained"] == 0
    assert bill["removed"] >= REMOVED * bill["removable"]
