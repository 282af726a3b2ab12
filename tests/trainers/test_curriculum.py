"""Is the table of stages read, refused, scaled and laid out as it says?"""

from pathlib import Path

import pytest
import yaml

from trainers.curriculum import Level, level_tokens, load_curriculum, plan_steps, read_curriculum

K1 = Path(__file__).parents[2] / "recipes/k1_stages.yaml"


def stage(**changes):
    given = {"name": "one", "tokens": 1000, "context": 10, "batch_tokens": 40, "mixture": {"web": 0.75, "code": 0.25}}
    return given | changes


def table(*stages, **more):
    return {"stages": list(stages or [stage()]), **more}


def test_the_papers_stages():
    stages = load_curriculum(K1).stages
    assert [s.tokens for s in stages] == [7_000_000_000_000, 1_660_000_000_000, 600_000_000_000]
    assert [[level.length for level in s.context] for s in stages] == [[4096], [4096], [4096, 16384, 32768]]
    assert [s.phase for s in stages] == ["stable", "decay", "floor"]
    assert stages[1].mixture["code"] == pytest.approx(29.42 / 99.08)
    assert stages[2].context[-1].rope["factor"] == 4.0 and stages[2].context[0].rope is None


@pytest.mark.parametrize("scale", [0.01, 1e-6, 1e-9])
def test_scaling_keeps_proportions(scale):
    whole, small = load_curriculum(K1), load_curriculum(K1, scale)
    assert [s.tokens for s in small.stages] == [round(s.tokens * scale) for s in whole.stages]
    assert small.warmup_tokens == pytest.approx(whole.warmup_tokens * scale)
    assert [s.mixture for s in small.stages] == [s.mixture for s in whole.stages]
    lengths = [level.length for level in small.stages[2].context]
    assert lengths[1:] == [4 * lengths[0], 8 * lengths[0]]
    assert small.stages[2].context[-1].rope["original_max_position_embeddings"] == lengths[-1]
    # The same shape of learning rate over the run.
    for share in (0.0001, 0.3, 0.8, 0.9, 1.0):
        assert small.learning(share * small.tokens) == pytest.approx(whole.learning(share * whole.tokens), abs=0.01)
    if scale < 0.01:
        assert {step.level for step in plan_steps(small) if step.stage == 2} == {0, 1, 2}, "every level is trained"


@pytest.mark.parametrize("scale", [1e-6, 1e-9])
def test_scaled_down_a_batch_still_has_a_row_for_each_of_two_ranks(scale):
    small = load_curriculum(K1, scale, rows=2)
    steps = list(plan_steps(small, 2))
    assert all(step.rows % 2 == 0 for step in steps) and {step.level for step in steps if step.stage == 2} == {0, 1, 2}
    assert [s.tokens for s in small.stages] == [s.tokens for s in load_curriculum(K1, scale).stages]
    assert all(step.rows % 3 == 0 for step in plan_steps(load_curriculum(K1, 3e-7, rows=3), 3)), "batches below their level"
    assert (small == load_curriculum(K1, scale)) == (scale == 1e-6), "contexts shrink no further than they must"
    assert load_curriculum(K1, rows=2000) == load_curriculum(K1), "a whole run is laid out as its table says, or not at all"
    with pytest.raises(ValueError, match="contexts would shrink to 0 for 64 ranks times accumulation steps; use a larger"):
        load_curriculum(K1, 1e-9, rows=64)


def test_steps_cover_the_tokens():
    c = read_curriculum(
        table(
            stage(batch_tokens_start=20, batch_ramp_tokens=400),
            stage(name="two", phase="decay", tokens=600, context=[10, {"length": 20}, {"length": 40}]),
            warmup_tokens=100,
            decay_floor=0.5,
        )
    )
    steps = list(plan_steps(c))
    assert steps[0].rows == 2 and max(step.rows for step in steps) == 4
    assert [step.tokens_before for step in steps[1:]] == [s.tokens_before + s.tokens for s in steps[:-1]]
    for number, of in enumerate(c.stages):
        assert sum(s.tokens for s in steps if s.stage == number) == of.tokens
    assert {s.length: sum(t.tokens for t in steps if t.stage == 1 and t.length == s.length) for s in steps if s.stage} == {
        10: 200, 20: 200, 40: 200,
    }  # fmt: skip
    assert steps[0].learning == pytest.approx(0.1) and steps[12].learning == 1.0
    assert 0.5 < steps[-1].learning < 0.55


def test_rows_split_evenly_over_ranks():
    c = read_curriculum(table(stage(tokens=1050)))
    steps = list(plan_steps(c, row_multiple=4))
    assert all(step.rows % 4 == 0 for step in steps) and sum(step.tokens for step in steps) == 1040
    assert level_tokens(c.stages[0], 4) == [1040]
    with pytest.raises(ValueError, match="not enough for 400 of them"):
        list(plan_steps(c, row_multiple=400))


def test_ranks_never_enlarge_a_batch():
    c = read_curriculum(table(stage(batch_tokens_start=20, batch_ramp_tokens=400)))
    assert next(plan_steps(c, row_multiple=2)).rows == 2
    with pytest.raises(
        ValueError, match="'one' has batches of 20 tokens, 2 rows of 10, and 4 ranks times accumulation"
    ):
        list(plan_steps(c, row_multiple=4))


