"""Does `axk1 sft` train from its example config, resume, attach LoRA, read what users have, and refuse what it cannot?"""

import json
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file

import axk1
from conversion import merge_adapter
from modeling_axk1 import AxK1ForCausalLM
from modeling_axk1.quantization_axk1 import is_packed
from recipes import think_fusion_sft
from tests.folders import full_disk, on_disk
from tests.random_models import tiny_chat_config
from tests.trainers.questions import ask
from trainers import sft
from trainers.adapters import ParamWrapper
from trainers.mode_overlap import build_mode_overlap, make_row, save_mode_overlap
from trainers.tokenizer import CHAT_TEMPLATE, train_tokenizer

CONFIGS = Path(think_fusion_sft.__file__).parent / "configs"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model, and rows to train and to test on."""
    folder = tmp_path_factory.mktemp("sft")
    tokenizer = train_tokenizer(["user assistant one two three four after comes 0 1 2 3 4 5 6 7 8 9"], 310)
    torch.manual_seed(0)
    AxK1ForCausalLM(tiny_chat_config(len(tokenizer))).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = build_mode_overlap(make_row(ask(f"{n} + 1"), str(n + 1), f"after {n} comes") for n in range(10))
    save_mode_overlap(rows[:16], folder / "mod.jsonl")
    save_mode_overlap(rows[16:], folder / "test.jsonl")
    return folder


def settings(files, out, *more):
    return [
        "--config", str(CONFIGS / "sft_cpu.yaml"), "--model_name_or_path", str(files / "model"),
        "--dataset", str(files / "mod.jsonl"), "--test_dataset", str(files / "test.jsonl"), "--output_dir", str(out),
        "--max_steps", "4", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--save_steps", "2",
        "--warmup_steps", "1", "--lr_scheduler_kwargs", '{"num_decay_steps": 1}', "--disable_tqdm", "true",
        "--probe_steps", "2", "--probe_max_new_tokens", "3", *more,
    ]  # fmt: skip


def test_the_cpu_config_trains_resumes_and_shows(files, tmp_path, capsys, caplog):
    trainer = sft.run_sft(settings(files, tmp_path / "straight", "--eval_strategy", "steps", "--eval_steps", "2"))
    assert trainer.args.pairing == "paired" and trainer.state.global_step == 4
    said = capsys.readouterr().out
    assert "8 prompts, 8 thinking rows and 8 non-thinking ones" in said
    assert "held-out loss of each mode" in said and "format error on the probe prompts" in said
    page = (tmp_path / "straight/report.html").read_text()
    assert page.count("<svg") == 5 and "http" not in page
    start = on_disk(files / "model")
    truth = on_disk(tmp_path / "straight")
    assert any(not torch.equal(start[name], truth[name]) for name in start)

    # Killed at the fourth step, while it saved: the half checkpoint is passed over, the end is the same.
    sft.run_sft(settings(files, tmp_path / "killed"))
    (tmp_path / "killed/checkpoint-4/trainer_state.json").unlink()
    (tmp_path / "killed/model.safetensors").unlink()
    capsys.readouterr()
    resumed = sft.run_sft(settings(files, tmp_path / "killed"))
    assert "checkpoint-4 has no whole trainer_state.json: its saving was interrupted; passed over." in caplog.text
    assert resumed.state.global_step == 4
    again = on_disk(tmp_path / "killed")
    assert again.keys() == truth.keys() and all(torch.equal(again[name], truth[name]) for name in truth)


def test_a_full_disk_at_the_end_is_one_line(files, tmp_path, capsys, monkeypatch):
    save = sft.ThinkFusionTrainer.save_model

    def without_room(self, folder):
        with full_disk(10_000):
            save(self, folder)

    monkeypatch.setattr(sft.ThinkFusionTrainer, "save_model", without_room)
    assert axk1.main(["sft", *settings(files, tmp_path, "--max_steps", "1", "--save_strategy", "no")]) == 2
    assert "axk1: The model could not be written to" in (said := capsys.readouterr().err) and "make room" in said


def test_lora_saves_an_adapter_leaves_the_model_and_resumes(files, tmp_path):
    experts = ["--lora_targets", "attention", "routed", "--lora_dropout", "0"]
    given = settings(files, tmp_path / "lora", "--use_peft", "true", "--lora_r", "4", *experts)
    trainer = sft.run_sft(given)
    assert (tmp_path / "lora/adapter_config.json").exists() and not (tmp_path / "lora/model.safetensors").exists()
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert type(trainer.model.get_submodule("base_model.model.model.layers.1.mlp.experts")) is ParamWrapper
    adapter = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    assert {name.split(".lora_")[0].split(".layers.1.")[-1] for name in adapter if ".layers.1." in name} == {
        "mlp.experts", "mlp.experts.base_layer", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj", "self_attn.o_proj",
        "self_attn.q_a_proj", "self_attn.q_b_proj",
    }  # fmt: skip
    assert any("probe_format_error_thinking" in log for log in trainer.state.log_history)
    (tmp_path / "lora/checkpoint-4/trainer_state.json").unlink()
    sft.run_sft(given)
    again = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert again.keys() == adapter.keys() and all(torch.equal(again[name], adapter[name]) for name in adapter)


def test_qlora_trains_routed_experts_and_merges_into_the_unquantised_model(files, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    more = ["--use_peft", "true", "--lora_targets", "routed", "--lora_dropout", "0", "--load_in_4bit", "true"]
    trainer = sft.run_sft(settings(files, tmp_path / "qlora", *more, "--probe_prompts", "0"))
    wrapper = trainer.model.get_submodule("base_model.model.model.layers.1.mlp.experts")
    assert type(wrapper) is ParamWrapper and is_packed(wrapper.get_base_layer())
    merge_adapter(files / "model", tmp_path / "qlora", tmp_path / "merged", progress=False)
    before, after = on_disk(files / "model"), on_disk(tmp_path / "merged")
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in before if ".mlp.experts." in name}


@pytest.mark.parametrize("name", ["sft_1gpu", "sft_8gpu"])
def test_gpu_configs_hold_settings_that_exist(name, monkeypatch):
    arguments, config, model = sft.parse(["--config", str(CONFIGS / f"{name}.yaml"), "--use_cpu", "true"])
    assert arguments.think_fusion_template and config.pairing == "paired" and config.bf16
    assert config.max_length == 2048 and config.resume_from_checkpoint == "latest"
    assert model.use_peft == (name == "sft_1gpu") and model.model_name_or_path.startswith("Qwen/")


def test_gsm8k_and_foreign_templates_as_they_stand(files, tmp_path, monkeypatch):
    lines = [{"question": f"{n} + 1", "answer": f"after {n}\n#### {n + 1}"} for n in range(4)]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, lines)))
    seen = {}

    class Stop(Exception):
        pass

    def stop(model, config, **kwargs):
        seen.update(kwargs)
        raise Stop

    monkeypatch.setattr(sft, "ThinkFusionTrainer", stop)
    with pytest.raises(Stop):
        sft.run_sft(
            settings(files, tmp_path, "--dataset", str(tmp_path / "gsm8k.jsonl"), "--think_fusion_template", "true")
        )
    assert [row["completion"][0]["content"] for row in seen["train_dataset"]][:2] == ["after 0</think>1", "1"]
    assert seen["processing_class"].chat_template == CHAT_TEMPLATE
    assert seen["probe_prompts"] == [ask("8 + 1"), ask("9 + 1")] and seen["peft_config"] is None


def test_defects_stop_it_before_it_trains(files, tmp_path):
    # The test rows are among the training rows.
    leak = settings(files, tmp_path, "--test_dataset", str(files / "mod.jsonl"))
    with pytest.raises(ValueError, match="prompt of the held-out split: 16 rows"):
        sft.run_sft(leak)


def test_a_stage_of_one_mode_needs_no_pairs(files):
    rows = load_dataset("json", data_files=str(files / "mod.jsonl"), split="train")
    sft.check(rows.select(range(0, 16, 2)), None, len)
    with pytest.raises(ValueError, match="prompt in one mode only: 1 rows"):
        sft.check(rows.select(range(15)), None, len)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--dataset", "x"], "No model is named"),
        (["--dataset", "x", "--model_name_or_path", "m", "--eval_strategy", "epoch"], "nothing to evaluate on"),
        (["--dataset", "x", "--thinking_ratio", "2"], "thinking_ratio=2.0 is not a share"),
    ],
)
def test_settings_that_cannot_work(given, complaint):
    with pytest.raises(ValueError, match=complaint):
        sft.parse([*given, "--output_dir", "o", "--use_cpu", "true", "--bf16", "false"])


def test_it_pushes_if_asked(files, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(sft.ThinkFusionTrainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(sft.ThinkFusionTrainer, "push_to_hub", lambda self, **kwargs: pushed.append(kwargs))
    monkeypatch.setattr(sft.ThinkFusionTrainer, "train", lambda self, **kwargs: None)
    more = ["--push_to_hub", "true", "--save_strategy", "no", "--hub_model_id", "me/model"]
    sft.run_sft(settings(files, tmp_path / "pushed", *more))
    # Once for saving the final model, once asked by us, as in TRL's own script.
    assert {"dataset_name": str(files / "mod.jsonl")} in pushed


def test_the_readable_twin_trains(files, tmp_path):
    trainer = think_fusion_sft.main(
        ["--model", str(files / "model"), "--out", str(tmp_path / "twin"), "--problems", "40", "--steps", "1"]
    )
    assert trainer.state.global_step == 1 and (tmp_path / "twin/mod.jsonl").exists()
    assert AxK1ForCausalLM.from_pretrained(tmp_path / "twin")
