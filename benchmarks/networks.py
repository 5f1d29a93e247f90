"""The networks of other people's libraries: relieved for one round, exported and validated, or what refuses them.

Every network is built small, with random weights, and given random data: the question is whether its layers are found,
captured, shrunk and proven, not how well it does. Each has a process and a time limit of its own, smallest first.

RELIEF_NETWORKS_MINUTES bounds the whole: what is not reached then stands in the table as not tried, and
RELIEF_NETWORKS=rest tries only that, keeping the rows that are there. The record is written after each network, so
that the same goes for a run that was stopped.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import relief_export as rx
from benchmarks.common import RESULTS, Benchmark, Column, Row
from relief_export.calling import run_batch
from relief_export.errors import MissingExtraError, ReliefError
from relief_export.records import machine, read_json
from relief_export.training.vision import import_torchvision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

SEED = 0
LIMIT = 300
"""Seconds of processor time that one network gets: what else the machine does is not its fault."""
BATCHES, BATCH = 3, 8
CLASSES = 5
WORDS, LENGTH = 97, 12
"""Vocabulary and length of the token sequences."""


@dataclass(frozen=True)
class Network:
    """One row: where the network comes from, how it is built, and what a batch of it is.

    Attributes:
        package: The distribution it comes from, "torch" where it is written here.
        build: Returns it with random weights.
        batch: Returns one batch of inputs.
        output: What is shipped of what it gives; everything by default.
    """

    name: str
    package: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    output: str | None = None


def pictures(size: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """Return a maker of batches [B, 3, size, size]."""
    return lambda: torch.randn(BATCH, 3, size, size).to(dtype)


def sequences(dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a batch of real-valued sequences [B, 10, 6]."""
    return torch.randn(BATCH, 10, 6).to(dtype)


def tokens() -> dict[str, Tensor]:
    """Return a batch of token sequences as Hugging Face's tokenizers give it."""
    ids = torch.randint(0, WORDS, (BATCH, LENGTH))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Cnn(nn.Module):
    """Two convolutions with batch norm, and a linear layer."""

    def __init__(self) -> None:
        """Build it with random weights."""
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv2, self.norm2 = nn.Conv2d(12, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, CLASSES]."""
        x = functional.relu(self.norm1(self.conv1(x)))
        x = functional.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """One of PyTorch's own transformer layers over embedded sequences."""

    def __init__(self) -> None:
        """Build it with random weights."""
        super().__init__()
        self.embed = nn.Linear(6, 24)
        self.layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, CLASSES]."""
        return self.head(self.layer(self.embed(x)).mean(1))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """An LSTM or GRU whose last state is classified by two linear layers."""

    def __init__(self, layer: type[nn.LSTM | nn.GRU]) -> None:
        """Build it with random weights."""
        super().__init__()
        self.rnn = layer(6, 16, batch_first=True)
        self.hidden, self.head = nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, CLASSES]."""
        steps, _ = self.rnn(x)
        return self.head(functional.relu(self.hidden(steps[:, -1])))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """YOLOv8's C2f: half of the channels pass a bottleneck, and all parts are joined again."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.enter, self.leave = _silu(channels, channels, 1), _silu(3 * half, channels, 1)
        self.inner = nn.Sequential(_silu(half, half, 3), _silu(half, half, 3))

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.enter(x).chunk(2, 1)
        return self.leave(torch.cat([one, two, two + self.inner(two)], 1))  # type: ignore[no-any-return]


def _silu(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU())


class YoloLike(nn.Module):
    """A detector in YOLOv8's style, in its raw form: boxes and classes of two scales, before any decoding."""

    def __init__(self) -> None:
        """Build it with random weights."""
        super().__init__()
        self.stem = nn.Sequential(_silu(3, 8, 3, 2), _silu(8, 16, 3, 2), _Block(16))
        self.deep = nn.Sequential(_silu(16, 32, 3, 2), _Block(32))
        self.join = nn.Sequential(_silu(48, 16, 1), _Block(16))
        self.fine, self.coarse = nn.Conv2d(16, 4 + CLASSES, 1), nn.Conv2d(32, 4 + CLASSES, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return [B, 4 + CLASSES, H, W] of each scale."""
        early = self.stem(x)
        late = self.deep(early)
        up = functional.interpolate(late, scale_factor=2.0, mode="nearest")
        return [self.fine(self.join(torch.cat([up, early], 1))), self.coarse(late)]


class _RawHeads(nn.Module):
    """A detector of torchvision without what comes after its heads, which is no network."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.get_submodule("backbone"), detector.get_submodule("head")

    def forward(self, x: Tensor) -> Any:  # noqa: ANN401  a dictionary of tensors
        return self.head(list(self.backbone(x).values()))


def _timm(name: str, size: int = 64, **settings: Any) -> Network:  # noqa: ANN401  whatever timm's models take
    def build() -> nn.Module:
        import_torchvision()  # which timm imports, and may need its help
        timm = importlib.import_module("timm")
        return timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings)  # type: ignore[no-any-return]

    return Network(f"timm {name}", "timm", build, pictures(size))


