"""How is `axk1 pretrain` run? A YAML of stages and flags become a model, sources and a plan; train, save, report.

Under torchrun or `accelerate launch` every process runs this. The same command again goes on from the last whole checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

from modeling_axk1 import AxK1Config, AxK1ForCausalLM
from modeling_axk1.configuration_axk1 import PRESETS
from trainers import report, tables
from trainers.curriculum import CURRICULUM_KINDS, Curriculum, load_curriculum
from trainers.mtp import MTPCallback
from trainers.pretrain import PretrainConfig, PretrainTrainer
from trainers.safeguards import naming_what_fails
from trainers.token_store import described, end_of_text, prepare

STOPPED_BY_SIGTERM = 143  # 128 + 15, as the shell has it


@dataclass
class PretrainArguments:
    """What `axk1 pretrain` needs beside the stages and PretrainConfig."""

    model: str = field(
        default="nano",
        metadata={
            "help": "nano, light or k1 (new weights), a folder with config.json (new), or with weights (goes on)."
        },
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of the tokenizer; default: the model's."}
    )
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "Files for the sources that list none: each document goes to the one named in its `domain`."},
    )
    scale: float = field(
        default=1.0, metadata={"help": "Factor on all tokens; contexts and batches shrink where they must, for the ranks too."}
    )
    dual_norm: bool | None = field(
        default=None,
        metadata={
            "help": "Norm on the MoE output too (dual normalization), for new weights; default: the config's, true in presets."
        },
    )
    fused_linear_loss: bool | None = field(
        default=None,
        metadata={"help": "Take the loss in chunks of tokens, without holding all logits; default: the config's."},
    )
    balance_loss: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the sequence-wise balance loss [DeepSeek-V3: 1e-4] beside the bias; default: the config's."
        },
    )
    prepared: str | None = field(default=None, metadata={"help": "Where tokens are kept; default: output_dir/tokens."})


def parse(settings: Sequence[str]) -> tuple[Path, PretrainArguments, PretrainConfig]:
    """STAGES.yaml, then flags, which override the file's `model`, `tokenizer` and `settings`."""
    if not settings or settings[0].startswith("-"):
        raise ValueError("No stages are named; give a YAML file first, such as recipes/k1_stages.yaml.")
    path = Path(settings[0])
    flags = [*_flags_of(path), *settings[1:]]
    parser = HfArgumentParser((PretrainArguments, PretrainConfig), prog="axk1 pretrain")
    try:
        arguments, config, unknown = parser.parse_args_into_dataclasses(args=flags, return_remaining_strings=True)
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise ValueError(f"The settings {' '.join(flags)} cannot be read; see axk1 pretrain --all-settings.") from None
    if unknown:
        raise ValueError(f"{unknown[0]} is no setting; see axk1 pretrain --all-settings.")
    if not config.output_dir or config.output_dir == "trainer_output":
        config.output_dir = f"runs/{path.stem}"
    return path, arguments, config


def _flags_of(path: Path) -> list[str]:
    """`model`, `tokenizer` and `settings` of a stages file as flags."""
    if not path.is_file():
        return []  # load_curriculum says so
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return []
    table = table if isinstance(table, dict) else {}
    ours = {name: table[name] for name in ("model", "tokenizer", "settings") if name in table}
    tables.check(ours, CURRICULUM_KINDS, str(path))
    given = ours | (ours.pop("settings", None) or {})
    flags = []
    for name, value in given.items():
        flags += [f"--{name}", *(str(each) for each in (value if isinstance(value, list) else [value]))]
    return flags


def load_tokenizer(arguments: PretrainArguments):
    name = arguments.tokenizer or (arguments.model if arguments.model not in PRESETS else None)
    if name is None:
        raise ValueError(
            "No tokenizer is named; give --tokenizer, a folder that `axk1 tokenizer train` or you have made."
        )
    return AutoTokenizer.from_pretrained(name)


