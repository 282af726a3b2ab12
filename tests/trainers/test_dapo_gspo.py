"""Does reinforcement ask every prompt in both modes, keep the groups that teach, and compute TRL's own loss on them?"""

import inspect
import json
import logging
import math
import re

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from modeling_axk1 import AxK1ForCausalLM
from tests.random_models import tiny_chat_config
from tests.trainers.questions import WORDS, ask, questions
from trainers import dapo_gspo
from trainers.adapters import ParamWrapper, target_names
from trainers.dapo_gspo import DapoGspoConfig, DapoGspoTrainer, mode_table
from trainers.mode_prompts import render_prompt
from trainers.rewards import Tokens, correct_reward, format_reward, judge_text
from trainers.tokenizer import train_tokenizer

pytestmark = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.16"), reason=f"DapoGspoTrainer needs TRL 1.16, found {trl.__version__}"
)
GENERATIONS = 4


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([WORDS], 300)


def axk1(tokenizer):
    torch.manual_seed(0)
    return AxK1ForCausalLM(tiny_chat_config(len(tokenizer)))


def llama(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=None, bos_token_id=None, **sizes))


def settings(folder, config=DapoGspoConfig, **more):
    arguments = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4 * GENERATIONS,
        "gradient_accumulation_steps": 1, "num_generations": GENERATIONS, "max_completion_length": 12,
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_steps": 0, "optim": "sgd",
        "shuffle_dataset": False, "disable_tqdm": True, "max_grad_norm": 0.0,
    }  # fmt: skip
    return config(**(arguments | more))


class Scripted:
    """Completions written by a script(question, number of the completion in its group) instead of sampled."""

    script = None

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations):
        self.asked = [*getattr(self, "asked", []), [list(ids) for ids in prompt_ids]]
        completions = []
        for place, ids in enumerate(prompt_ids):
            thinking = self._tokenizer.decode(ids[-1:]) == "<think>"
            question = re.search(r"user\n(.*)<\|im_end\|>", self._tokenizer.decode(ids)).group(1)
            text = type(self).script(question, place % num_generations, thinking)
            completions.append(self._tokenizer(text).input_ids)
        return completions, None


class ScriptedTrainer(Scripted, DapoGspoTrainer):
    pass


class ScriptedStock(Scripted, GRPOTrainer):
    pass


def mixed(question, number, thinking):
    """Questions 0, 4, 8, ... all right, 1, 5, ... all wrong, the others mixed; lengths differ."""
    kind = int(question) % 4
    right = kind == 0 or (kind > 1 and number < kind)
    answer = "right" if right else "wrong" + " so" * number
    return ("so" * (number % 2) + "</think>" if thinking else "") + answer + "<|im_end|>"


def train(tokenizer, folder, script, rows, trainer=ScriptedTrainer, model=None, judge=judge_text, **more):
    taught = type("Taught", (trainer,), {"script": staticmethod(script)})
    options = {name: more.pop(name) for name in ("shaping_rewards", "peft_config", "eval_dataset") if name in more}
    built = taught(
        model or llama(tokenizer), judge, settings(folder, **more), Dataset.from_list(rows),
        processing_class=tokenizer, **options,
    )  # fmt: skip
    built.train()
    return built


def stock(tokenizer, folder, script, rows, thinking, **more):
    """TRL's own trainer on rows that each have one mode; the reward is the same two functions."""
    tokens = Tokens(*tokenizer.convert_tokens_to_ids(["<think>", "</think>"]), frozenset({tokenizer.eos_token_id}))
    taught = type("Taught", (ScriptedStock,), {"script": staticmethod(script)})
    built = taught(
        llama(tokenizer),
        [correct_reward(judge_text, tokenizer, tokens), format_reward(tokens)],
        settings(folder, GRPOConfig, chat_template_kwargs={"enable_thinking": thinking}, **more),
        Dataset.from_list([row | {"thinking": thinking} for row in rows]),
        processing_class=tokenizer,
    )
    built.train()
    return built


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def moved(trainer, tokenizer):
    start = llama(tokenizer).state_dict()
    return max((value - start[name]).abs().max().item() for name, value in weights(trainer).items())


