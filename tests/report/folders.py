"""A build folder as the stages leave it: what needs no torch comes from the code that makes it in earnest."""

from __future__ import annotations

import json
import struct

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from relief_export import evaluation, formats
from relief_export.graph.arena import plan_arena
from relief_export.graph.cost import cost
from relief_export.records import Record, sha256, write_bytes

READ = {
    "train": (),
    "relieve": (),
    "quantise": (),
    "export": ("relieved/masks.safetensors",),
    "validate": ("artifacts/manifest.json", "artifacts/model.onnx"),
    "audit": ("artifacts/manifest.json",),
}
"""Stage -> files it read, of those that are there."""
HIDDEN, ALIVE, SIDE = 12, 5, 6


def network(fc1, b1, fc2, b2):
    """Build x (N, 1, SIDE, SIDE) -> Flatten -> Gemm -> Relu -> Gemm."""
    weights = {"fc1.weight": fc1, "fc1.bias": b1, "fc2.weight": fc2, "fc2.bias": b2}
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "fc1.weight", "fc1.bias"], ["h"], name="fc1", transB=1),
        helper.make_node("Relu", ["h"], ["a"], name="relu"),
        helper.make_node("Gemm", ["a", "fc2.weight", "fc2.bias"], ["y"], name="fc2", transB=1),
    ]
    made = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return ir.serde.deserialize_model(model)


