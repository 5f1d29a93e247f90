"""The fitting loop against plain torch, masks at every step, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import convolutional, data, mlp, states_equal
from torch import nn

from relief_export.errors import InputError, IntegrityError
from relief_export.recipe import ModelConfig, TrainConfig
from relief_export.training.checkpoints import load_weights, save_weights
from relief_export.training.data import DataSet, Split
from relief_export.training.fit import evaluate, fit, learning_rate
from relief_export.training.models import build_model

torch.set_num_threads(1)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _groups(model):
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0},
    ]


SCHEDULES = torch.optim.lr_scheduler
PLAIN = {
    "adam in steps": (
        {"optimizer": "adam", "milestones": (3, 6), "gamma": 0.5},
        lambda model: torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=0.01),
        lambda optimizer, steps: SCHEDULES.MultiStepLR(optimizer, [3 * steps, 6 * steps], gamma=0.5),
    ),
    "sgd in steps": (
        {"optimizer": "sgd", "milestones": (3, 6), "gamma": 0.5},
        lambda model: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01),
        lambda optimizer, steps: SCHEDULES.MultiStepLR(optimizer, [3 * steps, 6 * steps], gamma=0.5),
    ),
    "sgd with nesterov in one cycle": (
        {"optimizer": "sgd", "schedule": "one-cycle", "nesterov": True, "decay": "weights"},
        lambda model: torch.optim.SGD(_groups(model), lr=0.02, momentum=0.9, weight_decay=0.01, nesterov=True),
        lambda optimizer, steps: SCHEDULES.OneCycleLR(optimizer, 0.02, 9 * steps, cycle_momentum=False),
    ),
    "one cycle of a given warm-up": (
        {"optimizer": "sgd", "schedule": "one-cycle", "warmup": 1.5},
        lambda model: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01),
        lambda optimizer, steps: SCHEDULES.OneCycleLR(
            optimizer, 0.02, 9 * steps, pct_start=1.5 / 9, cycle_momentum=False
        ),
    ),
    "rmsprop in steps": (
        {"optimizer": "rmsprop", "milestones": (3, 6), "gamma": 0.5, "momentum": 0.5},
        lambda model: torch.optim.RMSprop(model.parameters(), lr=0.02, momentum=0.5, weight_decay=0.01),
        lambda optimizer, steps: SCHEDULES.MultiStepLR(optimizer, [3 * steps, 6 * steps], gamma=0.5),
    ),
    "adamw along a cosine": (
        {"optimizer": "adamw", "schedule": "cosine", "label_smoothing": 0.1},
        lambda model: torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.01),
        lambda optimizer, steps: SCHEDULES.CosineAnnealingLR(optimizer, 9 * steps),
    ),
}


@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize("name", PLAIN)
def test_a_training_is_what_plain_torch_does(name, batches):
    settings, optimizer_of, schedule_of = PLAIN[name]
    samples, model = data(), mlp()
    oracle, (x, y) = copy.deepcopy(model), samples.train.tensors()
    config = TrainConfig(9, lr=0.02, weight_decay=0.01, batch=len(x) // batches, **settings)
    plain = optimizer_of(oracle)
    schedule = schedule_of(plain, batches)
    states, rates = [], []
    for epoch in range(9):
        # The order in which an epoch takes its samples is drawn from the seed and the epoch's number.
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        rates.append(plain.param_groups[0]["lr"])
        for rows in order.split(config.batch):
            plain.zero_grad()
            smoothing = settings.get("label_smoothing", 0.0)
            nn.functional.cross_entropy(oracle(x[rows]), y[rows], label_smoothing=smoothing).backward()
            plain.step()
            schedule.step()
        states.append(weights(oracle))
    result = fit(model, samples, config, seed=0)
    assert [line.lr for line in result.history] == pytest.approx(rates, rel=1e-9)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, states[result.best - 1][key], rtol=1e-4, atol=1e-6)


def test_a_learning_rate_warms_up_linearly_before_its_schedule():
    for schedule, after in (("steps", [1, 1, 0.5, 0.5]), ("cosine", [1, 0.75, 0.25])):
        config = TrainConfig(
            4 if schedule == "steps" else 3, lr=1.0, schedule=schedule, warmup=1.5,
            milestones=(3,) if schedule == "steps" else (), gamma=0.5,
        )  # fmt: skip
        rates = [learning_rate(config, step, 2) for step in range(config.epochs * 2)]
        assert rates[:3] == pytest.approx([0.25, 0.5, 0.75])
        assert rates[3:] == pytest.approx([1, 1, 1, 0.5, 0.5] if schedule == "steps" else after)


def test_the_best_epoch_by_validation_is_loaded():
    samples, model = data(noise=0.8), mlp()
    result = fit(model, samples, TrainConfig(8, "sgd", lr=0.1, batch=8), seed=1)
    best = max(result.history, key=lambda line: (line.validation_accuracy, -line.validation_loss))
    assert result.best == best.epoch
    found = evaluate(model, samples.validation)
    assert found.accuracy == result.validation_accuracy == best.validation_accuracy
    assert found.loss == pytest.approx(best.validation_loss, rel=1e-6)
    assert 1 < result.best < 8
    assert len({line.validation_loss for line in result.history}) == 8


def test_no_epochs_measure_the_network_as_it_came():
    samples, model = data(), mlp()
    before = weights(model)
    result = fit(model, samples, TrainConfig(0), seed=0)
    assert (result.best, result.history) == (0, ())
    assert result.validation_accuracy == evaluate(model, samples.validation).accuracy
    assert states_equal(before, weights(model))


@pytest.mark.parametrize("augment", [False, True])
def test_the_same_seed_gives_the_same_bits_whatever_the_caller_drew(augment):
    samples, config = data(augment=augment), TrainConfig(3, lr=0.01, batch=16)

    def trained(seed, caller):
        model = convolutional()
        torch.manual_seed(caller)
        fit(model, samples, config, seed=seed)
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(caller)))
        return weights(model)

    first = trained(5, caller=1)
    assert states_equal(first, trained(5, caller=2))
    assert not states_equal(first, trained(6, caller=1))


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "sgd"])
def test_what_is_masked_is_exactly_zero_at_every_step(optimizer):
    model = build_model(ModelConfig("resnet20"), (1, 8, 8), 3, 0)
    names = ["conv1.weight", "layer1.0.conv1.weight", "layer1.0.bn1.weight", "layer1.0.bn1.bias", "linear.weight"]
    names += ["linear.bias", "layer2.0.join.shortcut_mask", "layer1.1.join.residual_mask"]
    state = weights(model)
    masks = {name: (torch.arange(state[name].numel()) % 5 % 2 == 0).view(state[name].shape) for name in names}
    seen = []

    def look(module, _):
        now = module.state_dict()
        seen.append(all(now[name][~mask].count_nonzero() == 0 for name, mask in masks.items()))

    model.register_forward_pre_hook(look)
    config = TrainConfig(2, optimizer, lr=0.05, weight_decay=0.1, batch=16)
    fit(model, data(48), config, masks=masks, seed=0)
    assert len(seen) == 2 * (3 + 1)
    assert all(seen)
    after = model.state_dict()
    for name in names[:6]:  # what is kept is trained
        assert not torch.equal(after[name][masks[name]], state[name][masks[name]])
        assert after[name][~masks[name]].count_nonzero() == 0


def test_reduced_precision_and_layout_train_too():
    samples, model = data(), convolutional()
    config = TrainConfig(6, lr=0.01, batch=16, precision="bf16", channels_last=True)
    masks = {"0.0.weight": torch.ones(6, 1, 3, 3, dtype=torch.bool)}
    masks["0.0.weight"][2] = False
    fit(model, samples, config, masks=masks, seed=0)
    assert evaluate(model, samples.test).accuracy > 0.9
    assert model[0][0].weight[2].count_nonzero() == 0
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


def test_evaluation_counts_and_returns_logits_in_order():
    samples, model = data(), mlp()
    model.train()
    found = evaluate(model, samples.test, batch=7, logits=True)
    x, y = samples.test.tensors()
    wanted = model(x).detach()
    torch.testing.assert_close(found.logits, wanted, rtol=0, atol=1e-6)
    assert found.accuracy == pytest.approx(float((wanted.argmax(1) == y).float().mean()), abs=1e-7)
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(wanted, y)), rel=1e-5)
    assert found.samples == 48
    assert model.training


def test_progress_is_told_after_every_batch():
    told = []
    config = TrainConfig(2, batch=40)
    fit(mlp(), data(96), config, seed=0, progress=lambda *line: told.append(line), task="retrain")
    assert [(task, done, total) for task, done, total, _ in told] == [
        ("retrain", done, 192) for done in (40, 80, 96, 136, 176, 192)
    ]
    assert told[0][3] == "epoch 1 of 2"
    assert told[-1][3].startswith("epoch 2 of 2, validation ")


def test_a_diverging_training_is_one_clear_error():
    with pytest.raises(
        InputError, match=r"the training diverged in epoch 1 \(loss (nan|inf)\): lower train\.lr = 1e\+30"
    ):
        fit(mlp(), data(), TrainConfig(2, "sgd", lr=1e30, batch=16), seed=0)


def test_a_training_that_diverges_on_validation_alone_names_that_loss():
    class Overflowing(nn.Module):
        """Finite while it is trained, and not when it is used, as where running statistics overflow."""

        def __init__(self):
            super().__init__()
            self.main = mlp()

        def forward(self, x):
            return self.main(x) if self.training else self.main(x) * torch.nan

    with pytest.raises(InputError, match=r"diverged in epoch 1 \(loss \d+\.\d+, nan on the validation set\): lower"):
        fit(Overflowing(), data(), TrainConfig(1, batch=16), seed=0)


def test_every_seed_that_a_recipe_may_have_trains():
    found = []
    for seed in (2**62 - 1, 2**62 - 2):
        model = mlp()
        fit(model, data(), TrainConfig(1, batch=16), seed=seed)
        found.append(weights(model))
    assert not states_equal(*found)


def test_pictures_in_any_layout_train_alike():
    found = []
    for copied in (False, True):
        torch.manual_seed(0)
        x, y = torch.rand(96, 8, 8, 1).permute(0, 3, 2, 1), torch.arange(96) % 3
        split, model = Split.of(x.contiguous() if copied else x, y), convolutional()
        fit(model, DataSet(split, split, split, 3, (1, 8, 8)), TrainConfig(1), seed=0)
        found.append(weights(model))
    assert states_equal(*found)


class Auxiliary(nn.Module):
    """Two outputs while it is trained, as torchvision's Inception has."""

    def __init__(self):
        super().__init__()
        self.main = mlp()

    def forward(self, x):
        return (self.main(x), self.main(x)) if self.training else self.main(x)


