"""The Python interface on a network of the user's own, without recipes."""

import copy
import json
import types
import warnings

import numpy as np
import onnx
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import relief_export as rx
from relief_export.errors import InputError, UnsupportedModelError
from relief_export.relief.masks import read_masks
from relief_export.stages.export_stages import stored_samples


@pytest.fixture(scope="module")
def digits():
    bunch = load_digits()
    return torch.tensor(bunch.images[:, None] / 16, dtype=torch.float32), torch.tensor(bunch.target)


@pytest.fixture
def model(digits):
    """A small trained network with a batch norm, of nobody's zoo."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    network = nn.Sequential(*layers, nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10))
    x, y = digits
    _train(network, x[:1200], y[:1200], steps=40)
    return network


def _train(network, x, y, *, steps, masks=None):
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
        if masks is not None:
            masks.apply_(network)


def test_readme_example_from_a_trained_network_to_a_validated_file(model, digits, tmp_path):
    x, y = digits
    data = {"train": (x[:1200], y[:1200]), "validation": (x[1200:1500], y[1200:1500])}
    found = rx.relieve(model, data, rounds=1, train=rx.TrainConfig(epochs=1), accuracy_drop=1.0)
    assert 0 < found.chosen.kept < found.chosen.dense
    manifest = rx.export(
        model,
        x[:8],
        tmp_path / "artifacts",
        masks=found.masks,
        formats=("packed", "csr"),
        samples=(x[1500:], y[1500:]),
    )
    assert [entry.name for entry in manifest.artifacts] == ["model.onnx", "model.packed.onnx", "csr"]
    with torch.no_grad():
        logits = model.eval()(x[1500:]).numpy()
    assert rx.validate(tmp_path / "artifacts", x[1500:].numpy(), y[1500:].numpy(), logits).ok
    assert rx.validate(tmp_path / "artifacts").ok  # on the stored samples
    assert not rx.validate(tmp_path / "artifacts", x[1500:].numpy(), y[1500:].numpy(), logits + logits.std()).ok


def test_own_training_loop(model, digits):
    x, y = digits
    calls = []

    def retrain(network, masks):
        calls.append(masks.count(network).kept)
        _train(network, x[:1200], y[:1200], steps=3, masks=masks)

    def evaluate(network):
        with torch.no_grad():
            return float((network.eval()(x[1200:1500]).argmax(1) == y[1200:1500]).float().mean())

    batches = list(x[:300].split(100))
    found = rx.relieve(model, batches, rounds=2, retrain=retrain, evaluate=evaluate, accuracy_drop=1.0)
    assert calls == [row.kept for row in found.history[1:]]
    for name, mask in found.masks.items():
        assert (model.state_dict()[name][~mask] == 0).all()


@pytest.mark.parametrize("number", [torch.tensor, np.float32])
def test_an_accuracy_of_any_kind_is_kept_in_the_folder(model, digits, tmp_path, number):
    arguments = {"retrain": lambda *_: None, "evaluate": lambda _: number(0.5), "rounds": 1, "folder": tmp_path}
    found = rx.relieve(model, [digits[0][:10]], **arguments)
    assert [row.accuracy for row in found.history] == [0.5, 0.5]
    assert json.loads((tmp_path / "history.jsonl").read_text().splitlines()[1])["accuracy"] == 0.5


def test_batches_that_are_used_up_are_refused(model, digits):
    with pytest.raises(InputError, match="only once: give a list"):
        rx.relieve(model, iter(digits[0][:20].split(10)), retrain=lambda *_: None, evaluate=lambda _: 0.5)


def test_a_test_accuracy_is_reported_only_of_test_samples(model, digits):
    x, y = digits
    data = {"train": (x[:100], y[:100]), "validation": (x[1200:1500], y[1200:1500])}
    assert [row.test_accuracy for row in rx.relieve(model, data, rounds=0).history] == [None]
    tested = rx.relieve(model, data | {"test": (x[1500:], y[1500:])}, rounds=0).history[0].test_accuracy
    with torch.no_grad():
        assert tested == pytest.approx(float((model.eval()(x[1500:]).argmax(1) == y[1500:]).float().mean()))


def test_shrink_takes_paths_and_protos_and_leaves_them_alone(model, digits, tmp_path):
    with torch.no_grad():
        model[5].weight[:10] = 0
        model[5].bias[:10] = 0
    rx.export(model, digits[0][:4], tmp_path / "out")
    proto = onnx.load(tmp_path / "out/masked.onnx")
    before = proto.SerializeToString()
    first, second = rx.shrink(proto), rx.shrink(str(tmp_path / "out/masked.onnx"))
    assert proto.SerializeToString() == before
    # Ten hidden neurons: 128 weights and a bias into each, 10 weights out of each.
    lost = rx.cost(proto).parameters.structural - rx.cost(first.model).parameters.structural
    assert lost == 10 * (128 + 1 + 10)
    assert rx.cost(second.model) == rx.cost(first.model)
    assert not rx.shrink(first.model).modified


def test_the_samples_of_an_exported_folder_may_be_called_like_its_input(model, digits, tmp_path):
    x, y = digits[0][:20], digits[1][:20]
    rx.export(model, x[:4], tmp_path / "out", formats=("dense",), input_names=["img"])
    np.savez(tmp_path / "own.npz", img=x, y=y)
    found = stored_samples(tmp_path / "out", tmp_path / "own.npz")
    np.testing.assert_array_equal(found.x, x)
    assert rx.validate(tmp_path / "out", found.x, found.y).ok


def test_files_are_converted_compared_and_audited_by_path(model, digits, tmp_path):
    x, y = digits[0][:50], digits[1][:50]
    rx.export(model, x[:4], str(tmp_path / "out"), formats=("dense",))
    written = rx.convert(str(tmp_path / "out"), str(tmp_path / "packed.onnx"), "packed")
    assert written.format == "packed"
    assert rx.compare(str(tmp_path / "out"), tmp_path / "packed.onnx", x, y).ok
    assert not rx.audit(str(tmp_path / "packed.onnx"), flash="1KiB").ok
    assert rx.audit(tmp_path / "out", flash="1MiB", ram="1MiB").ok
    assert rx.audit(tmp_path / "out", baseline=tmp_path / "out", max_growth="2%").growth.limit == 0.02
    with pytest.raises(InputError, match="45 is no size: write a number with B, k, KiB"):
        rx.audit(tmp_path / "out", flash=45)
    with pytest.raises(InputError, match="there is no format 'pack'; did you mean \"packed\""):
        rx.convert(tmp_path / "out", tmp_path / "x.onnx", "pack")
    text = str(rx.cost(tmp_path / "packed.onnx")).splitlines()
    assert text[0] == "cost at batch 1"
    assert text[2].startswith("parameters")


def test_export_never_replaces_a_folder_that_is_not_its_own(model, digits, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="no folder that an export wrote"):
        rx.export(model, digits[0][:4], tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(10, 3), nn.Linear(10, 3)

    def forward(self, u, v):
        return self.a(u) + self.b(v)


X, Y = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
OWN = {"retrain": lambda *_: None, "evaluate": lambda _: 0.9}


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))


def pair(x, **more):
    return {"train": (x, Y), "validation": (x, Y), **more}


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what people have
        return torch.ao.quantization.quantize_dynamic(small(), {nn.Linear})


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(small())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rx.relieve(small(), pair(X[:, :9])), r"Sequential fails on inputs \(2, 9\) float32: mat1 and mat2"),
        (lambda: rx.relieve(small(), pair(X), alpha_linear=0.9), 'alpha_linear is not a key; did you mean "alpha'),
        (lambda: rx.relieve(small(), pair(X), iterations=1), "^iterations is now rounds$"),
        (lambda: rx.relieve(small(), pair(X), train={"epoch": 1}), 'train.epoch is not a key; did you mean "epochs"'),
        (lambda: rx.relieve(small(), pair(X), train=3), "train must be a table, not 3"),
        (lambda: rx.relieve(small(), pair(X, tst=(X, Y))), "data has no split 'tst'; did you mean \"test\""),
        (lambda: rx.relieve(small(), {"train": (X, Y)}), "data lacks 'validation': give"),
        (
            lambda: rx.relieve(small(), {"train": X, "validation": X}),
            r"data\['train'\] must be a pair \(x, y\) of inputs",
        ),
        (
            lambda: rx.relieve(small(), pair(X), task="ranking"),
            "there is no task 'ranking'; known: classification, multi",
        ),
        (
            lambda: rx.relieve(small(), pair(X), task="regression", train={"watch_test": True, "epochs": 1}),
            "watch_test is",
        ),
        (
            lambda: rx.relieve(small(), pair(X), task="regression"),
            r"outputs \(64, 3\) float32 and labels \(64,\) .* do not",
        ),
        (lambda: rx.relieve(small(), {"train": [(X, Y)], "validation": iter([(X, Y)])}), "gone through only once"),
        (lambda: rx.relieve(small(), {"train": [X], "validation": [X]}), "a batch has no labels: give tuples"),
        (
            lambda: rx.relieve(small(), {"train": [(X, Y)]}, **OWN),
            "data is a list of batches or a DataLoader, not a dict",
        ),
        (lambda: rx.relieve(small(), [X]), "or give retrain and evaluate"),
        (lambda: rx.relieve(small(), [X], **OWN | {"evaluate": lambda _: None}), "evaluate returned a NoneType"),
        (lambda: rx.relieve(small().requires_grad_(False), pair(X)), "so there is nothing to retrain: unfreeze it"),
        (lambda: rx.relieve(small().requires_grad_(False), [X], **OWN), "every layer of Sequential is left whole"),
        (lambda: rx.relieve(nn.Sequential(nn.LazyLinear(3)), [X], **OWN), "no shape for '0.weight' yet: run it once"),
        (lambda: rx.relieve(Two(), [(X,)], **OWN), r"Two takes 2 inputs \(u, v\) and a batch holds 1"),
        (lambda: rx.relieve(quantised(), [X], **OWN), "'0' is a quantised Linear: give the floating-point network"),
        (lambda: rx.export(quantised(), X, "never"), "'0' is a quantised Linear"),
        (
            lambda: rx.export(nn.Linear(10, 2, device="meta"), X, "never"),
            "no numbers for 'weight', which is on the meta",
        ),
        (lambda: rx.relieve(scripted(), [X], **OWN), "is scripted or traced: give the module that it was made from"),
        (lambda: rx.export(small(), X, "never", samples="x"), r"samples is a pair \(x, y\) .*, not a str"),
        (lambda: rx.relieve(small(), [X], retrain=lambda *_: None), "belong together"),
        (
            lambda: rx.relieve(nn.LayerNorm(6), [torch.ones(2, 6)], **OWN),
            "LayerNorm has no linear or convolution layer",
        ),
    ],
)
def test_mistakes_are_one_sentence_that_says_what_was_expected(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_what_people_have_is_taken_as_it_is(tmp_path):
    """NumPy's float64, tensors in validate, inputs without labels, paths as strings, a mapping that is no dict."""
    model = small()
    data = types.MappingProxyType({name: (X.double().numpy(), Y.numpy()) for name in ("train", "validation")})
    found = rx.relieve(model, data, rounds=1, train={"epochs": 1}, accuracy_drop=1.0, folder=str(tmp_path / "journal"))
    out = str(tmp_path / "out")
    rx.export(model, X[:2], out, masks=found.masks, samples=X)
    logits = model.eval()(X)
    assert rx.validate(out, X, Y, logits).ok  # a tensor that still needs a gradient
    assert rx.validate(out).samples == len(X)
    path = str(tmp_path / "masks.safetensors")
    found.masks.save(path)
    assert rx.Masks.load(path).same(found.masks)
    assert read_masks(path, model).masks.same(found.masks)