def write_masks(path, masks):
    header, data = {}, b""
    for name, mask in masks.items():
        raw = mask.astype(np.uint8).tobytes()
        header[name] = {"dtype": "BOOL", "shape": list(mask.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    write_bytes(path, struct.pack("<Q", len(text)) + text + data)


def pruning_round(number, kept, accuracy, dense, *, before=None):
    layers = {"fc1": {"dense": 444, "kept": kept - 60, "neurons": HIDDEN, "alive": ALIVE}}
    layers["fc2"] = {"dense": 130, "kept": 60, "neurons": 10, "alive": 10}
    return {
        "round": number,
        "accuracy_before": before,
        "accuracy": accuracy,
        "test_accuracy": accuracy - 0.002,
        "peak_test_accuracy": accuracy + 0.003,
        "dense": dense,
        "kept": kept,
        "eligible": accuracy >= 0.94,
        "layers": layers,
        "seconds": {"scoring": 0.25, "disconnection": 0.01, "retraining": 3.5, "all": 3.8},
    }


def removed(layer, outputs, inputs):
    row = {"layer": layer, "op": "Gemm"}
    sides = {"outputs": outputs, "inputs": inputs, "weights": [a * b for a, b in zip(outputs, inputs, strict=True)]}
    return row | {f"{side}_{when}": sides[side][i] for side in sides for i, when in enumerate(("before", "after"))}


def write_run_on(folder, target, program, **run):
    """Leave the record of an emulated run of ``program``, an artifact of a build folder; ``run`` over its figures."""
    sizes = {"flash_bytes": 7001, "ram_bytes": 1310, "data_bytes": 30, "bss_bytes": 4, "arena_bytes": 816}
    sizes |= {"input_bytes": 144, "output_bytes": 40, "stack_bytes": 276, "stack_doubts": [], "command": "cc -Os"}
    counted = {"ok": True, "target": target, "samples": 20, "unit": "instructions", "mean_count": 54321.4}
    agreement = {"relative_error": 2.5e-7, "same_predictions": 1.0, "accuracy": None}
    counted |= {"nominal_seconds": 0.000434, "agreement": agreement} | run
    outcome = {"program": program, "format": "csr", "title": f"Board {target}", "compiler_version": "12.2.1"}
    files = sorted((folder / "artifacts" / program).iterdir())
    read = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    path = folder / "device" / target / f"{program}.json"
    Record("run-on", {}, read, 1.5, outcome | {"sizes": sizes, "run": counted}).write(path)
    return path


def make_networks(rng, moved):
    """Return the graphs of a network as it was, masked, and shrunk, and its masks; see ``make_folder``."""
    fc1, b1 = rng.normal(size=(HIDDEN, SIDE * SIDE)), rng.normal(size=HIDDEN)
    fc2, b2 = rng.normal(size=(10, HIDDEN)), rng.normal(size=10)
    keep1 = (rng.random(fc1.shape) < 0.3) & (np.arange(SIDE * SIDE) >= SIDE)  # the first row of pixels is unused
    keep1[ALIVE:] = False
    keep2 = (rng.random(fc2.shape) < 0.8) & (np.arange(HIDDEN) < ALIVE)
    masked = (fc1 * keep1, b1 * (np.arange(HIDDEN) < ALIVE), fc2 * keep2, b2)
    shrunk = (masked[0][:ALIVE] + moved, masked[1][:ALIVE], masked[2][:, :ALIVE], b2)
    graphs = {"original": network(fc1, b1, fc2, b2), "masked": network(*masked), "shrunk": network(*shrunk)}
    return graphs, {"fc2.weight": keep2, "fc1.weight": keep1}


def write_artifacts(artifacts, graphs, written_as, rng):
    """Write the baselines, the files of each format and the samples; return what records say of the first two."""
    artifacts.mkdir(parents=True)
    baselines = {}
    for key in ("original", "masked"):
        made = formats.FORMATS["dense"].write(graphs[key], artifacts / f"{key}.onnx", formats.Options())
        sizes = {"file_bytes": made.bytes, "gzip_bytes": made.bytes // 2}
        baselines[key] = {"path": f"{key}.onnx", **sizes, "sha256": "0" * 64}
    chosen = [formats.FORMATS[key] for key in written_as]
    written = [form.write(graphs["shrunk"], artifacts / form.suffix, formats.Options()) for form in chosen]
    formats.write_manifest(artifacts, written)
    x = rng.random((64, 1, SIDE, SIDE)).astype(np.float32)
    logits = evaluation.open_session(artifacts / "masked.onnx", optimised=False).run(x)[0]
    y = np.where(np.arange(64) < 60, logits.argmax(axis=1), (logits.argmax(axis=1) + 1) % 10)
    np.savez(artifacts / "reference.npz", x=x, y=y, logits=logits)
    return baselines, written


def export_outcome(artifacts, graphs, baselines, written):
    """Return what the stage export leaves in its record."""
    original = cost(graphs["original"])
    costs = {key: cost(graphs[key], baseline=original) for key in ("masked", "shrunk")}
    files = ("original.onnx", "masked.onnx", *(artifact.name for artifact in written))
    breakdowns = {path: formats.size_breakdown(artifacts / path) for path in files}
    return {
        "cost": {key: found.to_dict() for key, found in {"original": original, **costs}.items()},
        "arena": {key: plan_arena(graphs[key]).to_dict() for key in ("original", "shrunk")},
        "arena_unknown": None,
        "shrink": {
            "removed": [removed("fc1", (HIDDEN, ALIVE), (36, 36)), removed("fc2", (10, 10), (HIDDEN, ALIVE))],
            "stayed": [{"layer": "fc1", "side": "input", "count": SIDE, "reason": "graph input"}],
        },
        "ledger": formats.ledger(graphs["shrunk"]).to_dict(),
        "baselines": baselines,
        "size_breakdowns": {path: parts.to_dict() for path, parts in breakdowns.items() if parts is not None},
        "artifacts": [artifact.to_dict() for artifact in written],
    }


def validation_outcome(artifacts):
    """Return what the stage validate leaves in its record; it measures times only where the files are right."""
    with np.load(artifacts / "reference.npz") as data:
        x, y, logits = data["x"], data["y"], data["logits"]
    found = evaluation.validate(artifacts, x, y, logits)
    models = {name: artifacts / f"{name}.onnx" for name in ("original", "masked")}
    models["model.onnx"] = artifacts / "model.onnx"
    latency = evaluation.measure_latency(models, x, repeats=3) if found.ok else []
    rest = {"source": "test set", "provisional": False, "latency": [row.to_dict() for row in latency]}
    return found.to_dict() | rest


def make_folder(
    folder, name="tiny", *, description="A tiny network <on> digits & such.", moved=0.0, written_as=("dense", "csr")
):
    """Write a whole build folder; ``moved`` shifts one weight of model.onnx, so that validation fails."""
    rng = np.random.default_rng(7)
    graphs, masks = make_networks(rng, moved)
    artifacts = folder / "artifacts"
    baselines, written = write_artifacts(artifacts, graphs, written_as, rng)
    write_masks(folder / "relieved" / "masks.safetensors", masks)
    dense = sum(mask.size for mask in masks.values()) + 22
    kept = int(sum(mask.sum() for mask in masks.values())) + ALIVE + 10
    history = [pruning_round(0, dense, 0.95, dense), pruning_round(1, 300, 0.956, dense, before=0.8)]
    history += [pruning_round(2, kept, 0.945, dense, before=0.7), pruning_round(3, kept - 40, 0.6, dense, before=0.2)]
    outcomes = {
        ("train", "dense/record.json"): {
            "validation": 0.95,
            "test": 0.94,
            "fit": {"peak_test_accuracy": 0.951},
            "parameters": dense,
            "input_shape": [1, SIDE, SIDE],
            "classes": 10,
            "samples": {"train": 500, "validation": 100, "test": 64},
        },
        ("relieve", "relieved/record.json"): {
            "relief": {"chosen": 2, "accuracy_drop": 0.01, "history": history},
            "validation": 0.945,
            "test": 0.9375,
            "connections": {"dense": dense, "kept": kept},
        },
        ("quantise", "quantised/record.json"): {"values": None},
        ("export", "artifacts/record.json"): export_outcome(artifacts, graphs, baselines, written),
        ("validate", "validation.json"): validation_outcome(artifacts),
        ("audit", "audit.json"): evaluation.audit(folder, evaluation.Budget.of(flash="1k", ram="64k")).to_dict(),
    }
    recipe = {"name": name, "description": description, "reproduces": "", "seed": 3}
    recipe["train"] = {"epochs": 2, "lr": 0.001}
    for (stage, path), outcome in outcomes.items():
        read = {name: sha256(folder / name) for name in READ[stage]}
        Record(stage, recipe, read, 1.5, outcome).write(folder / path)
    return folder
