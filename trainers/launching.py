"""What do the training commands share? A model from a path, LoRA's names, where to go on, what is left at the end."""

import json
import logging
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
import yaml
from peft import PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from trl import ModelConfig, TrlParser, get_peft_config

# Importing the package is what makes AutoModelForCausalLM build our class for model type axk1.
import modeling_axk1  # noqa: F401
from trainers import report
from trainers.adapters import target_names
from trainers.mode_curves import first_and_last, write_report
from trainers.safeguards import checkpoints_in, naming_what_fails

LORA_TARGETS = {
    "help": "With use_peft, the parts to adapt: attention, shared (experts), routed (experts), dense (layers), in place of "
    "lora_target_modules and lora_target_parameters. Routed experts take no dropout: --lora_dropout 0."
}
logger = logging.getLogger(__name__)


def parse_settings(parser: TrlParser, settings: Sequence[str]) -> tuple:
    """The parser's dataclasses from flags and the YAML file under `--config`. ValueError for what is no setting or no YAML."""
    try:
        return parser.parse_args_and_config(list(settings))
    except yaml.YAMLError as error:
        raise ValueError(f"The file under --config is not YAML: {error}; mend it there.") from error


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


def settle_losses(model, args: TrainingArguments) -> None:
    """Say which of an A.X K1 model's losses TRL does not take; ValueError where one of them was asked for.

    TRL 1.16 takes its loss from the last hidden states, and its balance loss, Mixtral's, is for softmax routers.
    """
    if model.config.model_type != "axk1":
        return
    # TRL 1.14 has no such setting, and leaves the loss to the model.
    asked = vars(args).get("router_aux_loss_coef", 0.0)
    if asked:
        raise ValueError(
            f"router_aux_loss_coef={asked:g} is TRL's balance loss, for softmax routers, and A.X K1's are sigmoid; leave it out."
        )
    if asked is None and model.config.router_aux_loss_coef:
        coefficient = model.config.router_aux_loss_coef
        args.router_aux_loss_coef = model.config.router_aux_loss_coef = 0.0
        logger.warning(
            "The balance loss (router_aux_loss_coef=%g) is off: TRL knows softmax routers' only; what is saved says 0.",
            coefficient,
        )
    if asked is None and model.config.num_nextn_predict_layers:
        logger.warning("The multi-token-prediction layers stay as they are: TRL's loss does not reach them.")


def require_model(model: ModelConfig) -> None:
    """ValueError without a model. Names LoRA's only target as a list again.

    TRL unwraps a list of one name, which PEFT then takes for a pattern of whole paths: it would match nothing.
    """
    if model.model_name_or_path is None:
        raise ValueError("No model is named; give --model_name_or_path, a folder or a Hub name.")
    targets = model.lora_target_modules
    if isinstance(targets, str) and targets != "all-linear" and re.fullmatch(r"[\w.]+", targets):
        model.lora_target_modules = [targets]


def name_lora(model: ModelConfig, targets: list[str] | None, trust_remote_code: bool) -> PeftConfig | None:
    """TRL's LoRA settings as PEFT's, the parts in `targets` by their names in this model; without any name all linear layers."""
    if targets and not model.use_peft:
        raise ValueError(f"lora_targets={targets} without LoRA adapts nothing; add --use_peft true.")
    if targets and (model.lora_target_modules or model.lora_target_parameters):
        raise ValueError(
            "lora_targets stands in place of lora_target_modules and lora_target_parameters; give only one kind."
        )
    if targets:
        if "routed" in targets and model.lora_dropout:
            raise ValueError(
                f"lora_dropout={model.lora_dropout} is not available on routed experts; add --lora_dropout 0."
            )
        options = {"revision": model.model_revision, "trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(model.model_name_or_path, **options)
        # The names alone: no weight is allocated.
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        names = target_names(skeleton, targets)
        model.lora_target_modules, model.lora_target_parameters = names["target_modules"], names["target_parameters"]
    elif model.use_peft and model.lora_target_modules is None:
        # peft knows no default for axk1.
        model.lora_target_modules = "all-linear"
    return get_peft_config(model)


def find_checkpoint(config: TrainingArguments) -> str | None:
    """`resume_from_checkpoint`: a checkpoint's folder, or `latest` for the newest whole one in `output_dir`, if any.

    A checkpoint whose saving was interrupted has no whole trainer_state.json, which is written last: by `latest` it is passed
    over with a warning, by name it is a ValueError.
    """
    asked = config.resume_from_checkpoint
    if asked is None:
        return None
    if asked != "latest":
        if not _is_whole(Path(asked)):
            raise ValueError(f"{asked} has no whole {TRAINER_STATE_NAME}: no checkpoint, or half of one; try latest instead.")
        return asked
    folders = checkpoints_in(Path(config.output_dir))
    while folders and not _is_whole(folders[-1]):
        logger.warning("%s has no whole %s: its saving was interrupted; passed over.", folders.pop(), TRAINER_STATE_NAME)
    return str(folders[-1]) if folders else None


def _is_whole(checkpoint: Path) -> bool:
    """transformers writes trainer_state.json in place: killed in the midst, half of it is left."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


class Resumable:
    """Mixed into a TRL trainer: what has ended trains no further, and no checkpoint is whole before all of it is written."""

    def _run_epoch(self, *args, **kwargs):
        # Resumed where it had ended inside an epoch, transformers 5.23 would train one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        step, out = self.state.global_step, self._get_output_dir(trial)
        if self.args.should_save:
            # Of another run that saved here: it would vouch for what is half written.
            (Path(out) / f"checkpoint-{step}" / TRAINER_STATE_NAME).unlink(missing_ok=True)
        with naming_what_fails(f"The checkpoint of step {step}", out):
            super()._save_checkpoint(model, trial)


def train_and_save(trainer, dataset: str) -> None:
    """Train, going on where asked; model, tokenizer, card and report.html end in `output_dir`, and on the Hub if asked."""
    config = trainer.args
    trainer.train(resume_from_checkpoint=find_checkpoint(config))
    with naming_what_fails("The model", config.output_dir):
        trainer.save_model(config.output_dir)
    history = trainer.state.log_history
    if trainer.is_world_process_zero():
        path = Path(config.output_dir) / "report.html"
        write_report(path, trainer._name, history, trainer.measures)
        rows = first_and_last(history, trainer.measures)
        shown = report.text_table(rows) if rows else "nothing was logged; logging_steps is longer than the training"
        print(f"\n{shown}\n{config.output_dir}; {path}")
    trainer.create_model_card(dataset_name=dataset)
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset)
    trainer.accelerator.end_training()