class Forked(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(10, 8), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, u, v):
        hidden = torch.relu(self.a(u) + self.b(v))
        return {"logits": self.c(hidden), "hidden": hidden}


def test_several_inputs_and_outputs_from_relief_to_validation(tmp_path):
    model, v = Forked(), X.flip(0)
    loader = torch.utils.data.DataLoader([{"u": u, "v": w, "labels": y} for u, w, y in zip(X, v, Y, strict=True)], 16)
    data = {"train": loader, "validation": [((X, v), Y)]}
    dense = model.state_dict()["a.weight"].clone()
    found = rx.prune(model, data, rounds=1, output="logits", train={"epochs": 2, "lr": 0.01}, accuracy_drop=1.0)
    assert found.chosen.kept < found.chosen.dense
    manifest = rx.export(
        model, (X[:4], v[:4]), tmp_path / "out", masks=found.masks, samples=((X, v), Y), formats=("packed", "int8")
    )
    # The network that relief was given is the original, without a copy by the caller.
    original = onnx.load(tmp_path / "out/original.onnx")
    (stored,) = (onnx.numpy_helper.to_array(t) for t in original.graph.initializer if t.name == "a.weight")
    assert np.array_equal(stored, dense.numpy())
    assert manifest.extra["cost"]["original"]["parameters"]["nonzero"] == found.chosen.dense
    outputs = model.eval()(X, v)
    found = rx.validate(tmp_path / "out", (X, v), Y, outputs)
    exact = [check for check in found.checks if "int8" not in check.file]
    assert all(check.ok for check in exact)
    assert {check.file for check in exact} >= {"model.packed.onnx", "model.packed.onnx, output 'hidden'"}
    outputs["hidden"] = outputs["hidden"] * 1.01
    wrong = rx.validate(tmp_path / "out", {"u": X, "v": v}, Y, outputs)
    assert {c.code for c in wrong.checks if not c.ok and "hidden" in c.file} == {"relative_error"}
    stored = np.load(tmp_path / "out/reference.npz")
    assert set(stored.files) == {"x.u", "x.v", "y", "logits.logits", "logits.hidden"}
    # A network that was trained since is its own original.
    with torch.no_grad():
        model.a.bias.add_(1)
    again = rx.export(model, (X[:4], v[:4]), tmp_path / "again", output=lambda o: o["logits"], output_names=("scores",))
    assert (
        again.extra["cost"]["original"]["parameters"]["nonzero"]
        < manifest.extra["cost"]["original"]["parameters"]["nonzero"]
    )
    assert rx.validate(tmp_path / "again", (X, v)).ok


