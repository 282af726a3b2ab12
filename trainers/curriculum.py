"""What is trained when? Stages as a table: tokens, context, mixture, learning-rate phase, order; read from YAML, checked,
scaled, and laid out step by step before anything is trained.

A stage's context ramp is a list of levels; a level's last step is cut so that the tokens come out, to the nearest whole row.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from trainers import tables
from trainers.schedules import DECAYS, batch_ramp, wsd

PHASES = ("stable", "decay", "floor")
ORDERS = ("shuffled", "easy_to_hard", "hard_to_easy", "as_is")
# A mixture given in percent with two decimals, or as shares, sums to 1 within this.
MIXTURE_TOLERANCE = 1e-6
# Each step is held from the beginning; the paper's run has 572,181 of them.
MOST_STEPS = 10_000_000
# What a table may hold. Whether a value makes sense beside the others, `check` says.
COUNT = tables.whole(0)
STAGE_COUNTS = ("tokens", "batch_tokens", "batch_tokens_start", "batch_ramp_tokens")
SHARES = tables.table_of(tables.number(), "{web: 0.7, code: 0.3}")
# Transformers' names; whether they make a RoPE together, the trainer tries before its first step.
ROPE_KINDS = {
    "rope_type": tables.TEXT,
    "rope_theta": tables.number(1),
    "original_max_position_embeddings": tables.whole(1),
    "truncate": tables.SWITCH,
    **dict.fromkeys(("short_factor", "long_factor"), tables.list_of(tables.number(0), "[1.0, 2.0]")),
    **dict.fromkeys(
        ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "low_freq_factor")
        + ("high_freq_factor", "partial_rotary_factor"),
        tables.number(0),
    ),
}
LEVEL_KINDS = {
    "length": tables.whole(1),
    "share": tables.number(0, 1),
    "rope": tables.either(tables.NOTHING, tables.TABLE),
}
STAGE_KINDS = {
    "name": tables.TEXT,
    **dict.fromkeys(STAGE_COUNTS, COUNT),
    "context": tables.either(
        tables.whole(1),
        tables.list_of(tables.either(tables.whole(1), tables.TABLE), "[4096, {length: 16384}]"),
    ),
    "mixture": SHARES,
    "normalise_mixture": tables.SWITCH,
    "phase": tables.TEXT,
    "order": tables.TEXT,
    "repeat": tables.SWITCH,
}
FILES = tables.either(
    tables.TEXT, tables.list_of(tables.TEXT, "[data/a.jsonl]"), tables.Kind("[]", lambda value: value == [])
)
SETTING = tables.either(tables.TEXT, tables.number(), tables.SWITCH)
CURRICULUM_KINDS = {
    "stages": tables.list_of(tables.Kind("a stage", lambda value: True), "- {name: one, tokens: 1.0e+9, ...}"),
    "warmup_tokens": COUNT,
    "decay_floor": tables.number(0, 1),
    "decay_shape": tables.TEXT,
    "sources": tables.either(tables.NOTHING, tables.table_of(FILES, "{web: [crawl/*.jsonl]}")),
    "model": tables.TEXT,
    "tokenizer": tables.TEXT,
    "settings": tables.either(
        tables.NOTHING,
        tables.table_of(tables.either(SETTING, tables.list_of(SETTING, "[a, b]")), "{learning_rate: 3.0e-4}"),
    ),
}
# Below this a context holds no sentence, and RoPE no position to speak of.
SHORTEST_CONTEXT = 8


@dataclass(frozen=True)
class Level:
    """A step of a context ramp: `share` of the stage's tokens at `length` tokens a row, from here on with `rope`, if given."""

    length: int
    share: float = 1.0
    rope: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Stage:
    """One row of the table. Tokens are counted over all ranks.

    mixture: source -> share of the tokens, summing to 1 (`normalise_mixture` makes it so). phase: part of the WSD schedule
    ("stable", "decay", or "floor", which holds what the decay came to). batch_tokens of an optimizer step grow from
    `batch_tokens_start` over `batch_ramp_tokens`. repeat: a source that runs out begins anew; otherwise it is refused.
    """

    name: str
    tokens: int
    context: tuple[Level, ...]
    mixture: Mapping[str, float]
    batch_tokens: int
    phase: str = "stable"
    batch_tokens_start: int | None = None
    batch_ramp_tokens: int = 0
    order: str = "shuffled"
    repeat: bool = False


