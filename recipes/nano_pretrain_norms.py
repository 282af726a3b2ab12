"""Does a norm on the MoE output keep training steady? Dual against pre-norm, at a usual and at high learning rates.

    python -m recipes.nano_pretrain_norms --gsm8k gsm8k_train.jsonl --out runs/pretraining

The report trains with "dual normalization" for stability [A.X K1 report, architecture]. Expected if that holds at this scale: at
the usual rate little difference, at high ones fewer spikes of the gradient norm and a lower loss with the second norm. Nothing is
tuned towards that. Updates are clipped to norm 1 as usual; the norms shown are those before clipping.
"""

from functools import partial

from recipes.nano_cells import publish
from recipes.nano_pretrain_cells import (
    MIXTURE,
    charts,
    held_out_shown,
    model_config,
    options_parser,
    over_seeds,
    plain_stages,
    run_cells,
    spikes,
    train_cell,
)

RATES = (3e-3, 1e-2, 3e-2)
TOKENS = 800_000


def work(folder, text, tokens, seed, *, dual: bool, rate: float) -> dict:
    config = model_config(text, post_mlp_norm=dual)
    return train_cell(folder, text, config, plain_stages(tokens, MIXTURE), seed, learning_rate=rate)


def row(name: str, cells: list[dict]) -> dict[str, str]:
    return {
        "cell": name,
        "held-out loss": held_out_shown(cells),
        "gradient-norm spikes": over_seeds([spikes(cell["grad_norm"]) for cell in cells]),
        "largest gradient norm": over_seeds([max(cell["grad_norm"]) for cell in cells]),
        "loss spikes": over_seeds([spikes(cell["loss"], factor=1.2) for cell in cells]),
        "updates not finite": over_seeds([cell["not_finite"] for cell in cells]),
    }


def main(arguments: list[str] | None = None) -> dict[str, list[dict]]:
    options = options_parser(__doc__, TOKENS).parse_args(arguments)
    grid = {
        f"{'dual' if dual else 'pre'}, {rate:g}": partial(work, dual=dual, rate=rate)
        for rate in RATES
        for dual in (True, False)
    }
    cells = run_cells(options, "norms", grid)
    pieces = charts(cells, {"loss": ("training loss", False), "grad_norm": ("gradient norm before clipping", True)})
    tables = {"Dual and pre-norm, by learning rate": [row(*each) for each in cells.items()]}
    publish(options, "norms", "Does a second norm keep training steady?", pieces, tables)
    return cells


if __name__ == "__main__":
    main()
