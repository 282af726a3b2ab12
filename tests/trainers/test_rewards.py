"""Is an output worth what its mode's rules say, whatever the tags decode to, and is no failure of a judge silent?"""

import json
import logging
import math

import pytest
import reasoning_gym
import torch

from trainers.rewards import (
    Tokens,
    checked,
    correct_reward,
    find_judge,
    format_reward,
    has_spread,
    judge_math,
    judge_reasoning_gym,
    judge_text,
)
from trainers.tokenizer import train_tokenizer

THINK, END, STOP = 1, 2, 3
TOKENS = Tokens(THINK, END, frozenset({STOP}))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["user assistant 1 2 3 4 so it is"], 300)


# thinking?, completion (9 is an answer token, 8 another one), R_correct where 9 is right, R_format
TABLE = [
    (True, [7, END, 9, STOP], 1.0, 0.0),
    (True, [9, END, 8, STOP], -1.0, 0.0),  # the right answer in the thought only
    (True, [7, END, 9], -1.0, 0.0),  # cut by the length limit: no answer yet, no format broken yet
    (True, [7, 9], -1.0, 0.0),  # cut within the thought
    (True, [9, STOP], -1.0, -1.0),  # never closed
    (True, [7, END, 9, END, STOP], -1.0, -1.0),  # closed twice
    (True, [THINK, 7, END, 9, STOP], -1.0, -1.0),  # opened again
    (True, [END, 9, STOP], 1.0, 0.0),  # an empty thought keeps the format
    (False, [9, STOP], 1.0, 0.0),
    (False, [8, STOP], -1.0, 0.0),
    (False, [7, END, 9, STOP], -1.0, -1.0),  # thinks where it should answer
    (False, [THINK, 9], -1.0, -1.0),  # cut, and broken already
    (False, [STOP], -1.0, 0.0),  # an empty answer
]


class Ids:
    """A tokenizer that shows ids, so that a judge sees exactly what it is given."""

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))


@pytest.mark.parametrize(("thinking", "completion", "correct", "format_"), TABLE)
def test_rewards_of_each_case(thinking, completion, correct, format_):
    seen = []

    def judge(answer, row):
        seen.append(answer)
        return answer == "9"

    columns = {"completion_ids": [completion], "thinking": [thinking]}
    assert correct_reward(judge, Ids(), TOKENS)(**columns) == [correct]
    assert format_reward(TOKENS)(**columns) == [format_]
    # The judge sees the answer and nothing else: no thought, no tag, no stop token.
    assert all(not {"7", "1", "2", "3"} & set(answer.split()) for answer in seen)
    assert not (seen and format_), "an output of broken format has no answer to judge"


def test_tags_that_are_special_tokens_count_all_the_same(tokenizer):
    special = train_tokenizer(["user assistant 1 2 3 4"], 300)
    special.add_special_tokens(
        {"additional_special_tokens": ["<think>", "</think>"]}, replace_extra_special_tokens=False
    )
    ids = special("so</think>4").input_ids + [special.eos_token_id]
    assert "</think>" not in special.decode(ids, skip_special_tokens=True), "vacuous: the tag is still to be seen"
    tokens = Tokens(*special.convert_tokens_to_ids(["<think>", "</think>"]), frozenset({special.eos_token_id}))
    rows = {"completion_ids": [ids, ids], "thinking": [True, False], "prompts": ["a", "b"], "answer": ["4", "4"]}
    assert correct_reward(judge_text, special, tokens)(**rows) == [1.0, -1.0]
    assert format_reward(tokens)(**rows) == [0.0, -1.0]


def test_the_judge_reads_its_own_row():
    rows = []
    columns = {"completion_ids": [[9, STOP]] * 2, "thinking": [False] * 2, "prompts": ["p", "q"], "answer": ["a", "b"]}
    judge = correct_reward(lambda answer, row: rows.append(row) or True, Ids(), TOKENS)
    judge(**columns, completions=["with its thought"] * 2, trainer_state=object())
    assert rows == [{"prompt": p, "answer": a, "thinking": False} for p, a in zip("pq", "ab")]


@pytest.mark.parametrize("verdict", [math.nan, None, 0.5, "yes", ZeroDivisionError("by zero"), torch.ones(2)], ids=repr)
def test_a_judge_that_fails_is_named_or_skipped_aloud(verdict, caplog):
    def shaky(answer, row):
        if row["prompt"] == "fine":
            return True
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    columns = {"completion_ids": [[9, STOP]] * 2, "thinking": [False] * 2, "prompts": ["fine", "hard one"]}
    with pytest.raises(ValueError, match="judge shaky .* row 1 of the batch, prompt 'hard one'.*reward_errors=skip"):
        correct_reward(shaky, Ids(), TOKENS)(**columns)
    with caplog.at_level(logging.WARNING):
        first, second = correct_reward(shaky, Ids(), TOKENS, on_error="skip")(**columns)
    assert first == 1.0 and math.isnan(second) and "hard one" in caplog.text
    with pytest.raises(ValueError, match="on_error='ignore'"):
        correct_reward(shaky, Ids(), TOKENS, on_error="ignore")


