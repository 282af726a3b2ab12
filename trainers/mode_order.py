"""In which order does an epoch visit the rows: which modes, which rows together, which lengths beside each other?

Pure functions of their arguments, the seed and the epoch: a resumed run visits the same rows. And the sampler that serves them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

# How many updates' rows are sorted by length together: enough for even lengths, few enough to stay random (as in transformers).
STEPS_SORTED_TOGETHER = 50


def pair_rows(modes: Sequence[bool], prompts: Sequence[str]) -> list[tuple[int, int]]:
    """(thinking row, direct row) of every prompt; modes[row] is True for thinking. ValueError if a row has no partner."""
    rows_of: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for row, (thinking, prompt) in enumerate(zip(modes, prompts, strict=True)):
        rows_of[prompt][0 if thinking else 1].append(row)
    alone = [max(pair, key=len)[-1] for pair in rows_of.values() if len(pair[0]) != len(pair[1])]
    if alone:
        raise ValueError(
            f"{len(alone)} of {len(rows_of)} prompts do not have as many thinking as direct rows, e.g. that of row {alone[0]}; "
            "pair them with build_mode_overlap, or use pairing='shuffled'."
        )
    return [pair for thinking, direct in rows_of.values() for pair in zip(thinking, direct)]


def draw_mix(modes: Sequence[bool], thinking_ratio: float, generator: torch.Generator) -> list[int]:
    """As many rows as can be had, each at most once, with `thinking_ratio` of them thinking. ValueError if that is none."""
    rows = {mode: [row for row, thinking in enumerate(modes) if thinking == mode] for mode in (True, False)}
    most = [len(rows[mode]) / share for mode, share in ((True, thinking_ratio), (False, 1 - thinking_ratio)) if share]
    counts = {True: round(min(most) * thinking_ratio), False: round(min(most) * (1 - thinking_ratio))}
    drawn = []
    for mode in (True, False):
        order = torch.randperm(len(rows[mode]), generator=generator).tolist()
        drawn += [rows[mode][place] for place in order[: counts[mode]]]
    if not drawn:
        raise ValueError(
            f"thinking_ratio={thinking_ratio} cannot be had from {len(rows[True])} thinking and {len(rows[False])} direct rows; "
            "give rows of both modes."
        )
    return drawn


def order_units(
    units: Sequence[tuple[int, ...]], lengths: Sequence[int] | None, step_units: int, generator: torch.Generator
) -> list[int]:
    """The rows of all units (rows that stay together) in random order; with `lengths`, like beside like.

    step_units: units of one update, over all devices and accumulated batches. Those of an update are sorted by length, and the
    updates shuffled, so that a batch pads little and the devices wait little for each other.
    """
    shuffled = [units[place] for place in torch.randperm(len(units), generator=generator).tolist()]
    if lengths is not None:
        shuffled = _group_by_length(shuffled, lengths, step_units, generator)
    return [row for unit in shuffled for row in unit]


def _group_by_length(units: list, lengths: Sequence[int], step_units: int, generator: torch.Generator) -> list:
    def length(unit: tuple[int, ...]) -> int:
        return max(lengths[row] for row in unit)

    span = STEPS_SORTED_TOGETHER * step_units
    ordered = [unit for start in range(0, len(units), span) for unit in sorted(units[start : start + span], key=length)]
    whole = len(ordered) // step_units * step_units
    steps = [ordered[start : start + step_units] for start in range(0, whole, step_units)]
    mixed = [unit for place in torch.randperm(len(steps), generator=generator).tolist() for unit in steps[place]]
    # What does not fill an update has to stay at the end.
    return mixed + ordered[whole:]


class EpochSampler(Sampler[int]):
    """Serves `order(epoch)`, whose length is the same for every epoch."""

    def __init__(self, order: Callable[[int], list[int]], current_epoch: Callable[[], int]):
        # accelerate's set_epoch does not reach a sampler below a skipped and sharded batch sampler: the epoch is asked for.
        self.order, self.current_epoch = order, current_epoch
        self._length = len(order(0))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.current_epoch()))