# -- TRL's seams --------------------------------------------------------------------------------------------------------
def test_the_hooks_have_the_signatures_that_we_override():
    expected = {
        "_generate": ["self", "prompts"],
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_tokenize_prompts": ["self", "prompts"],
        "_generate_and_score_completions": ["self", "inputs"],
        "_get_train_sampler": ["self", "dataset"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(inspect.unwrap(getattr(GRPOTrainer, name))).parameters) == parameters, name
        assert list(inspect.signature(getattr(DapoGspoTrainer, name)).parameters) == parameters, name
    returned = inspect.getsource(GRPOTrainer._generate).rstrip().splitlines()[-1].strip()
    assert returned == (
        "return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images"
    )


def test_a_model_of_a_balance_loss_trains_without_it_which_is_said(tokenizer, tmp_path, caplog):
    model = axk1(tokenizer)
    model.config.router_aux_loss_coef = 0.01
    trainer = train(tokenizer, tmp_path, mixed, questions(8), model=model, max_steps=1)
    assert trainer.state.global_step == 1
    assert "The balance loss (router_aux_loss_coef=0.01) is off" in caplog.text and model.config.router_aux_loss_coef == 0


def test_old_trl_is_refused_in_one_sentence(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.14.2")
    with pytest.raises(ImportError, match="needs TRL 1.16, found 1.14.2; use Python 3.11"):
        DapoGspoTrainer(llama(tokenizer), judge_text, settings(tmp_path), Dataset.from_list(questions(4)))


def test_quantised_experts_do_not_go_to_vllm(tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    axk1(tokenizer).save_pretrained(tmp_path)
    packed = AxK1ForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(ValueError, match="experts are quantised; load it without quantization_config"):
        DapoGspoTrainer(packed, judge_text, settings(tmp_path, use_vllm=True), Dataset.from_list(questions(4)),
                        processing_class=tokenizer)  # fmt: skip


# -- settings -----------------------------------------------------------------------------------------------------------
def test_each_ratio_has_its_own_clip_and_aggregation(tmp_path):
    gspo = settings(tmp_path)
    assert (gspo.importance_sampling_level, gspo.loss_type, gspo.epsilon, gspo.epsilon_high) == (
        "sequence", "grpo", 3e-4, 4e-4,
    )  # fmt: skip
    dapo = settings(tmp_path, importance_sampling_level="token")
    assert (dapo.loss_type, dapo.epsilon, dapo.epsilon_high) == ("dapo", 0.2, 0.28)
    own = settings(tmp_path, loss_type="dapo", epsilon=0.1)
    assert (own.loss_type, own.epsilon, own.epsilon_high) == ("dapo", 0.1, 0.1)
    assert settings(tmp_path, epsilon_high=0.3).epsilon == 3e-4
    assert gspo.beta == 0.0 and gspo.mask_truncated_completions and gspo.disable_dropout
    assert settings(tmp_path, max_completion_length=20480).soft_overlong_tokens == 4096


def test_the_defaults_alone_are_a_valid_config(tmp_path):
    config = DapoGspoConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert config.generation_batch_size == 64 and config.num_generations == 16 and config.warmup_steps == 20
    assert config.lr_scheduler_type == "constant_with_warmup" and config.learning_rate == 1e-6
    # A share of the run may fall anywhere where each update has a generated batch of its own.
    assert settings(tmp_path, save_strategy="steps", save_steps=0.5, steps_per_generation=1).save_steps == 0.5


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"modes": "slow"}, "modes='slow' is unknown; use one of both, thinking, non-thinking"),
        ({"importance_sampling_level": "word"}, "use one of sequence, token"),
        ({"reward_errors": "ignore"}, "use one of raise, skip"),
        ({"max_resample_rounds": -1}, "max_resample_rounds=-1"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "choose with modes"),
        ({"soft_overlong_tokens": 13}, "soft_overlong_tokens=13"),
        ({"per_device_train_batch_size": GENERATIONS}, "4 rows does not split into instructions of 8"),
        ({"save_strategy": "steps", "save_steps": 3, "num_iterations": 2}, "use a multiple of 2"),
        ({"save_strategy": "steps", "save_steps": 0.5, "num_iterations": 2}, "save_steps=0.5 is a share .* multiple of 2"),
        ({"save_strategy": "steps", "save_steps": 2, "num_iterations": 2, "max_steps": 3}, "max_steps=3 .* multiple of 2"),
        ({"save_strategy": "steps", "save_steps": 6, "steps_per_generation": 4}, "use a multiple of 4"),
    ],
)
def test_a_wrong_setting_is_one_sentence(tmp_path, wrong, complaint):
    with pytest.raises(ValueError, match=complaint):
        settings(tmp_path, **wrong)


