"""What does reinforcement add to a model of two modes, and what does dynamic sampling? At nano scale, on a laptop CPU.

    problems -> tokenizer -> base -> start: Think-Fusion SFT, stopped while most thinking answers are still wrong
    start -> dynamic       RL with dynamic sampling
          -> same_updates  RL without it, as many updates
          -> same_tokens   RL without it, as many generated tokens (hence more updates)
    each measured on held-out problems in both modes

Read it from `main` downwards or upwards. A stage's folder appears only when it is finished: a killed run goes on from its
last finished stage. `axk1 rl --config recipes/configs/rl_cpu.yaml` is the RL of stage `dynamic` as a command.

The same at full scale: A.X K1 Technical Report, on-policy RL; DAPO, arXiv 2503.14476; GSPO, arXiv 2507.18071.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import datasets
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from recipes import nano_think_fusion as nano
from recipes.nano_problems import Problem, draw_problems
from trainers import report
from trainers.dapo_gspo import DapoGspoConfig, DapoGspoTrainer
from trainers.mode_overlap import build_mode_overlap, make_row
from trainers.rewards import judge_reasoning_gym
from trainers.think_fusion import ThinkFusionConfig, ThinkFusionTrainer


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of one seed. Saved with the run; a run goes on only under the same settings."""

    seed: int = 17
    threads: int = 2
    base_steps: int = 1000
    start_steps: int = 400  # at most: the stage ends when the thinking mode is good enough to learn by trial
    start_accuracy: float = 0.35  # of sampled answers, which are what reinforcement trains
    check_every: int = 20
    rl_steps: int = 50
    rl_problems: int = 4000
    instructions: int = 16  # of a batch, each in both modes
    generations: int = 8
    learning_rate: float = 5e-4
    test_problems: int = 300
    max_new_tokens: int = 64

    def sft(self) -> nano.Settings:
        """The same as the stages of `nano_think_fusion` read it."""
        return nano.Settings(seed=self.seed, threads=self.threads, base_steps=self.base_steps)


CELLS = ("dynamic", "same_updates", "same_tokens")


# -- stages -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Problems:
    """Disjoint by text: no question occurs in two of the fields."""

    base: list[Problem]
    fused: list[Problem]
    rl: list[Problem]
    check: list[Problem]
    test: list[Problem]


def draw_splits(settings: Settings) -> Problems:
    rows = settings.sft().batch_rows
    sizes = {
        "base": settings.base_steps * rows,
        "fused": settings.start_steps * rows // 2,
        "rl": settings.rl_problems,
        "check": 100,
        "test": settings.test_problems,
    }
    drawn = iter(draw_problems(sum(sizes.values()), seed=settings.seed))
    return Problems(**{name: [next(drawn) for _ in range(size)] for name, size in sizes.items()})


class StopInTime(TrainerCallback):
    """End the SFT where RL has something to do: not all right yet, and often enough right to be rewarded."""

    def __init__(self, tokenizer, problems: list[Problem], settings: Settings):
        self.tokenizer, self.problems, self.settings = tokenizer, problems, settings
        self.checks: list[dict] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.settings.check_every:
            return
        [(thinking, *_)] = measure(model, self.tokenizer, self.problems, self.settings, modes=(True,), **SAMPLED)
        self.checks.append({"step": state.global_step, "accuracy": thinking["accuracy"]})
        control.should_training_stop |= thinking["accuracy"] >= self.settings.start_accuracy