@pytest.mark.parametrize(
    ("model", "epochs", "message"),
    [
        (nn.Conv2d(1, 3, 1), 0, r"gives a tensor \(48, 3, 8, 8\), but only classifiers"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), 0, "there is a label 2, but the network has 2 outputs"),
        (Auxiliary(), 1, "gives a tuple, but only classifiers"),
    ],
)
def test_what_is_no_classifier_of_the_labels_is_refused(model, epochs, message):
    with pytest.raises(InputError, match=message):
        fit(model, data(), TrainConfig(epochs), seed=0)


def test_masks_that_fit_no_tensor_and_samples_that_make_no_batch_are_refused():
    with pytest.raises(InputError, match=r"the masks name '9\.weight', which the network does not have"):
        fit(mlp(), data(), TrainConfig(1), masks={"9.weight": torch.ones(1)}, seed=0)
    with pytest.raises(InputError, match=r"the mask of '1\.bias' has shape \(3,\), the network's tensor \(16,\)"):
        fit(mlp(), data(), TrainConfig(1), masks={"1.bias": torch.ones(3)}, seed=0)
    with pytest.raises(InputError, match=r"1 training samples make no batch"):
        fit(mlp(), data(1), TrainConfig(1), seed=0)


def test_a_checkpoint_of_another_training_is_left_unused(tmp_path):
    path, samples = tmp_path / "checkpoint", data()
    fit(mlp(), samples, TrainConfig(2), seed=0, checkpoint=path)
    mask = {"1.bias": torch.arange(16) > 3}
    for model, config, masks, seed in (
        (mlp(), TrainConfig(2, lr=0.1), None, 0),
        (mlp(), TrainConfig(2), None, 1),
        (mlp(1), TrainConfig(2), None, 0),
        (mlp(), TrainConfig(2), mask, 0),
    ):
        copied = tmp_path / "copied"
        copied.write_bytes(path.read_bytes())
        assert fit(model, samples, config, masks=masks, seed=seed, checkpoint=copied).resumed_at == 0
    finished = mlp()
    assert fit(finished, samples, TrainConfig(2), seed=0, checkpoint=path).resumed_at == 2


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda _: b"", lambda _: b"cos\nsystem\n"])
def test_a_damaged_checkpoint_is_refused_and_left_alone(tmp_path, damage):
    path = tmp_path / "checkpoint"
    fit(mlp(), data(), TrainConfig(1), seed=0, checkpoint=path)
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(IntegrityError, match=r"checkpoint is not a whole checkpoint .*: remove it to start again"):
        fit(mlp(), data(), TrainConfig(1), seed=0, checkpoint=path)
    assert path.read_bytes() == before


