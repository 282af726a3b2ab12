"""What do the training commands share? A model from a path, LoRA's names, where to go on, what is left at the end."""

import logging
import re
from collections.abc import Callable
from os import PathLike
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from trl import ModelConfig

# Importing the package is what makes AutoModelForCausalLM build our class for model type axk1.
import modeling_axk1  # noqa: F401

logger = logging.getLogger(__name__)


def load_policy(model, args: TrainingArguments, tokenizer, quantization_config) -> tuple:
    """Model and tokenizer, each loaded if it is not there yet. fp32 unless `args.model_init_kwargs` says otherwise.

    TRL's own loader takes the class that transformers itself has under the name in `architectures`; for axk1 that is not ours.
    """
    if not isinstance(model, (str, PathLike)):
        if quantization_config is not None:
            raise ValueError("quantization_config comes too late for a model that is built; give the model's path.")
        return model, tokenizer or AutoTokenizer.from_pretrained(model.config._name_or_path)
    settings = {"dtype": "float32", "trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
    # Used up here: TRL warns about them when it is handed a built model.
    args.model_init_kwargs = None
    if quantization_config is not None:
        settings["quantization_config"] = quantization_config
    named = {"revision": settings.get("revision"), "trust_remote_code": args.trust_remote_code}
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(model, **named)
    return AutoModelForCausalLM.from_pretrained(model, **settings), tokenizer


def require_model(model: ModelConfig) -> None:
    """ValueError without a model. Names LoRA's only target as a list again.

    TRL unwraps a list of one name, which PEFT then takes for a pattern of whole paths: it would match nothing.
    """
    if model.model_name_or_path is None:
        raise ValueError("No model is named; give --model_name_or_path, a folder or a Hub name.")
    targets = model.lora_target_modules
    if isinstance(targets, str) and targets != "all-linear" and re.fullmatch(r"[\w.]+", targets):
        model.lora_target_modules = [targets]


def find_checkpoint(config: TrainingArguments) -> str | None:
    """`resume_from_checkpoint`: a checkpoint's folder, or `latest` for the newest whole one in `output_dir`, if any.

    A checkpoint whose saving was interrupted has no trainer_state.json, which is written last: by `latest` it is passed
    over with a warning, by name it is a ValueError.
    """
    asked = config.resume_from_checkpoint
    if asked is None:
        return None
    if asked != "latest":
        if not (Path(asked) / TRAINER_STATE_NAME).is_file():
            raise ValueError(f"{asked} has no {TRAINER_STATE_NAME}: no checkpoint, or half of one; try latest instead.")
        return asked
    folders = sorted(
        Path(config.output_dir).glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.rpartition("-")[2])
    )
    while folders and not (folders[-1] / TRAINER_STATE_NAME).is_file():
        logger.warning("%s has no %s: its saving was interrupted; passed over.", folders.pop(), TRAINER_STATE_NAME)
    return str(folders[-1]) if folders else None


def train_and_save(
    trainer, dataset: str, write_report: Callable[[Path, list], None], summary: Callable[[list], str]
) -> None:
    """Train, going on where asked; the model, its tokenizer and report.html end in `output_dir`, and on the Hub if asked.

    write_report(path, log history) and summary(log history) say what a run of this kind shows.
    """
    config = trainer.args
    trainer.train(resume_from_checkpoint=find_checkpoint(config))
    trainer.save_model(config.output_dir)
    if trainer.is_world_process_zero():
        path = Path(config.output_dir) / "report.html"
        write_report(path, trainer.state.log_history)
        print(f"\n{summary(trainer.state.log_history)}\n{config.output_dir}; {path}")
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset)
    trainer.accelerator.end_training()
