"""How is a model sized from the command line?  `axk1 plan` and `axk1 info`."""

from pathlib import Path

from axk1.parsing import add_command

PLAN = """examples:
  axk1 plan --flops 2.548e24                           A.X K1's budget, beside what its report says
  axk1 plan --gpus 512 --days 30 --gpu h100            at the throughput that the layout should reach
  axk1 plan --gpus 512 --days 30 --gpu h100 --tflops 250
  axk1 plan --flops 1e22 --gpus 64 --json
  axk1 plan --flops 1e22 --gpus 64 --config PLANNED    writes PLANNED/config.json; then `axk1 info PLANNED`

FLOPs are GPU time: GPUs x seconds x sustained FLOP/s, as a cluster is booked. Every figure shows its law and source.
With --days alone, throughput and model are sought together and may settle a layout's step away: see the days printed."""
INFO = """examples:
  axk1 info k1                 one of the presets: k1, light, nano
  axk1 info runs/nano/fused --context 4096"""
PLAN_SERVE = """examples:
  axk1 plan serve k1                                  the fewest GPUs of each kind for each precision, at full context
  axk1 plan serve k1 --gpu h200 --context 32768 --batch 16    every layout, with its command
  axk1 plan serve MODEL --gpu h100 --json

Memory only: weights, one layer's activations, and the cache of latents. Every figure shows its formula."""


def add(commands) -> None:
    _add_plan(commands)
    _add_info(commands)


def _add_plan(commands) -> None:
    command = add_command(
        commands, "plan", plan, "derive model, tokens, vocabulary and layout from a compute budget", PLAN
    )
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
    serving = add_command(command.add_subparsers(metavar="serve"), "serve", plan_serve, summary, PLAN_SERVE)
    serving.add_argument("model", metavar="MODEL", nargs="?", default="k1", help="preset or folder (default k1)")
    serving.add_argument("--gpu", help="rtx4090, a100, h100, h800, h200 or b200 (default: each)")
    serving.add_argument("--context", type=int, metavar="N", help="tokens of a sequence (default: the model's longest)")
    serving.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once (default 1)")
    serving.add_argument("--json", action="store_true", help="print every figure as JSON")


def _add_info(commands) -> None:
    command = add_command(
        commands, "info", info, "print a model's dimensions, parameters, FLOPs and the cards that hold it", INFO
    )
    command.add_argument("model", metavar="MODEL", help="k1, light, nano, or a folder with a config.json")
    command.add_argument("--context", type=int, default=4096, metavar="N", help="tokens of context (default 4096)")


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


def _config(model: str):
    """Of a folder, or of a preset."""
    from modeling_axk1 import AxK1Config

    is_folder = (Path(model) / "config.json").exists()
    if not is_folder and (Path(model).is_dir() or len(Path(model).parts) > 1):
        raise ValueError(f"{model}/config.json is missing; give the folder of a model, or a preset.")
    return AxK1Config.from_pretrained(model) if is_folder else AxK1Config.preset(model)


def info(model: str, context: int) -> None:
    from modeling_axk1 import count_flops, count_parameters
    from modeling_axk1.quantization_axk1 import cards_table
    from trainers.report import text_table
    from trainers.serve_plan import activation_bytes

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
    print(
        "\nCards that hold the weights, layer by layer, and the tokens that they cache beside a prompt's activations:"
    )
    print(text_table(cards_table(config, activation_bytes=activation_bytes(config))))
