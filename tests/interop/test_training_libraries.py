"""Do TRL, PEFT and accelerate, as they are, train and load our model as they do stock transformers'?"""

import pytest
import torch
from accelerate import Accelerator, load_checkpoint_in_model
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer
from transformers.models.axk1.modeling_axk1 import AXK1ForCausalLM
from trl import SFTConfig, SFTTrainer

from modeling_axk1 import AxK1Config, AxK1ForCausalLM
from tests.random_models import padded_ids
from tests.tolerances import PREFILL

TARGETS = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj"]


def losses_of(kind, checkpoint, out) -> list[float]:
    rows = [{"prompt": f"What is {n} + 3?", "completion": f" {n + 3}."} for n in range(8)]
    settings = SFTConfig(
        str(out), max_steps=3, logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", seed=0, disable_tqdm=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = kind.from_pretrained(checkpoint, dtype=torch.float32)
    trainer = SFTTrainer(model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_trl_learns_the_same_with_either_class(checkpoint, tmp_path):
    ours, stock = (losses_of(kind, checkpoint, tmp_path) for kind in (AxK1ForCausalLM, AXK1ForCausalLM))
    assert len(ours) == 3 and ours[-1] < ours[0]
    # Measured 8e-6: three steps of AdamW on gradients that differ in the last bits.
    assert ours == pytest.approx(stock, abs=1e-4)


def test_peft_trains_on_ours_what_stock_loads_and_merges(checkpoint, tmp_path):
    model = get_peft_model(AxK1ForCausalLM.from_pretrained(checkpoint), LoraConfig(r=4, target_modules=TARGETS))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    ids, _ = padded_ids(model.config)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(AXK1ForCausalLM.from_pretrained(checkpoint), tmp_path / "adapter").eval()
    with torch.no_grad():
        untrained = AXK1ForCausalLM.from_pretrained(checkpoint)(ids).logits
        logits = model.eval()(ids).logits
        assert (logits - untrained).abs().max() > 1e-2, "the adapter does nothing"
        torch.testing.assert_close(stock(ids).logits, logits, atol=PREFILL, rtol=PREFILL)
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = AXK1ForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(ids).logits, logits, atol=PREFILL, rtol=PREFILL)


def test_accelerate_loads_the_files_themselves(checkpoint):
    """Not through from_pretrained: accelerate reads the shards and hands them to the model, experts apart as on the disk."""
    model = AxK1ForCausalLM(AxK1Config.from_pretrained(checkpoint)).eval()
    load_checkpoint_in_model(model, str(checkpoint))
    ids, _ = padded_ids(model.config)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, AxK1ForCausalLM.from_pretrained(checkpoint)(ids).logits)


def test_accelerate_goes_on_where_it_stopped(checkpoint, tmp_path):
    accelerator = Accelerator(cpu=True)
    model = AxK1ForCausalLM.from_pretrained(checkpoint)
    trained = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2))
    ids, _ = padded_ids(model.config)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        return loss.item()

    first = step()
    accelerator.save_state(tmp_path)
    second = [step(), step()]
    accelerator.load_state(tmp_path)
    assert [step(), step()] == second and second[1] < first
