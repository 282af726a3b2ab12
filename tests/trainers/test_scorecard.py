"""Does the scorecard judge both modes, resume, refuse what it cannot read, and show what it measured?"""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import axk1
from trainers import scorecard
from trainers.evaluation import bootstrap_interval
from trainers.tokenizer import train_tokenizer

LINES = [{"question": f"{n} + 1", "answer": f"#### {n + 1}"} for n in range(3)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Not an A.X K1 model: any causal LM with the two tokens will do."""
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen3"
    tokenizer = train_tokenizer(["user assistant 1 2 3 + = the answer"], 300)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)))
    return str(path)


def run(checkpoint, tasks, out, **settings):
    settings = {"max_new_tokens": 5, "batch_size": 2, "device_map": "cpu"} | settings
    return scorecard.run_eval(str(checkpoint), tasks=tasks, out=out, **settings)


def test_files_and_families_in_both_modes_end_in_json_and_a_page(checkpoint, problems, tmp_path):
    pytest.importorskip("reasoning_gym", reason="the eval extra is not installed")
    rows = run(checkpoint, [problems, "reasoning-gym:color_cube_rotation"], tmp_path / "out", limit=2)
    assert [(row["task"], row["mode"], row["problems"]) for row in rows] == [
        ("problems.jsonl", "thinking", 2),
        ("problems.jsonl", "non-thinking", 2),
        ("reasoning-gym:color_cube_rotation", "thinking", 2),
        ("reasoning-gym:color_cube_rotation", "non-thinking", 2),
    ]
    # A random model does not end within five tokens: all is cut, and nothing that is cut is right.
    assert all(row["truncation"] == 1.0 and row["accuracy"] == 0.0 and row["tokens_per_answer"] == 5 for row in rows)
    written = json.loads((tmp_path / "out/results.json").read_text())
    assert written["results"] == rows and written["settings"]["limit"] == 2
    page = (tmp_path / "out/report.html").read_text()
    assert "100.0% [100.0%, 100.0%]" in page and "problems.jsonl" in page and "http" not in page
    assert not list((tmp_path / "out").glob("*.unfinished"))


def test_finished_tasks_are_kept_and_settings_do_not_mix(checkpoint, problems, tmp_path, monkeypatch):
    out = tmp_path / "out"
    rows = run(checkpoint, [problems], out, modes="no-think")
    assert len(rows) == 1
    monkeypatch.setattr(scorecard, "evaluate_mode", None)
    assert run(checkpoint, [problems], out, modes="no-think") == rows
    with pytest.raises(TypeError):
        run(checkpoint, [problems], out, modes="think")
    with pytest.raises(ValueError, match="holds numbers of other settings"):
        run(checkpoint, [problems], out, max_new_tokens=6)
    # Trained on in its place, a model has other numbers, too.
    trained = tmp_path / "trained"
    shutil.copytree(checkpoint, trained)
    monkeypatch.undo()
    run(trained, [problems], tmp_path / "second", modes="no-think")
    os.utime(trained / "model.safetensors", (0, 0))
    with pytest.raises(ValueError, match="numbers of other settings or weights"):
        run(trained, [problems], tmp_path / "second", modes="no-think")


def test_a_task_file_changed_in_place_is_another_task(checkpoint, problems, tmp_path):
    # Longer than a file's name may be.
    elsewhere = tmp_path / ("else" * 40) / ("where" * 40)
    elsewhere.mkdir(parents=True)
    (elsewhere / "problems.jsonl").write_text(json.dumps(LINES[0]))
    [one] = run(checkpoint, [str(elsewhere / "problems.jsonl")], tmp_path / "out", modes="think")
    Path(elsewhere / "problems.jsonl").write_text(Path(problems).read_text())
    [all_of_them] = run(checkpoint, [str(elsewhere / "problems.jsonl")], tmp_path / "out", modes="think")
    assert (one["problems"], all_of_them["problems"]) == (1, len(LINES))


def test_a_refused_command_does_not_claim_the_folder(checkpoint, problems, tmp_path):
    with pytest.raises(ValueError, match="no such family"):
        run(checkpoint, ["reasoning-gym:nosuch"], tmp_path / "out")
    assert run(checkpoint, [problems], tmp_path / "out", modes="no-think", max_new_tokens=6)


@pytest.mark.parametrize(
    ("tasks", "settings", "complaint"),
    [
        (["gsm8k"], {}, "task 'gsm8k' is of no known kind"),
        (["none.jsonl"], {}, "none.jsonl does not exist"),
        (["reasoning-gym:x"], {"modes": "fast"}, "mode 'fast' does not exist"),
        (["reasoning-gym:x"], {"limit": 0}, "limit=0 leaves nothing"),
        (["reasoning-gym:x"], {"batch_size": 0}, "batch_size=0 asks nothing"),
        (["reasoning-gym:x"], {"temperature": -1.0}, "temperature=-1.0 does not exist"),
        (["reasoning-gym:x"], {"top_p": 5.0}, "top_p=5.0 is no share"),
        (["reasoning-gym:x"], {"dtype": "half-ish"}, "dtype='half-ish' does not exist"),
    ],
)
def test_what_cannot_be_judged_is_said_before_anything_runs(tasks, settings, complaint, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        run("no-model", tasks, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_paper_is_spelled_out_and_says_what_it_lacks(capsys):
    names = scorecard.expand_tasks(["paper"])
    assert {"lm-eval:kmmlu_direct", "lm-eval:click", "lm-eval:ifeval", "lm-eval:aime25"} <= set(names)
    assert "KoBALT" in capsys.readouterr().out


def test_tasks_of_the_harness_are_rows_like_the_others(checkpoint, tmp_path, monkeypatch):
    harness = pytest.importorskip("trainers.harness", reason="the eval extra is not installed")
    monkeypatch.setattr(harness, "TaskManager", partial(harness.TaskManager, include_defaults=False))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path / 'rows.jsonl'}}}\ntest_split: train\n"
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list:\n  - metric: exact_match\n"
    )
    rows = run(checkpoint, ["lm-eval:tiny"], tmp_path / "out", include_path=str(tmp_path), limit=2)
    assert [(row["task"], row["mode"], row["problems"]) for row in rows] == [
        ("lm-eval:tiny", "thinking", 2),
        ("lm-eval:tiny", "non-thinking", 2),
    ]
    assert rows[0]["metric"] == "exact_match,none" and rows[0]["truncation"] == 1.0
    assert (tmp_path / "out/lm-eval-tiny.think.json").exists()


def test_every_task_of_the_paper_suite_is_known_to_the_harness():
    tasks = pytest.importorskip("lm_eval.tasks", reason="the eval extra is not installed")
    files = list(Path(tasks.__file__).parent.rglob("*.yaml"))
    for task in filter(None, scorecard.PAPER_SUITE.values()):
        texts = [path.read_text() for path in files if path.stem.removeprefix("_") == task]
        assert any(line in (f"task: {task}", f"group: {task}") for text in texts for line in text.splitlines()), task


def test_a_template_that_does_not_end_in_the_modes_token_is_refused(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = "{{ messages[0].content }}{% if not enable_thinking %}<think></think>{% endif %}"
    with pytest.raises(ValueError, match="ends a thinking prompt in '.' instead of <think>"):
        scorecard.check_modes(tokenizer, "m")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="m has no chat template"):
        scorecard.check_modes(tokenizer, "m")


def test_bootstrap_interval_covers_as_it_says():
    assert bootstrap_interval([1.0] * 9) == (1.0, 1.0)
    low, high = bootstrap_interval([1.0] * 30 + [0.0] * 70)
    # The normal approximation: 0.3 +- 1.96 * sqrt(0.3 * 0.7 / 100).
    assert low == pytest.approx(0.3 - 0.0898, abs=0.015) and high == pytest.approx(0.3 + 0.0898, abs=0.015)
    assert bootstrap_interval([0.0, 1.0] * 5, confidence=0.5)[0] > bootstrap_interval([0.0, 1.0] * 5)[0]
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([])


def test_from_the_command_line(checkpoint, problems, tmp_path, capsys):
    options = ["--modes", "no-think", "--max-new-tokens", "5", "--device-map", "cpu", "--limit", "1"]
    assert axk1.main(["eval", str(checkpoint), "--tasks", problems, "--out", str(tmp_path / "out"), *options]) == 0
    said = capsys.readouterr().out
    assert "problems.jsonl  non-thinking  1" in said and str(tmp_path / "out/report.html") in said
    assert axk1.main(["eval", str(checkpoint), "--tasks", "gsm8k"]) == 2
    assert "is of no known kind; use FILE.jsonl, reasoning-gym:FAMILY" in capsys.readouterr().err
