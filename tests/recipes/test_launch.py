"""Do the launch files ask for what exists, and do two processes started as they start them equal one?"""

import json
import os
import shlex
import stat
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from transformers import AutoTokenizer, BitsAndBytesConfig

pytest.importorskip("transformers.distributed.expert_parallel", reason="sharding by plans needs transformers 5.21")

import axk1
from modeling_axk1 import AxK1Config, AxK1ForCausalLM, count_parameters
from modeling_axk1.quantization_axk1 import quantized_bytes
from recipes import generate_sharded, train_pipeline
from tests.documents import LAUNCHERS, ROOT, blocks_of, commands_in, documented
from tests.ranks import run_on_ranks
from tests.recipes.launch_checks import run_as_on_gpus, run_code, run_module, run_recipes
from tests.stand_ins import make_stand_ins
from trainers import pretrain_run, sft
from trainers.curriculum import load_curriculum, plan_steps
from trainers.pipeline import next_token_loss

LAUNCH = Path(generate_sharded.__file__).parent / "launch"
PROGRAMS = ("torchrun", "srun", "vllm", "python3", "axk1")
ON_A_CPU = "--use_cpu true --bf16 false --disable_tqdm true --gradient_accumulation_steps 1"
# What Slurm tells a job on the first of its machines.
SLURM = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "5"}
# Writes each argument on a line of its own, and a line of dashes.
RECORDER = '#!/bin/sh\nprintf "%s\\n" "$(basename "$0")" "$@" ---- >> "$RECORD"\n'


def commands_of(file: str, folder: Path, *arguments: str, **environment: str) -> list[list[str]]:
    """The commands that a launch file runs, recorded by programs of the same names that do nothing."""
    for program in PROGRAMS:
        (folder / program).write_text(RECORDER)
    (folder / "scontrol").write_text("#!/bin/sh\necho node7\n")
    for program in (*PROGRAMS, "scontrol"):
        (folder / program).chmod(stat.S_IRWXU)
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "RECORD": str(folder / "record")}
    subprocess.run(["bash", LAUNCH / file, *arguments], env=environment, check=True, timeout=60)
    return [call.splitlines() for call in (folder / "record").read_text().split("----\n") if call]


def module_arguments(command: list[str], module: str) -> list[str]:
    """What torchrun hands to the module."""
    at = command.index("-m")
    assert command[at + 1] == module
    return command[at + 2 :]


def test_every_launch_file_is_tested_here():
    tested = Path(__file__).read_text()
    files = sorted(path.name for path in LAUNCH.iterdir())
    assert len(files) == 11 and all(f'"{name}"' in tested for name in files), files


@pytest.mark.parametrize("file", ["pretrain_torchrun.sh", "pretrain_slurm.sh"])
def test_pretraining(file, tmp_path):
    said = {"STAGES": str(LAUNCH.parent / "k1_stages.yaml"), "DATA": "a.jsonl b.jsonl", "MODEL": "light", "GPUS": "8"}
    said |= {"TOKENIZER": "t", "OUT": str(tmp_path / "out"), "SLURM_NNODES": "4", "SLURM_GPUS_ON_NODE": "8"}
    said |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "5"}
    (command,) = commands_of(file, tmp_path, "--scale", "1e-3", "--use_cpu", "true", "--bf16", "false", **said)
    assert command[:2] == ["srun", "torchrun"] if "slurm" in file else command[0] == "torchrun"
    assert command[command.index("--nproc_per_node") + 1] == "8"
    pretrain, *settings = module_arguments(command, "axk1")
    assert pretrain == "pretrain"
    path, arguments, config = pretrain_run.parse(settings)
    assert str(path) == said["STAGES"] and arguments.data == ["a.jsonl", "b.jsonl"] and arguments.scale == 1e-3
    assert config.recompute == "selective" and config.output_dir == said["OUT"]
    # A rank holds one row of the longest context at a time.
    ranks = 32 if "slurm" in file else 8
    steps = plan_steps(load_curriculum(path, 1e-3), ranks * config.gradient_accumulation_steps)
    assert max(step.tokens for step in steps) == ranks * config.gradient_accumulation_steps * 32768


