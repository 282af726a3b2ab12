"""Does the trainer leave the control token out of the loss, count each mode's loss rightly, and build our class?"""

import copy
import json

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from modeling_axk1 import AxK1Config, AxK1ForCausalLM
from tests.folders import full_disk
from tests.trainers.questions import ask
from trainers import think_fusion
from trainers.launching import find_checkpoint
from trainers.mode_overlap import make_row
from trainers.think_fusion import (
    NO_MODE,
    NON_THINKING,
    THINKING,
    ThinkFusionConfig,
    ThinkFusionTrainer,
    choose_packing,
    loss_by_mode,
    mode_of_tokens,
)
from trainers.tokenizer import CHAT_TEMPLATE, train_tokenizer

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


def qwen3():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, intermediate_size=48, head_dim=16))


def trainer_of(model, tokenizer, folder, rows=ROWS, probe_prompts=(), **settings):
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
        probe_prompts=probe_prompts,
    )


@pytest.mark.parametrize("build", [axk1, llama, qwen3])
def test_control_token_is_given_not_learned(build, tokenizer, tmp_path):
    trainer = trainer_of(build(), tokenizer, tmp_path)
    for row, source in zip(trainer.train_dataset, ROWS):
        trained = [token for token in row["labels"] if token != -100]
        first = next(place for place, label in enumerate(row["labels"]) if label != -100)
        thinking = source["chat_template_kwargs"]["enable_thinking"]
        assert tokenizer.decode(row["input_ids"][first - 1]) == ("<think>" if thinking else "</think>")
        assert tokenizer.decode(trained) == source["completion"][0]["content"] + "<|im_end|>\n"


@pytest.mark.parametrize("build", [axk1, llama, qwen3])
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


def test_each_of_several_evaluation_sets_has_its_own_losses(tokenizer, tmp_path):
    trainer = trainer_of(llama(), tokenizer, tmp_path)
    whole, half = Dataset.from_list(ROWS), Dataset.from_list(ROWS[:2])
    alone = [
        ThinkFusionTrainer(llama(), trainer.args, processing_class=tokenizer, train_dataset=whole, eval_dataset=each).evaluate()
        for each in (whole, half)
    ]
    both = ThinkFusionTrainer(
        llama(), trainer.args, processing_class=tokenizer, train_dataset=whole, eval_dataset={"a": whole, "b": half}
    )
    found = both.evaluate()
    for name, truth in zip("ab", alone):
        for measure in ("loss_thinking", "loss_non_thinking", "thinking_token_share"):
            assert found[f"eval_{name}_{measure}"] == truth[f"eval_{measure}"]


def test_a_model_of_a_balance_loss_trains_without_it_which_is_said(tokenizer, tmp_path, caplog):
    plain = trainer_of(axk1(), tokenizer, tmp_path)
    plain.train()
    model = axk1()
    model.config.router_aux_loss_coef = 0.01
    trainer = trainer_of(model, tokenizer, tmp_path)
    trainer.train()
    assert [log["loss"] for log in trainer.state.log_history[:2]] == [log["loss"] for log in plain.state.log_history[:2]]
    assert "The balance loss (router_aux_loss_coef=0.01) is off" in caplog.text and model.config.router_aux_loss_coef == 0
    with pytest.raises(ValueError, match="router_aux_loss_coef=0.5 is TRL's balance loss, for softmax routers"):
        trainer_of(axk1(), tokenizer, tmp_path, router_aux_loss_coef=0.5)


def test_prediction_layers_that_do_not_train_are_said(tokenizer, tmp_path, caplog):
    model = AxK1ForCausalLM(AxK1Config.preset("nano", **SIZES, num_nextn_predict_layers=1))
    trainer_of(model, tokenizer, tmp_path)
    assert "The multi-token-prediction layers stay as they are" in caplog.text


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


