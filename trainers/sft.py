"""How is `axk1 sft` run? A YAML file and flags become settings; a model and rows from paths or the Hub; train, save, push.

Under `accelerate launch` every process runs this.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from datasets import Dataset
from transformers import AutoTokenizer
from trl import ModelConfig, TrlParser, get_quantization_config

from trainers.launching import LORA_TARGETS, name_lora, parse_settings, require_model, train_and_save
from trainers.mode_overlap import load_mode_overlap, prompt_key, validate_mode_overlap
from trainers.think_fusion import ThinkFusionConfig, ThinkFusionTrainer
from trainers.tokenizer import CHAT_TEMPLATE

LONE_PROMPT = "prompt in one mode only"


@dataclass
class SftArguments:
    """What `axk1 sft` needs beside ThinkFusionConfig and TRL's ModelConfig."""

    dataset: str = field(
        metadata={
            "help": "A .jsonl or .parquet file, a dataset folder or a Hub name: Mode-Overlap rows, thinking rows (prompt, "
            "completion), or question and answer as in GSM8K; the last two are paired by cutting the thought out."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset or folder."})
    test_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Rows whose prompts must not occur in training: for eval_strategy, and for the probe. As `dataset`."
        },
    )
    test_split: str = field(default="test", metadata={"help": "Split of the test dataset."})
    probe_prompts: int = field(default=16, metadata={"help": "Test prompts that the probe asks in both modes."})
    check_rows: bool = field(
        default=True,
        metadata={"help": "Look for every defect of a Mode-Overlap Dataset before training, and stop at any."},
    )
    think_fusion_template: bool = field(
        default=False,
        metadata={
            "help": "Give the model this library's chat template (ChatML, one control token a mode): for models whose own "
            "renders modes in another way, such as Qwen3."
        },
    )
    lora_targets: list[str] | None = field(default=None, metadata=LORA_TARGETS)


def parse(settings: Sequence[str]) -> tuple[SftArguments, ThinkFusionConfig, ModelConfig]:
    """Flags, and under `--config` a YAML file whose values they override. ValueError for a setting that does not exist."""
    parser = TrlParser((SftArguments, ThinkFusionConfig, ModelConfig), prog="axk1 sft")
    arguments, config, model = parse_settings(parser, settings)
    require_model(model)
    if config.eval_strategy != "no" and arguments.test_dataset is None:
        raise ValueError(f"eval_strategy={config.eval_strategy} has nothing to evaluate on; give --test_dataset.")
    return arguments, config, model


def run_sft(settings: Sequence[str]) -> ThinkFusionTrainer:
    """Train by the settings; the model, its tokenizer, its card and report.html end in `output_dir`."""
    arguments, config, model = parse(settings)
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
    } | (config.model_init_kwargs or {})
    tokenizer = AutoTokenizer.from_pretrained(
        model.model_name_or_path, revision=model.model_revision, trust_remote_code=config.trust_remote_code
    )
    if arguments.think_fusion_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    with config.main_process_first(desc="reading the rows"):
        rows, test_rows = load_splits(arguments)
    if arguments.check_rows and config.process_index == 0:
        check(rows, test_rows, lambda text: len(tokenizer(text).input_ids))
    trainer = ThinkFusionTrainer(
        model.model_name_or_path,
        config,
        processing_class=tokenizer,
        train_dataset=rows,
        eval_dataset=test_rows if config.eval_strategy != "no" else None,
        probe_prompts=distinct_prompts(test_rows, arguments.probe_prompts) if test_rows else (),
        peft_config=name_lora(model, arguments.lora_targets, config.trust_remote_code),
        quantization_config=get_quantization_config(model),
    )
    train_and_save(trainer, arguments.dataset)
    return trainer


def load_splits(arguments: SftArguments) -> tuple[Dataset, Dataset | None]:
    rows = load_mode_overlap(arguments.dataset, arguments.dataset_split, arguments.dataset_config)
    if arguments.test_dataset is None:
        return rows, None
    # A configuration belongs to the dataset it was given for.
    config = arguments.dataset_config if arguments.test_dataset == arguments.dataset else None
    return rows, load_mode_overlap(arguments.test_dataset, arguments.test_split, config)


def check(rows: Dataset, test_rows: Dataset | None, count_tokens) -> None:
    """Print the validator's report; ValueError for any defect. Rows of one mode only are a stage of their own: no pairs there."""
    held_out = test_rows["prompt"] if test_rows is not None else ()
    found = validate_mode_overlap(rows, held_out=held_out, count_tokens=count_tokens)
    if 0 in found.rows_per_mode.values():
        found.defects.pop(LONE_PROMPT, None)
    found.require_sound()
    print(found)


def distinct_prompts(rows: Dataset, count: int) -> list[str | list[dict]]:
    prompts = {prompt_key(prompt): prompt for prompt in rows["prompt"]}
    return list(prompts.values())[:count]