def test_generating_with_tensor_and_expert_parallelism(tmp_path):
    (command,) = commands_of("generate_tp_ep.sh", tmp_path, "k1", "Hello?", NODES="2", TP="16", EP="16", HEAD="node7")
    assert command[:3] == ["torchrun", "--nnodes", "2"] and "node7:29500" in command
    options = generate_sharded.parse(module_arguments(command, "recipes.generate_sharded"))
    assert (options.tp, options.ep, options.prompt, options.think) == (16, 16, "Hello?", True)
    assert not options.four_bit
    (_, command) = commands_of("generate_tp_ep.sh", tmp_path, "k1", "Hello?", FOUR_BIT="1")
    assert generate_sharded.parse(module_arguments(command, "recipes.generate_sharded")).four_bit


def test_generating_and_training_over_a_pipeline(tmp_path):
    (command,) = commands_of("generate_pp.sh", tmp_path, "m", "Hello?", STAGES="8", NODES="2")
    assert command[command.index("--nproc-per-node") + 1] == "4"
    assert generate_sharded.parse(module_arguments(command, "recipes.generate_sharded")).pp == 8
    (_, command) = commands_of("train_pp.sh", tmp_path, "m", "text", "out")
    options = train_pipeline.parse(module_arguments(command, "recipes.train_pipeline"))
    assert (options.model, options.text, options.out, options.micro_batches) == ("m", "text", "out", 16)


def test_fine_tuning_with_fsdp2_and_expert_parallelism_on_one_machine_and_under_slurm(tmp_path):
    config = str(LAUNCH / "sft_fsdp2_ep.yaml")
    _, settings, _ = sft.parse(["--config", config, "--use_cpu", "true"])
    assert settings.model_init_kwargs["distributed_config"]["ep_size"] == 8 and settings.save_only_model
    (command,) = commands_of("sft.sbatch", tmp_path, "m", **SLURM)
    assert command[:2] == ["srun", "torchrun"] and "node7:20005" in command
    given = module_arguments(command, "axk1")
    assert given[:3] == ["sft", "--config", "recipes/launch/sft_fsdp2_ep.yaml"]
    _, settings, model = sft.parse(["--config", config, *given[3:], "--use_cpu", "true"])
    layout = settings.model_init_kwargs["distributed_config"]
    assert model.model_name_or_path == "m" and (layout["fsdp_size"], layout["ep_size"]) == (16, 8)


def test_context_parallelism_and_fsdp2_of_accelerate():
    config = load_config_from_file(str(LAUNCH / "context_parallel.yaml"))
    sizes = config.parallelism_config
    ranks = sizes["parallelism_config_dp_shard_size"] * sizes["parallelism_config_cp_size"]
    assert config.fsdp_config["fsdp_version"] == 2 and ranks == config.num_processes == 8
    # The settings that the file's own header adds.
    _, settings, model = sft.parse(
        ["--config", str(LAUNCH.parent / "configs/sft_8gpu.yaml"), "--use_cpu", "true", "--max_length", "32768"]
        + ["--per_device_train_batch_size", "2", "--pad_to_multiple_of", "8", "--attn_implementation", "sdpa"]
        + ["--probe_batch_size", "1"]
    )
    assert settings.pad_to_multiple_of % (2 * sizes["parallelism_config_cp_size"]) == 0 and not settings.packing
    assert model.attn_implementation == "sdpa"


def test_megatron_by_conversion(tmp_path):
    (tmp_path / "work/trained").mkdir(parents=True)
    (tmp_path / "work/trained/latest_checkpointed_iteration.txt").write_text("7")
    commands = commands_of("megatron.sh", tmp_path, "m", str(tmp_path / "work"))
    options = [axk1.build_parser().parse_args(command[1:]) for command in commands]
    assert [command[2] for command in commands] == ["to-megatron", "inspect", "to-hf", "verify"]
    stages, last = options[0].pp, options[0].last_stage_layers
    assert (AxK1Config.preset("k1").num_hidden_layers - last) % (stages - 1) == 0