def test_more_steps_than_can_be_laid_out_are_refused_at_once():
    c = read_curriculum(table(stage(tokens=1e30)))
    with pytest.raises(ValueError, match=r"'one' has 1,000,.* tokens in batches of .* steps; give it at most 10,000,000"):
        next(plan_steps(c))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (table(stage(mixture={"web": 0.5, "code": 0.4})), "mixture of stage 'one' sums to 0.9, not 1; mend"),
        (table(stage(mixture={"web": 1.5, "code": -0.5})), "negative share in the mixture of stage 'one'"),
        (table(stage(context=[{"length": 10, "share": 0.5}])), "context shares of stage 'one' sum to 0.5"),
        (table(stage(tokens="many")), "tokens='many' is no number"),
        (table(stage(tokens=-5)), "tokens=-5 is no number"),
        (table(stage(context=80)), "a batch holds no row"),
        (table(stage(phase="decay"), stage(name="two")), "phases decay, stable go back"),
        (table(stage(), stage(name="two", phase="floor")), "phases stable, floor have a floor and no decay"),
        (table(stage(), stage()), "Two stages have one name"),
        (table(stage(order="random")), "order='random' of stage 'one' does not exist"),
        (table(stage(mixtures={})), "'mixtures' in stage 'one' is no setting"),
        (table(warmup_tokens=2000), "warmup_tokens=2,000 are more"),
        ({"stages": []}, "no list `stages`"),
        ({"stages": [{"name": "x"}]}, "Stage 'x' has no tokens"),
        (["stages"], "no list `stages`"),
        ({"stages": ["one"]}, "Stage 'stage1' is 'one', no table"),
        (table(stage(mixture=["web"])), r"mixture of stage 'one' is \['web'\]; give a table such as"),
        (table(stage(mixture={"web": "half"})), "mixture of stage 'one' is {'web': 'half'}"),
        (table(stage(mixture={"web": True})), "mixture of stage 'one' is {'web': True}"),
        (table(stage(mixture={"web": float("nan")})), "mixture of stage 'one' is {'web': nan}"),
        (table(stage(tokens=True)), "tokens=True is no number"),
        (table(stage(tokens=float("inf"))), "tokens=inf is no number"),
        (table(stage(batch_tokens=None)), "batch_tokens=None is no number"),
        (table(stage(name=["one"])), r"name of stage \['one'\] is \['one'\]; give a text"),
        (table(stage(context=[])), r"context of stage 'one' is \[\]; give a whole number from 1 or a list"),
        (table(stage(context=["long"])), "context of stage 'one' is"),
        (table(stage(context=[{"length": 10.5}])), "length of a context of stage 'one' is 10.5"),
        (table(stage(context=[{"length": 10, "share": "all"}])), "share of a context of stage 'one' is 'all'"),
        (table(stage(context=[{"share": 1.0}])), "context of stage 'one' has no length"),
        (table(stage(context=[{"length": 10, "rope": True}])), "rope of a context of stage 'one' is True"),
        (table(stage(context=[{"length": 10, "rope": {"rope_type": "yarn"}}])), "rope of stage 'one' has no rope_theta"),
        (
            table(stage(context=[{"length": 10, "rope": {"rope_type": "yarn", "rope_theta": "1e4"}}])),
            "rope_theta of a rope of stage 'one' is '1e4'",
        ),
        (table(stage(repeat="no")), "repeat of stage 'one' is 'no'; give true or false"),
        (table(stage(phase=["decay"])), r"phase of stage 'one' is \['decay'\]; give a text"),
        (table(decay_floor="low"), "decay_floor of the curriculum is 'low'; give a number from 0 to 1"),
        (table(decay_shape={}), "decay_shape of the curriculum is {}; give a text"),
        (table(sources=["a"]), r"sources of the curriculum is \['a'\]"),
        (table(sources={"web": 3}), "sources of the curriculum is {'web': 3}"),
        (table(settings=[1]), r"settings of the curriculum is \[1\]"),
        (table(model=3), "model of the curriculum is 3; give a text"),
        (table(colour=3), "'colour' in the curriculum is no setting; use stages"),
    ],
)
def test_bad_tables_are_refused_in_one_sentence(given, said):
    with pytest.raises(ValueError, match=said) as caught:
        read_curriculum(given)
    assert "\n" not in str(caught.value)


def test_files_are_read_or_named(tmp_path):
    with pytest.raises(ValueError, match="gone.yaml is no file"):
        load_curriculum(tmp_path / "gone.yaml")
    (tmp_path / "bad.yaml").write_text("stages: [")
    with pytest.raises(ValueError, match="bad.yaml is not YAML"):
        load_curriculum(tmp_path / "bad.yaml")
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(table(stage(tokens="7.0e+3"), sources={"web": "a/*.jsonl"})))
    good = load_curriculum(tmp_path / "good.yaml")
    assert good.tokens == 7000 and good.sources == {"web": ("a/*.jsonl",)} and good.stages[0].context == (Level(10),)
    with pytest.raises(ValueError, match="scale=1e-09|At scale=1e-09"):
        load_curriculum(tmp_path / "good.yaml", 1e-9)
