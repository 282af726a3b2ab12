"""How is a model fine-tuned in both modes at once? TRL's SFTTrainer, with each mode's loss seen and both ways to load.

Axes: B rows, S tokens.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from datasets import IterableDataset
from torch import Tensor
from trl import SFTConfig, SFTTrainer
from trl.models.utils import unwrap_model_for_generation

from modeling_axk1.generation_axk1 import set_thinking_tokens
from trainers.adapters import group_experts
from trainers.evaluation import evaluate_mode
from trainers.launching import Resumable, load_policy, settle_losses
from trainers.mode_curves import Measure, write_card
from trainers.mode_order import EpochSampler, draw_mix, order_units, pair_rows
from trainers.mode_rows import (
    NO_MODE,
    NON_THINKING,
    THINKING,
    apply_history_policy,
    check_control_tokens,
    describe_row,
    leave_out_overlong,
    refuse_conversations,
    require_completions,
    require_modes,
    require_rows,
    spell_tools,
    warn_of_lone_prompts,
    warn_of_unknown_tags,
)
from trainers.tokenizer import END_THINK, THINK


@dataclass
class ThinkFusionConfig(SFTConfig):
    """SFTConfig for Mode-Overlap rows (see `trainers.mode_overlap`): the loss falls on completions only.

    Rows longer than `max_length` are left out together with the same prompt's other rows, counted and warned about: a thought
    that is cut off would teach the model never to close it, and a prompt in one mode only confuses the modes.
    """

    # Said outright: with None, TRL decides by the columns of the first row.
    completion_only_loss: bool | None = True
    # The default of TRL 1.16; that of 1.14 keeps no per-token loss to split by mode.
    loss_type: str = "nll"
    packing: bool | None = field(
        default=None,
        metadata={
            "help": "Several rows in one sequence. None: where the attention is FlashAttention, pairing is 'shuffled', there is "
            "no thinking_ratio and max_length is set; with any other attention a packed row costs the square of its length, "
            "so rows are padded, and grouped by length."
        },
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "'group_by_length' (little padding), 'random', or transformers' other samplers."},
    )
    pairing: str = field(
        default="shuffled",
        metadata={
            "help": "'shuffled': rows in any order; grouped by length, a batch is mostly of one mode. 'paired': the thinking and "
            "the direct row of a prompt in one batch, the shorter padded to the longer.",
            "choices": ["shuffled", "paired"],
        },
    )
    thinking_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Share of thinking rows in an epoch, 0 to 1; rows of the mode in excess are drawn anew each epoch. "
            "None: as in the data."
        },
    )
    history_thoughts: str = field(
        default="drop",
        metadata={
            "help": "Thoughts of earlier assistant turns in a prompt. 'drop' (the rule of the chat template and of inference: a "
            "turn before the last user message reads as a direct answer) or 'keep'. Never trained on, either way.",
            "choices": ["drop", "keep"],
        },
    )
    probe_steps: int = field(
        default=100,
        metadata={
            "help": "Every so many steps the probe prompts are answered in both modes; a multiple of logging_steps, 0 for never."
        },
    )
    probe_max_new_tokens: int = field(default=512, metadata={"help": "An answer's limit in the probe."})
    probe_batch_size: int = field(default=16, metadata={"help": "Probe prompts answered at a time."})

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in (("pairing", ("shuffled", "paired")), ("history_thoughts", ("drop", "keep"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} does not exist; use one of {', '.join(allowed)}.")
        if self.thinking_ratio is not None and not 0 <= self.thinking_ratio <= 1:
            raise ValueError(f"thinking_ratio={self.thinking_ratio} is not a share between 0 and 1; 0.5 is even.")
        if self.thinking_ratio is not None and self.pairing == "paired":
            raise ValueError(
                "paired batches are half thinking; use pairing='shuffled' with a thinking_ratio, or drop it."
            )
        if self.pairing == "paired" and self.per_device_train_batch_size % 2:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} cannot hold whole pairs; use an even number."
            )
        if self.packing and (self.pairing == "paired" or self.thinking_ratio is not None):
            raise ValueError("packing mixes rows into fixed blocks; use pairing='shuffled' without a thinking_ratio.")
        if own_order(self) and self.train_sampling_strategy not in ("group_by_length", "random"):
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} has its own order of rows, and so have "
                "pairing='paired' and thinking_ratio; use 'group_by_length' or 'random' with them."
            )


def own_order(args: ThinkFusionConfig) -> bool:
    """Whether the order of rows is ours rather than one of transformers' samplers."""
    by_length = args.train_sampling_strategy == "group_by_length"
    return args.pairing == "paired" or args.thinking_ratio is not None or by_length


