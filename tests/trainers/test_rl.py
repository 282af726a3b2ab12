"""Does `axk1 rl` train by YAML and flags, resume, push, run in several processes, and are the example configs sound?"""

import json
from pathlib import Path

import pytest
import reasoning_gym
import torch
import trl
import yaml
from datasets import Dataset
from packaging.version import Version
from safetensors.torch import load_file

import axk1
from modeling_axk1 import AxK1ForCausalLM
from tests.folders import on_disk
from tests.random_models import tiny_chat_config
from tests.ranks import run_on_ranks
from tests.trainers.test_dapo_gspo import RATIOS, mixed, questions, train
from trainers.tokenizer import train_tokenizer

if Version(trl.__version__) < Version("1.16"):
    pytest.skip(f"axk1 rl needs TRL 1.16, found {trl.__version__}", allow_module_level=True)

from trainers import rl
from trainers.dapo_gspo import DapoGspoConfig, DapoGspoTrainer
from trainers.launching import find_checkpoint
from trainers.rl import RlArguments, draw_from_gym, load_prompts, parse

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny model of ours with its tokenizer, and a file of problems."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = train_tokenizer(["user assistant 0 1 2 3 4 5 6 7 8 9"], 300)
    torch.manual_seed(0)
    AxK1ForCausalLM(tiny_chat_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"question": f"{number} + 1", "answer": str(number + 1)} for number in range(12)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def odd_length(answer, row):
    return len(answer) % 2 == 1


def command(start, out, *more, judge="tests.trainers.test_rl:odd_length"):
    """The CPU example, shrunk: everything that is not overridden here comes from the YAML file."""
    left = train_tokenizer(["user assistant 0 1 2 3 4 5 6 7 8 9"], 300)("0 1 2</think><|im_end|>").input_ids
    few = {"suppress_tokens": [token for token in range(280) if token not in left]}
    flags = {
        "model_name_or_path": start, "dataset": start / "problems.jsonl", "prompt_column": "question", "judge": judge,
        "output_dir": out, "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 16, "num_generations": 4,
        "max_completion_length": 8, "generation_kwargs": json.dumps(few), "logging_steps": 1, "disable_tqdm": "true",
        "max_resample_rounds": 2,
    }  # fmt: skip
    pairs = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return ["rl", "--config", str(CONFIGS / "rl_cpu.yaml"), *pairs, *more]


def test_trains_saves_and_resumes_bit_identical(start, tmp_path, capsys):
    assert axk1.main(command(start, tmp_path / "a")) == 0
    shown = capsys.readouterr().out
    assert "(step 1)" in shown and "(step 2)" in shown and "report.html" in shown
    assert {"thinking", "non-thinking"} <= {word for line in shown.splitlines() if "keep rate" in line for word in line.split()}
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count("<svg") == 7 and "keep rate" in page and "non-thinking" in page
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"| base model | `{start.name}` |" in card and "| dataset | `problems.jsonl` |" in card and "gspo" in card
    assert "keep rate" in card and "| non-thinking |" in card
    # The second half again, from the first half's checkpoint alone.
    (tmp_path / "b").mkdir()
    kept = (tmp_path / "a" / "checkpoint-1").rename(tmp_path / "b" / "checkpoint-1") / "trainer_state.json"
    written = kept.stat().st_mtime_ns
    assert axk1.main(command(start, tmp_path / "b", "--resume_from_checkpoint", "latest")) == 0
    assert kept.stat().st_mtime_ns == written, "the run began anew"
    first, second, before = on_disk(tmp_path / "a"), on_disk(tmp_path / "b"), on_disk(start)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], before[name]) for name in first), "vacuous: nothing was learned"
    assert type(AxK1ForCausalLM.from_pretrained(tmp_path / "a")) is AxK1ForCausalLM
    assert (tmp_path / "a" / "tokenizer.json").exists()


def test_lora_evaluation_and_push(start, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(DapoGspoTrainer, "push_to_hub", lambda self, **named: pushed.append(named))
    monkeypatch.setattr(DapoGspoTrainer, "init_hf_repo", lambda self, token=None: None)
    more = ["--use_peft", "true", "--lora_target_modules", "o_proj", "--lora_dropout", "0"]
    more += ["--lora_target_parameters", "mlp.experts.down_proj"]
    more += ["--push_to_hub", "true", "--eval_split", "train", "--eval_strategy", "steps", "--eval_steps", "2"]
    more += ["--per_device_eval_batch_size", "8", "--save_strategy", "no"]
    assert axk1.main(command(start, tmp_path, *more)) == 0
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in adapter} == {"o_proj", "experts"}
    assert not (tmp_path / "model.safetensors").exists()
    # Trainer pushes when it saves; the last push brings the model card, as in TRL's own script.
    assert pushed[-1] == {"dataset_name": str(start / "problems.jsonl")}


