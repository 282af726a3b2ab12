"""Is every instruction asked in both modes, rendered to its control token, side by side, in an order that repeats?"""

import json
import logging

import pytest
from datasets import Dataset

from tests.trainers.questions import WORDS, ask, questions
from trainers.mode_prompts import PairedSampler, draw_instructions, pair_modes, render_prompt
from trainers.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([WORDS], 300)


def test_prompts_end_in_the_control_token_of_their_mode(tokenizer):
    for prompt in (ask("2"), "2 and", "2 and<think>", "2 and</think>"):
        for thinking, tag in ((True, "<think>"), (False, "</think>")):
            text = tokenizer.decode(render_prompt(tokenizer, prompt, thinking))
            assert text.endswith(tag) and text.count("think>") == 1
    rendered = tokenizer.apply_chat_template(
        ask("2"), add_generation_prompt=True, enable_thinking=True, return_dict=True
    )
    assert render_prompt(tokenizer, ask("2"), True) == rendered["input_ids"]


def test_a_template_without_modes_gets_the_token_appended_and_a_foreign_one_is_refused():
    tokenizer = train_tokenizer(["user assistant"], 300)
    tokenizer.chat_template = "{{ messages[0].content }}\nassistant:"
    assert tokenizer.decode(render_prompt(tokenizer, ask("2"), False)) == "2\nassistant:</think>"
    # As some published templates end a direct turn.
    tokenizer.chat_template += "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    with pytest.raises(ValueError, match=r"non_thinking prompt ends in .*, not in </think>; use a tokenizer"):
        render_prompt(tokenizer, ask("2"), False)


TOOL = {"type": "function", "function": {"name": "add", "description": "two", "parameters": {}}}


@pytest.mark.parametrize("written", [[TOOL], json.dumps([TOOL])], ids=["list", "JSON"])
def test_tools_are_shown_by_the_chat_template_or_refused(tokenizer, written):
    rows = [{"prompt": ask("2"), "tools": written}, {"prompt": ask("3"), "tools": None}]
    paired = pair_modes(Dataset.from_list(rows), tokenizer, max_prompt_tokens=999)
    shown = [tokenizer.decode(ids) for ids in paired["prompt_ids"]]
    assert ['"name": "add"' in text for text in shown] == [True, True, False, False]
    assert [text.endswith("<think>") for text in shown] == [True, False] * 2
    with pytest.raises(ValueError, match="has tools, and it is a text"):
        pair_modes(Dataset.from_list([{"prompt": "2", "tools": written}]), tokenizer, max_prompt_tokens=999)
    blind = train_tokenizer([WORDS], 300)
    blind.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="the chat template leaves them out"):
        pair_modes(Dataset.from_list(rows), blind, max_prompt_tokens=999)


def test_a_tool_has_no_fields_of_anothers(tokenizer):
    rows = [{"prompt": ask("2"), "tools": [{"name": "add", field: {field: 1}}]} for field in ("two", "three")]
    paired = pair_modes(Dataset.from_list(rows), tokenizer, modes="thinking", max_prompt_tokens=999)
    for row, ids in zip(rows, paired["prompt_ids"]):
        assert json.dumps(row["tools"][0]) in tokenizer.decode(ids)


def test_every_instruction_is_there_in_both_modes_side_by_side(tokenizer):
    paired = pair_modes(Dataset.from_list(questions(3)), tokenizer, max_prompt_tokens=99)
    assert paired["thinking"] == [True, False] * 3 and paired["instruction"] == [0, 0, 1, 1, 2, 2]
    assert [row[0]["content"] for row in paired["prompt"]] == ["0", "0", "1", "1", "2", "2"]
    assert [tokenizer.decode(ids[-1:]) for ids in paired["prompt_ids"]] == ["<think>", "</think>"] * 3
    single = pair_modes(Dataset.from_list(questions(3)), tokenizer, modes="non-thinking", max_prompt_tokens=99)
    assert single["thinking"] == [False] * 3 and single["instruction"] == [0, 1, 2]