def test_weights_are_saved_reproducibly_and_loaded_strictly(tmp_path):
    model, other = convolutional(0), convolutional(1)
    save_weights(model, tmp_path / "a.safetensors")
    save_weights(model.to(memory_format=torch.channels_last), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    found = load_weights(other, tmp_path / "a.safetensors")
    assert states_equal(other.state_dict(), model.state_dict())
    assert states_equal(found, model.state_dict())
    before = weights(mlp())
    foreign = mlp()
    with pytest.raises(
        IntegrityError, match=r'a\.safetensors is of another network: tensor "1\.weight" is absent there'
    ):
        load_weights(foreign, tmp_path / "a.safetensors")
    assert states_equal(before, foreign.state_dict())
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes()[:100])
    with pytest.raises(IntegrityError, match=r"a\.safetensors is not a whole safetensors file"):
        load_weights(model, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"c\.safetensors does not exist"):
        load_weights(model, tmp_path / "c.safetensors")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_seed_gives_the_same_bits_on_an_accelerator(precision):
    config = TrainConfig(3, lr=0.01, batch=16, precision=precision, channels_last=True)
    results = []
    for _ in range(2):
        model = build_model(ModelConfig("resnet20"), (1, 16, 16), 3, 0)
        fit(model, data(side=16, augment=True), config, seed=0)
        results.append(weights(model))
    assert states_equal(*results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize(
    ("optimizer", "precision"), [("sgd", "fp32"), ("adam", "bf16"), ("adamw", "fp32"), ("rmsprop", "fp32")]
)
def test_a_captured_step_does_what_its_operations_do(optimizer, precision):
    model = build_model(ModelConfig("resnet20"), (1, 16, 16), 3, 0)
    masks = {"layer1.0.conv1.weight": torch.arange(16 * 16 * 9).view(16, 16, 3, 3) % 3 > 0}
    results = []
    for captured in (False, True):
        trained = copy.deepcopy(model)
        # 96 samples in batches of 40: the last of an epoch is of another size.
        config = TrainConfig(
            3, optimizer, lr=0.01, schedule="one-cycle", batch=40, precision=precision, cuda_graph=captured
        )
        fit(trained, data(side=16, augment=True), config, masks=masks, seed=0)
        assert trained.layer1[0].conv1.weight.cpu()[~masks["layer1.0.conv1.weight"]].count_nonzero() == 0
        results.append(weights(trained))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-3, atol=1e-4)