def f1(outputs, labels):
    chosen, wanted = outputs > 0, labels == 1
    both = (chosen & wanted).sum()
    precision, recall = both / chosen.sum(), both / wanted.sum()
    return 2 * precision * recall / (precision + recall)


def iou(outputs, labels):
    chosen, known = outputs.argmax(1), labels != 255
    shares = []
    for one in range(4):
        mine, theirs = (chosen == one) & known, labels == one
        if (mine | theirs).any():
            shares.append((mine & theirs).sum() / (mine | theirs).sum())
    return torch.stack(shares).mean()


@pytest.mark.parametrize(
    ("task", "labels", "metric"),
    [
        (
            "regression",
            (X.sum(1, keepdim=True) / 3).double(),
            lambda o, y: 1 - ((o - y) ** 2).sum() / ((y - y.mean()) ** 2).sum(),
        ),
        ("multilabel", (X[:, :2] > 0).long(), f1),
        ("segmentation", ((X.cumsum(1) > 0).long() + (X > 1).long()).view(64, 10, 1), iou),
    ],
)
def test_other_tasks_are_retrained_and_measured(task, labels, metric):
    torch.manual_seed(0)
    maps = task == "segmentation"
    x = X.view(64, 1, 10, 1) if maps else X
    model = (
        nn.Sequential(nn.Conv2d(1, 4, (3, 1), padding=(1, 0)), nn.ReLU(), nn.Conv2d(4, 4, 1))
        if maps
        else nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, labels.shape[1]))
    )
    if maps:
        labels = labels.clone()
        labels[:3] = 255  # not labelled
    data = {"train": (x, labels), "validation": (x, labels)}
    found = rx.relieve(
        model, data, task=task, rounds=1, train={"epochs": 8, "lr": 0.02, "batch": 16}, accuracy_drop=1.0
    )
    assert found.history[1].accuracy > found.history[1].accuracy_before
    with torch.no_grad():
        assert found.chosen.accuracy == pytest.approx(float(metric(model.eval()(x), labels)), rel=1e-4)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_network_is_relieved_and_exported_under_its_own_names(wrap, tmp_path):
    plain, inner = small(), small()
    wrapped = wrap(inner)
    expected = rx.relieve(plain, [X], **OWN, rounds=1)
    found = rx.relieve(wrapped, [X], **OWN, rounds=1)
    assert found.masks.same(expected.masks)
    assert set(found.chosen.layers) == {"0", "2"}
    assert all(torch.equal(a, b) for a, b in zip(inner.parameters(), plain.parameters(), strict=True))
    rx.export(wrapped, X[:2], tmp_path / "out", masks=found.masks)
    assert {each.name for each in onnx.load(tmp_path / "out/original.onnx").graph.initializer} == set(
        plain.state_dict()
    )
    with torch.no_grad():
        assert rx.validate(tmp_path / "out", X, Y, plain.eval()(X)).ok


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float16, 1e-4), (torch.bfloat16, 1e-4), (torch.float32, 1e-2)])
def test_half_precision_is_proven_in_float32_and_halves_state_what_they_lose(kind, tolerance, tmp_path):
    model = small().to(kind)
    found = rx.relieve(model, [X.to(kind)], **OWN, rounds=1)
    assert found.chosen.kept < found.chosen.dense
    manifest = rx.export(
        model, X[:2].to(kind), tmp_path / "out", masks=found.masks, formats=("packed", "packed-f16"), samples=(X, Y)
    )
    assert model[0].weight.dtype == kind
    with torch.no_grad():
        logits = copy.deepcopy(model).float()(X)
    proven = rx.validate(tmp_path / "out", X, Y, logits)
    assert proven.ok
    # Weights that are halves already lose nothing as halves: the file is held to what exact ones are held to.
    assert manifest["model.packed-f16.onnx"].tolerance.relative_error == tolerance
    assert manifest["model.packed.onnx"].tolerance.relative_error == 1e-4
    errors = {each.file: each.agreement.relative_error for each in proven.measurements}
    assert errors["model.packed.onnx"] < 1e-6
    assert (errors["model.packed-f16.onnx"] < 1e-6) == (kind != torch.float32)


