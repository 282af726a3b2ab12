"""Does the trainer leave the control token out of the loss, count each mode's loss rightly, and build our class?"""

import json

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from modeling_axk1 import AxK1Config, AxK1ForCausalLM
from trainers.mode_overlap import make_row
from trainers.think_fusion import (
    NO_MODE,
    NON_THINKING,
    THINKING,
    ThinkFusionConfig,
    ThinkFusionTrainer,
    loss_by_mode,
    mode_of_tokens,
)
from trainers.tokenizer import train_tokenizer

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, **HEADS}
ROWS = [
    make_row([{"role": "user", "content": "2 + 2"}], "4", "two and two is four"),
    make_row([{"role": "user", "content": "2 + 2"}], "4"),
    make_row([{"role": "user", "content": "1 + 6"}], "7", "one more than six"),
    make_row([{"role": "user", "content": "1 + 6"}], "7"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["user assistant two four one six"], 300)


def axk1():
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 4}
    return AxK1ForCausalLM(AxK1Config.preset("nano", **sizes))


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48))


def trainer_of(model, tokenizer, folder, rows=ROWS, **settings):
    arguments = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "disable_tqdm": True, "learning_rate": 1e-3,
    }  # fmt: skip
    return ThinkFusionTrainer(
        model,
        ThinkFusionConfig(**(arguments | settings)),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
    )


@pytest.mark.parametrize("build", [axk1, llama])
def test_control_token_is_given_not_learned(build, tokenizer, tmp_path):
    trainer = trainer_of(build(), tokenizer, tmp_path)
    for row, source in zip(trainer.train_dataset, ROWS):
        trained = [token for token in row["labels"] if token != -100]
        first = next(place for place, label in enumerate(row["labels"]) if label != -100)
        thinking = source["chat_template_kwargs"]["enable_thinking"]
        assert tokenizer.decode(row["input_ids"][first - 1]) == ("<think>" if thinking else "</think>")
        assert tokenizer.decode(trained) == source["completion"][0]["content"] + "<|im_end|>\n"


@pytest.mark.parametrize("build", [axk1, llama])
def test_loss_of_each_mode_equals_a_hand_computation(build, tokenizer, tmp_path):
    trainer = trainer_of(build(), tokenizer, tmp_path, lr_scheduler_type="constant", learning_rate=0.0)
    expected = {"thinking": [], "non_thinking": []}
    with torch.no_grad():
        for row, source in zip(trainer.train_dataset, ROWS):
            log_probs = trainer.model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
            mode = "thinking" if source["chat_template_kwargs"]["enable_thinking"] else "non_thinking"
            expected[mode] += [-log_probs[i - 1, t].item() for i, t in enumerate(row["labels"]) if t != -100]
    trainer.train()
    logged = trainer.state.log_history[0]
    for mode, losses in expected.items():
        assert logged[f"loss_{mode}"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    count = {mode: len(losses) for mode, losses in expected.items()}
    assert logged["thinking_token_share"] == pytest.approx(count["thinking"] / sum(count.values()))
    # Together the two are the loss that TRL reports.
    share = logged["thinking_token_share"]
    together = share * logged["loss_thinking"] + (1 - share) * logged["loss_non_thinking"]
    assert together == pytest.approx(logged["loss"], rel=1e-4)


def test_losses_are_of_the_steps_since_the_last_log(tokenizer, tmp_path):
    every = trainer_of(llama(), tokenizer, tmp_path, max_steps=4, logging_steps=1)
    every.train()
    pairs = trainer_of(llama(), tokenizer, tmp_path, max_steps=4, logging_steps=2)
    pairs.train()
    single = [entry["loss_thinking"] for entry in every.state.log_history if "loss_thinking" in entry]
    double = [entry["loss_thinking"] for entry in pairs.state.log_history if "loss_thinking" in entry]
    # All four rows are in every batch, so the mean of two steps is the plain mean of their losses.
    assert double == pytest.approx([(single[0] + single[1]) / 2, (single[2] + single[3]) / 2], rel=1e-5)
    assert single[-1] < single[0]


def test_single_mode_data_logs_that_mode_only(tokenizer, tmp_path):
    trainer = trainer_of(llama(), tokenizer, tmp_path, rows=ROWS[1::2])
    trainer.train()
    logged = trainer.state.log_history[0]
    assert "loss_thinking" not in logged and logged["thinking_token_share"] == 0.0
    assert logged["loss_non_thinking"] == pytest.approx(logged["loss"], rel=1e-4)


def test_evaluation_logs_both_modes(tokenizer, tmp_path):
    trainer = trainer_of(llama(), tokenizer, tmp_path)
    trainer.evaluate(Dataset.from_list(ROWS))
    logged = trainer.state.log_history[-1]
    share = logged["eval_thinking_token_share"]
    together = share * logged["eval_loss_thinking"] + (1 - share) * logged["eval_loss_non_thinking"]
    assert together == pytest.approx(logged["eval_loss"], rel=1e-4)


def test_a_path_builds_our_class_and_what_is_saved_knows_its_control_tokens(tokenizer, tmp_path):
    axk1().save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    assert json.loads((tmp_path / "start/config.json").read_text())["architectures"] == ["AXK1ForCausalLM"]
    arguments = ThinkFusionConfig(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        model_init_kwargs={"attn_implementation": "eager"},
    )
    trainer = ThinkFusionTrainer(tmp_path / "start", arguments, train_dataset=Dataset.from_list(ROWS))
    assert type(trainer.model) is AxK1ForCausalLM
    assert trainer.model.config._attn_implementation == "eager" and trainer.model.dtype == torch.float32
    trainer.save_model(tmp_path / "out")
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens([saved.think_token_id, saved.end_think_token_id]) == ["<think>", "</think>"]


def test_a_tokenizer_without_control_tokens_is_refused(tokenizer, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])), eos_token="a")
    with pytest.raises(ValueError, match="<think>"):
        trainer_of(llama(), plain, tmp_path)


def test_modes_of_padded_and_packed_rows():
    think, end, pad = 1, 2, 0
    ids = torch.tensor([
        [9, think, 5, end, 6, pad, pad],  # a thinking row: the </think> that closes is no control token
        [9, 9, end, 6, 7, 7, 7],          # a direct row
        [9, think, 5, 9, end, 6, 6],      # packed: a thinking and a direct completion
        [9, 9, 9, 6, 6, 6, 6],            # no control token
        [think, 6, 6, 6, 6, 6, 6],        # trained from the very first token
    ])  # fmt: skip
    trained = torch.tensor([
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 1],
        [0, 0, 1, 0, 0, 1, 1],
        [0, 0, 0, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1],
    ]).bool()  # fmt: skip
    t, d, n = THINKING, NON_THINKING, NO_MODE
    assert mode_of_tokens(ids, ids.masked_fill(~trained, -100), think, end).tolist() == [
        [n, n, t, t, t, n, n],
        [n, n, n, d, d, d, d],
        [n, n, t, n, n, d, d],
        [n] * 7,
        [n] * 7,
    ]


def test_loss_sums():
    loss = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    modes = torch.tensor([[THINKING, NO_MODE, THINKING], [NON_THINKING, THINKING, NO_MODE]])
    assert loss_by_mode(loss, modes).tolist() == [[21.0, 3.0], [8.0, 1.0]]
