"""The table of other people's networks: what stands in a row when a network works, is refused, is absent or breaks."""

import importlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent


@pytest.fixture
def networks(monkeypatch):
    """Return the module of benchmarks/, which is no installed package."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.networks")


def one(networks, build):
    return networks.Network("a network", "torch", build, lambda: torch.randn(8, 6))


def test_a_network_that_works_is_counted_and_proven(networks, tmp_path):
    network = one(networks, lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)))
    row = networks.tried(network, tmp_path)
    assert (row["step"], row["outcome"]) == ("validate", "works")
    assert row["parameters"] == 6 * 9 + 9 + 9 * 4 + 4
    assert 0 < row["kept"] < 1
    assert 0 <= row["largest_error"] < 1e-5


def test_batch_norms_take_the_statistics_of_the_data_and_relief_finds_more_than_biases(networks, tmp_path):
    torch.manual_seed(0)
    model = networks.YoloLike().eval()
    batches = [3 * torch.randn(8, 3, 64, 64) + 2 for _ in range(3)]
    networks.take_statistics(model, batches)
    conv, norm = model.stem[0][0], model.stem[0][1]
    with torch.no_grad():
        outputs = [conv(batch) for batch in batches]
    expected = torch.stack([output.mean((0, 2, 3)) for output in outputs]).mean(0)
    torch.testing.assert_close(norm.running_mean, expected)
    assert norm.momentum == nn.BatchNorm2d(1).momentum
    assert not any(module.training for module in model.modules())
    (yolo,) = [network for network in networks.NETWORKS if network.name == "YOLO-like, raw"]
    row = networks.tried(yolo, tmp_path)
    assert row["outcome"] == "works"
    assert row["kept"] > 0.05


def test_layers_that_start_at_zero_are_drawn_and_no_others(networks, tmp_path):
    def built():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))
        nn.init.zeros_(model[1].weight)
        nn.init.zeros_(model[4].weight)
        return model

    model, before = built(), built()
    networks.draw_zeros(model)
    assert torch.equal(model[0].weight, before[0].weight)
    assert model[1].weight.eq(1).all()
    assert model[4].weight.all()
    row = networks.tried(networks.Network("a network", "torch", built, lambda: torch.randn(8, 3, 8, 8)), tmp_path)
    assert row["outcome"] == "works"


def test_a_network_that_is_refused_says_why_in_one_sentence(networks, tmp_path):
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            raise RuntimeError(f"the valve is shut to {len(x)}")

    row = networks.tried(one(networks, Stubborn), tmp_path)
    assert row["step"] == "relieve"
    assert "the valve is shut" in row["outcome"]
    assert not row["outcome"].startswith("a fault")
    assert "\n" not in row["outcome"]


def test_an_absent_package_is_named_and_a_fault_is_called_one(networks, tmp_path):
    row = networks.tried(one(networks, lambda: importlib.import_module("no_such_zoo")), tmp_path)
    assert row["outcome"] == "not tried: no_such_zoo is not installed"

    def broken():
        raise ValueError("first line\nsecond line")

    assert networks.tried(one(networks, broken), tmp_path)["outcome"] == "a fault, ValueError: first line"


def test_the_rest_is_tried_where_the_time_was_over(networks, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "NETWORKS", networks.NETWORKS[:3])
    monkeypatch.setattr(networks, "RESULTS", tmp_path)
    monkeypatch.setattr(networks, "_import_all", lambda: None)
    monkeypatch.setenv("RELIEF_NETWORKS_MINUTES", "0")
    (rows,) = networks.run()
    assert [row["outcome"] for row in rows] == ["not tried: the time was over"] * 3
    rows[1]["outcome"] = "works"
    (tmp_path / "networks.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setenv("RELIEF_NETWORKS", "rest")
    monkeypatch.setenv("RELIEF_NETWORKS_MINUTES", "1")
    monkeypatch.setattr(networks, "_row", lambda network, _: {"outcome": f"tried {network.name}"})
    tried = [row["outcome"] for row in list(networks.run())[-1]]
    assert tried == [
        f"tried {rows[0]['network']}",
        "works",
        f"tried {rows[2]['network']}",
    ]


def test_who_stops_it_keeps_what_was_tried_and_the_rest_goes_on(networks, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "NETWORKS", networks.NETWORKS[:3])
    monkeypatch.setattr(networks, "RESULTS", tmp_path)
    monkeypatch.setattr(networks, "_import_all", lambda: None)
    names = [network.name for network in networks.NETWORKS]

    def stopped(network, _):
        if network.name == names[1]:
            raise KeyboardInterrupt
        return {"outcome": "works"}

    monkeypatch.setattr(networks, "_row", stopped)
    with pytest.raises(KeyboardInterrupt):
        networks.BENCHMARK.write(tmp_path)
    record = tmp_path / "networks.json"
    assert [row["outcome"] for row in json.loads(record.read_text())["rows"]] == [
        "works",
        "not tried: the time was over",
        "not tried: the time was over",
    ]
    monkeypatch.setenv("RELIEF_NETWORKS", "rest")
    monkeypatch.setattr(networks, "_row", lambda network, _: {"outcome": f"tried {network.name}"})
    assert networks.BENCHMARK.write(tmp_path) == record
    rows = json.loads(record.read_text())["rows"]
    assert [row["outcome"] for row in rows] == ["works", f"tried {names[1]}", f"tried {names[2]}"]
    assert all(row["machine"] for row in rows)


def test_a_network_that_kills_its_process_is_one_row(networks):
    killed = one(networks, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert networks._row(killed, 60.0) == {"outcome": "a fault: the process ended with -9"}


def test_what_a_network_gets_is_processor_time_until_all_time_is_over(networks, monkeypatch):
    def busy():
        while True:
            pass

    monkeypatch.setattr(networks, "LIMIT", 1)
    assert networks._row(one(networks, busy), 60.0) == {"outcome": "not done within 1 s of processor time"}
    waiting = one(networks, lambda: time.sleep(60))
    assert networks._row(waiting, 0.2) == {"outcome": "not tried: the time was over"}


def test_every_network_has_its_own_name(networks):
    names = [network.name for network in networks.NETWORKS]
    assert len(set(names)) == len(names)
