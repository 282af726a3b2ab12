"""Does what is saved say where it comes from and how each mode went, and is nothing told that the Hub would refuse?"""

from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from conversion.hub import CardSettings, metadata
from trainers.launching import train_and_save
from trainers.mode_curves import Lineage, Measure, first_and_last, model_card
from trainers.mode_overlap import build_mode_overlap, make_row
from trainers.think_fusion import ThinkFusionConfig, ThinkFusionTrainer
from trainers.tokenizer import train_tokenizer

MEASURES = (Measure("right", "t", "n", "share"), Measure("length", "tl", "nl", "tokens"))
HISTORY = [{"step": 1, "t": 0.25, "tl": 9.0}, {"step": 5, "n": 1.0}, {"step": 9, "t": 0.5, "loss": 3.0}]


def test_each_mode_begins_at_its_first_value_and_ends_at_its_last():
    assert first_and_last(HISTORY, MEASURES) == [
        {"what": "right", "mode": "thinking", "first": "25.0% (step 1)", "last": "50.0% (step 9)"},
        {"what": "right", "mode": "non-thinking", "first": "100.0% (step 5)", "last": "100.0% (step 5)"},
        {"what": "length", "mode": "thinking", "first": "9 (step 1)", "last": "9 (step 1)"},
    ]
    assert first_and_last([{"step": 1, "loss": 1.0}], MEASURES) == []


def card(base, dataset="openai/gsm8k", is_adapter=False):
    return model_card("child", Lineage(base, dataset, "SFT", is_adapter, ["axk1"]), {"updates": "9"}, HISTORY, MEASURES)


def test_a_card_of_names_on_the_hub():
    of_model, of_adapter = card("org/parent"), card("org/parent", is_adapter=True)
    said = of_model.data.to_dict()
    assert (said["base_model"], said["base_model_relation"]) == ("org/parent", "finetune")
    assert (said["datasets"], said["library_name"], said["tags"]) == ("openai/gsm8k", "transformers", ["axk1"])
    assert of_adapter.data.base_model_relation == "adapter" and of_adapter.data.library_name == "peft"
    for line in ("| base model | `org/parent` |", "| relation | finetune |", "| dataset | `openai/gsm8k` |", "| updates | 9 |"):
        assert line in of_model.text
    assert "| right | thinking | 25.0% (step 1) | 50.0% (step 9) |" in of_model.text


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
def test_paths_and_families_are_told_but_not_as_names_of_the_hub(tmp_path, monkeypatch, relative):
    """The Hub refuses a card whose base_model or datasets are none of its own."""
    (tmp_path / "runs/parent").mkdir(parents=True)
    (tmp_path / "runs/rows.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    # runs/parent could be a name of the Hub too.
    folder = Path("runs") if relative else tmp_path / "runs"
    made = card(str(folder / "parent"), str(folder / "rows.jsonl"))
    assert not {"base_model", "base_model_relation", "datasets"} & made.data.to_dict().keys()
    assert "| base model | `parent` |" in made.text and "| dataset | `rows.jsonl` |" in made.text
    assert str(tmp_path) not in str(made)
    drawn = card("", "reasoning-gym:chain_sum,leg_counting")
    assert "datasets" not in drawn.data.to_dict() and "| dataset | `reasoning-gym:chain_sum,leg_counting` |" in drawn.text
    assert "| base model | not named |" in drawn.text


def test_a_folders_own_card_says_whose_child_it_is(tmp_path):
    (tmp_path / "README.md").write_text("---\nbase_model: org/grandparent\nlicense: mit\nlanguage: ko\ntags: [x]\n---\n# P\n")
    said = card(str(tmp_path)).data.to_dict()
    assert (said["base_model"], said["license"], said["language"]) == ("org/grandparent", "mit", "ko")
    assert said["tags"] == ["axk1"]
    # `axk1 push` reads it on.
    pushed = metadata("org/child", {}, said, CardSettings(), {}).to_dict()
    assert (pushed["base_model"], pushed["base_model_relation"], pushed["license"]) == ("org/grandparent", "finetune", "mit")


@pytest.mark.parametrize("adapter", [False, True], ids=["model", "adapter"])
def test_the_saved_folder_and_the_pushed_one_carry_our_card(tmp_path, monkeypatch, adapter):
    """Neither TRL's card nor PEFT's, which both write one of their own on the way."""
    tokenizer = train_tokenizer(["user assistant one two three 1 2 3"], 300)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "parent")
    tokenizer.save_pretrained(tmp_path / "parent")
    uploaded = []

    class Hub:
        def upload_folder(self, folder_path, **options):
            uploaded.append((Path(folder_path) / "README.md").read_text())

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    def name_it(self, token=None):
        self.hub_model_id = "me/child"

    monkeypatch.setattr(ThinkFusionTrainer, "init_hf_repo", name_it)
    settings = ThinkFusionConfig(
        str(tmp_path / "out"), max_steps=2, logging_steps=1, save_steps=1, use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False, disable_tqdm=True, push_to_hub=True, hub_model_id="me/child", hub_strategy="end",
        per_device_train_batch_size=4,
    )  # fmt: skip
    rows = build_mode_overlap(make_row([{"role": "user", "content": str(n)}], "2", "one") for n in range(4))
    trainer = ThinkFusionTrainer(
        str(tmp_path / "parent"), settings, train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(target_modules=["o_proj"], task_type="CAUSAL_LM") if adapter else None,
    )  # fmt: skip
    train_and_save(trainer, "openai/gsm8k")
    saved = ModelCard.load(tmp_path / "out/README.md")
    assert saved.content == uploaded[-1].replace("\r\n", "\n")
    assert "# child" in saved.text and "| base model | `parent` |" in saved.text
    assert f"| relation | {'adapter' if adapter else 'finetune'} |" in saved.text
    assert saved.data.datasets == "openai/gsm8k" and {"trl", "sft", "think-fusion"} <= set(saved.data.tags)
    last = [log for log in trainer.state.log_history if "loss_thinking" in log][-1]
    assert f"{last['loss_thinking']:.4g} (step {last['step']})" in saved.text