def test_serving_by_vllm_and_sglang(tmp_path):
    """What tests/interop/test_vllm_runs.py runs, with a few more flags; SGLang's published ones, which is not installed here."""
    (command,) = commands_of("serve_vllm.sh", tmp_path, "MODEL", TP="8", PP="1")
    assert command[:3] == ["vllm", "serve", "MODEL"] and set(documented("vllm serve MODEL")) <= set(command)
    assert command[command.index("--distributed-executor-backend") + 1] == "mp"
    (_, command) = commands_of("serve_sglang.sh", tmp_path, "m", NODE="1")
    assert command[:3] == ["python3", "-m", "sglang.launch_server"]
    flags = dict(zip(command[3::2], command[4::2]))
    assert flags["--tp-size"] == "16" and flags["--nnodes"] == "2" and flags["--node-rank"] == "1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the documentation's commands find what they name."""
    folder = tmp_path_factory.mktemp("launch")
    make_stand_ins(folder)
    return folder


# What begins several processes in the documentation, each by a part of its line: run below in two, with smaller sizes behind it.
LAUNCHED = {
    "generate_tp_ep.sh": "--max-new-tokens 12",
    "--four-bit": "--tp 2 --ep 2 --max-new-tokens 12 --think",
    "generate_pp.sh": "--max-new-tokens 12",
    "train_pp.sh": "--steps 3 --length 16 --batch 4 --micro-batches 2 --rate 1e-3",
    "sft_fsdp2_ep.yaml": "--use_cpu true --max_steps 3 --logging_steps 1 --learning_rate 2e-3 --warmup_steps 1 "
    "--gradient_checkpointing false --disable_tqdm true",
    "sft.sbatch": "--use_cpu true --max_steps 1 --gradient_checkpointing false --disable_tqdm true --model_init_kwargs "
    """'{"distributed_config": {"fsdp_size": 2, "ep_size": 2, "fsdp_mixed_precision": true}}'""",
    "-m axk1 pretrain": "--use_cpu true --model PLANNED --gradient_accumulation_steps 1 --disable_tqdm true",
    "fsdp2.yaml -m axk1 sft": f"{ON_A_CPU} --max_steps 1 --per_device_train_batch_size 2 --probe_steps 0 --eval_strategy no",
    "context_parallel.yaml": "--use_cpu true --bf16 false --disable_tqdm true --max_steps 3 --logging_steps 1 --warmup_steps 1 "
    "--learning_rate 2e-3 --gradient_accumulation_steps 1 --train_sampling_strategy random --eval_steps 3 --probe_steps 3 "
    "--probe_max_new_tokens 4",
    "fsdp2.yaml -m axk1 rl": f"{ON_A_CPU} --max_steps 1 --per_device_train_batch_size 4 --num_generations 2 --use_vllm false "
    "--steps_per_generation 1 --max_resample_rounds 1 --max_completion_length 4",
}
# Shrunk to nothing, its batches are one row, which two ranks cannot share.
INSTEAD = {"recipes/k1_stages.yaml": "stages.yaml"}
# What accelerate's launcher is told besides, so that two processes share each row.
CUT_IN_TWO = "--num_processes 2 --parallelism_config_dp_shard_size 1 --parallelism_config_cp_size 2 --mixed_precision no"


def started(part: str, folder: Path) -> tuple[str, list[str]]:
    """The module that a process of the documented command runs, with its arguments; GPUs of a script are two."""
    words = documented(part)
    if words[0] == "sbatch":
        words = words[1:]
    if words[0].startswith("recipes/launch/"):
        (records := folder / f"stubs-{part}").mkdir()
        (words,) = commands_of(Path(words[0]).name, records, *words[1:], GPUS="2", TP="2", EP="2", STAGES="2", **SLURM)
    if words[0] == "srun":
        words = words[1:]
    if words[0] == "torchrun":
        launch = torch.distributed.run.get_args_parser().parse_args(words[1:])
    else:
        launch = launch_command_parser().parse_args(words[2:])
    assert launch.module, words
    given = [INSTEAD.get(word, word) for word in launch.training_script_args]
    return launch.training_script, [*given, *shlex.split(LAUNCHED[part])]


