"""How does a model learn from rewards in both modes at once? TRL's GRPOTrainer with paired prompts and dynamic sampling.

    every instruction I -> [I; <think>] and [I; </think>], a group of completions each, in one generation batch
    R = R_correct {+1, -1} + R_format {0, -1}                                   (`trainers.rewards`)
    groups without spread in R teach nothing: their place goes to groups of other instructions, asked in further rounds

[A.X K1 tech report, on-policy RL: the DAPO framework with GSPO's sequence-level ratio]

Axes: N groups, G completions a group, F reward functions, B rows of this process, S tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import trl
from accelerate.utils import gather_object
from datasets import Dataset
from packaging.version import Version
from torch import Tensor
from torch.utils.data import Sampler
from transformers import ProgressCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import get_soft_overlong_punishment

from modeling_axk1.generation_axk1 import set_thinking_tokens
from modeling_axk1.quantization_axk1 import is_packed
from trainers.adapters import group_experts
from trainers.dynamic_sampling import (
    Group,
    Rollout,
    fill_slots,
    group_rollouts,
    groups_to_ask,
    mode_metrics,
    regroup,
    slim,
)
from trainers.launching import Resumable, load_policy, settle_losses
from trainers.mode_curves import Measure, write_card
from trainers.mode_prompts import MODE_NAMES, MODES, PairedSampler, draw_instructions, pair_modes
from trainers.rewards import ON_ERROR, Judge, Tokens, checked, correct_reward, format_reward

logger = logging.get_logger(__name__)

# Clip range of the ratio.  [GSPO 5.1; DAPO 4.1]
CLIP = {"sequence": (3e-4, 4e-4), "token": (0.2, 0.28)}
AGGREGATION = {"sequence": "grpo", "token": "dapo"}
# Losses that are a mean over a batch's rows, whether masked or not.
ROW_MEANS = ("grpo", "sapo", "dr_grpo", "luspo")


@dataclass
class DapoGspoConfig(GRPOConfig):
    """GRPOConfig with the defaults of DAPO (arXiv 2503.14476), GSPO (arXiv 2507.18071) and the A.X K1 report.

    Ratio and aggregation. `importance_sampling_level` is "sequence" [A.X K1 report: GSPO's ratio]. What the report leaves
    open is how DAPO's token-level aggregation goes with it, and it matters where long thoughts and short answers share a
    batch:
      "sequence" with loss_type "grpo"  every sequence counts the same, so a short answer's tokens count more than a long
                                        thought's: GSPO's objective as published, and the default
      "sequence" with loss_type "dapo"  every token counts the same, as its sequence's one value stands on each: DAPO's
                                        framework with GSPO's ratio, word for word; TRL warns. With one update a batch
                                        its gradient is that of "token" with "dapo"
      "token" with loss_type "dapo"     DAPO as published, and the default of "token"
    Clipping: left at None, epsilon and epsilon_high are 3e-4 and 4e-4 for "sequence" [GSPO 5.1], 0.2 and 0.28 for "token"
    [DAPO 4.1, clip-higher]. With one update a batch (the default, steps_per_generation = gradient_accumulation_steps) the
    ratio is 1 and nothing is clipped; GSPO takes four updates a batch: steps_per_generation = 4 x accumulation.

    Other defaults: beta 0, no KL and no reference model [DAPO 2.3]; 16 completions a prompt, learning rate 1e-6, constant
    after 20 warm-up steps [DAPO 4.1]; truncated completions masked [DAPO 3.4, overlong filtering]; a soft punishment over
    the last fifth of the length [DAPO 4.1: 4,096 of 20,480 tokens]; at most 10 rounds of generation for one batch [DAPO's
    released recipe]; temperature 1 and top_p 1, since samples of another distribution than the trained one make the
    ratio wrong; dropout off, for the same reason (TRL samples in training mode, so an adapter's dropout would be in the
    samples).

    Router: its balancing bias (`e_score_correction_bias`) is frozen. It is a buffer, no gradient reaches it, and no
    balancing step is taken here: a bias that moves between sampling and training changes which experts answer, and so
    the ratio, without any gradient having asked for it; and the few prompts of an RL batch say little about the load.

    Resuming is bit-identical at checkpoints that fall between two generations; others are refused here. The prompts of
    the resampling rounds are a function of seed and step, so that there is no state of theirs to lose.

    vLLM: `use_vllm=True` and TRL's other vllm_* options; weights go there as a checkpoint stores them (`vllm_rollouts`).
    """

    modes: str = field(
        default="both", metadata={"help": "both, thinking or non-thinking: the modes every prompt is asked in."}
    )
    dynamic_sampling: bool = field(
        default=True,
        metadata={"help": "Replace groups without spread by groups of other prompts, and mask what is left."},
    )
    max_resample_rounds: int = field(
        default=9, metadata={"help": "Rounds of generation after the first; groups still dead then are masked."}
    )
    reward_errors: str = field(
        default="raise",
        metadata={
            "help": "A judge or reward that raises or returns NaN: raise stops the run, skip leaves it out, counted."
        },
    )
    soft_overlong_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Last tokens of the length over which a punishment grows to -1; default a fifth, 0 for none."
        },
    )
    max_prompt_tokens: int | None = field(
        default=None,
        metadata={"help": "Longer prompts are left out, counted; default: what the model's positions leave room for."},
    )

    importance_sampling_level: str = field(default="sequence", metadata={"help": "sequence (GSPO) or token (DAPO)."})
    loss_type: str | None = field(
        default=None,
        metadata={"help": "Aggregation; default grpo (every sequence alike) for sequence, dapo for token."},
    )
    epsilon: float | None = field(
        default=None, metadata={"help": "Lower clip range; default 3e-4 (sequence), 0.2 (token)."}
    )
    epsilon_high: float | None = field(
        default=None, metadata={"help": "Upper clip range; default 4e-4 (sequence), 0.28 (token)."}
    )
    num_generations: int | None = field(default=16, metadata={"help": "Completions of a prompt in one mode: a group."})
    gradient_accumulation_steps: int = field(
        default=8, metadata={"help": "With 8 rows a device: four groups, two instructions in both modes."}
    )
    mask_truncated_completions: bool = field(default=True, metadata={"help": "Leave cut completions out of the loss."})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=20, metadata={"help": "Steps, or below 1 their share, of linear warm-up."})
    disable_dropout: bool = field(default=True, metadata={"help": "Sample from the very policy that is trained."})

    def __post_init__(self):
        _require_choice("modes", self.modes, MODES)
        _require_choice("importance_sampling_level", self.importance_sampling_level, CLIP)
        _require_choice("reward_errors", self.reward_errors, ON_ERROR)
        low, high = CLIP[self.importance_sampling_level]
        if self.epsilon_high is None:
            # Someone who sets the lower end alone means a symmetric range, as in TRL.
            self.epsilon_high = high if self.epsilon is None else self.epsilon
        self.epsilon = low if self.epsilon is None else self.epsilon
        self.loss_type = self.loss_type or AGGREGATION[self.importance_sampling_level]
        if self.max_resample_rounds < 0:
            raise ValueError(f"max_resample_rounds={self.max_resample_rounds} is no number of rounds; use 0 or more.")
        if (self.chat_template_kwargs or {}).get("enable_thinking") is not None:
            raise ValueError("chat_template_kwargs sets enable_thinking for all prompts; choose with modes instead.")
        super().__post_init__()
        if self.soft_overlong_tokens is None:
            self.soft_overlong_tokens = self.max_completion_length // 5
        if not 0 <= self.soft_overlong_tokens <= self.max_completion_length:
            raise ValueError(
                f"soft_overlong_tokens={self.soft_overlong_tokens} does not lie within "
                f"max_completion_length={self.max_completion_length}; use a part of it, or 0 for none."
            )
        self._require_whole_groups()
        self._require_aligned_checkpoints()

    def _require_whole_groups(self) -> None:
        rows = self.num_generations * len(MODES[self.modes])
        if self.generation_batch_size % rows:
            raise ValueError(
                f"A generation batch of {self.generation_batch_size} rows does not split into instructions of {rows} "
                f"({len(MODES[self.modes])} modes x {self.num_generations} completions); change num_generations, "
                "per_device_train_batch_size or gradient_accumulation_steps."
            )

    def _require_aligned_checkpoints(self) -> None:
        if self.save_strategy != "steps":
            return
        every = math.lcm(self.steps_per_generation * self.num_iterations, self.gradient_accumulation_steps)
        updates = every // self.gradient_accumulation_steps
        if updates == 1:
            return
        if self.save_steps < 1:
            raise ValueError(
                f"save_steps={self.save_steps} is a share of the run, whose steps may fall between the {updates} updates of one "
                f"generated batch, which a resumed run would not have; use a number of steps, a multiple of {updates}."
            )
        if self.save_steps % updates:
            raise ValueError(
                f"save_steps={self.save_steps} falls between the {updates} updates of one generated batch, which a "
                f"resumed run would not have; use a multiple of {updates}."
            )
        if self.max_steps > 0 and self.max_steps % updates:
            raise ValueError(
                f"max_steps={self.max_steps} ends between the {updates} updates of one generated batch, and a run that goes on "
                f"from its last checkpoint would not have that batch; use a multiple of {updates}."
            )


def _require_choice(name: str, value, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(choices)}.")


# What `mode_metrics` measures, as it is shown.
COLUMNS = ("accuracy", "format_error", "truncated", "tokens", "all_right", "all_wrong", "keep_rate")
MEASURES = tuple(
    Measure(
        f"{name.replace('_', ' ')}, sampled answers of all rounds",
        f"{MODE_NAMES[True]}/{name}",
        f"{MODE_NAMES[False]}/{name}",
        "tokens" if name == "tokens" else "share",
    )
    for name in COLUMNS
)


# -- the trainer --------------------------------------------------------------------------------------------------------
class DapoGspoTrainer(Resumable, GRPOTrainer):
    """GRPOTrainer for any causal LM whose tokenizer has `<think>` and `</think>` as single tokens, both modes in one run.

    judge(answer text, row) -> bool decides R_correct (see `trainers.rewards`); `shaping_rewards` are further reward
    functions of TRL's kind, added to the sum and never looked at by dynamic sampling. `train_dataset` has a column `prompt`
    (messages, or a text) and whatever the judge reads. `model` may be a path: it is then loaded through
    AutoModelForCausalLM, since TRL's own loader takes the class that transformers itself has for axk1.

    Logs besides TRL's metrics, for each mode, `thinking/` and `non_thinking/`: accuracy, format_error, truncated, tokens,
    all_right, all_wrong, keep_rate; and `sampling/`: keep_rate, rounds, dead_groups, failed, completions, tokens (generated
    for a batch).
    """

    _name = "reinforcement in both modes (DAPO with GSPO's ratio)"
    _tag_names = ["trl", "grpo", "dapo", "gspo"]
    measures = MEASURES
    # In place of TRL's, which knows of no modes.
    create_model_card = write_card

    def __init__(
        self,
        model,
        judge: Judge,
        args: DapoGspoConfig,
        train_dataset: Dataset,
        *,
        eval_dataset: Dataset | None = None,
        processing_class=None,
        shaping_rewards: Sequence[Callable] = (),
        callbacks=None,
        optimizers=(None, None),
        peft_config=None,
        quantization_config=None,
    ):
        if Version(trl.__version__) < Version("1.16"):
            raise ImportError(f"DapoGspoTrainer needs TRL 1.16, found {trl.__version__}; use Python 3.11 or later.")
        model, processing_class = load_policy(model, args, processing_class, quantization_config)
        if args.use_vllm and any(map(is_packed, model.modules())):
            raise ValueError(
                "use_vllm=True sends a policy's weights as a checkpoint stores them and this one's experts are quantised; "
                "load it without quantization_config, or set use_vllm=False."
            )
        settle_losses(model, args)
        set_thinking_tokens(model.generation_config, processing_class)
        settings = model.generation_config
        self.tokens = Tokens(settings.think_token_id, settings.end_think_token_id, frozenset(settings.eos_token_id))
        with args.main_process_first(desc="pairing the prompts"):
            pair = {
                "modes": args.modes,
                "max_prompt_tokens": prompt_limit(model, args),
                "template_kwargs": args.chat_template_kwargs,
            }
            train_dataset = pair_modes(train_dataset, processing_class, **pair)
            if eval_dataset is not None:
                eval_dataset = pair_modes(eval_dataset, processing_class, **pair)
        _require_full_batch(train_dataset, args)
        correct = correct_reward(judge, processing_class, self.tokens, on_error=args.reward_errors)
        rewards = [correct, format_reward(self.tokens)]
        if args.soft_overlong_tokens:
            rewards.append(get_soft_overlong_punishment(args.max_completion_length, args.soft_overlong_tokens))
        rewards += [checked(function, on_error=args.reward_errors) for function in shaping_rewards]
        # The rows being asked, for `_tokenize_prompts`; and the rollouts that fill the batch, once they are chosen.
        self._asking: list[dict] = []
        self._chosen: tuple[list[Rollout], Tensor] | None = None
        # All that the evaluation has asked so far.
        self._evaluated: list[Group] = []
        super().__init__(
            model,
            reward_funcs=rewards,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=group_experts(peft_config, model),
        )
        if self.use_vllm:
            # Imports vLLM, and needs TRL 1.16.
            from trainers.vllm_rollouts import StoredWeightsGeneration

            self.vllm_generation = StoredWeightsGeneration(self.vllm_generation)
        self.progress = ModeProgress()
        # With disable_tqdm there is a plain printer instead, which stays.
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(self.progress)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        args, modes = self.args, len(MODES[self.args.modes])
        return PairedSampler(
            instructions=len(dataset if dataset is not None else self.train_dataset) // modes,
            modes=modes,
            generations=self.num_generations,
            batch=args.generation_batch_size // (self.num_generations * modes),
            repeats=self.num_iterations * args.steps_per_generation,
            seed=args.seed if self.shuffle_dataset else None,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def _tokenize_prompts(self, prompts: list):
        # Rendered once for all by `pair_modes`: the prompt alone does not know its mode.
        assert len(prompts) == len(self._asking), (len(prompts), len(self._asking))
        return [row["prompt_ids"] for row in self._asking], None, {}

    def _generate(self, prompts: list):
        if self._chosen is None:
            return super()._generate(prompts)
        rollouts, _ = self._chosen
        logprobs = [each.logprobs for each in rollouts]
        return (
            [each.row["prompt_ids"] for each in rollouts],
            [each.completion_ids for each in rollouts],
            None,
            [each.completion for each in rollouts],
            None if None in logprobs else logprobs,
            {},
            None,
            [],
        )

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if self._chosen is None:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._chosen[1]

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        training = self.model.training
        generations = self.num_generations if training else self.num_generations_eval
        filtered = training and self.args.dynamic_sampling
        asked = group_rollouts(*self._ask(inputs), generations, filtered=filtered)
        slots, rounds = asked, 1
        while filtered and rounds <= self.args.max_resample_rounds and not all(group.alive for group in slots):
            rounds += 1
            fresh = group_rollouts(*self._ask(self._fresh_rows(slots, asked, rounds)), generations, filtered=True)
            asked = asked + fresh
            slots = fill_slots(slots, fresh)
            self.progress.show_round(rounds, sum(group.alive for group in slots), len(slots))
        self._log_sampling("train" if training else "eval", asked, slots, rounds)
        return self._score(slots, len(inputs))

    def _ask(self, rows: list[dict]) -> tuple[list[Rollout], Tensor]:
        """Generate and score this process's rows. Returns the rollouts and rewards [R, F] of all processes, in order."""
        self._asking = rows
        prompts = [row["prompt"] for row in rows]
        _, completion_ids, tool_mask, completions, logprobs, *_ = super()._generate(prompts)
        assert tool_mask is None, "tools and rollout functions are not offered"
        rewards_RF = super()._calculate_rewards(rows, prompts, completions, completion_ids)
        # TRL would keep them for a row whether or not the row is kept.
        columns = dict(self._pending_extra_logs)
        self._pending_extra_logs.clear()
        local = [
            Rollout(
                row,
                completion_ids[place],
                completions[place],
                logprobs[place] if logprobs is not None else None,
                {name: values[place] for name, values in columns.items()},
            )
            for place, row in enumerate(rows)
        ]
        return gather_object(local), rewards_RF.cpu()

    def _fresh_rows(self, slots: list[Group], asked: list[Group], round_number: int) -> list[dict]:
        """This process's rows of the next round: whole instructions, in all modes, that this batch has not asked yet."""
        modes, processes = len(MODES[self.args.modes]), self.accelerator.num_processes
        groups = groups_to_ask(
            sum(not group.alive for group in slots),
            len(asked),
            sum(group.alive for group in asked),
            # Every process gets the same number of rows, every instruction all its modes.
            unit=math.lcm(modes, processes // math.gcd(processes, self.num_generations)),
            most=len(slots),
        )
        micro_step = self._step % self.args.gradient_accumulation_steps
        numbers = draw_instructions(
            len(self.train_dataset) // modes,
            groups // modes,
            # A function of where the run is: resumed, it asks the same prompts, and no state had to be saved.
            f"{self.args.seed} update {self.state.global_step} micro-step {micro_step} round {round_number}",
            asked={group.rollouts[0].row["instruction"] for group in asked},
        )
        places = [
            number * modes + mode for number in numbers for mode in range(modes) for _ in range(self.num_generations)
        ]
        share = len(places) // processes
        mine = places[self.accelerator.process_index * share :][:share]
        return [self.train_dataset[place] for place in mine]

    def _score(self, slots: list[Group], rows: int) -> dict:
        """TRL's batch of this process's `rows` rows out of the chosen groups, the dead ones masked out of the loss."""
        mine = slice(self.accelerator.process_index * rows, (self.accelerator.process_index + 1) * rows)
        rollouts = [each for group in slots for each in group.rollouts][mine]
        alive = [group.alive for group in slots for _ in group.rollouts][mine]
        for each in rollouts:
            for name, value in each.extra.items():
                self._pending_extra_logs[name].append(value)
        self._chosen = rollouts, torch.cat([group.rewards_GF for group in slots]).to(self.accelerator.device)
        try:
            batch = super()._generate_and_score_completions([each.row for each in rollouts])
        finally:
            self._chosen = None
        return self._mask_dead(batch, torch.tensor(alive, device=self.accelerator.device))

    def _mask_dead(self, batch: dict, alive_B: Tensor) -> dict:
        mask_BS = batch["completion_mask"] * alive_B[:, None]
        counts_B = mask_BS.any(dim=1)
        counted, rows = self.accelerator.reduce(
            torch.stack([counts_B.sum(), torch.tensor(counts_B.numel(), device=counts_B.device)]), "sum"
        ).tolist()
        # Masked rows still stand in the divisor of these losses; a mean over the rows that count has to make up for it.
        scale = rows / max(counted, 1) if self.loss_type in ROW_MEANS else 1.0
        return batch | {
            "completion_mask": mask_BS,
            "advantages": batch["advantages"] * counts_B * scale,
            "num_items_in_batch": self.accelerator.gather(mask_BS.sum()).sum(),
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._evaluated and not self.model.training:
            # Of all answers at once: a mean over batches counts an answer the more, the fewer of its mode its batch holds.
            groups = regroup(self._evaluated, self.num_generations_eval)
            self._evaluated = []
            self._metrics["eval"] |= {name: [value] for name, value in mode_metrics(groups, self.tokens).items()}
        super().log(logs, start_time)

    def _log_sampling(self, phase: str, asked: list[Group], slots: list[Group], rounds: int) -> None:
        fates = [group.fate for group in asked]
        dead = sum(not group.alive for group in slots)
        sampling = {
            "keep_rate": fates.count("kept") / len(asked),
            "rounds": rounds,
            "dead_groups": dead,
            "failed": fates.count("failed"),
            "completions": sum(len(group.rollouts) for group in asked),
            "tokens": sum(len(each.completion_ids) for group in asked for each in group.rollouts),
        }
        metrics = mode_metrics(asked, self.tokens) | {f"sampling/{name}": value for name, value in sampling.items()}
        for name, value in metrics.items():
            self._metrics[phase][name].append(value)
        if phase == "eval":
            self._evaluated += [slim(group) for group in asked]
        if dead == len(slots) and self.accelerator.is_main_process:
            logger.warning(
                f"Step {self.state.global_step}: none of {len(asked)} groups in {rounds} rounds has a spread of rewards "
                f"({fates.count('all_right')} all right, {fates.count('all_wrong')} all wrong, {fates.count('failed')} "
                "failed), so this batch's loss is zero; use prompts of another difficulty or more max_resample_rounds."
            )


def prompt_limit(model, args: DapoGspoConfig) -> int:
    """The longest prompt in tokens: `max_prompt_tokens`, or what completions leave of the model's positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = math.inf if positions is None else positions - args.max_completion_length
    limit = args.max_prompt_tokens if args.max_prompt_tokens is not None else room
    if limit < 1 or limit > room:
        raise ValueError(
            f"max_completion_length={args.max_completion_length} leaves {room} of the model's {positions} positions to "
            f"prompts, max_prompt_tokens is {args.max_prompt_tokens}; lower one of the two."
        )
    return limit


def _require_full_batch(dataset: Dataset, args: DapoGspoConfig) -> None:
    groups = args.generation_batch_size // args.num_generations
    if len(dataset) < groups:
        modes = len(MODES[args.modes])
        raise ValueError(
            f"The dataset holds {len(dataset) // modes} instructions, a generation batch {groups // modes}; "
            "give more prompts, or lower the batch size."
        )


# -- what is shown ------------------------------------------------------------------------------------------------------
def mode_table(logs: dict[str, float]) -> str:
    """The two modes' metrics of one log as a small table; empty if it holds none."""
    lines = []
    for mode in MODE_NAMES.values():
        if f"{mode}/accuracy" not in logs:
            continue
        values = [logs[f"{mode}/{name}"] for name in COLUMNS]
        cells = [f"{value:.1f}" if name == "tokens" else f"{value:.1%}" for name, value in zip(COLUMNS, values)]
        lines.append([mode, *cells])
    if not lines:
        return ""
    head = ["", *(name.replace("_", " ") for name in COLUMNS)]
    return "\n".join("  ".join(f"{cell:>12}" for cell in line) for line in [head, *lines])


class ModeProgress(ProgressCallback):
    """Transformers' progress bar; a log is a line of the run's numbers and a table of the modes instead of sixty metrics."""

    def show_round(self, rounds: int, alive: int, groups: int) -> None:
        if self.training_bar is not None:
            self.training_bar.set_postfix_str(f"round {rounds}: {alive} of {groups} groups")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not logs:
            return
        shown = ("loss", "reward", "sampling/keep_rate", "sampling/rounds", "sampling/dead_groups", "learning_rate")
        numbers = "  ".join(f"{name.split('/')[-1]} {float(logs[name]):.4g}" for name in shown if name in logs)
        if table := mode_table(logs):
            self.training_bar.write(f"step {state.global_step}  {numbers}\n{table}")
