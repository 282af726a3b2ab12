"""Does a plan follow from its laws, reach A.X K1's report where it says so, and admit its misses?"""

import json
import math

import pytest

import axk1
from modeling_axk1 import AxK1Config, count_parameters
from trainers import planning
from trainers.planning import plan_budget, plan_days, plan_flops

K1_FLOPS = 2.548e24


@pytest.fixture(scope="module")
def k1():
    return plan_flops(K1_FLOPS)


@pytest.fixture(scope="module")
def tenth():
    return plan_flops(K1_FLOPS / 10)


def test_the_report_follows_from_its_budget(k1):
    figures = k1.figures()
    assert figures["total_parameters"] == pytest.approx(519e9, rel=0.10)
    assert figures["active_parameters"] == pytest.approx(33e9, rel=0.10)
    assert figures["tokens"] == pytest.approx(10e12, rel=0.10)
    assert figures["vocab_size"] == pytest.approx(163_840, rel=0.03)
    assert figures["vocab_size_approach_2"] == pytest.approx(132_500, rel=0.03)
    assert figures["granularity"] == 7
    assert (figures["experts_per_token"], figures["shared_experts"]) == (8, 1)
    assert sum(stage["tokens"] for stage in figures["stages"]) == pytest.approx(figures["tokens"])
    assert figures["stages"][0]["tokens"] / figures["stages"][2]["tokens"] == pytest.approx(7 / 0.6)
    assert figures["stages"][2]["context_parallel"] == [1, 4, 8]


def test_nothing_of_the_report_is_read_by_a_plan(k1, monkeypatch):
    monkeypatch.setattr(planning, "REPORTED", {"flops": 1.0})
    monkeypatch.setattr(planning, "REPORTED_LADDER", ())
    monkeypatch.setattr(AxK1Config, "preset", None)
    assert plan_flops(K1_FLOPS).figures() == k1.figures()
    assert not [model for model in planning.PUBLISHED if "K1" in model.name]


def test_a_tenth_of_the_budget_shrinks_everything(k1, tenth):
    large, small = k1.figures(), tenth.figures()
    for name in ("total_parameters", "active_parameters", "tokens", "vocab_size", "granularity", "layers", "hidden_size"):
        assert small[name] < large[name], name
    # Parameters and tokens share the compute equally: each falls with its square root.
    assert small["total_parameters"] / large["total_parameters"] == pytest.approx(10**-0.5, rel=0.05)


def test_granularity_is_the_line_through_published_models(monkeypatch):
    def model(total, hidden):
        return planning.Published("a model", total, total / 16, 1.0, 1, hidden, 1024, True, "")

    # G = 2, 4, 8 at 1e9, 1e10, 1e11: a power law, found again and read between and beyond.
    monkeypatch.setattr(planning, "PUBLISHED", (model(1e11, 4096), model(1e10, 2048), model(1e9, 1024)))
    monkeypatch.setattr(planning, "LARGE", planning.PUBLISHED)
    assert planning.published_granularity(10**10.5) == pytest.approx(4 * 2**0.5)
    # 1e9 parameters, 20 tokens each, a sixteenth of them active: 6 FLOPs a visited one.
    assert planning.granularity(6 * 1e9 / 16 * 20e9, 20.0) == 2
    # Beyond the largest of them as at the largest.
    assert planning.published_granularity(1e13) == pytest.approx(8)


def test_accounting_adds_up(k1):
    figures = k1.figures()
    assert figures["model_flops"] == pytest.approx(0.9 * K1_FLOPS)
    assert figures["model_flops"] == pytest.approx(figures["tokens"] * figures["model_flops_per_token"])
    assert figures["days"] * 86400 * 1024 * figures["tflops_per_gpu"] * 1e12 == pytest.approx(K1_FLOPS)
    counts = count_parameters(k1.config)
    assert (figures["total_parameters"], figures["active_parameters"]) == (counts["total"], counts["active"])


