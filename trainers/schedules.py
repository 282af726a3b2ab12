"""How do learning rate, batch and balancing rate go with the tokens seen? Pure functions of a count of tokens.

Tokens and not steps: where the batch or the context grows, a step is no measure of anything.
"""

import math
from collections.abc import Callable

# How the learning rate falls: from 1 at share 0 of the decay to 0 at share 1.  [linear: Hu et al. 2024 (MiniCPM) call WSD
# by its name; 1-sqrt: Haegele et al. 2024, found better than linear; cosine: Loshchilov & Hutter 2017]
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1.0 - share,
    "sqrt": lambda share: 1.0 - math.sqrt(share),
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
}


def wsd(
    tokens: float, *, warmup: float, stable: float, decay: float, floor: float = 0.0, shape: str = "linear"
) -> float:
    """Warm-up, stable, decay: the share of the peak learning rate at `tokens` tokens.  [Hu et al. 2024; paper, table of stages]

    `warmup`, `stable`, `decay` are the tokens of each phase, any may be 0; from then on the share is `floor`, in [0, 1].
    Warm-up begins at 0; without a decay the stable phase has no end. ValueError for negative phases, a floor outside [0, 1] and
    an unknown shape.
    """
    if min(warmup, stable, decay) < 0:
        raise ValueError(
            f"warmup={warmup}, stable={stable}, decay={decay} tokens: a phase is negative; use 0 for none."
        )
    if not 0 <= floor <= 1:
        raise ValueError(f"floor={floor} is no share of the peak learning rate; use a number from 0 to 1.")
    if shape not in DECAYS:
        raise ValueError(f"decay shape {shape!r} does not exist; use one of {', '.join(DECAYS)}.")
    if tokens < warmup:
        return tokens / warmup
    if decay == 0:
        return 1.0
    past = max(tokens - warmup - stable, 0)
    return floor + (1.0 - floor) * DECAYS[shape](min(past / decay, 1.0))


def batch_ramp(tokens: float, *, start: int, end: int, ramp: float) -> float:
    """Tokens a batch: `start` at first, growing linearly to `end` over `ramp` tokens.  [DeepSeek-V3 ramps so]"""
    if not 0 < start <= end:
        raise ValueError(f"A batch cannot grow from {start} to {end} tokens; give 0 < start <= end.")
    if ramp <= 0 or tokens >= ramp:
        return float(end)
    return start + (end - start) * tokens / ramp


def bias_rate(tokens: float, *, rate: float, stop: float) -> float:
    """Step of the balancing bias: `rate` until `stop` tokens, 0 from then on.  [DeepSeek-V3: 0.001, 0 in the last 3%]"""
    return rate if tokens < stop else 0.0
