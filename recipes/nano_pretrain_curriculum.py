"""Does the order of the data matter? The report's order against its reverse and against no order at all.

    python -m recipes.nano_pretrain_curriculum --gsm8k gsm8k_train.jsonl --out runs/pretraining

Three stages of a third of the tokens each, from general text towards mathematics, simple documents first (as the report
goes); the same stages backwards, hard documents first; and their mean mixture throughout, shuffled. All three see as many tokens
of each domain, under the same learning rate: stable, stable, decay. Difficulty is the stand-in of nano_pretrain_cells.
"""

from functools import partial

from recipes.nano_cells import publish
from recipes.nano_pretrain_cells import (
    BATCH_ROWS,
    CONTEXT,
    DOMAINS,
    charts,
    held_out_shown,
    model_config,
    options_parser,
    run_cells,
    train_cell,
)

MIXTURES = (
    {"docs": 0.7, "code": 0.2, "maths": 0.1},
    {"docs": 0.4, "code": 0.4, "maths": 0.2},
    {"docs": 0.2, "code": 0.3, "maths": 0.5},
)
PHASES = ("stable", "stable", "decay")
TOKENS = 1_500_000


def stages(tokens: int, arrangement: str) -> list[dict]:
    """The table of an arrangement: report, reverse or mixed."""
    mean = {name: sum(mixture[name] for mixture in MIXTURES) / len(MIXTURES) for name in DOMAINS}
    mixtures = {"report": MIXTURES, "reverse": MIXTURES[::-1], "mixed": (mean,) * len(MIXTURES)}[arrangement]
    order = {"report": "easy_to_hard", "reverse": "hard_to_easy", "mixed": "shuffled"}[arrangement]
    size = max(round(tokens / len(MIXTURES)), BATCH_ROWS * CONTEXT)
    shared = {"tokens": size, "context": CONTEXT, "batch_tokens": BATCH_ROWS * CONTEXT, "order": order, "repeat": True}
    return [
        {"name": f"stage{number + 1}", "mixture": dict(mixture), "phase": phase, **shared}
        for number, (mixture, phase) in enumerate(zip(mixtures, PHASES))
    ]


def work(folder, text, tokens, seed, *, arrangement: str) -> dict:
    return train_cell(folder, text, model_config(text), stages(tokens, arrangement), seed)


def row(name: str, cells: list[dict]) -> dict[str, str]:
    by_domain = {f"held-out loss, {domain}": held_out_shown(cells, domain) for domain in DOMAINS}
    return {"order": name, "held-out loss, all": held_out_shown(cells)} | by_domain


def main(arguments: list[str] | None = None) -> dict[str, list[dict]]:
    options = options_parser(__doc__, TOKENS).parse_args(arguments)
    grid = {name: partial(work, arrangement=name) for name in ("report", "reverse", "mixed")}
    cells = run_cells(options, "curriculum", grid)
    tables = {"Order of the data": [row(*each) for each in cells.items()]}
    pieces = charts(cells, {"loss": ("training loss; each order meets other text at a time", False)})
    publish(options, "curriculum", "Does the order of the data matter?", pieces, tables)
    return cells


if __name__ == "__main__":
    main()
