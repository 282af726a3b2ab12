"""Does the Mode-Overlap Dataset come out paired, and does its validator catch each defect?"""

import warnings

import pytest

from trainers.mode_overlap import build_mode_overlap, make_row, split_completion, validate_mode_overlap


def ask(text):
    return [{"role": "user", "content": text}]


def say(text, **more):
    return [{"role": "assistant", "content": text, **more}]


THINKING = [
    {"prompt": ask("2+2"), "completion": say("two and two</think>4")},
    {"prompt": ask("3+3"), "completion": say("6", reasoning_content="three twice")},
]


def test_cut_variant_pairs_every_prompt():
    rows = build_mode_overlap(THINKING)
    assert [row["chat_template_kwargs"]["enable_thinking"] for row in rows] == [True, False, True, False]
    assert [row["completion"][0]["content"] for row in rows] == [
        "two and two</think>4", "4", "three twice</think>6", "6",
    ]  # fmt: skip
    assert rows[0]["prompt"] == rows[1]["prompt"] == ask("2+2")
    report = validate_mode_overlap(rows)
    assert report.defects == {} and report.prompts == 2
    assert report.rows_per_mode == {"thinking": 2, "non-thinking": 2}
    report.require_sound()


def test_text_prompts_carry_their_control_token():
    rows = build_mode_overlap([{"prompt": "Q: 2+2 A:<think>", "completion": "<think>two and two</think>4"}])
    assert [row["prompt"] for row in rows] == ["Q: 2+2 A:<think>", "Q: 2+2 A:</think>"]
    assert [row["completion"] for row in rows] == ["two and two</think>4", "4"]
    assert validate_mode_overlap(rows).defects == {}


def test_join_keeps_common_prompts_and_tells_what_it_left_out():
    direct = [
        {"prompt": ask("2+2"), "completion": say("It is 4.")},
        {"prompt": ask("2+2"), "completion": say("again")},
        {"prompt": ask("9+9"), "completion": say("18")},
    ]
    expected = "1 prompts that have only a thinking.*1 that have only a direct.*1 rows.*1 pairs"
    with pytest.warns(UserWarning, match=expected):
        rows = build_mode_overlap(THINKING, direct)
    assert [row["completion"][0]["content"] for row in rows] == ["two and two</think>4", "It is 4."]


def test_nothing_is_warned_about_when_nothing_is_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_mode_overlap(THINKING)


@pytest.mark.parametrize("text", ["no closing tag", "a</think>b</think>c", "<think>a<think>b</think>c"])
def test_malformed_thinking_completion_raises(text):
    with pytest.raises(ValueError, match="one </think>"):
        split_completion(text)


def test_completion_of_two_messages_raises():
    with pytest.raises(ValueError, match="one assistant message"):
        build_mode_overlap([{"prompt": ask("q"), "completion": say("a</think>b") + say("c")}])


def pair(question="q", thinking="thought</think>answer", direct="answer"):
    return [
        {"prompt": ask(question), "completion": say(thinking), "chat_template_kwargs": {"enable_thinking": True}},
        {"prompt": ask(question), "completion": say(direct), "chat_template_kwargs": {"enable_thinking": False}},
    ]


DEFECTS = {
    "prompt in one mode only": pair()[:1],
    "tag in a direct answer": pair(direct="</think>answer"),
    "thinking completion that does not close its thought exactly once": pair(thinking="a</think>b</think>c"),
    "empty thought": pair(thinking="  </think>answer"),
    "empty answer": pair(direct=" "),
    "duplicate of an earlier row": pair() + pair()[:1],
    "prompt of the held-out split": pair(question="test question"),
    "chat_template_kwargs without a true or false enable_thinking": [
        *pair(),
        {**pair()[0], "chat_template_kwargs": None},
    ],
    "text prompt without its mode's control token at the end": [
        {**row, "prompt": "q<think>", "completion": row["completion"][0]["content"]} for row in pair()
    ],
}


@pytest.mark.parametrize("name", DEFECTS)
def test_each_defect_is_found_alone_and_shown(name):
    report = validate_mode_overlap(DEFECTS[name], held_out=[ask("test question")])
    assert list(report.defects) == [name]
    with pytest.raises(ValueError, match="has defects") as raised:
        report.require_sound()
    assert name in str(raised.value) and '"prompt"' in str(raised.value)


@pytest.mark.parametrize("thinking", ["thought", "<think>a</think>b"])
def test_missing_and_doubled_tags_are_malformed(thinking):
    defects = validate_mode_overlap(pair(thinking=thinking)).defects
    assert "thinking completion that does not close its thought exactly once" in defects


def test_leak_is_found_whatever_control_token_ends_the_prompt():
    rows = [make_row("q<think>", "a", "t"), make_row("q", "a")]
    assert list(validate_mode_overlap(rows, held_out=["q</think>"]).defects) == ["prompt of the held-out split"]


def test_token_share():
    rows = pair(thinking="aaa</think>b", direct="bbbb")
    report = validate_mode_overlap(rows, count_tokens=lambda text: len(text.replace("</think>", "")))
    assert report.tokens_per_mode == {"thinking": 4, "non-thinking": 4}
    assert report.thinking_token_share == 0.5