@pytest.mark.parametrize("name", ["rl_cpu", "rl_gpu", "rl_8gpu"])
def test_every_example_config_is_understood_whole(name, monkeypatch):
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    processes = 8 if name == "rl_8gpu" else 1
    monkeypatch.setattr(DapoGspoConfig, "world_size", property(lambda self: processes))
    # bf16 wants a GPU or use_cpu; nothing else depends on it.
    arguments, config, model = parse(["--config", str(CONFIGS / f"{name}.yaml"), "--use_cpu", "true"])
    for key, value in (values | {"use_cpu": True, "report_to": []}).items():
        [holder] = [each for each in (arguments, config, model) if hasattr(each, key)]
        assert getattr(holder, key) == value or [value] == getattr(holder, key), key
    instructions = config.generation_batch_size // (2 * config.num_generations)
    assert instructions == {"rl_cpu": 16, "rl_gpu": 4, "rl_8gpu": 32}[name]
    updates = config.steps_per_generation // config.gradient_accumulation_steps
    assert updates == (4 if name == "rl_8gpu" else 1)
    assert rl.find_judge(arguments.judge)


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_zero3"])
def test_every_launch_config_is_understood_by_accelerate(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "recipes" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == 8 and config.mixed_precision == "bf16"
    # FSDP2 wraps what the model names.
    assert "AxK1DecoderLayer" in AxK1ForCausalLM._no_split_modules


def test_prompts_of_every_source(start, tmp_path):
    arguments = RlArguments(dataset=str(start / "problems.jsonl"), prompt_column="question", system_prompt="Be brief.")
    first = load_prompts(arguments, "train")[0]
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "0 + 1"}]
    assert first == {"prompt": asked, "answer": "1"}
    arguments.plain_text = True
    assert load_prompts(arguments, "train")[3]["prompt"] == "3 + 1"
    Dataset.from_list([{"prompt": [{"role": "user", "content": "hello"}]}]).save_to_disk(tmp_path / "saved")
    saved = load_prompts(RlArguments(dataset=str(tmp_path / "saved")), "train")
    assert saved[0]["prompt"] == [{"role": "user", "content": "hello"}]
    drawn = draw_from_gym(["chain_sum", "spell_backward"], 5)
    families = [json.loads(entry)["metadata"]["source_dataset"] for entry in drawn["entry"]]
    assert families == ["chain_sum", "spell_backward"] * 2 + ["chain_sum"]
    expected = reasoning_gym.create_dataset("chain_sum", seed=0, size=3)[1]["question"]
    assert drawn[2]["prompt"] == expected


def test_gsm8k_rows_are_judged_as_they_stand(tmp_path):
    row = {"question": "2 and 2?", "answer": "2 and 2 is <<2+2=4>>4.\n#### 4"}
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps(row))
    arguments = RlArguments(dataset=str(tmp_path / "gsm8k.jsonl"), prompt_column="question")
    loaded = load_prompts(arguments, "train")[0]
    judge = rl.find_judge(arguments.judge)
    assert judge("It is 4.", loaded) and not judge("It is 5.", loaded)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--prompt_column", "ask"], "no column ask, only question, answer; name it with --prompt_column"),
        (["--dataset", "nowhere.jsonl"], "nowhere.jsonl does not exist; check the path"),
        (["--dataset", "reasoning-gym:nothing", "--prompt_column", "prompt"], "reasoning-gym has no such family"),
        (["--dataset", "reasoning-gym:chain_sum", "--dataset_size", "0"], "dataset_size=0 leaves nothing to ask"),
        (["--judge", "maths"], "judge='maths' is unknown"),
        (["--modes", "slow"], "modes='slow' is unknown"),
        (["--config", "nowhere.yaml"], "No such file or directory: 'nowhere.yaml'"),
    ],
)
def test_an_error_is_one_line(start, tmp_path, capsys, more, complaint):
    given = command(start, tmp_path)
    if more[0] == "--config":
        given = ["rl", *more]
    assert axk1.main([*given, *more] if more[0] != "--config" else given) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("axk1: ") and complaint in error


