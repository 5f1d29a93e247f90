import copy
import logging
import warnings
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import relief_export as rx
from relief_export.capture import OPSET, capture
from relief_export.errors import InputError, MissingExtraError
from relief_export.graph.prepare import fold
from relief_export.graph.shrink import shrink
from relief_export.recipe import ModelConfig
from relief_export.relief.activity import measure_activity
from relief_export.relief.masks import Masks
from relief_export.training.models import build_model

TOLERANCE = 1e-5


class Net(nn.Module):
    """A masked join's buffers, dropout, batch norm and a shared weight."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.register_buffer("gate", torch.ones(3))
        self.drop = nn.Dropout(0.5)
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))) * self.gate[:, None, None]
        return self.b(self.a(self.drop(x.mean((2, 3)))))


def net():
    torch.manual_seed(0)
    model = Net()
    model.norm.running_mean.normal_()
    return model


def run(model, *inputs):
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})


def expected(model, *inputs):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(*inputs)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_names_are_the_state_dicts_and_the_batch_is_dynamic(batch):
    model = net()
    graph = capture(model, torch.randn(batch, 2, 4, 4)).graph
    names = set(graph.initializers)
    assert names | {"a.weight"} == set(model.state_dict()) - {"norm.num_batches_tracked"}
    assert graph.inputs[0].shape == ir.Shape(["batch", 2, 4, 4])
    assert [value.name for value in graph.outputs] == ["output"]
    x = torch.randn(7, 2, 4, 4)
    found = run(capture(model, x[:batch]), x)[0]
    np.testing.assert_allclose(found, expected(model, x).numpy(), rtol=TOLERANCE, atol=TOLERANCE)


def test_the_module_is_not_changed_and_the_graph_does_not_follow_it():
    model = net().train()
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(3, 2, 4, 4)
    masks = {"conv.weight": torch.zeros(3, 2, 3, 3, dtype=torch.bool), "gate": torch.tensor([True, False, True])}
    graph = capture(model, x, masks=masks)
    assert [m.training for m in model.modules()] == [True, True, False, True, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.a.weight is model.b.weight
    assert not graph.graph.initializers["conv.weight"].const_value.numpy().any()
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.conv.weight.zero_()
        masked.gate[1] = 0
        model.conv.bias.fill_(9)
    np.testing.assert_allclose(run(graph, x)[0], expected(masked, x).numpy(), rtol=TOLERANCE, atol=TOLERANCE)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_reparametrised_weights_become_plain_ones():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[0], "bias", 1)
    parametrize.register_parametrization(model[2], "weight", Double())
    x = torch.randn(3, 4)
    model(x).sum().backward()  # its weight is now the result of an operation
    graph = capture(model, x)
    assert set(graph.graph.initializers) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert (graph.graph.initializers["0.weight"].const_value.numpy() == 0).sum() == 8
    assert prune.is_pruned(model)
    assert parametrize.is_parametrized(model[2])
    np.testing.assert_allclose(run(graph, x)[0], model(x).detach().numpy(), rtol=TOLERANCE, atol=TOLERANCE)


def test_the_same_network_gives_the_same_bytes_without_traces_of_the_machine():
    data = [ir.to_proto(capture(net(), torch.randn(n, 2, 4, 4))).SerializeToString() for n in (1, 3)]
    assert data[0] == data[1]
    for trace in (__file__.encode(), b"test_capture", b"/site-packages", b"File ", b"pkg.torch", b"forward"):
        assert trace not in data[0]


class Two(nn.Module):
    def forward(self, x, i):
        return x + i.float(), i


def test_several_inputs_and_outputs():
    model = capture(Two(), (torch.randn(1, 3), torch.ones(1, 3, dtype=torch.int64)))
    assert [v.name for v in model.graph.inputs] == ["x", "i"]
    assert [v.name for v in model.graph.outputs] == ["output_0", "i"]  # handed through: its own name
    found = run(model, torch.zeros(4, 3), torch.ones(4, 3, dtype=torch.int64))
    assert found[0].tolist() == [[1.0] * 3] * 4


class Named(nn.Module):
    """Takes keywords, and gives a mapping with what was not asked for and more than tensors in it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, left, right=None, *, scale=1.0):
        joined = left if right is None else left + right
        scores = scale * self.layer(joined)
        return {"logits": scores, "hidden": (joined, [scores + 1]), "loss": None}


