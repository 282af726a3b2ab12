"""Is an output read by its mode's rules, and do the shares add up?"""

import pytest

from tests.scripted_model import ScriptedModel
from trainers.evaluation import Reading, evaluate_mode, read_output, summarise
from trainers.tokenizer import train_tokenizer

THINK, END, STOP, PAD = 1, 2, 3, 0
A, B, C = 10, 11, 12


def read(ids, thinking):
    return read_output(ids, thinking=thinking, think_id=THINK, end_think_id=END, stop_ids={STOP, 4})


@pytest.mark.parametrize(
    ("ids", "thought", "answer", "format_error", "truncated", "tokens"),
    [
        ([A, B, END, C, STOP, PAD, PAD], [A, B], [C], False, False, 5),
        ([A, B, END, C, 4], [A, B], [C], False, False, 5),  # any stop token stops
        ([END, C, STOP], [], [C], False, False, 3),  # an empty thought is closed
        ([A, END, STOP], [A], [], False, False, 3),  # an empty answer is wrong, not malformed
        ([A, B, STOP], [A, B], None, True, False, 3),  # stopped before closing
        ([A, END, B, END, C, STOP], [A], None, True, False, 6),  # closed twice
        ([THINK, A, END, C, STOP], [THINK, A], None, True, False, 5),  # opened again
        ([A, B, C], [A, B, C], None, False, True, 3),  # cut while thinking: truncated, not malformed
        ([A, END, C], [A], None, False, True, 3),  # cut while answering: half an answer is none
        ([A, END, B, END], [A], None, True, True, 4),  # broken before it was cut
        ([A, END, C, STOP, END, THINK], [A], [C], False, False, 4),  # what follows the stop does not count
        ([], [], None, False, True, 0),
    ],
)  # fmt: skip
def test_thinking_output(ids, thought, answer, format_error, truncated, tokens):
    assert read(ids, True) == Reading(thought, answer, format_error, truncated, tokens)


@pytest.mark.parametrize(
    ("ids", "answer", "format_error", "truncated", "tokens"),
    [
        ([C, STOP, PAD], [C], False, False, 2),
        ([END, C, STOP], None, True, False, 3),
        ([THINK, C, STOP], None, True, False, 3),
        ([A, END, C, STOP], None, True, False, 4),
        ([A, B], None, False, True, 2),
        ([STOP], [], False, False, 1),
    ],
)
def test_direct_output(ids, answer, format_error, truncated, tokens):
    assert read(ids, False) == Reading([], answer, format_error, truncated, tokens)


def test_summary_is_shares_of_all_problems():
    readings = [read([A, END, C, STOP], True), read([A, STOP], True), read([A, B, C], True), read([END, C, STOP], True)]
    result = summarise("thinking", readings, [True, False, False, False], elapsed_s=2.0)
    assert (result.accuracy, result.format_error, result.truncation) == (0.25, 0.25, 0.25)
    assert (result.tokens_per_answer, result.seconds_per_answer, result.problems) == (3.0, 0.5, 4)
    with pytest.raises(ValueError, match="4 readings and 1 verdicts"):
        summarise("thinking", readings, [True], elapsed_s=1.0)


@pytest.mark.parametrize("thinking", [True, False])
def test_both_modes_ask_with_their_control_token_and_judge_complete_answers_only(thinking):
    tokenizer = train_tokenizer(["one two three four user assistant"], 300)
    think, end, stop = tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<|im_end|>"])

    def ids(text):
        return tokenizer(text).input_ids

    right = [*ids("hm"), end, *ids("4"), stop] if thinking else [*ids("4"), stop]
    broken = [*ids("hm 4"), stop] if thinking else [end, *ids("4"), stop]
    cut = [*ids("4 4 4 4")]
    model = ScriptedModel([right, broken, cut], stop, tokenizer.pad_token_id).train()
    prompts = [[{"role": "user", "content": question}] for question in ("2+2", "one two three four", "x")]
    judged, counted = [], []
    result, readings, correct = evaluate_mode(
        model,
        tokenizer,
        prompts,
        lambda number, answer: judged.append((number, answer)) or answer == "4",
        thinking=thinking,
        max_new_tokens=9,
        batch_size=2,
        on_batch=counted.append,
    )
    assert judged == [(0, "4")] and correct == [True, False, False] and counted == [2, 1]
    assert result.mode == ("thinking" if thinking else "non-thinking")
    assert [reading.format_error for reading in readings] == [False, True, False]
    assert [reading.truncated for reading in readings] == [False, False, True]
    assert all(asked[-1] == (think if thinking else end) for asked in model.asked)
    assert "2+2" in tokenizer.decode(model.asked[0]) and tokenizer.pad_token_id not in model.asked[0]
    assert model.settings[0] == {"do_sample": False, "max_new_tokens": 9}
    assert model.training, "the mode of the model is put back"


def test_model_that_cannot_stop_is_refused():
    model = ScriptedModel([], None, 0)
    with pytest.raises(ValueError, match="eos_token_id is None"):
        evaluate_mode(model, train_tokenizer(["x"], 300), [], lambda *_: True, thinking=True, max_new_tokens=1)
