"""Which merge weight keeps both modes, with and without the Mode-Overlap Dataset, and why?

    python -m recipes.nano_merge_sweep --out runs/experiments

Reasoning and instruct models are tuned from one base at several reasoning:instruction data ratios (the report's open
question 2), merged at alpha = 0.5 ... 0.95, measured as they are, and measured again after a short SFT on paired problems.

Where the authors' 0.8 does not come out best, three facts say why: how good the base is by itself, how far apart the two
models are, and whether the loss of either mode rises on the straight line between them (then no weight can keep both).
"""

import shutil
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from conversion.checkpoint import open_checkpoint, read_elements
from recipes.nano_cells import (
    MODES,
    Seed,
    instruct_model,
    mean_and_interval,
    options_parser,
    publish,
    reasoning_model,
    result_row,
    run_seeds,
    shown,
    values,
)
from recipes.nano_problems import Problem
from recipes.nano_think_fusion import Settings
from trainers import report
from trainers.mode_overlap import build_mode_overlap, make_row

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
AUTHORS_ALPHA = 0.8
# Reasoning and instruction steps (of 32 rows each) of the two models.
RATIOS = ((600, 600), (600, 200))
MOD_STEPS = 60


def run_seed(seed: Seed, alphas: list[float], ratios: list[tuple[int, int]], mod_steps: int) -> dict[str, dict]:
    """All cells of one seed: {"ratio|alpha|plain or MOD": measured}, and {"ratio|facts": ...}."""
    cells = {"base": seed.measure("base.measured", seed.out / "base")}
    problems = seed.problems.fused[: mod_steps * seed.settings.batch_rows // 2]
    rows = build_mode_overlap(make_row(p.messages, p.answer, p.trace) for p in problems)
    for steps in ratios:
        ratio = f"{steps[0]}:{steps[1]}"
        folder = f"sweep-{steps[0]}-{steps[1]}"
        models = reasoning_model(seed, steps[0]), instruct_model(seed, steps[1])
        cells[f"{ratio}|facts"] = seed.stage(f"{folder}.facts", partial(compare_models, seed=seed, models=models))
        for alpha in alphas:
            name = f"{folder}-{alpha:g}"

            def plain(stage: str, alpha=alpha, models=models) -> Path:
                return seed.merge(stage, *models, alpha)

            def with_mod(stage: str, plain=plain) -> Path:
                start = plain(f"{stage}.start")
                trained = seed.train(stage, start.name, rows, mod_steps)
                shutil.rmtree(start)
                return trained

            cells[f"{ratio}|{alpha:g}|plain"] = seed.cell(name, plain)
            cells[f"{ratio}|{alpha:g}|MOD"] = seed.cell(f"{name}-mod-{mod_steps}", with_mod)
    return cells


def compare_models(folder: Path, seed: Seed, models: tuple[str, str]) -> dict:
    """How far apart the two models are, in units of their way from the base, and each mode's loss on the line between them."""
    base, thinking, direct = (flat_weights(seed.out / name) for name in ("base", *models))
    ways = thinking - base, direct - base
    model = AutoModelForCausalLM.from_pretrained(seed.out / models[0])
    ends = [AutoModelForCausalLM.from_pretrained(seed.out / name).state_dict() for name in models]
    losses = {mode: [] for mode in MODES}
    alphas = [0.0, *ALPHAS, 1.0]
    for alpha in alphas:
        model.load_state_dict({name: torch.lerp(ends[1][name], ends[0][name], alpha) for name in ends[0]})
        for mode, is_thinking in MODES.items():
            losses[mode].append(answer_loss(model, seed.tokenizer, seed.problems.test[:64], is_thinking))
    return {
        "distance": ((thinking - direct).norm() / ways[0].norm()).item(),
        "cosine": F.cosine_similarity(*ways, dim=0).item(),
        "moved": [(way.norm() / base.norm()).item() for way in ways],
        "alphas": alphas,
        "losses": losses,
    }


def flat_weights(folder: Path) -> torch.Tensor:
    stored = open_checkpoint(folder)
    return torch.cat([read_elements(stored[name]).double() for name in sorted(stored)])


@torch.no_grad()
def answer_loss(model, tokenizer, problems: list[Problem], thinking: bool) -> float:
    """Mean loss a token of what the mode should say behind its control token."""
    total = tokens = 0
    for problem in problems:
        prompt = tokenizer.apply_chat_template(
            problem.messages, add_generation_prompt=True, enable_thinking=thinking, return_dict=True
        ).input_ids
        text = f"{problem.trace}</think>{problem.answer}" if thinking else problem.answer
        said = tokenizer(f"{text}<|im_end|>").input_ids
        logits_SV = model(input_ids=torch.tensor([prompt + said])).logits[0, -len(said) - 1 : -1]
        total += F.cross_entropy(logits_SV.float(), torch.tensor(said), reduction="sum").item()
        tokens += len(said)
    return total / tokens


# -- what is shown ------------------------------------------------------------------------------------------------
def curves(cells: dict[str, list[dict]], ratio: str, alphas: list[float], kind: str, what: str) -> dict:
    """{mode: [(alpha, percent)]}, means over the seeds."""
    return {
        mode: [(a, 100 * mean_and_interval(values(cells[f"{ratio}|{a:g}|{kind}"], mode, what))[0]) for a in alphas]
        for mode in MODES
    }


def best_alpha(cells: dict[str, list[dict]], ratio: str, alphas: list[float], kind: str) -> dict[str, str]:
    """The weight with the least format error in thinking mode, beside the authors' 0.8."""

    def error(alpha: float) -> list[list[float]]:
        return values(cells[f"{ratio}|{alpha:g}|{kind}"], "thinking", "format_error")

    best = min(alphas, key=lambda alpha: mean_and_interval(error(alpha))[0])
    at_best, at_authors = (mean_and_interval(error(alpha)) for alpha in (best, AUTHORS_ALPHA))
    return {
        "reasoning:instruction": ratio,
        "": kind,
        "least thinking format error": f"{shown(error(best))} at {best:g}",
        "at 0.8": shown(error(AUTHORS_ALPHA)),
        "0.8 is as good": "yes" if at_authors[1] <= at_best[2] else "no",
    }


def fact_row(cells: dict[str, list[dict]], ratio: str) -> dict[str, str]:
    """Why: means over the seeds."""
    facts = cells[f"{ratio}|facts"]

    def mean(numbers) -> float:
        numbers = list(numbers)
        return sum(numbers) / len(numbers)

    def barrier(mode: str) -> float:
        # How much the loss rises above the straight line between the two ends, at its worst.
        return mean(
            max(
                loss - (1 - alpha) * fact["losses"][mode][0] - alpha * fact["losses"][mode][-1]
                for alpha, loss in zip(fact["alphas"], fact["losses"][mode])
            )
            for fact in facts
        )

    return {
        "reasoning:instruction": ratio,
        "thinking model moved": f"{mean(fact['moved'][0] for fact in facts):.3f} of the base's norm",
        "instruct model moved": f"{mean(fact['moved'][1] for fact in facts):.3f}",
        "distance / way of the thinking model": f"{mean(fact['distance'] for fact in facts):.2f}",
        "cosine of the two ways": f"{mean(fact['cosine'] for fact in facts):.3f}",
        "barrier, thinking": f"{barrier('thinking'):.3f} nats",
        "barrier, non-thinking": f"{barrier('non-thinking'):.3f} nats",
    }


def main(arguments: list[str] | None = None) -> dict[str, list[dict]]:
    parser = options_parser(__doc__)
    parser.add_argument("--alphas", type=float, nargs="+", default=list(ALPHAS), help="default: %(default)s")
    parser.add_argument(
        "--ratios", nargs="+", default=[f"{a}:{b}" for a, b in RATIOS], metavar="R:I",
        help="steps of the reasoning and of the instruct model (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--mod-steps", type=int, default=MOD_STEPS, help="of SFT on pairs (default: %(default)s)")
    options = parser.parse_args(arguments)
    if AUTHORS_ALPHA not in options.alphas:
        parser.error(
            f"--alphas {options.alphas} lacks the authors' {AUTHORS_ALPHA}, which the others are compared with."
        )

    def scaled(steps: int) -> int:
        return max(2, round(steps * options.scale))

    ratios = [tuple(scaled(int(steps)) for steps in ratio.split(":")) for ratio in options.ratios]
    cells = run_seeds(
        options,
        Settings(test_problems=300),
        lambda seed: run_seed(seed, options.alphas, ratios, scaled(options.mod_steps)),
    )
    names = [f"{reasoning}:{instruct}" for reasoning, instruct in ratios]
    pieces = []
    for ratio in names:
        for what in ("format_error", "accuracy"):
            for kind in ("plain", "MOD"):
                title = f"{what.replace('_', ' ')}, reasoning:instruction {ratio}, {kind}"
                drawn = curves(cells, ratio, options.alphas, kind, what)
                pieces.append(report.line_chart(drawn, caption=title, x_label="alpha", y_label="%"))
    tables = {
        "The authors' weight": [best_alpha(cells, r, options.alphas, kind) for r in names for kind in ("plain", "MOD")],
        "Why": [fact_row(cells, ratio) for ratio in names],
        "All cells": [
            result_row(name.replace("|", ", "), of) for name, of in cells.items() if not name.endswith("facts")
        ],
    }
    publish(options, "merge_sweep", "Which merge weight keeps both modes?", pieces, tables)
    return cells


if __name__ == "__main__":
    main()
