"""Do sampled answers become sound pairs, is every refusal counted, and does an interrupted sampling go on?"""

import pytest
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from tests.scripted_model import ScriptedModel
from trainers.mode_overlap import validate_mode_overlap
from trainers.mode_sampling import sample_mode_overlap, sample_rows
from trainers.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["one two three four user assistant"], 300)
THINK, END, STOP = TOKENIZER.convert_tokens_to_ids(["<think>", "</think>", "<|im_end|>"])
PROMPTS = [[{"role": "user", "content": f"question {n}"}] for n in range(6)]


def ids(text):
    return TOKENIZER(text).input_ids


def model_of(*scripts):
    return ScriptedModel(scripts, STOP, TOKENIZER.pad_token_id)


THINKING = [
    [*ids("one two"), END, *ids("4"), STOP],
    [*ids("one two")],  # never ends
    [*ids("one"), STOP],  # never closes its thought
    [END, *ids("4"), STOP],  # thinks nothing
    [*ids("three"), END, *ids("5"), STOP],
    [*ids("four"), END, *ids("6"), STOP],
]
DIRECT = [[*ids("four"), STOP]] * 5 + [[END, *ids("6"), STOP]]


def test_two_models_give_sound_pairs_and_every_refusal_is_counted(capsys):
    settings = {"max_new_tokens": 9, "batch_size": 4, "is_correct": lambda number, answer: answer != "5"}
    with pytest.warns(UserWarning, match="0 prompts that have only a thinking.*4 that have only a direct.*1 pairs"):
        rows = sample_mode_overlap(PROMPTS[:5], model_of(*THINKING), model_of(*DIRECT), TOKENIZER, **settings)
    assert [row["completion"][0]["content"] for row in rows] == ["one two</think>4", "four"]
    assert rows[0]["prompt"] == PROMPTS[0] and validate_mode_overlap(rows).defects == {}
    said = capsys.readouterr().out
    for count in (
        "1 of 5 kept",
        "1 truncated",
        "1 with a format error",
        "1 with an empty thought or answer",
        "1 judged wrong",
    ):
        assert count in said
    assert "non-thinking: 5 of 5 kept\n" in said


def test_a_tag_in_a_direct_answer_is_refused():
    # Without progress nothing is printed, but what is left out is still told.
    with pytest.warns(UserWarning, match="non-thinking: 5 of 6 kept, 1 with a format error"):
        rows = sample_rows(model_of(*DIRECT), TOKENIZER, PROMPTS, thinking=False, max_new_tokens=9, progress=False)
    assert [row["prompt"] for row in rows] == PROMPTS[:5]


def test_a_tokenizer_that_splits_the_tags_is_refused():
    bytes_only = Tokenizer(models.BPE(vocab={char: place for place, char in enumerate(ByteLevel.alphabet())}, merges=[]))
    bytes_only.pre_tokenizer = ByteLevel(add_prefix_space=False)
    split = PreTrainedTokenizerFast(tokenizer_object=bytes_only, chat_template=TOKENIZER.chat_template)
    with pytest.raises(ValueError, match="the tokenizer has no single token for <think>"):
        sample_rows(model_of(*DIRECT), split, PROMPTS, thinking=False, max_new_tokens=9)


def test_an_interrupted_sampling_goes_on_where_it_was(tmp_path):
    def sample(model, prompts=PROMPTS, **settings):
        settings = {"max_new_tokens": 9, "batch_size": 2, "progress": False} | settings
        return sample_rows(model, TOKENIZER, prompts, thinking=True, journal=tmp_path / "sampled.jsonl", **settings)

    truth = sample_rows(model_of(*THINKING), TOKENIZER, PROMPTS, thinking=True, max_new_tokens=9, progress=False)
    dying = model_of(*THINKING[:4])
    with pytest.raises(IndexError):
        sample(dying)
    with (tmp_path / "sampled.jsonl").open("a") as file:
        file.write('{"thought": "half a li')
    rest = model_of(*THINKING[4:])
    assert sample(rest) == truth and len(truth) == 3
    assert len(rest.asked) == 2 and sample(model_of()) == truth
    with pytest.raises(ValueError, match="holds another sampling"):
        sample(model_of(), max_new_tokens=8)
    with pytest.raises(ValueError, match="holds another sampling"):
        sample(model_of(), PROMPTS[::-1])
