"""How is `axk1 rl` run? A YAML file and flags become settings; a model and prompts from paths or the Hub; train, save, push.

Under `accelerate launch` every process runs this; the files under recipes/accelerate say how the model is spread.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from datasets import Dataset
from trl import ModelConfig, TrlParser, get_quantization_config

from trainers.dapo_gspo import DapoGspoConfig, DapoGspoTrainer
from trainers.launching import LORA_TARGETS, name_lora, parse_settings, require_model, train_and_save
from trainers.mode_overlap import load_table
from trainers.rewards import JUDGES, find_judge
from trainers.tasks import GYM, open_family


@dataclass
class RlArguments:
    """What `axk1 rl` needs beside DapoGspoConfig and TRL's ModelConfig."""

    dataset: str = field(
        metadata={
            "help": "A .jsonl, .json, .parquet or .csv file, a dataset folder, a Hub name, or reasoning-gym:FAMILY,FAMILY."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset or folder."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on, with eval_strategy."})
    dataset_size: int = field(default=10_000, metadata={"help": "Problems to draw from reasoning-gym."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column with the instruction: messages, or a text."})
    plain_text: bool = field(
        default=False, metadata={"help": "Ask a text as it is, not as a user message in the chat template."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "A system message before every text."})
    judge: str = field(
        default="math", metadata={"help": f"{', '.join(JUDGES)}, or your own as package.module:function(answer, row)."}
    )
    lora_targets: list[str] | None = field(default=None, metadata=LORA_TARGETS)


def parse(settings: Sequence[str]) -> tuple[RlArguments, DapoGspoConfig, ModelConfig]:
    """Flags, and under `--config` a YAML file whose values they override. ValueError for a setting that does not exist."""
    parser = TrlParser((RlArguments, DapoGspoConfig, ModelConfig), prog="axk1 rl")
    arguments, config, model = parse_settings(parser, settings)
    require_model(model)
    return arguments, config, model


def load_prompts(arguments: RlArguments, split: str) -> Dataset:
    """The dataset with a column `prompt`, a text in it made a user message unless `plain_text`."""
    name = arguments.dataset
    if name.startswith(GYM):
        dataset = draw_from_gym(name.removeprefix(GYM).split(","), arguments.dataset_size)
    else:
        dataset = load_table(name, split, arguments.dataset_config)
    return _with_prompts(dataset, arguments)


def _with_prompts(dataset: Dataset, arguments: RlArguments) -> Dataset:
    column = arguments.prompt_column
    if column not in dataset.column_names:
        raise ValueError(
            f"The dataset has no column {column}, only {', '.join(dataset.column_names)}; name it with --prompt_column."
        )
    opening = [{"role": "system", "content": arguments.system_prompt}] if arguments.system_prompt else []

    def ask(row: dict) -> dict:
        prompt = row[column]
        if isinstance(prompt, str) and not arguments.plain_text:
            prompt = [*opening, {"role": "user", "content": prompt}]
        return {"prompt": prompt}

    return dataset.map(ask, remove_columns=[column], desc="Reading prompts")


def draw_from_gym(families: Sequence[str], size: int) -> Dataset:
    """`size` problems of reasoning-gym, the families taking turns; the item goes along for its verifier, as JSON."""
    if size < 1:
        raise ValueError(f"dataset_size={size} leaves nothing to ask; use 1 or more.")
    sources = [open_family(family, size=-(-size // len(families)), seed=0) for family in families]
    entries = [source[index] for index in range(len(sources[0])) for source in sources][:size]
    return Dataset.from_list([{"prompt": each["question"], "entry": json.dumps(each)} for each in entries])


def run_rl(settings: Sequence[str]) -> DapoGspoTrainer:
    """Train by the settings; the model, its tokenizer, its card and report.html end in `output_dir`."""
    arguments, config, model = parse(settings)
    # A judge of one's own lies where the command is given, which an installed script does not search.
    sys.path.insert(0, os.getcwd())
    judge = find_judge(arguments.judge)
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
    } | (config.model_init_kwargs or {})
    with config.main_process_first(desc="reading the prompts"):
        prompts = load_prompts(arguments, arguments.dataset_split)
        held_out = load_prompts(arguments, arguments.eval_split) if arguments.eval_split else None
    trainer = DapoGspoTrainer(
        model.model_name_or_path,
        judge,
        config,
        prompts,
        eval_dataset=held_out,
        peft_config=name_lora(model, arguments.lora_targets, config.trust_remote_code),
        quantization_config=get_quantization_config(model),
    )
    train_and_save(trainer, arguments.dataset)
    return trainer