def test_every_launch_of_the_documentation_is_run_here():
    lines = [
        " ".join(words)
        for page in (ROOT / "docs").rglob("*.md")
        for block in blocks_of(page)
        if block.language == "shell"
        for words in commands_in(block.text)
        if words[0].startswith(LAUNCHERS)
    ]
    assert all(any(part in line for part in LAUNCHED) for line in lines), lines
    assert len(lines) == len(LAUNCHED)


@pytest.mark.parametrize("part", ["sft.sbatch", "-m axk1 pretrain", "fsdp2.yaml -m axk1 sft", "fsdp2.yaml -m axk1 rl"])
def test_two_processes_run_a_documented_launch(part, folder, tmp_path):
    if "fsdp2" in part:
        environment = told_by_accelerate(part, "--num_processes 2 --mixed_precision no")
        run_on_ranks(2, tmp_path, run_as_on_gpus, str(folder), *started(part, tmp_path), environment)
    else:
        run_on_ranks(2, tmp_path, run_module, str(folder), *started(part, tmp_path))


def told_by_accelerate(part: str, options: str) -> dict[str, str]:
    """What the launcher puts into the environment of the documented command's processes."""
    launch = launch_command_parser().parse_args([*shlex.split(options), *documented(part)[2:]])
    launch, *_ = _validate_launch_command(launch)
    return {name: value for name, value in prepare_multi_gpu_env(launch).items() if os.environ.get(name) != value}


def test_rows_cut_over_two_processes_train_as_in_one(folder, tmp_path, monkeypatch):
    """accelerate's FSDP2 and context parallelism, with all that its launcher and the recipe ask for."""
    monkeypatch.chdir(folder)
    module, arguments = started("context_parallel.yaml", tmp_path)
    environment = told_by_accelerate("context_parallel.yaml", CUT_IN_TWO)
    assert (environment["FSDP_VERSION"], environment["PARALLELISM_CONFIG_CP_SIZE"]) == ("2", "2")
    cut = [*arguments, "--output_dir", str(tmp_path / "cut")]
    run_on_ranks(2, tmp_path, run_as_on_gpus, str(folder), module, cut, environment)
    sft.run_sft([*arguments[1:], "--output_dir", str(tmp_path / "whole")])
    found, truth = (measured_in(tmp_path / name / "checkpoint-3/trainer_state.json") for name in ("cut", "whole"))
    assert {"grad_norm", "loss_thinking", "loss_non_thinking", "eval_loss", "probe_tokens_thinking"} <= truth.keys()
    assert found == {name: pytest.approx(values, abs=1e-5) for name, values in truth.items()}
    found, truth = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "whole"))
    assert found.keys() == truth.keys()
    for name, weight in truth.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0, msg=name)


def measured_in(state: Path) -> dict[str, list[float]]:
    """What a trainer logged, by name, without its times."""
    entries = [entry.items() for entry in json.loads(state.read_text())["log_history"]]
    names = {name for entry in entries for name, _ in entry if "runtime" not in name and "per_second" not in name}
    return {name: [value for entry in entries for key, value in entry if key == name] for name in names}


def test_two_processes_run_the_documented_code(folder, tmp_path):
    page = ROOT / "docs/more_than_one_machine.md"
    (code,) = (block.text for block in blocks_of(page) if "under torchrun" in block.text)
    said = run_on_ranks(2, tmp_path, run_code, str(folder), code.replace("tp_size=8", "tp_size=2"))
    # One of two heads of 8 + 8 on each.
    assert said == ["AxK1ForCausalLM, 16"] * 2


def sft_settings(out: Path, rows: int) -> list[str]:
    _, (command, *settings) = started("sft_fsdp2_ep.yaml", out)
    assert command == "sft"
    return [*settings, "--output_dir", str(out), "--per_device_train_batch_size", str(rows)]


