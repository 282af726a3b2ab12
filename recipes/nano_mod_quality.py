"""How good and how large must a Mode-Overlap Dataset be? MOD of less variety, with wrong pairs, and of few pairs.

    python -m recipes.nano_mod_quality --out runs/experiments

From the merged model (0.8), always with the same number of steps; small sets are seen several times.
  merged              no MOD at all
  full                every pair once
  half the problems   half as many pairs, seen twice      one family   pairs of one of the two families only
  10%, 30% corrupt    so many pairs carry another problem's thought and answer
  10, 100, 1000 pairs
"""

import random

from recipes.nano_cells import Seed, instruct_model, options_parser, publish, reasoning_model, result_row, run_seeds
from recipes.nano_problems import FAMILIES, Problem
from recipes.nano_think_fusion import Settings
from trainers.mode_overlap import build_mode_overlap, make_row

STEPS = 200
SIZES = (10, 100, 1000)
CORRUPT = (0.1, 0.3)


def pairs(problems: list[Problem]) -> list[dict]:
    return build_mode_overlap(make_row(p.messages, p.answer, p.trace) for p in problems)


def corrupted(problems: list[Problem], share: float, seed: int) -> list[dict]:
    """Pairs of which `share` have the thought and the answer of another problem of their family."""
    rng = random.Random(seed)
    wrong = set(rng.sample(range(len(problems)), round(share * len(problems))))
    rows = []
    for number, problem in enumerate(problems):
        others = [p for p in problems if p.family == problem.family and p.answer != problem.answer]
        source = rng.choice(others) if number in wrong else problem
        rows.append(make_row(problem.messages, source.answer, source.trace))
    return build_mode_overlap(rows)


def run_seed(seed: Seed, steps: int) -> dict[str, dict]:
    merged = "merged-quality"
    model_steps = seed.settings.reasoning_steps, seed.settings.instruct_steps
    seed.merge(merged, reasoning_model(seed, model_steps[0]), instruct_model(seed, model_steps[1]), 0.8)
    full = seed.problems.fused[: steps * seed.settings.batch_rows // 2]
    # As many of the full set's problems, but of one family.
    alike = [p for p in seed.problems.fused if p.family == next(iter(FAMILIES))][: len(full)]
    sets = {"full": pairs(full), "half the problems": pairs(full[: len(full) // 2]), "one family": pairs(alike)}
    sets |= {f"{share:.0%} corrupt": corrupted(full, share, seed.settings.seed) for share in CORRUPT}
    sets |= {f"{size} pairs": pairs(full[:size]) for size in SIZES if size < len(full)}
    cells = {"merged": seed.measure(f"{merged}.measured", seed.out / merged)}
    for name, rows in sets.items():
        folder = f"mod-{steps}-{name.replace('%', '').replace(' ', '-')}"
        cells[name] = seed.cell(folder, lambda stage, rows=rows: seed.train(stage, merged, rows, steps))
    return cells


def main(arguments: list[str] | None = None) -> dict[str, list[dict]]:
    parser = options_parser(__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each MOD training (default: %(default)s)")
    options = parser.parse_args(arguments)
    steps = max(2, round(options.steps * options.scale))
    cells = run_seeds(options, Settings(test_problems=300), lambda seed: run_seed(seed, steps))
    tables = {"All held-out problems": [result_row(*each) for each in cells.items()]}
    for family in FAMILIES:
        tables[f"Family {family}"] = [result_row(name, of, family) for name, of in cells.items()]
    publish(options, "mod_quality", "How good and how large must a Mode-Overlap Dataset be?", [], tables)
    return cells


if __name__ == "__main__":
    main()
