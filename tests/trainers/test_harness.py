"""Does lm-evaluation-harness, through our wrapper, judge the answer and never the thought?"""

import json
from functools import partial

import pytest
import torch

from tests.scripted_model import ScriptedModel
from trainers.tokenizer import train_tokenizer

pytest.importorskip("lm_eval", reason="the eval extra is not installed")

from trainers import harness  # noqa: E402
from trainers.harness import TwoModeLM, cut_at, evaluate_harness_task  # noqa: E402

TOKENIZER = train_tokenizer(["one two three four user assistant Question Answer"], 320)
THINK, END, STOP = TOKENIZER.convert_tokens_to_ids(["<think>", "</think>", "<|im_end|>"])
GENERATE = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {file}}}
test_split: train
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: {metric}
"""


def ids(text):
    return TOKENIZER(text).input_ids


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    # Reading the harness's own thousands of task files takes seconds.
    monkeypatch.setattr(harness, "TaskManager", partial(harness.TaskManager, include_defaults=False))

    def write(answers, kind="generate_until", metric="exact_match", more=""):
        rows = [{"question": f"Question {n}", "answer": answer} for n, answer in enumerate(answers)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        text = GENERATE.format(file=tmp_path / "rows.jsonl", kind=kind, metric=metric) + more
        (tmp_path / "tiny.yaml").write_text(text)
        return str(tmp_path)

    return write


def judge(model, include_path, thinking, **settings):
    settings = {"max_new_tokens": 9, "batch_size": 4} | settings
    return evaluate_harness_task(model, TOKENIZER, "tiny", thinking=thinking, include_path=include_path, **settings)


def test_task_files_are_read_once_for_tasks_and_modes(tasks, monkeypatch):
    read, kind = [], harness.TaskManager

    def counted(include_path):
        read.append(include_path)
        return kind(include_path=include_path)

    monkeypatch.setattr(harness, "TaskManager", counted)
    path = tasks(["four"])
    for thinking, script in ((True, [*ids("one"), END, *ids("four"), STOP]), (False, [*ids("four"), STOP])):
        assert judge(ScriptedModel([script], STOP, 0), path, thinking).scores == [1.0]
    assert read == [path]


def test_the_answer_is_judged_and_an_unfinished_thought_is_wrong(tasks):
    scripts = [
        [*ids("one"), END, *ids("four"), STOP],  # right
        [*ids("four"), END, *ids("two"), STOP],  # right in the thought only
        [*ids("four four")],  # never ends: the harness's own wrapper would take it for the answer
        [*ids("four"), STOP],  # never closes its thought
        [*ids("one two"), END, *ids("four three"), STOP],  # right up to the stop string
    ]
    path = tasks(["four"] * 5, more='generation_kwargs: {until: [" three", "one"], max_gen_toks: 2}\n')
    found = judge(ScriptedModel(scripts, STOP, TOKENIZER.pad_token_id), path, True)
    assert found.scores == [1.0, 0.0, 0.0, 0.0, 1.0] and found.metric == "exact_match,none"
    assert found.result.accuracy == 0.4 and found.result.format_error == 0.2 and found.result.truncation == 0.2
    assert [len(reading.thought_ids) for reading in found.readings][0] == len(ids("one"))


def test_no_answer_is_wrong_even_where_the_metric_likes_silence(tasks):
    scripts = [[*ids("four four")], [*ids("one"), END, STOP]]
    found = judge(ScriptedModel(scripts, STOP, TOKENIZER.pad_token_id), tasks(["", ""]), True)
    # Both say nothing, which here is right; only the second said so.
    assert found.scores == [0.0, 1.0]


def test_prompts_end_in_the_modes_control_token_and_settings_are_ours(tasks):
    for thinking, tag in ((True, THINK), (False, END)):
        model = ScriptedModel([[*ids("four"), STOP]] * 2, STOP, TOKENIZER.pad_token_id)
        found = judge(model, tasks(["four", "one"]), thinking, temperature=0.6, do_sample=True)
        assert [row[-1] for row in model.asked] == [tag, tag] and "Question 1" in TOKENIZER.decode(model.asked[1])
        assert model.settings[0] == {"do_sample": True, "temperature": 0.6, "max_new_tokens": 9}
        assert found.scores == ([0.0, 0.0] if thinking else [1.0, 0.0])


class Favourite(ScriptedModel):
    """Likes one token after `</think>`, another everywhere else."""

    def __init__(self, liked, otherwise, scripts=()):
        super().__init__(scripts, STOP, TOKENIZER.pad_token_id)
        self.liked, self.otherwise = liked, otherwise

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, len(TOKENIZER))
        logits[..., self.otherwise] = 2.0
        logits[input_ids == END] = torch.nn.functional.one_hot(torch.tensor(self.liked), len(TOKENIZER)) * 3.0
        return type("Output", (), {"logits": logits})


CHOICES = 'doc_to_choice: ["1", "4"]\ntarget_delimiter: ""\n'


def test_choices_are_scored_behind_the_closed_thought(tasks):
    path = tasks([1, 0, 1], kind="multiple_choice", metric="acc", more=CHOICES)
    [four], [one] = ids("4"), ids("1")
    direct = judge(Favourite(four, one), path, False)
    assert direct.scores == [1.0, 0.0, 1.0] and direct.result.tokens_per_answer == 0
    scripts = [[*ids("two"), END], [*ids("two"), END], [*ids("two two two")]]
    thinking = judge(Favourite(four, one, scripts), path, True)
    # The third thought does not end: wrong, though the choice would be right.
    assert thinking.scores == [1.0, 0.0, 0.0] and thinking.result.truncation == pytest.approx(1 / 3)
    assert thinking.readings[0].thought_ids == ids("two")


def test_likelihood_of_a_choice_is_the_sum_over_its_tokens():
    [four], [one] = ids("4"), ids("1")
    speaker = TwoModeLM(Favourite(four, one), TOKENIZER, False, 9, 4, lambda n: None, {})
    first, later = torch.zeros(2, len(TOKENIZER))
    first[four], later[one] = 3.0, 2.0
    score, greedy = speaker._score([*ids("Question"), END], "41")
    expected = first.log_softmax(-1)[four] + later.log_softmax(-1)[one]
    assert ids("41") == [four, one] and score == pytest.approx(expected.item(), abs=1e-5) and greedy
    assert not speaker._score([*ids("Question"), END], "14")[1]


@pytest.mark.parametrize(
    ("text", "stops", "left"),
    [("a b c", ["c", "b"], "a "), ("a b c", [], "a b c"), ("a b", "b", "a "), ("a", ["", "x"], "a")],
)
def test_cut_at(text, stops, left):
    assert cut_at(text, stops) == left


def test_tasks_without_answers_are_refused(tasks):
    speaker = TwoModeLM(ScriptedModel([], STOP, 0), TOKENIZER, True, 9, 4, lambda n: None, {})
    with pytest.raises(ValueError, match="perplexity task"):
        speaker.loglikelihood_rolling([])
    with pytest.raises(ValueError, match="begins the answer"):
        speaker.apply_chat_template([], add_generation_prompt=False)


def test_a_task_that_does_not_exist_is_named(tasks):
    asked = {"thinking": True, "max_new_tokens": 9, "include_path": tasks(["1"])}
    with pytest.raises(ValueError, match="has no task 'nothing'; `lm-eval ls tasks` lists them"):
        evaluate_harness_task(ScriptedModel([], STOP, 0), TOKENIZER, "nothing", **asked)