@pytest.fixture(scope="module")
def launched(folder, tmp_path_factory):
    """What each of two ranks got from the recipes and from `axk1 sft` with FSDP2 and expert parallelism."""
    out = tmp_path_factory.mktemp("launched")
    *chats, pipeline = (started(part, out)[1] for part in list(LAUNCHED)[:4])
    layout = json.dumps({"distributed_config": {"fsdp_size": 2, "ep_size": 2}})
    sft = [*sft_settings(out / "sft", rows=4), "--model_init_kwargs", layout]
    return out, run_on_ranks(2, out, run_recipes, str(folder), chats, pipeline, sft)


def test_two_ranks_say_what_one_says(folder, launched):
    tokenizer = AutoTokenizer.from_pretrained(folder / "MODEL")
    chat = [{"role": "user", "content": "What is 2 + 3?"}]
    given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    nf4 = BitsAndBytesConfig(**generate_sharded.NF4, bnb_4bit_compute_dtype=torch.bfloat16)
    truths = []
    for bits in ({}, {"quantization_config": nf4}):
        model = AxK1ForCausalLM.from_pretrained(folder / "MODEL", **bits).eval()
        torch.manual_seed(0)
        output = model.generate(**given, enable_thinking=True, max_new_tokens=12)
        truths.append(tokenizer.decode(output[0, given["input_ids"].shape[1] :]))
    assert truths[0] != truths[1]
    assert [said for said, *_ in launched[1]] == [[*truths, truths[0]]] * 2


def test_two_stages_train_as_one_process_does(folder, launched):
    model = AxK1ForCausalLM.from_pretrained(folder / "MODEL").train()
    tokenizer = AutoTokenizer.from_pretrained(folder / "MODEL")
    rows = train_pipeline.rows_of(tokenizer, (folder / "corpus.txt").read_text(), 16)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for step in range(3):
        ids = rows[torch.randint(len(rows), (4,), generator=torch.Generator().manual_seed(step))]
        loss = next_token_loss(model(ids).logits, ids)
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 1, "clipping must show"
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    (_, none, _), (_, pipelined, _) = launched[1]
    assert none is None and pipelined == pytest.approx(losses, abs=1e-5)
    trained = AxK1ForCausalLM.from_pretrained(folder / "OUT")
    for name, weight in model.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), weight, atol=1e-5, rtol=0, msg=name)


def test_sharded_fine_tuning_equals_one_process_and_saves_a_plain_checkpoint(folder, launched, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    trainer = sft.run_sft([*sft_settings(tmp_path, rows=8), "--model_init_kwargs", "{}"])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for *_, sharded in launched[1]:
        assert sharded == pytest.approx(losses, abs=1e-3)
    truth, saved = (load_file(folder / "model.safetensors") for folder in (tmp_path, launched[0] / "sft"))
    assert saved.keys() == truth.keys()
    for name, weight in truth.items():
        torch.testing.assert_close(saved[name], weight, atol=1e-5, rtol=0, msg=name)


def test_the_plan_of_one_rank_is_the_whole_model(capsys):
    said = generate_sharded.main(["k1", "--plan"])
    total = count_parameters(AxK1Config.preset("k1"))["total"]
    assert said == f"rank 0: {total:,} parameters, {total * 2 / 1e9:,.1f} GB" and said in capsys.readouterr().out


def test_the_plan_in_4_bits():
    said = generate_sharded.main(["k1", "--plan", "--four-bit"])
    assert said == f"each of 1 ranks: {quantized_bytes(AxK1Config.preset('k1'), 'nf4 double') / 1e9:,.1f} GB"
    eight = generate_sharded.main(["k1", "--plan", "--four-bit", "--tp", "8", "--ep", "8"])
    assert eight == "each of 8 ranks: 38.2 GB"
    # What the loader refuses has no plan: one sentence, from the same place.
    with pytest.raises(ValueError, match=r"and got \{'tp_size': 2\}; use the number of ranks for tp_size and ep_size"):
        generate_sharded.main(["k1", "--plan", "--four-bit", "--tp", "2"])