def _timm_class(name: str, module: str, build: Callable[[Any], nn.Module], size: int = 32) -> Network:
    """Return a network whose size timm's create_model does not let one choose, from the module of its class."""

    def built() -> nn.Module:
        import_torchvision()
        return build(importlib.import_module(f"timm.models.{module}"))

    return Network(f"timm {name}", "timm", built, pictures(size))


_MIXER = {"num_classes": CLASSES, "img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 48}


def _poolformer(metaformer: Any) -> nn.Module:  # noqa: ANN401  timm's module
    return metaformer.MetaFormer(  # type: ignore[no-any-return]
        depths=(1, 1, 1, 1), dims=(16, 32, 48, 64), num_classes=CLASSES, downsample_norm=None, mlp_act=nn.GELU,
        mlp_bias=True, norm_layers=metaformer.GroupNorm1, layer_scale_init_values=1e-5, res_scale_init_values=None,
        use_mlp_head=False,
    )  # fmt: skip


def _resmlp(mixers: Any) -> nn.Module:  # noqa: ANN401  timm's module
    return mixers.MlpMixer(  # type: ignore[no-any-return]
        mlp_ratio=4, block_layer=mixers.ResBlock, norm_layer=mixers.Affine, **_MIXER
    )


def _torchvision(name: str, size: int = 64, *, family: str = "", **settings: Any) -> Network:  # noqa: ANN401
    def build() -> nn.Module:
        models = import_torchvision().models
        where = getattr(models, family) if family else models
        return getattr(where, name)(**settings)  # type: ignore[no-any-return]

    output = "out" if family == "segmentation" else None
    return Network(f"torchvision {name}", "torchvision", build, pictures(size), output)


def _convnext() -> nn.Module:
    convnext = import_torchvision().models.convnext
    blocks = [convnext.CNBlockConfig(16 * 2**i, 32 * 2**i if i < 3 else None, 1) for i in range(4)]
    return convnext.ConvNeXt(blocks, num_classes=CLASSES)  # type: ignore[no-any-return]


def _ssdlite() -> nn.Module:
    detection = import_torchvision().models.detection
    return _RawHeads(detection.ssdlite320_mobilenet_v3_large(weights_backbone=None, num_classes=CLASSES))


def _transformers(model: str, config: str, batch: Callable[[], Any], **settings: Any) -> Network:  # noqa: ANN401
    def build() -> nn.Module:
        with contextlib.suppress(MissingExtraError):
            import_torchvision()
        library = importlib.import_module("transformers")
        return getattr(library, model)(getattr(library, config)(**settings))  # type: ignore[no-any-return]

    return Network(f"transformers {model}", "transformers", build, batch, "logits")


def _unet() -> nn.Module:
    import_torchvision()
    smp = importlib.import_module("segmentation_models_pytorch")
    return smp.Unet(  # type: ignore[no-any-return]
        "resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(32, 16, 8), classes=2
    )


def _lightning() -> nn.Module:
    module = importlib.import_module("lightning").LightningModule

    class Module(module):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.network = Cnn()

        def forward(self, x: Tensor) -> Any:  # noqa: ANN401
            return self.network(x)

    return Module()


_TEXT = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

NETWORKS = (
    Network("CNN", "torch", Cnn, pictures(32)),
    *(
        Network(f"CNN, {name}", "torch", lambda kind=kind: Cnn().to(kind), pictures(32, kind))  # type: ignore[misc]
        for name, kind in (("float16", torch.float16), ("bfloat16", torch.bfloat16))
    ),
    Network("transformer layer", "torch", Encoder, sequences),
    *(
        Network(f"transformer layer, {name}", "torch", lambda k=k: Encoder().to(k), lambda k=k: sequences(k))  # type: ignore[misc]
        for name, k in (("float16", torch.float16), ("bfloat16", torch.bfloat16))
    ),
    Network("LSTM", "torch", lambda: Recurrent(nn.LSTM), sequences),
    Network("GRU", "torch", lambda: Recurrent(nn.GRU), sequences),
    Network("YOLO-like, raw", "torch", YoloLike, pictures(64)),
    Network("Lightning module", "lightning", _lightning, pictures(32)),
    _transformers("BertForSequenceClassification", "BertConfig", tokens, intermediate_size=64, **_TEXT),
    _transformers("GPT2LMHeadModel", "GPT2Config", tokens, vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4,
                  n_positions=32, use_cache=False, bos_token_id=0, eos_token_id=0),
    _transformers("LlamaForCausalLM", "LlamaConfig", tokens, intermediate_size=64, num_key_value_heads=2,
                  use_cache=False, **_TEXT),
    _transformers("ViTForImageClassification", "ViTConfig", lambda: {"pixel_values": pictures(32)()}, image_size=32,
                  patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64),
    _transformers("SegformerForSemanticSegmentation", "SegformerConfig", lambda: {"pixel_values": pictures(64)()},
                  depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 2, 4],
                  decoder_hidden_size=32),
    _timm("vit_tiny_patch16_224", 32, img_size=32, patch_size=8, embed_dim=48, depth=2),
    _timm("deit_tiny_patch16_224", 32, img_size=32, patch_size=8, embed_dim=48, depth=2),
    _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 32, 48, 64)),
    _timm("swin_tiny_patch4_window7_224", 64, img_size=64, window_size=2, embed_dim=24, depths=(2, 1, 1, 1),
          num_heads=(1, 2, 4, 8)),
    _timm_class("poolformer_s12", "metaformer", _poolformer, 64),
    _timm_class("mixer_s32_224", "mlp_mixer", lambda mixers: mixers.MlpMixer(**_MIXER)),
    _timm_class("resmlp_12_224", "mlp_mixer", _resmlp),
    _timm("mobilenetv3_small_050"),
    _timm("lcnet_050"),
    _timm("tinynet_e"),
    _timm("dla46_c"),
    _timm("edgenext_xx_small"),
    _timm("mobilevit_xxs"),
    _timm("ghostnet_050"),
    _timm("regnetx_002"),
    _timm("ese_vovnet19b_slim_dw"),
    _timm("resnet10t"),
    _timm("densenet121", growth_rate=8, block_config=(3, 3, 3, 3)),
    _torchvision("squeezenet1_1", num_classes=CLASSES),
    _torchvision("shufflenet_v2_x0_5", num_classes=CLASSES),
    _torchvision("mobilenet_v3_small", num_classes=CLASSES),
    _torchvision("mobilenet_v2", num_classes=CLASSES),
    _torchvision("mnasnet0_5", num_classes=CLASSES),
    _torchvision("VisionTransformer", 32, image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32,
                 mlp_dim=64, num_classes=CLASSES),
    _torchvision("lraspp_mobilenet_v3_large", family="segmentation", weights_backbone=None, num_classes=CLASSES),
    Network("torchvision ssdlite320_mobilenet_v3_large, raw heads", "torchvision", _ssdlite, pictures(64)),
    Network("segmentation_models_pytorch Unet", "segmentation_models_pytorch", _unet, pictures(64)),
    _timm("repvgg_a0"),
    _timm("levit_128s", 64, img_size=64),
    _timm("cs3darknet_focus_s"),
    _timm("resnext26ts"),
    _timm("coatnet_pico_rw_224", 64, img_size=64),
    _torchvision("googlenet", num_classes=CLASSES, aux_logits=False, init_weights=False),
    _torchvision("DenseNet", growth_rate=8, block_config=(2, 2, 2, 2), num_init_features=16, num_classes=CLASSES),
    _torchvision("resnet18", num_classes=CLASSES),
    Network("torchvision ConvNeXt", "torchvision", _convnext, pictures(64)),
    _torchvision("deeplabv3_mobilenet_v3_large", family="segmentation", weights_backbone=None, num_classes=CLASSES),
    _timm("efficientnet_b0"),
    _torchvision("efficientnet_b0", num_classes=CLASSES),
    _torchvision("regnet_y_400mf", num_classes=CLASSES),
    _timm("hrnet_w18_small"),
    _torchvision("fcn_resnet50", family="segmentation", weights_backbone=None, num_classes=CLASSES),
)  # fmt: skip