def fuse_a_little(folder: Path, base: Path, tokenizer, problems: Problems, settings: Settings) -> dict:
    """Think-Fusion SFT on the Mode-Overlap Dataset from the base model, at a constant rate, stopped early."""
    rows = build_mode_overlap(make_row(p.messages, p.answer, p.trace) for p in problems.fused)
    arguments = nano.training_arguments(folder, settings.sft(), settings.start_steps, learning_rate=1e-3)
    arguments |= {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": None}
    stop = StopInTime(tokenizer, problems.check, settings)
    trainer = ThinkFusionTrainer(
        str(base),
        ThinkFusionConfig(**arguments),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        callbacks=[stop],
    )
    trained = nano.train_and_save(trainer, folder, tokenizer)
    return trained | {"checks": stop.checks} | evaluate(folder, tokenizer, problems.test, settings)


def rl_rows(problems: Sequence[Problem]) -> list[dict]:
    """What DapoGspoTrainer and `axk1 rl` read: the prompt, and reasoning-gym's item for its verifier."""
    return [{"prompt": p.messages, "entry": json.dumps(p.entry)} for p in problems]


def rl_config(folder: Path, settings: Settings, *, dynamic: bool, updates: int, **more) -> DapoGspoConfig:
    return DapoGspoConfig(
        str(folder),
        dynamic_sampling=dynamic,
        max_steps=updates,
        # One update a batch.
        per_device_train_batch_size=settings.instructions * 2 * settings.generations,
        gradient_accumulation_steps=1,
        num_generations=settings.generations,
        max_completion_length=settings.max_new_tokens,
        # GSPO's ratio with DAPO's aggregation: with GSPO's own, the 5 tokens of a direct answer, most often a guess, would
        # weigh as much as the 28 of a worked one.
        loss_type="dapo",
        learning_rate=settings.learning_rate,
        warmup_steps=5,
        # Down to zero, so that the last steps' noise does not stay in the weights; single pilots, not a comparison, chose it.
        lr_scheduler_type="linear",
        adam_beta2=0.95,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=settings.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        **more,
    )


def reinforce(
    folder: Path, start: Path, tokenizer, problems: Problems, settings: Settings, *, dynamic: bool, updates: int, **more
) -> dict:
    """RL in both modes from `start`. `tokens` of the result: all that were generated, those of dropped groups too.

    `more` are further settings of DapoGspoConfig.
    """
    trainer = DapoGspoTrainer(
        str(start),
        judge_reasoning_gym,
        rl_config(folder, settings, dynamic=dynamic, updates=updates, **more),
        Dataset.from_list(rl_rows(problems.rl)),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(folder)
    history = [log for log in trainer.state.log_history if "sampling/rounds" in log]
    done = {"history": history, "updates": updates, "tokens": sum(log["sampling/tokens"] for log in history)}
    return done | evaluate(folder, tokenizer, problems.test, settings)


# What RL trains is the policy at temperature 1; what most people use is nearer to its most likely answer.
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}


def evaluate(folder: Path, tokenizer, test: list[Problem], settings: Settings) -> dict:
    """Both modes on the held-out problems, nothing enforced: greedy, and sampled as in training."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(settings.seed)
    greedy, sampled = (measure(model, tokenizer, test, settings, **how) for how in ({}, SAMPLED))
    return {
        "modes": [row for row, _, _ in greedy],
        "correct": [correct for _, correct, _ in greedy],
        "broken": [broken for _, _, broken in greedy],
        "sampled": [row for row, _, _ in sampled],
        "sampled_correct": [correct for _, correct, _ in sampled],
        "sampled_broken": [broken for _, _, broken in sampled],
    }


def measure(
    model, tokenizer, problems, settings: Settings, modes=(True, False), **how
) -> list[tuple[dict, list[bool], list[bool]]]:
    """For each mode its result, and of each problem whether the answer is right and whether its format is broken."""
    found = []
    for thinking in modes:
        asked = {"thinking": thinking, "max_new_tokens": settings.max_new_tokens, **how}
        result, readings, correct = nano.answer_problems(model, tokenizer, problems, **asked)
        found.append((result.as_row(), correct, [reading.format_error for reading in readings]))
    return found


# -- what is shown ------------------------------------------------------------------------------------------------
def interval(by_seed: Sequence[Sequence[bool]], draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of a share: seeds are drawn again, and within each its problems."""
    rng = random.Random(0)
    means = []
    for _ in range(draws):
        seeds = rng.choices(by_seed, k=len(by_seed))
        means.append(sum(sum(rng.choices(each, k=len(each))) / len(each) for each in seeds) / len(seeds))
    means.sort()
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def share(by_seed: Sequence[Sequence[bool]]) -> str:
    """How many are true, and its interval."""
    low, high = interval(by_seed)
    return f"{sum(sum(each) / len(each) for each in by_seed) / len(by_seed):.1%} ({low:.1%} to {high:.1%})"


def mean_row(rows: Sequence[dict]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0] if key != "mode"}


def result_table(runs: Sequence[dict[str, dict]]) -> list[dict]:
    """One line a model and mode, means over the seeds; greedy but for the last two columns, R_correct and R_format too."""
    lines = []
    for name in ("start", *CELLS):
        results = [run[name] for run in runs]
        for place, mode in enumerate(("thinking", "non-thinking")):
            rows = [result["modes"][place] for result in results]
            mean = mean_row(rows)
            correct, broken, sampled_correct, sampled_broken = (
                share([result[key][place] for result in results])
                for key in ("correct", "broken", "sampled_correct", "sampled_broken")
            )
            lines.append(
                {
                    "model": name.replace("_", " "),
                    "mode": mode,
                    "accuracy": correct,
                    "R_correct": f"{2 * mean['accuracy'] - 1:+.2f}",
                    "R_format": f"{-mean['format_error']:+.3f}",
                    "format error": broken,
                    "truncated": f"{mean['truncation']:.1%}",
                    "tokens/answer": f"{mean['tokens_per_answer']:.1f}",
                    "accuracy at t=1": sampled_correct,
                    "format error at t=1": sampled_broken,
                }
            )
    return lines


def cost_table(runs: Sequence[dict[str, dict]]) -> list[dict]:
    """What each training took, means over the seeds."""
    lines = []
    for name in CELLS:
        results = [run[name] for run in runs]
        steps = [log for result in results for log in result["history"]]
        lines.append(
            {
                "training": name.replace("_", " "),
                "updates": f"{sum(result['updates'] for result in results) / len(results):.0f}",
                "tokens generated": f"{sum(result['tokens'] for result in results) / len(results):,.0f}",
                "rounds/update": f"{sum(log['sampling/rounds'] for log in steps) / len(steps):.2f}",
                "keep rate": f"{sum(log['sampling/keep_rate'] for log in steps) / len(steps):.1%}",
                "seconds": f"{sum(result['elapsed_s'] for result in results) / len(results):.0f}",
            }
        )
    return lines