MEASURES = (
    Measure("loss of each mode", "loss_thinking", "loss_non_thinking", "nats a token"),
    Measure("held-out loss of each mode", "eval_loss_thinking", "eval_loss_non_thinking", "nats a token"),
    Measure(
        "format error on the probe prompts", "probe_format_error_thinking", "probe_format_error_non_thinking", "share"
    ),
    Measure(
        "truncated answers to the probe prompts", "probe_truncation_thinking", "probe_truncation_non_thinking", "share"
    ),
    Measure("tokens an answer, probe prompts", "probe_tokens_thinking", "probe_tokens_non_thinking", "tokens"),
)


class ThinkFusionTrainer(Resumable, SFTTrainer):
    """SFTTrainer for any causal LM whose tokenizer has `<think>` and `</think>` as single tokens.

    Logs besides TRL's metrics `loss_thinking`, `loss_non_thinking` (mean over the mode's trained tokens since the last
    log) and `thinking_token_share`; with `probe_prompts` (as `evaluate_mode` takes them) also, every `probe_steps`,
    `probe_{format_error, truncation, tokens}_{thinking, non_thinking}` of the model's own greedy answers. Writes the
    control-token ids into the model's generation config, so that what is saved can `generate(enable_thinking=...)`.

    `model` may be a path: it is then loaded through AutoModelForCausalLM. TRL's own loader takes the class that
    transformers itself has under the name in `architectures`, which for axk1 is not ours.

    ValueError for rows whose completion does not begin right behind its mode's control token (the chat template renders modes
    in another way), for rows without a mode, and for pairs that are none.
    """

    _name = "Think-Fusion SFT"
    _tag_names = ["trl", "sft", "think-fusion"]
    measures = MEASURES
    # In place of TRL's, which knows of no modes.
    create_model_card = write_card

    def __init__(
        self,
        model,
        args: ThinkFusionConfig,
        *,
        processing_class=None,
        probe_prompts: Sequence[str | list[dict]] = (),
        **kwargs,
    ):
        require_rows(kwargs.get("train_dataset"), "train")
        quantization = kwargs.pop("quantization_config", None)
        model, processing_class = load_policy(model, args, processing_class, quantization)
        settle_losses(model, args)
        if probe_prompts and args.probe_steps % args.logging_steps:
            raise ValueError(
                f"probe_steps={args.probe_steps} is no multiple of logging_steps={args.logging_steps}, and the probe is logged "
                "with the loss; make it one."
            )
        set_thinking_tokens(model.generation_config, processing_class)
        self.think_token_id, self.end_think_token_id = processing_class.convert_tokens_to_ids([THINK, END_THINK])
        self.probe_prompts = list(probe_prompts) if args.probe_steps else []
        choose_packing(args, model.config._attn_implementation)
        kwargs["peft_config"] = group_experts(kwargs.get("peft_config"), model)
        super().__init__(model, args, processing_class=processing_class, **kwargs)
        # Rows thinking, non-thinking; columns summed loss, trained tokens.
        self._mode_sums = {"train": torch.zeros(2, 2), "eval": torch.zeros(2, 2)}

    # -- data -----------------------------------------------------------------------------------------------------
    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if isinstance(dataset, IterableDataset):
            raise ValueError("A streamed dataset can be neither counted nor paired; load it without streaming.")
        require_rows(dataset, dataset_name)
        if formatting_func is None:
            refuse_conversations(dataset, dataset_name)
        if "input_ids" in dataset.column_names or "prompt" not in dataset.column_names:
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        require_completions(dataset, dataset_name)
        warn_of_unknown_tags(dataset, dataset_name)
        dataset = apply_history_policy(require_modes(spell_tools(dataset), dataset_name), args.history_thoughts)
        # TRL would cut long rows and drop some without a word: it gets no limit, and `leave_out_overlong` counts.
        unlimited = copy.copy(args)
        unlimited.max_length = None
        dataset = super()._prepare_dataset(dataset, processing_class, unlimited, False, formatting_func, dataset_name)
        ids = {"think_id": self.think_token_id, "end_think_id": self.end_think_token_id}
        dataset = dataset.map(describe_row, fn_kwargs=ids, desc=f"Finding the modes of {dataset_name} rows")
        check_control_tokens(dataset, dataset_name)
        dataset = leave_out_overlong(dataset, args.max_length, dataset_name)
        if dataset_name == "train":
            warn_of_lone_prompts(dataset)
        if packing:
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        return dataset

    def _get_train_sampler(self, train_dataset=None):
        # The dataset that is handed in has lost the columns that the order needs.
        rows = self.train_dataset
        if self.args.packing or not own_order(self.args):
            return super()._get_train_sampler(train_dataset)
        lengths = [len(ids) for ids in rows["input_ids"]] if "length" not in rows.column_names else list(rows["length"])
        modes = [mode == THINKING for mode in rows["mode"]] if "mode" in rows.column_names else None
        if modes is None and (self.args.pairing == "paired" or self.args.thinking_ratio is not None):
            raise ValueError(
                "tokenized rows do not show mode and prompt; give rows with prompt and completion to pair or mix them."
            )
        pairs = pair_rows(modes, rows["prompt_key"]) if self.args.pairing == "paired" else None
        step_units = max(self.get_total_train_batch_size(self.args) // (2 if pairs else 1), 1)
        by_length = self.args.train_sampling_strategy == "group_by_length"

        def order(epoch: int) -> list[int]:
            generator = torch.Generator().manual_seed(self.args.seed + epoch)
            if pairs is not None:
                units = pairs
            elif self.args.thinking_ratio is not None:
                units = [(row,) for row in draw_mix(modes, self.args.thinking_ratio, generator)]
            else:
                units = [(row,) for row in range(len(lengths))]
            return order_units(units, lengths if by_length else None, step_units, generator)

        return EpochSampler(order, lambda: int(self.state.epoch or 0))

    # -- what is seen of each mode -----------------------------------------------------------------------------------
    def _prepare_context_parallel_inputs(self, model, inputs):
        context, inputs = super()._prepare_context_parallel_inputs(model, inputs)
        if self._are_cut(inputs):
            # Rows are whole here for the last time: in this context a rank has pieces, and a control token may be another's.
            modes_BS = mode_of_tokens(inputs["input_ids"], inputs["labels"], self.think_token_id, self.end_think_token_id)
            self._next_modes_BS = F.pad(modes_BS[:, 1:], (0, 1), value=NO_MODE)
        return context, inputs

    def _are_cut(self, inputs: dict) -> bool:
        """Whether accelerate cuts these rows over ranks, for which Trainer gives them labels shifted beforehand."""
        parallel = self.accelerator.parallelism_config
        return parallel is not None and parallel.cp_enabled and "shift_labels" in inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # The parent keeps the per-token losses to itself: a hook is the way to them without a second forward pass or a
        # copy of its method.
        outputs = []
        hook = model.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            hook.remove()
        if self._are_cut(inputs):
            labels_BT = inputs["shift_labels"]
            modes_BT = self._next_modes_BS.gather(1, inputs["position_ids"])
        else:
            labels_BT = inputs["labels"][:, 1:]
            ids = (self.think_token_id, self.end_think_token_id)
            modes_BT = mode_of_tokens(inputs["input_ids"], inputs["labels"], *ids)[:, 1:]
        sums = loss_by_mode(loss_of_tokens(outputs[0], labels_BT), modes_BT)
        phase = "train" if self.model.training else "eval"
        self._mode_sums[phase] += self.accelerator.reduce(sums, "sum").cpu()
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        phase = "train" if self.model.training else "eval"
        # Of several datasets each has its own: eval_NAME_loss.
        prefix = next((name.removesuffix("loss") for name in logs if name.endswith("_loss")), "eval_") if phase == "eval" else ""
        sums = self._mode_sums[phase]
        tokens = {"thinking": sums[0, 1].item(), "non_thinking": sums[1, 1].item()}
        for row, mode in enumerate(tokens):
            if tokens[mode]:
                logs[f"{prefix}loss_{mode}"] = (sums[row, 0] / sums[row, 1]).item()
        if total := sum(tokens.values()):
            logs[f"{prefix}thinking_token_share"] = tokens["thinking"] / total
        sums.zero_()
        if (
            phase == "train"
            and "loss" in logs
            and self.probe_prompts
            and self.state.global_step % self.args.probe_steps == 0
        ):
            logs |= self.probe()
        super().log(logs, start_time)

    def probe(self) -> dict[str, float]:
        """Format error, truncation and tokens of each mode's greedy answers to the probe prompts. Draws no random number."""
        measured = {}
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            for thinking, mode in ((True, "thinking"), (False, "non_thinking")):
                result, _, _ = evaluate_mode(
                    model,
                    self.processing_class,
                    self.probe_prompts,
                    lambda number, answer: False,
                    thinking=thinking,
                    max_new_tokens=self.args.probe_max_new_tokens,
                    batch_size=self.args.probe_batch_size,
                )
                measured[f"probe_format_error_{mode}"] = result.format_error
                measured[f"probe_truncation_{mode}"] = result.truncation
                measured[f"probe_tokens_{mode}"] = result.tokens_per_answer
        return measured


def choose_packing(args: ThinkFusionConfig, attention: str) -> None:
    """Settle `args.packing`. Only FlashAttention keeps packed rows apart without computing what it then masks."""
    flash = "flash" in (attention or "")
    if args.packing is None:
        args.packing = (
            flash and args.pairing == "shuffled" and args.thinking_ratio is None and args.max_length is not None
        )
    elif args.packing and not flash:
        warnings.warn(
            f"packing=True with {attention} attention: a packed row costs the square of its length; packing=False pads instead.",
            stacklevel=3,
        )


def mode_of_tokens(input_ids_BS: Tensor, labels_BS: Tensor, think_id: int, end_think_id: int) -> Tensor:
    """The mode of every trained token [B, S]: THINKING, NON_THINKING, or NO_MODE (untrained, or no control token).

    A stretch of labels other than -100 is a completion, the token before it its control token; a packed row has many.
    """
    trained_BS = labels_BS != -100
    begins_BS = trained_BS.clone()
    begins_BS[:, 1:] &= ~trained_BS[:, :-1]
    position_S = torch.arange(labels_BS.shape[1], device=labels_BS.device)
    begin_BS = torch.where(begins_BS, position_S, 0).cummax(dim=1).values
    control_BS = input_ids_BS.gather(1, (begin_BS - 1).clamp(min=0))
    modes_BS = torch.full_like(labels_BS, NO_MODE)
    # A completion at the very start has no token before it.
    known_BS = trained_BS & (begin_BS > 0)
    modes_BS[known_BS & (control_BS == think_id)] = THINKING
    modes_BS[known_BS & (control_BS == end_think_id)] = NON_THINKING
    return modes_BS


def loss_of_tokens(output, labels_BT: Tensor) -> Tensor:
    """Negative log-likelihood of each position's next token, its label [B, T], detached; of no meaning where that is -100."""
    # TRL 1.16 computes it in its fused head and never builds the logits, 1.14 leaves it to the model.
    if "log_probs" in output:
        return -output.log_probs.detach()
    logits_BTV = output.logits.detach()[:, : labels_BT.shape[1]].float()
    return F.cross_entropy(logits_BTV.transpose(1, 2), labels_BT, ignore_index=-100, reduction="none")


def loss_by_mode(loss_BS: Tensor, modes_BS: Tensor) -> Tensor:
    """[[thinking loss, thinking tokens], [non-thinking loss, non-thinking tokens]], sums over all tokens, fp32."""
    rows = []
    for mode in (THINKING, NON_THINKING):
        chosen_BS = modes_BS == mode
        rows.append(torch.stack([loss_BS.float()[chosen_BS].sum(), chosen_BS.sum().float()]))
    return torch.stack(rows)
