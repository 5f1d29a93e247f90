"""Relief inside the loops of other libraries, with the real packages where they are installed."""

import importlib
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import relief_export as rx
from relief_export.errors import InputError

X = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()


@pytest.mark.filterwarnings("ignore")  # the library's own
def test_lightning_retrains_and_measures(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from relief_export.integrations.lightning import KeepMasked, evaluate_with, retrain_with  # noqa: PLC0415

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _index):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, _index):
            self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self):  # momentum and decay would revive a masked weight
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=0.1)

    def make_trainer(callbacks):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False, "default_root_dir": tmp_path, "accelerator": "cpu"}
        return lightning.Trainer(max_epochs=2, callbacks=callbacks, **quiet)

    loader, module = DataLoader(TensorDataset(X, Y), 16), Module()
    found = rx.relieve(
        module,
        loader,
        retrain=retrain_with(make_trainer, loader),
        evaluate=evaluate_with(make_trainer, "accuracy", loader),
        rounds=1,
        alpha_fc=0.7,
        accuracy_drop=1.0,
    )
    assert found.chosen.kept < found.chosen.dense
    assert found.masks.apply_(module) == {}
    with torch.no_grad():
        expected = float((module(X).argmax(1) == Y).float().mean())
    assert found.chosen.accuracy == pytest.approx(expected)
    with pytest.raises(InputError, match="no 'accurace' in its validation step; did you mean \"accuracy\""):
        evaluate_with(make_trainer, "accurace", loader)(module)
    with pytest.raises(InputError, match="which the network does not have"):
        make_trainer([KeepMasked({"elsewhere": torch.ones(2)})]).fit(module, loader)


@pytest.mark.filterwarnings("ignore")  # the library's own
def test_transformers_retrain_and_measure(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from relief_export.integrations.transformers import evaluate_with, retrain_with  # noqa: PLC0415

    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8, num_labels=3)
    config.pad_token_id = 0
    torch.manual_seed(0)
    model = transformers.GPT2ForSequenceClassification(config)
    ids = torch.randint(1, 20, (32, 6), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row[-1] % 3} for row in ids]

    def make_trainer(network, callbacks):
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=8, report_to=[], use_cpu=True, disable_tqdm=True,
            save_strategy="no", weight_decay=0.1, logging_strategy="no",
        )  # fmt: skip
        return transformers.Trainer(
            network,
            arguments,
            train_dataset=rows,
            eval_dataset=rows,
            callbacks=callbacks,
            compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())},
        )

    found = rx.relieve(
        model,
        DataLoader(rows, 16),
        retrain=retrain_with(make_trainer),
        evaluate=evaluate_with(make_trainer, "eval_accuracy"),
        output="logits",
        rounds=1,
        alpha_fc=0.7,
        accuracy_drop=1.0,
    )
    # GPT-2's linear layers keep their weights as (in, out), and are relieved like all others.
    layer = found.chosen.layers["transformer.h.0.mlp.c_fc"]
    assert layer["dense"] == 16 * 64 + 64
    assert layer["kept"] < layer["dense"]
    assert layer["neurons"] == 64
    assert found.masks.apply_(model) == {}
    with pytest.raises(InputError, match="the trainer measures no 'eval_accurace'"):
        evaluate_with(make_trainer, "eval_accurace")(model)


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_without_the_package_one_sentence_says_so(name, monkeypatch):
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    sys.modules.pop(f"relief_export.integrations.{name}", None)
    with pytest.raises(InputError, match=f"relief_export.integrations.{name} needs .*: pip install {name}"):
        importlib.import_module(f"relief_export.integrations.{name}")