def _keep(network: nn.Module, masks: Any) -> None:  # noqa: ANN401  relief's masks
    """Stand for a retraining, which would say nothing on random data."""
    masks.apply_(network)


def draw_zeros(network: nn.Module) -> None:
    """Give each layer that its library starts at zero the weights that PyTorch starts it with.

    The last norm of a residual branch and some heads start at zero: until a training changes them the branch, or all
    that the head reads, computes nothing, and relief rightly removes it.
    """
    for module in network.modules():
        weight, reset = getattr(module, "weight", None), getattr(module, "reset_parameters", None)
        if isinstance(weight, nn.Parameter) and callable(reset) and not weight.any():
            reset()


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def take_statistics(network: nn.Module, batches: list[Any]) -> None:
    """Give each batch norm the statistics of the data, as a training would have.

    With those that it starts with, signals fade layer by layer until the last biases alone are active, and relief
    rightly leaves nothing else: such a network would prove nothing.
    """
    norms = [module for module in network.modules() if isinstance(module, _NORMS)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    if norms:
        with torch.no_grad():
            for batch in batches:
                run_batch(network, batch)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
        norm.eval()


def tried(network: Network, folder: Path) -> Row:
    """Relieve, export and validate one network; return its row, with the step that failed and its sentence."""
    started = time.process_time()
    row: Row = {"step": "build"}
    try:
        torch.manual_seed(SEED)
        model = network.build().eval()
        row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        batches = [network.batch() for _ in range(BATCHES)]
        draw_zeros(model)
        take_statistics(model, batches)
        row["step"] = "relieve"
        found = rx.relieve(model, batches, rounds=1, retrain=_keep, evaluate=lambda _: 1.0, seed=SEED)
        kept, dense = (sum(f(mask) for mask in found.masks.values()) for f in (lambda m: int(m.sum()), Tensor.numel))
        row |= {"step": "export", "kept": kept / dense, "left_whole": sorted(found.left_whole)}
        rx.export(model, batches[0], folder / "out", masks=found.masks, formats=("dense", "packed"),
                  output=network.output)  # fmt: skip
        row["step"] = "validate"
        validation = rx.validate(folder / "out")
        errors = [each.agreement.relative_error for each in validation.measurements]
        # None where an output is not a finite number, which a check then says.
        row["largest_error"] = None if None in errors else max(error for error in errors if error is not None)
        failed = [check.message for check in validation.checks if not check.ok]
        row["outcome"] = "works" if validation.ok else f"validation: {failed[0]}"
    except ReliefError as error:
        row["outcome"] = str(error)
    except ModuleNotFoundError as error:
        row["outcome"] = f"not tried: {error.name} is not installed"
    except Exception as error:  # noqa: BLE001  whatever it is, the table says so
        lines = str(error).strip().splitlines() or [""]
        row["outcome"] = f"a fault, {type(error).__name__}: {lines[0][:200]}"
    return row | {"seconds": time.process_time() - started}


def _child(network: Network, answers: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 10))
    # Where memory runs out it is this process that goes, not the table.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    with tempfile.TemporaryDirectory() as scratch:
        # The exporter's progress is no part of the table.
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            row = tried(network, Path(scratch))
        answers.send(row)


