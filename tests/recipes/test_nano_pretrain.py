"""Do the pre-training experiments read real text, vary what they say and nothing else, and report what was measured?"""

import json
import math
import statistics

import pytest

from modeling_axk1 import count_flops
from recipes import (
    nano_cells,
    nano_pretrain_cells,
    nano_pretrain_curriculum,
    nano_pretrain_granularity,
    nano_pretrain_norms,
)
from recipes.nano_pretrain_cells import CONTEXT, curve, docstrings, model_config, spikes, surprisals
from tests.documents import arguments_shown
from tests.ranks import forking
from trainers.curriculum import plan_steps, read_curriculum


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory):
    """Where the commands of the documentation find it."""
    path = tmp_path_factory.mktemp("gsm8k") / "gsm8k_train.jsonl"
    rows = [
        {"question": f"What is {n} plus {n}? " * 8, "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(200)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path.parent


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("pretraining")


@pytest.fixture(autouse=True)
def small(monkeypatch, gsm8k):
    monkeypatch.chdir(gsm8k)
    monkeypatch.setattr(nano_cells, "DRAWS", 20)
    for module in (nano_pretrain_cells, nano_pretrain_curriculum):
        monkeypatch.setattr(module, "BATCH_ROWS", 2)
    monkeypatch.setattr(nano_pretrain_cells, "VOCABULARY", 300)
    monkeypatch.setattr(nano_pretrain_cells, "HELD_OUT_ROWS", 2)


def smaller(out):
    return ["--out", str(out), "--files", "25", "--seeds", "3", "--threads", "1", "--tokens", "600"]


def tables_of(out, name):
    page = (out / f"{name}.html").read_text()
    assert "http" not in page and "<svg" in page
    return json.loads((out / f"{name}.json").read_text())["tables"]


def test_cells_in_two_processes(tmp_path, monkeypatch):
    """At the recipe's own batches, which are not made small there; two steps each."""
    forking()
    monkeypatch.setattr(nano_pretrain_norms, "RATES", (3e-3,))
    cells = nano_pretrain_norms.main(["--gsm8k", "gsm8k_train.jsonl", *smaller(tmp_path), "--jobs", "2"])
    [dual], [pre] = cells["dual, 0.003"], cells["pre, 0.003"]
    assert dual["tokens"] == pre["tokens"] == [4096, 8192] and dual["loss"] != pre["loss"]
    said = (tmp_path / "norms.log").read_text()
    assert said.count("done in") == 2 and "seed3-pre-0.003" in said


def test_norms(out, monkeypatch, capsys):
    monkeypatch.setattr(nano_pretrain_norms, "RATES", (3e-3,))
    cells = nano_pretrain_norms.main([*arguments_shown("recipes.nano_pretrain_norms"), *smaller(out)])
    assert list(cells) == ["dual, 0.003", "pre, 0.003"]
    [dual], [pre] = cells.values()
    # One norm weight a sparse layer is all that tells the two apart; they saw the same text.
    assert dual["parameters"] - pre["parameters"] in (2 * 128, 3 * 128) and dual["tokens"] == pre["tokens"]
    assert dual["loss"] != pre["loss"] and all(map(math.isfinite, dual["loss"]))
    assert set(dual["held_out"]) == {"docs", "code", "maths"} and 3 < statistics.fmean(dual["held_out"]["code"]) < 9
    [rows] = tables_of(out, "norms").values()
    assert [row["cell"] for row in rows] == list(cells)
    capsys.readouterr()
    again = nano_pretrain_norms.main([*arguments_shown("recipes.nano_pretrain_norms"), *smaller(out)])
    assert again == cells and "finished earlier" in capsys.readouterr().out


def test_granularity(out, monkeypatch):
    monkeypatch.setattr(nano_pretrain_granularity, "GRANULARITIES", (12,))
    cells = nano_pretrain_granularity.main([*arguments_shown("recipes.nano_pretrain_granularity"), *smaller(out)])
    assert len(cells) == 4 and "G 7, 56 experts, unbalanced" in cells
    assert len(tables_of(out, "granularity")["Granularity and expert count"]) == 4


def test_granularities_have_equal_active_flops_and_parameters():
    text = nano_pretrain_cells.Text({}, {}, 300)
    configs = {g: model_config(text, **nano_pretrain_granularity.shape(g)) for g in (7, 10, 12)}
    for g, config in configs.items():
        assert 2 * config.hidden_size / config.moe_intermediate_size == g
    flops = [count_flops(config, queries=CONTEXT) for config in configs.values()]
    experts = [each["routed_experts"] + each["shared_experts"] for each in flops]
    assert len(set(experts)) == 1, "routed and shared experts together"
    # Only the router grows with the number of experts.
    assert len({each["total"] - each["router"] for each in flops}) == 1
    assert max(each["router"] for each in flops) < 0.05 * flops[0]["total"]


def test_curriculum(out):
    cells = nano_pretrain_curriculum.main([*arguments_shown("recipes.nano_pretrain_curriculum"), *smaller(out)])
    assert list(cells) == ["report", "reverse", "mixed"]
    [rows] = tables_of(out, "curriculum").values()
    assert "held-out loss, maths" in rows[0]


def test_orders_have_the_same_tokens_of_each_domain_and_learning_rates():
    totals, rates = {}, {}
    for name in ("report", "reverse", "mixed"):
        stages = nano_pretrain_curriculum.stages(30_000, name)
        curriculum = read_curriculum({"stages": stages})
        for stage in curriculum.stages:
            for domain, share in stage.mixture.items():
                totals.setdefault(domain, {}).setdefault(name, 0.0)
                totals[domain][name] += share * stage.tokens
        rates[name] = [step.learning for step in plan_steps(curriculum)]
    for of in totals.values():
        assert len({round(tokens, 3) for tokens in of.values()}) == 1
    assert rates["report"] == rates["reverse"] == rates["mixed"]
    first = {name: nano_pretrain_curriculum.stages(30_000, name)[0]["mixture"]["maths"] for name in rates}
    assert first["report"] < first["mixed"] < first["reverse"]


def test_parts():
    assert docstrings('"""' + "Long. " * 50 + '"""\ndef f():\n    "short"\n') == ["Long. " * 50]
    assert docstrings("def (") == []
    rare, common = surprisals([[1, 1, 2], [1, 1, 1]])
    assert rare > common == pytest.approx(-math.log(5 / 6))
    quiet = [1.0] * 60
    assert spikes(quiet) == 0 and spikes([*quiet, 3.5, 1.0, float("nan")]) == 2
    assert curve({"tokens": [1, 2, 3, 4], "loss": [4.0, 2.0, 3.0, 1.0]}, "loss", points=2) == [(2, 3.0), (4, 2.0)]
