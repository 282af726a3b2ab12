"""Does the Mode-Overlap Dataset come out paired, and does its validator catch each defect?"""

import json
import warnings

import pytest

from tests.trainers.questions import ask
from trainers.mode_overlap import (
    MESSAGE_FEATURES,
    TEXT_FEATURES,
    build_mode_overlap,
    gsm8k_row,
    load_mode_overlap,
    make_row,
    save_mode_overlap,
    split_completion,
    to_dataset,
    validate_mode_overlap,
)


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


@pytest.mark.parametrize("row", [{"prompt": None}, {"prompt": []}, {"prompt": [{"content": "q"}]}, {"prompt": ["q"]}])
def test_a_prompt_that_is_none_is_an_error(row):
    with pytest.raises(ValueError, match="A prompt must be"):
        build_mode_overlap([{"completion": say("a</think>b")} | row])


@pytest.mark.parametrize("completion", [None, [], ["a"], say(None), [{"role": "assistant"}]], ids=repr)
def test_a_completion_that_is_none_is_an_error(completion):
    with pytest.raises(ValueError, match="A completion must be"):
        build_mode_overlap([{"prompt": ask("q"), "completion": completion}])


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
    "message that is no object with a role": [*pair(), {**pair()[0], "prompt": [{"content": "q"}], "completion": ["a"]}],
    "unknown tag": pair(thinking="<thinking>a</think>b"),
    "prompt and completion not both text or both messages": [*pair(), {**pair()[0], "completion": "text"}],
    "completion that is not one assistant message": [*pair(), {**pair()[0], "completion": say("a") + say("b")}],
    "completion without a text content": [*pair(), {**pair()[0], "completion": say(None)}],
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


def test_rows_of_any_type_are_reported_rather_than_fallen_over():
    strange = [{"chat_template_kwargs": "thinking"}, {"prompt": 3, "completion": 4}, {"prompt": {}, "completion": {"a": 1}}, {}]
    report = validate_mode_overlap([*pair(), *({**pair()[0], **row} for row in strange)])
    assert report.defects == {
        "chat_template_kwargs without a true or false enable_thinking": [2],
        "prompt and completion not both text or both messages": [3, 4],
        "duplicate of an earlier row": [5],
    }
    assert report.rows_per_mode == {"thinking": 2, "non-thinking": 1} and "row 4" in str(report)


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


def test_a_leak_with_other_blanks_and_capitals_is_a_leak():
    assert (
        "prompt of the held-out split"
        in validate_mode_overlap(pair("What  is 2+2"), held_out=[ask("what is 2+2")]).defects
    )


def test_report_counts_and_shows_three_rows_of_a_defect():
    shown = str(validate_mode_overlap([row for n in range(5) for row in pair(f"q{n}", direct=" ")]))
    assert "empty answer: 5 rows" in shown and shown.count("  row ") == 3 and "  row 1: " in shown and "q2" in shown


def test_gsm8k_lines_become_pairs():
    line = {"question": "Clips?", "answer": "48/2 = <<48/2=24>>24 in May.\n48+24 = <<48+24=72>>72 in all.\n#### 72"}
    thinking, direct = build_mode_overlap([gsm8k_row(line)])
    assert thinking["prompt"] == direct["prompt"] == ask("Clips?")
    assert thinking["completion"] == say("48/2 = 24 in May.\n48+24 = 72 in all.</think>72")
    assert direct["completion"] == say("72")
    for line in ({"question": "q", "answer": "72"}, {"question": "q", "answer": None}, {"question": 1, "answer": "#### 1"}):
        with pytest.raises(ValueError, match="ends in '#### '"):
            gsm8k_row(line)


