"""Which groups of completions teach, and what takes the place of those that do not?  [DAPO, arXiv 2503.14476, 3.2]

A group whose rewards are all alike has no advantage. Its place in the batch goes to a group of another instruction, asked in a
further round. Pure functions of what was sampled: every process decides alike.

Axes: R rollouts, N groups, G completions a group, F reward functions.
"""

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainers.mode_prompts import MODE_NAMES
from trainers.rewards import Tokens, has_spread, read


@dataclass(frozen=True)
class Rollout:
    """One completion and the dataset row it answers."""

    row: dict
    completion_ids: list[int]
    completion: str | list[dict]
    logprobs: list[float] | None  # of the sampler; None where transformers generates
    extra: dict  # what reward functions logged about it


@dataclass(frozen=True)
class Group:
    """The completions of one instruction in one mode. `rewards_GF` as TRL calculates them: R_correct, R_format, others."""

    rollouts: list[Rollout]
    rewards_GF: Tensor
    alive: bool  # counts in the loss

    @property
    def thinking(self) -> bool:
        return self.rollouts[0].row["thinking"]

    @property
    def fate(self) -> str:
        """kept, or why not: all_right, all_wrong (alike, none right), failed (a reward is missing)."""
        base_GF = self.rewards_GF[:, :2]
        if base_GF.isnan().any():
            return "failed"
        if has_spread(base_GF.sum(dim=1)[None]).item():
            return "kept"
        return "all_right" if base_GF[0, 0] > 0 else "all_wrong"


def group_rollouts(rollouts: Sequence[Rollout], rewards_RF: Tensor, generations: int, *, filtered: bool) -> list[Group]:
    """Cut rows into groups of `generations`. Without the filter only groups with a missing reward are dead."""
    groups = []
    for start in range(0, len(rollouts), generations):
        rows = slice(start, start + generations)
        group = Group(list(rollouts[rows]), rewards_RF[rows], alive=True)
        groups.append(replace(group, alive=group.fate == "kept" if filtered else group.fate != "failed"))
    return groups


def fill_slots(slots: Sequence[Group], fresh: Sequence[Group]) -> list[Group]:
    """Put live groups in the place of dead ones, each time one of the mode that the batch has fewer of."""
    slots = list(slots)
    waiting = {mode: [group for group in fresh if group.alive and group.thinking is mode] for mode in (True, False)}
    for place, group in enumerate(slots):
        if group.alive or not any(waiting.values()):
            continue
        live = Counter(other.thinking for other in slots if other.alive)
        scarcer = min((mode for mode in waiting if waiting[mode]), key=lambda mode: live[mode])
        slots[place] = waiting[scarcer].pop(0)
    return slots


def groups_to_ask(missing: int, asked: int, kept: int, *, unit: int, most: int) -> int:
    """How many groups the next round asks: enough for `missing` at the keep rate so far, in units, at most a full batch."""
    expected = most if not kept else math.ceil(missing * asked / kept)
    return min(math.ceil(expected / unit) * unit, most)


def slim(group: Group) -> Group:
    """What `mode_metrics` reads of a group, to be kept for a whole evaluation."""
    rollouts = [
        Rollout({name: each.row[name] for name in ("instruction", "thinking")}, array("I", each.completion_ids), "", None, {})
        for each in group.rollouts
    ]
    return replace(group, rollouts=rollouts)


def regroup(groups: Sequence[Group], generations: int) -> list[Group]:
    """Groups by what their rows answer, each of the first `generations` completions.

    The batches of an evaluation cut groups where they may, and the last one is filled up with rows of the first.
    """
    answers = defaultdict(list)
    for group in groups:
        for rollout, rewards_F in zip(group.rollouts, group.rewards_GF):
            answers[rollout.row["instruction"], rollout.row["thinking"]].append((rollout, rewards_F))
    chosen = [each[:generations] for each in answers.values()]
    return [
        Group([rollout for rollout, _ in each], torch.stack([rewards_F for _, rewards_F in each]), alive=True) for each in chosen
    ]


def mode_metrics(groups: Sequence[Group], tokens: Tokens) -> dict[str, float]:
    """What each mode did, over all the groups that were asked: shares from 0 to 1, and tokens a completion."""
    metrics = {}
    for mode in MODE_NAMES:
        chosen = [group for group in groups if group.thinking is mode]
        if not chosen:
            continue
        fates = Counter(group.fate for group in chosen)
        base_RF = torch.cat([group.rewards_GF[:, :2] for group in chosen])
        readings = [read(each.completion_ids, mode, tokens) for group in chosen for each in group.rollouts]
        values = {
            "accuracy": (base_RF[:, 0] > 0).float().mean().item(),
            "format_error": (base_RF[:, 1] < 0).float().mean().item(),
            "truncated": sum(reading.truncated for reading in readings) / len(readings),
            "tokens": sum(reading.tokens for reading in readings) / len(readings),
            "all_right": fates["all_right"] / len(chosen),
            "all_wrong": fates["all_wrong"] / len(chosen),
            "keep_rate": fates["kept"] / len(chosen),
        }
        metrics |= {f"{MODE_NAMES[mode]}/{name}": value for name, value in values.items()}
    return metrics