def build_model(arguments: PretrainArguments, tokenizer, seed: int):
    """fp32. New weights are drawn from the seed, the same on every rank."""
    set_seed(seed)
    folder = Path(arguments.model)
    new = arguments.model in PRESETS or folder.is_dir() and not list(folder.glob("*.safetensors"))
    if arguments.model not in PRESETS and new and list(folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"{folder} has weights in pytorch_model*.bin, which are not read, and would begin with new ones; save them as "
            "safetensors, or give a folder with config.json alone."
        )
    if not new and arguments.dual_norm is not None:
        raise ValueError(
            f"dual_norm={arguments.dual_norm} is for new weights and {arguments.model} has some; leave it out."
        )
    if not new:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32")
    else:
        changes = {} if arguments.dual_norm is None else {"post_mlp_norm": arguments.dual_norm}
        if arguments.model in PRESETS:
            ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
            # A multiple of 128 keeps the head's matmul on tensor cores.
            changes |= ids | {"vocab_size": -(-len(tokenizer) // 128) * 128}
            config = AxK1Config.preset(arguments.model, **changes)
        else:
            config = AutoConfig.from_pretrained(arguments.model, **changes)
        model = AxK1ForCausalLM(config)
        # Documents end so; a turn's end is learned later.
        model.generation_config.eos_token_id = sorted({tokenizer.eos_token_id, end_of_text(tokenizer)} - {None})
    if arguments.fused_linear_loss is not None:
        model.config.fused_linear_loss = arguments.fused_linear_loss
    if arguments.balance_loss is not None:
        model.config.router_aux_loss_coef = arguments.balance_loss
    if model.config.vocab_size < len(tokenizer):
        raise ValueError(
            f"The model has {model.config.vocab_size:,} embeddings and the tokenizer {len(tokenizer):,} tokens; use the model's "
            "own tokenizer, or a config with a larger vocab_size."
        )
    return model


def run_pretrain(settings: Sequence[str]) -> PretrainTrainer:
    """Train by the stages; model, tokenizer and report.html end in `output_dir`. SystemExit 143 where SIGTERM ended it early."""
    path, arguments, config = parse(settings)
    curriculum = load_curriculum(path, arguments.scale, config.gradient_accumulation_steps * config.world_size)
    tokenizer = load_tokenizer(arguments)
    names = sorted({name for stage in curriculum.stages for name in stage.mixture})
    wanted = {name: curriculum.sources.get(name, ()) for name in names}
    # One process over all machines: the tokens lie beside the checkpoints, on a disk that they share.
    with config.main_process_first(local=False, desc="tokenising"):
        sources = prepare(Path(arguments.prepared or f"{config.output_dir}/tokens"), tokenizer, wanted, arguments.data)
    if config.process_index == 0:
        print(f"{report.text_table(described(sources))}\n")
    model = build_model(arguments, tokenizer, config.seed)
    callbacks = [MTPCallback()] if model.config.num_nextn_predict_layers else []
    trainer = PretrainTrainer(model, config, curriculum, sources, processing_class=tokenizer, callbacks=callbacks)
    if config.process_index == 0:
        print(f"{report.text_table(planned(curriculum, trainer))}\n")
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    if not trainer.stopped:
        with naming_what_fails("The model", config.output_dir):
            trainer.save_model(config.output_dir)
    if trainer.is_world_process_zero():
        page = Path(config.output_dir) / "report.html"
        write_report(page, trainer)
        print(f"\n{report.text_table(stage_rows(trainer))}\n{config.output_dir}; {page}")
    trainer.accelerator.end_training()
    if trainer.stopped:
        print(
            f"stopped by SIGTERM at step {trainer.state.global_step} of {len(trainer.steps)}; the same command goes on"
        )
        raise SystemExit(STOPPED_BY_SIGTERM)
    return trainer


# -- what is shown ------------------------------------------------------------------------------------------------
def planned(curriculum: Curriculum, trainer: PretrainTrainer) -> list[dict[str, str]]:
    rows = []
    shares = trainer.args.gradient_accumulation_steps * trainer.args.world_size
    for number, stage in enumerate(curriculum.stages):
        steps = [step for step in trainer.steps if step.stage == number]
        rows.append(
            {
                "stage": stage.name,
                "tokens": f"{sum(step.tokens for step in steps):,}",
                "steps": f"{len(steps):,}",
                "context": " -> ".join(f"{level.length:,}" for level in stage.context),
                "tokens a step": f"{steps[0].tokens:,} -> {max(step.tokens for step in steps):,}",
                "tokens a rank at once": f"{max(step.tokens for step in steps) // shares:,}",
                "phase": stage.phase,
                "order": stage.order,
            }
        )
    return rows


def logs_of(trainer: PretrainTrainer, stage: int | None = None) -> list[dict[str, Any]]:
    return [log for log in trainer.state.log_history if "tokens" in log and stage in (None, log["stage"])]


def stage_rows(trainer: PretrainTrainer) -> list[dict[str, str]]:
    """What each stage came to, by what was logged in it."""
    rows = []
    for number, stage in enumerate(trainer.curriculum.stages):
        logs = logs_of(trainer, number)
        if logs:
            rows.append(
                {
                    "stage": stage.name,
                    "tokens": f"{logs[-1]['tokens']:,}",
                    "loss": f"{logs[0]['loss']:.3f} -> {logs[-1]['loss']:.3f}",
                    "largest gradient norm": f"{max(log['grad_norm'] for log in logs):.3g}",
                    "MaxVio": f"{logs[0]['max_violation']:.2f} -> {logs[-1]['max_violation']:.2f}",
                    "dead experts": str(logs[-1]["dead_experts"]),
                    "skipped so far": str(logs[-1]["skipped_steps"]),
                }
            )
    return rows or [{"stage": "nothing was logged; logging_steps is longer than the training"}]


def mixture_rows(trainer: PretrainTrainer) -> list[dict[str, str]]:
    rows = []
    passes = trainer.packer.passes()
    for stage, consumed in zip(trainer.curriculum.stages, trainer.packer.consumed):
        total = max(sum(consumed.values()), 1)
        rows += [
            {
                "stage": stage.name,
                "source": name,
                "planned": f"{share:.2%}",
                "read": f"{consumed[name] / total:.2%}",
                "tokens": f"{consumed[name]:,}",
                "passes over it, in the run": str(passes[name]),
            }
            for name, share in stage.mixture.items()
        ]
    return rows


CURVES = (
    # title, what is logged, unit, whether on a logarithmic axis
    ("loss", "loss", "nats a token", False),
    ("gradient norm before clipping", "grad_norm", "norm", True),
    ("learning rate", "learning_rate", "learning rate", False),
    ("context", "context", "tokens a row", False),
)
BALANCE = (("max violation (0 is balanced)", "max_violation/", "MaxVio"), ("dead experts", "dead_experts/", "experts"))


def write_report(path: Path, trainer: PretrainTrainer) -> None:
    """Tables of stages, mixture and sources, curves over the tokens seen, and each stage's load as a heat map."""
    pieces = [
        report.heading("Stages"),
        report.table(planned(trainer.curriculum, trainer)),
        report.table(stage_rows(trainer)),
    ]
    logs = logs_of(trainer)
    if logs:
        for title, name, unit, log_y in CURVES:
            points = [(log["tokens"], log[name]) for log in logs]
            pieces.append(report.line_chart({name: points}, caption=title, x_label="tokens", y_label=unit, log_y=log_y))
        pieces.append(report.heading("Balance of the experts"))
        for title, prefix, unit in BALANCE:
            names = [name for name in logs[-1] if name.startswith(prefix)]
            series = {
                name.removeprefix(prefix).replace("_", " "): [(log["tokens"], log[name]) for log in logs]
                for name in names
            }
            pieces.append(report.line_chart(series, caption=title, x_label="tokens", y_label=unit))
    for stage, loads in zip(trainer.curriculum.stages, trainer.stage_loads):
        pieces.append(
            report.heat_map(
                loads,
                caption=f"{stage.name}: load of each expert over its layer's mean; 1 is balanced",
                row_names=[f"layer {name}" for name in trainer.balance.routers],
                column_names=[str(expert) for expert in range(len(loads[0]))],
            )
        )
    if trainer.packer.consumed:
        pieces += [report.heading("Mixture"), report.table(mixture_rows(trainer))]
    sources = {name: reader.source for name, reader in trainer.packer.readers.items()}
    pieces += [report.heading("Sources"), report.table(described(sources))]
    if trainer.events:
        pieces += [report.heading("Skipped and rolled back"), report.table(trainer.events)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.page("Pre-training", pieces), encoding="utf-8")