def test_a_loss_and_a_metric_of_ones_own():
    model = small()
    batches = [{"row": X[i : i + 16], "y": Y[i : i + 16]} for i in range(0, 64, 16)]
    found = rx.relieve(
        model,
        {"train": batches, "validation": batches},
        rounds=1,
        train=rx.TrainConfig(epochs=1),
        accuracy_drop=1.0,
        forward=lambda network, batch: network(batch["row"]),
        loss=nn.functional.multi_margin_loss,
        metric=lambda outputs, labels: -nn.functional.cross_entropy(outputs, labels),
    )
    with torch.no_grad():
        expected = -nn.functional.cross_entropy(model.eval()(X), Y)
    assert found.chosen.accuracy == pytest.approx(float(expected), rel=1e-5)


def test_normalised_weights_are_folded_and_progress_draws_bars(capfd):
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(10, 16)), nn.ReLU(), nn.Linear(16, 3))
    found = rx.relieve(model, [(X, Y)], **OWN, rounds=1, progress=True)
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert found.chosen.layers["0"]["kept"] < found.chosen.layers["0"]["dense"]
    out, err = capfd.readouterr()
    assert out == ""
    assert "relief" in err


def test_the_reference_is_computed_in_batches(tmp_path):
    sizes = []

    class Counted(nn.Linear):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    x = torch.randn(1000, 10)
    rx.export(Counted(10, 3), x[:2], tmp_path / "out", samples=x)
    assert max(size for size in sizes if isinstance(size, int)) <= 256
    assert rx.validate(tmp_path / "out").samples == 1000


