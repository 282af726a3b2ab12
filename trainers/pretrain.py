"""How is A.X K1 pre-trained? Trainer, driven by a plan of steps that is laid out from the curriculum before the first one.

Step number i decides everything: stage, context and RoPE, rows, learning rate, balancing rate, and which tokens. So a checkpoint
needs the step and a few counters, and what is resumed is the same run, bit for bit.
"""

import copy
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from modeling_axk1.configuration_axk1 import AxK1Config
from modeling_axk1.modeling_axk1 import AxK1Attention, AxK1RotaryEmbedding, yarn_softmax_scale
from trainers import tables
from trainers.balance import BalanceCallback
from trainers.curriculum import Curriculum, Step, plan_steps
from trainers.muon import MuonAdamW
from trainers.packing import Batches, Packer
from trainers.safeguards import (
    FEWEST_LOSSES,
    SpikeDetector,
    StopRequest,
    checkpoints_in,
    naming_what_fails,
    seal,
    sound_checkpoint,
    step_of,
)
from trainers.schedules import bias_rate
from trainers.token_store import Source

STATE_FILE = "pretrain_state.json"
UNFINISHED = "unfinished"
CHOICES = {
    "optimizer": ("adamw", "muon"),
    "recompute": ("none", "selective", "full"),
    "on_spike": ("skip", "rollback", "ignore"),
}
# What a number may be, of our own settings and one that the plan divides by.
RANGES = {
    "learning_rate": tables.number(0),
    "weight_decay": tables.number(0),
    "adam_beta2": tables.number(0, 1),
    "muon_momentum": tables.number(0, 1),
    "balance_rate": tables.number(0),
    "balance_until": tables.number(0, 1),
    "spike_window": tables.whole(FEWEST_LOSSES),
    "spike_sigmas": tables.number(0),
    "most_bad_steps": tables.whole(1),
    "gradient_accumulation_steps": tables.whole(1),
}
# Settings that an optimizer's saved state brings along: a run that goes on with others would not get them.
OF_THE_STATE = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "muon_momentum")
# Of a model's config what a run that goes on may change, or changes itself; with any other field it would be another model.
MAY_CHANGE = {
    "attention_dropout", "fused_linear_loss", "initializer_range", "max_position_embeddings", "mtp_loss_weight",
    "output_router_logits", "pretraining_tp", "router_aux_loss_coef", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id",
}  # fmt: skip
# TrainingArguments' own settings of what the stages say.
PLANNED = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "warmup_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
)
logger = logging.getLogger(__name__)