# -- prompts ------------------------------------------------------------------------------------------------------------
def test_too_few_prompts_and_too_long_completions_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="1 instructions, a generation batch 2"):
        train(tokenizer, tmp_path, mixed, questions(1))
    with pytest.raises(ValueError, match="leaves -3 of the model's 2048 positions"):
        train(tokenizer, tmp_path, mixed, questions(4), max_completion_length=2051)


def test_a_tokenizer_that_splits_the_tags_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate("</think>".replace("<", "<a"))}
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(letters, [])), eos_token="a")
    assert len(plain("<think>").input_ids) > 1
    with pytest.raises(ValueError, match="the tokenizer reads <think> as .* not as one token"):
        train(plain, tmp_path, mixed, questions(4), model=llama(range(20)))


# -- the trainer beside TRL's -------------------------------------------------------------------------------------------
RATIOS = [{"importance_sampling_level": "sequence"}, {"importance_sampling_level": "token"}]
RATIOS += [{"importance_sampling_level": "sequence", "loss_type": "dapo"}]


@pytest.mark.parametrize("ratio", RATIOS, ids=lambda ratio: "-".join(ratio.values()))
@pytest.mark.parametrize("thinking", [True, False])
def test_without_its_additions_it_is_trls_trainer(tokenizer, tmp_path, ratio, thinking):
    more = {"num_iterations": 2, "max_steps": 4}
    modes = "thinking" if thinking else "non-thinking"
    plain = {"dynamic_sampling": False, "soft_overlong_tokens": 0, "mask_truncated_completions": False}
    ours = train(tokenizer, tmp_path / "a", mixed, questions(8), modes=modes, **plain, **ratio, **more)
    clip = {"epsilon": ours.args.epsilon, "epsilon_high": ours.args.epsilon_high, "loss_type": ours.args.loss_type}
    theirs = stock(tokenizer, tmp_path / "b", mixed, questions(8), thinking, **(ratio | clip), **more)
    assert_same(weights(ours), weights(theirs), rtol=0, atol=0)
    assert moved(ours, tokenizer) > 1e-3, "vacuous: nothing was learned"
    assert [log.get("loss") for log in ours.state.log_history] == [log.get("loss") for log in theirs.state.log_history]


