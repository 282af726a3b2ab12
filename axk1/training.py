"""How is a model trained and judged from the command line?  `axk1 pretrain`, `sft`, `rl` and `eval`."""

from pathlib import Path

from axk1.parsing import add_command

PRETRAIN = """examples:
  axk1 pretrain recipes/k1_stages.yaml --data CURATED.jsonl --model nano --tokenizer DIR --scale 1e-9
  axk1 pretrain STAGES.yaml --data 'curated/documents/*.jsonl' --model PLANNED --tokenizer DIR --output_dir runs/pretrain
  axk1 pretrain STAGES.yaml ... --optimizer muon --recompute selective --on_spike rollback --bf16 true
  torchrun --nproc_per_node 8 -m axk1 pretrain STAGES.yaml ...      see recipes/launch for Slurm

STAGES.yaml is a table: tokens, context ramp, mixture, learning-rate phase and order of each stage; recipes/k1_stages.yaml shows
all of it. Its `model`, `tokenizer` and `settings` are overridden by flags. Settings are those of PretrainConfig
(TrainingArguments and more) and
  --data       what `axk1 curate` wrote (text, domain, difficulty) or the like, for sources that list no files of their own
  --model      nano, light, k1, a folder with a config.json (`axk1 plan --config` writes one), or a model to go on with
  --scale      all token counts times this; contexts and batches shrink where a level would hold no row a rank
`axk1 pretrain --all-settings` lists them all. Killed? The same command goes on, to the same numbers; SIGTERM saves first.
For Megatron: axk1 convert to-megatron OUTPUT_DIR CHECKPOINT."""
SFT = """examples:
  axk1 sft --config recipes/configs/sft_cpu.yaml
  axk1 sft --config recipes/configs/sft_cpu.yaml --max_steps 50 --resume_from_checkpoint latest
  axk1 sft --model_name_or_path MODEL --dataset gsm8k_train.jsonl --pairing paired --output_dir OUT
  axk1 sft --config FILE.yaml --use_peft true --lora_targets attention shared routed --lora_dropout 0
  accelerate launch --config_file ACCELERATE.yaml -m axk1 sft --config recipes/configs/sft_8gpu.yaml

Think-Fusion SFT on a Mode-Overlap Dataset: the same prompts with a thinking and with a direct answer. Settings are those
of ThinkFusionConfig (TRL's SFTConfig and more), of TRL's ModelConfig (LoRA, dtype) and
  --dataset       .jsonl or .parquet file, folder or Hub name: Mode-Overlap rows, or question and answer as in GSM8K
  --test_dataset  prompts that must not occur in training; a few of them are answered in both modes while it runs
A flag overrides the YAML file's value. `axk1 sft --all-settings` lists them all. --push_to_hub pushes at the end."""
RL = """examples:
  axk1 rl --config recipes/configs/rl_cpu.yaml
  axk1 rl --config recipes/configs/rl_cpu.yaml --max_steps 50 --resume_from_checkpoint latest
  axk1 rl --model_name_or_path MODEL --dataset gsm8k.jsonl --prompt_column question --judge math --output_dir OUT
  accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m axk1 rl --config recipes/configs/rl_8gpu.yaml

Every prompt is asked in both modes; groups of answers that are all right or all wrong are replaced by others (DAPO).
Settings are those of DapoGspoConfig (TRL's GRPOConfig and more), of TRL's ModelConfig (LoRA, dtype) and
  --dataset       .jsonl, .json, .parquet or .csv file, dataset folder, Hub name, or reasoning-gym:FAMILY,FAMILY
  --prompt_column the instruction: messages, or a text            --system_prompt, --plain_text: how a text is asked
  --judge         math, text, reasoning-gym, or your own package.module:function(answer, row)
A flag overrides the YAML file's value. `axk1 rl --all-settings` lists them all. --push_to_hub pushes at the end."""
EVAL = """examples:
  axk1 eval MODEL --tasks gsm8k_test.jsonl --modes think,no-think --out runs/eval
  axk1 eval MODEL --tasks reasoning-gym:color_cube_rotation --limit 200 --max-new-tokens 512
  axk1 eval MODEL --tasks lm-eval:ifeval lm-eval:aime25
  axk1 eval MODEL --tasks paper              the report's benchmarks, as far as lm-evaluation-harness has them

A task is FILE.jsonl (question and answer a line), reasoning-gym:FAMILY, lm-eval:TASK or paper. An answer that is cut by
the length limit or breaks its mode's format is wrong. Killed? Run the same command again: finished tasks are kept."""


def add(commands) -> None:
    _add_training(commands, "pretrain", pretrain, "pre-train in stages, by a table", PRETRAIN, "STAGES.yaml ")
    _add_training(commands, "sft", sft, "fine-tune a model in both modes (Think-Fusion)", SFT)
    _add_training(commands, "rl", rl, "train both modes by reinforcement (DAPO with GSPO's ratio)", RL)
    _add_eval(commands)


def _add_training(commands, name: str, run, summary: str, examples: str, first: str = "[--config FILE.yaml] ") -> None:
    command = add_command(commands, name, run, summary, examples)
    command.usage = f"axk1 {name} {first}[--SETTING VALUE ...]"
    command.add_argument("--all-settings", action="store_true", help="list every setting")
    command.set_defaults(settings=[])


def _add_eval(commands) -> None:
    command = add_command(commands, "eval", evaluate, "judge a model in both modes", EVAL)
    command.add_argument(
        "model_path", metavar="MODEL", help="folder or Hub name of any causal LM with both control tokens"
    )
    command.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="what to judge by, see below")
    command.add_argument("--modes", default="think,no-think", help="default think,no-think")
    command.add_argument("--out", type=Path, default=Path("runs/eval"), metavar="DIR", help="default runs/eval")
    command.add_argument("--limit", type=int, metavar="N", help="problems a task (default: all, 100 of reasoning-gym)")
    command.add_argument(
        "--max-new-tokens", type=int, default=4096, metavar="N", help="thought and answer (default 4096)"
    )
    command.add_argument("--batch-size", type=int, default=16, metavar="N", help="default 16")
    command.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="default 0: greedy; the authors use 0.6"
    )
    command.add_argument("--top-p", type=float, default=0.95, metavar="P", help="default 0.95, with a temperature")
    command.add_argument("--seed", type=int, default=0, help="of sampling, and of reasoning-gym's problems (default 0)")
    command.add_argument("--include-path", metavar="DIR", help="folder with more lm-eval task files")
    command.add_argument(
        "--device-map", default="auto", help="where the weights go: auto, cpu, cuda, ... (default auto)"
    )
    command.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16, ... (default auto)")


def pretrain(settings: list[str], all_settings: bool) -> None:
    from trainers.pretrain_run import run_pretrain

    run_pretrain(["STAGES.yaml", "--help"] if all_settings else settings)


def sft(settings: list[str], all_settings: bool) -> None:
    from trainers.sft import run_sft

    run_sft(["--help"] if all_settings else settings)


def rl(settings: list[str], all_settings: bool) -> None:
    from trainers.rl import run_rl

    run_rl(["--help"] if all_settings else settings)


def evaluate(**options) -> None:
    from trainers import report
    from trainers.scorecard import run_eval, shown

    rows = run_eval(**options)
    print(f"\n{report.text_table([shown(row) for row in rows])}\n\n{options['out'] / 'report.html'}")