def test_inputs_and_outputs_of_every_form_and_names_of_ones_own():
    net, x = Named(), torch.randn(4, 3)
    whole = capture(net, {"right": x[:1], "left": x[:1], "scale": 2.0})
    assert [v.name for v in whole.graph.inputs] == ["right", "left"]
    assert [v.name for v in whole.graph.outputs] == ["logits", "hidden_0", "hidden_1_0"]
    expected = net(x, x, scale=2.0)["logits"].detach().numpy()
    np.testing.assert_allclose(run(whole, x, x)[0], expected, rtol=TOLERANCE, atol=TOLERANCE)
    one = capture(net, (x, x), output="logits", input_names=("a", "b"), output_names=("scores",))
    assert ([v.name for v in one.graph.inputs], [v.name for v in one.graph.outputs]) == (["a", "b"], ["scores"])
    assert set(one.graph.initializers) == {"layer.weight", "layer.bias"}
    own = capture(
        net,
        {"pixels": [x, x]},
        forward=lambda network, batch: network(*batch["pixels"]),
        output=lambda found: (found["logits"].softmax(1), found["hidden"][1]),
    )
    assert [v.name for v in own.graph.inputs] == ["pixels_0", "pixels_1"]
    assert [v.name for v in own.graph.outputs] == ["output_0", "output_1_0"]
    np.testing.assert_allclose(run(own, x, x)[0].sum(1), np.ones(4), rtol=TOLERANCE)
    handed = capture(Two(), (x, x.long()), output=1, output_names=("same",))
    assert [v.name for v in handed.graph.outputs] == ["same"]
    assert run(handed, x, x.long())[0].tolist() == x.long().tolist()


@dataclass
class Found:
    """What detectors and the networks of Hugging Face give: a dataclass, in which some fields are empty."""

    logits: torch.Tensor
    levels: list
    loss: torch.Tensor | None = None


class Detector(nn.Module):
    def forward(self, x):
        return Found(2 * x, [x + 1, {"far": x + 2}])