@pytest.mark.parametrize("ratio", RATIOS, ids=lambda ratio: "-".join(ratio.values()))
def test_dead_groups_are_no_part_of_the_loss(tokenizer, tmp_path, ratio):
    """Questions 0 to 3 with two dead groups, against TRL's own trainer on the two live ones alone."""
    more = {"max_steps": 1, "modes": "thinking", "max_resample_rounds": 0}
    ours = train(tokenizer, tmp_path / "a", mixed, questions(4), soft_overlong_tokens=10, **more, **ratio)
    overlong = [log["rewards/soft_overlong_punishment_reward/std"] for log in ours.state.log_history[:1]]
    assert overlong[0] > 0.1, "vacuous: the shaped reward is the same everywhere"
    clip = {"epsilon": ours.args.epsilon, "epsilon_high": ours.args.epsilon_high, "loss_type": ours.args.loss_type}
    # The punishment is part of what the live groups learn, so TRL gets it too.
    from trl.rewards import get_soft_overlong_punishment

    taught = type("Taught", (ScriptedStock,), {"script": staticmethod(mixed)})
    theirs = taught(
        llama(tokenizer),
        [*ours.reward_funcs[:2], get_soft_overlong_punishment(12, 10)],
        settings(
            tmp_path / "b", GRPOConfig, max_steps=1, per_device_train_batch_size=2 * GENERATIONS,
            chat_template_kwargs={"enable_thinking": True}, **(ratio | clip),
        ),
        Dataset.from_list([row | {"thinking": True} for row in questions(2, start=2)]),
        processing_class=tokenizer,
    )  # fmt: skip
    theirs.train()
    assert_same(weights(ours), weights(theirs), rtol=1e-5, atol=1e-7)
    assert moved(ours, tokenizer) > 1e-3
    log = ours.state.log_history[0]
    assert (log["sampling/dead_groups"], log["sampling/keep_rate"], log["sampling/rounds"]) == (2, 0.5, 1)
    assert (log["thinking/all_right"], log["thinking/all_wrong"], log["thinking/accuracy"]) == (0.25, 0.25, 9 / 16)


def test_on_policy_only_the_aggregation_matters(tokenizer, tmp_path):
    """What the config's docstring says of the combinations, at one update a batch."""
    token, sequence_dapo, sequence_grpo = (
        weights(train(tokenizer, tmp_path, mixed, questions(8), **ratio)) for ratio in (RATIOS[1], RATIOS[2], RATIOS[0])
    )
    assert_same(token, sequence_dapo, rtol=0, atol=1e-6)
    assert max((token[name] - sequence_grpo[name]).abs().max().item() for name in token) > 1e-3


def test_masked_rows_are_masked_whole(tokenizer, tmp_path):
    """Not by their advantage alone: a KL term or an entropy bonus would still see them."""
    trainer = train(tokenizer, tmp_path, mixed, questions(4), max_steps=1)
    batch = {
        "completion_mask": torch.tensor([[1, 1], [1, 0], [1, 1], [0, 0]]),
        "advantages": torch.tensor([1.0, 2, 3, 4]),
    }
    masked = trainer._mask_dead(batch, torch.tensor([True, True, False, True]))
    assert masked["completion_mask"].tolist() == [[1, 1], [1, 0], [0, 0], [0, 0]]
    # Two of four rows count, and the mean over rows (loss_type grpo) is to be one over those two.
    assert masked["advantages"].tolist() == [2.0, 4.0, 0.0, 0.0] and masked["num_items_in_batch"] == 3


def test_a_full_batch_of_live_groups_is_asked_for(tokenizer, tmp_path):
    """Half of all questions are dead: every batch ends full, and each round asks every instruction in both modes."""
    judged = []

    def judge(answer, row):
        judged.append(answer)
        return judge_text(answer, row)

    trainer = train(tokenizer, tmp_path, mixed, questions(40), judge=judge, max_steps=3, shuffle_dataset=True)
    assert len(judged) == sum(map(len, trainer.asked)), "each completion is judged once"
    logs = [log for log in trainer.state.log_history if "sampling/rounds" in log]
    assert all(log["sampling/dead_groups"] == 0 for log in logs)
    assert [log["sampling/rounds"] > 1 for log in logs] == [log["sampling/keep_rate"] < 1 for log in logs]
    assert max(log["sampling/rounds"] for log in logs) > 1, "vacuous: nothing was resampled"
    assert sum(log["sampling/completions"] for log in logs) == sum(map(len, trainer.asked))
    for round_ in trainer.asked:
        texts = [tokenizer.decode(ids) for ids in round_]
        thinking = [text.removesuffix("<think>") for text in texts if text.endswith("<think>")]
        direct = [text.removesuffix("</think>") for text in texts if text.endswith("</think>")]
        assert (
            thinking == direct and len(texts) == 2 * len(thinking) and len(set(thinking)) * GENERATIONS == len(thinking)
        )
    trained = [prompt[0]["content"] for prompt in trainer._logs["prompt"]]
    assert len(trained) == 16 and all(int(question) % 4 > 1 for question in trained), "a dead group was trained on"


