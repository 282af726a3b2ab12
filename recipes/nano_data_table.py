"""Which training data lets one model keep two modes apart? The authors' data table, at nano scale.

    python -m recipes.nano_data_table --out runs/experiments

From the same base model and with the same number of steps and rows:
  thinking only       each problem with its work
  non-thinking only   each problem with its bare answer
  combined, disjoint  one family thinking, the other non-thinking
  sequential          first half the problems thinking, then the same ones non-thinking
  paired              half the problems, each in both modes (the Mode-Overlap Dataset)

The authors (4B dense, format error in thinking mode): combined 96.3%, sequential 100%, paired 0.37%. Expected here:
combined breaks where training saw a family only in the other mode, sequential everywhere, paired nowhere.
Nothing is tuned towards that; what does not come out so is reported as it is.
"""

import shutil
from pathlib import Path

from recipes import nano_cells
from recipes.nano_cells import Seed, options_parser, publish, result_row, run_seeds, shown, values
from recipes.nano_problems import FAMILIES, Problem
from recipes.nano_think_fusion import Settings
from trainers.mode_overlap import build_mode_overlap, make_row

THINKING_FAMILY, DIRECT_FAMILY = FAMILIES
# Of 32 rows each.
STEPS = 400
# A mode holds up to this format error, and is broken from that on.
HELD, BROKEN = 0.01, 0.5


def worked(problems: list[Problem]) -> list[dict]:
    return [make_row(p.messages, p.answer, p.trace) for p in problems]


def direct(problems: list[Problem]) -> list[dict]:
    return [make_row(p.messages, p.answer) for p in problems]


def run_seed(seed: Seed, steps: int) -> dict[str, dict]:
    """Every arrangement of the data, measured."""
    problems = seed.problems.reasoning[: steps * seed.settings.batch_rows]
    half = problems[: len(problems) // 2]
    disjoint = worked([p for p in problems if p.family == THINKING_FAMILY])
    disjoint += direct([p for p in problems if p.family == DIRECT_FAMILY])

    def from_base(rows: list[dict]):
        return lambda name: seed.train(name, "base", rows, steps)

    def sequential(name: str) -> Path:
        first = seed.train(f"{name}.first", "base", worked(half), steps // 2)
        trained = seed.train(name, first.name, direct(half), steps // 2)
        shutil.rmtree(first)
        return trained

    arrangements = {
        "thinking only": from_base(worked(problems)),
        "non-thinking only": from_base(direct(problems)),
        "combined, disjoint": from_base(disjoint),
        "sequential": sequential,
        "paired": from_base(build_mode_overlap(worked(half))),
    }
    cells = {"base": seed.measure("base.measured", seed.out / "base")}
    return cells | {
        name: seed.cell(f"data-{steps}-{name.replace(',', '').replace(' ', '-')}", make)
        for name, make in arrangements.items()
    }


def verdicts(cells: dict[str, list[dict]]) -> list[dict[str, str]]:
    """What the authors found, beside what came out here."""

    combined, seen, unseen = "combined, disjoint", THINKING_FAMILY, DIRECT_FAMILY
    expected = [
        ("combined: thinking breaks where training saw only direct answers", combined, "thinking", unseen, "high"),
        ("combined: thinking holds where training saw thinking", combined, "thinking", seen, "low"),
        ("combined: direct breaks where training saw only thinking", combined, "non-thinking", seen, "high"),
        ("sequential: thinking is gone", "sequential", "thinking", None, "high"),
        ("paired: thinking holds", "paired", "thinking", None, "low"),
        ("paired: direct holds", "paired", "non-thinking", None, "low"),
    ]
    rows = []
    for claim, cell, mode, family, wanted in expected:
        by_seed = values(cells[cell], mode, "format_error", family)
        mean = nano_cells.mean_and_interval(by_seed)[0]
        came_out = mean <= HELD if wanted == "low" else mean >= BROKEN
        rows.append({"expected": claim, "format error": shown(by_seed), "came out": "yes" if came_out else "no"})
    return rows


def main(arguments: list[str] | None = None) -> dict[str, list[dict]]:
    parser = options_parser(__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training (default: %(default)s)")
    options = parser.parse_args(arguments)
    steps = max(2, round(options.steps * options.scale))
    cells = run_seeds(options, Settings(test_problems=300), lambda seed: run_seed(seed, steps))
    tables = {
        "What was expected": verdicts(cells),
        "All held-out problems": [result_row(*each) for each in cells.items()],
    }
    for family in FAMILIES:
        tables[f"Family {family}"] = [result_row(name, of, family) for name, of in cells.items()]
    publish(options, "data_table", "Which data keeps two modes apart?", [], tables)
    return cells


if __name__ == "__main__":
    main()