def test_flops_of_a_token_are_six_a_weight_and_the_causal_half_of_attention():
    config, sequence = AxK1Config.preset("k1"), 4096
    counts, heads = count_parameters(config), config.num_attention_heads
    weights = counts["active"] - counts["embedding"] - counts["norms"]
    # Query-key and value products of (sequence + 0) / 2 earlier tokens, three times a forward pass.
    attention = 61 * heads * (192 + 128) * 2 * 3 * sequence / 2
    assert planning.flops_per_token(config, sequence, mtp_layers=0) == pytest.approx(6 * weights + attention)
    layer = (counts["attention"] + attention / 6) / 61 + (
        counts["router"] + counts["shared_experts"] + counts["routed_experts"] * 8 / 192
    ) / 60
    extra = planning.flops_per_token(config, sequence) - planning.flops_per_token(config, sequence, mtp_layers=0)
    assert extra == pytest.approx(6 * (layer + 2 * 7168**2 + counts["lm_head"]))


# Tao et al., abstract and table 1: at the compute that is optimal for them, 70 B parameters want about 216K rows, 7 B 57K to 67K.
@pytest.mark.parametrize(("parameters", "hidden", "low", "high"), [(70e9, 8192, 205e3, 235e3), (7e9, 4096, 57e3, 68e3)])
def test_the_three_vocabulary_laws_agree_where_they_were_made_to(parameters, hidden, low, high):
    flops = (parameters / math.exp(-2.48465)) ** 2
    by_loss = planning.vocabulary_by_loss(parameters, flops / 6 / parameters, hidden)
    for rows in (
        planning.vocabulary_by_flops(flops, hidden),
        planning.vocabulary_by_parameters(parameters, hidden),
        by_loss,
    ):
        assert low <= rows <= high


def test_approach_3_is_the_least_loss_of_a_fine_grid():
    parameters, tokens, hidden = 30e9, 10e12, 7168
    nonvocab, compute = parameters / 1e6, 6 * parameters / 1e6 * tokens / 1e9

    def loss(rows):
        vocab = rows * hidden / 1e6
        data = compute / 6 / (nonvocab + vocab)
        return -5.53278 + 1.83139 / nonvocab**0.446606 + 0.195842 / vocab**0.670737 + 2.12411 / data**0.446606

    best = min(range(50_000, 500_000, 100), key=loss)
    assert planning.vocabulary_by_loss(parameters, tokens, hidden) == pytest.approx(best, abs=100)


@pytest.mark.parametrize(
    ("rows", "rounded"),
    [
        (100, 512),
        (512, 512),
        (700, 640),
        (131_072, 131_072),
        (163_839, 131_072),
        (163_840, 163_840),
        (196_607, 163_840),
    ],
)
def test_a_vocabulary_is_rounded_down_to_three_bits(rows, rounded):
    assert planning.round_vocabulary(rows) == rounded
    assert rounded % 128 == 0


@pytest.mark.parametrize("flops", [1e18, 3e20, 1e22, 4e23, 6e24])
def test_a_plan_of_any_size_spends_its_budget_and_can_be_built(flops):
    plan = plan_flops(flops, gpus=2048)
    figures, config = plan.figures(), plan.config
    assert figures["tokens"] / figures["total_parameters"] == pytest.approx(20, rel=0.25)
    assert figures["granularity"] == planning.granularity(planning.EFFECTIVE_TIME * flops, 20.0)
    assert config.hidden_size % 64 == 0 and config.moe_intermediate_size % 128 == 0
    assert config.n_routed_experts % figures["expert_parallel"] == 0
    assert 2048 % (figures["pipeline_parallel"] * figures["context_parallel"]) == 0
    assert figures["memory_bytes_per_gpu"] <= 0.95 * 141e9


def test_a_tiny_plan_is_shown_in_units_that_fit_it():
    shown = planning.text_of_plan(plan_flops(1e18, gpus=8))
    for figure in ("235.7 M parameters, 13.9 M active", "4.9 B\n", "8.7 minutes", "317.7 M", "13", " ns at FP8 peak"):
        assert figure in shown, figure
    assert "by the same model" not in shown