# -- rows ---------------------------------------------------------------------------------------------------------
def many_rows(count=12):
    """Pairs of different lengths, all thinking rows before all direct ones."""
    thinking = [make_row(ask(f"{n} + 1"), "four", "one " * (3 * n + 1)) for n in range(count)]
    return thinking + [make_row(ask(f"{n} + 1"), "six " * (count - n)) for n in range(count)]


def batches_of(trainer):
    return [batch["input_ids"] for batch in trainer.get_train_dataloader()]


def test_paired_batches_hold_both_modes_of_their_prompts(tokenizer, tmp_path):
    trainer = trainer_of(llama(), tokenizer, tmp_path, many_rows(), pairing="paired")
    think, end = trainer.think_token_id, trainer.end_think_token_id
    batches = batches_of(trainer)
    assert len(batches) == 6
    for ids_BS in batches:
        prompts = {True: set(), False: set()}
        for ids in ids_BS.tolist():
            first = min(ids.index(tag) for tag in (think, end) if tag in ids)
            prompts[ids[first] == think].add(tuple(ids[:first]))
        assert prompts[True] == prompts[False] and len(prompts[True]) == 2


def test_pairs_stay_together_on_each_of_two_devices(tokenizer, tmp_path):
    trainer = trainer_of(llama(), tokenizer, tmp_path, many_rows(), pairing="paired")
    keys = trainer.train_dataset["prompt_key"]
    batches = BatchSampler(trainer._get_train_sampler(), batch_size=4, drop_last=False)
    seen = []
    for device in range(2):
        for batch in BatchSamplerShard(batches, num_processes=2, process_index=device):
            assert len({keys[row] for row in batch}) == len(batch) / 2 == 2
            seen += batch
    assert sorted(seen) == list(range(24))


@pytest.mark.parametrize(
    ("settings", "units"), [({}, 4), ({"pairing": "paired"}, 2), ({"gradient_accumulation_steps": 3}, 12)], ids=str
)
def test_the_rows_of_an_update_are_sorted_together(settings, units, tokenizer, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        think_fusion, "order_units", lambda of, lengths, step_units, generator: asked.append(step_units) or [0]
    )
    trainer_of(llama(), tokenizer, tmp_path, many_rows(), **settings)._get_train_sampler()
    assert asked == [units]


def test_grouped_by_length_is_the_default_and_pads_less(tokenizer, tmp_path):
    def padding(strategy):
        batches = batches_of(trainer_of(llama(), tokenizer, tmp_path, many_rows(), train_sampling_strategy=strategy))
        return sum((batch == tokenizer.pad_token_id).sum().item() for batch in batches)

    assert ThinkFusionConfig("x", use_cpu=True, bf16=False).train_sampling_strategy == "group_by_length"
    assert padding("group_by_length") < 0.5 * padding("random")