@pytest.mark.parametrize("verdict", [True, 1, 1.0, torch.tensor(True)], ids=repr)
def test_yes_may_be_said_in_any_type(verdict):
    assert correct_reward(lambda answer, row: verdict, Ids(), TOKENS)(completion_ids=[[9, STOP]], thinking=[False]) == [
        1
    ]


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="thinking holds 'slow'"):
        format_reward(TOKENS)(completion_ids=[[9]], thinking=["slow"])


def test_a_shaping_reward_is_checked_but_may_say_none(caplog):
    def bonus(completion_ids, values, **columns):
        return [value / scale for value, scale in values]

    good = {"completion_ids": [[9], [9]], "prompts": ["p", "q"]}
    assert checked(lambda **columns: [None, 0.5])(**good) == [None, 0.5]
    assert checked(bonus)(values=[(1, 2), (1, 4)], **good) == [0.5, 0.25] and checked(bonus).__name__ == "bonus"
    with pytest.raises(ValueError, match="bonus returned nan for row 1 of the batch, prompt 'q'"):
        checked(bonus)(values=[(1, 2), (math.nan, 4)], **good)
    with pytest.raises(ValueError, match="bonus failed with ZeroDivisionError"):
        checked(bonus)(values=[(1, 2), (1, 0)], **good)
    with pytest.raises(ValueError, match="<lambda> failed with ValueError: could not convert string to float: 'good'"):
        checked(lambda **columns: ["good", 1.0])(**good)
    counted = []
    skipping = checked(bonus, on_error="skip")
    with caplog.at_level(logging.WARNING):
        assert skipping(values=[(1, 2), (math.inf, 4)], log_metric=lambda *pair: counted.append(pair), **good) == [
            0.5,
            None,
        ]
    assert counted == [("bonus/failed", 1)] and "bonus returned inf" in caplog.text


def test_what_cannot_be_called_is_refused_before_any_answer():
    with pytest.raises(ValueError, match="The judge must be a function of .answer, row., got 'math'"):
        correct_reward("math", Ids(), TOKENS)
    with pytest.raises(ValueError, match="A shaping reward must be a function .* got 3"):
        checked(3)


def test_spread_is_what_a_loop_says():
    groups = [[1, 1, 1], [-1, -1, -1], [-2, -2, -1], [1, -1, 1], [1, 1, 1 + 1e-7], [1, math.nan, -1], [-2, -2, -2]]
    expected = []
    for group in groups:
        unlike = any(abs(a - b) > 1e-6 for a in group for b in group)
        expected.append(unlike and not any(math.isnan(value) for value in group))
    assert has_spread(torch.tensor(groups)).tolist() == expected == [False, False, True, True, False, False, False]


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("The answer is 72.", "48 / 2 = 24 and so on\n#### 72", True),
        ("72.0", "72", True),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"$x = 3$", "3", True),
        ("1,234", "1234", True),
        ("71", "72", False),
        ("", "72", False),
        ("}}{{ $ not maths \\frac", "72", False),
        ("$2x + 2x$", "4x", True),
        ("4", "4x", False),
        (r"It is $\frac{2}{4}$.", r"\boxed{\frac{1}{2}}", True),
    ],
)
def test_math_verify_judges_the_answer(answer, gold, right):
    assert judge_math(answer, {"answer": gold}) is right
    assert judge_math(answer, {"solution": gold}) is right


def test_a_row_that_cannot_be_judged_is_an_error():
    with pytest.raises(ValueError, match="cannot parse the dataset's own answer"):
        judge_math("4", {"answer": ""})
    with pytest.raises(ValueError, match="no column answer or solution, only prompt"):
        judge_math("4", {"prompt": "2 + 2"})
    with pytest.raises(ValueError, match="no column entry"):
        judge_reasoning_gym("4", {"prompt": "2 + 2"})


@pytest.mark.parametrize("family", ["chain_sum", "color_cube_rotation"])
def test_reasoning_gym_judges_by_its_own_verifier(family):
    for entry in reasoning_gym.create_dataset(family, seed=1, size=5):
        for form in (entry, json.dumps(entry)):
            assert judge_reasoning_gym(entry["answer"], {"entry": form}) is True
            assert judge_reasoning_gym(f"{entry['answer']} or so", {"entry": form}) is False, "partial credit"


def test_judges_by_name_and_by_import():
    assert find_judge("math") is judge_math
    assert find_judge("trainers.rewards:judge_text") is judge_text
    for name in ("maths", "trainers.rewards:judge_nothing", "no_such_module:judge", "trainers.rewards:SPREAD"):
        with pytest.raises(ValueError, match=f"judge='{name}'"):
            find_judge(name)
