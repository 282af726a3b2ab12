"""Do the experiments train the data that they name, go on behind finished cells, and report what was measured?"""

import json
from functools import partial

import pytest
import torch

from recipes import nano_cells, nano_data_table, nano_merge_sweep, nano_mod_quality
from recipes.nano_problems import FAMILIES, draw_problems
from tests.documents import arguments_shown
from trainers.mode_overlap import validate_mode_overlap

SCALE = ["--threads", "1", "--scale", "0.002", "--seeds", "3"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One folder for all, as a user would: the models that they share are made once."""
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Fewer draws, rows and tokens: an untrained model always answers to the limit. 12 rows, twice: more than ten pairs."""
    monkeypatch.setattr(nano_cells, "DRAWS", 20)
    for experiment in (nano_data_table, nano_merge_sweep, nano_mod_quality):
        monkeypatch.setattr(experiment, "Settings", partial(nano_cells.Settings, batch_rows=12, max_new_tokens=8))


def written(out, name):
    page = (out / f"{name}.html").read_text()
    assert "http" not in page
    return json.loads((out / f"{name}.json").read_text())["tables"], page


def test_each_seed_is_measured_on_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(nano_cells, "open_seed", lambda out, settings: settings)
    options = nano_cells.options_parser("").parse_args(["--out", str(tmp_path), "--seeds", "3", "4", "--scale", "0.5"])
    cells = nano_cells.run_seeds(options, nano_cells.Settings(test_problems=300), lambda seed: {"cell": vars(seed)})
    assert [(of["seed"], of["test_problems"]) for of in cells["cell"]] == [(3, 150), (4, 150)]


def test_data_table(out, capsys):
    cells = nano_data_table.main([*arguments_shown("recipes.nano_data_table"), "--out", str(out), *SCALE])
    assert list(cells) == ["base", "thinking only", "non-thinking only", "combined, disjoint", "sequential", "paired"]
    assert all(len(of) == 1 for of in cells.values()), "one measurement a seed"
    tables, page = written(out, "data_table")
    assert len(tables["What was expected"]) == 6 and "sequential" in page
    # The weights of a measured cell are gone, the figures are there.
    names = {path.name for path in (out / "seed-3").iterdir()}
    assert "data-2-paired.measured" in names and not {"data-2-paired", "data-2-sequential.first"} & names
    capsys.readouterr()
    again = nano_data_table.main([*arguments_shown("recipes.nano_data_table"), "--out", str(out), *SCALE])
    assert again == cells and "finished earlier" in capsys.readouterr().out


def test_merge_sweep(out):
    more = ["--alphas", "0.5", "0.8", "--ratios", "1000:1000"]
    cells = nano_merge_sweep.main([*arguments_shown("recipes.nano_merge_sweep"), "--out", str(out), *SCALE, *more])
    assert set(cells) == {"base", "2:2|facts"} | {
        f"2:2|{a}|{kind}" for a in ("0.5", "0.8") for kind in ("plain", "MOD")
    }
    tables, page = written(out, "merge_sweep")
    assert page.count("<svg") == 4 and [row[""] for row in tables["The authors' weight"]] == ["plain", "MOD"]
    for fact in cells["2:2|facts"]:
        # Two trainings of one base on the same problems went different ways, of about the same length.
        assert -1 < fact["cosine"] < 0.99 and fact["distance"] > 0.1 and min(fact["moved"]) > 0
        # The two ends of the line are the two models themselves.
        assert len(set(fact["losses"]["thinking"])) == len(fact["alphas"]) == 8
    with pytest.raises(SystemExit):
        nano_merge_sweep.main(["--out", str(out), *SCALE, "--alphas", "0.5"])


def test_mod_quality(out):
    cells = nano_mod_quality.main([*arguments_shown("recipes.nano_mod_quality"), "--out", str(out), *SCALE])
    assert {"merged", "full", "half the problems", "one family", "10% corrupt", "30% corrupt", "10 pairs"} == set(cells)
    tables, _ = written(out, "mod_quality")
    assert len(tables["All held-out problems"]) == len(cells)


def test_corrupt_pairs_hold_another_problems_answer():
    problems = draw_problems(40, seed=5)
    rows = nano_mod_quality.corrupted(problems, 0.3, seed=0)
    right = {p.question: (p.trace, p.answer) for p in problems}
    changed = 0
    for thinking, direct in zip(rows[::2], rows[1::2]):
        trace, answer = right[thinking["prompt"][0]["content"]]
        is_right = thinking["completion"][0]["content"] == f"{trace}</think>{answer}"
        assert is_right == (direct["completion"][0]["content"] == answer)
        changed += not is_right
    assert changed == 12 and validate_mode_overlap(rows).defects == {}


def test_values_pick_mode_measure_and_family():
    cell = {"family": ["a", "b", "a"], "thinking": {"accuracy": [1.0, 0.0, 0.5]}}
    assert nano_cells.values([cell], "thinking", "accuracy") == [[1.0, 0.0, 0.5]]
    assert nano_cells.values([cell], "thinking", "accuracy", "a") == [[1.0, 0.5]]


def test_interval_covers_both_seeds_and_problems(monkeypatch):
    monkeypatch.setattr(nano_cells, "DRAWS", 2000)
    # Seeds that disagree leave a wide interval however many problems each has.
    mean, low, high = nano_cells.mean_and_interval([[0.0] * 500, [1.0] * 500, [0.0] * 500])
    assert mean == pytest.approx(1 / 3) and low == 0.0 and high >= 2 / 3
    # Seeds that agree leave that of their problems.
    same = [[1.0] * 30 + [0.0] * 70] * 3
    mean, low, high = nano_cells.mean_and_interval(same)
    assert mean == pytest.approx(0.3) and high - low == pytest.approx(2 * 1.96 * (0.21 / 300) ** 0.5, abs=0.02)


def test_verdicts_say_what_came_out():
    def cell(thinking, direct):
        families = list(FAMILIES)
        return [
            {
                "family": families,
                "thinking": {"format_error": thinking},
                "non-thinking": {"format_error": direct},
            }
        ]

    cells = {
        "combined, disjoint": cell([0.0, 1.0], [1.0, 0.0]),
        "sequential": cell([1.0, 0.4], [0.0, 0.0]),
        "paired": cell([0.0, 0.0], [0.0, 0.1]),
    }
    assert [row["came out"] for row in nano_data_table.verdicts(cells)] == ["yes"] * 5 + ["no"]
    cells["combined, disjoint"] = cell([0.0, 0.2], [0.0, 0.0])
    assert [row["came out"] for row in nano_data_table.verdicts(cells)] == ["no", "yes", "no", "yes", "yes", "no"]


def test_loss_barrier_is_the_rise_above_the_line():
    facts = {
        "moved": [0.1, 0.1], "distance": 1.0, "cosine": 0.0, "alphas": [0.0, 0.5, 1.0],
        "losses": {"thinking": [1.0, 2.5, 2.0], "non-thinking": [1.0, 1.0, 3.0]},
    }  # fmt: skip
    row = nano_merge_sweep.fact_row({"1:1|facts": [facts]}, "1:1")
    assert row["barrier, thinking"] == "1.000 nats" and row["barrier, non-thinking"] == "0.000 nats"


def test_loss_is_that_of_the_answer_behind_its_control_token(tmp_path):
    from tests.random_models import tiny_chat_config
    from trainers.tokenizer import train_tokenizer

    from modeling_axk1 import AxK1ForCausalLM  # isort: skip

    tokenizer = train_tokenizer(["user assistant"], 300)
    model = AxK1ForCausalLM(tiny_chat_config(len(tokenizer))).eval()
    [problem] = draw_problems(1, seed=1)
    chat = [*problem.messages, {"role": "assistant", "content": f"{problem.trace}</think>{problem.answer}"}]
    ids = tokenizer.apply_chat_template(chat, return_dict=True).input_ids
    begin = ids.index(tokenizer.convert_tokens_to_ids("<think>")) + 1
    end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
    log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = -sum(log_probs[at - 1, ids[at]].item() for at in range(begin, end)) / (end - begin)
    assert nano_merge_sweep.answer_loss(model, tokenizer, [problem], True) == pytest.approx(expected, rel=1e-5)