@pytest.mark.parametrize(
    "labels",
    [torch.zeros(4, 8, 8), torch.eye(4), torch.full((4,), 0.5), torch.full((4,), -1), torch.zeros(0)],
    ids=["maps", "one-hot", "fractions", "negative", "none"],
)
def test_labels_that_are_no_classes_are_refused(model, labels):
    data = {"train": (torch.zeros(len(labels), 1, 8, 8), labels), "validation": (torch.zeros(4, 1, 8, 8), labels)}
    with pytest.raises(InputError, match="labels of 'train' must be classes"):
        rx.relieve(model, data)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere"):
        rx.validate(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"nothing\.onnx"):
        rx.cost(tmp_path / "nothing.onnx")


def test_public_names_exist_and_others_do_not():
    for name in rx.__all__:
        assert getattr(rx, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = rx.nonsense
    assert dir(rx) == sorted(rx.__all__)


def test_an_unknown_format_is_refused_before_anything_is_written(model, digits, tmp_path):
    with pytest.raises(InputError, match="no format 'zip': choose from dense"):
        rx.export(model, digits[0][:4], tmp_path / "out", formats=("zip",))
    assert not (tmp_path / "out").exists()


def test_a_network_of_tokens_is_exported_and_validated(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), nn.Linear(24, 3))
    tokens = torch.randint(0, 11, (50, 4))
    rx.export(network, tokens[:2], tmp_path / "out", samples=(tokens, torch.zeros(50, dtype=torch.int64)))
    logits = network(tokens).detach().numpy()
    for x in (tokens.numpy(), tokens.numpy().astype(np.int32)):
        assert rx.validate(tmp_path / "out", x, None, logits).ok
    assert rx.validate(tmp_path / "out").ok
    with pytest.raises(InputError, match=r"tensor\(int64\) and the samples are float32"):
        rx.validate(tmp_path / "out", tokens.float().numpy())