CURVES = {
    "thinking/accuracy": "R_correct, thinking: share of right answers among the sampled ones",
    "non_thinking/accuracy": "R_correct, non-thinking: share of right answers among the sampled ones",
    "thinking/format_error": "R_format, thinking: share of sampled answers that break the format",
    "non_thinking/format_error": "R_format, non-thinking: share of sampled answers that break the format",
    "sampling/keep_rate": "Keep rate: share of the asked groups whose rewards differ",
}


def write_report(path: Path, settings: Settings, seeds: Sequence[int], runs: Sequence[dict[str, dict]]) -> None:
    pieces = [
        report.paragraph(
            f"{settings.test_problems} held-out problems of reasoning-gym a seed, seeds {', '.join(map(str, seeds))}; "
            "greedy decoding, or sampled at temperature 1 as in training; nothing enforced; 95% bootstrap intervals over "
            "seeds and problems. All start from the same model of both modes, whose SFT was stopped early."
        ),
        report.table(result_table(runs)),
        report.heading("Cost"),
        report.table(cost_table(runs)),
        report.heading(f"While training, seed {seeds[0]}"),
    ]
    for key, caption in CURVES.items():
        series = {
            name.replace("_", " "): [(log["step"], log[key]) for log in runs[0][name]["history"]] for name in CELLS
        }
        pieces.append(report.line_chart(series, caption=caption, x_label="update", y_label="share"))
    checks = {"thinking": [(check["step"], check["accuracy"]) for check in runs[0]["start"]["checks"]]}
    pieces += [
        report.heading("Where the SFT was stopped"),
        report.line_chart(checks, caption="Thinking accuracy on 100 problems", x_label="step", y_label="share"),
        report.preformatted(json.dumps(asdict(settings) | {"seed": list(seeds)}, indent=1)),
    ]
    path.write_text(report.page("Reinforcement at nano scale, with and without dynamic sampling", pieces), "utf-8")


def publish(out: Path, settings: Settings, seeds: Sequence[int], runs: Sequence[dict[str, dict]]) -> None:
    """report.html, and its tables on the screen."""
    path = out / "report.html"
    write_report(path, settings, seeds, runs)
    print(f"\n{settings.test_problems} held-out problems a seed\n{report.text_table(result_table(runs))}")
    print(f"\n{report.text_table(cost_table(runs))}\n\n{path}")


# -- the job ------------------------------------------------------------------------------------------------------
def run_seed(out: Path, settings: Settings) -> dict[str, dict]:
    """All stages of one seed; returns the results of the start and of the three trainings."""
    nano.keep_settings(out, settings)
    torch.set_num_threads(settings.threads)
    datasets.disable_progress_bars()
    problems = draw_splits(settings)
    (out / "problems.jsonl").write_text("\n".join(map(json.dumps, rl_rows(problems.rl))))
    nano.run_stage(out, "tokenizer", partial(nano.make_tokenizer, problems=problems))
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    shared = {"tokenizer": tokenizer, "problems": problems, "settings": settings}

    def pretrain(folder: Path) -> dict:
        return nano.pretrain_base(folder, tokenizer, problems.base, settings.sft())

    nano.run_stage(out, "base", pretrain)
    results = {"start": nano.run_stage(out, "start", partial(fuse_a_little, base=out / "base", **shared))}

    def cell(name: str, **differs) -> None:
        results[name] = nano.run_stage(out, name, partial(reinforce, start=out / "start", **shared, **differs))

    cell("dynamic", dynamic=True, updates=settings.rl_steps)
    cell("same_updates", dynamic=False, updates=settings.rl_steps)
    # An update without dynamic sampling takes about as many tokens each time, so their number is known beforehand.
    more = results["dynamic"]["tokens"] / results["same_updates"]["tokens"]
    cell("same_tokens", dynamic=False, updates=round(more * settings.rl_steps))
    return results


def main(arguments: list[str] | None = None) -> list[dict[str, dict]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/rl_nano"), help="where the stages go (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19], help="one run each (default: 17 18 19)")
    parser.add_argument(
        "--steps", type=int, default=Settings.rl_steps, help="updates of an RL training (default: %(default)s)"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on the SFT's steps and all problems; 0.01 tries the machinery"
    )
    parser.add_argument("--threads", type=int, default=Settings.threads, help="CPU threads (default: %(default)s)")
    options = parser.parse_args(arguments)
    settings = Settings(threads=options.threads, rl_steps=options.steps)
    scaled = ("base_steps", "start_steps", "check_every", "rl_problems", "test_problems")
    settings = replace(settings, **{name: max(10, round(getattr(settings, name) * options.scale)) for name in scaled})
    runs = [run_seed(options.out / f"seed-{seed}", replace(settings, seed=seed)) for seed in options.seeds]
    publish(options.out, settings, options.seeds, runs)
    return runs


if __name__ == "__main__":
    main()