def test_thinking_ratio_is_the_share_of_rows(tokenizer, tmp_path):
    trainer = trainer_of(llama(), tokenizer, tmp_path, many_rows(), thinking_ratio=0.25)
    rows = [row for batch in batches_of(trainer) for row in batch.tolist()]
    assert len(rows) == 16 and sum(trainer.think_token_id in row for row in rows) == 4


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pairing": "paired"},
        {"thinking_ratio": 0.3},
        {"pairing": "paired", "train_sampling_strategy": "random", "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("build", [qwen3, axk1])
def test_resume_is_bit_identical(build, settings, tokenizer, tmp_path):
    # Twelve pairs in batches of four: epochs of four to six steps, so the checkpoint is inside the second.
    settings = {"max_steps": 9, "save_strategy": "steps", "save_steps": 8, "probe_steps": 2} | settings
    if "gradient_accumulation_steps" in settings:
        settings |= {"max_steps": 6, "save_steps": 5}
    settings |= {"probe_max_new_tokens": 3}
    straight = trainer_of(build(), tokenizer, tmp_path, many_rows(), probe_prompts=[ask("1 + 1")], **settings)
    straight.train()
    resumed = trainer_of(build(), tokenizer, tmp_path, many_rows(), probe_prompts=[ask("1 + 1")], **settings)
    before = {name: tensor.clone() for name, tensor in resumed.model.state_dict().items()}
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{settings['save_steps']}"))
    truth = straight.model.state_dict()
    assert any(not torch.equal(before[name], truth[name]) for name in truth)
    assert all(torch.equal(tensor, truth[name]) for name, tensor in resumed.model.state_dict().items())
    last = {"loss_thinking", "loss_non_thinking", "thinking_token_share"}
    logs = [[log for log in each.state.log_history if "loss" in log][-1] for each in (straight, resumed)]
    assert {key: logs[0].get(key) for key in last} == {key: logs[1].get(key) for key in last}


def test_a_finished_training_trains_no_further(tokenizer, tmp_path):
    # Eight steps end inside the second epoch of six.
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 8}
    finished = trainer_of(llama(), tokenizer, tmp_path, many_rows(), **settings)
    finished.train()
    again = trainer_of(llama(), tokenizer, tmp_path, many_rows(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    truth = finished.model.state_dict()
    assert again.state.global_step == 8
    assert all(torch.equal(tensor, truth[name]) for name, tensor in again.model.state_dict().items())


class Killed(BaseException):
    """Nothing that a trainer would catch."""


def test_a_checkpoint_half_written_over_anothers_is_not_taken_for_whole(tokenizer, tmp_path, monkeypatch):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer_of(llama(), tokenizer, tmp_path, **settings).train()
    anew = trainer_of(llama(), tokenizer, tmp_path, seed=1, **settings)
    anew.args.resume_from_checkpoint = "latest"
    assert find_checkpoint(anew.args) == str(tmp_path / "checkpoint-1")

    def die(folder):
        raise Killed

    monkeypatch.setattr(anew, "_save_optimizer_and_scheduler", die)
    with pytest.raises(Killed):
        anew.train()
    assert find_checkpoint(anew.args) is None


@pytest.mark.parametrize("room", [0.5, 1.2], ids=["no weights", "no optimizer"])
def test_a_full_disk_is_said(tokenizer, tmp_path, room):
    model = llama()
    room_bytes = int(room * sum(4 * parameter.numel() for parameter in model.parameters()))
    trainer = trainer_of(model, tokenizer, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(OSError, match="The checkpoint of step 1 could not be written to .*where the disk is full, make room"):
        with full_disk(room_bytes):
            trainer.train()


def test_overlong_prompts_leave_in_both_modes_and_are_counted(tokenizer, tmp_path):
    with pytest.warns(UserWarning, match=r"4 of 24 train rows are longer than max_length=45 .*4 prompts.*16 rows stay"):
        trainer = trainer_of(llama(), tokenizer, tmp_path, many_rows(), max_length=45)
    assert len(trainer.train_dataset) == 16 and max(trainer.train_dataset["length"]) <= 45
    assert sum(mode == THINKING for mode in trainer.train_dataset["mode"]) == 8
    with pytest.raises(ValueError, match="0 rows stay. Raise max_length"):
        trainer_of(llama(), tokenizer, tmp_path, many_rows(), max_length=5)


def test_rows_without_a_mode_are_named(tokenizer, tmp_path):
    rows = [ROWS[0], {**ROWS[1], "chat_template_kwargs": None}]
    with pytest.raises(ValueError, match="1 of 2 train rows, e.g. row 1, have no enable_thinking"):
        trainer_of(llama(), tokenizer, tmp_path, rows)


@pytest.mark.parametrize("missing", [None, []])
@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_rows_without_a_prompt_or_a_completion_are_named(tokenizer, tmp_path, column, missing):
    with pytest.raises(ValueError, match=f"1 of 3 train rows, e.g. row 2, have no {column}"):
        trainer_of(llama(), tokenizer, tmp_path, [*ROWS[:2], ROWS[0] | {column: missing}])


def test_a_dataset_without_rows_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="The train dataset has no rows"):
        trainer_of(llama(), tokenizer, tmp_path, [])
    args = trainer_of(llama(), tokenizer, tmp_path).args
    rows = Dataset.from_list(ROWS)
    with pytest.raises(ValueError, match="The eval dataset has no rows"):
        ThinkFusionTrainer(
            llama(), args, processing_class=tokenizer, train_dataset=rows, eval_dataset=rows.select([])
        )


def test_rows_without_a_column_prompt_are_refused(tokenizer, tmp_path):
    for rows in ([{"text": "two and two is four"}], [{"completion": row["completion"]} for row in ROWS]):
        with pytest.raises(ValueError, match=f"The train rows have no column prompt, only {min(rows[0])}, which do not say"):
            trainer_of(llama(), tokenizer, tmp_path, rows)


def test_rows_of_prompts_alone_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="The train rows have no column completion"):
        trainer_of(llama(), tokenizer, tmp_path, [{"prompt": row["prompt"]} for row in ROWS])


def test_whole_conversations_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="The train rows are conversations in a column messages, which do not say their mode"):
        trainer_of(llama(), tokenizer, tmp_path, [{"messages": row["prompt"] + row["completion"]} for row in ROWS])
    with pytest.raises(ValueError, match="in a column conversations"):
        trainer_of(llama(), tokenizer, tmp_path, [{"conversations": [{"from": "human", "value": "two"}]}] * 2)