def test_gsm8k_lines_without_their_mark_are_left_out_and_counted(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    answers = ["#### 1", "one", None, "two\n#### 2"]
    path.write_text("".join(json.dumps({"question": f"q{n}", "answer": a}) + "\n" for n, a in enumerate(answers)))
    with pytest.warns(UserWarning, match=r"Left out: 2 of 4 rows, which are no question .* \(rows 2, 3\)"):
        rows = load_mode_overlap(path)
    assert [row["prompt"][0]["content"] for row in rows] == ["q0", "q0", "q3", "q3"]
    path.write_text(json.dumps({"question": "q", "answer": "one"}))
    with pytest.raises(ValueError, match="ends in '#### ' and a number, got"):
        load_mode_overlap(path)


HISTORY = [*ask("1+1"), *say("2", reasoning_content="one and one"), *ask("and 1 more")]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("rows", "features"),
    [
        (build_mode_overlap(THINKING) + [make_row(HISTORY, "3", "two and one")], MESSAGE_FEATURES),
        (build_mode_overlap([{"prompt": "2+2<think>", "completion": "a</think>4"}]), TEXT_FEATURES),
    ],
    ids=["messages", "texts"],
)
def test_saved_rows_load_as_they_were(tmp_path, rows, features, suffix):
    path = save_mode_overlap(rows, tmp_path / f"mod{suffix}")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    loaded = load_mode_overlap(path)
    assert loaded.features == features
    expected = to_dataset(rows).to_list()
    assert loaded.to_list() == expected and validate_mode_overlap(loaded).rows_per_mode["thinking"] > 0
    if features is MESSAGE_FEATURES:
        # A thought in the history is written out, as the chat template reads it.
        assert expected[-1]["prompt"][1]["content"] == "one and one</think>2"
    # A folder with a data file is what a Hub dataset is.
    assert load_mode_overlap(tmp_path).to_list() == expected


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tools": []}, r"row 1 has \['tools'\]"),
        ({"completion": "text"}, "row 1 mixes text and messages"),
        ({"chat_template_kwargs": {"enable_thinking": True, "x": 1}}, r"row 1 has \['x'\]"),
        (
            {"prompt": [{"role": "assistant", "content": "", "tool_calls": [1]}]},
            r"row 1 has a message with \['tool_calls'\]",
        ),
    ],
)
def test_what_the_schema_cannot_hold_is_refused(tmp_path, change, complaint):
    rows = pair()
    with pytest.raises(ValueError, match=complaint):
        save_mode_overlap([rows[0], rows[1] | change], tmp_path / "mod.jsonl")
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="neither .jsonl nor .parquet"):
        save_mode_overlap(pair(), tmp_path / "mod.csv")
    with pytest.raises(ValueError, match="does not exist"):
        load_mode_overlap(tmp_path / "mod.jsonl")
    (tmp_path / "mod.jsonl").write_text('{"question": "q", "reply": "a"}\n')
    with pytest.raises(ValueError, match=r"columns \['question', 'reply'\]"):
        load_mode_overlap(tmp_path / "mod.jsonl")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "mod.jsonl holds no row"),
        ('{"prompt": "q<think>"}\n{nope', "mod.jsonl cannot be read as a table.*JSON"),
        ("\n".join(map(json.dumps, [*pair(), pair()[0] | {"prompt": "q"}])), "not of the Mode-Overlap schema"),
        (json.dumps(pair()[0] | {"completion": say("b", tools=1)}), "not of the Mode-Overlap schema"),
    ],
    ids=["empty", "malformed", "text and messages", "further keys"],
)
def test_a_file_that_is_no_table_is_an_error(tmp_path, text, complaint):
    (tmp_path / "mod.jsonl").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        load_mode_overlap(tmp_path / "mod.jsonl")


def test_thinking_rows_and_gsm8k_lines_are_paired_as_they_load(tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"question": "2+2", "answer": "two and two\n#### 4"}))
    (tmp_path / "thinking.jsonl").write_text(
        json.dumps({"prompt": ask("2+2"), "completion": say("two and two</think>4")})
    )
    expected = to_dataset(build_mode_overlap(THINKING[:1])).to_list()
    for name in ("gsm8k.jsonl", "thinking.jsonl"):
        assert load_mode_overlap(tmp_path / name).to_list() == expected
    to_dataset(build_mode_overlap(THINKING[:1])).save_to_disk(tmp_path / "saved")
    assert load_mode_overlap(tmp_path / "saved").to_list() == expected