def _row(network: Network, left: float) -> Row:
    """Return the row of a network, tried in a process that is forked, so that no library is imported again.

    Args:
        network: What is tried.
        left: Seconds of wall time until all is over.
    """
    context = multiprocessing.get_context("fork")
    receives, sends = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(network, sends))
    process.start()
    sends.close()
    try:
        return receives.recv() if receives.poll(left) else {"outcome": _OVER}
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            return {"outcome": f"not done within {LIMIT} s of processor time"}
        return {"outcome": f"a fault: the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


_OVER = "not tried: the time was over"
_UNANSWERED = ("not tried", "not done")


def _unanswered(network: Network) -> Row:
    return {
        "network": network.name,
        "package": network.package,
        "version": _version(network.package),
        "outcome": _OVER,
    }


def _kept() -> dict[str, Row]:
    """Return the rows of the record that have an answer, where only the rest is asked for."""
    path = RESULTS / "networks.json"
    if os.environ.get("RELIEF_NETWORKS") != "rest" or not path.is_file():
        return {}
    return {row["network"]: row for row in read_json(path)["rows"] if not row["outcome"].startswith(_UNANSWERED)}


def _import_all() -> None:
    """Import what the networks need once, for all processes; what is absent or broken is said by its networks."""
    with contextlib.suppress(MissingExtraError):
        import_torchvision()
    for name in ("timm", "transformers", "segmentation_models_pytorch", "lightning", "onnxruntime", "onnxscript"):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def run() -> Iterator[list[Row]]:
    """Yield one row for each network, after each that was tried; those still to come are not tried."""
    torch.set_num_threads(1)  # a fork of a pool of threads hangs
    end = time.monotonic() + 60 * float(os.environ.get("RELIEF_NETWORKS_MINUTES", "120"))
    if time.monotonic() < end:
        _import_all()
    kept = _kept()
    rows = {network.name: kept.get(network.name, _unanswered(network)) for network in NETWORKS}
    yield list(rows.values())
    for network in NETWORKS:
        left = end - time.monotonic()
        if network.name in kept or left <= 0:
            continue
        row = _unanswered(network) | _row(network, left)
        print(network.name, row.get("step"), row["outcome"], row.get("seconds"), file=sys.stderr, flush=True)
        rows[network.name] = {"machine": machine()} | row
        yield list(rows.values())


BENCHMARK = Benchmark(
    name="networks",
    question="Which networks of other libraries can be relieved, exported and proven?",
    run=run,
    columns=(
        Column("network", "network"),
        Column("version", "version of its library"),
        Column("parameters", "parameters", ",d"),
        Column("outcome", "outcome"),
        Column("kept", "% of connections kept", ".1f", 100),
        Column("largest_error", "largest error", ".1g"),
        Column("seconds", "s", ".0f"),
    ),
    seeds=(SEED,),
    note=(
        "Small forms with random weights, also where a library starts at zero, batch norms with the statistics of the "
        "data, 24 random samples, one round without retraining, then the formats dense and packed, then validation "
        "in ONNX Runtime against the pruned network; the outcome is *works* or the sentence that was given. Kept is "
        "the share of mask entries. The largest error is relative to the largest output, over files and sessions. "
        "Seconds are processor time of the whole, one thread. The record is written after each network; with "
        "RELIEF_NETWORKS=rest the command tries what has no answer yet, and the duration below is that of the last "
        "part."
    ),
    own_page=True,
)
