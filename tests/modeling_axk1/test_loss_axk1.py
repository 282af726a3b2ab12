"""Is the loss without logits the loss with them, in value, gradients and what it returns to whom?"""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_axk1 import loss_axk1
from modeling_axk1.loss_axk1 import fused_causal_lm_loss, fused_linear_loss
from tests.random_models import ours, padded_ids, random_config, stock_twin
from tests.tolerances import FUSED_LOSS


def problem(tokens: int = 29, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(67, 24, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(0, 67, (tokens,), generator=generator)
    target[::5] = -100
    return hidden, weight, target


def close(a, b, tolerance):
    assert a.dtype == b.dtype and b.abs().max() > 0
    assert (a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max()


@pytest.mark.parametrize("chunk_tokens", [1, 8, 29, 100])
def test_value_and_gradients_are_cross_entropys(chunk_tokens):
    hidden, weight, target = problem()
    fused = fused_linear_loss(hidden, weight, target, chunk_tokens)
    plain = F.cross_entropy(hidden @ weight.T, target, reduction="sum")
    close(fused, plain, FUSED_LOSS)
    for a, b in zip(torch.autograd.grad(3 * fused, [hidden, weight]), torch.autograd.grad(3 * plain, [hidden, weight])):
        close(a, b, FUSED_LOSS)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has no linear_cross_entropy before 2.13")
def test_it_agrees_with_torchs_own():
    hidden, weight, target = problem()
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=8)
    torchs = F.linear_cross_entropy(hidden, weight, target, reduction="sum", options=options)
    fused = fused_linear_loss(hidden, weight, target, 8)
    close(fused, torchs, FUSED_LOSS)
    for a, b in zip(torch.autograd.grad(fused, [hidden, weight]), torch.autograd.grad(torchs, [hidden, weight])):
        close(a, b, FUSED_LOSS)


def test_bfloat16_is_no_less_accurate_than_the_plain_loss():
    hidden, weight, target = problem(tokens=200, dtype=torch.bfloat16)
    wide = [hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()]
    truth = torch.autograd.grad(F.cross_entropy(wide[0] @ wide[1].T, target), wide)
    fused = torch.autograd.grad(fused_causal_lm_loss(hidden, weight, shift_labels=target), [hidden, weight])
    plain = torch.autograd.grad(F.cross_entropy((hidden @ weight.T).float(), target), [hidden, weight])
    for a, b, t in zip(fused, plain, truth):
        assert (a.float() - t).norm() <= 1.1 * (b.float() - t).norm() and t.norm() > 0


def test_whole_logits_never_exist(monkeypatch):
    seen = []
    chunk_loss = loss_axk1.chunk_loss
    monkeypatch.setattr(loss_axk1, "CHUNK_BYTES", 4 * 67 * 8)
    monkeypatch.setattr(
        loss_axk1, "chunk_loss", lambda logits, *rest: (seen.append(len(logits)), chunk_loss(logits, *rest))[1]
    )
    fused_linear_loss(*problem()).backward()
    assert seen == [8, 8, 8, 5]


def test_nothing_to_learn_and_frozen_parts():
    hidden, weight, target = problem()
    assert torch.autograd.grad(fused_linear_loss(hidden, weight.detach(), target), hidden)[0].norm() > 0
    assert torch.autograd.grad(fused_linear_loss(hidden.detach(), weight, target), weight)[0].norm() > 0
    none = fused_linear_loss(hidden, weight, torch.full_like(target, -1))
    assert none == 0 and torch.autograd.grad(none, hidden)[0].abs().max() == 0
    assert fused_linear_loss(hidden[:0], weight, target[:0]) == 0


def test_evaluation_computes_no_gradient(monkeypatch):
    seen = []
    chunk_loss = loss_axk1.chunk_loss
    monkeypatch.setattr(loss_axk1, "chunk_loss", lambda *args: (seen.append(chunk_loss(*args)), seen[-1])[1])
    hidden, weight, target = problem()
    with torch.no_grad():
        value = fused_linear_loss(hidden, weight, target, 8)
    frozen = fused_linear_loss(hidden.detach(), weight.detach(), target, 8)
    assert len(seen) == 8 and all(gradient is None for _, gradient in seen)
    assert torch.equal(value, fused_linear_loss(hidden, weight, target, 8)) and torch.equal(value, frozen)


def test_the_number_of_items_is_not_rounded_to_bfloat16():
    hidden, weight, target = problem(dtype=torch.bfloat16)
    whole = torch.autograd.grad(fused_linear_loss(hidden, weight, target), [hidden, weight])
    mean = torch.autograd.grad(fused_linear_loss(hidden, weight, target) / 510, [hidden, weight])
    assert torch.tensor(1 / 510).bfloat16().float() != torch.tensor(1 / 510)
    for a, b in zip(mean, whole):
        assert torch.equal(a, (b.float() * torch.tensor(1 / 510)).bfloat16()) and a.abs().max() > 0


@pytest.mark.parametrize(
    "reading", [{}, {"num_items_in_batch": 40}, {"num_items_in_batch": torch.tensor(40)}, {"ignore_index": 3}]
)
def test_arguments_are_read_as_transformers_reads_them(reading):
    hidden, weight, _ = problem()
    labels = torch.randint(0, 67, (1, 29), generator=torch.Generator().manual_seed(0))
    labels[0, 5:9] = reading.get("ignore_index", -100)
    fused = fused_causal_lm_loss(hidden[None], weight, labels, **reading)
    close(fused, ForCausalLMLoss(hidden[None] @ weight.T, labels, 67, **reading), FUSED_LOSS)


@pytest.fixture
def models():
    """The same weights and batch, plain and fused, with every other loss switched on."""
    overrides = {"num_nextn_predict_layers": 1, "router_aux_loss_coef": 0.02}
    plain = ours(random_config(1, **overrides))
    fused = ours(random_config(1, **overrides, fused_linear_loss=True))
    ids, mask = padded_ids(plain.config, rows=3)
    return (
        plain.train(),
        fused.train(),
        {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)},
    )


@pytest.mark.parametrize("items", [None, 30])
def test_the_models_loss_and_gradients_do_not_depend_on_the_switch(models, items):
    plain, fused, batch = models
    outputs = [model(**batch, num_items_in_batch=items) for model in (plain, fused)]
    assert outputs[0].logits is not None and outputs[1].logits is None
    for name in ("loss", "mtp_loss", "aux_loss"):
        close(outputs[1][name], outputs[0][name], FUSED_LOSS)
    for output in outputs:
        output.loss.backward()
    largest = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
    for (name, a), b in zip(fused.named_parameters(), plain.parameters()):
        if b.grad is not None:
            assert (a.grad - b.grad).abs().max() <= 10 * FUSED_LOSS * max(b.grad.abs().max(), largest / 1000), name


def test_logits_are_there_for_whoever_asks(models):
    plain, fused, batch = models
    reference = plain(**batch).logits
    assert torch.equal(fused(**batch, skip_logits=False).logits, reference)
    assert torch.equal(fused.eval()(**batch).logits, reference)
    assert fused(**batch, skip_logits=True).logits is None
    assert plain(**batch, skip_logits=True).logits is None
    assert fused.train()(input_ids=batch["input_ids"]).logits is not None
    with pytest.raises(ValueError, match="skip_logits=True"):
        fused(input_ids=batch["input_ids"], skip_logits=True)


def test_a_head_that_is_no_plain_linear_layer_takes_whole_logits(models, caplog):
    plain, fused, batch = models
    fused.lm_head.register_forward_hook(lambda *_: None)
    close(fused(**batch).loss, plain(**batch).loss, FUSED_LOSS)
    assert fused(**batch).logits is None


def test_trainer_takes_the_same_steps(tmp_path):
    rows = torch.randint(0, 67, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row[:3] + [-100] + row[4:]} for row in rows])
    losses = []
    for fused in (False, True):
        model = ours(random_config(1, num_nextn_predict_layers=1, fused_linear_loss=fused))
        arguments = TrainingArguments(
            tmp_path, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3, use_cpu=True,
            report_to="none", disable_tqdm=True, logging_steps=1, save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        losses[-1].append(trainer.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_label_smoothing_has_the_next_tokens_for_targets_as_for_stock(tmp_path):
    rows = torch.randint(0, 67, (4, 12), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to="none", disable_tqdm=True)
    model = ours(random_config(1))
    mine, stocks = (Trainer(each, arguments, eval_dataset=data).evaluate()["eval_loss"] for each in (model, stock_twin(model)))
    assert mine == pytest.approx(stocks, rel=1e-5)


def test_trainer_takes_logits_alone_for_predictions(tmp_path):
    """A balance loss and the router logits that it asked for are none."""
    settings = TrainingArguments(tmp_path, use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = Trainer(ours(random_config(1, router_aux_loss_coef=0.1)), settings)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 67, (2, 9))]
    assert trainer.predict(rows).predictions.shape == (2, 9, 67)