@dataclass
class PretrainConfig(TrainingArguments):
    """TrainingArguments and what pre-training adds. Steps, batch size, warm-up and schedule are the curriculum's."""

    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate (AdamW, and Muon scaled to it)."})
    weight_decay: float = field(default=0.1, metadata={"help": "On matrices; norms have none."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's beta2; 0.95 is usual in pre-training."})
    optimizer: str = field(
        default="adamw",
        metadata={
            "help": "'adamw', or 'muon' for the matrices with AdamW for the rest.",
            "choices": CHOICES["optimizer"],
        },
    )
    muon_momentum: float = field(default=0.95, metadata={"help": "Muon's momentum."})
    recompute: str = field(
        default="none",
        metadata={
            "help": "Recompute in backward: 'none', 'selective' (MLA up-projections and MLPs, as the report) or 'full' (layers).",
            "choices": CHOICES["recompute"],
        },
    )
    balance_rate: float = field(
        default=1e-3, metadata={"help": "Step of the routers' balancing bias [DeepSeek-V3]; 0 switches balancing off."}
    )
    balance_until: float = field(
        default=0.97,
        metadata={"help": "Share of all tokens after which the bias stands still [DeepSeek-V3: 14.3T of 14.8T]."},
    )
    on_spike: str = field(
        default="skip",
        metadata={
            "help": "At a loss spike: 'skip' the update, 'rollback' to the last checkpoint's weights and go on behind the "
            "batch, or 'ignore'.",
            "choices": CHOICES["on_spike"],
        },
    )
    spike_window: int = field(default=128, metadata={"help": "Losses that a spike is judged by."})
    spike_sigmas: float = field(default=7.0, metadata={"help": "A spike is so many deviations above their mean."})
    most_bad_steps: int = field(
        default=10, metadata={"help": "Updates skipped in a row, after which training stops with an error."}
    )
    resume_from_checkpoint: str | None = field(
        default="latest",
        metadata={"help": "'latest' whole checkpoint in output_dir if any, a checkpoint's folder, or none."},
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    report_to: str = field(default="none", metadata={"help": "wandb, tensorboard, ... or none."})

    def __post_init__(self):
        for name in PLANNED:
            value = getattr(self, name)
            if value != self.__dataclass_fields__[name].default:
                raise ValueError(f"{name}={value} is the plan's to decide; use --scale, or change the stages.")
        tables.check({name: getattr(self, name) for name in RANGES}, RANGES, "the settings")
        # Our own counters say where to go on; replaying all batches would take days.
        self.ignore_data_skip = True
        super().__post_init__()
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} does not exist; use one of {', '.join(allowed)}.")
        kind = str(self.optim.value)
        if not kind.startswith("adamw"):
            raise ValueError(f"optim={kind} is no AdamW; use one of transformers' adamw_..., or optimizer='muon'.")
        if self.optimizer == "muon" and (kind != self.__dataclass_fields__["optim"].default or self.optim_args):
            raise ValueError(f"optim={kind} says which AdamW and optimizer='muon' has torch's; leave one of them out.")
        if self.resume_from_checkpoint == "none":
            self.resume_from_checkpoint = None
        if self.n_gpu > 1:
            raise ValueError(f"{self.n_gpu} GPUs and one process; start one process a GPU, with torchrun.")
        if self.load_best_model_at_end:
            raise ValueError("load_best_model_at_end would undo the later stages; leave it off.")
        if self.save_only_model:
            raise ValueError(
                "save_only_model leaves optimizer and schedule out of checkpoints: what goes on from one would warm up again; "
                "leave it off."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} would leave out the balance and the "
                "multi-token-prediction loss; leave it at 0."
            )
        if self.recompute == "full":
            self.gradient_checkpointing = True


class PretrainTrainer(Trainer):
    """Trainer of a curriculum over prepared sources. Logs with the loss `tokens` seen, `stage`, `context`, `skipped_steps` and
    BalanceCallback's measures. `model` is fp32: those are the master weights; `bf16=True` computes in bf16 beside them.

    After `train()`: `stopped` says whether SIGTERM ended it early (its checkpoint is saved), `events` what was skipped or rolled
    back, `stage_loads` each finished stage's relative load an expert.

    ValueError for weights that are not fp32, rows that ranks and accumulation steps cannot share, data shorter than a stage.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: PretrainConfig,
        curriculum: Curriculum,
        sources: Mapping[str, Source],
        **kwargs,
    ):
        narrow = {p.dtype for p in model.parameters()} - {torch.float32}
        if narrow:
            raise ValueError(
                f"The model has {narrow.pop()} weights and training needs fp32 masters; load it in fp32, set bf16."
            )
        self.curriculum = curriculum
        # Before the steps: it refuses what the data cannot last for, which would be laid out for minutes.
        row_multiple = args.gradient_accumulation_steps * args.world_size
        self.packer = Packer(curriculum, sources, args.seed, row_multiple)
        self.steps = list(plan_steps(curriculum, row_multiple))
        args.max_steps = len(self.steps)
        self.batches = Batches(
            self.packer,
            self.steps,
            accumulation=args.gradient_accumulation_steps,
            rank=args.process_index,
            world=args.world_size,
            flat="flash" in (model.config._attn_implementation or ""),
        )
        super().__init__(model, args, train_dataset=self.batches, **kwargs)
        if args.recompute == "selective":
            model.recompute_selectively()
        self.spikes = SpikeDetector(args.spike_window, args.spike_sigmas)
        self.events: list[dict[str, Any]] = []
        self.stage_loads: list[list[list[float]]] = []
        self.stopped = False
        self._skips = self._bad_in_a_row = 0
        self._skipped = False
        self._micro: list[tuple[torch.Tensor, dict]] = []
        self._run_dir: str | None = None
        self._stop = StopRequest()
        self.balance = BalanceCallback(model, self._balance_rate)
        # Before the first level's RoPE is set.
        self._architecture = architecture(model.config)
        check_ropes(model, curriculum)
        set_context(model, rope_at(curriculum, self.steps[0]), longest_context(curriculum))
        self.add_callback(self.balance)
        self.add_callback(StageCallback(self))
        if self.pop_callback(ProgressCallback):
            self.add_callback(TokenProgress(self))

    # -- what Trainer asks for ------------------------------------------------------------------------------------
    def get_train_dataloader(self) -> DataLoader:
        # Not through accelerate, which would deal out batches that are a rank's own already, and read one ahead of the counters.
        return DataLoader(self.batches, batch_size=None)

    def create_optimizer(self, model=None):
        if self.optimizer is None and self.args.optimizer == "muon":
            self.optimizer = MuonAdamW(
                self.model if model is None else model,
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                momentum=self.args.muon_momentum,
            )
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            last = len(self.steps) - 1
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: self.steps[min(step, last)].learning)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """As Trainer's, from `resume_from_checkpoint` (`latest` or a folder), until the plan or SIGTERM ends it."""
        folder = sound_checkpoint(self.args.output_dir, resume_from_checkpoint)
        state = {"step": 0} if folder is None else json.loads((folder / STATE_FILE).read_text())
        if resume_from_checkpoint != "latest":
            self._refuse_later_checkpoints(state["step"])
        if folder is not None:
            self._load_state(state)
        with self._stop:
            return super().train(resume_from_checkpoint=None if folder is None else str(folder), **kwargs)

    def _refuse_later_checkpoints(self, step: int) -> None:
        """`latest` would take them for what this run saved, and rotation this run's for older ones."""
        later = [path.name for path in checkpoints_in(Path(self.args.output_dir)) if step_of(path) > step]
        if later:
            raise ValueError(
                f"{self.args.output_dir} holds {later[-1]} and this run begins at step {step}: what both saved would be mixed; "
                "remove the later checkpoints, or give another output_dir."
            )

    def _run_epoch(self, *args, **kwargs):
        # Resumed where it had ended there is nothing left to read, which Trainer would warn of.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro.append((loss, inputs))
        return loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        # The language loss is a sum over the step's tokens, right however they are shared; the balance loss is a mean, which the
        # model adds once a micro-batch and rank.
        config = self.model.config
        whole = config.router_aux_loss_coef
        config.router_aux_loss_coef = whole / (self.args.gradient_accumulation_steps * self.args.world_size)
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            config.router_aux_loss_coef = whole

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            step = self.steps[self.state.global_step - 1]
            seen = {"tokens": step.tokens_before + step.tokens, "stage": step.stage, "context": step.length}
            logs |= seen | {"skipped_steps": self._skips} | self.balance.metrics()
        super().log(logs, start_time)

    def _balance_rate(self) -> float:
        if self._skipped:
            return 0.0
        stop = self.args.balance_until * self.curriculum.tokens
        return bias_rate(self.present_step().tokens_before, rate=self.args.balance_rate, stop=stop)

    def present_step(self) -> Step:
        """The step that is being trained, or the last one."""
        return self.steps[min(self.state.global_step, len(self.steps) - 1)]

    # -- bad steps ------------------------------------------------------------------------------------------------
    def _get_grad_norm(self, model, grad_norm=None):
        # The last hook before the optimizer's step that knows the gradient's norm.
        norm = super()._get_grad_norm(model, grad_norm)
        micro, self._micro = self._micro, []
        loss = self.accelerator.reduce(torch.stack([each for each, _ in micro]).sum(), "mean").item()
        problem = self._problem(loss, float(norm))
        self._skipped = bool(problem)
        if problem:
            model.zero_grad()
            self._on_bad_step(problem, loss, float(norm), [inputs for _, inputs in micro])
        self._bad_in_a_row = self._bad_in_a_row + 1 if problem else 0
        if self._bad_in_a_row >= self.args.most_bad_steps:
            raise ValueError(
                f"{self._bad_in_a_row} updates in a row were bad, the last by {problem} at step {self.state.global_step + 1}; "
                f"lower learning_rate={self.args.learning_rate:g}, or look at the batches in {self.args.output_dir}/bad_batches."
            )
        return norm

    def _problem(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return f"a loss of {loss}"
        if not math.isfinite(norm):
            return f"a gradient norm of {norm}"
        spike = not self.spikes.accepts(loss)
        return "a loss spike" if spike and self.args.on_spike != "ignore" else ""

    def _on_bad_step(self, problem: str, loss: float, norm: float, batches: list[dict]) -> None:
        """Save the batch, go back if asked, and leave a record."""
        number = self.state.global_step + 1
        folder = Path(self.args.output_dir) / "bad_batches"
        folder.mkdir(parents=True, exist_ok=True)
        for place, inputs in enumerate(batches):
            path = folder / f"step-{number}-rank-{self.args.process_index}-{place}.safetensors"
            save_file({name: t.contiguous().cpu() for name, t in inputs.items() if isinstance(t, torch.Tensor)}, path)
        action = "skipped"
        # After a NaN the weights are as good as before: no update was made with it.
        if problem == "a loss spike" and self.args.on_spike == "rollback":
            action = self._roll_back()
        self._skips += 1
        event = {"step": number, "problem": problem, "loss": str(loss), "grad_norm": str(norm), "action": action}
        self.events.append(event)
        logger.warning("Step %d: %s (loss %.4g, gradient norm %.4g): %s.", number, problem, loss, norm, action)

    def _roll_back(self) -> str:
        """Weights, biases and optimizer of the last checkpoint; data, learning rate and step count go on."""
        saved = sound_checkpoint(self.args.output_dir, "latest")
        if saved is None:
            return "skipped, there is no whole checkpoint to go back to"
        going_on = self.lr_scheduler.state_dict()
        self._load_from_checkpoint(str(saved))
        self._load_optimizer_and_scheduler(str(saved))
        self.lr_scheduler.load_state_dict(going_on)
        return f"rolled back to {saved.name}"

    # -- checkpoints ----------------------------------------------------------------------------------------------
    def _save(self, output_dir=None, state_dict=None) -> None:
        # Trainer switches the cache off for training; a saved model is to generate.
        self.model.config.use_cache = True
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model.config.use_cache = self.args.use_cache

    def _get_output_dir(self, trial) -> str:
        return self._run_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """Written in a folder of its own, sealed, and only then given its name."""
        out = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._run_dir = str(out / UNFINISHED)
        try:
            with naming_what_fails(f"The checkpoint of step {self.state.global_step}", out):
                super()._save_checkpoint(model, trial)
        finally:
            self._run_dir = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            whole = out / UNFINISHED / name
            (whole / STATE_FILE).write_text(json.dumps(self._state(), indent=1))
            seal(whole)
            shutil.rmtree(out / name, ignore_errors=True)
            os.replace(whole, out / name)
            (out / UNFINISHED).rmdir()
            # Later ones are damaged, passed over when this run began, and stay until it gets there.
            mine = [path for path in checkpoints_in(out) if step_of(path) <= self.state.global_step]
            for old in mine[: -self.args.save_total_limit] if self.args.save_total_limit else ():
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        # Both come back with the peak that they were saved at; this run's may be another, such as a lower one behind bad steps.
        state = self.lr_scheduler.state_dict()
        state["base_lrs"] = [self.args.learning_rate] * len(state["base_lrs"])
        rate = self.args.learning_rate * self.steps[min(state["last_epoch"], len(self.steps) - 1)].learning
        state["_last_lr"] = [rate] * len(state["base_lrs"])
        self.lr_scheduler.load_state_dict(state)
        for group in self.optimizer.param_groups:
            group |= {"lr": rate, "initial_lr": self.args.learning_rate}

    def _state(self) -> dict[str, Any]:
        return {
            "optimizer": self.args.optimizer,
            "optimizer_settings": self._optimizer_settings(),
            "plan": self.plan_mark(),
            "ropes": self._ropes(),
            "model": self._architecture,
            "step": self.state.global_step,
            "data": self.packer.state(),
            "balance": self.balance.state(),
            "losses": list(self.spikes.losses),
            "events": self.events,
            "stage_loads": self.stage_loads,
            "skips": self._skips,
            "bad_in_a_row": self._bad_in_a_row,
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        if state["plan"] != self.plan_mark():
            raise ValueError(
                f"The checkpoint in {self.args.output_dir} belongs to another plan of stages, batches or ranks; go on with "
                "that one, or give another output_dir."
            )
        if state.get("ropes", self._ropes()) != self._ropes():
            raise ValueError(
                f"The checkpoint in {self.args.output_dir} belongs to stages of another RoPE; go on with that, or give another "
                "output_dir."
            )
        model = self._architecture
        for name, before in state.get("model", {}).items():
            if model.get(name) != before:
                raise ValueError(
                    f"The checkpoint in {self.args.output_dir} is of a model with {name}={before} and this run's has "
                    f"{model.get(name)}; go on with that one, or give another output_dir."
                )
        if state["optimizer"] != self.args.optimizer:
            raise ValueError(
                f"The checkpoint in {self.args.output_dir} was trained with optimizer={state['optimizer']} and this run has "
                f"{self.args.optimizer}; go on with that one, or give another output_dir."
            )
        now = self._optimizer_settings()
        for name, before in state.get("optimizer_settings", now).items():
            if now[name] != before:
                raise ValueError(
                    f"The checkpoint in {self.args.output_dir} was trained with {name}={before}, which its optimizer brings "
                    f"along, and this run has {now[name]}; go on with {before}, or give another output_dir."
                )
        self.batches.begin = state["step"]
        self.packer.load_state(state["data"])
        self.balance.load_state(state["balance"])
        self.spikes.losses.extend(state["losses"])
        self.events, self.stage_loads = state["events"], state["stage_loads"]
        self._skips, self._bad_in_a_row = state["skips"], state["bad_in_a_row"]

    def _optimizer_settings(self) -> dict[str, Any]:
        return {"optim": self.args.optim.value, **{name: getattr(self.args, name) for name in OF_THE_STATE}}

    def _ropes(self) -> list[list[dict | None]]:
        """Each stage's by context length, as JSON gives them back."""
        return json.loads(json.dumps([[level.rope for level in stage.context] for stage in self.curriculum.stages]))

    def plan_mark(self) -> str:
        """Changes with every step of the plan; not with the number of ranks that share a step."""
        digest = hashlib.sha256(
            repr([(s.name, sorted(s.mixture.items()), s.order) for s in self.curriculum.stages]).encode()
        )
        for step in self.steps:
            digest.update(repr(tuple(vars(step).values())).encode())
        return digest.hexdigest()[:16]


def architecture(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that make the model what it is, as JSON gives them back."""
    fields = AxK1Config.__annotations__.keys() - MAY_CHANGE
    return json.loads(json.dumps({name: getattr(config, name) for name in sorted(fields)}))


# -- context ------------------------------------------------------------------------------------------------------
def longest_context(curriculum: Curriculum) -> int:
    return max(level.length for stage in curriculum.stages for level in stage.context)


def rope_at(curriculum: Curriculum, step: Step) -> Mapping[str, Any] | None:
    """The RoPE that was last asked for up to this step; None where none was."""
    levels = [level for stage in curriculum.stages[: step.stage] for level in stage.context]
    levels += curriculum.stages[step.stage].context[: step.level + 1]
    asked = [level.rope for level in levels if level.rope is not None]
    return asked[-1] if asked else None


def check_ropes(model: PreTrainedModel, curriculum: Curriculum) -> None:
    """ValueError for a RoPE that cannot be made: the last level's would otherwise be found out weeks later."""
    for stage in curriculum.stages:
        for level in stage.context:
            if level.rope is None:
                continue
            config = copy.deepcopy(model.config)
            config.rope_parameters = dict(level.rope)
            try:
                AxK1RotaryEmbedding(config)
                yarn_softmax_scale(config.rope_parameters)
            except (KeyError, TypeError, ValueError, ArithmeticError) as error:
                raise ValueError(
                    f"The rope {dict(level.rope)} of stage {stage.name!r} cannot be made ({error!r}); use a rope_type of "
                    "transformers with all that it needs."
                ) from error


def set_context(model: PreTrainedModel, rope: Mapping[str, Any] | None, longest: int) -> None:
    """Give the model another RoPE and room for `longest` positions; the config says so, and is saved with the weights."""
    config = model.config
    if rope is None:
        config.max_position_embeddings = max(config.max_position_embeddings, longest)
        return
    stretched = rope.get("factor", 1.0) * rope.get("original_max_position_embeddings", longest)
    config.rope_parameters = dict(rope)
    config.max_position_embeddings = max(longest, int(stretched))
    device = model.model.rotary_emb.inv_freq.device
    model.model.rotary_emb = AxK1RotaryEmbedding(config).to(device)
    for module in model.modules():
        if isinstance(module, AxK1Attention):
            module.scaling = config.qk_head_dim**-0.5 * yarn_softmax_scale(config.rope_parameters)


# -- callbacks ----------------------------------------------------------------------------------------------------
class StageCallback(TrainerCallback):
    """Changes RoPE between levels, closes stages, and turns a heard SIGTERM into a checkpoint and an end, on all ranks."""

    def __init__(self, trainer: PretrainTrainer):
        self.trainer = trainer
        self.rope: Mapping[str, Any] | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        rope = rope_at(trainer.curriculum, trainer.present_step())
        if rope is not self.rope:
            set_context(trainer.model, rope, longest_context(trainer.curriculum))
            self.rope = rope

    def on_step_end(self, args, state, control, **kwargs):
        trainer, done = self.trainer, state.global_step
        if done == len(trainer.steps) or trainer.steps[done].stage != trainer.steps[done - 1].stage:
            trainer.stage_loads.append(trainer.balance.start_stage())
            control.should_log = True
        if heard_anywhere(trainer._stop.heard, args.device):
            trainer.stopped = done < len(trainer.steps)
            control.should_save = control.should_training_stop = True
        return control


def heard_anywhere(heard: bool, device: torch.device) -> bool:
    """Whether any rank heard the request: one that stopped alone would leave the others waiting."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return heard
    flag = torch.tensor(int(heard), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


class TokenProgress(TrainerCallback):
    """A bar a stage, in tokens, with the time that is left and the latest loss."""

    def __init__(self, trainer: PretrainTrainer):
        self.trainer = trainer
        self.bar: tqdm | None = None
        self.stage = -1

    def on_step_begin(self, args, state, control, **kwargs):
        step = self.trainer.present_step()
        if step.stage == self.stage or not state.is_world_process_zero:
            return
        self.close()
        self.stage = step.stage
        of_stage = [s for s in self.trainer.steps if s.stage == step.stage]
        self.bar = tqdm(
            total=sum(s.tokens for s in of_stage),
            initial=step.tokens_before - of_stage[0].tokens_before,
            unit="tok",
            unit_scale=True,
            desc=self.trainer.curriculum.stages[step.stage].name,
        )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(self.trainer.steps[state.global_step - 1].tokens)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix_str(
                f"loss {logs['loss']:.3f}, MaxVio {logs['max_violation']:.2f}, context {logs['context']}"
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