def test_what_cannot_be_shipped_is_refused_before_anything_is_written(model, digits, tmp_path):
    with pytest.raises(InputError, match="calibration is for int8 and packed-int8"):
        rx.export(model, digits[0][:4], tmp_path / "out", calibration=digits[0][:4])
    with pytest.raises(UnsupportedModelError, match="are all connections masked"):
        rx.export(model, digits[0][:4], tmp_path / "out", masks={"7.weight": torch.zeros(10, 32)})
    assert not (tmp_path / "out").exists()


def test_the_baseline_is_the_network_before_relief(model, digits, tmp_path):
    relieved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in relieved.parameters():
            parameter.mul_(torch.rand_like(parameter) < 0.5)
    manifest = rx.export(relieved, digits[0][:4], tmp_path / "out", original=model)
    original, masked = (manifest.extra["cost"][name]["parameters"] for name in ("original", "masked"))
    assert original["nonzero"] == original["structural"] == masked["structural"]
    assert 0.4 < masked["nonzero"] / original["nonzero"] < 0.7


def test_a_network_that_gives_maps_is_exported_and_proven(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 3, 2, stride=2))
    with torch.no_grad():
        network[0].weight[::2] = 0
        network[0].bias[::2] = 0
    x = torch.randn(16, 1, 8, 8)
    manifest = rx.export(network, x, tmp_path / "artifacts", formats=("dense", "packed", "csr"))
    assert manifest.extra["cost"]["shrunk"]["parameters"]["structural"] < 0.6 * sum(
        map(torch.numel, network.parameters())
    )
    found = rx.validate(tmp_path / "artifacts")  # against PyTorch's own outputs, (16, 3, 16, 16)
    assert found.ok
    assert {m.agreement.same_predictions for m in found.measurements} == {None}
    moved = np.asarray(network(x).detach()) * 1.001
    assert not rx.validate(tmp_path / "artifacts", x.numpy(), logits=moved).ok
    with pytest.raises(
        InputError, match=r"Sequential fails on inputs \(\(16, 1, 8, 8\) float32, .*positional arguments"
    ):
        rx.export(network, (x, x), tmp_path / "other")


def test_a_key_of_the_retraining_is_sent_where_it_belongs():
    with pytest.raises(InputError, match=r"epochs is a key of the retraining: give train=\{'epochs': 3\}"):
        rx.relieve(small(), {"train": (X, Y), "validation": (X, Y)}, epochs=3)