def test_long_prompts_are_left_out_in_both_modes_and_counted(tokenizer, caplog):
    rows = [*questions(2), {"prompt": ask("0 1 2 3 4 5 6 7 8 9"), "answer": "right"}]
    limit = len(render_prompt(tokenizer, ask("0"), True))
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        paired = pair_modes(Dataset.from_list(rows), tokenizer, max_prompt_tokens=limit)
    assert len(paired) == 4 and f"1 of 3 prompts are longer than {limit} tokens and left out" in caplog.text
    with pytest.raises(ValueError, match=f"3 of 3 prompts are longer than {limit - 1} tokens"):
        pair_modes(Dataset.from_list(rows), tokenizer, max_prompt_tokens=limit - 1)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"question": "2"}], "no column prompt, only question"),
        ([{"prompt": "2", "chat_template_kwargs": {"enable_thinking": True}}], "give each instruction once"),
        ([{"prompt": "2", "thinking": True}], "column thinking"),
        ([{"prompt": "2"}, {"prompt": None}], "A prompt must be a text or a list of messages"),
        ([{"prompt": ask("2"), "tools": "add, two"}], "tools holds 'add, two', no JSON .*; write the list of tools as JSON"),
        ([{"prompt": "2", "completions": ["3"]}], "The column completions means something else to TRL; rename it"),
        ([{"prompt": 2}], "A prompt must be a text or a list of messages"),
    ],
)
def test_rows_of_another_kind_are_refused(tokenizer, rows, complaint):
    with pytest.raises(ValueError, match=complaint):
        pair_modes(Dataset.from_list(rows), tokenizer, max_prompt_tokens=99)


def test_a_stream_is_refused(tokenizer):
    with pytest.raises(ValueError, match="IterableDataset; resampling needs a Dataset"):
        pair_modes(Dataset.from_list(questions(3)).to_iterable_dataset(), tokenizer, max_prompt_tokens=99)


# -- the order of prompts -----------------------------------------------------------------------------------------------
def test_one_mode_in_order_is_trls_own_sampler():
    from trl.trainer.utils import RepeatSampler

    ours = PairedSampler(7, modes=1, generations=3, batch=2, repeats=2, seed=None, epoch=lambda: 0)
    theirs = RepeatSampler(range(7), mini_repeat_count=3, batch_size=2, repeat_count=2, shuffle=False)
    assert list(ours) == list(theirs) and len(ours) == len(theirs) == len(list(ours))


def test_both_groups_of_an_instruction_share_a_batch_and_epochs_differ():
    epochs = []
    for epoch in (0, 1, 0):
        sampler = PairedSampler(8, modes=2, generations=3, batch=4, repeats=1, seed=5, epoch=lambda epoch=epoch: epoch)
        rows = list(sampler)
        assert len(rows) == len(sampler) == 48
        for start in range(0, 48, 24):
            batch = rows[start : start + 24]
            assert sorted(row // 2 for row in batch) == sorted([row // 2 for row in set(batch)] * 3)
            assert {row ^ 1 for row in batch} == set(batch), "an instruction in one mode only"
        epochs.append(rows)
    assert epochs[0] == epochs[2] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])


def test_drawn_instructions_repeat_by_key_and_avoid_the_asked():
    first = draw_instructions(50, 20, "a", asked=set(range(25)))
    assert (
        first == draw_instructions(50, 20, "a", asked=set(range(25))) != draw_instructions(50, 20, "b", set(range(25)))
    )
    assert len(set(first)) == 20 and min(first) >= 25
    # All are asked at last, none twice.
    assert sorted(draw_instructions(50, 50, "a", asked=set(range(25)))) == list(range(50))
    assert min(draw_instructions(50, 25, "a", asked=set(range(25)))) >= 25