def test_the_outputs_of_a_dataclass_have_the_names_of_its_fields():
    x = torch.randn(4, 3)
    whole = capture(Detector(), x[:2])
    assert [v.name for v in whole.graph.outputs] == ["logits", "levels_0", "levels_1_far"]
    for found, expected in zip(run(whole, x), (2 * x, x + 1, x + 2), strict=True):
        np.testing.assert_allclose(found, expected.numpy(), rtol=TOLERANCE)
    one = capture(Detector(), x[:2], output="logits")
    assert [v.name for v in one.graph.outputs] == ["logits"]


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        ((torch.ones(2, 3),), {"output": "logit"}, "Named gives no 'logit'; did you mean \"logits\""),
        ((torch.ones(2, 3),), {"output": 3}, "Named gives a dict, which has no output 3"),
        ((torch.ones(2, 3),), {"output": lambda found: found["logits"].sum()}, "a single number as 'output'"),
        (
            (torch.ones(2, 3),),
            {"output": lambda _: "text"},
            "gives more than tensors .*a str.*: choose one of logits",
        ),
        ((torch.ones(2, 3),), {"output": lambda _: None}, "Named gives no tensor"),
        ((torch.ones(2, 3),), {"output_names": ("a",)}, "output_names must name each of the 3 outputs once"),
        ((torch.ones(2, 3), torch.ones(4, 3)), {}, "Named fails on inputs|hold 2, 4 samples"),
        ("text", {}, "example input 0 must be a tensor with a batch axis, not a str"),
    ],
)
def test_outputs_and_names_that_are_not_there_are_refused(example, options, message):
    with pytest.raises(InputError, match=message) as caught:
        capture(Named(), example, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_captured_as_float32(kind):
    model, x = nn.Linear(3, 2).to(kind), torch.randn(4, 3)
    graph = capture(model, x[:2].to(kind))
    assert graph.graph.inputs[0].dtype == ir.DataType.FLOAT
    np.testing.assert_allclose(run(graph, x)[0], model.float()(x).detach().numpy(), rtol=TOLERANCE, atol=TOLERANCE)


def test_a_convolution_of_volumes_without_a_bias_has_none():
    layers = (nn.Conv3d(1, 8, 3, bias=False), nn.ReLU(), nn.ConvTranspose3d(8, 2, 2, bias=False))
    model, x = nn.Sequential(*layers), torch.randn(2, 1, 5, 5, 5)
    graph = capture(model, x)
    assert [len([i for i in n.inputs if i]) for n in graph.graph if n.op_type.startswith("Conv")] == [2, 2]
    found = run(shrink(fold(graph)).model, x)[0]
    np.testing.assert_allclose(found, expected(model, x).numpy(), rtol=1e-4, atol=TOLERANCE)


def test_weights_that_are_normalised_are_folded():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older ones are deprecated and still in use
        old = nn.utils.weight_norm(nn.Linear(4, 4)), nn.utils.spectral_norm(nn.Linear(4, 4))
    new = parametrizations.weight_norm(nn.Linear(4, 4)), parametrizations.orthogonal(nn.Linear(4, 4))
    model, x = nn.Sequential(*old, *new).eval(), torch.randn(3, 4)
    graph = capture(model, x)
    assert set(graph.graph.initializers) == {f"{i}.{name}" for i in range(4) for name in ("weight", "bias")}
    np.testing.assert_allclose(run(graph, x)[0], model(x).detach().numpy(), rtol=1e-4, atol=TOLERANCE)


class Wrapper(nn.Module):
    """Takes whatever it is given, as nn.DataParallel and torch.compile do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *inputs, **options):
        return self.inner(*inputs, **options)


def test_a_wrapper_that_takes_any_arguments():
    x, i = torch.randn(4, 3), torch.ones(4, 3, dtype=torch.int64)
    found = run(capture(Wrapper(Two()), (x[:2], i[:2])), x, i)
    np.testing.assert_allclose(found[0], (x + 1).numpy(), rtol=TOLERANCE)
    inner = nn.Linear(3, 2)
    for wrapped in (nn.DataParallel(inner), torch.compile(inner, backend="eager")):
        np.testing.assert_allclose(run(capture(wrapped, x[:1]), x)[0], inner(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_nothing_is_printed_warned_or_logged(capfd, caplog):
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")
        capture(net(), torch.randn(1, 2, 4, 4))
        with pytest.raises(InputError):
            capture(Branch(), torch.randn(2, 3))
    assert capfd.readouterr() == ("", "")
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Item(nn.Module):
    def forward(self, x):
        return x * x.sum().item() if x.max().item() > 2 else x


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(2, 3).sum(0)


def test_an_example_without_a_batch_axis_is_said_to_have_none(tmp_path):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 4)).eval()
    x = torch.randn(5, 2, 8, 8)
    hint = r"it takes them with a batch axis in front: give a batch, as x\[:1\] is one"
    with pytest.raises(InputError, match=rf"fails on inputs \(2, 8, 8\) float32: .*; {hint}"):
        rx.export(net, x[0], tmp_path / "out")
    # The samples of the reference likewise, and what calibrates.
    with pytest.raises(InputError, match=hint):
        rx.export(net, x[:1], tmp_path / "out", samples=x[0])
    with pytest.raises(InputError, match=hint):
        measure_activity(net, [x[0]], samples=8)
    # Of another mistake nothing is said of a batch.
    with pytest.raises(InputError, match="fails on inputs") as caught:
        rx.export(net, x[:, :1], tmp_path / "out")
    assert "batch" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "example", "message"),
    [
        (Branch(), torch.randn(2, 3), "Branch cannot be exported to ONNX: Could not guard on data-dependent"),
        (Item(), torch.randn(2, 3), "Item cannot be exported to ONNX: Could not guard on data-dependent expression"),
        (Fixed(), torch.randn(2, 3), r"Fixed (cannot be exported to ONNX|fixes the batch axis)"),
        (nn.Linear(3, 1), torch.randn(2, 4), r"Linear fails on inputs \(2, 4\) float32: mat1 and mat2"),
        (nn.Linear(3, 1), torch.randn(0, 3), "example input 0 must be a tensor with a batch axis"),
        (nn.Linear(3, 1), [[1.0, 2.0]], "example input 0 must be a tensor"),
    ],
)
def test_what_cannot_be_captured_is_refused_in_one_sentence(module, example, message):
    with pytest.raises(InputError, match=message) as caught:
        capture(module, example)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"conv": torch.ones(1)}, "name 'conv', which the network does not have"),
        ({"conv.bias": torch.ones(4)}, r"mask of 'conv.bias' has shape \(4,\), the network's tensor \(3,\)"),
    ],
)
def test_masks_that_fit_nothing_are_refused(masks, message):
    with pytest.raises(InputError, match=message):
        capture(net(), torch.randn(1, 2, 4, 4), masks=masks)


def test_a_network_that_keeps_its_activations_is_refused():
    model = net()
    model.kept = [model(torch.randn(2, 2, 4, 4))]
    with pytest.raises(InputError, match=r"Net cannot be copied \(activations that it keeps in a list"):
        capture(model, torch.randn(1, 2, 4, 4))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_traced_network_is_refused():
    traced, x = torch.jit.trace(nn.Linear(3, 1), torch.randn(2, 3)), torch.randn(2, 3)
    with pytest.raises(InputError, match="is scripted or traced: give the module"):
        capture(traced, x)


def test_a_missing_exporter_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(MissingExtraError, match="onnxscript, which is not installed"):
        capture(net(), torch.randn(1, 2, 4, 4))


def test_a_network_with_masked_joins():
    model, x = build_model(ModelConfig("resnet20"), (3, 32, 32), 10, 0), torch.randn(2, 3, 32, 32)
    masks = {"layer2.0.join.shortcut_mask": torch.arange(32) % 2 == 0}
    graph = capture(model, x, masks=masks)
    assert graph.opset_imports == {"": OPSET}
    assert graph.graph.initializers["layer2.0.join.shortcut_mask"].const_value.numpy().tolist() == [1.0, 0.0] * 16
    plain = run(graph, x)[0]
    model.layer2[0].join.shortcut_mask.copy_(masks["layer2.0.join.shortcut_mask"])
    np.testing.assert_allclose(plain, expected(model, x).numpy(), rtol=1e-4, atol=TOLERANCE)


class Block(nn.Module):
    """A transformer's block: attention in its fused form, and a feed-forward part."""

    def __init__(self, heads=3, width=12):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 20), nn.Linear(20, width)

    def forward(self, x):
        batch, time, width = x.shape
        parts = self.qkv(self.norm(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*parts.unbind(0))
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(nn.functional.gelu(self.up(x)))


@pytest.mark.parametrize("how", ["masks", "zeros"])
def test_dead_heads_and_hidden_units_of_a_transformer_go(how):
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 5, 12)
    kept = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters() if "norm" not in name}
    kept["qkv.weight"][28:32] = kept["qkv.bias"][28:32] = False  # the values of head 1
    kept["up.weight"][:7] = kept["up.bias"][:7] = False
    masks = Masks(kept)
    if how == "zeros":
        masks.apply_(model)
    result = shrink(capture(model, x, masks=masks if how == "masks" else None), strict=True)
    masks.apply_(model)
    assert run(result.model, x)[0] == pytest.approx(expected(model, x).numpy(), rel=TOLERANCE, abs=TOLERANCE)
    sizes = {row.layer: (row.weights_before, row.weights_after) for row in result.removed}
    assert (36 * 12, 24 * 12) in sizes.values()  # queries, keys and values of one head of three
    assert (12 * 12, 12 * 8) in sizes.values()
    assert list(sizes.values()).count((20 * 12, 13 * 12)) == 2
    assert result.opaque == {}


def test_an_attention_layer_of_torch_loses_a_dead_head():
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True).eval(), torch.randn(2, 5, 12)
    with torch.no_grad():
        model.self_attn.out_proj.weight[:, 4:8] = 0
        model.linear2.weight[:, :6] = 0
    result = shrink(capture(model, x), strict=True)
    assert run(result.model, x)[0] == pytest.approx(expected(model, x).numpy(), rel=TOLERANCE, abs=TOLERANCE)
    sizes = sorted((row.weights_before, row.weights_after) for row in result.removed)
    assert sizes == sorted([(36 * 12, 24 * 12), (12 * 12, 12 * 8), (12 * 20, 12 * 14), (20 * 12, 14 * 12)])
