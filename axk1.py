"""What can be done from the command line?  `axk1 --help`: one subcommand a capability, imported when it is called."""

import argparse
import os
import sys
from pathlib import Path

DESCRIPTION = (
    "A.X K1 for Transformers: talk to it, serve it, train, merge and judge its two modes, convert its weights."
)
EXAMPLES = {
    None: """examples:
  axk1 chat runs/nano/fused --think
  axk1 serve runs/nano/fused --port 8000
  axk1 merge THINKING NONTHINKING MERGED --alpha 0.8
  axk1 pretrain recipes/k1_stages.yaml --data CURATED.jsonl --tokenizer DIR --scale 1e-9
  axk1 sft --config recipes/configs/sft_cpu.yaml
  axk1 rl --config recipes/configs/rl_cpu.yaml
  axk1 eval runs/nano/fused --tasks gsm8k_test.jsonl --modes think,no-think
  axk1 convert to-hf CHECKPOINT MODEL
  axk1 doctor MODEL
  axk1 push MODEL ORG/NAME --dry-run
  axk1 plan --flops 2.548e24
  axk1 plan serve k1 --gpu h200
  axk1 tokenizer train OUT --source ko=reviews.jsonl:0.6 --source code=src:0.4
  axk1 curate run recipes/configs/curate.yaml
  axk1 info k1

`axk1 COMMAND --help` says more. AXK1_DEBUG=1 (or --debug) shows the traceback of an error.""",
    "chat": """examples:
  axk1 chat runs/nano/fused                     direct answers
  axk1 chat runs/nano/fused --think --budget 64  a thought of at most 64 tokens before each answer

In the chat: /think and /no-think switch the mode, /budget N bounds the thought, /reset forgets, /quit leaves.""",
    "serve": """examples:
  axk1 serve runs/nano/fused --port 8000
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "fused",
    "messages": [{"role": "user", "content": "hello"}], "chat_template_kwargs": {"enable_thinking": true}}'

The thought comes back as `reasoning_content`, the answer as `content`.""",
    "merge": """examples:
  axk1 merge THINKING NONTHINKING MERGED                        0.8 x THINKING + 0.2 x NONTHINKING
  axk1 merge THINKING NONTHINKING SWEEP --alphas 0.6 0.7 0.8 0.9  SWEEP/alpha-0.6 ... SWEEP/alpha-0.9

Each is a folder of safetensors, of any architecture. Memory does not grow with the model. Killed, or out of disk
space: run the same command again, it goes on where it was.""",
    "adapter": """examples:
  axk1 adapter merge MODEL ADAPTER MERGED     W + scale x B A: a checkpoint without adapter, for everyone
  axk1 adapter export ADAPTER FOR_VLLM        the routed experts' adapters one by one, as vLLM names them

ADAPTER is what `axk1 sft --use_peft true` saved, or PEFT. MODEL is unquantised, also where the adapter was trained on a
quantised one. Memory of a merge does not grow with the model. Killed: run the same command again, it goes on.""",
    "sft": """examples:
  axk1 sft --config recipes/configs/sft_cpu.yaml
  axk1 sft --config recipes/configs/sft_cpu.yaml --max_steps 50 --resume_from_checkpoint latest
  axk1 sft --model_name_or_path MODEL --dataset gsm8k_train.jsonl --pairing paired --output_dir OUT
  axk1 sft --config FILE.yaml --use_peft true --lora_targets attention shared routed --lora_dropout 0
  accelerate launch --config_file ACCELERATE.yaml -m axk1 sft --config recipes/configs/sft_8gpu.yaml

Think-Fusion SFT on a Mode-Overlap Dataset: the same prompts with a thinking and with a direct answer. Settings are those
of ThinkFusionConfig (TRL's SFTConfig and more), of TRL's ModelConfig (LoRA, dtype) and
  --dataset       .jsonl or .parquet file, folder or Hub name: Mode-Overlap rows, or question and answer as in GSM8K
  --test_dataset  prompts that must not occur in training; a few of them are answered in both modes while it runs
A flag overrides the YAML file's value. `axk1 sft --all-settings` lists them all. --push_to_hub pushes at the end.""",
    "pretrain": """examples:
  axk1 pretrain recipes/k1_stages.yaml --data CURATED.jsonl --model nano --tokenizer DIR --scale 1e-9
  axk1 pretrain STAGES.yaml --data 'curated/documents/*.jsonl' --model PLANNED --tokenizer DIR --output_dir runs/pretrain
  axk1 pretrain STAGES.yaml ... --optimizer muon --recompute selective --on_spike rollback --bf16 true
  torchrun --nproc_per_node 8 -m axk1 pretrain STAGES.yaml ...      see recipes/launch for Slurm

STAGES.yaml is a table: tokens, context ramp, mixture, learning-rate phase and order of each stage; recipes/k1_stages.yaml shows
all of it. Its `model`, `tokenizer` and `settings` are overridden by flags. Settings are those of PretrainConfig
(TrainingArguments and more) and
  --data       what `axk1 curate` wrote (text, domain, difficulty) or the like, for sources that list no files of their own
  --model      nano, light, k1, a folder with a config.json (`axk1 plan --config` writes one), or a model to go on with
  --scale      all token counts times this; contexts and batches shrink where a level would hold no row
`axk1 pretrain --all-settings` lists them all. Killed? The same command goes on, to the same numbers; SIGTERM saves first.
For Megatron: axk1 convert to-megatron OUTPUT_DIR CHECKPOINT.""",
    "eval": """examples:
  axk1 eval MODEL --tasks gsm8k_test.jsonl --modes think,no-think --out runs/eval
  axk1 eval MODEL --tasks reasoning-gym:color_cube_rotation --limit 200 --max-new-tokens 512
  axk1 eval MODEL --tasks lm-eval:ifeval lm-eval:aime25
  axk1 eval MODEL --tasks paper              the report's benchmarks, as far as lm-evaluation-harness has them

A task is FILE.jsonl (question and answer a line), reasoning-gym:FAMILY, lm-eval:TASK or paper. An answer that is cut by
the length limit or breaks its mode's format is wrong. Killed? Run the same command again: finished tasks are kept.""",
    "rl": """examples:
  axk1 rl --config recipes/configs/rl_cpu.yaml
  axk1 rl --config recipes/configs/rl_cpu.yaml --max_steps 50 --resume_from_checkpoint latest
  axk1 rl --model_name_or_path MODEL --dataset gsm8k.jsonl --prompt_column question --judge math --output_dir OUT
  accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m axk1 rl --config recipes/configs/rl_8gpu.yaml

Every prompt is asked in both modes; groups of answers that are all right or all wrong are replaced by others (DAPO).
Settings are those of DapoGspoConfig (TRL's GRPOConfig and more), of TRL's ModelConfig (LoRA, dtype) and
  --dataset       .jsonl, .json, .parquet or .csv file, dataset folder, Hub name, or reasoning-gym:FAMILY,FAMILY
  --prompt_column the instruction: messages, or a text            --system_prompt, --plain_text: how a text is asked
  --judge         math, text, reasoning-gym, or your own package.module:function(answer, row)
A flag overrides the YAML file's value. `axk1 rl --all-settings` lists them all. --push_to_hub pushes at the end.""",
    "convert": """examples:
  axk1 convert inspect CHECKPOINT                      format, layout, parameters, what is missing
  axk1 convert to-hf CHECKPOINT MODEL --tokenizer DIR  Megatron (rank files or torch_dist) to safetensors
  axk1 convert to-megatron MODEL CHECKPOINT --tp 2 --pp 2 --ep 4 --format legacy
  axk1 convert to-megatron OLD NEW --tp 4              reshard one Megatron checkpoint into another
  axk1 convert verify A B                              two checkpoints of any formats, bit for bit

CHECKPOINT is the folder with latest_checkpointed_iteration.txt, or an iter_* or release folder. Neither Megatron nor a GPU is
needed, memory does not grow with the model, and nothing in a checkpoint is ever run. Killed, or out of disk space: run the
same command again, it goes on where it was.""",
    "doctor": """examples:
  axk1 doctor MODEL             every fault, whom it breaks, and the remedy; status 1 if there are errors
  axk1 doctor MODEL --json

Reads config, tokenizer, generation config and the headers of the safetensors files: seconds for 519B parameters. Holds each
tensor's name, shape and dtype against the config. Loads no weight and runs no file of the checkpoint.""",
    "push": """examples:
  axk1 push MODEL ORG/NAME --dry-run --license apache-2.0 --language en ko
  axk1 push MODEL ORG/NAME --base-model skt/A.X-K1 --results runs/eval/results.json --recipe sft.yaml --private

Sends weights, config, generation config, tokenizer with its templates, and a card; pickles and other files stay. The doctor
has to find no error. What the folder's README.md says is kept. Interrupted: run it again, what is there is not sent again.""",
    "plan": """examples:
  axk1 plan --flops 2.548e24                           A.X K1's budget, beside what its report says
  axk1 plan --gpus 512 --days 30 --gpu h100            at the throughput that the layout should reach
  axk1 plan --gpus 512 --days 30 --gpu h100 --tflops 250
  axk1 plan --flops 1e22 --gpus 64 --json
  axk1 plan --flops 1e22 --gpus 64 --config PLANNED    writes PLANNED/config.json; then `axk1 info PLANNED`

FLOPs are GPU time: GPUs x seconds x sustained FLOP/s, as a cluster is booked. Every figure shows its law and source.
With --days alone, throughput and model are sought together and may settle a layout's step away: see the days printed.""",
    "plan serve": """examples:
  axk1 plan serve k1                                  the fewest GPUs of each kind for each precision, at full context
  axk1 plan serve k1 --gpu h200 --context 32768 --batch 16    every layout, with its command
  axk1 plan serve MODEL --gpu h100 --json

Memory only: weights, one layer's activations, and the cache of latents. Every figure shows its formula.""",
    "tokenizer": """examples:
  axk1 tokenizer train OUT --source ko=reviews.jsonl:0.4 --source en=books/:0.4 --source 'code=src/**/*.py:0.2'
  axk1 tokenizer train OUT --source en=web.parquet:1 --vocab-size 32768 --sample-gb 1
  axk1 tokenizer compare OUT OTHER --texts ko=reviews.jsonl en=heldout.txt

A byte-level BPE that gives back any text exactly: digits one by one, runs of blanks kept, the chat template of both modes.
A source is a file, folder or pattern of .jsonl, .parquet, .warc (also compressed) or plain text, its share that of the sample.
Memory grows with the sample, not with the files. What cannot be read is counted in OUT/report.json.""",
    "curate": """examples:
  axk1 curate train-classifier runs/domain --data labelled.jsonl --label-key domain
  axk1 curate train-classifier runs/difficulty --data labelled.jsonl --label-key level --order easy,medium,hard
  axk1 curate train-classifier runs/quality --data labelled.jsonl --label-key quality --order bad,good --base MODEL
  axk1 curate eval-classifier runs/domain --data other.jsonl --label-key domain
  axk1 curate synthesize made.jsonl --topics topics.txt --server http://localhost:8000/v1 --model NAME --language Korean
  axk1 curate synthesize made.jsonl --seeds documents.jsonl --model FOLDER
  axk1 curate run recipes/configs/curate.yaml

A recipe reads JSONL, Parquet, text and WARC, filters, classifies, removes duplicates and evaluation sets, and draws a mixture, on
this machine or on Slurm; documents/*.jsonl then go from simple to hard, report.html says what was dropped and why. Needs
axk1[curation]. Killed? Run the same command again.""",
    "info": """examples:
  axk1 info k1                 one of the presets: k1, light, nano
  axk1 info runs/nano/fused --context 4096""",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 where `doctor` finds errors, 2 for an error that the user can mend, 130
    when interrupted."""
    parser = build_parser()
    known, settings = parser.parse_known_args(argv)
    options = vars(known)
    # A training command's settings are declared in trainers, which is imported only when one is called.
    if "settings" in options:
        options["settings"] = settings
    elif settings:
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    run, debug = options.pop("run"), options.pop("debug") or bool(os.environ.get("AXK1_DEBUG"))
    try:
        # A command that judges says so by its status; the others return nothing.
        return run(**options) or 0
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        # Names from a file may hold anything, also what steers a terminal.
        said = "".join(character if character.isprintable() else " " for character in str(error))
        print("axk1: " + " ".join(said.split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("axk1: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "axk1",
        description=DESCRIPTION,
        epilog=EXAMPLES[None],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_chat(commands)
    _add_serve(commands)
    _add_merge(commands)
    _add_adapter(commands)
    _add_training(commands, "pretrain", pretrain, "pre-train in stages, by a table", "STAGES.yaml ")
    _add_training(commands, "sft", sft, "fine-tune a model in both modes (Think-Fusion)")
    _add_training(commands, "rl", rl, "train both modes by reinforcement (DAPO with GSPO's ratio)")
    _add_eval(commands)
    _add_convert(commands)
    _add_doctor(commands)
    _add_push(commands)
    _add_plan(commands)
    _add_tokenizer(commands)
    _add_curate(commands)
    _add_info(commands)
    return parser


def _add_command(commands, name: str, run, summary: str, examples: str | None = None) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=EXAMPLES[examples or name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _add_model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("model_path", metavar="MODEL", help="folder or Hub name of an A.X K1 model")
    command.add_argument(
        "--think", action=argparse.BooleanOptionalAction, default=False, help="think before answering (default: no)"
    )
    # The authors' sampling.  [model team's post]
    command.add_argument("--temperature", type=float, default=0.6, metavar="T", help="default 0.6; 0 is greedy")
    command.add_argument("--top-p", type=float, default=0.95, metavar="P", help="default 0.95")
    command.add_argument(
        "--device-map", default="auto", help="where the weights go: auto, cpu, cuda, ... (default auto)"
    )
    command.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16, ... (default auto)")


def _add_chat(commands) -> None:
    command = _add_command(commands, "chat", chat, "talk to a model in the terminal")
    _add_model_options(command)
    command.add_argument("--budget", type=int, metavar="N", help="close a thought after N tokens (default: never)")
    command.add_argument(
        "--max-new-tokens", type=int, default=4096, metavar="N", help="an answer's limit (default 4096)"
    )
    command.add_argument("--system", metavar="TEXT", help="a system message to begin with")


def _add_serve(commands) -> None:
    command = _add_command(commands, "serve", serve, "answer OpenAI-compatible requests over HTTP")
    _add_model_options(command)
    command.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine only")
    command.add_argument("--port", type=int, default=8000, help="default 8000")


def _add_merge(commands) -> None:
    command = _add_command(commands, "merge", merge, "merge a thinking and a non-thinking model, tensor by tensor")
    command.add_argument(
        "thinking_dir", metavar="THINKING", type=Path, help="also gives config, tokenizer and template"
    )
    command.add_argument("nonthinking_dir", metavar="NONTHINKING", type=Path)
    command.add_argument("out_dir", metavar="OUT", type=Path, help="written whole or not at all")
    weight = command.add_mutually_exclusive_group()
    weight.add_argument("--alpha", type=float, default=0.8, help="weight of the thinking model (default 0.8)")
    weight.add_argument("--alphas", type=float, nargs="+", metavar="ALPHA", help="one folder OUT/alpha-X for each")
    command.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="size of an output file (default 5)")


def _add_adapter(commands) -> None:
    summary = "merge a LoRA adapter into its model, or write it as vLLM reads it"
    directions = _add_command(commands, "adapter", None, summary).add_subparsers(metavar="DIRECTION", required=True)
    command = _add_command(directions, "merge", adapter_merge, "write the model with the adapter in it", "adapter")
    command.add_argument("model_dir", metavar="MODEL", type=Path, help="folder of safetensors; never changed")
    command.add_argument("adapter_dir", metavar="ADAPTER", type=Path)
    command.add_argument("out_dir", metavar="OUT", type=Path, help="written whole or not at all")
    command.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="size of an output file (default 5)")
    command = _add_command(directions, "export", adapter_export, "write the adapter expert by expert", "adapter")
    command.add_argument("adapter_dir", metavar="ADAPTER", type=Path)
    command.add_argument("out_dir", metavar="OUT", type=Path)


def _add_training(commands, name: str, run, summary: str, first: str = "[--config FILE.yaml] ") -> None:
    command = _add_command(commands, name, run, summary)
    command.usage = f"axk1 {name} {first}[--SETTING VALUE ...]"
    # A setting that begins like one of ours must not be taken for it.
    command.allow_abbrev = False
    command.add_argument("--all-settings", action="store_true", help="list every setting")
    command.set_defaults(settings=[])


def _add_eval(commands) -> None:
    command = _add_command(commands, "eval", evaluate, "judge a model in both modes")
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


def _add_convert(commands) -> None:
    summary = "turn Megatron checkpoints into safetensors and back, compare and inspect them"
    directions = _add_command(commands, "convert", None, summary).add_subparsers(metavar="DIRECTION", required=True)

    command = _add_command(directions, "to-hf", convert_to_hf, "write a folder that from_pretrained loads", "convert")
    _add_conversion(command)

    command = _add_command(directions, "to-megatron", convert_to_megatron, "write a Megatron checkpoint", "convert")
    _add_conversion(command)
    command.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks (default 1)")
    command.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline stages (default 1)")
    command.add_argument("--vpp", type=int, metavar="N", help="chunks a stage, for interleaved pipelines (default 1)")
    command.add_argument("--ep", type=int, default=1, metavar="N", help="expert-parallel ranks (default 1)")
    command.add_argument("--etp", type=int, metavar="N", help="tensor-parallel ranks inside experts (default: as --tp)")
    command.add_argument(
        "--format",
        choices=["torch_dist", "legacy"],
        default="torch_dist",
        help="torch_dist (default; Megatron loads it in any layout) or legacy rank files",
    )
    command.add_argument("--first-stage-layers", type=int, metavar="N", help="layers of the first stage, where uneven")
    command.add_argument("--last-stage-layers", type=int, metavar="N", help="layers of the last stage, where uneven")
    command.add_argument(
        "--transformer-engine",
        action=argparse.BooleanOptionalAction,
        help="that spec's names (default: a Megatron source's own, else the local spec's)",
    )
    command.add_argument("--vocab-divisor", type=int, metavar="N", help="make_vocab_size_divisible_by (default 128)")
    command.add_argument("--iteration", type=int, metavar="N", help="write iter_N (default: release)")
    command.add_argument(
        "--mtp-layer-name",
        choices=["transformer_layer", "mtp_model_layer"],
        default="transformer_layer",
        help="of rank files; megatron-core 0.17 and later read mtp_model_layer (default transformer_layer)",
    )

    command = _add_command(directions, "verify", convert_verify, "compare two checkpoints bit for bit", "convert")
    command.add_argument("a", metavar="A", type=Path, help="of any format")
    command.add_argument("b", metavar="B", type=Path, help="of any format")
    _add_reading(command)
    command.add_argument(
        "--workers", type=int, metavar="N", help="tensors compared at a time (default: cores, at most 4)"
    )

    command = _add_command(
        directions, "inspect", convert_inspect, "say what a checkpoint is and what it lacks", "convert"
    )
    command.add_argument("source", metavar="SRC", type=Path)
    _add_reading(command)


def _add_conversion(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="SRC", type=Path, help="a checkpoint of any format; never changed")
    command.add_argument("target", metavar="DST", type=Path, help="written whole or not at all")
    _add_reading(command)
    command.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="size of an output file (default 5)")
    command.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="files written, and then tensors compared, at a time; each file has threads of its own to hash and to write it "
        "besides (default: cores, at most 4)",
    )
    command.add_argument("--no-verify", action="store_true", help="do not compare the result with the source")
    command.add_argument("--check-nan", action="store_true", help="look for NaN in the source first")
    command.add_argument("--dry-run", action="store_true", help="print files, bytes, memory and time, write nothing")


def _add_reading(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--vocab-size", type=int, metavar="N", help="the true one, where a checkpoint holds the padded one only"
    )
    command.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="copied along; its length is the vocabulary, if unknown"
    )
    command.add_argument(
        "--config", type=Path, metavar="DIR", help="a config.json to take token ids from and to agree with"
    )
    command.add_argument(
        "--post-norm", metavar="NAME", help="how the norm behind the MLP is called (post_mlp_layernorm, ...)"
    )
    command.add_argument(
        "--drop-fp8-state", action="store_true", help="leave FP8 scaling state behind; the weights are whole"
    )


def _add_doctor(commands) -> None:
    summary = "say what is wrong with a checkpoint for transformers, vLLM and SGLang"
    command = _add_command(commands, "doctor", doctor, summary)
    command.add_argument("model", metavar="MODEL", type=Path, help="folder of an A.X K1 model")
    command.add_argument("--json", action="store_true", help="print the findings as JSON")


def _add_push(commands) -> None:
    command = _add_command(
        commands, "push", push, "send a model to the Hub, with a card from config, recipe and results"
    )
    command.add_argument("model", metavar="MODEL", type=Path, help="folder of an A.X K1 model; never changed")
    command.add_argument("repo", metavar="REPO", help="ORG/NAME; made if it is not there")
    command.add_argument("--dry-run", action="store_true", help="show files, bytes and card; send nothing")
    command.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    command.add_argument("--remote-code", action="store_true", help="add the model's code, for trust_remote_code=True")
    command.add_argument("--license", metavar="ID", help="as the Hub spells it (default: the README.md's)")
    command.add_argument("--language", nargs="+", metavar="CODE", help="en ko ... (default: the README.md's)")
    command.add_argument("--base-model", nargs="+", metavar="REPO", help="what it was made from, if from anything")
    command.add_argument("--relation", help="finetune, quantized, adapter or merge (default: by the files)")
    command.add_argument("--results", type=Path, metavar="FILE", help="results.json of axk1 eval")
    command.add_argument("--recipe", type=Path, metavar="FILE", help="YAML file that it was trained with")


def _add_plan(commands) -> None:
    command = _add_command(commands, "plan", plan, "derive model, tokens, vocabulary and layout from a compute budget")
    command.add_argument("--flops", type=float, metavar="C", help="the budget in FLOPs of GPU time, or give --days")
    command.add_argument("--days", type=float, metavar="N", help="the budget as --gpus for N days")
    command.add_argument("--gpus", type=int, default=1024, metavar="N", help="GPUs of the cluster (default 1024)")
    command.add_argument("--gpu", default="h200", help="a100, h100, h800, h200 or b200 (default h200)")
    command.add_argument(
        "--tflops", type=float, metavar="X", help="sustained by each GPU, with --days (default: modelled)"
    )
    command.add_argument(
        "--tokens-per-parameter",
        type=float,
        default=20.0,
        metavar="R",
        help="a total parameter (default 20: Chinchilla)",
    )
    command.add_argument("--json", action="store_true", help="print every figure as JSON")
    command.add_argument("--config", type=Path, metavar="DIR", help="write the planned model's config.json there")
    summary = "say which GPUs hold which precision and how much context"
    serving = _add_command(command.add_subparsers(metavar="serve"), "serve", plan_serve, summary, "plan serve")
    serving.add_argument("model", metavar="MODEL", nargs="?", default="k1", help="preset or folder (default k1)")
    serving.add_argument("--gpu", help="rtx4090, a100, h100, h800, h200 or b200 (default: each)")
    serving.add_argument("--context", type=int, metavar="N", help="tokens of a sequence (default: the model's longest)")
    serving.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once (default 1)")
    serving.add_argument("--json", action="store_true", help="print every figure as JSON")


def _add_tokenizer(commands) -> None:
    summary = "train a tokenizer, or compare how well several compress"
    actions = _add_command(commands, "tokenizer", None, summary).add_subparsers(metavar="ACTION", required=True)

    command = _add_command(actions, "train", tokenizer_train, "learn a byte-level BPE", "tokenizer")
    command.add_argument("out", metavar="OUT", type=Path, help="folder to write, whole or not at all")
    command.add_argument(
        "--source", action="append", required=True, metavar="NAME=PATH:SHARE", help="repeat; shares sum to 1"
    )
    # A.X K1's: 5 x 2^15.  [tech report]
    command.add_argument("--vocab-size", type=int, default=163_840, metavar="N", help="default 163840; 128 divides it")
    command.add_argument("--reserved", type=int, default=64, metavar="N", help="spare special tokens (default 64)")
    command.add_argument("--sample-gb", type=float, default=5.0, metavar="GB", help="learn from so much (default 5)")
    command.add_argument("--text-key", default="text", metavar="KEY", help="column of JSONL and Parquet (default text)")

    command = _add_command(actions, "compare", tokenizer_compare, "count tokens and bytes per token", "tokenizer")
    command.add_argument("tokenizers", nargs="+", metavar="TOKENIZER", help="folder of any tokenizer")
    command.add_argument("--texts", nargs="+", required=True, metavar="NAME=PATH", help="by language")
    command.add_argument("--limit", type=int, default=1000, metavar="N", help="documents each (default 1000)")
    command.add_argument("--text-key", default="text", metavar="KEY", help="column of JSONL and Parquet (default text)")
    command.add_argument("--json", action="store_true", help="print the figures as JSON")


def _add_curate(commands) -> None:
    summary = "turn raw files into a training mixture"
    actions = _add_command(commands, "curate", None, summary).add_subparsers(metavar="ACTION", required=True)

    command = _add_command(actions, "run", curate_run, "run a recipe, or go on with it", "curate")
    command.add_argument("recipe", metavar="RECIPE.yaml", type=Path, help="see recipes/configs/curate.yaml")

    command = _add_command(
        actions, "train-classifier", curate_train, "train, calibrate and judge a text classifier", "curate"
    )
    command.add_argument("out", metavar="OUT", type=Path, help="folder to write, whole or not at all")
    _add_labelled(command)
    command.add_argument("--order", metavar="A,B,C", help="labels from lowest to highest (default: sorted)")
    command.add_argument("--base", metavar="MODEL", help="fine-tune this Transformers model (default: a linear one)")
    command.add_argument("--epochs", type=float, metavar="N", help="with --base (default 3)")
    command.add_argument("--learning-rate", type=float, metavar="X", help="with --base (default 2e-5)")

    command = _add_command(actions, "eval-classifier", curate_eval, "judge a text classifier", "curate")
    command.add_argument("classifier", metavar="CLASSIFIER", type=Path, help="folder of one")
    _add_labelled(command)

    command = _add_command(actions, "synthesize", curate_synthesize, "write documents from seeds or topics", "curate")
    command.add_argument("out", metavar="OUT.jsonl", type=Path, help="appended to; what is there is not asked again")
    origin = command.add_mutually_exclusive_group(required=True)
    origin.add_argument("--seeds", metavar="PATH", help="documents to say anew")
    origin.add_argument("--topics", type=Path, metavar="FILE", help="a topic a line")
    command.add_argument("--server", metavar="URL", help="OpenAI-compatible (default: load MODEL here)")
    command.add_argument("--model", required=True, metavar="MODEL", help="the server's name for it, or a folder")
    command.add_argument("--language", default="English", help="of the documents (default English)")
    command.add_argument(
        "--forms", type=int, default=1, metavar="N", help="documents for each seed or topic (default 1)"
    )
    command.add_argument("--text-key", default="text", metavar="KEY", help="column of the seeds' text (default text)")
    command.add_argument("--max-tokens", type=int, default=2048, metavar="N", help="a document's limit (default 2048)")
    command.add_argument("--temperature", type=float, default=0.8, metavar="T", help="default 0.8; 0 is greedy")
    command.add_argument("--workers", type=int, default=8, metavar="N", help="requests at a time (default 8)")
    command.add_argument("--seed", type=int, default=0, help="of forms and sampling (default 0)")


def _add_labelled(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data", nargs="+", required=True, metavar="PATH", help="JSONL or Parquet with texts and labels"
    )
    command.add_argument("--label-key", default="label", metavar="KEY", help="column of the label (default label)")
    command.add_argument("--text-key", default="text", metavar="KEY", help="column of the text (default text)")


def _add_info(commands) -> None:
    command = _add_command(
        commands, "info", info, "print a model's dimensions, parameters, FLOPs and the cards that hold it"
    )
    command.add_argument("model", metavar="MODEL", help="k1, light, nano, or a folder with a config.json")
    command.add_argument("--context", type=int, default=4096, metavar="N", help="tokens of context (default 4096)")


def chat(**options) -> None:
    from serving.chat import run_chat

    run_chat(**options)


def serve(**options) -> None:
    from serving.server import run_server

    run_server(**options)


def merge(
    thinking_dir: Path,
    nonthinking_dir: Path,
    out_dir: Path,
    alpha: float,
    alphas: list[float] | None,
    shard_gb: float,
) -> None:
    from conversion import merge_checkpoints

    targets = {out_dir / f"alpha-{each:g}": each for each in alphas} if alphas else {out_dir: alpha}
    for target, weight in targets.items():
        # A finished merge has no journal beside it; a sweep that was killed goes on behind it.
        if alphas and target.exists() and not target.with_name(target.name + ".partial.jsonl").exists():
            print(f"{target} is there already")
            continue
        merge_checkpoints(thinking_dir, nonthinking_dir, target, alpha=weight, shard_bytes=int(shard_gb * 1e9))
        print(f"wrote {target}: {weight:g} x {thinking_dir} + {1 - weight:g} x {nonthinking_dir}")


def adapter_merge(model_dir: Path, adapter_dir: Path, out_dir: Path, shard_gb: float) -> None:
    from conversion import merge_adapter

    merge_adapter(model_dir, adapter_dir, out_dir, shard_bytes=int(shard_gb * 1e9))
    print(f"wrote {out_dir}: {model_dir} with {adapter_dir} in it")


def adapter_export(adapter_dir: Path, out_dir: Path) -> None:
    from conversion import export_adapter

    warnings = export_adapter(adapter_dir, out_dir)
    print(f"wrote {out_dir}: {adapter_dir}, expert by expert", *warnings, sep="\n")


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


def _reading(options: dict):
    from conversion import Reading

    names = ("vocab_size", "tokenizer", "config", "post_norm", "drop_fp8_state")
    return Reading(**{name: options.pop(name) for name in names})


def convert_to_hf(source: Path, target: Path, shard_gb: float, **options) -> None:
    from conversion import to_hf

    reading, running = _reading(options), _running(options)
    _convert(to_hf(source, target, reading=reading, shard_bytes=_bytes(shard_gb), **options), **running)


def convert_to_megatron(source: Path, target: Path, shard_gb: float, **options) -> None:
    from conversion import to_megatron

    reading, running = _reading(options), _running(options)
    _convert(to_megatron(source, target, reading=reading, shard_bytes=_bytes(shard_gb), **options), **running)


def _bytes(gigabytes: float) -> int:
    if not 0 < gigabytes < float("inf"):
        raise ValueError(f"--shard-gb {gigabytes} is no size of a file; 5 is usual.")
    return int(gigabytes * 1e9)


def _running(options: dict) -> dict:
    return {name: options.pop(name) for name in ("workers", "no_verify", "check_nan", "dry_run")}


def _convert(conversion, workers: int | None, no_verify: bool, check_nan: bool, dry_run: bool) -> None:
    for name in conversion.opened.added:
        print(f"{name} is not in the source; a constant stands for it")
    if dry_run:
        plan = conversion.plan(workers)
        for name, size in plan.files:
            print(f"  {name:<60}{size:>18,} bytes")
        print(f"{len(plan.files)} files, {plan.nbytes:,} bytes ({plan.nbytes / 1e9:,.2f} GB); ", end="")
        print(
            f"memory {plan.memory_bytes / 1e6:,.0f} MB; about {plan.seconds:,.0f} s and as long again to verify, ",
            end="",
        )
        print(f"if the disk keeps up with the {plan.bytes_per_s / 1e9:.2f} GB/s that a worker read and hashed just now")
        return
    done = conversion.run(workers=workers, verify=not no_verify, check_nan=check_nan)
    print(f"wrote {done.path}: {done.files} files, {done.nbytes / 1e9:,.2f} GB in {done.write_s:.1f} s", end="")
    print(f", verified bit for bit in {done.verify_s:.1f} s" if done.verify_s is not None else ", not verified")


def convert_verify(a: Path, b: Path, workers: int | None, **options) -> None:
    from conversion import verify

    differing = verify(a, b, reading=_reading(options), workers=workers)
    for difference in differing:
        print(f"differs: {difference}")
    if differing:
        raise ValueError(f"{len(differing)} tensors differ between {a} and {b}.")
    print(f"{a} and {b} hold the same model, bit for bit")


def convert_inspect(source: Path, **options) -> None:
    from conversion import inspect

    facts = inspect(source, _reading(options))
    problem = facts.pop("problem", None)
    for name, value in facts.items():
        print(f"{name:<20}{value:,}" if type(value) is int else f"{name:<20}{value}")
    if problem:
        raise ValueError(problem)


def doctor(model: Path, json: bool) -> int:
    from conversion.doctor import diagnose, text_of

    diagnosis = diagnose(model)
    print(diagnosis.json() if json else text_of(diagnosis))
    return 1 if diagnosis.errors() else 0


def push(model: Path, repo: str, dry_run: bool, private: bool, remote_code: bool, **card) -> None:
    from conversion.hub import CardSettings, plan_push, push_to_hub, text_of_push

    settings = CardSettings(**card)
    if dry_run:
        print(text_of_push(plan_push(model, repo, settings, remote_code=remote_code)))
    else:
        print(push_to_hub(model, repo, settings, remote_code=remote_code, private=private))


def plan(json: bool, config: Path | None, **budget) -> None:
    from trainers.planning import plan_budget, text_of_plan

    planned = plan_budget(**budget)
    if config:
        planned.config.save_pretrained(config)
    print(planned.json() if json else text_of_plan(planned))


def plan_serve(model: str, gpu: str | None, context: int | None, batch: int, json: bool, **budget) -> None:
    from trainers.serve_plan import json_of_serving, plan_serving, text_of_serving

    if budget["flops"] is not None or budget["days"] is not None:
        raise ValueError("a budget plans training, serve plans serving; drop --flops and --days, or serve.")
    config, asked = _config(model), {"gpu": gpu, "context": context, "batch": batch}
    ways = plan_serving(config, **asked)
    print(json_of_serving(ways) if json else text_of_serving(config, ways, **asked))


def tokenizer_train(**options) -> None:
    from trainers.tokenizer_training import run_train

    run_train(**options)


def tokenizer_compare(json: bool, **options) -> None:
    from json import dumps

    from trainers import report
    from trainers.tokenizer_training import compare, shown

    rows = compare(**options)
    print(dumps(rows, indent=2, ensure_ascii=False) if json else report.text_table([shown(row) for row in rows]))


def curate_run(recipe: Path) -> None:
    from trainers.curation import run_curation

    run_curation(recipe)


def curate_train(epochs: float | None, learning_rate: float | None, **options) -> None:
    from trainers.text_classifier import run_train

    given = {"epochs": epochs, "learning_rate": learning_rate}
    settings = {name: value for name, value in given.items() if value is not None}
    if settings and not options["base"]:
        raise ValueError(f"{', '.join(settings)} belong to a Transformers model; name it by --base.")
    run_train(**options, settings=settings)


def curate_eval(**options) -> None:
    from trainers.text_classifier import run_eval

    run_eval(**options)


def curate_synthesize(**options) -> None:
    from trainers.synthesis import run_synthesize

    run_synthesize(**options)


def _config(model: str):
    """Of a folder, or of a preset."""
    from modeling_axk1 import AxK1Config

    is_folder = (Path(model) / "config.json").exists()
    return AxK1Config.from_pretrained(model) if is_folder else AxK1Config.preset(model)


def info(model: str, context: int) -> None:
    from modeling_axk1 import count_flops, count_parameters
    from modeling_axk1.quantization_axk1 import cards_table
    from trainers.report import text_table

    config = _config(model)
    parameters = count_parameters(config)
    moe_layers = config.mlp_layer_types.count("sparse")
    print(f"{model}: {config.num_hidden_layers} layers ({moe_layers} MoE), hidden {config.hidden_size}, ", end="")
    print(
        f"{config.n_routed_experts} routed experts (top {config.num_experts_per_tok}), vocabulary {config.vocab_size:,}"
    )
    for part, count in parameters.items():
        print(f"  {part:<16}{count:>20,}  {count / parameters['total']:>7.2%}")
    prefill = count_flops(config, queries=context)["total"]
    decode = count_flops(config, queries=1, keys=context, absorbed=True)["total"]
    print(f"FLOPs at {context:,} tokens: prefill {prefill:.4g}, one decoded token {decode:.4g}")
    print("\nCards that hold the weights, layer by layer, and the tokens that they then have room to cache:")
    print(text_table(cards_table(config)))


if __name__ == "__main__":
    sys.exit(main())