def test_a_setting_that_does_not_exist_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="No model is named"):
        parse(["--dataset", "x", "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"])
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("dataset: x\nmodel_name_or_path: y\nlearning_rte: 1.0\n")
    with pytest.raises(ValueError, match="learning_rte"):
        parse(["--config", str(wrong), "--use_cpu", "true", "--bf16", "false"])
    with pytest.raises((SystemExit, ValueError), match="2|learning_rte"):
        parse(["--dataset", "x", "--use_cpu", "true", "--bf16", "false", "--learning_rte", "1.0"])


def test_latest_is_the_newest_whole_checkpoint(tmp_path, caplog):
    config = DapoGspoConfig(str(tmp_path / "new"), use_cpu=True, bf16=False, resume_from_checkpoint="latest")
    assert find_checkpoint(config) is None, "nothing to resume: start anew"
    for step in (5, 10, 15):
        (tmp_path / "new" / f"checkpoint-{step}").mkdir(parents=True)
    for step in (5, 10):
        (tmp_path / "new" / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    for unfinished in (None, "", '{"epoch": 1.0, "log_his'):
        if unfinished is not None:
            (tmp_path / "new" / "checkpoint-15" / "trainer_state.json").write_text(unfinished)
        config.resume_from_checkpoint = "latest"
        caplog.clear()
        assert find_checkpoint(config) == str(tmp_path / "new" / "checkpoint-10")
        assert "checkpoint-15 has no whole trainer_state.json: its saving was interrupted" in caplog.text
        config.resume_from_checkpoint = str(tmp_path / "new" / "checkpoint-15")
        with pytest.raises(ValueError, match="checkpoint-15 has no whole trainer_state.json"):
            find_checkpoint(config)


# -- two processes ------------------------------------------------------------------------------------------------------
def mostly_dead(question, number, thinking):
    """Two questions of eight can teach."""
    return mixed(question if int(question) % 8 in (2, 3) else "0", number, thinking)


def scripted_runs(out, processes):
    """Three steps with each kind of loss, and all that shows what was kept and learned."""
    tokenizer = train_tokenizer(["user assistant 0 1 2 3 4 5 6 7 8 9 right wrong so"], 300)
    runs = []
    for ratio in RATIOS:
        options = {"max_steps": 3, "per_device_train_batch_size": 16 // processes, "max_resample_rounds": 1}
        trainer = train(tokenizer, out, mostly_dead, questions(40), shuffle_dataset=True, **options, **ratio)
        logs = [log for log in trainer.state.log_history if "sampling/rounds" in log]
        kept = {
            "trained": [prompt[0]["content"] for prompt in trainer._logs["prompt"]],
            "advantages": list(trainer._logs["advantages"]),
            "logs": [{key: log[key] for key in log if key in ("loss", "reward") or "/" in key} for log in logs],
            "weights": {name: value.tolist() for name, value in trainer.model.state_dict().items()},
        }
        runs.append(kept)
    return runs


def runs_and_command(out, arguments):
    """What each process runs: the scripted runs, and then the command itself, on our own model with real sampling."""
    runs = scripted_runs(out, 2)
    assert axk1.main(arguments) == 0
    return runs


def test_two_processes_decide_alike_and_learn_what_one_learns(start, tmp_path):
    alone = scripted_runs(tmp_path, 1)
    arguments = command(start, tmp_path / "cli", "--save_strategy", "no", "--per_device_train_batch_size", "8")
    first, second = run_on_ranks(2, tmp_path, runs_and_command, tmp_path, arguments)
    for one, left, right in zip(alone, first, second):
        # The same groups are kept on both, and they are those that a single process keeps.
        assert left["trained"] == right["trained"] == one["trained"]
        assert left["advantages"] == right["advantages"] == pytest.approx(one["advantages"])
        rounds = [log["sampling/rounds"] for log in left["logs"]]
        dead = [log["sampling/dead_groups"] for log in left["logs"]]
        assert max(rounds) > 1 and 4 > max(dead) > 0, "vacuous: nothing was resampled or masked"
        for ours, theirs in zip(left["logs"], one["logs"]):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6, nan_ok=True)
        for name, value in one["weights"].items():
            torch.testing.assert_close(torch.tensor(left["weights"][name]), torch.tensor(value), rtol=1e-5, atol=1e-6)
            assert left["weights"][name] == right["weights"][name], name
    trained, before = on_disk(tmp_path / "cli"), on_disk(start)
    assert trained.keys() == before.keys() and any(not torch.equal(trained[name], before[name]) for name in before)
