"""What can be done from the command line?  `axk1 --help`: one subcommand a capability, imported when it is called."""

import argparse
import os
import sys
from pathlib import Path

DESCRIPTION = "A.X K1 for Transformers: talk to it, serve it, train and merge its two reasoning modes."
EXAMPLES = {
    None: """examples:
  axk1 chat runs/nano/fused --think
  axk1 serve runs/nano/fused --port 8000
  axk1 merge THINKING NONTHINKING MERGED --alpha 0.8
  axk1 rl --config recipes/configs/rl_cpu.yaml
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
    "info": """examples:
  axk1 info k1                 one of the presets: k1, light, nano
  axk1 info runs/nano/fused --context 4096""",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for an error that the user can mend, 130 when interrupted."""
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
        run(**options)
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        print("axk1: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("axk1: interrupted", file=sys.stderr)
        return 130
    return 0


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
    _add_rl(commands)
    _add_info(commands)
    return parser


def _add_command(commands, name: str, run, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=EXAMPLES[name],
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
    command.add_argument("--device-map", default="auto", help="where the weights go: auto, cpu, cuda, ... (default auto)")
    command.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16, ... (default auto)")


def _add_chat(commands) -> None:
    command = _add_command(commands, "chat", chat, "talk to a model in the terminal")
    _add_model_options(command)
    command.add_argument("--budget", type=int, metavar="N", help="close a thought after N tokens (default: never)")
    command.add_argument("--max-new-tokens", type=int, default=4096, metavar="N", help="an answer's limit (default 4096)")
    command.add_argument("--system", metavar="TEXT", help="a system message to begin with")


def _add_serve(commands) -> None:
    command = _add_command(commands, "serve", serve, "answer OpenAI-compatible requests over HTTP")
    _add_model_options(command)
    command.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine only")
    command.add_argument("--port", type=int, default=8000, help="default 8000")


def _add_merge(commands) -> None:
    command = _add_command(commands, "merge", merge, "merge a thinking and a non-thinking model, tensor by tensor")
    command.add_argument("thinking_dir", metavar="THINKING", type=Path, help="also gives config, tokenizer and template")
    command.add_argument("nonthinking_dir", metavar="NONTHINKING", type=Path)
    command.add_argument("out_dir", metavar="OUT", type=Path, help="written whole or not at all")
    weight = command.add_mutually_exclusive_group()
    weight.add_argument("--alpha", type=float, default=0.8, help="weight of the thinking model (default 0.8)")
    weight.add_argument("--alphas", type=float, nargs="+", metavar="ALPHA", help="one folder OUT/alpha-X for each")
    command.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="size of an output file (default 5)")


def _add_rl(commands) -> None:
    command = _add_command(commands, "rl", rl, "train both modes by reinforcement (DAPO with GSPO's ratio)")
    command.usage = "axk1 rl [--config FILE.yaml] [--SETTING VALUE ...]"
    # A setting that begins like one of ours must not be taken for it.
    command.allow_abbrev = False
    command.add_argument("--all-settings", action="store_true", help="list every setting")
    command.set_defaults(settings=[])


def _add_info(commands) -> None:
    command = _add_command(commands, "info", info, "print a model's dimensions, parameters and FLOPs")
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


def rl(settings: list[str], all_settings: bool) -> None:
    from trainers.rl import run_rl

    run_rl(["--help"] if all_settings else settings)


def info(model: str, context: int) -> None:
    from modeling_axk1 import AxK1Config, count_flops, count_parameters

    is_folder = (Path(model) / "config.json").exists()
    config = AxK1Config.from_pretrained(model) if is_folder else AxK1Config.preset(model)
    parameters = count_parameters(config)
    moe_layers = config.mlp_layer_types.count("sparse")
    print(f"{model}: {config.num_hidden_layers} layers ({moe_layers} MoE), hidden {config.hidden_size}, ", end="")
    print(f"{config.n_routed_experts} routed experts (top {config.num_experts_per_tok}), vocabulary {config.vocab_size:,}")
    for part, count in parameters.items():
        print(f"  {part:<16}{count:>20,}  {count / parameters['total']:>7.2%}")
    prefill = count_flops(config, queries=context)["total"]
    decode = count_flops(config, queries=1, keys=context, absorbed=True)["total"]
    print(f"FLOPs at {context:,} tokens: prefill {prefill:.4g}, one decoded token {decode:.4g}")


if __name__ == "__main__":
    sys.exit(main())