@dataclass(frozen=True)
class Step:
    """One optimizer step: `rows` rows of `length` tokens, over all ranks; `tokens_before` it in the run, `learning` the share
    of the peak learning rate."""

    stage: int
    level: int
    tokens_before: int
    length: int
    rows: int
    learning: float

    @property
    def tokens(self) -> int:
        return self.length * self.rows


@dataclass(frozen=True)
class Curriculum:
    """All stages, and what the learning-rate schedule has beside them: warm-up, floor, shape of the decay."""

    stages: tuple[Stage, ...]
    warmup_tokens: int = 0
    decay_floor: float = 0.0
    decay_shape: str = "linear"
    sources: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    def phase_tokens(self) -> dict[str, int]:
        """Arguments of `schedules.wsd`: the warm-up is the beginning of the stable phase."""
        of = {phase: sum(s.tokens for s in self.stages if s.phase == phase) for phase in PHASES}
        return {"warmup": self.warmup_tokens, "stable": of["stable"] - self.warmup_tokens, "decay": of["decay"]}

    def learning(self, tokens: float) -> float:
        return wsd(tokens, **self.phase_tokens(), floor=self.decay_floor, shape=self.decay_shape)


# -- reading ------------------------------------------------------------------------------------------------------
def load_curriculum(path: str | Path, scale: float = 1.0, rows: int = 1) -> Curriculum:
    """The stages of a YAML file, checked, all of it shrunk by `scale` to batches of at least `rows`. ValueError says what to
    mend, in one sentence."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file; give a YAML file with stages, such as recipes/k1_stages.yaml.")
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML ({error}); mend it there.") from error
    return read_curriculum(table, scale, rows)


def read_curriculum(table: Mapping[str, Any], scale: float = 1.0, rows: int = 1) -> Curriculum:
    """The same of what YAML makes of such a file."""
    if not isinstance(table, Mapping) or not isinstance(table.get("stages"), list) or not table["stages"]:
        raise ValueError(
            "The curriculum has no list `stages`; give one entry a stage, with name, tokens, context and mixture."
        )
    table = {**table, **_counts(table, ["warmup_tokens"])}
    tables.check(table, CURRICULUM_KINDS, "the curriculum")
    named = (table.get("sources") or {}).items()
    sources = {name: (files,) if isinstance(files, str) else tuple(files) for name, files in named}
    stages = tuple(_stage(row, number) for number, row in enumerate(table["stages"]))
    given = {name: table[name] for name in ("warmup_tokens", "decay_floor", "decay_shape") if name in table}
    curriculum = Curriculum(stages=stages, sources=sources, **given)
    check(curriculum)
    return scaled(curriculum, scale, rows)


def _stage(row: Mapping[str, Any], number: int) -> Stage:
    name = row.get("name", f"stage{number + 1}") if isinstance(row, Mapping) else f"stage{number + 1}"
    where = f"stage {name!r}"
    row = {**row, **_counts(row, STAGE_COUNTS)} if isinstance(row, Mapping) else row
    tables.check(row, STAGE_KINDS, where, needed=("tokens", "context", "mixture", "batch_tokens"))
    context = row["context"] if isinstance(row["context"], list) else [row["context"]]
    levels = [level if isinstance(level, Mapping) else {"length": level} for level in context]
    for level in levels:
        tables.check(level, LEVEL_KINDS, f"a context of {where}", needed=["length"])
        if level.get("rope") is not None:
            tables.check(level["rope"], ROPE_KINDS, f"a rope of {where}", needed=["rope_type", "rope_theta"])
    if not any("share" in level for level in levels):
        levels = [{**level, "share": 1.0 / len(levels)} for level in levels]
    mixture = {source: float(share) for source, share in row["mixture"].items()}
    total = sum(mixture.values())
    if row.get("normalise_mixture") and total > 0:
        mixture = {source: share / total for source, share in mixture.items()}
    given = {key: value for key, value in row.items() if key != "normalise_mixture"}
    read = {"name": name, "mixture": mixture, "context": tuple(Level(**level) for level in levels)}
    return Stage(**{**given, **read})


def _counts(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, int]:
    return {name: _count(row, name) for name in names if name in row}


def _count(row: Mapping[str, Any], name: str) -> int:
    value = row[name]
    # YAML reads 7.0e12 as a number and 7e12 as a text.
    try:
        value = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}={row[name]!r} is no number of tokens; write 7.0e+12 or 7000000000000.") from None
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={row[name]!r} is no number of tokens; give 0 or more.")
    return round(value)


# -- checking -----------------------------------------------------------------------------------------------------
def check(curriculum: Curriculum) -> None:
    """ValueError, one sentence, for a table that cannot be trained."""
    names = [stage.name for stage in curriculum.stages]
    if len(set(names)) < len(names):
        raise ValueError(f"Two stages have one name among {', '.join(names)}; give each its own.")
    for stage in curriculum.stages:
        check_stage(stage)
    order = [PHASES.index(stage.phase) for stage in curriculum.stages]
    if order != sorted(order):
        raise ValueError(
            f"The phases {', '.join(stage.phase for stage in curriculum.stages)} go back; WSD is stable, decay, floor, in order."
        )
    if "floor" in (phases := [stage.phase for stage in curriculum.stages]) and "decay" not in phases:
        raise ValueError(
            f"The phases {', '.join(phases)} have a floor and no decay that comes to it, so the peak learning rate would hold; "
            "give a stage phase: decay."
        )
    if curriculum.decay_shape not in DECAYS:
        raise ValueError(f"decay_shape={curriculum.decay_shape!r} does not exist; use one of {', '.join(DECAYS)}.")
    if curriculum.warmup_tokens > sum(stage.tokens for stage in curriculum.stages if stage.phase == "stable"):
        raise ValueError(f"warmup_tokens={curriculum.warmup_tokens:,} are more than the stable stages have; lower it.")


def check_stage(stage: Stage) -> None:
    total = sum(stage.mixture.values())
    if any(share < 0 for share in stage.mixture.values()):
        raise ValueError(f"There is a negative share in the mixture of stage {stage.name!r}; leave that source out.")
    if abs(total - 1) > MIXTURE_TOLERANCE:
        raise ValueError(
            f"The mixture of stage {stage.name!r} sums to {total:g}, not 1; mend the shares, or set normalise_mixture: true."
        )
    shares = [level.share for level in stage.context]
    if not shares or min(shares) <= 0 or abs(sum(shares) - 1) > MIXTURE_TOLERANCE:
        raise ValueError(f"The context shares of stage {stage.name!r} sum to {sum(shares):g}, not 1; mend them.")
    if stage.tokens <= 0:
        raise ValueError(f"Stage {stage.name!r} has {stage.tokens} tokens; give 1 or more.")
    for name, value, allowed in (("phase", stage.phase, PHASES), ("order", stage.order, ORDERS)):
        if value not in allowed:
            raise ValueError(
                f"{name}={value!r} of stage {stage.name!r} does not exist; use one of {', '.join(allowed)}."
            )
    longest = max(level.length for level in stage.context)
    smallest = min(stage.batch_tokens, stage.batch_tokens_start or stage.batch_tokens)
    if min(level.length for level in stage.context) < 2 or longest > smallest:
        raise ValueError(
            f"Stage {stage.name!r} has contexts up to {longest:,} tokens and batches from {smallest:,}: a batch holds no row; "
            "raise batch_tokens, or shorten the context to 2 or more."
        )


# -- shrinking ----------------------------------------------------------------------------------------------------
def scaled(curriculum: Curriculum, scale: float, rows: int = 1) -> Curriculum:
    """Every count of tokens times `scale`: stages, warm-up, ramps. Contexts and batches shrink, all by one power of two each,
    only as far as a level of the shortest stage would otherwise hold no batch, or a batch not the `rows` that ranks and
    accumulation steps share.

    ValueError where even contexts of `SHORTEST_CONTEXT` tokens do not fit.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale={scale} is no share of the run; use a number above 0 and up to 1.")
    if scale == 1:
        return curriculum
    stages = [
        replace(s, tokens=round(s.tokens * scale), batch_ramp_tokens=round(s.batch_ramp_tokens * scale))
        for s in curriculum.stages
    ]
    levels = [(s.tokens * level.share, level.length, s.batch_tokens) for s in stages for level in s.context]
    shorter = _halvings((rows * length, tokens) for tokens, length, _ in levels)
    smaller = max(shorter, _halvings((batch, tokens) for tokens, _, batch in levels))
    if rows > 1:
        shorter = max(shorter, _halvings((rows * length, batch >> smaller) for _, length, batch in levels))
    shortest = min(length for _, length, _ in levels) >> shorter
    if shortest < SHORTEST_CONTEXT:
        shared = f" for {rows} ranks times accumulation steps" if rows > 1 else ""
        raise ValueError(
            f"At scale={scale:g} the smallest level has {min(tokens for tokens, _, _ in levels):,.0f} tokens and contexts would "
            f"shrink to {shortest}{shared}; use a larger scale."
        )
    shrunk = [
        replace(
            s,
            context=tuple(
                replace(level, length=level.length >> shorter, rope=_shorter(level.rope, shorter))
                for level in s.context
            ),
            batch_tokens=s.batch_tokens >> smaller,
            batch_tokens_start=s.batch_tokens_start
            and max(s.batch_tokens_start >> smaller, rows * (s.context[-1].length >> shorter)),
        )
        for s in stages
    ]
    return replace(curriculum, stages=tuple(shrunk), warmup_tokens=round(curriculum.warmup_tokens * scale))