def test_misses_are_printed_at_the_reports_budget_only(k1, tenth):
    misses = {name: (ours, theirs) for name, ours, theirs in k1.misses()}
    assert misses["tokens"] == (k1.tokens, 9.26e12) and len([name for name in misses if "TFLOP" in name]) == 4
    assert "beside the A.X K1 report" in planning.text_of_plan(k1)
    assert not tenth.misses() and "A.X K1" not in planning.text_of_plan(tenth)


def test_each_law_names_its_source(k1):
    said = "\n".join(k1.derivation())
    for source in (
        "2407.21783",
        "2203.15556",
        "2507.17702",
        "2407.13623",
        "2405.04434",
        "2104.04473",
        "count_parameters",
    ):
        assert source in said, source
    for figure in ("163,840", f"{count_parameters(k1.config)['total']:,}", "geometric mean", "6.96 of 12 published MoEs"):
        assert figure in said, figure


def test_days_of_a_cluster_are_flops():
    given = plan_days(256, 20, tflops=300)
    assert given.flops == pytest.approx(256 * 20 * 86400 * 300e12)
    modelled = plan_days(256, 20)
    # The throughput it was planned for is the one that its layout reaches, up to a step of the layout.
    assert modelled.days == pytest.approx(20, rel=0.05)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"flops": 0.0}, "flops=0 is no compute budget"),
        ({"flops": -1e22}, "flops=-1e\\+22 is no compute budget"),
        ({"flops": math.nan}, "flops=nan is no compute budget"),
        ({"flops": math.inf}, "flops=inf is no compute budget"),
        ({"flops": 1e12}, "too small for any shape"),
        ({"flops": 1e30}, "too large for any shape"),
        ({"flops": 1e22, "gpu": "tpu"}, "gpu='tpu' is unknown; use one of a100"),
        ({"flops": 1e22, "gpus": 0}, "gpus=0 is no cluster"),
        ({"flops": K1_FLOPS, "gpus": 64}, "fit no layout on 64 x h200: the leanest needs"),
        ({"flops": K1_FLOPS, "gpus": 1001}, "fit no layout on 1001 x h200"),
        ({"flops": 1e22, "tokens_per_parameter": 0.0}, "tokens_per_parameter=0 is not positive"),
        ({"flops": 1e22, "days": 3.0}, "both was given"),
        ({"flops": 1e22, "tflops": 3.0}, "drop one of them"),
        ({}, "neither was given"),
        ({"days": 0.0}, "days=0 is no duration"),
        ({"days": 3.0, "tflops": 5000.0}, "tflops=5000 is outside 0 to a h200's peak, 1979"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(given, complaint):
    usual = {"flops": None, "days": None, "gpus": 1024, "gpu": "h200", "tflops": None, "tokens_per_parameter": 20.0}
    with pytest.raises(ValueError, match=complaint) as error:
        plan_budget(**usual | given)
    assert "\n" not in str(error.value)


def test_the_command_prints_json_and_writes_a_config_that_info_reads(tmp_path, capsys):
    assert axk1.main(["plan", "--flops", "1e21", "--gpus", "64", "--json", "--config", str(tmp_path / "planned")]) == 0
    figures = json.loads(capsys.readouterr().out)
    numbers = {name for name, value in figures.items() if isinstance(value, int | float)}
    assert numbers >= {"total_parameters", "active_parameters", "tokens", "vocab_size", "granularity", "tflops_per_gpu"}
    config = AxK1Config.from_pretrained(tmp_path / "planned")
    assert count_parameters(config)["total"] == figures["total_parameters"]
    assert json.loads((tmp_path / "planned" / "config.json").read_text())["architectures"] == ["AXK1ForCausalLM"]
    assert axk1.main(["info", str(tmp_path / "planned")]) == 0
    assert f"{figures['total_parameters']:,}" in capsys.readouterr().out


def test_the_command_shows_its_derivation_and_refuses_in_one_line(capsys):
    assert axk1.main(["plan", "--days", "10", "--gpus", "64", "--gpu", "h100", "--tflops", "250"]) == 0
    shown = capsys.readouterr().out
    assert "Where each figure comes from:" in shown and "64 x h100" in shown
    assert axk1.main(["plan", "--flops", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("axk1: flops=0 is no compute budget") and error.count("\n") == 1
