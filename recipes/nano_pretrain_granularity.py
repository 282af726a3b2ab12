"""How fine should experts be? Granularity 7, 10 and 12 at equal active FLOPs, more or fewer experts, balanced and not.

    python -m recipes.nano_pretrain_granularity --gsm8k gsm8k_train.jsonl --out runs/pretraining

G = 2 * hidden / expert width. With hidden 210 the widths are 60, 42, 35, and G experts a token (shared one included) read the
same 420 columns; 4 G routed experts make the same total. The report found 8 to 12 best and took 7 for stability under imperfect
balance. So each G is also trained with balancing switched off; there expert counts of 2 G and 8 G stand beside G = 7.
"""

from functools import partial

from recipes.nano_cells import publish
from recipes.nano_pretrain_cells import (
    BALANCE_RATE,
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

HIDDEN = 210  # divisible by what makes 2 * HIDDEN / G whole for 7, 10 and 12
GRANULARITIES = (7, 10, 12)
TOKENS = 200_000


def shape(granularity: int, times: int = 4) -> dict[str, int]:
    """The fields of a config: one shared expert, and `times` * G routed ones, of which G - 1 a token."""
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "moe_intermediate_size": 2 * HIDDEN // granularity,
        "n_routed_experts": times * granularity,
        "num_experts_per_tok": granularity - 1,
    }


def work(folder, text, tokens, seed, *, granularity: int, times: int, balanced: bool) -> dict:
    config = model_config(text, **shape(granularity, times))
    rate = BALANCE_RATE if balanced else 0.0
    measured = train_cell(folder, text, config, plain_stages(tokens, MIXTURE), seed, balance_rate=rate)
    # Every token to the same experts.
    return measured | {"worst_violation": config.n_routed_experts / config.num_experts_per_tok - 1}


def row(name: str, cells: list[dict]) -> dict[str, str]:
    tail = [max(1, len(cell["tokens"]) // 5) for cell in cells]
    return {
        "cell": name,
        "held-out loss": held_out_shown(cells),
        "MaxVio, last fifth": over_seeds([sum(c["max_violation"][-n:]) / n for c, n in zip(cells, tail)]),
        "MaxVio at worst": f"{cells[0]['worst_violation']:.3g}",
        "dead experts, last fifth": over_seeds([sum(c["dead_experts"][-n:]) / n for c, n in zip(cells, tail)]),
        "gradient-norm spikes": over_seeds([spikes(cell["grad_norm"]) for cell in cells]),
        "FLOPs a token": f"{cells[0]['flops_a_token']:.4g}",
        "parameters": f"{cells[0]['parameters']:,}",
    }


def main(arguments: list[str] | None = None) -> dict[str, list[dict]]:
    options = options_parser(__doc__, TOKENS).parse_args(arguments)
    grid = {
        f"G {g}, {4 * g} experts, {'balanced' if balanced else 'unbalanced'}": partial(
            work, granularity=g, times=4, balanced=balanced
        )
        for balanced in (True, False)
        for g in GRANULARITIES
    }
    for times in (2, 8):
        grid[f"G 7, {7 * times} experts, unbalanced"] = partial(work, granularity=7, times=times, balanced=False)
    cells = run_cells(options, "granularity", grid)
    measures = {"loss": ("training loss", False), "max_violation": ("max violation of the worst layer", False)}
    tables = {"Granularity and expert count": [row(*each) for each in cells.items()]}
    publish(options, "granularity", "How fine should experts be?", charts(cells, measures), tables)
    return cells


if __name__ == "__main__":
    main()
