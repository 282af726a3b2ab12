"""Does the nano recipe run end to end, and does a killed run end with the same numbers as an undisturbed one?"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_axk1 import AxK1ForCausalLM
from recipes import nano_think_fusion as recipe
from recipes.nano_problems import draw_problems
from tests.ranks import forking

OPTIONS = ["--scale", "0.004", "--threads", "1"]
STAGES = ["tokenizer", "base", "reasoning", "instruct", "merged", "fused", "evaluation", "stock"]
STAGES += ["early", "reinforced"] * recipe.can_reinforce()


@dataclass(frozen=True)
class Small(recipe.Settings):
    """An untrained model answers to the limit."""

    batch_rows: int = 16
    max_new_tokens: int = 16


def run_small(out: Path) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "Settings", Small)
        return recipe.main(["--out", str(out), *OPTIONS])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An undisturbed run: its folder and results."""
    out = tmp_path_factory.mktemp("straight")
    threads = torch.get_num_threads()
    results = run_small(out)
    torch.set_num_threads(threads)
    return out, results


def without_times(results):
    return json.loads(
        json.dumps(results),
        object_hook=lambda d: {k: v for k, v in d.items() if k not in ("elapsed_s", "seconds_per_answer", "step_time")},
    )


def test_every_stage_ends_in_a_folder_and_the_report_shows_the_result(straight):
    out, results = straight
    assert list(results) == STAGES
    assert sorted(path.name for path in out.iterdir()) == sorted([*STAGES, "settings.json", "report.html"])
    page = (out / "report.html").read_text()
    rows = recipe.closing_table(results)
    models = ["fused", "early", "early + RL", "early, t=1", "early + RL, t=1"] if recipe.can_reinforce() else ["fused"]
    assert [(row["model"], row["mode"]) for row in rows] == [(m, mode) for m in models for mode in ("thinking", "non-thinking")]
    for row in rows + recipe.mode_table(results["evaluation"]["modes"]):
        assert all(str(value) in page for value in row.values())
    assert page.count("<svg") == (6 if recipe.can_reinforce() else 4) and "http" not in page
    assert results["stock"]["question"].splitlines()[0] in page


def test_the_model_is_ours_here_and_transformers_own_there(straight):
    out, results = straight
    assert type(recipe.AutoModelForCausalLM.from_pretrained(out / "fused")) is AxK1ForCausalLM
    assert results["stock"]["class"] == "transformers.models.axk1.modeling_axk1.AXK1ForCausalLM"


def test_both_modes_are_trained_and_measured(straight):
    _, results = straight
    assert [row["mode"] for row in results["evaluation"]["modes"]] == ["thinking", "non-thinking"]
    last = results["fused"]["history"][-1]
    assert last["loss_thinking"] > 0 and last["loss_non_thinking"] > 0
    assert "loss_thinking" not in results["instruct"]["history"][-1]
    assert "loss_non_thinking" not in results["reasoning"]["history"][-1]
    for load in results["evaluation"]["expert_load"].values():
        assert [len(layer) for layer in load] == [8, 8]
        assert [sum(layer) for layer in load] == pytest.approx([1.0, 1.0])


@pytest.mark.skipif(not recipe.can_reinforce(), reason=f"reinforcement needs TRL 1.16, found {recipe.trl.__version__}")
def test_reinforcement_begins_at_the_early_model_and_leaves_the_final_one_alone(straight):
    out, results = straight
    stages = ("base", "fused", "early", "reinforced")
    base, fused, early, reinforced = (load_file(out / stage / "model.safetensors") for stage in stages)
    assert results["reinforced"]["updates"] == len(results["reinforced"]["history"]) == 1

    def apart(left, right):
        return max((left[name] - right[name]).abs().max().item() for name in left)

    # One update of warm-up hardly moves it: it is nearest to the model that it began at.
    assert apart(reinforced, early) < 0.1 * min(apart(reinforced, fused), apart(early, base))
    asked = {log["sampling/rounds"] for log in results["reinforced"]["history"]}
    assert max(asked) <= recipe.MAX_RESAMPLE_ROUNDS + 1


def test_merged_weights_are_four_fifths_reasoning(straight):
    out, _ = straight
    stages = ("reasoning", "instruct", "merged")
    reasoning, instruct, merged = (load_file(out / stage / "model.safetensors") for stage in stages)
    assert merged.keys() == reasoning.keys()
    apart = 0.0
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.8 * reasoning[name] + 0.2 * instruct[name], rtol=1e-6, atol=1e-7)
        apart = max(apart, (reasoning[name] - instruct[name]).abs().max().item())
    assert apart > 1e-4, "vacuous: the two models are the same"


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(straight, tmp_path, monkeypatch):
    out, results = straight
    # A process of seconds, behind `fused`, whose weights are compared.
    monkeypatch.setattr(recipe, "reload_with_stock", lambda *_: results["stock"])
    child = forking().Process(target=run_small, args=(tmp_path,))
    child.start()
    deadline = time.monotonic() + 300
    while not (tmp_path / "instruct.unfinished").exists():
        assert child.is_alive() and time.monotonic() < deadline, f"exit code {child.exitcode} before the third stage"
        time.sleep(0.02)
    child.kill()
    child.join()
    assert (tmp_path / "reasoning").exists() and not (tmp_path / "merged").exists()
    kept = (tmp_path / "reasoning" / "result.json").read_text()
    resumed = run_small(tmp_path)
    assert (tmp_path / "reasoning" / "result.json").read_text() == kept
    assert without_times(resumed) == without_times(results)
    for stage in ("base", "fused"):
        ours, theirs = (load_file(folder / stage / "model.safetensors") for folder in (tmp_path, out))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_stage_is_there_complete_or_not_at_all(tmp_path):
    calls = []

    def work(folder):
        calls.append(folder)
        assert list(folder.iterdir()) == [], "rests of a killed attempt"
        (folder / "half").write_text("x")
        if len(calls) == 1:
            raise KeyboardInterrupt
        return {"loss": 0.25}

    with pytest.raises(KeyboardInterrupt):
        recipe.run_stage(tmp_path, "stage", work)
    assert not (tmp_path / "stage").exists()
    first = recipe.run_stage(tmp_path, "stage", work)
    assert first["loss"] == 0.25 and recipe.run_stage(tmp_path, "stage", work) == first and len(calls) == 2


def test_a_folder_holds_one_run_only(tmp_path):
    settings = recipe.Settings()
    recipe.keep_settings(tmp_path, settings)
    recipe.keep_settings(tmp_path, settings)
    with pytest.raises(ValueError, match="other settings"):
        recipe.keep_settings(tmp_path, settings.scaled(0.5))


def test_splits_share_no_question():
    splits = recipe.draw_splits(recipe.Settings().scaled(0.01))
    questions = [{problem.question for problem in split} for split in vars(splits).values()]
    assert all(questions) and sum(map(len, questions)) == len(set().union(*questions))
    assert len(splits.test) == 5


def test_every_answer_fits_the_generation_limit(straight):
    out, _ = straight
    tokenizer = recipe.AutoTokenizer.from_pretrained(out / "tokenizer")
    problems = draw_problems(1000, seed=99)
    lengths = [len(tokenizer(f"{p.trace}</think>{p.answer}<|im_end|>").input_ids) for p in problems]
    assert max(lengths) < recipe.Settings.max_new_tokens


def test_help_names_every_stage(capsys):
    with pytest.raises(SystemExit):
        recipe.main(["--help"])
    said = capsys.readouterr().out
    assert all(stage in said for stage in STAGES)