def test_prompts_in_one_mode_only_are_counted_or_refused(tokenizer, tmp_path):
    rows = [*ROWS, make_row(ask("alone"), "four", "one")]
    with pytest.warns(UserWarning, match="1 of 3 prompts are in one mode only"):
        trainer_of(llama(), tokenizer, tmp_path, rows)
    trainer = trainer_of(llama(), tokenizer, tmp_path, ROWS + rows[-1:], pairing="paired")
    with pytest.raises(ValueError, match="1 of 3 prompts do not have as many thinking as direct rows"):
        trainer.get_train_dataloader()


def test_unknown_tags_are_counted(tokenizer, tmp_path):
    tagged = [make_row(ask("2 + 2"), "four", "<reasoning>two</reasoning>"), *ROWS[1:]]
    with pytest.warns(UserWarning, match="1 of 4 train rows, e.g. row 0, have a tag .* no control token here and"):
        trainer = trainer_of(llama(), tokenizer, tmp_path, tagged)
    assert len(trainer.train_dataset) == 4


def test_a_template_that_renders_modes_in_another_way_is_refused(tokenizer, tmp_path):
    # As Qwen3's does: the thought is opened by the model, a direct answer follows an empty thought.
    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and enable_thinking %}<think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
    )
    with pytest.raises(ValueError, match="4 of 4 train rows, e.g. row 0, do not begin their completion right behind"):
        trainer_of(qwen3(), other, tmp_path)
    # One mode's control token for both.
    other.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}</think>{% endif %}{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n</think>{% endif %}"
    )
    with pytest.raises(ValueError, match="2 of 4 train rows, e.g. row 0, do not begin"):
        trainer_of(qwen3(), other, tmp_path)
    other.chat_template = CHAT_TEMPLATE
    trainer_of(qwen3(), other, tmp_path)


def test_an_empty_thought_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="1 of 1 train rows.*or a thought is empty"):
        trainer_of(llama(), tokenizer, tmp_path, [make_row(ask("q"), "four", "")])


HISTORY = [*ask("one"), {"role": "assistant", "content": "two two</think>six"}, *ask("four")]