def _halvings(pairs) -> int:
    """How often every first number must be halved until none is larger than its second."""
    return max(max(0, math.ceil(math.log2(size / max(room, 1)))) for size, room in pairs)


def _shorter(rope: Mapping[str, Any] | None, halvings: int) -> Mapping[str, Any] | None:
    """RoPE's own context shrinks along with the rows."""
    name = "original_max_position_embeddings"
    return {**rope, name: rope[name] >> halvings} if rope and name in rope else rope


# -- laying out ---------------------------------------------------------------------------------------------------
def level_tokens(stage: Stage, row_multiple: int = 1) -> list[int]:
    """Tokens of each level, whole groups of `row_multiple` rows, as near to the stage's own as they come."""
    edges = [0, *accumulate(level.share * stage.tokens for level in stage.context)]
    counts, done = [], 0
    for level, edge in zip(stage.context, edges[1:]):
        group = level.length * row_multiple
        # What an earlier level was short of, this one makes up for.
        counts.append(round((edge - done) / group) * group)
        done += counts[-1]
    return counts


def plan_steps(curriculum: Curriculum, row_multiple: int = 1) -> Iterator[Step]:
    """Every optimizer step of the run. `row_multiple`: ranks x accumulation, which must share a step's rows evenly.

    ValueError for a level that comes to no step at all, more than `MOST_STEPS` in a stage, and batches with fewer rows than
    `row_multiple`.
    """
    for stage in curriculum.stages:
        if (steps := stage.tokens / stage.batch_tokens) > MOST_STEPS:
            raise ValueError(
                f"Stage {stage.name!r} has {stage.tokens:,} tokens in batches of {stage.batch_tokens:,}, {steps:.0e} steps; "
                f"give it at most {MOST_STEPS:,}, by larger batches or fewer tokens."
            )
    before = 0
    for number, stage in enumerate(curriculum.stages):
        begun = before
        for place, (level, tokens) in enumerate(zip(stage.context, level_tokens(stage, row_multiple))):
            group = level.length * row_multiple
            if tokens < group:
                raise ValueError(
                    f"Stage {stage.name!r} gives {level.share:.0%} of {stage.tokens:,} tokens to rows of {level.length}, not "
                    f"enough for {row_multiple} of them, one a rank and accumulation step; use fewer, or a larger stage."
                )
            left = tokens
            while left:
                size = batch_ramp(
                    before - begun,
                    start=stage.batch_tokens_start or stage.batch_tokens,
                    end=stage.batch_tokens,
                    ramp=stage.batch_ramp_tokens,
                )
                if size < group and row_multiple > 1:
                    raise ValueError(
                        f"Stage {stage.name!r} has batches of {int(size):,} tokens, {int(size / level.length):,} rows of "
                        f"{level.length:,}, and {row_multiple:,} ranks times accumulation steps; use fewer, or a larger "
                        "batch_tokens or scale."
                    )
                # Scaled down, a batch may be shorter than a row: then one row.
                rows = min(max(int(size / group), 1) * row_multiple, left // level.length)
                # The middle of a step stands for it: the first one is not trained at a learning rate of 0.
                middle = before + rows * level.length / 2
                yield Step(number, place, before, level.length, rows, curriculum.learning(middle))
                before, left = before + rows * level.length, left - rows * level.length
