"""Are problems read from files as they stand, and is an answer judged as a person would?"""

import json

import pytest

from trainers.tasks import draw_reasoning_gym, read_jsonl_task, same_answer


@pytest.mark.parametrize(
    ("said", "right", "verdict"),
    [
        ("18", "18", True),
        ("She makes $18 every day.", "18", True),
        ("16 - 3 - 4 = 9, so 9 * 2 = 18.", "18", True),
        ("18 eggs, not 9", "18", False),  # the last number counts
        ("70,000", "70000", True),
        ("70000.0", "70,000", True),
        ("$1,234.50", "1234.5", True),
        ("minus -3", "-3", True),
        ("3", "-3", False),
        ("정답은-5", "-5", True),
        ("3-5", "5", True),
        ("3-5", "-5", False),
        ("from 10%-20%", "20", True),
        ("(4)-5 and x-5", "5", True),
        ("so x=-5.", "-5", True),
        ("8 - (-5), that is **-5**", "-5", True),
        ("_-5_", "-5", True),
        ("a loss: -$1,200", "-1200", True),
        ("-5", "-$5", True),
        ("\u22125", "-5", True),
        ("-5", "\u22125", True),
        ("no idea", "18", False),
        ("", "18", False),
        ("118", "18", False),
        ("Blue.", "blue", True),
        ("the  sky\nis blue", "The sky is blue", True),
        ("red", "blue", False),
        ("1 2\n3 4", "1 2\n3 4", True),
        ("1 2\n3 5", "1 2\n3 4", False),
        ("50%", "50", True),
        ("-", "-", True),
        ("+", "$-", False),
    ],
)
def test_same_answer(said, right, verdict):
    assert same_answer(said, right) is verdict


LINES = [
    {"question": "eggs?", "answer": "16 - 7 = 9 <<9*2=18>>\n#### 18"},
    {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "colour?"}], "answer": "blue"},
    {"question": "how many?", "answer": 7},
]


def test_gsm8k_and_other_lines(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in LINES))
    task = read_jsonl_task(path)
    assert task.name == "problems.jsonl"
    assert task.prompts == [
        [{"role": "user", "content": "eggs?"}],
        LINES[1]["prompt"],
        [{"role": "user", "content": "how many?"}],
    ]
    assert [task.is_correct(n, said) for n, said in enumerate(("It is 18", "Blue", "7"))] == [True] * 3
    assert [task.is_correct(n, said) for n, said in enumerate(("9", "18", "18"))] == [False] * 3
    assert len(read_jsonl_task(path, limit=2).prompts) == 2


@pytest.mark.parametrize(
    "line",
    [
        "no json", "[1]", '{"question": "q"}', '{"question": "", "answer": "a"}', '{"question": "q", "answer": null}',
        '{"question": 5, "answer": "a"}', '{"prompt": ["q"], "answer": "a"}', '{"prompt": [{"role": "user"}], "answer": "a"}',
        '{"prompt": {"role": "user", "content": "q"}, "answer": "a"}',
    ],  # fmt: skip
)
def test_a_line_that_is_no_problem_is_named(tmp_path, line):
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(LINES[0]) + "\n" + line)
    with pytest.raises(ValueError, match=r"problems.jsonl:2 "):
        read_jsonl_task(path)


def test_a_question_may_hold_a_line_separator_of_unicode(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "one\u2028two\x85?", "answer": "3"}\n', encoding="utf-8")
    [[message]] = read_jsonl_task(tmp_path / "a.jsonl").prompts
    assert message["content"] == "one\u2028two\x85?"


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no problem"):
        read_jsonl_task(tmp_path / "none.jsonl")


def test_reasoning_gym_judges_by_its_own_verifier():
    pytest.importorskip("reasoning_gym", reason="the eval extra is not installed")
    task = draw_reasoning_gym("color_cube_rotation", 5, seed=3)
    again, other = (draw_reasoning_gym("color_cube_rotation", 5, seed=seed) for seed in (3, 4))
    assert task.prompts == again.prompts != other.prompts and len(task.prompts) == 5
    colours = (
        "red",
        "green",
        "blue",
        "yellow",
        "orange",
        "white",
        "violet",
        "cyan",
        "magenta",
        "purple",
        "indigo",
        "gold",
        "silver",
        "pink",
        "brown",
        "gray",
        "black",
    )
    right = [[colour for colour in colours if task.is_correct(n, colour)] for n in range(5)]
    assert all(len(found) <= 1 for found in right) and any(right)
    with pytest.raises(ValueError, match="reasoning-gym has no such family"):
        draw_reasoning_gym("nonsense", 5, seed=0)