def test_rounds_are_bounded_and_what_is_left_is_masked_aloud(tokenizer, tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    script = lambda question, number, thinking: mixed("1", number, thinking)  # noqa: E731
    with caplog.at_level(logging.WARNING):
        trainer = train(tokenizer, tmp_path, script, questions(40), max_steps=2, max_resample_rounds=3)
    log = trainer.state.log_history[0]
    assert (log["sampling/rounds"], log["sampling/dead_groups"], log["sampling/completions"]) == (4, 4, 64)
    assert log["loss"] == 0.0 and moved(trainer, tokenizer) == 0.0
    assert "none of 16 groups in 4 rounds has a spread of rewards (0 all right, 16 all wrong" in caplog.text


def test_a_failing_judge_stops_the_run_or_costs_its_group(tokenizer, tmp_path):
    def shaky(answer, row):
        if row["prompt"][0]["content"] == "2" and row["thinking"]:
            raise KeyError("no such unit")
        return judge_text(answer, row)

    with pytest.raises(ValueError, match="judge shaky failed with KeyError.*prompt .*'2'"):
        train(tokenizer, tmp_path, mixed, questions(2, start=2), judge=shaky, max_steps=1)
    for dynamic in (True, False):
        trainer = train(
            tokenizer, tmp_path, mixed, questions(2, start=2), judge=shaky, max_steps=1,
            reward_errors="skip", dynamic_sampling=dynamic, max_resample_rounds=0,
        )  # fmt: skip
        log = trainer.state.log_history[0]
        assert (log["sampling/failed"], log["sampling/dead_groups"]) == (1, 1) and math.isfinite(log["loss"])


def test_logged_columns_stay_with_the_rows_that_are_kept(tokenizer, tmp_path):
    def noted(prompts, log_extra, **columns):
        log_extra("question", [prompt[0]["content"] for prompt in prompts])
        return [0.0] * len(prompts)

    trainer = train(
        tokenizer, tmp_path, mixed, questions(40), max_steps=2, shaping_rewards=[noted], shuffle_dataset=True
    )
    logged = list(trainer._logs["extra"]["question"])
    assert logged == [prompt[0]["content"] for prompt in trainer._logs["prompt"]] and len(logged) == 16
    assert "rewards/noted/mean" in trainer.state.log_history[0]


def test_truncated_completions_are_masked_and_wrong(tokenizer, tmp_path):
    def cut(question, number, thinking):
        return "so so so so" if number == 0 else mixed("2", number, thinking)

    log = train(tokenizer, tmp_path, cut, questions(8), max_steps=1).state.log_history[0]
    assert log["thinking/truncated"] == log["non_thinking/truncated"] == 0.25
    assert log["thinking/format_error"] == 0.0 and log["thinking/accuracy"] == 0.25


def test_evaluation_measures_both_modes_without_resampling(tokenizer, tmp_path):
    held_out = Dataset.from_list(questions(4))
    trainer = train(tokenizer, tmp_path, mixed, questions(8), max_steps=1, eval_dataset=held_out)
    metrics = trainer.evaluate()
    assert metrics["eval_thinking/accuracy"] == metrics["eval_non_thinking/accuracy"] == 9 / 16
    assert metrics["eval_sampling/rounds"] == 1 and metrics["eval_sampling/dead_groups"] == 0


def test_how_an_evaluation_is_cut_into_batches_does_not_matter(tokenizer, tmp_path):
    """Batches of three groups hold two of one mode and one of the other."""
    measured = []
    for rows in (24, 12):
        more = {"max_steps": 1, "per_device_eval_batch_size": rows, "eval_dataset": Dataset.from_list(questions(3))}
        trainer = train(tokenizer, tmp_path, mixed, questions(8), **more)
        for metrics in (trainer.evaluate(), trainer.evaluate()):
            measured.append({name: value for name, value in metrics.items() if "thinking/" in name})
    assert all(each == measured[0] for each in measured) and measured[0]["eval_thinking/accuracy"] == 0.5


# -- real generation ----------------------------------------------------------------------------------------------------
def odd_length(answer, row):
    return len(answer) % 2 == 1


def few_tokens(tokenizer):
    """An untrained model hardly ever ends a turn; with a handful of tokens left to it, it does."""
    left = tokenizer("0 1 2</think><|im_end|>").input_ids
    return {"suppress_tokens": [token for token in range(len(tokenizer)) if token not in left]}


def really(tokenizer, folder, model, rows=12, resume=None, **more):
    arguments = {"max_steps": 4, "max_resample_rounds": 2, "shuffle_dataset": True, "optim": "adamw_torch"}
    arguments |= {"learning_rate": 1e-2, "max_completion_length": 8, "generation_kwargs": few_tokens(tokenizer)}
    options = {name: more.pop(name) for name in ("peft_config",) if name in more}
    trainer = DapoGspoTrainer(
        model, odd_length, settings(folder, **(arguments | more)), Dataset.from_list(questions(rows)),
        processing_class=tokenizer, **options,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


TIMES = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")


def without_times(logs):
    return [{key: value for key, value in log.items() if key not in TIMES} for log in logs if "loss" in log]


def test_a_resumed_run_ends_bit_identical(tokenizer, tmp_path):
    """Four steps of two instructions over five: the run is resumed within its second epoch, resampling all the way."""
    straight = really(tokenizer, tmp_path / "a", axk1(tokenizer), rows=5)
    really(tokenizer, tmp_path / "b", axk1(tokenizer), rows=5, save_strategy="steps", save_steps=3)
    resumed = really(tokenizer, tmp_path / "b", axk1(tokenizer), rows=5, resume=str(tmp_path / "b" / "checkpoint-3"))
    logs = without_times(straight.state.log_history)
    assert straight.state.epoch == 2.0 and logs[-1]["sampling/rounds"] > 1 and all(log["grad_norm"] > 0 for log in logs)
    assert_same(weights(resumed), weights(straight), rtol=0, atol=0)
    assert without_times(resumed.state.log_history) == without_times(straight.state.log_history)


def test_a_finished_run_trains_no_further(tokenizer, tmp_path):
    """Killed behind its last checkpoint, while the model was saved, a run begins again with nothing left to do."""
    settings = {"rows": 10, "save_strategy": "steps", "save_steps": 4}
    finished = really(tokenizer, tmp_path, axk1(tokenizer), **settings)
    again = really(tokenizer, tmp_path, axk1(tokenizer), resume=str(tmp_path / "checkpoint-4"), **settings)
    assert again.state.global_step == 4
    assert_same(weights(again), weights(finished), rtol=0, atol=0)


def test_a_static_cache_samples_the_same(tokenizer, tmp_path):
    growing = really(tokenizer, tmp_path, axk1(tokenizer), max_steps=1)
    static = really(tokenizer, tmp_path, axk1(tokenizer), max_steps=1, cache_implementation="static")
    assert static.generation_config.cache_implementation == "static"
    assert_same(weights(static), weights(growing), rtol=0, atol=1e-6)


def test_router_bias_is_frozen_while_the_router_learns(tokenizer, tmp_path):
    model = axk1(tokenizer)
    biases = [value for name, value in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert biases, "vacuous: no router has a bias"
    for bias in biases:
        bias.copy_(torch.linspace(-0.5, 0.5, len(bias)))
    routers = {name: value.detach().clone() for name, value in model.named_parameters() if name.endswith("gate.weight")}
    trainer = really(tokenizer, tmp_path, model, max_steps=2)
    assert all(torch.equal(bias, torch.linspace(-0.5, 0.5, len(bias))) for bias in biases)
    changed = [
        name for name, value in trainer.model.named_parameters() if name in routers and (value != routers[name]).any()
    ]
    assert changed == list(routers) != []


@pytest.mark.parametrize("targets", [["kv_b_proj"], ["q_b_proj", "o_proj"]], ids=lambda targets: targets[0])
def test_cached_generation_is_the_full_forward_under_lora(tokenizer, tmp_path, targets):
    """The sampler's log-probabilities are those of the loss: the absorbed decode must not skip an adapter."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(
        r=4, target_modules=targets, lora_dropout=0.5, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    trainer = really(tokenizer, tmp_path, axk1(tokenizer), max_steps=1, peft_config=adapter)
    model = trainer.model.train()
    prompt = torch.tensor([render_prompt(tokenizer, ask("7"), True)] * 3)
    chosen = {"do_sample": True, "max_new_tokens": 16, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        output = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), eos_token_id=None, **chosen)
        completion = output.sequences[:, prompt.shape[1] :]
        sampled = torch.stack(output.logits, dim=1).log_softmax(-1).gather(2, completion[..., None])[..., 0]

        def forward():
            mask = torch.ones_like(output.sequences)
            return trainer._get_per_token_logps_and_entropies(model, output.sequences, mask, completion.shape[1])[0]

        torch.testing.assert_close(sampled, forward(), rtol=0, atol=2e-5)
        with model.disable_adapter():
            assert (sampled - forward()).abs().max() > 0.1, "vacuous: the adapter changes nothing"


def test_lora_leaves_the_base_and_moves_the_adapter(tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    model = axk1(tokenizer)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **target_names(model, ["attention", "routed"]))
    trainer = really(tokenizer, tmp_path, model, max_steps=2, peft_config=adapter, gradient_checkpointing=True)
    assert type(trainer.model.get_submodule("base_model.model.model.layers.1.mlp.experts")) is ParamWrapper
    after = {
        name.replace("base_layer.", ""): value for name, value in trainer.model.get_base_model().state_dict().items()
    }
    assert all(torch.equal(after[name], value) for name, value in base.items())
    moved_ = [value.abs().max().item() for name, value in trainer.model.named_parameters() if "lora_B" in name]
    assert moved_ and min(moved_) > 0


def test_a_path_builds_our_class_and_what_is_saved_knows_its_control_tokens(tokenizer, tmp_path):
    axk1(tokenizer).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    config = settings(tmp_path / "out", model_init_kwargs={"attn_implementation": "eager"})
    trainer = DapoGspoTrainer(str(tmp_path / "start"), odd_length, config, Dataset.from_list(questions(4)))
    assert type(trainer.model) is AxK1ForCausalLM and trainer.model.config._attn_implementation == "eager"
    assert trainer.model.dtype == torch.float32
    trainer.save_model(tmp_path / "out")
    saved = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert tokenizer.convert_ids_to_tokens([saved["think_token_id"], saved["end_think_token_id"]]) == [
        "<think>",
        "</think>",
    ]


# -- what is shown ------------------------------------------------------------------------------------------------------
def test_a_log_is_a_table_of_the_modes(tokenizer, tmp_path, capsys):
    train(tokenizer, tmp_path, mixed, questions(8), max_steps=1, disable_tqdm=False)
    shown = capsys.readouterr()
    table = mode_table({f"{mode}/{name}": 0.25 for mode in ("thinking", "non_thinking") for name in dapo_gspo.COLUMNS})
    head, first, second = table.splitlines()
    assert head.split() == "accuracy format error truncated tokens all right all wrong keep rate".split()
    assert first.split() == ["thinking", "25.0%", "25.0%", "25.0%", "0.2", "25.0%", "25.0%", "25.0%"]
    assert second.split()[0] == "non_thinking" and len({len(line) for line in table.splitlines()}) == 1
    written = shown.out + shown.err
    assert head in written and "keep_rate" in written and "frac_reward_zero_std" not in written
    assert mode_table({"loss": 1.0}) == ""
