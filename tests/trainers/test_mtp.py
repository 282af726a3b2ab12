"""Does a plain Trainer with the callback follow the weight's schedule and log the layer's loss as it was?"""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from tests.random_models import ours, random_config
from trainers.mtp import MTPCallback


def train(tmp_path, layers: int = 1, **overrides):
    rows = torch.randint(0, 67, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    arguments = TrainingArguments(
        tmp_path, max_steps=4, learning_rate=1e-9, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        **{"logging_steps": 1, "per_device_train_batch_size": 8} | overrides,
    )  # fmt: skip
    model = ours(random_config(1, num_nextn_predict_layers=layers))
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[MTPCallback(((0.0, 0.5), (0.5, 0.25)))])
    trainer.train()
    batch = torch.tensor(rows)
    with torch.no_grad():
        mtp = model(batch, labels=batch).mtp_loss.item() * 10 / 11  # over the main head's targets, as Trainer divides
        main = model(batch, labels=batch, mtp_loss_weight=0.0).loss.item()
    return [log for log in trainer.state.log_history if "loss" in log], main, mtp, model


@pytest.mark.parametrize("overrides", [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}])
def test_weight_and_loss_are_logged(tmp_path, overrides):
    logs, main, mtp, model = train(tmp_path, **overrides)
    assert [log["mtp_loss_weight"] for log in logs] == [0.5, 0.5, 0.25, 0.25]
    for log in logs:
        # The learning rate moves nothing, so every step sees the same loss; Trainer rounds to four digits.
        assert log["mtp_loss"] == pytest.approx(mtp, abs=2e-3)
        assert log["loss"] == pytest.approx(main + log["mtp_loss_weight"] * mtp, abs=2e-3)
    assert not model._forward_hooks


def test_a_log_covers_the_updates_since_the_last(tmp_path):
    logs, _, mtp, _ = train(tmp_path, logging_steps=2)
    assert [log["mtp_loss"] for log in logs] == pytest.approx([mtp, mtp], abs=2e-3)


def test_a_model_without_the_layer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="leave the callback out"):
        train(tmp_path, layers=0)


def test_a_trainer_that_takes_the_loss_itself_is_refused(tmp_path):
    """TRL's do, by a forward pass of their own."""
    model = ours(random_config(1, num_nextn_predict_layers=1)).train()
    callback = MTPCallback()
    callback.on_train_begin(TrainingArguments(tmp_path, use_cpu=True, report_to="none"), None, None, model=model)
    model.forward = lambda input_ids: CausalLMOutput(loss=torch.zeros(()))
    with pytest.raises(ValueError, match="leave MTPCallback out"):
        model(torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.parametrize("across", [True, False])
def test_the_loss_of_two_ranks_is_a_mean_and_no_half(tmp_path, monkeypatch, across):
    model = ours(random_config(1, num_nextn_predict_layers=1)).train()
    callback = MTPCallback()
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none", average_tokens_across_devices=across)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    callback.on_train_begin(arguments, None, None, model=model)
    rows = torch.randint(0, 67, (4, 12), generator=torch.Generator().manual_seed(0))
    # This rank's half of the batch, divided by what Trainer counts: the whole one, or the half.
    model(rows[:2], labels=rows[:2], num_items_in_batch=44 if across else 22)
    logged = float(callback.total)
    assert logged == pytest.approx(model(rows[:2], labels=rows[:2]).mtp_loss.item() * 20 / 22, rel=1e-5)
