"""Does the RL recipe run end to end, compare what it says it compares, and keep its stages?"""

import json
import re
from pathlib import Path

import pytest
import torch
import trl
from packaging.version import Version

if Version(trl.__version__) < Version("1.16"):
    pytest.skip(f"the RL recipe needs TRL 1.16, found {trl.__version__}", allow_module_level=True)

from recipes import rl_nano as recipe
from trainers.rewards import find_judge
from trainers.rl import RlArguments, load_prompts, parse

TINY = recipe.Settings(
    threads=1, base_steps=2, start_steps=4, start_accuracy=0.0, check_every=2, rl_steps=2, rl_problems=8,
    instructions=2, generations=2, test_problems=4, max_new_tokens=12,
)  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("rl") / "seed-17"
    threads = torch.get_num_threads()
    results = recipe.run_seed(out, TINY)
    torch.set_num_threads(threads)
    return out, results


def test_the_three_trainings_differ_in_what_their_names_say(ran):
    _, results = ran
    assert list(results) == ["start", "dynamic", "same_updates", "same_tokens"]
    updates = {name: results[name]["updates"] for name in recipe.CELLS}
    assert updates["dynamic"] == updates["same_updates"] == TINY.rl_steps
    # An untrained model's groups are all dead, so dynamic sampling asks for more until its rounds are up.
    rounds = {name: [log["sampling/rounds"] for log in results[name]["history"]] for name in recipe.CELLS}
    assert max(rounds["dynamic"]) > 1 and set(rounds["same_updates"] + rounds["same_tokens"]) == {1}
    tokens = {name: results[name]["tokens"] for name in recipe.CELLS}
    assert updates["same_tokens"] == round(TINY.rl_steps * tokens["dynamic"] / tokens["same_updates"]) > TINY.rl_steps
    assert tokens["same_tokens"] == pytest.approx(tokens["dynamic"], rel=0.3)
    for name, cell in ((name, results[name]) for name in recipe.CELLS):
        assert len(cell["history"]) == cell["updates"], name
        assert [row["mode"] for row in cell["modes"]] == [row["mode"] for row in cell["sampled"]]


def test_the_start_is_stopped_by_its_check(ran):
    _, results = ran
    assert [check["step"] for check in results["start"]["checks"]] == [2]


def test_a_second_run_keeps_the_stages(ran, capsys):
    out, results = ran
    threads = torch.get_num_threads()
    again = recipe.run_seed(out, TINY)
    torch.set_num_threads(threads)
    assert again == results and capsys.readouterr().out.count("finished earlier") == 6
    with pytest.raises(ValueError, match="other settings"):
        recipe.run_seed(out, recipe.replace(TINY, rl_steps=3))


def test_the_report_and_the_screen_show_both_tables(ran, tmp_path, capsys):
    _, results = ran
    recipe.publish(tmp_path, TINY, [17], [results])
    page, screen = (tmp_path / "report.html").read_text(), capsys.readouterr().out
    for row in recipe.result_table([results]):
        # Each share that is claimed of a model has its interval.
        for name in ("accuracy", "format error", "accuracy at t=1", "format error at t=1"):
            assert re.fullmatch(r"\d+\.\d% \(\d+\.\d% to \d+\.\d%\)", row[name]), (name, row[name])
    for row in recipe.result_table([results]) + recipe.cost_table([results]):
        assert all(value in page and value in screen for value in row.values())
    assert page.count("<svg") == len(recipe.CURVES) + 1 and "http" not in page


def test_the_command_reads_the_problems_that_the_recipe_writes(ran):
    out, _ = ran
    rows = load_prompts(RlArguments(dataset=str(out / "problems.jsonl")), "train")
    judge = find_judge("reasoning-gym")
    assert len(rows) == TINY.rl_problems
    for row in rows:
        answer = json.loads(row["entry"])["answer"]
        assert judge(answer, row) and not judge(answer + " x", row)


def test_the_example_config_is_the_stage_with_dynamic_sampling(tmp_path):
    yaml = Path(recipe.__file__).parent / "configs" / "rl_cpu.yaml"
    _, theirs, _ = parse(["--config", str(yaml)])
    ours = recipe.rl_config(tmp_path, recipe.Settings(), dynamic=True, updates=recipe.Settings.rl_steps)
    # Where it is saved, and that it is.
    own = {"output_dir", "logging_dir", "save_strategy", "save_steps", "save_total_limit"}
    differ = {name for name, value in vars(ours).items() if name not in own and vars(theirs)[name] != value}
    assert {name for name in differ if name not in ("distributed_state", "_n_gpu")} == set()


def test_interval():
    assert recipe.interval([[True] * 50]) == (1.0, 1.0)
    low, high = recipe.interval([[True] * 30 + [False] * 70])
    # The normal approximation: 1.96 * sqrt(0.3 * 0.7 / 100) = 0.09.
    assert (low, high) == pytest.approx((0.21, 0.39), abs=0.02)
    apart = recipe.interval([[True] * 100, [False] * 100, [True] * 50 + [False] * 50])
    assert apart[0] < 0.2 and apart[1] > 0.8, "seeds that differ must widen it"


def test_splits_share_no_question():
    splits = recipe.draw_splits(TINY)
    questions = [{problem.question for problem in split} for split in vars(splits).values()]
    assert all(questions) and sum(map(len, questions)) == len(set().union(*questions))