def test_thoughts_of_the_history_are_dropped_or_kept(tokenizer, tmp_path):
    def rendered(policy, rows):
        trainer = trainer_of(llama(), tokenizer, tmp_path, rows, history_thoughts=policy)
        row = trainer.train_dataset[0]
        first = next(place for place, label in enumerate(row["labels"]) if label != -100)
        return tokenizer.decode(row["input_ids"][:first]).removeprefix(
            "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
        )

    rows = [make_row(HISTORY, "six", "one one")]
    end = "<|im_end|>\n<|im_start|>user\nfour<|im_end|>\n<|im_start|>assistant\n<think>"
    assert rendered("drop", rows) == "</think>six" + end
    assert rendered("keep", rows) == "<think>two two</think>six" + end
    written_apart = [{"role": "assistant", "content": "six", "reasoning_content": "two two"}]
    rows = [make_row([HISTORY[0], *written_apart, HISTORY[2]], "six", "one one")]
    assert rendered("drop", rows) == "</think>six" + end
    assert rendered("keep", rows) == "<think>two two</think>six" + end


def test_a_template_that_cannot_keep_thoughts_is_refused(tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.chat_template = CHAT_TEMPLATE.replace("keep_history_thoughts or ", "")
    with pytest.raises(ValueError, match="1 of 1 train rows, e.g. row 0, have thoughts in their history"):
        trainer_of(llama(), other, tmp_path, [make_row(HISTORY, "six", "one")], history_thoughts="keep")


def test_thoughts_between_tool_calls_of_the_running_turn_stay(tokenizer, tmp_path):
    calls = [*ask("one"), {"role": "assistant", "content": "two</think>six"}, {"role": "tool", "content": "four"}]
    trainer = trainer_of(llama(), tokenizer, tmp_path, [make_row(calls, "six", "one")])
    assert "<think>two</think>six" in tokenizer.decode(trainer.train_dataset[0]["input_ids"])


@pytest.mark.parametrize("spell", [list, json.dumps], ids=["list", "JSON"])
def test_each_row_shows_its_own_tools(tokenizer, tmp_path, spell):
    tools = [{"name": "add", "two": 1}, {"name": "add", "four": 1}]
    rows = [row | {"tools": spell([tool])} for row, tool in zip(ROWS, [tools[0]] * 2 + [tools[1]] * 2)]
    trainer = trainer_of(llama(), tokenizer, tmp_path, [*rows, make_row(ask("six"), "six") | {"tools": None}])
    shown = [tokenizer.decode(ids) for ids in trainer.train_dataset["input_ids"]]
    assert [[json.dumps(tool) in text for text in shown] for tool in tools] == [
        [True, True, False, False, False],
        [False, False, True, True, False],
    ]
    assert "# Tools" not in shown[4]


def test_a_prompt_without_a_user_stays_as_it_is(tokenizer, tmp_path):
    chat = [{"role": "system", "content": "one"}, {"role": "assistant", "content": "two</think>six"}]
    trainer = trainer_of(llama(), tokenizer, tmp_path, [make_row(chat, "six", "one")])
    assert tokenizer.decode(trainer.train_dataset[0]["input_ids"]).count("<|im_start|>") == 3


def test_packed_rows_train_the_same_tokens(tokenizer, tmp_path):
    with pytest.warns(UserWarning, match="packing=True with sdpa attention: a packed row costs the square"):
        packed = trainer_of(llama(), tokenizer, tmp_path, many_rows(), packing=True, max_length=64)
    padded = trainer_of(llama(), tokenizer, tmp_path, many_rows(), max_length=64)
    assert not padded.args.packing and len(packed.train_dataset) < len(padded.train_dataset)
    count = [sum(label != -100 for row in each.train_dataset for label in row["labels"]) for each in (packed, padded)]
    assert count[0] == count[1] > 0


@pytest.mark.parametrize(
    ("attention", "settings", "expected"),
    [
        ("flash_attention_2", {}, True),
        ("kernels-community/vllm-flash-attn3", {}, True),
        ("sdpa", {}, False),
        ("flash_attention_2", {"pairing": "paired"}, False),
        ("flash_attention_2", {"thinking_ratio": 0.5}, False),
        ("flash_attention_2", {"max_length": None}, False),
        ("flash_attention_2", {"packing": False}, False),
    ],
)
def test_packing_where_it_costs_nothing(attention, settings, expected):
    arguments = ThinkFusionConfig("x", use_cpu=True, bf16=False, **settings)
    choose_packing(arguments, attention)
    assert arguments.packing is expected


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"pairing": "both"}, "pairing='both' does not exist"),
        ({"history_thoughts": "cut"}, "history_thoughts='cut' does not exist"),
        ({"thinking_ratio": 1.5}, "thinking_ratio=1.5 is not a share"),
        ({"thinking_ratio": 0.5, "pairing": "paired"}, "paired batches are half thinking"),
        ({"pairing": "paired", "per_device_train_batch_size": 3}, "=3 cannot hold whole pairs"),
        ({"pairing": "paired", "packing": True}, "packing mixes rows"),
        ({"pairing": "paired", "train_sampling_strategy": "sequential"}, "'sequential' has its own order"),
    ],
)
def test_settings_that_contradict_each_other(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        ThinkFusionConfig("x", use_cpu=True, bf16=False, **settings)


# -- the probe ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("build", [axk1, qwen3])
def test_probe_is_logged_and_changes_nothing(build, tokenizer, tmp_path):
    settings = {"max_steps": 4, "logging_steps": 1, "probe_steps": 2, "probe_max_new_tokens": 4}
    probed = trainer_of(build(), tokenizer, tmp_path, probe_prompts=[ask("2 + 2"), ask("1")], **settings)
    probed.train()
    plain = trainer_of(build(), tokenizer, tmp_path, **settings)
    plain.train()
    logs = [log for log in probed.state.log_history if "loss" in log]
    assert ["probe_format_error_thinking" in log for log in logs] == [False, True, False, True]
    for log in (logs[1], logs[3]):
        for mode in ("thinking", "non_thinking"):
            assert 0 <= log[f"probe_format_error_{mode}"] <= 1 and 0 < log[f"probe_tokens_{mode}"] <= 4
    # An untrained model does not end its answers: cut at four tokens, both of both modes.
    assert logs[1]["probe_truncation_thinking"] == logs[1]["probe_truncation_non_thinking"] == 1.0
    twin = plain.model.state_dict()
    assert all(torch.equal(tensor, twin[name]) for name, tensor in probed.model.state_dict().items())
    with pytest.raises(ValueError, match="probe_steps=3 is no multiple of logging_steps=2"):
        trainer_of(build(), tokenizer, tmp_path, probe_prompts=[ask("1")], probe_steps=3, logging_steps=2)
    never = settings | {"probe_steps": 0, "max_steps": 1}
    silent = trainer_of(build(), tokenizer, tmp_path, probe_prompts=[ask("1")], **never)
    silent.train()
    assert not any("probe_format_error_thinking" in log for log in silent.state.log_history)


@pytest.mark.parametrize(("says", "thinking_error"), [("</think>", 1.0), ("<|im_end|>", 1.0), ("four", 0.0)])
def test_probe_reads_the_models_own_answers(says, thinking_error, tokenizer, tmp_path):
    """A model that only ever says one thing: a closed thought, the end, or a word (which never ends)."""
    model = llama()
    trainer = trainer_of(model, tokenizer, tmp_path, probe_prompts=["2 + 2", "1"], probe_max_new_tokens=4)
    model.lm_head = torch.nn.Linear(SIZES["hidden_size"], SIZES["vocab_size"])
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data = 9.0 * (torch.arange(SIZES["vocab_size"]) == tokenizer(says).input_ids[0])
    measured = trainer.probe()
    assert measured["probe_format_error_thinking"] == thinking_error
    assert measured["probe_format_error_non_thinking"] == (says == "</think>")
    assert measured["probe_truncation_thinking"] == (says != "<|im_end|>")
    assert measured["probe_tokens_thinking"] == (1.0 if says == "<|im_end|>" else 4.0)
